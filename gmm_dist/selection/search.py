"""The search for one mixture: its steps, and the jobs that they ask for.

Steps are generators. They yield jobs, which are pure functions of samples, and go on with their
results; they do no arithmetic over rows themselves. So whoever does the jobs, in whatever order,
the steps end alike. Lanes of one k share the passes of a job while these are small; beyond that
each goes its own way, so that even a single large k keeps several workers busy. How lanes are
dealt to jobs depends on the samples and on k alone, as do the bits.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

from gmm_dist.config import EMConfig, StartConfig
from gmm_dist.em import loop
from gmm_dist.em.degenerate import is_useless
from gmm_dist.em.lane import Lane, Status
from gmm_dist.em.memory import lane_bytes
from gmm_dist.em.statistics import TotalMoments
from gmm_dist.model.covariance import TYPE_OF
from gmm_dist.model.parameters import Parameters
from gmm_dist.selection import split_merge
from gmm_dist.selection.ranking import Candidate
from gmm_dist.selection.samples import Rows, Samples, Seeds
from gmm_dist.shards.protocol import Job
from gmm_dist.streams import Stream, keyed_generator

# EM iterations: of a seeded start, of a move's trial, of a short run, on the larger sample.
_FIRST, _TRIAL, _SHORT, LONG = 10, 12, 20, 100
# Gains (nats per row) below which a short run or a round of moves has stalled, and a run on the
# larger sample is done; on all rows EM goes on to the user's tol.
_SHORT_TOL, _LONG_TOL = 1e-4, 1e-5
TRAIL = 32
"""The largest k on the trail."""

_KEPT = 3  # from the small sample to the larger
# A full covariance needs this times d + 1 rows: with fewer its correlations fit noise, which gains
# hundreds of nats without any structure (at d = 60 more than two real clusters gain).
_SOUND = 2
_PROPOSALS = 4  # moves tried in a round
# Of so many components one is split at once: of thousands, a single split gains next to nothing.
_ALONE = 16
_PATIENCE = 2  # rounds without a gain, the second with the moves that promise next most
_GROWN, _FRESH = 2, 2  # splits and seeded starts that the trail tries for each size
_STATISTICS_BYTES = 1 << 29  # of the lanes of a job that run at once
# Numbers, of features and of components of all rows, that make a pass worth a job of its own: for
# fewer, what is the same for every lane takes most of the time.
_WORTH = 1 << 26

Sieve = tuple[tuple[int, int], ...]
"""After how many iterations how many lanes are left."""

# Which of like starts is best shows early: those that are behind then seldom win.
_SEEDS_SIEVE: Sieve = ((4, 8), (7, 4))
_GROWN_SIEVE: Sieve = ((6, 2),)
_MOVES_SIEVE: Sieve = ((5, 3),)

T = TypeVar("T")
Asked = tuple[Samples, Sequence[Job[Any]]]
Steps = Generator[Asked, list[Any], T]
"""Yields the jobs whose results it needs next, and returns what they lead to."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Run:
    """The job of EM from some starts, all lanes in the same passes over a sample."""

    starts: Sequence[Parameters]
    config: EMConfig
    sample: str = "small"
    sieve: Sieve = ()
    rivals: bool = False

    def __call__(self, samples: Samples) -> list[loop.FitResult]:
        rows = samples[self.sample]
        return run(rows, self.starts, self.config, sieve=self.sieve, rivals=self.rivals)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RunSeeds:
    """The job of EM from some of the seeded starts, on the small sample."""

    seeds: Seeds
    candidate: Candidate
    rounds: range
    config: EMConfig

    def __call__(self, samples: Samples) -> list[loop.FitResult]:
        of = self.candidate
        sample = samples.small.sample
        starts = self.seeds.starts(sample, of.k, of.covariance_type, self.rounds)
        return run(samples.small, starts, self.config, sieve=_SEEDS_SIEVE)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Grow:
    """The job that makes starts of one component more: the best splits, and seeded ones."""

    candidate: Candidate
    before: Parameters | None
    random_state: int

    def __call__(self, samples: Samples) -> list[Parameters]:
        k, kind, rows = self.candidate.k, self.candidate.covariance_type, samples.trail
        few = StartConfig(n_init=_FRESH, random_state=self.random_state)
        fresh = Seeds(start=few, total=rows.total, stream=Stream.TRAIL_STARTS)
        starts = fresh.starts(rows.sample, k, kind, range(fresh.n_starts(k)))
        if self.before is not None:
            generator = keyed_generator(Stream.TRAIL_SPLITS, self.random_state, k)
            splits = rows.splits(self.before, generator)
            starts += [_split(self.before, split) for split in splits[:_GROWN]]
        return starts


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Propose:
    """The job that makes the mixtures one move away from a fit that promise most."""

    parameters: Parameters
    degenerate: Bool[Tensor, " k"]
    stream: Stream
    random_state: int
    round: int

    def __call__(self, samples: Samples) -> list[Parameters]:
        rows, parameters = samples.small, self.parameters
        splits = rows.splits(
            parameters, keyed_generator(self.stream, self.random_state, self.round)
        )
        merges = split_merge.merges(parameters, rows.total.n_samples)
        limit, at_once = _PATIENCE * _PROPOSALS, parameters.n_components // _ALONE
        moved = split_merge.split_and_merge(parameters, splits, merges, limit, at_once)
        if bool(self.degenerate.any()):
            repaired = split_merge.replace(parameters, self.degenerate, splits)
            return moved if repaired is None else [repaired, *moved]
        return moved


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Repair:
    """The job that puts a fit's useless components elsewhere, and runs EM on the larger sample."""

    parameters: Parameters
    degenerate: Bool[Tensor, " k"]
    config: EMConfig
    random_state: int

    def __call__(self, samples: Samples) -> list[Parameters]:
        generator = keyed_generator(Stream.REPAIRS, self.random_state)
        splits = samples.large.splits(self.parameters, generator)
        repaired = split_merge.replace(self.parameters, self.degenerate, splits)
        if repaired is None:
            return []
        of = candidate_of(self.parameters)
        if stand_in(of, samples) != of:
            return [repaired]
        (refit,) = run(samples.large, [repaired], self.config)
        return [refit.parameters] if refit.is_ranked else []


def stand_in(candidate: Candidate, samples: Samples) -> Candidate:
    """Return what is searched for in place of a candidate: it, unless its rows are too few.

    Each covariance of many components may have fewer rows of the samples than it has features.
    Where the clusters lie, variances alone tell as well, in a d-th of the time; all rows then give
    the covariances.
    """
    lighter, rows = TYPE_OF[candidate.covariance_type].lighter, samples.small
    needed = _SOUND * (rows.n_features + 1) * candidate.k
    if lighter is None or candidate.k <= TRAIL or needed <= len(rows.sample.X):
        return candidate
    return Candidate(candidate.k, lighter)


def as_type(mixture: Parameters, kind: str) -> Parameters:
    """Return a mixture as one of a type of which its own is the lighter one."""
    covariances = TYPE_OF[kind].of_variances(mixture.covariances)
    return replace(mixture, covariances=covariances, covariance_type=kind)


def run(
    rows: Rows,
    starts: Sequence[Parameters],
    config: EMConfig,
    *,
    sieve: Sieve = (),
    rivals: bool = False,
) -> list[loop.FitResult]:
    """Run EM on a sample, and return the fits of the lanes that ran to the end.

    As many lanes run at once as memory allows, at least one of which is not dropped.

    Args:
        rows: The sample.
        starts: One mixture for each lane, of one shape.
        config: Settings of the loop.
        sieve: After how many iterations how many lanes are left.
        rivals: Whether those that will not catch up are dropped.
    """
    if not starts:
        return []
    shapes = [(start.n_components, start.covariance_type) for start in starts]
    at_once = max(1, len(starts) * _STATISTICS_BYTES // lane_bytes(shapes, rows.n_features))
    results: list[loop.FitResult] = []
    for first in range(0, len(starts), at_once):
        lanes = [Lane.start(s, config, rows.total) for s in starts[first : first + at_once]]
        loop.run(
            rows.shards,
            lanes,
            config,
            rows.total,
            rivals=[0] * len(lanes) if rivals else None,
            watch=functools.partial(_sift, sieve, rows.total),
        )
        fits = [loop.result_of(lane, rows.total) for lane in lanes]
        results += [fit for fit in fits if fit.status is not Status.DROPPED]
    return results


def _sift(sieve: Sieve, total: TotalMoments, lanes: Sequence[Lane]) -> None:
    """Drop the lanes that are behind, once all have come as far as the sieve says."""
    left = [lane for lane in lanes if lane.status is not Status.DROPPED]
    for n_iter, n_kept in sieve:
        if len(left) > n_kept and all(x.n_iter >= n_iter or not x.is_running for x in left):
            left.sort(key=lambda lane: (not is_useless(lane, total), lane.lower_bound))
            for lane in left[:-n_kept]:
                lane.status = Status.DROPPED
            left = left[-n_kept:]


@dataclass(slots=True, eq=False)
class _Fits:
    """The best fits of one k so far, all on the same rows, one of each optimum."""

    n_samples: float
    best_first: list[loop.FitResult] = field(default_factory=list)

    def add(self, fits: Sequence[loop.FitResult]) -> None:
        """Add fits, and drop those that are no longer among the best."""
        for fit in fits:
            ranked = sorted([*self.best_first, fit], key=_merit, reverse=True)
            distinct = ranked[:1]
            for other in ranked[1:]:
                gap = abs(distinct[-1].log_likelihood - other.log_likelihood)
                if not gap < _SHORT_TOL * self.n_samples:
                    distinct.append(other)
            self.best_first = distinct[:_KEPT]

    @property
    def best(self) -> loop.FitResult:
        return self.best_first[0]

    @property
    def mixtures(self) -> list[Parameters]:
        return [fit.parameters for fit in self.best_first]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Search:
    """The search for one candidate; `warm` are mixtures about the centre of any shape."""

    candidate: Candidate
    samples: Samples
    seeds: Seeds
    config: EMConfig
    start: StartConfig
    warm: Sequence[Parameters] = ()

    def seeded(self) -> Steps[list[loop.FitResult]]:
        """Return the best seeded starts after a few steps of EM."""
        n_starts = self.seeds.n_starts(self.candidate.k)
        rounds = _parts(n_starts, self.candidate, self.samples.small)
        found = yield from self._fits(
            [
                RunSeeds(
                    seeds=self.seeds,
                    candidate=self.candidate,
                    rounds=range(n_starts)[part],
                    config=self._trial(_FIRST),
                )
                for part in rounds
            ]
        )
        best = _Fits(self.samples.small.total.n_samples)
        best.add(found)
        return best.best_first

    def finalists(
        self, seeded: Sequence[loop.FitResult], on_trail: Sequence[Parameters]
    ) -> Steps[list[Parameters]]:
        """Return the finalists on the larger sample, the best first."""
        small, large = (
            _Fits(rows.total.n_samples) for rows in (self.samples.small, self.samples.large)
        )
        starts = [*(fit.parameters for fit in seeded), *on_trail]
        small.add((yield from self._run(starts, self._short)))
        yield from self._improve(small, Stream.MOVES, "small")
        warm = [mixture for mixture in self.warm if self.candidate == candidate_of(mixture)]
        long = replace(self.config, max_iter=LONG, tol=max(self.config.tol, _LONG_TOL))
        large.add((yield from self._run([*small.mixtures, *warm], long, "large", rivals=True)))
        yield from self._improve(large, Stream.LATE_MOVES, "large")
        return large.mixtures[: self.start.finalists]

    def grown(self, before: Parameters | None) -> Steps[Parameters]:
        """Return the trail's mixture of this size; `before` is that of one component less."""
        grow = Grow(candidate=self.candidate, before=before, random_state=self.start.random_state)
        (starts,) = yield self.samples, [grow]
        fits = _Fits(self.samples.trail.total.n_samples)
        fits.add((yield from self._run(starts, self._short, "trail", sieve=_GROWN_SIEVE)))
        return fits.best.parameters

    def _improve(self, fits: _Fits, stream: Stream, sample: str) -> Steps[None]:
        """Move the best of the fits while that gains; moves are tried on the small sample."""
        proposals: list[Parameters] = []
        for round in range(self.start.moves):
            before = fits.best
            if before.status is Status.COLLAPSED:
                return
            if not proposals:
                propose = Propose(
                    parameters=before.parameters,
                    degenerate=before.degenerate,
                    stream=stream,
                    random_state=self.start.random_state,
                    round=round,
                )
                (proposals,) = yield self.samples, [propose]
                if not proposals:
                    return
            tried, proposals = proposals[:_PROPOSALS], proposals[_PROPOSALS:]
            trials = _Fits(self.samples.small.total.n_samples)
            trial = self._trial(_TRIAL)
            trials.add((yield from self._run(tried, trial, sieve=_MOVES_SIEVE)))
            longer = replace(self._short, max_iter=2 * _SHORT)
            fits.add((yield from self._run(trials.mixtures, longer, sample, rivals=True)))
            if _gained(before, fits.best, fits.n_samples):
                proposals = []
            elif not proposals:
                return

    def _run(
        self,
        starts: Sequence[Parameters],
        config: EMConfig,
        sample: str = "small",
        *,
        sieve: Sieve = (),
        rivals: bool = False,
    ) -> Steps[list[loop.FitResult]]:
        parts = _parts(len(starts), self.candidate, self.samples[sample])
        runs = [
            Run(starts=starts[part], config=config, sample=sample, sieve=sieve, rivals=rivals)
            for part in parts
        ]
        return (yield from self._fits(runs))

    def _fits(self, runs: Sequence[Job[Any]]) -> Steps[list[loop.FitResult]]:
        found = (yield self.samples, runs) if runs else []
        return [fit for fits in found for fit in fits]

    @property
    def _short(self) -> EMConfig:
        return replace(self.config, max_iter=_SHORT, tol=max(self.config.tol, _SHORT_TOL))

    def _trial(self, n_iter: int) -> EMConfig:
        """Return settings for a few steps, without acceleration: it does not pay in so few."""
        return replace(self._short, max_iter=n_iter, accelerate=False)


def _parts(n_lanes: int, candidate: Candidate, rows: Rows) -> list[slice]:
    """Deal lanes to jobs: as many jobs as there is work for, with like numbers of lanes."""
    width = candidate.k * TYPE_OF[candidate.covariance_type].n_rows(rows.n_features)
    n_jobs = max(1, min(n_lanes, n_lanes * width * len(rows.sample.X) // _WORTH))
    edges = [n_lanes * i // n_jobs for i in range(n_jobs + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges) if a < b]


def candidate_of(parameters: Parameters) -> Candidate:
    """Return the candidate that a mixture is one of."""
    return Candidate(parameters.n_components, parameters.covariance_type)


def _merit(fit: loop.FitResult) -> tuple[bool, float]:
    """Return the key that orders fits: their likelihood, less what fitting noise may gain."""
    return fit.is_ranked, fit.log_likelihood - (_noise_gain(fit) if fit.is_ranked else 0.0)


def _noise_gain(fit: loop.FitResult) -> float:
    """Return how many nats components of hardly more rows than d gain by their correlations.

    By the variances alone they would be worth n_k / 2 · ln(|diag Σ| / |Σ|) less. A small cluster
    far from all others is worth far more than that.
    """
    few = fit.rows < _SOUND * (fit.parameters.n_features + 1)
    family = fit.parameters.type
    if family.is_shared or not family.has_products or not bool(few.any()):
        return 0.0
    covariances = fit.parameters.covariances[few]
    diagonal_log_det = covariances.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return float(fit.nk[few] @ (diagonal_log_det - torch.linalg.slogdet(covariances)[1])) / 2


def _gained(before: loop.FitResult, after: loop.FitResult, n_samples: float) -> bool:
    (*rank, now), (*rank_before, then) = _merit(after), _merit(before)
    return rank > rank_before or (rank == rank_before and now - then > _SHORT_TOL * n_samples)


def _split(parameters: Parameters, split: split_merge.Split) -> Parameters:
    return split_merge.apply(parameters, drop=[split.component], add=split.parts)

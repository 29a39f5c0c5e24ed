"""Search for starts: many short runs on a sample, moves where they stall; keep the best few.

The search works on samples that the driver holds, so it costs about as much as a few passes over
a lake. The starts for a k depend on the rows, the random state and k alone, not on the other
candidates. Each k is searched separately, with its lanes in separate passes, so that even the
bits are the same in any grid:

1. `n_init` seeded starts run a few steps of EM each on a small sample; beside them the mixture of
   k components on the trail, which always begins at one component;
2. rounds of moves from the best, each a split and a merge at once, while they gain;
3. the best few run on a larger sample until they stand still, and are moved again.

The trail lets a k begin where a smaller one ended: from size to size the best mixture is split, in
the most promising ways, and runs on the small sample beside two fresh starts.
It ends at k = 32; a larger k has only its seeded starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from gmm_dist.config import EMConfig, StartConfig
from gmm_dist.em import loop
from gmm_dist.em.estep import SumMoments
from gmm_dist.em.lane import Status
from gmm_dist.em.memory import lane_bytes
from gmm_dist.em.statistics import TotalMoments
from gmm_dist.model.densities import Densities
from gmm_dist.model.parameters import Parameters
from gmm_dist.selection import kmeans, split_merge
from gmm_dist.selection.coreset import Coreset, DrawCoreset, Whitening, whitening
from gmm_dist.selection.ranking import Candidate
from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import Shards
from gmm_dist.streams import Stream, keyed_generator

TRAIL = 32
"""The largest k on the trail."""

# EM iterations: of a seeded start, of a move's trial, of a short run, on the larger sample.
_FIRST, _TRIAL, _SHORT, _LONG = 10, 12, 20, 100
# Gains (nats per row) below which a short run or a round of moves has stalled, and a run on the
# larger sample is done; on all rows EM goes on to the user's tol.
_SHORT_TOL, _LONG_TOL = 1e-4, 1e-5
_ROWS_PER_MEAN = 50  # rows of the small sample, per value in the means
_TIER = 8  # all k up to this one share a sample, then all up to the next power of two
_FEWEST_ROWS, _MOST_ROWS = (2048, 10_000), 65_536
_POOL, _FEWEST_POOL = 4, 32_768  # the larger sample: times the small one, and rows at least
_KEPT = 3  # from the small sample to the larger
# A full covariance needs this times d + 1 rows: with fewer its correlations fit noise, which gains
# hundreds of nats without any structure (at d = 60 more than two real clusters gain).
_SOUND = 2
_PROPOSALS = 4  # moves tried in a round
_GROWN, _FRESH = 2, 2  # splits and seeded starts that the trail tries for each size
_SHARDS, _SHARD_ROWS = 8, 4096  # shards at the most, and rows of each at least
_STATISTICS_BYTES = 1 << 29  # of the lanes that run at once


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


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """A sample as shards in this process, with its moments."""

    sample: Coreset
    shards: LocalShards
    total: TotalMoments

    @classmethod
    def of(cls, sample: Coreset, whole: TotalMoments, n_threads: int) -> _Rows:
        X, weight = sample.X, sample.sample_weight
        n_shards = min(_SHARDS, max(1, len(X) // _SHARD_ROWS))
        # One shard is worked on in the caller's thread: calling another takes longer than the pass.
        threads = 0 if n_shards == 1 else n_threads
        local = LocalShards.of(X, weight, n_shards=n_shards, n_threads=threads)
        total = local.run(SumMoments(X.shape[1], whole.is_whole))
        total = replace(total, spikes=whole.spikes)
        return cls(sample, local, total)

    def run(self, starts: Sequence[Parameters], config: EMConfig) -> list[loop.FitResult]:
        """Run EM from all starts, as many at once as memory allows."""
        if not starts:
            return []
        lanes = [(start.n_components, start.covariance_type) for start in starts]
        size = lane_bytes(lanes, self.n_features)
        at_once = max(1, len(starts) * _STATISTICS_BYTES // size)
        results: list[loop.FitResult] = []
        for first in range(0, len(starts), at_once):
            batch = starts[first : first + at_once]
            results += loop.fit(self.shards, batch, config, self.total)
        return results

    def splits(self, parameters: Parameters, generator: torch.Generator) -> list[split_merge.Split]:
        """Return the splits of the mixture's components, computed from these rows' labels."""
        X, weight = self.sample.X, self.sample.sample_weight
        return split_merge.splits(parameters, X, weight, _labels(parameters, X), generator)

    @property
    def n_features(self) -> int:
        return self.sample.X.shape[1]


def find_starts(
    shards: Shards,
    candidates: Sequence[Candidate],
    config: EMConfig,
    start: StartConfig,
    total: TotalMoments,
    *,
    warm: Sequence[Parameters] = (),
    n_threads: int = 1,
) -> list[list[Parameters]]:
    """Return for each candidate the starts worth full passes, the best first.

    Args:
        shards: All rows, about their shared centre.
        candidates: (k, covariance type) each.
        config: Settings of the loop.
        start: Settings of the search.
        total: Moments of all rows.
        warm: Mixtures about the centre that join the search for a candidate of their shape.
        n_threads: Threads of this process that work on the sample; results do not depend on it.

    Starts are about the rows' shared centre.
    """
    search = _Search(config, start, warm)
    sampler = _Sampler(shards=shards, start=start, total=total, n_threads=n_threads)
    trail: dict[str, Parameters] = {}
    starts: dict[Candidate, list[Parameters]] = {}
    for candidate in _with_trail(candidates):
        k, kind = candidate.k, candidate.covariance_type
        samples = sampler.samples(k)
        if k <= TRAIL:
            trail[kind] = search.extend_trail(samples.small, k, kind, trail.get(kind))
        if candidate in candidates:
            seeded = sampler.seeds(k).starts(samples.small.sample, k, kind)
            starts[candidate] = search(samples, seeded, [trail[kind]] if k <= TRAIL else [])
    return [starts[candidate] for candidate in candidates]


def repair_degenerate(
    shards: Shards,
    fits: Sequence[loop.FitResult],
    config: EMConfig,
    start: StartConfig,
    total: TotalMoments,
    *,
    n_threads: int = 1,
) -> list[list[Parameters]]:
    """Return for each fit a list with a start to replace it if it is degenerate, else no start.

    The start drops the fit's useless components, splits those that gain most, and has run EM on a
    coreset. There is none where too few components can be split.

    Args:
        shards: All rows, about their shared centre.
        fits: Fits on all rows.
        config: Settings of the loop.
        start: Settings of the search.
        total: Moments of all rows.
        n_threads: Threads of this process that work on the sample; results do not depend on it.
    """
    # Nothing is seeded here.
    sampler = _Sampler(
        shards=shards, start=replace(start, init="k-means++"), total=total, n_threads=n_threads
    )
    degenerate = [i for i, fit in enumerate(fits) if fit.status is Status.DEGENERATE]
    starts: list[list[Parameters]] = [[] for _ in fits]
    for i in sorted(degenerate, key=lambda i: fits[i].parameters.n_components):
        parameters = fits[i].parameters
        rows = sampler.samples(parameters.n_components).large
        splits = rows.splits(parameters, keyed_generator(Stream.REPAIRS, start.random_state))
        if repaired := split_merge.replace(parameters, fits[i].degenerate, splits):
            (refit,) = rows.run([repaired], replace(config, max_iter=_LONG))
            starts[i] = [refit.parameters] if refit.is_ranked else []
    return starts


def _with_trail(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates and the smaller sizes on their trails, in the order of k."""
    ends = [candidate for candidate in candidates if candidate.k <= TRAIL]
    smaller = {Candidate(k, end.covariance_type) for end in ends for k in range(1, end.k)}
    return sorted(smaller.union(candidates))


@dataclass(frozen=True, slots=True, eq=False)
class _Samples:
    """The small and the larger sample of the rows on which one k is searched."""

    small: _Rows
    large: _Rows


@dataclass(slots=True, eq=False, kw_only=True)
class _Sampler:
    """Draws the samples for each k, which depend on the rows, the random state and k alone.

    Only the last ones are kept: call in the order of k.
    """

    shards: Shards
    start: StartConfig
    total: TotalMoments
    n_threads: int
    _drawn: tuple[int, _Samples] | None = None
    _seeds: tuple[int, _Seeds] | None = None

    def samples(self, k: int) -> _Samples:
        size = self._size(k)
        if self._drawn is None or self._drawn[0] != size:
            self._drawn = size, self._draw(size)
        return self._drawn[1]

    def seeds(self, k: int) -> _Seeds:
        """Return the source of seeded starts; k-means|| takes a few passes over all rows."""
        tier = _tier(k)
        if self._seeds is None or self._seeds[0] != tier:
            self._seeds = tier, _Seeds.of(self.shards, tier, self.start, self.total)
        return self._seeds[1]

    def _draw(self, size: int) -> _Samples:
        n_pool, seed = _pool_size(size, self.total), self.start.random_state
        pool = self.shards.run(DrawCoreset.of(self.total, n_pool, Stream.POOL, seed))
        part = pool.part(size, keyed_generator(Stream.SAMPLE, seed))
        small = _Rows.of(part.per_row(), self.total, self.n_threads)
        if len(pool.X) == len(part.X):
            return _Samples(small, small)
        return _Samples(small, _Rows.of(pool.per_row(), self.total, self.n_threads))

    def _size(self, k: int) -> int:
        """Return the number of rows of the small sample: `n_sample`, or enough for k's means."""
        if self.start.n_sample:
            return self.start.n_sample
        wanted, n_rows = _ROWS_PER_MEAN * _tier(k) * len(self.total.sum_x), self.total.n_rows
        few, many = _FEWEST_ROWS
        return min(max(wanted, min(max(n_rows // 16, few), many)), _MOST_ROWS)


def _tier(k: int) -> int:
    return max(_TIER, 1 << (k - 1).bit_length())


@dataclass(frozen=True, slots=True, eq=False)
class _Search:
    """The search for one k, from its seeded starts and from the trail's mixture."""

    config: EMConfig
    start: StartConfig
    warm: Sequence[Parameters]

    def __call__(
        self, samples: _Samples, seeded: Sequence[Parameters], on_trail: Sequence[Parameters]
    ) -> list[Parameters]:
        """Return the finalists on the larger sample, the best first."""
        small, large = samples.small, samples.large
        seeded_fits, small_fits = _Fits(small.total.n_samples), _Fits(small.total.n_samples)
        large_fits = _Fits(large.total.n_samples)
        seeded_fits.add(small.run(seeded, self._trial(_FIRST)))
        small_fits.add(small.run([*seeded_fits.mixtures, *on_trail], self._short))
        self._improve(small_fits, small, small, Stream.MOVES)
        warm = [m for m in self.warm if _candidate_of(m) == _candidate_of(seeded[0])]
        long = replace(self.config, max_iter=_LONG, tol=max(self.config.tol, _LONG_TOL))
        large_fits.add(large.run([*small_fits.mixtures, *warm], long))
        self._improve(large_fits, large, small, Stream.LATE_MOVES)
        return large_fits.mixtures[: self.start.finalists]

    def extend_trail(self, rows: _Rows, k: int, kind: str, before: Parameters | None) -> Parameters:
        """Return the trail's mixture of k components; `before` is that of k - 1."""
        few = replace(self.start, init="k-means++", n_init=_FRESH)
        fresh = _Seeds(start=few, total=rows.total, stream=Stream.TRAIL_STARTS)
        starts = fresh.starts(rows.sample, k, kind)
        if before is not None:
            generator = keyed_generator(Stream.TRAIL_SPLITS, self.start.random_state, k)
            splits = rows.splits(before, generator)
            starts += [_split(before, split) for split in splits[:_GROWN]]
        fits = _Fits(rows.total.n_samples)
        fits.add(rows.run(starts, self._short))
        return fits.best.parameters

    @property
    def _short(self) -> EMConfig:
        return replace(self.config, max_iter=_SHORT, tol=max(self.config.tol, _SHORT_TOL))

    def _trial(self, n_iter: int) -> EMConfig:
        """Return settings for a few steps, without acceleration: it does not pay in so few."""
        return replace(self._short, max_iter=n_iter, accelerate=False)

    def _improve(self, fits: _Fits, rows: _Rows, small: _Rows, stream: Stream) -> None:
        """Move the best of `rows`' fits while that gains; moves are tried on the small sample."""
        for round in range(self.start.moves):
            before, trials = fits.best, _Fits(small.total.n_samples)
            generator = keyed_generator(stream, self.start.random_state, round)
            proposals = _proposals(small, before, generator)
            if not proposals:
                return
            trials.add(small.run(proposals, self._trial(_TRIAL)))
            fits.add(rows.run(trials.mixtures, replace(self._short, max_iter=2 * _SHORT)))
            if not _gained(before, fits.best, fits.n_samples):
                return


def _pool_size(size: int, total: TotalMoments) -> int:
    wanted = max(_POOL * size, _FEWEST_POOL)
    # Where half of the rows would be drawn, take all: a coreset of twice their number keeps each.
    return wanted if 2 * wanted < total.n_rows else 2 * total.n_rows


def _candidate_of(parameters: Parameters) -> Candidate:
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


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Seeds:
    """The source of seeded starts: the method, and k-means||'s candidates from all rows."""

    start: StartConfig
    total: TotalMoments
    stream: Stream
    parallel: tuple[Float64[Tensor, "c d"], Float64[Tensor, " c"]] | None = None

    @classmethod
    def of(cls, shards: Shards, most: int, start: StartConfig, total: TotalMoments) -> _Seeds:
        """Return the source for up to `most` components."""
        parallel = None
        if start.init == "k-means||":
            parallel = kmeans.k_means_parallel(shards, total, most, random_state=start.random_state)
        return cls(start=start, total=total, stream=Stream.STARTS, parallel=parallel)

    def starts(self, sample: Coreset, k: int, kind: str) -> list[Parameters]:
        """Return `n_init` starts of k components; of one component all would be the same."""
        X, weight = sample.X, sample.sample_weight
        starts, pooled = [], kmeans.Pooled.of(X, weight, kind)
        n_starts = self.start.n_init if k > 1 else 1
        maps = [(whiten, whiten(X)) for whiten in self._maps()[:n_starts]]
        for round in range(n_starts):
            generator = keyed_generator(self.stream, self.start.random_state, round)
            shares = self._assignment(weight, k, *maps[round % len(maps)], generator)
            starts.append(kmeans.start_of(X, weight, shares, k, kind, pooled))
        return starts

    def _maps(self) -> list[Whitening]:
        """Return the coordinates that seeded starts use in turn.

        Whitened ones separate clusters along a direction in which all rows together vary little;
        scaled ones separate clusters far apart in many dimensions, which whitening draws close.
        """
        scaled = Whitening(self.total.mean, self.total.scale.reciprocal())
        return [scaled, whitening(self.total)] if self.total.is_whole else [scaled]

    def _assignment(
        self, weight: Tensor, k: int, whiten: Whitening, Z: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Share rows, at `Z` in the coordinates of `whiten`, among k components."""
        if self.parallel is None:
            return kmeans.assignments(self.start.init, Z, weight, [k], generator)[k]
        rows, mass_near = self.parallel
        candidates = whiten(rows)
        labels = kmeans.assignments("kmeans", candidates, mass_near, [k], generator)[k]
        member = torch.nn.functional.one_hot(labels, k).double() * mass_near[:, None]
        mass = member.sum(0).clamp_min(1e-300)
        return kmeans.nearest(Z, (member.T @ candidates) / mass[:, None])


def _gained(before: loop.FitResult, after: loop.FitResult, n_samples: float) -> bool:
    (*rank, now), (*rank_before, then) = _merit(after), _merit(before)
    return rank > rank_before or (rank == rank_before and now - then > _SHORT_TOL * n_samples)


def _proposals(rows: _Rows, fit: loop.FitResult, generator: torch.Generator) -> list[Parameters]:
    """Return the mixtures one move away that promise most."""
    parameters = fit.parameters
    if fit.status is Status.COLLAPSED:
        return []
    splits = rows.splits(parameters, generator)
    merges = split_merge.merges(parameters, rows.total.n_samples)
    moved = split_merge.split_and_merge(parameters, splits, merges, _PROPOSALS)
    if bool(fit.degenerate.any()):
        repaired = split_merge.replace(parameters, fit.degenerate, splits)
        return moved if repaired is None else [repaired, *moved]
    return moved


def _split(parameters: Parameters, split: split_merge.Split) -> Parameters:
    return split_merge.apply(parameters, drop=[split.component], add=split.parts)


def _labels(parameters: Parameters, X: Float64[Tensor, "m d"]) -> Int64[Tensor, " m"]:
    densities = Densities.of(parameters, X.device)
    return torch.cat([logits.argmax(0) for logits in densities.chunks(X)])

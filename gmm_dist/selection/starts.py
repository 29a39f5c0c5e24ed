"""Search for starts: many short runs on a sample, moves where they stall; keep the best few.

Everything happens on samples that the driver holds, so that a search costs about as much as a
few passes over a lake. What comes of a k depends on the rows, the random state and k alone,
never on what else is asked for. Each k is searched by itself, its lanes in passes of their own,
so that even the bits are the same in any grid:

1. `n_init` seeded starts, a few steps of EM each, on a small sample; beside them what came of the
   trail, which leads there from one component, whichever sizes are asked for;
2. rounds of moves from the best, a split and a merge at once, while anything gains;
3. the best few on a larger sample, until they stand still, and moves again.

The trail is what lets a k begin where a smaller one ended: from size to size the best mixture is
split, in the most promising ways, and runs on the small sample beside two fresh starts.
It ends at k = 32; beyond, each k has its own starts alone.
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
from gmm_dist.model.parameters import Parameters, ParameterStack
from gmm_dist.selection import kmeans, split_merge
from gmm_dist.selection.coreset import Coreset, DrawCoreset, Whitening, keyed_generator, whitening
from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import Shards

Pair = tuple[int, str]
"""k and covariance type."""

TRAIL = 32
"""Up to which k the trail leads."""

# EM iterations of a restart, of a move's trial, of a short run, on the larger sample.
_FIRST, _TRIAL, _SHORT, _LONG = 10, 12, 20, 100
# Gains (nats per row) below which a short run or a round has stalled, and a long one is done: on
# all rows EM goes on to the digit asked for.
_SHORT_TOL, _LONG_TOL = 1e-4, 1e-5
_ROWS_PER_MEAN = 50  # rows of the small sample, per value in the means
_TIER = 8  # sizes share a sample up to this k, then from one power of two to the next
_FEWEST_ROWS, _MOST_ROWS = (2048, 10_000), 65_536
_POOL, _FEWEST_POOL = 4, 32_768  # the larger sample: in small ones, and in rows
_KEPT = 3  # from the small sample to the larger
# Times d + 1 rows that a full covariance needs: with fewer its correlations fit their noise, and
# hundreds of nats are to be had where nothing is (at d = 60 more than two clusters are worth).
_SOUND = 2
_PROPOSALS = 4  # moves tried in a round
_GROWN, _FRESH = 2, 2  # splits and seeded starts that the trail tries for each size
_SHARDS, _SHARD_ROWS = 8, 4096  # shards at the most, and rows of each at least
_CHUNK_ROWS = 4096
_STATISTICS_BYTES = 1 << 29  # of the lanes that run at once
_MENDING, _GROWING = 4, 5  # streams of keyed random numbers


@dataclass(slots=True, eq=False)
class _Field:
    """The best fits of one k so far, all on the same rows; different optima only."""

    n_samples: float
    fits: list[loop.FitResult] = field(default_factory=list)

    def add(self, fits: Sequence[loop.FitResult]) -> None:
        """Enter fits, and let go of what is no longer among the best."""
        for fit in fits:
            ranked = sorted([*self.fits, fit], key=_merit, reverse=True)
            distinct = ranked[:1]
            for other in ranked[1:]:
                gap = abs(distinct[-1].log_likelihood - other.log_likelihood)
                if not gap < _SHORT_TOL * self.n_samples:
                    distinct.append(other)
            self.fits = distinct[:_KEPT]

    @property
    def best(self) -> loop.FitResult:
        return self.fits[0]

    @property
    def mixtures(self) -> list[Parameters]:
        return [fit.parameters for fit in self.fits]


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """A sample as shards in this process, with what its passes need."""

    sample: Coreset
    shards: LocalShards
    total: TotalMoments

    @classmethod
    def of(cls, sample: Coreset, whole: TotalMoments, n_threads: int) -> _Rows:
        X, weight = sample.X, sample.sample_weight
        n_shards = min(_SHARDS, max(1, len(X) // _SHARD_ROWS))
        # Of one shard by the caller's own thread: to call another takes longer than such a pass.
        threads = 0 if n_shards == 1 else n_threads
        local = LocalShards.of(X, weight, n_shards=n_shards, n_threads=threads)
        total = local.run(SumMoments(X.shape[1], whole.is_whole))
        total = replace(total, spikes=whole.spikes)
        return cls(sample, local, total)

    def run(self, starts: Sequence[Parameters], config: EMConfig) -> list[loop.FitResult]:
        """Run EM from all starts, as many at once as memory allows."""
        if not starts:
            return []
        size = lane_bytes([_pair_of(start) for start in starts], self.n_features)
        at_once = max(1, len(starts) * _STATISTICS_BYTES // size)
        results: list[loop.FitResult] = []
        for first in range(0, len(starts), at_once):
            batch = starts[first : first + at_once]
            results += loop.fit(self.shards, batch, config, self.total)
        return results

    def splits(self, parameters: Parameters, generator: torch.Generator) -> list[split_merge.Split]:
        """Return the splits of the mixture's components, by the labels of these rows."""
        X, weight = self.sample.X, self.sample.sample_weight
        return split_merge.splits(parameters, X, weight, _labels(parameters, X), generator)

    @property
    def n_features(self) -> int:
        return self.sample.X.shape[1]


def find_starts(
    shards: Shards,
    pairs: Sequence[Pair],
    config: EMConfig,
    start: StartConfig,
    total: TotalMoments,
    *,
    warm: Sequence[Parameters] = (),
    n_threads: int = 1,
) -> list[list[Parameters]]:
    """Return for each (k, covariance type) the starts worth full passes, the best first.

    Args:
        shards: All rows, about their shared centre.
        pairs: (k, covariance type) of each candidate.
        config: Settings of the loop.
        start: Settings of the search.
        total: Moments of all rows.
        warm: Mixtures about the centre that join the search for their shape, asked for or not.
        n_threads: Threads of this process that work on the sample; they change no bit.

    Starts are about the rows' shared centre.
    """
    climb = _Climb(config, start, warm)
    samples = _Samples(shards=shards, start=start, total=total, n_threads=n_threads)
    trail: dict[str, Parameters] = {}
    found: dict[Pair, list[Parameters]] = {}
    for k, kind in _way(pairs):
        on = samples.of(k)
        if k <= TRAIL:
            trail[kind] = climb.step(on.small, k, kind, trail.get(kind))
        if (k, kind) in pairs:
            starts = samples.seeds(k).starts(on.small.sample, k, kind)
            found[k, kind] = climb(on, starts, [trail[kind]] if k <= TRAIL else [])
    return [found[pair] for pair in pairs]


def repair_degenerate(
    shards: Shards,
    fits: Sequence[loop.FitResult],
    config: EMConfig,
    start: StartConfig,
    total: TotalMoments,
    *,
    n_threads: int = 1,
) -> list[list[Parameters]]:
    """Return for each fit a start in its place, if it is degenerate and there is hope.

    Its useless components go, those that gain most are split instead, and EM runs on a coreset.

    Args:
        shards: All rows, about their shared centre.
        fits: What has been fitted.
        config: Settings of the loop.
        start: Settings of the search.
        total: Moments of all rows.
        n_threads: Threads of this process that work on the sample; they change no bit.
    """
    # Nothing is seeded here.
    samples = _Samples(
        shards=shards, start=replace(start, init="k-means++"), total=total, n_threads=n_threads
    )
    broken = [i for i, fit in enumerate(fits) if fit.status is Status.DEGENERATE]
    found: list[list[Parameters]] = [[] for _ in fits]
    for i in sorted(broken, key=lambda i: fits[i].parameters.n_components):
        parameters = fits[i].parameters
        rows = samples.of(parameters.n_components).large
        apart = rows.splits(parameters, keyed_generator(start.random_state, _MENDING))
        if mended := split_merge.replace(parameters, fits[i].degenerate, apart):
            (again,) = rows.run([mended], replace(config, max_iter=_LONG))
            found[i] = [again.parameters] if again.is_ranked else []
    return found


def _way(pairs: Sequence[Pair]) -> list[Pair]:
    """Return what is asked for and the sizes that lead there, smaller ones first."""
    asked = set(pairs)
    led = [(k, kind) for k, kind in asked if k <= TRAIL]
    return sorted(asked | {(size, kind) for k, kind in led for size in range(1, k)})


@dataclass(frozen=True, slots=True, eq=False)
class _Sample:
    """The rows on which one k is searched, small ones first."""

    small: _Rows
    large: _Rows


@dataclass(slots=True, eq=False, kw_only=True)
class _Samples:
    """The samples of all sizes: each depends on the rows, the random state and its k alone.

    Only the last ones are kept: ask in the order of k.
    """

    shards: Shards
    start: StartConfig
    total: TotalMoments
    n_threads: int
    _drawn: tuple[int, _Sample] | None = None
    _seeds: tuple[int, _Seeds] | None = None

    def of(self, k: int) -> _Sample:
        size = self._size(k)
        if self._drawn is None or self._drawn[0] != size:
            self._drawn = size, self._draw(size)
        return self._drawn[1]

    def seeds(self, k: int) -> _Seeds:
        """Return where the restarts come from; k-means|| takes a few passes over all rows."""
        tier = _tier(k)
        if self._seeds is None or self._seeds[0] != tier:
            self._seeds = tier, _Seeds.of(self.shards, tier, self.start, self.total)
        return self._seeds[1]

    def _draw(self, size: int) -> _Sample:
        task = DrawCoreset.of(self.total, _pool_size(size, self.total), self.start.random_state)
        pool = self.shards.run(task)
        part = pool.part(size, keyed_generator(self.start.random_state, 3))
        small = _Rows.of(part.per_row(), self.total, self.n_threads)
        if len(pool.X) == len(part.X):
            return _Sample(small, small)
        return _Sample(small, _Rows.of(pool.per_row(), self.total, self.n_threads))

    def _size(self, k: int) -> int:
        """Return how many rows the small sample has: as asked, or enough for k's means."""
        if self.start.n_sample:
            return self.start.n_sample
        wanted, n_rows = _ROWS_PER_MEAN * _tier(k) * len(self.total.sum_x), self.total.n_rows
        few, many = _FEWEST_ROWS
        return min(max(wanted, min(max(n_rows // 16, few), many)), _MOST_ROWS)


def _tier(k: int) -> int:
    return max(_TIER, 1 << (k - 1).bit_length())


@dataclass(frozen=True, slots=True, eq=False)
class _Climb:
    """The search for one k, from its restarts and from what the trail came to."""

    config: EMConfig
    start: StartConfig
    warm: Sequence[Parameters]

    def __call__(
        self, on: _Sample, starts: Sequence[Parameters], led: Sequence[Parameters]
    ) -> list[Parameters]:
        """Return the best on the larger sample, the best first."""
        first, found = _Field(on.small.total.n_samples), _Field(on.small.total.n_samples)
        last = _Field(on.large.total.n_samples)
        first.add(on.small.run(starts, self._trial(_FIRST)))
        found.add(on.small.run([*first.mixtures, *led], self._short))
        self._improve(on, on.small, found)
        guests = [mixture for mixture in self.warm if _pair_of(mixture) == _pair_of(starts[0])]
        long = replace(self.config, max_iter=_LONG, tol=max(self.config.tol, _LONG_TOL))
        last.add(on.large.run([*found.mixtures, *guests], long))
        self._improve(on, on.large, last)
        return last.mixtures[: self.start.finalists]

    def step(self, rows: _Rows, k: int, kind: str, before: Parameters | None) -> Parameters:
        """Return where the trail goes on from its mixture of k - 1 components."""
        fresh = _Seeds(replace(self.start, init="k-means++", n_init=_FRESH), rows.total, None)
        starts = fresh.starts(rows.sample, k, kind)
        if before is not None:
            apart = rows.splits(before, keyed_generator(self.start.random_state, k, _GROWING))
            starts += [_split(before, split) for split in apart[:_GROWN]]
        found = _Field(rows.total.n_samples)
        found.add(rows.run(starts, self._short))
        return found.best.parameters

    @property
    def _short(self) -> EMConfig:
        return replace(self.config, max_iter=_SHORT, tol=max(self.config.tol, _SHORT_TOL))

    def _trial(self, n_iter: int) -> EMConfig:
        """Return settings for so few steps that leaps do not pay."""
        return replace(self._short, max_iter=n_iter, accelerate=False)

    def _improve(self, on: _Sample, rows: _Rows, found: _Field) -> None:
        """Move the best about while it gains: tried on the small sample, then run on `rows`."""
        for round in range(self.start.moves):
            before, tried = found.best, _Field(on.small.total.n_samples)
            generator = keyed_generator(self.start.random_state, round, 2)
            proposals = _proposals(on.small, before, generator)
            if not proposals:
                return
            tried.add(on.small.run(proposals, self._trial(_TRIAL)))
            found.add(rows.run(tried.mixtures, replace(self._short, max_iter=2 * _SHORT)))
            if not _gained(before, found.best, found.n_samples):
                return


def _pool_size(size: int, total: TotalMoments) -> int:
    wanted = max(_POOL * size, _FEWEST_POOL)
    # Where half of the rows would be drawn, all of them are: twice their number draws each.
    return wanted if 2 * wanted < total.n_rows else 2 * total.n_rows


def _pair_of(parameters: Parameters) -> Pair:
    return parameters.n_components, parameters.covariance_type


def _merit(fit: loop.FitResult) -> tuple[bool, float]:
    """Order fits by likelihood, less what may have been bought with noise."""
    return fit.is_ranked, fit.log_likelihood - (_bought(fit) if fit.is_ranked else 0.0)


def _bought(fit: loop.FitResult) -> float:
    """Return what components of hardly more rows than d gain by correlations, in nats.

    By the variances alone they would be worth n_k / 2 · ln(|diag Σ| / |Σ|) less. A small cluster
    far from all others is worth far more than that.
    """
    few = fit.rows < _SOUND * (fit.parameters.n_features + 1)
    if fit.parameters.covariance_type != "full" or not bool(few.any()):
        return 0.0
    covariances = fit.parameters.covariances[few]
    apart = covariances.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return float(fit.nk[few] @ (apart - torch.linalg.slogdet(covariances)[1])) / 2


@dataclass(frozen=True, slots=True, eq=False)
class _Seeds:
    """Where the restarts come from: the method, and k-means||'s candidates from all rows."""

    start: StartConfig
    total: TotalMoments
    parallel: tuple[Float64[Tensor, "c d"], Float64[Tensor, " c"]] | None

    @classmethod
    def of(cls, shards: Shards, most: int, start: StartConfig, total: TotalMoments) -> _Seeds:
        """Make ready for up to `most` components."""
        parallel = None
        if start.init == "k-means||":
            parallel = kmeans.k_means_parallel(shards, total, most, random_state=start.random_state)
        return cls(start, total, parallel)

    def starts(self, sample: Coreset, k: int, kind: str) -> list[Parameters]:
        """Return `n_init` starts of k components; of one component all would be the same."""
        X, weight = sample.X, sample.sample_weight
        found, pooled = [], kmeans.Pooled.of(X, weight, kind)
        n_starts = self.start.n_init if k > 1 else 1
        maps = [(to, to(X)) for to in self._maps()[:n_starts]]
        for round in range(n_starts):
            generator = keyed_generator(self.start.random_state, round, 1)
            shares = self._assignment(weight, k, *maps[round % len(maps)], generator)
            found.append(kmeans.start_of(X, weight, shares, k, kind, pooled))
        return found

    def _maps(self) -> list[Whitening]:
        """Return the coordinates that restarts take in turn.

        Whitened ones see clusters along a direction in which all rows together vary little;
        merely scaled ones see those far apart in many dimensions, which whitening draws close.
        """
        scaled = Whitening(self.total.mean, self.total.scale.reciprocal())
        return [scaled, whitening(self.total)] if self.total.is_whole else [scaled]

    def _assignment(
        self, weight: Tensor, k: int, to: Whitening, Z: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Share out rows of such weights, at `Z` in the coordinates of a map, among k."""
        if self.parallel is None:
            return kmeans.assignments(self.start.init, Z, weight, [k], generator)[k]
        rows, mass_near = self.parallel
        candidates = to(rows)
        labels = kmeans.assignments("kmeans", candidates, mass_near, [k], generator)[k]
        member = torch.nn.functional.one_hot(labels, k).double() * mass_near[:, None]
        mass = member.sum(0).clamp_min(1e-300)
        return kmeans.nearest(Z, (member.T @ candidates) / mass[:, None])


def _gained(before: loop.FitResult, after: loop.FitResult, n_samples: float) -> bool:
    (*rank, now), (*rank_before, then) = _merit(after), _merit(before)
    return rank > rank_before or (rank == rank_before and now - then > _SHORT_TOL * n_samples)


def _proposals(rows: _Rows, fit: loop.FitResult, generator: torch.Generator) -> list[Parameters]:
    """Return mixtures one move away."""
    parameters = fit.parameters
    if fit.status is Status.COLLAPSED:
        return []
    apart = rows.splits(parameters, generator)
    joined = split_merge.merges(parameters, rows.total.n_samples)
    moved = split_merge.split_and_merge(parameters, apart, joined, _PROPOSALS)
    if bool(fit.degenerate.any()):
        mended = split_merge.replace(parameters, fit.degenerate, apart)
        return moved if mended is None else [mended, *moved]
    return moved


def _split(parameters: Parameters, split: split_merge.Split) -> Parameters:
    return split_merge.apply(parameters, drop=[split.component], add=split.parts)


def _labels(parameters: Parameters, X: Float64[Tensor, "m d"]) -> Int64[Tensor, " m"]:
    densities = Densities(ParameterStack.of([parameters]), X.device)
    return torch.cat([densities(part.T).argmax(0) for part in X.split(_CHUNK_ROWS)])

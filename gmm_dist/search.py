"""The search for starts: many short runs on a sample, moves where they stall, the best few left.

Everything happens on samples that the driver holds, so that a search costs about as much as a
few passes over a lake. What comes of a k depends on the rows, the random state and k alone,
never on what else is asked for. Up to k = 32 the sizes are searched in blocks of four, from the
first block up, asked for or not. All restarts and moves of a block are lanes of the same passes,
and a block is always run whole, so even the bits are the same in any grid:

1. `n_init` seeded starts of every k, a few steps of EM each, on a small sample;
2. rounds of moves from the best: a split and a merge at once, and the best of k split for k + 1
   or merged for k - 1, while anything gains;
3. the best few of each, on a larger sample, until they stand still, and moves again.

A block also searches the first k of the next one, which so begins with what came of it, and with
the best of the last k split; no k ends below the smaller ones on the larger sample. Beyond 32 each
k is a block of its own, and begins with its own restarts alone: a chain so long would cost more
than it brings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from gmm_dist import em, moves, seeding
from gmm_dist.config import EMConfig, StartConfig
from gmm_dist.families import Densities
from gmm_dist.kernel import Total
from gmm_dist.limits import lane_bytes
from gmm_dist.parameters import Parameters, Stack
from gmm_dist.sample import Coreset, DrawCoreset, Whitening, keyed_generator, whitening
from gmm_dist.shards import LocalShards, Shards
from gmm_dist.statistics import TotalMoments

Pair = tuple[int, str]
"""k and covariance type."""

CHAIN, BLOCK = 32, 4
"""Up to which k sizes are searched in blocks from 1 up, and how many are in a block."""

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
# Times d + 1 rows that a full covariance needs: with fewer it fits their noise, and hundreds of
# nats of likelihood are to be had where nothing is (at d = 60 more than two clusters are worth).
_SOUND = 2
_PROPOSALS, _TO_NEXT = 4, 2  # moves tried in a round: of a k, and from it to each next one
_SHARDS, _SHARD_ROWS = 8, 4096  # shards at the most, and rows of each at least
_CHUNK_ROWS = 4096
_STATISTICS_BYTES = 1 << 29  # of the lanes that run at once
_MENDING, _GROWING = 4, 5  # streams of keyed random numbers


@dataclass(slots=True, eq=False)
class _Field:
    """The best fits of each k so far, all on the same rows; different optima only."""

    n_samples: float
    fits: dict[int, list[em.FitResult]] = field(default_factory=dict)

    def add(self, fits: Sequence[em.FitResult]) -> None:
        """Enter fits, and let go of what is no longer among the best."""
        for fit in fits:
            k = fit.parameters.n_components
            ranked = sorted([*self.fits.get(k, []), fit], key=_merit, reverse=True)
            distinct = ranked[:1]
            for other in ranked[1:]:
                gap = abs(distinct[-1].log_likelihood - other.log_likelihood)
                if not gap < _SHORT_TOL * self.n_samples:
                    distinct.append(other)
            self.fits[k] = distinct[:_KEPT]

    def best(self, k: int) -> em.FitResult:
        return self.fits[k][0]

    def of(self, k: int) -> list[Parameters]:
        return [fit.parameters for fit in self.fits[k]]

    def mixtures(self) -> list[Parameters]:
        return [fit.parameters for fits in self.fits.values() for fit in fits]


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
        total = local.run(Total(X.shape[1], whole.is_whole))
        total = replace(total, spikes=whole.spikes)
        return cls(sample, local, total)

    def run(self, starts: Sequence[Parameters], config: EMConfig) -> list[em.FitResult]:
        """Run EM from all starts, as many at once as memory allows."""
        if not starts:
            return []
        size = lane_bytes([_pair_of(start) for start in starts], self.n_features)
        at_once = max(1, len(starts) * _STATISTICS_BYTES // size)
        results: list[em.FitResult] = []
        for first in range(0, len(starts), at_once):
            batch = starts[first : first + at_once]
            results += em.fit(self.shards, batch, config, self.total)
        return results

    def log_likelihood(self, parameters: Parameters, config: EMConfig) -> float:
        """Return the log-likelihood (sum, nats) of a mixture as it is, in float64."""
        once = replace(config, max_iter=1, precision="float64")
        return self.run([parameters], once)[0].lower_bounds[0] * self.total.n_samples

    def splits(self, parameters: Parameters, generator: torch.Generator) -> list[moves.Split]:
        """Return the splits of the mixture's components, by the labels of these rows."""
        X, weight = self.sample.X, self.sample.sample_weight
        return moves.splits(parameters, X, weight, _labels(parameters, X), generator)

    @property
    def n_features(self) -> int:
        return self.sample.X.shape[1]


def search(
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

    They are about the rows' shared centre, as are `warm` ones, which join the search for their
    shape, asked for or not. `total` are the moments of all rows. `n_threads` of this process
    work on the sample; they change no bit.
    """
    climb = _Climb(config, start, warm)
    samples = _Samples(shards, start, total, n_threads)
    below: dict[str, _Below] = {}
    found: dict[Pair, list[Parameters]] = {}
    for block, kind in _blocks(pairs):
        chained = block[-1] <= CHAIN
        on, before = samples.of(block[-1]), below.get(kind, _Below()) if chained else _Below()
        looks_ahead = chained and block != [1]
        best = climb(on, [*block, block[-1] + 1] if looks_ahead else block, kind, before)
        found |= {(k, kind): best.of(k)[: start.finalists] for k in block}
        if chained:
            below[kind] = before.after(best, block)
    return [found[pair] for pair in pairs]


def mend(
    shards: Shards,
    fits: Sequence[em.FitResult],
    config: EMConfig,
    start: StartConfig,
    total: TotalMoments,
    *,
    n_threads: int = 1,
) -> list[list[Parameters]]:
    """Return for each fit a start in its place, if it is degenerate and there is hope.

    Its useless components go, those that gain most are split instead, and EM runs on a coreset.
    """
    # Nothing is seeded here.
    samples = _Samples(shards, replace(start, init="k-means++"), total, n_threads)
    broken = [i for i, fit in enumerate(fits) if fit.status is em.Status.DEGENERATE]
    found: list[list[Parameters]] = [[] for _ in fits]
    for i in sorted(broken, key=lambda i: fits[i].parameters.n_components):
        parameters = fits[i].parameters
        rows = samples.of(parameters.n_components).large
        apart = rows.splits(parameters, keyed_generator(start.random_state, _MENDING))
        if mended := moves.replace(parameters, fits[i].degenerate, apart):
            (again,) = rows.run([mended], replace(config, max_iter=_LONG))
            found[i] = [again.parameters] if again.is_ranked else []
    return found


def _blocks(pairs: Sequence[Pair]) -> list[tuple[list[int], str]]:
    """Return the blocks of sizes to search for these, those that they stand on first."""
    blocks: list[tuple[list[int], str]] = []
    for kind in dict.fromkeys(kind for _, kind in pairs):
        ks = {k for k, own in pairs if own == kind}
        top = max((k for k in ks if k <= CHAIN), default=0)
        ends = range(0, top + BLOCK, BLOCK)
        # One component needs no search, and is a block of its own.
        chain = [[1], *(list(range(max(end - BLOCK + 1, 2), end + 1)) for end in ends[1:])]
        blocks += [(block, kind) for block in chain if block[0] <= top]
        blocks += [([k], kind) for k in ks if k > CHAIN]
    return sorted(blocks)


@dataclass(frozen=True, slots=True, eq=False)
class _Below:
    """What a block stands on: the best sound mixture below it, and what came of its first k."""

    best: Parameters | None = None
    first: Sequence[Parameters] = ()

    def after(self, found: _Field, block: Sequence[int]) -> _Below:
        """Return what the next block stands on."""
        sound = [k for k in block if found.best(k).is_ranked]
        best = found.best(sound[-1]).parameters if sound else self.best
        ahead = block[-1] + 1
        return _Below(best, found.of(ahead) if ahead in found.fits else ())


@dataclass(frozen=True, slots=True, eq=False)
class _Sample:
    """The rows on which one k is searched, small ones first, and where its seeds come from."""

    small: _Rows
    large: _Rows
    seeds: _Seeds


@dataclass(slots=True, eq=False)
class _Samples:
    """The samples of all sizes: each depends on the rows, the random state and its k alone.

    Only the last one is kept: ask in the order of k.
    """

    shards: Shards
    start: StartConfig
    total: TotalMoments
    n_threads: int
    last: tuple[int, _Sample] | None = None

    def of(self, k: int) -> _Sample:
        # Seeds by k-means|| are for a number of centres, other samples for a number of rows.
        parallel, size = self.start.init == "k-means||", self._size(k)
        key = _tier(k) if parallel else size
        if self.last is None or self.last[0] != key:
            self.last = key, self._draw(k, size)
        return self.last[1]

    def _draw(self, k: int, size: int) -> _Sample:
        task = DrawCoreset.of(self.total, _pool_size(size, self.total), self.start.random_state)
        pool = self.shards.run(task)
        part = pool.part(size, keyed_generator(self.start.random_state, 3))
        small = _Rows.of(part.per_row(), self.total, self.n_threads)
        whole = len(pool.X) == len(part.X)
        large = small if whole else _Rows.of(pool.per_row(), self.total, self.n_threads)
        return _Sample(small, large, _Seeds.of(self.shards, _tier(k), self.start, self.total))

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
    """The search for the sizes of a block, from restarts and from what is below it."""

    config: EMConfig
    start: StartConfig
    warm: Sequence[Parameters]

    def __call__(self, on: _Sample, ks: Sequence[int], kind: str, below: _Below) -> _Field:
        """Return the best on the larger sample; none is worse there than a smaller one."""
        found, last = self._on_small(on, ks, kind, below), _Field(on.large.total.n_samples)
        pairs = [(k, kind) for k in ks]
        guests = [mixture for mixture in self.warm if _pair_of(mixture) in pairs]
        long = replace(self.config, max_iter=_LONG, tol=max(self.config.tol, _LONG_TOL))
        last.add(on.large.run([*found.mixtures(), *guests], long))
        self._improve(on, on.large, last)
        self._lift(on.large, last, below.best, long)
        return last

    @property
    def _short(self) -> EMConfig:
        return replace(self.config, max_iter=_SHORT, tol=max(self.config.tol, _SHORT_TOL))

    def _trial(self, n_iter: int) -> EMConfig:
        """Return settings for so few steps that leaps do not pay."""
        return replace(self._short, max_iter=n_iter, accelerate=False)

    def _on_small(self, on: _Sample, ks: Sequence[int], kind: str, below: _Below) -> _Field:
        rows, short = on.small, self._short
        seeded = [k for k in ks if not (below.first and k == ks[0])]
        starts = [one for k in seeded for one in on.seeds.starts(rows.sample, k, kind)]
        first, found = _Field(rows.total.n_samples), _Field(rows.total.n_samples)
        first.add(rows.run(starts, self._trial(_FIRST)))
        grown = self._grown(rows, below.best, ks[0])
        found.add(rows.run([*first.mixtures(), *below.first, *grown], short))
        self._improve(on, rows, found)
        return found

    def _grown(self, rows: _Rows, below: Parameters | None, k: int) -> list[Parameters]:
        """Return mixtures one split away from the next smaller one."""
        if below is None or below.n_components != k - 1:
            return []
        apart = rows.splits(below, keyed_generator(self.start.random_state, k, _GROWING))
        return [_after(below, split) for split in apart[:_TO_NEXT]]

    def _improve(self, on: _Sample, rows: _Rows, found: _Field) -> None:
        """Move the best about while it gains: tried on the small sample, then run on `rows`."""
        short, open_ = self._short, set(found.fits)
        for round in range(self.start.moves):
            generator = keyed_generator(self.start.random_state, round, 2)
            proposals = _proposals(on.small, found, open_, generator)
            if not proposals:
                return
            before, tried = {k: found.best(k) for k in found.fits}, _Field(on.small.total.n_samples)
            tried.add(on.small.run(proposals, self._trial(_TRIAL)))
            found.add(rows.run(tried.mixtures(), replace(short, max_iter=2 * _SHORT)))
            open_ = {k for k in before if _gained(before[k], found.best(k), found)}

    def _lift(self, rows: _Rows, last: _Field, below: Parameters | None, config: EMConfig) -> None:
        """Where all of a k ended below a smaller mixture, go on from it with components halved."""
        floor = -math.inf if below is None else rows.log_likelihood(below, config)
        for k in sorted(last.fits):
            best = last.best(k)
            if below is not None and not (best.is_ranked and best.log_likelihood >= floor):
                grown = [moves.halved(below, k), moves.halved(below, k, shift=0.0)]
                last.add(rows.run(grown, config))
                best = last.best(k)
            if best.is_ranked and best.log_likelihood > floor:
                below, floor = best.parameters, best.log_likelihood


def _pool_size(size: int, total: TotalMoments) -> int:
    wanted = max(_POOL * size, _FEWEST_POOL)
    # Where half of the rows would be drawn, all of them are: twice their number draws each.
    return wanted if 2 * wanted < total.n_rows else 2 * total.n_rows


def _pair_of(parameters: Parameters) -> Pair:
    return parameters.n_components, parameters.covariance_type


def _merit(fit: em.FitResult) -> tuple[bool, bool, float]:
    """Order fits: a likelihood bought with a component of hardly more rows than d comes last."""
    sound = fit.parameters.covariance_type != "full" or bool(
        fit.rows.min() >= _SOUND * (fit.parameters.n_features + 1)
    )
    return fit.is_ranked, sound, fit.log_likelihood


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
            parallel = seeding.k_means_parallel(
                shards, total, most, random_state=start.random_state
            )
        return cls(start, total, parallel)

    def starts(self, sample: Coreset, k: int, kind: str) -> list[Parameters]:
        """Return `n_init` starts of k components; of one component all would be the same."""
        found, maps = [], self._maps()
        for round in range(self.start.n_init if k > 1 else 1):
            generator = keyed_generator(self.start.random_state, round, 1)
            shares = self._assignment(sample, k, maps[round % len(maps)], generator)
            found.append(seeding.start_of(sample.X, sample.sample_weight, shares, k, kind))
        return found

    def _maps(self) -> list[Whitening]:
        """Return the coordinates that restarts take in turn.

        Whitened ones see clusters along a direction in which all rows together vary little;
        merely scaled ones see those far apart in many dimensions, which whitening draws close.
        """
        scaled = Whitening(self.total.mean, self.total.scale.reciprocal())
        return [scaled, whitening(self.total)] if self.total.is_whole else [scaled]

    def _assignment(
        self, sample: Coreset, k: int, to: Whitening, generator: torch.Generator
    ) -> Tensor:
        Z = to(sample.X)
        if self.parallel is None:
            method, weight = self.start.init, sample.sample_weight
            return seeding.assignments(method, Z, weight, [k], generator)[k]
        rows, weight = self.parallel
        candidates = to(rows)
        labels = seeding.assignments("kmeans", candidates, weight, [k], generator)[k]
        member = torch.nn.functional.one_hot(labels, k).double() * weight[:, None]
        mass = member.sum(0).clamp_min(1e-300)
        return seeding.nearest(Z, (member.T @ candidates) / mass[:, None])


def _gained(before: em.FitResult, after: em.FitResult, found: _Field) -> bool:
    (*rank, now), (*rank_before, then) = _merit(after), _merit(before)
    gained = now - then > _SHORT_TOL * found.n_samples
    return rank > rank_before or (rank == rank_before and gained)


def _proposals(
    rows: _Rows, found: _Field, open_: set[int], generator: torch.Generator
) -> list[Parameters]:
    """Return mixtures one move away from the best of the open sizes."""
    starts: list[Parameters] = []
    for k in sorted(open_):
        fit = found.best(k)
        parameters = fit.parameters
        if fit.status is em.Status.COLLAPSED:
            continue
        apart = rows.splits(parameters, generator)
        joined = moves.merges(parameters, rows.total.n_samples)
        if bool(fit.degenerate.any()):
            mended = moves.replace(parameters, fit.degenerate, apart)
            starts += [] if mended is None else [mended]
        starts += moves.split_and_merge(parameters, apart, joined, _PROPOSALS)
        if k + 1 in found.fits:
            starts += [_after(parameters, split) for split in apart[:_TO_NEXT]]
        if k - 1 in found.fits:
            starts += [_after(parameters, merge) for merge in joined[:_TO_NEXT]]
    return starts


def _after(parameters: Parameters, move: moves.Split | moves.Merge) -> Parameters:
    if isinstance(move, moves.Split):
        return moves.apply(parameters, drop=[move.component], add=move.parts)
    return moves.apply(parameters, drop=move.pair, add=[move.part])


def _labels(parameters: Parameters, X: Float64[Tensor, "m d"]) -> Int64[Tensor, " m"]:
    densities = Densities(Stack.of([parameters]), X.device)
    return torch.cat([densities(part.T).argmax(0) for part in X.split(_CHUNK_ROWS)])

"""The search for starts: many short runs on a sample, moves where they stall, the best few left.

All restarts of all candidates are lanes of the same passes over a sample that the driver
holds, so that a search costs about as much as a few passes over a lake:

1. `n_init` seeded starts of every candidate, a few steps of EM each, on a small sample;
2. rounds of moves from the best: a split and a merge at once, and across the grid the best of
   k split for k + 1 or merged for k - 1, while anything gains;
3. the best few of each, on a larger sample, until they stand still.
"""

from __future__ import annotations

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

Lanes = list[tuple["Pair", Parameters]]
Pair = tuple[int, str]
"""k and covariance type."""

_FIRST, _SHORT, _LONG = 10, 20, 100  # EM iterations of a restart, of a move, on the larger sample
_SHORT_TOL = 1e-4  # a gain (nats per row) below which a short run or a round has stalled
_ROWS_PER_MEAN = 50  # rows of the small sample, per value in the largest candidate's means
_FEWEST_ROWS, _MOST_ROWS = (2048, 10_000), 65_536
_POOL, _FEWEST_POOL = 4, 32_768  # the larger sample: in small ones, and in rows
_KEPT = 3  # of each candidate, from the small sample to the larger
# Times d + 1 rows that a full covariance needs: with fewer its correlations fit their noise, and
# hundreds of nats are to be had where nothing is (at d = 60 more than two clusters are worth).
_SOUND = 2
_PROPOSALS = 4  # moves of each kind tried in a round
_SHARDS, _SHARD_ROWS = 8, 4096  # shards at the most, and rows of each at least
_CHUNK_ROWS = 4096
_STATISTICS_BYTES = 1 << 29  # of the lanes that run at once


@dataclass(slots=True, eq=False)
class _Field:
    """The best fits of each candidate so far, all on the same rows; different optima only."""

    n_samples: float
    fits: dict[Pair, list[em.FitResult]] = field(default_factory=dict)

    def add(self, pair: Pair, fit: em.FitResult) -> None:
        """Enter a fit, and let go of what is no longer among the best."""
        ranked = sorted([*self.fits.get(pair, []), fit], key=_merit, reverse=True)
        distinct = ranked[:1]
        for other in ranked[1:]:
            gap = abs(distinct[-1].log_likelihood - other.log_likelihood)
            if not gap < _SHORT_TOL * self.n_samples:
                distinct.append(other)
        self.fits[pair] = distinct[:_KEPT]

    def best(self, pair: Pair) -> em.FitResult:
        return self.fits[pair][0]

    def lanes(self) -> Lanes:
        return [(pair, fit.parameters) for pair, fits in self.fits.items() for fit in fits]


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
        local = LocalShards.of(X, weight, n_shards=n_shards, n_threads=n_threads)
        total = local.run(Total(X.shape[1], whole.is_whole))
        total = replace(total, spikes=whole.spikes)
        return cls(sample, local, total)

    def run(self, lanes: Lanes, config: EMConfig) -> list[tuple[Pair, em.FitResult]]:
        """Run EM for all lanes, as many at once as memory allows."""
        if not lanes:
            return []
        size = lane_bytes([(p.n_components, p.covariance_type) for _, p in lanes], self.n_features)
        at_once = max(1, len(lanes) * _STATISTICS_BYTES // size)
        results: list[tuple[Pair, em.FitResult]] = []
        for first in range(0, len(lanes), at_once):
            batch = lanes[first : first + at_once]
            fits = em.fit(self.shards, [start for _, start in batch], config, self.total)
            results += [(pair, fit) for (pair, _), fit in zip(batch, fits, strict=True)]
        return results

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

    They are about the rows' shared centre, as are `warm` ones, which join the candidates of
    their shape. `total` are the moments of all rows. `n_threads` of this process work on the
    sample; they change no bit.
    """
    size = _sample_size(pairs, start, total)
    pool = _drawn(shards, size, start, total)
    part = pool.part(size, keyed_generator(start.random_state, 3))
    small = _Rows.of(part.per_row(), total, n_threads)
    seeds = _Seeds.of(shards, pairs, start, total)
    short = replace(config, max_iter=_SHORT, tol=max(config.tol, _SHORT_TOL))
    first, found = _Field(small.total.n_samples), _Field(small.total.n_samples)
    for pair, fit in small.run(seeds.lanes(small.sample), replace(short, max_iter=_FIRST)):
        first.add(pair, fit)
    for pair, fit in small.run(first.lanes(), short):
        found.add(pair, fit)
    _improve(small, found, short, start)
    large = small if len(pool.X) == len(part.X) else _Rows.of(pool.per_row(), total, n_threads)
    last = _Field(large.total.n_samples)
    guests = [(_pair_of(p), p) for p in warm]
    entrants = found.lanes() + [guest for guest in guests if guest[0] in found.fits]
    for pair, fit in large.run(entrants, replace(config, max_iter=_LONG)):
        last.add(pair, fit)
    _improve(large, last, short, start)
    return [[fit.parameters for fit in last.fits[pair][: start.finalists]] for pair in pairs]


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
    found: list[list[Parameters]] = [[] for _ in fits]
    broken = [i for i, fit in enumerate(fits) if fit.status is em.Status.DEGENERATE]
    if not broken:
        return found
    pairs = [_pair_of(fits[i].parameters) for i in broken]
    size = _sample_size(pairs, start, total)
    rows = _Rows.of(_drawn(shards, size, start, total).per_row(), total, n_threads)
    generator = keyed_generator(start.random_state, 4)
    lanes: Lanes = []
    owners = []
    for i, pair in zip(broken, pairs, strict=True):
        parameters = fits[i].parameters
        apart = rows.splits(parameters, generator)
        if mended := moves.replace(parameters, fits[i].degenerate, apart):
            lanes.append((pair, mended))
            owners.append(i)
    for i, (_, again) in zip(owners, rows.run(lanes, replace(config, max_iter=_LONG)), strict=True):
        if again.is_ranked:
            found[i] = [again.parameters]
    return found


def _drawn(shards: Shards, size: int, start: StartConfig, total: TotalMoments) -> Coreset:
    return shards.run(DrawCoreset.of(total, _pool_size(size, total), start.random_state))


def _pool_size(size: int, total: TotalMoments) -> int:
    wanted = max(_POOL * size, _FEWEST_POOL)
    # Where half of the rows would be drawn, all of them are: twice their number draws each.
    return wanted if 2 * wanted < total.n_rows else 2 * total.n_rows


def _sample_size(pairs: Sequence[Pair], start: StartConfig, total: TotalMoments) -> int:
    """Return how many rows the small sample has: as asked, or enough for the largest k."""
    if start.n_sample:
        return start.n_sample
    wanted = _ROWS_PER_MEAN * max(k for k, _ in pairs) * len(total.sum_x)
    few, many = _FEWEST_ROWS
    return min(max(wanted, min(max(total.n_rows // 16, few), many)), _MOST_ROWS)


def _pair_of(parameters: Parameters) -> Pair:
    return parameters.n_components, parameters.covariance_type


def _merit(fit: em.FitResult) -> tuple[bool, float]:
    """Order fits by likelihood, less what may have been bought with noise."""
    return fit.is_ranked, fit.log_likelihood - (_bought(fit) if fit.is_ranked else 0.0)


def _bought(fit: em.FitResult) -> float:
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

    pairs: Sequence[Pair]
    start: StartConfig
    total: TotalMoments
    parallel: tuple[Float64[Tensor, "c d"], Float64[Tensor, " c"]] | None

    @classmethod
    def of(
        cls, shards: Shards, pairs: Sequence[Pair], start: StartConfig, total: TotalMoments
    ) -> _Seeds:
        parallel = None
        if start.init == "k-means||":
            largest = max(k for k, _ in pairs)
            parallel = seeding.k_means_parallel(
                shards, total, largest, random_state=start.random_state
            )
        return cls(pairs, start, total, parallel)

    def lanes(self, sample: Coreset) -> Lanes:
        """Return `n_init` starts of every candidate; seeds of a smaller k begin a larger's."""
        sizes, found = sorted({k for k, _ in self.pairs}), []
        maps = self._maps()
        for round in range(self.start.n_init):
            generator = keyed_generator(self.start.random_state, round, 1)
            shares = self._assignments(sample, sizes, maps[round % len(maps)], generator)
            found += [
                ((k, kind), seeding.start_of(sample.X, sample.sample_weight, shares[k], k, kind))
                for k, kind in self.pairs
            ]
        return found

    def _maps(self) -> list[Whitening]:
        """Return the coordinates that restarts take in turn.

        Whitened ones see clusters along a direction in which all rows together vary little;
        merely scaled ones see those far apart in many dimensions, which whitening draws close.
        """
        scaled = Whitening(self.total.mean, self.total.scale.reciprocal())
        return [scaled, whitening(self.total)] if self.total.is_whole else [scaled]

    def _assignments(
        self, sample: Coreset, sizes: Sequence[int], to: Whitening, generator: torch.Generator
    ) -> dict[int, Tensor]:
        Z = to(sample.X)
        if self.parallel is None:
            method, weight = self.start.init, sample.sample_weight
            return seeding.assignments(method, Z, weight, sizes, generator)
        rows, weight = self.parallel
        candidates, shares = to(rows), {}
        clusters = seeding.assignments("kmeans", candidates, weight, sizes, generator)
        for k, labels in clusters.items():
            member = torch.nn.functional.one_hot(labels, k).double() * weight[:, None]
            mass = member.sum(0).clamp_min(1e-300)
            shares[k] = seeding.nearest(Z, (member.T @ candidates) / mass[:, None])
        return shares


def _improve(rows: _Rows, found: _Field, config: EMConfig, start: StartConfig) -> None:
    """Move the best of each candidate about while a round gains."""
    open_ = set(found.fits)
    for round in range(start.moves):
        proposals = _proposals(rows, found, open_, keyed_generator(start.random_state, round, 2))
        if not proposals:
            return
        before = {pair: found.best(pair) for pair in found.fits}
        tried = _Field(found.n_samples)
        for pair, fit in rows.run(proposals, config):
            tried.add(pair, fit)
        for pair, fit in rows.run(tried.lanes(), config):
            found.add(pair, fit)
        open_ = {pair for pair in found.fits if _gained(before[pair], found.best(pair), found)}


def _gained(before: em.FitResult, after: em.FitResult, found: _Field) -> bool:
    (*rank, now), (*rank_before, then) = _merit(after), _merit(before)
    gained = now - then > _SHORT_TOL * found.n_samples
    return rank > rank_before or (rank == rank_before and gained)


def _proposals(rows: _Rows, found: _Field, open_: set[Pair], generator: torch.Generator) -> Lanes:
    """Return mixtures one move away from the best of the open candidates."""
    lanes: Lanes = []
    for k, kind in sorted(open_):
        fit = found.best((k, kind))
        parameters = fit.parameters
        if fit.status is em.Status.COLLAPSED:
            continue
        apart = rows.splits(parameters, generator)
        joined = moves.merges(parameters, rows.total.n_samples)
        if bool(fit.degenerate.any()):
            mended = moves.replace(parameters, fit.degenerate, apart)
            lanes += [] if mended is None else [((k, kind), mended)]
        moved = moves.split_and_merge(parameters, apart, joined, _PROPOSALS)
        lanes += [((k, kind), other) for other in moved]
        if (k + 1, kind) in found.fits:
            lanes += [((k + 1, kind), _after(parameters, split)) for split in apart[:2]]
        if (k - 1, kind) in found.fits:
            lanes += [((k - 1, kind), _after(parameters, merge)) for merge in joined[:2]]
    return lanes


def _after(parameters: Parameters, move: moves.Split | moves.Merge) -> Parameters:
    if isinstance(move, moves.Split):
        return moves.apply(parameters, drop=[move.component], add=move.parts)
    return moves.apply(parameters, drop=move.pair, add=[move.part])


def _labels(parameters: Parameters, X: Float64[Tensor, "m d"]) -> Int64[Tensor, " m"]:
    densities = Densities(Stack.of([parameters]), X.device)
    return torch.cat([densities(part.T).argmax(0) for part in X.split(_CHUNK_ROWS)])

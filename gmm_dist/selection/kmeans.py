"""Starts of components: seeds among rows in whitened coordinates, and k-means from them.

Everything but k-means|| works on a sample: rows `Z` (m, r) in whitened coordinates and their
weights (m,), float64. Rows of zero weight are ignored, and an integer weight counts as so
many copies of the row (for `random` in expectation only). With one generator's state, the
seeds of a smaller k are the first of a larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from gmm_dist.chunks import chunk_rows
from gmm_dist.em.statistics import CONSTANT, TotalMoments
from gmm_dist.model.covariance import TYPE_OF, Moments
from gmm_dist.model.natural import maximise
from gmm_dist.model.parameters import Parameters
from gmm_dist.selection.coreset import Whitening, whitening
from gmm_dist.shards.protocol import ShardRows, Shards
from gmm_dist.streams import Stream, keyed_generator

METHODS = ("kmeans", "k-means++", "random", "random_from_data")
"""Methods of seeding on a sample, by scikit-learn's names."""

_TRIALS = 4  # of greedy k-means++; not a function of k, so that seeds of a smaller k are a prefix
_MANY = 64  # seeds, beyond which distances to them are taken by products
_EXACT = "donot_use_mm_for_euclid_dist"  # by differences: a row is at distance 0 from its copies
_MAX_LLOYD = 50
_OVERSAMPLING = 2  # rows that a round of k-means|| draws on average, times k
_PER_CENTRE = 2  # numbers for each row of a chunk: products with the centre, and distances


def assignments(
    method: str,
    Z: Float64[Tensor, "m r"],
    weight: Float64[Tensor, " m"],
    sizes: Sequence[int],
    generator: torch.Generator,
) -> dict[int, Tensor]:
    """Share the rows among components, for each k of `sizes`.

    Args:
        method: One of `METHODS`.
        Z: Rows (m, r) in whitened coordinates.
        weight: Their weights (m,).
        sizes: Numbers of components.
        generator: Source of random numbers.

    Returns labels (m,), int64: of the nearest seed (`random_from_data`, `k-means++`) or of the
    nearest centre after k-means (`kmeans`); for `random` responsibilities (m, k), float64.
    """
    largest = max(sizes)
    if method == "random":
        resp = torch.rand(len(Z), largest, dtype=torch.float64, generator=generator)
        return {k: resp[:, :k] / resp[:, :k].sum(1, keepdim=True) for k in sizes}
    if method == "random_from_data":
        seeds = random_rows(Z, weight, largest, generator)
    else:
        seeds = k_means_plus_plus(Z, weight, largest, generator)
    n_iter = _MAX_LLOYD if method == "kmeans" else 0
    return {k: nearest(Z, lloyd(Z, weight, Z[seeds[:k]], n_iter)) for k in sizes}


def random_rows(
    Z: Float64[Tensor, "m r"], weight: Float64[Tensor, " m"], k: int, generator: torch.Generator
) -> Int64[Tensor, " k"]:
    """Choose k distinct rows by their weights, one after the other; equal rows count as one.

    Where fewer than k are distinct, they are repeated in turn.
    """
    # `unique` wants a column, even of rows that are all the same.
    _, group = torch.nn.functional.pad(Z, (0, 1)).unique(dim=0, return_inverse=True)
    mass = weight.new_zeros(int(group.max()) + 1).index_add(0, group, weight)
    rows = torch.arange(len(Z))
    member = torch.zeros_like(mass, dtype=torch.int64).scatter_reduce(
        0, group, rows, "amin", include_self=False
    )
    # The first of exponential clocks that tick at these rates: draws without replacement.
    times = torch.empty_like(mass).exponential_(generator=generator) / mass
    order = member[times.argsort()[: int((mass > 0).sum())]]
    return order[torch.arange(k) % len(order)]


def k_means_plus_plus(
    Z: Float64[Tensor, "m r"], weight: Float64[Tensor, " m"], k: int, generator: torch.Generator
) -> Int64[Tensor, " k"]:
    """Choose k rows, each far from those before it (Arthur & Vassilvitskii 2007, greedy).

    Each step draws a few rows with probability ∝ weight · squared distance to the nearest
    seed, and keeps the one that lowers the weighted sum of these distances most.
    """
    seeds = [int(torch.multinomial(weight, 1, generator=generator))]
    apart = (Z - Z[seeds[0]]).square().sum(1)
    squares = Z.square().sum(1)
    for _ in range(k - 1):
        mass = weight * apart
        # Fewer distinct rows than seeds: any row is as good as another.
        mass = mass if bool(mass.sum() > 0) else weight
        trials = torch.multinomial(mass, _TRIALS, replacement=True, generator=generator)
        if len(seeds) < _MANY:
            distances = torch.cdist(Z[trials], Z, compute_mode=_EXACT).square()
        else:  # but for a few of the last digits, in half of the time
            products = torch.addmm(squares, Z[trials], Z.T, alpha=-2)
            distances = (products + squares[trials, None]).clamp_min(0)
        after = torch.minimum(distances, apart)
        chosen = int((after @ weight).argmin())
        apart = after[chosen]
        seeds.append(int(trials[chosen]))
    return torch.tensor(seeds)


def lloyd(
    Z: Float64[Tensor, "m r"],
    weight: Float64[Tensor, " m"],
    centres: Float64[Tensor, "k r"],
    n_iter: int = _MAX_LLOYD,
) -> Float64[Tensor, "k r"]:
    """Return centres after k-means iterations until no row changes sides, `n_iter` at most.

    A centre without rows stays where it is.
    """
    labels = None
    for _ in range(n_iter):
        before, labels = labels, nearest(Z, centres)
        if before is not None and torch.equal(before, labels):
            break
        mass = weight.new_zeros(len(centres)).index_add(0, labels, weight)
        sums = torch.zeros_like(centres).index_add(0, labels, Z * weight[:, None])
        centres = torch.where(mass[:, None] > 0, sums / mass[:, None], centres)
    return centres


def nearest(Z: Float64[Tensor, "m r"], centres: Float64[Tensor, "k r"]) -> Int64[Tensor, " m"]:
    """Return the label of each row's nearest centre; chunks of rows bound the memory."""
    half = centres.square().sum(1) / 2
    rows = chunk_rows(_PER_CENTRE * len(centres), Z.device)
    return torch.cat(
        [torch.addmm(half, part, centres.T, alpha=-1).min(1).indices for part in Z.split(rows)]
    )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Pooled:
    """Moments that all starts of one covariance type on the same rows share.

    `spread` is the covariance of all rows, (d, d) or its diagonal (d,), and `floor` (d,) is
    added to it; `counted` (m,) is 1 where a row has weight.
    """

    mean: Float64[Tensor, " d"]
    counted: Float64[Tensor, " m"]
    spread: Float64[Tensor, ...]
    floor: Float64[Tensor, " d"]

    @classmethod
    def of(cls, X: Float64[Tensor, "m d"], weight: Float64[Tensor, " m"], kind: str) -> Pooled:
        """Compute the moments once, for `start_of` of each start."""
        mean = (weight @ X) / weight.sum()
        spread = TYPE_OF[kind].scatter(X - mean, weight) / weight.sum()
        return cls(
            mean=mean, counted=(weight > 0).double(), spread=spread, floor=_floor(X, weight, mean)
        )


def start_of(
    X: Float64[Tensor, "m d"],
    weight: Float64[Tensor, " m"],
    assignment: Tensor,
    k: int,
    kind: str,
    pooled: Pooled | None = None,
) -> Parameters:
    """Return the parameters of an assignment, covariances shrunk towards that of all rows.

    To its rows each component adds virtual ones: as many as its covariance type needs at least
    (full d + 1, others 2), of its rows' mean weight, spread like the whole sample about its mean.
    So one of few rows does not start singular, however much each row of a coreset weighs.

    Args:
        X: Rows (m, d) in data units.
        weight: Their weights (m,).
        assignment: Labels (m,) or responsibilities (m, k).
        k: Number of components.
        kind: Covariance type.
        pooled: Moments of all these rows; None to compute them.
    """
    pooled = Pooled.of(X, weight, kind) if pooled is None else pooled
    family, counted = TYPE_OF[kind], pooled.counted
    more = family.least_rows(X.shape[1])
    floor = pooled.floor if pooled.spread.ndim == 1 else pooled.floor.diag()
    prior = more * (pooled.spread + floor)
    members = _members(X, weight, counted, assignment, k)
    mass, count = members.mass, members.count
    per_row = torch.where(mass > 0, mass / count, weight.sum() / counted.sum())
    means = torch.where(mass[:, None] > 0, members.sums / mass[:, None], pooled.mean)
    within = [
        family.scatter(x - means[c], row_mass) + per_row[c] * prior
        for c, (x, row_mass) in enumerate(members.rows)
    ]
    return _about_means(mass + per_row * more, means, torch.stack(within), kind)


@dataclass(frozen=True, slots=True, eq=False)
class _Members:
    """The rows of each component, with their masses; and sums over them, one a component."""

    rows: list[tuple[Tensor, Tensor]]
    mass: Float64[Tensor, " k"]
    count: Float64[Tensor, " k"]
    sums: Float64[Tensor, "k d"]


def _members(X: Tensor, weight: Tensor, counted: Tensor, assignment: Tensor, k: int) -> _Members:
    """Gather the rows of each component, by labels (m,) or by responsibilities (m, k)."""
    if assignment.ndim == 2:
        masses = assignment * weight[:, None]
        rows = [(X, mass) for mass in masses.T]
        return _Members(rows, masses.sum(0), counted @ assignment, masses.T @ X)
    order = assignment.argsort(stable=True)
    sizes = torch.bincount(assignment, minlength=k).tolist()
    x, row_mass, ones = X[order], weight[order], counted[order]
    rows = list(zip(x.split(sizes), row_mass.split(sizes), strict=True))
    return _Members(
        rows,
        torch.stack([mass.sum() for _, mass in rows]),
        torch.stack([part.sum() for part in ones.split(sizes)]),
        torch.stack([mass @ part for part, mass in rows]),
    )


def _floor(X: Tensor, weight: Tensor, mean: Tensor) -> Tensor:
    """Return a billionth of each feature's variance; of the largest, where it is constant."""
    second = weight @ X.square() / weight.sum()
    variances = weight @ (X - mean).square() / weight.sum()
    largest = variances.max()
    fallback = largest if largest > 0 else torch.ones_like(largest)
    return 1e-9 * torch.where(variances > CONSTANT * second, variances, fallback)


def _about_means(nk: Tensor, means: Tensor, within: Tensor, kind: str) -> Parameters:
    zeros, sum_xx = torch.zeros_like(means), TYPE_OF[kind].second(within)
    moments = Moments(nk=nk, sum_x=zeros, sum_xx=sum_xx, about=means)
    return maximise(kind, moments, (len(nk),), zeros).lanes()[0]


def k_means_parallel(
    shards: Shards, total: TotalMoments, k: int, *, rounds: int = 5, random_state: int = 0
) -> tuple[Float64[Tensor, "m d"], Float64[Tensor, " m"]]:
    """Draw candidates for up to k centres from all rows: k-means|| in `rounds` + 2 passes.

    After one row drawn by weight, each round keeps every row independently with probability
    min(1, 2 k w d² / φ): d is its distance to the nearest candidate in whitened coordinates and
    φ = Σ w d² (Bahmani et al., PVLDB 2012). Seeds for any k are then those of the candidates as
    weighted rows.

    Args:
        shards: All rows.
        total: Their moments.
        k: The largest number of centres.
        rounds: Rounds of drawing.
        random_state: Seed.

    Returns rows (m, d) in data units, about 2 k · rounds of them, and for each the weight of
    the rows that are nearest to it.
    """
    whiten = whitening(total)
    candidates = shards.run(_DrawOne(random_state, len(total.sum_x))).X
    for round in range(1, rounds + 1):
        task = _DrawFar(
            whitening=whiten,
            centres=whiten(candidates),
            oversampling=_OVERSAMPLING * k,
            random_state=random_state,
            round=round,
        )
        candidates = torch.cat([candidates, shards.run(task).X])
    return candidates, shards.run(_CountNearest(whiten, whiten(candidates))).weight


@dataclass(frozen=True, slots=True, eq=False)
class _One:
    """The row with the earliest key: `key` (1,) and `X` (1, d), or no row."""

    key: Float64[Tensor, " m"]
    X: Float64[Tensor, "m d"]

    def __add__(self, other: _One) -> _One:
        key = torch.cat([self.key, other.key])
        first = key.argsort(stable=True)[:1]
        return _One(key[first], torch.cat([self.X, other.X])[first])


@dataclass(frozen=True, slots=True)
class _DrawOne:
    """The task that draws one row with probability ∝ its weight: that of the earliest clock."""

    random_state: int
    n_features: int

    def __call__(self, rows: ShardRows) -> _One:
        generator = keyed_generator(Stream.FIRST_CENTRE, self.random_state, rows.shard)
        none = torch.empty(0, self.n_features, dtype=torch.float64)
        earliest = _One(none[:, 0], none)
        for block in rows.blocks:
            weight = block.weights
            clock = torch.empty(len(weight), dtype=torch.float64)
            times = clock.exponential_(generator=generator).to(weight.device) / weight
            first = times.argsort()[: min(1, int((weight > 0).sum()))]
            earliest = earliest + _One(times[first].cpu(), block.X[:, first].T.double().cpu())
        return earliest


@dataclass(frozen=True, slots=True, eq=False)
class _Far:
    """The rows that a round keeps of those seen so far, and these rows' cost φ.

    A row whose uniform number is u is kept if u < l w d² / φ: if its `threshold` l w d² / u is
    above φ. As φ only grows while rows are added, no row that is dropped early would have been
    kept at the end: the draw needs no earlier pass to compute φ.
    """

    cost: float
    threshold: Float64[Tensor, " m"]
    X: Float64[Tensor, "m d"]

    def __add__(self, other: _Far) -> _Far:
        cost = self.cost + other.cost
        threshold = torch.cat([self.threshold, other.threshold])
        kept = threshold > cost
        return _Far(cost, threshold[kept], torch.cat([self.X, other.X])[kept])


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _DrawFar:
    """The task of a round of k-means||; `centres` (m, r) are in whitened coordinates."""

    whitening: Whitening
    centres: Float64[Tensor, "m r"]
    oversampling: int
    random_state: int
    round: int

    def __call__(self, rows: ShardRows) -> _Far:
        generator = keyed_generator(Stream.MORE_CENTRES, self.random_state, rows.shard, self.round)
        none = self.whitening.mean.new_empty(0, len(self.whitening.mean))
        far = _Far(0.0, none[:, 0], none)
        whiten, centres = self.whitening.to(rows.device), self.centres.to(rows.device)
        for chunk in rows.chunks(_PER_CENTRE * len(centres)):
            x, weight = chunk.X.double(), chunk.weights
            Z = whiten.columns(x).T
            # By differences, not products: a candidate is at distance 0 from its copies.
            mass = weight * (Z - centres[nearest(Z, centres)]).square().sum(1)
            draws = torch.rand(len(weight), dtype=torch.float64, generator=generator)
            threshold = self.oversampling * mass / draws.to(rows.device)
            cost = float(mass.sum())
            kept = (threshold > max(cost, far.cost)).nonzero()[:, 0]
            far = far + _Far(cost, threshold[kept].cpu(), x[:, kept].T.cpu())
        return far


@dataclass(frozen=True, slots=True, eq=False)
class _Counts:
    """The weight of the rows nearest to each candidate."""

    weight: Float64[Tensor, " m"]

    def __add__(self, other: _Counts) -> _Counts:
        return _Counts(self.weight + other.weight)


@dataclass(frozen=True, slots=True, eq=False)
class _CountNearest:
    """The task that sums the weights of the rows nearest to each candidate."""

    whitening: Whitening
    centres: Float64[Tensor, "m r"]

    def __call__(self, rows: ShardRows) -> _Counts:
        whiten, centres = self.whitening.to(rows.device), self.centres.to(rows.device)
        counts = self.centres.new_zeros(len(centres))
        for chunk in rows.chunks(_PER_CENTRE * len(centres)):
            Z = whiten.columns(chunk.X.double()).T
            # On the CPU: on a GPU the bits of such sums differ from call to call.
            labels = nearest(Z, centres).cpu()
            counts += torch.bincount(labels, chunk.weights.cpu(), len(centres))
        return _Counts(counts)

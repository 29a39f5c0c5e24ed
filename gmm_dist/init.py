"""Starts: a bounded sample of the rows, k-means++ on it, and restarts as lanes on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from gmm_dist import em
from gmm_dist.config import EMConfig, StartConfig
from gmm_dist.families import Moments, maximise
from gmm_dist.kernel import Total
from gmm_dist.limits import lane_bytes
from gmm_dist.parameters import Parameters
from gmm_dist.shards import LocalShards, ShardRows, Shards

_SHORT_RUN = 20  # EM iterations of a restart on the sample
_LLOYD = 3  # k-means iterations between seeding and the first M-step
_TRIALS = 4  # of greedy k-means++; not a function of k, so that seeds of a smaller k are a prefix
_SAMPLE_SHARDS = 4
_STATISTICS_BYTES = 1 << 29  # of the restarts that run at once


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A uniform sample of at most `size` rows: those with the smallest random keys.

    Any union of samples is a sample, so the sum over shards draws from each by its size.
    `X` (m, d) and `sample_weight` (m,) are float64.
    """

    size: int
    keys: Float64[Tensor, " m"]
    X: Float64[Tensor, "m d"]
    sample_weight: Float64[Tensor, " m"]

    def __add__(self, other: Sample) -> Sample:
        keys = torch.cat([self.keys, other.keys])
        keep = keys.argsort(stable=True)[: self.size]
        X = torch.cat([self.X, other.X])[keep]
        return Sample(
            self.size, keys[keep], X, torch.cat([self.sample_weight, other.sample_weight])[keep]
        )


@dataclass(frozen=True, slots=True)
class DrawSample:
    """The task that draws a `Sample`; rows of zero weight are never drawn."""

    size: int
    random_state: int
    n_features: int

    def __call__(self, rows: ShardRows) -> Sample:
        generator = _generator(self.random_state, rows.shard)
        empty = torch.empty(0, dtype=torch.float64)
        sample = Sample(self.size, empty, empty.new_empty(0, self.n_features), empty)
        for block in rows.blocks:
            n = block.X.shape[1]
            weight = block.sample_weight
            keys = torch.rand(n, dtype=torch.float64, generator=generator)
            if weight is not None:
                keys[weight.cpu() == 0] = torch.inf
            keep = keys.topk(min(self.size, n), largest=False).indices
            keep = keep[keys[keep] < torch.inf]
            chosen = keep.to(block.X.device)
            X = block.X[:, chosen].T.double().cpu()
            own = torch.ones(len(keep)) if weight is None else weight[chosen]
            sample = sample + Sample(self.size, keys[keep], X, own.double().cpu())
        return sample


def _generator(*key: int) -> torch.Generator:
    """Return a generator keyed by a few whole numbers, the same everywhere."""
    seed = 0
    for part in key:  # a polynomial hash over a Mersenne prime
        seed = (seed * 6_364_136_223_846_793_005 + part + 1) % (2**61 - 1)
    return torch.Generator().manual_seed(seed)


def starts(
    shards: Shards,
    candidates: Sequence[tuple[int, str]],
    config: EMConfig,
    start: StartConfig,
    n_features: int,
) -> list[Parameters]:
    """Return the best start for each (k, covariance type), about the rows' shared centre.

    Draws a sample, seeds `n_init` restarts of every candidate by k-means++ and runs short EM
    on the sample, all restarts as lanes of the same passes; the likeliest of each goes on.
    """
    sample = shards.run(DrawSample(start.n_sample, start.random_state, n_features))
    local = LocalShards.of(sample.X, sample.sample_weight, n_shards=_SAMPLE_SHARDS)
    short = replace(config, max_iter=_SHORT_RUN)
    total = local.run(Total(n_features))
    at_once = max(1, _STATISTICS_BYTES // lane_bytes(candidates, n_features))
    best: dict[tuple[int, str], em.FitResult] = {}
    for first in range(0, start.n_init, at_once):
        lanes = [
            seeded
            for round in range(first, min(first + at_once, start.n_init))
            for seeded in _seeded(sample, candidates, start.random_state, round)
        ]
        results = em.fit(local, [parameters for _, parameters in lanes], short, total)
        for (candidate, _), result in zip(lanes, results, strict=True):
            if candidate not in best or _merit(result) > _merit(best[candidate]):
                best[candidate] = result
    return [best[candidate].parameters for candidate in candidates]


def _merit(result: em.FitResult) -> tuple[bool, float]:
    return result.is_ranked, result.log_likelihood


def _seeded(
    sample: Sample, candidates: Sequence[tuple[int, str]], random_state: int, round: int
) -> list[tuple[tuple[int, str], Parameters]]:
    """Return one start for each candidate; the seeds of a smaller k are the first of a larger."""
    generator = _generator(random_state, round, 1)
    spread = sample.X.std(0, correction=0)
    Z = sample.X / torch.where(spread > 0, spread, 1.0)
    seeds = k_means_plus_plus(Z, sample.sample_weight, max(k for k, _ in candidates), generator)
    labels = {k: _lloyd(Z, sample.sample_weight, Z[seeds[:k]]) for k, _ in candidates}
    return [((k, kind), hard_start(sample, labels[k], k, kind)) for k, kind in candidates]


def k_means_plus_plus(
    Z: Float64[Tensor, "m d"], weight: Float64[Tensor, " m"], k: int, generator: torch.Generator
) -> Int64[Tensor, " k"]:
    """Choose k rows, each far from those before it (Arthur & Vassilvitskii 2007, greedy).

    Each step draws a few rows with probability ∝ weight · squared distance to the nearest
    seed, and keeps the one that lowers the weighted sum of these distances most.
    """
    seeds = [int(torch.multinomial(weight, 1, generator=generator))]
    nearest = (Z - Z[seeds[0]]).square().sum(1)
    for _ in range(k - 1):
        mass = weight * nearest
        # Fewer distinct rows than seeds: any row is as good as another.
        mass = mass if bool(mass.sum() > 0) else weight
        trials = torch.multinomial(mass, _TRIALS, replacement=True, generator=generator)
        after = torch.minimum(torch.cdist(Z[trials], Z).square(), nearest)
        chosen = int((after @ weight).argmin())
        nearest = after[chosen]
        seeds.append(int(trials[chosen]))
    return torch.tensor(seeds)


def _lloyd(Z: Tensor, weight: Tensor, centres: Tensor) -> Int64[Tensor, " m"]:
    """Return labels after a few k-means iterations; a centre without rows stays."""
    for _ in range(_LLOYD):
        labels = torch.cdist(Z, centres).argmin(1)
        mass = torch.zeros(len(centres), dtype=Z.dtype).index_add(0, labels, weight)
        sums = torch.zeros_like(centres).index_add(0, labels, Z * weight[:, None])
        centres = torch.where(mass[:, None] > 0, sums / mass[:, None], centres)
    return torch.cdist(Z, centres).argmin(1)


def hard_start(sample: Sample, labels: Int64[Tensor, " m"], k: int, kind: str) -> Parameters:
    """Return the parameters of a partition, covariances shrunk towards that of all rows.

    Each component counts d + 1 more rows than it has, spread like the whole sample about its
    mean, so that a small one does not start singular.
    """
    X, weight = sample.X, sample.sample_weight
    d, mean = X.shape[1], (weight @ X) / weight.sum()
    pooled = ((X - mean).T * weight) @ (X - mean) / weight.sum()
    prior = (d + 1) * (pooled + _floor(pooled.diagonal()).diag())
    nk, means, within = [], [], []
    for component in range(k):
        rows = labels == component
        mass = weight[rows].sum()
        own = (weight[rows] @ X[rows]) / mass if mass > 0 else mean
        centred = X[rows] - own
        nk.append(mass + d + 1)
        means.append(own)
        within.append((centred.T * weight[rows]) @ centred + prior)
    return _about_means(torch.stack(nk), torch.stack(means), torch.stack(within), kind)


def _floor(variances: Tensor) -> Tensor:
    """Return a billionth of each feature's variance; of another's, where it has none."""
    largest = variances.max()
    fallback = largest if largest > 0 else torch.ones_like(largest)
    return 1e-9 * torch.where(variances > 1e-28 * largest, variances, fallback)


def _about_means(nk: Tensor, means: Tensor, within: Tensor, kind: str) -> Parameters:
    squares = within.diagonal(dim1=-2, dim2=-1)
    sum_xx = {"diag": squares, "spherical": squares.sum(-1)}.get(kind, within)
    moments = Moments(nk, torch.zeros_like(means), sum_xx, means)
    return maximise(kind, moments, (len(nk),), torch.zeros_like(nk)).lanes()[0]

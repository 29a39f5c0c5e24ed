"""A coreset: a bounded sample of the rows, drawn by how much each can matter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from gmm_dist.em.statistics import TotalMoments
from gmm_dist.shards.protocol import ShardRows
from gmm_dist.streams import Stream, keyed_generator

_DEPENDENT = 1e-10  # of an eigenvalue of the correlations: below it the direction has no rows


@dataclass(frozen=True, slots=True, eq=False)
class Whitening:
    """The linear map to coordinates in which all rows together have unit covariance.

    `mean` (d,) is that of all rows; `matrix` (r, d) has a row for each direction in which
    they vary, so constant features and linear functions of others drop out. A `matrix` (d,)
    only scales each feature; constant ones by 0.
    """

    mean: Float64[Tensor, " d"]
    matrix: Float64[Tensor, "*r d"]

    def __call__(self, X: Float64[Tensor, "m d"]) -> Float64[Tensor, "m r"]:
        """Return rows in whitened coordinates."""
        if self.matrix.ndim == 1:
            return (X - self.mean) * self.matrix
        return (X - self.mean) @ self.matrix.T

    def columns(self, x: Float64[Tensor, "d n"]) -> Float64[Tensor, "r n"]:
        """Return rows stored as columns, as in a block, in whitened coordinates."""
        if self.matrix.ndim == 1:
            return (x - self.mean[:, None]) * self.matrix[:, None]
        return self.matrix @ (x - self.mean[:, None])

    @property
    def rank(self) -> int:
        """The number of directions in which the rows vary."""
        return int((self.matrix != 0).sum()) if self.matrix.ndim == 1 else len(self.matrix)

    def to(self, device: torch.device) -> Whitening:
        return Whitening(self.mean.to(device), self.matrix.to(device))


def whitening(total: TotalMoments) -> Whitening:
    """Return the whitening of all rows: the pseudo-inverse root of their covariance.

    Each feature is first scaled to unit variance, so that the cut-off of directions without
    rows, 1e-10 of a feature's variance, does not depend on the features' units. Where the moments
    have no products, features are only scaled.
    """
    constant, d = set(total.constant_features()), len(total.sum_x)
    if not total.is_whole:
        each = total.scale.reciprocal()
        each[list(constant)] = 0.0
        return Whitening(total.mean, each)
    varying = [j for j in range(d) if j not in constant]
    scale = total.variances[varying].sqrt()
    correlation = total.covariance[varying][:, varying] / (scale[:, None] * scale)
    variances, axes = torch.linalg.eigh(correlation)
    kept = variances > _DEPENDENT
    matrix = axes.new_zeros(int(kept.sum()), d)
    matrix[:, varying] = axes[:, kept].T / variances[kept].sqrt()[:, None] / scale
    return Whitening(total.mean, matrix)


@dataclass(frozen=True, slots=True, eq=False)
class Coreset:
    """Rows that represent all: Σ sample_weight · f(X) is unbiased for Σ w f(x), for any f.

    `X` (m, d) and `sample_weight` (m,) are float64.
    """

    X: Float64[Tensor, "m d"]
    sample_weight: Float64[Tensor, " m"]

    def part(self, size: int, generator: torch.Generator) -> Coreset:
        """Return `size` of the rows, drawn at random, with their weights unchanged."""
        keep = _shuffled(len(self.X), generator)[:size]
        return Coreset(self.X[keep], self.sample_weight[keep])

    def fair(self, size: int, generator: torch.Generator) -> Float64[Tensor, "m d"]:
        """Return at most `size` of the rows, drawn in proportion to weight: a plain sample."""
        draws = torch.rand(len(self.X), dtype=torch.float64, generator=generator)
        kept = self.X[draws * self.sample_weight.max() < self.sample_weight]
        return kept[_shuffled(len(kept), generator)[:size]]

    def per_row(self) -> Coreset:
        """Return the rows with weights of mean one, so that weights count rows of this sample."""
        return Coreset(self.X, self.sample_weight / self.sample_weight.mean())

    def __add__(self, other: Coreset) -> Coreset:
        weight = torch.cat([self.sample_weight, other.sample_weight])
        return Coreset(torch.cat([self.X, other.X]), weight)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class DrawCoreset:
    """The task that draws a lightweight coreset of about `size` rows, at most on average.

    Row i, of weight w_i, is kept with probability

        p_i = min(1, size · w_i / W · (1/2 + δ_i / 2r)),   and then has the weight w_i / p_i,

    independently of the others; W = Σ w, δ_i is its squared Mahalanobis distance from the mean
    of all rows and r their rank, so that Σ w δ = W r (Bachem, Lucic & Krause, KDD 2018, in
    whitened coordinates; for mixtures Lucic et al., JMLR 2018). Rows of zero weight are never
    drawn, and none is made to weigh more than 2 W / size. Memory beside the rows: the rows
    kept, and one chunk in float64.
    """

    size: int
    stream: Stream
    random_state: int
    n_samples: float
    whitening: Whitening

    @classmethod
    def of(cls, total: TotalMoments, size: int, stream: Stream, random_state: int) -> DrawCoreset:
        return cls(
            size=size,
            stream=stream,
            random_state=random_state,
            n_samples=total.n_samples,
            whitening=whitening(total),
        )

    def __call__(self, rows: ShardRows) -> Coreset:
        generator = keyed_generator(self.stream, self.random_state, rows.shard)
        none = self.whitening.mean[:0]
        kept, weights = [none.new_empty(0, len(self.whitening.mean))], [none]
        whiten = self.whitening.to(rows.device)
        for chunk in rows.chunks(len(whiten.mean)):
            x, weight = chunk.X.double(), chunk.weights
            probability = self.probabilities(whiten.columns(x), weight)
            draws = torch.rand(len(weight), dtype=torch.float64, generator=generator)
            chosen = (draws.to(rows.device) < probability).nonzero()[:, 0]
            kept.append(x[:, chosen].T.cpu())
            weights.append((weight[chosen] / probability[chosen]).cpu())
        return Coreset(torch.cat(kept), torch.cat(weights))

    def probabilities(
        self, z: Float64[Tensor, "r n"], weight: Float64[Tensor, " n"]
    ) -> Float64[Tensor, " n"]:
        """Return p_i of rows in whitened coordinates."""
        rank = self.whitening.rank
        share = 0.5 + z.square().sum(0) / (2 * rank) if rank else torch.ones_like(weight)
        return (self.size / self.n_samples * weight * share).clamp_max(1)


def _shuffled(n: int, generator: torch.Generator) -> Int64[Tensor, " n"]:
    """Return the numbers below `n` in a random order, whatever torch's default dtype."""
    order: Tensor = torch.rand(n, dtype=torch.float32, generator=generator).argsort()
    return order

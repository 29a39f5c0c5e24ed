"""Match tonight's components to last night's, by how far two Gaussians overlap.

Gaussians are compared by the two parts of Bhattacharyya's distance (Kailath 1967), which is minus
the logarithm of ∫ √(p q) dx:

    location   δᵀ S⁻¹ δ / 8                            with S = (Σ₁ + Σ₂) / 2
    shape      ln(|S| / √(|Σ₁| |Σ₂|)) / 2

Their overlap is exp(-(location + shape / d)): 1 for equal Gaussians, near 0 for ones that have
nothing in common, and in one dimension ∫ √(p q) dx itself. Why this one:

- No invertible affine map changes it, so cents instead of euros match the same components. The
  Bures-Wasserstein distance is in feature units, and the feature of the largest numbers decides.
- It is bounded, so that a threshold means the same for any lake and no pair outweighs all others.
  The symmetric Kullback-Leibler divergence of a narrow and a wide component has no bound.
- The shape counts per feature. It is a sum over features, and 64 of them that each vary 1.4 times
  as much would leave an overlap of 0.15 of what everybody would call the same cluster. The
  location does not: two clusters 4 standard deviations apart are two, whatever d is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from gmm_dist.model.parameters import Parameters

MIN_OVERLAP = 0.2
"""Components that overlap less are different ones; a shift of 3.6 standard deviations gives it."""


@dataclass(frozen=True, slots=True)
class Matching:
    """Say which components are the same, by index: each of either night is named exactly once.

    `pairs` are (before, after), in order of `after`; `dead` ones of before and `born` ones of after
    have no partner.
    """

    pairs: tuple[tuple[int, int], ...]
    born: tuple[int, ...]
    dead: tuple[int, ...]

    def ids(self, before: Iterable[int], next_id: int) -> tuple[int, ...]:
        """Return the ids of the components after: a partner's, or new ones from `next_id` on."""
        before_ids = list(before)
        ids = {after: before_ids[partner] for partner, after in self.pairs}
        ids |= {after: next_id + i for i, after in enumerate(self.born)}
        return tuple(ids[after] for after in sorted(ids))


def match(before: Parameters, after: Parameters, *, min_overlap: float = MIN_OVERLAP) -> Matching:
    """Match components to maximise the sum of the pairs' overlaps beyond `min_overlap`.

    Components that overlap less are not paired: one is dead and the other born. Of the two that a
    component splits into, at most one keeps its number.
    """
    return matched(overlaps(before, after), min_overlap)


def matched(overlap_matrix: Float64[Tensor, "k m"], min_overlap: float) -> Matching:
    """Match rows to columns to maximise the sum of the pairs' overlaps beyond `min_overlap`."""
    gain = (overlap_matrix - min_overlap).clamp_min(0).numpy()
    rows, columns = linear_sum_assignment(gain, maximize=True)
    pairs = [
        (int(i), int(j))
        for i, j in zip(rows, columns, strict=True)
        if float(overlap_matrix[i, j]) >= min_overlap
    ]
    matched_before, matched_after = {i for i, _ in pairs}, {j for _, j in pairs}
    return Matching(
        tuple(sorted(pairs, key=lambda pair: pair[1])),
        tuple(j for j in range(overlap_matrix.shape[1]) if j not in matched_after),
        tuple(i for i in range(overlap_matrix.shape[0]) if i not in matched_before),
    )


def overlaps(one: Parameters, other: Parameters) -> Float64[Tensor, "k m"]:
    """Return the overlap of each component of one mixture with each of another, in [0, 1].

    The covariance types may differ; covariances are positive definite. Weights play no part. Takes
    k m d³ / 3 flops and m d² numbers for full or tied covariances, k m d and m d for the others.
    """
    full = any(p.type.has_products for p in (one, other))
    spreads = [p.covariance_matrices() if full else p.variances() for p in (one, other)]
    distances = _by_matrices if full else _by_variances
    rows = [
        distances(mean, spread, other.means, spreads[1])
        for mean, spread in zip(one.means, spreads[0], strict=True)
    ]
    return torch.stack(rows).neg().exp()


def _by_variances(
    mean: Float64[Tensor, " d"],
    variance: Float64[Tensor, " d"],
    means: Float64[Tensor, "m d"],
    variances: Float64[Tensor, "m d"],
) -> Float64[Tensor, " m"]:
    middle = (variance + variances) / 2
    location = ((means - mean).square() / middle).sum(1) / 8
    shape = (middle.log() - (variance.log() + variances.log()) / 2).mean(1) / 2
    return location + shape


def _by_matrices(
    mean: Float64[Tensor, " d"],
    covariance: Float64[Tensor, "d d"],
    means: Float64[Tensor, "m d"],
    covariances: Float64[Tensor, "m d d"],
) -> Float64[Tensor, " m"]:
    # Variances scaled to about one first: features may be 1e12 apart in their squares.
    unit = covariance.diagonal().rsqrt()
    scale = unit[:, None] * unit
    lower = torch.linalg.cholesky((covariance + covariances) / 2 * scale)
    delta = ((means - mean) * unit)[:, :, None]
    location = torch.linalg.solve_triangular(lower, delta, upper=False).square().sum((1, 2)) / 8
    log_dets = torch.linalg.slogdet(torch.cat([covariance[None], covariances]) * scale).logabsdet
    middle = 2 * lower.diagonal(dim1=1, dim2=2).log().sum(1)
    distance: Tensor = location + (middle - (log_dets[0] + log_dets[1:]) / 2) / 2 / len(mean)
    return distance

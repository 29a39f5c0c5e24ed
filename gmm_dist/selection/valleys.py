"""Valleys of a mixture's density: does it fall between two clusters, and how far?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.model.densities import Densities
from gmm_dist.model.parameters import Parameters

_POINTS = 33  # of a ridgeline
_MOST_PAIRS = 64  # of components, whose ridgelines are followed from one cluster to another


def valley(mixture: Parameters, first: Sequence[int], second: Sequence[int]) -> float:
    """Return the density's height on the way from one cluster to another, against the lower peak.

    1 says that there is no valley, 0 that nothing lies between. The density is that of the two
    clusters' components alone. Ways follow the ridgelines between a component of one and a
    component of the other, on which all modes and saddles of two Gaussians lie (Ray & Lindsay,
    Annals of Statistics 33, 2005), for the nearest pairs; the highest way counts, by its lowest
    point. Peaks are means of components within their own cluster. Where one cluster has none, as a
    background about the other, there is no valley.

    Args:
        mixture: The mixture, of k components.
        first: The components of one cluster.
        second: The components of the other.
    """
    densities = Densities.of(mixture, mixture.means.device)
    ours, theirs = list(first), list(second)

    def heights(x: Float64[Tensor, "n d"]) -> tuple[Tensor, Tensor]:
        logits = torch.cat(list(densities.chunks(x)), 1)
        return logits[ours].logsumexp(0), logits[theirs].logsumexp(0)

    inside, outside = heights(mixture.means[ours])
    starts, start_peaks = _within(ours, inside, outside)
    outside, inside = heights(mixture.means[theirs])
    ends, end_peaks = _within(theirs, inside, outside)
    if not starts or not ends:
        return 1.0
    pairs = _nearest(mixture, starts, ends)
    ways = torch.cat([ridgeline(mixture, j, k) for j, k in pairs])
    lowest = torch.logaddexp(*heights(ways)).view(len(pairs), _POINTS).amin(1)
    lower_peak = min(start_peaks, end_peaks)
    return min(1.0, float((lowest.max() - lower_peak).exp()))


def ridgeline(mixture: Parameters, j: int, k: int) -> Float64[Tensor, "p d"]:
    """Return points on the ridgeline from the mean of component j to that of component k.

        x(a) = [(1 - a) P_j + a P_k]⁻¹ [(1 - a) P_j μ_j + a P_k μ_k],  P = Σ⁻¹ / (δᵀ Σ⁻¹ δ)

    with δ = μ_k - μ_j. So scaled, components of one shape and any size have points evenly spaced.
    """
    a = torch.linspace(0, 1, _POINTS, dtype=torch.float64)[:, None]
    start, end = mixture.means[j], mixture.means[k]
    between = end - start
    covariances, d = mixture.stacked_covariances, mixture.n_features
    pair = covariances.expand(mixture.n_components, *covariances.shape[1:])[[j, k]]
    if mixture.type.has_products:
        inverse = torch.linalg.inv(mixture.type.matrices(pair, d))
        inverse = inverse / _or_one(between @ inverse @ between)[:, None, None]
        ours, theirs = (1 - a)[:, None] * inverse[0], a[:, None] * inverse[1]
        points: Tensor = torch.linalg.solve(ours + theirs, ours @ start + theirs @ end)
        return points
    precisions = 1 / mixture.type.variances(pair, d).expand(2, d)
    precisions = precisions / _or_one(precisions @ between.square())[:, None]
    ours, theirs = (1 - a) * precisions[0], a * precisions[1]
    return (ours * start + theirs * end) / (ours + theirs)


def _or_one(lengths: Float64[Tensor, " 2"]) -> Float64[Tensor, " 2"]:
    """Return lengths, 1 in place of 0: those between two means that are one."""
    return torch.where(lengths > 0, lengths, 1.0)


def _within(members: Sequence[int], inside: Tensor, outside: Tensor) -> tuple[list[int], float]:
    """Return the components whose means are labelled as of their own cluster, and its peak."""
    kept = inside >= outside
    peak = float(torch.logaddexp(inside, outside)[kept].max()) if bool(kept.any()) else 0.0
    return [c for c, keep in zip(members, kept.tolist(), strict=True) if keep], peak


def _nearest(
    mixture: Parameters, starts: Sequence[int], ends: Sequence[int]
) -> list[tuple[int, int]]:
    """Return the pairs of components that lie nearest to each other, in standard deviations.

    The distance is that along the line between the means, against both components' standard
    deviations along it.
    """
    d, means = mixture.n_features, mixture.means
    spreads = mixture.type.variances(mixture.stacked_covariances, d).expand(len(means), d)
    between = means[list(starts), None] - means[list(ends)]
    both = spreads[list(starts), None].sqrt() + spreads[list(ends)].sqrt()
    distances = (between / both).square().sum(-1).flatten()
    nearest = distances.argsort(stable=True)[:_MOST_PAIRS].tolist()
    return [(starts[i // len(ends)], ends[i % len(ends)]) for i in nearest]

"""Which of tonight's clusters are last night's, and how they have changed.

Clusters are sets of components, and these may split, join and shift while the cluster that they
draw stays. So two clusters are compared component by component. With o(a, b) the overlap of two
Gaussians (`matching`) and p, q the weights of the components within the two clusters A and B,

    similarity = (Σ_a p_a max_b o(a, b) + Σ_b q_b max_a o(a, b)) / 2

It is 1 for equal clusters and 0 for ones that have nothing in common; of two clusters into which
one splits, the larger is the more similar.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.model.mixture import Mixture
from gmm_dist.model.parameters import Parameters
from gmm_dist.nightly.matching import MIN_OVERLAP, Matching, matched, overlaps


def match_clusters(before: Mixture, after: Mixture) -> Matching:
    """Match clusters to maximise the sum of their similarities beyond 0.2.

    Of a mixture without clusters there are none: all of the other's are born, or dead.
    """
    if before.clusters is None or after.clusters is None:
        born, dead = (0 if m.clusters is None else m.clusters.n_clusters for m in (after, before))
        return Matching((), tuple(range(born)), tuple(range(dead)))
    return matched(similarities(before, after), MIN_OVERLAP)


def similarities(before: Mixture, after: Mixture) -> Float64[Tensor, "b c"]:
    """Return how similar each cluster of a mixture is to each of another, in [0, 1]."""
    overlap = overlaps(before.parameters, after.parameters)
    one, other = _members(before), _members(after)
    best_after = torch.stack([overlap[:, own > 0].amax(1) for own in other])  # (c, k)
    best_before = torch.stack([overlap[own > 0].amax(0) for own in one])  # (b, m)
    return (one @ best_after.T + best_before @ other.T) / 2


def _members(mixture: Mixture) -> Float64[Tensor, "c k"]:
    """Return the weights of the components within each cluster; those of others are 0."""
    assert mixture.clusters is not None
    of_component = torch.tensor(mixture.clusters.of_component)
    own = torch.arange(mixture.clusters.n_clusters)[:, None] == of_component
    # A component without rows still belongs to its cluster.
    weights = own * mixture.parameters.weights.clamp_min(torch.finfo(torch.float64).tiny)
    return weights / weights.sum(1, keepdim=True)


def as_gaussians(mixture: Mixture) -> Parameters:
    """Return each cluster as the Gaussian of its mean and covariance, whatever its form.

    Where components have no products of features, they have the variances alone.
    """
    parameters, shares = mixture.parameters, _members(mixture)
    clusters = mixture.clusters
    assert clusters is not None
    first = [clusters.of_component.index(c) for c in range(clusters.n_clusters)]
    near = parameters.means[first]
    means = near + torch.stack(
        [share @ (parameters.means - at) for share, at in zip(shares, near, strict=True)]
    )
    is_full = parameters.type.has_products
    spreads = parameters.covariance_matrices() if is_full else parameters.variances()
    each = []
    for share, mean in zip(shares, means, strict=True):
        apart = parameters.means - mean
        between = (share[:, None] * apart).T @ apart if is_full else share @ apart.square()
        each.append(torch.tensordot(share, spreads, 1) + between)
    weights = torch.zeros(clusters.n_clusters, dtype=torch.float64)
    return Parameters(
        weights=weights.index_add(0, torch.tensor(clusters.of_component), parameters.weights),
        means=means,
        covariances=torch.stack(each),
        covariance_type="full" if is_full else "diag",
    )

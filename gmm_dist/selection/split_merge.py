"""Moves out of a poor optimum: split a component, merge two, replace a useless one.

EM ends in the local optimum that its start leads to. Where one component covers two clusters and
two others share one, no step of EM mends it; a split and a merge do (Ueda, Nakano, Ghahramani &
Hinton, "SMEM algorithm for mixture models", Neural Computation 12, 2000). The gain of a move is
estimated from hard labels: each row counts for the Gaussian of one component alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from gmm_dist.model.parameters import Parameters
from gmm_dist.selection import kmeans

_NEIGHBOURS = 6  # nearest components with which a component may be merged
_LLOYD, _TRIALS = 25, 2  # until it stands still: splits half way there mislead
_TINY = 1e-300  # in place of a mixing weight of zero
_FLAT = 1e-12  # of the largest variance: directions with less are left out
_WIDE = 128  # features, beyond which diagonal covariances are split without d x d matrices
_SHARED = 1e-3  # of a shared covariance is left at least, however much a split explains
_ROWS = 4  # times its type's `least_rows`: fewer rows are too few to split a component


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One component: its mixing weight (a scalar), mean (d,) and covariance (as its type's)."""

    weight: Tensor
    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Two parts in place of a component; `gain` in log-likelihood (nats), by hard labels."""

    component: int
    parts: tuple[Part, Part]
    gain: float


@dataclass(frozen=True, slots=True, eq=False)
class Merge:
    """One part in place of two components; `loss` of log-likelihood (nats), by hard labels."""

    pair: tuple[int, int]
    part: Part
    loss: float


def splits(
    parameters: Parameters,
    X: Float64[Tensor, "m d"],
    weight: Float64[Tensor, " m"],
    labels: Int64[Tensor, " m"],
    generator: torch.Generator,
) -> list[Split]:
    """Return the best split in two of each component with enough rows, the best first.

    Args:
        parameters: The mixture.
        X: Rows (m, d).
        weight: Their weights (m,).
        labels: The component (m,) of each row.
        generator: Source of random numbers.
    """
    best_splits = []
    least = parameters.type.least_rows(parameters.n_features)
    for component in range(parameters.n_components):
        rows = (labels == component) & (weight > 0)
        if int(rows.sum()) < _ROWS * least:
            continue
        if split := _split(parameters, component, X[rows], weight[rows], generator):
            best_splits.append(split)
    return sorted(best_splits, key=lambda split: -split.gain)


def _split(
    parameters: Parameters, component: int, X: Tensor, weight: Tensor, generator: torch.Generator
) -> Split | None:
    """Return the best of a few splits: by two humps, and by k-means from several seeds."""
    spread = X.std(0, correction=0)
    Z = X / torch.where(spread > 0, spread, 1.0)
    # Humps take d³ operations, for a direction that some types cannot represent.
    trials = [] if not parameters.type.has_products and X.shape[1] > _WIDE else [_humps(Z, weight)]
    for _ in range(_TRIALS):
        seeds = kmeans.k_means_plus_plus(Z, weight, 2, generator)
        trials.append(_two_means(Z, weight, Z[seeds]))
    kind = parameters.type.alone
    pooled = kmeans.Pooled.of(X, weight, kind)
    whole = kmeans.start_of(X, weight, torch.zeros(len(X), dtype=torch.int64), 1, kind, pooled)
    tried = [
        _split_by(parameters, component, X, weight, labels, whole, pooled)
        for labels in trials
        if 0 < int(labels.sum()) < len(labels)
    ]
    return max(tried, key=lambda split: split.gain, default=None)


def _two_means(
    Z: Float64[Tensor, "m d"], weight: Float64[Tensor, " m"], centres: Float64[Tensor, "2 d"]
) -> Int64[Tensor, " m"]:
    """Label rows by the nearer of two centres, after a few iterations of k-means."""
    sums, mass = weight @ Z, weight.sum()
    labels = None
    for _ in range(_LLOYD):
        half = (centres[1] - centres[0]) @ centres.sum(0) / 2
        before, labels = labels, Z @ (centres[1] - centres[0]) > half
        if before is not None and torch.equal(before, labels):
            break
        in_second = weight * labels
        share = in_second.sum()
        if not 0 < share < mass:
            break
        second = in_second @ Z
        centres = torch.stack([(sums - second) / (mass - share), second / share])
    assert labels is not None
    return labels.long()


def _humps(X: Float64[Tensor, "m d"], weight: Float64[Tensor, " m"]) -> Int64[Tensor, " m"]:
    """Label rows by the side of their mean, along the direction with the lightest tails.

    Two humps have lighter tails than one; in whitened coordinates z the direction is the
    eigenvector of least eigenvalue of E ‖z‖² z zᵀ (FOBI: Cardoso, ICASSP 1989), whatever the angle.
    """
    mean = (weight @ X) / weight.sum()
    covariance = ((X - mean).T * weight) @ (X - mean) / weight.sum()
    variances, axes = torch.linalg.eigh(covariance)
    kept = variances > _FLAT * variances[-1]
    if not bool(kept.any()):
        return torch.zeros(len(X), dtype=torch.int64)
    Z = (X - mean) @ axes[:, kept] / variances[kept].sqrt()
    fourth = (Z.T * (weight * Z.square().sum(1))) @ Z
    across: Tensor = Z @ torch.linalg.eigh(fourth).eigenvectors[:, 0]
    return (across > 0).long()


def _split_by(
    parameters: Parameters,
    component: int,
    X: Tensor,
    weight: Tensor,
    labels: Tensor,
    whole: Parameters,
    pooled: kmeans.Pooled,
) -> Split:
    """Return the split by labels 0 and 1; `whole` is the one Gaussian of all the rows."""
    family = parameters.type
    mass = torch.stack([weight[labels == 0].sum(), weight[labels == 1].sum()])
    share = mass / mass.sum()
    halves = kmeans.start_of(X, weight, labels, 2, family.alone, pooled)
    if family.is_shared:
        covariances = [parameters.covariances] * 2
        n_samples = mass.sum() / parameters.weights[component].clamp_min(_TINY)
        freed = mass.prod() / mass.sum() / n_samples
        apart = halves.means[1] - halves.means[0]
        ratio = family.log_det_ratio(parameters.covariances, -freed, apart, _SHARED - 1)
        shaped = -n_samples / 2 * ratio
    else:
        covariances = list(halves.covariances)
        shaped = mass.sum() * _half_log_det(whole)[0] - (mass * _half_log_det(halves)).sum()
    parts = [
        Part(parameters.weights[component] * share[h], halves.means[h], covariances[h])
        for h in (0, 1)
    ]
    gain = float((mass * share.log()).sum() + shaped)
    return Split(component, (parts[0], parts[1]), gain)


def merges(parameters: Parameters, n_samples: float) -> list[Merge]:
    """Return the merges of neighbouring components, the cheapest first.

    The loss is Runnalls' bound ("Kullback-Leibler approach to Gaussian mixture reduction",
    IEEE Trans. AES 43, 2007), less the entropy of the two labels that become one.
    """
    family, weights, half = parameters.type, parameters.weights, _half_log_det(parameters)
    pair_merges = []
    for i, j in _neighbours(parameters):
        part = _merged(parameters, i, j)
        if family.is_shared:
            scale = weights[i] * weights[j] / part.weight.clamp_min(_TINY)
            apart = parameters.means[j] - parameters.means[i]
            shape = family.log_det_ratio(parameters.covariances, scale, apart) / 2
        else:
            joint = _half_log_det(_alone(parameters, part))[0]
            shape = part.weight * joint - weights[i] * half[i] - weights[j] * half[j]
        label = torch.special.entr(weights[[i, j]]).sum() - torch.special.entr(part.weight)
        pair_merges.append(Merge((i, j), part, n_samples * float(shape - label)))
    return sorted(pair_merges, key=lambda merge: merge.loss)


def _neighbours(parameters: Parameters) -> list[tuple[int, int]]:
    """Return pairs of components whose means are near, in units of their spread."""
    k = parameters.n_components
    spread = _typical(parameters).sqrt()
    Z = parameters.means / torch.where(spread > 0, spread, 1.0)
    distance = torch.cdist(Z, Z).fill_diagonal_(torch.inf)
    nearest = distance.topk(min(_NEIGHBOURS, k - 1), largest=False).indices
    pairs = {(min(i, int(j)), max(i, int(j))) for i in range(k) for j in nearest[i]}
    return sorted(pairs)


def _merged(parameters: Parameters, i: int, j: int) -> Part:
    """Return the component with the weight, mean and covariance of two together."""
    pair = torch.tensor([i, j])
    weight = parameters.weights[pair].sum()
    share = (parameters.weights[pair] + _TINY) / (weight + 2 * _TINY)
    mean = share @ parameters.means[pair]
    shift = parameters.means[pair] - mean
    covariance = parameters.type.merged(parameters.stacked_covariances, pair, share, shift)
    return Part(weight, mean, covariance)


def apply(
    parameters: Parameters, *, drop: Sequence[int] = (), add: Sequence[Part] = ()
) -> Parameters:
    """Return the mixture without the components `drop`, and with the parts `add`."""
    keep = [c for c in range(parameters.n_components) if c not in set(drop)]
    weights = torch.cat([parameters.weights[keep], *(part.weight[None] for part in add)])
    means = torch.cat([parameters.means[keep], *(part.mean[None] for part in add)])
    covariances = parameters.covariances
    if not parameters.type.is_shared:
        covariances = torch.cat([covariances[keep], *(part.covariance[None] for part in add)])
    return Parameters(
        weights=weights / weights.sum(),
        means=means,
        covariances=covariances,
        covariance_type=parameters.covariance_type,
    )


def split_and_merge(
    parameters: Parameters,
    best_splits: Sequence[Split],
    cheapest_merges: Sequence[Merge],
    limit: int,
    at_once: int = 1,
) -> list[Parameters]:
    """Return the `limit` most promising mixtures of as many components: one split, one merge.

    The first one has several that promise a gain, of components apart, where up to `at_once` of
    them may be made together.
    """
    ranked = sorted(
        (
            (split.gain - merge.loss, i, j)
            for i, split in enumerate(best_splits)
            for j, merge in enumerate(cheapest_merges[: max(limit, at_once)])
        ),
        reverse=True,
    )
    moved = _together(parameters, best_splits, cheapest_merges, at_once)[:limit]
    for _, i, j in ranked:
        split, merge = best_splits[i], cheapest_merges[j]
        if split.component in merge.pair:
            continue
        drop = (split.component, *merge.pair)
        moved.append(apply(parameters, drop=drop, add=[*split.parts, merge.part]))
        if len(moved) >= limit:
            break
    return moved


def _together(
    parameters: Parameters, splits: Sequence[Split], merges: Sequence[Merge], at_once: int
) -> list[Parameters]:
    """Return the mixture after several splits and merges that promise a gain, if there are some."""
    drop: list[int] = []
    add: list[Part] = []
    left = list(splits)
    for merge in merges:
        split = next((s for s in left if s.component not in {*drop, *merge.pair}), None)
        if split is None or split.gain <= merge.loss or 3 * at_once <= len(drop):
            break
        if not set(merge.pair) & set(drop):
            left.remove(split)
            drop += [split.component, *merge.pair]
            add += [*split.parts, merge.part]
    return [apply(parameters, drop=drop, add=add)] if len(drop) > 3 else []


def replace(
    parameters: Parameters, useless: Bool[Tensor, " k"], best_splits: Sequence[Split]
) -> Parameters | None:
    """Return the mixture with its useless components replaced by splits of others.

    None where there are not enough components to split.
    """
    dropped = [int(c) for c in useless.nonzero().flatten()]
    sound = [split for split in best_splits if split.component not in dropped]
    chosen = sound[: len(dropped)]
    if len(chosen) < len(dropped):
        return None
    drop = [*dropped, *(split.component for split in chosen)]
    return apply(parameters, drop=drop, add=[part for split in chosen for part in split.parts])


def halved(parameters: Parameters, k: int, *, shift: float = 0.2) -> Parameters:
    """Return a mixture of k components: the largest is halved until there are k.

    The halves lie `shift` standard deviations to either side of their mean, with a covariance
    reduced so that a pair keeps the mean and the covariance of the whole (a covariance that all
    share is kept). With a shift of 0 they are copies, and the density is the same.
    """
    while parameters.n_components < k:
        component = int(parameters.weights.argmax())
        offset, covariance = _narrowed(parameters, component, shift)
        weight, mean = parameters.weights[component] / 2, parameters.means[component]
        parts = [Part(weight, mean + side * offset, covariance) for side in (1, -1)]
        parameters = apply(parameters, drop=[component], add=parts)
    return parameters


def _narrowed(parameters: Parameters, component: int, shift: float) -> tuple[Tensor, Tensor]:
    """Return the halves' offset (d,) from the mean, and their covariance."""
    family = parameters.type
    covariances = parameters.stacked_covariances
    covariance = covariances[0 if family.is_shared else component]
    step = shift * family.offset(covariance, _typical(parameters))
    return step, family.narrowed(covariance, step, shift)


def _alone(parameters: Parameters, part: Part) -> Parameters:
    return Parameters(
        weights=part.weight[None],
        means=part.mean[None],
        covariances=parameters.type.unstacked(part.covariance[None]),
        covariance_type=parameters.covariance_type,
    )


def _typical(parameters: Parameters) -> Float64[Tensor, " d"]:
    """Return the mean variance of each feature within the components."""
    covariances, d = parameters.stacked_covariances, parameters.n_features
    return parameters.type.variances(covariances, d).mean(0)


def _half_log_det(parameters: Parameters) -> Float64[Tensor, " c"]:
    return parameters.type.log_det(parameters.stacked_covariances, parameters.n_features) / 2

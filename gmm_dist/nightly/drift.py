"""How tonight's mixture differs from last night's: matched components, and the rows under both."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.em.evaluate import Histograms, Tally, mean_log_likelihoods
from gmm_dist.model.parameters import Parameters
from gmm_dist.nightly.column_drift import ColumnDrift
from gmm_dist.nightly.matching import Matching, overlaps
from gmm_dist.shards.protocol import Shards

_BINS = 60
_TAIL = 0.001  # of the rows lie beyond either end of the histogram's bins
_APART = 0.01  # an overlap below which two components have nothing to do with each other


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentDrift:
    """How one component has changed; standard deviations and covariances are last night's.

    - `mean_shift` (d,): of the mean in each feature, in standard deviations of that feature;
    - `mahalanobis`: the whole shift √(δᵀ Σ⁻¹ δ), in standard deviations along it;
    - `volume_ratio`: (|Σ tonight| / |Σ|)^(1/d), the variance against last night's, on average
      over the directions: 1 for no change, 4 for twice the spread everywhere;
    - `shape_change`: what is left when volumes are made equal: the standard deviation over the
      directions of ln(variance tonight / variance), 0 for the same shape and orientation. It is
      the affine-invariant distance of the volume-normalised covariances over √d (Pennec,
      Fillard & Ayache 2006);
    - `overlap`: see `matching`.
    """

    id: int
    weight_before: float
    weight: float
    weight_change: float
    mean_shift: tuple[float, ...]
    mahalanobis: float
    volume_ratio: float
    shape_change: float
    overlap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmatched:
    """A component of one night alone, its `mean` (d,) in feature units.

    `id` is None for a newborn of a model that is not published. `nearest` is the id of the other
    night's component that it overlaps most: that which it split from, or was merged into. None
    where it overlaps none, and for a `nearest` without an id.
    """

    id: int | None
    weight: float
    mean: tuple[float, ...]
    nearest: int | None
    overlap: float


@dataclass(frozen=True, slots=True)
class DensityHistogram:
    """Shares of tonight's rows by their log-density (nats) under either model.

    `edges` (b + 1,) of equally wide bins; `before` and `tonight` (b,). They sum to less than 1:
    rows below the first edge or above the last are in no bin.
    """

    edges: tuple[float, ...]
    before: tuple[float, ...]
    tonight: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DensityChange:
    """Tonight's rows under last night's model (`before`) against tonight's, in nats per row.

    `mean_*` are mean log-densities of the rows that tonight's model was fitted to, `held_out_*`
    of those that neither has seen; None where there are none.
    """

    mean_before: float
    mean_tonight: float
    held_out_before: float | None
    held_out_tonight: float | None
    histogram: DensityHistogram


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """Who stayed, was born and died of two nights' components, or of their clusters."""

    components: tuple[ComponentDrift, ...]
    born: tuple[Unmatched, ...]
    dead: tuple[Unmatched, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """What has changed from one night's model to another's; plain values, made for JSON.

    `clusters` are compared as the Gaussians of their means and covariances; None where a night has
    none.
    """

    night_before: str
    night: str
    feature_names: tuple[str, ...]
    components: tuple[ComponentDrift, ...]
    born: tuple[Unmatched, ...]
    dead: tuple[Unmatched, ...]
    densities: DensityChange
    columns: ColumnDrift | None = None
    clusters: Changes | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Numbered:
    """A night's mixture, in feature units, and the ids of its components, in their order."""

    night: str
    parameters: Parameters
    ids: tuple[int | None, ...]


def drift(
    before: Numbered,
    after: Numbered,
    matching: Matching,
    densities: DensityChange,
    feature_names: tuple[str, ...],
    columns: ColumnDrift | None = None,
    clusters: Changes | None = None,
) -> Drift:
    """Describe what has changed between two nights whose components have been matched.

    Args:
        before: Last night's components.
        after: Tonight's components.
        matching: Which components are the same.
        densities: Tonight's rows under both mixtures.
        feature_names: Names of the features.
        columns: Drift of whole columns, if it was measured.
        clusters: How the clusters have changed, if both nights have such.
    """
    of_components = changes(before, after, matching)
    return Drift(
        night_before=before.night,
        night=after.night,
        feature_names=feature_names,
        components=of_components.components,
        born=of_components.born,
        dead=of_components.dead,
        densities=densities,
        columns=columns,
        clusters=clusters,
    )


def changes(before: Numbered, after: Numbered, matching: Matching) -> Changes:
    """Describe how matched Gaussians have changed, and those of one night alone."""
    old, new = before.parameters, after.parameters
    overlap_matrix = overlaps(old, new)
    old_covariances, new_covariances = old.covariance_matrices(), new.covariance_matrices()
    components = []
    for i, j in matching.pairs:
        component_id = before.ids[i]
        assert component_id is not None
        shift = new.means[j] - old.means[i]
        volume, shape = spread_change(old_covariances[i], new_covariances[j])
        components.append(
            ComponentDrift(
                id=component_id,
                weight_before=float(old.weights[i]),
                weight=float(new.weights[j]),
                weight_change=float(new.weights[j] - old.weights[i]),
                mean_shift=tuple((shift / old_covariances[i].diagonal().sqrt()).tolist()),
                mahalanobis=_mahalanobis(shift, old_covariances[i]),
                volume_ratio=volume,
                shape_change=shape,
                overlap=float(overlap_matrix[i, j]),
            )
        )
    return Changes(
        components=tuple(components),
        born=tuple(_unmatched(after, j, before, overlap_matrix[:, j]) for j in matching.born),
        dead=tuple(_unmatched(before, i, after, overlap_matrix[i]) for i in matching.dead),
    )


def spread_change(
    before: Float64[Tensor, "d d"], after: Float64[Tensor, "d d"]
) -> tuple[float, float]:
    """Return the volume ratio and the change of shape, see `ComponentDrift`."""
    whole = _whitened(before, _whitened(before, after).T)
    logs = torch.linalg.eigvalsh((whole + whole.T) / 2).clamp_min(1e-300).log()
    return math.exp(float(logs.mean())), float(logs.std(correction=0))


def _mahalanobis(shift: Float64[Tensor, " d"], covariance: Float64[Tensor, "d d"]) -> float:
    return float(_whitened(covariance, shift[:, None]).square().sum().sqrt())


def _whitened(
    covariance: Float64[Tensor, "d d"], vectors: Float64[Tensor, "d m"]
) -> Float64[Tensor, "d m"]:
    """Return the columns of `vectors` in units in which `covariance` is the identity."""
    # Variances scaled to one first: features may be 1e12 apart in their squares.
    unit = covariance.diagonal().rsqrt()
    lower = torch.linalg.cholesky(covariance * unit[:, None] * unit)
    solved: Tensor = torch.linalg.solve_triangular(lower, vectors * unit[:, None], upper=False)
    return solved


def _unmatched(
    this_night: Numbered, component: int, other_night: Numbered, overlap: Float64[Tensor, " m"]
) -> Unmatched:
    nearest = int(overlap.argmax())
    return Unmatched(
        id=this_night.ids[component],
        weight=float(this_night.parameters.weights[component]),
        mean=tuple(this_night.parameters.means[component].tolist()),
        nearest=other_night.ids[nearest] if overlap[nearest] > _APART else None,
        overlap=float(overlap[nearest]),
    )


def compare_densities(shards: Shards, before: Parameters, tonight: Parameters) -> DensityChange:
    """Score tonight's rows under both mixtures, which are about the rows' shared centre.

    Takes one pass over the rows that were fitted, and one over those held out.
    """
    histograms = shards.run(Tally((before, tonight)))
    held_before, held_tonight = mean_log_likelihoods(shards, [before, tonight])
    means = histograms.means.tolist()
    return DensityChange(
        mean_before=means[0],
        mean_tonight=means[1],
        held_out_before=held_before,
        held_out_tonight=held_tonight,
        histogram=_histogram(histograms),
    )


def _histogram(histograms: Histograms) -> DensityHistogram:
    ends = histograms.quantiles((_TAIL, 1 - _TAIL))
    edges = torch.linspace(float(ends.min()), float(ends.max()), _BINS + 1, dtype=torch.float64)
    shares = histograms.shares_below(edges).diff(dim=1)
    before, tonight = (tuple(row) for row in shares.tolist())
    return DensityHistogram(tuple(edges.tolist()), before, tonight)

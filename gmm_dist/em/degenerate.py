"""Find components that lost their rows or lie on spikes, and mixtures that fell far behind."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from gmm_dist.em.gpu.residence import on_host
from gmm_dist.em.lane import Lane, Status
from gmm_dist.em.statistics import TotalMoments
from gmm_dist.model.parameters import Parameters

# Iterations before a lane is compared with its rivals, and the gains that it may still hope for.
_WARM_UP, _CATCH_UP = 3, 10.0
_NEAR = 3.0  # standard deviations between a spike and the mean of a component that lies on it
_NEARLY = 1e-6  # of a row: responsibilities that sum to two rows may round to less


def drop_laggards(lanes: Sequence[Lane], rivals: Sequence[int], total: TotalMoments) -> None:
    """End the lanes that will not catch up with one that is fitted for the same purpose.

    `rivals` names each lane's purpose. A lane is out when what it lacks is more than so many
    times its last gain would bring; one that is degenerate leads nobody.
    """
    for purpose in set(rivals):
        field = [lane for lane, own in zip(lanes, rivals, strict=True) if own == purpose]
        late = [lane for lane in field if lane.is_running and len(lane.lower_bounds) > _WARM_UP]
        if late and len(field) > 1:
            lead = _lead(field, total)
            for lane in late:
                gain = abs(lane.lower_bounds[-1] - lane.lower_bounds[-2])
                if lead - lane.lower_bounds[-1] > _CATCH_UP * gain:
                    lane.status = Status.DROPPED


def _lead(lanes: Sequence[Lane], total: TotalMoments) -> float:
    """Return the highest bound that a sound lane has come to.

    One that was dropped leads nobody: where regularisation lowers bounds, none would be left.
    """
    out = (Status.COLLAPSED, Status.DROPPED)
    scored = [lane for lane in lanes if lane.lower_bounds and lane.status not in out]
    # From the highest down: whether a lane is sound costs more to know than its bound.
    for lane in sorted(scored, key=lambda lane: lane.lower_bounds[-1], reverse=True):
        if not is_useless(lane, total):
            return lane.lower_bounds[-1]
    return -math.inf


def is_useless(lane: Lane, total: TotalMoments) -> bool:
    """Say whether a lane has collapsed or has components that mean nothing."""
    if lane.status is Status.COLLAPSED or bool(_have_few_rows(lane).any()):
        return True
    return bool(degenerate_components(lane, total).any())


def degenerate_components(lane: Lane, total: TotalMoments) -> Bool[Tensor, " k"]:
    """Say which components have too few rows, or are flat where the data are not.

    Flat: regularisation makes up most of the variance in a direction. Directions in which all
    the rows together are flat (a constant column, a duplicated one) do not count, nor those in
    which a component lies on a value that many rows share (`TotalMoments.spikes`).
    """
    parameters, reg = on_host(lane.parameters), lane.model.reg
    few = _have_few_rows(lane)
    # Nothing more to know: the eigenvalues of wide covariances take longer than a pass.
    if not bool((reg > 0).any()) or bool(few.all()):
        return few
    family, reg = parameters.type, parameters.type.added(reg)
    spread = family.spread(parameters.stacked_covariances, parameters.n_features)
    of_all = total.covariance if family.has_products else total.variances
    flat, allowed = _n_below(spread, 2 * reg), _n_below(of_all[None], reg)
    return few | (flat > allowed + _n_on_spikes(parameters, reg, total))


def _n_on_spikes(parameters: Parameters, reg: Float64[Tensor, " d"], total: TotalMoments) -> Tensor:
    """Return in how many features each component is flat because it lies on a spike."""
    variances, on_any = parameters.variances(), torch.zeros_like(parameters.means)
    for spike in total.spikes:
        j = spike.feature
        near = (parameters.means[:, j] - spike.value).square() < 2 * _NEAR**2 * reg[j]
        on_any[:, j] += near & (variances[:, j] < 2 * reg[j])
    return (on_any > 0).sum(1)


def _have_few_rows(lane: Lane) -> Bool[Tensor, " k"]:
    """Say which components have fewer rows than their covariance type needs."""
    family, d = lane.parameters.type, lane.parameters.n_features
    in_all = float(lane.rows.sum()) < family.least_rows_in_all(d) - _NEARLY
    return (lane.rows < family.least_rows(d) - _NEARLY) | in_all


def _n_below(spread: Float64[Tensor, "c ..."], floor: Float64[Tensor, " d"]) -> Tensor:
    """Return in how many directions each covariance is below that of variances `floor`.

    Variances (c, d) stand for covariances of independent features. Of matrices (c, d, d) they are
    the negative eigenvalues of Σ - diag(floor), whose number no change of the features' scales
    alters (Sylvester); where the variances are one, rounding alters it least.
    """
    if spread.ndim == 2:
        return (spread < floor).sum(-1)
    scale = torch.maximum(spread.diagonal(dim1=-2, dim2=-1), floor).rsqrt()
    shifted = spread - floor.diag()
    scaled = shifted * scale[:, :, None] * scale[:, None, :]
    below: Tensor = (torch.linalg.eigvalsh(scaled) < 0).sum(-1)
    return below

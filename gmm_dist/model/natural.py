"""The natural parameters of mixtures, and the M-step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from gmm_dist.model.covariance import TYPE_OF, Moments
from gmm_dist.model.parameters import ParameterStack, lane_numbers, of_lanes

LOG_2PI = math.log(2 * math.pi)
NEVER = -1e30
"""The log-density of a component that has no rows: finite in float32, so nothing turns NaN."""


@dataclass(frozen=True, slots=True, eq=False)
class Natural:
    """A stack's natural parameters, and how far they can be trusted.

    `theta` (K, P); `failed` (K,) marks covariances that are not positive definite;
    `condition` (K,) bounds by how much the relative rounding of second moments about the
    centre is amplified in each component's covariance.
    """

    theta: Float64[Tensor, "K P"]
    failed: Bool[Tensor, " K"]
    condition: Float64[Tensor, " K"]


def log_weights(stack: ParameterStack) -> Float64[Tensor, " K"]:
    """Return the logarithms of the mixing weights, with `NEVER` in place of -inf."""
    logs = stack.weights.log() if stack.log_weights is None else stack.log_weights
    return logs.clamp_min(NEVER)


def natural(stack: ParameterStack) -> Natural:
    """Return Θ with `log w_k + log N(x | k) = Θ_k · φ(x)`, of means about the shared centre."""
    family, d = stack.type, stack.means.shape[1]
    factors, failed = family.precisions_cholesky(stack.covariances)
    half_log_det = stack.per_component(family.half_log_det(factors, d))
    variances = stack.per_component(family.variances(stack.covariances, d))
    failed = stack.per_component(failed)
    precisions = stack.per_component(family.precisions(factors))
    linear = family.precision_times(precisions, stack.means)
    constant = log_weights(stack) + half_log_det - 0.5 * d * LOG_2PI
    constant = constant - 0.5 * (stack.means * linear).sum(-1)
    theta = family.theta(constant, linear, precisions)
    condition = family.condition(precisions, stack.means.square() + variances.clamp_min(0))
    return Natural(theta, failed, condition)


def sums_of_lanes(nk: Float64[Tensor, " K"], sizes: tuple[int, ...]) -> Float64[Tensor, " L"]:
    """Sum what the components of each lane have."""
    if nk.device.type == "cpu":
        return nk.new_zeros(len(sizes)).index_add(0, lane_numbers(sizes), nk)
    # Elsewhere index_add sums in the order in which its threads come.
    return torch.stack([part.sum() for part in of_lanes(nk, sizes)])


def maximise(
    covariance_type: str, moments: Moments, sizes: tuple[int, ...], reg: Float64[Tensor, "K d"]
) -> ParameterStack:
    """Return the parameters that maximise the expected log-likelihood (the M-step).

    `reg` (K, d), squared feature units, is added to a component's variances (spherical: its
    mean over the features); a shared covariance takes that of each lane's first component.
    """
    family = TYPE_OF[covariance_type]
    lane = lane_numbers(sizes).to(moments.nk.device)
    covariances = family.covariances(moments, lane)
    if family.is_shared:
        first = torch.tensor((0, *sizes[:-1])).cumsum(0)
        reg = reg[first]
    family.regularise(covariances, reg)
    total = sums_of_lanes(moments.nk, sizes)
    return ParameterStack(
        weights=moments.nk / total[lane],
        means=moments.about + moments.shift,
        covariances=covariances,
        covariance_type=covariance_type,
        sizes=sizes,
    )

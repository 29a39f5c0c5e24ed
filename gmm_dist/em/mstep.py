"""The M-step: score each lane after a pass, step it, and choose its next pass's precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.config import EMConfig
from gmm_dist.em.degenerate import is_useless
from gmm_dist.em.lane import Lane, MaximumLikelihood, Model, Status
from gmm_dist.em.lane_batch import Precision, left_out
from gmm_dist.em.precision import MAX_CONDITION, float32_error, survivors_per_row
from gmm_dist.em.statistics import (
    PassStatistics,
    SufficientStatistics,
    TotalMoments,
    effective_rows,
)
from gmm_dist.model.covariance import TYPE_OF, Moments
from gmm_dist.model.natural import Natural, maximise, natural
from gmm_dist.model.parameters import Parameters, ParameterStack, lane_numbers, of_lanes

_LADDER = [0.0] + [10.0**rung for rung in range(-10, -3)]


class SingularCovarianceError(ValueError):
    """A covariance is not positive definite, and the arithmetic is not to blame."""


def advance(
    group: Sequence[Lane],
    sums: SufficientStatistics,
    whole: PassStatistics,
    total: TotalMoments,
    config: EMConfig,
) -> None:
    """Score the lanes of a group with what a pass brought back, and step those that go on.

    Args:
        group: Lanes of one covariance type and precision; changed in place.
        sums: Their sufficient statistics.
        whole: The statistics of the whole pass.
        total: Moments of all rows.
        config: Settings of the loop.

    Raises SingularCovarianceError, where `config` says so.
    """
    sizes = [lane.parameters.n_components for lane in group]
    per_lane, squares = of_lanes(sums.moments, sizes, dim=1), of_lanes(sums.squares, sizes)
    stepping, moments = [], []
    for i, lane in enumerate(group):
        log_likelihood = float(sums.log_likelihood[i]) + shared_quadratic(lane, total)
        # One infinite sum spoils the M-step, though all log-densities be finite.
        in_range = lane.precision is not Precision.FLOAT32 or (
            math.isfinite(log_likelihood) and bool(per_lane[i].isfinite().all())
        )
        survivors = survivors_per_row(lane.precision, sums, i, whole)
        has_lost = lane.policy.has_lost(
            float32_error(sums, i, whole), survivors=survivors, in_range=in_range
        )
        bound = log_likelihood / whole.n_samples
        taken_back = lane.is_leaping and (has_lost or _falls(lane, bound))
        if taken_back:
            lane.take_back()
        if has_lost:
            lane.repeat_exactly()
        if has_lost or taken_back:
            continue
        lane.log_likelihood, lane.entropy = log_likelihood, float(sums.entropy[i])
        is_centred = lane.precision is Precision.CENTRED
        lane.left_out = left_out(sizes[i], survivors, lane.policy.kept) if is_centred else 0.0
        of_lane = moments_of(lane, per_lane[i], total)
        lane.nk = of_lane.nk.clone().cpu()
        lane.rows = effective_rows(lane.nk, squares[i])
        if config.returns == "stepped" or _goes_on(lane, whole.n_samples, config):
            stepping.append(lane)
            moments.append(of_lane)
    if stepping:
        _m_step(stepping, moments, whole, total, config)


def moments_of(lane: Lane, sums: Float64[Tensor, "P k"], total: TotalMoments) -> Moments:
    """Name the sums that a pass brings back for a lane."""
    family = lane.parameters.type
    if lane.precision is not Precision.CENTRED:
        return family.moments(sums, total.sum_xx)
    layout = TYPE_OF[family.alone]
    means = lane.parameters.means.to(sums.device)
    return replace(layout.moments(sums, total.sum_xx), about=means)


def shared_quadratic(lane: Lane, total: TotalMoments) -> float:
    """Return what the products of a lane with one covariance leave out of Σ log p."""
    if lane.precision is Precision.CENTRED:
        return 0.0
    return lane.parameters.type.left_out(lane.parameters.covariances, total.sum_xx)


def step(models: Sequence[Model], moments: Sequence[Moments]) -> tuple[list[Model], Natural]:
    """Return the next model of each lane, of one covariance type, and their natural parameters."""
    kind = models[0].parameters.covariance_type
    sizes = tuple(len(of_lane.nk) for of_lane in moments)
    stacked = _stacked([_filled(m, model) for m, model in zip(moments, models, strict=True)])
    reg = torch.stack([model.reg for model in models])[lane_numbers(sizes)].to(stacked.nk.device)
    stack = maximise(kind, stacked, sizes, reg)
    fits, stepped = stack.lanes(), []
    for model, of_lane, fit in zip(models, moments, fits, strict=True):
        stepped.append(model.updated(of_lane.nk, fit))
    if any(model.parameters is not fit for model, fit in zip(stepped, fits, strict=True)):
        stack = ParameterStack.of([model.parameters for model in stepped])
    return stepped, natural(stack)


def maximised(kind: str, moments: Moments, reg_covar: float, empty: float) -> Parameters:
    """Return the maximum-likelihood parameters of one mixture.

    Args:
        kind: The covariance type.
        moments: Sums over the rows.
        reg_covar: What is added to the variances, squared feature units.
        empty: Rows added to each component, so that none has zero.
    """
    nk = moments.nk + empty
    reg = torch.full_like(moments.sum_x, reg_covar)
    return maximise(kind, replace(moments, nk=nk), (len(nk),), reg).lanes()[0]


def _falls(lane: Lane, bound: float) -> bool:
    """Say whether a leap came out below what has been scored before it."""
    return not (math.isfinite(bound) and bound >= lane.lower_bounds[-1])


def _goes_on(lane: Lane, n_samples: float, config: EMConfig) -> bool:
    """Note the likelihood of the parameters scored; return whether an M-step follows."""
    bound = lane.log_likelihood / n_samples
    del lane.lower_bounds[lane.n_iter :]  # of the same parameters, in a lower precision
    lane.lower_bounds.append(bound)
    gain = math.inf if lane.last_bound is None else abs(bound - lane.last_bound)
    leapt, lane.last_bound = lane.is_leaping, bound
    if lane.squarem is not None and math.isfinite(gain):
        lane.squarem.credit(gain)
    if not math.isfinite(bound):
        lane.status = Status.COLLAPSED
    elif lane.verdict is not None:
        lane.status = lane.verdict
    # Gains between leaps do not tell the next one.
    elif lane.n_iter == config.max_iter or (
        not leapt and lane.policy.ends_at(gain, () if lane.squarem else lane.lower_bounds)
    ):
        _stop(lane, gain, config)
        return False
    return lane.is_running


def _stop(lane: Lane, gain: float, config: EMConfig) -> None:
    """End a lane, or have a better precision judge or finish what this one has come to."""
    status = Status.CONVERGED if gain < config.tol else Status.MAX_ITER
    if lane.precision is Precision.FLOAT32:
        lane.close()
        if config.precision == "float32" or lane.n_iter == config.max_iter:
            lane.verdict = status
    elif lane.strained and lane.precision is Precision.FLOAT64:
        lane.repeat_in(Precision.CENTRED)
        lane.verdict = status
    else:
        lane.status = status


def _m_step(
    lanes: Sequence[Lane],
    moments: Sequence[Moments],
    whole: PassStatistics,
    total: TotalMoments,
    config: EMConfig,
) -> None:
    """Give every lane its next model, or the precision or regularisation that it needs."""
    stepped, at = step([lane.model for lane in lanes], moments)
    sizes = [len(of_lane.nk) for of_lane in moments]
    parts = (of_lanes(of_all, sizes) for of_all in (at.theta, at.failed, at.condition))
    for lane, of_lane, model, *part in zip(lanes, moments, stepped, *parts, strict=True):
        theta, failed, condition = part[0], bool(part[1].any()), float(part[2].max())
        if not failed:
            lane.look_at_screen(model.parameters, theta)
        if _repeats(lane, condition, failed, total, config):
            continue
        if failed:
            _regularise(lane, of_lane, total, config)
        elif config.returns == "scored":
            _follow(lane, model, theta)
            lane.n_iter += 1
            lane.policy.come_back(condition)
        elif _accepts(lane, model, whole.n_samples, config):
            lane.model, lane.theta = model, theta
            lane.policy.come_back(condition)


def _repeats(
    lane: Lane, condition: float, failed: bool, total: TotalMoments, config: EMConfig
) -> bool:
    """Have the next pass repeat this one in a better form, if the step needs one."""
    better = lane.policy.needed(condition, failed)
    is_slow = better is Precision.CENTRED and lane.policy.exact is not Precision.CENTRED
    if is_slow and config.returns == "scored" and is_useless(lane, total):
        # It will not be ranked: not worth the slowest passes there are, but for the last one.
        lane.strained, better = True, Precision.FLOAT64
    if better is lane.precision:
        return False
    lane.repeat_in(better)
    return True


def _accepts(lane: Lane, model: Model, n_samples: float, config: EMConfig) -> bool:
    """Note the bound of a step, and end the lane there if it is the last one.

    Return False where float64 is to repeat the pass first.
    """
    bound = model.lower_bound(lane.log_likelihood, lane.entropy, n_samples)
    change = math.inf if lane.last_bound is None else abs(bound - lane.last_bound)
    is_last = lane.n_iter + 1 == config.max_iter
    is_float32 = lane.precision is Precision.FLOAT32 and config.precision == "auto"
    if is_float32 and (is_last or lane.policy.ends_at(change, [*lane.lower_bounds, bound])):
        lane.close()
        if is_last and change < config.tol:
            lane.verdict = Status.CONVERGED  # float64 has no bound before this one to compare
        return False
    lane.last_bound = bound
    lane.lower_bounds.append(bound)
    lane.n_iter += 1
    if change < config.tol or lane.verdict is Status.CONVERGED:
        lane.status = Status.CONVERGED
    elif is_last:
        lane.status = Status.MAX_ITER
    return True


def _follow(lane: Lane, stepped: Model, theta: Float64[Tensor, "k P"]) -> None:
    """Have the next pass score the EM step, or a leap beyond it that can be scored as safely."""
    scored, lane.model, lane.theta = lane.parameters, stepped, theta
    if lane.squarem is None:
        return
    proposed = lane.squarem.follow(scored, lane.parameters)
    if proposed is lane.parameters:
        return
    at = natural(ParameterStack.of([proposed]))
    variances = proposed.type.conditional_variances(
        proposed.stacked_covariances, proposed.n_features
    )
    # A leap must neither dive below the regularisation floor nor ask for better arithmetic.
    safe = bool((at.condition <= MAX_CONDITION[lane.precision]).all())
    floor = 2 * stepped.reg.to(variances.device)
    if safe and not bool(at.failed.any()) and bool((variances > floor).all()):
        lane.model, lane.theta = stepped.updated(lane.nk, proposed), at.theta
    else:
        lane.squarem.forget()


def _regularise(lane: Lane, moments: Moments, total: TotalMoments, config: EMConfig) -> None:
    """Raise a lane's regularisation, in each feature's units, until it is positive definite."""
    if config.on_singular == "raise" or not isinstance(lane.model, MaximumLikelihood):
        raise SingularCovarianceError
    variances = total.scale.square()
    for rung in _LADDER:
        raised = replace(lane.model, reg=torch.maximum(lane.model.reg, rung * variances))
        (model,), at = step([raised], [moments])
        if not bool(at.failed.any()):
            lane.model, lane.theta = model, at.theta
            lane.n_iter += 1
            if lane.squarem is not None:
                lane.squarem.forget()
            return
    lane.status = Status.COLLAPSED


def _filled(moments: Moments, model: Model) -> Moments:
    return replace(moments, nk=moments.nk + model.empty) if model.empty else moments


def _stacked(moments: Sequence[Moments]) -> Moments:
    if len(moments) == 1:
        return moments[0]
    is_total = moments[0].is_total  # the same for every lane
    return Moments(
        nk=torch.cat([m.nk for m in moments]),
        sum_x=torch.cat([m.sum_x for m in moments]),
        sum_xx=moments[0].sum_xx if is_total else torch.cat([m.sum_xx for m in moments]),
        about=torch.cat([m.about for m in moments]),
        is_total=is_total,
    )

"""The M-step: score each lane after a pass, step it, and choose its next pass's precision.

Precision is measured, per lane. Iterations use float32 products while (a) the error of the
mean log-likelihood, seen on a sample of rows in the pass itself, is far below tol, and (b)
rounding cannot reach a covariance through the cancellation in S/N - μμᵀ. Otherwise the pass is
repeated in float64; where even its products could lose what matters, in the centred form. What
a lane is ranked by is always scored in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.config import EMConfig
from gmm_dist.em.degenerate import is_useless
from gmm_dist.em.lane import Lane, Outcome
from gmm_dist.em.lane_batch import Precision
from gmm_dist.em.statistics import (
    PassStatistics,
    SufficientStatistics,
    TotalMoments,
    effective_rows,
)
from gmm_dist.model.covariance import TYPE_OF, Moments, maximise, natural
from gmm_dist.model.parameters import Parameters, ParameterStack

_NEXT = {Precision.FLOAT32: Precision.FLOAT64, Precision.FLOAT64: Precision.CENTRED}

# The largest amplification of rounding (covariance.Natural.condition) that each form may meet:
# 2^-24 · 1.7e3 = 1e-4 of a covariance, 2^-53 · 1e7 = 1e-9.
MAX_CONDITION = {Precision.FLOAT32: 1.7e3, Precision.FLOAT64: 1e7, Precision.CENTRED: math.inf}

# float32's error of the mean log-likelihood may be a tenth of tol, or of this where tol is less.
SMALLEST_TOL = 1e-5

_LADDER = [0.0] + [10.0**rung for rung in range(-10, -3)]


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
    """
    sizes = [lane.parameters.n_components for lane in group]
    per_lane, squares = sums.moments.split(sizes, dim=1), sums.squares.split(sizes)
    going_on = []
    for i, lane in enumerate(group):
        moments = moments_of(lane.parameters, lane.precision, per_lane[i], total)
        log_likelihood = float(sums.log_likelihood[i]) + shared_quadratic(
            lane.parameters, lane.precision, total
        )
        error = float(sums.float32_error[i]) / max(whole.n_checked, 1)
        unsure = _needs_float64(lane, log_likelihood, error, config)
        if lane.is_leaping and (unsure or _falls(lane, log_likelihood / whole.n_samples)):
            lane.take_back()
            continue
        if unsure:
            lane.repeat_in(Precision.FLOAT64)
            continue
        lane.nk, lane.entropy = moments.nk.clone(), float(sums.entropy[i])
        lane.rows = effective_rows(lane.nk, squares[i])
        if _score(lane, log_likelihood, whole.n_samples, config):
            going_on.append((lane, moments))
    if going_on:
        _m_step([lane for lane, _ in going_on], [m for _, m in going_on], total, config)


def moments_of(
    parameters: Parameters,
    precision: Precision,
    sums: Float64[Tensor, "P k"],
    total: TotalMoments,
) -> Moments:
    """Name the sums that a pass in `precision` brings back for one lane's parameters."""
    kind = parameters.covariance_type
    if precision is not Precision.CENTRED:
        return TYPE_OF[kind].moments(sums, total.sum_xx)
    layout = TYPE_OF["full" if kind == "tied" else kind]
    about = layout.moments(sums, total.sum_xx)
    return Moments(nk=about.nk, sum_x=about.sum_x, sum_xx=about.sum_xx, about=parameters.means)


def shared_quadratic(parameters: Parameters, precision: Precision, total: TotalMoments) -> float:
    """Return what the products of a tied lane leave out of Σ log p: -½ tr(Σ⁻¹ S)."""
    if parameters.covariance_type != "tied" or precision is Precision.CENTRED:
        return 0.0
    factors, _ = TYPE_OF["tied"].precisions_cholesky(parameters.covariances[None])
    return -0.5 * float(((factors[0].T @ total.sum_xx) * factors[0].T).sum())


def _needs_float64(lane: Lane, log_likelihood: float, error: float, config: EMConfig) -> bool:
    if lane.precision is not Precision.FLOAT32 or config.precision != "auto":
        return False
    harmless = error <= max(config.tol, SMALLEST_TOL) / 10
    return not (harmless and math.isfinite(log_likelihood))


def _falls(lane: Lane, bound: float) -> bool:
    """Say whether a leap came out below what has been scored before it."""
    return not (math.isfinite(bound) and bound >= lane.lower_bounds[-1])


def _score(lane: Lane, log_likelihood: float, n_samples: float, config: EMConfig) -> bool:
    """Note the likelihood of a lane's parameters; return whether it goes on to an M-step."""
    bound = log_likelihood / n_samples
    lane.log_likelihood = log_likelihood
    del lane.lower_bounds[lane.n_iter :]  # of the same parameters, in a lower precision
    lane.lower_bounds.append(bound)
    gain = math.inf if lane.last_bound is None else abs(bound - lane.last_bound)
    leapt, lane.last_bound = lane.is_leaping, bound
    if lane.squarem is not None and math.isfinite(gain):
        lane.squarem.credit(gain)
    if not math.isfinite(bound):
        lane.outcome = Outcome.SINGULAR
    elif lane.verdict is not None:
        lane.outcome = lane.verdict
    elif (gain < _tol(lane, config) and not leapt) or lane.n_iter == config.max_iter:
        _stop(lane, gain, config)
        return False
    return lane.outcome is Outcome.RUNNING


def _tol(lane: Lane, config: EMConfig) -> float:
    """Return the gain that ends a lane's passes; smaller ones drown in float32's rounding."""
    if lane.precision is Precision.FLOAT32 and config.precision == "auto":
        return max(config.tol, SMALLEST_TOL)
    return config.tol


def _stop(lane: Lane, gain: float, config: EMConfig) -> None:
    """End a lane, or have a better precision judge or finish what this one has come to."""
    outcome = Outcome.CONVERGED if gain < config.tol else Outcome.MAX_ITER
    if lane.precision is Precision.FLOAT32:
        lane.repeat_in(Precision.FLOAT64)
        if config.precision == "float32" or lane.n_iter == config.max_iter:
            lane.verdict = outcome
    elif lane.strained and lane.precision is Precision.FLOAT64:
        lane.repeat_in(Precision.CENTRED)
        lane.verdict = outcome
    else:
        lane.outcome = outcome


def _m_step(
    lanes: Sequence[Lane], moments: Sequence[Moments], total: TotalMoments, config: EMConfig
) -> None:
    """Give every lane its next parameters, or the precision or regularisation that it needs."""
    kind = lanes[0].parameters.covariance_type
    stack = maximise(kind, _stacked(kind, moments), _sizes(lanes), _reg(lanes))
    at = natural(stack)
    sizes = list(stack.sizes)
    parts = (
        stack.lanes(),
        at.theta.split(sizes),
        at.failed.split(sizes),
        at.condition.split(sizes),
    )
    for lane, own, parameters, theta, failed, condition in zip(lanes, moments, *parts, strict=True):
        singular = bool(failed.any())
        limit = MAX_CONDITION[lane.precision]
        if (singular or bool((condition > limit).any())) and _escalate(lane, total, config):
            continue
        if singular:
            _climb(lane, own, total)
        else:
            _follow(lane, parameters, theta)
            lane.n_iter += 1


def _follow(lane: Lane, stepped: Parameters, theta: Tensor) -> None:
    """Have the next pass score the EM step, or a leap beyond it that can be scored as safely."""
    scored, lane.parameters, lane.theta = lane.parameters, stepped, theta
    if lane.squarem is None:
        return
    proposed = lane.squarem.follow(scored, stepped)
    if proposed is stepped:
        return
    at = natural(ParameterStack.of([proposed]))
    variances = _least_variances(proposed)
    # A leap must neither dive below the regularisation floor nor ask for better arithmetic.
    safe = bool((at.condition <= MAX_CONDITION[lane.precision]).all() and not at.failed.any())
    if safe and bool((variances > 2 * lane.reg).all()):
        lane.parameters, lane.theta = proposed, at.theta
    else:
        lane.squarem.forget()


def _least_variances(parameters: Parameters) -> Tensor:
    """Return variances per component and feature, of correlated ones given those before."""
    if parameters.covariance_type in ("full", "tied"):
        factors: Tensor = torch.linalg.cholesky_ex(parameters.covariances)[0]
        return factors.diagonal(dim1=-2, dim2=-1) ** 2
    return TYPE_OF[parameters.covariance_type].variances(
        parameters.covariances, parameters.n_features
    )


def _escalate(lane: Lane, total: TotalMoments, config: EMConfig) -> bool:
    """Repeat the pass in the next better form; return False where there is none."""
    if config.precision == "float32" or lane.precision is Precision.CENTRED:
        return False
    better = _NEXT[lane.precision]
    if better is Precision.CENTRED and is_useless(lane, total):
        # It will not be ranked: not worth the slowest passes there are, but for the last one.
        lane.strained = True
        return False
    lane.repeat_in(better)
    return True


def _climb(lane: Lane, moments: Moments, total: TotalMoments) -> None:
    """Raise a lane's regularisation, in each feature's units, until it is positive definite."""
    kind, variances = lane.parameters.covariance_type, total.scale.square()
    for rung in _LADDER:
        lane.reg = torch.maximum(lane.reg, rung * variances)
        stack = maximise(kind, _stacked(kind, [moments]), _sizes([lane]), _reg([lane]))
        at = natural(stack)
        if not bool(at.failed.any()):
            lane.parameters, lane.theta = stack.lanes()[0], at.theta
            lane.n_iter += 1
            if lane.squarem is not None:
                lane.squarem.forget()
            return
    lane.outcome = Outcome.SINGULAR


def _stacked(kind: str, moments: Sequence[Moments]) -> Moments:
    if len(moments) == 1:
        return moments[0]
    shared = kind == "tied" and moments[0].sum_xx.ndim == 2
    sum_xx = moments[0].sum_xx if shared else torch.cat([m.sum_xx for m in moments])
    return Moments(
        nk=torch.cat([m.nk for m in moments]),
        sum_x=torch.cat([m.sum_x for m in moments]),
        sum_xx=sum_xx,
        about=torch.cat([m.about for m in moments]),
    )


def _sizes(lanes: Sequence[Lane]) -> tuple[int, ...]:
    return tuple(lane.parameters.n_components for lane in lanes)


def _reg(lanes: Sequence[Lane]) -> Float64[Tensor, "K d"]:
    reg = torch.stack([lane.reg for lane in lanes])
    return torch.repeat_interleave(reg, torch.tensor(_sizes(lanes)), dim=0)

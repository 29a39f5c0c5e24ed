"""EM in scikit-learn's order, for models that differ in their M-step only.

One iteration is a pass over the rows, an M-step, and a comparison of the lower bound's change
with tol. The result is one step ahead of what was scored last, as in scikit-learn; `em.loop`
returns what it has scored, moves its lanes between precisions and helps singular ones on.
All trials of a fit are lanes of the same passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.em.estep import EStep
from gmm_dist.em.lane_batch import LaneBatch, Precision
from gmm_dist.em.mstep import MAX_CONDITION, SMALLEST_TOL, moments_of, shared_quadratic
from gmm_dist.em.statistics import SufficientStatistics, TotalMoments
from gmm_dist.model.covariance import Moments, maximise, natural
from gmm_dist.model.parameters import Parameters, ParameterStack
from gmm_dist.shards.protocol import Shards

_FORMS = (Precision.FLOAT32, Precision.FLOAT64, Precision.CENTRED)
_EMPTY = 10 * 2.0**-52  # scikit-learn's: rows added to each component, so that none has zero


@runtime_checkable
class Model(Protocol):
    """A mixture about the rows' shared centre, and its M-step."""

    @property
    def parameters(self) -> Parameters:
        """The mixture whose responsibilities a pass takes."""

    def step(self, moments: Moments) -> Model:
        """Return the model of the next iteration (the M-step).

        `moments` may be about each component's mean (`Moments.about`).
        """

    def lower_bound(self, log_likelihood: float, entropy: float, n_samples: float) -> float:
        """Return this model's bound; the sums are of the pass that it was stepped from."""


@dataclass(frozen=True, slots=True, eq=False)
class MaximumLikelihood:
    """The plain mixture; `reg_covar`, squared feature units, is added to its variances.

    `mean_weight` is what a row counts for.
    """

    parameters: Parameters
    reg_covar: float
    mean_weight: float = 1.0

    def step(self, moments: Moments) -> MaximumLikelihood:
        kind = self.parameters.covariance_type
        stepped = maximised(kind, moments, self.reg_covar, self.mean_weight)
        return replace(self, parameters=stepped)

    def lower_bound(self, log_likelihood: float, entropy: float, n_samples: float) -> float:
        return log_likelihood / n_samples


def mean_weight(total: TotalMoments) -> float:
    """Return what a row of positive weight counts for; 1 where there are no weights."""
    return total.n_samples / total.n_rows


def maximised(
    kind: str, moments: Moments, reg_covar: float, mean_weight: float = 1.0
) -> Parameters:
    """Return the maximum-likelihood parameters of one mixture, as scikit-learn floors them."""
    empty = _EMPTY * mean_weight
    floored = Moments(
        nk=moments.nk + empty, sum_x=moments.sum_x, sum_xx=moments.sum_xx, about=moments.about
    )
    reg = torch.full_like(moments.sum_x, reg_covar)
    return maximise(kind, floored, (len(reg),), reg).lanes()[0]


def moments_of_shares(
    kind: str,
    X: Float64[Tensor, "n d"],
    share: Float64[Tensor, "n k"],
    total: TotalMoments,
    centre: Float64[Tensor, " d"],
) -> Moments:
    """Return what an M-step reads of rows that are shared out among components.

    Where a few rows make a component, as seeds do, a variance is what is left of two numbers
    that are nearly equal; so these moments are about each component's mean. Not tied ones.

    Args:
        kind: The covariance type.
        X: Rows (n, d) in feature units.
        share: w_n r_nk (n, k): each row's weight times its responsibilities.
        total: Moments of all rows.
        centre: The rows' shared centre (d,).
    """
    nk = share.sum(0)
    sum_x = share.T @ X
    if kind == "tied":
        return _tied_moments(nk.cpu(), sum_x.cpu(), total, centre)
    means = sum_x / (nk + _EMPTY * mean_weight(total))[:, None]
    second = []
    for mean, part in zip(means, share.T, strict=True):
        x = X - mean  # one component's at a time: each is as large as the rows are
        second.append((x.T * part) @ x if kind == "full" else part @ x.square())
    sum_xx = torch.stack(second)
    if kind == "spherical":
        sum_xx = sum_xx.sum(1)
    # What is left of Σ r (x - mean) is rounding.
    return Moments(
        nk=nk.cpu(), sum_x=torch.zeros_like(sum_x).cpu(), sum_xx=sum_xx.cpu(), about=means.cpu()
    )


def _tied_moments(
    nk: Tensor, sum_x: Tensor, total: TotalMoments, centre: Float64[Tensor, " d"]
) -> Moments:
    """Return moments whose scatter is that of all rows about the origin, whatever is shared out.

    So it is in scikit-learn, where seeds share out k rows only: their tied start is wider than
    the rows, the more so the farther these lie from the origin. Where all rows are shared out,
    the origin cancels.
    """
    left_n, left_x = total.n_samples - nk.sum(), total.sum_x - sum_x.sum(0)
    across = centre[:, None] * left_x
    apart = left_n * centre[:, None] * centre + across + across.T
    return Moments(nk=nk, sum_x=sum_x, sum_xx=total.sum_xx + apart, about=torch.zeros_like(sum_x))


class SingularCovarianceError(ValueError):
    """A covariance is not positive definite, and the arithmetic is not to blame."""


@dataclass(frozen=True, slots=True)
class Rules:
    """When trials stop, and the arithmetic of their passes (`config.EMConfig` explains both)."""

    tol: float
    max_iter: int
    precision: str = "float64"

    @property
    def least(self) -> Precision:
        return Precision.FLOAT64 if self.precision == "float64" else Precision.FLOAT32


@dataclass(slots=True, eq=False, kw_only=True)
class Trial:
    """One start and what came of it: the `model` after `n_iter` M-steps.

    `lower_bounds` has one value for each; `last_bound` is what the next is compared with.
    """

    model: Model
    last_bound: float = -math.inf
    lower_bounds: list[float] = field(default_factory=list)
    converged: bool = False
    precision: Precision = Precision.FLOAT64
    theta: Float64[Tensor, "k P"] | None = None

    @property
    def n_iter(self) -> int:
        return len(self.lower_bounds)

    @property
    def lower_bound(self) -> float:
        return self.lower_bounds[-1] if self.lower_bounds else -math.inf

    @property
    def parameters(self) -> Parameters:
        return self.model.parameters


Watch = Callable[[Trial, float], None]
"""Told of each M-step, and by how much it changed the trial's lower bound."""


def run(
    shards: Shards,
    trials: Sequence[Trial],
    rules: Rules,
    total: TotalMoments,
    *,
    watch: Watch = lambda trial, change: None,
) -> None:
    """Iterate every trial until its bound changes by less than tol, or its iterations are used up.

    Args:
        shards: The rows, about their shared centre.
        trials: What is fitted; changed in place.
        rules: tol, max_iter and the precisions that are allowed.
        total: Moments of all rows.
        watch: Sees a trial and its change of bound after each iteration.

    Raises SingularCovarianceError.
    """
    for trial in trials:
        _begin(trial, rules)
    while running := [t for t in trials if not t.converged and t.n_iter < rules.max_iter]:
        groups = _grouped(running)
        task = EStep(tuple(_packed(group) for group in groups), len(total.sum_x))
        whole = shards.run(task)
        for group, sums in zip(groups, whole.groups, strict=True):
            sizes = [trial.parameters.n_components for trial in group]
            moments = sums.moments.split(sizes, dim=1) if len(group) > 1 else (sums.moments,)
            for i, trial in enumerate(group):
                found = _Pass(
                    sums=sums,
                    lane=i,
                    moments=moments[i],
                    n_samples=whole.n_samples,
                    n_checked=whole.n_checked,
                )
                _advance(trial, found, total, rules, watch)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Pass:
    """What a pass found of one trial, the `lane`-th of its group."""

    sums: SufficientStatistics
    lane: int
    moments: Tensor
    n_samples: float
    n_checked: int

    @property
    def float32_error(self) -> float:
        return float(self.sums.float32_error[self.lane]) / max(self.n_checked, 1)


def _begin(trial: Trial, rules: Rules) -> None:
    at = natural(ParameterStack.of([trial.parameters]))
    if bool(at.failed.any()):
        raise SingularCovarianceError
    trial.precision, trial.theta = _needed(float(at.condition.max()), rules), at.theta


def _advance(trial: Trial, found: _Pass, total: TotalMoments, rules: Rules, watch: Watch) -> None:
    """Step a trial, or have the next pass repeat this one with more digits."""
    model = trial.model
    moments = moments_of(trial.parameters, trial.precision, found.moments, total)
    log_likelihood = float(found.sums.log_likelihood[found.lane]) + shared_quadratic(
        trial.parameters, trial.precision, total
    )
    stepped = model.step(moments)
    at = natural(ParameterStack.of([stepped.parameters]))
    failed = bool(at.failed.any())
    needed = Precision.CENTRED if failed else _needed(float(at.condition.max()), rules)
    if _is_coarser(trial.precision, needed) and rules.precision != "float32":
        trial.precision = needed
        return
    if failed:
        raise SingularCovarianceError
    entropy = float(found.sums.entropy[found.lane])
    bound = stepped.lower_bound(log_likelihood, entropy, found.n_samples)
    change = bound - trial.last_bound
    if trial.precision is Precision.FLOAT32 and _is_unsure(trial, found, bound, rules):
        trial.precision, trial.last_bound = Precision.FLOAT64, -math.inf
        return
    trial.model, trial.theta, trial.last_bound = stepped, at.theta, bound
    # Back from the slowest form as soon as a step does without; float32 is left for good.
    trial.precision = max(needed, min(trial.precision, Precision.FLOAT64, key=_rank), key=_rank)
    trial.lower_bounds.append(bound)
    trial.converged = abs(change) < rules.tol
    watch(trial, change)


def _is_unsure(trial: Trial, found: _Pass, bound: float, rules: Rules) -> bool:
    """Say whether float64 has to repeat a float32 pass: its error counts, or it is the last."""
    if rules.precision == "float32":
        return False
    tol = max(rules.tol, SMALLEST_TOL)
    harmless = found.float32_error <= tol / 10 and math.isfinite(bound)
    change = abs(bound - trial.last_bound)
    return not harmless or change < tol or trial.n_iter + 1 == rules.max_iter


def _needed(condition: float, rules: Rules) -> Precision:
    """Return the fastest form of a pass that keeps the digits of such covariances."""
    if rules.precision == "float32":
        return Precision.FLOAT32
    allowed = [p for p in _FORMS if _rank(p) >= _rank(rules.least)]
    return next((p for p in allowed if condition <= MAX_CONDITION[p]), Precision.CENTRED)


def _rank(precision: Precision) -> int:
    return _FORMS.index(precision)


def _is_coarser(used: Precision, needed: Precision) -> bool:
    return _rank(used) < _rank(needed)


def _grouped(trials: Sequence[Trial]) -> list[list[Trial]]:
    groups: dict[Precision, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.precision, []).append(trial)
    return list(groups.values())


def _packed(group: Sequence[Trial]) -> LaneBatch:
    thetas = [trial.theta for trial in group if trial.theta is not None]
    return LaneBatch.of([trial.parameters for trial in group], thetas, group[0].precision)

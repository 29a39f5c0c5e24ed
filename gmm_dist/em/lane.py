"""A lane: one mixture that is being fitted, how far it has come, and snapshots to resume from.

A lane shares its passes with others. It carries a model: a mixture of maximum likelihood, or a
posterior over mixtures. A snapshot holds lanes as tensors and plain values, and gives them back
to the bit.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.config import RELATIVE, EMConfig
from gmm_dist.em.estep import EStep
from gmm_dist.em.gpu.half_screen import screens_in_half
from gmm_dist.em.lane_batch import LaneBatch, Precision, screen_of, screens
from gmm_dist.em.precision import PrecisionPolicy, check_every
from gmm_dist.em.squarem import Squarem
from gmm_dist.em.statistics import TotalMoments
from gmm_dist.model.density_loops import suits
from gmm_dist.model.natural import natural
from gmm_dist.model.parameters import Parameters, ParameterStack
from gmm_dist.model.variational import Posterior, Prior


class Status(enum.Enum):
    """Why EM stopped; the value is the sentence to show a user."""

    CONVERGED = "converged: the gain in mean log-likelihood fell below tol"
    MAX_ITER = "max_iter reached before convergence: raise max_iter or tol"
    COLLAPSED = "collapsed: a covariance is singular; use fewer components or a larger reg_covar"
    DEGENERATE = (
        "degenerate: a component has fewer rows than its covariance needs or lies on the "
        "regularisation floor; use fewer components"
    )
    DROPPED = "dropped: another start of the same candidate was ahead"


@runtime_checkable
class Model(Protocol):
    """A mixture about the rows' shared centre, and what its M-step adds to what the rows say."""

    @property
    def parameters(self) -> Parameters:
        """The mixture whose responsibilities a pass takes."""

    @property
    def reg(self) -> Float64[Tensor, " d"]:
        """What the M-step adds to the variances of the rows, squared feature units."""

    @property
    def empty(self) -> float:
        """The rows added to each component, so that none has zero."""

    def updated(self, nk: Float64[Tensor, " k"], fitted: Parameters) -> Model:
        """Return the next model; `fitted` maximises the likelihood of components of `nk` rows."""

    def lower_bound(self, log_likelihood: float, entropy: float, n_samples: float) -> float:
        """Return this model's bound; the sums are of the pass that it was stepped from."""


@dataclass(frozen=True, slots=True, eq=False)
class MaximumLikelihood:
    """The plain mixture."""

    parameters: Parameters
    reg: Float64[Tensor, " d"]
    empty: float = 0.0

    def updated(self, nk: Float64[Tensor, " k"], fitted: Parameters) -> MaximumLikelihood:
        return replace(self, parameters=fitted)

    def lower_bound(self, log_likelihood: float, entropy: float, n_samples: float) -> float:
        return log_likelihood / n_samples


@dataclass(slots=True, eq=False, kw_only=True)
class Lane:
    """One mixture being fitted: the model that the next pass scores, and its history."""

    model: Model
    theta: Float64[Tensor, "k P"]
    policy: PrecisionPolicy
    nk: Float64[Tensor, " k"]
    # How many rows of equal weight each component's are worth: without weights, nk.
    rows: Float64[Tensor, " k"]
    # None: plain EM.
    squarem: Squarem | None = None
    # None while the lane runs.
    status: Status | None = None
    n_iter: int = 0
    lower_bounds: list[float] = field(default_factory=list)
    log_likelihood: float = -math.inf
    entropy: float = math.nan
    # Bounds what the log-likelihood leaves out, nats per row.
    left_out: float = 0.0
    # The bound before this one, if the present precision may be compared with it.
    last_bound: float | None = None
    # What the lane will have come to when a better form has scored its parameters.
    verdict: Status | None = None
    # Whether float64 products have gone on where the centred form would be right.
    strained: bool = False

    @classmethod
    def start(
        cls,
        parameters: Parameters,
        config: EMConfig,
        total: TotalMoments | None = None,
    ) -> Lane:
        """Start from parameters; `total` are the moments of the rows (None: features spread by 1).

        With moments, and as `config` says, it leaps ahead of EM.
        """
        if total is None:
            unit = parameters.means.new_ones(parameters.n_features)
            return cls.of(MaximumLikelihood(parameters, regularisation(config, unit)), config)
        model = MaximumLikelihood(parameters, regularisation(config, total.scale))
        lane = cls.of(model, config, total)
        if config.accelerate:
            lane.squarem = Squarem(scale=total.scale)
        return lane

    @classmethod
    def of(
        cls,
        model: Model,
        config: EMConfig,
        total: TotalMoments | None = None,
        last_bound: float | None = None,
    ) -> Lane:
        """Start from a model, of rows with moments; the first bound is compared with `last_bound`.

        Without moments no loops are compiled.
        """
        at_start = natural(ParameterStack.of([model.parameters]))
        condition = float(at_start.condition.max())
        empty = torch.zeros_like(model.parameters.weights)
        return cls(
            model=model,
            theta=at_start.theta,
            policy=PrecisionPolicy.first(
                config,
                condition,
                model.parameters,
                compiled=_compiles(model, config, total),
                float64_price=0.0 if total is None else total.float64_price,
            ),
            nk=empty,
            rows=empty.clone(),
            status=Status.COLLAPSED if bool(at_start.failed.any()) else None,
            last_bound=last_bound,
        )

    @property
    def parameters(self) -> Parameters:
        """The mixture that the next pass scores, or that the lane has come to."""
        return self.model.parameters

    @property
    def is_running(self) -> bool:
        return self.status is None

    @property
    def converged(self) -> bool:
        return self.status is Status.CONVERGED

    @property
    def lower_bound(self) -> float:
        """The last bound; -inf before the first."""
        return self.lower_bounds[-1] if self.lower_bounds else -math.inf

    @property
    def is_leaping(self) -> bool:
        """Whether the next pass scores an extrapolation, which may fail."""
        return self.squarem is not None and self.squarem.is_leaping

    @property
    def precision(self) -> Precision:
        """The form of the next pass."""
        return self.policy.form

    def repeat_in(self, precision: Precision) -> None:
        """Have the next pass score the same parameters, more carefully."""
        self.policy.form, self.last_bound = precision, None
        if self.squarem is not None:
            self.squarem.forget()

    def close(self) -> None:
        """Have the remaining passes judge exactly what float32 has come to."""
        self.policy.leave_float32()
        self.repeat_exactly()

    def repeat_exactly(self) -> None:
        """Have the next pass score the same parameters in the faster of the exact forms."""
        self.look_at_screen(self.parameters, self.theta)
        self.repeat_in(self.policy.exact)

    def look_at_screen(self, parameters: Parameters, theta: Float64[Tensor, "k P"]) -> None:
        """Tell the policy how many components cannot be screened, where it depends on it."""
        if self.policy.asks_for_screen:
            alone, theta = screen_of(ParameterStack.of([parameters]), theta)
            on_gpu = bool(self.policy.float64_price) and alone.type.has_products
            screened = screens_in_half(alone, theta) if on_gpu else screens(alone, theta)
            self.policy.unscreened = float((~screened).sum())

    def take_back(self) -> None:
        """Have the next pass score the EM step that a failed leap replaced."""
        assert self.squarem is not None
        self.model = self.model.updated(self.nk, self.squarem.take_back())
        self.theta = natural(ParameterStack.of([self.parameters])).theta


def _compiles(model: Model, config: EMConfig, total: TotalMoments | None) -> bool:
    """Say whether a lane's centred passes take compiled loops."""
    if total is None or not total.loops_pay(config.compile_from):
        return False
    return suits(model.parameters.type, model.parameters.n_features)


def regularisation(config: EMConfig, scale: Float64[Tensor, " d"]) -> Float64[Tensor, " d"]:
    """Return what is added to the variances (squared feature units)."""
    if config.reg_unit == RELATIVE:
        return config.reg_covar * scale.square()
    return torch.full_like(scale, config.reg_covar)


def grouped(lanes: Sequence[Lane]) -> list[list[Lane]]:
    """Group lanes of one covariance type and form, in a fixed order."""
    groups: dict[tuple[str, Precision, bool], list[Lane]] = {}
    for lane in lanes:
        key = lane.parameters.covariance_type, lane.precision, lane.policy.all_pairs
        groups.setdefault(key, []).append(lane)
    return list(groups.values())


def task_of(groups: Sequence[Sequence[Lane]], n_rows: int) -> EStep:
    """Return the pass over `n_rows` rows that scores all lanes."""
    return EStep(
        groups=tuple(_batch(group) for group in groups),
        n_features=groups[0][0].parameters.n_features,
        check_every=check_every(n_rows, groups[0][0].policy.float64_price),
    )


def _batch(group: Sequence[Lane]) -> LaneBatch:
    policy = group[0].policy
    # Of lanes in one group some may have been stepped on a GPU, others not yet.
    device = next((lane.theta.device for lane in group if lane.theta.is_cuda), torch.device("cpu"))
    return LaneBatch.of(
        [lane.parameters.to(device) for lane in group],
        [lane.theta.to(device) for lane in group],
        policy.form,
        checks=any(lane.policy.measures_float32 for lane in group),
        compiled=policy.compiled,
        all_pairs=policy.all_pairs,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Where lanes stand between two passes: `tensors` by name, `state` as plain JSON values."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


_CLASSES = {
    cls.__name__: cls
    for cls in (
        Lane,
        MaximumLikelihood,
        Parameters,
        Posterior,
        PrecisionPolicy,
        Prior,
        Squarem,
    )
}
_ENUMS = {cls.__name__: cls for cls in (Precision, Status)}


def take_snapshot(lanes: Sequence[Lane]) -> Snapshot:
    """Return all that the lanes' next passes depend on."""
    tensors: dict[str, Tensor] = {}
    states = [_plain(lane, str(i), tensors) for i, lane in enumerate(lanes)]
    return Snapshot(tensors, {"lanes": states})


def restore_lanes(snapshot: Snapshot) -> list[Lane]:
    """Return the lanes that a snapshot was taken of."""
    return [_value(state, snapshot.tensors) for state in snapshot.state["lanes"]]


def _plain(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON has it; its tensors are put among `tensors`, by their names."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, enum.Enum):
        return {type(value).__name__: value.name}
    if isinstance(value, list):
        return [_plain(part, f"{name}.{i}", tensors) for i, part in enumerate(value)]
    if not is_dataclass(value):
        return value
    parts = {part.name: getattr(value, part.name) for part in fields(value)}
    return {
        type(value).__name__: {
            key: _plain(part, f"{name}.{key}", tensors) for key, part in parts.items()
        }
    }


def _value(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what `_plain` was given."""
    if isinstance(plain, list):
        return [_value(part, tensors) for part in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, content),) = plain.items()
    if kind == "tensor":
        return tensors[content]
    if kind in _ENUMS:
        return _ENUMS[kind][content]
    return _CLASSES[kind](**{key: _value(part, tensors) for key, part in content.items()})

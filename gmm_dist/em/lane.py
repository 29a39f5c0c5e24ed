"""A lane: one mixture that is being fitted, how far it has come, and snapshots to resume from.

A lane shares its passes with others; a snapshot holds lanes as tensors and plain values, and
gives them back to the bit.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.config import RELATIVE, EMConfig
from gmm_dist.em.estep import EStep
from gmm_dist.em.lane_batch import LaneBatch, Precision
from gmm_dist.em.squarem import Squarem
from gmm_dist.model.covariance import natural
from gmm_dist.model.parameters import Parameters, ParameterStack

_PLAIN = ("n_iter", "lower_bounds", "log_likelihood", "entropy", "last_bound", "strained")
_LEAPS = ("max_step", "n_leaps", "n_failed", "saved", "last_gain")


class Outcome(enum.Enum):
    """Where a lane stands."""

    RUNNING = enum.auto()
    CONVERGED = enum.auto()
    MAX_ITER = enum.auto()
    SINGULAR = enum.auto()
    DROPPED = enum.auto()


@dataclass(slots=True, eq=False, kw_only=True)
class Lane:
    """One mixture being fitted: the parameters that the next pass scores, and its history."""

    parameters: Parameters
    theta: Float64[Tensor, "k P"]
    precision: Precision
    reg: Float64[Tensor, " d"]
    nk: Float64[Tensor, " k"]
    # How many rows of equal weight each component's are worth: without weights, nk.
    rows: Float64[Tensor, " k"]
    # None: plain EM.
    squarem: Squarem | None = None
    outcome: Outcome = Outcome.RUNNING
    n_iter: int = 0
    lower_bounds: list[float] = field(default_factory=list)
    log_likelihood: float = -math.inf
    entropy: float = math.nan
    # The bound before this one, if the present precision has scored it.
    last_bound: float | None = None
    # What the lane will have come to when float64 has scored its parameters.
    verdict: Outcome | None = None
    # Whether float64 products have gone on where the centred form would be right.
    strained: bool = False

    @classmethod
    def start(
        cls,
        parameters: Parameters,
        config: EMConfig,
        scale: Float64[Tensor, " d"] | None = None,
    ) -> Lane:
        """Start from parameters, of rows whose features have the spread `scale` (None: 1).

        With a scale, and as `config` says, it leaps ahead of EM.
        """
        exact, d = config.precision == "float64", parameters.n_features
        at_start = natural(ParameterStack.of([parameters]))
        lane = cls(
            parameters=parameters,
            theta=at_start.theta,
            precision=Precision.FLOAT64 if exact else Precision.FLOAT32,
            reg=regularisation(config, parameters.means.new_ones(d) if scale is None else scale),
            nk=torch.zeros_like(parameters.weights),
            rows=torch.zeros_like(parameters.weights),
            squarem=Squarem(scale=scale) if config.accelerate and scale is not None else None,
        )
        if bool(at_start.failed.any()):
            lane.outcome = Outcome.SINGULAR
        return lane

    @property
    def is_leaping(self) -> bool:
        """Whether the next pass scores an extrapolation, which may fail."""
        return self.squarem is not None and self.squarem.is_leaping

    def repeat_in(self, precision: Precision) -> None:
        """Have the next pass score the same parameters, more carefully."""
        self.precision, self.last_bound = precision, None
        if self.squarem is not None:
            self.squarem.forget()

    def take_back(self) -> None:
        """Have the next pass score the EM step that a failed leap replaced."""
        assert self.squarem is not None
        self.parameters = self.squarem.take_back()
        self.theta = natural(ParameterStack.of([self.parameters])).theta


def regularisation(config: EMConfig, scale: Float64[Tensor, " d"]) -> Float64[Tensor, " d"]:
    """Return what is added to the variances (squared feature units)."""
    if config.reg_unit == RELATIVE:
        return config.reg_covar * scale.square()
    return torch.full_like(scale, config.reg_covar)


def grouped(lanes: Sequence[Lane]) -> list[list[Lane]]:
    """Group lanes of one covariance type and precision, in a fixed order."""
    groups: dict[tuple[str, Precision], list[Lane]] = {}
    for lane in lanes:
        groups.setdefault((lane.parameters.covariance_type, lane.precision), []).append(lane)
    return list(groups.values())


def task_of(groups: Sequence[Sequence[Lane]]) -> EStep:
    """Return the pass that scores all lanes."""
    return EStep(tuple(_packed(group) for group in groups), groups[0][0].parameters.n_features)


def _packed(group: Sequence[Lane]) -> LaneBatch:
    lanes, thetas = [lane.parameters for lane in group], [lane.theta for lane in group]
    return LaneBatch.of(lanes, thetas, group[0].precision)


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Where lanes stand between two passes: `tensors` by name, `state` as plain JSON values."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


def take_snapshot(lanes: Sequence[Lane]) -> Snapshot:
    """Return all that the lanes' next passes depend on."""
    tensors: dict[str, Tensor] = {}
    states = []
    for i, lane in enumerate(lanes):
        plain = {name: getattr(lane, name) for name in _PLAIN}
        plain["lower_bounds"] = list(lane.lower_bounds)
        plain |= {
            "covariance_type": lane.parameters.covariance_type,
            "precision": lane.precision.name,
            "outcome": lane.outcome.name,
            "verdict": None if lane.verdict is None else lane.verdict.name,
        }
        tensors |= {f"{i}.theta": lane.theta, f"{i}.reg": lane.reg, f"{i}.nk": lane.nk}
        tensors[f"{i}.rows"] = lane.rows
        tensors |= _tensors(f"{i}.parameters", lane.parameters)
        if (squarem := lane.squarem) is not None:
            plain["leaps"] = {name: getattr(squarem, name) for name in _LEAPS}
            plain["n_trail"], plain["leaping"] = len(squarem.trail), squarem.is_leaping
            tensors[f"{i}.scale"] = squarem.scale
            for j, passed in enumerate(squarem.trail):
                tensors |= _tensors(f"{i}.trail.{j}", passed)
            if squarem.fallback is not None:
                tensors |= _tensors(f"{i}.fallback", squarem.fallback)
        states.append(plain)
    return Snapshot(tensors, {"lanes": states})


def restore_lanes(snapshot: Snapshot) -> list[Lane]:
    """Return the lanes that a snapshot was taken of."""
    return [_lane(snapshot.tensors, i, one) for i, one in enumerate(snapshot.state["lanes"])]


def _lane(tensors: Mapping[str, Tensor], i: int, plain: Mapping[str, Any]) -> Lane:
    kind = plain["covariance_type"]
    squarem = None
    if "leaps" in plain:
        trail = [_parameters(tensors, f"{i}.trail.{j}", kind) for j in range(plain["n_trail"])]
        fallback = _parameters(tensors, f"{i}.fallback", kind) if plain["leaping"] else None
        squarem = Squarem(
            scale=tensors[f"{i}.scale"], trail=trail, fallback=fallback, **plain["leaps"]
        )
    return Lane(
        parameters=_parameters(tensors, f"{i}.parameters", kind),
        theta=tensors[f"{i}.theta"],
        precision=Precision[plain["precision"]],
        reg=tensors[f"{i}.reg"],
        nk=tensors[f"{i}.nk"],
        # Snapshots of earlier versions lack them; the next pass counts anew.
        rows=tensors.get(f"{i}.rows", tensors[f"{i}.nk"]),
        squarem=squarem,
        outcome=Outcome[plain["outcome"]],
        verdict=None if plain["verdict"] is None else Outcome[plain["verdict"]],
        **{name: plain[name] for name in _PLAIN},
    )


def _tensors(name: str, parameters: Parameters) -> dict[str, Tensor]:
    return {
        f"{name}.weights": parameters.weights,
        f"{name}.means": parameters.means,
        f"{name}.covariances": parameters.covariances,
    }


def _parameters(tensors: Mapping[str, Tensor], name: str, kind: str) -> Parameters:
    weights, means, covariances = (
        tensors[f"{name}.{part}"] for part in ("weights", "means", "covariances")
    )
    return Parameters(weights=weights, means=means, covariances=covariances, covariance_type=kind)

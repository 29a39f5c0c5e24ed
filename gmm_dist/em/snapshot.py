"""Lanes as tensors and plain values, and back to the bit: what a checkpoint holds of EM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gmm_dist.em.lane import Lane, Outcome
from gmm_dist.em.lane_batch import Precision
from gmm_dist.em.squarem import Squarem
from gmm_dist.model.parameters import Parameters

_PLAIN = ("n_iter", "lower_bounds", "log_likelihood", "entropy", "last_bound", "strained")
_LEAPS = ("max_step", "n_leaps", "n_failed", "saved", "last_gain")


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Where lanes stand between two passes: `tensors` by name, `state` as plain JSON values."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


def taken(lanes: Sequence[Lane]) -> Snapshot:
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


def restored(snapshot: Snapshot) -> list[Lane]:
    """Return the lanes that a snapshot was taken of."""
    return [_lane(snapshot.tensors, i, one) for i, one in enumerate(snapshot.state["lanes"])]


def _lane(tensors: Mapping[str, Tensor], i: int, plain: Mapping[str, Any]) -> Lane:
    kind = plain["covariance_type"]
    squarem = None
    if "leaps" in plain:
        trail = [_parameters(tensors, f"{i}.trail.{j}", kind) for j in range(plain["n_trail"])]
        fallback = _parameters(tensors, f"{i}.fallback", kind) if plain["leaping"] else None
        squarem = Squarem(tensors[f"{i}.scale"], trail, fallback, **plain["leaps"])
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
    return Parameters(weights, means, covariances, kind)

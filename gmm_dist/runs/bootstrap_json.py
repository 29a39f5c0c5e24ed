"""What resampled rows say of a fit as plain JSON values, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from gmm_dist.model.bootstrap import Bootstrap, Win

_OF_COMPONENTS, _OF_FEATURES = (
    ("weights", "log_weights"),
    ("means", "deviations", "log_deviations"),
)


def plain_bootstrap(bootstrap: Bootstrap | None) -> dict[str, Any] | None:
    """Return the spread of a mixture's fits as plain JSON values; None for none."""
    if bootstrap is None:
        return None
    errors = {name: getattr(bootstrap, name).tolist() for name in (*_OF_COMPONENTS, *_OF_FEATURES)}
    return {
        "n_resamples": bootstrap.n_resamples,
        "n_used": bootstrap.n_used,
        "random_state": bootstrap.random_state,
        "standard_errors": errors,
        "wins": [
            {"k": win.k, "covariance_type": win.covariance_type, "n": win.n}
            for win in bootstrap.wins
        ],
    }


def parse_bootstrap(content: Mapping[str, Any] | None, k: int, d: int) -> Bootstrap | None:
    """Return the spread of the fits of a mixture of k components of d features; None for none.

    Raises ValueError, TypeError or KeyError for what describes none.
    """
    if content is None:
        return None
    errors = content["standard_errors"]
    shapes = dict.fromkeys(_OF_COMPONENTS, (k,)) | dict.fromkeys(_OF_FEATURES, (k, d))
    tensors = {name: _tensor(errors[name], shape, name) for name, shape in shapes.items()}
    return Bootstrap(
        n_resamples=_whole(content["n_resamples"], "n_resamples"),
        n_used=_whole(content["n_used"], "n_used"),
        random_state=_whole(content["random_state"], "random_state"),
        weights=tensors["weights"],
        log_weights=tensors["log_weights"],
        means=tensors["means"],
        deviations=tensors["deviations"],
        log_deviations=tensors["log_deviations"],
        wins=tuple(
            Win(
                k=_whole(win["k"], "k"),
                covariance_type=str(win["covariance_type"]),
                n=_whole(win["n"], "n"),
            )
            for win in content["wins"]
        ),
    )


def _tensor(values: Any, shape: tuple[int, ...], name: str) -> Tensor:
    """Return numbers as a tensor; None stands for one that was not finite."""
    rows = values if len(shape) == 2 else [values]
    numbers = [[_number(value, name) for value in row] for row in rows]
    tensor = torch.tensor(numbers, dtype=torch.float64)
    tensor = tensor if len(shape) == 2 else tensor[0]
    if tensor.shape != shape:
        raise ValueError(f"{name} are {tuple(tensor.shape)} where {shape} should be")
    return tensor


def _number(value: Any, name: str) -> float:
    if value is None:
        return math.nan
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} holds {value!r}")
    return float(value)


def _whole(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} is {value!r}")
    return value

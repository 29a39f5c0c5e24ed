"""The parameters that one E-step needs, batched by covariance type and precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.model.parameters import Parameters, ParameterStack


class Precision(Enum):
    """How a lane's pass is computed, from fast to last resort."""

    FLOAT32 = "float32 matrix products"
    FLOAT64 = "float64 matrix products"
    CENTRED = "float64, each component about its own mean, by its Cholesky factor"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self is Precision.FLOAT32 else torch.float64


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LaneBatch:
    """Lanes of one covariance type and precision, as a worker needs them.

    `theta` (K, P) are the natural parameters of all their components; the centred form reads
    `stack` instead. Where the batch `checks`, the pass holds float32 log-densities against float64.
    """

    covariance_type: str
    precision: Precision
    sizes: tuple[int, ...]
    theta: Float64[Tensor, "K P"] | None = None
    stack: ParameterStack | None = None
    checks: bool = False

    @classmethod
    def of(
        cls,
        lanes: Sequence[Parameters],
        thetas: Sequence[Float64[Tensor, "_ P"]],
        precision: Precision,
        *,
        checks: bool = False,
    ) -> LaneBatch:
        """Pack mixtures of one covariance type, and their natural parameters."""
        kind, sizes = lanes[0].covariance_type, tuple(lane.n_components for lane in lanes)
        if precision is Precision.CENTRED:
            return cls(
                covariance_type=kind,
                precision=precision,
                sizes=sizes,
                stack=ParameterStack.of(lanes),
            )
        theta = thetas[0] if len(thetas) == 1 else torch.cat(list(thetas))
        return cls(
            covariance_type=kind, precision=precision, sizes=sizes, theta=theta, checks=checks
        )

    @property
    def layout(self) -> tuple[str, Precision, tuple[int, ...]]:
        """What the buffers of a pass depend on."""
        return self.covariance_type, self.precision, self.sizes

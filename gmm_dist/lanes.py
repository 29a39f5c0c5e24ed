"""What a pass is told of the mixtures that it serves."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.parameters import Stack


class Precision(Enum):
    """How a lane's pass is computed, from fast to last resort."""

    FLOAT32 = "float32 matrix products"
    FLOAT64 = "float64 matrix products"
    CENTRED = "float64, each component about its own mean, by its Cholesky factor"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self is Precision.FLOAT32 else torch.float64


@dataclass(frozen=True, slots=True, eq=False)
class LaneGroup:
    """Lanes of one covariance type and precision, as a worker needs them.

    `theta` (K, P) are the natural parameters of all their components; the centred form reads
    `stack` instead.
    """

    covariance_type: str
    precision: Precision
    sizes: tuple[int, ...]
    theta: Float64[Tensor, "K P"] | None = None
    stack: Stack | None = None

    @property
    def layout(self) -> tuple[str, Precision, tuple[int, ...]]:
        """What the buffers of a pass depend on."""
        return self.covariance_type, self.precision, self.sizes

"""The parameters that one E-step needs, batched by covariance type and precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from gmm_dist.model.covariance import TYPE_OF
from gmm_dist.model.natural import natural
from gmm_dist.model.parameters import Parameters, ParameterStack


class Precision(Enum):
    """How a lane's pass is computed, from fast to last resort."""

    FLOAT32 = "float32 matrix products"
    FLOAT64 = "float64 matrix products"
    CENTRED = "float64, each component about its own mean"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self is Precision.FLOAT32 else torch.float64


KEPT = 28.0
"""Nats by which a component may lie below the others, together, and still matter."""
KEPT_ON_GPU = 20.7
"""The same on a GPU, where a pair costs more: what is left out has 1e-9 of a row, all together."""


MARGIN = 1.0
"""Nats that the centred form allows for the rounding of its screen, twice over."""


def cut(n_components: int, kept: float = KEPT) -> float:
    """Return how far below the largest of a row's logits a component still matters, nats.

    All of those further below have a responsibility of e^-28 together, 7e-13, at the most.
    """
    return kept + math.log(n_components)


def left_out(n_components: int, survivors: float, kept: float = KEPT) -> float:
    """Bound what a centred pass leaves out of the mean log-likelihood, nats per row.

    `survivors` are the components that matter to a row, in the mean. The others' responsibilities
    are e^-cut each at the most, and ln(1 + x) < x.
    """
    return max(n_components - survivors, 0.0) * math.exp(-cut(n_components, kept))


_NEAR = 3.0  # standard deviations
GROWTH = 2 / _NEAR**2
"""By how many `screening_error`s a screened logit errs, at most, for each nat that the row lies
deep below the component's peak; near the component by one. (At r standard deviations it is r²/2
nats, and the terms of a logit grow with r².)"""


def screen_of(
    stack: ParameterStack, theta: Float64[Tensor, "K _"]
) -> tuple[ParameterStack, Float64[Tensor, "K P"]]:
    """Return what the centred form screens by: the components, each by itself, and their Θ.

    `theta` are the stack's natural parameters; those of components that share a covariance leave
    out what they share.
    """
    if not stack.type.is_shared:
        return stack, theta
    alone = stack.unshared()
    return alone, natural(alone).theta


def screens(stack: ParameterStack, theta: Float64[Tensor, "K P"]) -> Bool[Tensor, " K"]:
    """Say which components of a `screen_of` the centred form may screen in float32.

    Half the margin is allowed.
    """
    is_small: Tensor = screening_error(stack, theta) <= MARGIN / 2  # NaN is not
    return is_small


def screening_error(stack: ParameterStack, theta: Float64[Tensor, "K P"]) -> Float64[Tensor, " K"]:
    """Bound the rounding, nats, of the float32 logits of each component of a `screen_of`.

    Of rows within three standard deviations of it. A logit is a sum of terms that largely cancel:
    rounding errs by less than 2^-25 (3 + √P) times the sum of their sizes.
    """
    sizes = theta.abs() * largest_features(stack)
    error: Tensor = 2.0**-25 * (3 + theta.shape[1] ** 0.5) * sizes.sum(1)
    return error


def largest_features(stack: ParameterStack) -> Float64[Tensor, "K P"]:
    """Return the sizes of features of rows within three standard deviations of each component."""
    kind = stack.type
    variances = kind.variances(stack.covariances, stack.means.shape[1])
    x = stack.means.abs() + _NEAR * variances.clamp_min(0).sqrt()
    second = x[:, :, None] * x[:, None, :] if kind.has_products else x.square()
    # Features are products, so those of the largest x are the largest.
    largest: Tensor = kind.sums(torch.ones_like(stack.weights), x, kind.second(second)).T
    return largest


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LaneBatch:
    """Lanes of one covariance type and precision, as a worker needs them.

    `theta` (K, P) are the natural parameters of all their components; the centred form screens by
    them, each component's by itself, and evaluates by `stack`, in `compiled` loops or without. In
    these it may take `all_pairs` of rows and components, instead of those that pass the screen.
    Where the batch `checks`, the pass holds float32 log-densities against float64.
    """

    covariance_type: str
    precision: Precision
    sizes: tuple[int, ...]
    theta: Float64[Tensor, "K P"]
    stack: ParameterStack | None = None
    checks: bool = False
    compiled: bool = False
    all_pairs: bool = False

    @classmethod
    def of(
        cls,
        lanes: Sequence[Parameters],
        thetas: Sequence[Float64[Tensor, "_ P"]],
        precision: Precision,
        *,
        checks: bool = False,
        compiled: bool = False,
        all_pairs: bool = False,
    ) -> LaneBatch:
        """Pack mixtures of one covariance type, and their natural parameters."""
        kind, sizes = lanes[0].covariance_type, tuple(lane.n_components for lane in lanes)
        stack = ParameterStack.of(lanes) if precision is Precision.CENTRED else None
        theta = thetas[0] if len(thetas) == 1 else torch.cat(list(thetas))
        if stack is not None:
            _, theta = screen_of(stack, theta)
        return cls(
            covariance_type=kind,
            precision=precision,
            sizes=sizes,
            theta=theta,
            stack=stack,
            checks=checks,
            compiled=compiled,
            all_pairs=all_pairs,
        )

    @property
    def features(self) -> tuple[str, torch.dtype]:
        """The type whose features the products of a pass take, and their precision."""
        if self.precision is Precision.CENTRED:
            return TYPE_OF[self.covariance_type].alone, torch.float32
        return self.covariance_type, self.precision.dtype

    @property
    def layout(self) -> tuple[str, Precision, tuple[int, ...], bool, bool]:
        """What the buffers of a pass depend on."""
        return self.covariance_type, self.precision, self.sizes, self.compiled, self.all_pairs

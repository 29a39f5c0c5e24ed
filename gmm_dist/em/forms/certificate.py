"""What a component may have come to in rows that it was far from, since its parameters moved.

Take a component whose logit at a row was at most T, and whose mean μ and factor A (its distance
from a row x is |A (x - μ)|) have moved to ν and B. At the row |A (x - μ)| was at least
r = √(2 (peak - T)). By the triangle inequality

    |B (x - ν)| ≥ |B (x - μ)| - |B (ν - μ)| ≥ s r - δ,

s being the least singular value of B A⁻¹ and δ = |B (ν - μ)|. So the logit is now at most the new
peak less (s r - δ)²/2: a bound that needs no row, tight while parameters move little, in any number
of features. (Hamerly and Elkan bound distances so in k-means, where B = A = I.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

_DEEPEST, _RATIO, _LEAST = 2.0e7, 1.016, 20.0
_ROUNDING = 1e-6  # of the singular values' squares, whatever the factors' condition
_LOOSE = 0.01  # a norm above it is bounded more tightly

DEPTHS = _LEAST * _RATIO ** torch.arange(
    int(torch.log(torch.tensor(_DEEPEST / _LEAST)) / torch.log(torch.tensor(_RATIO))),
    dtype=torch.float64,
)
"""Depths below a lane's peak, nats, each 1.6 % below the last."""


@dataclass(frozen=True, slots=True, eq=False)
class Centred:
    """Components for which rows are taken about their means.

    Means (K, d), peaks (K,), and factors, lower triangular (K, d, d), or inverse standard
    deviations (K, d).
    """

    means: Float64[Tensor, "K d"]
    factors: Tensor
    peaks: Float64[Tensor, " K"]

    def highest(self, sizes: Sequence[int]) -> Float64[Tensor, " L"]:
        """Return the highest peak of each lane, of so many components."""
        return torch.stack([of_lane.max() for of_lane in self.peaks.split(list(sizes))])

    def renewed(self, moved: Bool[Tensor, " K"], now: Centred) -> Centred:
        """Return these, but the components that have `moved` as they are now."""
        means = torch.where(moved[:, None], now.means, self.means)
        over = moved.view(-1, *[1] * (self.factors.ndim - 1))
        factors = torch.where(over, now.factors, self.factors)
        return Centred(means, factors, torch.where(moved, now.peaks, self.peaks))


def reached(before: Centred, now: Centred, peaks: Float64[Tensor, " K"]) -> Float64[Tensor, "K G"]:
    """Return the largest logit that each component can have by now.

    In rows where its logit was as deep below its lane's peak (`peaks`, nats) as each of DEPTHS.
    """
    shift = now.means - before.means
    if now.factors.ndim == 3:
        moved = (now.factors @ shift[:, :, None])[:, :, 0].norm(dim=1)
    else:
        moved = (now.factors * shift).norm(dim=1)
    stretch = _stretch(before.factors, now.factors)
    # How much higher a component's peak is than a row's logit, at the least.
    below = (before.peaks - peaks)[:, None] + DEPTHS
    r = below.clamp_min_(0).mul_(2).sqrt_()
    nearest = r.mul_(stretch[:, None]).sub_(moved[:, None]).clamp_min_(0)
    logits: Tensor = nearest.square_().mul_(-0.5).add_(now.peaks[:, None])
    return logits.nan_to_num_(nan=torch.inf)  # of parameters that are no numbers


def _stretch(before: Tensor, now: Tensor) -> Float64[Tensor, " K"]:
    """Return a lower bound of the least singular value of B A⁻¹, tight where B is close to A."""
    if before.ndim == 2:
        narrowest: Tensor = (now / before).amin(1)
        return narrowest
    ratio = torch.linalg.solve_triangular(before, now, upper=False, left=False)
    # λ of RᵀR is at least 1 - |RᵀR - I|, and a norm is at most a root of the trace of a power.
    off = ratio.mT @ ratio
    off.diagonal(dim1=1, dim2=2).sub_(1)
    norm = off.flatten(1).norm(dim=1)
    loose = (norm > _LOOSE) & norm.isfinite()
    power = off[loose]
    power = power @ power
    power = power @ power
    norm[loose] = power.flatten(1).norm(dim=1) ** 0.25
    least: Tensor = (1 - _ROUNDING - norm).clamp_min(0).sqrt()
    return least

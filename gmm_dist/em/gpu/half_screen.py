"""All logits of a chunk, roughly: one product on a GPU's tensor cores, in float16.

An H200 makes 655 TFLOP/s of it, where float64 and float32 take ten times as long; the logits were
off by 0.007 nats on average and by 0.054 at most (1M × 128, K = 1,024, docs/gpu-measured.md). TF32
rounds as much and takes twice as long.

float16 has few digits and a small range, so features are scaled to at most 64 and each component's
parameters to below 2, by powers of two; the constant, whose digits count most, is split into three
numbers against three rows of ones.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float32, Float64
from torch import Tensor

from gmm_dist.em.forms.features import product_cells
from gmm_dist.em.lane_batch import largest_features
from gmm_dist.model.covariance.features import n_feature_rows, product_pairs
from gmm_dist.model.parameters import ParameterStack

MARGIN = 0.5
"""Nats allowed for the roughness of the screen, twice over: half of it is four times the largest
error that an H200 showed."""

_LARGEST = 6.0  # features are below 2^6, their products below 2^12
_ONE = 1024.0  # the rows of ones: constants are as large as products are
_PARTS = 3  # of the constant
_ALIGNED = 8
# The deviation that four roundings to 11 digits leave, of the root of the terms' squares; twice, as
# the terms' are those of a row that lies three standard deviations out along all features.
_ROUNDING = 2 * 2.0**-11.3


def half_error(stack: ParameterStack, theta: Float64[Tensor, "K P"]) -> Float64[Tensor, " K"]:
    """Return by how much float16 may round each component's logits, nats: what is to be expected.

    No bound: the errors of thousands of terms are taken for independent. A bound would never admit
    float16 (it is some hundred times what is seen). The logits of pairs that survive show more.
    """
    terms = theta * largest_features(stack)
    error: Tensor = _ROUNDING * terms.square().sum(1).sqrt()
    return error


def screens_in_half(stack: ParameterStack, theta: Float64[Tensor, "K P"]) -> Bool[Tensor, " K"]:
    """Say which components, each with a covariance of its own, float16 can screen."""
    is_small: Tensor = half_error(stack, theta) <= MARGIN / 2  # NaN is not
    return is_small


class HalfScreen:
    """Logits of components of full covariances, in float16 products summed in float32.

    Memory: features (P + 2, n) in float16.
    """

    def __init__(self, d: int, n_max: int, device: torch.device) -> None:
        self._d, self._p = d, n_feature_rows(d) - 1
        n_rows = self._p + _PARTS - 1
        self._buffer = torch.empty(n_rows * n_max, dtype=torch.float16, device=device)
        i, j = product_pairs(d)
        self._pairs = i.to(device), j.to(device)

    def begin(self, theta: Float64[Tensor, "K P"]) -> None:
        """Take the natural parameters, on the device."""
        k, p = theta.shape
        # Lines of a multiple of 16 bytes; the last columns' logits are not looked at.
        self._theta = theta.new_ones(p, -(-k // _ALIGNED) * _ALIGNED)
        self._theta[:, :k] = theta.T
        self._k = k

    def __call__(self, X: Tensor) -> Float32[Tensor, "n K"]:
        """Return logits of rows X (d, n); NaN or infinite where they leave the range."""
        scale = torch.exp2(_LARGEST - X.abs().amax(1).double().clamp_min(1e-300).log2().ceil())
        features = self._features(X, scale.to(X.dtype))
        parameters, sizes = self._parameters(scale)
        logits = torch.mm(features.T, parameters, out_dtype=torch.float32)
        return logits[:, : self._k].mul_(sizes[: self._k])

    def _features(self, X: Tensor, scale: Tensor) -> Tensor:
        d, n = X.shape
        phi = self._buffer[: (self._p + _PARTS - 1) * n].view(-1, n)
        phi[0].fill_(_ONE)
        phi[self._p :].fill_(_ONE)
        x = phi[1 : 1 + d]
        x.copy_(X * scale[:, None])
        torch.mul(x, x, out=phi[1 + d : 1 + 2 * d])
        for left, right, out in product_cells(x, phi[1 + 2 * d : self._p]):
            torch.mul(left, right, out=out)
        return phi

    def _parameters(self, scale: Float64[Tensor, " d"]) -> tuple[Tensor, Tensor]:
        """Return Θ for scaled features, (P + 2, K) float16, and the powers of two to put back."""
        i, j = self._pairs
        of_features = torch.cat([scale.new_full((1,), _ONE), scale, scale**2, scale[i] * scale[j]])
        theta = self._theta / of_features[:, None]
        sizes = torch.exp2(theta.abs().amax(0).log2().floor())
        theta /= sizes
        half = theta.half()
        parts, rest = [], theta[0] - half[0].double()
        for _ in range(_PARTS - 1):
            part = rest.half()
            parts.append(part)
            rest = rest - part.double()
        return torch.cat([half, torch.stack(parts)]), sizes.float()

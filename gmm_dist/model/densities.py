"""Log-densities of rows under each component, centred on the component's own mean."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.chunks import chunk_rows, cuts
from gmm_dist.compiling import can_compile
from gmm_dist.model.density_loops import STRETCH, Array, logits_loop, loop_factors, suits
from gmm_dist.model.natural import LOG_2PI, log_weights
from gmm_dist.model.parameters import Parameters, ParameterStack

Rows = npt.NDArray[Any] | Tensor

_TINY = torch.finfo(torch.float64).tiny
FAR = -1e12  # log-densities below it have no digits left for what sets components apart
_GPU_NUMBERS = 1 << 26  # of rows about means at once, on a GPU: half a GiB
_BEYOND = 1e300  # minus the log-density of a row whose distances overflow, at most


class Densities:
    """The weighted log-densities of a stack's components, each centred on its own mean.

    The textbook form by Cholesky factors: K triangular products per chunk, and accurate where
    the matrix-product form loses its digits to cancellation. `peaks` (K,) are the largest values,
    those at the `means` (K, d); `factors` (K, ...) are as the covariance type has them. `width` is
    how many numbers a row of a chunk needs.

    `compiled`, on a CPU with Numba, they take a tenth of the time, and a row's are the same bits in
    any chunk. `filled` are the factors as the loops have them (`loop_factors`), `own` (K, d, d) or
    (K, d) the same without what fills them up.
    """

    def __init__(
        self, stack: ParameterStack, device: torch.device, *, compiled: bool = False
    ) -> None:
        self._family, d = stack.type, stack.means.shape[1]
        factors, failed = self._family.precisions_cholesky(stack.covariances)
        assert not bool(failed.any()), "a covariance is not positive definite"
        half = stack.per_component(self._family.half_log_det(factors, d))
        self.peaks = (log_weights(stack) + half - 0.5 * d * LOG_2PI).to(device)
        self.means, self.factors = stack.means.to(device), stack.per_component(factors).to(device)
        self.width, self._device, self.is_compiled = d + len(self.peaks), device, compiled
        if compiled:
            # Of its own, row by row: a stack's may be a part of something that changes.
            self.means = self.means.clone(memory_format=torch.contiguous_format)
            self.filled = loop_factors(self.factors, self._family.has_products, d)

    @classmethod
    def of(cls, mixture: Parameters, device: torch.device, *, compiled: bool = False) -> Densities:
        """Return those of one mixture, `compiled` where it can be and is the faster."""
        compiled = compiled and device.type == "cpu" and suits(mixture.type, mixture.n_features)
        return cls(ParameterStack.of([mixture]), device, compiled=compiled and can_compile())

    @property
    def own(self) -> Float64[Tensor, "K ..."]:
        """The factors of the loops, without what fills them up."""
        d, factors = self.means.shape[1], torch.from_numpy(self.filled)
        return factors[:, :d, :d] if self._family.has_products else factors

    def fill(self, n: int, x: Array, logits: Array) -> None:
        """Fill `logits` (K, N) of n rows `x` (d, N) by compiled loops; N is whole stretches.

        Rows are taken as they are: those far from all components may have no finite number.
        """
        loop = logits_loop(self._family.has_products)
        loop(n, x, self.means.numpy(), self.filled, self.peaks.numpy(), logits)

    def chunks(self, X: Rows) -> Iterator[Float64[Tensor, "K b"]]:
        """Yield log w_k + log N(x; k) of rows (n, d), some at a time; of no rows once."""
        parts = cuts(len(X), chunk_rows(self.width, self._device)) if len(X) else [slice(0)]
        for part in parts:
            yield self(_columns(X[part]).to(self._device))

    def __call__(self, x: Float64[Tensor, "d n"]) -> Float64[Tensor, "K n"]:
        """Return log w_k + log N(x; k) of rows `x`, one per column."""
        if self.is_compiled:
            logits = self._looped(x)
        else:
            logits = self._one_by_one(x) if x.device.type == "cpu" else self._some_at_once(x)
        # One sum shows whether any row is so far out that digits or the range run short.
        if not float(logits.detach().sum()) > FAR:
            self._place_far_rows(x, logits)
        return logits

    def _one_by_one(self, x: Float64[Tensor, "d n"]) -> Float64[Tensor, "K n"]:
        distance = self._family.mahalanobis
        each = zip(self.means, self.factors, self.peaks, strict=True)
        return torch.stack([c - 0.5 * distance(x - m[:, None], f) for m, f, c in each])

    def _looped(self, x: Float64[Tensor, "d n"]) -> Float64[Tensor, "K n"]:
        d, n = x.shape
        size = -(-n // STRETCH) * STRETCH
        rows, logits = np.zeros((d, size)), np.empty((len(self.peaks), size))
        rows[:, :n] = x.numpy()
        self.fill(n, rows, logits)
        return torch.from_numpy(logits)[:, :n]

    def _some_at_once(self, x: Float64[Tensor, "d n"]) -> Float64[Tensor, "K n"]:
        """Return the same on a GPU, where to launch K times as many kernels would take longer."""
        step = max(1, _GPU_NUMBERS // max(x.numel(), 1))
        logits = x.new_empty(len(self.peaks), x.shape[1])
        for first in range(0, len(self.peaks), step):
            part = slice(first, first + step)
            z = x - self.means[part, :, None]
            logits[part] = self._family.distances(z, self.factors[part])
        return logits.mul_(-0.5).add_(self.peaks[:, None])

    def _place_far_rows(self, x: Float64[Tensor, "d n"], logits: Float64[Tensor, "K n"]) -> None:
        """Give rows far from all components finite log-densities with a single largest one."""
        finite = x.isfinite().all(0)
        logits[logits.isnan() & finite] = -math.inf
        beyond = finite & logits.isinf().all(0)
        if bool(beyond.any()):
            logits[:, beyond] = self._relative(x[:, beyond])
        top = logits.amax(0)
        tied = (logits == top).sum(0) > 1
        tied &= finite & (top < FAR)
        if bool(tied.any()):
            logits[:, tied] = self._apart(x[:, tied], logits[:, tied])

    def _relative(self, x: Float64[Tensor, "d n"]) -> Float64[Tensor, "K n"]:
        """Return stand-ins for log-densities whose distances overflow, in the distances' order."""
        unit = x.abs().amax(0)
        steepest = float(self.factors.abs().max())
        near = [
            self._family.mahalanobis(x / unit - m[:, None] / unit, f / steepest)
            for m, f in zip(self.means, self.factors, strict=True)
        ]
        distances = torch.stack(near)
        return -_BEYOND * (1 + 1e6 * distances / distances.amax(0).clamp_min(_TINY))

    def _apart(
        self, x: Float64[Tensor, "d n"], logits: Float64[Tensor, "K n"]
    ) -> Float64[Tensor, "K n"]:
        """Break ties between equally distant components by the side that a row lies on."""
        top = logits.amax(0)
        unit = x / x.abs().amax(0)
        each = zip(self.means, self.factors, strict=True)
        sides = torch.stack([self._side(unit, m, f) for m, f in each])
        sides = torch.where(logits == top, sides, -math.inf)
        return torch.where(sides == sides.amax(0), logits, logits * (1 + 1e-9))

    def _side(self, x: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
        """Return x ᵀ Σ⁻¹ m: the term in which a far row's distances to like components differ."""
        distance = self._family.mahalanobis
        size = mean.abs().max().clamp_min(_TINY)
        unit = (mean / size)[:, None]
        return (distance(x + unit, factor) - distance(x - unit, factor)) * size


def _columns(X: Rows) -> Float64[Tensor, "d b"]:
    """Return a few rows as columns; a copy, for arrays may be read-only, reversed or swapped."""
    if isinstance(X, Tensor):
        return X.T.double()
    return torch.from_numpy(np.array(X.T, dtype=np.float64, order="C"))

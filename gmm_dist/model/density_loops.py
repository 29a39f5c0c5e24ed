"""Log-densities of rows under all components, in loops for Numba to compile.

Lines are rows of one feature or component, so that a loop over them is one of vector instructions.
They are worked on in stretches, which are filled up: no loop ends in a remainder. What a row gets
depends on nothing but the row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.compiling import compiled
from gmm_dist.model.covariance import CovarianceType

Array = Any
"""A NumPy array; the docstrings say which shape, and which dtype if not float64."""

STRETCH = 128
"""Rows at once: their features, about one mean, stay in the fastest cache."""

_MOST_FEATURES = 128  # with more of them, torch's products of a component's rows take less time


def suits(kind: CovarianceType, n_features: int) -> bool:
    """Say whether compiled loops are the faster, about the components' own means."""
    return n_features <= _MOST_FEATURES or not kind.has_products


def padded(d: int) -> int:
    """Return how many lines the factors of d correlated features have, in these loops."""
    return -(-d // 4) * 4


def loop_factors(factors: Float64[Tensor, "K ..."], has_products: bool, d: int) -> Array:
    """Return the precisions' Cholesky factors as the loops have them.

    Lower triangular (K, D, D), D = padded(d), zero beyond d; or, of independent features, the
    inverse standard deviations (K, d).
    """
    n = len(factors)
    if not has_products:  # a spherical component's factor is one number
        return factors.reshape(n, -1).expand(-1, d).contiguous().numpy()
    filled = factors.new_zeros(n, padded(d), padded(d))
    filled[:, :d, :d] = factors.mT
    return filled.numpy()


@functools.cache
def logits_loop(has_products: bool) -> Callable[..., None]:
    """Return `all_logits` or `all_logits_apart`, compiled."""
    loop = all_logits if has_products else all_logits_apart
    factors = "f8[:,:,::1]" if has_products else "f8[:,::1]"
    signature = f"void(i8, f8[:,::1], f8[:,::1], {factors}, f8[::1], f8[:,::1])"
    found: Callable[..., None] = compiled(loop, signature, reorders=True)
    return found


def all_logits(n: int, x: Array, means: Array, factors: Array, peaks: Array, logits: Array) -> None:
    """Fill the logits of rows with all components, by their distances from the means.

    Args:
        n: How many rows there are.
        x: (d, N), N the rows filled up to whole stretches, and more.
        means: (K, d).
        factors: (K, D, D), lower triangular: the distance of z is |F z|. D is d rounded up to a
            multiple of four, all beyond d zero.
        peaks: (K,), the logits at the means.
        logits: (K, N); filled.
    """
    d, z = len(x), np.zeros((factors.shape[1], STRETCH))
    y0, y1 = np.zeros(STRETCH), np.zeros(STRETCH)
    for first in range(0, n, STRETCH):
        for k in range(len(means)):
            F, mean, line = factors[k], means[k], logits[k, first : first + STRETCH]
            for i in range(d):
                row, about, centre = x[i, first : first + STRETCH], z[i], mean[i]
                for m in range(STRETCH):
                    about[m] = row[m] - centre
            for m in range(STRETCH):
                line[m] = 0.0
            # Two lines of F at once, and four of z.
            for j in range(0, d, 2):
                f, g = F[j], F[j + 1]
                for i in range(0, j + 2, 4):
                    f0, f1, f2, f3 = f[i], f[i + 1], f[i + 2], f[i + 3]
                    g0, g1, g2, g3 = g[i], g[i + 1], g[i + 2], g[i + 3]
                    z0, z1, z2, z3 = z[i], z[i + 1], z[i + 2], z[i + 3]
                    if j < 4:  # four at the most: the sums need not be kept
                        for m in range(STRETCH):
                            a = (f0 * z0[m] + f1 * z1[m]) + (f2 * z2[m] + f3 * z3[m])
                            b = (g0 * z0[m] + g1 * z1[m]) + (g2 * z2[m] + g3 * z3[m])
                            line[m] += a * a + b * b
                    elif i == 0:
                        for m in range(STRETCH):
                            y0[m] = (f0 * z0[m] + f1 * z1[m]) + (f2 * z2[m] + f3 * z3[m])
                            y1[m] = (g0 * z0[m] + g1 * z1[m]) + (g2 * z2[m] + g3 * z3[m])
                    else:
                        for m in range(STRETCH):
                            y0[m] += (f0 * z0[m] + f1 * z1[m]) + (f2 * z2[m] + f3 * z3[m])
                            y1[m] += (g0 * z0[m] + g1 * z1[m]) + (g2 * z2[m] + g3 * z3[m])
                if j >= 4:
                    for m in range(STRETCH):
                        line[m] += y0[m] * y0[m] + y1[m] * y1[m]
            peak = peaks[k]
            for m in range(STRETCH):
                line[m] = peak - 0.5 * line[m]


def all_logits_apart(
    n: int, x: Array, means: Array, factors: Array, peaks: Array, logits: Array
) -> None:
    """Do the same for independent features: `factors` (K, d) are inverse standard deviations."""
    d = len(x)
    for first in range(0, n, STRETCH):
        for k in range(len(means)):
            line = logits[k, first : first + STRETCH]
            for m in range(STRETCH):
                line[m] = 0.0
            for i in range(d):
                row, centre, factor = x[i, first : first + STRETCH], means[k, i], factors[k, i]
                for m in range(STRETCH):
                    y = (row[m] - centre) * factor
                    line[m] += y * y
            peak = peaks[k]
            for m in range(STRETCH):
                line[m] = peak - 0.5 * line[m]

"""The loops of the pruned form that evaluate pairs of a row and a component, for Numba to compile.

Pairs stand as in `screening_loops`.
"""

from __future__ import annotations

import numpy as np

from gmm_dist.model.density_loops import Array

_AT_ONCE = 64  # pairs of a component: their rows stay in the fastest cache


def distances(
    X: Array, means: Array, factors: Array, peaks: Array, firsts: Array, rows: Array, exact: Array
) -> None:
    """Fill the logits of pairs by their distances from their components' means.

    Args:
        X: (n, d).
        means: (K, d).
        factors: (K, D, D), lower triangular: the distance of z is |F z|. D is d rounded up to a
            multiple of four, all beyond d zero.
        peaks: (K,), the logits at the means.
        firsts: (K + 1,).
        rows: int32.
        exact: One for each pair; filled.
    """
    d, size = means.shape[1], factors.shape[1]
    z = np.zeros((size, _AT_ONCE))
    y0, y1, total = np.zeros(_AT_ONCE), np.zeros(_AT_ONCE), np.zeros(_AT_ONCE)
    for k in range(len(means)):
        F, mean = factors[k], means[k]
        for first in range(firsts[k], firsts[k + 1], _AT_ONCE):
            n = min(_AT_ONCE, firsts[k + 1] - first)
            width = (n + 15) // 16 * 16  # whole vectors, of zeros beyond n
            for m in range(n):
                x = X[rows[first + m]]
                for i in range(d):
                    z[i, m] = x[i] - mean[i]
            for m in range(n, width):
                for i in range(d):
                    z[i, m] = 0.0
            for m in range(width):
                total[m] = 0.0
            # Two lines of F at once, and four of z.
            for j in range(0, d, 2):
                for m in range(width):
                    y0[m] = y1[m] = 0.0
                f, g = F[j], F[j + 1]
                for i in range(0, j + 2, 4):
                    f0, f1, f2, f3 = f[i], f[i + 1], f[i + 2], f[i + 3]
                    g0, g1, g2, g3 = g[i], g[i + 1], g[i + 2], g[i + 3]
                    z0, z1, z2, z3 = z[i], z[i + 1], z[i + 2], z[i + 3]
                    for m in range(width):
                        y0[m] += (f0 * z0[m] + f1 * z1[m]) + (f2 * z2[m] + f3 * z3[m])
                        y1[m] += (g0 * z0[m] + g1 * z1[m]) + (g2 * z2[m] + g3 * z3[m])
                for m in range(width):
                    total[m] += y0[m] * y0[m] + y1[m] * y1[m]
            for m in range(n):
                exact[first + m] = peaks[k] - 0.5 * total[m]


def distances_apart(
    X: Array, means: Array, factors: Array, peaks: Array, firsts: Array, rows: Array, exact: Array
) -> None:
    """Do the same for independent features: `factors` (K, d) are inverse standard deviations."""
    d = means.shape[1]
    for k in range(len(means)):
        mean, factor = means[k], factors[k]
        for p in range(firsts[k], firsts[k + 1]):
            x, total = X[rows[p]], 0.0
            for i in range(d):
                y = (x[i] - mean[i]) * factor[i]
                total += y * y
            exact[p] = peaks[k] - 0.5 * total


def moments(
    X: Array, means: Array, firsts: Array, rows: Array, shares: Array, sum_x: Array, scatter: Array
) -> None:
    """Add pairs' first and second moments about their components' means.

    Args:
        X: (n, d).
        means: (K, d).
        firsts: (K + 1,).
        rows: int32.
        shares: The weighted responsibility of each pair.
        sum_x: (K, d), added to.
        scatter: (K, D, D), added to on and above the diagonal, and here and there below it.
    """
    d, size = means.shape[1], scatter.shape[1]
    z, weighted = np.zeros((size, _AT_ONCE)), np.zeros((size, _AT_ONCE))
    for k in range(len(means)):
        S, mean = scatter[k], means[k]
        for first in range(firsts[k], firsts[k + 1], _AT_ONCE):
            n = min(_AT_ONCE, firsts[k + 1] - first)
            width = (n + 15) // 16 * 16  # whole vectors, of zeros beyond n
            for m in range(n):
                x, share = X[rows[first + m]], shares[first + m]
                for i in range(d):
                    # A share of zero is a row of no weight, or one infinitely far away.
                    z[i, m] = x[i] - mean[i] if share > 0 else 0.0
            for i in range(d):
                for m in range(n):
                    weighted[i, m] = z[i, m] * shares[first + m]
                for m in range(n, width):
                    z[i, m] = weighted[i, m] = 0.0
                # By itself: a loop that stores, too, is only made of vectors where it finds that
                # arrays lie well apart, and so would not always sum in the same order.
                w, total = weighted[i], 0.0
                for m in range(width):
                    total += w[m]
                sum_x[k, i] += total
            # Two lines at once with four.
            for i in range(0, d, 2):
                v, w = weighted[i], weighted[i + 1]
                for j in range(i // 4 * 4, d, 4):
                    z0, z1, z2, z3 = z[j], z[j + 1], z[j + 2], z[j + 3]
                    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = 0.0
                    for m in range(width):
                        a0 += v[m] * z0[m]
                        a1 += v[m] * z1[m]
                        a2 += v[m] * z2[m]
                        a3 += v[m] * z3[m]
                        b0 += w[m] * z0[m]
                        b1 += w[m] * z1[m]
                        b2 += w[m] * z2[m]
                        b3 += w[m] * z3[m]
                    S[i, j] += a0
                    S[i, j + 1] += a1
                    S[i, j + 2] += a2
                    S[i, j + 3] += a3
                    S[i + 1, j] += b0
                    S[i + 1, j + 1] += b1
                    S[i + 1, j + 2] += b2
                    S[i + 1, j + 3] += b3


def moments_apart(
    X: Array, means: Array, firsts: Array, rows: Array, shares: Array, sum_x: Array, scatter: Array
) -> None:
    """Do the same for independent features, whose `scatter` is (K, d)."""
    d = means.shape[1]
    for k in range(len(means)):
        S, s, mean = scatter[k], sum_x[k], means[k]
        for p in range(firsts[k], firsts[k + 1]):
            x, share = X[rows[p]], shares[p]
            if share > 0:
                for i in range(d):
                    z = x[i] - mean[i]
                    s[i] += share * z
                    S[i] += share * z * z

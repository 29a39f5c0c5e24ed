"""The loops of the dense form: all rows with all components, for Numba to compile.

Each works on a chunk of rows, whose logits fit a core's cache, in stretches of a few vectors. Lines
are rows or components of one number, so that a loop over them is one of vector instructions.
Stretches are filled up, with rows of no weight: no loop ends in a remainder, which might sum in
another order.
"""

from __future__ import annotations

import numpy as np

from gmm_dist.model.density_loops import STRETCH, Array

_LEAST = -700.0  # powers of less would leave float64's range; they are far below any cut
_ROUNDS = 6755399441055744.0  # 1.5 · 2^52: a sum with it has a small whole number in its last bits
_LOG_2_HIGH, _LOG_2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10


def all_shares(
    edges: Array,
    cuts: Array,
    lowest: float,
    logits: Array,
    shares: Array,
    weight: Array,
    far: Array,
    by_component: Array,
    by_lane: Array,
) -> int:
    """Turn logits into weighted responsibilities, and sum what needs no rows.

    Only the components within a cut of the largest logit of a row and lane have a share. Rows are
    far whose largest logit in some lane is not above `lowest`, or no number; they count for
    nothing. Return how many there are.

    Args:
        edges: (L + 1,), the first component of each lane, and K.
        cuts: (L,), nats below its largest logit within which a component matters to a row.
        lowest: Nats.
        logits: (K, N); overwritten.
        shares: (K, N); filled with responsibilities times the rows' weights.
        weight: (n,).
        far: (n,), bool; filled.
        by_component: (2, K): the shares and their products with the weights are added.
        by_lane: (3, L): Σ w log p, the entropy and Σ w of the components that matter are added.
    """
    n, n_lanes, n_far = len(weight), len(cuts), 0
    top, total = np.empty((n_lanes, STRETCH)), np.empty((n_lanes, STRETCH))
    expected, matter = np.empty((n_lanes, STRETCH)), np.empty((n_lanes, STRETCH))
    w, power = np.zeros(STRETCH), np.zeros(STRETCH)
    log_total, one_over = np.zeros(STRETCH), np.zeros(STRETCH)
    bits = shares.view(np.int64)
    for first in range(0, n, STRETCH):
        width = min(STRETCH, n - first)
        for m in range(width):
            w[m] = weight[first + m]
        for m in range(width, STRETCH):
            w[m] = 0.0
        for lane in range(n_lanes):
            highest, sum_, mean, count = top[lane], total[lane], expected[lane], matter[lane]
            cut = -cuts[lane]
            for m in range(STRETCH):
                highest[m] = logits[edges[lane], first + m]
                sum_[m] = mean[m] = count[m] = 0.0
            for k in range(edges[lane] + 1, edges[lane + 1]):
                line = logits[k, first : first + STRETCH]
                for m in range(STRETCH):
                    highest[m] = max(highest[m], line[m])
            for k in range(edges[lane], edges[lane + 1]):
                line, share = logits[k, first : first + STRETCH], shares[k, first : first + STRETCH]
                exponent = bits[k, first : first + STRETCH]
                # The exponential: 2^q, in the bits of a number, times that of the rest.
                for m in range(STRETCH):
                    below = max(line[m] - highest[m], _LEAST)
                    q = np.rint(below * 1.4426950408889634)
                    r = (below - q * _LOG_2_HIGH) - q * _LOG_2_LOW
                    series = 1 / 39916800.0 + r * (1 / 479001600.0)
                    series = 1 / 3628800.0 + r * series
                    series = 1 / 362880.0 + r * series
                    series = 1 / 40320.0 + r * series
                    series = 1 / 5040.0 + r * series
                    series = 1 / 720.0 + r * series
                    series = 1 / 120.0 + r * series
                    series = 1 / 24.0 + r * series
                    series = 1 / 6.0 + r * series
                    power[m] = 1.0 + r * (1.0 + r * (0.5 + r * series))
                    line[m] = below
                    share[m] = q + _ROUNDS
                for m in range(STRETCH):
                    exponent[m] = (exponent[m] << 52) + 0x3FF0000000000000
                for m in range(STRETCH):
                    p = share[m] * power[m] if line[m] >= cut else 0.0
                    share[m] = p
                    sum_[m] += p
                    mean[m] += p * line[m]
                    count[m] += 1.0 if line[m] >= cut else 0.0
        for m in range(STRETCH):
            is_nothing = m >= width
            for lane in range(n_lanes):
                # The largest logit adds one to the total, unless another is no number.
                if not (top[lane, m] > lowest and total[lane, m] >= 1.0):
                    is_nothing = True
            if m < width:
                far[first + m] = is_nothing
                n_far += is_nothing
            if is_nothing:
                w[m] = 0.0
                for lane in range(n_lanes):
                    top[lane, m] = expected[lane, m] = matter[lane, m] = 0.0
                    total[lane, m] = 1.0
                for k in range(len(shares)):
                    shares[k, first + m] = 0.0
        for lane in range(n_lanes):
            log_likelihood = entropy = survivors = 0.0
            highest, sum_, mean, count = top[lane], total[lane], expected[lane], matter[lane]
            for m in range(STRETCH):
                log_total[m] = np.log(sum_[m])
            for m in range(STRETCH):
                one_over[m] = 1.0 / sum_[m]
            # Loops that sum do nothing else: with a store in it, one is only made of vector
            # instructions where it finds that arrays lie apart, and sums in another order if not.
            for m in range(STRETCH):
                log_likelihood += w[m] * (highest[m] + log_total[m])
                entropy += w[m] * (log_total[m] - mean[m] * one_over[m])
                survivors += w[m] * count[m]
            by_lane[0, lane] += log_likelihood
            by_lane[1, lane] += entropy
            by_lane[2, lane] += survivors
            for k in range(edges[lane], edges[lane + 1]):
                share = shares[k, first : first + STRETCH]
                for m in range(STRETCH):
                    share[m] = share[m] * one_over[m] * w[m]
                nk = squares = 0.0
                for m in range(STRETCH):
                    nk += share[m]
                    squares += share[m] * w[m]
                by_component[0, k] += nk
                by_component[1, k] += squares
    return n_far


def all_moments(
    n: int, x: Array, means: Array, shares: Array, sum_x: Array, scatter: Array
) -> None:
    """Add the first and second moments of rows about all components' means.

    Args:
        n: How many rows there are.
        x: (d, N), N the rows filled up to whole stretches, and more.
        means: (K, d).
        shares: (K, N), the weighted responsibilities.
        sum_x: (K, d), added to.
        scatter: (K, D, D), added to on and above the diagonal, and here and there below it. D is d
            rounded up to a multiple of four.
    """
    d, size = len(x), scatter.shape[1]
    z, weighted = np.zeros((size, STRETCH)), np.zeros((size, STRETCH))
    for first in range(0, n, STRETCH):
        for k in range(len(means)):
            S, mean, share = scatter[k], means[k], shares[k, first : first + STRETCH]
            for i in range(d):
                row, centre = x[i, first : first + STRETCH], mean[i]
                about, times = z[i], weighted[i]
                for m in range(STRETCH):
                    # A share of zero is a row of no weight, or one infinitely far away.
                    about[m] = row[m] - centre if share[m] > 0 else 0.0
                    times[m] = about[m] * share[m]
                total = 0.0
                for m in range(STRETCH):
                    total += times[m]
                sum_x[k, i] += total
            # Two lines at once with four.
            for i in range(0, d, 2):
                v, u = weighted[i], weighted[i + 1]
                for j in range(i // 4 * 4, d, 4):
                    z0, z1, z2, z3 = z[j], z[j + 1], z[j + 2], z[j + 3]
                    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = 0.0
                    for m in range(STRETCH):
                        a0 += v[m] * z0[m]
                        a1 += v[m] * z1[m]
                        a2 += v[m] * z2[m]
                        a3 += v[m] * z3[m]
                        b0 += u[m] * z0[m]
                        b1 += u[m] * z1[m]
                        b2 += u[m] * z2[m]
                        b3 += u[m] * z3[m]
                    S[i, j] += a0
                    S[i, j + 1] += a1
                    S[i, j + 2] += a2
                    S[i, j + 3] += a3
                    S[i + 1, j] += b0
                    S[i + 1, j + 1] += b1
                    S[i + 1, j + 2] += b2
                    S[i + 1, j + 3] += b3


def all_moments_apart(
    n: int, x: Array, means: Array, shares: Array, sum_x: Array, scatter: Array
) -> None:
    """Do the same for independent features, whose `scatter` is (K, d)."""
    d, z = len(x), np.zeros(STRETCH)
    for first in range(0, n, STRETCH):
        for k in range(len(means)):
            share = shares[k, first : first + STRETCH]
            for i in range(d):
                row, centre = x[i, first : first + STRETCH], means[k, i]
                for m in range(STRETCH):
                    z[m] = row[m] - centre if share[m] > 0 else 0.0
                linear = second = 0.0
                for m in range(STRETCH):
                    linear += share[m] * z[m]
                    second += share[m] * z[m] * z[m]
                sum_x[k, i] += linear
                scatter[k, i] += second

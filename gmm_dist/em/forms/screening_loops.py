"""The loops of the pruned form that find pairs of a row and a component, for Numba to compile.

Pairs stand component by component, those of one by their rows: component k has pairs firsts[k] to
firsts[k + 1], of the `rows` of a piece, 0 to n - 1.
"""

from __future__ import annotations

import numpy as np

from gmm_dist.em.lane_batch import GROWTH
from gmm_dist.model.density_loops import Array

_BLOCK = 32  # rows that are looked at at once
_SLACK, _SLACK_PART = 6.0, 0.08
"""Nats below its cut to which a row's pairs are taken, and of its depth the part, at least."""


def room(below: Array, margin: float) -> Array:
    """Return how far below the peak a row's cut lies, of which pairs are taken so far `below`."""
    return (below - _SLACK) / (1 + _SLACK_PART) - margin


def transpose(X: Array, rows: Array) -> None:
    """Fill `rows` (n, d) with the columns of X (d, n)."""
    d, n = X.shape
    # Row by row: lines that are written from end to end come into a cache ahead of time.
    for j in range(n):
        row = rows[j]
        for i in range(d):
            row[i] = X[i, j]


def limits(
    logits: Array,
    n: int,
    first_row: int,
    edges: Array,
    cuts: Array,
    peaks: Array,
    grid: Array,
    depths: Array,
    limit: Array,
) -> None:
    """Find the logit of each row and lane from which on pairs are taken.

    Not more than a cut below the largest one. With a grid, pairs further down are taken too, to the
    next depth of it that leaves room for parameters to move.

    Args:
        logits: (K, m), float32.
        n: How many columns are filled.
        first_row: The row of the first column.
        edges: (L + 1,), the first component of each lane, and K.
        cuts: (L,), nats.
        peaks: (L,), the largest logit that the lane's components reach.
        grid: (G,), how far below the peak each depth is, nats, each in the same ratio to the last;
            or empty.
        depths: (L, n of all rows), int16, to which depth of the grid a row's pairs go, -1 for none;
            filled if there is a grid.
        limit: (L, m), float32; filled.
    """
    for lane in range(len(cuts)):
        first, last = edges[lane], edges[lane + 1]
        line = limit[lane]
        for j in range(n):
            line[j] = logits[first, j]
        for k in range(first + 1, last):
            other = logits[k]
            for j in range(n):
                line[j] = other[j] if other[j] > line[j] else line[j]
        for j in range(n):
            line[j] -= cuts[lane] + 1e-6 * abs(line[j])  # rounded downwards
        if len(grid) > 0:
            ratio = np.log(grid[1] / grid[0])
            for j in range(n):
                below = _SLACK + (1 + _SLACK_PART) * (peaks[lane] - line[j])
                depth = -1
                if grid[0] <= below < grid[-2]:
                    depth = int(np.log(below / grid[0]) / ratio) + 1
                    reach = peaks[lane] - grid[depth]
                    # Rounded downwards: no pair between the two is left out.
                    line[j] = reach - 1e-6 * abs(reach)
                depths[lane, first_row + j] = depth


def depth_limits(first_row: int, peaks: Array, grid: Array, depths: Array, limit: Array) -> None:
    """Find the logits of rows of known depths from which on pairs are taken; of others none are.

    Args:
        first_row: The row of the first column.
        peaks: As in `limits`.
        grid: As in `limits`.
        depths: As in `limits`.
        limit: (L, m), float32; filled.
    """
    for lane in range(len(peaks)):
        for j in range(min(limit.shape[1], depths.shape[1] - first_row)):
            depth = depths[lane, first_row + j]
            limit[lane, j] = np.inf
            if depth >= 0:
                reach = peaks[lane] - grid[depth]
                limit[lane, j] = reach - 1e-6 * abs(reach)


def select(
    logits: Array,
    n: int,
    first_row: int,
    components: Array,
    lanes: Array,
    takes_all: Array,
    peaks: Array,
    errors: Array,
    limit: Array,
    of: Array,
    rows: Array,
    screened: Array,
    n_pairs: int,
) -> int:
    """Append the pairs of some rows that may matter; return the number of pairs then.

    Those whose exact logit may not be below the limit of their row and lane; of NaN all. A screened
    logit errs by the component's error near it, and by more further out (`lane_batch.GROWTH`).

    Args:
        logits: (C, m), float32, of some components.
        n: How many columns are filled.
        first_row: The row of the first column.
        components: (C,), their numbers.
        lanes: (K,), each component's lane.
        takes_all: (K,), bool, whether all of a component's pairs are taken.
        peaks: (K,), the largest logit of each component.
        errors: (K,), nats.
        limit: (L, m), float32.
        of: int32, the component of each pair; filled from `n_pairs` on, as the next two.
        rows: int32, the row of each pair.
        screened: float32, the logit of each pair.
        n_pairs: How many there are.
    """
    p = n_pairs
    for c in range(len(components)):
        k = components[c]
        line, least, takes = logits[c], limit[lanes[k]], takes_all[k]
        peak, error = np.float32(peaks[k]), np.float32(errors[k])
        growth = np.float32(GROWTH) * error
        for j0 in range(0, n, _BLOCK):
            j1 = min(j0 + _BLOCK, n)
            n_below = 0
            for j in range(j0, j1):
                n_below += line[j] < least[j] - max(error, growth * (peak - least[j]))
            if n_below == j1 - j0 and not takes:
                continue
            for j in range(j0, j1):
                if takes or not (line[j] < least[j] - max(error, growth * (peak - least[j]))):
                    of[p], rows[p], screened[p] = k, first_row + j, line[j]
                    p += 1
    return p


def arrange(
    n_pairs: int,
    of: Array,
    rows: Array,
    screened: Array,
    firsts: Array,
    rows_out: Array,
    screened_out: Array,
) -> None:
    """Put pairs that stand by rows, or by chunks of them, component by component.

    Args:
        n_pairs: How many there are.
        of: The component of each, int32.
        rows: The row of each, int32; of one component they rise.
        screened: The logit of each, float32.
        firsts: (K + 1,); filled, as the next two.
        rows_out: The same rows.
        screened_out: The same logits.
    """
    for k in range(len(firsts)):
        firsts[k] = 0
    for p in range(n_pairs):
        firsts[of[p] + 1] += 1
    for k in range(1, len(firsts)):
        firsts[k] += firsts[k - 1]
    place = firsts[:-1].copy()
    for p in range(n_pairs):
        q = place[of[p]]
        rows_out[q], screened_out[q] = rows[p], screened[p]
        place[of[p]] = q + 1


def merge(
    firsts_a: Array,
    rows_a: Array,
    exact_a: Array,
    dropped: Array,
    firsts_b: Array,
    rows_b: Array,
    exact_b: Array,
    firsts: Array,
    rows: Array,
    exact: Array,
) -> None:
    """Merge two lists of pairs and their logits into a third.

    Args:
        firsts_a: (K + 1,), of the first list, as the next two.
        rows_a: int32.
        exact_a: The logits.
        dropped: (n,), bool: rows that the first list is to lose.
        firsts_b: Of the second list, as the next two.
        rows_b: int32.
        exact_b: The logits.
        firsts: Of the third, filled, as the next two.
        rows: int32.
        exact: The logits.
    """
    r = 0
    for k in range(len(firsts) - 1):
        firsts[k] = r
        p, q = firsts_a[k], firsts_b[k]
        while p < firsts_a[k + 1] or q < firsts_b[k + 1]:
            takes_a = q == firsts_b[k + 1] or (p < firsts_a[k + 1] and rows_a[p] < rows_b[q])
            if takes_a:
                if not dropped[rows_a[p]]:
                    rows[r], exact[r] = rows_a[p], exact_a[p]
                    r += 1
                p += 1
            else:
                rows[r], exact[r] = rows_b[q], exact_b[q]
                r += 1
                q += 1
    firsts[-1] = r


def unsure(
    exact: Array,
    screened: Array,
    trusted: Array,
    off: float,
    firsts: Array,
    rows: Array,
    unsure: Array,
) -> None:
    """Mark the rows of which a trusted logit is off by more than `off`.

    Args:
        exact: The logit of each pair.
        screened: The same as screened, float32.
        trusted: (K,), bool.
        off: Nats.
        firsts: (K + 1,).
        rows: int32.
        unsure: (n,), bool; marked.
    """
    for k in range(len(trusted)):
        if trusted[k]:
            for p in range(firsts[k], firsts[k + 1]):
                if not (abs(exact[p] - screened[p]) <= off):
                    unsure[rows[p]] = True


def highest(edges: Array, firsts: Array, rows: Array, exact: Array, top: Array) -> None:
    """Fill the largest logit (L, n) of each lane and row; NaN where a pair's is."""
    for lane in range(len(edges) - 1):
        line = top[lane]
        for j in range(len(line)):
            line[j] = -np.inf
        for p in range(firsts[edges[lane]], firsts[edges[lane + 1]]):
            j = rows[p]
            if exact[p] > line[j] or exact[p] != exact[p]:
                line[j] = exact[p]


def stale(top: Array, depths: Array, reached: Array, cuts: Array, stale: Array) -> int:
    """Mark rows of which a component left out may have come to matter; return how many are.

    Args:
        top: (L, n), the largest logits.
        depths: (L, n), int16, to which depth the row's pairs were taken, or -1.
        reached: (L, G): what is below a depth has at most such a logit now.
        cuts: (L,), nats.
        stale: (n,), bool; filled.
    """
    for j in range(len(stale)):
        stale[j] = False
    for lane in range(len(cuts)):
        for j in range(len(stale)):
            depth = depths[lane, j]
            if depth < 0 or not (reached[lane, depth] < top[lane, j] - cuts[lane]):
                stale[j] = True
    count = 0
    for j in range(len(stale)):
        count += stale[j]
    return count


def shares(
    edges: Array,
    cuts: Array,
    top: Array,
    firsts: Array,
    rows: Array,
    exact: Array,
    weight: Array,
    total: Array,
    firsts_out: Array,
    rows_out: Array,
    by_component: Array,
    by_lane: Array,
) -> None:
    """Turn the logits of pairs into weighted responsibilities, and sum what needs no rows.

    Only pairs within a cut of the largest logit of their row and lane go on. So what a row adds
    depends on its exact logits alone, and not on which pairs were tried.

    Args:
        edges: (L + 1,), the first component of each lane, and K.
        cuts: (L,), nats.
        top: (L, n), the largest logits.
        firsts: (K + 1,).
        rows: int32.
        exact: The logit of each pair; then, of those that go on, the share: the responsibility
            times the row's weight.
        weight: (n,).
        total: (n,); overwritten.
        firsts_out: (K + 1,), of the pairs that go on; filled.
        rows_out: Their rows, int32; filled.
        by_component: (2, K): the shares and their products with the weights are added.
        by_lane: (3, L): Σ w log p, the entropy and Σ w of all pairs are added.
    """
    n, q = len(weight), 0
    for lane in range(len(cuts)):
        line, cut = top[lane], cuts[lane]
        for j in range(n):
            total[j] = 0.0
        for p in range(firsts[edges[lane]], firsts[edges[lane + 1]]):
            j = rows[p]
            if exact[p] >= line[j] - cut:
                total[j] += np.exp(exact[p] - line[j])
        log_likelihood = 0.0
        for j in range(n):
            total[j] = np.log(total[j])
            log_likelihood += (line[j] + total[j]) * weight[j]
        entropy = survivors = 0.0
        for k in range(edges[lane], edges[lane + 1]):
            nk = squares = 0.0
            firsts_out[k] = q
            for p in range(firsts[k], firsts[k + 1]):
                j = rows[p]
                if exact[p] >= line[j] - cut:
                    log_share = (exact[p] - line[j]) - total[j]  # large logits have few digits
                    share = np.exp(log_share) * weight[j]
                    rows_out[q], exact[q] = j, share
                    q += 1
                    nk += share
                    squares += share * weight[j]
                    entropy -= share * log_share
                    survivors += weight[j]
            by_component[0, k] += nk
            by_component[1, k] += squares
        by_lane[0, lane] += log_likelihood
        by_lane[1, lane] += entropy
        by_lane[2, lane] += survivors
    firsts_out[-1] = q

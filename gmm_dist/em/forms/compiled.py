"""The loops of the centred form over pairs of a row and a component, compiled by Numba.

Numba compiles them once for each machine, in seconds, and keeps the code in a cache. Without it
the centred form does with torch's calls. The loops are plain Python too, for tests.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64
from torch import Tensor

from gmm_dist.em.lane_batch import MARGIN, cut
from gmm_dist.model.covariance import TYPE_OF
from gmm_dist.model.densities import Densities
from gmm_dist.shards.protocol import Block

Array = Any
"""A NumPy array; the docstrings say which shape, and which dtype if not float64."""

# Passes over fewer rows take less time than it takes to load Numba, half a second.
_LEAST_ROWS = 50_000
_MOST_FEATURES = 48  # with more of them, torch's products of a component's rows take less time
_AT_ONCE = 64  # pairs of a component: their rows stay in the fastest cache


def pays(n_rows: int, covariance_type: str, n_features: int) -> bool:
    """Say whether a lane's centred passes over `n_rows` rows take compiled loops."""
    is_small = n_features <= _MOST_FEATURES or not TYPE_OF[covariance_type].has_products
    return n_rows >= _LEAST_ROWS and is_small and can_compile()


@functools.cache
def can_compile() -> bool:
    """Say whether Numba is there, goes with the NumPy that is, and has not been switched off."""
    try:
        import numba
    except ImportError:
        return False
    config: Any = numba.config
    return not config.DISABLE_JIT


class CompiledPairs:
    """Evaluates the pairs of a chunk that the screen has let through, and sums their statistics.

    Of lanes of `sizes` components, `has_products` as their covariance type, in chunks of `n_max`
    rows at most.
    """

    def __init__(self, sizes: Sequence[int], n_max: int, *, has_products: bool) -> None:
        n_components = sum(sizes)
        self._has_products = has_products
        self._edges = np.array(list(itertools.accumulate(sizes, initial=0)))
        self._cuts = np.array([cut(size) + MARGIN for size in sizes], dtype=np.float32)
        self._firsts = np.zeros(n_components + 1, dtype=np.int64)
        # What no pair has come to use is memory in name alone.
        self._rows = np.empty(n_components * n_max, dtype=np.int32)
        self._shares = np.empty(n_components * n_max)
        self._highest = np.empty(n_max, dtype=np.float32)
        self._top, self._total = np.empty((2, n_max))
        self._unsure = np.empty(n_max, dtype=np.bool_)

    def begin(self, densities: Densities, trusted: Bool[Tensor, " K"]) -> None:
        """Take the parameters of the next passes, and which components are `trusted` to a screen.

        The others' pairs all matter.
        """
        self._trusted = trusted.numpy()
        means, factors, _ = zip(*densities.components, strict=True)
        d = len(means[0])
        self._means = torch.stack(means).numpy()
        self._peaks = densities.peaks.numpy()
        # A spherical component's factor is one number.
        self._factors = torch.stack(
            [f.T if self._has_products else f.expand(d) for f in factors]
        ).numpy()

    def add(
        self,
        logits: Float32[Tensor, "K m"],
        chunk: Block,
        by_component: Float64[Tensor, "2 K"],
        by_lane: Float64[Tensor, "3 L"],
        sum_x: Float64[Tensor, "K d"],
        scatter: Float64[Tensor, "K ..."],
    ) -> Bool[Tensor, " n"] | None:
        """Add the statistics of n rows, and return which rows are unsure, if any: they add nothing.

        Args:
            logits: Of the screen, in the first n columns.
            chunk: The rows.
            by_component: N and Σ r w², w being the weights.
            by_lane: Σ w log p, the entropy, and the weight of all pairs.
            sum_x: The first moments about the means.
            scatter: The second moments, on and above the diagonal, or those of single features.
        """
        X, weight, n = chunk.X.numpy(), chunk.weights.numpy(), chunk.X.shape[1]
        loops = loops_for(self._has_products, X.dtype.char)
        firsts, rows, shares, unsure = self._firsts, self._rows, self._shares, self._unsure
        screened = logits.numpy()
        trusted = self._trusted
        loops.select(screened, n, self._edges, self._cuts, trusted, firsts, rows, self._highest)
        loops.distances(X, self._means, self._factors, firsts, rows, shares)
        some = loops.shares(
            screened,
            trusted,
            shares,
            weight,
            MARGIN / 2,
            self._edges,
            firsts,
            rows,
            self._peaks,
            self._top,
            self._total,
            unsure,
            by_component.numpy(),
            by_lane.numpy(),
        )
        loops.moments(X, self._means, firsts, rows, shares, sum_x.numpy(), scatter.numpy())
        return torch.from_numpy(unsure[:n]) if some else None


@dataclass(frozen=True, slots=True)
class Loops:
    """The loops for one layout of moments."""

    select: Callable[..., int]
    distances: Callable[..., None]
    shares: Callable[..., bool]
    moments: Callable[..., None]


_SIGNATURES = {
    "_select": "i8(f4[:,::1], i8, i8[::1], f4[::1], b1[::1], i8[::1], i4[::1], f4[::1])",
    "_distances": "void({x}[:,:], f8[:,::1], f8[:,:,::1], i8[::1], i4[::1], f8[::1])",
    "_distances_apart": "void({x}[:,:], f8[:,::1], f8[:,::1], i8[::1], i4[::1], f8[::1])",
    "_shares": "b1(f4[:,::1], b1[::1], f8[::1], f8[::1], f8, i8[::1], i8[::1], i4[::1], f8[::1], "
    "f8[::1], f8[::1], b1[::1], f8[:,::1], f8[:,::1])",
    "_moments": "void({x}[:,:], f8[:,::1], i8[::1], i4[::1], f8[::1], f8[:,::1], f8[:,:,::1])",
    "_moments_apart": "void({x}[:,:], f8[:,::1], i8[::1], i4[::1], f8[::1], f8[:,::1], f8[:,::1])",
}


@functools.cache
def loops_for(has_products: bool, dtype: str) -> Loops:
    """Return the compiled loops for rows of a dtype, "f" or "d"."""
    import numba

    def compile_(loop: Callable[..., Any]) -> Any:
        signature = _SIGNATURES[loop.__name__].format(x={"f": "f4", "d": "f8"}[dtype])
        # Sums may be taken in any order, which vector instructions need.
        fast = {"contract", "reassoc", "nsz"}
        options: dict[str, Any] = {"fastmath": fast, "nogil": True, "error_model": "numpy"}
        try:
            return numba.njit(signature, cache=True, **options)(loop)
        except RuntimeError:  # no folder to keep it in
            return numba.njit(signature, **options)(loop)

    return plain(has_products, compile_)


def plain(has_products: bool, wrapped: Callable[..., Any] = lambda loop: loop) -> Loops:
    """Return the loops as they stand below, each `wrapped`."""
    distances, moments = (
        (_distances, _moments) if has_products else (_distances_apart, _moments_apart)
    )
    loops = (_select, distances, _shares, moments)
    # Without what tests wrap functions in to check annotations.
    return Loops(*(wrapped(inspect.unwrap(loop)) for loop in loops))


def _select(
    logits: Array,
    n: int,
    edges: Array,
    cuts: Array,
    trusted: Array,
    firsts: Array,
    rows: Array,
    top: Array,
) -> int:
    """Find the pairs that matter, component by component; return their number.

    Those whose logit is not more than a cut below the largest of the row and lane, and all of
    components that are not trusted, whose logits are -inf. Of NaN all do.

    Args:
        logits: (K, m), float32.
        n: How many columns are filled.
        edges: (L + 1,), the first component of each lane, and K.
        cuts: (L,), float32, nats.
        trusted: (K,), bool.
        firsts: (K + 1,), the first pair of each component, and their number; filled.
        rows: (K n,), int32, the row of each pair; filled.
        top: (n,), float32; overwritten.
    """
    p = 0
    for lane in range(len(cuts)):
        first, last = edges[lane], edges[lane + 1]
        for j in range(n):
            top[j] = logits[first, j]
        for k in range(first + 1, last):
            line = logits[k]
            for j in range(n):
                value = line[j]
                top[j] = value if value > top[j] else top[j]
        for j in range(n):
            top[j] -= cuts[lane]
        for k in range(first, last):
            firsts[k] = p
            line = logits[k]
            for j in range(n):
                if not (trusted[k] and line[j] < top[j]):
                    rows[p] = j
                    p += 1
    firsts[edges[-1]] = p
    return p


def _distances(
    X: Array, means: Array, factors: Array, firsts: Array, rows: Array, distances: Array
) -> None:
    """Fill the squared distances of pairs from their components' means.

    Args:
        X: (d, n).
        means: (K, d).
        factors: (K, d, d), lower triangular: the distance of z is |F z|.
        firsts: (K + 1,), the first pair of each component.
        rows: The row of each pair.
        distances: One for each pair; filled.
    """
    d = X.shape[0]
    # Eight pairs of a component at a time, which a vector instruction takes together.
    z = np.zeros((d, 8))
    for k in range(len(means)):
        F = factors[k]
        for first in range(firsts[k], firsts[k + 1], 8):
            n = min(8, firsts[k + 1] - first)
            for m in range(n):
                j = rows[first + m]
                for i in range(d):
                    z[i, m] = X[i, j] - means[k, i]
            s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = 0.0
            for j in range(d):
                y0 = y1 = y2 = y3 = y4 = y5 = y6 = y7 = 0.0
                for i in range(j + 1):
                    f = F[j, i]
                    y0 += f * z[i, 0]
                    y1 += f * z[i, 1]
                    y2 += f * z[i, 2]
                    y3 += f * z[i, 3]
                    y4 += f * z[i, 4]
                    y5 += f * z[i, 5]
                    y6 += f * z[i, 6]
                    y7 += f * z[i, 7]
                s0 += y0 * y0
                s1 += y1 * y1
                s2 += y2 * y2
                s3 += y3 * y3
                s4 += y4 * y4
                s5 += y5 * y5
                s6 += y6 * y6
                s7 += y7 * y7
            sums = (s0, s1, s2, s3, s4, s5, s6, s7)
            for m in range(n):
                distances[first + m] = sums[m]


def _distances_apart(
    X: Array, means: Array, factors: Array, firsts: Array, rows: Array, distances: Array
) -> None:
    """Do the same for independent features: `factors` (K, d) are inverse standard deviations."""
    for k in range(len(means)):
        for p in range(firsts[k], firsts[k + 1]):
            j, total = rows[p], 0.0
            for i in range(len(X)):
                y = (X[i, j] - means[k, i]) * factors[k, i]
                total += y * y
            distances[p] = total


def _shares(
    logits: Array,
    trusted: Array,
    exact: Array,
    weight: Array,
    off: float,
    edges: Array,
    firsts: Array,
    rows: Array,
    peaks: Array,
    top: Array,
    total: Array,
    unsure: Array,
    of_component: Array,
    of_lane: Array,
) -> bool:
    """Turn the distances of pairs into weighted responsibilities, and sum what needs no rows.

    A row of which a trusted logit is off by more than `off` is unsure, and adds nothing. Return
    whether there are any.

    Args:
        logits: (K, m), float32, of the screen.
        trusted: (K,), bool.
        exact: The squared distance of each pair; then its share, the responsibility times the
            row's weight.
        weight: (n,).
        off: Nats.
        edges: (L + 1,), the first component of each lane, and K.
        firsts: (K + 1,), the first pair of each component.
        rows: The row of each pair.
        peaks: (K,), the largest logits.
        top: (n,); overwritten.
        total: (n,); overwritten.
        unsure: (n,), the rows that are; filled.
        of_component: (2, K): the shares and their products with the weights are added.
        of_lane: (3, L): Σ w log p, the entropy and Σ w of all pairs are added.
    """
    n, some = len(weight), False
    unsure[:n] = False
    for k in range(len(peaks)):
        for p in range(firsts[k], firsts[k + 1]):
            j = rows[p]
            exact[p] = peaks[k] - 0.5 * exact[p]
            if trusted[k] and not (abs(exact[p] - logits[k, j]) <= off):
                unsure[j] = some = True
    for lane in range(len(edges) - 1):
        first, last = firsts[edges[lane]], firsts[edges[lane + 1]]
        for j in range(n):
            top[j], total[j] = -np.inf, 0.0
        for p in range(first, last):
            j = rows[p]
            if exact[p] > top[j]:
                top[j] = exact[p]
        for p in range(first, last):
            total[rows[p]] += np.exp(exact[p] - top[rows[p]])
        log_likelihood = 0.0
        for j in range(n):
            if not unsure[j]:
                top[j] += np.log(total[j])
                log_likelihood += top[j] * weight[j]
        entropy = survivors = 0.0
        for k in range(edges[lane], edges[lane + 1]):
            nk = squares = 0.0
            for p in range(firsts[k], firsts[k + 1]):
                j = rows[p]
                if unsure[j]:
                    exact[p] = 0.0
                    continue
                log_share = exact[p] - top[j]
                share = np.exp(log_share) * weight[j]
                exact[p] = share
                nk += share
                squares += share * weight[j]
                entropy -= share * log_share
                survivors += weight[j]
            of_component[0, k] += nk
            of_component[1, k] += squares
        of_lane[0, lane] += log_likelihood
        of_lane[1, lane] += entropy
        of_lane[2, lane] += survivors
    return some


def _moments(
    X: Array, means: Array, firsts: Array, rows: Array, shares: Array, sum_x: Array, scatter: Array
) -> None:
    """Add pairs' first and second moments about their components' means.

    Args:
        X: (d, n).
        means: (K, d).
        firsts: (K + 1,), the first pair of each component.
        rows: The row of each pair.
        shares: The weighted responsibility of each pair.
        sum_x: (K, d), added to.
        scatter: (K, d, d), added to on and above the diagonal.
    """
    d = X.shape[0]
    # A line more than features, of zeros: features go by twos.
    z, weighted = np.zeros((d + 1, _AT_ONCE)), np.zeros((d + 1, _AT_ONCE))
    for k in range(len(means)):
        S, s = scatter[k], sum_x[k]
        for first in range(firsts[k], firsts[k + 1], _AT_ONCE):
            n = min(_AT_ONCE, firsts[k + 1] - first)
            for i in range(d):
                line, mean, total = X[i], means[k, i], 0.0
                for m in range(n):
                    share = shares[first + m]
                    z[i, m] = line[rows[first + m]] - mean if share > 0 else 0.0
                    weighted[i, m] = share * z[i, m]
                    total += weighted[i, m]
                s[i] += total
            for i in range(0, d, 2):
                w0, w1 = weighted[i], weighted[i + 1]
                for j in range(i, d, 2):
                    z0, z1 = z[j], z[j + 1]
                    t00 = t01 = t10 = t11 = 0.0
                    for m in range(n):
                        t00 += w0[m] * z0[m]
                        t01 += w0[m] * z1[m]
                        t10 += w1[m] * z0[m]
                        t11 += w1[m] * z1[m]
                    S[i, j] += t00
                    if i < j:
                        S[i + 1, j] += t10
                    if j + 1 < d:
                        S[i, j + 1] += t01
                        S[i + 1, j + 1] += t11


def _moments_apart(
    X: Array, means: Array, firsts: Array, rows: Array, shares: Array, sum_x: Array, scatter: Array
) -> None:
    """Do the same for independent features, whose `scatter` is (K, d)."""
    for k in range(len(means)):
        S, s = scatter[k], sum_x[k]
        for p in range(firsts[k], firsts[k + 1]):
            j, share = rows[p], shares[p]
            if not share > 0:
                continue
            for i in range(len(X)):
                z = X[i, j] - means[k, i]
                s[i] += share * z
                S[i] += share * z * z

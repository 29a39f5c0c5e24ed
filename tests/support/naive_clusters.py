"""The slow, obvious reference of merges: everything anew from the merged responsibilities."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from naive import Array


@dataclass(frozen=True)
class NaiveMerge:
    """A merge, by the first components of the two; its numbers as `Merge` has them."""

    first: int
    second: int
    entropy: float
    misclassification: float
    share: float


def phi(t: float) -> float:
    return t * math.log(t) if t > 0 else 0.0


def entropy_of(resp: Array, weight: Array) -> float:
    """Return -Σ w r ln r / Σ w of responsibilities (n, c)."""
    rows = zip(resp, weight, strict=True)
    return -sum(w * sum(phi(float(r)) for r in row) for row, w in rows) / float(weight.sum())


def misclassification(resp: Array, weight: Array, j: int, k: int) -> float:
    """Return Σ w r_j 1(argmax r = k) / Σ w r_j."""
    taken = sum(w * row[j] for row, w in zip(resp, weight, strict=True) if int(row.argmax()) == k)
    return float(taken / sum(w * row[j] for row, w in zip(resp, weight, strict=True)))


def joined(resp: Array, j: int, k: int) -> Array:
    """Return responsibilities in which column j is the sum of both, and k is gone."""
    merged = resp.copy()
    merged[:, j] += merged[:, k]
    return merged[:, [c for c in range(resp.shape[1]) if c != k]]


def merges(resp: Array, weight: Array, by: str) -> list[NaiveMerge]:
    """Merge components one pair after another, by "entropy" or by "misclassification"."""
    leaders = list(range(resp.shape[1]))
    found = []
    while resp.shape[1] > 1:
        pairs = list(itertools.combinations(range(resp.shape[1]), 2))
        before = entropy_of(resp, weight)
        worth = {
            (j, k): before - entropy_of(joined(resp, j, k), weight)
            if by == "entropy"
            else max(misclassification(resp, weight, j, k), misclassification(resp, weight, k, j))
            for j, k in pairs
        }
        j, k = max(pairs, key=lambda pair: worth[pair])
        labels = resp.argmax(1)
        chance = max(misclassification(resp, weight, *p) for p in ((j, k), (k, j)))
        share = float(weight[(labels == j) | (labels == k)].sum() / weight.sum())
        first, second = leaders[j], leaders.pop(k)
        resp = joined(resp, j, k)
        found.append(NaiveMerge(first, second, entropy_of(resp, weight), chance, share))
    return found

"""Sums along a fixed binary tree over shard numbers: the same bits in any order of arrival."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Generic

from gmm_dist.shards.protocol import Landing, S, ShardRows, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial(Generic[S]):
    """The sum over one complete subtree: leaves index·2^level up to (index + 1)·2^level."""

    level: int
    index: int
    n_rows: int
    summary: S


@dataclass(slots=True)
class TreeSum(Generic[S]):
    """Add summaries of shards along the plan's binary tree, as they come, in any order.

    Two siblings are added, left + right, as soon as both are there; a left node without a right
    sibling moves up unchanged. What is left (`partials`) are sums of complete subtrees: all that
    a worker has to send. Every shard is counted exactly once: a second partial for the same
    subtree, or one that overlaps, is an error.
    """

    n_shards: int
    _waiting: dict[tuple[int, int], Partial[S]] = field(default_factory=dict)
    _counted: int = 0  # one bit for each shard

    def push(self, partial: Partial[S]) -> None:
        """Add a subtree's sum."""
        span = 1 << partial.level
        shards = ((1 << span) - 1) << (partial.index * span)
        assert not self._counted & shards, f"shards were counted twice: {partial.index * span} on"
        self._counted |= shards
        while partial.level < self._root_level:
            sibling = self._waiting.pop((partial.level, partial.index ^ 1), None)
            if sibling is None and not self._is_lone(partial):
                break
            partial = _parent(partial, sibling)
        self._waiting[partial.level, partial.index] = partial

    @property
    def partials(self) -> list[Partial[S]]:
        return list(self._waiting.values())

    def total(self, n_rows: int | None = None) -> S:
        """Return the sum over all shards; `n_rows` are the rows that it must have counted."""
        root = self._waiting.get((self._root_level, 0))
        assert root is not None, "a shard has not been counted"
        assert n_rows is None or root.n_rows == n_rows, f"{root.n_rows} rows, not {n_rows}"
        return root.summary

    @property
    def _root_level(self) -> int:
        return math.ceil(math.log2(self.n_shards))

    def _is_lone(self, partial: Partial[S]) -> bool:
        return partial.index % 2 == 0 and (partial.index + 1) << partial.level >= self.n_shards


def _parent(child: Partial[S], sibling: Partial[S] | None) -> Partial[S]:
    level, index = child.level + 1, child.index // 2
    if sibling is None:
        return Partial(level=level, index=index, n_rows=child.n_rows, summary=child.summary)
    left, right = (child, sibling) if child.index % 2 == 0 else (sibling, child)
    n_rows = left.n_rows + right.n_rows
    return Partial(level=level, index=index, n_rows=n_rows, summary=left.summary + right.summary)


def run_on(task: Task[S], shards: Iterable[ShardRows], n_shards: int) -> list[Partial[S]]:
    """Apply a task to some of the shards and return the sums of the complete subtrees.

    Shards on a device are added there, with the bits of sums on the host, which gets the subtrees.
    """
    tree: TreeSum[S] = TreeSum(n_shards)
    for rows in shards:
        tree.push(Partial(level=0, index=rows.shard, n_rows=rows.n_rows, summary=task(rows)))
    return [_landed(partial) for partial in tree.partials]


def _landed(partial: Partial[S]) -> Partial[S]:
    if not isinstance(partial.summary, Landing):
        return partial
    return replace(partial, summary=partial.summary.landed())

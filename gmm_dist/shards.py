"""The one verb of everything that looks at rows: `Shards.run(task) -> Summary`.

A task is a small picklable pure function over the column-major blocks of one shard; a summary
has `+`. Summaries are added along a binary tree over shard numbers that belongs to the plan,
so the result has the same bits wherever the shards lie and in whatever order they answer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor


class Summary(Protocol):
    """What a task returns: a value that can be added to its like, and its size is bounded."""

    def __add__(self, other: Self, /) -> Self: ...


S = TypeVar("S", bound=Summary)
S_co = TypeVar("S_co", bound=Summary, covariant=True)


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Rows that lie together: `X` (d, n), one contiguous line per feature; weights (n,)."""

    X: Tensor
    sample_weight: Tensor | None = None

    @property
    def weights(self) -> Tensor:
        """The rows' weights (n,), float64, on the rows' device: ones where none were given."""
        if self.sample_weight is None:
            return self.X.new_ones(self.X.shape[1], dtype=torch.float64)
        return self.sample_weight.double()

    def to(self, device: torch.device) -> Block:
        weight = None if self.sample_weight is None else self.sample_weight.to(device)
        return Block(self.X.to(device), weight)


@dataclass(frozen=True, slots=True, eq=False)
class ShardRows:
    """One shard as a task sees it: its number, and its rows as an iterable of blocks.

    `counts` is what reading the shard counted (a Summary; None for rows from memory).
    `held_out` are rows that nothing is fitted to: a task sees them through `HeldOut` alone.
    """

    shard: int
    blocks: Sequence[Block]
    counts: object = None
    held_out: Sequence[Block] = ()

    @property
    def n_rows(self) -> int:
        """The rows to be fitted: those that every pass has to count exactly once."""
        return sum(block.X.shape[1] for block in self.blocks)

    def to(self, device: torch.device) -> ShardRows:
        return ShardRows(
            self.shard,
            [block.to(device) for block in self.blocks],
            self.counts,
            [block.to(device) for block in self.held_out],
        )


class Task(Protocol[S_co]):
    """A pure function of one shard's rows; randomness is keyed by (seed, shard, round)."""

    def __call__(self, rows: ShardRows, /) -> S_co: ...


@dataclass(frozen=True, slots=True)
class HeldOut(Generic[S]):
    """The task that applies another one to the held-out rows of each shard."""

    task: Task[S]

    def __call__(self, rows: ShardRows) -> S:
        # Whoever runs the task counts the shard's own rows: that each shard was seen once.
        return self.task(ShardRows(rows.shard, rows.held_out))


Loader = Callable[[int], ShardRows]
"""Makes the rows of a shard, the same bits each time it is called; picklable."""


@runtime_checkable
class Shards(Protocol):
    """Rows in shards, wherever they lie."""

    @property
    def n_shards(self) -> int: ...

    def run(self, task: Task[S]) -> S:
        """Apply the task to every shard once and add the summaries along the fixed tree."""


@dataclass(frozen=True, slots=True)
class Partial(Generic[S]):
    """The sum over one complete subtree: leaves index·2^level up to (index + 1)·2^level."""

    level: int
    index: int
    n_rows: int
    summary: S


@dataclass(slots=True)
class TreeSum(Generic[S]):
    """Add summaries of shards along the plan's binary tree, as they come, in any order.

    Two siblings are added, left + right, as soon as both are there; a left edge without a right
    sibling moves up unchanged. What is left (`partials`) are complete subtrees: all that a
    worker has to send. Every shard is counted exactly once: a second partial for the same
    subtree, or one that overlaps, is an error.
    """

    n_shards: int
    _waiting: dict[tuple[int, int], Partial[S]] = field(default_factory=dict)
    _counted: int = 0  # one bit for each shard

    def push(self, partial: Partial[S]) -> None:
        """Add a subtree's sum to what is there."""
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
        """Return the sum over all shards; `n_rows` is what it must have counted."""
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
        return Partial(level, index, child.n_rows, child.summary)
    left, right = (child, sibling) if child.index % 2 == 0 else (sibling, child)
    n_rows = left.n_rows + right.n_rows
    return Partial(level, index, n_rows, left.summary + right.summary)


def run_on(task: Task[S], shards: Iterable[ShardRows], n_shards: int) -> list[Partial[S]]:
    """Apply a task to some of the shards and return the sums of the complete subtrees."""
    tree: TreeSum[S] = TreeSum(n_shards)
    for rows in shards:
        tree.push(Partial(0, rows.shard, rows.n_rows, task(rows)))
    return tree.partials


class LocalShards:
    """Shards in this process: for tests, for samples, and for data that fit here.

    `n_threads` shards are worked on at a time, each by one thread: torch releases the GIL, and
    single-threaded operations on their own rows beat multi-threaded ones on the same rows. With
    `n_threads` 0 the caller's own thread does the work, with torch's setting as it is.
    """

    def __init__(self, shards: Sequence[ShardRows], *, n_threads: int = 1) -> None:
        assert [rows.shard for rows in shards] == list(range(len(shards)))
        self._shards = shards
        self._n_rows = sum(rows.n_rows for rows in shards)
        self._pool = ThreadPoolExecutor(n_threads, initializer=_one_thread) if n_threads else None

    @classmethod
    def of(
        cls,
        X: Tensor,
        sample_weight: Tensor | None = None,
        *,
        n_shards: int = 1,
        n_threads: int = 1,
    ) -> Self:
        """Deal rows `X` (n, d) evenly to shards."""
        edges = [len(X) * i // n_shards for i in range(n_shards + 1)]
        parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
        weights = [None if sample_weight is None else sample_weight[part] for part in parts]
        blocks = [
            Block(X[p].T.contiguous(), weight) for p, weight in zip(parts, weights, strict=True)
        ]
        return cls([ShardRows(i, [block]) for i, block in enumerate(blocks)], n_threads=n_threads)

    @property
    def n_shards(self) -> int:
        return len(self._shards)

    def run(self, task: Task[S]) -> S:
        tree: TreeSum[S] = TreeSum(self.n_shards)
        summaries = (
            map(task, self._shards) if self._pool is None else self._pool.map(task, self._shards)
        )
        for rows, summary in zip(self._shards, summaries, strict=True):
            tree.push(Partial(0, rows.shard, rows.n_rows, summary))
        return tree.total(self._n_rows)


def _one_thread() -> None:
    torch.set_num_threads(1)

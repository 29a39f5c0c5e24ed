"""The one way to compute over rows: `Shards.run(task) -> Summary`.

A task is a small picklable pure function of the column-major blocks of one shard; a summary
has `+`. Summaries are added along the plan's fixed binary tree over shard numbers, so the
result has the same bits wherever the shards lie and in whatever order they finish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor

from gmm_dist.chunks import chunk_rows, cuts


@runtime_checkable
class Summary(Protocol):
    """What a task returns: a value of bounded size that can be added to others of its type."""

    def __add__(self, other: Self, /) -> Self: ...


@runtime_checkable
class Landing(Protocol):
    """A summary whose numbers may lie on a device: sums of subtrees are made there."""

    def landed(self) -> Self:
        """Return it with all numbers on the host."""


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

    def part(self, which: slice) -> Block:
        """Return some of the rows (a view)."""
        weight = None if self.sample_weight is None else self.sample_weight[which]
        return Block(self.X[:, which], weight)

    def to(self, device: torch.device) -> Block:
        weight = None if self.sample_weight is None else self.sample_weight.to(device)
        return Block(self.X.to(device), weight)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ShardRows:
    """One shard as a task sees it: its number, and its rows as an iterable of blocks.

    `counts` is the Summary of what was counted while the shard was read (None for rows from
    memory). `held_out` are rows that nothing is fitted to; a task sees them only through `HeldOut`.
    In `kept` tasks leave themselves what they have worked out from the rows to save time; it may be
    lost at any time, so it changes no bit.
    """

    shard: int
    blocks: Sequence[Block]
    counts: object = None
    held_out: Sequence[Block] = ()
    kept: dict[str, object] = field(default_factory=dict, repr=False)

    @property
    def n_rows(self) -> int:
        """The number of rows to be fitted; every pass counts each exactly once."""
        return sum(block.X.shape[1] for block in self.blocks)

    @property
    def device(self) -> torch.device:
        """Where the rows to be fitted are; the CPU where there are none."""
        return self.blocks[0].X.device if self.blocks else torch.device("cpu")

    def every(self, step: int) -> ShardRows:
        """Return the first row of every `step` ones to be fitted, in each block (views)."""
        parts = [block.part(slice(None, None, step)) for block in self.blocks]
        return ShardRows(shard=self.shard, blocks=parts)

    def chunks(self, width: int) -> Iterator[Block]:
        """Yield the rows to be fitted, as many at once as fit where each needs `width` numbers."""
        most = chunk_rows(width, self.device)
        for block in self.blocks:
            yield from map(block.part, cuts(block.X.shape[1], most))

    def to(self, device: torch.device) -> ShardRows:
        return ShardRows(
            shard=self.shard,
            blocks=[block.to(device) for block in self.blocks],
            counts=self.counts,
            held_out=[block.to(device) for block in self.held_out],
        )


@runtime_checkable
class Task(Protocol[S_co]):
    """A pure function of one shard's rows; randomness is keyed by (seed, shard, round)."""

    def __call__(self, rows: ShardRows, /) -> S_co: ...


@dataclass(frozen=True, slots=True)
class HeldOut(Generic[S]):
    """The task that applies another one to the held-out rows of each shard."""

    task: Task[S]

    def __call__(self, rows: ShardRows) -> S:
        # The caller still checks the shard's fitted rows: that each shard was counted once.
        return self.task(ShardRows(shard=rows.shard, blocks=rows.held_out))


@runtime_checkable
class Movable(Protocol):
    """A value that jobs share, which a worker moves to its device; it says itself what moves."""

    def to(self, device: torch.device, /) -> Self: ...


R_co = TypeVar("R_co", covariant=True)


@runtime_checkable
class Job(Protocol[R_co]):
    """A pure function of a value that many jobs share; picklable, as its result is."""

    def __call__(self, shared: Any, /) -> R_co: ...


@runtime_checkable
class Jobs(Protocol):
    """Jobs under way: whoever is free does the next one, and who it is changes no bit."""

    def share(self, value: Movable) -> Any:
        """Return a handle of a value, for `submit`; it travels once to each who needs it."""

    def submit(self, job: Job[Any], shared: Any, *, order: tuple[int, ...]) -> int:
        """Add a job for a shared value, and return its number; the least order comes first."""

    def next(self) -> tuple[int, Any]:
        """Wait for a job to be done, and return its number and its result."""


Loader = Callable[[int], ShardRows]
"""Loads the rows of a shard, with the same bits each time; picklable."""


@runtime_checkable
class Parted(Protocol):
    """A loader that can be cut: who loads some of the shards needs to know of no others."""

    def part(self, shards: range, /) -> Loader:
        """Return a loader of these shards alone, by their numbers among all."""


@runtime_checkable
class Shards(Protocol):
    """Rows in shards, wherever they lie."""

    @property
    def n_shards(self) -> int: ...

    def run(self, task: Task[S]) -> S:
        """Apply the task to every shard once and add the summaries along the fixed tree."""


@runtime_checkable
class WorkingShards(Shards, Protocol):
    """Rows in shards, whose holders also do jobs that have nothing to do with these rows."""

    def jobs(self) -> AbstractContextManager[Jobs]:
        """Return a context in which those who hold the shards do jobs, and no passes."""

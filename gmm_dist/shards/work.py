"""Work on a shard that is done once, as the shard is read: a summary is held in place of its rows.

Rows that a worker cannot hold all at once, or need not, are read, worked on and let go, shard after
shard. `RayShards.load` does the work, each shard with its own deadline and its progress, and
`run(summary)` adds up what it left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, cast

import torch

from gmm_dist.shards.protocol import Block, ShardRows, Summary, Task


class Counted(Summary, Protocol):
    """A summary that says how many rows it is of."""

    @property
    def n_rows(self) -> int: ...


C = TypeVar("C", bound=Counted)


@dataclass(frozen=True, slots=True)
class Done(Generic[C]):
    """The loader of shards that are worked on: it does `work` and holds its summary alone.

    `work` reads the shard's rows itself. It may be done again, and elsewhere.
    """

    work: Callable[[int], C]

    def __call__(self, shard: int) -> ShardRows:
        done = self.work(shard)
        # Rows without features: they take no memory, and are counted like any others.
        return ShardRows(shard=shard, blocks=[Block(torch.empty(0, done.n_rows))], counts=done)


def summary(work: Callable[[int], C]) -> Task[C]:
    """Return the task that adds up what `work` has left of each shard."""
    return cast(Task[C], _held)


def _held(rows: ShardRows) -> object:
    return rows.counts

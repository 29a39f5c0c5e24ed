"""Scale sample weights by a power of two: only their ratios count.

Weights that sum to one, or that are all 1e-300, describe the same rows as others. Passes see
them multiplied by a power of two, which changes no digit, so that the largest is between 1 and
2: no square and no product with a small responsibility leaves the range of float32.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

from gmm_dist.shards.protocol import Block, Jobs, ShardRows, Summary, Task, WorkingShards

S = TypeVar("S", bound=Summary)


@dataclass(frozen=True, slots=True)
class Reweighted(Generic[S]):
    """The task that applies another one to rows with their weights times `scale`."""

    task: Task[S]
    scale: float

    def __call__(self, rows: ShardRows) -> S:
        fitted, held = (
            [_scaled(block, self.scale) for block in blocks]
            for blocks in (rows.blocks, rows.held_out)
        )
        return self.task(
            ShardRows(
                shard=rows.shard,
                blocks=fitted,
                counts=rows.counts,
                held_out=held,
                kept=rows.kept,  # of what weights have no part in
            )
        )


def _scaled(block: Block, scale: float) -> Block:
    weight = block.sample_weight
    return Block(block.X, None if weight is None else weight.double() * scale)


@dataclass(frozen=True, slots=True, eq=False)
class ReweightedShards:
    """Shards whose rows weigh `scale` times as much."""

    shards: WorkingShards
    scale: float

    @property
    def n_shards(self) -> int:
        return self.shards.n_shards

    def run(self, task: Task[S]) -> S:
        """Apply the task to every shard once and add the summaries along the fixed tree."""
        return self.shards.run(Reweighted(task, self.scale))

    def jobs(self) -> AbstractContextManager[Jobs]:
        """Return a context in which those who hold the shards do jobs, which see no weights."""
        return self.shards.jobs()


def unit_of(largest: float) -> float:
    """Return the power of two that brings the largest weight to between 1 and 2."""
    if not (0 < largest < math.inf):
        return 1.0
    # 2^1023 is the largest there is; weights below its inverse keep a smaller exponent.
    return math.ldexp(1.0, min(1 - math.frexp(largest)[1], 1023))

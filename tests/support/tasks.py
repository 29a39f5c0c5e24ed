"""Tasks whose results show where they ran, and in which order they were added."""

from __future__ import annotations

import os
from dataclasses import dataclass

from gmm_dist.shards.protocol import ShardRows


@dataclass(frozen=True)
class Pids:
    """The process of each shard, in the order of the shards."""

    pids: tuple[int, ...]

    def __add__(self, other: Pids) -> Pids:
        return Pids(self.pids + other.pids)


def pid(rows: ShardRows) -> Pids:
    return Pids((os.getpid(),))


@dataclass(frozen=True)
class Value:
    """A float sum that shows the order of its additions in its last bits."""

    value: float

    def __add__(self, other: Value) -> Value:
        return Value(self.value + other.value)


def odd_sum(rows: ShardRows) -> Value:
    return Value(sum(float(block.X.double().sum()) for block in rows.blocks) * 0.1**rows.shard)

"""Work on shards: its summaries are held, counted as their rows, and added along the tree."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.work import Done, summary


@dataclass(frozen=True)
class Lines:
    """What was written of some shards."""

    text: str
    n_rows: int

    def __add__(self, other: Lines) -> Lines:
        return Lines(f"({self.text} {other.text})", self.n_rows + other.n_rows)


def write(shard: int) -> Lines:
    return Lines(f"file {shard}", 10**9 * (shard + 1))


def test_summaries_stand_for_rows_that_take_no_memory() -> None:
    loader = pickle.loads(pickle.dumps(Done(write)))
    rows = loader(2)
    assert (rows.shard, rows.n_rows) == (2, 3 * 10**9)
    assert sum(block.X.nbytes for block in rows.blocks) == 0
    shards = LocalShards([loader(shard) for shard in range(3)])
    assert shards.run(summary(write)) == Lines("((file 0 file 1) file 2)", 6 * 10**9)

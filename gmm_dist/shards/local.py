"""Shards in this process: for tests, for samples, and for data that fit here."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor

from gmm_dist.shards.protocol import Block, S, ShardRows, Task
from gmm_dist.shards.tree_sum import Partial, TreeSum


class LocalShards:
    """Shards in this process: for tests, for samples, and for data that fit here.

    `n_threads` shards are worked on at a time, each by one thread: torch releases the GIL, and
    single-threaded operations on separate rows beat multi-threaded ones on the same rows. With
    `n_threads` 0 the caller's thread does the work, with torch's present number of threads.
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
        return cls(
            [ShardRows(shard=i, blocks=[block]) for i, block in enumerate(blocks)],
            n_threads=n_threads,
        )

    @property
    def n_shards(self) -> int:
        return len(self._shards)

    def run(self, task: Task[S]) -> S:
        tree: TreeSum[S] = TreeSum(self.n_shards)
        summaries = (
            map(task, self._shards) if self._pool is None else self._pool.map(task, self._shards)
        )
        for rows, summary in zip(self._shards, summaries, strict=True):
            tree.push(Partial(level=0, index=rows.shard, n_rows=rows.n_rows, summary=summary))
        return tree.total(self._n_rows)


def _one_thread() -> None:
    torch.set_num_threads(1)


class _Threads:
    """torch's number of threads outside `one_thread`, and how many callers are inside."""

    def __init__(self) -> None:
        self.lock, self.n_users, self.before = threading.Lock(), 0, 1


_threads = _Threads()


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch use one thread in the block, and restore the setting afterwards.

    Sums then have the same bits whatever the machine's cores. torch keeps the number per thread
    and, for new threads, per process; both are restored, even if several threads fit at once.
    """
    with _threads.lock:
        if _threads.n_users == 0:
            _threads.before = torch.get_num_threads()
        _threads.n_users += 1
        before = _threads.before
    if before != 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _threads.lock:
            _threads.n_users -= 1
            if before != 1:
                torch.set_num_threads(before)

"""Shards in this process: for tests, for samples, and for data that fit here."""

from __future__ import annotations

import heapq
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor

from gmm_dist.shards.protocol import Block, Job, Movable, S, ShardRows, Task
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

    def to(self, device: torch.device) -> Self:
        """Return the shards on a device, in the caller's thread."""
        return type(self)([rows.to(device) for rows in self._shards], n_threads=0)

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

    @contextmanager
    def jobs(self) -> Iterator[LocalJobs]:
        """Have this process do jobs while the block lasts, on each core one."""
        with one_thread(), LocalJobs(os.cpu_count() or 1) as jobs:
            yield jobs


class LocalJobs:
    """Jobs in this process: `n_threads` at a time, or in the caller's thread if that is one.

    Peak memory: that of as many jobs.
    """

    def __init__(self, n_threads: int) -> None:
        self._n_threads = n_threads
        self._pool = ThreadPoolExecutor(n_threads, initializer=_one_thread)
        self._numbers = itertools.count()
        self._waiting: list[tuple[tuple[int, ...], int, Job[Any], Any]] = []  # a heap
        self._running: dict[Future[Any], int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def share(self, value: Movable) -> Any:
        return value

    def submit(self, job: Job[Any], shared: Any, *, order: tuple[int, ...]) -> int:
        number = next(self._numbers)
        heapq.heappush(self._waiting, (order, number, job, shared))
        return number

    def next(self) -> tuple[int, Any]:
        if self._n_threads == 1:
            _, number, job, shared = heapq.heappop(self._waiting)
            return number, job(shared)
        while self._waiting and len(self._running) < self._n_threads:
            _, number, job, shared = heapq.heappop(self._waiting)
            self._running[self._pool.submit(job, shared)] = number
        done, _ = wait(self._running, return_when=FIRST_COMPLETED)
        future = min(done, key=self._running.__getitem__)
        return self._running.pop(future), future.result()


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

"""Our passes as production runs them, without Ray: one single-threaded process per core.

Each process holds shards and answers with `shards.run_on`, which is all that a Ray actor does.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import multiprocessing
import multiprocessing.connection
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gmm_dist.shards.protocol import Block, Job, S, ShardRows, Task
from gmm_dist.shards.tree_sum import TreeSum, run_on


@dataclass(frozen=True)
class Loader:
    """Make shards of the rows in a file of NumPy's; dealt evenly, like the lake's."""

    path: Path
    n_shards: int

    def __call__(self, shard: int) -> ShardRows:
        X = np.load(self.path, mmap_mode="r")
        a, b = (len(X) * i // self.n_shards for i in (shard, shard + 1))
        columns = torch.from_numpy(np.ascontiguousarray(X[a:b].T))
        return ShardRows(shard=shard, blocks=[Block(columns)])


class ProcessShards:
    """Shards in `n_workers` processes, each with a contiguous range of them."""

    def __init__(self, loader: Loader, n_workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        n_shards = self.n_shards = loader.n_shards
        edges = [n_shards * i // n_workers for i in range(n_workers + 1)]
        self._pipes: list[Connection] = []
        self._workers = []
        for a, b in itertools.pairwise(edges):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(theirs, loader, a, b), daemon=True)
            worker.start()
            theirs.close()
            self._pipes.append(ours)
            self._workers.append(worker)

    def run(self, task: Task[S]) -> S:
        message, waiting = pickle.dumps(task), list(self._pipes)
        for pipe in self._pipes:
            pipe.send_bytes(message)
        tree: TreeSum[S] = TreeSum(self.n_shards)
        while waiting:
            ready = multiprocessing.connection.wait(waiting)
            for pipe in [pipe for pipe in waiting if pipe in ready]:
                for partial in pickle.loads(pipe.recv_bytes()):
                    tree.push(partial)
                waiting.remove(pipe)
        return tree.total()

    @contextlib.contextmanager
    def jobs(self) -> Iterator[ProcessJobs]:
        yield ProcessJobs(self._pipes)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for worker in self._workers:
            worker.join()


@dataclass(frozen=True)
class _Work:
    """A job for a shared value; `value` travels to a process once, with the first of its jobs."""

    number: int
    job: Job[Any]
    shared: int
    value: Any


class ProcessJobs:
    """Jobs in the processes that hold the shards."""

    def __init__(self, pipes: list[Connection]) -> None:
        self._pipes, self._values = pipes, list[Any]()
        self._idle, self._sent = list(pipes), {id(pipe): set[int]() for pipe in pipes}
        self._numbers = itertools.count()
        self._waiting: list[tuple[tuple[int, ...], int, Job[Any], int]] = []

    def share(self, value: Any) -> int:
        self._values.append(value)
        return len(self._values) - 1

    def submit(self, job: Job[Any], shared: int, *, order: tuple[int, ...]) -> int:
        number = next(self._numbers)
        heapq.heappush(self._waiting, (order, number, job, shared))
        return number

    def next(self) -> tuple[int, Any]:
        while self._waiting and self._idle:
            _, number, job, shared = heapq.heappop(self._waiting)
            pipe = self._idle.pop()
            value = None if shared in self._sent[id(pipe)] else self._values[shared]
            self._sent[id(pipe)].add(shared)
            pipe.send_bytes(pickle.dumps(_Work(number, job, shared, value)))
        busy = [pipe for pipe in self._pipes if pipe not in self._idle]
        ready = multiprocessing.connection.wait(busy)
        pipe = next(pipe for pipe in busy if pipe in ready)
        self._idle.append(pipe)
        done: tuple[int, Any] = pickle.loads(pipe.recv_bytes())
        return done


def _serve(pipe: Connection, loader: Loader, first: int, last: int) -> None:
    torch.set_num_threads(1)
    rows = [loader(shard) for shard in range(first, last)]
    values: dict[int, Any] = {}
    with contextlib.suppress(EOFError):
        while True:
            work: Task[Any] | _Work = pickle.loads(pipe.recv_bytes())
            if not isinstance(work, _Work):
                values.clear()
                pipe.send_bytes(pickle.dumps(run_on(work, rows, loader.n_shards)))
                continue
            if work.value is not None:
                values[work.shared] = work.value
            pipe.send_bytes(pickle.dumps((work.number, work.job(values[work.shared]))))

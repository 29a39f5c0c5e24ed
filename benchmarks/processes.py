"""Our passes as production runs them, without Ray: one single-threaded process per core.

Each process holds shards and answers with `shards.run_on`, which is all that a Ray actor does.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import pickle
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gmm_dist.shards.protocol import Block, S, ShardRows, Task
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

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for worker in self._workers:
            worker.join()


def _serve(pipe: Connection, loader: Loader, first: int, last: int) -> None:
    torch.set_num_threads(1)
    rows = [loader(shard) for shard in range(first, last)]
    with contextlib.suppress(EOFError):
        while True:
            task: Task[Any] = pickle.loads(pipe.recv_bytes())
            pipe.send_bytes(pickle.dumps(run_on(task, rows, loader.n_shards)))

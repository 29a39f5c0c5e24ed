"""Shards on a Ray cluster: `run`, over workers that load rows and hold them."""

from __future__ import annotations

import functools
import itertools
import logging
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import ray

from gmm_dist.config import Cluster, FailureConfig
from gmm_dist.formats import counted
from gmm_dist.shards.connection import connected
from gmm_dist.shards.crew import Crew
from gmm_dist.shards.dispatch import Dispatcher
from gmm_dist.shards.job_queue import JobQueue
from gmm_dist.shards.placement import Placement, ranges
from gmm_dist.shards.protocol import Loader, Parted, S, Task
from gmm_dist.shards.spill import Spill
from gmm_dist.shards.tree_sum import TreeSum
from gmm_dist.shards.workers import ShardActor, Source, Work, Worker

logger = logging.getLogger(__name__)

_ROOM_SECONDS = 5.0  # after which the machines' memory is looked up again


@contextmanager
def session(
    loader: Loader,
    n_shards: int,
    cluster: Cluster,
    faults: FailureConfig | None = None,
    *,
    reserve: int = 0,
    gpu_reserve: int = 0,
) -> Iterator[RayShards]:
    """Connect to Ray and start workers; both end with the block, however it ends.

    A process that was connected before, as a notebook is, stays so: nothing of the session is left
    in it, no actor and no object. Takes what `RayShards` does; raises as `connected` does.
    """
    cluster = cluster.at_most(n_shards)
    with (
        connected(cluster),
        RayShards(
            loader, n_shards, cluster, faults, reserve=reserve, gpu_reserve=gpu_reserve
        ) as shards,
    ):
        yield shards


def _starter(make: Any, n_shards: int, name: str) -> Callable[[], Any]:
    """Return a function that starts a worker's actor, each time under a new name."""
    takes = itertools.count(1)

    def start() -> Any:
        take = next(takes)
        # The previous actor may still be ending under its name.
        shown = name if take == 1 else f"{name} take {take}"
        return make(name=shown).remote(n_shards)

    return start


class RayShards:
    """Shards dealt to actors as contiguous ranges of like length.

    A task's sum has the same bits even if actors fail (`faults` says how many failures, and how
    long waits, are tolerated): every shard is counted once, along the plan's tree. `reserve` are
    the bytes that each worker needs beside its rows, for the statistics of a pass, and
    `gpu_reserve` those on a GPU. The actors are there within a `with` block.
    """

    def __init__(
        self,
        loader: Loader,
        n_shards: int,
        cluster: Cluster,
        faults: FailureConfig | None = None,
        *,
        reserve: int = 0,
        gpu_reserve: int = 0,
    ) -> None:
        self._n_shards = n_shards
        self._room_known, self._room_bytes = float("-inf"), 0
        use_gpu = _use_gpu(cluster)
        self._reserve = gpu_reserve if use_gpu else reserve
        self._resource = "GPU" if use_gpu else "CPU"  # of which each worker has one
        self._n_rows: int | None = None
        remote: Any = ray.remote  # its types know neither these options nor our methods
        actor = remote(concurrency_groups={"pulse": 1})(ShardActor)
        # Ray neither restarts nor repeats: its own retries stall for up to 30 s and cannot be
        # seen, while without them a death is known in 10 ms and a lost message in 2 s.
        options = {"num_cpus": 1, "num_gpus": int(use_gpu), "max_restarts": 0}
        make = functools.partial(actor.options, **options, max_task_retries=0)
        run = uuid.uuid4().hex[:8]
        homes = ranges(n_shards, _n_workers(n_shards, cluster.num_workers, self._resource))
        self._homes = homes
        self._source = self._stored(loader)
        now = time.monotonic()
        self._workers = [
            Worker(index=i, start=_starter(make, n_shards, f"gmm_dist {run} worker {i}"), since=now)
            for i in range(len(homes))
        ]
        config = FailureConfig() if faults is None else faults
        self._crew = Crew(self._workers, config)
        self._dispatcher = Dispatcher(self._crew, Placement(homes), self._room)

    def __enter__(self) -> Self:
        try:
            for worker in self._workers:
                worker.restart()
        except BaseException:
            self.close()
            raise
        what = counted(self._n_shards, "shard"), counted(self.n_workers, "worker")
        logger.info("%s on %s with one %s each", *what, self._resource)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def n_shards(self) -> int:
        return self._n_shards

    @property
    def n_workers(self) -> int:
        """The number of workers that were started; fewer may be up."""
        return len(self._workers)

    @property
    def on_gpu(self) -> bool:
        """Say whether workers hold their rows on GPUs."""
        return self._resource == "GPU"

    def worker_memory(self) -> int:
        """Return the bytes that a worker has: what was free on its GPU, or its share of a machine.

        Of GPUs the first that is there, of machines the smallest.
        """
        if self.on_gpu:
            who = self._crew.await_worker().introduction
            return sys.maxsize if who is None or who.memory is None else who.memory
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        places = [(m["memory"], min(m.get("CPU", 0), self.n_workers)) for m in machines]
        # sys.maxsize where no machine is there yet.
        return int(min((memory / n for memory, n in places if n), default=sys.maxsize))

    @property
    def workers_per_machine(self) -> int:
        """The workers of the machine that has the most, if they are spread evenly."""
        n_machines = sum(bool(node["Alive"]) for node in ray.nodes())
        return -(-self.n_workers // max(n_machines, 1))

    def load(self, watch: Callable[[int, int], None] = lambda done, rows: None) -> int:
        """Load all shards; `watch` gets the number loaded, and of their rows, so far.

        Raises UserError where the loader does, and where rows do not fit; RunFailed after too
        many failures.
        """
        n_rows = 0
        for done, reply in enumerate(self._dispatcher.gather(Work(self._source)), start=1):
            n_rows += reply.value.n_rows
            watch(done, n_rows)
        self._n_rows = n_rows
        return n_rows

    def replace(self, loader: Loader) -> None:
        """Take the rows from another loader from now on."""
        number, spill = self._source.number + 1, self._source.spill
        self._source = replace(self._stored(loader), number=number, spill=spill)
        self._n_rows = None

    def spill(self, spill: Spill) -> None:
        """Have workers keep rows that their memory does not hold in files, from the loading on."""
        self._source = replace(self._source, spill=spill)

    def run(self, task: Task[S]) -> S:
        """Apply the task to every shard once and add the summaries along the fixed tree.

        Raises RunFailed after too many failures.
        """
        tree: TreeSum[S] = TreeSum(self._n_shards)
        for reply in self._dispatcher.gather(Work(self._source, task)):
            for partial in reply.value:
                tree.push(partial)
        return tree.total(self._n_rows)

    @contextmanager
    def jobs(self) -> Iterator[JobQueue]:
        """Have the workers do jobs, and no passes, while the block lasts."""
        queue = JobQueue(self._crew)
        try:
            yield queue
        finally:
            queue.close()

    def close(self) -> None:
        """End the actors, with their rows, and let go of the loader in the object store."""
        self._source.loaders.clear()  # a traceback may still refer to the source
        self._dispatcher.close()
        self._crew.close()

    def _stored(self, loader: Loader) -> Source:
        """Put a loader into the object store; one that can be cut, in a part for each worker."""
        if not isinstance(loader, Parted):
            return Source(0, [ray.put(loader)], (0,))
        parts = [ray.put(loader.part(home)) for home in self._homes]
        return Source(0, parts, tuple(home.start for home in self._homes))

    def _room(self) -> int:
        if self._source.spill is not None:
            return sys.maxsize
        now = time.monotonic()
        if now > self._room_known + _ROOM_SECONDS:
            self._room_known, self._room_bytes = now, self.worker_memory() - self._reserve
        return self._room_bytes


def _use_gpu(cluster: Cluster) -> bool:
    if cluster.use_gpu is not None:
        return cluster.use_gpu
    return bool(ray.cluster_resources().get("GPU", 0) >= 1)


def _n_workers(n_shards: int, num_workers: int | None, resource: str) -> int:
    """Return `num_workers`, else the cluster's CPUs or GPUs; never more than shards."""
    places = int(ray.cluster_resources().get(resource, 1))
    return max(1, min(num_workers or places, n_shards))

"""Shards on a Ray cluster: the one verb, over workers that load their own rows and hold them."""

from __future__ import annotations

import functools
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from gmm_dist.dispatch import Dispatcher
from gmm_dist.errors import UserError
from gmm_dist.failures import FaultConfig
from gmm_dist.placement import Placement, ranges
from gmm_dist.shards import Loader, S, Task, TreeSum
from gmm_dist.workers import ShardActor, Source, Work, Worker

logger = logging.getLogger(__name__)

_ROOM_SECONDS = 5.0  # for which what is known of the machines' memory holds


@dataclass(frozen=True, slots=True)
class ScalingConfig:
    """How many workers, and whether each has a GPU of its own (None: if the cluster has any)."""

    num_workers: int | None = None
    use_gpu: bool | None = None

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 1:
            raise UserError(f"num_workers is {self.num_workers}: give a whole number >= 1")


@contextmanager
def connected(address: str | None, scaling: ScalingConfig) -> Iterator[None]:
    """Connect to a Ray cluster, or start one here, and leave it again.

    `address` None: the cluster that the job runs in (RAY_ADDRESS), else an embedded one, with
    as many CPUs as this machine or as `num_workers` asks for. A process that is connected
    already, such as a notebook, stays so; no other cluster can be had there.

    Raises UserError when there is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {}
    if address == "local":
        n_cpus = max(os.cpu_count() or 1, scaling.num_workers or 1)
        options = {"num_cpus": n_cpus, "include_dashboard": False}
        logger.info("starting Ray on this machine")
    else:
        _require_listener(address)
    # Ray warns of what it did by default (token files and the like): not our user's concern.
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    try:
        yield
    finally:
        ray.shutdown()


def _require_listener(address: str) -> None:
    """Raise UserError at once where Ray would wait five minutes for a cluster to appear."""
    match = re.fullmatch(r"(?:ray://)?\[?([^\[\]/]+)\]?:(\d+)", address)
    if match is None:  # "auto" and the like: Ray's to find
        return
    try:
        socket.create_connection((match[1], int(match[2])), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({error.strerror or error}): "
            "check --address or RAY_ADDRESS, or leave both out to run Ray on this machine"
        ) from error


class RayShards:
    """Shards dealt to actors as contiguous ranges of like length.

    Whatever becomes of the actors (`faults` says how patient we are), a task's sum has the same
    bits: every shard is counted once, along the plan's tree. `reserve` are the bytes that each
    worker needs beside its rows, for the statistics of a pass.
    """

    def __init__(
        self,
        loader: Loader,
        n_shards: int,
        scaling: ScalingConfig,
        faults: FaultConfig | None = None,
        *,
        reserve: int = 0,
    ) -> None:
        self._n_shards = n_shards
        self._reserve = reserve
        self._room_known, self._room_bytes = float("-inf"), 0
        use_gpu = _use_gpu(scaling)
        self._resource = "GPU" if use_gpu else "CPU"  # of which each worker has one
        self._source = Source(0, [ray.put(loader)])
        self._n_rows: int | None = None
        remote: Any = ray.remote  # its types know neither these options nor our methods
        actor = remote(concurrency_groups={"pulse": 1})(ShardActor)
        # Ray neither restarts nor repeats: its own retries stall for up to 30 s and cannot be
        # seen, while without them a death is known in 10 ms and a lost message in 2 s.
        options = {"num_cpus": 1, "num_gpus": int(use_gpu), "max_restarts": 0}
        make = actor.options(**options, max_task_retries=0)
        homes = ranges(n_shards, _n_workers(n_shards, scaling.num_workers, self._resource))
        now = time.monotonic()
        start = functools.partial(make.remote, n_shards)
        self._workers = [Worker(i, start, now) for i in range(len(homes))]
        config = FaultConfig() if faults is None else faults
        self._dispatcher = Dispatcher(self._workers, Placement(homes), config, self._room)
        for worker in self._workers:
            worker.restart()
        kind = self._resource
        logger.info("%d shards on %d workers, each with one %s", n_shards, self.n_workers, kind)

    @property
    def n_shards(self) -> int:
        return self._n_shards

    @property
    def n_workers(self) -> int:
        """The number of workers asked for; fewer may be up."""
        return len(self._workers)

    @property
    def on_gpu(self) -> bool:
        """Say whether workers hold their rows on GPUs."""
        return self._resource == "GPU"

    def worker_memory(self) -> int:
        """Return the bytes that a worker has: its GPU's, or its share of the smallest machine."""
        if self.on_gpu:
            who = self._dispatcher.await_worker().introduction
            return sys.maxsize if who is None or who.memory is None else who.memory
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        places = [(m["memory"], min(m.get("CPU", 0), self.n_workers)) for m in machines]
        # A machine may be yet to come: nothing is known of it.
        return int(min((memory / n for memory, n in places if n), default=sys.maxsize))

    def load(self, watch: Callable[[int, int], None] = lambda done, rows: None) -> int:
        """Load all shards; `watch` sees how many are loaded, and their rows so far.

        Raises UserError for what the loader finds wrong, and where rows do not fit; RunFailed
        when too much fails.
        """
        n_rows = 0
        for done, reply in enumerate(self._dispatcher.gather(Work(self._source)), start=1):
            n_rows += reply.value.n_rows
            watch(done, n_rows)
        self._n_rows = n_rows
        return n_rows

    def replace(self, loader: Loader) -> None:
        """Take the rows from another loader from now on."""
        self._source, self._n_rows = Source(self._source.number + 1, [ray.put(loader)]), None

    def run(self, task: Task[S]) -> S:
        """Apply the task to every shard once and add the summaries along the fixed tree.

        Raises RunFailed when too much fails.
        """
        tree: TreeSum[S] = TreeSum(self._n_shards)
        for reply in self._dispatcher.gather(Work(self._source, task)):
            for partial in reply.value:
                tree.push(partial)
        return tree.total(self._n_rows)

    def close(self) -> None:
        """End the actors; their rows go with them."""
        self._dispatcher.close()

    def _room(self) -> int:
        now = time.monotonic()
        if now > self._room_known + _ROOM_SECONDS:
            self._room_known, self._room_bytes = now, self.worker_memory() - self._reserve
        return self._room_bytes


def _use_gpu(scaling: ScalingConfig) -> bool:
    if scaling.use_gpu is not None:
        return scaling.use_gpu
    return bool(ray.cluster_resources().get("GPU", 0) >= 1)


def _n_workers(n_shards: int, num_workers: int | None, resource: str) -> int:
    """Return as many workers as asked for, or as the cluster has places."""
    places = int(ray.cluster_resources().get(resource, 1))
    return max(1, min(num_workers or places, n_shards))

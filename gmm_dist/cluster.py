"""Shards on a Ray cluster: actors that load their own rows, hold them, and answer tasks."""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError

from gmm_dist.errors import UserError
from gmm_dist.shards import Loader, Partial, S, ShardRows, Task, TreeSum, run_on

logger = logging.getLogger(__name__)

_PATIENCE = 10.0  # seconds between two lines that say what we wait for


@dataclass(frozen=True, slots=True)
class Source:
    """Where the rows of shards come from: a number that names it, and a loader in the store."""

    number: int
    loader: list[Any]  # in a list, so that an actor fetches it only when it has to load

    def rows(self, shard: int) -> ShardRows:
        loader: Loader = ray.get(self.loader[0])
        return loader(shard)


class ShardActor:
    """Holds the rows of some shards, on its GPU where it has one, and nothing else.

    Every call is a pure function of its arguments and names its shards, so Ray may retry it;
    the rows held are a cache. An actor that Ray has restarted loads them again, to the same
    bits.
    """

    def __init__(self, n_shards: int) -> None:
        torch.set_num_threads(1)  # one thread per process, one process per core
        self._device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        self._n_shards = n_shards
        self._rows: dict[tuple[int, int], ShardRows] = {}

    def load(self, source: Source, shard: int) -> int:
        """Hold one shard, and no rows of earlier sources; return its number of rows."""
        self._rows = {key: rows for key, rows in self._rows.items() if key[0] == source.number}
        return self._held(source, shard).n_rows

    def run(self, source: Source, shards: Sequence[int], task: Task[S]) -> list[Partial[S]]:
        """Return the sums over the complete subtrees of these shards."""
        return run_on(task, (self._held(source, shard) for shard in shards), self._n_shards)

    def _held(self, source: Source, shard: int) -> ShardRows:
        key = source.number, shard
        if key not in self._rows:
            self._rows[key] = source.rows(shard).to(self._device)
        return self._rows[key]


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
    as many CPUs as this machine or as `num_workers` asks for.

    Raises UserError when there is no cluster at the address.
    """
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
    """Shards dealt to actors as contiguous ranges of like length."""

    def __init__(self, loader: Loader, n_shards: int, scaling: ScalingConfig) -> None:
        self._n_shards = n_shards
        use_gpu = _use_gpu(scaling)
        self._resource = "GPU" if use_gpu else "CPU"  # of which each worker has one
        self._ranges = _ranges(n_shards, scaling.num_workers, self._resource)
        self._source = Source(0, [ray.put(loader)])
        self._n_rows: int | None = None
        actor: Any = ray.remote(ShardActor)  # its handles have no types of their own
        make = actor.options(
            num_cpus=1,
            num_gpus=int(use_gpu),
            # Calls are pure: Ray may repeat them on an actor that it had to restart.
            max_restarts=-1,
            max_task_retries=-1,
        )
        self._actors = [make.remote(n_shards) for _ in self._ranges]
        kind = self._resource
        logger.info("%d shards on %d workers, each with one %s", n_shards, self.n_workers, kind)

    @property
    def n_shards(self) -> int:
        return self._n_shards

    @property
    def n_workers(self) -> int:
        return len(self._actors)

    def worker_memory(self) -> int:
        """Return the bytes that the smallest machine has for each worker it may hold."""
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        places = [(m["memory"], min(m.get(self._resource, 0), self.n_workers)) for m in machines]
        return int(min((memory / n for memory, n in places if n), default=math.inf))

    def load(self, watch: Callable[[int, int], None] = lambda done, rows: None) -> int:
        """Load all shards; `watch` sees how many are loaded, and their rows so far."""
        pairs = zip(self._actors, self._ranges, strict=True)
        calls = [actor.load.remote(self._source, i) for actor, shards in pairs for i in shards]
        n_rows = 0
        for done, rows in enumerate(self._replies(calls), start=1):
            n_rows += rows
            watch(done, n_rows)
        self._n_rows = n_rows
        return n_rows

    def replace(self, loader: Loader) -> None:
        """Take the rows from another loader from now on."""
        self._source, self._n_rows = Source(self._source.number + 1, [ray.put(loader)]), None

    def run(self, task: Task[S]) -> S:
        stored = ray.put(task)
        tree: TreeSum[S] = TreeSum(self._n_shards)
        pairs = zip(self._actors, self._ranges, strict=True)
        calls = [actor.run.remote(self._source, list(shards), stored) for actor, shards in pairs]
        for partials in self._replies(calls):
            for partial in partials:
                tree.push(partial)
        return tree.total(self._n_rows)

    def close(self) -> None:
        """End the actors; their rows go with them."""
        for actor in self._actors:
            ray.kill(actor)

    def _replies(self, calls: list[Any]) -> Iterator[Any]:
        """Yield replies as they come; say now and then what is still missing."""
        began, waiting = time.monotonic(), list(calls)
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=_PATIENCE, fetch_local=False)
            if not ready:
                self._report(len(waiting), len(calls), time.monotonic() - began)
            for call in ready:
                yield _result(call)

    def _report(self, missing: int, calls: int, seconds: float) -> None:
        logger.info(
            "%d of %d replies missing for %.0f s (%d workers wanted; the cluster has %g CPUs)",
            missing,
            calls,
            seconds,
            self.n_workers,
            ray.cluster_resources().get("CPU", 0),
        )


def _result(call: Any) -> Any:
    try:
        return ray.get(call)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise


def _use_gpu(scaling: ScalingConfig) -> bool:
    if scaling.use_gpu is not None:
        return scaling.use_gpu
    return bool(ray.cluster_resources().get("GPU", 0) >= 1)


def _ranges(n_shards: int, num_workers: int | None, resource: str) -> list[range]:
    """Deal shards to workers: as many workers as asked for, or as the cluster has places."""
    places = int(ray.cluster_resources().get(resource, 1))
    n_workers = max(1, min(num_workers or places, n_shards))
    edges = [n_shards * i // n_workers for i in range(n_workers + 1)]
    return [range(a, b) for a, b in itertools.pairwise(edges)]

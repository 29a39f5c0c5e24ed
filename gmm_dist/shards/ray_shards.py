"""Shards on a Ray cluster: `run`, over workers that load rows and hold them."""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import os
import re
import signal
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch

from gmm_dist.config import Cluster, FailureConfig
from gmm_dist.errors import Option, RunFailed, UserError
from gmm_dist.formats import counted
from gmm_dist.shards.dispatch import Dispatcher
from gmm_dist.shards.placement import Placement, ranges
from gmm_dist.shards.protocol import Loader, S, Task
from gmm_dist.shards.same_cluster import HERE, require_same_cluster
from gmm_dist.shards.tree_sum import TreeSum
from gmm_dist.shards.workers import ShardActor, Source, Work, Worker, machines

logger = logging.getLogger(__name__)

_LAST_PORT = 2**16 - 1
_ACTION_BYTES = 512  # more than any system's struct sigaction has
_ANSWER_SECONDS = 10.0  # for a cluster's head to answer
_PLACES_SECONDS = 60.0  # for the first machine of a cluster to join
# The longest name of a socket below Ray's folder: /ray/session_..._PID/sockets/plasma_store.
_SOCKET_BYTES = 68
_ROOM_SECONDS = 5.0  # after which the machines' memory is looked up again


@contextmanager
def connected(cluster: Cluster) -> Iterator[None]:
    """Connect to a Ray cluster, or start one here, and leave it again.

    Without an address: the cluster that the job runs in (RAY_ADDRESS), else an embedded one, with
    as many CPUs as this machine has or, if more, `num_workers`. A process that is connected
    already, such as a notebook, stays so and cannot use another cluster. The process keeps its
    signal handlers.

    Raises:
        UserError: no cluster answers at the address; it lacks the CPUs or GPUs that workers need
            and cannot grow; or the process is connected to another cluster.
        RunFailed: Ray does not start on this machine.
    """
    if ray.is_initialized():
        require_same_cluster(cluster.address)
        _require_places(cluster)
        yield
        return
    address = _where(cluster.address)
    try:
        if address == HERE:
            _start(cluster)
        else:
            _join(address)
        _require_places(cluster)
        yield
    finally:
        with _kept_handlers():
            ray.shutdown()


def most_memory(cluster: Cluster, n_shards: int) -> int:
    """Return the bytes that a worker can have at most, without asking Ray.

    They are known only where `connected` would start Ray on this machine, with workers on CPUs;
    otherwise sys.maxsize.
    """
    may_use_gpu = cluster.use_gpu is not False and torch.cuda.is_available()
    if ray.is_initialized() or _where(cluster.address) != HERE or may_use_gpu:
        return sys.maxsize
    n_workers = min(cluster.num_workers or _n_cpus(cluster), n_shards)
    utils: Any = ray._private.utils
    return int(utils.get_system_memory()) // max(1, n_workers)


def _where(address: str | None) -> str:
    return address or os.environ.get("RAY_ADDRESS") or HERE


def _n_cpus(cluster: Cluster) -> int:
    """Return the number of CPUs that Ray starts with on this machine."""
    return max(os.cpu_count() or 1, cluster.num_workers or 1)


def _start(cluster: Cluster) -> None:
    logger.info("starting Ray on this machine")
    n_cpus = _n_cpus(cluster)
    try:
        _init(HERE, num_cpus=n_cpus, include_dashboard=False, _temp_dir=_temp_dir())
    except Exception as error:
        raise RunFailed(
            f"Ray did not start on this machine ({_line(error)})",
            remedy="free memory, or space in /dev/shm and /tmp, try again when the machine is less "
            "busy, or name a cluster with " + Option("address"),
        ) from error


def _join(address: str) -> None:
    head = _require_ray(address)
    try:
        _init(head)
    except Exception as error:
        raise UserError(
            f"the Ray cluster at {address} cannot be joined ({_line(error)}): run the job on one "
            "of its machines (`ray job submit`), with the same versions of Ray and Python"
        ) from error


def _init(address: str, **options: Any) -> None:
    # A thread of Ray's prints a page to stdout when a worker dies; our log has a line instead.
    hushed = _replaced(ray._private.worker, "listen_error_messages", lambda worker, over: None)
    with _kept_handlers(), hushed, warnings.catch_warnings(action="ignore"):
        # Ray warns of its own defaults (token files and the like), which users need not know.
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)


@contextmanager
def _kept_handlers() -> Iterator[None]:
    """Keep the process's signal handlers while Ray starts or ends.

    In Python, Ray sets one for SIGTERM, whose SystemExit is lost where nobody catches it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with (
            _replaced(ray._private.utils, "set_sigterm_handler", lambda handler: None),
            _kept_action(signal.SIGTERM),
        ):
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def _kept_action(number: int) -> Iterator[None]:
    """Keep the system's action for a signal.

    Below Python, Ray sets a handler that aborts the process, and resets it to the system's
    default long before all of Ray has ended. This cannot be switched off, so a thread restores
    the action within a millisecond.
    """
    sigaction = ctypes.CDLL(None).sigaction
    ours = ctypes.create_string_buffer(_ACTION_BYTES)
    sigaction(number, None, ours)
    over = threading.Event()

    def keep() -> None:
        while not over.wait(0.001):
            sigaction(number, ours, None)

    keeper = threading.Thread(target=keep, daemon=True, name="handlers")
    keeper.start()
    try:
        yield
    finally:
        over.set()
        keeper.join()
        sigaction(number, ours, None)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _temp_dir() -> str | None:
    """Return a folder for Ray's sockets, with names of at most 107 bytes; None: Ray's default."""
    base = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return "/tmp/ray" if len(os.fsencode(base)) + _SOCKET_BYTES > 107 else None


def _line(error: BaseException) -> str:
    """Return the first words of an error and of its causes, in one line."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None and cause not in causes:
        causes.append(cause)
    texts = dict.fromkeys(" ".join(str(each).split())[:200] or repr(each) for each in causes)
    return "; ".join(texts)


def _require_ray(address: str) -> str:
    """Return the address to join; raise UserError soon where Ray would wait for minutes.

    The server at HOST:PORT must speak Ray's protocol.
    """
    if address == "auto":
        try:
            address = ray._private.services.canonicalize_bootstrap_address_or_die("auto")
        except Exception as error:
            raise UserError(
                f"is auto, and no Ray cluster was found ({_line(error)})",
                option="address",
                remedy="start one (`ray start --head`), or leave "
                + Option("address")
                + " out to run Ray on this machine alone",
            ) from error
    match = re.fullmatch(r"(ray://)?(\[[^\[\]/]+\]|[^\[\]/:\s]+):(\d{1,5})/?", address)
    if match is None or int(match[3]) > _LAST_PORT:
        raise UserError(
            f"or RAY_ADDRESS is {address!r}",
            option="address",
            remedy="give HOST:PORT of a Ray head (`ray start --head` prints it, 6379 by default; "
            "the dashboard's 8265 is for `ray job submit`), ray://HOST:10001, or auto",
        )
    if (reason := _silence(f"{match[2]}:{match[3]}", is_client=bool(match[1]))) is not None:
        raise UserError(
            f"no Ray cluster answers at {address} ({reason})",
            remedy="check "
            + Option("address")
            + " or RAY_ADDRESS, or leave both out to run Ray on this machine",
        )
    return address.rstrip("/")


def _silence(address: str, *, is_client: bool) -> str | None:
    """Say why Ray does not answer at HOST:PORT; None where it does."""
    import grpc  # half a second, and only where there is an address
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    channel = init_grpc_channel(address, options=[("grpc.enable_http_proxy", 0)])
    try:
        if is_client:
            grpc.channel_ready_future(channel).result(timeout=_ANSWER_SECONDS)
        else:
            stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
            messages: Any = gcs_service_pb2  # its types are made when it is imported
            stub.CheckAlive(messages.CheckAliveRequest(), timeout=_ANSWER_SECONDS)
    except grpc.FutureTimeoutError:
        return f"nothing that speaks gRPC within {_ANSWER_SECONDS:g} s"
    except grpc.RpcError as error:
        code, words = error.code(), " ".join(str(error.details()).split())[:200]
        if code is grpc.StatusCode.UNAUTHENTICATED:
            return f"it asks for a token, {words}; give RAY_AUTH_MODE and its token here too"
        return f"{code.name}: {words}"
    finally:
        channel.close()
    return None


def _require_places(cluster: Cluster) -> None:
    """Wait a moment for a machine with a CPU or GPU for a worker; raise UserError without hope.

    A cluster with node groups (`ray up`, KubeRay) starts machines on demand.
    """
    kind = "GPU" if cluster.use_gpu else "CPU"
    began, reported = time.monotonic(), float("-inf")
    while not _has(kind) and not _may_grow():
        now = time.monotonic()
        if kind == "GPU":
            gpu = Option("use_gpu")
            raise UserError(
                "a GPU for each worker is asked for (" + gpu + f"), and {machines()}",
                remedy="leave out " + gpu + ", or use a cluster whose machines have GPUs",
            )
        if now - began > _PLACES_SECONDS:
            raise UserError(
                f"after {now - began:.0f} s {machines()}, and workers need one CPU each: add "
                "machines (`ray start --address=...`), or CPUs to the head "
                "(`ray start --head --num-cpus=...`)"
            )
        if now - reported > 10:
            reported = now
            logger.info("waiting for machines: %s", machines())
        time.sleep(min(1.0, _PLACES_SECONDS / 10))
    if not _has(kind):
        logger.info("asking for machines, which may take minutes: %s", machines())


def _has(kind: str) -> bool:
    return bool(ray.cluster_resources().get(kind, 0) >= 1)


def _may_grow() -> bool:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return any("ray.io/node-group" in node.get("Labels", {}) for node in nodes)


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
    the bytes that each worker needs beside its rows, for the statistics of a pass.
    """

    def __init__(
        self,
        loader: Loader,
        n_shards: int,
        cluster: Cluster,
        faults: FailureConfig | None = None,
        *,
        reserve: int = 0,
    ) -> None:
        self._n_shards = n_shards
        self._reserve = reserve
        self._room_known, self._room_bytes = float("-inf"), 0
        use_gpu = _use_gpu(cluster)
        self._resource = "GPU" if use_gpu else "CPU"  # of which each worker has one
        self._source = Source(0, [ray.put(loader)])
        self._n_rows: int | None = None
        remote: Any = ray.remote  # its types know neither these options nor our methods
        actor = remote(concurrency_groups={"pulse": 1})(ShardActor)
        # Ray neither restarts nor repeats: its own retries stall for up to 30 s and cannot be
        # seen, while without them a death is known in 10 ms and a lost message in 2 s.
        options = {"num_cpus": 1, "num_gpus": int(use_gpu), "max_restarts": 0}
        make = functools.partial(actor.options, **options, max_task_retries=0)
        run = uuid.uuid4().hex[:8]
        homes = ranges(n_shards, _n_workers(n_shards, cluster.num_workers, self._resource))
        now = time.monotonic()
        self._workers = [
            Worker(index=i, start=_starter(make, n_shards, f"gmm_dist {run} worker {i}"), since=now)
            for i in range(len(homes))
        ]
        config = FailureConfig() if faults is None else faults
        self._dispatcher = Dispatcher(self._workers, Placement(homes), config, self._room)
        for worker in self._workers:
            worker.restart()
        what = counted(n_shards, "shard"), counted(self.n_workers, "worker")
        logger.info("%s on %s with one %s each", *what, self._resource)

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
        """Return the bytes that a worker has: its GPU's, or its share of the smallest machine."""
        if self.on_gpu:
            who = self._dispatcher.await_worker().introduction
            return sys.maxsize if who is None or who.memory is None else who.memory
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        places = [(m["memory"], min(m.get("CPU", 0), self.n_workers)) for m in machines]
        # sys.maxsize where no machine is there yet.
        return int(min((memory / n for memory, n in places if n), default=sys.maxsize))

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
        self._source, self._n_rows = Source(self._source.number + 1, [ray.put(loader)]), None

    def run(self, task: Task[S]) -> S:
        """Apply the task to every shard once and add the summaries along the fixed tree.

        Raises RunFailed after too many failures.
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


def _use_gpu(cluster: Cluster) -> bool:
    if cluster.use_gpu is not None:
        return cluster.use_gpu
    return bool(ray.cluster_resources().get("GPU", 0) >= 1)


def _n_workers(n_shards: int, num_workers: int | None, resource: str) -> int:
    """Return `num_workers`, else the cluster's CPUs or GPUs; never more than shards."""
    places = int(ray.cluster_resources().get(resource, 1))
    return max(1, min(num_workers or places, n_shards))

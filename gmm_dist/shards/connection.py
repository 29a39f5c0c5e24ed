"""The connection to a Ray cluster: the one at an address, or one that is started here."""

from __future__ import annotations

import ctypes
import ipaddress
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
import torch

from gmm_dist.config import Cluster
from gmm_dist.errors import Option, RunFailed, UserError
from gmm_dist.shards.workers import machines

logger = logging.getLogger(__name__)

_HERE = "local"  # the address that has Ray start on this machine
_LAST_PORT = 2**16 - 1
_ACTION_BYTES = 512  # more than any system's struct sigaction has
_ANSWER_SECONDS = 10.0  # for a cluster's head to answer
_PLACES_SECONDS = 60.0  # for the first machine of a cluster to join
# The longest name of a socket below Ray's folder: /ray/session_..._PID/sockets/plasma_store.
_SOCKET_BYTES = 68


@contextmanager
def connected(cluster: Cluster) -> Iterator[None]:
    """Connect to a Ray cluster, or start one here, and leave it again.

    Without an address: the cluster that the job runs in (RAY_ADDRESS), else an embedded one, with
    as many CPUs as this machine has or, if more, `num_workers`. A process that is connected
    already, such as a notebook, stays so and cannot use another cluster; so does one in which
    another thread has connected, until the last is done. The process keeps its signal handlers.

    Raises:
        UserError: no cluster answers at the address; it lacks the CPUs or GPUs that workers need
            and cannot grow; or the process is connected to another cluster.
        RunFailed: Ray does not start on this machine.
    """
    _ours.enter(cluster)
    try:
        _require_places(cluster)
        yield
    finally:
        _ours.leave()


class _Ours:
    """The process's connection to Ray, if it is ours: threads share it, and the last one ends it.

    Ray knows one connection for a process; whoever ended it first would end it for all.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_users, self._is_ours = 0, False

    def enter(self, cluster: Cluster) -> None:
        """Use the connection that there is, or make one."""
        with self._lock:
            if ray.is_initialized():
                _require_same_cluster(cluster.address)
            else:
                self._connect(cluster)
            self._n_users += 1

    def _connect(self, cluster: Cluster) -> None:
        address, self._is_ours = _where(cluster.address), True
        try:
            if address == _HERE:
                _start(cluster)
            else:
                _join(address)
        except BaseException:
            self._end()
            raise

    def leave(self) -> None:
        """End the connection, if it is ours and nobody uses it any more."""
        with self._lock:
            self._n_users -= 1
            if self._is_ours and self._n_users == 0:
                self._end()

    def _end(self) -> None:
        self._is_ours = False
        with _kept_handlers():
            ray.shutdown()


_ours = _Ours()


def most_memory(cluster: Cluster, n_shards: int) -> int:
    """Return the bytes that a worker can have at most, without asking Ray.

    They are known only where `connected` would start Ray on this machine, with workers on CPUs;
    otherwise sys.maxsize.
    """
    may_use_gpu = cluster.use_gpu is not False and torch.cuda.is_available()
    if ray.is_initialized() or _where(cluster.address) != _HERE or may_use_gpu:
        return sys.maxsize
    n_workers = min(cluster.num_workers or _n_cpus(cluster), n_shards)
    utils: Any = ray._private.utils
    return int(utils.get_system_memory()) // max(1, n_workers)


def _where(address: str | None) -> str:
    return address or os.environ.get("RAY_ADDRESS") or _HERE


def _n_cpus(cluster: Cluster) -> int:
    """Return the number of CPUs that Ray starts with on this machine."""
    return max(os.cpu_count() or 1, cluster.num_workers or 1)


def _start(cluster: Cluster) -> None:
    logger.info("starting Ray on this machine")
    n_cpus = _n_cpus(cluster)
    try:
        _init(_HERE, num_cpus=n_cpus, include_dashboard=False, _temp_dir=_temp_dir())
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


def _require_same_cluster(address: str | None) -> None:
    """Raise UserError if this process is connected to another cluster than the one at `address`."""
    if address is None or address == "auto":
        return
    client = ray.util.client.ray
    if client.is_connected():
        # The client server's port is not that of the cluster: only hosts are compared.
        here = str(client.get_context().client_worker._conn_str)
        is_same = _hosts(address) & _hosts(here) != set()
    else:
        here = str(ray.get_runtime_context().gcs_address)
        node: Any = ray._private.worker._global_node
        is_same = node.is_head() if address == _HERE else _is_at(address, here)
    if not is_same:
        raise UserError(
            f"is {address}, but this process is connected to the Ray cluster at {here}",
            option="address",
            remedy="leave "
            + Option("address")
            + " out to use that one, or leave it first (ray.shutdown())",
        )


def _is_at(address: str, here: str) -> bool:
    """Say whether an address leads to the cluster whose head listens at `here`."""
    if not _hosts(address) & _hosts(here):
        return False
    is_client = address.startswith("ray://")  # another port leads to the same cluster
    return is_client or _parted(address)[1] == _parted(here)[1]


def _hosts(address: str) -> set[str]:
    """Return the IP addresses of the host that an address names, and its name."""
    host, _ = _parted(address)
    ips: set[str] = set()
    with suppress(OSError):
        ips = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    if any(ipaddress.ip_address(ip).is_loopback for ip in ips):
        ips.add(str(ray.util.get_node_ip_address()))  # the address that Ray uses for this machine
    return ips | {host}


def _parted(address: str) -> tuple[str, str]:
    host, _, port = address.removeprefix("ray://").rstrip("/").rpartition(":")
    return host.strip("[]"), port

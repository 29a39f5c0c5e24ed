"""Ray actors: the same bits whatever the workers, and rows that come back after a kill."""

from __future__ import annotations

import ctypes
import logging
import operator
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
import torch
from tasks import odd_sum, pid

from gmm_dist.config import Cluster, EMConfig, StartConfig
from gmm_dist.errors import UserError
from gmm_dist.selection.starts import SearchProgress
from gmm_dist.selection.sweep import Candidate, Searching, SweepResult, sweep
from gmm_dist.shards import connection
from gmm_dist.shards.connection import connected, most_memory
from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import Block, ShardRows
from gmm_dist.shards.ray_shards import RayShards, session

N_SHARDS, D = 7, 3


def load(shard: int) -> ShardRows:
    """Make a shard of two clusters, of a length of its own."""
    generator = torch.Generator().manual_seed(shard)
    X = torch.randn(D, 300 + 50 * shard, generator=generator)
    X[:, ::2] += 6
    return ShardRows(shard=shard, blocks=[Block(X)])


def fail_to_load(shard: int) -> ShardRows:
    if shard == 5:
        raise UserError("row 17 is NaN")
    return load(shard)


@contextmanager
def on_ray(address: str, n_workers: int | None, loader: object = load) -> Iterator[RayShards]:
    cluster = Cluster(address, num_workers=n_workers)
    with session(loader, N_SHARDS, cluster) as shards:  # type: ignore[arg-type]
        yield shards


def fitted(shards: LocalShards | RayShards, searching: Searching = lambda at: None) -> SweepResult:
    candidates = [Candidate(k, "full") for k in (1, 2, 3)]
    start = StartConfig(n_init=2)
    return sweep(shards, candidates, EMConfig(), start, n_features=D, searching=searching)


def bits(result: SweepResult) -> list[bytes]:
    return [
        part.numpy().tobytes()
        for scored in result.scored
        for part in (scored.fit.parameters.means, scored.fit.parameters.covariances)
    ]


def test_one_two_and_four_workers_give_the_same_bits_as_this_process(ray_address: str) -> None:
    torch.set_num_threads(1)
    here = LocalShards([load(shard) for shard in range(N_SHARDS)])
    expected, expected_sum = bits(fitted(here)), here.run(odd_sum)
    for n_workers in (1, 2, 4):
        with on_ray(ray_address, n_workers) as shards:
            assert shards.n_workers == n_workers
            assert shards.load() == sum(300 + 50 * shard for shard in range(N_SHARDS))
            assert shards.run(odd_sum) == expected_sum
            assert bits(fitted(shards)) == expected


def test_shards_are_dealt_as_contiguous_ranges_to_as_many_workers_as_there_are_cpus(
    ray_address: str,
) -> None:
    with on_ray(ray_address, None) as shards:
        n_cpus = int(ray.cluster_resources()["CPU"])
        pids = shards.run(pid).pids
        assert shards.n_workers == n_cpus == len(set(pids))
        changes = sum(map(operator.ne, pids, pids[1:]))
        assert changes == n_cpus - 1


def test_more_workers_than_shards_are_not_started(ray_address: str) -> None:
    with on_ray(ray_address, 64) as shards:
        assert shards.n_workers == N_SHARDS


def test_actors_have_names_in_the_dashboard(ray_address: str) -> None:
    cluster = Cluster(ray_address, num_workers=2)
    with session(load, 4, cluster):
        names = [str(name) for name in ray.util.list_named_actors()]
        assert sorted(name.split()[-2:] for name in names) == [["worker", "0"], ["worker", "1"]]
        assert all(name.startswith("gmm_dist ") for name in names)


def test_a_killed_actor_comes_back_with_its_rows(ray_address: str) -> None:
    with on_ray(ray_address, 2) as shards:
        shards.load()
        before, pids = shards.run(odd_sum), set(shards.run(pid).pids)
        os.kill(min(pids), signal.SIGKILL)
        assert shards.run(odd_sum) == before
        assert min(pids) not in shards.run(pid).pids


def test_replaced_rows_are_the_ones_that_tasks_see(ray_address: str) -> None:
    with on_ray(ray_address, 2) as shards:
        shards.load()
        first = shards.run(odd_sum)
        shards.replace(load_shifted)
        shards.load()
        assert shards.run(odd_sum) != first


def load_shifted(shard: int) -> ShardRows:
    return ShardRows(shard=shard, blocks=[Block(load(shard).blocks[0].X + 1)])


def test_a_users_error_in_a_worker_arrives_as_it_was_raised(ray_address: str) -> None:
    with (
        on_ray(ray_address, 2, fail_to_load) as shards,
        pytest.raises(UserError, match=r"^row 17 is NaN$"),
    ):
        shards.load()


class Mute:
    """Something at a port that takes connections, and answers as `reply` says."""

    def __init__(self, reply: bytes) -> None:
        self._socket, self._reply = socket.create_server(("127.0.0.1", 0)), reply
        self._kept: list[socket.socket] = []
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                self._kept.append(self._socket.accept()[0])
                self._kept[-1].sendall(self._reply)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()
        for each in (self._socket, *self._kept):
            each.close()


@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize("reply", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
def test_what_is_no_ray_is_told_in_time(
    monkeypatch: pytest.MonkeyPatch, scheme: str, reply: bytes
) -> None:
    monkeypatch.setattr(connection, "_ANSWER_SECONDS", 1.0)
    with closing(Mute(reply)) as other:
        began = time.monotonic()
        with (
            pytest.raises(UserError, match=f"no Ray cluster answers at {scheme}{other.address} "),
            connected(Cluster(scheme + other.address)),
        ):
            pass
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:8265",
        "127.0.0.1",
        "https://x",
        "host:port",
        "/tmp/ray",
        "a b:1",
        "127.0.0.1:65536",  # gRPC would ask at port 0
    ],
)
def test_an_address_that_is_none_is_told_what_one_is(address: str) -> None:
    with (
        pytest.raises(UserError, match=r"address or RAY_ADDRESS is .*: give HOST:PORT of a Ray"),
        connected(Cluster(address)),
    ):
        pass


def test_auto_without_a_cluster_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(address: str) -> str:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray._private.services, "canonicalize_bootstrap_address_or_die", none)
    with (
        pytest.raises(UserError, match=r"address is auto, and no Ray cluster was found"),
        connected(Cluster("auto")),
    ):
        pass


def test_gpus_that_nobody_has_are_refused_in_seconds(ray_address: str) -> None:
    began = time.monotonic()
    with (
        pytest.raises(UserError, match=r"use_gpu.* 0 GPUs .*: leave out use_gpu"),
        connected(Cluster(ray_address, use_gpu=True)),
    ):
        pass
    assert time.monotonic() - began < 60
    assert not ray.is_initialized()


def test_a_cluster_without_cpus_says_so_and_ends_in_time(
    ray_address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection, "_PLACES_SECONDS", 0.3)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"memory": 1.0})
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(UserError, match=r"^after \d+ s the cluster has 0 CPUs .* need one CPU"),
        connected(Cluster(ray_address)),
    ):
        pass
    assert "waiting for machines: the cluster has 0 CPUs" in caplog.text


def test_a_cluster_that_may_grow_is_asked_for_machines(
    ray_address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    node = {"Alive": True, "Labels": {"ray.io/node-group": "head"}, "Resources": {}}
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    with caplog.at_level(logging.INFO), connected(Cluster(ray_address, use_gpu=True)):
        assert "asking for machines, which may take minutes" in caplog.text


def test_sockets_get_names_that_are_short_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = "/session_2026-11-27_00-50-41_360612_4194304/sockets/plasma_store"
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    for base in ("/t", "/" + 38 * "t", "/" + 39 * "t", "/" + 90 * "t", "/" + 30 * "ü"):
        monkeypatch.setenv("TMPDIR", base)
        folder = connection._temp_dir() or f"{base}/ray"
        assert len(os.fsencode(folder + longest)) <= 107
        assert (connection._temp_dir() is None) is (len(os.fsencode(base)) <= 39)


def test_the_process_keeps_its_handlers_of_signals(ray_address: str) -> None:
    def ours(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, ours)
    try:
        with connected(Cluster(ray_address)):
            assert signal.getsignal(signal.SIGTERM) is ours
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        # Nor has Ray, at its end, left the system's default behind Python's back.
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("at", ["init", "shutdown"])
def test_a_signal_while_ray_starts_or_ends_reaches_the_process_own_handler(
    monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Neither what Ray sets in Python is in its way, nor what it sets and takes back below."""

    def ours(number: int, frame: object) -> None:
        seen.append(number)

    def meddle(*asked: object, **options: object) -> None:
        ray._private.utils.set_sigterm_handler(lambda number, frame: sys.exit(number))
        default = ctypes.create_string_buffer(512)  # SIG_DFL is 0
        ctypes.CDLL(None).sigaction(signal.SIGTERM, default, None)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)

    seen: list[int] = []
    for name in ("init", "shutdown"):
        monkeypatch.setattr(ray, name, meddle if name == at else lambda *asked, **options: None)
    monkeypatch.setattr(connection, "_require_places", lambda cluster: None)
    before = signal.signal(signal.SIGTERM, ours)
    try:
        with connected(Cluster("local")):
            pass
        assert seen == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


def test_no_cluster_at_the_address_is_one_line() -> None:
    with (
        pytest.raises(UserError, match=r"no Ray cluster answers at 127\.0\.0\.1:1 .*check address"),
        connected(Cluster("127.0.0.1:1")),
    ):
        pass


def test_a_process_that_is_connected_stays_so(ray_address: str) -> None:
    ray.init(ray_address, log_to_driver=False)
    try:
        with on_ray(ray_address, 1) as shards:
            assert shards.load() == sum(300 + 50 * shard for shard in range(N_SHARDS))
        assert ray.is_initialized()
        host, _, port = ray_address.rpartition(":")
        other = f"{host}:1"
        for address in (other, "ray://192.0.2.77:10001", "local"):
            with (
                pytest.raises(
                    UserError, match=f"^address is {address}, but .* cluster at .*{port}: leave"
                ),
                connected(Cluster(address)),
            ):
                pass
        for address in (None, "auto", f"localhost:{port}", "ray://127.0.0.1:10001"):
            with connected(Cluster(address)):
                assert ray.is_initialized()
    finally:
        ray.shutdown()


def test_who_is_done_first_leaves_ray_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process has one connection, whatever its threads: two that fit at once share it."""
    told: list[str] = []
    is_up = threading.Event()

    def start(cluster: Cluster) -> None:
        told.append("start")
        time.sleep(0.05)  # in which the other thread comes
        is_up.set()

    def shutdown() -> None:
        told.append("shutdown")
        is_up.clear()

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(connection, "_start", start)
    monkeypatch.setattr(connection, "_require_places", lambda cluster: None)
    monkeypatch.setattr(ray, "is_initialized", is_up.is_set)
    monkeypatch.setattr(ray, "shutdown", shutdown)
    both, first_is_done, was_up = threading.Barrier(2), threading.Event(), []

    def fit(is_first: bool) -> None:
        with connected(Cluster()):
            both.wait(10)
            if not is_first:
                assert first_is_done.wait(10)
                was_up.append(is_up.is_set())
        if is_first:
            first_is_done.set()

    threads = [threading.Thread(target=fit, args=(is_first,)) for is_first in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert was_up == [True]
    assert told == ["start", "shutdown"]


def test_a_start_that_fails_leaves_nothing_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes next starts anew, and a process that was connected before stays so."""
    told: list[str] = []

    def start(cluster: Cluster) -> None:
        raise UserError("no room")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(connection, "_start", start)
    monkeypatch.setattr(connection, "_require_places", lambda cluster: None)
    monkeypatch.setattr(ray, "shutdown", lambda: told.append("shutdown"))
    for _ in range(2):
        with pytest.raises(UserError, match="no room"), connected(Cluster()):
            pass
    assert told == ["shutdown", "shutdown"]
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with connected(Cluster()):
        pass
    assert told == ["shutdown", "shutdown"]


def test_memory_is_known_without_ray_only_where_ray_would_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    one, two = (most_memory(Cluster(None, n, False), 8) for n in (1, 2))
    assert 2 * two <= one <= total
    assert most_memory(Cluster(None, 2, False), 1) == one  # one shard, one worker
    assert most_memory(Cluster("head:6379"), 8) == sys.maxsize
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert most_memory(Cluster(), 8) == sys.maxsize


def test_ray_prints_nothing_of_workers_that_die(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it starts a thread for would ask a cluster, and print what that says."""
    said: list[object] = []

    def init(address: str, **options: object) -> None:
        said.append(ray._private.worker.listen_error_messages(None, threading.Event()))

    theirs = ray._private.worker.listen_error_messages
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(connection, "_require_places", lambda cluster: None)
    with connected(Cluster("local")):
        pass
    assert said == [None]
    assert ray._private.worker.listen_error_messages is theirs


def test_ray_is_started_for_no_more_workers_than_have_shards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It starts a process for each CPU that it is told of, before any is asked for."""
    asked: list[object] = []
    monkeypatch.setattr(ray, "init", lambda *_, **options: asked.append(options["num_cpus"]))
    monkeypatch.setattr(connection, "_require_places", lambda cluster: None)
    n_cpus = os.cpu_count() or 1
    for n_workers in (None, 10**23, 1):
        with connected(Cluster("local", n_workers).at_most(n_cpus + 3)):
            pass
    assert asked == [n_cpus, n_cpus + 3, n_cpus]


def test_no_workers_are_refused() -> None:
    with pytest.raises(UserError, match="num_workers is 0"):
        Cluster(num_workers=0)


@dataclass(frozen=True)
class Number:
    """What jobs share."""

    value: float

    def to(self, device: torch.device) -> Number:
        return self


@dataclass(frozen=True)
class Add:
    """A job that adds to the shared number; it kills its worker the first time, if it has to."""

    more: int
    fuse: Path | None = None

    def __call__(self, shared: Number) -> tuple[float, int]:
        if self.fuse is not None and not self.fuse.exists():
            self.fuse.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return shared.value + self.more, os.getpid()


def all_sums(shards: RayShards, jobs: Sequence[Add]) -> dict[int, tuple[float, int]]:
    with shards.jobs() as queue:
        shared = queue.share(Number(0.5))
        for job in jobs:
            queue.submit(job, shared, order=(job.more,))
        return dict(queue.next() for _ in jobs)


def test_jobs_are_done_once_each_by_all_workers_between_passes(ray_address: str) -> None:
    with on_ray(ray_address, 2) as shards:
        shards.load()
        before = shards.run(odd_sum)
        done = all_sums(shards, [Add(more) for more in range(40)])
        assert {number: value for number, (value, _) in done.items()} == {
            number: number + 0.5 for number in range(40)
        }
        assert {pid for _, pid in done.values()} == set(shards.run(pid).pids)
        assert shards.run(odd_sum) == before


def test_a_job_whose_worker_is_killed_is_done_by_another(ray_address: str, tmp_path: Path) -> None:
    with on_ray(ray_address, 2) as shards:
        shards.load()
        before = shards.run(odd_sum)
        done = all_sums(shards, [Add(0, tmp_path / "fuse"), *(Add(more) for more in range(1, 6))])
        assert (tmp_path / "fuse").exists()
        assert sorted(value for value, _ in done.values()) == [0.5 + more for more in range(6)]
        assert shards.run(odd_sum) == before


def test_a_worker_lost_in_the_search_changes_no_bit(ray_address: str) -> None:
    torch.set_num_threads(1)
    expected = bits(fitted(LocalShards([load(shard) for shard in range(N_SHARDS)])))
    with on_ray(ray_address, 2) as shards:
        shards.load()
        pids = sorted(set(shards.run(pid).pids))

        def kill_one(progress: SearchProgress) -> None:
            if len(pids) == 2 and progress.n_passes > 20:
                os.kill(pids.pop(), signal.SIGKILL)

        assert bits(fitted(shards, kill_one)) == expected
        assert len(pids) == 1


class Wrong:
    """A job that fails for a reason that no repetition helps."""

    def __call__(self, shared: Number) -> None:
        raise UserError("row 17 is NaN")


def test_what_a_job_raises_ends_the_queue(ray_address: str) -> None:
    with on_ray(ray_address, 2) as shards, shards.jobs() as queue:
        queue.submit(Wrong(), queue.share(Number(0.0)), order=())
        with pytest.raises(UserError, match="row 17 is NaN"):
            queue.next()

"""A soak: small sweeps over and over, random faults, the right bits, and nothing left behind.

    python -m tools.soak [--minutes 30] [--seed 0] [--worlds laptop cluster hosts] [--logs DIR]

Each round runs jobs/sweep.py on a small lake, in one of three worlds: `laptop`, local disk and
the job's own Ray; `cluster`, Ray and an S3 server on loopback behind a proxy that fails;
`hosts`, several hosts in network namespaces (root only). What is done to it, when and to whom
follows from the seed, the round's number and the choice of worlds. A round ends well when a
driver has committed the undisturbed run's model, if need be after the resume command that a
driver printed; drivers beside it may yield, in words that say to whom. Afterwards no process of
the run, no actor, no lease, no temporary file and no object is there that a commit does not keep.
Status 1 unless every round ends so.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import heapq
import itertools
import json
import os
import random
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from gmm_dist.runs.commit import ATTEMPTS, MANIFEST, MODEL, WHO
from tests.conftest import (
    S3Server,
    forget_connections,
    free_ports,
    running,
    wait_for_port,
    wait_until_ready,
    weed_command,
)
from tests.support import hosts
from tests.support.faulty import proxy
from tests.support.hosts import ROOT, Host

MODEL_FILE = f"{MODEL}/model.safetensors"
_WORLD, _ROUND = "GMM_SOAK_WORLD", "GMM_SOAK_ROUND"  # in the environment of what belongs to them
_TIMEOUT = 600.0  # seconds for one round
_ACTORS_GO, _PROCESSES_GO = 60.0, 180.0  # seconds after a round's end
_VICTIM_COMES = 60.0  # seconds for which a fault waits for somebody to strike
_BACK, _LEASE_OVER = 8.0, 28.0  # seconds until a host is back; in which a rival takes a run over

ANYWHERE = ("actor killed", "actor stopped", "driver killed", "driver stopped", "two drivers")
KINDS = {
    "laptop": ANYWHERE,
    "cluster": (*ANYWHERE, "S3 down", "S3 busy", "torn reads", "slow reads", "lost RPCs"),
    "hosts": (*ANYWHERE, "S3 down", "lost RPCs", "host killed", "host cut off", "spot drain"),
}
_WEIGHTS = {"laptop": 3, "cluster": 5, "hosts": 3}

# The job's own options: a tolerance out of reach, so that lanes go on in float32, then in float64.
_OPTIONS = ("--k", "2..5", "--n-init", "2", "--max-iter", "60", "--tol", "1e-12")


# --- the plan


@dataclass(frozen=True)
class Fault:
    """What breaks: `at` in undisturbed runs' lengths after the round's begin, for `seconds`.

    `pick`, from 0 to 1, chooses the victim or how much.
    """

    kind: str
    at: float
    seconds: float
    pick: float


@dataclass(frozen=True)
class Round:
    """One run, and what is done to it; `max_failures` None: the job's default."""

    number: int
    world: str
    faults: tuple[Fault, ...]
    max_failures: int | None

    def __str__(self) -> str:
        faults = [
            f"{f.kind} at {f.at:.2f} for {f.seconds:.0f} s ({f.pick:.2f})" for f in self.faults
        ]
        few = "" if self.max_failures is None else f"; --max-failures {self.max_failures}"
        return f"{self.world}: {', '.join(faults)}{few}"


def plan(seed: int, number: int, worlds: Sequence[str]) -> Round:
    """Return a round's faults: the same for the same seed, number and worlds."""
    rng = random.Random(f"{seed} {number}")
    names = sorted(worlds)
    (world,) = rng.choices(names, [_WEIGHTS[name] for name in names])
    kinds = rng.sample(KINDS[world], rng.choice((1, 2, 2, 3)))
    faults = [
        Fault(kind, rng.uniform(0.1, 1.0), rng.uniform(3, 20), rng.random()) for kind in kinds
    ]
    return Round(
        number,
        world,
        tuple(sorted(faults, key=lambda fault: fault.at)),
        rng.choice((None, None, None, 0, 2)),  # so few that a driver may give up, and be resumed
    )


# --- what is looked for afterwards


def marked(name: str, value: str) -> dict[int, str]:
    """Return the processes that were started with a variable: pid and command line."""
    wanted, found = f"{name}={value}".encode(), {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    words = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    if words.strip():  # else it has ended, and waits to be collected
                        found[int(entry.name)] = words.decode(errors="replace").strip()
    return found


def listing(url: str) -> dict[str, str]:
    """Return the files below a URL with their sha256, and its empty folders, as `name/`."""
    fs, path = fsspec.core.url_to_fs(url)
    local = isinstance(fs, LocalFileSystem)
    found = fs.find(path, withdirs=local, detail=True)
    result = {}
    for name, entry in found.items():
        short = name[len(path) :].strip("/")
        if entry["type"] == "file" and not name.endswith("/"):
            result[short] = hashlib.sha256(fs.cat_file(name)).hexdigest()
        elif local and short and not os.listdir(name):  # noqa: PTH208 - names, not paths
            result[f"{short}/"] = ""
    return result


def faults_of(files: Mapping[str, str], manifest: bytes) -> list[str]:
    """Say in what an output differs from what a commit leaves: the attempt's files, and copies."""
    content = json.loads(manifest)
    attempt = f"{ATTEMPTS}/{content['attempt']}"
    wanted = {
        path: entry["sha256"]
        for name, entry in content["files"].items()
        for path in (name, f"{attempt}/{name}")
    }
    damaged = [f"damaged: {name}" for name in sorted(wanted) if files.get(name) != wanted[name]]
    expected = {*wanted, MANIFEST, f"{attempt}/{MANIFEST}", f"{attempt}/{WHO}"}
    return [*damaged, *(f"left behind: {name}" for name in sorted(set(files) - expected))]


_LISTING = """
import fsspec, json, sys
from tools import soak
files, url = soak.listing(sys.argv[1]), sys.argv[1] + "/" + soak.MANIFEST
manifest = None
if soak.MANIFEST in files:
    with fsspec.open(url) as file:
        manifest = file.read().decode()
print(json.dumps([files, manifest]))
"""

_ACTORS = """
import sys
from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions
state = GlobalState()
state._initialize_global_state(GcsClientOptions.create(sys.argv[1], None, True, False))
for actor in state.actor_table(None, None, None).values():
    if actor["State"] != "DEAD":
        print(actor["ActorClassName"], actor["State"], "job", actor["JobID"], "pid", actor["Pid"])
"""

_PUT = """
import fsspec, sys
fs, path = fsspec.core.url_to_fs(sys.argv[2])
fs.put_file(sys.argv[1], path)
"""


def put_lake(folder: Path) -> list[Path]:
    """Write a lake of five overlapping clusters, the same each time."""
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(5, 6)) * 0.7
    folder.mkdir()
    paths = []
    for i in range(2):
        X = centres[rng.integers(0, 5, 60_000)] + rng.normal(size=(60_000, 6))
        paths.append(folder / f"part-{i}.parquet")
        table = pa.table({f"x{j}": X[:, j] for j in range(6)})
        pq.write_table(table, paths[-1], row_group_size=15_000)
    return paths


# --- worlds


class World(Protocol):
    """Where runs take place. `kinds` are the faults that there are; `options` the job's here."""

    name: str
    lake: str
    outputs: str
    options: tuple[str, ...]
    address: str | None
    folder: Path

    def start(
        self, command: Sequence[str], log: Path, extra: Mapping[str, str]
    ) -> subprocess.Popen[bytes]: ...
    def python(self, code: str, *arguments: str) -> str: ...
    def mend(self) -> None: ...


def _environment(name: str, folder: Path) -> dict[str, str]:
    """Return the environment of a world's processes: their mark, and folders of their own."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
    own = {_WORLD: mark(name), "TMPDIR": str(folder / "tmp"), "RAY_TMPDIR": str(folder)}
    (folder / "tmp").mkdir()
    ray = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    return kept | own | ray | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def mark(name: str) -> str:
    return f"{os.getpid()}-{name}"


class Laptop:
    """Local disk, and a Ray that each job starts for itself."""

    def __init__(self, folder: Path, name: str = "laptop") -> None:
        self.name, self.folder, self.address = name, folder, None
        self.environment = _environment(name, folder)
        put_lake(folder / "lake")
        self.lake, self.outputs = str(folder / "lake"), str(folder / "out")
        self.options: tuple[str, ...] = ("--num-workers", "2")

    def start(
        self, command: Sequence[str], log: Path, extra: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            return subprocess.Popen(
                command,
                env=self.environment | dict(extra),
                cwd=ROOT,
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def python(self, code: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{code.strip().splitlines()[-1]}: {done.stderr[-2000:]}")
        return done.stdout.strip()

    def mend(self) -> None:
        pass


class Cluster(Laptop):
    """A Ray cluster of four CPUs and an S3 server on loopback, asked by way of a proxy."""

    address: str

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        super().__init__(folder, "cluster")
        (folder / "s3").mkdir()
        self._command, endpoint = weed_command(folder / "s3")
        self._server = S3Server(endpoint, "tester", secrets.token_hex(8), "s3://lake")
        self._process: subprocess.Popen[bytes] | None = None
        stack.callback(forget_connections)
        stack.callback(self.stop_s3)
        self.start_s3()
        self.proxy = stack.enter_context(proxy(endpoint))
        self.environment |= self._server.environment | {"AWS_ENDPOINT_URL": self.proxy.endpoint}
        (port,) = free_ports(1)
        ray = str(Path(sys.executable).with_name("ray"))
        start = [ray, "start", "--head", "--block", "--num-cpus=4", "--include-dashboard=false"]
        start += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={folder / 'ray'}"]
        (folder / "head").mkdir()
        stack.enter_context(running(start, folder / "head", self.environment))
        wait_for_port(port, folder / "head" / "log")
        self.address = f"127.0.0.1:{port}"
        for path in sorted((folder / "lake").iterdir()):
            self.python(_PUT, str(path), f"s3://lake/points/{path.name}")
        self.lake, self.outputs = "s3://lake/points", "s3://lake/out"
        self.options = (*self.options, "--address", self.address)

    @property
    def s3_is_up(self) -> bool:
        return self._process is not None

    def start_s3(self) -> None:
        for socket in (self.folder / "s3").glob("*.sock"):
            socket.unlink()
        log = self.folder / "s3.log"
        self._process = self.start(self._command, log, self._server.environment)
        forget_connections()
        wait_until_ready(self._server, log)

    def stop_s3(self) -> None:
        """Kill the server (SIGKILL); its data stay."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def mend(self) -> None:
        if not self.s3_is_up:
            self.start_s3()
        self.proxy.busy = self.proxy.torn = 0
        self.proxy.bytes_per_second = None


class Apart:
    """Hosts of their own for the head, the S3 server and two pairs of workers."""

    name = "hosts"
    lake, outputs = "s3://lake/points", "s3://lake/out"

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        extra = _environment(self.name, folder)
        del extra["RAY_TMPDIR"]
        self.hosts = stack.enter_context(hosts.hosts(2, extra=extra))
        for path in put_lake(folder / "lake"):
            self.hosts.python(_PUT, str(path), f"{self.lake}/{path.name}")
        self.address = self.hosts.address
        self.options = ("--address", self.address)

    def start(
        self, command: Sequence[str], log: Path, extra: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        return self.hosts.start(self.hosts.head, command, str(log), extra)  # absolute: as it is

    def python(self, code: str, *arguments: str) -> str:
        return self.hosts.python(code, *arguments)

    def mend(self) -> None:
        self.hosts.make_whole()


# --- one round


@dataclass
class Driver:
    """A driver, and what its end was taken for: None while it runs or once it was killed."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    said: bool = False
    killed: bool = False

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None


_YIELDS = (
    (1, "has passed to another driver"),
    (2, "another driver is at work on this run"),
    (2, "already holds a committed result"),
    (2, "holds the checkpoints of an unfinished run"),
)
_RESUME = re.compile(r"; go on with: ((?:python|gmm-dist) .* --resume)$", re.MULTILINE)


def end_of(status: int, text: str) -> str:
    """Say what a driver's end amounts to: done, resumable, yields, or what is wrong with it."""
    if "Traceback" in text:
        return f"WRONG: a traceback, status {status}"
    if status == 0:
        return "done"
    if status == 1 and _RESUME.search(text):
        return "resumable"
    if any(status == own and words in text for own, words in _YIELDS):
        return "yields"
    return f"WRONG: status {status}: {(text.strip().splitlines() or ['(silent)'])[-1][-300:]}"


class Trial:
    """One round in its world: drivers, the faults that strike them, and what is mended later."""

    def __init__(
        self, world: World, round_: Round, logs: Path, length: float, log: Callable[[str], None]
    ) -> None:
        self.world, self.round, self.log = world, round_, log
        self.mark = f"{os.getpid()}-{round_.number}"
        self.output = f"{world.outputs}/{round_.number}"
        self.drivers: list[Driver] = []
        self.struck: collections.Counter[str] = collections.Counter()
        self.hit_hosts: set[str] = set()
        self._logs, self._length = logs, length
        self._loses_rpcs = any(fault.kind == "lost RPCs" for fault in round_.faults)
        self._began = time.monotonic()
        self._order = itertools.count()
        self._due: list[tuple[float, int, bool, Callable[[], None]]] = []

    def run(self) -> None:
        """Run to the end of all drivers; raise TimeoutError where there is none."""
        for fault in self.round.faults:
            self._at(fault.at * self._length, lambda fault=fault: self._strike(fault))
        self.start("driver")
        while any(driver.is_alive for driver in self.drivers):
            self._do_what_is_due()
            if time.monotonic() - self._began > _TIMEOUT:
                raise TimeoutError(f"no end after {_TIMEOUT:.0f} s")
            time.sleep(0.05)
        self._note_ends()
        for _, _, is_mend, action in sorted(self._due):
            if is_mend:
                action()

    def heal(self) -> None:
        """Let no fault go on, nor befall drivers to come."""
        self._loses_rpcs = False
        self.world.mend()

    def end(self) -> None:
        """End what still runs of the round."""
        for driver in self.drivers:
            if driver.is_alive:
                driver.process.send_signal(signal.SIGCONT)
                driver.process.kill()
                driver.process.wait()

    def start(self, name: str, *more: str, command: Sequence[str] | None = None) -> Driver:
        """Start a driver of the run, or the command line that one has printed."""
        few = self.round.max_failures
        if command is None:
            job = [sys.executable, str(ROOT / "jobs" / "sweep.py"), self.world.lake]
            job += ["--output", self.output, *_OPTIONS, *self.world.options]
            command = [*job, *(() if few is None else ("--max-failures", str(few))), *more]
        log = self._logs / f"round-{self.round.number:03d}-{len(self.drivers)}-{name}.log"
        log.unlink(missing_ok=True)
        extra = {_ROUND: self.mark} | (hosts.LOST_RPCS if self._loses_rpcs else {})
        driver = Driver(name, self.world.start(command, log, extra), log)
        self.drivers.append(driver)
        self.log(f"{name} starts {' '.join(more)}: pid {driver.process.pid}")
        return driver

    def later(self, seconds: float, text: str, action: Callable[[], None]) -> None:
        """Mend something in so many seconds, or when all drivers have ended."""

        def mend() -> None:
            self.log(text)
            action()

        self._at(time.monotonic() - self._began + seconds, mend, is_mend=True)

    def _at(self, when: float, action: Callable[[], None], *, is_mend: bool = False) -> None:
        heapq.heappush(self._due, (when, next(self._order), is_mend, action))

    def _do_what_is_due(self) -> None:
        self._note_ends()
        while self._due and self._due[0][0] <= time.monotonic() - self._began:
            heapq.heappop(self._due)[-1]()

    def _note_ends(self) -> None:
        for driver in self.drivers:
            if not (driver.is_alive or driver.said or driver.killed):
                driver.said = True
                status = driver.process.returncode
                self.log(f"{driver.name} ends: {end_of(status, driver.text)}")

    def _strike(self, fault: Fault) -> None:
        what = FAULTS[fault.kind](self, fault)
        waited = time.monotonic() - self._began - fault.at * self._length
        if what is None and waited < _VICTIM_COMES:
            self._at(fault.at * self._length + waited + 0.2, lambda: self._strike(fault))
            return
        self.struck[fault.kind if what else f"{fault.kind}, found nothing"] += 1
        self.log(f"{fault.kind}: {what or 'found nothing'}")

    # Victims.

    def actor(self, fault: Fault) -> int | None:
        found = actors(self.world.name)
        return sorted(found)[int(fault.pick * len(found))] if found else None

    def driver(self) -> Driver | None:
        """Return the newest driver that runs."""
        return next((d for d in reversed(self.drivers) if d.is_alive and not d.killed), None)

    def host(self, fault: Fault) -> Host | None:
        """Return a host that nothing has been done to yet."""
        assert isinstance(self.world, Apart)
        left = [h for h in self.world.hosts.workers if h.name not in self.hit_hosts]
        if not left:
            return None
        host = left[int(fault.pick * len(left))]
        self.hit_hosts.add(host.name)
        return host


def actors(world: str) -> dict[int, str]:
    """Return the processes of a world's actors."""
    found = marked(_WORLD, mark(world))
    return {pid: words for pid, words in found.items() if words.startswith("ray::ShardActor")}


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


# --- faults: each says what it did, None if it found nothing to do it to


def _actor_killed(trial: Trial, fault: Fault) -> str | None:
    pid = trial.actor(fault)
    if pid is None:
        return None
    _signal(pid, signal.SIGKILL)
    return f"pid {pid}"


def _actor_stopped(trial: Trial, fault: Fault) -> str | None:
    pid = trial.actor(fault)
    if pid is None:
        return None
    _signal(pid, signal.SIGSTOP)
    trial.later(fault.seconds, f"pid {pid} goes on", lambda: _signal(pid, signal.SIGCONT))
    return f"pid {pid} for {fault.seconds:.0f} s"


def _driver_killed(trial: Trial, fault: Fault) -> str | None:
    driver = trial.driver()
    if driver is None:
        return None
    driver.killed = True
    driver.process.kill()
    driver.process.wait()
    trial.start("resumed", "--resume")
    return f"pid {driver.process.pid}, resumed at once"


def _driver_stopped(trial: Trial, fault: Fault) -> str | None:
    """Stop a driver for longer than its lease lasts, while another one resumes its run."""
    driver = trial.driver()
    if driver is None:
        return None
    pid = driver.process.pid
    _signal(pid, signal.SIGSTOP)
    trial.later(_LEASE_OVER, f"driver {pid} goes on", lambda: _signal(pid, signal.SIGCONT))
    trial.start("successor", "--resume")
    return f"pid {pid} for {_LEASE_OVER:.0f} s, and another resumes"


def _two_drivers(trial: Trial, fault: Fault) -> str | None:
    rival = trial.start("rival", *(["--resume"] if fault.pick < 0.7 else []))
    return f"pid {rival.process.pid}"


def _s3_down(trial: Trial, fault: Fault) -> str | None:
    world = trial.world
    store = world.hosts if isinstance(world, Apart) else world
    assert isinstance(store, Cluster | hosts.Hosts)
    store.stop_s3()
    trial.later(fault.seconds, "S3 is started", store.start_s3)
    return f"for {fault.seconds:.0f} s"


def _s3_busy(trial: Trial, fault: Fault) -> str | None:
    assert isinstance(trial.world, Cluster)
    failing = trial.world.proxy
    failing.busy = 10**9
    trial.later(fault.seconds, "S3 is not busy", lambda: setattr(failing, "busy", 0))
    return f"503 for {fault.seconds:.0f} s"


def _torn_reads(trial: Trial, fault: Fault) -> str | None:
    assert isinstance(trial.world, Cluster)
    failing = trial.world.proxy
    failing.torn_after, failing.torn = int(fault.pick * 20_000), 8
    return f"8 bodies are cut after {failing.torn_after:,} bytes"


def _slow_reads(trial: Trial, fault: Fault) -> str | None:
    assert isinstance(trial.world, Cluster)
    failing = trial.world.proxy
    failing.bytes_per_second = pace = 30_000 + 300_000 * fault.pick
    trial.later(fault.seconds, "S3 is fast", lambda: setattr(failing, "bytes_per_second", None))
    return f"{pace:,.0f} bytes a second for {fault.seconds:.0f} s"


def _lost_rpcs(trial: Trial, fault: Fault) -> str | None:
    return "from the first call to the last"  # see Trial: in the drivers' environment


def _host_killed(trial: Trial, fault: Fault) -> str | None:
    host = trial.host(fault)
    if host is None:
        return None
    host.kill()
    trial.later(_BACK, f"{host.name} joins", lambda: _join(trial, host))
    return host.name


def _host_cut_off(trial: Trial, fault: Fault) -> str | None:
    host = trial.host(fault)
    if host is None:
        return None
    assert isinstance(trial.world, Apart)
    network, seconds = trial.world.hosts.network, 3 * fault.seconds
    network.partition(host)
    trial.later(seconds, f"{host.name} is reached again", lambda: network.heal(host))
    return f"{host.name} for {seconds:.0f} s"


def _spot_drain(trial: Trial, fault: Fault) -> str | None:
    host = trial.host(fault)
    if host is None:
        return None
    assert isinstance(trial.world, Apart)
    killer = trial.world.hosts.spot_drain(host, seconds=2)

    def back() -> None:
        killer.join()
        _join(trial, host)

    trial.later(_BACK, f"{host.name} joins", back)
    return f"{host.name}, killed 2 s later"


def _join(trial: Trial, host: Host) -> None:
    assert isinstance(trial.world, Apart)
    if not host.pids():
        trial.world.hosts.join(host)


FAULTS: dict[str, Callable[[Trial, Fault], str | None]] = {
    "actor killed": _actor_killed,
    "actor stopped": _actor_stopped,
    "driver killed": _driver_killed,
    "driver stopped": _driver_stopped,
    "two drivers": _two_drivers,
    "S3 down": _s3_down,
    "S3 busy": _s3_busy,
    "torn reads": _torn_reads,
    "slow reads": _slow_reads,
    "lost RPCs": _lost_rpcs,
    "host killed": _host_killed,
    "host cut off": _host_cut_off,
    "spot drain": _spot_drain,
}


# --- the soak


@dataclass
class Soak:
    """Round after round, and what is to be told of them at the end."""

    logs: Path
    stack: ExitStack
    began: float = field(default_factory=time.monotonic)
    wanted: str = ""
    outcomes: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    struck: collections.Counter[str] = field(default_factory=collections.Counter)
    violations: list[str] = field(default_factory=list)
    _worlds: dict[str, tuple[World, float]] = field(default_factory=dict)
    # Rounds whose last processes (Ray's own, of drivers that were killed) may take a while to go.
    _leaving: list[tuple[float, int, str]] = field(default_factory=list)

    def log(self, text: str) -> None:
        """Say what happens, with the seconds since the start, and note it."""
        line = f"{time.monotonic() - self.began:8.1f} s  {text}"
        print(line, flush=True)
        with (self.logs / "soak.log").open("a") as file:
            print(line, file=file)

    def round(self, round_: Round) -> None:
        """Run one round; what is wrong becomes a violation."""
        world, length = self._world(round_.world)
        self.log(f"round {round_.number}, {round_}")
        trial = Trial(world, round_, self.logs, length, lambda text: self.log(f"  {text}"))
        wrong: list[str] = []
        outcome = "no end"
        try:
            trial.run()
            outcome = self._ended(trial, wrong)
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")
        finally:
            trial.end()
            self.struck.update(trial.struck)
            self._leaving.append((time.monotonic() + _PROCESSES_GO, round_.number, trial.mark))
            world.mend()
        self._settle(world, wrong)
        self.outcomes[round_.world, "WRONG" if wrong else outcome] += 1
        for text in wrong:
            self._violated(f"round {round_.number}: {text}")
        self.log(f"round {round_.number}: {outcome}")
        self.see_off()

    def undisturbed(self, world: World) -> float:
        """Return the seconds of a run without faults; its model is what all others must equal."""
        number = 900 + len(self._worlds)
        trial = Trial(world, Round(number, world.name, (), None), self.logs, 1.0, self.log)
        began, wrong = time.monotonic(), list[str]()
        try:
            trial.run()
        finally:
            trial.end()
        seconds = time.monotonic() - began
        self._compare(trial, wrong)
        self._settle(world, wrong)
        if wrong:
            raise RuntimeError(f"{world.name}, undisturbed: {'; '.join(wrong)}")
        self.log(f"{world.name}, undisturbed: {seconds:.0f} s, {self.wanted}")
        return seconds

    def see_off(self, *, wait: bool = False) -> None:
        """Look for the processes of rounds that are over; with `wait`, until none has any."""
        while self._leaving:
            now = time.monotonic()
            left = []
            for due, number, own in self._leaving:
                found = marked(_ROUND, own)
                if found and now < due:
                    left.append((due, number, own))
                for pid, words in found.items() if now >= due else ():
                    self._violated(f"round {number}: process left behind: {pid} {words[:100]}")
                    _signal(pid, signal.SIGKILL)
            self._leaving = left
            if not wait:
                return
            time.sleep(1.0 if left else 0.0)

    def table(self) -> str:
        """Return what came of it as two Markdown tables."""
        lines = ["| world | outcome | rounds |", "|---|---|---|"]
        lines += [f"| {w} | {o} | {n} |" for (w, o), n in sorted(self.outcomes.items())]
        lines += ["", "| fault | times |", "|---|---|"]
        lines += [f"| {kind} | {n} |" for kind, n in sorted(self.struck.items())]
        return "\n".join(lines)

    def _world(self, name: str) -> tuple[World, float]:
        if name not in self._worlds:
            self.log(f"{name} is made")
            folder = Path(tempfile.mkdtemp(prefix="gs", dir="/tmp"))  # short: sockets lie there
            self.stack.callback(shutil.rmtree, folder, ignore_errors=True)
            world: World
            if name == "laptop":
                world = Laptop(folder)
            else:
                world = {"cluster": Cluster, "hosts": Apart}[name](folder, self.stack)
            self._worlds[name] = world, self.undisturbed(world)
        return self._worlds[name]

    def _ended(self, trial: Trial, wrong: list[str]) -> str:
        """Judge the drivers' ends, resume where one says so, and compare what is there."""
        ends = [(d, end_of(d.process.returncode, d.text)) for d in trial.drivers if not d.killed]
        wrong += [f"{driver.log.name}: {end}" for driver, end in ends if end.startswith("WRONG")]
        outcome = "the same bits"
        if not any(end == "done" for _, end in ends):
            said = [driver for driver, end in ends if end == "resumable"]
            if not said:
                wrong.append("no driver came to an end, and none says how to go on")
                return "no end"
            trial.heal()
            self._resume(trial, said[-1], wrong)
            outcome = "resumed by hand to the same bits"
        elif len(ends) > 1 or any(driver.killed for driver in trial.drivers):
            outcome += ", of several drivers"
        self._compare(trial, wrong)
        return outcome

    def _resume(self, trial: Trial, said: Driver, wrong: list[str]) -> None:
        """Do what a driver that gave up says, without faults."""
        found = _RESUME.search(said.text)
        assert found is not None
        words = shlex.split(found[1])
        self.log(f"  {found[1]}")
        again = trial.start("again", command=[sys.executable, *words[1:]])
        with suppress(subprocess.TimeoutExpired):
            again.process.wait(_TIMEOUT)
        if again.process.poll() != 0:
            wrong.append(f"{again.log.name}: the resume command ended with {again.process.poll()}")

    def _compare(self, trial: Trial, wrong: list[str]) -> None:
        files, manifest = json.loads(trial.world.python(_LISTING, trial.output))
        if manifest is None:
            wrong.append(f"nothing is committed; there are {sorted(files)}")
            return
        wrong += faults_of(files, manifest.encode())
        self.wanted = self.wanted or files[MODEL_FILE]
        if files.get(MODEL_FILE) != self.wanted:
            wrong.append(f"other bits: {files.get(MODEL_FILE)}, not {self.wanted}")

    def _settle(self, world: World, wrong: list[str]) -> None:
        """See that no actor is left, in processes and in Ray's books, and no temporary file."""
        deadline = time.monotonic() + _ACTORS_GO
        while True:
            left = [f"process {pid} {words}" for pid, words in actors(world.name).items()]
            if not left and world.address is not None:
                left = world.python(_ACTORS, world.address).splitlines()
            if not left or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        wrong += [f"actor left behind: {actor}" for actor in left]
        for path in (world.folder / "tmp").iterdir():
            if path.name.startswith("weed."):  # the test's own server's log
                continue
            wrong.append(f"temporary file left behind: {path.name}")
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _violated(self, text: str) -> None:
        self.violations.append(text)
        self.log(f"VIOLATION: {text}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=30, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (default: 0)")
    parser.add_argument(
        "--worlds", nargs="+", choices=list(KINDS), help="(default: those that can be had here)"
    )
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--rounds", type=int, help="end after so many, if that is sooner")
    parser.add_argument("--logs", type=Path, default=Path("soak-logs"))
    options = parser.parse_args(argv)
    why = hosts.missing()
    worlds = options.worlds or [name for name in KINDS if name != "hosts" or why is None]
    if "hosts" in worlds and why is not None:
        print(f"cannot run: {why}", file=sys.stderr)
        return 2
    logs = options.logs.absolute()
    logs.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    n = 0
    with ExitStack() as stack:
        soak = Soak(logs, stack)
        soak.log(f"seed {options.seed}, {options.minutes:g} minutes, worlds {', '.join(worlds)}")
        while time.monotonic() < deadline and n != options.rounds:
            soak.round(plan(options.seed, options.first + n, worlds))
            n += 1
        soak.see_off(wait=True)
    print(f"\n{soak.table()}\n\n{n} rounds, {len(soak.violations)} violations")
    print(*soak.violations, sep="\n")
    return 1 if soak.violations else 0


if __name__ == "__main__":
    sys.exit(main())

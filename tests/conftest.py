"""Fixtures that are slow to make: a real S3 server, once per session."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import fsspec
import pytest
import torch


@pytest.hookimpl(tryfirst=True)  # xdist's own hook reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests in one process, and all that need the Ray cluster in one.

    These take longest, so they come first: the other processes have the files meanwhile.
    """
    needing: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        needs_ray = "ray_address" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("ray" if needs_ray else item.path.name))
        needing[needs_ray].append(item)
    items[:] = needing[True] + needing[False]


@pytest.fixture(autouse=True)
def _annotations(request: pytest.FixtureRequest) -> Iterator[None]:
    """Execute the annotations of the mathematics, but in tests marked `unchecked`."""
    import typechecker  # where pytest puts the folders of tests on the path

    typechecker.begin_test(request.node.get_closest_marker("unchecked") is None)
    yield
    typechecker.begin_test(True)  # fixtures of many tests are made between them


@pytest.fixture(autouse=True)
def _no_secrets_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no test's messages starred for what another one's URLs held."""
    from gmm_dist import urls  # not before annotations are checked

    monkeypatch.setattr(urls, "_known", type(urls._known)())


# As the jobs do: the same bits on any machine, and no threads that spin beside other tests.
torch.set_num_threads(1)


@dataclass(frozen=True)
class S3Server:
    """Say where a real S3 server listens; `url` is its one bucket, e.g. s3://lake."""

    endpoint: str
    key: str
    secret: str
    url: str

    def file_system(self) -> fsspec.AbstractFileSystem:
        """Return a file system that needs no environment, to put things there."""
        return fsspec.filesystem(
            "s3",
            key=self.key,
            secret=self.secret,
            endpoint_url=self.endpoint,
            client_kwargs={"region_name": "us-east-1"},
            use_listings_cache=False,
        )

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which any process finds the server."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            # A wrong key must not be looked up elsewhere, least of all in the developer's home.
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }


def forget_connections() -> None:
    """Close s3fs's sessions, whose sockets would else be collected open (a warning)."""
    s3fs = sys.modules.get("s3fs")
    if s3fs is None:
        return
    for fs in list(s3fs.S3FileSystem._cache.values()):
        if fs._s3 is not None:
            fs.close_session(fs.loop, fs._s3)
    s3fs.S3FileSystem.clear_instance_cache()


def free_ports(count: int) -> list[int]:
    """Return TCP ports p that are free, and p + 10000 (weed's gRPC) too."""
    ports: list[int] = []
    with ExitStack() as held:
        while len(ports) < count:
            first = held.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            if port <= 55000:
                second = held.enter_context(socket.socket())
                try:
                    second.bind(("127.0.0.1", port + 10000))
                except OSError:
                    continue
                ports.append(port)
    return ports


def weed_command(folder: Path) -> tuple[list[str], str]:
    """Return the command of a server that shares nothing with another one, and its endpoint."""
    s3, master, filer, volume, admin = free_ports(5)
    options = {
        "dir": folder,
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "s3.port": s3,
        "master.port": master,
        "filer.port": filer,
        "volume.port": volume,
        "admin.port": admin,
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        # Else in /tmp, where one of them stays.
        "s3.localSocket": folder / "s3.sock",
        "filer.localSocket": folder / "filer.sock",
        "webdav": "false",
        "admin.ui": "false",
        "master.telemetry": "false",
        "bucket": "lake",
    }
    weed = Path(sys.executable).with_name("weed")
    command = [str(weed), "mini", *(f"-{name}={value}" for name, value in options.items())]
    return command, f"http://127.0.0.1:{s3}"


@contextmanager
def running(
    command: list[str],
    folder: Path,
    environment: dict[str, str],
    *,
    enter: Callable[[], None] | None = None,
) -> Iterator[None]:
    """Run a server until the block ends, then end it by SIGTERM to its own pid.

    Its process does `enter` first.
    """
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            cwd=folder,
            stdout=log,
            stderr=log,
            preexec_fn=enter,
        )
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_ready(server: S3Server, log: Path, seconds: float = 60) -> None:
    """Wait for /healthz and then for the bucket, which is made a moment later."""
    deadline = time.monotonic() + seconds
    healthy = False
    while time.monotonic() < deadline:
        try:
            if not healthy:
                with urllib.request.urlopen(f"{server.endpoint}/healthz", timeout=5):
                    healthy = True
            if "lake" in server.file_system().ls("", refresh=True):
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise TimeoutError(f"no S3 server after {seconds} s:\n{log.read_text()}")


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run a real S3 server (SeaweedFS) on loopback."""
    # Not pytest's own folder: Unix sockets have names of at most 108 bytes.
    folder = Path(tempfile.mkdtemp(prefix="weed-"))
    try:
        command, endpoint = weed_command(folder)
        server = S3Server(endpoint, "tester", secrets.token_hex(8), "s3://lake")
        with running(command, folder, server.environment):
            wait_until_ready(server, folder / "log")
            yield server
    finally:
        forget_connections()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """Run a real S3 server on loopback for the whole session."""
    with s3_server() as server:
        yield server


@pytest.fixture
def s3_lake(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """Point this process's environment at the server; `url` is a prefix of the test's own."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    forget_connections()
    yield replace(s3, url=f"{s3.url}/{uuid.uuid4().hex}")
    forget_connections()


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the jobs that fit hold their rows in this process, and draw no pictures.

    For what does not depend on who holds the rows: a job does the same, to the bit, in half a
    second in place of eight. Some tests of each job do without this.
    """
    import here

    from gmm_dist.fitting import (
        fit,  # only now: annotations of modules that conftest.py imports go unchecked
    )
    from gmm_dist.report import cluster_figures, figures

    monkeypatch.setattr(fit.Job, "resident", here.resident)
    monkeypatch.setattr(figures, "drawn", here.titled)
    monkeypatch.setattr(cluster_figures, "drawn", here.titled)


def path_of_tests() -> str:
    """Return where Ray's workers find the loaders and tasks of tests, and us."""
    folder = Path(__file__).parent
    boxes = [str(path) for path in folder.iterdir() if path.is_dir()]
    return os.pathsep.join([str(folder.parent), str(folder), *boxes])


@contextmanager
def ray_cluster(server: S3Server) -> Iterator[str]:
    """Run a real Ray cluster of four CPUs on loopback, whose workers know the S3 server."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    (port,) = free_ports(1)
    ray = Path(sys.executable).with_name("ray")
    command = [str(ray), "start", "--head", "--block", "--num-cpus=4", "--include-dashboard=false"]
    command += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={folder}"]
    # Drivers in this process and the cluster must agree; a token file would be the developer's.
    os.environ["RAY_AUTH_MODE"] = "disabled"
    environment = server.environment | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": path_of_tests()}
    try:
        with running(command, folder, environment):
            wait_for_port(port, folder / "log")
            yield f"127.0.0.1:{port}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_address(s3: S3Server) -> Iterator[str]:
    """Run a real Ray cluster for the whole session."""
    with ray_cluster(s3) as address:
        yield address


def wait_for_port(port: int, log: Path, seconds: float = 60) -> None:
    """Wait until something listens on the port."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"nothing listens on port {port} after {seconds} s:\n{log.read_text()}")

"""A lake of four times a worker's memory, whose processes a cgroup holds to little more."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import free_ports, running, wait_for_port

pytestmark = [pytest.mark.unchecked, pytest.mark.long]  # whole jobs

ROOT = Path("/sys/fs/cgroup")
MEMORY = 400 << 20  # of the worker
BASE = 1300 << 20  # of Ray's own processes, the driver, and the libraries
D, N_ROWS = 32, 4 * (MEMORY // (4 * 32))


@contextmanager
def cgroup(limit: int) -> Iterator[Callable[[], None]]:
    """Make a cgroup of so many bytes; yield a function by which a child enters it."""
    first = ROOT / "memory" if (ROOT / "memory").is_dir() else ROOT
    group = first / f"gmm-dist-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("no cgroup can be made here")
    try:
        name = "memory.limit_in_bytes" if first != ROOT else "memory.max"
        try:
            (group / name).write_text(str(limit))
        except OSError:
            pytest.skip("the cgroup takes no limit")

        def enter() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

        yield enter
    finally:
        group.rmdir()


@contextmanager
def ray_of(memory: int, enter: Callable[[], None] | None) -> Iterator[str]:
    """Run a Ray of one CPU that has so much memory for its actors."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    (port,) = free_ports(1)
    ray = Path(sys.executable).with_name("ray")
    command = [str(ray), "start", "--head", "--block", "--num-cpus=1", f"--memory={memory}"]
    command += ["--object-store-memory=100000000", "--include-dashboard=false"]
    command += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={folder}"]
    try:
        with running(command, folder, {"RAY_AUTH_MODE": "disabled"}, enter=enter):
            wait_for_port(port, folder / "log")
            yield f"127.0.0.1:{port}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(data: Path, out: Path, address: str, *more: str) -> str:
    command = [sys.executable, "-m", "gmm_dist", "sweep", str(data), "--k", "2,4"]
    command += ["--n-init", "2", "--output", str(out), "--address", address, *more]
    done = subprocess.run(
        command,
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    assert ("lie in files" in done.stderr) == bool(more)
    return hashlib.sha256((out / "model/model.safetensors").read_bytes()).hexdigest()


@pytest.mark.timeout(3600)
def test_a_lake_of_four_times_the_memory_has_the_bits_of_one_in_memory(tmp_path: Path) -> None:
    (tmp_path / "lake").mkdir()
    rng = np.random.default_rng(0)
    for i in range(16):
        X = rng.normal(size=(N_ROWS // 16, D)).astype(np.float32)
        X[::3] += 4
        part = pa.table({f"x{j}": X[:, j] for j in range(D)})
        pq.write_table(part, tmp_path / f"lake/{i}.parquet", row_group_size=1 << 16)
    with ray_of(8 << 30, None) as address:
        expected = sweep(tmp_path / "lake", tmp_path / "memory", address)
    with cgroup(BASE + MEMORY) as enter, ray_of(MEMORY, enter) as address:
        more = ("--spill", str(tmp_path))
        assert sweep(tmp_path / "lake", tmp_path / "disk", address, *more) == expected

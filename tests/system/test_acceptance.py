"""What the README promises, at size: a million rows, from disk and from S3, and as a Ray job."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import datasets
import lakes
import pytest
from conftest import S3Server, free_ports, running

import gmm_dist
from gmm_dist.commands import sweep as sweep_job

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.unchecked, pytest.mark.long]  # whole jobs


@pytest.mark.timeout(1200)  # two sweeps of a million rows, where other work is going on
def test_a_million_rows_have_eight_clusters_from_disk_and_from_s3_to_the_same_bits(
    tmp_path: Path, ray_address: str, s3_lake: S3Server
) -> None:
    table = datasets.blobs(1_000_000, 16, 8, distance=12.0, seed=1)
    datasets.write(table, tmp_path / "lake", n_files=16, row_group_size=1_000_000 // 64)
    remote = lakes.upload(tmp_path / "lake", s3_lake.file_system(), s3_lake.url)
    hashes = []
    for name, data in (("disk", str(tmp_path / "lake")), ("s3", remote)):
        out = tmp_path / name
        argv = [data, "--k", "7..9", "--output", str(out), "--address", ray_address]
        argv += ["--n-init", "4"]  # of the search, whose annotations are executed here
        assert sweep_job.main([*argv, "--num-workers", "2"]) == 0
        report = json.loads((out / "sweep.json").read_text())
        assert report["best"] == {"k": 8, "covariance_type": "full"}
        assert report["n_rows"] == 1_000_000
        hashes.append(hashlib.sha256((out / "model/model.safetensors").read_bytes()).hexdigest())
    assert hashes[0] == hashes[1]


@pytest.fixture
def dashboard() -> Iterator[str]:
    """Run a Ray cluster that takes jobs, as `ray start --head` makes it; yield its address."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    port, web, agent, client = free_ports(4)
    ray = Path(sys.executable).with_name("ray")
    command = [str(ray), "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={folder}"]
    command += ["--node-ip-address=127.0.0.1", f"--port={port}", "--dashboard-host=127.0.0.1"]
    command += [f"--dashboard-port={web}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--ray-client-server-port={client}"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    try:
        with running(command, folder, {"RAY_AUTH_MODE": "disabled", "PATH": path}):
            wait_for_jobs(f"http://127.0.0.1:{web}")
            yield f"http://127.0.0.1:{web}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_jobs(url: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/api/jobs/", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"{url} takes no jobs after {seconds} s")


def test_as_a_ray_job(tmp_path: Path, dashboard: str) -> None:
    table = datasets.blobs(1_000, 3, 3, distance=15.0)
    datasets.write(table, tmp_path / "lake", n_files=2)
    out = tmp_path / "out"
    ray = str(Path(sys.executable).with_name("ray"))
    job = ["python", "jobs/sweep.py", str(tmp_path / "lake"), "--k", "2,3", "--output", str(out)]
    done = subprocess.run(
        [ray, "job", "submit", "--address", dashboard, "--working-dir", ".", "--", *job],
        cwd=ROOT,
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "best by BIC: k=3 full" in done.stdout
    assert gmm_dist.load(str(out)).n_components == 3

"""Through `ray job submit` to a real `ray start --head`: exit codes as they are documented."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nights
import pytest
from conftest import free_ports, running
from ray.job_submission import JobSubmissionClient
from test_nightly import FIRST, night

import gmm_dist

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))

pytestmark = pytest.mark.faults  # a cluster with its dashboard, and five jobs: two minutes


@dataclass(frozen=True)
class Cluster:
    """A cluster that jobs are submitted to; `submit` returns the driver's exit code."""

    dashboard: str
    log: Path

    def submit(self, *command: str) -> int:
        done = subprocess.run(
            [RAY, "job", "submit", f"--address={self.dashboard}", "--", *command],
            env=os.environ | {"RAY_AUTH_MODE": "disabled", "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        submitted = re.search(r"raysubmit_\w+", done.stdout)
        assert submitted is not None, done.stdout + done.stderr
        # The command line makes 1 of every failure; the job's own code is kept here.
        details = JobSubmissionClient(self.dashboard).get_job_info(submitted[0])
        code = details.driver_exit_code
        assert code is not None, done.stdout
        assert done.returncode == (0 if code == 0 else 1), done.stdout
        return code


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Run a head with a dashboard, in folders and on ports of its own."""
    with tempfile.TemporaryDirectory(prefix="ray-") as name:
        folder = Path(name)
        port, dashboard, *more = free_ports(5)
        options = {
            "num-cpus": 3,
            "node-ip-address": "127.0.0.1",
            "port": port,
            "dashboard-host": "127.0.0.1",
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": more[0],
            "dashboard-agent-grpc-port": more[1],
            "ray-client-server-port": more[2],
            "temp-dir": folder,
        }
        command = [RAY, "start", "--head", "--block"]
        command += [f"--{name}={value}" for name, value in options.items()]
        # A job's python is the first one on the path of the cluster.
        environment = {
            "RAY_AUTH_MODE": "disabled",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        os.environ["RAY_AUTH_MODE"] = "disabled"
        with running(command, folder, environment):
            url = f"http://127.0.0.1:{dashboard}"
            _wait_for(f"{url}/api/jobs/", folder / "log")
            _wait_for_agent(url, folder / "log")
            yield Cluster(url, folder / "log")


def _wait_for(url: str, log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"{url} does not answer after {seconds} s:\n{log.read_text()}")


def _wait_for_agent(url: str, log: Path, seconds: float = 120) -> None:
    """Wait until the cluster takes jobs: its dashboard answers long before there is an agent."""
    client, deadline = JobSubmissionClient(url), time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            client.submit_job(entrypoint="true")
            return
        except RuntimeError:
            time.sleep(0.5)
    raise TimeoutError(f"{url} takes no job after {seconds} s:\n{log.read_text()}")


@pytest.mark.timeout(900)
def test_sweep_score_and_nightly_end_with_their_codes(cluster: Cluster, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    for day in (1, 2):
        nights.write_night(lake, night(day), nights.rows(FIRST, 400, seed=day))
    jobs, model, registry = ROOT / "jobs", tmp_path / "model", tmp_path / "reg"
    common = [str(lake), "--columns", "x", "y", "--num-workers", "2"]

    sweep = ["python", str(jobs / "sweep.py"), *common, "--k", "2..3", "--output", str(model)]
    assert cluster.submit(*sweep) == 0
    assert gmm_dist.load(str(model)).n_components == 3
    assert cluster.submit(*sweep) == 2  # there is a result already

    scores = ["python", str(jobs / "score.py"), str(lake), "--model", str(model), "--keep", "id"]
    assert cluster.submit(*scores, "--output", str(tmp_path / "scored")) == 0
    assert len(list((tmp_path / "scored").glob("ds=*/part.parquet"))) == 2

    nightly = ["python", str(jobs / "nightly.py"), *common, "--registry", str(registry)]
    nightly += ["--partition", "ds", "--scores", str(tmp_path / "nights")]
    assert cluster.submit(*nightly, "--night", night(1), "--k", "3") == 0
    assert cluster.submit(*nightly, "--night", night(2), "--k", "2") == 3
    assert list((registry / "models").iterdir()) == [registry / "models" / night(1)]
    assert (tmp_path / "nights" / night(1) / f"ds={night(1)}" / "part.parquet").exists()

"""A run that was broken off goes on, and ends with the bits of one that was not."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_jobs import Errors, refused
from test_lake_resume import learned

from gmm_dist import BayesianGaussianMixture, Cluster, GaussianMixture, Lake
from gmm_dist.commands import sweep as sweep_job
from gmm_dist.em.lane import Snapshot
from gmm_dist.fitting.checkpoints import FitCheckpoints
from gmm_dist.runs.checkpoint import checkpoint_names
from gmm_dist.runs.folder import Folder

ROOT = Path(__file__).parents[2]
ARGS = ["--k", "3,6", "--tol", "0", "--max-iter", "60", "--precision", "float64"]

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("lake")
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60_000, 3)) + 2 * rng.normal(size=(5, 3))[np.arange(60_000) % 5]
    pq.write_table(pa.table({f"x{i}": X[:, i] for i in range(3)}), folder / "a.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def undisturbed(data: str, ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert sweep_job.main([data, "--output", str(out), *ARGS, "--address", ray_address]) == 0
    assert not (out / "_checkpoints").exists()
    return model_hash(out)


def model_hash(out: Path) -> str:
    return hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()


def start(data: str, out: Path, address: str, *more: str) -> subprocess.Popen[bytes]:
    job = [sys.executable, str(ROOT / "jobs" / "sweep.py"), data, "--output", str(out)]
    return subprocess.Popen([*job, *ARGS, "--address", address, *more], stderr=subprocess.PIPE)


def killed_at(text: str, process: subprocess.Popen[bytes], after: float = 0.0) -> None:
    """Kill the driver, as a spot machine goes, when it has said something."""
    assert process.stderr is not None
    for line in process.stderr:
        if text.encode() in line:
            time.sleep(after)
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    process.stderr.close()
    assert process.returncode == -signal.SIGKILL


def test_a_driver_killed_before_the_first_checkpoint_is_resumed_from_the_start(
    data: str, ray_address: str, undisturbed: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    killed_at("choosing the best of", start(data, out, ray_address))
    argv = [data, "--output", str(out), *ARGS, "--address", ray_address, "--resume"]
    assert sweep_job.main(argv) == 0
    assert model_hash(out) == undisturbed


def test_a_killed_driver_is_resumed_where_it_was_to_the_same_bits(
    data: str, ray_address: str, undisturbed: str, tmp_path: Path
) -> None:
    """Neither the search nor the passes before the checkpoint come again."""
    out = tmp_path / "out"
    killed_at("pass 20:", start(data, out, ray_address), after=0.2)
    assert not (out / "manifest.json").exists()
    resumed = start(data, out, ray_address, "--resume")
    said = resumed.communicate()[1].decode()
    assert resumed.returncode == 0, said
    assert "choosing the best of" not in said
    assert "resuming after pass" in said
    assert "pass 1:" not in said
    assert model_hash(out) == undisturbed
    assert json.loads((out / "sweep.json").read_text())["n_passes"] > 20
    left = {path.name for path in out.iterdir()} - {"_attempts"}
    assert left == {"manifest.json", "model", "sweep.json", "report.html", "recipe.json"}
    before = (out / "manifest.json").read_bytes()
    argv = [data, "--output", str(out), *ARGS, "--address", ray_address, "--resume"]
    assert sweep_job.main(argv) == 0  # nothing is left to do
    assert (out / "manifest.json").read_bytes() == before


def test_what_cannot_be_resumed_is_one_line(
    data: str, ray_address: str, tmp_path: Path, capfd: Errors
) -> None:
    lake = tmp_path / "lake"
    lake.mkdir()
    whole = pq.read_table(data)
    pq.write_table(whole, lake / "a.parquet")
    out = tmp_path / "out"
    killed_at("pass 10:", start(str(lake), out, ray_address))
    argv = [str(lake), "--output", str(out), *ARGS, "--address", ray_address]
    line = refused(capfd, *argv)
    assert "holds the checkpoints of an unfinished run: pass --resume" in line
    line = refused(capfd, *argv, "--resume", "--n-init", "3")
    assert "the settings differ: start.n_init was 16, is 3" in line
    pq.write_table(whole.slice(1), lake / "a.parquet")
    line = refused(capfd, *argv, "--resume")
    assert "the lake's files have changed: a.parquet had" in line
    assert not (out / "manifest.json").exists()


@pytest.mark.filterwarnings("ignore:Best performing initialization did not converge")
@pytest.mark.parametrize("estimator", [GaussianMixture, BayesianGaussianMixture])
def test_an_estimator_whose_process_was_killed_is_resumed_to_the_same_bits(
    estimator: type[GaussianMixture | BayesianGaussianMixture],
    data: str,
    ray_address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"n_components": 4, "n_init": 2, "random_state": 3, "max_iter": 25, "tol": 0.0}
    lake = Lake(data, where="x0 > 2")
    cluster = Cluster(address=ray_address, num_workers=2)
    whole = estimator(**settings).fit(lake, cluster=cluster, output=tmp_path / "whole")
    out = tmp_path / "out"
    program = f"""
from gmm_dist import *
cluster = Cluster(address={ray_address!r}, num_workers=2)
lake = Lake({data!r}, where="x0 > 2")
{estimator.__name__}(**{settings!r}).fit(lake, cluster=cluster, output={str(out)!r})
"""
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)
    try:
        while number_of_checkpoint(out) < 8:
            assert process.poll() is None, process.communicate()[1].decode()
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate()
    before = number_of_checkpoint(out)
    assert before >= 8
    assert not (out / "manifest.json").exists()
    keep, passes = FitCheckpoints.keep, []

    def counted(self: FitCheckpoints, number: int, snapshot: Callable[[], Snapshot]) -> None:
        passes.append(number)
        keep(self, number, snapshot)

    monkeypatch.setattr(FitCheckpoints, "keep", counted)
    resumed = estimator(**settings).fit(lake, cluster=cluster, output=out, resume=True)
    assert passes[0] == before + 1
    assert learned(resumed) == learned(whole)
    assert number_of_checkpoint(out) == 0


def number_of_checkpoint(out: Path) -> int:
    """Return after how many passes the newest checkpoint was taken; 0 for none."""
    names = checkpoint_names(Folder.of(str(out))) if out.exists() else []
    return int(names[-1].split("-")[0]) if names else 0

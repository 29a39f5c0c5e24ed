"""A lake beyond the workers' memory is fitted to the same bits, or refused where that is asked."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_jobs import refused

from gmm_dist.commands import sweep as sweep_job
from gmm_dist.runs.checkpoint import checkpoint_names
from gmm_dist.runs.folder import Folder
from gmm_dist.shards.ray_shards import RayShards

pytestmark = pytest.mark.unchecked  # whole jobs

D, N_ROWS = 8, 16 * 16_384  # 16 shards of 512 KiB
MEMORY = 8 << 20  # of a worker: six shards, beside what loading takes


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("lake")
    rng = np.random.default_rng(0)
    X = rng.normal(size=(N_ROWS, D)).astype(np.float32)
    X[::3] += 5
    for i in range(4):
        part = pa.table({f"x{j}": X[i::4, j] for j in range(D)})
        pq.write_table(part, folder / f"{i}.parquet", row_group_size=4096)
    return str(folder)


def argv(data: str, out: Path, address: str) -> list[str]:
    fit = ["--k", "2,3", "--n-init", "2", "--holdout", "0.1", "--clusters", "none"]
    return [data, *fit, "--output", str(out), "--address", address, "--num-workers", "1"]


def sha256(out: Path) -> str:
    return hashlib.sha256((out / "model/model.safetensors").read_bytes()).hexdigest()


def test_rows_beyond_memory_have_the_bits_of_rows_in_memory(
    data: str, ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd, caplog
) -> None:
    assert sweep_job.main(argv(data, tmp_path / "memory", ray_address)) == 0
    assert "lie in files" not in caplog.text
    monkeypatch.setattr(RayShards, "worker_memory", lambda self: MEMORY)
    spilled = [*argv(data, tmp_path / "disk", ray_address), "--spill", str(tmp_path)]
    assert sweep_job.main(spilled) == 0
    assert f"GiB of them lie in files in {tmp_path}" in caplog.text
    capfd.readouterr()
    assert sha256(tmp_path / "disk") == sha256(tmp_path / "memory")
    tables = [json.loads((tmp_path / o / "sweep.json").read_text()) for o in ("disk", "memory")]
    for candidate in (*tables[0]["candidates"], *tables[1]["candidates"]):
        del candidate["seconds"]
    assert tables[0]["candidates"] == tables[1]["candidates"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "memory"]
    line = refused(capfd, *argv(data, tmp_path / "no", ray_address), "--no-spill")
    assert "rows of 8 features need" in line


def test_a_job_that_was_killed_goes_on_with_spilled_rows(
    data: str, ray_address: str, tmp_path: Path
) -> None:
    program = f"""
import sys
from gmm_dist.commands import sweep
from gmm_dist.shards.ray_shards import RayShards
RayShards.worker_memory = lambda self: {MEMORY}
sys.exit(sweep.main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", program, *argv(data, tmp_path / "whole", ray_address)]
    subprocess.run(command, check=True, capture_output=True)
    out = tmp_path / "killed"
    command[3:] = argv(data, out, ray_address)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (out.exists() and checkpoint_names(Folder.of(str(out)))):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run([*command, "--resume"], check=True, capture_output=True)
    assert sha256(out) == sha256(tmp_path / "whole")

"""The benchmarks run, on tiny shapes, and what they print is JSON; no figure is looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def parsed(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_ours_and_scikit_learn_make_the_same_iterations(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    shapes = ["--shapes", "diag:4000:5:4"]
    contenders = ["--contenders", "ours-f32", "sklearn-f64"]
    quick = ["--repeats", "1", "--iterations", "3", "--peak-seconds", "0.05"]
    out = run("passes.py", *shapes, *contenders, *quick, "--json", str(path))
    assert "| sklearn-f64 |" in out
    results = parsed(path.read_text())
    assert [r["contender"] for r in results] == contenders[1:]
    for result in results:
        assert result["failure"] is None
        assert result["agrees"], result
        assert result["iterations"] == 3
        assert result["machine"]["versions"]["torch"]
        assert result["machine"]["gflops"]["float32_all_cores"] > 0
        assert (result["peak_fraction"] is None) == (result["contender"] == "sklearn-f64")
    # Scored once more than it iterates: counted.
    assert {r["contender"]: r["e_steps"] for r in results}["sklearn-f64"] == 4


def test_a_contender_that_cannot_run_is_a_row_of_the_table(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    pytest.importorskip("sklearn")
    quick = ["--rows", "1500", "--features", "3", "--k", "2", "4", "--peak-seconds", "0"]
    quick += ["--repeats", "1", "--iterations", "2", "--json", str(path), "--contenders"]
    out = run("sweeps.py", *quick, "ours-f32", "ours-separate-f32", "torchgmm-f32")
    together, separate, peer = parsed(path.read_text())
    assert len(together["log_likelihood"]) == 3
    assert together["log_likelihood"] == pytest.approx(separate["log_likelihood"], abs=1e-6)
    assert together["details"]["passes"] * 3 == separate["details"]["passes"]
    if peer["failure"] is not None:
        assert "skipped: torchgmm is not installed: pip install -e '.[bench]'" in out


def test_the_gpu_benchmark_runs_on_a_cpu() -> None:
    results = parsed(run("gpu.py", "--device", "cpu", "--scale", "0.0003", "--repeats", "1"))
    checks = [r for r in results if r["benchmark"] == "gpu-check"]
    timed = [r for r in results if r["benchmark"] == "gpu"]
    assert len(checks) == 8
    assert all(r["agrees"] for r in checks)
    assert [r["covariance_type"] for r in timed] == ["spherical", "diag", "full", "full"]
    assert all(r["pass_seconds"] > 0 and r["machine"]["device"] for r in timed)

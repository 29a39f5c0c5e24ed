"""The benchmarks run, on tiny shapes, and what they print is JSON; no figure is looked at."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from problems import Mixture
from quality import BestSeen, Contest, Fit, is_degenerate, scored

from gmm_dist.model.covariance import COVARIANCE_TYPES

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a benchmark in this process, and returns what it printed."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        capsys.readouterr()
        with warnings.catch_warnings(action="default"):  # a peer that stops early warns
            assert importlib.import_module(name).main() == 0
        return capsys.readouterr().out

    return run


def parsed(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.long
def test_ours_and_scikit_learn_make_the_same_iterations(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "results.jsonl"
    shapes = ["--shapes", "diag:4000:5:4"]
    contenders = ["--contenders", "ours-f32", "sklearn-f64"]
    quick = ["--repeats", "1", "--iterations", "3", "--peak-seconds", "0.05"]
    out = run("passes", *shapes, *contenders, *quick, "--json", str(path))
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


@pytest.mark.long
def test_a_contender_that_cannot_run_is_a_row_of_the_table(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "results.jsonl"
    pytest.importorskip("sklearn")
    quick = ["--rows", "1500", "--features", "3", "--k", "2", "4", "--peak-seconds", "0"]
    quick += ["--repeats", "1", "--iterations", "2", "--json", str(path), "--contenders"]
    out = run("sweeps", *quick, "ours-f32", "ours-separate-f32", "torchgmm-f32")
    together, separate, peer = parsed(path.read_text())
    assert len(together["log_likelihood"]) == 3
    assert together["log_likelihood"] == pytest.approx(separate["log_likelihood"], abs=1e-6)
    assert together["details"]["passes"] * 3 == separate["details"]["passes"]
    if peer["failure"] is not None:
        assert "skipped: torchgmm is not installed: pip install -e '.[bench]'" in out


@pytest.mark.long
def test_the_gpu_benchmark_checks_every_form_and_times_every_shape(run: Run) -> None:
    results = parsed(run("gpu", "--small", "--sections", "check", "passes", "fits"))
    checks = [r for r in results if r["name"] == "check"]
    assert len(checks) == 3 * len(COVARIANCE_TYPES)
    for key in ("agrees", "same_bits_twice", "same_bits_as_the_hosts_tree"):
        assert all(r[key] for r in checks)
    timed = [r for r in results if r["name"] == "pass"]
    kinds = ["full", "diag", "spherical", "full"]
    assert [r["shape"]["kind"] for r in timed] == [kind for kind in kinds for _ in range(6)]
    assert all(r["measured_ms"] > 0 and r["predicted_ms"] > 0 for r in timed)
    assert [r["n_iter"] > 0 for r in results if r["name"] == "fit"] == [True] * 3


def test_the_gpu_benchmark_runs_without_a_gpu(run: Run) -> None:
    some = ["m_step", "ceilings", "small_shapes", "plain_torch"]
    results = parsed(run("gpu", "--small", "--sections", *some))
    assert [r["name"] for r in results] == [
        "machine",
        "m_step",
        *["ceiling"] * 9,
        "copies",
        *["small shape"] * 6,
        "peer",
        "done",
    ]
    assert all((r["card"], r["figures"]) == ("pretended", "mean nothing") for r in results)


def test_a_section_of_the_gpu_benchmark_that_fails_is_a_line_and_not_the_end(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu

    def fails(bench: object) -> bool:
        raise ValueError("no such kernel")

    monkeypatch.setitem(gpu.SECTIONS, "check", (fails, 0.0))
    monkeypatch.setitem(gpu.SECTIONS, "passes", (fails, 1e9))
    assert gpu.main(["--small", "--sections", "check", "passes"]) == 1
    results = parsed(capsys.readouterr().out)
    assert [r["name"] for r in results] == ["machine", "failed", "skipped", "done"]
    assert "no such kernel" in results[1]["error"]


@pytest.mark.long
def test_quality_compares_notes_the_best_and_hunts_for_better(tmp_path: Path, run: Run) -> None:
    pytest.importorskip("sklearn")
    path, best = tmp_path / "results.jsonl", tmp_path / "best.json"
    files = ["--best", str(best), "--json", str(path)]
    quick = ["--datasets", "overlap4", "--rows", "1200", *files]
    out = run("quality", *quick, "--k", "2", "3", "--repeats", "2")
    results = parsed(path.read_text())
    sizes = {(r["data_set"], r["n"], r["d"]) for r in results}
    assert sizes == {("overlap4", 1200, 4)}
    counts = [sum(r["program"] == p for r in results) for p in ("ours", "scikit-learn")]
    assert counts == [4, 4]
    assert [r["k"] for r in results if r["program"] == "ours, one sweep"] == [2, 3]
    for result in results:
        assert -8 < result["log_likelihood"] < -7
        assert not result["degenerate"]
        assert result["machine"]["versions"]["scikit-learn"]
    # A pass for the moments and one for the sample, at least, besides those of EM.
    ours = [r for r in results if r["program"] == "ours"]
    assert all(r["passes"] > r["e_steps"] > r["n_iter"] for r in ours)
    seen = json.loads(best.read_text())["overlap4"]["best"]
    for k in (2, 3):
        own = max(r["log_likelihood"] for r in results if r["k"] == k)
        assert seen[str(k)]["log_likelihood"] == pytest.approx(own, abs=1e-6)
        assert f"| overlap4 | {k} |" in out
    assert "in 1/40 of n_init=10's time" in out

    run("quality", *quick, "--k", "3", "--hunt", "--hunt-seconds", "0")
    hunted = json.loads(best.read_text())["overlap4"]["best"]["3"]
    assert hunted["log_likelihood"] > seen["3"]["log_likelihood"] - 1e-7

    few = ["--k", "3", "--repeats", "1", "--skip-peers"]
    out = run("quality", *quick, *few, "--ablate")
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| overlap4 | 3")]
    assert {row[2] for row in rows} >= {"defaults"}
    assert all(float(row[6]) > -1e-6 for row in rows)  # below the best


@pytest.mark.long
def test_scored_files_agree_with_scikit_learn(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "results.jsonl"
    shape = ["--rows", "6000", "--features", "3", "--k", "4", "--files", "2"]
    contenders = ["--contenders", "one-worker", "sklearn"]
    run("scoring", *shape, *contenders, "--json", str(path))
    results = parsed(path.read_text())
    assert [r["contender"] for r in results] == contenders[1:]
    for result in results:
        assert result["rows_per_second"] > 0
        assert result["peak_rss_mib"] > 50


@pytest.mark.long
def test_sizes_are_measured(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    path = tmp_path / "results.jsonl"
    shape = ["--shapes", "20000:3", "--k", "2,3", "--num-workers", "1", "--json", str(path)]
    out = run("sizing", *shape)
    assert "| 20,000 | 3 | 1 |" in out
    (result,) = parsed(path.read_text())
    assert 0.05 < result["worker_gib"] < 4
    assert sum(result["phases"].values()) == pytest.approx(result["seconds"], abs=0.1)
    assert all(seconds >= 0 for seconds in result["phases"].values())
    assert result["n_passes"] > 0


def test_degenerate_mixtures_are_never_the_best(tmp_path: Path) -> None:
    X = np.random.default_rng(0).normal(size=(1000, 2)).astype(np.float32)
    eye, means = np.eye(2), np.zeros((2, 2))
    plain = Mixture(np.array([0.5, 0.5]), means, np.stack([eye, eye]))
    flat = Mixture(
        np.array([0.5, 0.5]),
        means,
        np.stack([eye, np.diag([1.0, 1.9e-6])]),
    )
    small = Mixture(np.array([0.9971, 0.0029]), means, np.stack([eye, eye]))
    degenerate = [is_degenerate(m, len(X), 1e-6) for m in (plain, flat, small)]
    assert degenerate == [False, True, True]

    path = tmp_path / "best.json"
    best = BestSeen.load(path)
    best.open("blob", X)

    def offered(mixture: Mixture) -> bool:
        fit = Fit("ours", "defaults", 2, 1.0, "CONVERGED", mixture, degenerate=False)
        return best.offer("blob", scored(fit, X, 1e-6))

    assert [offered(m) for m in (flat, small, plain, plain)] == [False, False, True, False]
    read = BestSeen.load(path)
    read.open("blob", X)
    # Two of the same, N(0, I): -½ (d ln 2π + |x|²).
    expected = -np.log(2 * np.pi) - 0.5 * float(np.square(X, dtype=np.float64).sum(1).mean())
    assert read.value("blob", 2) == pytest.approx(expected, abs=1e-9)
    read.open("blob", X * 1.01)  # other rows: what was seen does not hold for them
    assert read.value("blob", 2) == -np.inf


def test_aims_are_judged_where_the_peer_is_not_degenerate() -> None:
    blank = np.ones(1)
    mixture = Mixture(blank, blank, blank)

    def fit(value: float, seconds: float, *, degenerate: bool = False) -> Fit:
        return Fit("any", "", 3, seconds, "", mixture, value, degenerate)

    ours = [fit(-5.0, 1.0), fit(-5.002, 1.0), fit(-4.0, 1.0, degenerate=True)]
    contest = Contest("blob", 3, ours, {10: fit(-5.0015, 41.0)}, best=-4.998)
    assert contest.median == -5.002
    assert contest.worst == -np.inf
    assert contest.aims(contest.median) == {"n_init=10": True, "best": True, "time": True}
    assert contest.aims(-5.0031) == {"n_init=10": False, "best": False, "time": True}
    contest.peers = {10: fit(-3.0, 39.0, degenerate=True)}
    assert contest.aims(contest.median) == {"best": True, "time": False}
    assert "-3.0000 (degenerate)" in contest.row()


def test_the_estimator_is_timed_beside_scikit_learns(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "results.jsonl"
    quick = ["--shapes", "400:2:2", "--rounds", "1", "--iterations", "3", "--json", str(path)]
    quick += ["--no-processes"]
    printed = parsed(run("estimator", *quick))
    assert printed == parsed(path.read_text())
    assert [result["start"] for result in printed] == ["k-means", "given start"]
    for result in printed:
        bounds, iterations = result["lower_bound"], result["iterations"]
        assert iterations["ours"] == iterations["sklearn"]
        assert bounds["ours"] == pytest.approx(bounds["sklearn"], rel=1e-9)
        assert result["times_faster"] > 0

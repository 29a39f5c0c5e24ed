"""A fit with resamples: in its files, resumed to the same bits, and refused where it makes none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import here
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import gmm_dist
from gmm_dist.errors import UserError
from gmm_dist.fitting import fit
from gmm_dist.fitting.options import FitOptions
from gmm_dist.fitting.progress import Silent
from gmm_dist.runs.checkpoint import Checkpoint

pytestmark = pytest.mark.unchecked


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit.Job, "resident", here.resident)
    monkeypatch.setattr("gmm_dist.selection.certainty.bootstrap.N_AFRESH", 2)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    X = np.random.default_rng(0).normal(size=(400, 2))
    X[::2] += 7
    (tmp_path / "lake").mkdir()
    pq.write_table(pa.table({"x": X[:, 0], "y": X[:, 1]}), tmp_path / "lake" / "a.parquet")
    return {"data": str(tmp_path / "lake"), "k": (1, 2, 3), "bootstrap": 3, "n_init": 2}


class Breaks(Silent):
    """Breaks a run off after so many steps of its resampling."""

    def __init__(self, after: int) -> None:
        self.left = after

    def resampling(self, what: str, done: int, n: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def content(output: Path) -> dict[str, Any]:
    report = json.loads((output / "sweep.json").read_text())
    card = json.loads((output / "model" / "model.json").read_text())
    assert report["bootstrap"] == card["bootstrap"]
    assert report["clusters"] == card["clusters"]
    return {name: card[name] for name in ("bootstrap", "clusters")}


def test_a_fit_that_is_broken_off_while_it_resamples_goes_on_to_the_same_bits(options, tmp_path):
    outcome = fit.fit_lake(FitOptions(output=str(tmp_path / "whole"), **options))
    expected = content(tmp_path / "whole")
    assert outcome.mixture.bootstrap.n_used == 3
    assert [win["k"] for win in expected["bootstrap"]["wins"]] == [2]
    assert expected["clusters"]["stability"]["afresh"]["n_clusters"] == [2, 2]
    steps = Breaks(10**6)
    fit.fit_lake(FitOptions(output=str(tmp_path / "counted"), **options), progress=steps)
    n_steps = 10**6 - steps.left
    assert n_steps > 5
    for after in (0, 2, n_steps - 4, n_steps - 1):
        output = tmp_path / f"broken {after}"
        with pytest.raises(KeyboardInterrupt):
            fit.fit_lake(FitOptions(output=str(output), **options), progress=Breaks(after))
        assert not (output / "manifest.json").exists()
        # Fewer steps are left than there were: the run has not begun anew.
        rest = Breaks(10**6)
        fit.fit_lake(FitOptions(output=str(output), resume=True, **options), progress=rest)
        assert 10**6 - rest.left < n_steps - after + 1
        assert content(output) == expected


def test_a_model_is_read_back_with_what_was_resampled(options, tmp_path):
    outcome = fit.fit_lake(FitOptions(output=str(tmp_path / "out"), **options))
    mixture = gmm_dist.load(tmp_path / "out")
    assert mixture.clusters == outcome.mixture.clusters
    assert mixture.clusters.stability is not None
    for name in ("weights", "log_weights", "means", "deviations", "log_deviations"):
        assert torch.equal(
            getattr(mixture.bootstrap, name), getattr(outcome.mixture.bootstrap, name)
        )
    means = mixture.bootstrap.of_means(mixture.parameters)
    assert bool((means.low < mixture.parameters.means).all())
    gmm_dist.save(mixture, tmp_path / "again")
    assert torch.equal(gmm_dist.load(tmp_path / "again").bootstrap.means, mixture.bootstrap.means)


def test_resampling_changes_no_bit_of_the_model(options, tmp_path):
    fit.fit_lake(FitOptions(output=str(tmp_path / "with"), **options))
    fit.fit_lake(FitOptions(output=str(tmp_path / "without"), **options | {"bootstrap": 0}))
    files = [
        (tmp_path / name / "model" / "model.safetensors").read_bytes()
        for name in ("with", "without")
    ]
    assert files[0] == files[1]
    card = json.loads((tmp_path / "without" / "model" / "model.json").read_text())
    assert card["bootstrap"] is None
    assert card["clusters"]["stability"] is None


@pytest.mark.parametrize("n", [-1, 1])
def test_too_few_resamples_are_refused(options, tmp_path, n):
    with pytest.raises(UserError, match=rf"bootstrap is {n}: give 0, or a number"):
        FitOptions(output=str(tmp_path / "out"), **options | {"bootstrap": n})


def test_checkpoints_part_what_they_joined(options, tmp_path):
    """Tensors of the fits and of the resampling share names."""
    kept: list[Checkpoint] = []

    class Store:
        is_due = True

        def put(self, checkpoint: Checkpoint) -> None:
            kept.append(checkpoint)

        def latest(self) -> Checkpoint | None:
            return kept[-1] if kept else None

    class Run:
        def checkpoints(self, identity: object, *, seconds: float) -> Store:
            return Store()

        def check(self) -> None: ...

    from gmm_dist.em.lane import Snapshot
    from gmm_dist.fitting.checkpoints import FitCheckpoints

    one, two = torch.zeros(2), torch.ones(3)
    checkpoints = FitCheckpoints(Run(), None, resume=False)  # type: ignore[arg-type]
    checkpoints.keep(3, lambda: Snapshot({"0.theta": one}, {"lanes": [1]}))
    checkpoints.keep_resampled(4, lambda: Snapshot({"0.theta": two}, {"lanes": [2]}))
    again = FitCheckpoints(Run(), None, resume=True)  # type: ignore[arg-type]
    again.keep_resampled(5, lambda: Snapshot({"0.theta": two}, {"lanes": [3]}))
    last = FitCheckpoints(Run(), None, resume=True)  # type: ignore[arg-type]
    assert last.number == 5
    assert last.latest.tensors == {"0.theta": one}
    assert last.latest.state == {"lanes": [1]}
    assert last.resampled.tensors == {"0.theta": two}
    assert last.resampled.state == {"lanes": [3]}

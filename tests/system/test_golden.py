"""What an earlier version left behind is still loaded, continued and resumed.

tests/golden was written by the project at commit b3467b9: a lake of three days, models
of all families, a registry of two nights, scores of the whole lake, and scores of a run that
was cut off after one file. Reports are left out, and hosts' names.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch

from gmm_dist.commands import nightly as nightly_job
from gmm_dist.commands import score as score_job
from gmm_dist.nightly.registry import Registry
from gmm_dist.runs import load

GOLDEN = Path(__file__).parents[1] / "golden"
MODIFIED = 1_764_000_000 * 10**9  # of the lake's first file then; the plan's hash knows them
FULL = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
COVARIANCES = {
    "full": torch.stack([FULL, FULL * 2, FULL / 2]),
    "tied": FULL,
    "diag": torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.5, 0.25]], dtype=torch.float64),
    "spherical": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
}


@pytest.fixture
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy it all, to be worked on; relative paths are within."""
    there = shutil.copytree(GOLDEN, tmp_path / "golden")
    for i, path in enumerate(sorted((there / "lake").rglob("*.parquet"))):
        os.utime(path, ns=(MODIFIED + i, MODIFIED + i))
    monkeypatch.chdir(there)
    return there


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("kind", COVARIANCES)
def test_models_are_loaded(kind: str) -> None:
    for url in (f"{GOLDEN}/models/{kind}", f"{GOLDEN}/models/{kind}/model"):
        model = load.load(url)
        assert (model.covariance_type, model.n_components) == (kind, 3)
        assert model.feature_names == ("x", "y")
        assert (model.n_samples, model.log_likelihood) == (720.0, -2500.25)
        assert torch.equal(model.parameters.covariances, COVARIANCES[kind])
        assert model.parameters.weights.tolist() == [0.5, 0.25, 0.25]
        assert model.parameters.means.tolist() == [[0, 0], [6, 1], [-3, 7]]
    assert load.read_report(f"{GOLDEN}/models/{kind}") == {"criterion": "bic"}
    assert load.repair(f"{GOLDEN}/models/{kind}") == ()


def test_a_registry_is_read() -> None:
    place = Registry(str(GOLDEN / "registry"))
    assert place.nights() == ["2026-11-21", "2026-11-22"]
    assert place.latest() == "2026-11-22"
    before = place.newest_before("2026-11-23")
    assert before is not None
    assert before.lineage.night_before == "2026-11-21"
    assert sorted(before.lineage.ids) == [0, 1, 2]
    assert load.load(str(GOLDEN / "registry")).component_ids == before.lineage.ids


def test_a_registry_is_continued(golden: Path, in_process: None) -> None:
    old = hashes(golden / "registry" / "models")
    argv = ["lake", "--k", "3", "--registry", "registry", "--night", "2026-11-23"]
    argv += ["--partition", "ds", "--columns", "x", "y", "--n-init", "4", "--min-rows", "50"]
    argv += ["--max-drop", "1"]
    assert nightly_job.main(argv) == 0
    place = Registry("registry")
    assert place.latest() == "2026-11-23"
    before, now = place.newest_before("2026-11-23"), place.newest_before("2026-11-24")
    assert before is not None
    assert now is not None
    assert now.lineage.night_before == "2026-11-22"
    assert sorted(now.lineage.ids) == [0, 1, 2]  # the clusters have kept their numbers
    assert hashes(golden / "registry" / "models").items() >= old.items()
    assert nightly_job.main(argv) == 0  # published before


def test_scores_are_recognised_and_resumed(golden: Path, ray_address: str) -> None:
    whole = hashes(golden / "scored")
    argv = ["lake", "--model", "models/full", "--keep", "id", "--address", ray_address]
    argv += ["--num-workers", "1", "--output"]
    assert score_job.main([*argv, "scored"]) == 0
    assert hashes(golden / "scored") == whole
    (first,) = (golden / "unfinished").rglob("*.parquet")
    written = first.stat().st_mtime_ns
    assert score_job.main([*argv, "unfinished"]) == 2  # not without --resume
    assert score_job.main([*argv, "unfinished", "--resume"]) == 0
    assert first.stat().st_mtime_ns == written
    found = load.read_report("unfinished/_scored", "scored.json")
    then = load.read_report("scored/_scored", "scored.json")
    for fact in ("rows", "filtered", "missing", "columns", "plan_hash", "components"):
        assert found[fact] == then[fact]
    assert found["files"].keys() == then["files"].keys()

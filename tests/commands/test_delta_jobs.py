"""Fits of Delta tables: live rows alone decide the bits, and a run stays with its version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deltas
import here
import lakes
import numpy as np
import pyarrow as pa
import pytest
from conftest import S3Server
from test_jobs import Errors, model_hash, refused
from test_lake_resume import stopped_after

import gmm_dist
from gmm_dist.commands import fit as fit_job
from gmm_dist.commands import sweep as sweep_job
from gmm_dist.fitting import lake_sweep
from gmm_dist.lake.plan import plan_lake
from gmm_dist.lake.read import read

pytestmark = pytest.mark.unchecked  # whole jobs

ARGS = ["--k", "2", "--columns", "x", "y", "--n-init", "1", "--max-iter", "6", "--tol", "1e-9"]


def rows(n: int, seed: int = 0) -> pa.Table:
    """Return rows of three clusters, with a kind and a weight."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 2)) + 5 * rng.normal(size=(3, 2))[np.arange(n) % 3] + 1e6
    y = X[:, 1].astype(np.float32)
    return pa.table({"x": X[:, 0], "y": y, "kind": ["a", "b"] * (n // 2), "w": np.arange(n) % 3.0})


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Write a table with deleted rows in each of its files, and a version more."""
    root = deltas.write(tmp_path / "table", rows(18_000), partition_by=["kind"])
    deltas.write(root, rows(4000, 1))
    paths = pa.table(deltas.opened(root).get_add_actions())["path"].to_pylist()
    rng = np.random.default_rng(3)
    deltas.delete_rows(root, {path: rng.choice(2000, 900, replace=False) for path in paths})
    return root


def fitted(place: object, out: Path, *more: str) -> str:
    assert fit_job.main([str(place), "--output", str(out), *ARGS, *more]) == 0
    return model_hash(out)


@pytest.mark.parametrize("more", [[], ["--where", "kind == 'b'", "--weight-column", "w"]])
def test_live_rows_decide_the_bits_however_they_are_cut(
    table: Path, tmp_path: Path, in_process: None, s3_lake: S3Server, more: list[str]
) -> None:
    options: dict[str, Any] = {"columns": ["x", "y"]}
    if more:
        options |= {"where": "kind == 'b'", "weight_column": "w"}
    plan = plan_lake(str(table), **options)
    parts = [part for shard in range(plan.n_shards) for part in read(plan, shard)]
    X = np.concatenate([part.X for part in parts])
    weights = [part.sample_weight for part in parts]
    live = {"x": X[:, 0], "y": X[:, 1].astype(np.float32)}
    if more:
        # Rows of weight 0 are no rows, but they have numbers: put them back where they were.
        by_file = plan_lake(str(table), columns=["x", "y", "w"], where=options["where"])
        X = lakes.read_all(by_file)[0]
        live = {"x": X[:, 0], "y": X[:, 1].astype(np.float32), "w": X[:, 2]}
        assert sum(map(len, weights)) == int((X[:, 2] > 0).sum())
    weighted = more[2:]
    own = fitted(table, tmp_path / "own", *more)
    lakes.write(tmp_path / "one" / "a.parquet", live)
    for i, (a, b) in enumerate(((0, 77), (77, 9000), (9000, None))):
        cut = pa.table(live).slice(a, None if b is None else b - a)
        lakes.write(tmp_path / "cut" / f"{i}.parquet", cut, rows_per_group=1500)
    hashes = {
        fitted(tmp_path / name, tmp_path / f"of-{name}", *weighted) for name in ("one", "cut")
    }
    url = lakes.upload(table, s3_lake.file_system(), s3_lake.url)
    hashes.add(fitted(url, tmp_path / "of-s3", *more))
    assert hashes == {own}
    assert len(live["x"]) == plan.n_rows


def test_a_sweep_tells_which_version_it_has_read(
    table: Path, tmp_path: Path, in_process: None, capfd: Errors
) -> None:
    out = tmp_path / "out"
    assert sweep_job.main([str(table), "--output", str(out), *ARGS, "--k", "1,2", "--at", "1"]) == 0
    metadata = deltas.opened(table).metadata()
    snapshot = {"format": "Delta", "table": str(metadata.id), "version": 1, "masks": None}
    report = json.loads((out / "sweep.json").read_text())
    assert report["snapshot"] == snapshot
    assert report["rows"]["read"] == 22_000
    assert json.loads((out / "model" / "model.json").read_text())["snapshot"] == snapshot
    page = (out / "report.html").read_text()
    assert f"the live rows of version 1 of the Delta table {metadata.id}." in page
    assert gmm_dist.load(str(out)).n_samples == 22_000
    line = refused(capfd, str(table), "--output", str(tmp_path / "x"), *ARGS, "--at", "tomorrow")
    assert line.startswith("error: --at is 'tomorrow': give the number of a version, or a time")
    line = refused(capfd, str(table), "--output", str(tmp_path / "x"), *ARGS, "--at", "9")
    assert (
        line == f"error: {table}: --at is 9, and the newest version is 2; give that or an older one"
    )


def test_a_run_that_resumes_stays_with_its_version(
    table: Path, tmp_path: Path, in_process: None, capfd: Errors
) -> None:
    out, expected = tmp_path / "out", fitted(table, tmp_path / "expected")
    with stopped_after(3):
        fit_job.fit([str(table), "--output", str(out), *ARGS])
    deltas.write(table, rows(600, 2))
    argv = [str(table), "--output", str(out), *ARGS, "--resume"]
    line = refused(capfd, *argv, "--at", "3", job=fit_job.main)
    same = str(deltas.opened(table).metadata().id)
    assert (
        f"the rows were those of version 2 of the Delta table {same}, and are of version 3" in line
    )
    assert fit_job.main(argv) == 0
    assert model_hash(out) == expected
    assert json.loads((out / "sweep.json").read_text())["snapshot"]["version"] == 2
    assert fitted(table, tmp_path / "newest") != expected
    assert fitted(table, tmp_path / "then", "--at", "2") == expected


def test_a_run_whose_files_were_vacuumed_ends_in_a_line(
    tmp_path: Path, in_process: None, capfd: Errors
) -> None:
    table, out = deltas.write(tmp_path / "table", rows(600)), tmp_path / "out"
    with stopped_after(3):
        fit_job.fit([str(table), "--output", str(out), *ARGS])
    deltas.write(table, rows(600, 2), mode="overwrite")
    deltas.opened(table).vacuum(0, dry_run=False, enforce_retention_duration=False)
    argv = [str(table), "--output", str(out), *ARGS, "--resume"]
    line = refused(capfd, *argv, job=fit_job.main)
    assert "leave the files of older versions; read a newer ver" in line
    assert line.endswith("starts afresh in another --output")


def test_an_estimators_fit_stays_with_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lake_sweep, "session", here.session)
    settings: dict[str, Any] = {"n_components": 2, "n_init": 1, "random_state": 0, "tol": 0.5}
    table = deltas.write(tmp_path / "table", rows(600))
    lake = gmm_dist.Lake(table, columns=["x", "y"])
    out, expected = tmp_path / "out", gmm_dist.GaussianMixture(**settings).fit(lake)
    with stopped_after(1):
        gmm_dist.GaussianMixture(**settings).fit(lake, output=out)
    deltas.write(table, rows(60, 2))
    for _ in range(2):  # the second time what the first has learned is read
        resumed = gmm_dist.GaussianMixture(**settings).fit(lake, output=out, resume=True)
        np.testing.assert_array_equal(resumed.means_, expected.means_)
    newer = gmm_dist.Lake(table, columns=["x", "y"], at=1)
    with pytest.raises(
        gmm_dist.UserError, match=r"version 0 of the Delta table .*, and are of ver"
    ):
        gmm_dist.GaussianMixture(**settings).fit(newer, output=out, resume=True)

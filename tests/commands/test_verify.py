"""A committed fit is fitted again: the same bits, or what differs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import deltas
import here
import lakes
import pyarrow.parquet as pq
import pytest
from test_delta_jobs import rows
from test_delta_nights import run as run_night
from test_delta_nights import table_of
from test_jobs import Errors, refused
from test_nightly import night

from gmm_dist.commands import fit as fit_job
from gmm_dist.commands import sweep as sweep_job
from gmm_dist.commands.checks import verify as verify_job
from gmm_dist.fitting import replay
from gmm_dist.runs.load import read_report

pytestmark = pytest.mark.unchecked  # whole jobs

ARGS = ["--k", "1,2", "--columns", "x", "y", "--n-init", "1", "--max-iter", "6"]


@pytest.fixture(autouse=True)
def here_alone(in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmm_dist.fitting.lake_scores.session", here.session)


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    for i in range(3):
        lakes.write(
            tmp_path / "lake" / f"{i}.parquet", rows(600, i).append_column("i", [[i] * 600])
        )
    return tmp_path / "lake"


def swept(data: object, out: Path, *more: str) -> Path:
    assert sweep_job.main([str(data), "--output", str(out), *ARGS, *more]) == 0
    return out


def verified(capfd: Errors, out: object, *more: str) -> tuple[int, dict[str, Any], list[str]]:
    """Return the exit status, what --json tells, and the lines that were said."""
    capfd.readouterr()
    status = verify_job.main([str(out), "--json", *more])
    *lines, facts = capfd.readouterr().out.splitlines()
    return status, json.loads(facts), lines


OPTIONS = [
    ["--where", "i > 0", "--weight-column", "w", "--holdout", "0.1", "--tol", "0"],
    ["--covariance-type", "diag", "tied", "--criterion", "icl", "--no-accelerate"],
    ["--random-state", "7", "--reg-covar", "0.001", "--precision", "float64"],
]


@pytest.mark.parametrize("more", OPTIONS)
def test_a_fit_is_found_again(lake: Path, tmp_path: Path, capfd: Errors, more: list[str]) -> None:
    out = swept(lake, tmp_path / "out", *more)
    n_rows = f"{1200 if '--where' in more else 1800:,}"
    for fast, said in (
        ([], "the same bits, fitted again to the"),
        (["--fast"], "its files are whole, and score the"),
    ):
        status, facts, lines = verified(capfd, out, *fast)
        assert (status, facts["verified"]) == (0, True)
        assert lines[-1].startswith(f"{out}: {said} {n_rows} rows of {lake}")


def test_it_is_found_again_from_another_folder(
    lake: Path, tmp_path: Path, capfd: Errors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    swept("lake", Path("out"))
    more = ["--columns", "x", "y", "--start", "out", "--max-iter", "3"]
    assert fit_job.main(["lake", "--output", "second", *more]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("out", "second"):
        assert verified(capfd, f"../{name}")[0] == 0


def test_another_time_is_a_note_and_the_bits_decide(
    lake: Path, tmp_path: Path, capfd: Errors
) -> None:
    out = swept(lake, tmp_path / "out")
    os.utime(lake / "1.parquet", (1, 1))
    status, _, lines = verified(capfd, out)
    assert status == 0
    assert lines[0] == "note: of the same size, but with another time or ETag: 1.parquet"
    # Written in another way, with the same rows: the bits are the same.
    path = lake / "2.parquet"
    pq.write_table(pq.ParquetFile(path).read(), path, compression="none", row_group_size=77)
    for fast in ([], ["--fast"]):
        status, _, lines = verified(capfd, out, *fast)
        assert status == 0
        assert lines[0].startswith("note: the lake's files have changed: 1.parquet had ")


def test_a_changed_file_is_the_reason(lake: Path, tmp_path: Path, capfd: Errors) -> None:
    out = swept(lake, tmp_path / "out")
    path = lake / "1.parquet"
    table = pq.ParquetFile(path).read().to_pydict()
    table["x"][5] += 1000.0
    lakes.write(path, table)
    status, facts, lines = verified(capfd, out)
    assert (status, facts["verified"]) == (3, False)
    assert "other bits, fitted again to the 1,800 rows of" in lines[-1]
    assert facts["reasons"][0].startswith("the lake's files have changed: 1.parquet had ")
    assert "the parameters have other bits, the mean log-likelihood differs by " in lines[-1]
    status, facts, _ = verified(capfd, out, "--fast")
    assert status == 3
    assert any("rows' mean log-likelihood differs by" in reason for reason in facts["reasons"])
    lakes.write(lake / "3.parquet", rows(60, 9).append_column("i", [[9] * 60]))
    status, facts, lines = verified(capfd, out, "--fast")
    assert status == 3
    assert "other scores of the 1,860 rows" in lines[-1]
    assert any("1,800 rows were fitted, and there are 1,860" in r for r in facts["reasons"])


def test_another_version_or_processor_is_a_note_where_the_bits_are_the_same(
    lake: Path, tmp_path: Path, capfd: Errors, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = swept(lake, tmp_path / "out")
    real = replay.environment
    monkeypatch.setattr(replay, "environment", lambda: {**real(), "processor": "another"})
    status, _, lines = verified(capfd, out)
    assert status == 0
    assert lines[0].startswith("note: processor was ")
    assert lines[0].endswith(", is another")
    # Where they are not, it is the reason.
    monkeypatch.setattr(replay, "model_sha256", lambda parameters: str(id(parameters)))
    status, facts, _ = verified(capfd, out)
    assert status == 3
    assert facts["reasons"][-1].endswith("is another")


def test_a_version_of_a_table_is_fitted_again(tmp_path: Path, capfd: Errors) -> None:
    table = deltas.write(tmp_path / "table", rows(900))
    out = swept(table, tmp_path / "out")
    deltas.write(table, rows(300, 1))
    table_id = deltas.opened(table).metadata().id
    for fast in ([], ["--fast"]):
        status, _, lines = verified(capfd, out, *fast)
        assert status == 0
        assert f"the live rows of version 0 of the Delta table {table_id}" in lines[-1]
        assert not lines[:-1]
        status, facts, _ = verified(capfd, out, *fast, "--at", "1")
        assert status == 3
        assert any(
            reason.startswith("the rows were those of version 0 of the Delta table")
            for reason in facts["reasons"]
        )
    deltas.opened(table).optimize.compact()
    deltas.opened(table).vacuum(0, dry_run=False, enforce_retention_duration=False)
    line = refused(capfd, str(out), job=verify_job.main)
    assert "but it is gone, as VACUUM or expiring snapshots leave the files of older versio" in line


def test_nights_are_found_again_with_the_night_before(tmp_path: Path, capfd: Errors) -> None:
    table, reg = table_of(tmp_path / "t", "day"), tmp_path / "reg"
    for day in (1, 2):
        assert run_night(table, reg, day, partition=["day"]) == 0
    recipe = read_report(str(reg / "models" / night(2)), "recipe.json")
    assert recipe["warm"] == str(reg / "models" / night(1))
    deltas.opened(table).delete("id > 10_500")
    for day in (1, 2):
        assert verified(capfd, reg / "models" / night(day))[0] == 0
    assert verified(capfd, reg / "models" / night(2), "--fast")[0] == 0


def test_what_cannot_be_verified_is_one_line(lake: Path, tmp_path: Path, capfd: Errors) -> None:
    line = refused(capfd, str(tmp_path / "none"), job=verify_job.main)
    assert "holds no result" in line
    old = Path(__file__).parents[1] / "golden" / "models"
    (some, *_) = sorted(path.parent for path in old.rglob("manifest.json"))
    line = refused(capfd, str(some), job=verify_job.main)
    assert "has no recipe.json, as fits in Python and those of earlier versions have none" in line
    out = swept(lake, tmp_path / "out")
    for path in out.rglob("model.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    line = refused(capfd, str(out), "--fast", job=verify_job.main)
    assert "model/model.safetensors is missing or damaged (no copy fits manifest.json's sha" in line
    line = refused(capfd, str(out), "--at", "1", job=verify_job.main)
    assert "error: " in line


def test_what_a_model_was_resampled_for_plays_no_part(
    lake: Path, tmp_path: Path, capfd: Errors
) -> None:
    out = swept(lake, tmp_path / "out", "--bootstrap", "2", "--clusters", "none")
    for more in ([], ["--fast"], ["--spill", str(tmp_path)]):
        status, _, lines = verified(capfd, out, *more)
        assert status == 0
        assert not any("differ" in line for line in lines)


def test_a_night_whose_night_before_is_gone_is_verified_without_fitting(
    tmp_path: Path, capfd: Errors
) -> None:
    table, reg = table_of(tmp_path / "t", "day"), tmp_path / "reg"
    for day in (1, 2):
        assert run_night(table, reg, day, partition=["day"]) == 0
    shutil.rmtree(reg / "models" / night(1))
    out = reg / "models" / night(2)
    assert verified(capfd, out, "--fast")[0] == 0
    line = refused(capfd, str(out), job=verify_job.main)
    assert "started from the model of the night before, which is gone" in line
    assert "give --fast" in line


def test_a_model_is_not_written_into_a_table(tmp_path: Path, capfd: Errors) -> None:
    table = deltas.write(tmp_path / "table", rows(300))
    line = refused(capfd, str(table), "--output", str(table / "model"), *ARGS)
    assert "lies inside the table, whose VACUUM would remove the model" in line
    assert not (table / "model").exists()

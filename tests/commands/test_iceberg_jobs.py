"""Jobs on Iceberg tables: fits, scores and nights of one snapshot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import here
import icebergs
import lakes
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from conftest import S3Server
from pyiceberg.transforms import DayTransform
from test_delta_jobs import ARGS, fitted, rows
from test_delta_nights import rows as night_rows
from test_delta_nights import run as run_night
from test_jobs import Errors, refused
from test_lake_resume import stopped_after
from test_nightly import night

from gmm_dist.commands import fit as fit_job
from gmm_dist.commands import score as score_job
from gmm_dist.runs.load import read_report

pytestmark = [
    pytest.mark.unchecked,  # whole jobs
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def here_alone(in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmm_dist.scoring.score.session", here.session)


@pytest.fixture
def table(tmp_path: Path) -> Any:
    """Write a table with deleted rows in each of its two files."""
    made = icebergs.write(tmp_path / "lake", rows(18_000))
    made.append(rows(4000, 1))
    rng = np.random.default_rng(3)
    dead = {path: rng.choice(4000, 900, replace=False) for path in icebergs.data_files(made)}
    return icebergs.delete_rows(made, dead)


def test_live_rows_decide_the_bits_however_they_are_cut(
    table: Any, tmp_path: Path, capfd: Errors
) -> None:
    place = icebergs.place(table)
    own = fitted(place, tmp_path / "own")
    # Rows in the order of the files' paths, which is the plan's.
    tasks = sorted(table.scan().plan_files(), key=lambda task: task.file.file_path)
    from pyiceberg.io.pyarrow import ArrowScan

    scan = ArrowScan(table.metadata, table.io, table.schema(), row_filter=True_())
    live = pa.concat_tables([scan.to_table([task]) for task in tasks])
    assert len(live) == 22_000 - 1800
    live = live.select(["x", "y"])
    lakes.write(tmp_path / "one" / "a.parquet", live)
    for i, (a, b) in enumerate(((0, 77), (77, 9000), (9000, None))):
        cut = live.slice(a, None if b is None else b - a)
        lakes.write(tmp_path / "cut" / f"{i}.parquet", cut, rows_per_group=1500)
    assert {fitted(tmp_path / n, tmp_path / f"of-{n}") for n in ("one", "cut")} == {own}
    snapshot = json.loads((tmp_path / "own" / "sweep.json").read_text())["snapshot"]
    assert snapshot["version"] == table.current_snapshot().snapshot_id
    assert snapshot["format"] == "Iceberg"
    assert snapshot["schema"] == 0
    page = (tmp_path / "own" / "report.html").read_text()
    assert f"snapshot {snapshot['version']} of the Iceberg table {snapshot['table']}" in page


def True_() -> Any:  # noqa: N802 - a constant of pyiceberg's
    from pyiceberg.expressions import AlwaysTrue

    return AlwaysTrue()


def test_a_run_that_resumes_stays_with_its_snapshot(
    table: Any, tmp_path: Path, capfd: Errors
) -> None:
    place, out = icebergs.place(table), tmp_path / "out"
    expected = fitted(place, tmp_path / "expected")
    with stopped_after(3):
        fit_job.fit([place, "--output", str(out), *ARGS])
    with table.update_schema() as update:
        update.rename_column("w", "weight")
    table.append(rows(600, 2).rename_columns(["x", "y", "kind", "weight"]))
    newer = icebergs.place(table)
    argv = [newer, "--output", str(out), *ARGS, "--resume"]
    at = str(table.current_snapshot().snapshot_id)
    line = refused(capfd, *argv, "--at", at, job=fit_job.main)
    assert "the rows were those of snapshot " in line
    assert f"and are of snapshot {at} of the Iceberg table" in line
    assert fit_job.main(argv) == 0
    assert fitted(newer, tmp_path / "newest") != expected
    name = "model/model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def test_live_rows_are_scored_beside_their_places(table: Any, tmp_path: Path) -> None:
    place, out = icebergs.place(table), tmp_path / "scores"
    fitted(place, tmp_path / "model")
    argv = [place, "--model", str(tmp_path / "model"), "--output", str(out), "--keep", "x"]
    assert score_job.main(argv) == 0
    found = pd.read_parquet(out)
    expected = table.scan().to_arrow()["x"].to_pylist()
    assert sorted(found["x"]) == sorted(expected)
    for name, part in found.groupby("data_file"):
        whole = pd.read_parquet(Path(table.location().removeprefix("file://")) / str(name))
        assert (whole["x"].to_numpy()[part["row_index"]] == part["x"]).all()
    report = read_report(str(out / "_scored"), "scored.json")
    assert report["snapshot"]["version"] == table.current_snapshot().snapshot_id


def test_nights_of_a_table(tmp_path: Path) -> None:
    names = ["x", "y", "id", "event_time"]
    table = icebergs.catalog(tmp_path / "lake").create_table(
        icebergs.NAME, schema=night_rows(1).select(names).schema
    )
    with table.update_spec() as update:
        update.add_field("event_time", DayTransform(), "day")
    for day in (1, 2, 3):
        table.append(night_rows(day, first=10_000 * day).select(names))
    reg = tmp_path / "reg"
    for day in (1, 2):
        assert run_night(Path(icebergs.place(table)), reg, day, partition=["event_time"]) == 0
    found = read_report(str(reg / "models" / night(2)), "sweep.json")
    assert found["rows"]["read"] == 1200
    assert found["snapshot"]["version"] == table.current_snapshot().snapshot_id


def test_a_table_on_s3_by_its_metadata_file(
    tmp_path: Path, s3_lake: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = {
        "s3.endpoint": s3_lake.endpoint,
        "s3.access-key-id": s3_lake.key,
        "s3.secret-access-key": s3_lake.secret,
        "s3.region": "us-east-1",
    }
    catalog = icebergs.SqlCatalog(
        "lake", uri=f"sqlite:///{tmp_path}/c.db", warehouse=f"{s3_lake.url}/wh", **properties
    )
    catalog.create_namespace("db")
    made = catalog.create_table("db.t", schema=rows(10).schema)
    made.append(rows(600))
    here_hash = fitted(made.metadata_location, tmp_path / "of-s3")
    local = icebergs.write(tmp_path / "local", rows(600))
    assert fitted(icebergs.place(local), tmp_path / "of-here") == here_hash

"""Nights of Delta tables: by partitions or by a timestamp, each of one version."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deltas
import here
import nights
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from test_jobs import Errors, refused
from test_lake_resume import stopped_after
from test_nightly import FIRST, night

import gmm_dist
from gmm_dist.commands import nightly
from gmm_dist.lake import nights as night_keys
from gmm_dist.lake.plan import plan_lake
from gmm_dist.nightly.lineage import Lineage
from gmm_dist.runs import load

pytestmark = pytest.mark.unchecked  # whole jobs

ARGS = ["--k", "3", "--n-init", "1", "--columns", "x", "y"]


@pytest.fixture(autouse=True)
def here_alone(in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmm_dist.scoring.score.session", here.session)
    monkeypatch.setattr("gmm_dist.commands.night.connected", lambda cluster: here_nothing())


class here_nothing:  # noqa: N801 - a context
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def rows(day: int, *, first: int = 0, n: int = 400) -> pa.Table:
    """Return a night's rows, with its date as partitioned tables have it, and a time of that day.

    The first row is of the day's first moment, the last one of its last microsecond.
    """
    table = nights.rows(FIRST, n, seed=day)
    start = dt.datetime(2026, 11, day, tzinfo=dt.UTC)
    micros = np.linspace(0, 24 * 3600 * 10**6 - 1, len(table)).round().astype(int).tolist()
    times = [start + dt.timedelta(microseconds=m) for m in micros]
    return pa.table(
        {
            "x": table["x"],
            "y": table["y"],
            "id": np.arange(first, first + len(table)),
            "event_time": pa.array(times, pa.timestamp("us", "UTC")),
            "day": pa.array([start.date()] * len(table)),
            "ds": [night(day)] * len(table),
            **{name: [getattr(start, name)] * len(table) for name in ("year", "month")},
            "dd": [day] * len(table),
        }
    )


def table_of(root: Path, *partitions: str, days: Sequence[int] = (1, 2, 3)) -> Path:
    """Write a table, a commit a day."""
    names = ["x", "y", "id", *(partitions or ["event_time"])]
    for i, day in enumerate(days):
        own = rows(day, first=10_000 * i).select(list(dict.fromkeys(names)))
        deltas.write(root, own, partition_by=[*partitions])
    return root


def run(data: Path, reg: Path, day: int, *more: str, partition: Sequence[str]) -> int:
    argv = [str(data), "--registry", str(reg), "--night", night(day), *ARGS]
    return nightly.main([*argv, "--partition", *partition, *more])


def report(reg: Path, day: int) -> dict[str, Any]:
    return load.read_report(str(reg / "models" / night(day)))


@pytest.mark.parametrize(
    ("partitions", "asked"),
    [
        (["day"], ["day"]),
        (["ds"], ["ds"]),
        (["year", "month", "dd"], ["dd"]),
        ([], ["event_time"]),
    ],
    ids=["date", "text", "three", "timestamp"],
)
def test_a_night_is_its_partitions_or_one_utc_day(
    tmp_path: Path, partitions: list[str], asked: list[str]
) -> None:
    table, reg = table_of(tmp_path / "t", *partitions), tmp_path / "reg"
    for day in (1, 2):
        assert run(table, reg, day, "--keep-models", "5", partition=asked) == 0
    found = report(reg, 2)
    assert found["rows"]["read"] == 1200
    assert found["snapshot"]["version"] == 2
    lineages = [Lineage.read(str(reg / "models" / night(day))) for day in (1, 2)]
    assert set(lineages[0].ids) == set(lineages[1].ids) == {0, 1, 2}
    gate = load.read_report(str(reg / "models" / night(2)), "gate.json")
    assert gate["snapshot"] == found["snapshot"]
    assert gmm_dist.load(str(reg)).n_samples == pytest.approx(1080, abs=60)  # less a tenth


def test_a_timestamp_leaves_out_files_by_the_logs_statistics(tmp_path: Path) -> None:
    table = table_of(tmp_path / "t", days=(1, 2, 3))
    key = night_keys.find(str(table), ["event_time"])
    day = dt.date(2026, 11, 2)
    where = " and ".join(f"{name} {op} {value!r}" for name, op, value in key.clauses(day, day))
    plan = plan_lake(str(table), columns=["x", "y"], where=where)
    assert (len(plan.files), plan.n_rows) == (1, 1200)
    # Without statistics all rows are looked at, and the same ones pass.
    bare = tmp_path / "bare"
    for i, each in enumerate((1, 2, 3)):
        own = rows(each, first=10_000 * i)
        settings = {"delta.dataSkippingNumIndexedCols": "0"}
        deltas.write(bare, own.select(["x", "y", "id", "event_time"]), configuration=settings)
    everywhere = plan_lake(str(bare), columns=["x", "y"], where=where)
    assert everywhere.n_rows == 1200  # the footers' statistics leave out the other row groups


def test_scores_are_of_the_version_that_was_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, reg, scores = table_of(tmp_path / "t"), tmp_path / "reg", tmp_path / "scores"
    paths = pa.table(deltas.opened(table).get_add_actions())["path"].to_pylist()
    deltas.delete_rows(table, {path: [0, 5, 1199] for path in paths})
    score = nightly._score

    def after_more_rows(*args: Any) -> None:
        late = rows(2, first=90_000, n=10).select(["x", "y", "id", "event_time"])
        deltas.write(table, late)
        score(*args)

    monkeypatch.setattr(nightly, "_score", after_more_rows)
    more = ["--scores", str(scores), "--keep", "id"]
    assert run(table, reg, 2, *more, partition=["event_time"]) == 0
    found = pd.read_parquet(scores / night(2))
    gone = {10_000, 10_005, 11_199}
    assert sorted(found["id"]) == [i for i in range(10_000, 11_200) if i not in gone]
    snapshots = [
        report(reg, 2)["snapshot"],
        json.loads((scores / night(2) / "_scored" / "scored.json").read_text())["snapshot"],
    ]
    assert snapshots[0] == snapshots[1]
    assert snapshots[0]["version"] == 3
    # The next run of that night has nothing to do, though the table has moved on.
    assert run(table, reg, 2, *more, partition=["event_time"]) == 0
    assert len(pd.read_parquet(scores / night(2))) == 1197


def test_scores_that_are_asked_for_later_are_of_that_version_too(tmp_path: Path) -> None:
    table, reg, scores = table_of(tmp_path / "t", "day"), tmp_path / "reg", tmp_path / "scores"
    assert run(table, reg, 2, partition=["day"]) == 0
    deltas.opened(table).delete("id % 2 = 0")
    more = ["--scores", str(scores), "--keep", "id", "day"]
    assert run(table, reg, 2, *more, partition=["day"]) == 0
    found = pd.read_parquet(scores / night(2))
    assert sorted(found["id"]) == list(range(10_000, 11_200))
    assert set(found["day"].astype(str)) == {night(2)}


def test_a_night_that_resumes_stays_with_its_version(tmp_path: Path, capfd: Errors) -> None:
    table = table_of(tmp_path / "t")
    models = []
    for name, moves in (("whole", False), ("broken", True)):
        reg = tmp_path / name
        if moves:
            argv = [str(table), "--registry", str(reg), "--night", night(2), *ARGS]
            with stopped_after(3):
                nightly.nightly([*argv, "--partition", "event_time", "--tol", "1e-9"])
            deltas.write(table, rows(2, first=90_000).select(["x", "y", "id", "event_time"]))
        more = ["--tol", "1e-9", *(["--resume"] if moves else [])]
        assert run(table, reg, 2, *more, partition=["event_time"]) == 0
        models.append((reg / "models" / night(2) / "model" / "model.safetensors").read_bytes())
        assert report(reg, 2)["snapshot"]["version"] == 2
    assert models[0] == models[1]


def test_what_is_no_night_is_one_line(tmp_path: Path, capfd: Errors) -> None:
    table, reg = table_of(tmp_path / "t", "day"), tmp_path / "reg"
    argv = [str(table), "--registry", str(reg), "--k", "3"]
    assert nightly.main([*argv, "--night", night(9), "--partition", "day"]) == 3
    kept_back = f"kept back {night(9)}: no rows of {night(9)} (day) yet: run again when they have"
    assert kept_back in capfd.readouterr().out
    line = refused(capfd, *argv, "--night", night(1), "--partition", "dya", job=nightly.main)
    assert "--partition 'dya' is no column; columns are day, x, y, id; name the one" in line
    line = refused(capfd, *argv, "--night", night(1), "--partition", "x", job=nightly.main)
    assert "--partition 'x' does not tell the night in one spelling that is understood" in line
    inside = ["--night", night(1), "--partition", "day", "--scores", str(table / "scores")]
    line = refused(capfd, *argv, *inside, job=nightly.main)
    assert "lies inside the table, whose VACUUM would remove the scores: give --scores out" in line


def test_a_column_of_text_or_integers_in_the_files_tells_a_night(tmp_path: Path) -> None:
    for i, day in enumerate((1, 2)):
        own = rows(day, first=1000 * i).select(["x", "y", "ds"])
        number = pa.array([20261100 + day] * len(own), pa.int32())
        deltas.write(tmp_path / "t", own.append_column("n", number))
    assert night_keys.find(str(tmp_path / "t"), ["ds"]).digits is None
    assert night_keys.find(str(tmp_path / "t"), ["n"]).digits == 8
    assert run(tmp_path / "t", tmp_path / "reg", 2, partition=["n"]) == 0
    assert report(tmp_path / "reg", 2)["rows"]["read"] == 1200

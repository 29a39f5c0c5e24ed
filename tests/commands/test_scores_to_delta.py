"""Scores in a Delta table: one commit a run, once, and nothing of a run that did not commit."""

from __future__ import annotations

import datetime as dt
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import deltas
import here
import lakes
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from conftest import S3Server
from test_delta_scores import live, rows
from test_score import Errors, days, model_at, refused

from gmm_dist.commands import score as score_job
from gmm_dist.runs.commit import Attempt
from gmm_dist.scoring import delta
from gmm_dist.scoring.files import ScoreFiles
from gmm_dist.storage import open_url

pytestmark = pytest.mark.unchecked  # whole jobs

SCORES = ["id", "data_file", "row_index", "component", "log_density"]


@pytest.fixture(autouse=True)
def here_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmm_dist.scoring.score.session", here.session)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return model_at(str(tmp_path / "model"))


def argv_of(data: object, model: str, out: object, *more: object) -> list[str]:
    argv = [data, "--model", model, "--output", out, "--write", "delta", "--keep", "id", *more]
    return [*map(str, argv)]


def by_id(root: Path, version: int | None = None) -> pd.DataFrame:
    return live(root, SCORES, version).set_index("id").sort_index()


def test_a_run_commits_once(tmp_path: Path, model: str, capfd: Errors) -> None:
    data, out = days(tmp_path / "lake"), tmp_path / "scores"
    argv = argv_of(data, model, out, "ds")
    assert score_job.main(argv) == 0
    assert "scored 1,200 rows of 3 files by k=4" in capfd.readouterr().out
    assert score_job.main([str(data), "--model", model, "--output", str(tmp_path / "f")]) == 0
    files = pd.read_parquet(tmp_path / "f")
    found = live(out, [*SCORES, "ds"]).set_index("id").sort_index()
    assert found.index.tolist() == list(range(1200))
    assert found["data_file"].iloc[0] == "ds=2026-11-01/part-0.parquet"
    assert found["row_index"].tolist() == [*range(400)] * 3
    assert found["ds"].iloc[-1] == "2026-11-03"
    np.testing.assert_array_equal(found["log_density"], files["log_density"])
    np.testing.assert_array_equal(found["component"], files["component"])
    capfd.readouterr()
    for more in ([], ["--resume"]):
        assert score_job.main([*argv, *more]) == 0
        assert "committed before, nothing is left to do" in capfd.readouterr().out
    assert deltas.opened(out).version() == 0
    # Even where the run's own files are gone, the table knows.
    for path in sorted((out / "_scored").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert score_job.main(argv) == 0
    assert "committed before, nothing is left to do" in capfd.readouterr().out
    assert deltas.opened(out).version() == 0


def test_runs_are_appended_or_take_the_place_of_all(tmp_path: Path, model: str) -> None:
    data, out = days(tmp_path / "lake"), tmp_path / "scores"
    for day in (1, 2):
        argv = argv_of(data, model, out, "--where", f"ds == '2026-11-0{day}'")
        assert score_job.main(argv) == 0
    assert by_id(out).index.tolist() == list(range(800))
    assert by_id(out, 0).index.tolist() == list(range(400))
    last = argv_of(data, model, out, "--where", "ds == '2026-11-03'", "--overwrite")
    assert score_job.main([*last, "--probabilities"]) == 0  # other columns, too
    assert by_id(out).index.tolist() == list(range(800, 1200))
    assert by_id(out, 1).index.tolist() == list(range(800))
    assert len(deltas.opened(out).file_uris()) == 1
    deltas.opened(out).vacuum(0, dry_run=False, enforce_retention_duration=False)
    assert by_id(out).index.tolist() == list(range(800, 1200))
    assert len(list((out / "_scored" / "runs").glob("*/scored.json"))) == 3


def test_a_run_that_is_killed_leaves_no_rows_and_goes_on(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capfd: Errors
) -> None:
    table = deltas.write(tmp_path / "table", rows(300))
    deltas.write(table, rows(100, 2, first=300))
    out, whole = tmp_path / "scores", tmp_path / "whole"
    assert score_job.main(argv_of(table, model, whole)) == 0
    argv = argv_of(table, model, out)
    n_scored: list[int] = []

    def some(work: ScoreFiles, folder: Any, index: int) -> Any:
        if n_scored:
            raise KeyboardInterrupt
        n_scored.append(index)
        return score(work, folder, index)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    score = ScoreFiles._score
    with monkeypatch.context() as patch:
        patch.setattr(ScoreFiles, "_score", some)
        assert score_job.main(argv) == 130
    assert not (out / "_delta_log").exists()
    deltas.write(table, rows(50, 3, first=400))  # the table moves on
    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(delta.DeltaScores, "commit", interrupted)
        assert score_job.main([*argv, "--resume"]) == 130
    assert len(list(out.glob("*.parquet"))) == 2
    assert not (out / "_delta_log").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "commit", interrupted)
        assert score_job.main([*argv, "--resume"]) == 130
    assert deltas.opened(out).version() == 0
    assert score_job.main([*argv, "--resume"]) == 0
    assert "committed before, nothing is left to do" in capfd.readouterr().out
    assert deltas.opened(out).version() == 0
    assert by_id(out).index.tolist() == list(range(400))
    files = [{p.name: p.read_bytes() for p in each.glob("*.parquet")} for each in (out, whole)]
    assert files[0] == files[1]
    # The newest version is another run.
    assert score_job.main(argv) == 0
    assert len(by_id(out)) == 850


def test_an_unfinished_run_is_in_nobodys_way(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capfd: Errors
) -> None:
    data, out = days(tmp_path / "lake"), tmp_path / "scores"

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(delta.DeltaScores, "commit", interrupted)
        assert score_job.main(argv_of(data, model, out)) == 130
    capfd.readouterr()
    line = refused(capfd, *argv_of(data, model, out))
    assert line.endswith("an unfinished run: pass --resume to go on with it, or another --output")
    assert score_job.main(argv_of(data, model, out, "--where", "id < 30")) == 0
    assert by_id(out).index.tolist() == list(range(30))
    assert score_job.main(argv_of(data, model, out, "--resume")) == 0
    assert len(by_id(out)) == 1230


def test_runs_at_once_are_both_appended(tmp_path: Path, model: str) -> None:
    data, out = days(tmp_path / "lake"), tmp_path / "scores"
    assert score_job.main(argv_of(data, model, out, "--where", "id < 10")) == 0
    wheres = [f"id >= {first} and id < {first + 10}" for first in (10, 20, 30)]

    def run(where: str) -> None:
        job = score_job.options_of(
            score_job.ScoreOptions, _parsed(argv_of(data, model, out, "--where", where))
        )
        score_job.score_lake(job)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, wheres))
    assert by_id(out).index.tolist() == list(range(40))
    assert deltas.opened(out).version() == 3


def _parsed(argv: list[str]) -> Any:
    parser = score_job.Parser(prog="score")
    score_job.add_score(parser)
    return parser.parse_args(argv)


def test_types_that_delta_lacks_are_widened_or_refused(
    tmp_path: Path, model: str, capfd: Errors
) -> None:
    when = dt.datetime(2026, 11, 1, 12, 30, 0, 5)
    table = pa.table(
        {
            "x": [1.0, 2.0],
            "y": [3.0, 4.0],
            "id": pa.array([2**64 - 1, None], pa.uint64()),
            "small": pa.array([255, 0], pa.uint8()),
            "kind": pa.array(["a", None]).dictionary_encode(),
            "ns": pa.array([1, 2**60 + 1], pa.timestamp("ns")),
            "at": pa.array([when, None], pa.timestamp("ms", "Europe/Berlin")),
            "price": pa.array(["1.50", None]).cast(pa.decimal128(9, 2)),
            "emb": pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2)),
            "took": pa.array([1, 2], pa.duration("s")),
            "a b": [1, 2],
        }
    )
    lakes.write(tmp_path / "lake" / "a.parquet", table)
    out = tmp_path / "scores"
    names = ["small", "kind", "ns", "at", "price", "emb"]
    argv = argv_of(tmp_path / "lake", model, out, *names)
    assert score_job.main(argv) == 0
    found = live(out, ["id", *names])
    assert [int(found["id"][0]), found["id"].isna()[1]] == [2**64 - 1, True]
    assert found["small"].tolist() == [255, 0]
    assert found["kind"].tolist()[0] == "a"
    assert found["ns"].astype("int64").tolist() == [0, 2**60 // 1000]
    assert found["at"][0] == pd.Timestamp(when.replace(microsecond=0), tz="UTC")
    assert str(found["price"][0]) == "1.50"
    assert list(found["emb"][0]) == [1.0, 2.0]
    capfd.readouterr()
    line = refused(capfd, *argv_of(tmp_path / "lake", model, tmp_path / "o", "took"))
    assert line == (
        "error: --keep column 'took' has type duration[s], which Delta tables lack: "
        "leave it out, or write files"
    )
    line = refused(capfd, *argv_of(tmp_path / "lake", model, tmp_path / "o", "a b"))
    assert "column 'a b' has a character that names in Delta tables lack" in line
    assert not (tmp_path / "o").exists()


def test_tables_that_cannot_take_scores_are_one_line(
    tmp_path: Path, model: str, capfd: Errors, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = days(tmp_path / "lake")
    parts = deltas.write(tmp_path / "parts", rows(10), partition_by=["kind"])
    line = refused(capfd, *argv_of(data, model, parts, "--overwrite"))
    assert line == (f"error: {parts}: the Delta table is partitioned, by kind; give a new --output")
    other = deltas.write(tmp_path / "other", {"id": ["a"]})
    line = refused(capfd, *argv_of(data, model, other))
    assert "has other columns than the scores: 'id' is string there, long here; give opt" in line
    assert score_job.main(argv_of(data, model, other, "--overwrite")) == 0
    assert len(by_id(other)) == 1200
    ruled = deltas.write(
        tmp_path / "ruled", {"id": [1]}, configuration={"delta.enableDeletionVectors": "true"}
    )
    deltas.commit(ruled, deltas.protocol("deletionVectors"))
    line = refused(capfd, *argv_of(data, model, ruled))
    assert "asks of its writers what is not known here, deletionVectors; give a new --out" in line
    lakes.write(tmp_path / "folder" / "a.parquet", {"id": [1]})
    line = refused(capfd, *argv_of(data, model, tmp_path / "folder"))
    assert "folder is not empty (1 entries, first 'a.parquet'): pass another --output" in line
    line = refused(capfd, str(data), "--model", model, "--output", str(other), "--keep", "id")
    assert "other is not empty" in line
    line = refused(capfd, str(data), "--model", model, "--output", str(other), "--overwrite")
    assert line == (
        "error: --overwrite is about the rows of a table: give --write delta too, or leave it out"
    )
    table = deltas.write(tmp_path / "table", {"x": [1.0], "y": [1.0], "id": [1]})
    line = refused(capfd, *argv_of(table, model, table))
    assert "lies inside the table" in line or "has other columns" in line
    monkeypatch.setitem(sys.modules, "deltalake", None)
    line = refused(capfd, *argv_of(data, model, tmp_path / "new"))
    assert line == (
        f"error: {tmp_path / 'new'}: a Delta table, which takes the package deltalake to write; "
        "pip install 'gmm_dist[delta]'"
    )


def test_on_s3_it_is_the_same(tmp_path: Path, model: str, s3_lake: S3Server) -> None:
    data, out = days(tmp_path / "lake"), f"{s3_lake.url}/scores"
    for day in (1, 2):
        where = ["--where", f"ds == '2026-11-0{day}'"]
        for place in (out, tmp_path / "scores"):
            assert score_job.main(argv_of(data, model, place, *where)) == 0
            assert score_job.main(argv_of(data, model, place, *where)) == 0
    fs, root = open_url(out)
    paths = fs.ls(root, detail=False)
    names = {path.rpartition("/")[2] for path in paths if path.endswith(".parquet")}
    assert names == {path.name for path in (tmp_path / "scores").glob("*.parquet")}
    assert len(names) == 2
    commits = sorted(name for name in fs.find(f"{root}/_delta_log") if name.endswith(".json"))
    assert len(commits) == 2
    actions = [json.loads(line) for line in fs.cat_file(commits[1]).decode().splitlines()]
    assert [a["txn"]["version"] for a in actions if "txn" in a] == [1]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda out: deltas.opened(out).delete("id < 5"), "delete"),
        (lambda out: deltas.opened(out).restore(0), "restore"),
    ],
)
def test_scores_that_others_took_away_are_not_said_to_be_there(
    tmp_path: Path, model: str, capfd: Errors, change: Callable[[Path], object], what: str
) -> None:
    table, out = deltas.write(tmp_path / "table", rows(300)), tmp_path / "scores"
    first = argv_of(table, model, out)
    assert score_job.main(first) == 0
    second = [*first, "--where", "id < 100", "--overwrite"]
    assert score_job.main(second) == 0
    assert len(by_id(out)) == 100
    # The first run's rows have been replaced: to run it again would leave them so.
    assert score_job.main(first) == 2
    assert "had the scores of this run, which has committed before" in capfd.readouterr().err
    assert score_job.main(second) == 0
    change(out)
    assert score_job.main(second) == 2
    assert f"({what})" in capfd.readouterr().err


def test_a_restored_version_has_its_runs_and_what_only_moves_rows_takes_none_away() -> None:
    ours = {"operation": "WRITE", "operationParameters": {"mode": "Append"}, "gmm_dist.run": "a"}
    gone = {"operation": "DELETE", "operationParameters": {}}
    moved = {"operation": "OPTIMIZE", "operationParameters": {}}
    appended = {"operation": "WRITE", "operationParameters": {"mode": "Append"}}

    def back(version: int) -> dict[str, object]:
        return {"operation": "RESTORE", "operationParameters": {"version": str(version)}}

    def taken(*entries: dict[str, object]) -> str | None:
        numbered = [entry | {"version": i} for i, entry in enumerate([appended, *entries])]
        return delta._taken_away(reversed(numbered), "a")

    assert taken(ours, moved, appended) is None
    assert taken(ours, gone) == "version 2 (delete)"
    assert taken(ours, gone, back(1)) is None
    assert taken(ours, back(0)) == "version 2 (restore)"
    assert taken(ours, gone, back(1), gone) == "version 4 (delete)"
    assert taken(gone) is None  # the log has the run's commit no longer

"""Scores of Delta tables: of the live rows alone, each beside its place, and of one version."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deltas
import here
import lakes
import mixtures
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import S3Server
from test_delta import by_hand, mapped, only_file
from test_score import MIXTURE, Errors, hashes, model_at, refused, report_of
from test_scorer import reference

from gmm_dist.commands import score as score_job
from gmm_dist.lake.plan import plan_lake
from gmm_dist.scoring import files
from gmm_dist.scoring.files import ScoreFiles

pytestmark = pytest.mark.unchecked  # whole jobs

REAL = Path(__file__).parents[1] / "data" / "delta"


@pytest.fixture(autouse=True)
def here_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmm_dist.scoring.score.session", here.session)


def rows(n: int, seed: int = 1, first: int = 0) -> pa.Table:
    X = mixtures.rows(MIXTURE, n, seed=seed).numpy()
    ids = np.arange(first, first + n)
    return pa.table({"id": ids, "y": X[:, 1], "x": X[:, 0], "kind": ["a", "b/c"] * (n // 2)})


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Write a table of four files, with deleted rows in each of the first two."""
    root = deltas.write(tmp_path / "table", rows(600), partition_by=["kind"])
    paths = pa.table(deltas.opened(root).get_add_actions())["path"].to_pylist()
    deltas.write(root, rows(200, 2, first=600))
    deltas.delete_rows(root, {path: [0, 1, 77, 299] for path in paths})
    return root


def scored(data: object, tmp_path: Path, *more: str, out: object = None) -> pd.DataFrame:
    """Score a table; return all scores."""
    out = out or tmp_path / "out"
    model = model_at(str(tmp_path / "model")) if not (tmp_path / "model").exists() else None
    argv = [str(data), "--model", model or str(tmp_path / "model"), "--output", str(out), *more]
    assert score_job.main(argv) == 0
    return pd.read_parquet(out)


def live(root: Path, names: Sequence[str], version: int | None = None) -> pd.DataFrame:
    """Return the rows of a table as deltalake's query engine has them."""
    found = deltas.QueryBuilder().register("t", deltas.opened(root, version))
    return pa.table(found.execute(f"select {', '.join(names)} from t")).to_pandas()


def test_live_rows_alone_are_scored_and_can_be_joined(table: Path, tmp_path: Path) -> None:
    found = scored(table, tmp_path, "--keep", "id", "kind", "--probabilities").set_index("id")
    expected = live(table, ["id", "x", "y", "kind"]).set_index("id")
    assert len(found) == len(expected) == 792
    assert sorted(found.index) == sorted(expected.index)
    expected = expected.loc[found.index]
    assert (found["kind"].astype(str) == expected["kind"]).all()
    X = expected[["x", "y"]].to_numpy()
    assert (found["component"] == reference(MIXTURE).predict(X)).all()
    np.testing.assert_allclose(found["log_density"], reference(MIXTURE).score_samples(X))
    # By their places in the data files, the rows are the same.
    for name, part in found.groupby("data_file"):
        whole = pq.ParquetFile(table / name).read().to_pandas()
        assert (whole["id"].to_numpy()[part["row_index"]] == part.index).all()
        place = pq.ParquetFile(tmp_path / "out" / name).read().to_pandas()
        assert place["row_index"].is_monotonic_increasing
        assert (place["data_file"] == name).all()
        assert "kind" not in place  # the folders tell it
    report = report_of(tmp_path / "out")
    assert report["snapshot"]["version"] == 2
    assert report["snapshot"]["masks"] is not None
    assert (report["rows"], report["filtered"], len(report["files"])) == (792, 0, 4)


def test_a_filter_and_an_earlier_version(table: Path, tmp_path: Path, capfd: Errors) -> None:
    where = ["--where", "kind == 'b/c' and id >= 100", "--keep", "id"]
    found = scored(table, tmp_path, *where, "--at", "1", out=tmp_path / "then")
    assert sorted(found["id"]) == list(range(101, 800, 2))
    assert "; of version 1 of the Delta table " in capfd.readouterr().out
    found = scored(table, tmp_path, *where, out=tmp_path / "now").set_index("id")
    gone = {2 * row + 1 for row in (0, 1, 77, 299)}
    assert sorted(found.index) == [i for i in range(101, 800, 2) if i not in gone]
    assert found["row_index"][601] == 0
    assert found["row_index"][101] == 50
    argv = [table, "--model", tmp_path / "model", "--output", tmp_path / "now", *where[:2]]
    assert "now holds the scores of another run: the settings differ: keep was" in refused(
        capfd, *argv
    )


def test_partition_values_go_along_where_no_folder_tells_them(tmp_path: Path) -> None:
    root = mapped(tmp_path / "t", "name")
    model = model_at(str(tmp_path / "model"), feature_names=("x", "y z"))
    out = tmp_path / "out"
    argv = [str(root), "--model", model, "--output", str(out), "--keep", "day", "late"]
    assert score_job.main(argv) == 0
    table = pq.read_table(out)
    assert table.schema.names[:4] == ["day", "late", "data_file", "row_index"]
    assert [str(day) for day in table["day"].to_pylist()] == ["2026-11-01"] * 2
    assert table["late"].null_count == 2
    assert table["row_index"].to_pylist() == [0, 1]
    assert table["data_file"].to_pylist() == ["sub dir/f.parquet"] * 2
    expected = reference(MIXTURE).score_samples(np.array([[3.0, 1.0], [4.0, 2.0]]))
    np.testing.assert_allclose(table["log_density"], expected)


def test_a_feature_that_came_later_is_missing_before(tmp_path: Path) -> None:
    root = deltas.write(tmp_path / "t", {"x": [1.0, 2.0]})
    deltas.write(root, {"x": [3.0], "y": [4.0]}, schema_mode="merge")
    found = scored(root, tmp_path)
    assert found["component"].isna().sum() == 2
    assert report_of(tmp_path / "out")["missing"] == 2


def test_a_file_that_lacks_all_that_is_read_has_its_rows_counted(tmp_path: Path) -> None:
    root = deltas.write(tmp_path / "t", {"other": [1.0, 2.0, 3.0]})
    deltas.write(root, {"x": [3.0], "y": [4.0]}, schema_mode="merge")
    found = scored(root, tmp_path)
    assert found["component"].isna().sum() == 3
    assert sorted(found["row_index"]) == [0, 0, 1, 2]


def test_row_groups_and_batches_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    X = mixtures.rows(MIXTURE, 100, seed=3).numpy()
    tables = {"a.parquet": pa.table({"x": X[:, 0], "y": X[:, 1], "i": np.arange(100)})}
    dead = [0, 12, 13, *range(26, 39), 99]
    found = []
    for i, (rows_per_group, batch) in enumerate(((100, 1 << 16), (13, 1 << 16), (100, 7), (13, 5))):
        monkeypatch.setattr("gmm_dist.lake.stream.BATCH_ROWS", batch)
        root = by_hand(tmp_path / f"t{i}", tables, rows_per_group=rows_per_group)
        deltas.delete_rows(root, {"a.parquet": dead})
        keep = ["--keep", "i", "--where", "x > -0.5 or i > 90"]
        found.append(scored(root, tmp_path, *keep, out=tmp_path / f"out{i}"))
        assert (found[-1]["i"] == found[-1]["row_index"]).all()
        pd.testing.assert_frame_equal(found[0], found[-1])
    assert set(found[0]["i"]) == {
        i for i in range(100) if i not in dead and (X[i, 0] > -0.5 or i > 90)
    }


def test_tables_that_spark_wrote(tmp_path: Path) -> None:
    root = REAL / "table-with-dv-small"
    one = mixtures.parameters("full", 2, 1)
    model_at(str(tmp_path / "model"), parameters=one, feature_names=("value",))
    found = scored(root, tmp_path, "--keep", "value")
    assert sorted(found["value"]) == sorted(live(root, ["value"])["value"])
    assert len(found) == 8


def test_files_outside_the_root_have_a_folder(tmp_path: Path) -> None:
    source = deltas.write(tmp_path / "source", rows(10).select(["x", "y"]))
    outside, clone = source / only_file(source), tmp_path / "clone"
    facts = [a for a in deltas.actions_of(source, 0) if "metaData" in a]
    adds = [deltas.add(outside.as_uri(), outside)]
    deltas.commit(clone, deltas.protocol("deletionVectors"), *facts, *adds)
    found = scored(clone, tmp_path)
    assert set(found["data_file"]) == {str(outside)}
    (path,) = hashes(tmp_path / "out")
    assert path.startswith("outside/")
    assert path.endswith(f"/{outside.name}")


def test_a_run_that_resumes_stays_with_its_version(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Errors
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    scored(table, tmp_path, out=whole)
    argv = [str(table), "--model", str(tmp_path / "model"), "--output", str(out)]
    n_scored = []

    def some(work: ScoreFiles, folder: Any, index: int) -> Any:
        if len(n_scored) == 2:
            raise KeyboardInterrupt
        n_scored.append(index)
        return score(work, folder, index)

    score = ScoreFiles._score
    monkeypatch.setattr(files.ScoreFiles, "_score", some)
    assert score_job.main(argv) == 130
    monkeypatch.setattr(files.ScoreFiles, "_score", score)
    assert len(hashes(out)) == 2
    capfd.readouterr()
    deltas.opened(table).delete("id < 300")
    line = refused(capfd, *argv, "--resume", "--at", "3")
    assert "the rows were those of version 2 of the Delta table" in line
    assert score_job.main([*argv, "--resume"]) == 0
    assert hashes(out) == hashes(whole)
    assert report_of(out)["snapshot"] == report_of(whole)["snapshot"]
    # Once it has committed, the same run has nothing to do; the newest version is another run.
    assert score_job.main([*argv, "--resume"]) == 0
    assert "committed before, nothing is left to do" in capfd.readouterr().out
    line = refused(capfd, *argv)
    assert "another run: the rows were those of version 2 of the Delta table" in line


def test_on_s3_it_is_the_same(table: Path, tmp_path: Path, s3_lake: S3Server) -> None:
    url = lakes.upload(table, s3_lake.file_system(), f"{s3_lake.url}/table")
    scored(table, tmp_path, "--keep", "id")
    model, out = str(tmp_path / "model"), f"{s3_lake.url}/out"
    assert score_job.main([url, "--model", model, "--output", out, "--keep", "id"]) == 0
    assert report_of(out)["files"] == report_of(tmp_path / "out")["files"]


def test_scores_cannot_lie_in_the_table_nor_take_the_names_of_places(
    table: Path, tmp_path: Path, capfd: Errors
) -> None:
    model = model_at(str(tmp_path / "model"))
    line = refused(capfd, table, "--model", model, "--output", table / "scores")
    assert "lies inside the table, whose VACUUM would remove the scores: give --output out" in line
    root = deltas.write(tmp_path / "t", {"x": [1.0], "y": [2.0], "row_index": [3]})
    argv = [root, "--model", model, "--output", tmp_path / "out", "--keep", "row_index"]
    assert "--keep row_index would stand beside the column of that name" in refused(capfd, *argv)
    # A folder's scores have no such columns, and may keep one.
    lakes.write(tmp_path / "lake" / "a.parquet", {"x": [1.0], "y": [2.0], "row_index": [3]})
    assert score_job.main([str(tmp_path / "lake"), *map(str, argv[1:])]) == 0
    assert pq.read_schema(tmp_path / "out" / "a.parquet").names[:2] == ["row_index", "component"]
    assert (
        json.loads((tmp_path / "out" / "_scored" / "scored.json").read_text()).get("snapshot")
        is None
    )
    assert plan_lake(str(tmp_path / "out"), columns=["probability"]).n_rows == 1

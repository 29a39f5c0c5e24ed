"""A scored file is written once, whole, and trusted only with its record."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import lakes
import mixtures
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import S3Server

from gmm_dist.errors import UserError
from gmm_dist.lake import stream
from gmm_dist.lake.plan import plan_lake
from gmm_dist.model.mixture import Mixture
from gmm_dist.runs.checkpoint import RunIdentity
from gmm_dist.scoring import files
from gmm_dist.scoring.files import Scored, ScoreFiles, spread
from gmm_dist.scoring.scorer import Scoring
from gmm_dist.scoring.target import Target
from gmm_dist.storage import open_url

MIXTURE = mixtures.parameters("full", 3, 2)
RECORD = "_scored/_checkpoints/files"


def days(folder: Path) -> Path:
    """Write three files of 100, 300 and 500 rows, under hive keys."""
    for i, day in enumerate(("2026-11-01", "2026-11-02", "2026-11-03")):
        n = 100 + 200 * i
        x, y = lakes.numbers(n, i), lakes.numbers(n, i + 10)
        x[:i] = np.nan
        columns = {"x": x, "y": y, "id": np.arange(n) + 1000 * i}
        lakes.write(folder / f"ds={day}" / "a.parquet", columns, rows_per_group=70)
    return folder


def work_of(
    data: object, output: object, *, where: str | None = None, key: str = "", attempt: str = "one"
) -> ScoreFiles:
    plan = plan_lake(str(data), columns=["x", "y"], missing="mean", keep=["id"], where=where)
    scoring = Scoring(mixture=MIXTURE, kept=pa.schema([("id", pa.int64())]), threshold=-6.0)
    return ScoreFiles(
        plan,
        scoring,
        Target(str(output)),
        RunIdentity(plan_hash=plan.hash, files=(), settings={"k": key}),
        attempt,
    )


def score(work: ScoreFiles, n: int = 3) -> Scored:
    parts = [work(shard) for shard in range(n)]
    return parts[0] + parts[1] + parts[2] if n == 3 else parts[0]


def contents(output: Path) -> dict[str, bytes]:
    return {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*.parquet")}


def test_every_file_has_its_rows_in_its_place(tmp_path: Path) -> None:
    data, out = days(tmp_path / "lake"), tmp_path / "out"
    found = score(work_of(data, out))
    assert contents(out).keys() == found.files.keys() == contents(data).keys()
    assert (found.counts.rows, found.counts.missing) == (900, 3)
    for path, file in found.files.items():
        before = pq.ParquetFile(data / path).read()
        after = pq.ParquetFile(out / path).read()
        assert after["id"].equals(before["id"])
        X = np.stack([before["x"], before["y"]], axis=1)
        whole = ~np.isnan(X).any(1)
        expected = Mixture(parameters=MIXTURE).score_samples(X[whole])
        np.testing.assert_allclose(after["log_density"].drop_null(), expected, rtol=1e-12)
        assert file.counts.rows == after.num_rows == before.num_rows
        assert file.counts.missing == after["component"].null_count
        assert file.counts.outliers == (expected < -6).sum() > 0
        counts = np.bincount(Mixture(parameters=MIXTURE).predict(X[whole]), minlength=3)
        assert file.counts.components == tuple(counts)
    assert sum(found.counts.components) == 897
    assert found.counts.filtered == 0


def test_a_file_counts_as_many_rows_as_were_scored(tmp_path: Path) -> None:
    data = days(tmp_path / "lake")
    work = work_of(data, tmp_path / "out")
    assert sorted(work(shard).n_rows for shard in range(3)) == [100, 300, 500]


def test_filtered_rows_are_not_written(tmp_path: Path) -> None:
    data, out = days(tmp_path / "lake"), tmp_path / "out"
    found = score(work_of(data, out, where="id >= 1290"))
    assert [file.counts.rows for _, file in sorted(found.files.items())] == [0, 10, 500]
    assert [file.counts.filtered for _, file in sorted(found.files.items())] == [100, 290, 0]
    empty = pq.read_table(out / "ds=2026-11-01" / "a.parquet", partitioning=None)
    assert empty.num_rows == 0
    assert empty.schema.names == ["id", "component", "probability", "log_density", "outlier"]


def test_the_bytes_are_the_same_each_time_and_in_any_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = days(tmp_path / "lake")
    score(work_of(data, tmp_path / "a"))
    score(work_of(data, tmp_path / "b", attempt="two"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    monkeypatch.setattr(files, "_GROUP_BYTES", 1000)
    monkeypatch.setattr(stream, "BATCH_ROWS", 10)
    found = score(work_of(data, tmp_path / "c"))
    path = "ds=2026-11-03/a.parquet"
    assert pq.read_metadata(tmp_path / "c" / path).num_row_groups > 5
    assert pq.read_table(tmp_path / "c" / path)["id"].to_pylist() == list(range(2000, 2500))
    assert found.counts.rows == 900


def test_a_file_with_its_record_is_left_as_it_is(tmp_path: Path) -> None:
    data, out = days(tmp_path / "lake"), tmp_path / "out"
    work = work_of(data, out)
    first = score(work)
    stamps = {path: (out / path).stat().st_mtime_ns for path in first.files}
    assert score(work_of(data, out, attempt="two")) == first
    assert {path: (out / path).stat().st_mtime_ns for path in first.files} == stamps


@pytest.mark.parametrize(
    "spoil",
    ["no record", "torn record", "other run", "other device", "no file", "cut file", "other bytes"],
)
def test_without_a_sound_record_a_file_is_written_again(tmp_path: Path, spoil: str) -> None:
    data, out = days(tmp_path / "lake"), tmp_path / "out"
    first, before = score(work_of(data, out)), contents(out)
    path = "ds=2026-11-02/a.parquet"
    record = out / RECORD / f"{path}.json"
    os.utime(out / path, ns=(0, 0))
    match spoil:
        case "no record":
            record.unlink()
        case "torn record":
            lakes.truncate(record, 30)
        case "other run":
            record.write_text(json.dumps(json.loads(record.read_text()) | {"key": "other"}))
        case "other device":
            record.write_text(json.dumps(json.loads(record.read_text()) | {"device": "abacus"}))
        case "no file":
            (out / path).unlink()
        case "cut file":
            lakes.truncate(out / path, 100)
        case "other bytes":
            lakes.corrupt(out / path, start=200, length=8)
            os.utime(out / path, ns=(0, 0))
    assert score(work_of(data, out)) == first
    assert contents(out) == before
    assert (out / path).stat().st_mtime_ns > 0


def test_what_fails_half_way_leaves_no_file(tmp_path: Path) -> None:
    data, out = days(tmp_path / "lake"), tmp_path / "out"
    x = lakes.numbers(500)
    x[450] = np.inf
    lakes.write(data / "ds=2026-11-03" / "a.parquet", {"x": x, "y": x, "id": range(500)})
    work = work_of(data, out)
    with pytest.raises(UserError, match="row 450: column 'x' is inf"):
        score(work)
    assert "ds=2026-11-03/a.parquet" not in contents(out)
    assert not [path for path in out.rglob("*") if path.name.endswith(".part")]


def test_on_s3_it_is_the_same(tmp_path: Path, s3_lake: S3Server) -> None:
    data = days(tmp_path / "lake")
    url = lakes.upload(data, s3_lake.file_system(), f"{s3_lake.url}/lake")
    here = score(work_of(data, tmp_path / "out"))
    there = score(work_of(url, f"{s3_lake.url}/out"))
    assert there == here
    fs, root = open_url(f"{s3_lake.url}/out")
    found = {path: fs.cat_file(f"{root}/{path}") for path in there.files}
    assert found == contents(tmp_path / "out")
    path = "ds=2026-11-02/a.parquet"
    fs.pipe_file(f"{root}/{path}", b"x" * len(found[path]))
    untouched = {
        other: fs.info(f"{root}/{other}")["LastModified"] for other in found.keys() - {path}
    }
    assert score(work_of(url, f"{s3_lake.url}/out")) == here
    assert fs.cat_file(f"{root}/{path}") == found[path]
    for other, modified in untouched.items():
        assert fs.info(f"{root}/{other}")["LastModified"] == modified


@pytest.mark.parametrize("n", [1, 2, 3, 7, 40, 101])
def test_ranges_of_files_are_of_like_size(n: int) -> None:
    sizes = [(i + 1) ** 2 for i in range(n)]
    order = spread(sizes)
    assert sorted(order) == list(range(n))
    if n == 101:
        edges = [0, 25, 50, 75, 101]
        shares = [sum(sizes[i] for i in order[a:b]) for a, b in itertools.pairwise(edges)]
        assert max(shares) < 1.4 * min(shares)

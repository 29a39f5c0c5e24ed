"""Rows of a shard: decoded once, bad values named; real Parquet files."""

from __future__ import annotations

import re

import lakes
import numpy as np
import pyarrow as pa
import pytest

from gmm_dist.errors import UserError
from gmm_dist.lake import read
from gmm_dist.lake.plan import plan_lake
from gmm_dist.lake.probe import probe
from gmm_dist.lake.read import RowCounts

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def nothing_cached():
    read.release()


def test_shards_of_one_row_group_decode_it_once(tmp_path, monkeypatch):
    path = lakes.write(tmp_path / "a.parquet", {"x": lakes.numbers(1600)})
    plan = plan_lake(str(path), n_shards=16)
    assert {part.row_group for shard in plan.shards for part in shard} == {0}
    decoded = []
    original = lakes.pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        lakes.pq.ParquetFile,
        "read_row_group",
        lambda *args, **options: decoded.append(args) or original(*args, **options),
    )
    X, _, _ = lakes.read_all(plan)
    assert len(decoded) == 1
    np.testing.assert_array_equal(X[:, 0], lakes.numbers(1600))
    assert read._last_decoded._entry is None  # nothing left behind once its last row is read
    next(read.read(plan, 0))
    assert read._last_decoded._entry is not None
    read.release()
    assert read._last_decoded._entry is None


def test_corrupt_pages_are_found_when_they_are_read(tmp_path):
    path = lakes.write(tmp_path / "a.parquet", {"x": lakes.numbers(1000)})
    lakes.corrupt(path, start=4, length=64)
    plan = plan_lake(str(tmp_path))
    with pytest.raises(UserError, match=rf"{path}: cannot be read as Parquet \(.*\); write the"):
        lakes.read_all(plan)


# --- missing, infinite and negative values


def bad_rows(tmp_path, **columns):
    """Two row groups of 5 rows; bad values are put into the second."""
    values = {
        "x": lakes.numbers(10),
        "y": lakes.numbers(10, 1),
        "w": np.ones(10),
        "i": np.arange(10),
    }
    for name, (row, value) in columns.items():
        values[name] = [*values[name][:row], value, *values[name][row + 1 :]]
    lakes.write(tmp_path / "a.parquet", values, rows_per_group=5)
    return str(tmp_path)


@pytest.mark.parametrize(("value", "text"), [(NAN, "NaN"), (None, "null")])
def test_a_missing_value_is_an_error_that_names_the_first(tmp_path, value, text):
    url = bad_rows(tmp_path, y=(7, value), x=(8, value))
    message = (
        f"{tmp_path}/a.parquet, row group 1, row 2: column 'y' is {text}; "
        'pass missing="drop" or impute such rows first'
    )
    for n_shards in (1, 3, 10):
        # Under a filter by row, which may leave nulls out, planning does not ask for them.
        plan = plan_lake(url, columns=["x", "y"], n_shards=n_shards, where="i >= 0")
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            lakes.read_all(plan)


def test_a_row_in_a_message_is_counted_before_the_filter(tmp_path):
    url = bad_rows(tmp_path, y=(8, NAN))
    with pytest.raises(UserError, match="row group 1, row 3: column 'y' is NaN"):
        lakes.read_all(plan_lake(url, columns=["x", "y"], where="i >= 7"))
    X, _, counts = lakes.read_all(plan_lake(url, columns=["x", "y"], where="i != 8"))
    assert len(X) == 9
    assert counts == RowCounts(read=10, filtered=1)


def test_rows_with_missing_values_can_be_dropped(tmp_path):
    url = bad_rows(tmp_path, x=(2, None), y=(7, NAN), w=(3, 5.0))
    plan = plan_lake(url, columns=["x", "y"], weight_column="w", missing="drop", n_shards=3)
    X, weight, counts = lakes.read_all(plan)
    keep = np.delete(np.arange(10), [2, 7])
    np.testing.assert_array_equal(
        X, np.stack([lakes.numbers(10), lakes.numbers(10, 1)], axis=1)[keep]
    )
    assert weight.tolist() == [1, 1, 5, 1, 1, 1, 1, 1]
    assert counts == RowCounts(read=10, dropped=2)
    for part in read.read(plan, 0):
        assert part.X.T.flags.c_contiguous


def test_missing_values_can_be_filled(tmp_path):
    url = bad_rows(tmp_path, x=(2, None), y=(2, NAN))
    plan = plan_lake(url, columns=["x", "y"], missing="mean", n_shards=3)
    X, _, counts = lakes.read_all(plan)
    assert np.isnan(X).sum() == 2
    assert counts == RowCounts(read=10, imputed=2)
    X, _, counts = lakes.read_all(plan, fill=np.array([7.0, 8.0]))
    assert X[2].tolist() == [7.0, 8.0]
    assert counts == RowCounts(read=10, imputed=2)
    assert np.isfinite(X).all()


def test_held_out_rows_are_marked_after_the_filter_and_the_dropped(tmp_path):
    url = bad_rows(tmp_path, x=(2, None), y=(7, NAN), w=(3, 5.0))
    options = {"columns": ["i", "x", "y"], "weight_column": "w"}
    whole = plan_lake(url, **options, missing="mean", holdout=0.5)
    held = lakes.held_out(whole)
    assert 2 in held  # of this path and share: a dropped row among them
    assert whole.files[0].path == "a.parquet"
    for n_shards in (1, 3):
        plan = plan_lake(
            url, **options, missing="drop", where="i != 4", holdout=0.5, n_shards=n_shards
        )
        X, weight, counts = lakes.read_all(plan)
        assert X[:, 0].tolist() == [0, 1, 3, 5, 6, 8, 9]  # all are handed out, to be told apart
        assert weight.tolist() == [1, 1, 5, 1, 1, 1, 1]
        left = held - {2, 4, 7}
        assert lakes.held_out(plan) == left
        assert counts == RowCounts(read=10, filtered=1, dropped=2, held_out=len(left))
    assert next(read.read(plan_lake(url, **options, missing="mean"), 0)).held_out is None


def test_rows_of_zero_weight_are_left_out_and_counted(tmp_path):
    x = np.arange(10.0)
    weight = np.array([1, 0, 2, 0, 0, 1, 1, 1, 1, 0])
    far = np.where(weight == 0, 1e9, x)
    url = str(lakes.write(tmp_path / "a.parquet", {"x": far, "w": weight}, rows_per_group=4))
    plan = plan_lake(url, weight_column="w", columns=["x"], n_shards=2, holdout=0.4)
    X, left, counts = lakes.read_all(plan)
    assert X[:, 0].tolist() == x[weight > 0].tolist()
    assert left.tolist() == weight[weight > 0].tolist()
    held = [plan.held_out(part) for shard in plan.shards for part in shard]
    expected = int((np.concatenate(held) & (weight > 0)).sum())
    assert counts == RowCounts(read=10, absent=4, held_out=expected)
    assert probe(plan).max() == x[weight > 0].max()


@pytest.mark.parametrize("missing", ["error", "drop", "mean"])
@pytest.mark.parametrize(("value", "text"), [(INF, "inf"), (-INF, "-inf")])
def test_an_infinite_value_is_always_an_error(tmp_path, missing, value, text):
    url = bad_rows(tmp_path, y=(6, value))
    plan = plan_lake(url, columns=["x", "y"], missing=missing)
    message = f"a.parquet, row group 1, row 1: column 'y' is {text}; impute such rows first, or"
    with pytest.raises(UserError, match=message):
        lakes.read_all(plan, fill=np.zeros(2))
    assert len(lakes.read_all(plan_lake(url, columns=["x", "y"], where="i != 6"))[0]) == 9


@pytest.mark.parametrize(
    ("value", "text"), [(None, "null"), (NAN, "NaN"), (INF, "inf"), (-1.0, "-1")]
)
def test_a_bad_weight_is_an_error(tmp_path, value, text):
    url = bad_rows(tmp_path, w=(6, value))
    message = f"a.parquet, row group 1, row 1: weight 'w' is {text}; weights are finite and not"
    for missing in ("error", "drop"):
        with pytest.raises(UserError, match=message):
            lakes.read_all(plan_lake(url, columns=["x"], weight_column="w", missing=missing))


def test_embeddings_keep_their_rows_over_nulls_and_cuts(tmp_path):
    rows = [[float(i), None if i == 4 else i + 0.5] for i in range(12)]
    rows[7] = None
    lists = pa.array(rows, pa.list_(pa.float32(), 2))
    lakes.write(tmp_path / "a.parquet", {"emb": lists, "i": range(12)}, rows_per_group=9)
    for n_shards in (1, 5):
        plan = plan_lake(str(tmp_path), missing="mean", n_shards=n_shards)
        X, _, counts = lakes.read_all(plan)
        assert counts == RowCounts(read=12, imputed=3)
        assert np.flatnonzero(np.isnan(X).any(axis=1)).tolist() == [4, 7]
        expected = [row for i, row in enumerate(rows) if i not in (4, 7)]
        assert np.delete(X, [4, 7], axis=0).tolist() == expected
    with pytest.raises(UserError, match=r"row group 0, row 4: column 'emb\[1\]' is null"):
        lakes.read_all(plan_lake(str(tmp_path), n_shards=5, where="i >= 0"))
    assert len(lakes.read_all(plan_lake(str(tmp_path), missing="drop", n_shards=5))[0]) == 10


def test_a_column_of_nothing_but_null_is_missing(tmp_path):
    lakes.write(tmp_path / "a.parquet", {"x": [1.0]})
    lakes.write(tmp_path / "b.parquet", {"x": pa.nulls(2)})
    with pytest.raises(UserError, match=r"b\.parquet, row group 0, row 0: column 'x' is null"):
        lakes.read_all(plan_lake(str(tmp_path)))

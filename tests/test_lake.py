"""Planning and reading: real Parquet files, local and on a real S3 server."""

from __future__ import annotations

import datetime as dt
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import lakes
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gmm_dist import lake
from gmm_dist.errors import UserError
from gmm_dist.lake import RowCounts, RowRange

NAN, INF = float("nan"), float("inf")


def read_all(plan, **options):
    """Return all rows in plan order, their weights and the counts."""
    parts = [part for shard in range(plan.n_shards) for part in lake.read(plan, shard, **options)]
    X = np.concatenate([np.empty((0, plan.n_features)), *(part.X for part in parts)])
    weights = [part.sample_weight for part in parts if part.sample_weight is not None]
    weight = np.concatenate(weights) if weights else None
    return X, weight, sum((part.counts for part in parts), RowCounts())


def numbers(n, seed=0):
    return np.random.default_rng(seed).normal(size=n)


@pytest.fixture(autouse=True)
def nothing_cached():
    lake.release()


@pytest.fixture
def two_files(tmp_path):
    """Two files under hive keys with row groups of 7; rows are numbered by column `i`."""
    for day, first in (("2026-11-01", 0), ("2026-11-02", 25)):
        i = np.arange(first, first + 25)
        columns = {"x": i * 1.5, "y": (i * 2).astype(np.float32), "i": i}
        lakes.write(tmp_path / f"dt={day}" / "a.parquet", columns, rows_per_group=7)
    return tmp_path


# --- sharding


@given(
    groups=st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=4),
    n_shards=st.integers(1, 40),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_number_of_shards_reads_the_rows_that_arrow_reads(tmp_path, groups, n_shards):
    shutil.rmtree(tmp_path / "lake", ignore_errors=True)
    first = 0
    for number, sizes in enumerate([[3], *groups]):
        path = tmp_path / "lake" / f"{number}.parquet"
        path.parent.mkdir(exist_ok=True)
        schema = pa.schema([("x", pa.float64()), ("y", pa.float32()), ("w", pa.int32())])
        with lakes.pq.ParquetWriter(path, schema) as writer:
            for size in sizes:
                i = np.arange(first, first + size)
                first += size
                table = pa.table({"x": i / 3, "y": i * 2.0, "w": i}).cast(schema)
                writer.write_table(table, row_group_size=max(size, 1))
    plan = lake.plan(str(tmp_path / "lake"), weight_column="w", n_shards=n_shards)
    X, weight, counts = read_all(plan)
    table = ds.dataset(tmp_path / "lake").to_table()
    np.testing.assert_array_equal(X, np.stack([table["x"], table["y"]], axis=1))
    np.testing.assert_array_equal(weight, table["w"])
    assert counts == RowCounts(read=first)
    assert plan.n_rows == first
    sizes = [sum(part.stop - part.start for part in shard) for shard in plan.shards]
    assert len(sizes) == n_shards
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("n_rows", "expected"),
    [
        (1, 1),
        (16_383, 1),
        (16_384, 2),
        (32_767, 2),
        (64 * 8192 - 1, 32),
        (64 * 8192, 64),
        (64 * 2**20, 64),
        (64 * 2**20 + 1, 128),
        (2**30, 1024),
        (2**34, 1024),
    ],
)
def test_the_number_of_shards_depends_on_the_rows_alone(n_rows, expected):
    assert len(lake._deal([RowRange(0, 0, 0, n_rows)], None)) == expected


def test_a_shard_may_begin_and_end_within_a_row_group(two_files):
    plan = lake.plan(str(two_files), n_shards=8)
    assert plan.shards[1] == (RowRange(0, 0, 6, 7), RowRange(0, 1, 0, 5))
    assert [len(shard) for shard in lake.plan(str(two_files), n_shards=60).shards].count(0) == 10


def test_no_shards_is_refused(two_files):
    with pytest.raises(UserError, match="0 shards; at least one is needed"):
        lake.plan(str(two_files), n_shards=0)


def test_shards_of_one_row_group_decode_it_once(tmp_path, monkeypatch):
    path = lakes.write(tmp_path / "a.parquet", {"x": numbers(1600)})
    plan = lake.plan(str(path), n_shards=16)
    assert {part.row_group for shard in plan.shards for part in shard} == {0}
    decoded = []
    original = lakes.pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        lakes.pq.ParquetFile,
        "read_row_group",
        lambda *args, **options: decoded.append(args) or original(*args, **options),
    )
    X, _, _ = read_all(plan)
    assert len(decoded) == 1
    np.testing.assert_array_equal(X[:, 0], numbers(1600))
    assert lake._last_decoded._entry is None  # nothing left behind once its last row is read
    next(lake.read(plan, 0))
    assert lake._last_decoded._entry is not None
    lake.release()
    assert lake._last_decoded._entry is None


# --- the plan is a value


def test_the_plan_is_a_small_value_that_travels(two_files):
    plan = lake.plan(str(two_files), where="i >= 3 and dt <= '2026-11-02'", weight_column="i")
    again = lake.plan(str(two_files), where="dt <= '2026-11-02' and i >= 3", weight_column="i")
    assert plan == again
    assert len(plan.hash) == 64
    travelled = pickle.loads(pickle.dumps(plan))
    assert travelled == plan
    np.testing.assert_array_equal(read_all(travelled)[0], read_all(plan)[0])
    assert len(pickle.dumps(plan)) < 3000


def test_the_hash_is_the_same_in_another_process_and_by_another_spelling(two_files):
    plan = lake.plan(str(two_files))
    code = "from gmm_dist import lake; print(lake.plan('./').hash)"
    environment = os.environ | {
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": str(Path(lake.__file__).parents[1]),
    }
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=two_files,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == plan.hash
    assert lake.plan(f"file://{two_files}").hash == plan.hash


@pytest.mark.parametrize(
    "options",
    [
        {"columns": ["x"]},
        {"columns": ["y", "x"]},
        {"weight_column": "i"},
        {"where": "i > 3"},
        {"missing": "drop"},
        {"n_shards": 3},
    ],
)
def test_the_hash_changes_with_every_setting(two_files, options):
    assert lake.plan(str(two_files), **options).hash != lake.plan(str(two_files)).hash


def test_the_hash_changes_with_a_file(two_files):
    before = lake.plan(str(two_files)).hash
    path = two_files / "dt=2026-11-01" / "a.parquet"
    os.utime(path, ns=(1, 1))
    assert lake.plan(str(two_files)).hash != before


# --- which files


def test_only_data_files_of_a_folder_are_read(two_files):
    good = lake.plan(str(two_files))
    for name in ("_SUCCESS", "_metadata", ".a.parquet.crc", "notes.txt", "empty.parquet"):
        (two_files / name).touch()
    for name in ("_temporary/b.parquet", ".hidden/b.parquet", "dt=2026-11-01/_b.parquet"):
        lakes.write(two_files / name, {"x": [NAN], "y": [INF], "i": [-1]})
    assert lake.plan(str(two_files)) == good


def test_one_file_is_a_lake_whatever_its_name(tmp_path):
    path = lakes.write(tmp_path / "_part-7", {"x": numbers(5)})
    plan = lake.plan(str(path))
    assert [file.path for file in plan.files] == ["_part-7"]
    np.testing.assert_array_equal(read_all(plan)[0][:, 0], numbers(5))


def test_a_linked_file_is_read(tmp_path):
    target = lakes.write(tmp_path / "elsewhere" / "a.parquet", {"x": numbers(5)})
    (tmp_path / "lake").mkdir()
    (tmp_path / "lake" / "a.parquet").symlink_to(target)
    assert lake.plan(str(tmp_path / "lake")).n_rows == 5


def test_a_linked_folder_is_refused_and_not_passed_over(two_files, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    lakes.write(elsewhere / "a.parquet", {"x": numbers(5)})
    (two_files / "dt=2026-11-03").symlink_to(elsewhere)
    with pytest.raises(UserError, match=r"/dt=2026-11-03: a link to a folder, which is not fol"):
        lake.plan(str(two_files))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_delta_log/00000000000000000000.json", "a Delta"),
        ("events/_delta_log/00000000000000000000.json", "a Delta"),
        ("metadata/00001-abc.metadata.json", "an Iceberg"),
        (".hoodie/hoodie.properties", "a Hudi"),
    ],
)
def test_a_table_format_is_refused(two_files, name, kind):
    (two_files / name).parent.mkdir(parents=True)
    (two_files / name).write_text("{}")
    message = rf"{kind} table \({re.escape(name)}\), whose folder also holds deleted rows; export"
    with pytest.raises(UserError, match=message):
        lake.plan(str(two_files))


def test_hive_keys_have_types_and_nulls(tmp_path):
    for folder in ("year=2026/city=New%20York", "year=007/city=__HIVE_DEFAULT_PARTITION__"):
        lakes.write(tmp_path / folder / "a.parquet", {"x": [1.0]})
    plan = lake.plan(str(tmp_path))
    assert [file.partition for file in plan.files] == [
        (("year", 7), ("city", None)),
        (("year", 2026), ("city", "New York")),
    ]
    assert plan.feature_names == ("x",)


# --- which columns


def test_features_are_by_default_the_floating_point_columns_in_order(tmp_path):
    columns = {
        "n": [1, 2],
        "b": pa.array([1, 2], pa.float32()),
        "s": ["u", "v"],
        "a": pa.array(np.array([1, 2], np.float16)),
        "w": [1.0, 2.0],
        "year": [1.0, 2.0],
        "e": lakes.embeddings(np.ones((2, 3))),
    }
    lakes.write(tmp_path / "year=1" / "a.parquet", columns)
    plan = lake.plan(str(tmp_path), weight_column="w")
    assert plan.columns == plan.feature_names == ("b", "a")
    assert plan.n_features == 2
    assert read_all(plan)[1].tolist() == [1.0, 2.0]


def test_an_embedding_is_the_default_when_no_column_is_floating(tmp_path):
    columns = {"id": [1, 2], "emb": lakes.embeddings(np.arange(6.0).reshape(2, 3))}
    plan = lake.plan(str(lakes.write(tmp_path / "a.parquet", columns)))
    assert plan.columns == ("emb",)
    assert plan.feature_names == ("emb[0]", "emb[1]", "emb[2]")
    assert read_all(plan)[0].tolist() == [[0, 1, 2], [3, 4, 5]]


NUMERIC = [
    (pa.array([1, 2], pa.float32()), False),
    (pa.array(np.array([1, 2], np.float16)), False),
    (pa.array([1, 2], pa.int16()), False),
    (pa.array([1, 2], pa.uint8()), False),
    (pa.array([1, 2], pa.float64()), True),
    (pa.array([1, 2], pa.int32()), True),
    (pa.array([1, 2**60 + 1], pa.int64()), True),
    (pa.array([1, 2**64 - 1], pa.uint64()), True),
    (pa.array([Decimal("1.25"), Decimal("-2.50")]), True),
    (lakes.embeddings([[1, 2], [3, 4]], type_=pa.float32()), False),
    (lakes.embeddings([[1, 2], [3, 4]], type_=pa.float64()), True),
    (lakes.embeddings([[1, 2], [3, 4]], type_=pa.int8()), False),
]


@pytest.mark.parametrize(
    ("column", "wide"), NUMERIC, ids=lambda value: str(getattr(value, "type", value))
)
def test_every_numeric_type_is_read_exactly(tmp_path, column, wide):
    plan = lake.plan(str(lakes.write(tmp_path / "a.parquet", {"c": column})), columns=["c"])
    (rows,) = lake.read(plan, 0)
    assert plan.float64_source is wide
    assert rows.X.dtype == (np.float64 if wide else np.float32)
    assert rows.X.T.flags.c_contiguous
    expected = np.array([np.atleast_1d(value) for value in column.to_pylist()], np.float64)
    np.testing.assert_array_equal(rows.X, expected)


def test_columns_are_unified_by_name_over_files(tmp_path):
    lakes.write(tmp_path / "a.parquet", {"x": pa.array([1, 2], pa.int32()), "y": [1.0, 2.0]})
    columns = {"extra": ["u"], "y": pa.array([3], pa.float32()), "x": [2.5]}
    lakes.write(tmp_path / "b.parquet", columns)
    plan = lake.plan(str(tmp_path))
    assert plan.columns == ("x", "y")
    assert read_all(plan)[0].tolist() == [[1, 1], [2, 2], [2.5, 3]]


def test_a_wider_type_in_any_file_makes_the_source_float64(tmp_path):
    lakes.write(tmp_path / "a.parquet", {"x": pa.array([1], pa.float32())})
    assert not lake.plan(str(tmp_path)).float64_source
    lakes.write(tmp_path / "b.parquet", {"x": pa.array([2**24 + 1], pa.int64())})
    plan = lake.plan(str(tmp_path))
    assert plan.float64_source
    assert read_all(plan)[0][-1] == 2**24 + 1


def test_only_needed_columns_are_read(two_files):
    plan = lake.plan(str(two_files), columns=["x"], where="dt > '2026-11-01' and i > 3")
    assert plan.read_columns == ("x", "i")
    assert plan.schema.names == ["x", "i"]


BAD_COLUMNS = [
    ({}, {"columns": ["nope"]}, "a.parquet: no column 'nope' among 'x', 's', .*; name the feat"),
    ({}, {"columns": []}, "no feature columns were named; name at least one with --columns"),
    ({}, {"columns": ["x", "x"]}, "feature column 'x' is named twice; name it once"),
    ({}, {"columns": ["s"]}, "a.parquet: feature column 's' has type string; name numeric col"),
    ({}, {"columns": ["t"]}, "feature column 't' has type bool; name numeric columns"),
    ({}, {"columns": ["l"]}, "feature column 'l' has type list<.*; write it as a fixed-size"),
    ({}, {"columns": ["e", "x"]}, "feature column 'e' has type fixed_size_list.* alone"),
    ({}, {"columns": ["k"]}, "'k' is a hive key of the path, not a column .*; use it in --where"),
    ({}, {"weight_column": "nope"}, "no column 'nope' among .*; name another weight column"),
    ({}, {"weight_column": "s"}, "weight column 's' has type string; name a numeric column"),
    ({}, {"columns": ["x"], "weight_column": "x"}, "column 'x' is a feature and the weight"),
    ({}, {"where": "nope > 1"}, "filter: no column 'nope'; columns are x, s, t, l, e, k; cor"),
    ({}, {"where": "x > 'a'"}, "filter: column 'x' has type double, which 'a' is not"),
    ({}, {"where": "k > 'a'"}, "filter: column 'k' has type int64, which 'a' is not"),
    ({"x": ["u"]}, {}, r"b.parquet: column 'x' has type string, but double in .*a.parquet; mend"),
    ({"x": ["u"]}, {"columns": ["e"], "where": "x > 1"}, "string, but double .* of the filter"),
    ({"s": [1.0]}, {}, "b.parquet: column 's' has type double, but string in .*a.parquet"),
    ({"z": [1.0]}, {}, "a.parquet: no column 'z' among .*; name the feature columns with --col"),
    ({"x": None}, {}, "b.parquet: no column 'x' among 's', "),
    ({"e": [[1.0, 2]]}, {"columns": ["e"]}, "b.parquet: column 'e' has type list.*, but fixed_"),
    (
        {"e": lakes.embeddings([[1.0, 2, 3]])},
        {"columns": ["e"]},
        "b.parquet: column 'e' has embedding width 3, but 2 in .*a.parquet; mend the files",
    ),
]


@pytest.mark.parametrize(("changes", "options", "message"), BAD_COLUMNS)
def test_an_unfit_column_is_refused(tmp_path, changes, options, message):
    columns = {
        "x": [1.0],
        "s": ["u"],
        "t": [True],
        "l": [[1.0, 2.0]],
        "e": lakes.embeddings([[1.0, 2.0]]),
    }
    lakes.write(tmp_path / "k=1" / "a.parquet", columns)
    other = {name: value for name, value in (columns | changes).items() if value is not None}
    lakes.write(tmp_path / "k=1" / "b.parquet", other)
    with pytest.raises(UserError, match=message) as caught:
        lake.plan(str(tmp_path), **options)
    assert "\n" not in str(caught.value)


def test_a_column_that_occurs_twice_in_a_file_is_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array([1.0])] * 3, names=["x", "x", "y"])
    lakes.write(tmp_path / "a.parquet", table)
    with pytest.raises(UserError, match=r"a\.parquet: column 'x' occurs twice; mend the files"):
        lake.plan(str(tmp_path))
    assert read_all(lake.plan(str(tmp_path), columns=["y"]))[0].tolist() == [[1.0]]


@pytest.mark.parametrize("n_lists", [0, 2])
def test_no_default_feature_is_an_error(tmp_path, n_lists):
    columns = {"id": [1]} | {f"e{i}": lakes.embeddings([[1.0]]) for i in range(n_lists)}
    lakes.write(tmp_path / "a.parquet", columns)
    message = f"no floating-point column and {n_lists} fixed-size-list columns among 'id'"
    with pytest.raises(UserError, match=message):
        lake.plan(str(tmp_path))


# --- the filter


@pytest.mark.parametrize(
    ("where", "files", "rows", "kept"),
    [
        ("dt == '2026-11-02'", 1, 25, range(25, 50)),
        ("dt > '2026-11-01' and i < 30", 1, 7, range(25, 30)),
        ("10 <= i < 12", 2, 7, range(10, 12)),
        ("x == 15 and y > 0.5", 2, 7, range(10, 11)),
        ("i != 3", 2, 50, [i for i in range(50) if i != 3]),
        ("dt != 'x'", 2, 50, range(50)),
    ],
)
def test_a_filter_leaves_out_files_row_groups_and_rows(two_files, where, files, rows, kept):
    plan = lake.plan(str(two_files), columns=["i"], where=where, n_shards=3)
    X, _, counts = read_all(plan)
    assert (len(plan.files), plan.n_rows) == (files, rows)
    assert X[:, 0].tolist() == list(kept)
    assert counts == RowCounts(read=rows, filtered=rows - len(kept))


def test_a_filter_on_dates_and_nulls(tmp_path):
    days = [dt.date(2026, 11, day) for day in (1, 2)]
    columns = {"x": numbers(4), "day": [*days, None, days[1]], "v": [1.0, NAN, 1.0, None]}
    path = str(lakes.write(tmp_path / "a.parquet", columns))
    kept = read_all(lake.plan(path, columns=["x"], where="day >= '2026-11-02'"))[0]
    assert kept[:, 0].tolist() == numbers(4)[[1, 3]].tolist()
    kept = read_all(lake.plan(path, columns=["x"], where="v != 5"))[0]
    assert kept[:, 0].tolist() == numbers(4)[[0, 2]].tolist()


def test_a_null_hive_key_and_a_column_that_a_file_lacks_do_not_match(tmp_path):
    lakes.write(tmp_path / "k=__HIVE_DEFAULT_PARTITION__" / "a.parquet", {"x": [1.0]})
    lakes.write(tmp_path / "k=2" / "a.parquet", {"x": [2.0]})
    lakes.write(tmp_path / "k=2" / "b.parquet", {"x": [3.0], "added": [3]})
    assert read_all(lake.plan(str(tmp_path), where="k != 1"))[0].tolist() == [[2.0], [3.0]]
    assert read_all(lake.plan(str(tmp_path), where="added != 1"))[0].tolist() == [[3.0]]


def test_a_filter_compares_in_the_type_of_all_files(tmp_path):
    lakes.write(tmp_path / "a.parquet", {"x": numbers(3), "n": pa.array([1, 2, 3], pa.int8())})
    lakes.write(tmp_path / "b.parquet", {"x": numbers(3), "n": [1, 2, 300]})
    plan = lake.plan(str(tmp_path), columns=["n"], where="n >= 3")
    assert read_all(plan)[0].tolist() == [[3], [300]]


def test_the_path_decides_on_a_column_that_is_also_a_hive_key(tmp_path):
    lakes.write(tmp_path / "k=1" / "a.parquet", {"x": [1.0], "k": pa.array([7], pa.int32())})
    assert lake.plan(str(tmp_path), where="k == 1").n_rows == 1


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("dt == '1999-01-01'", "no rows match the filter dt == '1999-01-01', by any of 2 files'"),
        ("i > 999", "no rows match the filter i > 999, by the row groups' statistics; widen"),
        ("i = 3", "equality is written '==', not '='"),
    ],
)
def test_a_filter_that_nothing_passes_is_an_error(two_files, where, message):
    with pytest.raises(UserError, match=message):
        lake.plan(str(two_files), where=where)


# --- missing, infinite and negative values


def bad_rows(tmp_path, **columns):
    """Two row groups of 5 rows; bad values are put into the second."""
    values = {"x": numbers(10), "y": numbers(10, 1), "w": np.ones(10), "i": np.arange(10)}
    for name, (row, value) in columns.items():
        values[name] = [*values[name][:row], value, *values[name][row + 1 :]]
    lakes.write(tmp_path / "a.parquet", values, rows_per_group=5)
    return str(tmp_path)


@pytest.mark.parametrize("value", [NAN, None])
def test_a_missing_value_is_an_error_that_names_the_first(tmp_path, value):
    url = bad_rows(tmp_path, y=(7, value), x=(8, value))
    message = (
        f"{tmp_path}/a.parquet, row group 1, row 2: column 'y' is NaN; pass --missing drop or "
        "impute such rows first"
    )
    for n_shards in (1, 3, 10):
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            read_all(lake.plan(url, columns=["x", "y"], n_shards=n_shards))


def test_a_row_in_a_message_is_counted_before_the_filter(tmp_path):
    url = bad_rows(tmp_path, y=(8, NAN))
    with pytest.raises(UserError, match="row group 1, row 3: column 'y' is NaN"):
        read_all(lake.plan(url, columns=["x", "y"], where="i >= 7"))
    X, _, counts = read_all(lake.plan(url, columns=["x", "y"], where="i != 8"))
    assert len(X) == 9
    assert counts == RowCounts(read=10, filtered=1)


def test_rows_with_missing_values_can_be_dropped(tmp_path):
    url = bad_rows(tmp_path, x=(2, None), y=(7, NAN), w=(3, 5.0))
    plan = lake.plan(url, columns=["x", "y"], weight_column="w", missing="drop", n_shards=3)
    X, weight, counts = read_all(plan)
    keep = np.delete(np.arange(10), [2, 7])
    np.testing.assert_array_equal(X, np.stack([numbers(10), numbers(10, 1)], axis=1)[keep])
    assert weight.tolist() == [1, 1, 5, 1, 1, 1, 1, 1]
    assert counts == RowCounts(read=10, dropped=2)
    for part in lake.read(plan, 0):
        assert part.X.T.flags.c_contiguous


def test_missing_values_can_be_filled(tmp_path):
    url = bad_rows(tmp_path, x=(2, None), y=(2, NAN))
    plan = lake.plan(url, columns=["x", "y"], missing="mean", n_shards=3)
    X, _, counts = read_all(plan)
    assert np.isnan(X).sum() == 2
    assert counts == RowCounts(read=10, imputed=2)
    X, _, counts = read_all(plan, fill=np.array([7.0, 8.0]))
    assert X[2].tolist() == [7.0, 8.0]
    assert counts == RowCounts(read=10, imputed=2)
    assert np.isfinite(X).all()


@pytest.mark.parametrize("missing", ["error", "drop", "mean"])
@pytest.mark.parametrize(("value", "text"), [(INF, "inf"), (-INF, "-inf")])
def test_an_infinite_value_is_always_an_error(tmp_path, missing, value, text):
    url = bad_rows(tmp_path, y=(6, value))
    plan = lake.plan(url, columns=["x", "y"], missing=missing)
    message = f"a.parquet, row group 1, row 1: column 'y' is {text}; impute such rows first, or"
    with pytest.raises(UserError, match=message):
        read_all(plan, fill=np.zeros(2))
    assert len(read_all(lake.plan(url, columns=["x", "y"], where="i != 6"))[0]) == 9


@pytest.mark.parametrize(
    ("value", "text"), [(None, "NaN"), (NAN, "NaN"), (INF, "inf"), (-1.0, "-1")]
)
def test_a_bad_weight_is_an_error(tmp_path, value, text):
    url = bad_rows(tmp_path, w=(6, value))
    message = f"a.parquet, row group 1, row 1: weight 'w' is {text}; weights are finite and not"
    for missing in ("error", "drop"):
        with pytest.raises(UserError, match=message):
            read_all(lake.plan(url, columns=["x"], weight_column="w", missing=missing))


def test_embeddings_keep_their_rows_over_nulls_and_cuts(tmp_path):
    rows = [[float(i), None if i == 4 else i + 0.5] for i in range(12)]
    rows[7] = None
    lists = pa.array(rows, pa.list_(pa.float32(), 2))
    lakes.write(tmp_path / "a.parquet", {"emb": lists}, rows_per_group=9)
    for n_shards in (1, 5):
        plan = lake.plan(str(tmp_path), missing="mean", n_shards=n_shards)
        X, _, counts = read_all(plan)
        assert counts == RowCounts(read=12, imputed=3)
        assert np.flatnonzero(np.isnan(X).any(axis=1)).tolist() == [4, 7]
        expected = [row for i, row in enumerate(rows) if i not in (4, 7)]
        assert np.delete(X, [4, 7], axis=0).tolist() == expected
    with pytest.raises(UserError, match=r"row group 0, row 4: column 'emb\[1\]' is NaN"):
        read_all(lake.plan(str(tmp_path), n_shards=5))
    assert len(read_all(lake.plan(str(tmp_path), missing="drop", n_shards=5))[0]) == 10


def test_embeddings_of_narrower_numbers_or_nothing_but_null_join_the_others(tmp_path):
    lakes.write(tmp_path / "a.parquet", {"e": lakes.embeddings([[1, 2]], type_=pa.float32())})
    lakes.write(tmp_path / "b.parquet", {"e": lakes.embeddings([[0.1, 4]])})
    lakes.write(tmp_path / "c.parquet", {"e": pa.nulls(1)})
    X, _, counts = read_all(lake.plan(str(tmp_path), missing="drop"))
    assert X.tolist() == [[1, 2], [0.1, 4]]
    assert counts == RowCounts(read=3, dropped=1)


def test_a_column_of_nothing_but_null_is_missing(tmp_path):
    lakes.write(tmp_path / "a.parquet", {"x": [1.0]})
    lakes.write(tmp_path / "b.parquet", {"x": pa.nulls(2)})
    with pytest.raises(UserError, match=r"b\.parquet, row group 0, row 0: column 'x' is NaN"):
        read_all(lake.plan(str(tmp_path)))


# --- probing


def test_a_probe_takes_rows_from_all_over_the_plan(tmp_path):
    x = np.arange(40_000.0)
    lakes.write(tmp_path / "a.parquet", {"x": x, "y": x}, rows_per_group=1000)
    X = lake.probe(lake.plan(str(tmp_path)), max_rows=160)
    assert X.shape == (160, 2)
    assert X.dtype == np.float64
    assert X[0, 0] == 0
    assert X[-1, 0] == 39_009
    assert np.isin(X[:, 0], x).all()


def test_a_probe_leaves_out_bad_and_filtered_rows(tmp_path):
    url = bad_rows(tmp_path, x=(0, NAN), y=(1, INF))
    plan = lake.plan(url, columns=["x", "y"], where="i != 2")
    X = lake.probe(plan)
    np.testing.assert_array_equal(X[:, 0], numbers(10)[3:])
    assert lake.probe(plan, max_rows=4).shape == (4, 2)
    assert lake.probe(plan, max_rows=1).shape == (1, 2)


def test_a_probe_may_find_nothing(tmp_path):
    lakes.write(tmp_path / "a.parquet", {"x": [NAN, 1.0], "i": [1, 3]})
    assert lake.probe(lake.plan(str(tmp_path), where="i <= 2")).shape == (0, 1)


# --- what is wrong with a lake


def test_a_missing_path_is_an_error(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/nope: no such file or folder; check the"):
        lake.plan(f"{tmp_path}/nope")


def test_a_folder_without_parquet_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no Parquet file .* among 0 files \(found nothing\)"):
        lake.plan(str(tmp_path))
    (tmp_path / "a.csv").write_text("x\n1\n")
    with pytest.raises(UserError, match=r"no Parquet file .* among 1 files \(found a\.csv\)"):
        lake.plan(str(tmp_path))


def test_no_rows_at_all_is_an_error(tmp_path):
    for name in ("a", "b"):
        lakes.write(tmp_path / f"{name}.parquet", {"x": pa.array([], pa.float64())})
    with pytest.raises(UserError, match=f"{tmp_path}: no rows in 2 Parquet files; check the path"):
        lake.plan(str(tmp_path))


@pytest.mark.parametrize("size", [1, 8, 300, -1])
def test_a_truncated_file_is_named(tmp_path, size):
    lakes.write(tmp_path / "a.parquet", {"x": numbers(1000)})
    path = lakes.write(tmp_path / "b.parquet", {"x": numbers(1000)})
    lakes.truncate(path, size)
    message = rf"{path}: cannot be read as Parquet \(.*\); write the file again or move it away"
    with pytest.raises(UserError, match=message) as caught:
        lake.plan(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_corrupt_pages_are_found_when_they_are_read(tmp_path):
    path = lakes.write(tmp_path / "a.parquet", {"x": numbers(1000)})
    lakes.corrupt(path, start=4, length=64)
    plan = lake.plan(str(tmp_path))
    with pytest.raises(UserError, match=rf"{path}: cannot be read as Parquet \(.*\); write the"):
        read_all(plan)


def test_a_file_that_changed_since_the_plan_is_an_error(tmp_path):
    path = lakes.write(tmp_path / "a.parquet", {"x": numbers(100)})
    plan = lake.plan(str(tmp_path))
    message = f"{path}: changed since the plan was made; run again"
    lakes.write(path, {"x": numbers(100, seed=1)})
    with pytest.raises(UserError, match=message):
        read_all(plan)
    with pytest.raises(UserError, match=message):
        lake.probe(plan)
    path.unlink()
    with pytest.raises(UserError, match=message):
        read_all(plan)


# --- on S3


def test_a_lake_on_s3_gives_the_same_shards_and_rows(two_files, s3_lake):
    url = lakes.upload(two_files, s3_lake.file_system(), s3_lake.url)
    local = lake.plan(str(two_files), where="i != 3", n_shards=5)
    remote = lake.plan(url, where="i != 3", n_shards=5)
    assert remote.shards == local.shards
    assert remote.schema == local.schema
    assert [f.path for f in remote.files] == [f.path for f in local.files]
    assert lake.plan(f"{url}/", where="i != 3", n_shards=5) == remote
    np.testing.assert_array_equal(read_all(remote)[0], read_all(local)[0])
    np.testing.assert_array_equal(lake.probe(remote), lake.probe(local))


def test_directory_markers_and_hidden_keys_on_s3_are_not_read(two_files, s3_lake):
    fs = s3_lake.file_system()
    url = lakes.upload(two_files, fs, s3_lake.url)
    good = lake.plan(url)
    for marker in ("", "/dt=2026-11-01", "/dt=2026-11-03", "/x.parquet"):
        lakes.put_marker(fs, url + marker)
    for name in ("_SUCCESS", "_temporary/0/a.parquet", "dt=2026-11-01/.a.parquet"):
        fs.pipe_file(fs._strip_protocol(f"{url}/{name}"), b"not parquet")
    assert lake.plan(url) == good
    assert read_all(lake.plan(url))[2] == RowCounts(read=50)


def test_one_file_on_s3_is_a_lake(two_files, s3_lake):
    url = lakes.upload(two_files, s3_lake.file_system(), s3_lake.url)
    plan = lake.plan(f"{url}/dt=2026-11-02/a.parquet")
    assert (plan.url, plan.files[0].path) == (f"{url}/dt=2026-11-02", "a.parquet")
    assert read_all(plan)[2] == RowCounts(read=25)


def test_a_key_that_changed_since_the_plan_is_an_error(two_files, s3_lake):
    fs = s3_lake.file_system()
    url = lakes.upload(two_files, fs, s3_lake.url)
    plan = lake.plan(url)
    key = f"{url}/dt=2026-11-02/a.parquet"
    data = bytearray(fs.cat_file(fs._strip_protocol(key)))
    data[10] ^= 1
    fs.pipe_file(fs._strip_protocol(key), bytes(data))
    message = f"{key}: changed since the plan was made; run again"
    with pytest.raises(UserError, match=message):
        read_all(plan)
    fs.rm_file(fs._strip_protocol(key))
    with pytest.raises(UserError, match=message):
        read_all(plan)


def test_a_key_that_changes_while_it_is_read_is_an_error(tmp_path, s3_lake, monkeypatch):
    monkeypatch.setattr(lake, "_SMALL_BYTES", 0)  # small files are read at once
    fs = s3_lake.file_system()
    path = lakes.write(tmp_path / "a.parquet", {"x": numbers(100)}, rows_per_group=50)
    url = lakes.upload(tmp_path, fs, s3_lake.url)
    rows = lake.read(lake.plan(url), 0)
    next(rows)
    lakes.write(path, {"x": numbers(100, seed=1)}, rows_per_group=50)
    lakes.upload(tmp_path, fs, s3_lake.url)
    with pytest.raises(UserError, match=f"{url}/a.parquet: changed since the plan was made"):
        next(rows)


def test_a_truncated_key_is_named(tmp_path, s3_lake):
    lakes.truncate(lakes.write(tmp_path / "a.parquet", {"x": numbers(1000)}), 500)
    url = lakes.upload(tmp_path, s3_lake.file_system(), s3_lake.url)
    with pytest.raises(UserError, match=f"{url}/a.parquet: cannot be read as Parquet"):
        lake.plan(url)


@pytest.mark.parametrize(
    ("variable", "value"), [("AWS_ACCESS_KEY_ID", "nobody"), ("AWS_SECRET_ACCESS_KEY", "wrong")]
)
def test_wrong_s3_credentials_are_an_error(s3_lake, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=rf"{s3_lake.url}: access denied \(.*\); check the perm"):
        lake.plan(s3_lake.url)


def test_a_missing_bucket_or_prefix_is_an_error(s3_lake):
    with pytest.raises(UserError, match="s3://nobucket/x: the bucket does not exist; check"):
        lake.plan("s3://nobucket/x")
    with pytest.raises(UserError, match=f"{s3_lake.url}/nope: no such file or folder; check"):
        lake.plan(f"{s3_lake.url}/nope")


def test_the_spread_of_shard_sizes_over_many_keys(tmp_path, s3_lake):
    for i in range(40):
        lakes.write(tmp_path / f"{i:02}.parquet", {"x": numbers(11, seed=i)})
    plan = lake.plan(lakes.upload(tmp_path, s3_lake.file_system(), s3_lake.url), n_shards=7)
    assert {sum(p.stop - p.start for p in shard) for shard in plan.shards} == {
        math.floor(440 / 7),
        math.ceil(440 / 7),
    }

"""Columns by name over files, and their types: real Parquet files."""

from __future__ import annotations

from decimal import Decimal

import lakes
import numpy as np
import pyarrow as pa
import pytest

from gmm_dist.errors import UserError
from gmm_dist.lake import read
from gmm_dist.lake.plan import plan_lake
from gmm_dist.lake.read import RowCounts


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
    plan = plan_lake(str(tmp_path), weight_column="w")
    assert plan.columns == plan.feature_names == ("b", "a")
    assert plan.n_features == 2
    assert lakes.read_all(plan)[1].tolist() == [1.0, 2.0]


def test_an_embedding_is_the_default_when_no_column_is_floating(tmp_path):
    columns = {"id": [1, 2], "emb": lakes.embeddings(np.arange(6.0).reshape(2, 3))}
    plan = plan_lake(str(lakes.write(tmp_path / "a.parquet", columns)))
    assert plan.columns == ("emb",)
    assert plan.feature_names == ("emb[0]", "emb[1]", "emb[2]")
    assert lakes.read_all(plan)[0].tolist() == [[0, 1, 2], [3, 4, 5]]


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
    plan = plan_lake(str(lakes.write(tmp_path / "a.parquet", {"c": column})), columns=["c"])
    (rows,) = read.read(plan, 0)
    assert plan.float64_source is wide
    assert rows.X.dtype == (np.float64 if wide else np.float32)
    assert rows.X.T.flags.c_contiguous
    expected = np.array([np.atleast_1d(value) for value in column.to_pylist()], np.float64)
    np.testing.assert_array_equal(rows.X, expected)


def test_columns_are_unified_by_name_over_files(tmp_path):
    lakes.write(tmp_path / "a.parquet", {"x": pa.array([1, 2], pa.int32()), "y": [1.0, 2.0]})
    columns = {"extra": ["u"], "y": pa.array([3], pa.float32()), "x": [2.5]}
    lakes.write(tmp_path / "b.parquet", columns)
    plan = plan_lake(str(tmp_path))
    assert plan.columns == ("x", "y")
    assert lakes.read_all(plan)[0].tolist() == [[1, 1], [2, 2], [2.5, 3]]


def test_embeddings_of_narrower_numbers_or_nothing_but_null_join_the_others(tmp_path):
    lakes.write(tmp_path / "a.parquet", {"e": lakes.embeddings([[1, 2]], type_=pa.float32())})
    lakes.write(tmp_path / "b.parquet", {"e": lakes.embeddings([[0.1, 4]])})
    lakes.write(tmp_path / "c.parquet", {"e": pa.nulls(1)})
    X, _, counts = lakes.read_all(plan_lake(str(tmp_path), missing="drop"))
    assert X.tolist() == [[1, 2], [0.1, 4]]
    assert counts == RowCounts(read=3, dropped=1)


def test_a_wider_type_in_any_file_makes_the_source_float64(tmp_path):
    lakes.write(tmp_path / "a.parquet", {"x": pa.array([1], pa.float32())})
    assert not plan_lake(str(tmp_path)).float64_source
    lakes.write(tmp_path / "b.parquet", {"x": pa.array([2**24 + 1], pa.int64())})
    plan = plan_lake(str(tmp_path))
    assert plan.float64_source
    assert lakes.read_all(plan)[0][-1] == 2**24 + 1


def test_only_needed_columns_are_read(tmp_path):
    plan = plan_lake(
        str(lakes.numbered(tmp_path)), columns=["x"], where="dt > '2026-11-01' and i > 3"
    )
    assert plan.read_columns == ("x", "i")
    assert plan.schema.names == ["x", "i"]


BAD_COLUMNS = [
    ({}, {"columns": ["nope"]}, "a.parquet: no column 'nope' among 'x', 's', .*; name the feat"),
    ({}, {"columns": []}, "no feature columns were named; name at least one with columns"),
    ({}, {"columns": ["x", "x"]}, "feature column 'x' is named twice; name it once"),
    ({}, {"columns": ["s"]}, "a.parquet: feature column 's' has type string; name numeric col"),
    ({}, {"columns": ["t"]}, "feature column 't' has type bool; name numeric columns"),
    ({}, {"columns": ["l", "x"]}, "feature column 'l' has type list<.* lists of numbers alone"),
    ({}, {"columns": ["n"]}, "feature column 'n' has type list<.*string.*; name numeric columns"),
    ({}, {"columns": ["e", "x"]}, "feature column 'e' has type fixed_size_list.* alone"),
    ({}, {"columns": ["k"]}, "'k' is a hive key of the path, not a column .*; use it in where"),
    ({}, {"weight_column": "nope"}, "no column 'nope' among .*; name another weight column"),
    ({}, {"weight_column": "s"}, "weight column 's' has type string; name a numeric column"),
    ({}, {"columns": ["x"], "weight_column": "x"}, "column 'x' is a feature and the weight"),
    ({}, {"where": "nope > 1"}, "filter: no column 'nope'; columns are x, s, t, l, n, e, k; cor"),
    ({}, {"where": "x > 'a'"}, "filter: column 'x' has type double, which 'a' is not"),
    ({}, {"where": "k > 'a'"}, "filter: column 'k' has type int64, which 'a' is not"),
    ({"x": ["u"]}, {}, r"b.parquet: column 'x' has type string, but double in .*a.parquet; mend"),
    ({"x": ["u"]}, {"columns": ["e"], "where": "x > 1"}, "string, but double .* of the filter"),
    ({"s": [1.0]}, {}, "b.parquet: column 's' has type double, but string in .*a.parquet"),
    ({"z": [1.0]}, {}, "a.parquet: no column 'z' among .*; name the feature columns with col"),
    ({"x": None}, {}, "b.parquet: no column 'x' among 's', "),
    ({"e": [["u"]]}, {"columns": ["e"]}, "b.parquet: column 'e' has type list.*, but fixed_"),
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
        "n": [["u"]],
        "e": lakes.embeddings([[1.0, 2.0]]),
    }
    lakes.write(tmp_path / "k=1" / "a.parquet", columns)
    other = {name: value for name, value in (columns | changes).items() if value is not None}
    lakes.write(tmp_path / "k=1" / "b.parquet", other)
    with pytest.raises(UserError, match=message) as caught:
        plan_lake(str(tmp_path), **options)
    assert "\n" not in str(caught.value)


def test_a_column_that_occurs_twice_in_a_file_is_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array([1.0])] * 3, names=["x", "x", "y"])
    lakes.write(tmp_path / "a.parquet", table)
    with pytest.raises(UserError, match=r"a\.parquet: column 'x' occurs twice; mend the files"):
        plan_lake(str(tmp_path))
    assert lakes.read_all(plan_lake(str(tmp_path), columns=["y"]))[0].tolist() == [[1.0]]


@pytest.mark.parametrize("n_lists", [0, 2])
def test_no_default_feature_is_an_error(tmp_path, n_lists):
    columns = {"id": [1]} | {f"e{i}": lakes.embeddings([[1.0]]) for i in range(n_lists)}
    lakes.write(tmp_path / "a.parquet", columns)
    message = rf"no floating-point column and {n_lists} columns of lists of numbers among 'id'.*"
    message += r"; name the feature columns with columns, of the numeric id$"
    with pytest.raises(UserError, match=message):
        plan_lake(str(tmp_path))


def test_a_wide_lake_is_told_of_in_a_short_line(tmp_path, caplog):
    lakes.write(tmp_path / "a.parquet", {f"f{i}": [1.0] for i in range(1200)})
    with caplog.at_level("INFO", "gmm_dist"):
        plan_lake(str(tmp_path))
    assert "1,200 features: f0, f1, " in caplog.text
    assert caplog.text.rstrip().endswith("f11 and 1,188 more")

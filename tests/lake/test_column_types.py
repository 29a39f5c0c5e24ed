"""The common type of two columns: it holds every value, or one line says which two differ."""

from __future__ import annotations

import datetime as dt
import itertools
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import lakes
import numpy as np
import pyarrow as pa
import pytest

from gmm_dist.errors import UserError
from gmm_dist.lake.parquet.column_types import join, without_views
from gmm_dist.lake.plan import plan_lake
from gmm_dist.lake.stream import row_groups, stream

FAR, NEAR = dt.datetime(9999, 12, 31), dt.datetime(2026, 11, 1)

ARRAYS = [
    pa.array([-128, None], pa.int8()),
    pa.array([2**32 - 1], pa.uint32()),
    pa.array([2**63 - 1, -(2**63), None]),
    pa.array([2**53, -5]),
    pa.array([2**64 - 1], pa.uint64()),
    pa.array(np.array([0.5, 65504], np.float16)),
    pa.array([0.1, None], pa.float32()),
    pa.array([0.1, math.inf, None]),
    pa.array([Decimal("1.25"), None], pa.decimal128(4, 2)),
    pa.array([Decimal("0.00001")], pa.decimal128(38, 5)),
    pa.array([Decimal("0.001")], pa.decimal64(12, 3)),
    pa.array([Decimal(10) ** 49], pa.decimal256(50, 0)),
    pa.array([True, None]),
    pa.array(["ä", None]),
    pa.array(["b"], pa.large_string()),
    pa.array(["view", None], pa.string_view()),
    pa.array([b"\xff", None]),
    pa.array([b"v"], pa.binary_view()),
    pa.array([b"xy"], pa.binary(2)),
    pa.array(["a", None, "a"]).dictionary_encode(),
    pa.array([FAR.date(), None]),
    pa.array([NEAR], pa.timestamp("ms")),
    pa.array([FAR, None], pa.timestamp("us")),
    pa.array([NEAR], pa.timestamp("ns")),
    pa.array([NEAR], pa.timestamp("us", "UTC")),
    pa.array([NEAR, None], pa.timestamp("ns", "Asia/Tokyo")),
    pa.array([dt.time(1, 2, 3)], pa.time32("ms")),
    pa.array([dt.time(1, 2, 3, 4)], pa.time64("us")),
    pa.array([dt.timedelta(1)], pa.duration("us")),
    pa.nulls(2),
    pa.array([[1, 2], None, []], pa.list_(pa.int8())),
    pa.array([[0.5], None], pa.large_list(pa.float64())),
    pa.array([[1.0, None], None], pa.list_view(pa.float32())),
    pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2)),
    pa.array([["v"], None], pa.list_(pa.string_view())),
    pa.array([{"a": 1}, None], pa.struct([("a", pa.int8())])),
]


def _plain(value: Any) -> Any:
    """Return a value by which rows of other types are told apart."""
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, dt.datetime) and value.tzinfo is not None:
        return value.astimezone(dt.UTC).replace(tzinfo=None)
    if isinstance(value, dt.date) and not isinstance(value, dt.datetime):
        return dt.datetime.combine(value, dt.time())
    if isinstance(value, str):
        return value.encode()
    return value


def _kept(url: Path) -> list[list[Any]]:
    """Return the values of the kept column, file by file; all of them have one type."""
    plan = plan_lake(str(url), columns=["row"], missing="mean", keep=["c"])
    parts = [
        pa.concat_tables([kept for kept, _ in stream(plan, i, row_groups(plan)[i])])
        for i in range(len(plan.files))
    ]
    assert {part.schema.field("c").type for part in parts} == {plan.schema.field("c").type}
    return [part["c"].to_pylist() for part in parts]


def _kept_or_told(url: Path) -> tuple[list[list[Any]], str | None]:
    try:
        return _kept(url), None
    except UserError as error:
        return [], str(error)


def test_kept_columns_of_any_two_types_are_the_same_values_or_refused(tmp_path: Path) -> None:
    joined = 0
    for number, (a, b) in enumerate(itertools.combinations(ARRAYS, 2)):
        url = tmp_path / str(number)
        for name, column in (("a", a), ("b", b)):
            lakes.write(url / f"{name}.parquet", {"row": np.zeros(len(column)), "c": column})
        came, message = _kept_or_told(url)
        if message is not None:
            assert "\n" not in message
            assert "column 'c'" in message
            assert "a.parquet" in message
            assert "b.parquet" in message or "cannot be written as" in message
            continue
        joined += 1
        assert [list(map(_plain, part)) for part in came] == [
            list(map(_plain, column.to_pylist())) for column in (a, b)
        ], (a.type, b.type)
    assert joined > 100


@pytest.mark.parametrize(
    ("a", "b", "common"),
    [
        (pa.int8(), pa.uint8(), pa.int16()),
        (pa.int64(), pa.uint32(), pa.int64()),
        (pa.int64(), pa.uint64(), pa.decimal128(20, 0)),
        (pa.int16(), pa.float32(), pa.float32()),
        (pa.int16(), pa.float16(), pa.float32()),
        (pa.int32(), pa.float32(), pa.float64()),
        (pa.decimal128(5, 1), pa.decimal128(10, 3), pa.decimal128(10, 3)),
        (pa.decimal128(38, 0), pa.decimal128(5, 5), pa.decimal256(43, 5)),
        (pa.decimal128(4, 2), pa.int64(), pa.decimal128(21, 2)),
        (pa.string(), pa.dictionary(pa.int8(), pa.large_string()), pa.large_string()),
        (pa.string_view(), pa.string(), pa.string()),
        (pa.string(), pa.binary(3), pa.binary()),
        (pa.date32(), pa.timestamp("ms"), pa.timestamp("ms")),
        (pa.timestamp("s", "UTC"), pa.timestamp("ns", "Asia/Tokyo"), pa.timestamp("ns", "UTC")),
        (pa.timestamp("s"), pa.timestamp("s", "UTC"), None),
        (pa.time32("s"), pa.time64("us"), pa.time64("us")),
        (pa.date32(), pa.timestamp("s", "UTC"), None),
        (pa.bool_(), pa.int8(), None),
        (pa.null(), pa.string(), pa.string()),
        (pa.list_(pa.float32(), 2), pa.list_(pa.float64(), 3), None),
        (pa.list_(pa.float32(), 2), pa.list_(pa.float64(), 2), pa.list_(pa.float64(), 2)),
        (pa.list_(pa.float32(), 2), pa.list_(pa.float64()), pa.list_(pa.float64())),
        (pa.list_(pa.string()), pa.list_(pa.int8()), None),
    ],
)
def test_the_common_type_is_the_same_both_ways(
    a: pa.DataType, b: pa.DataType, common: pa.DataType | None
) -> None:
    for found in (join(a, b), join(b, a)):
        assert found == common


def test_texts_of_any_depth_lose_their_views() -> None:
    field = pa.struct([("a", pa.list_(pa.string_view())), ("b", pa.binary_view())])
    bare = pa.struct([("a", pa.list_(pa.large_string())), ("b", pa.large_binary())])
    assert without_views(field) == bare


@pytest.mark.parametrize(
    ("type_", "values"),
    [
        (pa.map_(pa.string_view(), pa.binary_view()), [[("a", b"b")], None, [("c", b"d")]]),
        (pa.list_(pa.string_view(), 1), [["a"], None, ["c"]]),
        (pa.list_(pa.list_(pa.string_view(), 1)), [[["a"]], [], [["c"]]]),
    ],
)
def test_nested_texts_that_are_views_are_filtered_and_kept(
    tmp_path: Path, type_: pa.DataType, values: list[Any]
) -> None:
    lakes.write(tmp_path / "a.parquet", {"row": [0.0, 1.0, 2.0], "c": pa.array(values, type_)})
    plan = plan_lake(str(tmp_path), columns=["row"], missing="mean", keep=["c"], where="row >= 1")
    ((kept, _),) = stream(plan, 0, row_groups(plan)[0])
    assert kept["c"].to_pylist() == values[1:]


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (
            pa.array([2**53 + 1]),
            pa.array([5.0]),
            r"a.parquet: column 'c' has type int64, but double in .*b.parquet, and no type holds "
            r"the values of both; write the files with one type or leave out keep 'c'",
        ),
        (
            pa.array([Decimal("0.1")]),
            pa.array([0.1]),
            r"a.parquet: column 'c' has type decimal128\(1, 1\), but double in .*b.parquet, and no",
        ),
        (
            pa.array([FAR], pa.timestamp("us")),
            pa.array([NEAR], pa.timestamp("ns")),
            r"a.parquet: column 'c' has type timestamp\[us\], but timestamp\[ns\] in .*b.parquet",
        ),
    ],
)
def test_what_would_be_rounded_is_refused_at_planning(
    tmp_path: Path, a: pa.Array, b: pa.Array, message: str
) -> None:
    lakes.write(tmp_path / "a.parquet", {"row": [0.0], "c": a})
    lakes.write(tmp_path / "b.parquet", {"row": [1.0], "c": b})
    with pytest.raises(UserError, match=message) as caught:
        plan_lake(str(tmp_path), columns=["row"], keep=["c"])
    assert "\n" not in str(caught.value)


def test_without_statistics_it_is_refused_when_it_is_read(tmp_path: Path) -> None:
    table = pa.table({"row": [0.0], "c": [2**53 + 1]})
    lakes.pq.write_table(table, tmp_path / "a.parquet", write_statistics=False)
    lakes.write(tmp_path / "b.parquet", {"row": [1.0], "c": [5.0]})
    message = r"a.parquet, row group 0: column 'c' of type int64 cannot be written as double, the"
    with pytest.raises(UserError, match=message):
        _kept(tmp_path)


def test_ids_that_were_floats_because_of_a_null_go_along(tmp_path: Path) -> None:
    lakes.write(tmp_path / "a.parquet", {"row": [0.0], "c": [2**53]})
    lakes.write(tmp_path / "b.parquet", {"row": [1.0, 2.0], "c": [7.0, None]})
    assert _kept(tmp_path) == [[2**53], [7, None]]


def test_texts_that_are_views_are_filtered_and_kept(tmp_path: Path) -> None:
    views = pa.array(["a", "b", None], pa.string_view())
    lakes.write(tmp_path / "a.parquet", {"row": [0.0, 1.0, 2.0], "c": views})
    plan = plan_lake(str(tmp_path), columns=["row"], missing="mean", keep=["c"], where="row >= 1")
    ((kept, X),) = stream(plan, 0, row_groups(plan)[0])
    assert kept["c"].to_pylist() == ["b", None]
    assert X.tolist() == [[1, 2]]

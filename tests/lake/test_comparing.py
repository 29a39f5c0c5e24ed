"""A filter against Python: the same rows pass, whatever the types, the files and their footers."""

from __future__ import annotations

import datetime as dt
import math
import operator
import struct
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import lakes
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gmm_dist.errors import NoRows, UserError
from gmm_dist.lake.filters.text import parse
from gmm_dist.lake.parquet.comparing import DoesNotFit, Passing
from gmm_dist.lake.plan import plan_lake

COMPARE = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
WHOLE = [0, 1, -1, 5, 2**53, 2**53 + 1, 2**53 - 1, -(2**53) - 1, 2**63 - 1, -(2**63), 2**64 - 1]
WHOLE += [127, -128, 255, 2**31 - 1, 16_777_216, 16_777_217]
FLOATS = [0.0, -0.0, 0.5, -1.5, 1.0, 5.0, 2.0**53, 2.0**63, 2.0**64, 1e300, math.inf, math.nan]
FLOATS += [-math.inf, 16_777_216.0, 65_504.0]
DECIMALS = [Decimal(text) for text in ("0", "0.5", "-1.5", "1.25", "5", "99.99", "-99.99")]


def _whole(type_: pa.DataType) -> list[Any]:
    unsigned = pa.types.is_unsigned_integer(type_)
    low, high = (0, 2**type_.bit_width - 1) if unsigned else (-(2 ** (type_.bit_width - 1)), 0)
    high = high or -low - 1
    return [value for value in WHOLE if low <= value <= high]


def _floats(float_: Any) -> list[Any]:
    with np.errstate(over="ignore"):
        return [float(float_(value)) for value in FLOATS]


NUMBERS: list[tuple[pa.DataType, list[Any]]] = [
    *((type_, _whole(type_)) for type_ in (pa.int8(), pa.uint8(), pa.int32(), pa.uint32())),
    *((type_, _whole(type_)) for type_ in (pa.int64(), pa.uint64())),
    (pa.float16(), _floats(np.float16)),
    (pa.float32(), _floats(np.float32)),
    (pa.float64(), FLOATS),
    (pa.decimal128(4, 2), DECIMALS),
    (pa.decimal128(25, 4), DECIMALS),
    (pa.decimal64(10, 3), DECIMALS),
    (pa.decimal256(50, 2), DECIMALS),
]
LITERALS = st.one_of(
    st.sampled_from([*WHOLE, 300, -200, 10**30, -(10**30), 65_505]),
    st.sampled_from([0.5, -1.5, 2.5, 1e300, -1e300, 1e-300, 0.0, 5.0, 2.0**53, 1.25, 99.99]),
)


def _is_match(stored: Any, op: str, literal: float, type_: pa.DataType) -> bool:
    """Compare as Python does, without rounding; but 0.1 of a float column is such a column's."""
    if stored is None or (isinstance(stored, float) and math.isnan(stored)):
        return False
    compared: Any = literal
    if pa.types.is_floating(type_) and isinstance(literal, float):
        with np.errstate(over="ignore"):
            narrow = float(type_.to_pandas_dtype()(literal))
        compared = literal if math.isinf(narrow) else narrow
    elif isinstance(literal, float):
        compared = Decimal(repr(literal))
    if isinstance(stored, float) and math.isinf(stored):
        return COMPARE[op](stored, 0)  # no literal is as large
    return COMPARE[op](Fraction(stored), Fraction(compared))


def _rows(url: Path, where: str) -> list[float]:
    """Return the numbers of the rows that pass: planned by footers, then read."""
    try:
        return lakes.read_all(plan_lake(str(url), columns=["row"], where=where))[0][:, 0].tolist()
    except NoRows:
        return []


@st.composite
def _files(draw: st.DrawFn) -> list[tuple[pa.DataType, list[Any]]]:
    types = draw(st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=2))
    return [
        (type_, draw(st.lists(st.one_of(st.none(), st.sampled_from(values)), max_size=6)))
        for type_, values in types
    ]


@given(
    files=_files(),
    clauses=st.lists(st.tuples(st.sampled_from(list(COMPARE)), LITERALS), min_size=1, max_size=3),
)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_rows_that_pass_are_those_that_python_finds(tmp_path_factory, files, clauses):
    url = tmp_path_factory.mktemp("lake")
    expected, row = [], 0.0
    for number, (type_, values) in enumerate(files):
        rows = np.arange(row, row + len(values))
        if pa.types.is_float16(type_):
            mask = np.array([value is None for value in values], bool)
            halves = np.array([value or 0.0 for value in values], np.float16)
            column = pa.array(halves, mask=mask)
        else:
            column = pa.array(values, type_)
        table = pa.table({"row": rows, "c": column})
        lakes.write(url / f"{number}.parquet", table, rows_per_group=2)
        for i, value in enumerate(values):
            if all(_is_match(value, op, literal, type_) for op, literal in clauses):
                expected.append(row + i)
        row += len(values)
    lakes.write(url / "z.parquet", {"row": [-1.0], "c": pa.nulls(1)})  # the lake has rows
    where = " and ".join(f"c {op} {literal!r}" for op, literal in clauses)
    assert _rows(url, where) == expected


INSTANTS = [
    dt.datetime(1969, 12, 31, 23, 59, 59, 999_999),
    dt.datetime(1970, 1, 1),
    dt.datetime(2026, 11, 1),
    dt.datetime(2026, 11, 1, 12, 0, 0, 1),
    dt.datetime(2200, 1, 1),
]
FAR = dt.datetime(9999, 12, 31)


@given(
    unit=st.sampled_from(["s", "ms", "us", "ns"]),
    zone=st.sampled_from([None, "UTC", "Asia/Tokyo"]),
    values=st.lists(st.one_of(st.none(), st.sampled_from(INSTANTS)), min_size=1, max_size=5),
    op=st.sampled_from(list(COMPARE)),
    literal=st.sampled_from([*INSTANTS, FAR, dt.datetime(1, 1, 1)]),
    far=st.booleans(),
)
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_instants_are_compared_as_python_does(
    tmp_path_factory, unit, zone, values, op, literal, far
):
    url = tmp_path_factory.mktemp("lake")
    whole = {"s": 10**6, "ms": 10**3, "us": 1, "ns": 1}[unit]
    stored = [
        None if v is None else v - (v - v.min) % dt.timedelta(microseconds=whole) for v in values
    ]
    times = pa.array(stored, pa.timestamp(unit, zone))
    lakes.write(url / "a.parquet", {"row": np.arange(len(values), dtype=float), "c": times})
    expected = [float(i) for i, v in enumerate(stored) if v is not None and COMPARE[op](v, literal)]
    if far:
        lakes.write(
            url / "b.parquet", {"row": [99.0], "c": pa.array([FAR], pa.timestamp("us", zone))}
        )
        expected += [99.0] if COMPARE[op](FAR, literal) else []
    assert _rows(url, f"c {op} {literal.isoformat()!r}") == expected


@given(
    values=st.lists(st.one_of(st.none(), st.text(max_size=3)), min_size=1, max_size=5),
    type_=st.sampled_from([pa.string(), pa.large_string(), pa.string_view(), pa.binary()]),
    as_dictionary=st.booleans(),
    op=st.sampled_from(list(COMPARE)),
    literal=st.text(max_size=3),
)
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_texts_are_compared_byte_by_byte(
    tmp_path_factory, values, type_, as_dictionary, op, literal
):
    url = tmp_path_factory.mktemp("lake")
    texts = pa.array([None if v is None else v.encode() for v in values], pa.binary())
    texts = texts.cast(pa.string()).dictionary_encode() if as_dictionary else texts.cast(type_)
    lakes.write(
        url / "a.parquet",
        {"row": np.arange(len(values), dtype=float), "c": texts},
        rows_per_group=2,
    )
    expected = [
        float(i)
        for i, v in enumerate(values)
        if v is not None and COMPARE[op](v.encode(), literal.encode())
    ]
    assert _rows(url, f"c {op} {literal!r}") == expected


def test_a_range_of_dates_holds_for_dates_and_instants_alike(tmp_path: Path) -> None:
    day = dt.date(2026, 11, 2)
    columns = {
        "a": pa.array([day, dt.date(9999, 12, 31)]),
        "b": pa.array([dt.datetime(2026, 11, 2, 23, 59)] * 2, pa.timestamp("ns")),
    }
    for number, (name, days) in enumerate(columns.items()):
        table = {"row": [2.0 * number, 2.0 * number + 1], "c": days}
        lakes.write(tmp_path / f"{name}.parquet", table)
    assert _rows(tmp_path, "c >= '2026-11-02' and c < '2026-11-03'") == [0, 2, 3]


def test_statistics_that_are_not_of_the_column_are_not_trusted(tmp_path: Path) -> None:
    # NaN among them, which some writers put there, decides nothing.
    passing = Passing.of(pa.float64(), [(">", 5)])
    assert passing.may_hold(0.0, 6.0)
    assert not passing.may_hold(0.0, 5.0)
    values = [math.nan, 1.0, 7.0]
    lakes.write(tmp_path / "a.parquet", {"row": [0.0, 1.0, 2.0], "c": values}, rows_per_group=1)
    assert _rows(tmp_path, "c > 5") == [2]
    assert plan_lake(str(tmp_path), columns=["row"], where="c > 5").n_rows < 3


def test_decimals_are_compared_with_all_digits_of_a_quoted_number(tmp_path: Path) -> None:
    values = [Decimal(f"0.123456789012345678{digit}") for digit in range(3)]
    lakes.write(tmp_path / "a.parquet", {"row": [0.0, 1.0, 2.0], "c": values})
    assert _rows(tmp_path, "c >= '0.1234567890123456781'") == [1, 2]
    with pytest.raises(UserError, match="more digits"):
        _rows(tmp_path, "c >= 0.1234567890123456781")


def _lie(path: Path, was: bytes, now: bytes) -> None:
    """Replace what a footer says."""
    data = path.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    assert data[start:].count(was)
    path.write_bytes(data[:start] + data[start:].replace(was, now))


def test_statistics_that_contradict_themselves_are_not_trusted(tmp_path: Path) -> None:
    options = {"use_dictionary": False, "compression": "NONE", "store_schema": False}
    n = 1000
    table = pa.table({"row": np.arange(float(n)), "c": [*[None] * 900, *np.arange(5000, 5100)]})
    path = tmp_path / "a.parquet"
    for change in ("the wrong way round", "nothing but nulls"):
        lakes.pq.write_table(table, path, **options)
        if change == "the wrong way round":
            low, high = (struct.pack("<q", number) for number in (5000, 5099))
            for was, now in ((low, b"........"), (high, low), (b"........", high)):
                _lie(path, was, now)
        else:
            was, now = (bytes([2 * nulls & 0x7F | 0x80, 2 * nulls >> 7]) for nulls in (900, n))
            _lie(path, was, now)
        assert _rows(tmp_path, "c >= 5098") == [998, 999], change


@pytest.mark.parametrize(
    ("type_", "literal"),
    [
        (pa.list_(pa.int8()), "a"),
        (pa.struct([("a", pa.int8())]), 1),
        (pa.duration("s"), "1"),
        (pa.int64(), "1e"),
        (pa.time32("s"), "01:00+01:00"),
        (pa.date32(), "2026-13-01"),
    ],
)
def test_what_cannot_be_compared_does_not_fit(type_: pa.DataType, literal: Any) -> None:
    with pytest.raises(DoesNotFit):
        Passing.of(type_, [("<", literal)])


@pytest.mark.parametrize("text", ["1e999999999", "-1e999999999", "1e-999999999"])
def test_a_number_of_many_digits_is_not_spelt_out(text: str) -> None:
    mask = parse(f"n > '{text}'").mask(pa.table({"n": [-1, 1]}))
    assert mask.tolist() == [n > float(text) for n in (-1, 1)]


EQUIVALENT = {
    "a category one night, a text the next": (
        pa.array(["a", "b"]).dictionary_encode(),
        pa.array(["a", "b"]),
        "c == 'a'",
        [0, 2],
    ),
    "a text and its view": (
        pa.array(["a", "b"]),
        pa.array(["a", "b"], pa.string_view()),
        "c == 'a'",
        [0, 2],
    ),
    "two zones": (
        pa.array([0, 1], pa.timestamp("us", "UTC")),
        pa.array([0, 1], pa.timestamp("us", "Europe/Berlin")),
        "c >= '1970-01-01'",
        [0, 1, 2, 3],
    ),
    "ids, and ids that were floats": (
        pa.array([2**53 + 1, 2**53]),
        pa.array([2.0**53, 5.0]),
        f"c == {2**53 + 1}",
        [0],
    ),
    "signed and unsigned": (
        pa.array([2**64 - 1, 2**63], pa.uint64()),
        pa.array([-1, 7]),
        "c > 5",
        [0, 1, 3],
    ),
    "decimals of other scales": (
        pa.array([Decimal("1.5"), Decimal("2.5")], pa.decimal128(5, 1)),
        pa.array([Decimal("1.500"), Decimal("9.125")], pa.decimal128(10, 3)),
        "c >= 2.125",
        [1, 3],
    ),
    "decimals and floats": (
        pa.array([Decimal("0.1"), Decimal("2.5")], pa.decimal128(5, 1)),
        pa.array([0.1, 2.5]),
        "c == 0.1",
        [0, 2],
    ),
}


@pytest.mark.parametrize("name", EQUIVALENT)
def test_files_of_equivalent_types_are_filtered_alike(tmp_path: Path, name: str) -> None:
    a, b, where, rows = EQUIVALENT[name]
    lakes.write(tmp_path / "a.parquet", {"row": [0.0, 1.0], "c": a})
    lakes.write(tmp_path / "b.parquet", {"row": [2.0, 3.0], "c": b})
    assert _rows(tmp_path, where) == rows


@pytest.mark.parametrize(
    ("a", "b", "where", "message"),
    [
        (pa.array([1]), pa.array(["1"]), "c == 1", "b.parquet: column 'c' has type string, but"),
        (pa.array([True]), pa.array([1]), "c == 1", "has type int64, but bool in .*a.parquet; ta"),
        (
            pa.array([0], pa.timestamp("us")),
            pa.array([0], pa.timestamp("us", "UTC")),
            "c > '2026-01-01'",
            r"b.parquet: column 'c' has type timestamp\[us, tz=UTC\], but timestamp\[us\] in",
        ),
    ],
)
def test_types_that_do_not_go_together_are_told_with_both_files(
    tmp_path: Path, a: pa.Array, b: pa.Array, where: str, message: str
) -> None:
    lakes.write(tmp_path / "a.parquet", {"row": [0.0], "c": a})
    lakes.write(tmp_path / "b.parquet", {"row": [1.0], "c": b})
    with pytest.raises(UserError, match=message) as caught:
        plan_lake(str(tmp_path), columns=["row"], where=where)
    assert "\n" not in str(caught.value)


SPREAD = {
    "c == 1": [pa.array([0, 1, 2], type_) for type_ in (pa.int8(), pa.uint64(), pa.float32())],
    "c > 0.5 and c < 1.5": [
        pa.array([Decimal(i) for i in range(3)], pa.decimal128(digits, 2)) for digits in (5, 15, 30)
    ],
    "c == 'b'": [
        pa.array(["a", "b", "c"], type_) for type_ in (pa.string(), pa.string_view(), pa.binary())
    ],
    "c > '1970-01-01T12' and c < '1970-01-02T12'": [
        pa.array([0, 1, 2], pa.date32()),
        *(
            pa.array([86_400 * ticks * day for day in range(3)], pa.timestamp(unit, zone))
            for unit, ticks in (("ms", 10**3), ("us", 10**6), ("ns", 10**9))
            for zone in (None, "UTC")
        ),
    ],
    "c == '00:00:01'": [pa.array([0, 10**6, 2 * 10**6], pa.time64("us"))],
    "c < 2": [pa.array([1, 2, None])],
    "c == True": [pa.array([True, False, None])],
}


@pytest.mark.parametrize(
    ("where", "column"), [(where, column) for where, found in SPREAD.items() for column in found]
)
def test_row_groups_that_cannot_match_are_not_read(
    tmp_path: Path, where: str, column: pa.Array
) -> None:
    table = {"row": [0.0, 1.0, 2.0], "c": column}
    lakes.write(tmp_path / "a.parquet", table, rows_per_group=1)
    assert plan_lake(str(tmp_path), columns=["row"], where=where).n_rows == 1
    assert len(_rows(tmp_path, where)) == 1

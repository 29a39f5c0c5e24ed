"""The filter's language, and what it means for every type of column."""

from __future__ import annotations

import datetime as dt
import pickle
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmm_dist.errors import UserError
from gmm_dist.lake.filters.text import parse
from gmm_dist.lake.filters.where import Where

DAYS = [dt.datetime(2026, 11, 1), dt.datetime(2026, 11, 2), None]
TABLE = pa.table(
    {
        "small": pa.array([1, None, 3], pa.int8()),
        "n": [1, 2, 3],
        "big": pa.array([1, 2, 2**63 + 5], pa.uint64()),
        "x": pa.array([0.1, float("nan"), None], pa.float32()),
        "half": pa.array(np.array([0.5, 2.0, 3.0], np.float16)),
        "money": pa.array([Decimal("1.50"), Decimal("2.50"), None], pa.decimal128(10, 2)),
        "day": pa.array(DAYS, pa.date32()),
        "time": pa.array(DAYS, pa.timestamp("us")),
        "utc": pa.array(DAYS, pa.timestamp("us", "UTC")),
        "text": ["2026-11-01", "b", None],
        "large": pa.array(["2026-11-01", "b", None], pa.large_string()),
        "code": pa.array(["x", "y", None]).dictionary_encode(),
        "flag": [True, False, None],
        "dep delay": [1, 2, 3],
        "void": pa.nulls(3),
        "view": pa.array(["a", "b", None], pa.string_view()),
        "bytes": pa.array([b"a", b"b", None], pa.binary_view()),
        "fixed": pa.array([b"a", b"b", None], pa.binary(1)),
        "clock": pa.array([dt.time(0, 0, 1), dt.time(0, 0, 2), None], pa.time32("s")),
        "code of void": pa.nulls(3).dictionary_encode(),
        "lists": pa.array([[1.0], [None], None], pa.list_(pa.float64())),
    }
)


def matches(text: str) -> list[bool]:
    return parse(text).mask(TABLE).tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n == 2", [False, True, False]),
        ("void == 2", [False, False, False]),
        ("void != 'a'", [False, False, False]),
        ("n == 2 and col('code of void') <= True", [False, False, False]),
        ("n != 2", [True, False, True]),
        ("n <= 2", [True, True, False]),
        ("2 <= n", [False, True, True]),
        ("0 < n <= 2", [True, True, False]),
        ("n > 1 and n < 3", [False, True, False]),
        ("n > 1 and (n < 3 and text == 'b')", [False, True, False]),
        ("n > -1", [True, True, True]),
        ("n < 2.5", [True, True, False]),
        ("n > 0.5 and n != 1.5", [True, True, True]),
        ("n == 1.5", [False, False, False]),
        ("n < 99999999999999999999999", [True, True, True]),
        ("n > 1e300", [False, False, False]),
        ("big > -1", [True, True, True]),
        ("big >= 9223372036854775813", [False, False, True]),
        ("small != 300", [True, None, True]),
        ("x > -3e38 and x < 1e300", [True, False, None]),
        ("x != 16777217", [True, False, None]),
        ("x < 'inf'", [True, False, None]),
        ("half < 65520", [True, True, True]),
        ("money != 2.125", [True, True, None]),
        ("money <= 1e100", [True, True, None]),
        ("day > '2026-11-01 12:00'", [False, True, None]),
        ("time < '2026-11-01 00:00:00.0000000001'", [True, False, None]),
        ("utc > '2026-11-01T01:00:00.0000005+01:00'", [False, True, None]),
        ("view == 'a'", [True, False, None]),
        ("bytes >= 'b'", [False, True, None]),
        ("fixed < 'b'", [True, False, None]),
        ("clock >= '00:00:01.5'", [False, True, None]),
        ("flag < True", [False, True, None]),
        ("n < 2.0", [True, False, False]),
        ("n >= -0.5", [True, True, True]),
        ("n < '3'", [True, True, False]),
        ("small < 300", [True, None, True]),
        ("big == 9223372036854775813", [False, False, True]),
        ("x == 0.1", [True, False, None]),
        ("x < 16777217", [True, False, None]),
        ("x != 5", [True, False, None]),  # NaN never matches
        ("half < 2.5", [True, True, False]),
        ("money == 1.5", [True, False, None]),
        ("money < 2.125", [True, False, None]),
        ("day >= '2026-11-02'", [False, True, None]),
        ("time == '2026-11-01'", [True, False, None]),
        ("time < '2026-11-01 12:00:00'", [True, False, None]),
        ("utc == '2026-11-01'", [True, False, None]),
        ("utc == '2026-11-01T01:00+01:00'", [True, False, None]),
        ("text == '2026-11-01'", [True, False, None]),
        ("text != 'b'", [True, False, None]),
        ("large > 'a'", [False, True, None]),
        ("code == 'x'", [True, False, None]),
        ("flag == True", [True, False, None]),
        ("col('dep delay') > 1", [False, True, True]),
        ("n == 1 or n == 3", [True, False, True]),
        ("n == 1 or n == 2 and small == 3", [True, False, False]),
        ("(n == 1 OR n == 2) AND small is not null", [True, False, False]),
        ("not n == 1 or n == 1", [True, True, True]),
        ("not (n == 1 or n == 2)", [False, False, True]),
        ("not (0 < n <= 2)", [False, False, True]),
        ("small is null", [False, True, False]),
        ("small IS NOT NULL", [True, False, True]),
        ("small < 5 or small >= 5", [True, None, True]),
        ("not small == 1", [False, None, True]),
        ("x is null", [False, True, True]),  # NaN is missing as null is
        ("not x == 0.1", [False, None, None]),
        ("not (x is null)", [True, False, False]),
        ("void is null and void is null", [True, True, True]),
        ("void is not null or void in (1)", [False, False, False]),
        ("void is null and void == 1", [False, False, False]),
        ("col('code of void') is null", [True, True, True]),
        ("code is null or half is null", [False, False, True]),
        ("n in (1, 3.0, 99)", [True, False, True]),
        ("n in (2)", [False, True, False]),
        ("n in (1, 2) and n in (2, 3)", [False, True, False]),
        ("n in (1) and n in (2)", [False, False, False]),
        ("n in (1, 2) and n != 1", [False, True, False]),
        ("n not in (1, 3)", [False, True, False]),
        ("small not in (3)", [True, None, False]),
        ("small in (1, null)", [True, None, None]),
        ("small not in (3, null)", [None, None, False]),
        ("not small in (3, null)", [None, None, False]),
        ("small in (null) or n == 2", [None, True, None]),
        ("x in (0.1, 16777217)", [True, False, None]),
        ("money in (1.5, '2.5', 2.125)", [True, True, None]),
        ("day in ('2026-11-01', '2026-11-02 12:00')", [True, False, None]),
        ("utc not in ('2026-11-01T01:00+01:00')", [False, True, None]),
        ("time in ('2026-11-02')", [False, True, None]),
        ("code in ('x', 'z')", [True, False, None]),
        ("bytes in ('b')", [False, True, None]),
        ("clock in ('00:00:02')", [False, True, None]),
        ("flag in (true, False)", [True, True, None]),
        ("flag == TRUE", [True, False, None]),
        ("lists is null", [False, False, True]),
        ("lists is not null and n == 1", [True, False, False]),
    ],
)
def test_a_filter_means_what_it_says(text, expected):
    assert matches(text) == [value is True for value in expected]  # null never matches


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n = 1", r"filter 'n = 1' cannot be read from '= 1' on; equality is written '==', not"),
        ("n == 1 OR m = 2", "from '= 2' on; equality is written '==', not '='"),
        ("n <> 1", "from '<> 1' on; inequality is written '!=', not '<>'"),
        (
            "n < 1; n",
            "cannot be read from '; n' on; write comparisons joined by 'and', 'or', 'not'",
        ),
        ("n < 1 OR", "cannot be read to its end; write comparisons joined by"),
        ("n LIKE 'a'", "cannot be read from \"LIKE 'a'\" on; write comparisons joined by"),
        ("", "filter '' cannot be read to its end; write comparisons joined by 'and', 'or', 'not'"),
        ("n", "'n' is not a comparison of a column with a string, a number"),
        ("n < small", "'n < small' is not a comparison of a column"),
        ("1 < 2", "'1 < 2' is not a comparison of a column"),
        ("n in ()", r"'n in \(\)' has no list; write n in \('a', 'b'\)"),
        ("n in 'ab'", "has no list; write n in"),
        ("n in -1", "has no list; write n in"),
        ("n in (1, small)", "is not a comparison of a column"),
        ("1 in (n, 2)", "is not a comparison of a column"),
        ("n in (1, (2, 3))", r"'\(2, 3\)' is not a comparison of a column"),
        ("0 < n in (1, 2)", "is a chain; write comparisons one by one, joined by 'and'"),
        ("n is null is null", "is a chain; write comparisons one by one, joined by 'and'"),
        ("not n", "'n' is not a comparison of a column"),
        ("n and small == 1", "'n' is not a comparison of a column"),
        ("(n < 1) is null", "'n < 1' is not a comparison of a column"),
        ("n is 1", "'n is 1' asks for something else than null; write 'is null', 'is not null' or"),
        ("1 is null", "asks for something else than null"),
        ("n == None", "'n == None' is never true; write 'n is null' or 'n is not null'"),
        ("NULL != n", "'NULL != n' is never true; write 'n is null' or 'n is not null'"),
        ("n == 1 or (n == 2 and (" * 60 + "n < 1" + "))" * 60, "more than 50 deep; write it with"),
        ("n == 1e999", "is not a comparison of a column"),
        ("n < f()", r"'f\(\)' is not a comparison of a column"),
        ("n.real < 1", "'n.real' is not a comparison of a column"),
        ("n < " + "-" * 9999 + "1", "cannot be read|is not a comparison"),
        (
            "n < 0.12345678901234567",
            "0.12345678901234567 has more digits than .* write it in quotes",
        ),
        ("(n < 2 and\nn > -1e-400)", "1e-400 has more digits than a number .* and would be 0.0"),
        ("n < 0x" + "f" * 9999, "is not a comparison"),
        ("n < -0x" + "f" * 9999, "is not a comparison"),
        ("a.b < 1", r"'a.b' is not a comp.* has dots, spaces and such is col\('dep delay'\)"),
        ("`dep delay` < 1", r"cannot be read .*col\('dep delay'\)"),
    ],
)
def test_what_is_no_filter_is_refused_with_the_remedy(text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nope == 1", "no column 'nope'; columns are small, n, big.*; correct the filter"),
        ("n == 'x'", "column 'n' has type int64, which 'x' is not; write a value of that type"),
        ("n == True", "column 'n' has type int64, which True is not"),
        ("text == 5", "column 'text' has type string, which 5 is not"),
        ("day == 5", r"column 'day' has type date32\[day\], which 5 is not"),
        ("day < 'soon'", "which 'soon' is not"),
        ("utc < 'soon'", "which 'soon' is not"),
        ("flag == 1", "column 'flag' has type bool, which 1 is not"),
        ("flag == 'True'", "column 'flag' has type bool, which 'True' is not"),
        ("time > '2026-11-01T01:00+01:00'", "column 'time' has type timestamp.us., which '2026-"),
        ("n > 'nan'", "column 'n' has type int64, which 'nan' is not"),
        ("text == '\\udc80'", r"column 'text' has type string, which '.udc80' is not"),
    ],
)
def test_a_literal_that_does_not_fit_its_column_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse(text).tests(TABLE.schema)


def test_a_filter_is_a_value_that_does_not_depend_on_spelling():
    where = parse("0 < n <= 5 and text=='a'")
    assert where == parse('text == "a" and n<=5 and n > 0 and n > 0')
    assert hash(where) == hash(parse("text=='a' and 0 < n <= 5"))
    assert pickle.loads(pickle.dumps(where)) == where
    assert where.columns == ("n", "text")
    assert where.text == "n <= 5 and n > 0 and text == 'a'"


def test_a_filter_can_be_restricted_to_some_columns():
    where = parse("n > 0 and text == 'a'")
    assert where.restricted({"n"}) == parse("n > 0")
    assert where.restricted({"x"}) is None
    where = parse("(n > 0 or text == 'a') and (n > 1 and x > 0 or n == 9)")
    assert where.restricted({"n"}) == parse("n > 1 or n == 9")
    assert where.restricted({"text"}) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("n == 1 or x > 2", "x > 2 OR n == 1 or n == 1"),
        ("n == 1 or n == 2", "n in (2, 1, 2)"),
        ("n in (1) or n in (2, null)", "n in (1, 2)"),
        ("not (n == 1 and (x > 2 or k is null))", "n != 1 or x <= 2 and k is not null"),
        ("not n in (1, 2)", "n not in (2, 1)"),
        ("n not in (1, 2)", "not (n == 1 or n == 2)"),
        ("not not n == 1", "n == 1"),
        ("a == 1 or (b == 1 or c == 1)", "(c == 1 or a == 1) or b == 1"),
        ("n not in (1, null)", "n in (null)"),
    ],
)
def test_what_says_the_same_is_equal(one, other):
    assert parse(one) == parse(other)
    assert parse(parse(one).text) == parse(one)


@pytest.mark.parametrize(
    ("text", "column", "literal"),
    [("NOT == 1", "NOT", 1), ("1 == null", "null", 1), ("AND == True", "AND", True)],
)
def test_a_word_in_another_case_is_a_column_where_one_is_due(text, column, literal):
    assert parse(text).clauses == ((column, "==", literal),)
    assert parse(f"{text} AND NOT x == 2").clauses == ((column, "==", literal), ("x", "!=", 2))
    assert parse(f"x == 2 or {text}").columns == (column, "x")
    null = parse(f"col({column!r}) is null")
    assert parse(null.text) == null


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_what_ends_a_line_for_str_alone_moves_no_keyword(end):
    text = f"s == 'a{end}b' AND (x IN (1, 2) OR NOT y > 3)"
    assert parse(text) == parse(text.replace("AND", "and").replace("IN", "in").lower())


def test_words_in_texts_are_left_alone():
    where = parse("text in ('AND', 'Not in') OR text == ' IS '")
    assert where.clauses == (("text", "in", (" IS ", "AND", "Not in")),)


names = st.text(min_size=1, max_size=8)
literals = st.one_of(
    st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()
)
operators = st.sampled_from(["==", "!=", "<", "<=", ">", ">="])


@given(st.lists(st.tuples(names, operators, literals), min_size=1, max_size=4))
def test_the_canonical_text_reads_back_as_the_same_filter(clauses):
    where = Where(tuple(clauses))
    again = parse(where.text)
    assert set(again.clauses) == set(where.clauses)
    assert parse(again.text).text == again.text


def test_thousands_of_comparisons_are_a_filter():
    values = pa.table({"id": np.arange(20_000), "x": np.arange(20_000) / 2})
    text = " and ".join(f"id != {i} and x < {30_000 + i}" for i in range(9000))
    assert np.flatnonzero(parse(text).mask(values)).tolist() == list(range(9000, 20_000))
    assert len(parse(text).shown) < 300
    assert parse(parse(text).text) == parse(text)


def test_minus_zero_is_zero():
    table = pa.table({"x": [-0.0, 0.0, 1.0]})
    for text in ("x != 0", "x != -0.0", "x > 0"):
        assert parse(text).mask(table).tolist() == [False, False, True]
    assert parse("x == 0").mask(table).tolist() == [True, True, False]

"""Filters over random small lakes: what planning and reading leave is what a naive reader keeps."""

from __future__ import annotations

import datetime as dt
import functools
import math
import operator
import random
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from gmm_dist.errors import NoRows, UserError
from gmm_dist.lake.filters.text import parse
from gmm_dist.lake.plan import plan_lake
from gmm_dist.lake.read import read

Row = dict[str, Any]
Truth = bool | None
Condition = tuple[str, Callable[[Row], Truth]]

NAN = float("nan")
FIELDS = {
    "id": pa.float64(),
    "n": pa.int32(),
    "v": pa.float64(),
    "s": pa.string(),
    "d": pa.date32(),
    "m": pa.decimal128(6, 2),
    "b": pa.bool_(),
    "late": pa.int64(),
}
VALUES: dict[str, list[Any]] = {
    "n": [None, 1, 2, 3],
    "v": [None, NAN, 0.5, 1.0, 2.5],
    "s": [None, "a", "b", "ä"],
    "d": [None, dt.date(2026, 11, 1), dt.date(2026, 11, 2)],
    "m": [None, Decimal("1.00"), Decimal("1.25"), Decimal("-2.00")],
    "b": [None, True, False],
    "late": [None, 5, 7],
    "key": [None, 1, 2],
    "name": ["x", "y"],
}
# What may be written in a filter, and the value that it stands for.
LITERALS: dict[str, list[tuple[str, Any]]] = {
    "n": [("1", 1), ("2", 2), ("2.5", 2.5), ("-7", -7), ("'3'", 3), ("99999999999", 99999999999)],
    "v": [("0.5", 0.5), ("1", 1.0), ("2.5", 2.5), ("-1e3", -1e3)],
    "s": [("'a'", "a"), ('"b"', "b"), ("''", ""), ("'ä'", "ä")],
    "d": [("'2026-11-01'", dt.date(2026, 11, 1)), ("'2026-11-02'", dt.date(2026, 11, 2))],
    "m": [("1", Decimal(1)), ("1.25", Decimal("1.25")), ("'1.255'", Decimal("1.255"))],
    "b": [("True", True), ("false", False)],
    "late": [("5", 5), ("6", 6)],
    "key": [("1", 1), ("2", 2), ("3", 3)],
    "name": [("'x'", "x"), ("'z'", "z")],
}
OPERATORS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def write(rng: random.Random, path: Path) -> list[Row]:
    """Write a lake of a few files of small row groups; return its rows, hive keys and all."""
    rows: list[Row] = []
    for key in VALUES["key"]:
        for name in rng.sample(VALUES["name"], rng.randint(1, 2)):
            told = "__HIVE_DEFAULT_PARTITION__" if key is None else key
            folder = path / f"key={told}" / f"name={name}"
            folder.mkdir(parents=True)
            for number in range(2):
                names = [c for c in FIELDS if c != "late" or number == 0]
                part = rows_of(rng, names, first=len(rows))
                table = pa.Table.from_pylist(part, pa.schema([(c, FIELDS[c]) for c in names]))
                size = rng.randint(1, 3)
                pq.write_table(table, folder / f"{number}.parquet", row_group_size=size)
                rows += [{"late": None, **row, "key": key, "name": name} for row in part]
    return rows


def rows_of(rng: random.Random, names: list[str], first: int) -> list[Row]:
    # Few values of each column, so that footers tell something.
    few = {column: rng.sample(VALUES[column], rng.randint(1, 2)) for column in names[1:]}
    return [
        {"id": float(first + i), **{column: rng.choice(values) for column, values in few.items()}}
        for i in range(rng.randint(1, 6))
    ]


def kept(path: Path, where: Any) -> list[float]:
    """Return the ids of the rows that are read."""
    try:
        plan = plan_lake(str(path), columns=["id"], where=where)
    except NoRows:
        return []
    return [float(x) for i in range(plan.n_shards) for rows in read(plan, i) for x in rows.X[:, 0]]


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def compared(op: str, column: str, literal: Any) -> Callable[[Row], Truth]:
    return lambda row: None if is_missing(row[column]) else OPERATORS[op](row[column], literal)


def any_of(truths: list[Truth]) -> Truth:
    return True if True in truths else (None if None in truths else False)


def negated(truth: Truth) -> Truth:
    return None if truth is None else not truth


def all_of(truths: list[Truth]) -> Truth:
    return negated(any_of([negated(truth) for truth in truths]))


def cased(rng: random.Random, word: str) -> str:
    return rng.choice([word, word.upper(), word.capitalize()])


def comparison(rng: random.Random) -> Condition:
    column = rng.choice(list(LITERALS))
    kind = rng.random()
    if kind < 0.2:
        is_not = rng.random() < 0.5
        words = ["is", "not", "null"] if is_not else ["is", "null"]
        text = " ".join([column, *(cased(rng, word) for word in words)])
        return text, lambda row: is_missing(row[column]) != is_not
    if kind < 0.5:
        some = rng.choices(LITERALS[column], k=rng.randint(1, 3))
        has_null, is_not = rng.random() < 0.2, rng.random() < 0.4
        spelt = [text for text, _ in some] + [cased(rng, "null")] * has_null

        def one_of(row: Row) -> Truth:
            equal = [compared("==", column, literal)(row) for _, literal in some]
            return any_of([*equal, None] if has_null else equal)

        text = f"{column} {cased(rng, 'not in' if is_not else 'in')} ({', '.join(spelt)})"
        return text, lambda row: negated(one_of(row)) if is_not else one_of(row)
    op, (text, literal) = rng.choice(list(OPERATORS)), rng.choice(LITERALS[column])
    return f"{column} {op} {text}", compared(op, column, literal)


def condition(rng: random.Random, depth: int) -> Condition:
    kind = rng.random() if depth else 0.0
    if kind < 0.3:
        return comparison(rng)
    if kind < 0.5:
        text, truth = condition(rng, depth - 1)
        return f"{cased(rng, 'not')} ({text})", lambda row: negated(truth(row))
    parts = [condition(rng, depth - 1) for _ in range(rng.randint(2, 3))]
    truths = [truth for _, truth in parts]
    if kind < 0.7:
        text = f" {cased(rng, 'and')} ".join(f"({text})" for text, _ in parts)
        return text, lambda row: all_of([truth(row) for truth in truths])
    text = f" {cased(rng, 'or')} ".join(
        text if " or " in text else f"({text})" for text, _ in parts
    )
    return text, lambda row: any_of([truth(row) for truth in truths])


@pytest.mark.parametrize("seed", range(5))
def test_a_filter_leaves_the_rows_that_it_is_true_of(seed, tmp_path):
    rng = random.Random(seed)
    rows = write(rng, tmp_path)
    for _ in range(6):
        text, truth = condition(rng, 3)
        expected = [row["id"] for row in rows if truth(row) is True]
        assert sorted(kept(tmp_path, text)) == expected, text
        assert parse(parse(text).text) == parse(text), text


NUMBERS = [[1, 2], [3, None], [None, None], [5, 9]]


@pytest.mark.parametrize(
    ("text", "groups", "ids"),
    [
        ("n == 2 or n == 5", [0, 3], [1, 6]),
        ("n in (2, 4, 9)", [0, 3], [1, 7]),
        ("n in (4, 10) or s == 'b'", [1], [2, 3]),
        ("n not in (1, 2)", [0, 1, 3], [2, 6, 7]),
        ("not n > 2", [0], [0, 1]),
        ("not (n <= 2 or n is null)", [1, 3], [2, 6, 7]),
        ("n is null", [1, 2], [3, 4, 5]),
        ("n is not null", [0, 1, 3], [0, 1, 2, 6, 7]),
        ("n is null and s == 'c'", [2], [4, 5]),
        ("v is null", [0, 1, 2, 3], [1, 4, 5]),  # no footer tells of NaN
        ("v is not null and n > 2", [1, 3], [2, 6, 7]),
        ("(n < 3 or s == 'd') and v > 5", [3], [6, 7]),
        ("lists is null", [0, 1, 2, 3], [3]),
        ("key == 2 or n == 1", [0], [0]),
        ("key == 1 and (n == 1 or key == 2)", [0], [0]),
        ("key is null or n in (9, null)", [3], [7]),
    ],
)
def test_row_groups_are_left_out_where_none_of_their_rows_can_pass(tmp_path, text, groups, ids):
    columns = {
        "id": [float(i) for i in range(8)],
        "n": [n for group in NUMBERS for n in group],
        "v": [1.0, NAN, 2.0, 3.0, None, None, 6.0, 7.0],
        "s": [letter for letter in "abcd" for _ in range(2)],
        "lists": [[1.0], [None], [], None, [None, None], [2.0], [3.0], [4.0]],
    }
    path = tmp_path / "key=1" / "a.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table(columns), path, row_group_size=2)
    plan = plan_lake(str(tmp_path), columns=["id"], where=text)
    assert sorted({part.row_group for shard in plan.shards for part in shard}) == groups
    assert kept(tmp_path, text) == ids


def test_of_a_file_that_lacks_a_column_the_rows_pass_that_null_passes(tmp_path):
    pq.write_table(pa.table({"id": [0.0, 1.0], "late": [1, None]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"id": [2.0, 3.0]}), tmp_path / "b.parquet")
    assert kept(tmp_path, "late is null") == [1, 2, 3]
    assert kept(tmp_path, "late == 1 or id > 2") == [0, 3]
    assert kept(tmp_path, "not late in (2, 3)") == [0]
    files = plan_lake(str(tmp_path), columns=["id"], where="late in (1, 2)").shards
    assert {part.file for shard in files for part in shard} == {0}


def test_a_file_that_no_alternative_can_need_is_not_opened(tmp_path):
    for key in (1, 2, 3):
        folder = tmp_path / f"key={key}"
        folder.mkdir()
        pq.write_table(pa.table({"id": [float(key)], "n": [key]}), folder / "a.parquet")
    (tmp_path / "key=3" / "a.parquet").write_bytes(b"PAR1 damaged PAR1")
    assert kept(tmp_path, "key == 1 or key == 2 and n == 2") == [1, 2]
    assert kept(tmp_path, "key in (1, 2) and (n > 5 or n == 2)") == [2]
    assert kept(tmp_path, "not (key == 3 or n == 1)") == [2]
    with pytest.raises(UserError, match=r"key=3/a\.parquet"):
        kept(tmp_path, "key == 1 or n == 2")


def test_the_first_list_that_passes_tells_the_length_of_all(tmp_path):
    """Without a fixed size, and under a filter that mixes a hive key and a column."""
    for key, length in ((1, 2), (2, 3)):
        folder = tmp_path / f"key={key}"
        folder.mkdir()
        lists = pa.array([[0.5] * length] * 2)
        pq.write_table(pa.table({"emb": lists, "n": [1, 2]}), folder / "a.parquet")
    for where in (
        "key == 2 and n == 2 or key == 1 and n == 9",
        (pc.field("key") == 2) & (pc.field("n") == 2) | (pc.field("n") == 9),
    ):
        plan = plan_lake(str(tmp_path), columns=["emb"], where=where)
        assert plan.n_features == 3
        assert sum(len(rows.X) for i in range(plan.n_shards) for rows in read(plan, i)) == 1


def scalar(column: str, literal: Any) -> Any:
    return pc.scalar(
        pa.scalar(literal, FIELDS.get(column, pa.int64() if column == "key" else None))
    )


def expression_of_one(rng: random.Random) -> pc.Expression:
    column = rng.choice([c for c in VALUES if c != "b"])
    values = [value for value in VALUES[column] if value is not None]
    kind = rng.random()
    if kind < 0.15:
        return pc.field(column).is_null()
    if kind < 0.25 and column == "v":
        return pc.field("v").is_nan() if rng.random() < 0.5 else pc.is_finite(pc.field("v"))
    if kind < 0.35 and column == "n":
        return pc.field("n") / 2 > rng.choice([0, 0.4, 1])
    if kind < 0.5:
        type_ = FIELDS.get(column, pa.int64() if column == "key" else pa.string())
        return pc.field(column).isin(pa.array(rng.sample(VALUES[column], 2), type_))
    compare = rng.choice(list(OPERATORS.values()))
    found: pc.Expression = compare(pc.field(column), scalar(column, rng.choice(values)))
    return found


def expression(rng: random.Random, depth: int) -> pc.Expression:
    kind = rng.random() if depth else 0.0
    if kind < 0.3:
        return expression_of_one(rng)
    if kind < 0.5:
        return ~expression(rng, depth - 1)
    parts = [expression(rng, depth - 1) for _ in range(rng.randint(2, 3))]
    return functools.reduce(operator.and_ if kind < 0.75 else operator.or_, parts)


@pytest.mark.parametrize("seed", range(5))
def test_an_expression_leaves_the_rows_that_arrow_keeps_of_a_table(seed, tmp_path):
    rng = random.Random(seed)
    rows = write(rng, tmp_path)
    types = pa.schema([*FIELDS.items(), ("key", pa.int64()), ("name", pa.string())])
    table = pa.Table.from_pylist(rows, types)
    for _ in range(6):
        asked = expression(rng, 3)
        assert sorted(kept(tmp_path, asked)) == table.filter(asked)["id"].to_pylist(), str(asked)

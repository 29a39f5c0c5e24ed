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

from gmm_dist.errors import NoRows
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


@pytest.mark.parametrize("seed", range(8))
def test_a_filter_leaves_the_rows_that_it_is_true_of(seed, tmp_path):
    rng = random.Random(seed)
    rows = write(rng, tmp_path)
    for _ in range(6):
        text, truth = condition(rng, 3)
        expected = [row["id"] for row in rows if truth(row) is True]
        assert sorted(kept(tmp_path, text)) == expected, text
        assert parse(parse(text).text) == parse(text), text


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


@pytest.mark.parametrize("seed", range(8))
def test_an_expression_leaves_the_rows_that_arrow_keeps_of_a_table(seed, tmp_path):
    rng = random.Random(seed)
    rows = write(rng, tmp_path)
    types = pa.schema([*FIELDS.items(), ("key", pa.int64()), ("name", pa.string())])
    table = pa.Table.from_pylist(rows, types)
    for _ in range(6):
        asked = expression(rng, 3)
        assert sorted(kept(tmp_path, asked)) == table.filter(asked)["id"].to_pylist(), str(asked)

"""A row filter, written as Python comparisons: `dt >= '2026-11-01' and 0 < amount <= 50`."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass
from decimal import Decimal
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from gmm_dist.errors import UserError

Literal = bool | int | float | str

_OPERATORS: dict[type[ast.cmpop], str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}
_FLIPPED = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_REMEDY = "write comparisons joined by 'and', such as \"dt >= '2026-11-01' and 0 < amount <= 50\""


@dataclass(frozen=True, slots=True)
class Where:
    """Hold the comparisons of a filter; a row passes when all of them hold.

    `clauses` are (column, operator, literal) in canonical order, so two texts that say the
    same in another order are equal. Null and NaN never match, not even `!=`.
    """

    clauses: tuple[tuple[str, str, Literal], ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Name the columns that are compared, sorted."""
        return tuple(sorted({column for column, _, _ in self.clauses}))

    @property
    def text(self) -> str:
        """Write the filter canonically; `parse` reads it back."""
        return " and ".join(f"{_spell(c)} {op} {literal!r}" for c, op, literal in self.clauses)

    def restricted(self, columns: Collection[str]) -> Where | None:
        """Return the comparisons of `columns` alone, None when there are none."""
        clauses = tuple(clause for clause in self.clauses if clause[0] in columns)
        return Where(clauses) if clauses else None

    def expression(self, schema: pa.Schema) -> pc.Expression:
        """Return the filter for rows of `schema`, literals cast to the columns' types.

        Raises:
            UserError: a column is not in `schema`, or a literal does not fit its type.
        """
        return reduce(operator.and_, (_clause(schema, *clause) for clause in self.clauses))

    def mask(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        """Say of each row of `table` (n,) whether it passes.

        Raises:
            UserError: as `expression`.
        """
        expression = self.expression(table.schema)
        matches = ds.InMemoryDataset(table).to_table(columns={"match": expression})["match"]
        mask: npt.NDArray[np.bool_] = matches.fill_null(False).to_numpy()
        return mask


def parse(text: str) -> Where:
    """Read comparisons joined by `and`, in Python's syntax.

    `==, !=, <, <=, >, >=`, chains (`0 < x <= 5`), the literal on either side; literals are
    strings (also for dates and times, UTC without an offset), numbers, True and False. A column
    whose name is not a Python name is written `col('dep delay')`. Nothing is evaluated.

    Raises:
        UserError: anything else.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"filter {text!r} cannot be read; {_syntax_remedy(text)}") from error
    clauses = {clause for node in _conjuncts(tree, text) for clause in _comparisons(node, text)}
    # 1, 1.0 and True are equal but not the same literal: order by what is written.
    return Where(tuple(sorted(clauses, key=lambda c: (c[0], c[1], repr(c[2])))))


def _syntax_remedy(text: str) -> str:
    try:
        call = ast.parse(f"f({text})", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return _REMEDY
    # `x = 1` reads as a keyword argument.
    single = isinstance(call, ast.Call) and call.keywords
    return "equality is written '==', not '='" if single else _REMEDY


def _conjuncts(node: ast.expr, text: str) -> list[ast.Compare]:
    match node:
        case ast.Compare():
            return [node]
        case ast.BoolOp(op=ast.And()):
            return [part for value in node.values for part in _conjuncts(value, text)]
        case ast.BoolOp(op=ast.Or()):
            raise UserError(f"filter {text!r}: 'or' is not supported; run once per alternative")
    raise _not_supported(node, text)


def _comparisons(node: ast.Compare, text: str) -> list[tuple[str, str, Literal]]:
    operands = [_operand(part, text) for part in (node.left, *node.comparators)]
    clauses = []
    for op, (left, right) in zip(node.ops, pairwise(operands), strict=True):
        if type(op) not in _OPERATORS or isinstance(left, ast.Name) == isinstance(right, ast.Name):
            raise _not_supported(node, text)
        symbol = _OPERATORS[type(op)]
        if isinstance(left, ast.Name):
            assert not isinstance(right, ast.Name)
            clauses.append((left.id, symbol, right))
        elif isinstance(right, ast.Name):
            clauses.append((right.id, _FLIPPED[symbol], left))
    return clauses


def _operand(node: ast.expr, text: str) -> ast.Name | Literal:
    """Return a column as ast.Name, a literal as its value."""
    match node:
        case ast.Name():
            return node
        case ast.Call(func=ast.Name(id="col"), args=[ast.Constant(value=str(name))], keywords=[]):
            return ast.Name(name)
        case ast.Constant(value=bool() | int() | str() as value):
            return value
        case ast.Constant(value=float(value)) if math.isfinite(value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            if not isinstance(value, bool) and math.isfinite(value):
                return -value
    raise _not_supported(node, text)


def _not_supported(node: ast.expr, text: str) -> UserError:
    return UserError(
        f"filter {text!r}: {ast.unparse(node)!r} is not a comparison of a column with a string, "
        f"a number, True or False; {_REMEDY}"
    )


def _spell(column: str) -> str:
    try:
        node = ast.parse(column, mode="eval").body
        # Python reads `ﬁ` as `fi`.
        if isinstance(node, ast.Name) and node.id == column:
            return column
    except (SyntaxError, ValueError):
        pass
    return f"col({column!r})"


def _clause(schema: pa.Schema, column: str, op: str, literal: Literal) -> pc.Expression:
    positions = schema.get_all_field_indices(column)
    if len(positions) != 1:
        found = ", ".join(schema.names[:20]) or "none"
        raise UserError(f"filter: no column {column!r}; columns are {found}; correct the filter")
    type_ = schema.field(positions[0]).type
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if pa.types.is_null(type_):
        return pc.scalar(False)  # nothing but null, whatever it is compared with
    value, field = pc.scalar(_cast(column, literal, type_)), pc.field(column)
    if pa.types.is_float16(type_):  # Arrow compares no half floats
        value, field = value.cast(pa.float32()), field.cast(pa.float32())
    if op == "!=" and pa.types.is_floating(type_):
        # NaN != 5 holds in IEEE arithmetic, but a row group's minimum and maximum know nothing
        # of NaN: whether the row is seen must not depend on its neighbours.
        return (field < value) | (field > value)
    return _COMPARE[op](field, value)


def _cast(column: str, literal: Literal, type_: pa.DataType) -> pa.Scalar:
    wrong = UserError(
        f"filter: column {column!r} has type {type_}, which {literal!r} is not; write a value of "
        "that type (text, dates and times in quotes, numbers without)"
    )
    if not _comparable(literal, type_):
        raise wrong
    try:
        if isinstance(literal, str):
            return _parse_as(type_, literal)
        if pa.types.is_decimal(type_):
            return pa.scalar(Decimal(repr(literal)), type_)
        if pa.types.is_integer(type_) and isinstance(literal, float):
            # pa.scalar(2.5, pa.int64()) is 2.
            return pa.scalar(int(literal), type_) if literal.is_integer() else pa.scalar(literal)
        return pa.scalar(literal, type_)
    except (pa.ArrowException, OverflowError) as error:
        # x < 300 of an int8 column, x < 2.125 of a decimal one: Arrow compares in a wider type.
        if isinstance(literal, str) or abs(literal) >= 2**63:
            raise wrong from error
        return pa.scalar(literal if pa.types.is_integer(type_) else float(literal))


def _parse_as(type_: pa.DataType, literal: str) -> pa.Scalar:
    try:
        return pa.scalar(literal).cast(type_)
    except pa.ArrowInvalid:
        if pa.types.is_timestamp(type_) and type_.tz is not None:
            return pa.scalar(literal).cast(pa.timestamp(type_.unit)).cast(type_)  # UTC
        raise


def _comparable(literal: Literal, type_: pa.DataType) -> bool:
    """Refuse what Arrow would cast though it was never meant: 5 to '5', True to 1, 5 to a date."""
    if isinstance(literal, bool):
        return bool(pa.types.is_boolean(type_))
    if isinstance(literal, str):
        return True
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    return any(test(type_) for test in tests)

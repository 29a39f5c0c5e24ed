"""A row filter, written as Python comparisons: `dt >= '2026-11-01' and 0 < amount <= 50`."""

from __future__ import annotations

import ast
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gmm_dist.errors import UserError
from gmm_dist.lake.parquet.comparing import DoesNotFit, Literal, Passing, value_type

_OPERATORS: dict[type[ast.cmpop], str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}
_FLIPPED = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}
_MOST_BITS = 4096
_REMEDY = (
    "write comparisons joined by 'and', such as \"dt >= '2026-11-01' and 0 < amount <= 50\"; a "
    "column whose name has dots, spaces and such is col('dep delay')"
)


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
        spelt = {column: _spell(column) for column in self.columns}
        return " and ".join(f"{spelt[c]} {op} {literal!r}" for c, op, literal in self.clauses)

    @property
    def shown(self) -> str:
        """Write the filter for a message: a long one is cut short."""
        return _shortened(self.text)

    def restricted(self, columns: Collection[str]) -> Where | None:
        """Return the comparisons of `columns` alone, None when there are none."""
        among = frozenset(columns)
        clauses = tuple(clause for clause in self.clauses if clause[0] in among)
        return Where(clauses) if clauses else None

    def tests(self, schema: pa.Schema) -> tuple[tuple[str, Passing], ...]:
        """Return what passes of each column that is compared, for rows of `schema`.

        Raises:
            UserError: a column is not in `schema`, or a literal does not fit its type.
        """
        compared: dict[str, list[tuple[str, Literal]]] = {}
        for column, op, literal in self.clauses:
            compared.setdefault(column, []).append((op, literal))
        return tuple((name, _passing(schema, name, found)) for name, found in compared.items())

    def mask(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        """Say of each row of `table` (n,) whether it passes.

        Each column is compared in the type that it has there: what a row means depends on no
        other file.

        Raises:
            UserError: as `tests`.
        """
        mask = np.ones(table.num_rows, dtype=np.bool_)
        for name, passing in self.tests(table.schema):
            mask &= passing.mask(table.column(name)).to_numpy()
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
        raise UserError(f"filter {_quoted(text)} cannot be read; {_syntax_remedy(text)}") from error
    _refuse_rounded(tree, text)
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
            raise UserError(
                f"filter {_quoted(text)}: 'or' is not supported; run once per alternative"
            )
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
        case ast.Constant(value=bool() | str() as value):
            return value
        case ast.Constant(value=int() | float() as value) if _is_number(value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            if _is_number(value):
                return -value
    raise _not_supported(node, text)


def _refuse_rounded(tree: ast.expr, text: str) -> None:
    """Raise for a number that Python rounds: decimals would be compared with another one."""
    lines = text.strip().encode().splitlines()
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Constant) and isinstance(node.value, float)):
            continue
        spelt = lines[node.lineno - 1][node.col_offset : node.end_col_offset].decode()
        if math.isfinite(node.value) and Decimal(spelt) != Decimal(repr(node.value)):
            raise UserError(
                f"filter {_quoted(text)}: {_shortened(spelt)} has more digits than a number here "
                f"can have, and would be {node.value!r}; write it in quotes, or with fewer digits"
            )


def _is_number(value: float) -> bool:
    """Say whether a number can be compared with: Python spells no whole number of 4,300 digits."""
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, bool) and value.bit_length() <= _MOST_BITS


def _not_supported(node: ast.expr, text: str) -> UserError:
    return UserError(
        f"filter {_quoted(text)}: {_quoted(_unparsed(node))} is not a comparison of a column with "
        f"a string, a number, True or False; {_REMEDY}"
    )


def _unparsed(node: ast.expr) -> str:
    try:
        return ast.unparse(node)
    except (RecursionError, ValueError):
        return "..."


def _quoted(text: str) -> str:
    return _shortened(repr(text))


def _spell(column: str) -> str:
    try:
        node = ast.parse(column, mode="eval").body
        # Python reads `ﬁ` as `fi`.
        if isinstance(node, ast.Name) and node.id == column:
            return column
    except (SyntaxError, ValueError):
        pass
    return f"col({column!r})"


def _passing(schema: pa.Schema, column: str, compared: Sequence[tuple[str, Literal]]) -> Passing:
    positions = schema.get_all_field_indices(column)
    if len(positions) != 1:
        raise UserError(
            f"filter: no column {column!r}; columns are {shown_names(schema.names)}; correct the "
            "filter"
        )
    type_ = schema.field(positions[0]).type
    try:
        return Passing.of(type_, compared)
    except DoesNotFit as error:
        literal = _shortened(repr(error.args[0]))
        raise UserError(
            f"filter: column {column!r} has type {value_type(type_)}, which {literal} is not; "
            "write a value of that type (text, dates and times in quotes, numbers without)"
        ) from error


def shown_names(names: Iterable[str]) -> str:
    """Write some columns' names, on one line whatever they hold."""
    listed = list(names)
    shown = [
        _shortened(name if name.isprintable() and name else repr(name)) for name in listed[:20]
    ]
    more = f" and {len(listed) - 20} more" if len(listed) > 20 else ""
    return (", ".join(shown) or "none") + more


def _shortened(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}..."

"""A row filter as a value: what it compares, how it is written, and which rows pass."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from gmm_dist.errors import UserError
from gmm_dist.lake.parquet import footers
from gmm_dist.lake.parquet.comparing import (
    DoesNotFit,
    Literal,
    Operand,
    Passing,
    PassingRows,
    value_type,
)

KEYWORDS = frozenset({"and", "or", "not", "in", "is"})

Clause = tuple[str, str, Operand]
"""A column, an operator, and what it is compared with."""


class Filter(Protocol):
    """Say which rows of a lake pass: a `Where`, or an expression of pyarrow's.

    Hashable and picklable. `columns` are the columns and hive keys that it names, `text` is all of
    it, for a plan's hash, and `shown` a short form.
    """

    @property
    def columns(self) -> tuple[str, ...]: ...

    @property
    def text(self) -> str: ...

    @property
    def shown(self) -> str: ...

    def by_row(self, keys: Collection[str]) -> Self | None:
        """Return the part that hive `keys` alone do not decide, None where there is none."""

    def check(self, schema: pa.Schema, stored: Iterable[Mapping[str, pa.DataType]]) -> None:
        """Raise UserError unless it fits `schema`, of all files, and `stored`, of each one."""

    def matching_paths(
        self, keys: pa.Table, schema: Callable[[], pa.Schema]
    ) -> npt.NDArray[np.bool_]:
        """Say of each file (n,) whether a row of it may pass, by its hive `keys`, a row each.

        `schema` returns the keys and the columns of some file, for filters that need them.
        """

    def in_file(self, keys: pa.Table, schema: pa.Schema, names: Collection[str]) -> Self | bool:
        """Return what is left to test of a file that has columns of such names.

        `keys` has one row, the hive keys of its path. Columns that it lacks are null.
        `schema` types columns as they are compared.
        """

    def matching_groups(self, metadata: pq.FileMetaData, schema: pa.Schema) -> list[int]:
        """Return the row groups of a file of `schema` that may hold a row that passes.

        For a filter that `in_file` returned. Raises UserError where it does not fit the columns.
        """

    def mask(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        """Say of each row of a file's `table` (n,) whether it passes, by a filter of `in_file`."""


@dataclass(frozen=True, slots=True)
class Either:
    """Hold filters of which a row passes at least one."""

    alternatives: tuple[Where, ...]

    @property
    def text(self) -> str:
        """Write the alternatives canonically, without parentheses around them."""
        return " or ".join(where.text for where in self.alternatives)

    def known(self, truth: Callable[[Clause], bool | None]) -> Where | bool:
        """Return what is left to test; `truth` returns None for what it does not decide."""
        simplified = [where.known(truth) for where in self.alternatives]
        if any(where is True for where in simplified):
            return True
        left = [where for where in simplified if isinstance(where, Where)]
        return Where.any_of(left) if left else False


@dataclass(frozen=True, slots=True)
class Where:
    """Hold the clauses of a filter; a row passes when all of them hold.

    They are in canonical order, so texts that differ in order alone give equal filters. There is
    no `not`: `not x < 5` is held as `x >= 5`, which is the same in three-valued logic. So unknown
    may be taken for false.
    """

    clauses: tuple[Clause | Either, ...]

    @classmethod
    def all_of(cls, clauses: Iterable[Clause | Either]) -> Where:
        """Return the filter that passes where all of these hold."""
        return cls(tuple(sorted(dict.fromkeys(clauses), key=_order)))

    @classmethod
    def any_of(cls, alternatives: Iterable[Where]) -> Where:
        """Return the filter that passes where one of these does."""
        flat = dict.fromkeys(one for where in alternatives for one in where._alternatives)
        merged = sorted(_merged(flat), key=lambda where: where.text)
        return merged[0] if len(merged) == 1 else cls((Either(tuple(merged)),))

    @property
    def _alternatives(self) -> tuple[Where, ...]:
        only = self.clauses[0]
        return only.alternatives if len(self.clauses) == 1 and isinstance(only, Either) else (self,)

    @property
    def comparisons(self) -> Iterator[Clause]:
        """Yield all comparisons, whether joined by `and` or by `or`."""
        for clause in self.clauses:
            if isinstance(clause, Either):
                for where in clause.alternatives:
                    yield from where.comparisons
            else:
                yield clause

    @property
    def columns(self) -> tuple[str, ...]:
        """Name the columns that are compared, sorted."""
        return tuple(sorted({column for column, _, _ in self.comparisons}))

    @property
    def text(self) -> str:
        """Write the filter canonically; `parse` reads it back."""
        if len(self._alternatives) > 1:
            return Either(self._alternatives).text
        single = [clause for clause in self.clauses if not isinstance(clause, Either)]
        spelt = {column: spell(column) for column in {column for column, _, _ in single}}
        return " and ".join(
            f"({clause.text})" if isinstance(clause, Either) else _written(clause, spelt)
            for clause in self.clauses
        )

    @property
    def shown(self) -> str:
        """Write the filter for a message: a long one is cut short."""
        return shortened(self.text)

    def restricted(self, columns: Collection[str]) -> Where | None:
        """Return the part of the filter about `columns` alone, None when there is none.

        All rows that pass the filter pass it too: comparisons of other columns count as true.
        """
        among = frozenset(columns)
        simplified = self.known(lambda clause: None if clause[0] in among else True)
        return simplified if isinstance(simplified, Where) else None

    def by_row(self, keys: Collection[str]) -> Where | None:
        """Return the part that hive `keys` alone do not decide, None where there is none."""
        of_path = frozenset(keys)
        clauses = tuple(
            clause
            for clause in self.clauses
            if not of_path.issuperset(
                Where((clause,)).columns if isinstance(clause, Either) else clause[:1]
            )
        )
        return Where(clauses) if clauses else None

    def matching_paths(
        self, keys: pa.Table, schema: Callable[[], pa.Schema]
    ) -> npt.NDArray[np.bool_]:
        """Say of each file (n,) whether a row of it may pass, by its hive `keys`, a row each.

        `schema` returns the columns of some file, which this kind of filter does not need.
        """
        key_filter = self.restricted(keys.column_names)
        return (
            np.ones(keys.num_rows, dtype=np.bool_) if key_filter is None else key_filter.mask(keys)
        )

    def in_file(self, keys: pa.Table, schema: pa.Schema, names: Collection[str]) -> Where | bool:
        """Return what is left to test of a file that has columns of such names.

        `keys` has one row, the hive keys of its path. Columns that it lacks are null.
        """

        columns = set(self.columns)
        if columns.issubset(names) and columns.isdisjoint(keys.column_names):
            return self

        def truth(clause: Clause) -> bool | None:
            if clause[0] in keys.column_names:
                return bool(Where((clause,)).mask(keys)[0])
            return None if clause[0] in names else clause[1] == "is"

        return self.known(truth)

    def known(self, truth: Callable[[Clause], bool | None]) -> Where | bool:
        """Return what is left to test; `truth` returns None for what it does not decide."""
        left: list[Clause | Either] = []
        for clause in self.clauses:
            known = clause.known(truth) if isinstance(clause, Either) else truth(clause)
            if known is False:
                return False
            if known is None:
                left.append(clause)
            elif isinstance(known, Where):
                left.extend(known.clauses)
        return Where.all_of(left) if left else True

    def check(self, schema: pa.Schema, stored: Iterable[Mapping[str, pa.DataType]]) -> None:
        """Check that columns are in `schema`, and literals fit its types and those of each file.

        Raises:
            UserError: a column is not there, or a literal does not fit.
        """
        self.tests(schema)
        for types in stored:
            clauses = tuple(clause for clause in self.comparisons if clause[0] in types)
            Where(clauses).tests(
                pa.schema([(name, types[name]) for name in {c[0] for c in clauses}])
            )

    def tests(self, schema: pa.Schema) -> PassingRows:
        """Return what passes, for rows of `schema`.

        Raises:
            UserError: a column is not in `schema`, or a literal does not fit its type.
        """
        compared: dict[str, list[tuple[str, Operand]]] = {}
        several = []
        for clause in self.clauses:
            if isinstance(clause, Either):
                several.append(tuple(where.tests(schema) for where in clause.alternatives))
            else:
                compared.setdefault(clause[0], []).append(clause[1:])
        columns = tuple(
            (name, _passing(schema, name, comparisons)) for name, comparisons in compared.items()
        )
        return PassingRows(columns, tuple(several))

    def matching_groups(self, metadata: pq.FileMetaData, schema: pa.Schema) -> list[int]:
        """Return the row groups of a file of `schema` that may hold a row that passes.

        Raises:
            UserError: as `tests`.
        """
        return footers.matching_groups(metadata, schema, self.tests(schema))

    def mask(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        """Say of each row of `table` (n,) whether it passes.

        Each column is compared in the type that it has there: what a row means depends on no
        other file.

        Raises:
            UserError: as `tests`.
        """
        return self.tests(table.schema).mask(table)


def one_of(column: str, literals: Iterable[Literal]) -> Clause:
    """Return the clause that passes where a column is one of some literals."""
    distinct = tuple(sorted({repr(literal): literal for literal in literals}.values(), key=repr))
    return (column, "==", distinct[0]) if len(distinct) == 1 else (column, "in", distinct)


def _merged(alternatives: Iterable[Where]) -> list[Where]:
    """Return alternatives; those that compare one column with values become one."""
    equal: dict[str, list[Literal]] = {}
    others = []
    for where in alternatives:
        match where.clauses:
            case ((str(name), "==" | "in", operand),):
                assert operand is not None
                equal.setdefault(name, []).extend(
                    operand if isinstance(operand, tuple) else (operand,)
                )
            case _:
                others.append(where)
    return others + [Where((one_of(name, literals),)) for name, literals in equal.items()]


def _order(clause: Clause | Either) -> tuple[bool, str, str, str]:
    if isinstance(clause, Either):
        return True, clause.text, "", ""
    # 1, 1.0 and True are equal but not the same literal: order by what is written.
    return False, clause[0], clause[1], repr(clause[2])


def _written(clause: Clause, spelt: Mapping[str, str]) -> str:
    column, operator, operand = clause
    if operator in ("==", "!=", "<", "<=", ">", ">="):
        return f"{spelt[column]} {operator} {operand!r}"
    name = f"col({column!r})" if column.lower() in (*KEYWORDS, "null") else spelt[column]
    if operand is None:
        return f"{name} {operator} null"
    assert isinstance(operand, tuple)
    return f"{name} in ({', '.join(map(repr, operand)) or 'null'})"


def spell(column: str) -> str:
    """Write a column as a filter names it."""
    try:
        node = ast.parse(column, mode="eval").body
        # Python reads `ﬁ` as `fi`.
        if isinstance(node, ast.Name) and node.id == column:
            return column
    except (SyntaxError, ValueError):
        pass
    return f"col({column!r})"


def _passing(schema: pa.Schema, column: str, compared: Sequence[tuple[str, Operand]]) -> Passing:
    positions = schema.get_all_field_indices(column)
    if len(positions) != 1:
        raise no_column(column, schema.names)
    type_ = schema.field(positions[0]).type
    try:
        return _compiled(type_, _Compared(repr(compared), tuple(compared)))
    except DoesNotFit as error:
        literal = shortened(repr(error.args[0]))
        raise UserError(
            f"filter: column {column!r} has type {value_type(type_)}, which {literal} is not; "
            "write a value of that type (text, dates and times in quotes, numbers without)"
        ) from error


@dataclass(frozen=True, slots=True)
class _Compared:
    """Hold comparisons, equal where they are written alike: 1, 1.0 and True are not the same."""

    written: str
    comparisons: tuple[tuple[str, Operand], ...] = field(compare=False)


@functools.lru_cache(maxsize=64)
def _compiled(type_: pa.DataType, compared: _Compared) -> Passing:
    """Return what passes; once for all files and batches, for lists of values may be long."""
    return Passing.of(type_, compared.comparisons)


def no_column(name: str, names: Iterable[str]) -> UserError:
    """Say that a filter names a column that is not among those there are."""
    return UserError(
        f"filter: no column {name!r}; columns are {shown_names(names)}; correct the filter"
    )


def shown_names(names: Iterable[str]) -> str:
    """Write some columns' names, on one line whatever they hold."""
    listed = list(names)
    shown = [shortened(name if name.isprintable() and name else repr(name)) for name in listed[:20]]
    more = f" and {len(listed) - 20} more" if len(listed) > 20 else ""
    return (", ".join(shown) or "none") + more


def shortened(text: str, most: int = 200) -> str:
    """Cut a text that is too long for a message."""
    return text if len(text) <= most else f"{text[:most]}..."

"""A row filter that is a `pyarrow.compute.Expression`: the rows that `Table.filter` keeps.

Nulls and NaN mean what they mean to Arrow: a comparison with null is null, one with NaN is false,
`~` of that is true. Arrow decides which files and row groups to leave out, by guarantees made from
hive keys and footers. A footer's range of a floating-point column holds for its numbers alone, so
NaN is a second case beside it: Arrow itself leaves out row groups whose NaN `~(x == 5)` keeps.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import operator
import pickle
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem

from gmm_dist.errors import UserError
from gmm_dist.lake.filters.text import parse
from gmm_dist.lake.filters.where import Filter, Where, no_column, shortened
from gmm_dist.lake.parquet import footers
from gmm_dist.lake.parquet.comparing import as_scalar, stored

_MOST_FLOATING = 3  # columns; each doubles the cases of a row group
_KEYS = "call|end|literal|options|field_ref|nested_field_ref"
_NAMED = re.compile(rf"^({_KEYS}): '(.*?)'(?=\n(?:{_KEYS}): '|\Z)", re.DOTALL | re.MULTILINE)
_RENAMED = {"and": "and_", "or": "or_"}
_BOUNDED_TYPES = (
    *(pa.types.is_integer, pa.types.is_float32, pa.types.is_float64, pa.types.is_string),
    *(pa.types.is_large_string, pa.types.is_date32, pa.types.is_timestamp, pa.types.is_decimal128),
)


def filter_of(where: str | pc.Expression | Filter | None) -> Filter | None:
    """Return a filter, written as text or as an expression, as a value.

    Raises:
        UserError: it is not a filter, or one that cannot be taken.
    """
    if isinstance(where, str):
        return parse(where)
    if isinstance(where, pc.Expression):
        return ArrowFilter.of(where)
    if where is None or isinstance(where, Where | ArrowFilter):
        return where
    raise UserError(
        f"a filter of type {type(where).__name__} cannot be taken; write it as text, or as an "
        "expression: pc.field('a') > 3"
    )


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class ArrowFilter:
    """Hold an expression as bytes, which can be hashed and travel to workers.

    `keys` and `types` are set for one file: the hive keys of its path, in a row, and the types
    in which its other columns are compared.
    """

    packed: bytes
    columns: tuple[str, ...]
    keys: pa.Table = field(default_factory=lambda: pa.table({}), compare=False)
    types: pa.Schema = field(default_factory=lambda: pa.schema([]), compare=False)

    @classmethod
    def of(cls, expression: pc.Expression) -> ArrowFilter:
        """Take an expression.

        Raises:
            UserError: it names no column, or one by its position, or calls a function of the
                user's own.
        """
        try:
            packed = pickle.dumps(expression, protocol=5)
        except pa.ArrowException as error:
            remedy = "name columns by pc.field('name')"
            raise _refused(
                expression, f"it cannot be sent to workers: {_line(error)}", remedy
            ) from error
        columns, functions = _named(expression)
        user_functions = sorted(
            name for name in functions if not hasattr(pc, _RENAMED.get(name, name))
        )
        if user_functions:
            reason = f"it calls {user_functions[0]!r}, which workers do not have"
            raise _refused(expression, reason, "use pyarrow's own functions")
        if not columns:
            raise _refused(expression, "it names no column", "name one by pc.field('name')")
        return cls(packed=packed, columns=columns)

    def __repr__(self) -> str:
        return f"<{self.shown}>"

    @property
    def expression(self) -> pc.Expression:
        """Return the expression, for Arrow to evaluate."""
        return pickle.loads(self.packed)

    @property
    def text(self) -> str:
        """Write the expression, and a hash of it: types and long lists are not spelt out."""
        return f"{_line(self.expression)} (sha256 {hashlib.sha256(self.packed).hexdigest()})"

    @property
    def shown(self) -> str:
        """Write the filter for a message: a long one is cut short."""
        return shortened(_line(self.expression))

    def by_row(self, keys: Collection[str]) -> ArrowFilter | None:
        """Return it whole, None where it names hive `keys` alone."""
        return None if set(self.columns) <= set(keys) else self

    def check(self, schema: pa.Schema, stored: Iterable[Mapping[str, pa.DataType]]) -> None:
        """Raise UserError unless all columns are in `schema`, and Arrow can compare them there."""
        for name in self.columns:
            if name not in schema.names:
                raise no_column(name, schema.names)
        self._check_types(pa.schema([schema.field(name) for name in self.columns]))

    def _check_types(self, types: pa.Schema) -> None:
        nulls = pa.table([pa.nulls(1, type_) for type_ in types.types], schema=types)
        result_type = self._evaluated(nulls).type
        if not pa.types.is_boolean(result_type):
            raise _refused(self.expression, f"its values are {result_type}, not true or false")

    def _evaluated(self, table: pa.Table) -> pa.ChunkedArray:
        try:
            rows = ds.dataset(table).scanner(columns={"": self.expression}, use_threads=False)
            return rows.to_table().column(0)
        except (pa.ArrowException, KeyError) as error:
            raise _refused(self.expression, _line(error)) from error

    def matching_paths(
        self, keys: pa.Table, schema: Callable[[], pa.Schema]
    ) -> npt.NDArray[np.bool_]:
        """Say of each file (n,) whether a row of it may pass, as `Filter` does."""
        named = [name for name in self.columns if name in keys.column_names]
        known = keys.schema if len(named) == len(self.columns) else schema()
        types = _fields(self.columns, known)
        rows = keys.select(named).to_pylist()
        distinct = {tuple(row.values()): row for row in rows}
        guarantees = [[_all(_path_guarantees(row, keys.schema))] for row in distinct.values()]
        try:
            may_pass = dict(zip(distinct, self._satisfiable(guarantees, types), strict=True))
        except UserError:  # the types of some file: other files may have others
            return np.ones(keys.num_rows, dtype=np.bool_)
        return np.array([may_pass[tuple(row.values())] for row in rows])

    def in_file(self, keys: pa.Table, schema: pa.Schema, names: Collection[str]) -> ArrowFilter:
        """Return the filter that knows the hive keys of a file, and the types of columns."""
        path_keys = keys.select([name for name in self.columns if name in keys.column_names])
        others = [name for name in self.columns if name not in path_keys.column_names]
        return replace(self, keys=path_keys, types=_fields(others, schema))

    def matching_groups(self, metadata: pq.FileMetaData, schema: pa.Schema) -> list[int]:
        """Return the row groups that may hold a row that passes, as `Filter` does."""
        row = {name: self.keys.column(name)[0].as_py() for name in self.keys.column_names}
        path = _path_guarantees(row, self.keys.schema)
        # Arrow takes `x < nan` for true of numbers that are not above it.
        names = [
            field.name
            for field in self.types
            if not (pa.types.is_floating(field.type) and "nan" in str(self.expression))
        ]
        guarantees = [
            [_all([*path, *case]) for case in _footer_guarantees(metadata, group, schema, names)]
            for group in range(metadata.num_row_groups)
        ]
        types = pa.schema([*self.keys.schema, *self.types])
        return [group for group, may in enumerate(self._satisfiable(guarantees, types)) if may]

    def _satisfiable(
        self, guarantees: Sequence[Sequence[pc.Expression]], types: pa.Schema
    ) -> list[bool]:
        """Say, for each list of cases, whether a row for which one of them is true may pass."""
        self._check_types(types)
        files, format_ = LocalFileSystem(), ds.ParquetFileFormat()
        # Arrow reads a fragment's guarantee, and never opens its file.
        fragments = [
            format_.make_fragment(str(i), files, partition_expression=case)
            for i, cases in enumerate(guarantees)
            for case in cases
        ]
        every = ds.FileSystemDataset(fragments, types, format_, files)
        try:
            left = {int(fragment.path) for fragment in every.get_fragments(self.expression)}
        except pa.ArrowException:  # of a value that no row may have
            return [True] * len(guarantees)
        return [i in left for i in range(len(guarantees))]

    def mask(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        """Say of each row of a file's `table` (n,) whether it passes, as `Filter` does."""
        n = table.num_rows
        columns = {
            name: pa.repeat(values[0], n)
            for name, values in zip(self.keys.column_names, self.keys.columns, strict=True)
        }
        for name, type_ in zip(self.types.names, self.types.types, strict=True):
            is_there = name in table.column_names
            columns[name] = self._as(table.column(name), type_) if is_there else pa.nulls(n, type_)
        passes = self._evaluated(pa.table(columns)).fill_null(False)
        return np.asarray(passes.to_numpy())

    def _as(self, column: pa.ChunkedArray, type_: pa.DataType) -> pa.ChunkedArray:
        if column.type == type_:
            return column
        try:
            return stored(column).cast(type_)
        except pa.ArrowException as error:
            raise _refused(self.expression, _line(error)) from error


def _named(expression: pc.Expression) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the columns and the functions that an expression names.

    They are metadata of the schema that Arrow packs it with, where each may occur many times.
    """
    (packed,) = expression.__reduce__()[1]
    metadata = pa.ipc.open_file(packed).schema.to_string(truncate_metadata=False)
    columns: set[str] = set()
    functions: set[str] = set()
    entries = iter(_NAMED.findall(metadata))
    for key, value in entries:
        if key == "call":
            functions.add(value)
        elif key == "field_ref":
            columns.add(value)
        elif key == "nested_field_ref":  # so many names follow: a column, and what is in it
            names = [next(entries)[1] for _ in range(int(value))]
            columns.add(names[0])
    return tuple(sorted(columns)), frozenset(functions)


def _fields(names: Iterable[str], known: pa.Schema) -> pa.Schema:
    """Return the fields of such names; those that are not known are null."""
    return pa.schema(
        [known.field(n) if n in known.names else pa.field(n, pa.null()) for n in names]
    )


def _all(conditions: Iterable[pc.Expression]) -> pc.Expression:
    return functools.reduce(operator.and_, conditions, pc.scalar(True))


def _path_guarantees(keys: Mapping[str, object], types: pa.Schema) -> list[pc.Expression]:
    """Return what is true of all rows of a file, by its hive keys."""
    return [
        pc.field(name).is_null()
        if value is None
        else pc.field(name) == pa.scalar(value, types.field(name).type)
        for name, value in keys.items()
    ]


def _footer_guarantees(
    metadata: pq.FileMetaData, group: int, schema: pa.Schema, names: Iterable[str]
) -> list[list[pc.Expression]]:
    """Return cases of which one is true of each row of a row group."""
    column_cases, floating = [], 0
    for name in names:
        cases = _column_guarantees(metadata, group, schema, name)
        floating += len(cases) > 1
        if len(cases) == 1 or 0 < floating <= _MOST_FLOATING:
            column_cases.append(cases)
    return [list(itertools.chain.from_iterable(case)) for case in itertools.product(*column_cases)]


def _column_guarantees(
    metadata: pq.FileMetaData, group: int, schema: pa.Schema, name: str
) -> list[list[pc.Expression]]:
    """Return the cases of a column: its numbers and, where it may have them, its NaN."""
    column = pc.field(name)
    if name not in schema.names:
        return [[column.is_null()]]
    type_ = schema.field(name).type
    bounds, nulls = footers.extremes_and_nulls(metadata, group, schema, name)
    if nulls == metadata.row_group(group).num_rows and bounds is None:
        return [[column.is_null()]]
    if bounds is None or not any(is_of(type_) for is_of in _BOUNDED_TYPES):
        return [[]]
    try:
        low, high = (as_scalar(type_, key).cast(type_) for key in bounds)
    except UnicodeDecodeError:  # a text that the writer cut short
        return [[]]
    within = [column >= low, column <= high]
    if nulls != 0:
        within = [bound | column.is_null() for bound in within]
    if pa.types.is_floating(type_):
        return [within, [column == pa.scalar(float("nan"), type_)]]
    return [within]


def _refused(
    expression: pc.Expression, reason: str, remedy: str = "correct the filter"
) -> UserError:
    said = shortened(_line(expression)), shortened(reason)
    return UserError(f"filter {said[0]} cannot be taken: {said[1]}; {remedy}")


def _line(said: object) -> str:
    return " ".join(str(said).split())

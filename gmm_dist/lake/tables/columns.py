"""The columns of a table as its data files hold them: under other names, or not at all."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gmm_dist.errors import UserError
from gmm_dist.lake.parquet.decoding import parquet_file

_FIELD_ID = b"PARQUET:field_id"


@dataclass(frozen=True, slots=True, kw_only=True)
class TableColumns:
    """Say how the data files of a table name its columns.

    `schema` has the columns that files hold, under the table's names and in its types; `stored`
    has, in that order, their names in the files or, with `by_id`, their field ids there. Of files
    without ids, `without_ids` has the names that each may have; None where the table tells none.
    """

    schema: pa.Schema
    stored: tuple[str | int, ...]
    by_id: bool = False
    without_ids: tuple[tuple[str, ...], ...] | None = None

    def names_in(self, file_schema: pa.Schema, file: str) -> dict[str, str]:
        """Return the name in a file of each of the table's columns that the file has.

        `file` names it in messages.

        Raises:
            UserError: columns go by field ids, and the file has none.
        """
        if not self.by_id:
            there = set(file_schema.names)
            return {
                name: str(stored)
                for name, stored in zip(self.schema.names, self.stored, strict=True)
                if stored in there
            }
        ids = {
            int(field.metadata[_FIELD_ID]): field.name
            for field in file_schema
            if field.metadata and _FIELD_ID in field.metadata
        }
        if not ids and self.without_ids is not None:
            there = set(file_schema.names)
            found = (
                (name, next((own for own in names if own in there), None))
                for name, names in zip(self.schema.names, self.without_ids, strict=True)
            )
            return {name: own for name, own in found if own is not None}
        if not ids and len(file_schema):
            raise UserError(
                "the table finds its columns by field ids, and this file has none",
                where=file,
                remedy="have the table's own writer write it anew, as REORG TABLE does",
            )
        places = zip(self.schema.names, self.stored, strict=True)
        return {name: ids[int(stored)] for name, stored in places if stored in ids}


def has_names(type_: pa.DataType) -> bool:
    """Say whether a type has named parts, at any depth."""
    if pa.types.is_struct(type_):
        return True
    return any(has_names(type_.field(i).type) for i in range(type_.num_fields))


class LakeFileReader:
    """Read a Parquet file by the lake's names of columns, as `pq.ParquetFile` does by its own.

    Of a table's file: columns that the file lacks are null, as they came to the table later;
    columns that the table lacks are not there, as they were dropped. A timestamp without a zone is
    UTC where the table says so: Spark writes INT96, which cannot say it.

    Args:
        source: The file, opened.
        columns: The columns of the table that it belongs to, if any.
        name: The file's name, for messages.
        options: As `parquet_file` takes them.
    """

    def __init__(
        self, source: Any, columns: TableColumns | None, name: str, **options: Any
    ) -> None:
        self._parquet = parquet_file(source, **options)
        self._columns = columns
        file_schema: pa.Schema = self._parquet.schema_arrow
        self._stored = {} if columns is None else columns.names_in(file_schema, name)
        self._file_schema = file_schema

    @property
    def metadata(self) -> pq.FileMetaData:
        return self._parquet.metadata

    @cached_property
    def _fields(self) -> dict[str, pa.Field]:
        """The table's columns by name: a schema looks for each among all."""
        return (
            {} if self._columns is None else {field.name: field for field in self._columns.schema}
        )

    @cached_property
    def schema(self) -> pa.Schema:
        """The lake's columns, in the types that they are read in."""
        if self._columns is None:
            return self._file_schema
        return pa.schema([(field.name, self._type(field)) for field in self._columns.schema])

    @cached_property
    def stored_schema(self) -> pa.Schema:
        """All columns of the file, as they are stored; those that the lake lacks have no names."""
        if self._columns is None:
            return self._file_schema.remove_metadata()
        names = {stored: name for name, stored in self._stored.items()}
        return pa.schema(
            [
                (names.get(field.name, f"\0{i}"), field.type)
                for i, field in enumerate(self._file_schema)
            ]
        )

    @property
    def absent(self) -> Collection[str]:
        """The columns of the lake that the file lacks."""
        if self._columns is None:
            return ()
        return [name for name in self._columns.schema.names if name not in self._stored]

    def stored_names(self, names: Collection[str]) -> Collection[str]:
        """Return the names in the file of those of the lake's columns that it has."""
        if self._columns is None:
            return names
        return [self._stored[name] for name in names if name in self._stored]

    def read_row_group(self, group: int, columns: Sequence[str]) -> pa.Table:
        """Return the rows of a row group, deleted ones too."""
        table = self._parquet.read_row_group(group, columns=list(self.stored_names(columns)))
        return self._named(table, columns)

    def iter_batches(
        self, size: int, group: int, columns: Sequence[str], *, use_threads: bool = True
    ) -> Iterator[pa.Table]:
        """Yield the rows of a row group, deleted ones too, `size` at a time at most."""
        for batch in self._parquet.iter_batches(
            size,
            row_groups=[group],
            columns=list(self.stored_names(columns)),
            use_threads=use_threads,
        ):
            yield self._named(pa.Table.from_batches([batch]), columns)

    def _named(self, table: pa.Table, names: Sequence[str]) -> pa.Table:
        if self._columns is None:
            return table
        fields = self._fields
        columns = {name: self._column(table, fields[name]) for name in names if name in fields}
        return pa.table(columns) if columns else table.select([])

    def _column(self, table: pa.Table, field: pa.Field) -> pa.ChunkedArray | pa.Array:
        type_ = self._type(field)
        if field.name not in self._stored:
            return pa.nulls(table.num_rows, type_)
        column = table.column(self._stored[field.name])
        return column if column.type == type_ else column.cast(type_)

    def _type(self, field: pa.Field) -> pa.DataType:
        """Return the type in which a column is read: the file's own, but for the zone of times."""
        if field.name not in self._stored:
            return field.type
        type_ = self._file_schema.field(self._stored[field.name]).type
        both = pa.types.is_timestamp(type_) and pa.types.is_timestamp(field.type)
        return pa.timestamp(type_.unit, field.type.tz) if both and type_.tz is None else type_

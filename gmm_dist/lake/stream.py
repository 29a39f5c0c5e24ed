"""The rows of one file, batch after batch: memory for a batch, however large the file is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gmm_dist import storage
from gmm_dist.errors import Option, UserError
from gmm_dist.lake import read
from gmm_dist.lake.deal import RowRange
from gmm_dist.lake.listing import name_of
from gmm_dist.lake.opening import opened
from gmm_dist.lake.parquet.comparing import stored
from gmm_dist.lake.parquet.decoding import wrong_rows
from gmm_dist.lake.parquet.footers import statistics, stored_in
from gmm_dist.lake.plan import Plan
from gmm_dist.lake.tables.columns import LakeFileReader

BATCH_ROWS = 1 << 16  # at most
BATCH_BYTES = 1 << 25
_LEAST_ROWS = 1024
_WHOLE_BYTES = 1 << 27  # up to here a row group is fetched at once
_BUFFER_BYTES = 1 << 22  # of each column, of a larger one

_Chunk = tuple[str, pq.ColumnChunkMetaData]


def row_groups(plan: Plan) -> tuple[tuple[int, ...], ...]:
    """Return, for each file of a plan, its row groups that may hold a row that passes."""
    groups: list[dict[int, None]] = [{} for _ in plan.files]
    for part in itertools.chain.from_iterable(plan.shards):
        groups[part.file][part.row_group] = None
    return tuple(map(tuple, groups))


def stream(
    plan: Plan,
    index: int,
    groups: Sequence[int],
    *,
    beside: int = 0,
    row_index: str | None = None,
) -> Iterator[tuple[pa.Table, npt.NDArray[np.float64]]]:
    """Yield the live rows of row groups of `plan.files[index]` that pass the filter, in order.

    Each item is a table of the plan's kept columns, in the plan's types (null where the file lacks
    one), and the features (d, n), missing values as NaN. Peak memory: a row group's bytes as they
    are stored, 128 MB at most, and a few times a decoded batch of 32 MB, as the footer has it: at
    most 65,536 rows, fewer of wide ones, at least 1024.

    Args:
        plan: The plan.
        index: The number of the file.
        groups: The numbers of its row groups.
        beside: The bytes that the caller makes of each row.
        row_index: The name of a column to put behind the kept ones: each row's number in the file,
            from 0, deleted rows counted.

    Raises:
        UserError: an infinite value, a file that changed since the plan was made, has other rows
            than its footer says, is corrupt or cannot be reached.
    """
    types = pa.schema([plan.schema.field(name) for name in plan.kept])
    file, name = plan.files[index], name_of(plan.url, plan.files[index])
    with _Batches(plan, index, beside) as batches:
        for group in groups:
            first, live = sum(file.rows[:group]), file.live(group)
            start = n_live = 0  # of rows before the batch: all, and those that live
            while (batch := batches.after(group, start)) is not None:
                stop = start + batch.num_rows
                mask = None if live is None else live[start:stop]
                batch = read.those(batch, mask)
                stop_live = n_live + batch.num_rows
                part = RowRange(file=index, row_group=group, start=n_live, stop=stop_live)
                table, X, positions = read.passed(plan, part, batch)
                kept = _kept(table, types, f"{name}, row group {group}")
                if row_index is not None:
                    rows = np.arange(first + start, first + stop)
                    rows = rows if mask is None else rows[mask]
                    rows = rows if positions is None else rows[positions]
                    kept = _with_column(kept, row_index, pa.array(rows, pa.int64()))
                yield kept, X
                start, n_live = stop, stop_live


def _with_column(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    # A table without columns takes none: it has another number of rows.
    return table.append_column(name, column) if table.num_columns else pa.table({name: column})


def _kept(table: pa.Table, types: pa.Schema, where: str) -> pa.Table:
    columns = [
        _cast(table.column(field.name), field, where)
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in types
    ]
    if not columns:  # a table of no columns would forget how many rows it has
        return table.select([])
    return pa.table(columns, schema=types)


def _cast(column: pa.ChunkedArray, field: pa.Field, where: str) -> pa.ChunkedArray:
    """Return a column in the type that it has in all scored files; no value may change."""
    if column.type == field.type:
        return column
    try:
        column = stored(column)
        if pa.types.is_list_view(column.type) or pa.types.is_large_list_view(column.type):
            column = pa.chunked_array([_as_lists(chunk) for chunk in column.chunks])
        return column.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"column {field.name!r} of type {column.type} cannot be written as {field.type}, the "
            f"type that it has over all files ({reason})",
            where=where,
            remedy="write the files with one type or leave out "
            + Option("keep")
            + f" {field.name!r}",
        ) from error


def _as_lists(views: pa.Array) -> pa.Array:
    """Return views of lists as lists: Arrow 26 casts them to lists that are not valid."""
    lengths = pc.list_value_length(views).fill_null(0).cast(pa.int64()).to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pa.LargeListArray.from_arrays(offsets, views.flatten(), mask=views.is_null())


class _Batches:
    """Keeps a file open at a row, and returns to that row after an outage."""

    def __init__(self, plan: Plan, index: int, beside: int) -> None:
        self._plan, self._file = plan, plan.files[index]
        self._beside = beside
        self._fs, self._root = storage.open_url(plan.url)
        self._name = name_of(plan.url, self._file)
        self._stack = ExitStack()
        self._source: Any = None
        self._batches: Iterator[pa.Table] = iter(())
        self._at = (-1, 0)  # the row group and row that the next batch begins with

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def after(self, group: int, start: int) -> pa.Table | None:
        """Return the rows of a row group from `start` on, a batch of them; None after the last."""
        if start == self._file.rows[group]:
            return None
        return storage.patiently(lambda: self._read(group, start), self._name)

    def _read(self, group: int, start: int) -> pa.Table:
        if self._source is None:
            opening = opened(self._fs, self._root, self._plan.url, self._file)
            self._source = self._stack.enter_context(opening)
        try:
            if self._at != (group, start):
                self._seek(group, start)
            batch = next(self._batches, None)
            if batch is None:
                raise wrong_rows(self._name, group, start, self._file.rows[group])
        except BaseException:
            self._source, self._at = None, (-1, 0)
            with self._stack.pop_all():  # `opened` explains the error
                raise
        self._at = group, start + batch.num_rows
        return batch

    def _seek(self, group: int, start: int) -> None:
        plan, metadata = self._plan, pq.read_metadata(self._source)
        wanted = sorted({*plan.read_columns, *plan.kept})
        stored = _stored_names(plan, metadata.schema.to_arrow_schema(), wanted, self._name)
        chunks = _chunks(metadata, group, stored)
        every = itertools.chain.from_iterable(chunks.values())
        size = sum(chunk.total_compressed_size for _, chunk in every)
        whole = size <= _WHOLE_BYTES
        reader = LakeFileReader(
            self._source,
            plan.table_columns,
            self._name,
            metadata=metadata,
            pre_buffer=whole,
            buffer_size=0 if whole else _BUFFER_BYTES,
        )
        self._batches = reader.iter_batches(
            self._batch_rows(metadata.row_group(group).num_rows, chunks),
            group,
            # A table's reader has columns that the file lacks, as nulls.
            wanted if plan.table_columns is not None else list(stored),
            use_threads=False,
        )
        row = 0
        while row < start:
            row += next(self._batches).num_rows

    def _batch_rows(self, rows: int, chunks: Mapping[str, Sequence[_Chunk]]) -> int:
        """Return how many rows make up a batch; the file and the plan alone decide it."""
        plan = self._plan
        others = {*plan.read_columns, *plan.kept} - {*plan.columns}
        width = 8 * plan.n_features + self._beside
        width += sum(
            _value_bytes(rows, chunks.get(name, ()), plan.schema.field(name)) for name in others
        )
        return min(max(BATCH_BYTES // width, _LEAST_ROWS), BATCH_ROWS)


def _stored_names(
    plan: Plan, file_schema: pa.Schema, names: Sequence[str], file: str
) -> dict[str, str]:
    """Return the names in a file of those of the lake's columns that it has."""
    if plan.table_columns is None:
        there = {name: name for name in file_schema.names}
    else:
        there = plan.table_columns.names_in(file_schema, file)
    return {name: there[name] for name in names if name in there}


def _chunks(
    metadata: pq.FileMetaData, group: int, stored: Mapping[str, str]
) -> dict[str, list[_Chunk]]:
    """Return each column's chunks in a row group, with their physical types by the schema.

    `stored` has the columns' names in the file.
    """
    of_group, leaves = metadata.row_group(group), stored_in(metadata, stored.values())
    return {
        name: [(metadata.schema.column(i).physical_type, of_group.column(i)) for i in leaves[own]]
        for name, own in stored.items()
    }


def _value_bytes(rows: int, chunks: Sequence[_Chunk], field: pa.Field) -> int:
    """Return about how many bytes a column's value takes when it is decoded."""
    stored: int = sum(chunk.total_uncompressed_size for _, chunk in chunks) // max(rows, 1)
    # A dictionary stores once what is decoded many times: then the type or extremes give the size.
    chunk_statistics = [
        statistics(chunk, type_) for type_, chunk in chunks if type_ == "BYTE_ARRAY"
    ]
    texts = [stats for stats in chunk_statistics if stats is not None and stats.has_min_max]
    longest = sum(max(len(stats.min_raw), len(stats.max_raw)) for stats in texts)
    fixed = field.type.bit_width // 8 if pa.types.is_primitive(field.type) else 0
    return max(stored, longest, fixed)

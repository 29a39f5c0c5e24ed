"""The rows of one file, batch after batch: memory for a batch, however large the file is."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from gmm_dist import reading, storage
from gmm_dist.lake import Plan, RowRange
from gmm_dist.listing import name_of, opened

BATCH_ROWS = 1 << 16
_WHOLE_BYTES = 1 << 27  # up to here a row group is fetched at once
_BUFFER_BYTES = 1 << 22  # of each column, of a larger one


def row_groups(plan: Plan) -> tuple[tuple[int, ...], ...]:
    """Return, for each file of a plan, its row groups that may hold a row that passes."""
    groups: list[dict[int, None]] = [{} for _ in plan.files]
    for part in itertools.chain.from_iterable(plan.shards):
        groups[part.file][part.row_group] = None
    return tuple(map(tuple, groups))


def stream(
    plan: Plan, index: int, groups: Sequence[int]
) -> Iterator[tuple[pa.Table, npt.NDArray[np.float64]]]:
    """Yield the rows of some row groups of `plan.files[index]` that pass the filter, in order.

    Each time a table of the plan's kept columns, in the plan's types (null where the file lacks
    one), and the features (d, n), missing values as NaN. Peak memory: a row group's bytes as they
    are stored, 128 MB at most, and a decoded batch of 65,536 rows.

    Raises:
        UserError: an infinite value, a file that changed since the plan was made, is corrupt or
            cannot be reached.
    """
    types = pa.schema([plan.schema.field(name) for name in plan.kept])
    with _Batches(plan, index) as batches:
        for group in groups:
            start = 0
            while (batch := batches.after(group, start)) is not None:
                stop = start + batch.num_rows
                table, X = reading.passed(plan, RowRange(index, group, start, stop), batch)
                yield _kept(table, types), X
                start = stop


def _kept(table: pa.Table, types: pa.Schema) -> pa.Table:
    columns = [
        table.column(field.name).cast(field.type)
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in types
    ]
    if not columns:  # a table of no columns would forget how many rows it has
        return table.select([])
    return pa.table(columns, schema=types)


class _Batches:
    """Keeps a file and a place in it open, and finds the place again after an outage."""

    def __init__(self, plan: Plan, index: int) -> None:
        self._plan, self._file = plan, plan.files[index]
        self._fs, self._root = storage.open_url(plan.url)
        self._name = name_of(plan.url, self._file)
        self._stack = ExitStack()
        self._source: Any = None
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._at = (-1, 0)  # the row group and row that the next batch begins with

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def after(self, group: int, start: int) -> pa.Table | None:
        """Return the rows of a row group from `start` on, a batch of them; None after the last."""
        if start >= self._file.rows[group]:
            return None
        return storage.patiently(lambda: self._read(group, start), self._name)

    def _read(self, group: int, start: int) -> pa.Table:
        if self._source is None:
            opening = opened(self._fs, self._root, self._plan.url, self._file)
            self._source = self._stack.enter_context(opening)
        try:
            if self._at != (group, start):
                self._seek(group, start)
            batch = next(self._batches)
        except BaseException:
            self._source, self._at = None, (-1, 0)
            with self._stack.pop_all():  # `opened` explains the error
                raise
        self._at = group, start + batch.num_rows
        return pa.Table.from_batches([batch])

    def _seek(self, group: int, start: int) -> None:
        metadata = pq.read_metadata(self._source)
        wanted = {*self._plan.read_columns, *self._plan.kept} & set(
            metadata.schema.to_arrow_schema().names
        )
        whole = _stored_bytes(metadata.row_group(group), wanted) <= _WHOLE_BYTES
        parquet = pq.ParquetFile(
            self._source,
            metadata=metadata,
            pre_buffer=whole,
            buffer_size=0 if whole else _BUFFER_BYTES,
        )
        self._batches = parquet.iter_batches(
            BATCH_ROWS, row_groups=[group], columns=sorted(wanted), use_threads=False
        )
        row = 0
        while row < start:
            row += next(self._batches).num_rows


def _stored_bytes(group: pq.RowGroupMetaData, wanted: Collection[str]) -> int:
    columns = (group.column(i) for i in range(group.num_columns))
    return sum(
        column.total_compressed_size
        for column in columns
        if column.path_in_schema.partition(".")[0] in wanted
    )

"""Read the rows of a shard, or say which value is wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gmm_dist import storage
from gmm_dist.errors import Option, UserError
from gmm_dist.lake.deal import RowRange
from gmm_dist.lake.listing import LakeFile, name_of
from gmm_dist.lake.opening import opened
from gmm_dist.lake.parquet.column_types import is_embedding, without_views
from gmm_dist.lake.parquet.comparing import stored
from gmm_dist.lake.parquet.decoding import wrong_rows
from gmm_dist.lake.plan import Plan
from gmm_dist.lake.tables.columns import LakeFileReader
from gmm_dist.lake.tables.entry import Mask

Float = np.float32 | np.float64

_MEND_WEIGHT = "weights are finite and not negative: mend it or filter such rows with " + Option(
    "where"
)
_CACHED_BYTES = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCounts:
    """Count what happened to rows: read = filtered + dropped + absent + held_out + to be fitted.

    `filtered`: rows that did not pass `where`; `dropped`: rows with a missing value under
    missing="drop"; `imputed`: *cells* (not rows) missing under missing="mean"; `absent`: rows of
    weight 0; `held_out`: rows that the plan holds out, less those counted above.
    """

    read: int = 0
    filtered: int = 0
    dropped: int = 0
    imputed: int = 0
    held_out: int = 0
    absent: int = 0

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(
            read=self.read + other.read,
            filtered=self.filtered + other.filtered,
            dropped=self.dropped + other.dropped,
            imputed=self.imputed + other.imputed,
            held_out=self.held_out + other.held_out,
            absent=self.absent + other.absent,
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Rows:
    """Hold the rows of one row range.

    `X` (n, d) in Fortran order (X.T is C-contiguous), feature units, float32 when the plan's
    `float64_source` is False, else float64; `sample_weight` (n,) positive, float64, or None;
    `held_out` (n,) marks the rows that nothing is fitted to (None: the plan holds none out).
    """

    X: npt.NDArray[Float]
    sample_weight: npt.NDArray[np.float64] | None
    counts: RowCounts
    held_out: npt.NDArray[np.bool_] | None = None


def read(plan: Plan, shard: int, *, fill: npt.NDArray[np.float64] | None = None) -> Iterator[Rows]:
    """Yield the rows of one shard, one `Rows` per row range, in file order.

    The filter comes first, then missing values (null, NaN, a null list or list element): an
    error, or the row is dropped, or the cell becomes `fill[j]` (d,) and, without `fill`, stays
    NaN for a first pass that computes the means. Infinite values are always an error, and so are
    lists of another length. Rows of weight 0 are left out last: they must not change even
    a rounding. Peak memory: one decoded row group (its read columns) and twice the row range's X.

    Raises:
        UserError: a bad value (the row in the message counts from 0 within its row group), a
            file that changed since the plan was made, is corrupt or cannot be reached.
    """
    with _Opened(plan) as files:
        for part in plan.shards[shard]:
            yield _Extract(plan, plan.files[part.file], part).rows(files.decoded(part), fill)


def passed(
    plan: Plan, part: RowRange, decoded: pa.Table
) -> tuple[pa.Table, npt.NDArray[np.float64], npt.NDArray[np.intp] | None]:
    """Return the rows of `part` that pass the filter, and their features (d, n), missing as NaN.

    Under a filter their positions (n,) among the rows of `part` come last. `decoded` are the rows
    of `part`, the plan's read columns among others. For plans of any `missing` but "error".

    Raises:
        UserError: an infinite value, or a list of another length.
    """
    table, positions = filtered(plan, part.file, decoded)
    extract = _Extract(plan, plan.files[part.file], part)
    extract.check_lengths(table, positions)
    columns = features(plan, table)
    if not np.isfinite(columns).all():
        extract.check(columns, table, positions)
    return table, columns.astype(np.float64, copy=False), positions


def release() -> None:
    """Forget the last decoded row group, to give its memory back after loading."""
    _last_decoded.forget()


class _LastDecoded:
    """Keep the row group that was decoded last, for the shards that share it.

    A writer such as pandas puts everything into one row group, which Parquet can only decode
    from its start; a worker reads its shards in order, so that one entry saves all repetition.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entry: tuple[tuple[object, ...], pa.Table] | None = None

    def get(self, key: tuple[object, ...]) -> pa.Table | None:
        with self._lock:
            return self._entry[1] if self._entry is not None and self._entry[0] == key else None

    def put(self, key: tuple[object, ...], table: pa.Table) -> None:
        with self._lock:
            self._entry = (key, table) if table.nbytes <= _CACHED_BYTES else None

    def forget(self) -> None:
        with self._lock:
            self._entry = None


_last_decoded = _LastDecoded()


class _Opened:
    """Keep the file of the last row range open for the next one, and outlast outages."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._fs, self._root = storage.open_url(plan.url)
        self._index, self._source = -1, None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def decoded(self, part: RowRange) -> pa.Table:
        """Return the rows of `part`, the plan's read columns."""
        name = name_of(self._plan.url, self._plan.files[part.file])
        return storage.patiently(lambda: self._read(part), name)

    def _read(self, part: RowRange) -> pa.Table:
        if part.file != self._index:
            self._stack.close()
            file = opened(self._fs, self._root, self._plan.url, self._plan.files[part.file])
            self._source = self._stack.enter_context(file)
            self._index = part.file
        try:
            return _decoded(self._plan, self._source, part)
        except BaseException:
            self._index = -1
            with self._stack.pop_all():  # `opened` explains the error
                raise


def _decoded(plan: Plan, source: Any, part: RowRange) -> pa.Table:
    """Return the live rows of `part`, the plan's read columns."""
    file, columns = plan.files[part.file], plan.read_columns
    key = (plan.url, file.path, file.version, part.row_group, columns)
    table = _last_decoded.get(key)
    if table is None:
        _last_decoded.forget()  # before the next is decoded, not after
        name = name_of(plan.url, file)
        reader = LakeFileReader(source, plan.table_columns, name, pre_buffer=True)
        table = reader.read_row_group(part.row_group, columns)
        promised = file.rows[part.row_group]
        if table.num_rows != promised:
            raise wrong_rows(name, part.row_group, table.num_rows, promised)
        table = those(table, file.live(part.row_group))
    if part.stop < table.num_rows:
        _last_decoded.put(key, table)
    else:
        _last_decoded.forget()
    return table.slice(part.start, part.stop - part.start)


def filtered(
    plan: Plan, file: int, table: pa.Table
) -> tuple[pa.Table, npt.NDArray[np.intp] | None]:
    """Return the rows of a file that pass the filter and, under a filter, their positions."""
    condition = plan.row_filter_of(file, table.column_names)
    if condition is True:
        return table, None
    mask = condition.mask(table) if condition else np.zeros(table.num_rows, dtype=np.bool_)
    return those(table, mask), np.flatnonzero(mask)


def those(table: pa.Table, mask: Mask | None) -> pa.Table:
    """Return the rows of a table that a mask (n,) has, all of them without one."""
    if mask is None:
        return table
    types = pa.schema([field.with_type(without_views(field.type)) for field in table.schema])
    if types != table.schema:
        table = table.cast(types)
    return table.filter(pa.array(mask))


def features(plan: Plan, table: pa.Table) -> npt.NDArray[Float]:
    """Return the features (d, n), C-contiguous, null as NaN."""
    dtype = np.float64 if plan.float64_source else np.float32
    columns = np.empty((plan.n_features, table.num_rows), dtype)
    if _has_lists(plan):
        _fill_embedding(columns, table.column(plan.columns[0]))
    else:
        for j, name in enumerate(plan.columns):
            columns[j] = _to_numpy(table.column(name), dtype)
    return columns


def _has_lists(plan: Plan) -> bool:
    return is_embedding(plan.schema.field(plan.columns[0]).type)


def _lengths(lists: pa.ChunkedArray | pa.Array, length: int) -> npt.NDArray[np.int64]:
    """Return how long each list is, `length` for those that are null."""
    lengths: npt.NDArray[np.int64] = (
        pc.list_value_length(lists).cast(pa.int64()).fill_null(length).to_numpy()
    )
    return lengths


def _fill_embedding(columns: npt.NDArray[Float], column: pa.ChunkedArray) -> None:
    """Fill (d, n) from lists; NaN for null ones, and for those of another length."""
    if pa.types.is_null(column.type):
        columns[:] = np.nan
        return
    start, length = 0, len(columns)
    for chunk in stored(column).chunks:
        stop = start + len(chunk)
        fits = chunk.is_valid().to_numpy(zero_copy_only=False)
        fits &= np.asarray(_lengths(chunk, length)) == length
        # `flatten` drops what is null, and `values` would ignore slices.
        lists = chunk if fits.all() else chunk.filter(pa.array(fits))
        values = _to_numpy(lists.flatten(), columns.dtype).reshape(-1, length).T
        columns[:, start:stop][:, fits] = values
        columns[:, start:stop][:, ~fits] = np.nan
        start = stop


def _to_numpy(array: pa.Array | pa.ChunkedArray, dtype: npt.DTypeLike) -> npt.NDArray[Float]:
    floats = array.cast(pa.from_numpy_dtype(dtype), safe=False)
    if isinstance(floats, pa.ChunkedArray):
        floats = floats.combine_chunks()
    numbers: npt.NDArray[Float] = floats.to_numpy(zero_copy_only=False)
    return numbers


@dataclass(frozen=True, slots=True)
class _Extract:
    """Turn decoded rows of one row range into `Rows`, or say which value is wrong."""

    plan: Plan
    file: LakeFile
    part: RowRange

    def rows(self, decoded: pa.Table, fill: npt.NDArray[np.float64] | None) -> Rows:
        table, positions = filtered(self.plan, self.part.file, decoded)
        self.check_lengths(table, positions)
        weight = self._weight(table, positions)
        held_out = self.plan.held_out(self.part)
        if held_out is not None and positions is not None:
            held_out = held_out[positions]
        columns = features(self.plan, table)
        dropped = imputed = absent = 0
        if not np.isfinite(columns).all():
            self.check(columns, table, positions)
            missing = np.isnan(columns)
            if self.plan.missing == "drop":
                complete = ~missing.any(axis=0)
                columns = np.ascontiguousarray(columns[:, complete])
                weight = None if weight is None else weight[complete]
                held_out = None if held_out is None else held_out[complete]
                dropped = table.num_rows - columns.shape[1]
            else:
                imputed = int(np.count_nonzero(missing))
                if fill is not None:
                    columns[missing] = np.broadcast_to(fill[:, None], columns.shape)[missing]
        if weight is not None and not weight.all():
            absent = int(np.count_nonzero(weight == 0))
            columns = np.ascontiguousarray(columns[:, weight > 0])
            held_out = None if held_out is None else held_out[weight > 0]
            weight = weight[weight > 0]
        counts = RowCounts(
            read=decoded.num_rows,
            filtered=decoded.num_rows - table.num_rows,
            dropped=dropped,
            imputed=imputed,
            held_out=0 if held_out is None else int(np.count_nonzero(held_out)),
            absent=absent,
        )
        return Rows(X=columns.T, sample_weight=weight, counts=counts, held_out=held_out)

    def _weight(
        self, table: pa.Table, positions: npt.NDArray[np.intp] | None
    ) -> npt.NDArray[np.float64] | None:
        name = self.plan.weight_column
        if name is None:
            return None
        weight = _to_numpy(table.column(name), np.float64).astype(np.float64)
        bad = ~(np.isfinite(weight) & (weight >= 0))
        if bad.any():
            row = int(bad.argmax())
            value = _spell(weight[row]) if table.column(name)[row].is_valid else "null"
            what = f"weight {name!r} is {value}"
            raise UserError(what, where=self._row(row, positions), remedy=_MEND_WEIGHT)
        return weight

    def check_lengths(self, table: pa.Table, positions: npt.NDArray[np.intp] | None) -> None:
        """Raise for the first list of an embedding that is longer or shorter than the others."""
        name = self.plan.columns[0]
        if not _has_lists(self.plan) or pa.types.is_null(table.column(name).type):
            return
        length = self.plan.n_features
        lengths = _lengths(stored(table.column(name)), length)
        wrong = lengths != length
        if wrong.any():
            row = int(wrong.argmax())
            first = f" in {self.plan.first_list}" if self.plan.first_list else ""
            raise UserError(
                f"the list in column {name!r} has {lengths[row]:,} numbers, but {length:,}{first}",
                where=self._row(row, positions),
                remedy="write lists of one length, or leave out such rows with " + Option("where"),
            )

    def check(
        self,
        columns: npt.NDArray[Float],
        table: pa.Table,
        positions: npt.NDArray[np.intp] | None,
    ) -> None:
        """Raise for the first row with an infinite or, if that is an error, missing value."""
        allowed = np.isnan if self.plan.missing != "error" else np.zeros_like
        bad = ~(np.isfinite(columns) | allowed(columns).astype(bool))
        if not bad.any():
            return
        row = int(bad.any(axis=0).argmax())
        feature = int(bad[:, row].argmax())
        value = columns[feature, row]
        remedy = "impute such rows first, or filter them with " + Option("where")
        if np.isnan(value):
            remedy = "pass " + Option("missing", "drop") + " or impute such rows first"
        shown = "null" if self._is_null(table, row, feature) else _spell(value)
        raise UserError(
            f"column {self.plan.feature_names[feature]!r} is {shown}",
            where=self._row(row, positions),
            remedy=remedy,
        )

    def _is_null(self, table: pa.Table, row: int, feature: int) -> bool:
        if _has_lists(self.plan):
            embedding = stored(table.column(self.plan.columns[0]))[row]
            return not (embedding.is_valid and embedding[feature].is_valid)
        return not table.column(self.plan.columns[feature])[row].is_valid

    def _row(self, row: int, positions: npt.NDArray[np.intp] | None) -> str:
        at = self.part.start + (row if positions is None else int(positions[row]))
        live = self.file.live(self.part.row_group)
        at = at if live is None else int(np.flatnonzero(live)[at])
        return f"{name_of(self.plan.url, self.file)}, row group {self.part.row_group}, row {at}"


def _spell(value: Float) -> str:
    return "NaN" if np.isnan(value) else f"{value:g}"

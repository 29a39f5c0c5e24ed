"""What the footer of a Parquet file says of its rows and columns, before they are read.

A damaged footer is refused before it is used: Arrow would end the process.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq

from gmm_dist.lake.parquet.column_types import is_embedding, is_numeric
from gmm_dist.lake.parquet.comparing import Key, Passing, PassingRows, extremes, value_type

Extent = tuple[Key, Key]


def leaves(schema: pa.Schema) -> list[range]:
    """Return, for each column, the numbers of the Parquet columns that it is stored in."""
    ends = list(itertools.accumulate(map(_n_leaves, schema.types), initial=0))
    return [range(first, stop) for first, stop in itertools.pairwise(ends)]


def _n_leaves(type_: pa.DataType) -> int:
    type_ = value_type(type_)
    if is_numeric(type_):
        return 1
    return sum(_n_leaves(type_.field(i).type) for i in range(type_.num_fields)) or 1


def looked_at(metadata: pq.FileMetaData, names: Collection[str] | None) -> list[int]:
    """Return the Parquet columns to look at for columns of these names (None: all).

    At least one has no lists, where there is any: see `contradiction`.
    """
    every = range(metadata.num_columns)
    if names is None:
        return list(every)
    wanted = set(itertools.chain.from_iterable(stored_in(metadata, names).values()))
    return sorted(wanted if _flat(metadata, wanted) else {*wanted, *_flat(metadata, every)[:1]})


def _flat(metadata: pq.FileMetaData, leaves: Iterable[int]) -> list[int]:
    return [i for i in leaves if not metadata.schema.column(i).max_repetition_level]


def contradiction(metadata: pq.FileMetaData, leaves: Iterable[int]) -> str | None:
    """Say where a footer contradicts itself about the number of rows; None where it does not.

    Only the Parquet columns `leaves` are looked at.
    """
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    rows = sum(group.num_rows for group in groups)
    if rows != metadata.num_rows:
        return f"the footer promises {metadata.num_rows:,} rows, its row groups {rows:,}"
    # A column without lists has a value for each row, if only a null: one such column is enough.
    flat = next(iter(_flat(metadata, leaves)), None)
    for number, group in enumerate(groups):
        values = group.num_rows if flat is None else group.column(flat).num_values
        if group.num_rows < 0 or values != group.num_rows:
            return (
                f"the footer promises {group.num_rows:,} rows of row group {number}, and "
                f"{values:,} values of its columns"
            )
    return None


def index_columns(schema: pa.Schema) -> frozenset[str]:
    """Return the columns that pandas wrote an index to, by its metadata in the schema."""
    listed: list[object] = []
    with suppress(ValueError, TypeError, KeyError):
        listed = json.loads((schema.metadata or {})[b"pandas"])["index_columns"]
    if not isinstance(listed, list):
        listed = []
    # A range is kept as its bounds, and has no column.
    index_names = {name for name in listed if isinstance(name, str)}
    # Other writers copy the columns of such a file, without the metadata of pandas.
    return frozenset(name for name in schema.names if name in index_names or _is_index_name(name))


def _is_index_name(name: str) -> bool:
    number = name.removeprefix("__index_level_").removesuffix("__")
    return number.isdecimal() and name == f"__index_level_{number}__"


def old_timestamps(metadata: pq.FileMetaData, schema: pa.Schema) -> frozenset[str]:
    """Return the columns that hold INT96 timestamps, alone or in lists and such."""
    stored = [metadata.schema.column(i).physical_type for i in range(len(metadata.schema))]
    if "INT96" not in stored:
        return frozenset()
    places = zip(schema.names, leaves(schema), strict=True)
    return frozenset(name for name, place in places if "INT96" in stored[place.start : place.stop])


def matching_groups(metadata: pq.FileMetaData, schema: pa.Schema, tests: PassingRows) -> list[int]:
    """Return the row groups that may hold a row that passes, as far as the footer tells."""
    first = {name: place.start for name, place in zip(schema.names, leaves(schema), strict=True)}

    def may_hold(group: int) -> bool:
        return tests.may_hold(
            lambda name, passing: _may_pass(
                metadata, group, first[name], schema.field(name).type, passing
            )
        )

    return [group for group in range(metadata.num_row_groups) if may_hold(group)]


def _leaf_statistics(metadata: pq.FileMetaData, group: int, leaf: int) -> pq.Statistics | None:
    return statistics(
        metadata.row_group(group).column(leaf), metadata.schema.column(leaf).physical_type
    )


def extremes_and_nulls(
    metadata: pq.FileMetaData, group: int, schema: pa.Schema, name: str
) -> tuple[Extent | None, int | None]:
    """Return a column's extremes in a row group, and how many nulls; None if unknown."""
    column = schema.get_field_index(name)
    type_ = schema.field(column).type
    if pa.types.is_nested(value_type(type_)):
        return None, None
    stats = _leaf_statistics(metadata, group, leaves(schema)[column].start)
    nulls = stats.null_count if stats is not None and stats.has_null_count else None
    return extremes(stats, type_), nulls


def _may_pass(
    metadata: pq.FileMetaData, group: int, leaf: int, type_: pa.DataType, passing: Passing
) -> bool:
    if passing.never:
        return False
    if pa.types.is_nested(value_type(type_)):
        return True  # the statistics are of what the lists hold
    stats, rows = _leaf_statistics(metadata, group, leaf), metadata.row_group(group).num_rows
    if stats is not None and stats.has_null_count and stats.null_count == rows > 0:
        # Extremes of nothing but nulls? Then neither is to be trusted.
        return passing.missing or bool(stats.has_min_max)
    if passing.missing:  # no footer tells of NaN
        if stats is None or not stats.has_null_count or pa.types.is_floating(value_type(type_)):
            return True
        return bool(stats.null_count > 0)
    if type_ != passing.type or (pa.types.is_decimal(type_) and type_.bit_width < 128):
        return True  # plans that were made before have read such row groups
    bounds = extremes(stats, type_)
    return bounds is None or passing.may_hold(*bounds)


def nulls(
    metadata: pq.FileMetaData,
    schema: pa.Schema,
    groups: Iterable[int],
    among: Collection[str] | None,
    *,
    most: int,
) -> dict[str, tuple[int, int]]:
    """Return the columns that have nulls by the footer: the first row group, and how many there.

    Of lists both null lists and null elements count.

    Args:
        metadata: The file's footer.
        schema: Its columns.
        groups: The row groups to look at.
        among: Names of columns to look at, of those that could be features; None for all.
        most: How many column chunks are looked at.
    """
    if among is not None and not among:
        return {}
    wanted = [
        (name, place.start, metadata.schema.column(place.start).physical_type)
        for name, place, type_ in zip(schema.names, leaves(schema), schema.types, strict=True)
        if (among is None or name in among) and _could_be_feature(type_)
    ]
    first_nulls: dict[str, tuple[int, int]] = {}
    for group in groups:
        if (most := most - len(wanted)) < 0:
            break
        row_group = metadata.row_group(group)
        for name, leaf, physical_type in wanted:
            stats = statistics(row_group.column(leaf), physical_type)
            if stats is not None and stats.has_null_count and stats.null_count > 0:
                first_nulls.setdefault(name, (group, stats.null_count))
    return first_nulls


def _could_be_feature(type_: pa.DataType) -> bool:
    return is_numeric(type_) or is_embedding(type_)


def extents(
    metadata: pq.FileMetaData, schema: pa.Schema, groups: Iterable[int], names: Collection[str]
) -> Mapping[str, Extent]:
    """Return the least and the largest key of columns, over the row groups that have them."""
    places = leaves(schema)
    extent_of: dict[str, Extent] = {}
    for name in names:
        column = schema.get_field_index(name)
        if column < 0:
            continue
        leaf, type_ = places[column].start, schema.field(column).type
        bounds = [extremes(_leaf_statistics(metadata, group, leaf), type_) for group in groups]
        known_bounds = [bound for bound in bounds if bound is not None]
        if known_bounds:
            extent_of[name] = (
                min(low for low, _ in known_bounds),
                max(high for _, high in known_bounds),
            )
    return extent_of


def stored_in(metadata: pq.FileMetaData, names: Collection[str]) -> dict[str, list[int]]:
    """Return the numbers of the Parquet columns that hold each column of these names.

    A name may have dots, and nested columns add more.
    """
    leaf_numbers: dict[str, list[int]] = {name: [] for name in names}
    for i in range(metadata.num_columns):
        for name in itertools.accumulate(metadata.schema.column(i).path.split("."), "{}.{}".format):
            if name in leaf_numbers:
                leaf_numbers[name].append(i)
    return leaf_numbers


def require_sound(metadata: pq.FileMetaData, size: int, leaves: Sequence[int]) -> None:
    """Raise OSError where a footer makes no sense about the chunks of these Parquet columns.

    Also where they are encrypted. Arrow checks all of it before it reads, and then raises; so
    this begins to read from a file of `size` bytes that yields nothing.
    """
    source = _Unreadable(size)
    parquet = pq.ParquetFile(source, metadata=metadata, pre_buffer=True)
    batches = parquet.iter_batches(
        row_groups=range(metadata.num_row_groups),
        columns=[metadata.schema.column(i).path for i in leaves],
        use_threads=False,
    )
    try:
        next(batches, None)
    except OSError:
        if not source.was_read:  # else all that was to be looked at is well
            raise


class _Unreadable(io.RawIOBase):
    """A file that has a size and nothing else.

    It yields no bytes: an error raised here Arrow would keep for good, 40 KB for each file.
    """

    def __init__(self, size: int) -> None:
        self._size, self._at, self.was_read = size, 0, False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = start + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        self.was_read = True
        return b""


def statistics(chunk: pq.ColumnChunkMetaData, physical_type: str) -> pq.Statistics | None:
    """Return the statistics of a column chunk, None where the footer has none.

    `physical_type` is the column's, by the schema in the same footer. Raises OSError where they
    contradict each other.
    """
    if chunk.physical_type != physical_type:
        raise OSError(
            f"the footer says both {physical_type} and {chunk.physical_type} of column "
            f"{chunk.path_in_schema!r}"
        )
    return chunk.statistics

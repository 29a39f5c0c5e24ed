"""Read the footers of a plan's files: rows, column types, ranges, and which files they rule out."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gmm_dist import storage
from gmm_dist.errors import NoRows, Option, TooFewRows, UserError
from gmm_dist.lake import listing
from gmm_dist.lake.deal import RowRange
from gmm_dist.lake.filters.expressions import ArrowFilter
from gmm_dist.lake.filters.where import Filter, shown_names
from gmm_dist.lake.listing import LakeFile, Listing
from gmm_dist.lake.opening import opened, opened_first
from gmm_dist.lake.parquet import footers
from gmm_dist.lake.parquet.comparing import stored
from gmm_dist.lake.parquet.footers import Extent
from gmm_dist.lake.schema import Chosen, Columns
from gmm_dist.lake.tables.columns import LakeFileReader
from gmm_dist.lake.tables.entry import Mask

logger = logging.getLogger(__name__)

_FOOTERS_AT_ONCE = 32
_TELL_SECONDS = 10.0

_CHUNKS_ASKED = 2**18  # for nulls, over all files: a second or so

_LISTS_AT_ONCE = 256

_PAGES_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Footer:
    """Hold what planning needs of one file's footer.

    `groups` are the row groups that may hold a matching row; `nulls` has, of columns with
    nulls, the first such row group and how many there; `extents` are of columns to be kept;
    `old_timestamps` are the columns of INT96 among those that are compared or kept.
    """

    file: LakeFile
    schema: pa.Schema
    indices: frozenset[str]
    groups: Sequence[int]
    nulls: Mapping[str, tuple[int, int]]
    extents: Mapping[str, Extent]
    old_timestamps: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """Say what planning wants to know from footers.

    `names` are the columns that may be read (None: all), `tested` is the filter by row, `keys`
    types the hive keys. `no_nulls` are the columns to look at for nulls (None: all), in at most
    `chunks` column chunks of a file. `keep` are the columns to be kept.
    """

    names: Collection[str] | None
    tested: Filter | None
    keys: pa.Schema
    no_nulls: Collection[str] | None
    chunks: int
    keep: Sequence[str]

    def of(self, file: LakeFile, reader: LakeFileReader) -> Footer:
        """Return what is wanted from one file's footer."""
        metadata, stored = reader.metadata, reader.stored_schema
        rows = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        file = replace(file, rows=rows)
        groups = self._groups(file, metadata, stored)
        read = {*self.keep, *(self.tested.columns if self.tested else ())}
        return Footer(
            file=file,
            schema=reader.schema.remove_metadata(),
            indices=footers.index_columns(reader.schema),
            groups=groups,
            nulls=self._nulls(file, reader, groups),
            extents=footers.extents(metadata, stored, groups, self.keep),
            old_timestamps=footers.old_timestamps(metadata, stored) & read if read else frozenset(),
        )

    def _nulls(
        self, file: LakeFile, reader: LakeFileReader, groups: Sequence[int]
    ) -> Mapping[str, tuple[int, int]]:
        """Return the first row group with nulls of each column that has some, and how many."""
        if self.no_nulls is not None and not self.no_nulls:
            return {}
        live_rows = file.live_rows
        filled = [(group, live_rows[group]) for group in groups if live_rows[group]]
        nulls = dict.fromkeys(reader.absent, filled[0]) if filled else {}
        if live_rows != file.rows:  # the footer counts nulls of deleted rows, too
            return nulls
        stored, no_nulls = reader.stored_schema, self.no_nulls
        return nulls | footers.nulls(reader.metadata, stored, groups, no_nulls, most=self.chunks)

    def _groups(
        self, file: LakeFile, metadata: pq.FileMetaData, schema: pa.Schema
    ) -> Sequence[int]:
        if self.tested is None:
            return range(metadata.num_row_groups)
        with suppress(UserError):  # raised later, when all files' columns are known
            keys = listing.key_table([file], self.keys)
            left = self.tested.in_file(keys, schema, schema.names)
            if left is False:
                return ()
            if left is not True:
                return left.matching_groups(metadata, schema)
        return range(metadata.num_row_groups)


def tell_of_old_timestamps(file_footers: Sequence[Footer]) -> None:
    names = sorted(frozenset[str]().union(*{footer.old_timestamps for footer in file_footers}))
    if names:
        logger.info(
            "INT96 timestamps are compared and kept to the microsecond, finer digits cut off: %s",
            shown_names(names),
        )


def read_footers(
    lake_listing: Listing, files: Sequence[LakeFile], questions: Questions
) -> list[Footer]:
    """Return the footers of some files of a lake, in their order."""
    root = lake_listing.root
    fs, path = storage.open_url(root)
    known: dict[bytes, pa.Schema] = {}  # one for all files that have the same

    def read(file: LakeFile) -> Footer:
        name = listing.name_of(root, file)
        with opened_first(fs, path, root, file, footer=True) as (source, file):
            reader = LakeFileReader(source, lake_listing.columns, name)
            metadata, names = reader.metadata, questions.names
            stored_names = None if names is None else reader.stored_names(names)
            leaves = footers.looked_at(metadata, stored_names)
            footers.require_sound(metadata, file.size, leaves)
            footer = questions.of(file, reader)
        lie = footers.contradiction(metadata, leaves) or _unlike_its_log(footer.file, reader)
        if lie:
            raise UserError(f"{name}: {lie}; write the file again or move it away")
        schema = known.setdefault(footer.schema.serialize().to_pybytes(), footer.schema)
        return replace(footer, schema=schema)

    def footer(file: LakeFile) -> Footer:
        return storage.patiently(lambda: read(file), listing.name_of(root, file))

    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        try:
            return list(_told(pool.map(footer, files), len(files)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _told(file_footers: Iterator[Footer], n_files: int) -> Iterator[Footer]:
    """Pass footers on, and tell now and then how many there are, and how long the rest takes."""
    began = said = time.monotonic()
    for done, footer in enumerate(file_footers, start=1):
        yield footer
        now = time.monotonic()
        if now - said >= _TELL_SECONDS and done < n_files:
            said = now
            left = (now - began) / done * (n_files - done)
            text = "read the footers of %s of %s files, about %.0f s left"
            logger.info(text, f"{done:,}", f"{n_files:,}", left)


def _unlike_its_log(file: LakeFile, reader: LakeFileReader) -> str | None:
    """Say where a file is other than a table's log promises; None where it does not."""
    if file.entry is None:
        return None
    n_rows, deleted = sum(file.rows), file.entry.deleted
    if lacking := [name for name in file.entry.told if name in reader.absent]:
        return f"the file lacks the column {lacking[0]!r}, which the table's partitions tell"
    if file.entry.n_rows not in (None, n_rows):
        return f"the footer promises {n_rows:,} rows, the table's log {file.entry.n_rows:,}"
    if deleted is not None and deleted.n_rows > n_rows:
        return f"the footer promises {n_rows:,} rows, and of {deleted.n_rows:,} some are deleted"
    return None


def unpruned(file_footers: list[Footer], tested: Filter | None, types: pa.Schema) -> list[Footer]:
    """Return the footers, with all row groups where an expression's columns have other types.

    It is evaluated in the types over all files, in which it may mean something else: 7 / 2 depends
    on its type, and so does `coalesce` of 7 and a column of nulls, or one that a file lacks.
    """
    if not isinstance(tested, ArrowFilter):
        return file_footers
    compared_fields = [types.field(name) for name in tested.columns if name in types.names]

    def is_other(schema: pa.Schema) -> bool:
        return any(
            field.name not in schema.names or schema.field(field.name).type != field.type
            for field in compared_fields
        )

    return [
        replace(footer, groups=range(len(footer.file.rows))) if is_other(footer.schema) else footer
        for footer in file_footers
    ]


def matching_row_groups(
    root: str, file_footers: list[Footer], condition: Filter | None
) -> list[RowRange]:
    """Return the row groups that may hold a matching row, whole; `condition` is tested by row."""
    groups = [
        RowRange(file=index, row_group=group, start=0, stop=live_rows[group])
        for index, footer in enumerate(file_footers)
        for live_rows in (footer.file.live_rows,)
        for group in footer.groups
        if live_rows[group] > 0
    ]
    if condition is not None and not groups:
        raise nothing_matches(root, condition, "the row groups' statistics")
    return groups


def refuse_nulls(root: str, file_footers: Sequence[Footer], chosen: Chosen) -> None:
    """Raise for the first null of a feature that a footer counts."""
    for footer in file_footers:
        for name in chosen.columns:
            if name not in footer.nulls:
                continue
            group, count = footer.nulls[name]
            what = "null" if count == 1 else "nulls"
            if chosen.feature_names != chosen.columns:
                what += ", lists or elements of them"
            raise UserError(
                f"column {name!r} has {count:,} {what}",
                where=f"{listing.name_of(root, footer.file)}, row group {group}",
                remedy="pass " + Option("missing", "drop") + " or impute such rows first",
            )


def refuse_rounding(known: Columns, chosen: Chosen, file_footers: Sequence[Footer]) -> None:
    """Raise where a kept value, by the footers, does not fit the common type of all files."""
    for name in chosen.kept:
        for footer in file_footers:
            bounds = footer.extents.get(name)
            if bounds is None or not isinstance(bounds[0], int):
                continue
            type_ = footer.schema.field(name).type
            if not _fits(bounds, type_, known.types[name]):
                raise known.no_common_type(name, (type_, footer.file))


def _fits(bounds: Extent, stored: pa.DataType, common: pa.DataType) -> bool:
    """Say whether the least and largest value of a column fit into a common type."""
    if stored == common or pa.types.is_decimal(stored):
        return True
    integers = pa.int64() if stored.bit_width == 64 else pa.int32()
    integers = pa.uint64() if stored == pa.uint64() else integers
    try:
        pa.array(list(bounds), integers).cast(stored).cast(common)
    except pa.ArrowInvalid:
        return False
    except pa.ArrowNotImplementedError:  # no matter of whole numbers, such as booleans
        return True
    return True


def measure_lists(
    lake_listing: Listing,
    file_footers: Sequence[Footer],
    groups: Sequence[RowRange],
    tested: Filter | None,
    chosen: Chosen,
) -> tuple[int, str]:
    """Return the length of the first list of a column that matches, and where it is.

    Args:
        lake_listing: The lake's files.
        file_footers: Their footers.
        groups: The row groups that match.
        tested: The part of the filter that is tested row by row.
        chosen: The chosen columns, of which one is of lists.
    """
    root, name = lake_listing.root, chosen.unmeasured
    assert name is not None
    fs, path = storage.open_url(root)
    for part in groups:
        file, names = file_footers[part.file].file, file_footers[part.file].schema.names
        keys = listing.key_table([file], lake_listing.keys)
        left = tested is None or tested.in_file(keys, chosen.schema, names)
        where = listing.name_of(root, file)

        def read(
            file: LakeFile = file, group: int = part.row_group, left: Filter | bool = left
        ) -> tuple[int, int] | None:
            with opened(fs, path, root, file) as source:
                table = lake_listing.columns, listing.name_of(root, file)
                reader = LakeFileReader(source, *table, buffer_size=_PAGES_BYTES)
                return _first_length(reader, group, file.live(group), left, name)

        first = storage.patiently(read, where)
        if first is not None:
            return first[1], f"{where}, row group {part.row_group}, row {first[0]}"
    matching, error = ("", UserError) if tested is None else (" in rows that match", TooFewRows)
    raise error(
        f"column {name!r} has no list that is not null or empty{matching}, in {len(file_footers)} "
        "Parquet files",
        where=storage.redacted(root),
        remedy="name other feature columns with " + Option("columns"),
    )


def _first_length(
    reader: LakeFileReader, group: int, live: Mask | None, tested: Filter | bool, name: str
) -> tuple[int, int] | None:
    """Return the row and the length of a row group's first live list that matches."""
    names = [name, *(() if isinstance(tested, bool) else tested.columns)]
    start = 0
    # Some rows at first: one is enough where none is null, and lists may be long.
    for batch in reader.iter_batches(_LISTS_AT_ONCE, group, names):
        column = batch.column(name)
        lengths = pc.list_value_length(stored(column)).to_numpy()
        fits = np.nan_to_num(lengths.astype(np.float64)) > 0  # neither null nor empty
        fits &= tested if isinstance(tested, bool) else tested.mask(batch)
        fits &= True if live is None else live[start : start + batch.num_rows]
        if fits.any():
            row = int(fits.argmax())
            return start + row, int(lengths[row])
        start += batch.num_rows
    return None


def nothing_matches(root: str, condition: Filter, what: str) -> NoRows:
    return NoRows(
        f"{storage.redacted(root)}: no rows match the filter {condition.shown}, by {what}; "
        "widen the filter"
    )

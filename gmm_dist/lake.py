"""Plan a lake: which rows of which files a job reads, dealt to shards by rows."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gmm_dist import footers, listing, nights, storage
from gmm_dist.columns import Chosen, Columns
from gmm_dist.comparing import stored
from gmm_dist.decoding import parquet_file
from gmm_dist.errors import NoRows, TooFewRows, UserError
from gmm_dist.expressions import ArrowFilter, filter_of
from gmm_dist.footers import Extent
from gmm_dist.formats import counted
from gmm_dist.listing import LakeFile, Listing
from gmm_dist.urls import Url
from gmm_dist.where import Filter, shown_names

logger = logging.getLogger(__name__)

Missing = Literal["error", "drop", "mean"]

_MIN_ROWS_PER_SHARD = 16_384
_MAX_ROWS_PER_SHARD = 2**20
_FOOTERS_AT_ONCE = 32
_CHUNKS_ASKED = 2**18  # for nulls, over all files: a second or so
_LISTS_AT_ONCE = 256
_PAGES_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RowRange:
    """Name rows [start, stop) of one row group; `file` is an index into `Plan.files`."""

    file: int
    row_group: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Say which rows and columns a job reads, and how they are dealt to shards.

    A picklable value. `hash` is the same for the same files and settings, wherever they are
    mounted (`url` is not part of it); `n_rows` counts rows before the row-level filter;
    `schema` has the file columns that are read, filtered by or kept, their types unified over
    files; `float64_source` says that float32 cannot hold some feature's every value; `holdout` is
    the share of rows that nothing is fitted to; `kept` are columns to go along with the rows,
    which some files may lack; `first_list` says where the list is whose length all lists of an
    embedding must have, where their types do not tell it; `keys` types the hive keys of the files.
    """

    url: str
    files: tuple[LakeFile, ...]
    schema: pa.Schema
    columns: tuple[str, ...]
    feature_names: tuple[str, ...]
    weight_column: str | None
    where: Filter | None
    missing: Missing
    shards: tuple[tuple[RowRange, ...], ...]
    float64_source: bool
    holdout: float = 0.0
    kept: tuple[str, ...] = ()
    first_list: str | None = None
    keys: pa.Schema = field(default_factory=lambda: pa.schema([]))
    hash: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", Url(self.url))
        object.__setattr__(self, "hash", _hash(self))

    @property
    def n_rows(self) -> int:
        return sum(part.stop - part.start for shard in self.shards for part in shard)

    @property
    def n_features(self) -> int:
        return len(self.feature_names)

    @property
    def n_shards(self) -> int:
        return len(self.shards)

    @property
    def versions(self) -> tuple[tuple[str, int, str], ...]:
        """Each file's path, size (bytes) and version, by which a change is noticed."""
        return tuple((file.path, file.size, file.version) for file in self.files)

    @property
    def row_filter(self) -> Filter | None:
        """Return what is left of `where` to test row by row: files were chosen by hive keys."""
        return self.where.by_row(self._path_keys) if self.where else None

    def row_filter_of(self, file: int, names: Collection[str]) -> Filter | bool:
        """Return what there is to test of the rows of a file, of which columns `names` are read.

        True says that all rows pass, False that none does.
        """
        condition = self.row_filter
        if condition is None:
            return True
        keys = _key_table([self.files[file]], self.keys).select(self._path_keys)
        return condition.in_file(keys, self.schema, names)

    @property
    def _path_keys(self) -> list[str]:
        return [name for name in self.keys.names if name not in self.schema.names]

    @property
    def read_columns(self) -> tuple[str, ...]:
        """Name the file columns that reading needs: features, weight, filter; each once."""
        weight = (self.weight_column,) if self.weight_column else ()
        tested = self.row_filter.columns if self.row_filter else ()
        by_row = (name for name in tested if name in self.schema.names)
        return tuple(dict.fromkeys((*self.columns, *weight, *by_row)))

    def held_out(self, part: RowRange) -> npt.NDArray[np.bool_] | None:
        """Say which rows of a range are held out, (n,), or None when none ever is.

        It depends on the file's path within the lake and the row's number within the file alone:
        neither on the filter, nor on shards, nor on other files.
        """
        if self.holdout == 0:
            return None
        file = self.files[part.file]
        first = sum(file.rows[: part.row_group])
        hashes = _row_hashes(file.path, first + part.start, first + part.stop)
        return hashes < np.uint64(int(self.holdout * 2.0**64))


@dataclass(frozen=True, slots=True)
class _Footer:
    """Hold what planning needs of one file's footer.

    `groups` are the row groups that may hold a matching row; `nulls` says of columns with nulls
    in which of them the first are, and how many; `extents` are of columns to be kept;
    `old_timestamps` are the columns of INT96 among those that are compared or kept.
    """

    file: LakeFile
    schema: pa.Schema
    indices: frozenset[str]
    groups: Sequence[int]
    nulls: Mapping[str, tuple[int, int]]
    extents: Mapping[str, Extent]
    old_timestamps: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Questions:
    """Say what is asked of footers: the filter by row, columns that may have no null or are kept.

    `names` are the columns that may be read (None: all), `no_nulls` those of them to be asked for
    nulls, `chunks` how many of a file's column chunks at most.
    """

    names: Collection[str] | None
    tested: Filter | None
    keys: pa.Schema
    no_nulls: Collection[str] | None
    chunks: int
    keep: Sequence[str]

    def of(self, file: LakeFile, parquet: pq.ParquetFile) -> _Footer:
        """Return the answers of one file's footer."""
        metadata, schema = parquet.metadata, parquet.schema_arrow
        rows = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        bare = schema.remove_metadata()
        groups = self._groups(file, metadata, bare)
        read = {*self.keep, *(self.tested.columns if self.tested else ())}
        return _Footer(
            replace(file, rows=rows),
            bare,
            footers.index_columns(schema),
            groups,
            footers.nulls(metadata, bare, groups, self.no_nulls, most=self.chunks),
            footers.extents(metadata, bare, groups, self.keep),
            footers.old_timestamps(metadata, bare) & read if read else frozenset(),
        )

    def _groups(
        self, file: LakeFile, metadata: pq.FileMetaData, schema: pa.Schema
    ) -> Sequence[int]:
        if self.tested is None:
            return range(metadata.num_row_groups)
        # Told once it is known what other files have.
        with suppress(UserError):
            keys = _key_table([file], self.keys)
            left = self.tested.in_file(keys, schema, schema.names)
            if left is False:
                return ()
            if left is not True:
                return left.matching_groups(metadata, schema)
        return range(metadata.num_row_groups)


def plan(
    url: str,
    *,
    columns: Sequence[str] | None = None,
    weight_column: str | None = None,
    where: str | pc.Expression | Filter | None = None,
    missing: Missing = "error",
    holdout: float = 0.0,
    keep: Sequence[str] = (),
    remedy: str = "name the feature columns with --columns",
    n_shards: int | None = None,
) -> Plan:
    """Plan the Parquet file or folder at `url`; reads footers, and one list at most.

    `listing.find` says which files count. `columns` are numeric columns or one column of lists of
    numbers, all of one length; default: every floating-point column but pandas' indices, or else
    the one column of lists. Where types do not say how long lists are, the first one that matches
    is read; the others are checked when they are read. With `missing` "error", nulls of which
    footers tell are an error here, unless a filter by row might leave them out.
    `where` is a filter over columns and hive keys, in the syntax of `gmm_dist.filter_text` or an
    expression of pyarrow's: it leaves out whole files and row groups here, rows when they are
    read. `holdout` is the share of rows, at
    random but the same every time, that nothing is fitted to. `keep` are columns to go along with
    the rows; hive keys among them stay in the path. `remedy` says what helps when a feature is
    missing. `n_shards` overrides the number of shards, which else depends on the number of rows
    alone.

    Raises:
        UserError: the path, bucket or credentials are wrong; there is no Parquet file, or it is
            corrupt, or part of a Delta, Iceberg or Hudi table; a column is missing from a file,
            duplicate, or of a wrong or incompatible type; no rows, or none that match; `holdout`
            is not a share below one.
    """
    if not 0 <= holdout < 1:
        raise UserError(f"--holdout is {holdout:g}: give a share of the rows, 0 <= share < 1")
    condition = filter_of(where)
    found = nights.with_dates(listing.find(url), condition)
    tested = condition.by_row(found.keys.names) if condition else None
    files = _matching_files(found, condition)
    may_fail = missing == "error" and tested is None
    no_nulls = _columns_of(columns) if may_fail else ()
    names = _columns_of(columns)
    if names is not None:
        names = {*names, *keep, *(tested.columns if tested else ()), *filter(None, [weight_column])}
    questions = _Questions(names, tested, found.keys, no_nulls, _CHUNKS_ASKED // len(files), keep)
    told = _read_footers(found.root, files, questions)
    if not any(sum(footer.file.rows) for footer in told):
        n_files = counted(len(told), "Parquet file")
        raise NoRows(f"{storage.redacted(found.root)}: no rows in {n_files}; check the path")
    # Writers leave files without rows or even columns: these say nothing about the lake's.
    filled = [footer for footer in told if any(footer.file.rows)]
    known = Columns.unify(
        found.root,
        ((footer.schema, footer.file) for footer in filled),
        found.keys,
        frozenset[str]().union(*{footer.indices for footer in filled}),
    )
    chosen = known.choose(columns, weight_column, tested, keep, remedy=remedy)
    _refuse_rounding(known, chosen, told)
    told = _unpruned(told, tested, chosen.schema)
    groups = _row_groups(found.root, told, condition if tested else None)
    first_list = None
    if chosen.unmeasured is not None:
        length, first_list = _first_list(found, told, groups, tested, chosen)
        chosen = chosen.measured(length)
    if may_fail:
        _refuse_nulls(found.root, told, chosen)
    result = Plan(
        url=found.root,
        files=tuple(footer.file for footer in told),
        schema=chosen.schema,
        columns=chosen.columns,
        feature_names=chosen.feature_names,
        weight_column=weight_column,
        where=condition,
        missing=missing,
        shards=_deal(groups, n_shards),
        float64_source=chosen.float64_source,
        holdout=holdout,
        kept=chosen.kept,
        first_list=first_list,
        keys=found.keys,
    )
    what = counted(len(files), "file"), counted(result.n_rows, "row")
    logger.info("%s: %s, %s", storage.redacted(result.url), *what)
    logger.info("%s", known.described(chosen, weight_column))
    _tell_of_old_timestamps(told)
    return result


def _unpruned(told: list[_Footer], tested: Filter | None, types: pa.Schema) -> list[_Footer]:
    """Return the footers, with all row groups where an expression's columns have other types.

    It is asked in the types over all files, in which it may mean something else: of 1 / 2.
    """
    if not isinstance(tested, ArrowFilter):
        return told
    names = set(tested.columns) & set(types.names)

    def is_other(schema: pa.Schema) -> bool:
        own = names & set(schema.names)
        return any(schema.field(name).type != types.field(name).type for name in own)

    return [
        replace(footer, groups=range(len(footer.file.rows))) if is_other(footer.schema) else footer
        for footer in told
    ]


def _tell_of_old_timestamps(told: Sequence[_Footer]) -> None:
    names = sorted(frozenset[str]().union(*{footer.old_timestamps for footer in told}))
    if names:
        logger.info(
            "INT96 timestamps are compared and kept to the microsecond, finer digits cut off: %s",
            shown_names(names),
        )


def _key_table(files: Sequence[LakeFile], keys: pa.Schema) -> pa.Table:
    """Return the files' hive keys, a row for each file."""
    return pa.Table.from_pylist([dict(file.partition) for file in files], schema=keys)


def _matching_files(found: Listing, condition: Filter | None) -> Sequence[LakeFile]:
    """Return the files whose hive keys match."""
    if condition is None or not {*condition.columns} & {*found.keys.names}:
        return found.files
    keys = _key_table(found.files, found.keys)
    matches = condition.matching_paths(keys, lambda: nights.columns_of(found))
    if not matches.any():
        what = f"any of {len(found.files)} files' hive keys"
        raise _nothing_matches(found.root, condition, what)
    return [file for file, match in zip(found.files, matches, strict=True) if match]


def _nothing_matches(root: str, condition: Filter, what: str) -> NoRows:
    return NoRows(
        f"{storage.redacted(root)}: no rows match the filter {condition.shown}, by {what}; "
        "widen the filter"
    )


def _columns_of(names: Sequence[str] | None) -> Collection[str] | None:
    """Return the columns that features of such names may come from; None for any."""
    if names is None:
        return None
    return {*names, *(name.rpartition("[")[0] for name in names)}


def _read_footers(root: str, files: Sequence[LakeFile], questions: _Questions) -> list[_Footer]:
    fs, path = storage.open_url(root)
    known: dict[bytes, pa.Schema] = {}  # one for all files that have the same

    def read(file: LakeFile) -> _Footer:
        with listing.opened(fs, path, root, file, footer=True) as source:
            parquet = parquet_file(source)
            leaves = footers.looked_at(parquet.metadata, questions.names)
            footers.require_sound(parquet.metadata, file.size, leaves)
            footer = questions.of(file, parquet)
        if lie := footers.contradiction(parquet.metadata, leaves):
            name = listing.name_of(root, file)
            raise UserError(f"{name}: {lie}; write the file again or move it away")
        schema = known.setdefault(footer.schema.serialize().to_pybytes(), footer.schema)
        return replace(footer, schema=schema)

    def footer(file: LakeFile) -> _Footer:
        return storage.patiently(lambda: read(file), listing.name_of(root, file))

    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        try:
            return list(pool.map(footer, files))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _row_groups(root: str, told: list[_Footer], condition: Filter | None) -> list[RowRange]:
    """Return the row groups that may hold a matching row, whole; `condition` is tested by row."""
    groups = [
        RowRange(index, group, 0, footer.file.rows[group])
        for index, footer in enumerate(told)
        for group in footer.groups
        if footer.file.rows[group] > 0
    ]
    if condition is not None and not groups:
        raise _nothing_matches(root, condition, "the row groups' statistics")
    return groups


def _refuse_nulls(root: str, told: Sequence[_Footer], chosen: Chosen) -> None:
    """Raise for the first null of a feature that a footer tells of."""
    for footer in told:
        for name in chosen.columns:
            if name not in footer.nulls:
                continue
            group, count = footer.nulls[name]
            what = "null" if count == 1 else "nulls"
            if chosen.feature_names != chosen.columns:
                what += ", lists or elements of them"
            raise UserError(
                f"{listing.name_of(root, footer.file)}, row group {group}: column {name!r} has "
                f"{count:,} {what}; pass --missing drop or impute such rows first"
            )


def _refuse_rounding(known: Columns, chosen: Chosen, told: Sequence[_Footer]) -> None:
    """Raise where a kept value, as footers tell, does not fit the common type of all files."""
    for name in chosen.kept:
        for footer in told:
            bounds = footer.extents.get(name)
            if bounds is None or not isinstance(bounds[0], int):
                continue
            type_ = footer.schema.field(name).type
            if not _fits(bounds, type_, known.types[name]):
                raise known.no_common_type(name, (type_, footer.file))


def _fits(bounds: Extent, stored: pa.DataType, common: pa.DataType) -> bool:
    """Say whether the least and the largest value of a column stand a cast to a common type."""
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


def _first_list(
    found: Listing,
    told: Sequence[_Footer],
    groups: Sequence[RowRange],
    tested: Filter | None,
    chosen: Chosen,
) -> tuple[int, str]:
    """Return the length of the first list of a column that matches, and where it is."""
    root, name = found.root, chosen.columns[0]
    fs, path = storage.open_url(root)

    for part in groups:
        file = told[part.file].file
        there = told[part.file].schema.names
        keys = _key_table([file], found.keys)
        left = tested is None or tested.in_file(keys, chosen.schema, there)
        where = listing.name_of(root, file)

        def read(
            file: LakeFile = file, group: int = part.row_group, left: Filter | bool = left
        ) -> tuple[int, int] | None:
            with listing.opened(fs, path, root, file) as source:
                return _first_length(source, group, left, name)

        first = storage.patiently(read, where)
        if first is not None:
            return first[1], f"{where}, row group {part.row_group}, row {first[0]}"
    matching, error = ("", UserError) if tested is None else (" in rows that match", TooFewRows)
    raise error(
        f"{storage.redacted(root)}: column {name!r} has no list that is not null or empty"
        f"{matching}, in {len(told)} Parquet files; name other feature columns with --columns"
    )


def _first_length(
    source: Any, group: int, tested: Filter | bool, name: str
) -> tuple[int, int] | None:
    """Return the row and the length of a row group's first list that matches."""
    names = [name, *(() if isinstance(tested, bool) else tested.columns)]
    parquet = parquet_file(source, buffer_size=_PAGES_BYTES)
    start = 0
    for batch in _batches(parquet, group, names):
        column = batch.column(name)
        lengths = pc.list_value_length(stored(column)).to_numpy()
        fits = np.nan_to_num(lengths.astype(np.float64)) > 0  # neither null nor empty
        fits &= tested if isinstance(tested, bool) else tested.mask(batch)
        if fits.any():
            row = int(fits.argmax())
            return start + row, int(lengths[row])
        start += batch.num_rows
    return None


def _batches(parquet: pq.ParquetFile, group: int, names: list[str]) -> Iterator[pa.Table]:
    # Some rows at first: one is enough where none is null, and lists may be long.
    for batch in parquet.iter_batches(_LISTS_AT_ONCE, row_groups=[group], columns=names):
        yield pa.Table.from_batches([batch])


def _deal(groups: Sequence[RowRange], n_shards: int | None) -> tuple[tuple[RowRange, ...], ...]:
    """Cut the rows, in order, into shards of equal size, give or take a row."""
    total = sum(group.stop for group in groups)
    count = default_shards(total) if n_shards is None else n_shards
    if count < 1:
        raise UserError(f"{count} shards; at least one is needed")
    edges = [i * total // count for i in range(count + 1)]
    shards: list[list[RowRange]] = [[] for _ in range(count)]
    offset = shard = 0
    for group in groups:
        start = 0
        while start < group.stop:
            while edges[shard + 1] <= offset + start:
                shard += 1
            stop = min(group.stop, edges[shard + 1] - offset)
            shards[shard].append(replace(group, start=start, stop=stop))
            start = stop
        offset += group.stop
    return tuple(map(tuple, shards))


def default_shards(n_rows: int) -> int:
    """Return a power of two: up to 64 with enough rows each, up to 1024 to keep shards small."""
    count = 1
    while count < 64 and n_rows >= 2 * count * _MIN_ROWS_PER_SHARD:
        count *= 2
    while count < 1024 and n_rows > count * _MAX_ROWS_PER_SHARD:
        count *= 2
    return count


def _row_hashes(path: str, first: int, stop: int) -> npt.NDArray[np.uint64]:
    """Return 64 random bits for each row number from `first` up to `stop` of a file.

    SplitMix64 (Steele, Lea, Flood 2014), whose n-th number can be had without those before it,
    seeded by the path; arithmetic modulo 2^64.
    """
    seed = int.from_bytes(hashlib.sha256(os.fsencode(path)).digest()[:8], "little")
    z = np.arange(first + 1, stop + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _hash(plan: Plan) -> str:
    content: dict[str, object] = {
        "format": 1,
        "files": [(file.path, file.size, file.version, file.rows) for file in plan.files],
        "row_groups": sorted({(p.file, p.row_group) for shard in plan.shards for p in shard}),
        "columns": plan.columns,
        "feature_names": plan.feature_names,
        "weight_column": plan.weight_column,
        "where": plan.where.text if plan.where else None,
        "missing": plan.missing,
        "n_shards": plan.n_shards,
    }
    if plan.holdout > 0:  # plans without it keep the hash that they had before there was any
        content["holdout"] = plan.holdout
    if plan.kept:
        content["kept"] = plan.kept
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()

"""Plan a lake: which rows of which files a job reads, dealt to shards by rows."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gmm_dist import storage
from gmm_dist.errors import NoRows, Words
from gmm_dist.formats import counted
from gmm_dist.lake import listing, nights
from gmm_dist.lake.deal import RowRange, deal
from gmm_dist.lake.filters.expressions import filter_of
from gmm_dist.lake.filters.where import Filter
from gmm_dist.lake.lake import Lake, Missing, require_share
from gmm_dist.lake.listing import LakeFile, Listing
from gmm_dist.lake.schema import NAME_COLUMNS, Columns
from gmm_dist.lake.survey import (
    _CHUNKS_ASKED,
    Questions,
    matching_row_groups,
    measure_lists,
    nothing_matches,
    read_footers,
    refuse_nulls,
    refuse_rounding,
    tell_of_old_timestamps,
    unpruned,
)
from gmm_dist.lake.tables.columns import TableColumns
from gmm_dist.lake.tables.find import find
from gmm_dist.lake.tables.snapshot import At, Snapshot, parse_at
from gmm_dist.urls import Url

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Say which rows and columns a job reads, and how they are dealt to shards.

    A picklable value. `hash` is the same for the same files and settings, wherever they are
    mounted (`url` is not part of it); `n_rows` counts rows before the row-level filter;
    `schema` has the file columns that are read, filtered by or kept, their types unified over
    files; `float64_source` says that float32 cannot hold some feature's every value; `holdout` is
    the share of rows that nothing is fitted to; `kept` are columns to go along with the rows,
    which some files may lack; `first_list` says where the list is whose length all lists of an
    embedding must have, where their types do not tell it; `keys` types the hive keys of the files;
    of a table, `table_columns` says how files name its columns, `snapshot` which version it is.
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
    table_columns: TableColumns | None = None
    snapshot: Snapshot | None = None
    hash: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", Url(self.url))
        object.__setattr__(self, "hash", _hash(self))

    @property
    def snapshot_content(self) -> dict[str, Any] | None:
        """The version of the table that it is, as plain JSON values; None for no table."""
        return None if self.snapshot is None else self.snapshot.content

    @property
    def n_rows(self) -> int:
        return sum(part.stop - part.start for shard in self.shards for part in shard)

    def part(self, shards: range) -> Plan:
        """Return the plan of some shards: it has their files alone, and the others are empty."""
        ours = self.shards[shards.start : shards.stop]
        needed = sorted({part.file for shard in ours for part in shard})
        places = {file: place for place, file in enumerate(needed)}
        moved = [tuple(replace(part, file=places[part.file]) for part in shard) for shard in ours]
        before, after = ((),) * shards.start, ((),) * (self.n_shards - shards.stop)
        files = tuple(self.files[file] for file in needed)
        return replace(self, files=files, shards=(*before, *moved, *after))

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
        """Return the part of `where` to test row by row: hive keys have chosen the files."""
        return self.where.by_row(self._path_keys) if self.where else None

    def row_filter_of(self, file: int, names: Collection[str]) -> Filter | bool:
        """Return the filter of the rows of a file, of which columns `names` are read.

        True says that all rows pass, False that none does.
        """
        condition = self.row_filter
        if condition is None:
            return True
        keys = listing.key_table([self.files[file]], self.keys).select(self._path_keys)
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
        neither on the filter, nor on shards, nor on other files. Deleted rows have numbers, too.
        """
        if self.holdout == 0:
            return None
        file = self.files[part.file]
        first = sum(file.rows[: part.row_group])
        live = file.live(part.row_group)
        if live is None:
            hashes = _row_hashes(file.path, first + part.start, first + part.stop)
        else:
            hashes = _row_hashes(file.path, first, first + len(live))[live][part.start : part.stop]
        return hashes < np.uint64(int(self.holdout * 2.0**64))


def plan_of(lake: Lake, *, keep: Sequence[str] = (), remedy: Words = NAME_COLUMNS) -> Plan:
    """Plan the rows of a lake; takes `keep` and `remedy`, and raises, as `plan_lake` does."""
    return plan_lake(
        lake.url,
        columns=lake.columns,
        weight_column=lake.weight_column,
        where=lake.where,
        missing=lake.missing,
        holdout=lake.holdout,
        at=parse_at(lake.at),
        keep=keep,
        remedy=remedy,
    )


def plan_lake(
    url: str,
    *,
    columns: Sequence[str] | None = None,
    weight_column: str | None = None,
    where: str | pc.Expression | Filter | None = None,
    missing: Missing = "error",
    holdout: float = 0.0,
    at: At | None = None,
    keep: Sequence[str] = (),
    remedy: Words = NAME_COLUMNS,
    n_shards: int | None = None,
) -> Plan:
    """Plan the Parquet file or folder, or the table, at `url`; reads footers, and one list at most.

    `tables.find` says which files count. Where types do not say how long lists are, the first one
    that matches is read; the others are checked when they are read.

    Args:
        url: A local path or any fsspec URL.
        columns: Numeric columns, or one column of lists of numbers, all of one length; None for
            every floating-point column but pandas' indices, or else the one column of lists.
        weight_column: Column of sample weights.
        where: Filter over columns and hive keys, in the syntax of `filters.text` or an expression
            of pyarrow's: it leaves out whole files and row groups here, rows when they are read.
        missing: What becomes of nulls and NaN. With "error", nulls of which footers tell are an
            error here, unless a filter by row might leave them out.
        holdout: Share of rows, at random but the same every time, that nothing is fitted to.
        at: Version of a table; None for the newest.
        keep: Columns to go along with the rows; hive keys among them stay in the path.
        remedy: What helps when a feature is missing.
        n_shards: Number of shards; None for one that depends on the number of rows alone.

    Raises:
        UserError: the path, bucket or credentials are wrong; there is no Parquet file, or it is
            corrupt, or a part of a table, or the table cannot be read; a column is missing from a
            file, duplicate, or of a wrong or incompatible type; no rows, or none that match;
            `holdout` is not a share below one; `at` is no version of it.
    """
    require_share(holdout)
    condition = filter_of(where)
    lake_listing = nights.with_dates(find(url, at), condition)
    tested = condition.by_row(lake_listing.keys.names) if condition else None
    files = _matching_files(lake_listing, condition)
    may_fail = missing == "error" and tested is None
    no_nulls = _columns_of(columns) if may_fail else ()
    names = _columns_of(columns)
    if names is not None:
        names = {*names, *keep, *(tested.columns if tested else ()), *filter(None, [weight_column])}
    questions = Questions(
        names=names,
        tested=tested,
        keys=lake_listing.keys,
        no_nulls=no_nulls,
        chunks=_CHUNKS_ASKED // len(files),
        keep=keep,
    )
    file_footers = read_footers(lake_listing, files, questions)
    if not any(sum(footer.file.live_rows) for footer in file_footers):
        n_files = counted(len(file_footers), "Parquet file")
        raise NoRows(f"{storage.redacted(lake_listing.root)}: no rows in {n_files}; check the path")
    # Writers leave files without rows or even columns: these say nothing about the lake's.
    filled = [footer for footer in file_footers if any(footer.file.rows)]
    known = Columns.unify(
        lake_listing.root,
        ((footer.schema, footer.file) for footer in filled),
        lake_listing.keys,
        frozenset[str]().union(*{footer.indices for footer in filled}),
    )
    chosen = known.choose(columns, weight_column, tested, keep, remedy=remedy)
    refuse_rounding(known, chosen, file_footers)
    file_footers = unpruned(file_footers, tested, chosen.schema)
    groups = matching_row_groups(lake_listing.root, file_footers, condition if tested else None)
    first_list = None
    if chosen.unmeasured is not None:
        length, first_list = measure_lists(lake_listing, file_footers, groups, tested, chosen)
        chosen = chosen.measured(length)
    if may_fail:
        refuse_nulls(lake_listing.root, file_footers, chosen)
    result = Plan(
        url=lake_listing.root,
        files=tuple(footer.file for footer in file_footers),
        schema=chosen.schema,
        columns=chosen.columns,
        feature_names=chosen.feature_names,
        weight_column=weight_column,
        where=condition,
        missing=missing,
        shards=deal(groups, n_shards),
        float64_source=chosen.float64_source,
        holdout=holdout,
        kept=chosen.kept,
        first_list=first_list,
        keys=lake_listing.keys,
        table_columns=lake_listing.columns,
        snapshot=lake_listing.snapshot,
    )
    what = counted(len(files), "file"), counted(result.n_rows, "row")
    logger.info("%s: %s, %s", storage.redacted(result.url), *what)
    logger.info("%s", known.described(chosen, weight_column))
    tell_of_old_timestamps(file_footers)
    return result


def _matching_files(lake_listing: Listing, condition: Filter | None) -> Sequence[LakeFile]:
    """Return the files whose hive keys match and, of a table, the statistics in its log."""
    files = lake_listing.files
    if condition is None:
        return files
    among: Sequence[int] = range(len(files))
    if {*condition.columns} & {*lake_listing.keys.names}:
        keys = listing.key_table(files, lake_listing.keys)
        matches = condition.matching_paths(keys, lambda: nights.columns_of(lake_listing))
        among = np.flatnonzero(matches).tolist()
        if not among:
            what = f"any of {len(files)} files' hive keys"
            raise nothing_matches(lake_listing.root, condition, what)
    if lake_listing.bounds is not None:
        among = lake_listing.bounds.matching(condition, among)
        if not among:
            what = f"the statistics of {len(files)} files in the table's log"
            raise nothing_matches(lake_listing.root, condition, what)
    return [files[i] for i in among]


def _columns_of(names: Sequence[str] | None) -> Collection[str] | None:
    """Return the columns that features of such names may come from; None for any."""
    if names is None:
        return None
    return {*names, *(name.rpartition("[")[0] for name in names)}


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
    if plan.snapshot is not None:
        content["snapshot"] = plan.snapshot.content
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()

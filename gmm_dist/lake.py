"""Plan a lake: which rows of which files a job reads, dealt to shards by rows."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds

from gmm_dist import listing, nights, storage
from gmm_dist.columns import Columns
from gmm_dist.errors import NoRows, UserError
from gmm_dist.listing import LakeFile, Listing
from gmm_dist.where import Where, parse

logger = logging.getLogger(__name__)

Missing = Literal["error", "drop", "mean"]

_MIN_ROWS_PER_SHARD = 16_384
_MAX_ROWS_PER_SHARD = 2**20
_FOOTERS_AT_ONCE = 32


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
    which some files may lack.
    """

    url: str
    files: tuple[LakeFile, ...]
    schema: pa.Schema
    columns: tuple[str, ...]
    feature_names: tuple[str, ...]
    weight_column: str | None
    where: Where | None
    missing: Missing
    shards: tuple[tuple[RowRange, ...], ...]
    float64_source: bool
    holdout: float = 0.0
    kept: tuple[str, ...] = ()
    hash: str = field(init=False)

    def __post_init__(self) -> None:
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
    def row_filter(self) -> Where | None:
        """Return what is left of `where` to test row by row: files were chosen by hive keys."""
        return self.where.restricted(self.schema.names) if self.where else None

    @property
    def read_columns(self) -> tuple[str, ...]:
        """Name the file columns that reading needs: features, weight, filter; each once."""
        weight = (self.weight_column,) if self.weight_column else ()
        tested = self.row_filter.columns if self.row_filter else ()
        return tuple(dict.fromkeys((*self.columns, *weight, *tested)))

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
    """Hold what planning needs of one file's footer; the fragment only under a filter."""

    file: LakeFile
    schema: pa.Schema
    fragment: ds.ParquetFileFragment | None


def plan(
    url: str,
    *,
    columns: Sequence[str] | None = None,
    weight_column: str | None = None,
    where: str | None = None,
    missing: Missing = "error",
    holdout: float = 0.0,
    keep: Sequence[str] = (),
    remedy: str = "name the feature columns with --columns",
    n_shards: int | None = None,
) -> Plan:
    """Plan the Parquet file or folder at `url`; reads footers only.

    `listing.find` says which files count. `columns` are numeric columns or one fixed-size-list
    column; default: every floating-point column, or else the one fixed-size-list column.
    `where` is a filter in `gmm_dist.where`'s syntax over columns and hive keys: it leaves out
    whole files and row groups here, rows when they are read. `holdout` is the share of rows, at
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
    condition = parse(where) if where is not None else None
    found = nights.with_dates(listing.find(url), condition)
    tested = _tested_by_row(condition, found.keys)
    files = _matching_files(found, condition)
    footers = _read_footers(found.root, files, keep_fragments=tested is not None)
    schemas = ((footer.schema, footer.file) for footer in footers)
    known = Columns.unify(found.root, schemas, found.keys)
    chosen = known.choose(columns, weight_column, tested, keep, remedy=remedy)
    groups = _row_groups(found.root, footers, tested, chosen.schema)
    result = Plan(
        url=found.root,
        files=tuple(footer.file for footer in footers),
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
    )
    logger.info("%s: %d files, %d rows", storage.redacted(result.url), len(files), result.n_rows)
    return result


def _tested_by_row(condition: Where | None, keys: pa.Schema) -> Where | None:
    """Return the comparisons that the path does not decide."""
    return condition.restricted(set(condition.columns) - set(keys.names)) if condition else None


def _matching_files(found: Listing, condition: Where | None) -> Sequence[LakeFile]:
    """Return the files whose hive keys match."""
    by_key = condition.restricted(found.keys.names) if condition else None
    if condition is None or by_key is None:
        return found.files
    partitions = [dict(file.partition) for file in found.files]
    matches = by_key.mask(pa.Table.from_pylist(partitions, schema=found.keys))
    if not matches.any():
        what = f"any of {len(found.files)} files' hive keys"
        raise _nothing_matches(found.root, condition, what)
    return [file for file, match in zip(found.files, matches, strict=True) if match]


def _nothing_matches(root: str, condition: Where, what: str) -> NoRows:
    return NoRows(
        f"{storage.redacted(root)}: no rows match the filter {condition.text}, by {what}; "
        "widen the filter"
    )


def _read_footers(root: str, files: Sequence[LakeFile], *, keep_fragments: bool) -> list[_Footer]:
    fs, path = storage.open_url(root)

    def read(file: LakeFile) -> _Footer:
        with listing.opened(fs, path, root, file, footer=True) as source:
            fragment = ds.ParquetFileFormat().make_fragment(source)
            fragment.ensure_complete_metadata()
            rows = tuple(group.num_rows for group in fragment.row_groups)
            schema = fragment.physical_schema.remove_metadata()
        return _Footer(replace(file, rows=rows), schema, fragment if keep_fragments else None)

    def footer(file: LakeFile) -> _Footer:
        return storage.patiently(lambda: read(file), listing.name_of(root, file))

    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        try:
            return list(pool.map(footer, files))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _row_groups(
    root: str, footers: list[_Footer], condition: Where | None, schema: pa.Schema
) -> list[RowRange]:
    """Return the row groups that may hold a matching row, whole."""
    groups = []
    for index, footer in enumerate(footers):
        rows = footer.file.rows
        for group in range(len(rows)) if condition is None else _kept(footer, condition, schema):
            groups.append(RowRange(index, group, 0, rows[group]))
    groups = [group for group in groups if group.stop > 0]
    if not any(sum(footer.file.rows) for footer in footers):
        raise UserError(
            f"{storage.redacted(root)}: no rows in {len(footers)} Parquet files; check the path"
        )
    if condition is not None and not groups:
        raise _nothing_matches(root, condition, "the row groups' statistics")
    return groups


def _kept(footer: _Footer, condition: Where, schema: pa.Schema) -> list[int]:
    if set(condition.columns) - set(footer.schema.names):
        return []  # an added column: null in this file, and null never matches
    assert footer.fragment is not None
    tested = pa.schema([schema.field(name) for name in condition.columns])
    subset = footer.fragment.subset(filter=condition.expression(tested), schema=tested)
    return [group.id for group in subset.row_groups]


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
    seed = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "little")
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

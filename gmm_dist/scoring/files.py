"""Scored files: written once, to their place; resumed one by one; complete or not committed.

    OUT/_scored/manifest.json                  the commit: names scored.json, see `commit`
    OUT/_scored/scored.json                    every file with its sha256, size and rows
    OUT/_scored/_checkpoints/run.json          whose run it is, until the commit
    OUT/_scored/_checkpoints/files/<path>.json the record of a file that is finished

`target` says where they lie. The same run writes the same bytes on the same kind of processor, so
it does no harm when two workers, or one that was given up for lost, write the same file. The record
is written after the file: it names the run, the kind of processor, and the file's size and sha256
(or ETag).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import reduce
from operator import add, index
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gmm_dist.errors import RunFailed
from gmm_dist.lake.listing import LakeFile, name_of
from gmm_dist.lake.plan import Plan
from gmm_dist.lake.stream import row_groups, stream
from gmm_dist.runs.checkpoint import RunIdentity
from gmm_dist.runs.commit import ATTEMPTS
from gmm_dist.runs.folder import Folder
from gmm_dist.runs.json_files import FORMAT_VERSION, to_json
from gmm_dist.scoring.scorer import (
    COMPONENT,
    DATA_FILE,
    LOG_DENSITY,
    OUTLIER,
    PROBABILITIES,
    PROBABILITY,
    ROW_INDEX,
    Scorer,
    Scoring,
    device,
)
from gmm_dist.scoring.target import Target
from gmm_dist.storage import absolute, explained
from gmm_dist.urls import redacted

SCRATCH = "files"
_LONG_NAME = 240  # bytes; with what is added, the longest that file systems take is 255
_GROUP_BYTES = 1 << 26  # of a row group that is written, in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Count the rows of scored files.

    `rows` were written; `filtered` did not pass the filter; `missing` of those written lack a
    feature; `outliers` are marked (0 where none are asked for); `components` (k,) counts the rows
    of each.
    """

    rows: int
    filtered: int
    missing: int
    outliers: int
    components: tuple[int, ...]

    def __add__(self, other: Counts) -> Counts:
        components = zip(self.components, other.components, strict=True)
        return Counts(
            rows=self.rows + other.rows,
            filtered=self.filtered + other.filtered,
            missing=self.missing + other.missing,
            outliers=self.outliers + other.outliers,
            components=tuple(map(sum, components)),
        )


@dataclass(frozen=True, slots=True)
class ScoredFile:
    """Identify a scored file, and count its rows."""

    sha256: str
    size: int
    counts: Counts

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> ScoredFile:
        """Return the file that `entry` describes; TypeError or KeyError where it is none."""
        counts = {**entry, "components": tuple(map(index, entry["components"]))}
        for name in ("size", "rows", "filtered", "missing", "outliers"):
            counts[name] = index(counts[name])
        return cls(counts.pop("sha256"), counts.pop("size"), Counts(**counts))

    @property
    def entry(self) -> dict[str, Any]:
        """All of it, as plain JSON values."""
        return {"sha256": self.sha256, "size": self.size, **asdict(self.counts)}


@dataclass(frozen=True, slots=True)
class Scored:
    """The files that were scored, one at least, by their paths; a Summary."""

    files: Mapping[str, ScoredFile]

    def __add__(self, other: Scored) -> Scored:
        assert not self.files.keys() & other.files.keys(), "a file was counted twice"
        return Scored({**self.files, **other.files})

    @property
    def counts(self) -> Counts:
        """The counts over all files."""
        return reduce(add, (file.counts for file in self.files.values()))

    @property
    def n_rows(self) -> int:
        """The rows that were written."""
        return self.counts.rows


class ScoreFiles:
    """The work on a shard of a scoring: read a file, score it, write it, and count.

    Shard i is one file; neighbours are of all sizes, so that ranges of shards are alike. It may be
    called again, and elsewhere: a file that this run has finished on such a processor is kept.

    Peak memory: see `lake.stream.stream`; and a row group of the written file, 64 MB.
    """

    def __init__(
        self, plan: Plan, scoring: Scoring, target: Target, identity: RunIdentity, attempt: str
    ) -> None:
        self._plan, self._scoring = plan, scoring
        target = replace(target, url=absolute(target.url))  # workers may be in other folders
        self._target, self._key, self._attempt = target, identity.key, attempt
        self._groups = row_groups(plan)
        self._order = spread([file.size for file in plan.files])

    def __call__(self, shard: int) -> Scored:
        index = self._order[shard]
        folder, path = self._target.folder, self._path(index)
        with explained(folder.url):
            file = self._recorded(folder, path) or self._score(folder, index)
        return Scored({path: file})

    def _path(self, index: int) -> str:
        return self._target.path(self._plan.files[index], index)

    def _recorded(self, folder: Folder, path: str) -> ScoredFile | None:
        """Return the record of a file that this run has finished."""
        data = self._target.records.read(_record_name(path))
        with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
            record = json.loads(data or b"")
            is_ours = (record["key"], record["device"]) == (self._key, device().type)
            if is_ours and record["stamp"] and record["stamp"] == _stamp(folder, path):
                return ScoredFile.parse(record["file"])
        return None

    def _score(self, folder: Folder, index: int) -> ScoredFile:
        path = self._path(index)
        scratch = self._target.home.below(ATTEMPTS, self._attempt, SCRATCH)
        with folder.writing(path, scratch=scratch) as growing:
            file = self._write(growing, index)
        record = {
            "format_version": FORMAT_VERSION,
            "key": self._key,
            "device": device().type,
            "stamp": [file.size, file.sha256] if folder.is_local else _stamp(folder, path),
            "file": file.entry,
        }
        self._target.records.write(to_json(record), _record_name(path), durable=True)
        return file

    def _write(self, path: Path, index: int) -> ScoredFile:
        plan, scorer = self._plan, Scorer(self._scoring)
        mixture = self._scoring.mixture
        counts = _Counts(self._scoring.ids or range(mixture.n_components))
        with _writer(path, self._scoring) as writer:
            pending: list[pa.Table] = []
            beside = 8 * mixture.n_components if self._scoring.probabilities else 0
            row_index = ROW_INDEX if self._scoring.is_placed else None
            batches = stream(plan, index, self._groups[index], beside=beside, row_index=row_index)
            for kept, X in batches:
                table = scorer.table(self._along(kept, index, X.shape[1]), X)
                counts.add(table)
                pending.append(table)
                if sum(part.nbytes for part in pending) >= _GROUP_BYTES:
                    writer.write_table(pa.concat_tables(pending))
                    pending = []
            if pending:
                writer.write_table(pa.concat_tables(pending))
        n_read = sum(plan.files[index].live_rows)  # `stream` has seen them, or raised
        n_written = pq.read_metadata(path).num_rows
        if counts.rows != n_written or not (counts.rows == n_read or plan.row_filter):
            raise RunFailed(
                f"{name_of(plan.url, plan.files[index])}: {n_read:,} rows, {counts.rows:,} scored, "
                f"{n_written:,} found in the file written: check the disk, and run again"
            )
        return ScoredFile(
            _sha256(path),
            path.stat().st_size,
            Counts(
                rows=counts.rows,
                filtered=n_read - counts.rows,
                missing=counts.missing,
                outliers=counts.outliers,
                components=tuple(counts.components.tolist()),
            ),
        )

    def _along(self, kept: pa.Table, index: int, n: int) -> pa.Table:
        """Return what goes along with n rows: kept columns, partition values, the file's name."""
        file = self._plan.files[index]
        values = dict(file.partition) | {DATA_FILE: data_file(file)}
        columns = {
            field.name: kept.column(field.name)
            if field.name in kept.column_names
            else pa.repeat(pa.scalar(values[field.name], field.type), n)
            for field in self._scoring.along
        }
        return pa.table(columns) if columns else kept


class _Counts:
    """Counts the rows of the tables that make up a file."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.rows = self.missing = self.outliers = 0
        self.components = np.zeros(len(ids), dtype=np.int64)
        self._ids = np.array(ids)
        self._order = np.argsort(self._ids)

    def add(self, table: pa.Table) -> None:
        component = table.column(COMPONENT)
        self.rows += table.num_rows
        self.missing += component.null_count
        component_ids = component.drop_null().to_numpy()
        places = self._order[np.searchsorted(self._ids, component_ids, sorter=self._order)]
        self.components += np.bincount(places, minlength=len(self.components))
        if OUTLIER in table.column_names:
            self.outliers += pc.sum(table.column(OUTLIER)).as_py() or 0


def data_file(file: LakeFile) -> str:
    """Return the path of a data file within its lake, or its URL where it lies outside a table."""
    is_outside = file.entry is not None and file.entry.is_outside
    return redacted(file.path) if is_outside else file.path


def _record_name(path: str) -> str:
    """Return the name of a file's record, short enough for a disk that holds the file."""
    folder, slash, name = path.rpartition("/")
    if len(os.fsencode(name)) > _LONG_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f"{folder}{slash}{name}.json"


def _stamp(folder: Folder, path: str) -> list[object] | None:
    """Return a file's size and sha256 or, in a store that would have to send it, its ETag."""
    if not folder.is_local:
        return folder.stamp(path)
    whole = Path(folder.at(path))
    return [whole.stat().st_size, _sha256(whole)] if whole.is_file() else None


def _sha256(path: Path) -> str:
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _writer(path: Path, scoring: Scoring) -> pq.ParquetWriter:
    # Values that hardly ever repeat are not worth a dictionary.
    plain = {PROBABILITY, LOG_DENSITY, PROBABILITIES, ROW_INDEX}
    repeated = [name for name in scoring.schema.names if name not in plain]
    return pq.ParquetWriter(path, scoring.schema, use_dictionary=repeated)


def spread(sizes: list[int]) -> list[int]:
    """Return an order of files in which any range of like length has files of all sizes.

    The golden section of their number is the step through the files by size (Weyl's sequence).
    """
    n = len(sizes)
    by_size = sorted(range(n), key=lambda i: (-sizes[i], i))
    step = next(s for s in range(max(1, round(0.618 * n)), n + 1) if math.gcd(s, n) == 1 or n == 1)
    return [by_size[i * step % n] for i in range(n)]

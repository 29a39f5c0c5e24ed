"""Scored files: written once, to their place; resumed one by one; complete or not committed.

    OUT/<path in the lake>                     a scored file, whole whenever it is there
    OUT/_scored/manifest.json                  the commit: names scored.json, see `commit`
    OUT/_scored/scored.json                    every file with its sha256, size and rows
    OUT/_scored/_checkpoints/run.json          whose run it is, until the commit
    OUT/_scored/_checkpoints/files/<path>.json the record of a file that is finished

What tells of the run lies under one name with an underscore, which readers of Parquet folders pass
over. The same run writes the same bytes, so it does no harm when two workers, or one that was
given up for lost, write the same file; the record, which names the run, follows the file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from gmm_dist.checkpoint import CHECKPOINTS, RunIdentity
from gmm_dist.commit import ATTEMPTS
from gmm_dist.lake import Plan
from gmm_dist.places import Place
from gmm_dist.records import FORMAT_VERSION, to_json
from gmm_dist.scoring import (
    COMPONENT,
    LOG_DENSITY,
    OUTLIER,
    PROBABILITIES,
    PROBABILITY,
    Scorer,
    Scoring,
)
from gmm_dist.shards import Block, ShardRows
from gmm_dist.storage import absolute, explained
from gmm_dist.streaming import row_groups, stream

HOME = "_scored"
SCRATCH = "files"
_RECORDS = "files"
_GROUP_BYTES = 1 << 26  # of a row group that is written, in memory


@dataclass(frozen=True, slots=True)
class ScoredFile:
    """Identify a scored file, and count its rows.

    `rows` were written; `filtered` did not pass the filter; `missing` of those written lack a
    feature; `outliers` are marked (0 where none are asked for); `components` (k,) counts the rows
    of each.
    """

    sha256: str
    size: int
    rows: int
    filtered: int
    missing: int
    outliers: int
    components: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Scored:
    """The files that were scored, by their paths; a Summary."""

    files: Mapping[str, ScoredFile]

    def __add__(self, other: Scored) -> Scored:
        assert not self.files.keys() & other.files.keys(), "a file was counted twice"
        return Scored({**self.files, **other.files})

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files.values())

    @property
    def missing(self) -> int:
        return sum(file.missing for file in self.files.values())

    @property
    def filtered(self) -> int:
        return sum(file.filtered for file in self.files.values())

    @property
    def outliers(self) -> int:
        return sum(file.outliers for file in self.files.values())

    def totals(self) -> dict[str, Any]:
        """Return the counts over all files, as plain JSON values."""
        files = self.files.values()
        names = ("rows", "filtered", "missing", "outliers")
        counts = {name: getattr(self, name) for name in names}
        components = [sum(own) for own in zip(*(file.components for file in files), strict=True)]
        return {**counts, "components": components}


def collect(rows: ShardRows) -> Scored:
    """Return what scoring counted: the task over what `ScoreFiles` made."""
    assert isinstance(rows.counts, Scored)
    return rows.counts


def home_of(place: Place) -> Place:
    """Return the folder, within an output, of what tells of the run."""
    return place.below(HOME)


def records_of(place: Place) -> Place:
    """Return the folder, within an output, of the records of finished files."""
    return home_of(place).below(CHECKPOINTS, _RECORDS)


class ScoreFiles:
    """The loader that scores a file and writes it, and holds its counts in place of its rows.

    Shard i is one file; neighbours are of all sizes, so that ranges of shards are alike. It may be
    called again, and elsewhere: a file that has this run's record is left as it is.

    Peak memory: see `streaming.stream`; and a row group of the written file, 64 MB.
    """

    def __init__(
        self, plan: Plan, scoring: Scoring, output: str, identity: RunIdentity, attempt: str
    ) -> None:
        self._plan, self._scoring = plan, scoring
        self._output, self._key, self._attempt = absolute(output), identity.key, attempt
        self._groups = row_groups(plan)
        self._order = spread([file.size for file in plan.files])

    def __call__(self, shard: int) -> ShardRows:
        index = self._order[shard]
        path = self._plan.files[index].path
        place = Place.of(self._output)
        with explained(place.url):
            file = self._recorded(place, path) or self._score(place, index)
        # Rows without features: they take no memory, and are counted like any others.
        return ShardRows(shard, [Block(torch.empty(0, file.rows))], Scored({path: file}))

    def _recorded(self, place: Place, path: str) -> ScoredFile | None:
        """Return the record of a file that this run has finished."""
        data = records_of(place).read(f"{path}.json")
        with suppress(ValueError, TypeError, KeyError):
            record = json.loads(data or b"")
            file = ScoredFile(**record["file"])
            if record["key"] == self._key and place.size(path) == file.size:
                return replace(file, components=tuple(file.components))
        return None

    def _score(self, place: Place, index: int) -> ScoredFile:
        path = self._plan.files[index].path
        scratch = home_of(place).below(ATTEMPTS, self._attempt, SCRATCH)
        with place.writing(path, scratch=scratch) as growing:
            file = self._write(growing, index)
        record = {"format_version": FORMAT_VERSION, "key": self._key, "file": asdict(file)}
        records_of(place).write(to_json(record), f"{path}.json", durable=True)
        return file

    def _write(self, path: Path, index: int) -> ScoredFile:
        plan, scorer = self._plan, Scorer(self._scoring)
        mixture = self._scoring.mixture
        counts = _Counts(self._scoring.ids or range(mixture.n_components))
        with _writer(path, self._scoring) as writer:
            pending: list[pa.Table] = []
            for kept, X in stream(plan, index, self._groups[index]):
                table = scorer.table(kept, X)
                counts.add(table)
                pending.append(table)
                if sum(part.nbytes for part in pending) >= _GROUP_BYTES:
                    writer.write_table(pa.concat_tables(pending))
                    pending = []
            if pending:
                writer.write_table(pa.concat_tables(pending))
        n_read = sum(plan.files[index].rows)
        n_written = pq.read_metadata(path).num_rows
        assert counts.rows == n_written, f"{counts.rows} rows scored, {n_written} written"
        assert counts.rows == n_read or plan.row_filter, f"{n_read} rows, {n_written} written"
        with path.open("rb") as source:
            sha256 = hashlib.file_digest(source, "sha256").hexdigest()
        return ScoredFile(
            sha256,
            path.stat().st_size,
            counts.rows,
            n_read - counts.rows,
            counts.missing,
            counts.outliers,
            tuple(counts.components.tolist()),
        )


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
        found = component.drop_null().to_numpy()
        places = self._order[np.searchsorted(self._ids, found, sorter=self._order)]
        self.components += np.bincount(places, minlength=len(self.components))
        if OUTLIER in table.column_names:
            self.outliers += pc.sum(table.column(OUTLIER)).as_py() or 0


def _writer(path: Path, scoring: Scoring) -> pq.ParquetWriter:
    # Values that hardly ever repeat are not worth a dictionary.
    plain = {PROBABILITY, LOG_DENSITY, PROBABILITIES}
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

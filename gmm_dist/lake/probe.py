"""Look at some rows of a plan before they are loaded: those by which a centre is chosen."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gmm_dist import storage
from gmm_dist.lake.deal import RowRange
from gmm_dist.lake.listing import name_of
from gmm_dist.lake.opening import opened
from gmm_dist.lake.plan import Plan
from gmm_dist.lake.read import features, filtered, those
from gmm_dist.lake.tables.columns import LakeFileReader

Floats = npt.NDArray[np.float64]

_PLACES = 16
_VALUES = 2**24  # looked at while places lack rows; more only while there is no row at all
_MOST_VALUES = 2**28
_GROWTH = 16  # of the rows that are looked at from each place, where too few are good
_BATCH_ROWS = 8192


def probe(plan: Plan, *, max_rows: int = 16384) -> Floats:
    """Return some complete, finite rows (m, d), m <= max_rows, for choosing a centre.

    They are the first that pass `where` from each of 16 places on, which are spread evenly over
    the plan's rows by their numbers: the same rows, however they are cut into files and row
    groups, and the same as an array's (see `local_rows.robust_centre`). At places that lack rows
    16 million values in all are looked at, and 256 million while there is no row at all: m may be
    0. Parquet decodes a row group from its start only, so each row group with a place is decoded
    up to there, and its bytes are fetched whole. Bad values are left out: `read` reports them.
    """
    groups = _row_groups(plan)
    places = _places(plan.n_rows, max_rows)
    looked_at, reach = 0, max(places[0].room, 1)
    while True:
        goals = [min(place.first + reach, place.stop) for place in places]
        looks = [
            (i, place.at, goal)
            for i, (place, goal) in enumerate(zip(places, goals, strict=True))
            if place.lacks > 0 and place.at < goal
        ]
        if not looks:
            break
        for first, group in groups:
            _look(plan, first, group, looks, places)
        for i, _, goal in looks:
            places[i].at = goal
        looked_at += sum(goal - at for _, at, goal in looks) * plan.n_features
        is_found = any(place.lacks < place.room for place in places)
        limit = _VALUES if is_found else _MOST_VALUES
        if looked_at >= limit:
            break
        reach *= _GROWTH
    found = itertools.chain.from_iterable(place.rows for place in places)
    return np.concatenate([np.empty((0, plan.n_features)), *found])


@dataclass(slots=True)
class _Place:
    """Rows from `first` up to `stop`, of which `room` good ones are wanted: `rows` so far.

    Those before `at` have been looked at.
    """

    first: int
    stop: int
    room: int
    at: int
    rows: list[Floats] = field(default_factory=list)

    @property
    def lacks(self) -> int:
        return self.room - sum(map(len, self.rows))


def _places(n_rows: int, max_rows: int) -> list[_Place]:
    if n_rows <= max_rows:
        return [_Place(0, n_rows, max_rows, 0)]
    n = min(_PLACES, max_rows)
    firsts = np.linspace(0, n_rows - max_rows // n, n).round().astype(int).tolist()
    edges = itertools.pairwise([*firsts, n_rows])
    return [_Place(first, stop, max_rows // n, first) for first, stop in edges]


def _row_groups(plan: Plan) -> list[tuple[int, RowRange]]:
    """Return the plan's row groups in order, each with the number of its first row."""
    merged: list[RowRange] = []
    for part in itertools.chain.from_iterable(plan.shards):
        last = merged[-1] if merged else None
        if last is not None and (last.file, last.row_group) == (part.file, part.row_group):
            part = RowRange(
                file=part.file, row_group=part.row_group, start=last.start, stop=part.stop
            )
            merged.pop()
        merged.append(part)
    firsts = itertools.accumulate((part.stop - part.start for part in merged), initial=0)
    return list(zip(firsts, merged, strict=False))


def _look(
    plan: Plan,
    first: int,
    group: RowRange,
    looks: Sequence[tuple[int, int, int]],
    places: Sequence[_Place],
) -> None:
    """Add the good rows of a row group, whose first row has the number `first`, to their places.

    `looks` has places and the numbers of the rows that they look at.
    """
    stop = first + group.stop
    wanted = [
        (i, max(a, first) - first, min(b, stop) - first)
        for i, a, b in looks
        if a < stop and b > first and places[i].lacks > 0
    ]
    if not wanted:
        return
    name = name_of(plan.url, plan.files[group.file])
    for i, rows in storage.patiently(lambda: list(_good_rows(plan, group, wanted)), name):
        places[i].rows.append(rows[: max(places[i].lacks, 0)])


def _good_rows(
    plan: Plan, group: RowRange, wanted: Sequence[tuple[int, int, int]]
) -> Iterator[tuple[int, Floats]]:
    """Yield the complete, finite rows that pass the filter, less those of weight 0.

    `wanted` has numbers of places, and ranges of the row group's live rows, in order.
    """
    file, last = plan.files[group.file], wanted[-1][2]
    live = file.live(group.row_group)
    fs, root = storage.open_url(plan.url)
    with opened(fs, root, plan.url, file) as source:
        name = name_of(plan.url, file)
        reader = LakeFileReader(source, plan.table_columns, name, pre_buffer=True)
        row = number = 0  # of the batch's first row: among all rows, and among those that live
        for batch in reader.iter_batches(_BATCH_ROWS, group.row_group, plan.read_columns):
            mask = None if live is None else live[row : row + batch.num_rows]
            row += batch.num_rows
            table = those(batch, mask)
            for i, start, stop in wanted:
                start, stop = max(start - number, 0), min(stop - number, table.num_rows)
                if start < stop:
                    yield i, _good(plan, group.file, table.slice(start, stop - start))
            number += table.num_rows
            if number >= last:
                return


def _good(plan: Plan, file: int, table: pa.Table) -> Floats:
    table, _ = filtered(plan, file, table)
    if plan.weight_column is not None:
        table = table.filter(pc.not_equal(table.column(plan.weight_column), 0))
    X = features(plan, table).T
    return X[np.isfinite(X).all(axis=1)].astype(np.float64)

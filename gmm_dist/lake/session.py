"""Hold a lake's rows in workers: how much memory that takes, and the loading."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from gmm_dist import storage
from gmm_dist.errors import Option, RunFailed, TooFewRows, UserError, Words
from gmm_dist.formats import counted, gigabytes
from gmm_dist.lake.load import Counted, LakeLoader, column_means, count_rows
from gmm_dist.lake.plan import Plan
from gmm_dist.shards.ray_shards import RayShards
from gmm_dist.shards.spill import Spill

logger = logging.getLogger(__name__)

_LOADING_BYTES = 24  # of a value, while its shard is made: read, centred in float64, cast, joined
_READ_AHEAD = 2  # shards in memory, of those that are spilled: one computed on, the next one read

Loaded = Callable[[int, int], None]
"""Called with the numbers of shards and of rows that have been loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsNeed:
    """The memory that the rows of a plan need.

    `itemsize`: bytes of a resident value; `row_bytes`: of a row's further values, its weight;
    `decoded`: of the largest row group, decoded; `is_bound`: a filter may leave fewer rows.
    """

    n_rows: int
    n_features: int
    n_shards: int
    itemsize: int
    row_bytes: int = 0
    decoded: int = 0
    is_bound: bool = False

    @property
    def shard(self) -> int:
        """Return the bytes of a resident shard; they are of equal size, give or take a row."""
        return self._shard_rows * (self.n_features * self.itemsize + self.row_bytes)

    @property
    def loading(self) -> int:
        """Return the bytes that are needed for a while to make a shard."""
        return self.decoded + self._shard_rows * self.n_features * _LOADING_BYTES

    def in_worker(self, n_workers: int) -> int:
        """Return the bytes of the rows of one of so many workers."""
        return math.ceil(self.n_shards / n_workers) * self.shard

    @property
    def _shard_rows(self) -> int:
        return math.ceil(self.n_rows / self.n_shards)


def require_room(need: RowsNeed, n_workers: int, available: int, *, beside: int) -> None:
    """Raise UserError when the rows do not fit into the `available` bytes of `n_workers` each.

    `beside` are the bytes that a worker needs next to its rows, once they are loaded, or while
    they are. Where a filter may leave fewer rows, this only warns: loading will tell.
    """
    resident = need.in_worker(n_workers)
    if resident + beside <= available:
        return
    message = (
        f"{need.n_rows:,} rows of {need.n_features:,} features need {gigabytes(resident)} in "
        f"each of {n_workers} workers, and {gigabytes(beside)} beside them, but a worker has "
        f"{gigabytes(available)}: use "
        + _more_workers(need, available - beside)
        + ("fewer " + Option("columns") + " or a narrower " + Option("where"))
    )
    if not need.is_bound:
        raise UserError(message)
    logger.warning("unless the filter leaves fewer rows, they will not fit: %s", message)


def _more_workers(need: RowsNeed, room: int) -> Words:
    shards = room // need.shard
    if shards < 1:
        return ""
    n_workers = math.ceil(need.n_shards / shards)
    return Option("num_workers", n_workers) + " on machines with as much memory for each, "


def make_room(
    shards: RayShards, loader: LakeLoader, spill: bool | str, *, available: int, reserve: int
) -> None:
    """See to it that rows and `reserve` bytes fit into a worker's `available` bytes.

    Rows beyond them are to be spilled, unless `spill` is False: to the folder that it names, or
    where it is True to each worker's temporary one. Raises UserError where rows do not fit so.
    """
    need = _rows_need(loader.plan, loader)
    # Loading is over when the statistics come.
    beside = reserve if shards.on_gpu else max(reserve, need.loading)
    resident = need.in_worker(shards.n_workers)
    in_memory = available - beside - _READ_AHEAD * need.shard
    if spill is False or in_memory < 0 or resident + beside <= available:
        require_room(need, shards.n_workers, available, beside=beside)
        return
    rest = resident - in_memory
    shards.spill(
        Spill(
            folder=spill if isinstance(spill, str) else None,
            memory=in_memory,
            on_disk=0 if need.is_bound else rest * shards.workers_per_machine,
        )
    )
    logger.info(
        "%s rows of %s features need %s in each of %s, which has %s: %s of them lie in %s",
        *(f"{need.n_rows:,}", f"{need.n_features:,}", gigabytes(resident)),
        counted(shards.n_workers, "worker"),
        *(gigabytes(available), gigabytes(rest)),
        f"files in {spill}" if isinstance(spill, str) else "files in its temporary folder",
    )


def load_rows(
    shards: RayShards, loader: LakeLoader, watch: Loaded = lambda done, rows: None
) -> Counted:
    """Have the workers load their rows; where values are missing, after a pass for the means.

    Raises TooFewRows when none is left.
    """
    plan = loader.plan
    n_rows = shards.load(watch)
    if n_rows == 0:
        filters = f" after the filter {plan.where.shown}" if plan.where else ""
        smaller = ", or give a smaller " + Option("holdout") if plan.holdout else ""
        weighing = f", and weights {plan.weight_column!r} above 0" if plan.weight_column else ""
        raise TooFewRows(
            f"{plan.url}: no rows are left of {plan.n_rows:,}{filters}",
            remedy="loosen "
            + Option("where")
            + " or choose another "
            + Option("missing")
            + smaller
            + weighing,
        )
    if plan.missing == "mean":
        fill = column_means(shards, loader)
        shards.replace(LakeLoader(plan=plan, centre=loader.centre, dtype=loader.dtype, fill=fill))
        shards.load(watch)
    counted = shards.run(count_rows)
    if counted.counts.read != plan.n_rows:
        raise RunFailed(
            f"{counted.counts.read:,} rows were read of the {plan.n_rows:,} that were planned",
            where=storage.redacted(plan.url),
            remedy="run again",
        )
    if counted.counts.dropped:
        dropped = f"{counted.counts.dropped:,}"
        logger.info("%s left out %s rows", Option("missing", "drop"), dropped)
    return counted


def _rows_need(plan: Plan, loader: LakeLoader) -> RowsNeed:
    source = 8 if plan.float64_source else 4
    n_values = plan.n_features + len(plan.read_columns) - len(plan.columns)
    largest = max(plan.files[p.file].rows[p.row_group] for shard in plan.shards for p in shard)
    return RowsNeed(
        n_rows=plan.n_rows,
        n_features=plan.n_features,
        n_shards=plan.n_shards,
        itemsize=loader.dtype.itemsize,
        row_bytes=8 if plan.weight_column else 0,
        decoded=largest * n_values * source,
        is_bound=plan.row_filter is not None or plan.missing == "drop",
    )

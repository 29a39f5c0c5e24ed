"""What rows and the lanes of a sweep need of memory, known before anything is allocated."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from gmm_dist.errors import UserError
from gmm_dist.model.covariance import FAMILIES
from gmm_dist.model.parameters import COVARIANCE_TYPES

logger = logging.getLogger(__name__)

# Parameters, their padded copy, sums in the working precision and in float64, the summary that
# is sent and the partial sums that it meets on the way: so many float64 copies at once.
_COPIES = 8
_LEAST_CHUNK_ROWS = 256
_LOADING_BYTES = 24  # of a value, while its shard is made: read, centred in float64, cast, joined


def lane_bytes(lanes: Sequence[tuple[int, str]], n_features: int) -> int:
    """Return the bytes that a worker needs for lanes (k, covariance type), beside its rows."""
    widths = {kind: _width(kind, n_features) for _, kind in lanes}
    statistics = sum(k * widths[kind] for k, kind in lanes)
    chunk = _LEAST_CHUNK_ROWS * (max(widths.values()) + 2 * sum(k for k, _ in lanes))
    return 8 * (_COPIES * statistics + chunk)


def require_memory(lanes: Sequence[tuple[int, str]], n_features: int, available: int) -> None:
    """Raise UserError when the lanes need more than the `available` bytes of a worker."""
    needed = lane_bytes(lanes, n_features)
    if needed <= available:
        return
    cheaper = {kind: lane_bytes([(k, kind) for k, _ in lanes], n_features) for kind in _by_width()}
    fitting = [kind for kind, size in cheaper.items() if size <= available]
    families = f"--covariance-type {fitting[-1]}, " if fitting else ""
    raise UserError(
        f"the statistics of {sum(k for k, _ in lanes):,} components with {n_features:,} features "
        f"need {_gigabytes(needed)} in every worker, which has at most {_gigabytes(available)}: "
        f"use {families}smaller --k, fewer --columns, or fewer workers per machine"
    )


@dataclass(frozen=True, slots=True)
class RowsNeed:
    """What rows need of memory, by numbers that a plan knows.

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

    @property
    def _shard_rows(self) -> int:
        return math.ceil(self.n_rows / self.n_shards)


def require_room(need: RowsNeed, n_workers: int, available: int, *, beside: int) -> None:
    """Raise UserError when the rows do not fit into the `available` bytes of `n_workers` each.

    `beside` are the bytes that a worker needs next to its rows, once they are loaded, or while
    they are. Where a filter may leave fewer rows, this only warns: loading will tell.
    """
    resident = math.ceil(need.n_shards / n_workers) * need.shard
    if resident + beside <= available:
        return
    message = (
        f"{need.n_rows:,} rows of {need.n_features:,} features need {_gigabytes(resident)} in "
        f"each of {n_workers} workers, and {_gigabytes(beside)} beside them, but a worker has "
        f"{_gigabytes(available)}: use {_more_workers(need, available - beside)}fewer --columns "
        "or a narrower --where"
    )
    if not need.is_bound:
        raise UserError(message)
    logger.warning("unless the filter leaves fewer rows, they will not fit: %s", message)


def _more_workers(need: RowsNeed, room: int) -> str:
    shards = room // need.shard
    if shards < 1:
        return ""
    n_workers = math.ceil(need.n_shards / shards)
    return f"--num-workers {n_workers} on machines with as much memory for each, "


def _by_width() -> list[str]:
    return sorted(COVARIANCE_TYPES, key=lambda kind: _width(kind, 100))


def _width(kind: str, n_features: int) -> int:
    rows = FAMILIES[kind].rows(n_features)
    width: int = rows.stop - rows.start
    return width


def _gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:,.1f} GiB"

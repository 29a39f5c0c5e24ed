"""Deal rows to shards as ranges of row groups; the rows alone decide how many shards there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gmm_dist.errors import UserError

_MIN_ROWS_PER_SHARD = 16_384

_MAX_ROWS_PER_SHARD = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRange:
    """Name rows [start, stop) of one row group; `file` is an index into `Plan.files`."""

    file: int
    row_group: int
    start: int
    stop: int


def deal(groups: Sequence[RowRange], n_shards: int | None) -> tuple[tuple[RowRange, ...], ...]:
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

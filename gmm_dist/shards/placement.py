"""Which worker owns which shards: its home range, and shards that were moved to it."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence


def ranges(n_shards: int, n_workers: int) -> list[range]:
    """Deal shards to workers as contiguous ranges of like length."""
    edges = [n_shards * i // n_workers for i in range(n_workers + 1)]
    return [range(a, b) for a, b in itertools.pairwise(edges)]


class Placement:
    """Every shard has a home, and exactly one owner: its home unless it was moved."""

    def __init__(self, homes: Sequence[range]) -> None:
        self._homes = homes
        self._moved: dict[int, int] = {}
        self._owned = [set(home) for home in homes]

    def owned(self, worker: int) -> set[int]:
        return self._owned[worker]

    def away(self, worker: int) -> list[int]:
        """Return the worker's home shards that others own now."""
        return [shard for shard in self._homes[worker] if shard in self._moved]

    def owner(self, shard: int) -> int:
        """Return the owner of a shard that was moved."""
        return self._moved[shard]

    def move(self, shards: Collection[int], worker: int) -> None:
        """Let a worker own these shards."""
        for owned in self._owned:
            owned.difference_update(shards)
        self._owned[worker].update(shards)
        for shard in shards:
            if shard in self._homes[worker]:
                self._moved.pop(shard, None)
            else:
                self._moved[shard] = worker


def shares(
    shards: Collection[int], room: Mapping[int, float], sizes: Mapping[int, int]
) -> dict[int, list[int]] | None:
    """Deal shards to takers as contiguous ranges, or return None where there is no room.

    `room` has the free bytes of each taker, `sizes` the bytes of those shards whose size is
    known; takers without room for an equal range are left out.
    """
    typical = sum(sizes.values()) / len(sizes) if sizes else 0.0
    ordered, takers = sorted(shards), sorted(room)
    while takers:
        dealt = {
            taker: [ordered[i] for i in part]
            for taker, part in zip(takers, ranges(len(ordered), len(takers)), strict=True)
        }
        fitting = [
            taker
            for taker, portion in dealt.items()
            if sum(sizes.get(shard, typical) for shard in portion) <= room[taker]
        ]
        if len(fitting) == len(takers):
            return {taker: portion for taker, portion in dealt.items() if portion}
        takers = fitting
    return None

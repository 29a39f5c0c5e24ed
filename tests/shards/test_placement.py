"""Who owns which shard: always exactly one, wherever they are moved."""

from __future__ import annotations

import random

from gmm_dist.shards.placement import Placement, ranges, shares


def test_ranges_are_contiguous_and_of_like_length() -> None:
    assert ranges(7, 3) == [range(2), range(2, 4), range(4, 7)]


def test_every_shard_has_one_owner_whatever_is_moved() -> None:
    rng = random.Random(0)
    homes = ranges(20, 4)
    placement = Placement(homes)
    for _ in range(200):
        shards, taker = rng.sample(range(20), rng.randrange(8)), rng.randrange(4)
        placement.move(shards, taker)
        assert placement.owned(taker) >= set(shards)
        owned = [shard for worker in range(4) for shard in placement.owned(worker)]
        assert sorted(owned) == list(range(20))
        for worker, home in enumerate(homes):
            away = set(home) - placement.owned(worker)
            assert placement.away(worker) == sorted(away)
            assert all(shard in placement.owned(placement.owner(shard)) for shard in away)


def test_shares_are_contiguous_and_go_to_all_takers() -> None:
    room = {5: 100.0, 1: 100.0}
    assert shares({9, 2, 3, 8}, room, {}) == {1: [2, 3], 5: [8, 9]}
    assert shares({4}, room, {}) in ({1: [4]}, {5: [4]})


def test_who_has_no_room_is_left_out() -> None:
    sizes = dict.fromkeys(range(4), 10)
    assert shares(range(4), {0: 19.0, 1: 40.0}, sizes) == {1: [0, 1, 2, 3]}
    assert shares(range(4), {0: 19.0, 1: 39.0}, sizes) is None
    assert shares(range(4), {}, sizes) is None


def test_unknown_sizes_are_taken_for_typical_ones() -> None:
    assert shares([1, 2], {0: 25.0}, {7: 10, 8: 14}) == {0: [1, 2]}
    assert shares([1, 2], {0: 23.0}, {7: 10, 8: 14}) is None

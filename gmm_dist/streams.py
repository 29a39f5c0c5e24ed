"""Random numbers: each use of them is a stream of its own, keyed by the seed and by whole numbers.

A stream's name stands in exactly one place, so no two uses draw the same numbers. Within a stream
the keys say which shard or round draws. Candidates of a search share their numbers: they differ by
what they are, not by luck, and a k ends alike in any grid.
"""

from __future__ import annotations

import enum

import torch
from numpy.random import SeedSequence


@enum.unique
class Stream(enum.Enum):
    """What random numbers are drawn for; a number, once given, stays."""

    PROFILE = 0  # rows by which spikes and rounded columns are seen
    POOL = 1  # the larger sample of a search
    SAMPLE = 2  # the smaller one
    FIRST_CENTRE = 3  # of k-means||
    MORE_CENTRES = 4
    STARTS = 5
    TRAIL_STARTS = 6
    TRAIL_SPLITS = 7
    MOVES = 8  # on the smaller sample
    LATE_MOVES = 9  # on the larger one
    REPAIRS = 10
    PICTURE_ROWS = 11  # of the report
    PICTURE = 12  # those of them that are drawn
    NIGHT = 13  # rows by which columns are compared with last night's
    RESAMPLES = 14  # how often the bootstrap draws each row
    STABILITY_ROWS = 15  # the sample on which clusters are looked for again
    FROM_FIT = 16  # how often it draws each row of that sample: for fits that start from the fit
    AFRESH = 17  # and for those that are searched for afresh


def keyed_generator(stream: Stream, random_state: int, *key: int) -> torch.Generator:
    """Return a stream's generator for a key, the same everywhere.

    Keys that differ give unrelated numbers, but for one in 2^32: torch seeds with so many bits.
    """
    sequence = SeedSequence(random_state, spawn_key=(stream.value, *key))
    return torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))


def keyed_seed(stream: Stream, random_state: int, *key: int) -> int:
    """Return a stream's seed for a key, for what is hashed and not generated: 64 bits."""
    sequence = SeedSequence(random_state, spawn_key=(stream.value, *key))
    low, high = (int(word) for word in sequence.generate_state(2))
    return high << 32 | low

"""How many rows are worked on at once, and where they are cut: one rule for all that sees rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from gmm_dist.devices import total_memory

SHORTEST = 256
"""Rows of a chunk, at least, however much memory each takes."""

STAGGER = 80
"""Numbers between a chunk's lines: a power of two apart, they would share places in a cache."""

_ALIGNED = 16  # chunks are cut at multiples of this many rows: a cache line of float32


@dataclass(frozen=True, slots=True)
class _Limits:
    """Of a chunk: numbers at the most, unless that is too few rows; rows at least and at most."""

    numbers: int
    least: int
    most: int


_ONE_THREAD = _Limits(1 << 20, SHORTEST, 2048)  # a few MB, so that they stay in its cache
_THREADS = _Limits(1 << 22, SHORTEST, 1 << 17)  # what they share must outweigh handing it out
_CUDA = _Limits(1 << 28, 2048, 1 << 17)  # 2 GiB; smaller cards take less


def chunk_rows(width: int, device: torch.device) -> int:
    """Return how many rows are worked on at once, where each needs `width` numbers of memory.

    The same for the same width on all CPUs, for passes: they use one thread of torch; and on all
    GPUs of a kind, whatever else lies on them.
    """
    if device.type == "cuda":
        limits = replace(_CUDA, numbers=min(_CUDA.numbers, _most_numbers(device)))
    else:
        limits = _ONE_THREAD if torch.get_num_threads() == 1 else _THREADS
    return max(limits.least, min(limits.numbers // width, limits.most))


def _most_numbers(device: torch.device) -> int:
    """Return how many float64 numbers are a sixteenth of a GPU, or half of that."""
    return 1 << ((total_memory(device) // (16 * 8)).bit_length() - 1)


def most_bytes_on_gpu(width: int) -> int:
    """Return the bytes that a chunk takes on any GPU, at the most, `width` numbers for each row."""
    return 8 * max(_CUDA.numbers, _CUDA.least * width)


def cuts(n_rows: int, most: int) -> Iterator[slice]:
    """Cut rows into chunks of at most `most` rows (a multiple of 16), as equal as can be."""
    lines = -(-n_rows // _ALIGNED)
    n_chunks = -(-lines // (most // _ALIGNED))
    edges = [min(lines * i // max(n_chunks, 1) * _ALIGNED, n_rows) for i in range(n_chunks + 1)]
    return itertools.starmap(slice, itertools.pairwise(edges))

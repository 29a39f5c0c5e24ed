"""Rows beyond memory: shards in files on a worker's disk, read ahead while it computes.

A spilled shard is the very bytes that would lie in memory, so a pass over it has the same bits. Its
file has no name: it is gone once the process is, however that ends.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import socket
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from gmm_dist.errors import Option, UserError
from gmm_dist.formats import gigabytes
from gmm_dist.shards.protocol import Block, ShardRows

_ALIGNED = mmap.PAGESIZE  # of a tensor in a file, and of the buffers
_MOST_AT_ONCE = 1 << 30  # bytes of one read or write: Linux takes fewer than 2 GiB
_IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spill:
    """Where a worker keeps the rows that its memory does not hold.

    `folder` on the worker's disk, None for its temporary folder; `memory`: bytes of rows that stay
    in memory; `on_disk`: bytes that the workers of one machine will write, as far as is known.
    """

    folder: str | None
    memory: int
    on_disk: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """A tensor in a file: where it begins, and what it is."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Kept:
    """A block in a file."""

    X: _Piece
    sample_weight: _Piece | None


class SpilledShard:
    """The rows of one shard in a file."""

    def __init__(self, rows: ShardRows, file: IO[bytes]) -> None:
        """Write the rows to an empty file."""
        self.shard, self.n_rows, self._counts = rows.shard, rows.n_rows, rows.counts
        self._file, self.n_bytes = file, 0
        weakref.finalize(self, file.close)  # with it goes the room on the disk
        self._blocks = [self._keep(block) for block in rows.blocks]
        self._held_out = [self._keep(block) for block in rows.held_out]

    def read(self, buffer: Tensor) -> ShardRows:
        """Return the rows, which lie in a buffer of `n_bytes` bytes or more."""
        for start in range(0, self.n_bytes, _MOST_AT_ONCE):
            part = buffer[start : min(start + _MOST_AT_ONCE, self.n_bytes)].numpy()
            _all(part, start, lambda view, at: os.preadv(self._file.fileno(), [view], at))
        return ShardRows(
            shard=self.shard,
            blocks=[_block(kept, buffer) for kept in self._blocks],
            counts=self._counts,
            held_out=[_block(kept, buffer) for kept in self._held_out],
        )

    def _keep(self, block: Block) -> _Kept:
        weight = block.sample_weight
        return _Kept(self._write(block.X), None if weight is None else self._write(weight))

    def _write(self, values: Tensor) -> _Piece:
        start = self.n_bytes
        data = values.contiguous().numpy().reshape(-1).view(np.uint8)
        for first in range(0, len(data), _MOST_AT_ONCE):
            part = data[first : first + _MOST_AT_ONCE]
            _all(part, start + first, lambda view, at: os.pwrite(self._file.fileno(), view, at))
        self.n_bytes = -(-(start + len(data)) // _ALIGNED) * _ALIGNED
        os.ftruncate(self._file.fileno(), self.n_bytes)
        return _Piece(start, tuple(values.shape), values.dtype)


def _all(data: Any, start: int, move: Any) -> None:
    """Read or write all bytes, however few are taken at a time."""
    view, done = memoryview(data), 0
    while done < len(view):
        taken = move(view[done:], start + done)
        if taken == 0:
            raise OSError(errno.EIO, "a file of spilled rows is shorter than what was written")
        done += taken


def _block(kept: _Kept, buffer: Tensor) -> Block:
    weight = kept.sample_weight
    return Block(_view(kept.X, buffer), None if weight is None else _view(weight, buffer))


def _view(piece: _Piece, buffer: Tensor) -> Tensor:
    size = piece.dtype.itemsize * int(np.prod(piece.shape))
    return buffer[piece.start : piece.start + size].view(piece.dtype).view(piece.shape)


Held = ShardRows | SpilledShard
"""A shard as a worker holds it."""


class Store:
    """Holds shards in memory and, beyond it, in files; passes see them one after another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._folder: str | None = None  # that has been looked at
        self._buffers: list[Tensor] = []

    def hold(self, rows: ShardRows, spill: Spill | None, others: Iterable[Held]) -> Held:
        """Return rows as they are held, beside `others`.

        Raises UserError where the disk has no room for them.
        """
        if spill is None:
            return rows.to(self._device)
        in_memory = sum(size_of(held) for held in others if isinstance(held, ShardRows))
        if in_memory + size_of(rows) <= spill.memory:
            return rows.to(self._device)
        folder = spill.folder or tempfile.gettempdir()
        try:
            if self._folder != folder:
                _require_disk(folder, spill.on_disk)
                self._folder = folder
            return SpilledShard(rows, tempfile.TemporaryFile(dir=folder, buffering=0))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _full(folder, size_of(rows)) from error
            raise UserError(
                f"rows cannot be spilled there: {error.strerror}",
                where=_place(folder),
                remedy="give a folder on a disk of every worker as " + Option("spill"),
            ) from error

    def each(self, held: Iterable[Held]) -> Iterator[ShardRows]:
        """Yield the rows of shards in their order; those of a file only until the next are asked.

        While a shard is computed on, the next one is read.
        """
        shards = list(held)
        spilled = [shard for shard in shards if isinstance(shard, SpilledShard)]
        if not spilled:
            yield from (shard for shard in shards if isinstance(shard, ShardRows))
            return
        self._make_buffers(spilled)
        with ThreadPoolExecutor(1) as reader:
            left = iter(enumerate(spilled))
            ahead = self._begin(reader, left)
            for shard in shards:
                if isinstance(shard, ShardRows):
                    yield shard
                    continue
                assert ahead is not None
                rows = ahead.result()
                ahead = self._begin(reader, left)
                yield rows

    def _begin(
        self, reader: ThreadPoolExecutor, left: Iterator[tuple[int, SpilledShard]]
    ) -> Future[ShardRows] | None:
        """Begin to read the next shard, into the buffer that is not computed on."""
        following = next(left, None)
        if following is None:
            return None
        i, shard = following
        return reader.submit(lambda: shard.read(self._buffers[i % 2]).to(self._device))

    def _make_buffers(self, spilled: Sequence[SpilledShard]) -> None:
        size = max(1, *(shard.n_bytes for shard in spilled))
        if not self._buffers or len(self._buffers[0]) < size:
            self._buffers = []
            # Anonymous maps begin at a page, as tensors of that size do.
            self._buffers = [
                torch.from_numpy(np.frombuffer(mmap.mmap(-1, size), np.uint8)) for _ in range(2)
            ]


def size_of(rows: Held) -> int:
    """Return the bytes of a shard's rows."""
    if isinstance(rows, SpilledShard):
        return rows.n_bytes
    blocks = [*rows.blocks, *rows.held_out]
    weights = sum(b.sample_weight.nbytes for b in blocks if b.sample_weight is not None)
    return weights + sum(block.X.nbytes for block in blocks)


def _require_disk(folder: str, needed: int) -> None:
    if _file_system(folder) in _IN_MEMORY:
        raise UserError(
            "is no disk but memory: rows cannot be spilled there",
            where=_place(folder),
            remedy="give a folder on a disk of every worker as " + Option("spill"),
        )
    if shutil.disk_usage(folder).free < needed:
        raise _full(folder, needed)


def _full(folder: str, needed: int) -> UserError:
    free = shutil.disk_usage(folder).free
    return UserError(
        f"has {gigabytes(free)} free for spilled rows, which need {gigabytes(needed)}",
        where=_place(folder),
        remedy="give a folder on a larger disk as "
        + Option("spill")
        + ", or use more workers on more machines",
    )


def _place(folder: str) -> str:
    return f"{socket.gethostname()}:{folder}"


def _file_system(folder: str) -> str:
    """Return the type of the file system that holds a folder; "" where that is not known."""
    path, best, kind = os.path.realpath(folder), "", ""
    try:
        with Path("/proc/self/mounts").open(encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                _, point, type_, *_ = line.split(" ")
                point = point.replace("\\040", " ")
                inside = path == point or path.startswith(point.rstrip("/") + "/")
                if inside and len(point) >= len(best):
                    best, kind = point, type_
    except OSError:
        return ""
    return kind

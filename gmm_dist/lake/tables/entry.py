"""What a table's log says of one data file: where it lies, its rows, and which of them are deleted.

A deletion vector deletes rows of a file that stays as it is. A row has two numbers: the one in its
row group, and the one among the row group's live rows, by which rows are dealt and read.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Deleted:
    """Mark the deleted ones among the first `n_rows` rows of a file; all after them are live.

    `packed` has a bit for each row, compressed: plans travel to all workers.
    """

    n_rows: int
    packed: bytes

    @classmethod
    def of(cls, kept: Mask) -> Self | None:
        """Return what the mask of the rows to keep (n,) deletes; None for nothing."""
        if kept.all():
            return None
        return cls(len(kept), zlib.compress(np.packbits(~kept).tobytes(), 1))

    @property
    def mask(self) -> Mask:
        """Say of each of the first rows (n,) whether it is deleted."""
        packed = np.frombuffer(zlib.decompress(self.packed), dtype=np.uint8)
        return np.unpackbits(packed, count=self.n_rows).astype(np.bool_)

    def live(self, first: int, stop: int) -> Mask:
        """Say of the rows from `first` up to `stop` of the file whether they are live."""
        live = np.ones(stop - first, dtype=np.bool_)
        deleted = self.mask[first:stop]
        live[: len(deleted)] = ~deleted
        return live


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Hold what a table's log says of a data file.

    `is_outside`: the file's path is a URL or absolute path of its own, not below the table's root,
    as in a shallow clone. `n_rows` counts its rows, deleted ones too; None where the log does not.
    `told` are columns that the file may lack, as the table has their values elsewhere.
    """

    is_outside: bool = False
    n_rows: int | None = None
    deleted: Deleted | None = None
    told: tuple[str, ...] = ()


def hash_of_deleted(files: Iterable[tuple[str, Entry | None]]) -> str | None:
    """Return the sha256 of which rows of files, by their paths, are deleted; None where none is."""
    digest, is_any = hashlib.sha256(), False
    for path, entry in files:
        if entry is None or entry.deleted is None:
            continue
        rows = np.flatnonzero(entry.deleted.mask).astype("<u8")
        digest.update(json.dumps([path, len(rows)]).encode())
        digest.update(rows.tobytes())
        is_any = True
    return digest.hexdigest() if is_any else None

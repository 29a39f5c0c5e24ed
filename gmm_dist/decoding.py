"""How Parquet is decoded, everywhere alike: checksums are verified, old timestamps do not wrap.

And how a footer is looked into: Arrow ends the process where a damaged one is asked from Python.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

import pyarrow.parquet as pq

from gmm_dist.errors import UserError

# INT96, the timestamps of Hive, Impala and older Spark, counts nanoseconds over a range that 64
# bits cannot hold: Arrow's default wraps 9999-12-31 to 1816. Microseconds hold all of it.
_INT96_UNIT = "us"


def parquet_file(source: Any, **options: Any) -> pq.ParquetFile:
    """Open a Parquet file; a page whose checksum is wrong raises OSError."""
    return pq.ParquetFile(
        source,
        coerce_int96_timestamp_unit=_INT96_UNIT,
        page_checksum_verification=True,
        **options,
    )


def stored_in(metadata: pq.FileMetaData, names: Collection[str]) -> dict[str, list[int]]:
    """Return the numbers of the Parquet columns that hold each column of these names.

    A name may have dots, and nested columns add more.
    """
    found: dict[str, list[int]] = {name: [] for name in names}
    for i in range(metadata.num_columns):
        for name in itertools.accumulate(metadata.schema.column(i).path.split("."), "{}.{}".format):
            if name in found:
                found[name].append(i)
    return found


def require_sound(metadata: pq.FileMetaData, size: int, leaves: Sequence[int]) -> None:
    """Raise OSError where what a footer says of chunks of these Parquet columns makes no sense.

    So it is where they are encrypted. Arrow looks at all of it before it reads, and then raises;
    hence it begins to read from a file of `size` bytes that yields nothing.
    """
    parquet = pq.ParquetFile(_Unreadable(size), metadata=metadata, pre_buffer=True)
    batches = parquet.iter_batches(
        row_groups=range(metadata.num_row_groups),
        columns=[metadata.schema.column(i).path for i in leaves],
        use_threads=False,
    )
    with suppress(_NothingRead):
        next(batches, None)


class _NothingRead(Exception):  # noqa: N818 - no error: all that was to be looked at is well
    pass


class _Unreadable(io.RawIOBase):
    """A file that has a size and nothing else."""

    def __init__(self, size: int) -> None:
        self._size, self._at = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = start + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        raise _NothingRead


def statistics(chunk: pq.ColumnChunkMetaData, physical_type: str) -> pq.Statistics | None:
    """Return what a footer tells of the values of a column chunk, None where it does not.

    `physical_type` is the column's, by the schema in the same footer. Raises OSError where they
    contradict each other.
    """
    if chunk.physical_type != physical_type:
        raise OSError(
            f"the footer says both {physical_type} and {chunk.physical_type} of column "
            f"{chunk.path_in_schema!r}"
        )
    return chunk.statistics


def wrong_rows(name: str, row_group: int, found: int, promised: int) -> UserError:
    """Return the error that a row group of the file `name` has other rows than promised."""
    return UserError(
        f"{name}, row group {row_group}: {found:,} rows where the footer has {promised:,}; "
        "write the file again or move it away"
    )

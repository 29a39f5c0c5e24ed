"""How Parquet is decoded, everywhere alike: checksums are verified, old timestamps do not wrap."""

from __future__ import annotations

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


def wrong_rows(name: str, row_group: int, n_rows: int, promised: int) -> UserError:
    """Return the error that a row group of the file `name` has other rows than promised."""
    return UserError(
        f"{name}, row group {row_group}: {n_rows:,} rows where the footer has {promised:,}; "
        "write the file again or move it away"
    )

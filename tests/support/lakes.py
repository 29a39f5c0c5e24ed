"""Write small Parquet lakes, read them whole, and damage them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from gmm_dist.lake import read
from gmm_dist.lake.plan import Plan
from gmm_dist.lake.read import RowCounts

Floats = npt.NDArray[np.float64]


def numbers(n: int, seed: int = 0) -> Floats:
    """Return n numbers, the same for the same seed."""
    return np.random.default_rng(seed).normal(size=n)


def write(
    path: Path, columns: Mapping[str, Any] | pa.Table, *, rows_per_group: int | None = None
) -> Path:
    """Write one Parquet file, and the folders above it."""
    table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows_per_group)
    return path


def numbered(folder: Path) -> Path:
    """Write two files under hive keys, row groups of 7 rows; column `i` numbers the rows."""
    for day, first in (("2026-11-01", 0), ("2026-11-02", 25)):
        i = np.arange(first, first + 25)
        columns = {"x": i * 1.5, "y": (i * 2).astype(np.float32), "i": i}
        write(folder / f"dt={day}" / "a.parquet", columns, rows_per_group=7)
    return folder


def read_all(plan: Plan, **options: Any) -> tuple[Floats, Floats | None, RowCounts]:
    """Return all rows in plan order, their weights and the counts."""
    shards = range(plan.n_shards)
    parts = [part for shard in shards for part in read.read(plan, shard, **options)]
    X = np.concatenate([np.empty((0, plan.n_features)), *(part.X for part in parts)])
    weights = [part.sample_weight for part in parts if part.sample_weight is not None]
    weight = np.concatenate(weights) if weights else None
    return X, weight, sum((part.counts for part in parts), RowCounts())


def held_out(plan: Plan, column: int = 0) -> set[float]:
    """Return the values of one feature in the held-out rows."""
    parts = [part for shard in range(plan.n_shards) for part in read.read(plan, shard)]
    assert all(part.held_out is not None for part in parts)
    return {float(x) for part in parts for x in part.X[part.held_out, column]}


def embeddings(rows: npt.ArrayLike, *, type_: pa.DataType | None = None) -> pa.Array:
    """Return rows (n, d) as a fixed-size-list column."""
    X = np.asarray(rows)
    values = pa.array(X.ravel(), type=type_)
    return pa.FixedSizeListArray.from_arrays(values, X.shape[1])


def upload(folder: Path, fs: fsspec.AbstractFileSystem, url: str) -> str:
    """Copy a local folder to `url`, file by file, and return `url`."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            target = f"{url}/{path.relative_to(folder).as_posix()}"
            fs.pipe_file(fs._strip_protocol(target), path.read_bytes())
    return url


def put_marker(fs: fsspec.AbstractFileSystem, url: str) -> None:
    """Put a zero-byte object `url/`, as consoles, Spark and EMR do for a folder."""
    bucket, _, key = fs._strip_protocol(url).partition("/")
    fs.call_s3("put_object", Bucket=bucket, Key=f"{key}/", Body=b"")


def truncate(path: Path, size: int) -> None:
    """Keep the first `size` bytes of a file."""
    path.write_bytes(path.read_bytes()[:size])


def corrupt(path: Path, *, start: int, length: int) -> None:
    """Overwrite bytes in the middle of a file; its size stays."""
    data = bytearray(path.read_bytes())
    data[start : start + length] = b"\xff" * length
    path.write_bytes(data)


def partitioned() -> pa.Table:
    """Return a row for each kind of partition value, and for null."""
    when = dt.datetime(2026, 11, 1, 12, 30, 0, 5)
    return pa.table(
        {
            "x": [1.0, 2.0, 3.0],
            "day": pa.array([dt.date(2026, 11, 1), dt.date(2026, 11, 2), None]),
            "when": pa.array([when, None, when + dt.timedelta(1)], pa.timestamp("us", "UTC")),
            "price": pa.array([Decimal("1.50"), Decimal("0.25"), None], pa.decimal128(9, 2)),
            "kind": ["a b/c%d", "", "é?#=&+"],
            "n": pa.array([7, None, -8], pa.int32()),
            "ok": [True, False, None],
        }
    )


PARTITION_FILTERS = [
    ("day == '2026-11-01'", [1]),
    ("day > '2026-11-01' or day is null", [2, 3]),
    ("when >= '2026-11-01T12:30:00.000005'", [1, 3]),
    ("price < 1", [2]),
    ("kind == 'a b/c%d'", [1]),
    ("kind == 'é?#=&+' and x > 0", [3]),
    ("n in (7, -8) and x < 3", [1]),
    ("n is null", [2]),
    ("ok == False", [2]),
]
"""Filters of these rows, and the values of x that they leave."""

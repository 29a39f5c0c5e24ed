"""Nights of a small lake: clusters in two features, one Parquet file for each night."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Cluster = tuple[float, float, float]  # the mean in x and in y, and the standard deviation


def rows(clusters: Mapping[str, Cluster], n: int, *, seed: int) -> pa.Table:
    """Return `n` rows of each cluster, in columns x and y, and their row numbers."""
    rng = np.random.default_rng(seed)
    parts = [rng.normal((x, y), s, size=(n, 2)) for x, y, s in clusters.values()]
    X = np.concatenate(parts)[rng.permutation(n * len(parts))]
    return pa.table({"x": X[:, 0], "y": X[:, 1], "id": np.arange(len(X))})


def write_night(lake: Path, night: str, table: pa.Table) -> Path:
    """Write a night's file in place of one that is there."""
    path = lake / f"ds={night}" / "part.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path

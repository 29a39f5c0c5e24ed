"""How many kinds of flights left New York in 2013? A sweep from Python, and what it found.

python examples/flights.py [rows]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

import gmm_dist

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import datasets


def main(n_rows: int = 40_000) -> None:
    """Fit K = 2..6 to a sample of the flights, and describe the best mixture."""
    with tempfile.TemporaryDirectory() as folder:
        table = datasets.flights()
        every = np.arange(0, len(table), -(-len(table) // n_rows))
        pq.write_table(table.take(every), f"{folder}/a.parquet")
        lake = gmm_dist.Lake(url=folder, columns=["departure", "distance", "speed", "arr_delay"])
        selection = gmm_dist.select(lake, n_components=range(2, 7), covariance_type="full")
    print(selection)
    mixture = selection.best.to_mixture()
    print(f"{mixture.n_components} components; the three largest:")
    order = mixture.parameters.weights.argsort(descending=True)[:3]
    for k in order.tolist():
        means = zip(mixture.feature_names, mixture.parameters.means[k].tolist(), strict=True)
        described = ", ".join(f"{name} {value:,.0f}" for name, value in means)
        print(f"  {float(mixture.parameters.weights[k]):.0%}: {described}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

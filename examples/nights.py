"""Two nights of a small lake; on the second a cluster is born, and the others keep their numbers.

python examples/nights.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gmm_dist.commands import nightly

OLD = {"north": (0.0, 6.0), "south": (0.0, -6.0), "east": (7.0, 0.0)}
NIGHTS = {"2026-11-26": OLD, "2026-11-27": OLD | {"born": (-8.0, 1.0)}}


def write_night(lake: Path, night: str, centres: dict[str, tuple[float, float]]) -> None:
    """Write 2,000 rows about each centre, as the partition of a night."""
    rng = np.random.default_rng(int(night[-2:]))
    X = np.concatenate([rng.normal(centre, 1, (2_000, 2)) for centre in centres.values()])
    folder = lake / f"ds={night}"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"x": X[:, 0], "y": X[:, 1]}), folder / "part.parquet")


def main() -> None:
    """Fit both nights, and show what the second one says of its components."""
    with tempfile.TemporaryDirectory() as folder:
        lake, registry = Path(folder) / "lake", Path(folder) / "registry"
        for night, centres in NIGHTS.items():
            write_night(lake, night, centres)
            words = [str(lake), "--registry", str(registry), "--night", night]
            status = nightly.main([*words, "--partition", "ds", "--k", "2..5", "--n-init", "4"])
            assert status == 0, status
        lineage = json.loads((registry / "models" / night / "lineage.json").read_text())
    print(f"components {sorted(lineage['ids'])}, of which {lineage['born']} were born on {night}")


if __name__ == "__main__":
    main()

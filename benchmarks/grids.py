"""Show that a K ends alike in any grid, that no K ends below a smaller one, and what it takes.

python benchmarks/grids.py --dataset flights --grids 2..5 2..12 4..8 5 12

Each grid is one sweep with the default settings; likelihoods are scored on all rows, in float64.
"""

from __future__ import annotations

import argparse
import itertools
import sys

from datasets import QUALITY
from quality import Fit, ours, resident

from gmm_dist.config import EMConfig, StartConfig

ALIKE, FALL = 1e-3, 1e-6
"""The aims, nats per row: how far a K may end apart in two grids, and below a smaller one."""


def parse_grid(text: str) -> list[int]:
    """Return the sizes of `5` or `2..12`."""
    first, _, last = text.partition("..")
    return list(range(int(first), int(last or first) + 1))


def table(grids: dict[str, list[Fit]]) -> str:
    """Return a Markdown table: a line for each K, a column for each grid."""
    found = {grid: {fit.k: fit for fit in fits} for grid, fits in grids.items()}
    lines = [
        "| K | " + " | ".join(grids) + " | apart by |",
        "|" + "---|" * (len(grids) + 2),
    ]
    for k in sorted({k for fits in found.values() for k in fits}):
        values = [fits[k].log_likelihood for fits in found.values() if k in fits]
        cells = [f"{fits[k].log_likelihood:.7f}" if k in fits else "" for fits in found.values()]
        lines.append(f"| {k} | {' | '.join(cells)} | {max(values) - min(values):.1g} |")
    seconds = [f"{fits[0].seconds:.1f} s" for fits in grids.values()]
    return "\n".join([*lines, "| | " + " | ".join(seconds) + " | |"])


def failures(grids: dict[str, list[Fit]]) -> list[str]:
    """Return which K end apart in two grids, and which below a smaller one; unranked ones apart."""
    lines, values = [], {}
    for grid, fits in grids.items():
        ranked = sorted((fit for fit in fits if not fit.degenerate), key=lambda fit: fit.k)
        for fit in ranked:
            values.setdefault(fit.k, []).append(fit.log_likelihood)
        for smaller, larger in itertools.pairwise(ranked):
            if larger.log_likelihood < smaller.log_likelihood - FALL:
                lines.append(f"{grid}: K={larger.k} ends below K={smaller.k}")
    apart = {k: max(own) - min(own) for k, own in values.items()}
    return lines + [f"K={k}: {gap:.1e} apart" for k, gap in apart.items() if gap > ALIKE]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=QUALITY, default="flights")
    parser.add_argument("--grids", nargs="+", default=["2..5", "2..12", "4..8", "5", "12"])
    parser.add_argument("--random-state", type=int, default=0)
    options = parser.parse_args()
    X, start = QUALITY[options.dataset].rows(), StartConfig(random_state=options.random_state)
    grids: dict[str, list[Fit]] = {}
    with resident(X) as shards:
        for grid in options.grids:
            grids[grid] = ours(shards, X, parse_grid(grid), EMConfig(), start)
    print(table(grids))
    for line in (found := failures(grids)):
        print(f"missed: {line}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())

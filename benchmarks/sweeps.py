"""Time a sweep over K: all mixtures in the same passes, against one fit after another.

python benchmarks/sweeps.py --json sweeps.jsonl
python benchmarks/sweeps.py --rows 5000 --features 4 --k 2 4 --repeats 1 --iterations 2

One E-step, here, is one for every K of the grid.
"""

from __future__ import annotations

import sys

from passes import compete, described, options
from problems import Shape

_DEFAULT = ["ours-f32", "ours-auto", "ours-separate-f32", "onedal-f32", "sklearn-f64"]


def main() -> int:
    parser = options(__doc__, _DEFAULT)
    parser.set_defaults(repeats=3, iterations=3)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--features", type=int, default=16)
    parser.add_argument(
        "--k", nargs=2, type=int, default=[2, 20], metavar=("FIRST", "LAST"), help="inclusive"
    )
    chosen = parser.parse_args()
    first, last = chosen.k
    shape = Shape(chosen.rows, chosen.features, tuple(range(first, last + 1)), "full")
    laps = compete("sweeps", shape, chosen, described(chosen.peak_seconds))
    return int(any(lap.failure is None and not lap.agrees for lap in laps))


if __name__ == "__main__":
    sys.exit(main())

"""Time one EM iteration from the same start, ours and the peers', in one run.

python benchmarks/passes.py --json passes.jsonl
python benchmarks/passes.py --shapes full:20000:8:8 --contenders ours-f32 sklearn-f64 --repeats 1
python benchmarks/passes.py --shapes full:60000:16:256:10

The last shape's components are 10 standard deviations apart (the others': 3), so that few of them
matter to a row.

Install the peers with `pip install -c constraints.txt -e '.[bench]'`; Spark needs Java 17. Run
nothing else on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import machine
from contenders import CONTENDERS
from problems import Problem, Shape
from race import Lap, race, results, table

SHAPES = ("full:200000:16:16", "full:100000:32:32", "full:60000:64:64", "diag:300000:32:64")
_SEPARATE = "ours-separate-f32"  # the same as ours-f32 where there is one start
_DEFAULT = [name for name in CONTENDERS if name not in (_SEPARATE, "ours-ray-f32", "onedal-f64")]


def parse_shape(text: str) -> Shape:
    """Parse TYPE:N:D:K, or TYPE:N:D:K:APART, e.g. full:200000:16:16."""
    kind, n, d, k, *apart = text.split(":")
    if kind not in ("full", "diag"):
        raise argparse.ArgumentTypeError(f"{kind} is not full or diag: other peers have no more")
    return Shape(int(n), int(d), (int(k),), kind, *map(float, apart))


def n_features(shape: Shape) -> int:
    """Return P, the length of a row's features."""
    linear = 1 + 2 * shape.d
    return linear + shape.d * (shape.d - 1) // 2 if shape.covariance_type == "full" else linear


def flops(shape: Shape) -> float:
    """Return what the two matrix products of one pass multiply and add: 4 n K P."""
    return 4.0 * shape.n * sum(shape.k) * n_features(shape)


def options(description: str | None, contenders: list[str]) -> argparse.ArgumentParser:
    """Return the options that all side-by-side benchmarks share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contenders", nargs="+", default=contenders, choices=list(CONTENDERS))
    parser.add_argument("--repeats", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--iterations", type=int, default=10, help="per run (default 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append results to this file")
    parser.add_argument("--log", type=Path, metavar="FILE", help="the contenders' stderr")
    parser.add_argument(
        "--peak-seconds",
        type=float,
        default=1.0,
        help="how long to measure the matrix-product peak; 0: not at all (default 1)",
    )
    return parser


def described(peak_seconds: float) -> dict[str, Any]:
    """Describe the machine, with its measured peaks."""
    gflops = machine.peaks(seconds=peak_seconds) if peak_seconds > 0 else {}
    on = machine.description() | {"gflops": gflops}
    print(
        f"{on['cpu']}, {on['cores']} cores, GFLOP/s {gflops or 'not measured'}, {on['versions']}\n"
    )
    return on


def compete(
    benchmark: str, shape: Shape, chosen: argparse.Namespace, on: dict[str, Any]
) -> list[Lap]:
    """Race on one shape, print the table and write the results."""
    problem = Problem.make(shape)
    laps = race(
        chosen.contenders,
        problem,
        iterations=chosen.iterations,
        repeats=chosen.repeats,
        log=chosen.log,
    )
    print(table(str(shape), laps, on["gflops"], flops(shape)), flush=True)
    if chosen.json:
        for result in results(benchmark, problem, laps, on, flops(shape)):
            machine.append(result, chosen.json)
    return laps


def main() -> int:
    parser = options(__doc__, _DEFAULT)
    parser.add_argument(
        "--shapes", nargs="+", type=parse_shape, default=[parse_shape(text) for text in SHAPES]
    )
    parser.add_argument("--ray", action="store_true", help="ours on Ray actors too")
    chosen = parser.parse_args()
    if chosen.ray and "ours-ray-f32" not in chosen.contenders:
        chosen.contenders = [*chosen.contenders, "ours-ray-f32"]
    on = described(chosen.peak_seconds)
    laps = [lap for shape in chosen.shapes for lap in compete("passes", shape, chosen, on)]
    return int(any(lap.failure is None and not lap.agrees for lap in laps))


if __name__ == "__main__":
    sys.exit(main())

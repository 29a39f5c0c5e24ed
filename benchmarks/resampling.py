"""What a pass of the bootstrap costs, beside a pass of one fit over the same rows.

python benchmarks/resampling.py --rows 200000 --features 16 --components 16 --resamples 50

Both passes start from the same mixture, in the arithmetic that a fit would take there. One thread,
in CPU seconds, the least of three. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import torch
from problems import Problem, Shape

from gmm_dist.config import EMConfig
from gmm_dist.em.estep import SumMoments
from gmm_dist.em.lane import Lane, grouped, task_of
from gmm_dist.em.resampling import Draws, OfResamples
from gmm_dist.model.parameters import Parameters
from gmm_dist.shards.local import LocalShards, one_thread
from gmm_dist.streams import Stream


def measured(n: int, d: int, k: int, n_resamples: int) -> dict[str, Any]:
    """Return the CPU seconds of a pass of one fit, and of a pass of resamples."""
    problem = Problem.make(Shape(n, d, (k,), "full"))
    made = problem.starts[0]
    start = Parameters(
        weights=torch.from_numpy(made.weights),
        means=torch.from_numpy(made.means),
        covariances=torch.from_numpy(made.covariances),
        covariance_type="full",
    )
    shards = LocalShards.of(torch.from_numpy(problem.X), n_shards=16, n_threads=1)
    total = replace(shards.run(SumMoments(d)), compiles=True)
    lane = Lane.start(start, EMConfig(), total)
    task = task_of(grouped([lane]), n)
    draws = [Draws(Stream.RESAMPLES, 0, i) for i in range(n_resamples)]
    resampled = OfResamples(tuple((draw, task) for draw in draws))
    for warm in (task, OfResamples(((draws[0], task),))):
        shards.run(warm)
    one, many = (_seconds(lambda t=t: shards.run(t)) for t in (task, resampled))
    return {
        "rows": n,
        "features": d,
        "components": k,
        "resamples": n_resamples,
        "form": lane.precision.name,
        "pass_seconds": round(one, 4),
        "resampled_seconds": round(many, 4),
        "passes_each": round(many / one / n_resamples, 3),
    }


def _seconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return min(times)


def main() -> int:
    """Print what a resample costs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--features", type=int, default=16)
    parser.add_argument("--components", type=int, default=16)
    parser.add_argument("--resamples", type=int, default=50)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with one_thread(), torch.no_grad():
        result = measured(
            arguments.rows, arguments.features, arguments.components, arguments.resamples
        )
    machine.append(result | {"machine": machine.description()}, arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""How often the bootstrap's 95 % intervals hold the truth, over simulations of a known mixture.

python benchmarks/intervals.py --simulations 200 --resamples 200

Three clusters in two features, two of which overlap; the fit starts at the truth, so that its
components have the truth's order. Prints a line of JSON: which share of the intervals of weights,
of means and of standard deviations hold theirs.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import machine
import numpy as np
import numpy.typing as npt
import torch

import gmm_dist
from gmm_dist.model.bootstrap import Bootstrap, Interval

Floats = npt.NDArray[np.float64]

WEIGHTS = np.array([0.5, 0.3, 0.2])
MEANS = np.array([[0.0, 0.0], [3.0, 0.5], [-1.0, 5.0]])
FACTORS = np.array([[[1.0, 0.0], [0.4, 0.8]], [[0.7, 0.0], [0.0, 1.2]], [[1.5, 0.0], [-0.5, 0.6]]])


def rows(n: int, seed: int) -> Floats:
    """Return rows (n, 2) of the mixture."""
    rng = np.random.default_rng(seed)
    of = rng.choice(len(WEIGHTS), size=n, p=WEIGHTS)
    drawn = np.einsum("nij,nj->ni", FACTORS[of], rng.normal(size=(n, 2)))
    return np.asarray(MEANS[of] + drawn)


def held(seed: int, *, n: int, n_resamples: int) -> dict[str, list[bool]]:
    """Simulate once; return whether each interval holds the truth."""
    X = rows(n, seed)
    precisions = np.linalg.inv(FACTORS @ FACTORS.transpose(0, 2, 1))
    model = gmm_dist.GaussianMixture(
        len(WEIGHTS), weights_init=WEIGHTS, means_init=MEANS, precisions_init=precisions
    ).fit(X)
    mixture = gmm_dist.bootstrap(model, X, n_resamples, random_state=seed)
    bootstrap, fitted = mixture.bootstrap, mixture.parameters
    assert isinstance(bootstrap, Bootstrap)
    truth = {
        "weights": (bootstrap.of_weights(fitted), WEIGHTS),
        "means": (bootstrap.of_means(fitted), MEANS),
        "deviations": (bootstrap.of_deviations(fitted), np.sqrt((FACTORS**2).sum(2))),
    }
    return {name: _holds(interval, value) for name, (interval, value) in truth.items()}


def _holds(interval: Interval, value: Floats) -> list[bool]:
    true = torch.from_numpy(value)
    within: list[bool] = ((interval.low <= true) & (true <= interval.high)).flatten().tolist()
    return within


def coverage(
    n_simulations: int, *, n: int, n_resamples: int, n_processes: int = 1, seed: int = 0
) -> dict[str, float]:
    """Return which share of the intervals of each kind, and of all, hold the truth."""
    seeds = range(seed, seed + n_simulations)
    simulate = partial(held, n=n, n_resamples=n_resamples)
    if n_processes == 1:
        each = list(map(simulate, seeds))
    else:
        with ProcessPoolExecutor(n_processes) as pool:
            each = list(pool.map(simulate, seeds))
    kinds = {name: [yes for one in each for yes in one[name]] for name in each[0]}
    kinds["all"] = [yes for of_kind in kinds.values() for yes in of_kind]
    return {name: float(np.mean(of_kind)) for name, of_kind in kinds.items()}


def main() -> int:
    """Print the coverage, and what it was measured on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulations", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    began = time.monotonic()
    shares = coverage(
        arguments.simulations,
        n=arguments.rows,
        n_resamples=arguments.resamples,
        n_processes=arguments.processes,
        seed=arguments.seed,
    )
    result: dict[str, Any] = {
        "simulations": arguments.simulations,
        "resamples": arguments.resamples,
        "rows": arguments.rows,
        "seed": arguments.seed,
        "coverage": shares,
        "seconds": round(time.monotonic() - began, 1),
        "machine": machine.description(),
    }
    machine.append(result, arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Time `fit` of our GaussianMixture and of scikit-learn's, from the same start, in one run.

python benchmarks/estimator.py --json estimator.jsonl
python benchmarks/estimator.py --shapes 1000:4:3 --rounds 3

Each shape is fitted three times: as most people call it (k-means, default tol), from a given start
for a fixed number of iterations, and in a process of its own, from the start of Python over the
import to the labels (`--no-processes` leaves that out). Both contenders fit float64 rows in
interleaved rounds; medians count. Run nothing else on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import machine
import numpy as np
import sklearn.mixture
from sklearn.datasets import make_blobs

import gmm_dist

CONTENDERS = {"ours": gmm_dist.GaussianMixture, "sklearn": sklearn.mixture.GaussianMixture}
SHAPES = ("1000:4:3", "10000:8:5", "200000:16:16")
_FIT_FOR = 0.2  # seconds that a small fit is repeated for, in a round


def settings(X: np.ndarray, k: int, iterations: int) -> dict[str, dict[str, Any]]:
    """Return the two ways in which a shape is fitted."""
    n, d = X.shape
    means = X[np.random.default_rng(0).choice(n, k, replace=False)]
    given = {
        "weights_init": np.full(k, 1 / k),
        "means_init": means,
        "precisions_init": np.array([np.eye(d)] * k) / X.var(),
        "max_iter": iterations,
        "tol": 0.0,
    }
    return {"k-means": {"random_state": 0}, "given start": given}


def seconds(fitted: type, k: int, options: dict[str, Any], X: np.ndarray) -> tuple[float, Any]:
    """Return the mean time of a fit, and the last one."""
    n_fits, began = 0, time.perf_counter()
    while True:
        model = fitted(k, **options).fit(X)
        n_fits += 1
        spent = time.perf_counter() - began
        if spent > _FIT_FOR:
            return spent / n_fits, model


def race(shape: str, rounds: int, iterations: int) -> list[dict[str, Any]]:
    """Fit one shape in both ways; return a result for each."""
    n, d, k = (int(part) for part in shape.split(":"))
    X = make_blobs(n, d, centers=k, cluster_std=3.0, random_state=0)[0]
    results = []
    for start, options in settings(X, k, iterations).items():
        laps: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        models = {}
        for _ in range(rounds + 1):
            for name, fitted in CONTENDERS.items():
                lap, models[name] = seconds(fitted, k, options, X)
                laps[name].append(lap)
        medians = {name: statistics.median(own[1:]) for name, own in laps.items()}
        results.append(
            {
                "benchmark": "estimator",
                "n": n,
                "d": d,
                "k": k,
                "start": start,
                "iterations": {name: model.n_iter_ for name, model in models.items()},
                "lower_bound": {name: float(model.lower_bound_) for name, model in models.items()},
                "seconds": medians,
                "laps": {name: own[1:] for name, own in laps.items()},
                "times_faster": medians["sklearn"] / medians["ours"],
            }
        )
    return results


_PROCESS = """
import sys
from {module} import GaussianMixture
from sklearn.datasets import make_blobs
n, d, k = map(int, sys.argv[1:])
X = make_blobs(n, d, centers=k, cluster_std=3.0, random_state=0)[0]
GaussianMixture(k, random_state=0).fit(X).predict(X)
"""


def in_processes(shape: str, rounds: int) -> dict[str, Any]:
    """Fit one shape in processes of their own, in turn; return one result."""
    n, d, k = (int(part) for part in shape.split(":"))
    laps: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds + 1):
        for name, module in (("ours", "gmm_dist"), ("sklearn", "sklearn.mixture")):
            code, began = _PROCESS.format(module=module), time.perf_counter()
            subprocess.run([sys.executable, "-c", code, *shape.split(":")], check=True)
            laps[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(own[1:]) for name, own in laps.items()}
    own = {"n": n, "d": d, "k": k, "start": "process", "seconds": medians}
    ratio = medians["sklearn"] / medians["ours"]
    return {"benchmark": "estimator", **own, "laps": laps, "times_faster": ratio}


def main() -> int:
    """Run all shapes and print a JSON line for each result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="N:D:K, e.g. 1000:4:3")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved, after one to warm up")
    parser.add_argument("--iterations", type=int, default=20, help="from the given start")
    parser.add_argument("--processes", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append results to this file")
    options = parser.parse_args()
    warnings.simplefilter("ignore", sklearn.exceptions.ConvergenceWarning)
    about = machine.description()
    for shape in options.shapes:
        results = race(shape, options.rounds, options.iterations)
        if options.processes:
            results.append(in_processes(shape, options.rounds))
        for result in results:
            whole = result | {"machine": about}
            print(json.dumps(whole), flush=True)
            if options.json is not None:
                machine.append(whole, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

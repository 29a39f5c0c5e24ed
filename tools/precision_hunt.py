"""Hunt for mixtures on which `--precision auto` ends elsewhere than float64; a command, no test.

    python -m tools.precision_hunt --seeds 0 1 2
    python -m tools.precision_hunt --compiled --features 1 2 16

Each fit starts from a partition with a tenth of its labels wrong and runs until the gain is
below 1e-9 nats per row. Held against the same run in float64: that it ends; the likelihood, which
may be 1e-6 nats per row lower; and the covariances to 1e-4 of the features' spread. Held against
the mixture's densities by Cholesky factors: the likelihood reported, to 1e-6. Always: covariances
positive definite. Fits that either run calls degenerate, or that float64 does not finish, are
counted apart; of them only the last two are asked.

Covariances may be further apart where the likelihood is flat: there the last leap before the gain
that ends a fit decides how near to the optimum that is. Such fits are counted if all of this
holds. Float64's next EM step from the end gains too little to go on. The step after it is at least
half as long, since lost digits would come back in the first; unless float64 goes nowhere from
there. And float64 that goes on from both ends comes to one place: the two are then apart by less
than a quarter of the way there.
"""

from __future__ import annotations

import argparse
import collections
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gmm_dist.config import EMConfig
from gmm_dist.em.loop import FitResult
from gmm_dist.model.covariance import COVARIANCE_TYPES, TYPE_OF
from gmm_dist.model.densities import Densities
from gmm_dist.model.parameters import Parameters, ParameterStack
from gmm_dist.selection.kmeans import start_of

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import mixtures

N, K = 1500, 3
_TOL, _MAX_ITER = 1e-9, 5000  # cut off on its way, a fit may be anywhere
_LOWER = 1e-6  # nats per row that a fit may end below float64's
_APART = 1e-4  # of the features' spread, between two fits' covariances
Make = Callable[[torch.Generator, int, Tensor], Tensor]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def around(centres: float, spreads: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Make:
    """Return clusters whose centres lie `centres` apart, each with its spread."""

    def make(generator: torch.Generator, d: int, labels: Tensor) -> Tensor:
        spread = torch.tensor(spreads, dtype=torch.float64)[labels][:, None]
        return spread * normal(generator, N, d) + centres * normal(generator, K, d)[labels]

    return make


def correlated(rho: float) -> Make:
    def make(generator: torch.Generator, d: int, labels: Tensor) -> Tensor:
        X = normal(generator, N, d)
        X[:, 1:] = rho * X[:, :1] + math.sqrt(1 - rho**2) * X[:, 1:]
        return X + 3 * normal(generator, K, d)[labels]

    return make


def scaled(generator: torch.Generator, d: int, labels: Tensor) -> Tensor:
    """Return features of scales from 1e-6 to 1e6 in one row."""
    return around(3)(generator, d, labels) * torch.logspace(-6, 6, d, dtype=torch.float64)


def shifted(generator: torch.Generator, d: int, labels: Tensor) -> Tensor:
    return around(3)(generator, d, labels) + 1e6


def with_outliers(generator: torch.Generator, d: int, labels: Tensor) -> Tensor:
    X = around(3)(generator, d, labels)
    X[-3:] *= 1e4
    return X


SHAPES: dict[str, Make] = {
    "near": around(3),
    "100 sigma apart": around(100),
    "1000 sigma apart": around(1000),
    "3000 sigma apart": around(3000),
    "3000 apart, tight": around(3000, (0.1, 0.5, 1.0)),
    "one tight, one wide": around(0.5, (1.0, 0.03, 0.001)),
    "correlation 0.99": correlated(0.99),
    "correlation 0.99999": correlated(0.99999),
    "scales 1e-6 to 1e6": scaled,
    "shifted by 1e6": shifted,
    "outliers": with_outliers,
}


def start_at(X: Tensor, labels: Tensor, kind: str) -> Parameters:
    """Return the mixture of a partition."""
    centre, ones = X.mean(0), torch.ones(N, dtype=torch.float64)
    return start_of(X - centre, ones, labels, K, kind).shifted(centre)


def fits(
    X: Tensor,
    start: Parameters,
    precision: str,
    *,
    tol: float = _TOL,
    max_iter: int = _MAX_ITER,
    accelerate: bool = True,
    compiled: bool = False,
) -> FitResult:
    config = EMConfig(
        tol=tol,
        max_iter=max_iter,
        reg_covar=1e-15,
        precision=precision,
        accelerate=accelerate,
        compile_from=0 if compiled else X.shape[0] + 1,
    )
    (result,) = mixtures.fit(X, [start], config, edges=[N // 3])
    return result


def faults(X: Tensor, auto: FitResult, kind: str) -> list[str]:
    """Return what is wrong with a fit by itself, in words and figures."""
    stack = ParameterStack.of([auto.parameters])
    if bool(TYPE_OF[kind].precisions_cholesky(stack.covariances)[1].any()):
        return ["a covariance is not positive definite"]
    messages = []
    centred = float(Densities(stack, torch.device("cpu"))(X.T).logsumexp(0).sum())
    if (gap := abs(centred - auto.log_likelihood) / N) > 1e-6:
        messages.append(f"reported likelihood off by {gap:.1e}")
    return messages


def apart(one: FitResult, exact: FitResult, kind: str) -> float:
    """Return how far two fits' covariances are apart, in units of the features' spread."""
    reference = ParameterStack.of([exact.parameters]).covariances
    variances = TYPE_OF[kind].variances(reference, exact.parameters.n_features)
    spread = variances.sqrt()
    family = TYPE_OF[kind]
    unit = (
        spread[:, :, None] * spread[:, None] if family.has_products else family.nearest(variances)
    )
    return float(((ParameterStack.of([one.parameters]).covariances - reference) / unit).abs().max())


def is_flat(X: Tensor, auto: FitResult, exact: FitResult, kind: str) -> bool:
    """Say whether float64 would end where `auto` did, too, and goes on from both to one place."""
    first, second = (
        fits(X, auto.parameters, "float64", max_iter=n, accelerate=False, tol=0) for n in (1, 2)
    )
    if not first.is_ranked or first.lower_bounds[-1] - first.lower_bounds[0] >= _TOL:
        return False
    ends = [auto, exact]
    beyond = [fits(X, end.parameters, "float64", tol=1e-14) for end in ends]
    ways = [apart(end, there, kind) for end, there in zip(ends, beyond, strict=True)]
    comes_back = apart(second, first, kind) < apart(first, auto, kind) / 2
    if comes_back and ways[0] > _APART:
        return False
    return apart(*beyond, kind) < max(ways) / 4


def differences(X: Tensor, auto: FitResult, exact: FitResult, kind: str) -> tuple[list[str], bool]:
    """Return how a fit differs from float64's, in words and figures; and whether that is flat."""
    if not exact.converged:
        return [], False
    if not auto.converged:
        return [f"no end after {auto.n_iter} iterations, float64 has one"], False
    messages = []
    if (low := (exact.log_likelihood - auto.log_likelihood) / N) > _LOWER:
        messages.append(f"likelihood {low:.1e} below float64's")
    gap = apart(auto, exact, kind)
    flat = gap > _APART and is_flat(X, auto, exact, kind)
    if gap > _APART and not flat:
        messages.append(f"covariances {gap:.1e} away from float64's")
    return messages, flat


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--features", type=int, nargs="+", default=[1, 2, 16, 64, 128])
    parser.add_argument(
        "--compiled", action="store_true", help="auto takes compiled loops, float64 does not"
    )
    options = parser.parse_args()
    began, counts = time.monotonic(), collections.Counter[str]()
    for seed in options.seeds:
        generator = torch.Generator().manual_seed(seed)
        for d in options.features:
            for name, make in SHAPES.items():
                labels = torch.randint(K, (N,), generator=generator)
                X = make(generator, d, labels)
                wrong = torch.rand(N, generator=generator) < 0.1
                start = torch.where(wrong, torch.randint(K, (N,), generator=generator), labels)
                for kind in COVARIANCE_TYPES:
                    first = start_at(X, start, kind)
                    auto = fits(X, first, "auto", compiled=options.compiled)
                    exact = fits(X, first, "float64")
                    counts["fits"] += 1
                    messages = faults(X, auto, kind)
                    if auto.is_ranked and exact.is_ranked:
                        more, flat = differences(X, auto, exact, kind)
                        messages += more
                        counts["flat"] += flat
                        counts["unfinished"] += not exact.converged
                    else:
                        counts["degenerate"] += 1
                    for message in messages:
                        counts["faults"] += 1
                        print(f"seed {seed}, d={d}, {name}, {kind}: {message}", flush=True)
            spent = time.monotonic() - began
            print(f"seed {seed}, d={d} done: {dict(counts)} in {spent:.0f} s", file=sys.stderr)
    print(f"{dict(counts)} in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()

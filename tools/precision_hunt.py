"""Hunt for mixtures on which `--precision auto` ends elsewhere than float64; a command, no test.

    python -m tools.precision_hunt --seeds 0 1 2

Each fit starts from a partition with a tenth of its labels wrong and runs until the gain is
below 1e-9 nats per row. Held against the same run in float64: the likelihood, which may be 1e-6
nats per row lower, and the covariances to 1e-4 of the features' spread. Held against the mixture's
densities by Cholesky factors: the likelihood reported, to 1e-6. Always: covariances positive
definite. Fits that either run calls degenerate are counted apart; of them only the last two are
asked. Where covariances differ, float64 goes on to a gain of 1e-14: a fit that is no further from
there than float64's own was (four times) ended on a flat likelihood, where the gain that ends a
fit sets covariances apart, not the arithmetic; such are counted. So are fits below float64's where
float64 itself ends as low from one of eight starts whose weights differ by a millionth.
"""

from __future__ import annotations

import argparse
import collections
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gmm_dist.config import EMConfig
from gmm_dist.em.loop import FitResult
from gmm_dist.model.covariance import COVARIANCE_TYPES, TYPE_OF
from gmm_dist.model.densities import Densities
from gmm_dist.model.parameters import ParameterStack
from gmm_dist.selection.kmeans import start_of

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import mixtures

N, K = 1500, 3
_LOWER = 1e-6  # nats per row that a fit may end below float64's
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


def fits(
    X: Tensor,
    labels: Tensor,
    kind: str,
    precision: str,
    *,
    tol: float = 1e-9,
    max_iter: int = 1000,
    nudge: int | None = None,
) -> FitResult:
    """Fit from a partition, with weights moved by a millionth if there is a seed to `nudge`."""
    centre = X.mean(0)
    ones = torch.ones(N, dtype=torch.float64)
    start = start_of(X - centre, ones, labels, K, kind)
    start = start.shifted(centre)
    if nudge is not None:
        moved = start.weights * (1 + 1e-6 * normal(torch.Generator().manual_seed(nudge), K))
        start = replace(start, weights=moved / moved.sum())
    config = EMConfig(tol=tol, max_iter=max_iter, reg_covar=1e-15, precision=precision)
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


def _is_flat(X: Tensor, labels: Tensor, auto: FitResult, exact: FitResult, kind: str) -> bool:
    """Say whether float64 itself ended as far from where it goes, or a quarter as far."""
    optimum = fits(X, labels, kind, "float64", tol=1e-14, max_iter=20_000)
    return apart(auto, optimum, kind) < 4 * apart(exact, optimum, kind)


def _is_chaotic(X: Tensor, labels: Tensor, auto: FitResult, kind: str) -> bool:
    """Say whether float64 ends as low as `auto` from one of eight starts a millionth away."""
    others = (fits(X, labels, kind, "float64", nudge=seed) for seed in range(8))
    return any(other.log_likelihood <= auto.log_likelihood + _LOWER * N for other in others)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--features", type=int, nargs="+", default=[1, 2, 16, 64, 128])
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
                    auto, exact = (fits(X, start, kind, p) for p in ("auto", "float64"))
                    counts["fits"] += 1
                    counts["degenerate"] += not (auto.is_ranked and exact.is_ranked)
                    messages = faults(X, auto, kind)
                    are_ranked = auto.is_ranked and exact.is_ranked
                    low = (exact.log_likelihood - auto.log_likelihood) / N
                    if are_ranked and low > _LOWER and _is_chaotic(X, start, auto, kind):
                        counts["chaotic"] += 1
                    elif are_ranked:
                        if low > _LOWER:
                            messages.append(f"likelihood {low:.1e} below float64's")
                        gap = apart(auto, exact, kind)
                        is_flat = gap > 1e-4 and _is_flat(X, start, auto, exact, kind)
                        counts["flat"] += is_flat
                        if gap > 1e-4 and not is_flat:
                            messages.append(f"covariances {gap:.1e} away from float64's")
                    for message in messages:
                        counts["faults"] += 1
                        print(f"seed {seed}, d={d}, {name}, {kind}: {message}", flush=True)
            spent = time.monotonic() - began
            print(f"seed {seed}, d={d} done: {dict(counts)} in {spent:.0f} s", file=sys.stderr)
    print(f"{dict(counts)} in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()

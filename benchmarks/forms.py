"""Time a pass in each form of the E-step, beside the form that `em.precision` takes for fastest.

python benchmarks/forms.py --json forms.jsonl
python benchmarks/forms.py --shapes full:20000:16:16 --apart 3 20 --repeats 2

Nanoseconds of one thread for a row: of float32 and float64 products, of the centred form, which
evaluates the components that matter, and of compiled loops over all pairs. How many components
matter depends on how far apart they are (`--apart`, roughly in standard deviations). The centred
passes are later ones, which keep in mind what the first has found. `error` is that of the mean
log-likelihood, nats per row, against the density by the Cholesky factors of all components. Run
nothing else on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import machine
import torch
from passes import parse_shape
from problems import Shape

from gmm_dist.compiling import can_compile
from gmm_dist.em.estep import EStep
from gmm_dist.em.lane_batch import LaneBatch, Precision
from gmm_dist.em.precision import most_survivors
from gmm_dist.model.densities import Densities
from gmm_dist.model.density_loops import suits
from gmm_dist.model.natural import natural
from gmm_dist.model.parameters import Parameters, ParameterStack
from gmm_dist.shards.protocol import Block, ShardRows

_SHAPES = (
    "full:100000:2:3",
    "full:100000:6:12",
    "full:50000:16:16",
    "full:30000:32:32",
    "full:15000:64:64",
    "full:30000:16:64",
    "full:10000:32:256",
    "full:10000:128:32",
    "diag:50000:16:16",
    "diag:30000:32:64",
    "diag:15000:64:256",
)
_MANY = 1_000_000  # rows, as if there were so many: the centred form's loops are compiled, if ever
_HEAD = (
    "| rows, d, K | survivors per row | float32, ns | float64, ns | centred, ns | "
    "all pairs, ns | error of float32 | of centred | chosen |\n" + "|---" * 9 + "|"
)


def mixture(shape: Shape, apart: float) -> Parameters:
    """Return a mixture whose means lie on a sphere of radius `apart`."""
    generator = torch.Generator().manual_seed(0)
    (k,), d = shape.k, shape.d

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    factors = normal(k, d, d) / d**0.5
    covariances = 0.5 * (factors @ factors.mT) + 0.5 * torch.eye(d, dtype=torch.float64)
    if shape.covariance_type == "diag":
        covariances = covariances.diagonal(dim1=1, dim2=2).clone()
    means = normal(k, d)
    return Parameters(
        weights=torch.full((k,), 1 / k, dtype=torch.float64),
        means=apart * means / means.norm(dim=1, keepdim=True),
        covariances=covariances,
        covariance_type=shape.covariance_type,
    )


def rows_of(model: Parameters, n: int) -> torch.Tensor:
    """Draw rows (n, d) in float32."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, model.n_components, (n,), generator=generator)
    noise = torch.randn(n, model.n_features, 1, generator=generator, dtype=torch.float64)
    lower = torch.linalg.cholesky(model.covariance_matrices())[labels]
    return (model.means[labels] + (lower @ noise)[:, :, 0]).float()


def measure(shape: Shape, apart: float, repeats: int) -> dict[str, Any]:
    """Time all forms in turn, and take the least of each."""
    model = mixture(shape, apart)
    X = rows_of(model, shape.n)
    rows = ShardRows(shard=0, blocks=[Block(X.T.contiguous())])
    stack = ParameterStack.of([model])
    theta = natural(stack).theta
    compiles = can_compile() and suits(model.type, shape.d)
    forms = {
        form.name.lower(): LaneBatch.of([model], [theta], form, compiled=compiles)
        for form in Precision
    }
    if compiles:
        forms["all_pairs"] = LaneBatch.of(
            [model], [theta], Precision.CENTRED, compiled=True, all_pairs=True
        )
    tasks = {form: EStep((batch,), shape.d) for form, batch in forms.items()}
    least: dict[str, float] = {}
    sums = {}
    for repeat in range(repeats + 1):
        for form, task in tasks.items():
            task(rows)  # makes the buffers, which the passes of a fit keep
            began = time.thread_time()
            sums[form] = task(rows).groups[0]
            seconds = time.thread_time() - began
            if repeat:
                least[form] = min(seconds, least.get(form, seconds))
    exact = sum(
        float(part.logsumexp(0).sum()) for part in Densities.of(model, rows.device).chunks(X)
    )
    sizes = (model.n_components, shape.d)
    limits = most_survivors(shape.covariance_type, *sizes, compiled=compiles)
    float32, float64, all_pairs = limits
    survivors = float(sums["centred"].survivors[0]) / shape.n
    exact_forms = {"centred": survivors, "float64": float64, "all pairs": all_pairs}
    fast = exact_forms | {"float32": float32}
    chosen = min(fast, key=lambda form: fast[form])
    exactly = min(exact_forms, key=lambda form: exact_forms[form])
    return {
        "shape": f"{shape.covariance_type} {shape.n:,}, {shape.d}, {model.n_components}",
        "apart": apart,
        "survivors": survivors,
        "ns": {form: 1e9 * least[form] / shape.n for form in tasks},
        "error": {
            form: abs(float(sums[form].log_likelihood[0]) - exact) / shape.n for form in tasks
        },
        "chosen": chosen + (f" (exact: {exactly})" if exactly != chosen else ""),
        "most_survivors": limits,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--shapes", nargs="+", type=parse_shape, default=list(map(parse_shape, _SHAPES))
    )
    parser.add_argument("--apart", nargs="+", type=float, default=[3.0, 8.0, 20.0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(_HEAD)
    for shape in options.shapes:
        for apart in options.apart:
            result = measure(shape, apart, options.repeats)
            ns, error = result["ns"], result["error"]
            print(
                f"| {result['shape']} | {result['survivors']:.2f} | {ns['float32']:.0f} | "
                f"{ns['float64']:.0f} | {ns['centred']:.0f} | "
                f"{ns.get('all_pairs', math.nan):.0f} | "
                f"{error['float32']:.1e} | "
                f"{error['centred']:.1e} | {result['chosen']} |",
                flush=True,
            )
            if options.json is not None:
                machine.append(result | {"machine": machine.description()}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

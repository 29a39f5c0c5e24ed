"""Check and time our passes on a GPU; needs torch and nothing that reads lakes or starts clusters.

python benchmarks/gpu.py --json gpu.jsonl
python benchmarks/gpu.py --device cpu --scale 0.001

First a small shape of every covariance type is held against float64 on the CPU, then the large
shapes are timed, on rows drawn on the device. `--scale` multiplies rows, and components by its
square root.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from machine import append, description
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # not installed on a borrowed machine

from gmm_dist.config import EMConfig
from gmm_dist.em.estep import EStep, Precision, SumMoments
from gmm_dist.em.lane import Lane, grouped, task_of
from gmm_dist.em.mstep import advance
from gmm_dist.em.precision import float32_error
from gmm_dist.em.statistics import PassStatistics
from gmm_dist.model.covariance import COVARIANCE_TYPES, TYPE_OF
from gmm_dist.model.parameters import Parameters
from gmm_dist.shards.protocol import Block, ShardRows
from gmm_dist.shards.tree_sum import run_on

CHECKED = (3_000, 16, 5)  # n, d, K
_ALLOWED = {"float32": 1e-4, "float64": 1e-11}
"""Largest error of the log-likelihood per row (nats) and of the moments (of their largest)."""


@dataclass(frozen=True)
class Shape:
    """n rows of d features, K components of one covariance type."""

    covariance_type: str
    n: int
    d: int
    k: int

    def scaled(self, scale: float) -> Shape:
        n, k = max(64, round(self.n * scale)), max(2, round(self.k * math.sqrt(scale)))
        return Shape(self.covariance_type, n, self.d, k)

    @property
    def flops(self) -> float:
        """What the two matrix products of one pass multiply and add: 4 n K P."""
        rows = TYPE_OF[self.covariance_type].rows(self.d)
        return 4.0 * self.n * self.k * float(rows.stop - rows.start)


SHAPES = (
    Shape("spherical", 1_000_000, 128, 1024),
    Shape("diag", 1_000_000, 128, 1024),
    Shape("full", 1_000_000, 128, 1024),
    Shape("full", 10_000_000, 64, 64),
)


def draw(shape: Shape, device: torch.device, *, seed: int = 0) -> tuple[ShardRows, Parameters]:
    """Draw rows of an overlapping mixture on the device, and a start near the truth."""
    n, d, k = shape.n, shape.d, shape.k
    generator = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "device": device, "dtype": torch.float32}
    means = torch.randn(d, k, **options) * 3 / math.sqrt(2 * d)
    X = torch.randn(d, n, **options)
    labels = torch.randint(k, (n,), generator=generator, device=device)
    for feature, of_component in zip(X, means, strict=True):  # d rows, so no second (d, n)
        feature += of_component[labels]
    start = means.T + 0.1 * torch.randn(k, d, **options)
    weights = torch.full((k,), 1 / k, dtype=torch.float64)
    covariances = _covariances(shape, seed)
    parameters = Parameters(
        weights=weights,
        means=start.double().cpu(),
        covariances=covariances,
        covariance_type=shape.covariance_type,
    )
    return ShardRows(shard=0, blocks=[Block(X)]), parameters


def _covariances(shape: Shape, seed: int) -> Tensor:
    """Return covariances near the unit matrix, no two alike and no entry zero."""
    generator = torch.Generator().manual_seed(seed)
    d, k, kind = shape.d, shape.k, shape.covariance_type
    size = TYPE_OF[kind].shape(k, d)
    if not TYPE_OF[kind].has_products:
        return 1 + 0.2 * torch.rand(size, generator=generator, dtype=torch.float64)
    noise = torch.randn(size, generator=generator, dtype=torch.float64)
    factor = torch.eye(d, dtype=torch.float64) + 0.2 / math.sqrt(d) * noise
    return factor @ factor.mT


def _float32_error(task: EStep, rows: ShardRows) -> float:
    """Return the mean signed error of log p in float32, nats, and two standard errors."""
    checking = replace(task, groups=tuple(replace(group, checks=True) for group in task.groups))
    whole = run(checking, rows)
    return float32_error(whole.groups[0], 0, whole)


def pass_of(parameters: Parameters, precision: str, n_rows: int) -> EStep:
    """Return the task of one pass in "float32" or "float64"."""
    return task_of(grouped([Lane.start(parameters, EMConfig(precision=precision))]), n_rows)


def run(task: EStep, rows: ShardRows) -> PassStatistics:
    """Make one pass over one shard, as a worker does."""
    (partial,) = run_on(task, [rows], 1)
    return partial.summary


def check(device: torch.device) -> list[dict[str, Any]]:
    """Hold passes on the device against float64 on the CPU, every covariance type."""
    results = []
    for kind in COVARIANCE_TYPES:
        shape = Shape(kind, *CHECKED)
        rows, start = draw(shape, device)
        reference = run(pass_of(start, "float64", rows.n_rows), rows.to(torch.device("cpu")))
        for precision, allowed in _ALLOWED.items():
            errors = _errors(run(pass_of(start, precision, rows.n_rows), rows), reference)
            named = {"benchmark": "gpu-check", "covariance_type": kind, "precision": precision}
            verdict = {"allowed": allowed, "agrees": max(errors.values()) <= allowed}
            results.append(named | errors | verdict)
    return results


def _errors(ours: PassStatistics, reference: PassStatistics) -> dict[str, float]:
    (a,), (b,) = ours.groups, reference.groups
    difference = (a.log_likelihood - b.log_likelihood).abs().max() / reference.n_samples
    relative = (a.moments - b.moments).abs().max() / b.moments.abs().max()
    return {"log_likelihood_error": float(difference), "moments_error": float(relative)}


def timed(shape: Shape, device: torch.device, precision: str, repeats: int) -> dict[str, Any]:
    """Time passes, and the driver's M-step after one, at one shape."""
    rows, start = draw(shape, device)
    config = EMConfig(precision=precision)
    lanes = grouped([Lane.start(start, config)])
    task = task_of(lanes, rows.n_rows)
    run(task, rows)  # warm-up: allocations, the library's choice of kernels
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [_seconds(lambda: run(task, rows), device) for _ in range(repeats)]
    statistics_, total = run(task, rows), run_on(SumMoments(shape.d), [rows], 1)[0].summary
    m_step = _seconds(
        lambda: advance(lanes[0], statistics_.groups[0], statistics_, total, config), device
    )
    median = statistics.median(seconds)
    gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {
        "benchmark": "gpu",
        "shape": {"n": shape.n, "d": shape.d, "k": shape.k},
        "covariance_type": shape.covariance_type,
        "precision": precision,
        "seconds": seconds,
        "pass_seconds": median,
        "m_step_seconds": m_step,
        "tflops": shape.flops / median / 1e12,
        "peak_memory_gib": gib,
        "float32_error": _float32_error(task, rows),
        "log_likelihood": float(statistics_.groups[0].log_likelihood[0]) / statistics_.n_samples,
    }


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_peak(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """Return TFLOP/s of a large square matrix product, the median of `repeats`."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.rand(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.mm(a, b)
    seconds = [_seconds(lambda: torch.mm(a, b, out=out), device) for _ in range(repeats)]
    return 2 * size**3 / statistics.median(seconds) / 1e12


def machine_of(device: torch.device, repeats: int) -> dict[str, Any]:
    """Describe the machine, and what matrix products reach on the device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else description()["cpu"]
    peaks = {
        str(dtype).removeprefix("torch."): matrix_peak(device, dtype, repeats)
        for dtype in (torch.float32, torch.float64)
    }
    products = torch.get_float32_matmul_precision()  # "highest": float32 it is, no TF32
    here = {"device": name, "tflops_peak": peaks, "float32_matmul_precision": products}
    return description() | here


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    precisions = [precision.name.lower() for precision in list(Precision)[:2]]
    parser.add_argument("--precisions", nargs="+", choices=precisions, default=["float32"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="append results to this file")
    chosen = parser.parse_args(argv)
    here = machine_of(chosen.device, chosen.repeats)
    checks = check(chosen.device)
    for result in checks:
        append(result | {"machine": here}, chosen.json)
    for shape in SHAPES:
        for precision in chosen.precisions:
            result = timed(shape.scaled(chosen.scale), chosen.device, precision, chosen.repeats)
            append(result | {"machine": here}, chosen.json)
    return int(not all(result["agrees"] for result in checks))


if __name__ == "__main__":
    sys.exit(main())

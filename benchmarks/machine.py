"""What a benchmark ran on: versions, hardware, and the matrix-product peak that it measured.

python benchmarks/machine.py
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "torch",
    "numpy",
    "scipy",
    "ray",
    "scikit-learn",
    "scikit-learn-intelex",
    "daal",
    "torchgmm",
    "pyspark",
)
_DTYPES = (torch.float32, torch.float64)
_SIZE = 1536  # three matrices of 9 MB (float32): large products, and near the cache


def description() -> dict[str, Any]:
    """Return versions and hardware as values that JSON can hold."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_model(),
        "cores": n_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": _versions(),
    }


def n_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def append(result: dict[str, Any], path: Path | None) -> None:
    """Append one result as a line of JSON to a file, or print it."""
    line = json.dumps(result)
    if path is None:
        print(line, flush=True)
        return
    with path.open("a") as file:
        file.write(line + "\n")


def matrix_peaks(n_processes: int, *, repeats: int = 3, seconds: float = 1.0) -> dict[str, float]:
    """Return GFLOP/s of square matrix products, in all processes together at the same time.

    Each process has one thread; the values, float32's and float64's, are the medians of
    `repeats` measurements.
    """
    context = multiprocessing.get_context("spawn")
    barrier, rates = context.Barrier(n_processes), context.Queue()
    arguments = (repeats, seconds, barrier, rates)
    workers = [context.Process(target=_measure, args=arguments) for _ in range(n_processes)]
    for worker in workers:
        worker.start()
    answers = [rates.get() for _ in workers]
    for worker in workers:
        worker.join()
    return {
        str(dtype).removeprefix("torch."): float(
            statistics.median(
                sum(rounds) for rounds in zip(*(a[dtype] for a in answers), strict=True)
            )
        )
        for dtype in _DTYPES
    }


def peaks(*, repeats: int = 3, seconds: float = 1.0) -> dict[str, float]:
    """Return the peaks in GFLOP/s of one process, and of one process per core."""
    return {
        f"{name}_{label}": round(rate, 1)
        for n, label in ((1, "1_process"), (n_cores(), "all_cores"))
        for name, rate in matrix_peaks(n, repeats=repeats, seconds=seconds).items()
    }


def workers_peak(driver: int) -> int:
    """Return the peak of resident memory, KiB, among the Ray actors that a process began."""
    parents, peaks = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, KeyError, ValueError):
            status = dict(
                line.split(":\t", 1) for line in (entry / "status").read_text().splitlines()
            )
            parents[int(entry.name)] = int(status["PPid"])
            if (entry / "cmdline").read_bytes().startswith(b"ray::ShardActor"):
                peaks[int(entry.name)] = int(status["VmHWM"].split()[0])

    def is_ours(pid: int) -> bool:
        return pid == driver or (pid in parents and is_ours(parents[pid]))

    return max((peak for pid, peak in peaks.items() if is_ours(pid)), default=0)


def _measure(repeats: int, seconds: float, barrier: Barrier, rates: Any) -> None:
    torch.set_num_threads(1)
    rates.put({dtype: _rates(dtype, repeats, seconds, barrier) for dtype in _DTYPES})


def _rates(dtype: torch.dtype, repeats: int, seconds: float, barrier: Barrier) -> list[float]:
    a, b = torch.rand(_SIZE, _SIZE, dtype=dtype), torch.rand(_SIZE, _SIZE, dtype=dtype)
    out = torch.mm(a, b)
    answers = []
    for _ in range(repeats):
        barrier.wait()
        count, began = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds:
            torch.mm(a, b, out=out)
            count += 1
        answers.append(2 * _SIZE**3 * count / elapsed / 1e9)
    return answers


def _cpu_model() -> str:
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


if __name__ == "__main__":
    print(json.dumps(description() | {"gflops": peaks()}, indent=2))

"""Measure what sweeps of a few sizes need: memory of each worker, and seconds of each phase.

python benchmarks/sizing.py --json sizing.jsonl
python benchmarks/sizing.py --shapes 20000:4 --k 2,3 --num-workers 2

Runs jobs/sweep.py as a user starts it, its own Ray included, on rows of blobs about 3 standard
deviations apart. Phases are told apart by the lines of the job's log. `worker_gib` is the largest
resident memory of a worker at its peak, all that it has loaded (Python, torch, Arrow) included.
Prints a table in Markdown; times are those of this machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import machine
import pyarrow.parquet as pq

_JOB = Path(__file__).parent.parent / "jobs" / "sweep.py"
_SHAPES = ("300000:8", "1000000:16", "3000000:16", "1000000:64")
_ROWS_PER_FILE, _BLOBS = 500_000, 8

# The line of the log that each phase begins with.
_PHASES = {
    "start": r"starting Ray",
    "load": r"\d+ shards? on \d+ worker",
    "search": r"choosing the best of",
    "passes": r"pass 1:",
    "commit": r"committing",
}
_HEAD = (
    "| rows | features | workers | memory per worker, GiB | start, s | load, s | search, s | "
    "passes, report, s | passes | in all, min |\n|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> int:
    options = _options().parse_args()
    facts = {"machine": machine.description(), "k": options.k, "type": options.covariance_type}
    print(_HEAD)
    for shape in options.shapes:
        n, d = map(int, shape.split(":"))
        folder = Path(tempfile.mkdtemp(prefix="sizing-", dir=options.folder))
        try:
            _write(folder / "lake", n, d)
            found = _sweep(folder, options)
        finally:
            shutil.rmtree(folder)
        if options.json is not None:
            row = {"benchmark": "sizing", "rows": n, "features": d}
            machine.append({**row, "workers": options.num_workers, **found, **facts}, options.json)
        print(_row(n, d, options.num_workers, found), flush=True)
    return 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=_SHAPES, metavar="ROWS:FEATURES")
    parser.add_argument("--k", default="2..12", help="as jobs/sweep.py takes it")
    parser.add_argument("--covariance-type", default="full")
    parser.add_argument("--num-workers", type=int, default=machine.n_cores())
    parser.add_argument("--folder", type=Path, help="where the lakes are made (default: temporary)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append results to this file")
    return parser


def _write(folder: Path, n: int, d: int) -> None:
    """Write a lake, file by file."""
    folder.mkdir()
    edges = [*range(0, n, _ROWS_PER_FILE), n]
    for i, (first, stop) in enumerate(itertools.pairwise(edges)):
        table = datasets.blobs(stop - first, d, _BLOBS, distance=3.0, seed=i)
        pq.write_table(table, folder / f"part-{i:03}.parquet")


def _sweep(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run the job, and return what its workers and its phases took."""
    command = [_JOB, folder / "lake", "--output", folder / "model", "--k", options.k]
    command += ["--covariance-type", options.covariance_type, "--num-workers", options.num_workers]
    watched = _watched([sys.executable, *map(str, command)])
    missed = [phase for phase in _PHASES if phase not in watched.begins]
    if watched.status or missed or not watched.peak:
        raise RuntimeError(
            f"sweep.py ended with status {watched.status}, phases not seen: {missed}; peak "
            f"{watched.peak} KiB; its log ends with: {watched.last}"
        )
    begins = [watched.begins[phase] for phase in _PHASES if phase != "start"]
    edges = itertools.pairwise([0.0, *begins, watched.seconds])
    phases = {name: round(b - a, 2) for name, (a, b) in zip(_PHASES, edges, strict=True)}
    report = json.loads((folder / "model" / "sweep.json").read_text())
    return {
        "worker_gib": watched.peak / 2**20,
        "seconds": watched.seconds,
        "phases": phases,
        "n_passes": report["n_passes"],
    }


@dataclass
class _Watched:
    """What was seen of a job: seconds from its start, and KiB."""

    begins: dict[str, float] = field(default_factory=dict)
    last: str = ""
    peak: int = 0
    seconds: float = 0.0
    status: int = 0


def _watched(command: list[str]) -> _Watched:
    """Run a job; note when each phase begins, and look now and then at its workers' memory."""
    seen, began = _Watched(), time.perf_counter()

    def read(lines: Iterable[str]) -> None:
        for seen.last in lines:
            for phase, pattern in _PHASES.items():
                if re.search(pattern, seen.last):
                    seen.begins.setdefault(phase, time.perf_counter() - began)

    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        reader = threading.Thread(target=read, args=(process.stderr,))
        reader.start()
        while process.poll() is None:
            seen.peak = max(seen.peak, machine.workers_peak(process.pid))
            time.sleep(0.2)
        reader.join()
    seen.seconds, seen.status = time.perf_counter() - began, process.returncode
    return seen


def _row(n: int, d: int, workers: int, found: dict[str, Any]) -> str:
    spans = [f"{found['phases'][phase]:.1f}" for phase in ("start", "load", "search", "passes")]
    cells = [f"{n:,}", d, workers, f"{found['worker_gib']:.2f}", *spans, found["n_passes"]]
    return f"| {' | '.join(map(str, cells))} | {found['seconds'] / 60:.1f} |"


if __name__ == "__main__":
    sys.exit(main())

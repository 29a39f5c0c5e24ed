"""Contenders side by side: a process each, interleaved rounds, medians, and the same answer."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from contenders import CONTENDERS
from machine import n_cores
from problems import Mixture, Problem, load_mixtures, mean_log_likelihood

N_CHECKED = 20_000
"""Rows on which the fitted mixtures are compared."""

_REFERENCES = ("sklearn-f64", "ours-f64", "onedal-f64")
_PAUSE = 0.3  # seconds before each run: threads of the one before spin for a while


@dataclass
class Lap:
    """What one contender did on one problem; `failure` says why there is nothing else."""

    name: str
    runs: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None
    log_likelihoods: list[float] = field(default_factory=list)
    difference: float | None = None

    @property
    def seconds(self) -> float:
        """The median time of a run."""
        return float(statistics.median(run["seconds"] for run in self.runs))

    @property
    def per_iteration(self) -> float:
        return self.seconds / int(self.runs[0]["iterations"])

    @property
    def per_e_step(self) -> float:
        return self.seconds / int(self.runs[0]["e_steps"])

    @property
    def pass_seconds(self) -> float | None:
        """The median time of one of our passes, without the M-steps between them."""
        if "pass_seconds" not in self.runs[0]["details"]:
            return None
        details = [run["details"] for run in self.runs]
        return float(statistics.median(d["pass_seconds"] / d["passes"] for d in details))

    @property
    def agrees(self) -> bool:
        return self.difference is not None and self.difference <= CONTENDERS[self.name][1]


class _Process:
    """A contender's process, which holds the data and waits between its runs."""

    def __init__(self, name: str, folder: Path, log: IO[str]) -> None:
        threads = str(n_cores())
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        # -P would hide the modules beside contenders.py; the package is found from here.
        here = Path(__file__).parent
        paths = [str(here.parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | dict.fromkeys(names, threads)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        command = [sys.executable, str(here / "contenders.py"), name, str(folder)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
        )

    def read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            return {"failed": f"the process ended with status {self._process.wait()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, iterations: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        time.sleep(_PAUSE)
        self._process.stdin.write(f"{iterations}\n")
        self._process.stdin.flush()
        return self.read()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def race(
    names: Sequence[str],
    problem: Problem,
    *,
    iterations: int,
    repeats: int,
    warm_up: int = 2,
    log: Path | None = None,
) -> list[Lap]:
    """Run every contender `repeats` times, A B C A B C ..., after a warm-up of a few iterations.

    The contenders' stderr goes to `log`.
    """
    laps = [Lap(name) for name in names]
    with tempfile.TemporaryDirectory() as scratch, (log or Path(os.devnull)).open("a") as stderr:
        folder = Path(scratch)
        problem.save(folder)
        processes = {name: _Process(name, folder, stderr) for name in names}
        try:
            for lap in laps:
                _note(lap, processes[lap.name].read())
            for lap in _standing(laps) if warm_up else []:
                _note(lap, processes[lap.name].run(warm_up))
            for _ in range(repeats):
                for lap in _standing(laps):
                    answer = processes[lap.name].run(iterations)
                    if _note(lap, answer):
                        lap.runs.append(answer)
        finally:
            for process in processes.values():
                process.close()
        fitted = {lap.name: load_mixtures(folder / f"{lap.name}.npz") for lap in _standing(laps)}
    _compare(laps, fitted, problem)
    return laps


def _note(lap: Lap, answer: dict[str, Any]) -> bool:
    lap.failure = answer.get("skipped") or answer.get("failed")
    return lap.failure is None


def _standing(laps: Iterable[Lap]) -> list[Lap]:
    return [lap for lap in laps if lap.failure is None]


def _compare(laps: list[Lap], fitted: dict[str, list[Mixture]], problem: Problem) -> None:
    """Score what each contender fitted, by one float64 formula, and hold it to the reference."""
    for lap in _standing(laps):
        try:
            lap.log_likelihoods = [
                mean_log_likelihood(m, problem.X, rows=N_CHECKED) for m in fitted[lap.name]
            ]
        except np.linalg.LinAlgError:
            lap.failure = "failed: fitted a covariance that is not positive definite"
    reference = reference_of(laps)
    for lap in _standing(laps):
        assert reference is not None
        pairs = zip(lap.log_likelihoods, reference.log_likelihoods, strict=True)
        lap.difference = max(abs(mine - theirs) for mine, theirs in pairs)


def reference_of(laps: Iterable[Lap]) -> Lap | None:
    """Return the contender that the others are held to: scikit-learn in float64 where it ran."""
    standing = {lap.name: lap for lap in _standing(laps)}
    for name in _REFERENCES:
        if name in standing:
            return standing[name]
    return next(iter(standing.values()), None)


def table(title: str, laps: Sequence[Lap], peaks: dict[str, float], flops: float) -> str:
    """Return a Markdown table of one race; `flops` is what one of our passes multiplies."""
    lines = [
        f"### {title}",
        "",
        "| contender | s / E-step | s / iteration | times oneDAL f32 | times scikit-learn "
        "| our pass alone, s | of matrix peak | difference, nats/row |",
        "|---|---|---|---|---|---|---|---|",
    ]
    reference = reference_of(laps)
    by_name = {lap.name: lap for lap in _standing(laps)}
    bases = [by_name.get("onedal-f32"), by_name.get("sklearn-f64")]
    for lap in laps:
        if lap.failure is not None:
            lines.append(f"| {lap.name} | {lap.failure} |||||||")
            continue
        ratios = [f"{lap.per_e_step / base.per_e_step:.2f}" if base else "" for base in bases]
        share = peak_fraction(lap, peaks, flops)
        cells = [
            lap.name,
            f"{lap.per_e_step:.4f}",
            f"{lap.per_iteration:.4f}",
            *ratios,
            "" if lap.pass_seconds is None else f"{lap.pass_seconds:.4f}",
            "" if share is None else f"{share:.0%}",
            "reference" if lap is reference else _difference(lap),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if reference is not None:
        lines += [
            "",
            "Seconds are medians; below 1 in a column of times is faster. Difference: between the "
            f"mean log-likelihoods, on at most {N_CHECKED:,} rows and by one float64 formula, of "
            f"what the contender and {reference.name} fitted; allowed 1e-4 in float32, "
            "1e-6 in float64.",
        ]
    return "\n".join(lines) + "\n"


def _difference(lap: Lap) -> str:
    return f"{lap.difference:.1e}" + ("" if lap.agrees else " **disagrees**")


def peak_fraction(lap: Lap, peaks: dict[str, float], flops: float) -> float | None:
    """Return which part of the measured matrix-product peak one of our passes reaches."""
    details = lap.runs[0]["details"]
    if lap.pass_seconds is None or 0 < details["float64_passes"] < details["passes"]:
        return None
    passes_per_round = details["passes"] / lap.runs[0]["iterations"]
    dtype = "float64" if details["float64_passes"] else "float32"
    peak = peaks.get(f"{dtype}_all_cores")
    per_round = lap.pass_seconds * passes_per_round
    return None if peak is None else flops / per_round / (peak * 1e9)


def results(
    benchmark: str, problem: Problem, laps: Sequence[Lap], on: dict[str, Any], flops: float
) -> Iterable[dict[str, Any]]:
    """Yield one result per contender, as values that JSON can hold."""
    shape = problem.shape
    common = {
        "benchmark": benchmark,
        "shape": {
            "n": shape.n,
            "d": shape.d,
            "k": shape.k,
            "covariance_type": shape.covariance_type,
        },
        "flops_per_pass": flops,
    }
    for lap in laps:
        result = common | {"contender": lap.name, "failure": lap.failure}
        if lap.failure is None:
            result |= {
                "seconds": [run["seconds"] for run in lap.runs],
                "iterations": lap.runs[0]["iterations"],
                "e_steps": lap.runs[0]["e_steps"],
                "seconds_per_iteration": lap.per_iteration,
                "seconds_per_e_step": lap.per_e_step,
                "pass_seconds": lap.pass_seconds,
                "peak_fraction": peak_fraction(lap, on["gflops"], flops),
                "details": lap.runs[-1]["details"],
                "log_likelihood": lap.log_likelihoods,
                "difference": lap.difference,
                "agrees": lap.agrees,
            }
        yield result | {"machine": on}

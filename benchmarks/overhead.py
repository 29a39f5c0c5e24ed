"""Time what a sweep's driver does besides waiting: checkpoints, calls, sums, M-steps.

python benchmarks/overhead.py --json overhead.jsonl
python benchmarks/overhead.py --part checkpoints --pass-seconds 0.1 --repeats 1 --iterations 4
python benchmarks/overhead.py --part driver --actors 2 --pass-seconds 0.1 --iterations 4

Two parts, both on Ray on this machine. `checkpoints`: the same fit with checkpoints after each
pass and without, in interleaved rounds, on one actor per core; and how long the driver itself is
held up by them. `driver`: which part of an iteration the driver of many small actors works, by its
main thread's processor time; what it does not wait, on the clock, is more where it has no core
of its own. Rows are drawn so that a pass takes about as long as `--pass-seconds` says; how
long it took is in the table. Run nothing else on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import collections
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
from machine import append, description, n_cores

from gmm_dist.config import Cluster, EMConfig, FailureConfig, StartConfig
from gmm_dist.em import loop
from gmm_dist.em.lane import Lane, Snapshot, grouped, task_of
from gmm_dist.model.parameters import Parameters
from gmm_dist.runs import claim
from gmm_dist.runs.checkpoint import Checkpoint, RunIdentity, environment
from gmm_dist.selection.ranking import Candidate
from gmm_dist.selection.sweep import Standing, sweep
from gmm_dist.shards import dispatch
from gmm_dist.shards.protocol import Block, ShardRows
from gmm_dist.shards.ray_shards import RayShards, session
from gmm_dist.shards.tree_sum import TreeSum

AIMS = {"checkpoints": 0.02, "driver": 0.05}
"""The largest shares of a pass of 1 s that are aimed at."""

_ACTOR_GIB = 0.2  # by which 64 actors that have imported torch lower what is available, each
_CALIBRATION_ROWS = 16_384


@dataclass(frozen=True)
class Drawn:
    """Draw the rows of a shard, of overlapping clusters; the same each time."""

    n_rows: int
    n_features: int
    n_shards: int

    def __call__(self, shard: int) -> ShardRows:
        a, b = (self.n_rows * i // self.n_shards for i in (shard, shard + 1))
        centres = torch.randn(12, self.n_features, generator=_seeded(0))
        labels = torch.randint(12, (b - a,), generator=_seeded(2 * shard + 1))
        X = torch.randn(self.n_features, b - a, generator=_seeded(2 * shard + 2))
        X += centres[labels].T
        return ShardRows(shard=shard, blocks=[Block(X)])


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def starts(ks: Sequence[int], n_features: int) -> list[Parameters]:
    """Return a start for each k, full covariances, about random centres."""
    eye = torch.eye(n_features, dtype=torch.float64)
    return [
        Parameters(
            weights=torch.full((k,), 1 / k, dtype=torch.float64),
            means=torch.randn(k, n_features, dtype=torch.float64, generator=_seeded(k)),
            covariances=eye.repeat(k, 1, 1) * 2,
            covariance_type="full",
        )
        for k in ks
    ]


def rows_for(seconds: float, given: Sequence[Parameters], n_features: int) -> int:
    """Return how many rows a pass on all cores takes so long for, by one on few rows here."""
    lanes = [Lane.start(parameters, EMConfig(precision="float32")) for parameters in given]
    task, rows = (
        task_of(grouped(lanes), _CALIBRATION_ROWS),
        Drawn(_CALIBRATION_ROWS, n_features, 1)(0),
    )
    times = []
    for _ in range(3):
        began = time.perf_counter()
        task(rows)
        times.append(time.perf_counter() - began)
    return round(seconds * n_cores() * _CALIBRATION_ROWS / min(times))


# --- clocks


@dataclass
class Clock:
    """Seconds of the driver's main thread, by what it did, since the last lap.

    `timer` says which: those on the clock, or those of the processor, which do not grow when more
    processes want to work than there are cores. Waiting is on the clock.
    """

    timer: Callable[[], float] = time.perf_counter
    seconds: collections.Counter[str] = field(default_factory=collections.Counter)
    laps: list[dict[str, float]] = field(default_factory=list)
    _since: float = field(default_factory=time.perf_counter)
    _cpu: float = field(default_factory=time.process_time)
    _own: float = field(default_factory=time.thread_time)

    def lap(self) -> None:
        """End a lap: `wall` on the clock; processors' seconds of all threads and this one."""
        now, cpu, own = time.perf_counter(), time.process_time(), time.thread_time()
        spent = {"wall": now - self._since, "cpu": cpu - self._cpu, "own": own - self._own}
        self.laps.append(spent | self.seconds)
        self.seconds.clear()
        self._since, self._cpu, self._own = now, cpu, own

    def timed(self, label: str, call: Callable[..., Any]) -> Callable[..., Any]:
        timer = time.perf_counter if label == "wait" else self.timer

        def wrapped(*arguments: Any, **options: Any) -> Any:
            began = timer()
            try:
                return call(*arguments, **options)
            finally:
                self.seconds[label] += timer() - began

        return wrapped

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time the parts of an iteration while the block runs."""
        parts = [
            ("encode", loop, "grouped"),
            ("encode", loop, "task_of"),
            ("encode", ray, "put"),
            ("send", dispatch.Dispatcher, "_send"),
            ("wait", ray, "wait"),
            ("fetch", ray, "get"),
            ("sum", TreeSum, "push"),
            ("m_step", loop, "advance"),
        ]
        with ExitStack() as stack:
            for label, owner, name in parts:
                plain = getattr(owner, name)
                setattr(owner, name, self.timed(label, plain))
                stack.callback(setattr, owner, name, plain)
            yield


def fit(
    shards: RayShards,
    given: Sequence[Parameters],
    iterations: int,
    clock: Clock,
    output: Path | None,
) -> list[dict[str, float]]:
    """Fit all starts in the same passes; return the laps of the float32 passes but the first.

    With `output` a run is claimed there and a checkpoint taken after each pass, as the jobs do.
    """
    config = EMConfig(tol=0.0, max_iter=iterations, precision="float32")
    candidates = [Candidate(p.n_components, p.covariance_type) for p in given]
    n_features, plain = given[0].n_features, 0

    def watch(standings: Sequence[Standing]) -> None:
        nonlocal plain
        plain += all(s.is_running and s.precision == "float32" for s in standings)
        clock.lap()

    with ExitStack() as stack:
        keep = _keeper(stack, clock, output)
        clock.lap()
        clock.laps.clear()
        options: dict[str, Any] = {"n_features": n_features, "given": given}
        sweep(shards, candidates, config, StartConfig(), **options, watch=watch, keep=keep)
    return clock.laps[1 : plain + 1]


def _keeper(stack: ExitStack, clock: Clock, output: Path | None) -> Callable[..., None]:
    """Return what jobs/fitting.py does after each pass, timed, or nothing."""
    if output is None:
        return lambda number, snapshot: None
    run = stack.enter_context(claim.claim(str(output)))
    stack.callback(run.forget)
    identity = RunIdentity(plan_hash="plan", files=(), settings={}, environment=environment())
    checkpoints = run.checkpoints(identity)

    def keep(number: int, snapshot: Callable[[], Snapshot]) -> None:
        clock.timed("check", run.check)()
        taken = clock.timed("snapshot", snapshot)()
        clock.timed("put", checkpoints.put)(Checkpoint(number, taken.tensors, taken.state))

    return keep


def median(laps: Sequence[dict[str, float]], *labels: str) -> float:
    """Return the median over laps of the seconds that the labels have together."""
    return float(statistics.median(sum(lap.get(name, 0.0) for name in labels) for lap in laps))


# --- the two parts


@contextmanager
def actors(count: int, loader: Drawn) -> Iterator[RayShards]:
    """Run Ray here with so many actors, whatever the cores, and have them load their shards."""
    # Many that start at once on few cores would take too long to introduce themselves.
    at_once = {"RAY_worker_maximum_startup_concurrency": str(2 * n_cores())}
    os.environ.update(at_once, RAY_worker_register_timeout_seconds="600", RAY_AUTH_MODE="disabled")
    cluster = Cluster("local", num_workers=count, use_gpu=False)
    with session(loader, loader.n_shards, cluster, FailureConfig(grace=600)) as shards:
        shards.load()
        yield shards


def checkpoints(chosen: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Fit with and without checkpoints in turn, and compare passes."""
    given = starts(chosen.k, chosen.features)
    n_rows, n = rows_for(seconds, given, chosen.features), n_cores()
    laps: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    with ExitStack() as stack:
        shards = stack.enter_context(actors(n, Drawn(n_rows, chosen.features, 4 * n)))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=chosen.folder)))
        for i in range(chosen.repeats):
            for kept in (False, True) if i % 2 == 0 else (True, False):
                output = folder / str(i) if kept else None
                laps[kept] += fit(shards, given, chosen.iterations, Clock(), output)
    plain, kept = median(laps[False], "wall"), median(laps[True], "wall")
    parts = ("check", "snapshot", "put")
    return {
        "part": "checkpoints",
        "rows": n_rows,
        "actors": n,
        "passes": len(laps[True]),
        "pass_seconds": plain,
        "pass_seconds_with": kept,
        "share_by_difference": kept / plain - 1,
        "share": median(laps[True], *parts) / kept,
        "seconds": {name: median(laps[True], name) for name in parts},
        # Of the thread that writes them, too, which no pass waits for.
        "process_share": (median(laps[True], "cpu") - median(laps[False], "cpu")) / plain,
    }


_WORK = ("encode", "send", "fetch", "sum", "m_step", "check", "snapshot", "put")


def driver(chosen: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Time the iterations of many small actors' driver, checkpoints among its work."""
    given = starts(chosen.k, chosen.features)
    n_rows, n = rows_for(seconds, given, chosen.features), chosen.actors
    clock = Clock(time.thread_time)
    with ExitStack() as stack:
        shards = stack.enter_context(actors(n, Drawn(n_rows, chosen.features, n)))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=chosen.folder)))
        stack.enter_context(clock.watching())
        laps = fit(shards, given, chosen.iterations, clock, folder / "out")
    for lap in laps:
        lap["busy"] = lap["wall"] - lap.get("wait", 0.0)
        lap["rest"] = lap["own"] - sum(lap.get(name, 0.0) for name in _WORK)
    wall = median(laps, "wall")
    return {
        "part": "driver",
        "rows": n_rows,
        "actors": n,
        "passes": len(laps),
        "pass_seconds": wall,
        "share": median(laps, "own") / wall,
        "not_waiting_share": median(laps, "busy") / wall,
        "seconds": {name: median(laps, name) for name in (*_WORK, "rest")},
        "process_share": median(laps, "cpu") / wall,
    }


def memory_gib() -> float:
    """Return what this machine has available."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("MemAvailable:")]
    return int(line.split()[1]) / 2**20


_SHARES = {
    "share": "share",
    "share_by_difference": "with, against without",
    "not_waiting_share": "does not wait",
    "process_share": "all its threads",
}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the results of one part as a Markdown table."""
    names, shares = list(results[0]["seconds"]), [key for key in _SHARES if key in results[0]]
    titles = ["rows", "actors", "pass, s", *(_SHARES[key] for key in shares)]
    titles += [f"{name}, ms" for name in names]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for r in results:
        cells = [f"{r['rows']:,}", str(r["actors"]), f"{r['pass_seconds']:.3f}"]
        cells += [f"{r[key]:.2%}" for key in shares]
        cells += [f"{1e3 * r['seconds'][name]:.2f}" for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=list(AIMS), help="(default: both)")
    parser.add_argument("--pass-seconds", nargs="+", type=float, default=[1.0, 0.3, 0.1])
    parser.add_argument("--actors", type=int, default=64, help="of the driver (default 64)")
    parser.add_argument("--features", type=int, default=16)
    parser.add_argument(
        "--k", nargs=2, type=int, default=[2, 12], metavar=("FIRST", "LAST"), help="inclusive"
    )
    parser.add_argument("--iterations", type=int, default=12, help="of a fit (default 12)")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--folder", type=Path, help="where checkpoints go (default: as TMPDIR)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append results to this file")
    chosen = parser.parse_args()
    chosen.k = range(chosen.k[0], chosen.k[1] + 1)
    torch.set_num_threads(1)  # as the jobs' driver does
    need = chosen.actors * _ACTOR_GIB
    if chosen.part != "checkpoints" and memory_gib() < need:
        print(
            f"{chosen.actors} actors need about {need:.0f} GiB, there are {memory_gib():.0f}: "
            "give fewer --actors",
            file=sys.stderr,
        )
        return 2
    on = description()
    for part, run in (("checkpoints", checkpoints), ("driver", driver)):
        if chosen.part in (None, part):
            results = [run(chosen, seconds) for seconds in chosen.pass_seconds]
            shape = {"d": chosen.features, "k": list(chosen.k), "covariance_type": "full"}
            print(f"### {part}, K={chosen.k[0]}..{chosen.k[-1]}, d={chosen.features}, full\n")
            print(table(results), f"\nAim: less than {AIMS[part]:.0%} of a pass of 1 s.\n")
            for result in results if chosen.json else ():
                append(
                    {"benchmark": "overhead", "shape": shape} | result | {"machine": on},
                    chosen.json,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())

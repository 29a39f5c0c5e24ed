"""The kill matrix: every fault in every phase of a sweep, and whether the bits stay the same.

    python -m tools.chaos [--quick] [--cells actor:iteration s3:commit] [--seed 1] [--logs DIR]

Runs jobs/sweep.py on a small lake in S3 over several hosts (tests/support/hosts.py; needs root),
breaks something when the driver's log shows the phase, waits for the end, and compares the sha256
of model.safetensors with that of an undisturbed run. Prints a Markdown table; status 1 unless every
cell is the same.
"""

from __future__ import annotations

import argparse
import io
import itertools
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.support import hosts
from tests.support.hosts import Host, Hosts

LAKE = "s3://lake/points"
_TIMEOUT = 420.0  # seconds for one cell: a silent partition alone may take Ray 65

# The first line of the driver's log that tells of a phase.
PHASES = {
    "load": r"\d+ shards? on \d+ workers?",
    "start": r"choosing the best of \d+ starts",
    "iteration": r"pass 3:",
    "float64": r"pass \d+:.*float64",
    "checkpoint": r"checkpoint",
    "commit": r"committing",
}

ROWS, QUICK_ROWS = 280_000, 70_000  # 16 and 4 shards, on 4 workers of 2 hosts
OUTAGE, QUICK_OUTAGE = 60.0, 15.0  # seconds

# What the driver logs of a fault that it met; a fault may also strike where nothing needs it.
_MET = r"starts anew|call is repeated|storage fails|resum|works for \d+ s"

After = tuple[float, Callable[[], object]]  # seconds after the fault, and what is then done


@dataclass
class Run:
    """One driver at work, its log, and what is to be done later."""

    hosts: Hosts
    output: str
    log: Path
    options: tuple[str, ...] = ()
    extra: tuple[tuple[str, str], ...] = ()
    outage: float = 0.0  # of S3, in seconds
    process: subprocess.Popen[bytes] | None = None

    def start(self, *more: str) -> None:
        job = [sys.executable, str(hosts.ROOT / "jobs" / "sweep.py"), LAKE]
        job += ["--output", self.output, "--address", self.hosts.address, *self.options, *more]
        name = str(self.log.relative_to(self.hosts.folder))
        self.process = self.hosts.start(self.hosts.head, job, name, dict(self.extra))

    @property
    def status(self) -> int | None:
        assert self.process is not None
        return self.process.poll()

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, pattern: str, deadline: float) -> bool:
        """Wait until the log has such a line; return False when the driver ended without it."""
        while time.monotonic() < deadline:
            ended = self.status is not None
            if re.search(pattern, self.text()):
                return True
            if ended:
                return False
            time.sleep(0.01)
        return False

    def wait(self, deadline: float, later: Sequence[After] = ()) -> int | None:
        """Wait for the end, and do what is to be done meanwhile; None: not within the time."""
        began, due = time.monotonic(), sorted(later, key=lambda after: after[0])
        while (status := self.status) is None or due:
            while due and time.monotonic() - began >= due[0][0]:
                due.pop(0)[1]()
            if time.monotonic() > deadline:
                return None
            time.sleep(0.05)
        return status

    def sha256(self) -> str:
        return self.hosts.python(_SHA256, f"{self.output}/model/model.safetensors")


_SHA256 = """
import fsspec, hashlib, sys
with fsspec.open(sys.argv[1]) as file:
    print(hashlib.sha256(file.read()).hexdigest())
"""


# --- faults: each breaks something, and returns what is to be done later


def actor(run: Run, host: Host) -> list[After]:
    deadline = time.monotonic() + 30
    while True:
        try:
            run.hosts.kill_actor(host)
        except LookupError:  # still starting
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return []


def host(run: Run, host: Host) -> list[After]:
    host.kill()
    return [(8, lambda: run.hosts.join(host))]


def gone(run: Run, host: Host) -> list[After]:
    """Kill a host for good: the others have to take over."""
    host.kill()
    return []


def partition(run: Run, host: Host) -> list[After]:
    run.hosts.network.partition(host)
    return [(30, lambda: run.hosts.network.heal(host))]


def spot(run: Run, host: Host) -> list[After]:
    run.hosts.spot_drain(host, seconds=2)
    return [(8, lambda: run.hosts.join(host))]


def driver(run: Run, host: Host) -> list[After]:
    assert run.process is not None
    run.process.send_signal(signal.SIGKILL)
    run.process.wait()
    run.start("--resume")
    return []


def s3(run: Run, host: Host) -> list[After]:
    run.hosts.stop_s3()
    return [(run.outage, run.hosts.start_s3)]


def rpc(run: Run, host: Host) -> list[After]:
    return []  # the driver loses calls from its first to its last, see Matrix.cell


FAULTS: dict[str, Callable[[Run, Host], list[After]]] = {
    "actor": actor,
    "host": host,
    "gone": gone,
    "partition": partition,
    "spot": spot,
    "driver": driver,
    "s3": s3,
    "rpc": rpc,
}
# What the fault needs of the job beyond the common options.
NEEDS = {"gone": ("--grace", "10"), "driver": ("--resume",)}
# The actors have been let go of by then.
CANNOT_OCCUR = {("actor", "commit")}
QUICK = ("actor:iteration", "s3:load", "driver:iteration", "host:iteration")


@dataclass(frozen=True)
class Cell:
    """What came of one fault in one phase; `seconds` from the driver's start to its end.

    "unnoticed": the driver's log tells of no trouble, such as of S3 lost while nobody reads.
    """

    fault: str
    phase: str
    outcome: str
    seconds: float

    @property
    def is_same(self) -> bool:
        return self.outcome.startswith("same")


class Matrix:
    """Runs cells on hosts that it mends in between; logs go to `logs`, one file per run."""

    def __init__(self, hosts_: Hosts, logs: Path, *, seed: int = 0, quick: bool) -> None:
        self._hosts, self._logs, self._seed = hosts_, logs, seed
        self._options = tuple(job_options(quick=quick))
        self._outage = QUICK_OUTAGE if quick else OUTAGE
        self._help = hosts_.python(_HELP)
        logs.mkdir(parents=True, exist_ok=True)

    def undisturbed(self) -> tuple[str, list[str]]:
        """Run without faults; return the model's sha256 and the phases that its log lacks."""
        run, began = self._run("undisturbed"), time.monotonic()
        run.start()
        status = run.wait(began + _TIMEOUT)
        self._keep(run)
        if status != 0:
            raise RuntimeError(f"the undisturbed run ended with {status}:\n{run.text()[-3000:]}")
        print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)
        text = run.text()
        return run.sha256(), [p for p, line in PHASES.items() if not re.search(line, text)]

    def cell(self, fault: str, phase: str, wanted: str) -> Cell:
        """Run one cell, and mend the hosts."""
        needs = NEEDS.get(fault, ())
        if needs and needs[0] not in self._help:
            return Cell(fault, phase, f"the job has no {needs[0]}", 0)
        run, began = self._run(f"{fault}-{phase}", fault), time.monotonic()
        # Cells in any order and selection have the same victims.
        victim = random.Random(f"{self._seed} {fault} {phase}").choice(self._hosts.workers)
        run.start()
        deadline = began + _TIMEOUT
        try:
            if run.wait_for(PHASES[phase], deadline):
                status = run.wait(deadline, FAULTS[fault](run, victim))
                outcome = self._outcome(run, status, wanted)
                if fault == "driver":  # whose own log cannot tell
                    outcome = outcome.removesuffix(", unnoticed")
            else:
                outcome = f"phase not seen, status {run.status}"
        except Exception as error:  # of the fault itself; the other cells are worth their time
            outcome = f"{type(error).__name__}: {error}"
        finally:
            seconds = time.monotonic() - began
            if run.process is not None and run.status is None:
                run.process.kill()
                run.process.wait()
            self._keep(run)
            self._hosts.make_whole()
        return Cell(fault, phase, outcome, seconds)

    def log(self, cell: Cell) -> str:
        """Return the end of the driver's log; empty if the cell has not run."""
        path = self._logs / f"{cell.fault}-{cell.phase}.log"
        return path.read_text()[-3000:] if path.exists() else ""

    def _run(self, name: str, fault: str = "") -> Run:
        log = self._hosts.folder / f"{name}-{time.monotonic_ns()}.log"
        log.touch()
        options = (*self._options, *(NEEDS["gone"] if fault == "gone" else ()))
        extra = tuple(hosts.LOST_RPCS.items()) if fault == "rpc" else ()
        output = f"s3://lake/out/{log.stem}"
        return Run(self._hosts, output, log, options, extra, self._outage)

    def _outcome(self, run: Run, status: int | None, wanted: str) -> str:
        if status is None:
            return "no end"
        if status != 0:
            return f"status {status}"
        if run.sha256() != wanted:
            return "DIFFERENT"
        return "same" if re.search(_MET, run.text()) else "same, unnoticed"

    def _keep(self, run: Run) -> None:
        name = re.sub(r"-\d+$", "", run.log.stem)
        shutil.copy(run.log, self._logs / f"{name}.log")
        for log in self._hosts.folder.glob("*.log"):
            if log.stem in {"s3", "head", *(host.name for host in self._hosts.workers)}:
                shutil.copy(log, self._logs / log.name)


_HELP = """
import contextlib
from gmm_dist.commands import sweep
with contextlib.suppress(SystemExit):
    sweep.main(["--help"])
"""


def put_lake(hosts_: Hosts, *, n_rows: int, n_features: int = 8, n_files: int = 8) -> None:
    """Put a lake of six overlapping clusters into S3, the same each time."""
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(6, n_features)) * 0.7  # so near that EM takes long
    for i in range(n_files):
        X = centres[rng.integers(0, 6, n_rows // n_files)]
        X = X + rng.normal(size=X.shape)
        table = pa.table({f"x{j}": X[:, j] for j in range(n_features)})
        path = hosts_.folder / f"part-{i}.parquet"
        pq.write_table(table, path, row_group_size=n_rows // n_files // 4)
        hosts_.python(_PUT, str(path), f"{LAKE}/{path.name}")
        path.unlink()


_PUT = """
import fsspec, sys
fs, path = fsspec.core.url_to_fs(sys.argv[2])
fs.put_file(sys.argv[1], path)
"""


def job_options(*, quick: bool) -> list[str]:
    """Return the sweep's own options: minutes of passes for the matrix, seconds if quick."""
    ks, passes = ("3..4", "12") if quick else ("3..8", "40")
    # A tolerance out of reach: lanes go on in float32, then in float64.
    return ["--k", ks, "--n-init", "2", "--max-iter", passes, "--tol", "1e-12"]


def table(cells: Sequence[Cell]) -> str:
    """Return the cells as a Markdown table, a row for each fault."""
    faults = list(dict.fromkeys(cell.fault for cell in cells))
    phases = [phase for phase in PHASES if any(cell.phase == phase for cell in cells)]
    found = {(cell.fault, cell.phase): cell for cell in cells}
    out = io.StringIO()
    print("| fault |", " | ".join(phases), "|", file=out)
    print("|---|", "---|" * len(phases), sep="", file=out)
    for fault in faults:
        line = [found.get((fault, phase)) for phase in phases]
        texts = ["–" if cell is None else f"{cell.outcome}, {cell.seconds:.0f} s" for cell in line]
        print(f"| {fault} |", " | ".join(texts), "|", file=out)
    return out.getvalue()


def _pair(text: str) -> tuple[str, str]:
    fault, _, phase = text.partition(":")
    if fault not in FAULTS or phase not in PHASES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not FAULT:PHASE of {', '.join(FAULTS)} and {', '.join(PHASES)}"
        )
    return fault, phase


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.chaos", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"a small lake, {', '.join(QUICK)}")
    parser.add_argument("--cells", nargs="+", type=_pair, help="such as actor:iteration s3:commit")
    parser.add_argument("--seed", type=int, default=0, help="chooses the hosts that are hit")
    parser.add_argument(
        "--logs", type=Path, default=Path("chaos-logs"), help="(default: %(default)s)"
    )
    options = parser.parse_args(argv)
    if (why := hosts.missing()) is not None:
        print(f"cannot run: {why}", file=sys.stderr)
        return 2
    pairs = options.cells or (
        [_pair(text) for text in QUICK]
        if options.quick
        else [
            pair
            for pair in itertools.product(FAULTS, PHASES)
            if pair not in CANNOT_OCCUR and (pair[0] != "rpc" or pair[1] == "load")
        ]
    )
    with hosts.hosts(2, s3_rate="20mbit") as hosts_:
        put_lake(hosts_, n_rows=QUICK_ROWS if options.quick else ROWS)
        matrix = Matrix(hosts_, options.logs, seed=options.seed, quick=options.quick)
        wanted, unseen = matrix.undisturbed()
        print(f"sha256: {wanted}; phases without a line: {', '.join(unseen) or 'none'}", flush=True)
        cells = []
        for fault, phase in pairs:
            cells.append(matrix.cell(fault, phase, wanted))
            print(f"{fault}:{phase}: {cells[-1].outcome}, {cells[-1].seconds:.0f} s", flush=True)
            if not cells[-1].is_same:
                print(matrix.log(cells[-1]), flush=True)
    print(f"\n{table(cells)}")
    bad = [cell for cell in cells if not cell.is_same]
    print(f"{len(cells) - len(bad)} of {len(cells)} cells have the undisturbed run's bits")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

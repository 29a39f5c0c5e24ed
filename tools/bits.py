"""Fit a dozen small settings and print a hash of each result: the same code, the same list.

python tools/bits.py >before.txt, then a change that must change no bit, then
python tools/bits.py | diff before.txt -

Bits depend on the processor and on the versions of torch and numpy, so both lists come from one
machine. Each line hashes a model's parameters, the numbers of a sweep's table, or scored rows:
nothing that depends on time or place.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / part) for part in ("", "tests", "tests/support", "benchmarks")]

import datasets  # noqa: E402
import lakes  # noqa: E402
from conftest import S3Server, ray_cluster, s3_server  # noqa: E402

import gmm_dist  # noqa: E402

FAMILIES = ("full", "tied", "diag", "spherical")
SHARED_VARIANCES = ("tied-diag", "tied-spherical")
_SECONDS = 300  # for a job


def sha(*parts: bytes) -> str:
    """Return the first 16 hex digits of the SHA-256 of some bytes."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def of_arrays(*arrays: Any) -> str:
    """Return the hash of arrays: their values as float64, and their shapes."""
    values = [np.ascontiguousarray(array, dtype=np.float64) for array in arrays]
    return sha(*(part for a in values for part in (repr(a.shape).encode(), a.tobytes())))


def of_fit(out: Path | str, read: Any = None) -> str:
    """Return the hash of a fit's output: the model's tensors and the table of the sweep."""
    read = read or (lambda name: (Path(out) / name).read_bytes())
    table = json.loads(read("sweep.json"))
    numbers = {key: table[key] for key in ("best", "candidates", "criterion", "n_rows")}
    text = json.dumps(_without_time(numbers), sort_keys=True).encode()
    return sha(read("model/model.safetensors"), text)


def _without_time(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_time(v) for k, v in value.items() if "seconds" not in k}
    return [_without_time(v) for v in value] if isinstance(value, list) else value


def of_table(folder: Path) -> str:
    """Return the hash of the rows of all Parquet files below a folder, in order of their names."""
    tables = [pq.read_table(path, partitioning=None) for path in sorted(folder.rglob("*.parquet"))]
    columns = [column.to_pylist() for table in tables for column in table.columns]
    return sha(repr(columns).encode())


class Jobs:
    """Runs jobs on one cluster; each writes below `folder`."""

    def __init__(self, folder: Path, address: str, environment: dict[str, str]) -> None:
        self.folder = folder
        self._address, self._environment = address, os.environ | environment

    def command(self, job: str, *arguments: str) -> list[str]:
        """Return the command line of a job on the cluster."""
        script = str(ROOT / "jobs" / f"{job}.py")
        return [sys.executable, script, *arguments, "--address", self._address]

    def run(self, job: str, *arguments: str) -> None:
        """Run a job to its end."""
        done = subprocess.run(
            self.command(job, *arguments),
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        if done.returncode:
            raise SystemExit(
                f"error: {job} {arguments} ended with {done.returncode}: {done.stderr}"
            )

    def fit(self, name: str, job: str, data: str, *arguments: str) -> Path:
        """Run a job that fits, and return its output."""
        out = self.folder / name
        self.run(job, data, "--output", str(out), *arguments)
        return out

    def break_off(self, out: Path, *arguments: str) -> None:
        """Kill a sweep, as a spot machine goes, once it has written a checkpoint."""
        command = self.command("sweep", *arguments, "--output", str(out))
        with subprocess.Popen(command, env=self._environment, stderr=subprocess.DEVNULL) as job:
            while job.poll() is None and not list(out.glob("_checkpoints/*")):
                time.sleep(0.01)
            if job.poll() is not None:
                raise SystemExit("error: the sweep to break off ended before its first checkpoint")
            job.send_signal(signal.SIGKILL)


def lake(folder: Path) -> str:
    """Write 4,000 rows of five clusters, with weights, some missing values and three nights."""
    table = datasets.blobs(4_000, 3, 5, distance=6.0, seed=3)
    rng = np.random.default_rng(5)
    holes = np.where(rng.random(4_000) < 0.02, np.nan, table.column(1).to_numpy())
    table = table.append_column("w", pa.array(rng.integers(0, 4, 4_000) + 0.5))
    table = table.append_column("holes", pa.array(holes))
    nights = np.array(["2026-11-21", "2026-11-22", "2026-11-23"])
    table = table.append_column("night", pa.array(nights[np.arange(4_000) % 3]))
    datasets.write(table, folder, n_files=3, row_group_size=500)
    return str(folder)


def fits(jobs: Jobs, data: str, remote: str, server: S3Server) -> Iterator[tuple[str, str]]:
    """Yield the name and hash of what the four jobs make."""
    columns = [
        "--columns",
        *(name for name in pq.read_schema(next(Path(data).glob("*"))).names[:3]),
    ]
    ks = ["--k", "2..5", "--n-init", "4"]
    for family in (*FAMILIES, *SHARED_VARIANCES):
        out = jobs.fit(family, "sweep", data, *columns, *ks, "--covariance-type", family)
        yield f"sweep, {family}", of_fit(out)
    together = ["--covariance-type", *FAMILIES, "--num-workers", "2"]
    yield "sweep, all families", of_fit(jobs.fit("all", "sweep", data, *columns, *ks, *together))
    weighted = jobs.fit("w", "sweep", data, *columns, *ks, "--weight-column", "w")
    yield "sweep, weights", of_fit(weighted)
    held = jobs.fit("h", "sweep", data, *columns, *ks, "--holdout", "0.2", "--criterion", "holdout")
    yield "sweep, holdout", of_fit(held)
    for how in ("drop", "mean"):
        some = ["--columns", columns[1], "holes", "--missing", how]
        yield f"sweep, missing {how}", of_fit(jobs.fit(how, "sweep", data, *some, *ks))
    doubled = ["--precision", "float64", "--no-accelerate"]
    yield "sweep, float64", of_fit(jobs.fit("f64", "sweep", data, *columns, *ks, *doubled))
    for init in ("k-means||", "kmeans", "random", "random_from_data"):
        started = jobs.fit(f"i-{init}", "fit", data, *columns, "--k", "5", "--init", init)
        yield f"fit, {init}", of_fit(started)
    yield (
        "fit, from a model",
        of_fit(jobs.fit("start", "fit", data, *columns, "--start", str(jobs.folder / "full"))),
    )

    jobs.run("sweep", remote, "--output", f"{server.url}/out", *columns, *ks)
    fs, bucket = server.file_system(), server.url.removeprefix("s3://")
    yield "sweep, on S3", of_fit("", lambda name: fs.cat_file(f"{bucket}/out/{name}"))

    slow = [*columns, "--k", "4,7", "--tol", "0", "--max-iter", "60"]
    broken = jobs.folder / "broken"
    jobs.break_off(broken, data, *slow)
    jobs.run("sweep", data, "--output", str(broken), *slow, "--resume")
    yield "sweep, resumed", of_fit(broken)

    scored = jobs.folder / "scored"
    asked = ["--model", str(jobs.folder / "full"), "--keep", "w", "--probabilities"]
    jobs.run("score", data, "--output", str(scored), *asked, "--outliers", "0.01")
    yield "score", of_table(scored)

    registry = jobs.folder / "registry"
    for night in ("2026-11-21", "2026-11-22", "2026-11-23"):
        of_night = ["--night", night, "--partition", "night", "--registry", str(registry)]
        jobs.run("nightly", data, *columns, *ks, *of_night)
        yield f"nightly, {night}", of_fit(registry / "models" / night)


def estimators(data: str) -> Iterator[tuple[str, str]]:
    """Yield the name and hash of what the estimators and `select` make of arrays."""
    table = pq.read_table(data)
    X = np.column_stack([table.column(i).to_numpy() for i in range(3)])
    weights = table.column("w").to_numpy()
    for family in (*FAMILIES, *SHARED_VARIANCES):
        model = gmm_dist.GaussianMixture(4, covariance_type=family, random_state=0).fit(X)
        arrays = (model.weights_, model.means_, model.covariances_, model.score_samples(X))
        yield f"estimator, {family}", of_arrays(*arrays)
        if family in SHARED_VARIANCES:
            continue
        bayes = gmm_dist.BayesianGaussianMixture(
            n_components=6, covariance_type=family, random_state=0
        ).fit(X)
        yield (
            f"estimator, Bayesian {family}",
            of_arrays(bayes.weights_, bayes.means_, bayes.covariances_),
        )
    weighted = gmm_dist.GaussianMixture(3, random_state=1).fit(X, sample_weight=weights)
    yield "estimator, weights", of_arrays(weighted.weights_, weighted.means_, weighted.covariances_)
    best = gmm_dist.select(X, n_components=range(1, 5), random_state=0).best
    yield "select", of_arrays(best.weights_, best.means_, best.covariances_)


def main() -> int:
    """Print the list, a line as soon as it is known."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # servers end too
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name,
        s3_server() as server,
        ray_cluster(server) as address,
    ):
        folder = Path(name)
        jobs = Jobs(folder / "out", address, server.environment)
        data = lake(folder / "lake")
        remote = lakes.upload(Path(data), server.file_system(), f"{server.url}/points")
        for results in (estimators(data), fits(jobs, data, remote, server)):
            for name, digest in results:
                print(f"{digest}  {name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Time scoring a lake, from Parquet to Parquet, against scikit-learn on the same parameters.

python benchmarks/scoring.py --json scoring.jsonl
python benchmarks/scoring.py --rows 50000 --features 4 --k 3 --files 2

Contenders, in turn: `job` is jobs/score.py as a user starts it, its own Ray included; `one-worker`
is what one of its workers does, in a process of its own; `sklearn` reads the same files by record
batches, calls predict_proba and score_samples, and writes the same columns. Seconds are wall
clock; of `one-worker` and `sklearn` without the start of Python. `peak_rss_mib` is the largest
resident memory of any process that holds rows. Files are compared afterwards.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import machine
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.mixture import GaussianMixture

from gmm_dist.lake.plan import plan_lake
from gmm_dist.model.mixture import Mixture
from gmm_dist.model.parameters import Parameters
from gmm_dist.runs import load
from gmm_dist.runs.checkpoint import RunIdentity
from gmm_dist.scoring.files import ScoreFiles
from gmm_dist.scoring.scorer import Scoring
from gmm_dist.scoring.target import Target

_JOB = Path(__file__).parent.parent / "jobs" / "score.py"
_CONTENDERS = ("job", "one-worker", "sklearn")
_ROWS_PER_GROUP, _SKLEARN_BATCH = 1 << 18, 1 << 16
_TOLERANCE = 1e-6


def main() -> int:
    options = _options().parse_args()
    facts = {"shape": _shape(options), "machine": machine.description()}
    folder = Path(tempfile.mkdtemp(prefix="scoring-", dir=options.folder))
    try:
        _make(options, folder)
        agree = True
        for repeat in range(options.repeats):
            for name in options.contenders:
                out = folder / name
                shutil.rmtree(out, ignore_errors=True)
                lap = _lap(name, folder, out, options)
                rate = round(options.rows / lap["seconds"])
                machine.append(
                    {"benchmark": "scoring", "contender": name, "repeat": repeat}
                    | {**lap, "rows_per_second": rate, **facts},
                    options.json,
                )
        if len(options.contenders) > 1:
            agree = _agree([folder / name for name in options.contenders])
    finally:
        shutil.rmtree(folder)
    return int(not agree)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--features", type=int, default=16)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--covariance-type", choices=("full", "diag"), default="full")
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--num-workers", type=int, default=machine.n_cores())
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--contenders", nargs="+", choices=_CONTENDERS, default=list(_CONTENDERS))
    parser.add_argument("--folder", type=Path, help="where the lake is made (default: temporary)")
    parser.add_argument("--json", type=Path, help="append lines here (default: print them)")
    return parser


def _shape(options: argparse.Namespace) -> dict[str, Any]:
    names = ("rows", "features", "k", "covariance_type", "files", "num_workers")
    return {name: getattr(options, name) for name in names}


def _make(options: argparse.Namespace, folder: Path) -> None:
    """Write the lake, file by file, and a model near to its rows."""
    (folder / "lake").mkdir()
    edges = [options.rows * i // options.files for i in range(options.files + 1)]
    for i, (first, stop) in enumerate(itertools.pairwise(edges)):
        table = datasets.blobs(stop - first, options.features, options.k, distance=3.0, seed=i)
        table = table.add_column(0, "id", pa.array(range(first, stop)))
        name = folder / "lake" / f"part-{i:03}.parquet"
        pq.write_table(table, name, row_group_size=_ROWS_PER_GROUP)
    names = tuple(table.column_names[1:])
    rows = np.column_stack([table[name] for name in names]).astype(np.float64)
    with load.claim(str(folder / "model")) as attempt:
        mixture = Mixture(
            parameters=_parameters(rows, options.k, options.covariance_type), feature_names=names
        )
        provenance = load.Provenance(
            criteria={},
            status="made up",
            converged=True,
            n_iter=0,
            config={},
            plan_hash="",
            versions={},
        )
        attempt.write_model(mixture, provenance)
        attempt.commit()


def _parameters(rows: np.ndarray, k: int, kind: str) -> Parameters:
    rng = np.random.default_rng(0)
    covariance = np.cov(rows.T) / k
    one = covariance if kind == "full" else np.diag(covariance).copy()
    means = rows[rng.choice(len(rows), k, replace=False)]
    weights = rng.dirichlet(np.full(k, 5.0))
    covariances = np.stack([one * scale for scale in rng.uniform(0.5, 2, k)])
    return Parameters(
        weights=torch.from_numpy(weights),
        means=torch.from_numpy(means),
        covariances=torch.from_numpy(covariances),
        covariance_type=kind,
    )


def _lap(name: str, folder: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    if name == "job":
        return _job(folder, out, options)
    answers = multiprocessing.get_context("spawn").Queue()
    work = {"one-worker": _one_worker, "sklearn": _sklearn}[name]
    process = multiprocessing.get_context("spawn").Process(target=work, args=(folder, out, answers))
    process.start()
    lap: dict[str, Any] = answers.get(timeout=24 * 3600)
    process.join()
    return lap


def _job(folder: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run the job, and look now and then at the memory of its workers."""
    command = [sys.executable, _JOB, folder / "lake", "--model", folder / "model"]
    command += ["--output", out, "--keep", "id", "--num-workers", options.num_workers]
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen([str(word) for word in command])
    while process.poll() is None:
        peak = max(peak, machine.workers_peak(process.pid))
        time.sleep(0.1)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise RuntimeError(f"score.py ended with status {process.returncode}")
    inside = json.loads((out / "_scored" / "scored.json").read_text())["seconds"]
    return {"seconds": seconds, "seconds_inside": inside, "peak_rss_mib": round(peak / 1024)}


def _one_worker(folder: Path, out: Path, answers: Any) -> None:
    torch.set_num_threads(1)
    mixture = load.load(str(folder / "model"))
    began = time.perf_counter()
    names = mixture.feature_names
    plan = plan_lake(str(folder / "lake"), columns=names, missing="mean", keep=["id"])
    kept = pa.schema([plan.schema.field("id")])
    identity = RunIdentity(plan_hash=plan.hash, files=(), settings={})
    files = ScoreFiles(
        plan, Scoring(mixture=mixture.parameters, kept=kept), Target(str(out)), identity, "attempt"
    )
    for shard in range(len(plan.files)):
        files(shard)
    answers.put(_measured(began))


def _sklearn(folder: Path, out: Path, answers: Any) -> None:
    model, names = _reference(folder)
    out.mkdir()
    began = time.perf_counter()
    for path in sorted((folder / "lake").glob("*.parquet")):
        _sklearn_file(model, names, path, out / path.name)
    answers.put(_measured(began))


def _reference(folder: Path) -> tuple[GaussianMixture, list[str]]:
    """Return scikit-learn's mixture of the model's parameters."""
    mixture = load.load(str(folder / "model"))
    parts, kind = mixture.parameters, mixture.covariance_type
    model = GaussianMixture(mixture.n_components, covariance_type=kind)
    model.weights_, model.means_ = parts.weights.numpy(), parts.means.numpy()
    model.covariances_ = parts.covariances.numpy()
    if kind == "diag":
        model.precisions_cholesky_ = 1 / np.sqrt(model.covariances_)
    else:
        inverse = np.linalg.inv(np.linalg.cholesky(model.covariances_))
        model.precisions_cholesky_ = inverse.transpose(0, 2, 1)
    return model, list(mixture.feature_names)


def _sklearn_file(model: GaussianMixture, names: list[str], path: Path, out: Path) -> None:
    writer = None
    for batch in pq.ParquetFile(path).iter_batches(_SKLEARN_BATCH, columns=["id", *names]):
        X = np.column_stack([batch.column(name) for name in names]).astype(np.float64)
        resp = model.predict_proba(X)
        component = resp.argmax(1).astype(np.int32)
        columns = {
            "id": batch.column("id"),
            "component": component,
            "probability": resp[np.arange(len(X)), component],
            "log_density": model.score_samples(X),
        }
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(out, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _measured(began: float) -> dict[str, Any]:
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak_rss_mib": round(peak / 1024)}


def _agree(outputs: list[Path]) -> bool:
    """Say whether all contenders wrote the same of each row, to 1e-6."""
    first, *others = outputs
    worst = {"probability": 0.0, "log_density": 0.0}
    for path in sorted(first.glob("*.parquet")):
        mine = pq.read_table(path)
        for other in others:
            theirs = pq.read_table(other / path.name)
            assert theirs["id"].equals(mine["id"]), f"{other / path.name} has other rows"
            for name in worst:
                gap = np.abs(mine[name].to_numpy() - theirs[name].to_numpy()).max()
                worst[name] = max(worst[name], float(gap))
    print(f"largest differences: {worst}", file=sys.stderr)
    return max(worst.values()) < _TOLERANCE


if __name__ == "__main__":
    sys.exit(main())

"""Time passes over rows in files, beside the same passes in memory and the reading alone.

python benchmarks/spill.py --json spill.jsonl
python benchmarks/spill.py --folder /mnt/disk --gib 8 --k 4 64

One thread computes, as in a worker, and one reads ahead. Before each pass over files the operating
system is asked to forget them, so that they come from the disk. `reached` is the longer of reading
and computing, by the time of the pass that does both. Run nothing else on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import machine
import torch

from gmm_dist.em.estep import EStep
from gmm_dist.em.lane_batch import LaneBatch, Precision
from gmm_dist.model.natural import natural
from gmm_dist.model.parameters import Parameters, ParameterStack
from gmm_dist.shards.protocol import Block, ShardRows
from gmm_dist.shards.spill import Spill, SpilledShard, Store
from gmm_dist.shards.tree_sum import run_on

_HEAD = "| d | K | GiB | read alone, s | in memory, s | from files, s | GiB/s | reached |\n" + (
    "|---" * 8 + "|"
)


def mixture(k: int, d: int) -> Parameters:
    """Return k components with unit covariances."""
    generator = torch.Generator().manual_seed(0)
    return Parameters(
        weights=torch.full((k,), 1 / k, dtype=torch.float64),
        means=3 * torch.randn(k, d, generator=generator, dtype=torch.float64),
        covariances=torch.eye(d, dtype=torch.float64).repeat(k, 1, 1),
        covariance_type="full",
    )


def task_of(model: Parameters) -> EStep:
    """Return a float32 pass."""
    theta = natural(ParameterStack.of([model])).theta
    batch = LaneBatch.of([model], [theta], Precision.FLOAT32)
    return EStep((batch,), model.n_features)


def forget(shards: Sequence[SpilledShard]) -> None:
    """Have the operating system read the files anew."""
    for shard in shards:
        os.fsync(shard._file.fileno())
        os.posix_fadvise(shard._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(work: Callable[[], object], before: Callable[[], object], repeats: int) -> float:
    """Return the median of the times that some work takes."""
    times = []
    for _ in range(repeats):
        before()
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to be timed")
    parser.add_argument("--gib", type=float, default=2.0, help="of rows (default %(default)g)")
    parser.add_argument("--features", type=int, default=32)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rows", type=int, default=1 << 19, help="of a shard")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    d, n = chosen.features, chosen.rows
    n_shards = max(2, round(chosen.gib * 2**30 / (4 * d * n)))
    store, place = Store(torch.device("cpu")), Spill(folder=chosen.folder, memory=0, on_disk=0)
    X = torch.randn(d, n, generator=torch.Generator().manual_seed(1))
    rows = [ShardRows(shard=i, blocks=[Block(X)]) for i in range(n_shards)]
    files = [store.hold(one, place, []) for one in rows]
    spilled = [one for one in files if isinstance(one, SpilledShard)]
    gib = sum(one.n_bytes for one in spilled) / 2**30
    print(_HEAD)
    for k in chosen.k:
        task = task_of(mixture(k, d))

        def read() -> None:
            for _ in store.each(spilled):
                pass

        run_on(task, rows[:1], 1)
        alone = seconds(read, lambda: forget(spilled), chosen.repeats)
        memory = seconds(lambda: run_on(task, rows, n_shards), lambda: None, chosen.repeats)  # noqa: B023
        both = seconds(
            lambda: run_on(task, store.each(spilled), n_shards),  # noqa: B023
            lambda: forget(spilled),
            chosen.repeats,
        )
        reached = max(alone, memory) / both
        print(
            f"| {d} | {k} | {gib:.2f} | {alone:.2f} | {memory:.2f} | {both:.2f} | "
            f"{gib / both:.2f} | {100 * reached:.0f} % |",
            flush=True,
        )
        if chosen.json is not None:
            result = {"benchmark": "spill", "d": d, "k": k, "gib": gib, "read": alone}
            result |= {"memory": memory, "files": both, "machine": machine.description()}
            machine.append(result, chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

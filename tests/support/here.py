"""A job's rows in this process, in place of Ray's workers, and titles in place of pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Self

from gmm_dist.commands.progress import Progress
from gmm_dist.config import Cluster, FailureConfig
from gmm_dist.fitting import fit
from gmm_dist.lake.load import Counted
from gmm_dist.lake.session import load_rows
from gmm_dist.report.svg import Drawing
from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import Jobs, Loader, S, Shards, Task
from gmm_dist.shards.ray_shards import RayShards


class HereShards(RayShards):
    """Shards in this process; to those who pass them on, they are a cluster's."""

    n_workers, on_gpu = 1, False  # type: ignore[assignment]

    def __init__(self, loader: Loader, n_shards: int) -> None:
        self._loader, self._n_shards = loader, n_shards

    def worker_memory(self) -> int:
        return 1 << 40

    def __enter__(self) -> Self:
        return self

    def close(self) -> None: ...

    def replace(self, loader: Loader) -> None:
        self._loader = loader

    def load(self, watch: Callable[[int, int], None] = lambda done, rows: None) -> int:
        shards, n_rows = [], 0
        for shard in range(self.n_shards):
            shards.append(self._loader(shard))
            n_rows += shards[-1].n_rows
            watch(shard + 1, n_rows)
        self._local = LocalShards(shards)
        return n_rows

    def run(self, task: Task[S]) -> S:
        return self._local.run(task)

    def jobs(self) -> AbstractContextManager[Jobs]:  # type: ignore[override]
        return self._local.jobs()


@contextmanager
def session(
    loader: Loader,
    n_shards: int,
    cluster: Cluster,
    faults: FailureConfig | None = None,
    *,
    reserve: int = 0,
    gpu_reserve: int = 0,
) -> Iterator[RayShards]:
    """Do what `ray_shards.session` does, without a cluster."""
    yield HereShards(loader, n_shards)


@contextmanager
def resident(job: fit.Job, progress: Progress) -> Iterator[tuple[Shards, Counted]]:
    """Do what `Job.resident` does, without a cluster."""
    shards = HereShards(job.loader, job.plan.n_shards)

    def loaded(done: int, n_rows: int) -> None:
        progress.loading(done, shards.n_shards, n_rows)

    yield shards, load_rows(shards, job.loader, loaded)


def titled(
    name: str, size: tuple[float, float], draw: object, title: str, description: str
) -> Drawing:
    """Do what `svg.drawn` does, without the drawing."""
    return Drawing(f"<svg><title>{title}</title></svg>", round(size[0]))

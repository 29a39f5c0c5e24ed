"""Workers of a real Ray cluster whose GPUs are pretended: Ray hands them out, torch believes it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from pretended_cuda import Card, pretended_cuda

CARDS = {
    "0": Card(name="Pretended H100", free=60 << 30),
    "1": Card(name="Pretended H100", free=60 << 30),
    "2": Card(name="Pretended L4", capability=(8, 9), free=20 << 30, total=22 << 30),
}


def set_up() -> None:
    """Have the workers of this process pretend; Ray calls it as the process starts."""
    from gmm_dist.shards import workers

    introduce, busy = workers.ShardActor.introduce, workers.ShardActor._busy

    def introduced(self: Any) -> Any:
        with _pretended():
            return introduce(self)

    @contextmanager
    def pretending(self: Any, ticket: Any) -> Iterator[None]:
        with _pretended(), busy(self, ticket):
            yield

    patched: Callable[..., Any] = pretending
    workers.ShardActor.introduce = introduced  # type: ignore[method-assign]
    workers.ShardActor._busy = patched  # type: ignore[method-assign]


@contextmanager
def _pretended() -> Iterator[None]:
    """Pretend in this thread, where this worker has a GPU."""
    if not ray.get_gpu_ids():
        yield
        return
    # Torch sees the visible ones alone, and calls the first of them 0.
    with pretended_cuda(CARDS[os.environ["CUDA_VISIBLE_DEVICES"]]):
        yield

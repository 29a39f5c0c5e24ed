"""Workers on GPUs that a real Ray hands out: two on one node, workers on CPUs beside them.

The GPUs are pretended. Ray counts and places them like any, the workers' tensors obey CUDA's rules.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import mixtures
import pytest
import ray
from conftest import path_of_tests
from test_on_gpu import agree

from gmm_dist.config import Cluster, EMConfig, FailureConfig, StartConfig
from gmm_dist.em.estep import SumMoments
from gmm_dist.em.lane import Lane, grouped, task_of
from gmm_dist.errors import RunFailed, UserError
from gmm_dist.selection.sweep import Candidate, SweepResult, sweep
from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import Block, ShardRows
from gmm_dist.shards.ray_shards import RayShards, session
from gmm_dist.shards.workers import State

pytestmark = pytest.mark.faults  # a Ray of their own, in this process

N_SHARDS, D = 7, 3


@pytest.fixture(scope="module")
def two_cards() -> Iterator[None]:
    """Run a Ray of this process with four CPUs and two GPUs of one kind."""
    with ray_with(2):
        yield


@contextmanager
def ray_with(n_gpus: int) -> Iterator[None]:
    assert not ray.is_initialized()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    # The hook is looked up before a worker has its driver's path.
    ray.init(
        num_cpus=4,
        num_gpus=n_gpus,
        include_dashboard=False,
        runtime_env={
            "worker_process_setup_hook": "pretended_workers.set_up",
            "env_vars": {"PYTHONPATH": path_of_tests()},
        },
        log_to_driver=False,
    )
    try:
        yield
    finally:
        ray.shutdown()


def load(shard: int) -> ShardRows:
    X = mixtures.normal_rows(30 + 5 * shard, D, seed=shard).T.float().contiguous()
    return ShardRows(shard=shard, blocks=[Block(X)])


@dataclass(frozen=True)
class Places:
    """Where shards lie: (shard, device, the GPUs that the process may see, its pid)."""

    places: tuple[tuple[int, str, str, int], ...]

    def __add__(self, other: Places) -> Places:
        return Places(self.places + other.places)


def place(rows: ShardRows) -> Places:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return Places(((rows.shard, rows.device.type, visible, os.getpid()),))


def a_pass() -> object:
    starts = [mixtures.parameters(kind, 3, D) for kind in ("full", "diag")]
    lanes = [Lane.start(start, EMConfig(precision="float64")) for start in starts]
    return task_of(grouped(lanes), 300)


def shards_on(*, use_gpu: bool | None, n: int | None = None, **more: object) -> RayShards:
    return session(load, N_SHARDS, Cluster(None, n, use_gpu), **more)


def test_each_worker_has_a_gpu_of_its_own_and_cpus_work_beside_them(two_cards: None) -> None:
    with shards_on(use_gpu=None) as on_gpus, shards_on(use_gpu=False, n=2) as on_cpus:
        assert (on_gpus.n_workers, on_gpus.on_gpu) == (2, True)  # as many as there are GPUs
        assert (on_cpus.n_workers, on_cpus.on_gpu) == (2, False)
        assert ray.available_resources().get("GPU", 0) == 0
        there, here = (shards.run(place).places for shards in (on_gpus, on_cpus))
        assert {device for _, device, _, _ in there} == {"cuda"}
        assert {device for _, device, _, _ in here} == {"cpu"}
        cards = {pid: gpu for _, _, gpu, pid in there}
        assert sorted(cards.values()) == ["0", "1"]
        assert not set(cards) & {pid for _, _, _, pid in here}
        agree(on_gpus.run(a_pass()), on_cpus.run(a_pass()))


def test_any_number_of_gpus_gives_the_same_bits_and_memory_is_what_is_free(
    two_cards: None,
) -> None:
    results = []
    for n in (1, 2):
        with shards_on(use_gpu=True, n=n, gpu_reserve=1 << 30, reserve=1 << 50) as shards:
            shards.load()
            results.append(shards.run(a_pass()))
            assert shards.worker_memory() == 60 << 30
            assert shards._room() == (60 << 30) - (1 << 30)
            total = shards.run(SumMoments(D))
            assert (total.compiles, total.float64_price) == (False, 1.0)
    agree(results[0], results[1], 0.0)
    here = LocalShards([load(i) for i in range(N_SHARDS)]).run(a_pass())
    agree(results[0], here)


@pytest.mark.faults
def test_more_workers_than_gpus_wait_for_one_and_the_others_do_the_work(
    two_cards: None, caplog: pytest.LogCaptureFixture
) -> None:
    faults = FailureConfig(grace=1.0, backoff=0.05)
    with caplog.at_level(logging.INFO), shards_on(use_gpu=True, n=3, faults=faults) as shards:
        assert shards.n_workers == 3
        assert len({pid for *_, pid in shards.run(place).places}) == 2
    assert "with one GPU each" in caplog.text
    assert "workers have a Pretended H100 each" in caplog.text


@pytest.mark.faults
def test_a_lost_gpu_workers_shards_go_to_one_with_the_same_card(
    two_cards: None, caplog: pytest.LogCaptureFixture
) -> None:
    faults = FailureConfig(grace=1.0, backoff=60.0)
    with caplog.at_level(logging.INFO), shards_on(use_gpu=True, faults=faults) as shards:
        shards.load()
        before = shards.run(a_pass())
        os.kill(shards.run(place).places[0][-1], signal.SIGKILL)
        agree(shards.run(a_pass()), before, 0.0)
        assert len({pid for *_, pid in shards.run(place).places}) == 1
    assert "its 3 shards go to 1 other" in caplog.text


@pytest.mark.faults
@pytest.mark.unchecked
def test_a_search_and_its_fits_on_gpus(two_cards: None) -> None:
    """Jobs of the search find the samples on their worker's GPU; results are of the host."""

    def swept(shards: LocalShards | RayShards) -> SweepResult:
        candidates = [Candidate(k, "full") for k in (1, 2)]
        return sweep(shards, candidates, EMConfig(), StartConfig(n_init=2), n_features=D)

    results = []
    for n in (1, 2):
        with shards_on(use_gpu=True, n=n) as shards:
            shards.load()
            results.append(swept(shards))
    one, two, here = (
        [scored.fit for scored in result.scored]
        for result in (*results, swept(LocalShards([load(i) for i in range(N_SHARDS)])))
    )
    for a, b, c in zip(one, two, here, strict=True):
        agree(a.parameters, b.parameters, 0.0)
        assert a.log_likelihood / a.n_samples == pytest.approx(
            c.log_likelihood / c.n_samples, abs=1e-4
        )


@pytest.mark.faults
def test_rows_that_a_gpu_does_not_hold_are_said(two_cards: None) -> None:
    with (
        shards_on(use_gpu=True, gpu_reserve=(60 << 30) - 100) as shards,
        pytest.raises(UserError, match=r"GiB of rows, and has 0\.0 GiB for them"),
    ):
        shards.load()


@pytest.mark.faults
def test_a_lost_workers_shards_go_to_no_other_kind_of_card(
    two_cards: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray hands out two cards of one kind here; that one is another kind is what we tell it."""
    faults = FailureConfig(grace=1.0, backoff=120.0)
    with caplog.at_level(logging.WARNING), shards_on(use_gpu=True, faults=faults) as shards:
        shards.load()
        other = shards._workers[1]
        assert other.state is State.UP
        shards._crew._note_card(other, "Pretended L4")
        shards._crew.faults = replace(faults, forsaken=2.0)
        os.kill(shards.run(place).places[0][-1], signal.SIGKILL)
        wanted = (
            r"^no worker for 3 shards in \d+ s: they were summed on a Pretended H100, and who is "
            r"up has a Pretended L4, whose sums have other last bits: add machines of the same kind"
        )
        with pytest.raises(RunFailed, match=wanted):
            shards.run(a_pass())
    assert "has a Pretended L4 where it had a Pretended H100: the last bits may differ" in (
        caplog.text
    )

"""Ray actors: the same bits whatever the workers, and rows that come back after a kill."""

from __future__ import annotations

import operator
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import ray
import torch

from gmm_dist.cluster import RayShards, ScalingConfig, connected
from gmm_dist.config import EMConfig, StartConfig
from gmm_dist.errors import UserError
from gmm_dist.shards import Block, LocalShards, ShardRows
from gmm_dist.sweep import Candidate, SweepResult, sweep

N_SHARDS, D = 7, 3


def load(shard: int) -> ShardRows:
    """Make a shard of two clusters, of a length of its own."""
    generator = torch.Generator().manual_seed(shard)
    X = torch.randn(D, 300 + 50 * shard, generator=generator)
    X[:, ::2] += 6
    return ShardRows(shard, [Block(X)])


def fail_to_load(shard: int) -> ShardRows:
    if shard == 5:
        raise UserError("row 17 is NaN")
    return load(shard)


@dataclass(frozen=True)
class Value:
    """A float sum that shows the order of its additions in its last bits."""

    value: float

    def __add__(self, other: Value) -> Value:
        return Value(self.value + other.value)


def odd_sum(rows: ShardRows) -> Value:
    return Value(float(rows.blocks[0].X.double().sum()) * 0.1**rows.shard)


@dataclass(frozen=True)
class Pids:
    pids: tuple[int, ...]

    def __add__(self, other: Pids) -> Pids:
        return Pids(self.pids + other.pids)


def pid(rows: ShardRows) -> Pids:
    return Pids((os.getpid(),))


@contextmanager
def on_ray(address: str, n_workers: int | None, loader: object = load) -> Iterator[RayShards]:
    scaling = ScalingConfig(num_workers=n_workers)
    with connected(address, scaling):
        shards = RayShards(loader, N_SHARDS, scaling)  # type: ignore[arg-type]
        yield shards
        shards.close()


def fitted(shards: LocalShards | RayShards) -> SweepResult:
    candidates = [Candidate(k, "full") for k in (1, 2, 3)]
    return sweep(shards, candidates, EMConfig(), StartConfig(n_init=2), n_features=D)


def bits(result: SweepResult) -> list[bytes]:
    return [
        part.numpy().tobytes()
        for scored in result.scored
        for part in (scored.fit.parameters.means, scored.fit.parameters.covariances)
    ]


def test_one_two_and_four_workers_give_the_same_bits_as_this_process(ray_address: str) -> None:
    torch.set_num_threads(1)
    here = LocalShards([load(shard) for shard in range(N_SHARDS)])
    expected, expected_sum = bits(fitted(here)), here.run(odd_sum)
    for n_workers in (1, 2, 4):
        with on_ray(ray_address, n_workers) as shards:
            assert shards.n_workers == n_workers
            assert shards.load() == sum(300 + 50 * shard for shard in range(N_SHARDS))
            assert shards.run(odd_sum) == expected_sum
            assert bits(fitted(shards)) == expected


def test_shards_are_dealt_as_contiguous_ranges_to_as_many_workers_as_there_are_cpus(
    ray_address: str,
) -> None:
    with on_ray(ray_address, None) as shards:
        n_cpus = int(ray.cluster_resources()["CPU"])
        pids = shards.run(pid).pids
        assert shards.n_workers == n_cpus == len(set(pids))
        changes = sum(map(operator.ne, pids, pids[1:]))
        assert changes == n_cpus - 1


def test_more_workers_than_shards_are_not_started(ray_address: str) -> None:
    with on_ray(ray_address, 64) as shards:
        assert shards.n_workers == N_SHARDS


def test_a_killed_actor_comes_back_with_its_rows(ray_address: str) -> None:
    with on_ray(ray_address, 2) as shards:
        shards.load()
        before, pids = shards.run(odd_sum), set(shards.run(pid).pids)
        os.kill(min(pids), signal.SIGKILL)
        assert shards.run(odd_sum) == before
        assert min(pids) not in shards.run(pid).pids


def test_replaced_rows_are_the_ones_that_tasks_see(ray_address: str) -> None:
    with on_ray(ray_address, 2) as shards:
        shards.load()
        first = shards.run(odd_sum)
        shards.replace(load_shifted)
        shards.load()
        assert shards.run(odd_sum) != first


def load_shifted(shard: int) -> ShardRows:
    return ShardRows(shard, [Block(load(shard).blocks[0].X + 1)])


def test_a_users_error_in_a_worker_arrives_as_it_was_raised(ray_address: str) -> None:
    with (
        on_ray(ray_address, 2, fail_to_load) as shards,
        pytest.raises(UserError, match=r"^row 17 is NaN$"),
    ):
        shards.load()


def test_no_cluster_at_the_address_is_one_line() -> None:
    with (
        pytest.raises(UserError, match=r"no Ray cluster answers at 127\.0\.0\.1:1 .*--address"),
        connected("127.0.0.1:1", ScalingConfig()),
    ):
        pass


def test_a_process_that_is_connected_stays_so(ray_address: str) -> None:
    ray.init(ray_address, log_to_driver=False)
    try:
        with on_ray("127.0.0.1:1", 1) as shards:
            assert shards.load() == sum(300 + 50 * shard for shard in range(N_SHARDS))
        assert ray.is_initialized()
    finally:
        ray.shutdown()


def test_no_workers_are_refused() -> None:
    with pytest.raises(UserError, match="num_workers is 0"):
        ScalingConfig(num_workers=0)

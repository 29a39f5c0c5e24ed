"""What is large: said before anything is allocated where it does not fit, else it works."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch

from gmm_dist.em.estep import EStep
from gmm_dist.em.lane_batch import LaneBatch, Precision
from gmm_dist.em.memory import lane_bytes, require_memory
from gmm_dist.errors import UserError
from gmm_dist.lake.session import RowsNeed, require_room
from gmm_dist.model.natural import natural
from gmm_dist.model.parameters import Parameters, ParameterStack
from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import Block, ShardRows
from gmm_dist.shards.tree_sum import TreeSum, run_on


def test_bytes_grow_with_components_and_features() -> None:
    # Σ K·P of float64, several copies, P = 1 + d + d(d + 1)/2.
    full = 1 + 128 + 128 * 129 // 2
    assert lane_bytes([(1024, "full")], 128) > 8 * 1024 * full
    assert lane_bytes([(1024, "full")], 128) < 20 * 8 * 1024 * full
    assert lane_bytes([(8, "diag")], 128) < lane_bytes([(8, "full")], 128) / 20


def test_what_fits_passes() -> None:
    require_memory([(k, "full") for k in range(2, 21)], 64, 2**30)


# 54 · 12,507,501 statistics in 12 copies, and 256 rows of as many features, of 8 bytes each.
def test_what_does_not_fit_is_one_line_with_the_numbers_and_a_remedy() -> None:
    wanted = (
        r"^the statistics of 54 components with 5,000 features need 84\.2 GiB in every worker, "
        r"which has at most 2\.0 GiB: use covariance_type=.diag., smaller n_components, fewer "
        r"columns, or fewer workers per machine$"
    )
    with pytest.raises(UserError, match=wanted):
        require_memory([(k, "full") for k in range(2, 11)], 5000, 2 * 2**30)
    with pytest.raises(UserError, match="use smaller n_components"):
        require_memory([(10**6, "spherical")], 5000, 2 * 2**30)


# 2^30 rows of 64 float32 and a float64 weight are 264 GiB, 4.125 GiB in each of 64 shards.
NEED = RowsNeed(n_rows=2**30, n_features=64, n_shards=64, itemsize=4, row_bytes=8, decoded=2**30)


def test_rows_that_fit_pass_to_the_last_byte() -> None:
    resident = 8 * NEED.shard
    assert resident == 2**27 * (64 * 4 + 8)
    require_room(NEED, 8, resident + 2**30, beside=2**30)
    with pytest.raises(UserError):
        require_room(NEED, 8, resident + 2**30 - 1, beside=2**30)


def test_rows_that_do_not_fit_are_one_line_with_the_numbers_and_how_many_workers_would() -> None:
    wanted = (
        r"^1,073,741,824 rows of 64 features need 33\.0 GiB in each of 8 workers, and 1\.0 GiB "
        r"beside them, but a worker has 16\.0 GiB: use num_workers=22 on machines with as much "
        r"memory for each, fewer columns or a narrower where$"
    )
    with pytest.raises(UserError, match=wanted):
        require_room(NEED, 8, 2**34, beside=2**30)
    require_room(NEED, 22, 2**34, beside=2**30)
    with pytest.raises(UserError, match=r"but a worker has 4\.0 GiB: use fewer columns or"):
        require_room(NEED, 8, 2**32, beside=2**30)


def test_a_filter_may_leave_fewer_rows(caplog: pytest.LogCaptureFixture) -> None:
    require_room(replace(NEED, is_bound=True), 8, 2**34, beside=0)
    assert "unless the filter leaves fewer rows" in caplog.text


def test_loading_counts_the_decoded_row_group_and_the_copies_of_a_shard() -> None:
    assert NEED.loading == 2**30 + 2**24 * 64 * 24


def test_a_thousand_components_of_128_features_are_a_lane_like_any_other() -> None:
    k, d = 1024, 128
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(k, d, generator=generator, dtype=torch.float64)
    eye = torch.eye(d, dtype=torch.float64).expand(k, d, d)
    weights = torch.full((k,), 1 / k, dtype=torch.float64)
    theta = natural(
        ParameterStack.of(
            [Parameters(weights=weights, means=means, covariances=eye, covariance_type="full")]
        )
    ).theta
    task = EStep(
        (LaneBatch(covariance_type="full", precision=Precision.FLOAT32, sizes=(k,), theta=theta),),
        d,
    )
    X = means[torch.arange(600) % k] + 0.01 * torch.randn(600, d, generator=generator)
    statistics = LocalShards.of(X.float(), n_shards=2).run(task).groups[0]
    assert statistics.moments.nbytes == 8 * k * (1 + d + d * (d + 1) // 2)  # 69 MB
    expected = torch.zeros(k, dtype=torch.float64)
    expected[:600] = 1.0
    torch.testing.assert_close(statistics.moments[0], expected, rtol=1e-5, atol=1e-5)


def test_what_workers_send_follows_the_tree_not_the_number_of_shards() -> None:
    n_shards = 1000
    for n_workers in (1, 2, 4, 7, 64):
        edges = [n_shards * i // n_workers for i in range(n_workers + 1)]
        root: TreeSum[Rows] = TreeSum(n_shards)
        for a, b in itertools.pairwise(edges):
            shards = [ShardRows(shard=i, blocks=[Block(torch.zeros(1, 2))]) for i in range(a, b)]
            partials = run_on(lambda rows: Rows(rows.n_rows), shards, n_shards)
            assert len(partials) <= 2 * math.log2(n_shards)
            for partial in partials:
                root.push(partial)
        assert root.total(2 * n_shards) == Rows(2 * n_shards)


@dataclass(frozen=True)
class Rows:
    n: int

    def __add__(self, other: Rows) -> Rows:
        return Rows(self.n + other.n)

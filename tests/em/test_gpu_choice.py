"""What is chosen on a GPU: the form by predicted time, float64 by its price, chunks by memory."""

from __future__ import annotations

import logging
from dataclasses import replace

import mixtures
import pytest
import torch
from pretended_cuda import CUDA, Card, pretended_cuda, to_cuda

from gmm_dist import chunks, devices
from gmm_dist.config import EMConfig
from gmm_dist.em import estep, loop
from gmm_dist.em.estep import SumMoments
from gmm_dist.em.gpu.prices import most_survivors
from gmm_dist.em.lane import Lane, task_of
from gmm_dist.em.lane_batch import Precision
from gmm_dist.em.memory import lane_bytes
from gmm_dist.em.precision import check_every
from gmm_dist.model.covariance import COVARIANCE_TYPES
from gmm_dist.model.densities import Densities
from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import Block, ShardRows
from gmm_dist.shards.tree_sum import run_on

H100, L4 = Card(capability=(9, 0)), Card(capability=(8, 9), free=20 << 30, total=22 << 30)


def shards(n: int = 200, d: int = 3) -> LocalShards:
    X = to_cuda(mixtures.normal_rows(n, d).T.float().contiguous())
    return LocalShards([ShardRows(shard=0, blocks=[Block(X)])], n_threads=0)


def test_the_lines_cross_where_they_did_on_an_h200() -> None:
    """Near 80 survivors at 1M × 128, K = 1,024, near 3 at 10M × 64, K = 64 (gpu-measured.md)."""
    assert most_survivors("full", 1024, 128, 1.0)[1] == pytest.approx(80, rel=0.15)
    assert most_survivors("full", 64, 64, 1.0)[1] == pytest.approx(3, rel=0.15)
    # Where float64 is slow, screening pays at more survivors than in place of float32.
    float32, float64 = most_survivors("full", 1024, 128, 64.0)
    assert float32 < 80 < float64
    # Spherical and diagonal components overlap: at 600 survivors products are right.
    assert max(most_survivors("diag", 1024, 128, 1.0)) < 594


@pytest.mark.parametrize(("card", "price"), [(H100, 1.0), (L4, 64.0), (Card((99, 9)), 32.0)])
def test_the_price_of_float64_travels_with_the_moments(card: Card, price: float) -> None:
    with pretended_cuda(card):
        total = shards().run(SumMoments(3))
    here = LocalShards.of(mixtures.normal_rows(9, 3)).run(SumMoments(3))
    assert (total.float64_price, here.float64_price) == (price, 0.0)
    assert (total + here).float64_price == price


def test_where_float64_costs_the_same_auto_takes_no_float32() -> None:
    seen: dict[Card, set[Precision]] = {H100: set(), L4: set()}
    for card, forms in seen.items():
        with pretended_cuda(card):
            rows = shards()
            total = rows.run(SumMoments(3))
            start = mixtures.parameters("full", 2, 3)
            loop.fit(
                rows,
                [start],
                EMConfig(max_iter=12, tol=0.0, precision="auto"),
                total,
                watch=lambda lanes, forms=forms: forms.update(lane.precision for lane in lanes),
            )
            only = Lane.start(start, EMConfig(precision="float32"), total)
            assert only.precision is Precision.FLOAT32
            first = Lane.start(start, EMConfig(precision="auto"), total)
            assert first.precision is (Precision.FLOAT64 if card is H100 else Precision.FLOAT32)
    assert Precision.FLOAT32 not in seen[H100]


def test_where_float64_is_slow_fewer_rows_are_checked_in_it() -> None:
    assert check_every(1 << 20) == check_every(1 << 20, 1.0) == 64
    assert check_every(1 << 17) == 16
    assert check_every(1 << 17, 64.0) == 16 * 29  # 64 / 2.2: no more of a pass than on a CPU
    assert check_every(1 << 26, 64.0) == check_every(1 << 26)


def test_tf32_is_seen_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    estep._said_tf32.cache_clear()
    lanes = [Lane.start(mixtures.parameters("full", 2, 3), EMConfig(precision="float32"))]
    before = torch.get_float32_matmul_precision()

    def passes() -> None:
        with pretended_cuda(), caplog.at_level(logging.WARNING):
            rows = shards()._shards
            for _ in range(2):
                run_on(task_of([lanes], 200), rows, 1)

    passes()
    assert "TF32" not in caplog.text
    try:
        torch.set_float32_matmul_precision("high")
        assert devices.rounds_to_tf32()
        passes()
    finally:
        torch.set_float32_matmul_precision(before)
        estep._said_tf32.cache_clear()
    assert caplog.text.count("off by 0.007 nats") == 1
    assert "torch.set_float32_matmul_precision('highest')" in caplog.text


def test_chunks_are_cut_to_the_card_and_not_to_what_lies_on_it() -> None:
    def rows(card: Card) -> int:
        with pretended_cuda(card):
            return chunks.chunk_rows(8385 + 2048, CUDA)

    assert rows(H100) == (1 << 28) // (8385 + 2048)
    assert rows(Card(free=1 << 30)) == rows(H100)
    assert rows(L4) == (1 << 27) // (8385 + 2048)


def test_memory_is_counted_as_a_pass_takes_it_there() -> None:
    lanes = [(1024, "full")]
    statistics = 1024 * (1 + 128 + 128 * 129 // 2) * 8
    assert lane_bytes(lanes, 128, on_gpu=True) == 20 * statistics + (5 << 30) + (2 << 30)
    # Rows so wide that the fewest of a chunk take more than that: 2,048 of 501,501 features.
    wide = 501_501 + 2
    assert lane_bytes([(1, "full")], 1000, on_gpu=True) > 5 * 8 * 2048 * wide // 2 > 5 << 30


@pytest.mark.parametrize("free", [[79, 79], [10, 40, 60, 60], [10, 10]])
def test_free_memory_is_what_nobody_uses_once_it_no_longer_grows(
    free: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process before may still be letting go of the card."""
    told = iter(free)
    with pretended_cuda():
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(told) << 30, 80 << 30))
        monkeypatch.setattr(devices.time, "sleep", lambda seconds: None)
        assert devices.free_memory(CUDA) == max(free) << 30


def test_buffers_are_let_go_of_after_a_fit() -> None:
    with pretended_cuda():
        rows = shards()
        total = rows.run(SumMoments(3))
        config = EMConfig(max_iter=2, tol=0.0)
        loop.fit(rows, [mixtures.parameters("full", 2, 3)], config, total)
        assert getattr(estep._local, "workspace", None) is None


@pytest.mark.parametrize("at_once", [1, 1 << 26])
@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_densities_of_some_components_at_once(
    kind: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gmm_dist.model.densities._GPU_NUMBERS", at_once)
    mixture, X = mixtures.parameters(kind, 5, 4), mixtures.normal_rows(33, 4).T.contiguous()
    here = Densities.of(mixture, X.device)(X)
    with pretended_cuda():
        there = Densities.of(mixture, CUDA)(to_cuda(X)).cpu()
    torch.testing.assert_close(there, here, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("on_card", [False, True], ids=["M-step here", "M-step there"])
def test_a_fit_takes_the_screened_form_where_it_is_predicted_to_be_the_fastest(
    on_card: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small rows, and products that are dear: what a thousand components make of them."""
    truth = mixtures.parameters("full", 6, 4, seed=2, spread=8.0)
    X = mixtures.rows(truth, 400)
    starts = [truth, mixtures.parameters("full", 6, 4, seed=5, spread=8.0)]
    config = EMConfig(max_iter=12, tol=1e-9, precision="float64")
    here = LocalShards.of(X, n_shards=2, n_threads=0)
    expected = loop.fit(here, starts, config, here.run(SumMoments(4)))
    monkeypatch.setattr("gmm_dist.em.gpu.prices._PRODUCTS", 1.0)
    monkeypatch.setattr("gmm_dist.em.gpu.residence._LARGE", 0 if on_card else 1 << 60)
    forms: set[Precision] = set()
    with pretended_cuda(H100):
        rows = [
            ShardRows(shard=s.shard, blocks=[Block(to_cuda(s.blocks[0].X))]) for s in here._shards
        ]
        there = LocalShards(rows, n_threads=0)
        auto = replace(config, precision="auto")
        results = loop.fit(
            there,
            starts,
            auto,
            there.run(SumMoments(4)),
            watch=lambda lanes: forms.update(lane.precision for lane in lanes),
        )
    assert Precision.CENTRED in forms
    for result, other in zip(results, expected, strict=True):
        assert result.log_likelihood / 400 == pytest.approx(other.log_likelihood / 400, abs=1e-8)
        assert result.parameters.means.device.type == "cpu"
        assert 0 <= result.left_out <= 1.1e-9
        assert result.left_out == 0 or result.left_out > 1e-12  # by the GPU's cut


def test_a_fit_on_a_card_with_slow_float64_ends_where_a_cpus_does() -> None:
    start = mixtures.parameters("full", 2, 3)
    X = mixtures.rows(mixtures.parameters("full", 2, 3, seed=4), 300).float()
    config = EMConfig(max_iter=40, tol=1e-5, precision="auto")
    here = LocalShards.of(X, n_threads=0)
    (expected,) = loop.fit(here, [start], config, here.run(SumMoments(3)))
    forms: list[Precision] = []
    with pretended_cuda(L4):
        rows = [ShardRows(shard=0, blocks=[Block(to_cuda(here._shards[0].blocks[0].X))])]
        there = LocalShards(rows, n_threads=0)
        (result,) = loop.fit(
            there,
            [start],
            config,
            there.run(SumMoments(3)),
            watch=lambda lanes: forms.append(lanes[0].precision),
        )
    assert Precision.FLOAT32 in forms
    assert forms[-1] is not Precision.FLOAT32  # what is said of a fit is exact
    assert result.log_likelihood / 300 == pytest.approx(expected.log_likelihood / 300, abs=1e-4)

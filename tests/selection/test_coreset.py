"""A bounded sample of the rows: the coreset is what its formula says, and stands for all."""

from __future__ import annotations

import random

import mixtures
import naive
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from gmm_dist.em.estep import SumMoments
from gmm_dist.selection.coreset import Coreset, DrawCoreset, whitening
from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import Block, ShardRows
from gmm_dist.shards.tree_sum import TreeSum, run_on
from gmm_dist.streams import Stream, keyed_generator


def drawn(X, size, seed, *, edges=(), sample_weight=None) -> Coreset:
    shards = mixtures.shards(X, edges, sample_weight)
    total = shards.run(SumMoments(X.shape[1]))
    return shards.run(DrawCoreset.of(total, size, Stream.POOL, seed))


def task_of(X, size, seed=0, sample_weight=None) -> DrawCoreset:
    total = mixtures.shards(X, (), sample_weight).run(SumMoments(X.shape[1]))
    return DrawCoreset.of(total, size, Stream.POOL, seed)


def naive_probabilities(X, weight, size) -> np.ndarray:
    """Return p_i by the formula, row by row, with NumPy's pseudo-inverse."""
    rows, w = X.numpy(), weight.numpy()
    mean = sum(w[i] * rows[i] for i in range(len(rows))) / w.sum()
    covariance = sum(w[i] * np.outer(x - mean, x - mean) for i, x in enumerate(rows)) / w.sum()
    rank, inverse = np.linalg.matrix_rank(covariance), np.linalg.pinv(covariance, hermitian=True)
    distance = [float((x - mean) @ inverse @ (x - mean)) for x in rows]
    shares = [w[i] * (0.5 + distance[i] / (2 * rank)) / w.sum() for i in range(len(rows))]
    return np.array([min(1.0, size * share) for share in shares])


def probabilities(task: DrawCoreset, X, weight) -> torch.Tensor:
    return task.probabilities(task.whitening.columns(X.T), weight)


def far_cluster(n=1500, n_far=6) -> torch.Tensor:
    """Return rows (n, 2) about the origin, the last few of them in a distant small cluster."""
    X = mixtures.normal_rows(n, 2)
    X[-n_far:] += torch.tensor([60.0, -40.0], dtype=torch.float64)
    return X


@pytest.mark.parametrize("size", [1, 20, 500])
def test_probabilities_are_the_formula(size):
    X, weight = mixtures.rows(mixtures.parameters("full", 3, 3), 80), mixtures.row_weights(80)
    X = torch.cat([X, X[:, :1] - 2 * X[:, 1:2], torch.ones(80, 1)], dim=1)  # of rank 3
    expected = naive_probabilities(X, weight, size)
    found = probabilities(task_of(X, size, sample_weight=weight), X, weight)
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_the_rows_drawn_are_those_whose_uniform_is_below_their_probability():
    """A row of certain draw keeps its weight; the others' are divided by their probability."""
    X, weight = far_cluster(300, 3), mixtures.row_weights(300)
    task = task_of(X, 40, sample_weight=weight)
    p = probabilities(task, X, weight)
    assert (p == 1).any()
    assert (p < 1).any()
    found = drawn(X, 40, 0, edges=[100, 100, 170], sample_weight=weight)
    numbers = []
    for shard, (first, last) in enumerate([(0, 100), (100, 100), (100, 170), (170, 300)]):
        generator = keyed_generator(Stream.POOL, 0, shard)
        for i in range(first, last):
            if torch.rand(1, dtype=torch.float64, generator=generator) < p[i]:
                numbers.append(i)
    assert torch.equal(found.X, X[numbers])
    torch.testing.assert_close(found.sample_weight, weight[numbers] / p[numbers])
    assert set((p == 1).nonzero()[:, 0].tolist()) <= set(numbers)


def test_whitened_rows_have_unit_covariance():
    X, weight = mixtures.rows(mixtures.parameters("full", 3, 3), 200), mixtures.row_weights(200)
    scale = torch.tensor([1e-6, 1.0, 1e6, 1.0, 1.0], dtype=torch.float64)
    X = torch.cat([X, X[:, :1] + X[:, 1:2], torch.full((200, 1), 7.0)], dim=1) * scale
    X = X[:, [0, 4, 1, 2, 3]]  # the constant column before others
    whiten = whitening(mixtures.shards(X, (), weight).run(SumMoments(5)))
    Z = whiten(X)
    assert Z.shape == (200, 3)
    covariance = (Z.T * weight) @ Z / weight.sum()
    torch.testing.assert_close(covariance, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(whiten.columns(X.T), Z.T)


def test_distances_add_up_to_the_rank():
    """So the expected size needs no pass of its own, and is `size` where no p_i is cut at 1."""
    X, weight = mixtures.normal_rows(2000, 3), mixtures.row_weights(2000)
    X = torch.cat([X, X[:, :1]], dim=1)
    p = probabilities(task_of(X, 50, sample_weight=weight), X, weight)
    assert (p < 1).all()
    assert float(p.sum()) == pytest.approx(50, rel=1e-9)
    sizes = [len(drawn(X, 50, seed, sample_weight=weight).X) for seed in range(100)]
    assert np.mean(sizes) == pytest.approx(50, abs=4 * 50**0.5 / 10)


def test_the_coreset_is_unbiased_and_varies_less_than_a_uniform_sample():
    """Of the log-likelihood of a fixed mixture that knows nothing of a far small cluster."""
    X = far_cluster()
    mixture = mixtures.parameters("full", 3, 2)
    log_norm = {
        tuple(x.tolist()): v for x, v in zip(X, naive.e_step(X, mixture).log_norm, strict=True)
    }
    exact, rounds, size = sum(log_norm.values()), 300, 60

    def estimate(rows, weight):
        return sum(
            float(w) * log_norm[tuple(x.tolist())] for x, w in zip(rows, weight, strict=True)
        )

    coreset, uniform = [], []
    shards = mixtures.shards(X, [500, 900])
    total = shards.run(SumMoments(2))
    for seed in range(rounds):
        found = shards.run(DrawCoreset.of(total, size, Stream.POOL, seed))
        coreset.append(estimate(found.X, found.sample_weight))
        sample = X[torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))[:size]]
        uniform.append(estimate(sample, torch.full((size,), len(X) / size)))
    assert np.mean(coreset) == pytest.approx(exact, abs=4 * np.std(coreset) / rounds**0.5)
    assert np.std(coreset) < 0.5 * np.std(uniform)


def test_the_weight_of_the_coreset_is_unbiased_for_that_of_any_row():
    """Weights up to 1 : 50, some of them zero: each row's mean weight in many draws is its own."""
    X = mixtures.rows(mixtures.parameters("full", 2, 2), 30)
    weight = torch.arange(30, dtype=torch.float64).square() / 20
    weight[::7] = 0
    shards, rounds = mixtures.shards(X, [4, 19], weight), 1500
    total = shards.run(SumMoments(2))
    p = naive_probabilities(X, weight, 12)
    sums = torch.zeros(30, dtype=torch.float64)
    for seed in range(rounds):
        found = shards.run(DrawCoreset.of(total, 12, Stream.POOL, seed))
        numbers = (found.X[:, None] == X).all(2).nonzero()[:, 1]
        assert (weight[numbers] > 0).all()
        sums[numbers] += found.sample_weight
    for i in range(30):
        spread = float(weight[i]) * ((1 - p[i]) / p[i] / rounds) ** 0.5 if p[i] > 0 else 0.0
        assert float(sums[i]) / rounds == pytest.approx(float(weight[i]), abs=4 * spread + 1e-9)


@mixtures.FIXED
@given(n_workers=st.integers(1, 7), seed=st.integers(0, 999))
def test_the_coreset_does_not_depend_on_who_holds_which_shard(n_workers, seed):
    X = mixtures.normal_rows(100, 2)
    cut = mixtures.blocks(X, [10, 10, 35, 60, 61, 90])
    shards = [ShardRows(shard=i, blocks=[block]) for i, block in enumerate(cut)]
    order, tree = random.Random(seed), TreeSum(len(shards))
    task = task_of(X, 30)
    workers = [[] for _ in range(n_workers)]
    for shard in shards:
        order.choice(workers).append(shard)
    partials = [partial for held in workers for partial in run_on(task, held, len(shards))]
    order.shuffle(partials)
    for partial in partials:
        tree.push(partial)
    expected, found = LocalShards(shards).run(task), tree.total(100)
    assert torch.equal(found.X, expected.X)
    assert torch.equal(found.sample_weight, expected.sample_weight)


def test_chunks_and_blocks_do_not_change_which_rows_are_drawn():
    """The rows of a shard use its random numbers one after the other."""
    X = mixtures.normal_rows(9000, 2)
    task = task_of(X, 500)
    whole = task(ShardRows(shard=3, blocks=[Block(X.T.contiguous())]))
    parts = task(ShardRows(shard=3, blocks=mixtures.blocks(X, [1, 4000, 4000, 4003])))
    assert 400 < len(whole.X) < 600
    assert torch.equal(whole.X, parts.X)


def test_the_random_state_and_the_shard_decide():
    X = mixtures.normal_rows(200, 2)
    task, other = task_of(X, 50, seed=1), task_of(X, 50, seed=2)
    shard = ShardRows(shard=0, blocks=[Block(X.T.contiguous())])
    assert torch.equal(task(shard).X, task(shard).X)
    assert task(shard).X.tolist() != other(shard).X.tolist()
    assert task(shard).X.tolist() != task(ShardRows(shard=1, blocks=shard.blocks)).X.tolist()


def test_a_size_that_all_rows_reach_keeps_all_with_their_weights():
    weight = (torch.arange(30) % 3).double()
    X = torch.arange(30.0, dtype=torch.float64)[:, None]
    found = drawn(X, 10_000, 0, edges=[7, 7, 20], sample_weight=weight)
    numbers = found.X[:, 0].long()
    assert numbers.tolist() == (weight > 0).nonzero()[:, 0].tolist()
    assert torch.equal(found.sample_weight, weight[numbers])


def test_rows_that_are_all_the_same_are_drawn_uniformly():
    X, weight = torch.full((400, 3), 2.5, dtype=torch.float64), mixtures.row_weights(400)
    p = probabilities(task_of(X, 40, sample_weight=weight), X, weight)
    torch.testing.assert_close(p, (40 * weight / weight.sum()).clamp_max(1))
    assert len(drawn(X, 40, 0, sample_weight=weight).X) > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_outlier_is_drawn_and_the_others_still_stand_for_all(dtype):
    """One row at 1e9 has half the probability of its own; the rest share the other half."""
    X = mixtures.normal_rows(3000, 3)
    X[17, 1] = 1e9
    found = drawn(X.to(dtype), 200, 0, edges=[1000])
    outlier = found.X[:, 1] > 1e8
    assert found.X.dtype == found.sample_weight.dtype == torch.float64
    assert int(outlier.sum()) == 1
    assert float(found.sample_weight[outlier]) == 1.0
    assert 100 < len(found.X) < 300
    assert float(found.sample_weight.sum()) == pytest.approx(3000, rel=0.3)


def test_a_shard_without_blocks_gives_nothing():
    task = task_of(mixtures.normal_rows(20, 3), 5)
    found = task(ShardRows(shard=0, blocks=[]))
    assert found.X.shape == (0, 3)
    assert found.sample_weight.shape == (0,)


def numbered(n=60) -> Coreset:
    """Return a coreset whose rows say their own number."""
    return Coreset(torch.arange(float(n), dtype=torch.float64)[:, None], mixtures.row_weights(n))


def test_a_part_is_of_any_rows_equally_often_with_their_weights():
    whole, size, rounds = numbered(), 12, 1000
    counts = torch.zeros(60)
    for seed in range(rounds):
        part = whole.part(size, torch.Generator().manual_seed(seed))
        rows = part.X[:, 0].long()
        assert len(rows.unique()) == size  # without replacement
        assert torch.equal(part.sample_weight, whole.sample_weight[rows])
        counts[rows] += 1
    expected = rounds * size / 60
    # Without replacement the counts vary less, by 1 - size / n (and n / (n - 1)).
    statistic = float((counts - expected).square().sum() / expected / (1 - size / 60)) * 59 / 60
    assert chi2.ppf(0.001, 59) < statistic < chi2.ppf(0.999, 59)


def test_a_part_larger_than_the_whole_is_the_whole():
    part = numbered().part(100, torch.Generator().manual_seed(0))
    assert sorted(part.X[:, 0].tolist()) == list(range(60))


def test_weights_per_row_have_mean_one_and_keep_their_ratios():
    whole = numbered()
    found = whole.per_row()
    assert float(found.sample_weight.sum()) == pytest.approx(60)
    ratio = found.sample_weight / whole.sample_weight
    torch.testing.assert_close(ratio, ratio[0].expand(60))
    assert torch.equal(found.X, whole.X)


def test_a_fair_sample_has_each_row_as_often_as_it_weighs():
    """A coreset that prefers the far rows gives a sample that does not."""
    X, weight = far_cluster(), mixtures.row_weights(1500)
    wanted = float(weight[-6:].sum() / weight.sum())
    drawn_from = drawn(X, 900, 5, sample_weight=weight)
    assert (drawn_from.X[:, 0] > 30).sum() == 6
    found = [drawn_from.fair(10**6, keyed_generator(Stream.PICTURE, seed)) for seed in range(400)]
    share = sum(int((x[:, 0] > 30).sum()) for x in found) / sum(len(x) for x in found)
    estimate = float(drawn_from.sample_weight[drawn_from.X[:, 0] > 30].sum())
    assert share == pytest.approx(estimate / float(drawn_from.sample_weight.sum()), rel=0.15)
    assert share == pytest.approx(wanted, rel=0.25)


def test_a_fair_sample_is_bounded_and_the_same_again():
    coreset = drawn(far_cluster(), 400, 2)
    one, again = (coreset.fair(50, keyed_generator(Stream.PICTURE, 3)) for _ in range(2))
    assert one.shape == (50, 2)
    assert torch.equal(one, again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_draws_do_not_depend_on_torchs_default_dtype(dtype: torch.dtype) -> None:
    """A process may change it, and a lake's workers know nothing of that."""
    rows = Coreset(torch.arange(4000.0, dtype=torch.float64)[:, None], torch.ones(4000).double())

    def draw() -> list[torch.Tensor]:
        generators = [keyed_generator(Stream.POOL, 0, i) for i in range(2)]
        return [rows.part(100, generators[0]).X, rows.fair(100, generators[1])]

    before = draw()
    assert torch.get_default_dtype() is torch.float32
    torch.set_default_dtype(dtype)
    try:
        after = draw()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)

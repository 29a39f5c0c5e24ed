"""Samples are uniform and the plan's; starts are far apart, good, and never die."""

from __future__ import annotations

import random
from dataclasses import replace

import mixtures
import naive
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from gmm_dist import em
from gmm_dist.config import EMConfig, StartConfig
from gmm_dist.init import DrawSample, Sample, hard_start, k_means_plus_plus, starts
from gmm_dist.kernel import Total
from gmm_dist.parameters import COVARIANCE_TYPES
from gmm_dist.shards import LocalShards, ShardRows, TreeSum, run_on

every_type = pytest.mark.parametrize("kind", COVARIANCE_TYPES)


def numbered(n: int) -> torch.Tensor:
    """Return rows (n, 1) that say their own number."""
    return torch.arange(float(n), dtype=torch.float64)[:, None]


def drawn(n, size, seed, *, edges=(), sample_weight=None) -> Sample:
    return mixtures.shards(numbered(n), edges, sample_weight).run(DrawSample(size, seed, 1))


def test_every_row_is_drawn_as_often_as_any_other():
    n, size, rounds = 40, 12, 1000
    counts = torch.zeros(n)
    for seed in range(rounds):
        sample = drawn(n, size, seed, edges=[3, 3, 20])
        assert sample.X.shape == (size, 1)
        rows = sample.X[:, 0].long()
        assert len(rows.unique()) == size  # without replacement
        counts[rows] += 1
    expected = rounds * size / n
    # Without replacement the counts vary less, by 1 - size / n (and n / (n - 1)).
    statistic = float((counts - expected).square().sum() / expected / (1 - size / n)) * (n - 1) / n
    assert chi2.ppf(0.001, n - 1) < statistic < chi2.ppf(0.999, n - 1)


def test_rows_of_different_shards_are_drawn_independently():
    """How many come from the first half is spread as in drawing from an urn."""
    n, size, rounds = 40, 12, 600
    from_first = torch.tensor(
        [int((drawn(n, size, seed, edges=[20]).X < 20).sum()) for seed in range(rounds)]
    ).double()
    variance = size * 0.25 * (n - size) / (n - 1)
    assert float(from_first.mean()) == pytest.approx(size / 2, abs=4 * (variance / rounds) ** 0.5)
    assert float(from_first.var()) == pytest.approx(variance, rel=0.2)


@mixtures.FIXED
@given(n_workers=st.integers(1, 5), seed=st.integers(0, 999))
def test_the_sample_does_not_depend_on_who_holds_which_shard(n_workers, seed):
    cut = mixtures.blocks(numbered(100), [10, 10, 35, 60, 61, 90])
    shards = [ShardRows(i, [block]) for i, block in enumerate(cut)]
    task, order, tree = DrawSample(20, 7, 1), random.Random(seed), TreeSum(len(shards))
    workers = [[] for _ in range(n_workers)]
    for shard in shards:
        order.choice(workers).append(shard)
    partials = [partial for held in workers for partial in run_on(task, held, len(shards))]
    order.shuffle(partials)
    for partial in partials:
        tree.push(partial)
    expected, found = LocalShards(shards).run(task), tree.total(100)
    assert torch.equal(found.keys, expected.keys)
    assert torch.equal(found.X, expected.X)


def test_a_sample_of_everything_is_everything():
    weight = mixtures.row_weights(30)
    sample = drawn(30, 100, 0, edges=[7, 20], sample_weight=weight)
    order = sample.X[:, 0].long()
    assert order.sort().values.tolist() == list(range(30))
    assert torch.equal(sample.sample_weight, weight[order])


def test_rows_of_zero_weight_are_never_drawn():
    weight = (torch.arange(30) % 3).double()
    for seed in range(20):
        for size in (5, 100):
            sample = drawn(30, size, seed, edges=[10], sample_weight=weight)
            assert (sample.sample_weight > 0).all()
            assert len(sample.X) == min(size, 20)


def test_the_sample_is_float64_of_float32_rows():
    X = mixtures.normal_rows(50, 2).float()
    sample = mixtures.shards(X).run(DrawSample(10, 0, 2))
    assert sample.X.dtype == sample.sample_weight.dtype == torch.float64
    assert all((row == X.double()).all(1).any() for row in sample.X)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_seeds_are_far_apart():
    """One seed in each of six distant clusters, the smallest of three rows, whatever the draw."""
    sizes = [400, 200, 100, 50, 20, 3]
    labels = torch.repeat_interleave(torch.arange(6), torch.tensor(sizes))
    centres = 100 * torch.eye(6, dtype=torch.float64)
    X = mixtures.normal_rows(sum(sizes), 6) + centres[labels]
    ones = torch.ones(len(X), dtype=torch.float64)
    for seed in range(25):
        seeds = k_means_plus_plus(X, ones, 6, generator(seed))
        assert sorted(labels[seeds].tolist()) == list(range(6))


def test_rows_without_weight_are_no_seeds():
    X, weight = mixtures.normal_rows(60, 2), torch.ones(60, dtype=torch.float64)
    X[30:] *= 1000  # far away, and of no weight
    weight[30:] = 0
    for seed in range(10):
        assert (k_means_plus_plus(X, weight, 8, generator(seed)) < 30).all()


def test_seeds_of_a_smaller_k_are_the_first_of_a_larger():
    X, ones = mixtures.normal_rows(60, 2), torch.ones(60, dtype=torch.float64)
    few, many = (k_means_plus_plus(X, ones, k, generator(3)) for k in (4, 9))
    assert torch.equal(few, many[:4])


@every_type
def test_the_start_of_one_component_is_the_whole_sample(kind):
    X, weight = mixtures.rows(mixtures.parameters("full", 3, 2), 50), mixtures.row_weights(50)
    labels = torch.zeros(50, dtype=torch.int64)
    start = hard_start(Sample(50, weight, X, weight), labels, 1, kind)
    whole = naive.m_step(X, torch.ones(50, 1).numpy(), kind, sample_weight=weight)
    mixtures.assert_same(start, whole, rtol=1e-7)


@every_type
def test_a_start_is_positive_definite_whatever_the_partition(kind):
    X, ones = mixtures.normal_rows(40, 3), torch.ones(40, dtype=torch.float64)
    X[:, 2] = X[:, 1]  # a column twice
    labels = torch.zeros(40, dtype=torch.int64)
    labels[0] = 1  # one row; the third component has none
    start = hard_start(Sample(40, ones, X, ones), labels, 3, kind)
    matrices = torch.tensor(naive.covariance_matrices(start))
    assert (torch.linalg.cholesky_ex(matrices).info == 0).all()
    assert float(start.weights.sum()) == pytest.approx(1)
    assert (start.weights > 0).all()


CANDIDATES = [(k, kind) for kind in COVARIANCE_TYPES for k in (1, 4)]


def make_starts(X, candidates=CANDIDATES, *, edges=(), **settings):
    shards = mixtures.shards(X, edges)
    return starts(shards, candidates, EMConfig(), StartConfig(**settings), X.shape[1])


def test_the_same_random_state_gives_the_same_bits():
    X = mixtures.rows(mixtures.parameters("full", 4, 2), 300)
    X = X - X.mean(0)
    settings = {"n_init": 2, "n_sample": 100, "edges": [50, 170]}
    one, same = (make_starts(X, random_state=3, **settings) for _ in range(2))
    other = make_starts(X, random_state=4, **settings)
    for mine, theirs in zip(one, same, strict=True):
        mixtures.assert_same(mine, theirs, rtol=0, atol=0)
    assert not any(torch.equal(a.means, b.means) for a, b in zip(one, other, strict=True))


def test_there_is_one_start_for_each_candidate_in_their_order():
    X = mixtures.normal_rows(100, 2)
    found = make_starts(X, n_init=2)
    assert [(s.n_components, s.covariance_type) for s in found] == CANDIDATES


@every_type
def test_the_best_of_many_restarts_is_the_best(kind):
    """Restarts of a smaller n_init are among those of a larger one: more are never worse."""
    X = mixtures.rows(mixtures.parameters("full", 6, 2, spread=3), 400, seed=1)
    X = X - X.mean(0)
    shards = mixtures.shards(X)
    scores = []
    for n_init in (1, 2, 4, 8):
        (start,) = make_starts(X, [(6, kind)], n_init=n_init, random_state=1)
        config = EMConfig(max_iter=1, precision="float64")
        (fit,) = em.fit(shards, [start], config, shards.run(Total(2)))
        scores.append(fit.lower_bounds[0])
    assert scores == sorted(scores)
    assert scores[-1] > scores[0]


@every_type
@pytest.mark.parametrize("d", [1, 3])
def test_fewer_distinct_rows_than_components_still_run(kind, d):
    X = mixtures.normal_rows(3, d).repeat(20, 1)
    X = X - X.mean(0)
    found = make_starts(X, [(5, kind)], n_init=2)
    shards = mixtures.shards(X)
    (fit,) = em.fit(shards, found, EMConfig(), shards.run(Total(d)))
    for start in (found[0], fit.parameters):
        matrices = torch.tensor(naive.covariance_matrices(start))
        assert (torch.linalg.cholesky_ex(matrices).info == 0).all()


@every_type
def test_rows_that_are_all_the_same_still_run(kind):
    X = torch.zeros(30, 2, dtype=torch.float64)
    shards = mixtures.shards(X)
    (fit,) = em.fit(shards, make_starts(X, [(2, kind)], n_init=2), EMConfig(), shards.run(Total(2)))
    assert fit.log_likelihood == pytest.approx(naive.e_step(X, fit.parameters).log_likelihood)


def test_a_sample_smaller_than_k_still_runs():
    X = mixtures.normal_rows(200, 2)
    found = make_starts(X, [(8, "full")], n_init=2, n_sample=4)
    assert found[0].n_components == 8
    assert torch.isfinite(found[0].means).all()


def test_features_of_any_scale_seed_alike():
    """Seeds are drawn in units of each feature's spread."""
    X = _blobs()
    scale = torch.tensor([2.0**-20, 2.0**20], dtype=torch.float64)
    config = replace(EMConfig(), reg_covar=0.0)
    one, other = (
        starts(mixtures.shards(Z), [(3, "full")], config, StartConfig(n_init=2), 2)[0]
        for Z in (X, X * scale)
    )
    torch.testing.assert_close(other.means / scale, one.means, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(other.weights, one.weights, rtol=1e-3, atol=1e-3)


def _blobs():
    labels = torch.arange(200) % 3
    centres = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0]], dtype=torch.float64)
    X = mixtures.normal_rows(200, 2) + centres[labels]
    return X - X.mean(0)

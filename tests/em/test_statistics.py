"""Statistics are a commutative monoid up to rounding, so shards may be reduced in any order."""

from __future__ import annotations

import functools
import operator
import pickle
import random

import mixtures
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gmm_dist.em.estep import EStep, SumMoments
from gmm_dist.em.lane_batch import LaneBatch, Precision
from gmm_dist.em.statistics import PassStatistics, SufficientStatistics, TotalMoments
from gmm_dist.model.natural import natural
from gmm_dist.model.parameters import ParameterStack
from gmm_dist.shards.protocol import ShardRows

MIXTURE = mixtures.parameters("full", 3, 2)
STACK = ParameterStack.of([MIXTURE])
GROUP = LaneBatch(
    covariance_type="full",
    precision=Precision.FLOAT64,
    sizes=STACK.sizes,
    theta=natural(STACK).theta,
)
X = mixtures.rows(MIXTURE, 60)
SINGLE = LaneBatch(
    covariance_type="full",
    precision=Precision.FLOAT32,
    sizes=STACK.sizes,
    theta=natural(STACK).theta,
)
TASKS = {"pass": EStep((GROUP, SINGLE), 2), "moments": SumMoments(2)}


def parts(task, edges):
    """Return the statistics of each piece of the rows, computed away from this thread."""
    cut = [mixtures.shards(block.X.T) for block in mixtures.blocks(X, edges)]
    return [piece.run(task) for piece in cut]


def assert_equal_up_to_rounding(one, other):
    if isinstance(one, PassStatistics):
        assert (one.n_samples, one.checked_weight) == (other.n_samples, other.checked_weight)
        for mine, theirs in zip(one.groups, other.groups, strict=True):
            assert_equal_up_to_rounding(mine, theirs)
        return
    names = (
        ("moments", "log_likelihood", "entropy", "float32_error")
        if isinstance(one, SufficientStatistics)
        else ("sum_x", "sum_xx")
    )
    for name in names:
        mine, theirs = getattr(one, name), getattr(other, name)
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", TASKS)
@mixtures.FIXED
@given(cuts=st.lists(st.integers(0, 60), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_the_sum_does_not_depend_on_order_or_brackets(name, cuts, seed):
    pieces = parts(TASKS[name], cuts)
    from_left = functools.reduce(operator.add, pieces)
    shuffler = random.Random(seed)
    while len(pieces) > 1:
        shuffler.shuffle(pieces)
        pieces = [pieces[0] + pieces[1], *pieces[2:]]
    assert_equal_up_to_rounding(from_left, pieces[0])


@pytest.mark.parametrize("name", TASKS)
def test_an_empty_shard_is_the_identity_bit_for_bit(name):
    task = TASKS[name]
    (whole,) = parts(task, [])
    empty = mixtures.shards(X[:0]).run(task)
    no_blocks = task(ShardRows(shard=0, blocks=[]))
    for sum_ in (whole + empty, empty + whole, whole + no_blocks, no_blocks + whole):
        for mine, theirs in zip(_tensors(sum_), _tensors(whole), strict=True):
            assert torch.equal(mine, theirs)


def _tensors(value):
    if isinstance(value, PassStatistics):
        assert value.n_samples == 60
        groups = value.groups
        return [t for g in groups for t in (g.moments, g.log_likelihood, g.entropy)]
    return [value.sum_x, value.sum_xx]


def test_total_moments_give_the_mean_and_the_covariance():
    weight = mixtures.row_weights(60)
    weight[::7] = 0
    total = mixtures.shards(X, [20], weight).run(SumMoments(2))
    assert isinstance(total, TotalMoments)
    assert total.n_rows == int((weight > 0).sum())
    assert total.n_samples == pytest.approx(float(weight.sum()), rel=1e-14)
    torch.testing.assert_close(total.mean, (weight @ X) / weight.sum(), rtol=1e-12, atol=0)
    expected = torch.cov(X.T, correction=0, aweights=weight)
    torch.testing.assert_close(total.covariance, expected, rtol=1e-10, atol=1e-12)


def test_statistics_travel_without_losing_a_bit():
    sums = EStep((GROUP,), 2)(ShardRows(shard=0, blocks=mixtures.blocks(X, [20]))).groups[0]
    back = pickle.loads(pickle.dumps(sums))
    for name in ("moments", "log_likelihood", "entropy", "float32_error"):
        assert torch.equal(getattr(back, name), getattr(sums, name))
    assert torch.equal((back + sums).moments, 2 * sums.moments)

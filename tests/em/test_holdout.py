"""Held-out rows are scored as the mixture itself scores them, and touch nothing else."""

from __future__ import annotations

from dataclasses import replace

import mixtures
import pytest
import torch

from gmm_dist.em.estep import SumMoments
from gmm_dist.em.evaluate import Score, mean_log_likelihoods
from gmm_dist.model.covariance import COVARIANCE_TYPES
from gmm_dist.model.mixture import Mixture
from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import HeldOut, ShardRows

X = mixtures.normal_rows(5000, 3)
WEIGHT = mixtures.row_weights(5000)


def held_out(X, weight=None, *, edges=()) -> LocalShards:
    """Return shards without rows to be fitted, all of them held out."""
    cut = mixtures.blocks(X, edges, weight)
    return LocalShards(
        [ShardRows(shard=i, blocks=[], held_out=[block]) for i, block in enumerate(cut)]
    )


def lanes():
    return [mixtures.parameters(kind, k, 3, seed=k) for kind in COVARIANCE_TYPES for k in (1, 4)]


def test_the_mean_is_that_of_the_mixture():
    found = mean_log_likelihoods(held_out(X, edges=(7, 7, 4000)), lanes())
    expected = [Mixture(parameters=lane).score(X) for lane in lanes()]
    assert found == pytest.approx(expected, rel=1e-12)


def test_compiled_loops_give_the_same():
    shards = held_out(X, WEIGHT, edges=(7, 7, 4000))
    by_torch, by_loops = (shards.run(HeldOut(Score(tuple(lanes()), c))) for c in (False, True))
    torch.testing.assert_close(by_loops.sums, by_torch.sums, rtol=1e-13, atol=0)
    assert by_loops.n_samples == by_torch.n_samples


def test_weights_count():
    found = mean_log_likelihoods(held_out(X, WEIGHT), lanes())
    per_row = [Mixture(parameters=lane).score_samples(X) for lane in lanes()]
    expected = [float((WEIGHT * values).sum() / WEIGHT.sum()) for values in per_row]
    assert found == pytest.approx(expected, rel=1e-12)
    assert found != pytest.approx([float(values.mean()) for values in per_row], rel=1e-5)


def test_it_is_float64_whatever_the_rows_are_held_in():
    exact = mean_log_likelihoods(held_out(X.float().double()), lanes())
    assert mean_log_likelihoods(held_out(X.float()), lanes()) == exact


def test_tight_and_far_components_lose_no_digits():
    tight = replace(
        mixtures.parameters("spherical", 2, 3),
        means=torch.tensor([[1e6, 0.0, 0.0], [-1e6, 0.0, 0.0]], dtype=torch.float64),
        covariances=torch.full((2,), 1e-6, dtype=torch.float64),
    )
    rows = tight.means[torch.arange(50) % 2] + 1e-3 * X[:50]
    (found,) = mean_log_likelihoods(held_out(rows), [tight])
    assert found == pytest.approx(Mixture(parameters=tight).score(rows), rel=1e-12)


def test_a_singular_mixture_has_none_and_harms_no_other():
    broken = [replace(lane, covariances=0 * lane.covariances) for lane in lanes()]
    sound = mixtures.parameters("diag", 2, 3)
    found = mean_log_likelihoods(held_out(X), [*broken, sound])
    assert found == [
        *[None] * len(broken),
        pytest.approx(Mixture(parameters=sound).score(X), rel=1e-12),
    ]
    assert mean_log_likelihoods(held_out(X), broken) == [None] * len(broken)


def test_without_held_out_rows_there_is_none():
    for shards in (LocalShards.of(X), held_out(X, 0 * WEIGHT)):
        assert mean_log_likelihoods(shards, lanes()) == [None] * len(lanes())


def test_held_out_rows_are_in_no_other_pass():
    one = ShardRows(
        shard=0, blocks=mixtures.blocks(X[:4000], ()), held_out=mixtures.blocks(X[4000:], ())
    )
    shards = LocalShards([one])
    assert shards.run(SumMoments(3)).n_rows == 4000
    mixture = lanes()[0]
    score = Score((mixture,))
    assert shards.run(score).n_samples == 4000
    assert mean_log_likelihoods(shards, [mixture]) == pytest.approx(
        [Mixture(parameters=mixture).score(X[4000:])], rel=1e-12
    )

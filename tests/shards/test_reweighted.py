"""Weights count relative to each other: their unit changes nothing but the n of the criteria."""

from __future__ import annotations

import functools
import math
import re

import mixtures
import numpy as np
import pytest
import torch

from gmm_dist import GaussianMixture, select
from gmm_dist.config import EMConfig
from gmm_dist.em.estep import SumMoments
from gmm_dist.selection.kmeans import start_of
from gmm_dist.shards.reweighted import Reweighted, unit_of

LABELS = np.arange(400) % 4 > 0
X = np.random.default_rng(5).normal(size=(400, 2)) + 6.0 * LABELS[:, None]
WEIGHT = np.random.default_rng(6).uniform(0.5, 1.5, 400)

pytestmark = pytest.mark.unchecked  # long fits


def chosen(weight):
    return _chosen(tuple(weight))


@functools.cache
def _chosen(weight):
    """Each once, however many tests compare with it."""
    return select(X, [1, 2, 3], ("full", "diag"), sample_weight=np.array(weight), n_init=2)


def figures(found):
    """Return what must not depend on the weights' unit."""
    return [
        (
            s.candidate,
            s.fit.status,
            s.fit.n_iter,
            s.fit.lower_bounds,
            s.fit.parameters.means.tolist(),
            s.fit.parameters.covariances.tolist(),
        )
        for s in found.result.scored
    ]


@pytest.mark.parametrize("exponent", [-996, -30, 9, 980])
def test_a_power_of_two_on_all_weights_changes_no_bit(exponent):
    """1.5e-300, 1e-9, 512, 1e295: the weights' digits are the same, and so is all arithmetic."""
    plain, scaled = chosen(WEIGHT), chosen(WEIGHT * 2.0**exponent)
    assert figures(scaled) == figures(plain)
    if exponent < 0:  # else n outweighs every penalty
        assert scaled.rows()[0]["k"] == 2


@pytest.mark.parametrize("scale", [1 / WEIGHT.sum(), 1e-300, 3e7])
def test_any_unit_of_the_weights_gives_the_same_model(scale):
    plain, scaled = (
        GaussianMixture(2, random_state=0).fit(X, sample_weight=w) for w in (WEIGHT, WEIGHT * scale)
    )
    np.testing.assert_allclose(scaled.means_, plain.means_, rtol=1e-9)
    np.testing.assert_allclose(scaled.covariances_, plain.covariances_, rtol=1e-9, atol=1e-12)
    assert (scaled.n_iter_, scaled.converged_) == (plain.n_iter_, plain.converged_)


def test_weights_that_sum_to_one_count_as_kish_counts_them():
    plain, share = chosen(WEIGHT), chosen(WEIGHT / WEIGHT.sum())
    n = WEIGHT.sum() ** 2 / (WEIGHT**2).sum()
    assert plain.result.n_samples == pytest.approx(WEIGHT.sum())
    assert share.result.n_samples == pytest.approx(n)
    assert share.rows()[0]["k"] == 2
    best = share.result.best
    expected = -2 * n * best.mean_log_likelihood + best.n_parameters * math.log(n)
    assert best.bic == pytest.approx(expected)
    (note,) = [line for line in share.warnings() if "weights sum to" in line]
    assert "over 400 rows" in note
    assert f"{n:,.1f}" in note
    assert not any("weights sum to" in line for line in plain.warnings())


@pytest.mark.parametrize("weight", [1e308, 1.7e308, 1e291])
def test_weights_whose_sum_is_none_count_as_kish_counts_them(weight):
    found, same = chosen(np.full(400, weight)), chosen(np.full(400, weight * 2.0**-1000))
    assert figures(found) == figures(same)
    assert found.result.n_samples == pytest.approx(400)
    assert found.rows()[0]["k"] == 2
    best = found.result.best
    expected = -2 * 400 * best.mean_log_likelihood + best.n_parameters * math.log(400)
    assert best.bic == pytest.approx(expected)
    (note,) = found.warnings()
    assert re.match(r"the weights sum to (more than float64 holds|4e\+293) over 400 rows", note)


def test_light_rows_beside_the_heaviest_there_are():
    heavy, plain = (np.where(LABELS, w, w / 4) for w in (1.7e308, 1.0))
    found, expected = chosen(heavy), chosen(plain)
    assert found.rows()[0]["k"] == expected.rows()[0]["k"]
    model, other = (
        GaussianMixture(2, random_state=0).fit(X, sample_weight=w) for w in (heavy, plain)
    )
    np.testing.assert_allclose(model.means_, other.means_, rtol=1e-9)


def test_a_cluster_of_light_rows_has_its_rows():
    """A hundred rows that weigh a thousandth each are a hundred rows, not a tenth of one."""
    rows, weight = torch.tensor(X), torch.tensor(np.where(LABELS, 1.0, 1e-3))
    start = start_of(rows, weight, torch.tensor(LABELS).long(), 2, "full")
    (fit,) = mixtures.fit(rows, [start], EMConfig(), sample_weight=weight)
    assert fit.is_ranked
    assert sorted(fit.rows.tolist()) == pytest.approx([100, 300], abs=1)
    assert sorted(fit.nk.tolist()) == pytest.approx([0.1, 300], abs=0.02)


def test_moments_of_reweighted_rows_are_multiples():
    rows, weight = torch.tensor(X), torch.tensor(WEIGHT)
    shards = mixtures.shards(rows, [100], weight)
    total, double = shards.run(SumMoments(2)), shards.run(Reweighted(SumMoments(2), 2.0))
    assert double.n_samples == 2 * total.n_samples
    assert (
        double.n_effective
        == total.n_effective
        == pytest.approx(WEIGHT.sum() ** 2 / (WEIGHT**2).sum())
    )
    assert torch.equal(double.sum_xx, 2 * total.sum_xx)
    assert double.n_rows == total.n_rows == 400


def test_the_largest_weight_comes_to_between_one_and_two():
    for largest in (5e-324, 1e-300, 0.3, 1.0, 1.99, 2.0, 1e300):
        assert 1 <= largest * unit_of(largest) < 2 or largest < 1e-307
    assert unit_of(0.0) == unit_of(math.inf) == 1.0

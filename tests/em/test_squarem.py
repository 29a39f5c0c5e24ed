"""SQUAREM: its step by the formula, its safeguard, and what it saves."""

from __future__ import annotations

import itertools
from dataclasses import replace

import mixtures
import pytest
import torch

from gmm_dist.config import EMConfig
from gmm_dist.em.squarem import Squarem, coordinates, parameters_at
from gmm_dist.model.covariance import COVARIANCE_TYPES, TYPE_OF

every_type = pytest.mark.parametrize("kind", COVARIANCE_TYPES)
SCALE = torch.tensor([1.0, 100.0, 1e-3], dtype=torch.float64)


def slow(kind, n=3000, d=3, k=4, seed=0):
    """Return rows of components that overlap so much that EM crawls, and a start."""
    truth = mixtures.parameters("full", k, d, seed=seed)
    X = mixtures.rows(replace(truth, means=truth.means * 0.5), n, seed=seed)
    return X, mixtures.parameters(kind, k, d, seed=seed + 5)


@every_type
def test_coordinates_and_back(kind):
    parameters = mixtures.parameters(kind, 4, 3)
    back = parameters_at(coordinates(parameters, SCALE), parameters, SCALE)
    mixtures.assert_same(back, parameters, rtol=1e-12, atol=1e-12)


@every_type
def test_any_vector_is_valid_parameters(kind):
    like = mixtures.parameters(kind, 3, 3)
    x = 3 * mixtures.normal_rows(1, len(coordinates(like, SCALE)))[0]
    found = parameters_at(x, like, SCALE)
    assert float(found.weights.sum()) == pytest.approx(1)
    assert bool((found.weights > 0).all())
    if TYPE_OF[kind].has_products:
        torch.linalg.cholesky(found.covariances)
    else:
        assert bool((found.covariances > 0).all())


def test_a_leap_is_varadhan_and_rolands():
    first, second, third = (mixtures.parameters("full", 2, 3, seed=s) for s in (1, 2, 3))
    squarem = Squarem(scale=SCALE, max_step=1e9)
    assert squarem.follow(first, second) is second
    leap = squarem.follow(second, third)
    x0, x1, x2 = (coordinates(p, SCALE) for p in (first, second, third))
    r, v = x1 - x0, x2 - 2 * x1 + x0
    alpha = -r.norm() / v.norm()
    expected = x0 - 2 * alpha * r + alpha**2 * v
    if alpha > -1:
        assert leap is third
    else:
        torch.testing.assert_close(coordinates(leap, SCALE), expected)


def test_the_step_is_bounded_and_the_bound_grows_when_reached():
    x = coordinates(mixtures.parameters("full", 2, 3), SCALE)
    like = mixtures.parameters("full", 2, 3)
    # Steps that shrink by 1 % each: the geometric series ends 100 steps away.
    line = [parameters_at(x + 1e-2 * (1 - 0.99**i) / 0.01, like, SCALE) for i in range(3)]
    squarem = Squarem(scale=SCALE)
    squarem.follow(line[0], line[1])
    leap = squarem.follow(line[1], line[2])
    assert squarem.is_leaping
    assert squarem.max_step == 16
    reached = (coordinates(leap, SCALE) - x)[2:8].mean() / 1e-2
    assert float(reached) == pytest.approx(2 * 4 - 16 * 0.01, rel=1e-6)
    assert squarem.take_back() is line[2]
    assert squarem.max_step == 4
    assert not squarem.is_leaping


@every_type
@pytest.mark.parametrize("precision", ["auto", "float64"])
def test_the_likelihood_never_falls(kind, precision):
    X, start = slow(kind)
    config = EMConfig(tol=0, max_iter=60, reg_covar=0.0, precision=precision)
    (fit,) = mixtures.fit(X, [start], config, edges=[1000])
    gains = [b - a for a, b in itertools.pairwise(fit.lower_bounds)]
    assert len(gains) == 60
    assert min(gains) >= (-1e-12 if precision == "float64" else -1e-6)


@every_type
def test_it_saves_passes_and_ends_no_lower(kind):
    X, start = slow(kind)
    config = EMConfig(tol=1e-6, max_iter=2000, reg_covar=0.0, precision="float64")
    passes = []
    fits = []
    for accelerate in (True, False):
        counted = []
        (fit,) = mixtures.fit(
            X, [start], replace(config, accelerate=accelerate), watch=counted.append
        )
        passes.append(len(counted))
        fits.append(fit)
    assert fits[0].converged
    assert passes[0] < 0.7 * passes[1]
    assert fits[0].log_likelihood >= fits[1].log_likelihood - 1e-4 * len(X)
    assert fits[0].passes_saved > 0
    assert fits[1].passes_saved == 0

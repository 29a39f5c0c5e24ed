"""Log-densities by compiled loops are those of the definition, and a row's bits are its own."""

from __future__ import annotations

from dataclasses import replace

import mixtures
import naive
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gmm_dist import compiling
from gmm_dist.model.covariance import COVARIANCE_TYPES
from gmm_dist.model.densities import FAR, Densities

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not compiling.can_compile(), reason="needs Numba")


def by_loops(mixture) -> Densities:
    return Densities.of(mixture, CPU, compiled=True)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("d", [1, 2, 3, 4, 7, 16])
def test_loops_give_the_definition(kind, d):
    mixture = mixtures.parameters(kind, 5, d, seed=d)
    X = mixtures.normal_rows(300, d)
    (found,) = by_loops(mixture).chunks(X)
    np.testing.assert_allclose(found.T, naive.weighted_log_prob(X, mixture), rtol=1e-13, atol=1e-12)


@given(n=st.integers(0, 400), first=st.integers(0, 399))
@settings(max_examples=50, deadline=None)
def test_a_rows_bits_are_the_same_in_any_chunk(n, first):
    mixture, X = mixtures.parameters("full", 4, 6), mixtures.normal_rows(400, 6)
    whole = by_loops(mixture)(X.T)
    part = by_loops(mixture)(X[first : first + n].T)
    assert torch.equal(part, whole[:, first : first + n])


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_rows_far_out_or_of_no_number_are_placed_as_products_place_them(kind):
    """Such rows have few digits; each has one largest logit, and it is the same component's."""
    mixture = mixtures.parameters(kind, 4, 3)
    X = torch.cat([10.0 ** (3 * mixtures.normal_rows(64, 3)), 1e200 * mixtures.normal_rows(64, 3)])
    found, expected = by_loops(mixture)(X.T), Densities.of(mixture, CPU)(X.T)
    assert bool((expected.amax(0) < FAR).any())
    assert torch.equal(found.argmax(0), expected.argmax(0))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    X[5, 1] = torch.nan
    assert bool(by_loops(mixture)(X.T)[:, 5].isnan().all())


def test_a_component_of_no_weight_is_impossible():
    mixture = mixtures.parameters("full", 3, 2)
    mixture = replace(mixture, weights=torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64))
    found = by_loops(mixture)(mixtures.normal_rows(9, 2).T)
    assert bool((found[1] < FAR).all())
    assert bool((found[[0, 2]] > FAR).all())


@pytest.mark.parametrize(("kind", "d", "expected"), [("full", 129, False), ("diag", 129, True)])
def test_wide_full_covariances_stay_with_products(kind, d, expected):
    densities = by_loops(mixtures.parameters(kind, 2, d))
    assert densities.is_compiled == expected


def test_without_numba_they_are_products(monkeypatch):
    monkeypatch.setattr("gmm_dist.model.densities.can_compile", lambda: False)
    assert not by_loops(mixtures.parameters("full", 2, 3)).is_compiled

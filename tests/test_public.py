"""What `import gmm_dist` gives: its names, and the examples in their docstrings."""

from __future__ import annotations

import doctest
import importlib

import pytest

import gmm_dist

MODULES = (
    "",
    "config",
    "estimators.bootstrap",
    "estimators.clusters",
    "estimators.fitted",
    "estimators.gaussian_mixture",
    "estimators.save",
    "estimators.select",
    "lake.lake",
)


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_in_docstrings_run(module):
    found = doctest.testmod(importlib.import_module(f"gmm_dist.{module}".rstrip(".")))
    assert found.attempted > 0
    assert found.failed == 0


def test_the_public_names():
    assert gmm_dist.__all__ == [
        *("BayesianGaussianMixture", "Cluster", "GaussianMixture", "Lake", "Mixture", "Parameters"),
        *("UserError", "bootstrap", "find_clusters", "load", "save", "select"),
    ]
    assert all(callable(getattr(gmm_dist, name)) for name in gmm_dist.__all__)
    told = gmm_dist.__doc__ or ""
    assert all(f"`{name}`" in told for name in gmm_dist.__all__)
    assert len(told.splitlines()) <= 40

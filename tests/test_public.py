"""What `import gmm_dist` gives: its names, and the examples in their docstrings."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = (
    "config",
    "estimators.base",
    "estimators.gaussian_mixture",
    "estimators.save",
    "estimators.select",
    "lake.lake",
)


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_in_docstrings_run(module):
    found = doctest.testmod(importlib.import_module(f"gmm_dist.{module}"))
    assert found.attempted > 0
    assert found.failed == 0

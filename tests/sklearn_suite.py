"""Run scikit-learn's own tests of its mixtures with our classes in place of theirs.

    python -m tests.sklearn_suite [pytest's options]

The test files are those of the installed package, and so is the conftest that has their
fixtures; only the two names that they test are replaced. What asks for private parts of
scikit-learn's classes stands in `PRIVATE`, with a reason each.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# The tests of float32 and of array-API inputs too; SciPy asks as it is imported.
os.environ.update(SKLEARN_RUN_FLOAT32_TESTS="1", SCIPY_ARRAY_API="1")

import pytest
from sklearn.mixture import tests as their_tests

import gmm_dist

FILES = ("test_gaussian_mixture", "test_bayesian_mixture")

PRIVATE = {
    "test_gaussian_mixture_precisions_init": "calls _set_parameters and _initialize",
    "test_gaussian_mixture_all_init_does_not_estimate_gaussian_parameters": (
        "counts calls of scikit-learn's own _estimate_gaussian_parameters"
    ),
    "test_compare_covar_type": "calls _initialize_parameters and _m_step",
}
"""Tests that are not of public behaviour, by name, and why."""


class Replaced:
    """The plugin that puts our classes in place of theirs, and leaves out what is private."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            assert item.module.__name__.rpartition(".")[2] in FILES
            for name in ("GaussianMixture", "BayesianGaussianMixture"):
                if hasattr(item.module, name):
                    setattr(item.module, name, getattr(gmm_dist, name))
            if reason := PRIVATE.get(item.originalname):
                item.add_marker(pytest.mark.skip(reason=reason))


def main(options: list[str]) -> int:
    """Run the tests; return pytest's exit status."""
    folder = Path(their_tests.__file__).parent
    files = [str(folder / f"{name}.py") for name in FILES]
    plain = ["-p", "no:cacheprovider", "--rootdir", str(folder), "-c", "/dev/null", "-q", "-rs"]
    return int(pytest.main([*plain, *files, *options], plugins=[Replaced()]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Run scikit-learn's own tests of its mixtures with our classes in place of theirs.

    python -m tools.sklearn_suite [pytest's options]

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

FILES = {
    "test_gaussian_mixture": "GaussianMixture",
    "test_bayesian_mixture": "BayesianGaussianMixture",
}
"""Their files, and the class that each is about."""

_FUNCTION = "tests {} of scikit-learn's module, a function that we do not have"
PRIVATE = {
    "test_gaussian_mixture_precisions_init": "calls _set_parameters and _initialize",
    "test_gaussian_mixture_all_init_does_not_estimate_gaussian_parameters": (
        "counts calls of scikit-learn's own _estimate_gaussian_parameters"
    ),
    "test_compare_covar_type": "calls _initialize_parameters and _m_step",
    "test_suffstat_sk_full": _FUNCTION.format("_estimate_gaussian_covariances_full"),
    "test_suffstat_sk_tied": _FUNCTION.format("_estimate_gaussian_covariances_tied"),
    "test_suffstat_sk_diag": _FUNCTION.format("_estimate_gaussian_covariances_diag"),
    "test_gaussian_suffstat_sk_spherical": _FUNCTION.format(
        "_estimate_gaussian_covariances_spherical"
    ),
    "test_compute_log_det_cholesky": _FUNCTION.format("_compute_log_det_cholesky"),
    "test_log_dirichlet_norm": _FUNCTION.format("_log_dirichlet_norm"),
    "test_log_wishart_norm": _FUNCTION.format("_log_wishart_norm"),
}
"""Tests that are not of public behaviour, by name, and why."""


class Replaced:
    """The plugin that puts our classes in place of theirs, and leaves out what is private."""

    @pytest.hookimpl(tryfirst=True)  # before options deselect
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for module in {item.module for item in items}:
            tested = FILES[module.__name__.rpartition(".")[2]]
            if not hasattr(module, tested):
                raise pytest.UsageError(f"{module.__name__} names no {tested} to replace")
            for name in FILES.values():
                if hasattr(module, name):
                    setattr(module, name, getattr(gmm_dist, name))
        if stale := set(PRIVATE) - {item.originalname for item in items}:
            raise pytest.UsageError(f"PRIVATE names tests that are gone: {sorted(stale)}")
        for item in items:
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

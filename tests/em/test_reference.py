"""Log-likelihoods and criteria on which scikit-learn 1.9.1 and R mclust 6.0.0 agree.

The file's `_doc` says how the cases were made: EM to convergence, float64, from the M-step of a
hard partition. Every data set is fitted from all its starts in the same passes.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import mixtures
import naive
import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris, load_wine

from gmm_dist.config import EMConfig
from gmm_dist.em.loop import FitResult
from gmm_dist.model.criteria import aic, bic, icl, n_parameters
from gmm_dist.model.mixture import Mixture
from gmm_dist.model.parameters import Parameters

REFERENCE = json.loads((Path(__file__).parents[1] / "reference" / "gmm_cases.json").read_text())
CASES = REFERENCE["cases"]
LOADERS = {"sklearn.iris": load_iris, "sklearn.wine": load_wine}
# Plain EM, as theirs: where the maximum is flat, another path ends at another entropy.
CONFIG = EMConfig(tol=1e-14, max_iter=1000, reg_covar=0.0, precision="float64", accelerate=False)


def name(case) -> str:
    start = re.sub(r"\W+", "_", case["start"])
    weighted = "-weighted" if case["weights"] else ""
    return f"{case['dataset']}-{case['covariance_type']}-{case['K']}-{start}{weighted}"


@functools.cache
def data(dataset: str, weights: str | None):
    """Return rows (n, d), weights (n,) or None, and the target labels."""
    found = LOADERS[dataset]()
    X, n = torch.tensor(found.data), len(found.data)
    assert weights in (None, "1+i%3")
    weight = None if weights is None else 1.0 + torch.arange(n, dtype=torch.float64) % 3
    return X, weight, found.target


def start_of(case) -> Parameters:
    """Return the M-step of the case's partition."""
    X, weight, target = data(case["dataset"], case["weights"])
    labels = {"one component": np.zeros(len(X), int), "target labels": target}.get(case["start"])
    if labels is None:
        labels = np.array(REFERENCE["hc"][re.search(r"hc\.(\w+)", case["start"])[1]])
    resp = np.eye(case["K"])[labels]
    return naive.m_step(X, resp, case["covariance_type"], sample_weight=weight)


@functools.cache
def fits(dataset: str, weights: str | None) -> dict[str, FitResult]:
    """Fit all cases of a data set as lanes of the same passes."""
    cases = [c for c in CASES if (c["dataset"], c["weights"]) == (dataset, weights)]
    X, weight, _ = data(dataset, weights)
    starts = [start_of(case) for case in cases]
    results = mixtures.fit(X, starts, CONFIG, sample_weight=weight, edges=[40, 40, 111])
    return {name(case): result for case, result in zip(cases, results, strict=True)}


def test_every_case_is_here():
    assert len(CASES) == 40
    assert len({name(case) for case in CASES}) == 40
    assert all(case["reg_covar"] == 0 for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_case(case):
    fit = fits(case["dataset"], case["weights"])[name(case)]
    start, after_one = (bound * fit.n_samples for bound in fit.lower_bounds[:2])
    assert fit.n_samples == case["n"]
    assert start == pytest.approx(case["ll_start"], abs=1e-6)
    assert after_one == pytest.approx(case["ll_after_1_iter"], abs=1e-6)
    assert fit.log_likelihood == pytest.approx(case["ll"], abs=2e-6)
    # At the maximum the likelihood is flat, but the entropy is not: it has fewer digits.
    assert fit.entropy == pytest.approx(case["entropy"], rel=2e-6, abs=1e-6)

    df = n_parameters(case["covariance_type"], case["K"], case["d"])
    assert df == case["df"]
    own_bic = bic(fit.log_likelihood, df, fit.n_samples)
    assert own_bic == pytest.approx(case["bic"], abs=1e-5)
    assert aic(fit.log_likelihood, df) == pytest.approx(case["aic"], abs=1e-5)
    assert icl(own_bic, fit.entropy) == pytest.approx(case["icl_soft"], rel=1e-7)

    weights, first = fit.parameters.weights, fit.parameters.means[:, 0]
    np.testing.assert_allclose(weights.sort().values, case["weights_sorted"], atol=1e-5)
    np.testing.assert_allclose(first.sort().values, case["mean_of_first_feature_sorted"], atol=1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if not c["weights"]], ids=name)
def test_the_fitted_mixture_has_the_criteria_of_the_case(case):
    fit = fits(case["dataset"], case["weights"])[name(case)]
    X, _, _ = data(case["dataset"], None)
    model = Mixture(parameters=fit.parameters)
    assert model.bic(X) == pytest.approx(case["bic"], abs=1e-5)
    assert model.aic(X) == pytest.approx(case["aic"], abs=1e-5)
    assert model.icl(X) == pytest.approx(case["icl_soft"], rel=1e-7)

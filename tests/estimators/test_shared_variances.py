"""The covariance types that scikit-learn lacks: variances that all components share."""

from __future__ import annotations

import mixtures
import naive
import numpy as np
import pytest
import sklearn.mixture
import torch
from sklearn.datasets import load_iris

from gmm_dist import BayesianGaussianMixture, GaussianMixture
from gmm_dist.model.parameters import Parameters

# Each with the shape of its covariances for three features.
SHAPES = {"tied-diag": (3,), "tied-spherical": ()}
every_type = pytest.mark.parametrize("kind", SHAPES)
LEARNED = ("covariances_", "precisions_", "precisions_cholesky_")


def rows(n: int = 90) -> np.ndarray:
    return mixtures.rows(mixtures.parameters("full", 3, 3, spread=5), n).numpy() + 20.0


def begun(kind: str, **options: object) -> GaussianMixture:
    """Return an estimator whose start is set, of variances 4."""
    return GaussianMixture(
        3,
        covariance_type=kind,
        weights_init=[0.2, 0.3, 0.5],
        means_init=rows()[:3],
        precisions_init=np.full(SHAPES[kind], 0.25),
        **options,
    )


def start(kind: str) -> Parameters:
    return Parameters(
        weights=torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64),
        means=torch.tensor(rows()[:3]),
        covariances=torch.full(SHAPES[kind], 4.0, dtype=torch.float64),
        covariance_type=kind,
    )


@every_type
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.filterwarnings("ignore:Best performing")
def test_a_fit_equals_the_naive_loop(kind, weighted):
    X, weight = rows(), mixtures.row_weights(90).numpy() if weighted else None
    model = begun(kind, max_iter=4, tol=0, reg_covar=0.01).fit(X, sample_weight=weight)
    expected, _ = naive.em(X, start(kind), 4, reg_covar=0.01, sample_weight=weight)
    np.testing.assert_allclose(model.weights_, expected.weights, rtol=1e-9)
    np.testing.assert_allclose(model.means_, expected.means, rtol=1e-9)
    np.testing.assert_allclose(model.covariances_, expected.covariances, rtol=1e-8)


@every_type
def test_an_integer_weight_is_a_row_repeated(kind):
    X, weight = rows(), np.arange(90) % 3
    one = begun(kind).fit(X, sample_weight=weight)
    two = begun(kind).fit(np.repeat(X, weight, axis=0))
    np.testing.assert_allclose(one.covariances_, two.covariances_, rtol=1e-8)
    assert one.lower_bound_ == pytest.approx(two.lower_bound_, rel=1e-12)


@every_type
@pytest.mark.parametrize("init_params", ["kmeans", "k-means++", "random", "random_from_data"])
def test_what_is_learned_has_the_shapes_of_the_type(kind, init_params):
    X = rows().astype(np.float32)
    model = GaussianMixture(3, covariance_type=kind, init_params=init_params, random_state=0).fit(X)
    for name in LEARNED:
        value = getattr(model, name)
        assert (np.shape(value), value.dtype) == (SHAPES[kind], np.float32)
    np.testing.assert_allclose(model.precisions_, 1 / model.covariances_, rtol=1e-6)
    np.testing.assert_allclose(model.precisions_cholesky_**2, model.precisions_, rtol=1e-6)
    again = GaussianMixture.from_mixture(model.to_mixture())
    np.testing.assert_allclose(again.score_samples(X), model.score_samples(X), rtol=1e-6)


@every_type
def test_scikit_learn_gets_a_diagonal_mixture(kind):
    X = rows()
    model = begun(kind, random_state=7).fit(X)
    theirs = model.to_sklearn()
    assert type(theirs) is sklearn.mixture.GaussianMixture
    assert theirs.covariance_type == "diag"
    for name in (*LEARNED, "precisions_init"):
        assert getattr(theirs, name).shape == (3, 3)
    np.testing.assert_allclose(theirs.score_samples(X), model.score_samples(X), rtol=1e-10)
    np.testing.assert_allclose(theirs.predict_proba(X), model.predict_proba(X), atol=1e-10)
    for mine, expected in zip(model.sample(9), theirs.sample(9), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-12)
    theirs.fit(X)  # from the start that was expanded too
    back = GaussianMixture.from_sklearn(model.to_sklearn())
    assert back.covariance_type == "diag"
    np.testing.assert_allclose(back.score_samples(X), model.score_samples(X), rtol=1e-10)


def test_the_one_precision_may_be_a_number():
    """As may be what was learned, which is a scalar."""
    X, kind = rows(), "tied-spherical"
    model = begun(kind).fit(X)
    of_number = begun(kind).set_params(precisions_init=0.25).fit(X)
    assert of_number.covariances_ == model.covariances_
    for name in LEARNED:
        assert isinstance(getattr(model, name), np.float64)
    again = begun(kind).set_params(precisions_init=model.precisions_).fit(X)
    assert again.lower_bound_ == pytest.approx(model.lower_bound_, rel=1e-9)
    with pytest.raises(ValueError, match="'tied-spherical precision' should be positive"):
        begun(kind).set_params(precisions_init=-0.25).fit(X)
    with pytest.raises(ValueError, match=r"'full precision' should have the shape of \(3, 3, 3\)"):
        begun(kind).set_params(covariance_type="full", precisions_init=0.25).fit(X)


@every_type
@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_precisions_that_are_not_positive_are_refused(kind, bad):
    model = begun(kind).set_params(precisions_init=np.full(SHAPES[kind], bad))
    with pytest.raises(ValueError, match=f"'{kind} precision' should be positive"):
        model.fit(rows())
    model.set_params(precisions_init=np.full((3, 3), 1.0))
    with pytest.raises(ValueError, match=f"'{kind} precision' should have the shape of"):
        model.fit(rows())


@every_type
def test_the_variational_mixture_refuses_them_in_one_line(kind):
    with pytest.raises(ValueError, match=r"^The 'covariance_type' parameter of [^\n]*$"):
        BayesianGaussianMixture(covariance_type=kind).fit(rows())


def test_one_number_for_scikit_learn_needs_the_number_of_features():
    model = GaussianMixture(3, covariance_type="tied-spherical", precisions_init=0.25)
    with pytest.raises(ValueError, match="give means_init too, or fit"):
        model.to_sklearn()
    model.set_params(means_init=rows()[:3])
    assert model.to_sklearn().precisions_init.tolist() == [[0.25] * 3] * 3


# What mclustBIC(iris[, -5]) of R's mclust prints for K = 1, 2, 3, with its sign, as EEI and EII.
MCLUST = {
    "tied-diag": (-1522.1202, -1042.9679, -813.0504),
    "tied-spherical": (-1804.0854, -1123.4117, -878.7650),
}


@every_type
def test_a_bic_is_that_of_mclust(kind):
    X = load_iris().data
    for k, published in enumerate(MCLUST[kind], start=1):
        model = GaussianMixture(k, covariance_type=kind, init_params="search", n_init=2)
        model.set_params(reg_covar=0, tol=1e-6, max_iter=500, random_state=0)
        # mclust stops at a relative gain of 1e-5, a little below the optimum.
        assert published - 1e-3 < -model.fit(X).bic(X) < published + 2e-2

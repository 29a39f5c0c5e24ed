"""The variational face keeps scikit-learn's contract and equals its mixture; weights count rows."""

from __future__ import annotations

import copy

import lakes
import mixtures
import numpy as np
import pandas as pd
import pytest
import sklearn.mixture
import torch
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

from gmm_dist import Cluster, Lake
from gmm_dist.errors import UserError
from gmm_dist.estimators.bayesian_gaussian_mixture import BayesianGaussianMixture
from gmm_dist.estimators.init_params import INIT_PARAMS
from gmm_dist.model.variational import VARIATIONAL_TYPES, WEIGHT_PRIORS
from gmm_dist.runs.model_folder import model_sha256

every_type = pytest.mark.parametrize("kind", VARIATIONAL_TYPES)
every_prior = pytest.mark.parametrize("weight_prior", WEIGHT_PRIORS)
ATTRIBUTES = (
    "weights_",
    "means_",
    "covariances_",
    "precisions_",
    "precisions_cholesky_",
    "weight_concentration_",
    "mean_precision_",
    "degrees_of_freedom_",
    "weight_concentration_prior_",
    "mean_precision_prior_",
    "mean_prior_",
    "degrees_of_freedom_prior_",
    "covariance_prior_",
    "lower_bound_",
    "lower_bounds_",
)


def rows(n=240, d=3, *, seed=0):
    """Return rows (n, d) of three clusters, not about the origin."""
    return mixtures.rows(mixtures.parameters("full", 3, d, seed=seed), n, seed=seed).numpy() + 7.0


def assert_same(one, other, *, rtol=1e-7) -> None:
    """Assert that two fits learned the same."""
    for name in ATTRIBUTES:
        mine, theirs = (np.ravel(getattr(fit, name)) for fit in (one, other))
        np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=1e-9, err_msg=name)
    assert one.n_iter_ == other.n_iter_
    assert one.converged_ == other.converged_


# Of a start that is drawn row by row, a weight is no repetition: see test_estimator.py.
BY_ROW = {"check_sample_weight_equivalence_on_dense_data": "starts are drawn row by row"}


@parametrize_with_checks(
    [BayesianGaussianMixture(), BayesianGaussianMixture(n_components=2)],
    expected_failed_checks=lambda estimator: {} if estimator.n_components == 1 else BY_ROW,
)
# Two components for the checks' one cluster take long to agree: no concern of theirs.
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_it_is_an_estimator(estimator, check):
    check(estimator)


# ---- scikit-learn ----------------------------------------------------------------------------


@every_type
@every_prior
def test_a_fit_equals_scikit_learns(kind, weight_prior):
    X = rows()
    settings = {
        "n_components": 4,
        "covariance_type": kind,
        "weight_concentration_prior_type": weight_prior,
        "n_init": 2,
        "tol": 1e-2,
        "max_iter": 200,
        "random_state": 3,
    }
    ours = BayesianGaussianMixture(**settings).fit(X)
    theirs = sklearn.mixture.BayesianGaussianMixture(**settings).fit(X)
    assert_same(ours, theirs)
    new = rows(50, seed=1)
    assert ours.predict(new).tolist() == theirs.predict(new).tolist()
    np.testing.assert_allclose(ours.predict_proba(new), theirs.predict_proba(new), atol=1e-7)
    np.testing.assert_allclose(ours.score_samples(new), theirs.score_samples(new), rtol=1e-7)
    for mine, peers in zip(ours.sample(20), theirs.sample(20), strict=True):
        np.testing.assert_allclose(mine, peers, rtol=1e-6)


@pytest.mark.parametrize("init_params", INIT_PARAMS)
@every_type
def test_every_start_is_scikit_learns(kind, init_params):
    X = rows()
    settings = {
        "n_components": 3,
        "covariance_type": kind,
        "init_params": init_params,
        "max_iter": 0,
        "random_state": 5,
    }
    ours = BayesianGaussianMixture(**settings).fit(X)
    theirs = sklearn.mixture.BayesianGaussianMixture(**settings).fit(X)
    for name in ("means_", "covariances_", "degrees_of_freedom_", "weights_"):
        mine, peers = getattr(ours, name), getattr(theirs, name)
        np.testing.assert_allclose(mine, peers, rtol=1e-8, atol=1e-10, err_msg=name)


@every_type
def test_beliefs_come_back_as_they_were_given(kind):
    X = rows()
    full = np.diag([0.1, 0.2, 0.3]) + 0.01
    covariance = {"diag": full.diagonal().copy(), "spherical": 0.3}.get(kind, full)
    settings = {
        "n_components": 3,
        "covariance_type": kind,
        "weight_concentration_prior": 30.0,
        "mean_precision_prior": 0.1,
        "mean_prior": [0.1, 0.2, 0.3],
        "degrees_of_freedom_prior": 4.1,
        "covariance_prior": covariance,
        "random_state": 0,
        "max_iter": 200,
    }
    ours = BayesianGaussianMixture(**settings).fit(X)
    assert ours.mean_prior_.tolist() == [0.1, 0.2, 0.3]
    assert np.array_equal(ours.covariance_prior_, covariance)
    assert ours.degrees_of_freedom_prior_ == 4.1
    assert_same(ours, sklearn.mixture.BayesianGaussianMixture(**settings).fit(X))


@every_type
@every_prior
def test_to_scikit_learn_and_back_is_exact(kind, weight_prior):
    X = rows()
    ours = BayesianGaussianMixture(
        n_components=3,
        covariance_type=kind,
        weight_concentration_prior_type=weight_prior,
        random_state=0,
        tol=1e-2,
    ).fit(X)
    theirs = ours.to_sklearn()
    np.testing.assert_allclose(theirs.score_samples(X), ours.score_samples(X), rtol=1e-10)
    # What None stands for, as scikit-learn has it.
    expected = ours.get_params() | {"n_init": ours.n_init_, "init_params": ours.init_params_}
    assert theirs.get_params() == {name: expected[name] for name in theirs.get_params()}
    again = BayesianGaussianMixture.from_sklearn(theirs.fit(X))
    np.testing.assert_allclose(again.score_samples(X), theirs.score_samples(X), rtol=1e-10)
    before = again.lower_bound_
    again.set_params(warm_start=True, max_iter=1000, tol=1e-6).fit(X)
    assert again.lower_bound_ > before


def test_the_two_share_no_memory():
    X = rows()
    ours = BayesianGaussianMixture(n_components=2, random_state=0).fit(X)
    theirs = ours.to_sklearn()
    theirs.weight_concentration_[0][:] = 0
    theirs.means_[:] = 0
    assert (ours.weight_concentration_[0] > 0).all()
    assert (ours.means_ != 0).all()


# ---- weights ---------------------------------------------------------------------------------


@every_type
@every_prior
def test_a_weight_of_two_is_a_row_twice(kind, weight_prior):
    X, weight = rows(), np.arange(240) % 3
    start = BayesianGaussianMixture(
        n_components=4,
        covariance_type=kind,
        weight_concentration_prior_type=weight_prior,
        max_iter=0,
        random_state=0,
    ).fit(X)
    start.set_params(max_iter=300, warm_start=True)
    by_weight = copy.deepcopy(start).fit(X, sample_weight=weight)
    by_copies = copy.deepcopy(start).fit(np.repeat(X, weight, axis=0))
    assert by_weight.n_iter_ > 3
    assert_same(by_weight, by_copies)
    unweighted = copy.deepcopy(start).fit(X)
    assert abs(unweighted.lower_bound_ - by_weight.lower_bound_) > 1


def test_weights_that_do_not_count_rows_need_a_covariance_of_ones_own():
    X = rows()
    weight = np.full(240, 1e-3)
    with pytest.raises(ValueError, match=r"weights sum to 0\.24: .*give covariance_prior"):
        BayesianGaussianMixture(random_state=0).fit(X, sample_weight=weight)
    given = BayesianGaussianMixture(covariance_prior=np.eye(3), random_state=0)
    assert given.fit(X, sample_weight=weight).converged_


# ---- how it behaves --------------------------------------------------------------------------


@every_prior
def test_components_that_nobody_needs_vanish(weight_prior):
    X = np.concatenate([rows(150), rows(150) + 100])
    model = BayesianGaussianMixture(
        n_components=12,
        weight_concentration_prior_type=weight_prior,
        weight_concentration_prior=1e-3,
        covariance_type="full",
        max_iter=2000,
        init_params="random_from_data",
        random_state=0,
    ).fit(X)
    used = model.weights_ > 1e-2
    assert 2 <= used.sum() <= 8
    assert model.weights_[~used].max() < 2 / 300  # a broken stick leaves a row or so
    assert len(set(model.predict(X))) == used.sum()


def test_the_best_of_many_starts_wins():
    X = rows()
    settings = {"n_components": 4, "init_params": "random", "max_iter": 1000, "tol": 1e-4}
    many = BayesianGaussianMixture(**settings, n_init=5, random_state=0).fit(X)
    state = np.random.RandomState(0)
    alone = [BayesianGaussianMixture(**settings, random_state=state).fit(X) for _ in range(5)]
    bounds = [fit.lower_bound_ for fit in alone]
    assert max(bounds) - min(bounds) > 1e-3
    assert many.lower_bound_ == pytest.approx(max(bounds), abs=1e-6)


@every_type
def test_a_warm_start_goes_on_where_it_stopped(kind):
    X = rows()
    settings = {"n_components": 4, "covariance_type": kind, "random_state": 0, "tol": 0.0}
    at_once = BayesianGaussianMixture(**settings, max_iter=6)
    in_steps = BayesianGaussianMixture(**settings, max_iter=2, warm_start=True)
    bounds: list[float] = []
    for model in (at_once, in_steps, in_steps, in_steps):
        with pytest.warns(ConvergenceWarning, match="did not converge"):
            model.fit(X)
        bounds += model.lower_bounds_
    np.testing.assert_allclose(bounds[6:], at_once.lower_bounds_, rtol=1e-10)
    np.testing.assert_allclose(in_steps.means_, at_once.means_, rtol=1e-8)


@every_type
def test_the_number_of_shards_changes_nothing_but_rounding(kind):
    X = rows()
    settings = {"n_components": 3, "covariance_type": kind, "random_state": 0, "max_iter": 500}
    one, five = (BayesianGaussianMixture(**settings, n_shards=n).fit(X) for n in (1, 5))
    assert_same(five, one)


@every_prior
def test_what_is_learned_of_a_tensor_is_tensors(weight_prior):
    X = torch.from_numpy(rows()).float()
    model = BayesianGaussianMixture(
        n_components=2, weight_concentration_prior_type=weight_prior, random_state=0
    ).fit(X)
    assert isinstance(model.means_, torch.Tensor)
    assert model.means_.dtype == torch.float32
    assert model.predict_proba(X).dtype == torch.float32
    concentration = model.weight_concentration_
    parts = concentration if weight_prior == "dirichlet_process" else (concentration,)
    assert all(isinstance(part, torch.Tensor) for part in parts)
    assert model.fit(X).predict(X).unique().tolist() == [0, 1]


def test_float32_rows_are_scored_as_scikit_learn_scores_them():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(500, 1)) * 100
    X = np.hstack([z, 2 * z + rng.normal(size=(500, 1)) * 1e-4, rng.normal(size=(500, 1))])
    settings = {"n_components": 2, "covariance_prior": 1e-6 * np.eye(3), "random_state": 0}
    model = BayesianGaussianMixture(**settings, max_iter=500).fit(X.astype(np.float32))
    assert model.covariances_.dtype == np.float32
    theirs = model.to_sklearn()
    rows = X[:50].astype(np.float32).astype(np.float64)
    theirs.means_ = theirs.means_.astype(np.float64)
    theirs.precisions_cholesky_ = theirs.precisions_cholesky_.astype(np.float64)
    np.testing.assert_allclose(model.score_samples(rows), theirs.score_samples(rows), rtol=1e-4)


def test_settings_that_it_cannot_take():
    lake = Lake(url="nowhere")
    for options, message in [
        ({"device": "cpu"}, "use_gpu="),
        ({"n_shards": 2}, "planned from its"),
    ]:
        with pytest.raises(ValueError, match=message):
            BayesianGaussianMixture(**options).fit(lake)
    with pytest.raises(TypeError, match=r"takes a sklearn\.mixture\.BayesianGaussianMixture"):
        BayesianGaussianMixture.from_sklearn(sklearn.mixture.GaussianMixture())
    model = BayesianGaussianMixture(warm_start=True).fit(rows())
    with pytest.raises(ValueError, match="fit to 3 features, but X has 2"):
        model.fit(rows(d=2))


def test_it_says_when_it_is_not_fitted():
    with pytest.raises(NotFittedError, match="BayesianGaussianMixture instance is not fitted yet"):
        BayesianGaussianMixture().predict(rows())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"degrees_of_freedom_prior": 2.0}, "should be greater than 2, but got 2.000"),
        ({"mean_prior": [1.0, 2.0]}, r"'means' should have the shape of \(3,\), but got \(2,\)"),
        ({"covariance_prior": np.eye(2)}, r"'full covariance_prior' should have the shape"),
        ({"covariance_prior": -np.eye(3)}, "should be symmetric, positive-definite"),
        ({"covariance_prior": np.triu(np.ones((3, 3)))}, "should be symmetric, positive-definite"),
        (
            {"covariance_prior": [1.0, 0.0, 1.0], "covariance_type": "diag"},
            "'diag covariance_prior' should be positive",
        ),
        ({"covariance_prior": 0.0, "covariance_type": "spherical"}, "covariance_prior"),
        ({"weight_concentration_prior": 0.0}, "weight_concentration_prior"),
        ({"weight_concentration_prior_type": "dirichlet"}, "weight_concentration_prior_type"),
        ({"n_components": 241}, "n_samples >= n_components"),
    ],
)
def test_what_cannot_be_is_refused_in_scikit_learns_words(settings, message):
    with pytest.raises(ValueError, match=message):
        BayesianGaussianMixture(**settings).fit(rows())


def test_a_singular_belief_is_an_error():
    X = rows()
    X[:, 1] = 4.0
    with pytest.raises(ValueError, match="ill-defined empirical covariance"):
        BayesianGaussianMixture(n_components=2, reg_covar=0, random_state=0).fit(X)


# ---- lakes -----------------------------------------------------------------------------------


def lake_of(folder, X, weight):
    """Write rows in two files with others that a filter leaves out; return the lake."""
    for part in range(2):
        kept, own = X[part::2], weight[part::2]
        columns = {f"x{j}": np.append(kept[:, j], [1e6, -1e6]) for j in range(X.shape[1])}
        columns |= {"w": np.append(own, [1.0, 1.0]), "t": np.append(np.ones(len(kept)), [0, 0])}
        lakes.write(folder / f"{part}.parquet", columns, rows_per_group=50)
    names = [f"x{j}" for j in range(X.shape[1])]
    return Lake(
        url=str(folder),
        columns=names,
        weight_column="w",
        where="t > 0",
    )


def test_a_lake_is_fitted_on_ray(tmp_path, ray_address):
    X, weight = rows(), np.arange(240) % 3 + 0.5
    lake = lake_of(tmp_path / "lake", X, weight)
    cluster = Cluster(ray_address, num_workers=2)
    settings = {"n_components": 4, "tol": 1e-3, "max_iter": 500, "random_state": 0}
    model = BayesianGaussianMixture(**settings).fit(lake, cluster=cluster)
    assert model.feature_names_in_.tolist() == ["x0", "x1", "x2"]
    assert model.n_features_in_ == 3
    assert model.converged_
    near = BayesianGaussianMixture(**settings, n_init=5).fit(X, sample_weight=weight)
    assert model.lower_bound_ > near.lower_bound_ - 0.1
    np.testing.assert_allclose(model.mean_prior_, near.mean_prior_, rtol=1e-9)
    np.testing.assert_allclose(model.covariance_prior_, near.covariance_prior_, rtol=1e-9)
    resp = model.predict_proba(pd.DataFrame(X, columns=["x0", "x1", "x2"])) * weight[:, None]
    pulled = resp.T @ X + model.mean_precision_prior_ * model.mean_prior_
    means = pulled / (resp.sum(0) + model.mean_precision_prior_)[:, None]
    np.testing.assert_allclose(model.means_, means, atol=0.01)


def test_from_the_same_start_a_lake_leads_where_memory_does(tmp_path, ray_address):
    X, weight = rows(), np.arange(240) % 3 + 0.5
    lake = lake_of(tmp_path / "lake", X, weight)
    cluster = Cluster(ray_address, num_workers=2)
    start = BayesianGaussianMixture(n_components=4, max_iter=0, random_state=0)
    start.fit(X, sample_weight=weight).set_params(max_iter=300, warm_start=True)
    here, there = copy.deepcopy(start), copy.deepcopy(start)
    assert_same(there.fit(lake, cluster=cluster), here.fit(X, sample_weight=weight))
    assert there.n_iter_ > 3
    assert there.lower_bound_ == pytest.approx(here.lower_bound_, rel=1e-9)


def test_what_a_lake_does_not_take(tmp_path):
    columns = {"x": np.arange(9.0), "y": np.arange(9.0) ** 2}
    lakes.write(tmp_path / "lake" / "a.parquet", columns)
    lake = Lake(url=str(tmp_path / "lake"))
    with pytest.raises(ValueError, match="weight_column"):
        BayesianGaussianMixture().fit(lake, sample_weight=[1])
    with pytest.raises(ValueError, match=r"should have the shape of \(2,\), but got \(3,\)"):
        BayesianGaussianMixture(mean_prior=np.zeros(3)).fit(lake)
    with pytest.raises(ValueError, match="10 components, but there are 9 rows"):
        BayesianGaussianMixture(n_components=10).fit(lake)


def test_a_posteriors_mixture_is_not_saved_as_if_it_were_plain():
    model = BayesianGaussianMixture(n_components=2, random_state=0).fit(rows())
    with pytest.raises(UserError, match="mixture of 2 components has expected log-weights"):
        model_sha256(model._parameters())

"""scikit-learn's face: its contract, its results, and all the kinds of rows it takes."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import pydoc
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import lakes
import mixtures
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import sklearn.mixture
import torch
from sklearn.base import clone
from sklearn.datasets import load_iris, make_blobs
from sklearn.exceptions import (
    ConvergenceWarning,
    NotFittedError,
    UnsetMetadataPassedError,
)
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from test_reference import CASES, data, name, start_of

import gmm_dist
from gmm_dist import Cluster, GaussianMixture, Lake
from gmm_dist.config import EMConfig
from gmm_dist.em.lane import Lane
from gmm_dist.em.statistics import TotalMoments
from gmm_dist.estimators.init_params import moments_of_shares
from gmm_dist.estimators.local_rows import robust_centre
from gmm_dist.estimators.restarts import ranked
from gmm_dist.model.arrays import tensor_of, viewed

KINDS = ("full", "tied", "diag", "spherical")
INITS = ("kmeans", "k-means++", "random", "random_from_data")
ROOT = Path(__file__).parents[2]


def blobs(n: int = 300, d: int = 3, k: int = 3, seed: int = 0) -> np.ndarray:
    return make_blobs(n, d, centers=k, cluster_std=2.5, random_state=seed)[0]


def test_the_public_names_are_imported_when_asked_for_and_ray_is_not():
    code = """
import sys, numpy as np, gmm_dist
assert "sklearn" not in sys.modules and "torch" not in sys.modules
gmm_dist.GaussianMixture(2, random_state=0).fit(np.random.default_rng(0).normal(size=(99, 2)))
# pyarrow may be there: scikit-learn imports pandas, and that pyarrow, where they are installed.
ours = {f"gmm_dist.{name}" for name in ("fitting", "lake.plan", "runs", "shards.ray_shards")}
assert not ({"ray", "fsspec", "matplotlib"} | ours) & set(sys.modules)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_dir_lists_the_public_names_and_help_documents_them():
    assert [name for name in dir(gmm_dist) if not name.startswith("_")] == gmm_dist.__all__
    assert {"__version__", "__doc__", "__all__"} <= set(dir(gmm_dist))
    told = pydoc.render_doc(gmm_dist, renderer=pydoc.plaintext)
    for public in gmm_dist.__all__:
        assert f"`{public}`" in told.partition("PACKAGE CONTENTS")[0]
        assert re.search(rf"^    (class )?{public}\(", told, re.MULTILINE)
        first_line = getattr(gmm_dist, public).__doc__.partition("\n")[0]
        assert first_line in told


# Their own mixture takes no weights, so the check of them is not run on it. Their KMeans, which
# does, fails it, and is listed as such in their own tests.
BY_ROW = {
    "check_sample_weight_equivalence_on_dense_data": (
        "every init_params draws row by row: one of weight 2 draws once where two rows draw twice; "
        "from the same start they are equal (test_an_integer_weight_is_a_row_repeated)"
    ),
}


# Array-API inputs are checked in a process of their own, by sklearn_suite.py: SciPy asks for
# SCIPY_ARRAY_API once, as it is imported.
@parametrize_with_checks(
    [
        GaussianMixture(),
        GaussianMixture(2),
        GaussianMixture(2, init_params="random"),
    ],
    expected_failed_checks=lambda estimator: {} if estimator.n_components == 1 else BY_ROW,
)
def test_scikit_learns_checks_of_an_estimator(estimator, check):
    check(estimator)


def in_order_of(ours: GaussianMixture, theirs: sklearn.mixture.GaussianMixture) -> None:
    """Put scikit-learn's components in our order.

    Two of its starts may mirror each other; its choice among them is that of a last bit.
    """
    apart = ((ours.means_[:, None] - theirs.means_) ** 2).sum(2)
    order = apart.argmin(1)
    assert sorted(order) == list(range(len(order)))
    names = ["weights_", "means_"]
    if theirs.covariance_type != "tied":
        names += ["covariances_", "precisions_", "precisions_cholesky_"]
    for attribute in names:
        setattr(theirs, attribute, getattr(theirs, attribute)[order])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("init_params", INITS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_start_leads_where_scikit_learn_goes(kind, init_params, weighted):
    X = blobs() + 10
    options = {"covariance_type": kind, "init_params": init_params, "n_init": 2, "tol": 1e-4}
    theirs = sklearn.mixture.GaussianMixture(3, random_state=4, max_iter=300, **options).fit(X)
    weight = np.ones(len(X)) if weighted and init_params != "random_from_data" else None
    ours = GaussianMixture(3, random_state=4, max_iter=300, **options).fit(X, sample_weight=weight)
    in_order_of(ours, theirs)
    assert ours.n_iter_ == theirs.n_iter_
    assert ours.converged_ is True
    # A start on single rows has variances of reg_covar alone: -1e7 nats, and of few digits.
    np.testing.assert_allclose(ours.lower_bounds_[0], theirs.lower_bounds_[0], rtol=1e-6)
    np.testing.assert_allclose(ours.lower_bounds_[1:], theirs.lower_bounds_[1:], rtol=1e-9)
    assert ours.lower_bound_ == ours.lower_bounds_[-1]
    for attribute in ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_"):
        expected = getattr(theirs, attribute)
        np.testing.assert_allclose(getattr(ours, attribute), expected, rtol=1e-7, atol=1e-9)
    np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-9)
    assert ours.bic(X) == pytest.approx(theirs.bic(X), rel=1e-10)
    assert ours.aic(X) == pytest.approx(theirs.aic(X), rel=1e-10)
    for mine, expected in zip(ours.sample(7), theirs.sample(7), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-6)


@pytest.mark.parametrize("case", [c for c in CASES if c["K"] <= 3], ids=name)
def test_a_case_of_reference_through_this_face(case):
    X, weight, _ = data(case["dataset"], case["weights"])
    kind, start = case["covariance_type"], start_of(case)
    spread = start.covariances
    precisions = 1 / spread if kind in ("diag", "spherical") else torch.linalg.inv(spread)
    model = GaussianMixture(
        case["K"],
        covariance_type=kind,
        weights_init=start.weights,
        means_init=start.means,
        precisions_init=precisions,
        reg_covar=0,
        tol=1e-13,
        max_iter=2000,
    )
    weights = None if weight is None else weight.numpy()
    model.fit(X.numpy(), sample_weight=weights)
    total = case["n"] if weight is None else float(weight.sum())
    assert model.lower_bound_ * total == pytest.approx(case["ll"], abs=2e-6)
    assert model._n_parameters() == case["df"]
    np.testing.assert_allclose(np.sort(model.weights_), case["weights_sorted"], atol=1e-5)
    if weight is None:
        assert model.bic(X.numpy()) == pytest.approx(case["bic"], abs=1e-5)
        assert model.icl(X.numpy()) == pytest.approx(case["icl_soft"], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_integer_weight_is_a_row_repeated(kind):
    X = blobs(120)
    weight = np.arange(120) % 3
    start = {"means_init": X[:3], "weights_init": [0.2, 0.3, 0.5], "random_state": 0}
    start["precisions_init"] = {
        "full": np.array([np.eye(3)] * 3) / 9,
        "tied": np.eye(3) / 9,
        "diag": np.full((3, 3), 1 / 9),
        "spherical": np.full(3, 1 / 9),
    }[kind]
    one = GaussianMixture(3, covariance_type=kind, **start).fit(X, sample_weight=weight)
    two = GaussianMixture(3, covariance_type=kind, **start).fit(np.repeat(X, weight, axis=0))
    np.testing.assert_allclose(one.means_, two.means_, rtol=1e-9)
    np.testing.assert_allclose(one.covariances_, two.covariances_, rtol=1e-8)
    assert one.lower_bound_ == pytest.approx(two.lower_bound_, rel=1e-12)


@pytest.mark.parametrize("init_params", ["kmeans", "random"])
def test_weights_count_at_the_start(init_params):
    X, weight = blobs(50), np.arange(50.0) % 3
    options = {"init_params": init_params, "random_state": 0, "max_iter": 0}
    start = GaussianMixture(1, **options).fit(X, sample_weight=weight)
    np.testing.assert_allclose(start.means_[0], np.average(X, axis=0, weights=weight))
    np.testing.assert_allclose(start.weights_, [1.0])


@pytest.mark.parametrize("init_params", ["k-means++", "random_from_data"])
def test_a_row_without_weight_is_no_seed(init_params):
    X, weight = np.arange(12.0)[:, None], np.zeros(12)
    weight[[3, 8]] = 1, 5
    options = {"init_params": init_params, "max_iter": 0}
    for seed in range(5):
        start = GaussianMixture(2, random_state=seed, **options).fit(X, sample_weight=weight)
        np.testing.assert_allclose(np.sort(start.means_[:, 0]), [3, 8])


def test_weights_of_zero_are_no_rows_and_negative_ones_an_error():
    X = blobs(20)
    weight = np.zeros(20)
    weight[:2] = 1
    with pytest.raises(ValueError, match="n_components = 3, n_samples = 2"):
        GaussianMixture(3).fit(X, sample_weight=weight)
    with pytest.raises(ValueError, match="Negative values"):
        GaussianMixture(3).fit(X, sample_weight=-weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_stay_tensors(dtype):
    X = torch.from_numpy(blobs()).to(dtype)
    model = GaussianMixture(3, random_state=0).fit(X)
    arrays = GaussianMixture(3, random_state=0).fit(X.numpy())
    for result in (model.means_, model.predict_proba(X), model.score_samples(X), model.weights_):
        assert isinstance(result, torch.Tensor)
        assert result.dtype == dtype
        assert result.device == X.device
    np.testing.assert_array_equal(model.means_.numpy(), arrays.means_)
    np.testing.assert_array_equal(model.predict(X).numpy(), arrays.predict(X.numpy()))
    rows, labels = model.sample(5)
    assert rows.dtype == torch.float64
    assert labels.dtype == torch.int64
    # What was fitted to one kind of rows scores another.
    assert isinstance(model.predict(X.numpy()), np.ndarray)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_tensors_stay_on_their_device():
    X = torch.from_numpy(blobs()).cuda()
    model = GaussianMixture(3, random_state=0).fit(X)
    assert model.means_.device == X.device
    assert model.predict(X).device == X.device
    there = GaussianMixture(3, random_state=0, device="cuda").fit(X.cpu().numpy())
    np.testing.assert_allclose(there.means_, model.means_.cpu().numpy(), rtol=1e-9)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (torch.zeros(3), "Expected 2D array, got 1D array"),
        (torch.zeros(1, 2), r"1 sample\(s\).*minimum of 2 is required by GaussianMixture"),
        (torch.zeros(5, 0), r"0 feature\(s\)"),
        (torch.tensor([[1.0], [float("nan")]]), "Input X contains NaN"),
        (torch.tensor([[1.0], [float("inf")]]), "Input X contains infinity"),
        (torch.zeros(3, 2, dtype=torch.complex64), "Complex data"),
    ],
)
def test_a_tensor_that_is_no_rows(X, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture().fit(X)


@pytest.mark.parametrize("make", [pd.DataFrame, lambda columns: pa.table(dict(columns))])
def test_tables_keep_their_names(make):
    X = blobs()
    table = make({"a": X[:, 0], "b": X[:, 1], "c": X[:, 2]})
    model = GaussianMixture(3, random_state=0).fit(table)
    assert model.feature_names_in_.tolist() == ["a", "b", "c"]
    assert model.n_features_in_ == 3
    plain = GaussianMixture(3, random_state=0).fit(X)
    np.testing.assert_array_equal(model.means_, plain.means_)
    np.testing.assert_array_equal(model.predict(table), plain.predict(X))
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(make({"b": X[:, 1], "a": X[:, 0], "c": X[:, 2]}))
    with pytest.raises(ValueError, match="X has 2 features, but GaussianMixture is expecting 3"):
        plain.predict(X[:, :2])


@pytest.mark.parametrize("precision", ["auto", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_precisions_end_close_by(kind, precision):
    X = blobs(600)
    options = {"covariance_type": kind, "random_state": 0, "tol": 1e-6, "max_iter": 300}
    exact = GaussianMixture(3, **options).fit(X)
    other = GaussianMixture(3, precision=precision, **options).fit(X)
    # float32 knows a bound to some 1e-6, about tol: it may stop a few dozen steps of that early.
    allowed = 5e-5 if precision == "float32" else 1e-5
    assert other.lower_bound_ == pytest.approx(exact.lower_bound_, abs=allowed)
    np.testing.assert_allclose(other.means_, exact.means_, atol=0.1)
    assert other.lower_bounds_ != exact.lower_bounds_


def test_clusters_a_thousand_sigma_apart_lose_no_digits():
    X = np.vstack([blobs(150, k=1), 3e5 + blobs(150, k=1, seed=1)])
    theirs = sklearn.mixture.GaussianMixture(2, random_state=0).fit(X)
    ours = GaussianMixture(2, random_state=0).fit(X)
    np.testing.assert_allclose(ours.covariances_, theirs.covariances_, rtol=1e-9)


@pytest.mark.parametrize("init_params", INITS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zero_weight_is_no_row(kind, init_params):
    """Wherever it stands and however far away: the same arithmetic, hence the same bits."""
    X, weight = blobs(200), np.ones(300)
    weight[np.random.default_rng(1).permutation(300)[:100]] = 0
    beside = np.full((300, 3), 1e9)
    beside[weight > 0] = X
    options = {"covariance_type": kind, "init_params": init_params, "random_state": 3, "n_init": 2}
    one = GaussianMixture(3, **options).fit(X, sample_weight=np.ones(200))
    other = GaussianMixture(3, **options).fit(beside, sample_weight=weight)
    np.testing.assert_array_equal(other.means_, one.means_)
    np.testing.assert_array_equal(other.covariances_, one.covariances_)
    assert other.lower_bounds_ == one.lower_bounds_
    assert len(other.fit_predict(beside, sample_weight=weight)) == 300


def test_more_starts_never_end_below_one():
    for seed in range(30):
        X = blobs(60, d=2, k=4, seed=seed)
        options = {"max_iter": 1, "random_state": seed, "tol": 1e-10}
        with pytest.warns(ConvergenceWarning):
            one = GaussianMixture(4, **options).fit(X)
        with pytest.warns(ConvergenceWarning):
            more = GaussianMixture(4, n_init=5, **options).fit(X)
        assert more.lower_bound_ >= one.lower_bound_


def test_of_starts_that_rounding_alone_tells_apart_the_first_is_taken():
    def scored(bound: float) -> Lane:
        lane = Lane.start(start_of(CASES[0]), EMConfig())
        lane.lower_bounds = [bound]
        return lane

    bounds = [-3.0, -2.0, -2.0 + 4e-16, math.nan, -2.0 - 1e-15, -1.999, -math.inf]
    lanes = [scored(bound) for bound in bounds]
    assert [lanes.index(lane) for lane in ranked(lanes)] == [5, 1, 2, 4, 0, 3, 6]


def test_shards_change_rounding_only():
    X = blobs(4000)
    one = GaussianMixture(3, random_state=0, n_shards=1).fit(X)
    many = GaussianMixture(3, random_state=0, n_shards=7).fit(X)
    again = GaussianMixture(3, random_state=0, n_shards=7).fit(X)
    np.testing.assert_allclose(one.means_, many.means_, rtol=1e-10)
    np.testing.assert_array_equal(many.means_, again.means_)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_torchs_threads_are_as_they_were(n_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    found: list[int] = []

    def fit() -> None:
        GaussianMixture(2, random_state=0, n_shards=3).fit(blobs())
        found.append(torch.get_num_threads())

    try:
        workers = [threading.Thread(target=fit) for _ in range(4)]
        for worker in workers:
            worker.start()
        fit()
        for worker in workers:
            worker.join()
        found.append(torch.get_num_threads())
        new = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        new.start()
        new.join()
    finally:
        torch.set_num_threads(before)
    assert found == [n_threads] * 7


@pytest.mark.parametrize("kind", KINDS)
def test_to_scikit_learn_and_back_to_the_bit(kind):
    X = blobs()
    model = GaussianMixture(3, covariance_type=kind, random_state=0, tol=1e-4).fit(
        pd.DataFrame(X, columns=list("abc"))
    )
    theirs = model.to_sklearn()
    assert type(theirs) is sklearn.mixture.GaussianMixture
    assert theirs.tol == 1e-4
    back = GaussianMixture.from_sklearn(theirs)
    for attribute in [a for a in vars(model) if a.endswith("_")]:
        np.testing.assert_array_equal(getattr(theirs, attribute), getattr(model, attribute))
        np.testing.assert_array_equal(getattr(back, attribute), getattr(model, attribute))
    frame = pd.DataFrame(X, columns=list("abc"))
    np.testing.assert_array_equal(theirs.predict(frame), model.predict(frame))
    assert theirs.score(frame) == pytest.approx(model.score(frame), rel=1e-12)
    theirs.means_[0, 0] = 99
    assert model.means_[0, 0] != 99
    unfitted = GaussianMixture.from_sklearn(sklearn.mixture.GaussianMixture(4, tol=0.5))
    assert (unfitted.n_components, unfitted.tol) == (4, 0.5)
    with pytest.raises(NotFittedError, match="This GaussianMixture instance is not fitted"):
        unfitted.predict(X)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"means_": np.array([[np.nan, 0.0]] * 2)}, r"means\[0, 0\] is nan"),
        ({"weights_": np.array([1.5, -0.5])}, r"component 1 has the weight -0\.5"),
        ({"weights_": np.array([0.5, 0.4])}, r"weights sum to 0\.9, not to 1"),
        ({"weights_": np.array([1.0])}, r"have shapes \[\(1,\), \(2, 2\)\]"),
        ({"precisions_cholesky_": np.zeros((2, 2, 2))}, "not the factors of positive-definite"),
        ({"precisions_cholesky_": np.full((2, 2, 2), np.nan)}, "not the factors"),
        ({"precisions_cholesky_": np.zeros((2, 2))}, r"has shape \(2, 2\), not \(2, 2, 2\)"),
    ],
)
def test_of_scikit_learns_models_those_of_unsound_numbers_are_refused(changes, message):
    for theirs, ours in (
        (sklearn.mixture.GaussianMixture, GaussianMixture),
        (sklearn.mixture.BayesianGaussianMixture, gmm_dist.BayesianGaussianMixture),
    ):
        for dtype in (np.float64, np.float32):
            fitted = theirs(n_components=2, random_state=0, tol=1).fit(
                blobs(d=2, k=2).astype(dtype)
            )
            ours.from_sklearn(fitted)
        if ours is GaussianMixture or "weights_" not in changes:
            for name, value in changes.items():
                setattr(fitted, name, value)
            with pytest.raises(ValueError, match=message):
                ours.from_sklearn(fitted)


def test_pickle_copy_and_clone():
    X = blobs()
    model = GaussianMixture(3, random_state=0, n_shards=2).fit(X)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), copy.copy(model)):
        np.testing.assert_array_equal(twin.score_samples(X), model.score_samples(X))
    fresh = clone(model)
    assert fresh.get_params() == model.get_params()
    assert not hasattr(fresh, "means_")


def test_pipeline_grid_search_and_set_output():
    frame = pd.DataFrame(blobs(), columns=list("abc"))
    pipeline = make_pipeline(StandardScaler().set_output(transform="pandas"), GaussianMixture())
    grid = {"gaussianmixture__n_components": [1, 3], "gaussianmixture__random_state": [0]}
    search = GridSearchCV(pipeline, grid, cv=3).fit(frame)
    assert search.best_params_["gaussianmixture__n_components"] == 3
    assert search.best_estimator_[-1].feature_names_in_.tolist() == ["a", "b", "c"]
    weight = np.ones(len(frame))
    pipeline.fit(frame, gaussianmixture__sample_weight=weight)
    assert pipeline.predict(frame).shape == (len(frame),)


def test_no_convergence_is_a_warning_with_the_status_sentence():
    with pytest.warns(ConvergenceWarning, match="did not converge.*raise max_iter or tol"):
        model = GaussianMixture(3, max_iter=2, tol=0, random_state=0).fit(blobs())
    assert model.converged_ is False
    assert model.n_iter_ == len(model.lower_bounds_) == 2


def test_a_singular_covariance_is_an_error():
    X = np.repeat(np.eye(2), 5, axis=0)
    with (
        pytest.warns(ConvergenceWarning, match="distinct clusters"),
        pytest.raises(ValueError, match="ill-defined empirical covariance"),
    ):
        GaussianMixture(4, reg_covar=0, random_state=0).fit(X)


def test_float32_is_named_where_it_may_be_what_makes_a_covariance_singular():
    X = np.array([[9999.0], [0.0]])
    model = GaussianMixture(2, reg_covar=0.1, random_state=0, precision="float32")
    with pytest.raises(ValueError, match=r"ill-defined .* Or leave out precision='float32'"):
        model.fit(X)
    for precision in ("auto", "float64"):
        fitted = model.set_params(precision=precision).fit(X)
        np.testing.assert_allclose(fitted.covariances_, 0.1, rtol=1e-6)


def test_warm_start_goes_on():
    X = blobs()
    model = GaussianMixture(3, random_state=0, max_iter=1, tol=1e-8, warm_start=True)
    for _ in range(5):
        with pytest.warns(ConvergenceWarning):
            model.fit(X)
    with pytest.warns(ConvergenceWarning):
        straight = GaussianMixture(3, random_state=0, max_iter=5, tol=1e-8).fit(X)
    np.testing.assert_allclose(model.means_, straight.means_, rtol=1e-10)
    assert model.lower_bound_ == pytest.approx(straight.lower_bound_, rel=1e-12)


def test_verbose_tells_of_trials_and_iterations(capsys):
    model = GaussianMixture(3, random_state=0, n_init=2, verbose=2, verbose_interval=1, tol=1e-4)
    model.fit(blobs())
    told = capsys.readouterr().out
    assert "Initialization 1  Iteration 2" in told
    assert told.count("converged.") == 2
    GaussianMixture(3, random_state=0).fit(blobs())
    assert capsys.readouterr().out == ""


def test_a_lake_is_fitted_on_ray(tmp_path, ray_address):
    X = load_iris().data
    columns = {"a": X[:, 0], "b": X[:, 2], "w": np.ones(len(X)), "t": np.arange(len(X))}
    lakes.write(tmp_path / "lake" / "x.parquet", columns, rows_per_group=40)
    lake = Lake(
        url=str(tmp_path / "lake"),
        columns=["a", "b"],
        weight_column="w",
        where=(pc.field("t") >= 20) & pc.field("a").is_valid(),
    )
    cluster = Cluster(ray_address, num_workers=2)
    model = GaussianMixture(2, random_state=0, tol=1e-6).fit(lake, cluster=cluster)
    rows = X[20:][:, [0, 2]]
    assert model.feature_names_in_.tolist() == ["a", "b"]
    assert model.converged_ is True
    frame = pd.DataFrame(rows, columns=["a", "b"])
    assert model.score(frame) == pytest.approx(model.lower_bound_, abs=1e-9)
    near = GaussianMixture(2, random_state=0, n_init=5, tol=1e-6).fit(rows)
    assert model.lower_bound_ == pytest.approx(near.lower_bound_, abs=1e-3)

    again = clone(model).set_params(
        weights_init=model.weights_, means_init=model.means_, precisions_init=model.precisions_
    )
    assert again.fit(lake, cluster=cluster).lower_bounds_[0] == pytest.approx(
        model.lower_bound_, abs=1e-9
    )
    told = dataclasses.replace(lake, where="t >= 20 and (a is not null or t in (0))")
    chosen = gmm_dist.select(told, n_components=[1, 2], covariance_type="diag", cluster=cluster)
    assert chosen.best.feature_names_in_.tolist() == ["a", "b"]
    assert chosen.best.n_components == 2


@pytest.mark.parametrize("kind", [GaussianMixture, gmm_dist.BayesianGaussianMixture])
def test_a_cluster_is_for_a_lake_alone(kind):
    for verb in (kind().fit, lambda X, cluster: gmm_dist.select(X, cluster=cluster)):
        with pytest.raises(ValueError, match=r"^cluster is for a lake, .* leave it out$"):
            verb(blobs(), cluster=Cluster(num_workers=2))
        with pytest.raises(TypeError, match=r"^cluster is '10\.0\.0\.1:6379': give gmm_dist\.Clu"):
            verb(Lake(url="nowhere"), cluster="10.0.0.1:6379")


def test_a_cluster_and_weights_are_routed_to_the_estimator():
    """A pipeline hands on what a step asks for, and nothing else."""
    with sklearn.config_context(enable_metadata_routing=True):
        asking = GaussianMixture().set_fit_request(cluster=True, sample_weight=True)
        steps = make_pipeline(asking)
        with pytest.raises(ValueError, match=r"^cluster is for a lake"):
            steps.fit(blobs(), cluster=Cluster())
        assert steps.fit(blobs(), sample_weight=np.ones(300)).predict(blobs()).shape == (300,)
        with pytest.raises(UnsetMetadataPassedError, match="cluster"):
            make_pipeline(GaussianMixture()).fit(blobs(), cluster=Cluster())


def test_what_a_lake_does_not_take():
    lake = Lake(url="nowhere")
    with pytest.raises(ValueError, match="weight_column"):
        GaussianMixture().fit(lake, sample_weight=[1])
    with pytest.raises(TypeError, match="`gmm-dist score` writes"):
        GaussianMixture().fit_predict(lake)
    with pytest.raises(ValueError, match="give all three, or none"):
        GaussianMixture(1, means_init=[[0.0]]).fit(lake)
    with pytest.raises(ValueError, match="nowhere"):
        GaussianMixture(1).fit(lake)


def test_foreign_arrays_go_through_dlpack():
    class Foreign:
        """An array that knows the array API and DLPack, and nothing else."""

        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def __array_namespace__(self):
            return Namespace

        def __dlpack__(self, **options):
            return self.tensor.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    class Namespace:
        from_dlpack = staticmethod(lambda tensor: Foreign(tensor))

    X = torch.from_numpy(blobs())
    model = GaussianMixture(3, random_state=0).fit(Foreign(X))
    assert isinstance(model.means_, Foreign)
    labels = model.predict(Foreign(X))
    assert isinstance(labels, Foreign)
    plain = GaussianMixture(3, random_state=0).fit(X)
    assert torch.equal(labels.tensor, plain.predict(X))
    assert torch.equal(tensor_of(model.means_), plain.means_)
    assert model.to_sklearn().means_.shape == (3, 3)


@pytest.mark.long  # a command of its own: python -m tools.sklearn_suite
def test_scikit_learns_own_tests_with_our_classes():
    command = [sys.executable, "-m", "tools.sklearn_suite"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    # Without array-api-strict there are 32 fewer.
    assert passed
    assert int(passed[1]) >= 180


# ---- float32, and models made by hand ----------------------------------------------------------


def nearly_flat() -> np.ndarray:
    """Return float32 rows whose covariances, in float32, are singular."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(500, 1)) * 100
    columns = [z, 2 * z + rng.normal(size=(500, 1)) * 1e-4, rng.normal(size=(500, 1))]
    return np.hstack(columns).astype(np.float32)


@pytest.mark.parametrize("reg_covar", [1e-3, 1e-6])
@pytest.mark.parametrize("kind", ["full", "tied"])
def test_float32_rows_are_scored_as_they_were_fitted(kind, reg_covar):
    X = nearly_flat()
    options = {"covariance_type": kind, "reg_covar": reg_covar, "random_state": 0}
    model = GaussianMixture(2, **options).fit(X)
    assert model.covariances_.dtype == np.float32
    rows = X.astype(np.float64)
    expected = model.to_sklearn()
    expected.precisions_cholesky_ = expected.precisions_cholesky_.astype(np.float64)
    expected.means_ = expected.means_.astype(np.float64)
    np.testing.assert_allclose(model.score(rows), expected.score(rows), rtol=1e-5)
    # A mean that is rounded to float32 is off by some 1e-6 of 1e-4.
    assert model.score(X) == pytest.approx(model.lower_bound_, abs=0.05)
    again = copy.copy(model).set_params(warm_start=True).fit(X)
    assert again.lower_bounds_[0] == pytest.approx(model.lower_bound_, abs=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_made_by_hand_scores_by_its_factors(kind):
    X = blobs()
    fitted = GaussianMixture(3, covariance_type=kind, random_state=0).fit(X)
    makers = (GaussianMixture, sklearn.mixture.GaussianMixture)
    ours, theirs = (make(3, covariance_type=kind) for make in makers)
    for made in (ours, theirs):
        made.weights_, made.means_ = fitted.weights_, fitted.means_
        made.precisions_cholesky_ = 0.5 * fitted.precisions_cholesky_
    np.testing.assert_allclose(ours.score_samples(X), theirs.score_samples(X), rtol=1e-9)
    for made in (ours, theirs):
        made.covariances_ = fitted.covariances_  # are for drawing, not for scoring
    np.testing.assert_allclose(ours.score_samples(X), theirs.score_samples(X), rtol=1e-9)
    np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))
    ours.precisions_cholesky_ = 0 * fitted.precisions_cholesky_
    del ours.covariances_
    with pytest.raises(ValueError, match="not the factors of positive-definite precisions"):
        ours.score(X)


# ---- settings that are refused, and said where --------------------------------------------------


def test_a_lake_takes_no_settings_of_rows_in_memory():
    for options, message in [
        ({"device": "cpu"}, "use_gpu="),
        ({"n_shards": 2}, "planned from its"),
    ]:
        with pytest.raises(ValueError, match=message):
            GaussianMixture(**options).fit(Lake(url="nowhere"))


def test_of_a_lake_too_messages_name_arguments(tmp_path):
    model = GaussianMixture(2, random_state=0, warm_start=True).fit(blobs())
    lakes.write(tmp_path / "lake" / "a.parquet", {"x": np.arange(9.0), "y": np.arange(9.0) ** 2})
    with pytest.raises(ValueError, match=r"start has 3 features, but .* has 2 \(x, y\)"):
        model.fit(Lake(url=str(tmp_path / "lake")))


def test_rows_that_lie_in_order_are_not_copied_whole():
    X = blobs()
    assert viewed(X).data_ptr() == X.ctypes.data
    model = GaussianMixture(3, random_state=0).fit(X)
    expected = model.score_samples(X)
    X.flags.writeable = False
    np.testing.assert_array_equal(model.score_samples(X), expected)
    for rows in (np.asfortranarray(X), X[::-1][::-1]):
        np.testing.assert_array_equal(model.score_samples(rows), expected)


def test_a_path_is_no_rows():
    for verb in (GaussianMixture().fit, GaussianMixture().fit_predict, gmm_dist.select):
        with pytest.raises(TypeError, match=r"X is 's3://x/y', a place .* gmm_dist\.Lake"):
            verb("s3://x/y")
    with pytest.raises(TypeError, match=r"gmm_dist\.Lake"):
        GaussianMixture().fit(Path("x"))


def test_only_scikit_learns_class_becomes_ours():
    with pytest.raises(TypeError, match=r"takes a sklearn\.mixture\.GaussianMixture, not a skl"):
        GaussianMixture.from_sklearn(sklearn.mixture.BayesianGaussianMixture())


def test_a_device_that_is_none():
    names = ["bogus"] if torch.cuda.is_available() else ["bogus", "cuda"]
    for device in names:
        with pytest.raises(ValueError, match=f"device is '{device}', where torch can work on no"):
            GaussianMixture(device=device).fit(blobs())


def test_sparse_tensors_are_refused():
    with pytest.raises(ValueError, match=r"sparse tensor .* X\.to_dense\(\)"):
        GaussianMixture().fit(torch.eye(4).to_sparse())


@pytest.mark.parametrize("kind", [GaussianMixture, gmm_dist.BayesianGaussianMixture])
def test_a_warm_start_wants_the_same_number_of_components(kind):
    model = kind(n_components=2, random_state=0, warm_start=True).fit(blobs())
    with pytest.raises(ValueError, match="from a fit of 2 components, but n_components is 3"):
        model.set_params(n_components=3).fit(blobs())
    assert model.set_params(n_components=2).fit(blobs()).means_.shape[0] == 2


def test_a_warm_start_wants_the_same_features_and_covariance_type():
    model = GaussianMixture(2, random_state=0, warm_start=True).fit(blobs())
    with pytest.raises(ValueError, match="fit to 3 features, but X has 2: give rows of the same"):
        model.fit(blobs(d=2))
    with pytest.raises(
        ValueError, match=r"precisions_cholesky_ has shape \(2, 3, 3\), not \(2, 3\)"
    ):
        model.set_params(covariance_type="diag").fit(blobs())


# ---- weights, memory, warnings, names -----------------------------------------------------------


@pytest.mark.parametrize("init_params", ["k-means++", "random"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_unit_of_weights_does_not_matter(kind, init_params):
    X, n = blobs(), 300
    options = {"covariance_type": kind, "init_params": init_params, "random_state": 0}
    plain = GaussianMixture(3, **options, max_iter=500).fit(X)
    small = GaussianMixture(3, **options, max_iter=500).fit(X, sample_weight=np.full(n, 2.0**-50))
    np.testing.assert_allclose(small.means_, plain.means_, rtol=1e-9)
    assert small.lower_bound_ == pytest.approx(plain.lower_bound_, rel=1e-12)


def test_starts_take_no_copy_of_the_rows_for_each_component():
    X, k = torch.zeros(200_000, 2, dtype=torch.float64), 40
    share = torch.full((len(X), k), 1 / k, dtype=torch.float64)
    total = TotalMoments(n_samples=float(len(X)), n_rows=len(X), sum_x=X.sum(0), sum_xx=X.T @ X)
    with torch.profiler.profile(profile_memory=True) as profile:
        moments_of_shares("full", X, share, total, torch.zeros(2, dtype=torch.float64))
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert most < 6 * X.nbytes


def test_warnings_point_to_the_callers_line():
    model = GaussianMixture(3, max_iter=2, tol=0, random_state=0)
    for verb in (model.fit, model.fit_predict):
        with pytest.warns(ConvergenceWarning) as caught:
            verb(blobs())
        assert [Path(w.filename).name for w in caught] == [Path(__file__).name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", ["fit", "fit_predict"])
def test_a_reg_covar_beyond_a_features_variance_is_told(kind, verb):
    frame = pd.DataFrame(blobs() * [1.0, 1e-4, 1.0], columns=["a", "b", "c"])
    if kind == "spherical":  # its one variance is dominated by the largest feature
        frame *= 1e-5
    model = GaussianMixture(2, covariance_type=kind, random_state=0)
    name, variance = ("'a'" if kind == "spherical" else "'b'"), frame.var(ddof=0)
    variance = variance["a" if kind == "spherical" else "b"]
    with pytest.warns(UserWarning, match=f"more than the variance of feature {name}") as caught:
        getattr(model, verb)(frame)
    (told,) = caught
    assert str(told.message).startswith("reg_covar=1e-06 is more than")
    assert f"far below {variance:.2g}, its variance over all rows" in str(told.message)
    assert Path(told.filename).name == Path(__file__).name


@pytest.mark.parametrize("kind", KINDS)
def test_a_reg_covar_below_every_variance_is_not_told(kind):
    X = blobs() * [1.0, 1e-4, 1.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Far below; and a feature that is constant has no variance to be compared.
        GaussianMixture(2, covariance_type=kind, reg_covar=1e-12, random_state=0).fit(X)
        flat = np.c_[blobs(), np.full(300, 7.0)]
        GaussianMixture(1, covariance_type=kind, random_state=0).fit(flat)


def test_a_reg_covar_beyond_a_lakes_variance_is_told(tmp_path, ray_address):
    lakes.write(tmp_path / "a.parquet", {"x": blobs()[:, 0] * 1e-4, "y": blobs()[:, 1]})
    lake, cluster = Lake(url=tmp_path), Cluster(ray_address, num_workers=1)
    model = GaussianMixture(2, covariance_type="diag", n_init=1, random_state=0)
    with pytest.warns(UserWarning, match="more than the variance of feature 'x'") as caught:
        model.fit(lake, cluster=cluster)
    assert [Path(w.filename).name for w in caught] == [Path(__file__).name]


def test_a_record_batch_keeps_its_names():
    X = blobs()
    batch = pa.record_batch({"a": X[:, 0], "b": X[:, 1], "c": X[:, 2]})
    model = GaussianMixture(3, random_state=0).fit(batch)
    assert model.feature_names_in_.tolist() == ["a", "b", "c"]
    assert model.predict(batch).shape == (300,)


def test_of_starts_that_nothing_iterates_the_last_is_kept():
    X, options = blobs(), {"n_init": 3, "max_iter": 0, "init_params": "random", "random_state": 0}
    ours = GaussianMixture(3, **options).fit(X)
    theirs = sklearn.mixture.GaussianMixture(3, **options).fit(X)
    np.testing.assert_allclose(ours.means_, theirs.means_, rtol=1e-9)


@mixtures.few_types
@pytest.mark.parametrize("weighted", [pytest.param(False, marks=pytest.mark.long), True])
def test_rows_and_the_lake_that_holds_them_have_the_same_bits(
    kind, weighted, tmp_path, ray_address
):
    """Same rows, start and rules: whether they lie in memory or in a file changes nothing."""
    X = blobs(700, d=3, k=4, seed=1) * [1.0, 1e3, 1e-2]
    weight = np.random.default_rng(2).uniform(0.5, 3, len(X)) if weighted else None
    columns = {name: X[:, j] for j, name in enumerate("abc")}
    if weighted:
        columns["w"] = weight
    lakes.write(tmp_path / "lake.parquet", columns, rows_per_group=len(X))
    lake = Lake(
        str(tmp_path / "lake.parquet"),
        columns=["a", "b", "c"],
        weight_column="w" if weighted else None,
    )
    options = {"covariance_type": kind, "random_state": 3, "tol": 1e-6}
    cluster = Cluster(ray_address, num_workers=1)
    of_lake = GaussianMixture(4, n_init=2, **options).fit(lake, cluster=cluster)
    model = GaussianMixture(4, n_init=2, init_params="search", n_shards=1, **options)
    of_rows = model.fit(X, sample_weight=weight)
    for attribute in ("weights_", "means_", "covariances_", "precisions_cholesky_"):
        np.testing.assert_array_equal(getattr(of_rows, attribute), getattr(of_lake, attribute))
    assert of_rows.lower_bounds_ == of_lake.lower_bounds_
    assert (of_rows.init_params_, of_rows.n_init_) == ("search", 2)
    assert (of_lake.init_params_, of_lake.n_init_) == ("search", 2)


def test_the_defaults_of_starts_are_told_and_never_rewritten():
    X = blobs(300, d=2, k=3)
    plain = GaussianMixture(3, random_state=0).fit(X)
    assert (plain.n_init, plain.init_params) == (None, None)
    assert (plain.n_init_, plain.init_params_) == (1, "kmeans")
    expected = sklearn.mixture.GaussianMixture(3, random_state=0).fit(X)
    np.testing.assert_allclose(plain.means_, expected.means_, rtol=1e-9)
    searched = GaussianMixture(3, init_params="search", random_state=0).fit(X)
    assert (searched.n_init_, searched.init_params_) == (16, "search")
    one = GaussianMixture(3, init_params="search", n_init=1, random_state=0).fit(X)
    assert (one.n_init, one.n_init_) == (1, 1)
    assert searched.to_sklearn().get_params()["init_params"] == "kmeans"
    searched.warm_start = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        searched.fit(X)
    assert (searched.n_init_, searched.init_params_) == (1, "given")


@pytest.mark.parametrize("weighted", [False, True])
def test_a_search_ends_no_lower_than_one_start(weighted):
    X = make_blobs(900, 2, centers=9, cluster_std=0.5, random_state=5)[0]
    weight = np.random.default_rng(0).uniform(0.5, 2, len(X)) if weighted else None
    options = {"tol": 1e-6, "max_iter": 3000, "random_state": 0}
    one = GaussianMixture(9, **options).fit(X, sample_weight=weight)
    searched = GaussianMixture(9, init_params="search", **options).fit(X, sample_weight=weight)
    assert searched.lower_bound_ >= one.lower_bound_ - 1e-6
    mean = np.average(searched.score_samples(X), weights=weight)
    assert mean == pytest.approx(searched.lower_bound_, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_centre_of_many_rows_is_theirs(dtype):
    """In float32 the last of the rows that are looked at would lie beyond the end."""
    n = 2**24 + 1024 + 3
    rows = torch.full((1, 1), 7.0, dtype=torch.float64).expand(n, 1)  # takes no memory
    torch.set_default_dtype(dtype)
    try:
        assert robust_centre(rows).tolist() == [7.0]
    finally:
        torch.set_default_dtype(torch.float32)


def test_weights_that_were_published_as_float32_can_be_drawn_from():
    """All but the last may then sum to more than one, which NumPy's multinomial refuses."""
    weights = np.array([1 / 3, 2 / 3 + 6e-8, 1e-12], dtype=np.float32)
    assert weights[:-1].sum(dtype=np.float64) > 1 + 1e-12
    model = GaussianMixture(3, covariance_type="spherical", random_state=0)
    model.fit(np.array([[0.0], [1.0], [10.0], [11.0], [20.0], [21.0]], dtype=np.float32))
    model.weights_ = weights
    rows, labels = model.sample(500)
    assert rows.shape == (500, 1)
    assert set(labels.tolist()) == {0, 1}
    assert abs((labels == 0).mean() - 1 / 3) < 0.07  # three standard errors

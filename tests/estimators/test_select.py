"""The sweep as a function: what it ranks is right, prints, and can be drawn."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import make_blobs

import gmm_dist
from gmm_dist import Lake, UserError, select
from gmm_dist.estimators.select import _select_again

pytestmark = pytest.mark.unchecked  # whole searches


@pytest.fixture(scope="module")
def X() -> pd.DataFrame:  # noqa: N802 - the field's own capital
    rows = make_blobs(600, 3, centers=4, cluster_std=1.0, random_state=0)[0]
    return pd.DataFrame(rows, columns=list("abc"))


@pytest.fixture(scope="module")
def selection(X):
    return select(X, n_components=[3, 4, 5], covariance_type=("full", "diag"))


def test_the_best_is_fitted_and_scored_as_the_table_says(X, selection):
    best, first = selection.best, selection.rows()[0]
    assert isinstance(best, gmm_dist.GaussianMixture)
    assert (best.n_components, best.covariance_type) == (4, "diag") == (first["k"], "diag")
    assert first["covariance_type"] == "diag"
    assert best.bic(X) == pytest.approx(first["bic"], abs=1e-6)
    assert best.aic(X) == pytest.approx(first["aic"], abs=1e-6)
    assert best.icl(X) == pytest.approx(first["icl"], abs=1e-6)
    assert best.score(X) * len(X) == pytest.approx(first["log_likelihood"], rel=1e-9)
    assert best.feature_names_in_.tolist() == ["a", "b", "c"]
    assert isinstance(best.means_, np.ndarray)


def test_it_prints_as_a_table_and_becomes_a_frame(selection):
    lines = str(selection).splitlines()
    assert lines[0].split()[:4] == ["rank", "k", "covariance_type", "bic"]
    assert lines[1].split()[:3] == ["1", "4", "diag"]
    # The sum for programs, the mean for people.
    assert "mean log-likelihood, nats per row" in lines[0]
    assert f" {selection.rows()[0]['log_likelihood'] / 600:.4f} " in lines[1]
    assert repr(selection) == str(selection)
    frame = selection.to_frame()
    assert len(frame) == 6
    sums = [scored.fit.log_likelihood for scored in selection.result.ranked]
    assert frame["log_likelihood"].tolist() == sums
    assert frame["mean_log_likelihood"].tolist() == [total / 600 for total in sums]
    assert frame["bic"].is_monotonic_increasing
    assert set(zip(frame["k"], frame["covariance_type"], strict=True)) == {
        (k, kind) for k in (3, 4, 5) for kind in ("full", "diag")
    }


def test_it_draws_a_line_for_each_covariance_type(selection):
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib.figure import Figure

    ax = selection.plot(Figure().subplots())
    full, diag, star = ax.get_lines()
    assert [full.get_label(), diag.get_label()] == ["full", "diag"]
    assert diag.get_xdata().tolist() == [3, 4, 5]
    assert star.get_xdata().tolist() == [4]
    assert star.get_ydata()[0] == selection.rows()[0]["bic"]
    assert ax.get_ylabel() == "BIC"


def test_a_failed_candidate_has_no_rank_and_a_best_at_the_edge_a_note():
    rows = np.repeat(make_blobs(40, 2, centers=1, random_state=0)[0], 2, axis=0)
    found = select(rows, n_components=[1, 40], covariance_type="full", reg_covar=1e-6)
    assert [row["rank"] for row in found.rows()] == [1, None]
    assert "  -  40" in str(found) or str(found).splitlines()[2].split()[0] == "-"
    edge = select(rows, n_components=[2, 3], covariance_type="diag", sample_weight=np.ones(80))
    k = edge.best.n_components
    noted = any(
        f"the best k is the {'smallest' if k == 2 else 'largest'}" in w for w in edge.warnings()
    )
    assert noted
    (again,) = re.findall(r"select again with n_components=(.+)$", str(edge), re.MULTILINE)
    assert list(eval(again)) == ([1, 2] if k == 2 else [3, 4, 5, 6])


def test_a_grid_with_gaps_is_told_as_python_reads_it():
    assert _select_again("4,6,8") == "select again with n_components=(4, 6, 8)"


def test_rows_of_zero_weight_change_no_bit(X):
    weight = np.ones(2 * len(X))
    weight[::2] = 0
    beside = np.full((2 * len(X), X.shape[1]), -1e7)
    beside[1::2] = X
    options = {"n_components": range(1, 4), "n_init": 3, "init_params": "random"}
    one = select(X, sample_weight=np.ones(len(X)), **options)
    other = select(beside, sample_weight=weight, **options)
    assert one.rows() == other.rows()


def test_weights_count(X):
    weight = np.arange(600) % 2
    half = select(X, n_components=2, covariance_type="diag", sample_weight=weight)
    rows = select(X[weight == 1], n_components=2, covariance_type="diag")
    assert half.rows()[0]["bic"] == pytest.approx(rows.rows()[0]["bic"], rel=1e-6)
    assert math.isclose(half.result.n_samples, 300)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "gap"}, "criterion is 'gap': give one of bic"),
        ({"criterion": "holdout"}, "for lakes"),
        ({"covariance_type": ["round"]}, "covariance_type has 'round'"),
        ({"n_components": []}, "one of each at least"),
        ({"n_components": 0}, "whole numbers >= 1"),
        (
            {"n_components": 601},
            "^n_components asks for 601 components, but there are 600 rows: give at most 600",
        ),
        ({"n_components": "3..5"}, r"n_components has '3\.\.5': give a whole number"),
        ({"n_components": [2.5]}, r"n_components has 2\.5: give a whole number"),
        ({"n_components": None}, "n_components has None"),
        ({"n_components": [True]}, "n_components has True"),
    ],
)
def test_what_it_does_not_take(X, options, message):
    with pytest.raises(UserError, match=message):
        select(X, **options)


def test_of_the_defaults_those_are_fitted_that_the_rows_can_rank(X):
    found = select(X[:8], n_init=1)
    asked = sorted((row["covariance_type"], row["k"]) for row in found.rows())
    # 4 rows of 3 features make a full covariance, 2 make variances.
    assert asked == [("diag", 2), ("diag", 3), ("diag", 4), ("full", 2)]
    note = "not tried: full with k above 2 and diag with k above 4, for 8 rows of 3 features"
    assert note in found.warnings()[0]
    assert not any("again with n_components from 4" in text for text in found.warnings())


def test_full_covariances_of_more_features_than_rows_are_not_tried_unasked():
    rows = make_blobs(40, 60, centers=2, random_state=0)[0]
    found = select(rows, n_components=[1, 2], n_init=1)
    assert [row["covariance_type"] for row in found.rows()] == ["diag", "diag"]
    assert found.best.covariance_type == "diag"
    assert "not tried: full covariances, for 40 rows of 60 features" in found.warnings()[0]
    with pytest.raises(UserError, match=r"^40 rows of 60 features are too few for 2 .*, full:"):
        select(rows, covariance_type="full")
    with pytest.raises(UserError, match=r"^3 rows of 60 .* for 2 components, full or diag: give"):
        select(rows[:3])


def test_settings_are_checked_as_the_estimators(X):
    with pytest.raises(ValueError, match="'tol' parameter of GaussianMixture"):
        select(X, n_components=2, tol="a")
    with pytest.raises(UserError, match=r"^n_init is 2\.5: give a whole number >= 1"):
        select(X, n_components=2, n_init=2.5)
    with pytest.raises(ValueError, match="'n_shards' parameter of GaussianMixture"):
        select(X, n_components=2, n_shards=0)
    with pytest.raises(ValueError, match="cannot be used to seed"):
        select(X, n_components=2, random_state="seed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_weight": [1.0]}, "weight_column="),
        ({"device": "cpu"}, "use_gpu="),
        ({"n_shards": 2}, "planned from its files"),
    ],
)
def test_a_lake_takes_no_settings_of_rows_in_memory(options, message):
    with pytest.raises(ValueError, match=message):
        select(Lake(url="nowhere"), **options)


def test_numpys_numbers_and_scikit_learns_seeds(X):
    options = {"n_components": np.int64(3), "covariance_type": "diag", "n_init": 2}
    seed = int(np.random.RandomState(7).randint(2**31 - 1))
    state = np.random.RandomState(7)
    one = select(X, random_state=np.int64(seed), precision="float64", **options)
    two = select(X, random_state=state, precision="float64", **options)
    np.testing.assert_array_equal(one.best.means_, two.best.means_)
    assert one.best.random_state == seed
    assert two.best.random_state is state
    assert one.best.precision == "float64"
    assert select(X, random_state=None, **options).best.random_state is None


def test_a_small_cluster_of_many_features_is_found():
    """40 rows of 64 features, 30 sigma away: too few for a full covariance."""
    rng = np.random.default_rng(0)
    centres, sizes = rng.normal(0, 3, (5, 64)), [400, 400, 400, 400, 40]
    X = np.vstack([c + rng.normal(size=(n, 64)) for c, n in zip(centres, sizes, strict=True)])
    assert select(X, [4, 5], "spherical", n_init=4).rows()[0]["k"] == 5


def test_units_of_the_features_change_no_more_than_the_jacobian():
    rng = np.random.default_rng(0)
    X = np.r_[rng.normal(0, 1, (300, 2)), rng.normal(8, 1, (300, 2))]
    unit = np.array([1e-4, 1e6])
    # Not three: for two clusters these have several optima, and rounding would choose.
    plain, scaled = (select(rows, [1, 2], n_init=2).rows() for rows in (X, X * unit))
    assert [(r["k"], r["covariance_type"]) for r in scaled] == [
        (r["k"], r["covariance_type"]) for r in plain
    ]
    jacobian = 2 * 600 * np.log(unit).sum()
    for one, other in zip(plain, scaled, strict=True):
        assert other["bic"] == pytest.approx(one["bic"] + jacobian, abs=0.05)

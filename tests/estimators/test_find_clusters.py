"""Clusters of a fitted mixture, asked of rows in memory and of a lake."""

from __future__ import annotations

from pathlib import Path

import here
import mixtures
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score

import gmm_dist
from gmm_dist import GaussianMixture, Lake, Mixture, UserError, find_clusters
from gmm_dist.fitting import lake_sweep

pytestmark = pytest.mark.unchecked


def two_squares(n: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(n) % 2
    X = np.random.default_rng(0).uniform(size=(n, 2)) + 1e4 + 3 * labels[:, None]
    return X, labels


@pytest.fixture(scope="module")
def model() -> GaussianMixture:
    return GaussianMixture(6, random_state=0).fit(two_squares()[0])


def test_squares_of_several_gaussians_are_two_clusters(model):
    X, labels = two_squares()
    mixture = find_clusters(model, X)
    assert isinstance(mixture, Mixture)
    assert mixture.clusters.n_clusters == 2
    assert adjusted_rand_score(labels, mixture.predict(X, clusters=True)) == 1.0
    np.testing.assert_array_equal(mixture.predict(X), model.predict(X))
    # A mixture is as good as the estimator, and a number as good as the rule.
    again = find_clusters(mixture, X, 3)
    assert again.clusters == mixture.clusters.at(3)


def test_weights_count_rows(model):
    X, _ = two_squares()
    weight = np.arange(len(X)) % 3
    one = find_clusters(model, X, sample_weight=weight).clusters
    other = find_clusters(model, np.repeat(X, weight, 0)).clusters
    assert one.of_component == other.of_component
    np.testing.assert_allclose(one.tree.entropies, other.tree.entropies, rtol=1e-9, atol=1e-12)


def test_a_lakes_rows_say_what_they_say_in_memory(model, tmp_path: Path, monkeypatch):
    X, _ = two_squares()
    pd.DataFrame(X, columns=["x", "y"]).to_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr(lake_sweep, "session", here.session)
    frame = pd.DataFrame(X, columns=["x", "y"])
    named = GaussianMixture(6, random_state=0).fit(frame)
    found = find_clusters(named, Lake(tmp_path)).clusters
    expected = find_clusters(named, frame).clusters
    assert found.of_component == expected.of_component
    np.testing.assert_allclose(found.tree.entropies, expected.tree.entropies, rtol=1e-9, atol=1e-12)
    with pytest.raises(UserError, match=r"sample_weight is for rows in memory"):
        find_clusters(named, Lake(tmp_path), sample_weight=[1.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_clusters": 0}, "n_clusters is 0: give 'auto', or a whole number from 1 to 6"),
        ({"n_clusters": 7}, "n_clusters is 7"),
        ({"n_clusters": "few"}, "n_clusters is 'few'"),
        ({"n_clusters": True}, "n_clusters is True"),
        ({"sample_weight": [1.0]}, r"sample_weight has shape \(1,\): give one for each of 9 rows"),
        ({"sample_weight": [-1.0] * 9}, r"sample_weight\[0\] is -1.0: give finite weights >= 0"),
        ({"sample_weight": [0.0] * 9}, "no rows of positive weight"),
    ],
)
def test_bad_settings_are_one_line(model, options, message):
    with pytest.raises(UserError, match=message):
        find_clusters(model, two_squares(9)[0], **options)


def test_bad_rows_and_models_are_refused(model):
    with pytest.raises(UserError, match="no rows of positive weight"):
        find_clusters(model, np.empty((0, 2)))
    with pytest.raises(UserError, match="3 features"):
        find_clusters(model, mixtures.normal_rows(5, 3))
    with pytest.raises(TypeError, match=r"gmm_dist\.Lake"):
        find_clusters(model, "s3://lake/points")
    with pytest.raises(TypeError, match="find_clusters takes a Mixture or an estimator"):
        find_clusters(two_squares, np.zeros((1, 2)))
    with pytest.raises(ValueError, match="cluster is for a lake"):
        find_clusters(model, two_squares()[0], cluster=gmm_dist.Cluster())

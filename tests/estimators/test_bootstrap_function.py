"""bootstrap: of rows in memory and of a lake, with weights, and of what it cannot be asked."""

from __future__ import annotations

from pathlib import Path

import here
import intervals
import numpy as np
import pandas as pd
import pytest
import torch

import gmm_dist
from gmm_dist import GaussianMixture, Lake, Mixture, UserError, bootstrap, find_clusters
from gmm_dist.fitting import lake_sweep

pytestmark = pytest.mark.unchecked


def rows(n: int = 400) -> np.ndarray:
    X = np.random.default_rng(0).normal(size=(n, 2)) + 1e4
    X[::2] += 9
    return X


@pytest.fixture(scope="module")
def model() -> GaussianMixture:
    return GaussianMixture(2, random_state=0).fit(rows())


def errors(mixture: Mixture) -> torch.Tensor:
    assert mixture.bootstrap is not None
    return mixture.bootstrap.means


def test_standard_errors_are_those_of_means(model):
    mixture = bootstrap(model, rows(), 100)
    assert mixture.bootstrap.n_used == 100
    np.testing.assert_allclose(errors(mixture), 1 / np.sqrt(200), rtol=0.25)
    means = mixture.bootstrap.of_means(mixture.parameters)
    true = torch.tensor([[1e4, 1e4], [1e4 + 9, 1e4 + 9]], dtype=torch.float64)
    order = mixture.parameters.means[:, 0].argsort()
    assert bool(((means.low[order] < true + 0.1) & (true - 0.1 < means.high[order])).all())
    # The same draws again, and others.
    assert torch.equal(errors(bootstrap(model, rows(), 100)), errors(mixture))
    assert not torch.equal(errors(bootstrap(model, rows(), 100, random_state=1)), errors(mixture))


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """benchmarks/intervals.py has the figure, of 200 simulations."""
    shares = intervals.coverage(12, n=500, n_resamples=40)
    assert 0.88 <= shares["all"] <= 1.0


def test_weights_scale_and_absent_rows_matter_not(model):
    X = rows()
    some = np.arange(len(X)) % 4 > 0
    one = errors(bootstrap(model, X, 5, sample_weight=2.5 * some))
    two = errors(bootstrap(model, X, 5, sample_weight=some.astype(float)))
    np.testing.assert_allclose(one, two, rtol=1e-9)


def test_clusters_get_their_stability(model, monkeypatch):
    monkeypatch.setattr("gmm_dist.selection.certainty.bootstrap.N_AFRESH", 2)
    mixture = bootstrap(find_clusters(model, rows()), rows(), 3)
    assert mixture.clusters.stability.is_stable == (True, True)
    assert bootstrap(model, rows(), 2).clusters is None


def test_a_lake_is_resampled_as_the_rows_that_it_holds(tmp_path: Path, monkeypatch):
    frame = pd.DataFrame(rows(), columns=["x", "y"])
    frame.to_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr(lake_sweep, "session", here.session)
    named = GaussianMixture(2, random_state=0).fit(frame)
    of_lake, in_memory = bootstrap(named, Lake(tmp_path), 4), bootstrap(named, frame, 4)
    np.testing.assert_allclose(errors(of_lake), errors(in_memory), rtol=1e-6)


@pytest.mark.parametrize("n", [1, 0, 2.0, True])
def test_too_few_resamples_are_refused(model, n):
    with pytest.raises(UserError, match="from 2 up"):
        bootstrap(model, rows(), n)


def test_what_is_no_model_is_refused(model):
    with pytest.raises(TypeError, match="bootstrap takes a Mixture"):
        bootstrap(rows(), rows())
    with pytest.raises(UserError, match="no rows of positive weight"):
        bootstrap(model, rows(), sample_weight=np.zeros(400))
    with pytest.raises(ValueError, match="random_state"):
        bootstrap(model, rows(), random_state=-1)
    with pytest.raises(UserError, match="Lake"):
        bootstrap(model, Lake("nowhere"), sample_weight=np.ones(400))
    assert "bootstrap" in gmm_dist.__all__

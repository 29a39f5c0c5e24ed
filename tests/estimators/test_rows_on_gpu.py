"""The estimators and the scorer on rows of a pretended CUDA device: the CPU's results."""

from __future__ import annotations

from typing import Any

import mixtures
import numpy as np
import pyarrow as pa
import pytest
import torch
from pretended_cuda import PretendCuda, pretended_cuda, to_cuda
from torch import Tensor

from gmm_dist import BayesianGaussianMixture, GaussianMixture, find_clusters, select
from gmm_dist.scoring.scorer import Scorer, Scoring

VERBS = ("predict", "predict_proba", "score_samples", "score", "bic")


def rows() -> Tensor:
    return torch.cat([mixtures.normal_rows(150, 3) - 3, mixtures.normal_rows(150, 3, seed=1) + 3])


def plain(value: Any) -> Any:
    return value.inner.numpy() if isinstance(value, PretendCuda) else np.asarray(value)


def both(make: Any, **fit: Any) -> tuple[Any, Any]:
    """Fit on the device and here, and hold what is learned and said of rows against each other."""
    here = make().fit(rows(), **fit)
    moved = {name: to_cuda(value) for name, value in fit.items()}
    with pretended_cuda():
        X = to_cuda(rows())
        there = make().fit(X, **moved)
        assert there.means_.device == X.device
        for name in ("weights_", "means_", "covariances_"):
            np.testing.assert_allclose(
                plain(getattr(there, name)), plain(getattr(here, name)), rtol=1e-9, atol=1e-12
            )
        for verb in VERBS:
            if hasattr(here, verb):
                ours, theirs = getattr(there, verb)(X), getattr(here, verb)(rows())
                np.testing.assert_allclose(plain(ours), plain(theirs), rtol=1e-9, atol=1e-12)
    return there, here


@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical", "tied-diag"])
def test_gaussian_mixtures(kind: str) -> None:
    both(lambda: GaussianMixture(2, covariance_type=kind, random_state=0))


@pytest.mark.parametrize("init", ["k-means++", "random", "random_from_data"])
def test_starts(init: str) -> None:
    both(lambda: GaussianMixture(2, init_params=init, random_state=0, tol=1e-2))


def test_weights() -> None:
    weight = mixtures.row_weights(300)
    both(lambda: GaussianMixture(2, random_state=0), sample_weight=weight)


@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
def test_bayesian_mixtures(kind: str) -> None:
    both(lambda: BayesianGaussianMixture(n_components=3, covariance_type=kind, random_state=0))


def test_a_search_and_clusters() -> None:
    here = select(rows(), n_components=(1, 2, 3), random_state=0)
    with pretended_cuda():
        there = select(to_cuda(rows()), n_components=(1, 2, 3), random_state=0)
        best = there.best
        np.testing.assert_allclose(plain(best.means_), plain(here.best.means_), rtol=1e-9)
        ours = find_clusters(best, to_cuda(rows()))
    assert ours.clusters.n_clusters == find_clusters(here.best, rows()).clusters.n_clusters


def test_a_scorer() -> None:
    X = rows().T.numpy()
    scoring = Scoring(
        mixture=mixtures.parameters("full", 3, 3), kept=pa.schema([]), probabilities=True
    )
    here = Scorer(scoring).scores(X)
    with pretended_cuda():
        there = Scorer(scoring).scores(X)
    for name in ("components", "probabilities", "log_densities", "resp"):
        np.testing.assert_allclose(getattr(there, name), getattr(here, name), rtol=1e-12)

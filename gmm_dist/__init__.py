"""Gaussian mixtures over data lakes: EM on a Ray cluster, many numbers of components in one run.

>>> import numpy as np
>>> import gmm_dist
>>> X = np.r_[np.arange(40.0), np.arange(100.0, 140.0)][:, None]
>>> model = gmm_dist.GaussianMixture(2, random_state=0).fit(X)
>>> sorted(model.means_.ravel().round(1).tolist())
[19.5, 119.5]

Rows in memory are arrays, tensors and tables; rows elsewhere are a lake:

    lake = gmm_dist.Lake("s3://lake/points", where="ds >= '2026-11-01'")
    cluster = gmm_dist.Cluster(num_workers=8)
    selection = gmm_dist.select(lake, n_components=range(2, 13), cluster=cluster)
    gmm_dist.save(selection.best, "s3://models/points")
    gmm_dist.load("s3://models/points").predict(X)

To fit:

- `GaussianMixture`, `BayesianGaussianMixture`: scikit-learn's estimators, with weights;
- `select`: mixtures of several sizes and covariance types, fitted in the same passes and ranked;
- `find_clusters`: components of a mixture merged into clusters, and how many those are;
- `bootstrap`: how sure a mixture's parameters are, and how stable its clusters, by resampled rows;
- `Lake`: rows of Parquet files, by name, which `fit`, `select` and `score` take in place of rows;
- `Cluster`: the Ray cluster that holds a lake's rows, and how many workers do.

To keep and to use:

- `load`, `save`: models in folders, local or on S3, as the command `gmm-dist` writes them too;
- `Mixture`: a model that was loaded: labels, probabilities, densities and criteria of rows;
- `Parameters`: its weights, means and covariances, float64 tensors;
- `UserError`: the ValueError that says in one line what is wrong, where, and what to do.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gmm_dist.config import Cluster as Cluster
    from gmm_dist.errors import UserError as UserError
    from gmm_dist.estimators.bayesian_gaussian_mixture import (
        BayesianGaussianMixture as BayesianGaussianMixture,
    )
    from gmm_dist.estimators.bootstrap import bootstrap as bootstrap
    from gmm_dist.estimators.clusters import find_clusters as find_clusters
    from gmm_dist.estimators.gaussian_mixture import GaussianMixture as GaussianMixture
    from gmm_dist.estimators.save import save as save
    from gmm_dist.estimators.select import select as select
    from gmm_dist.lake.lake import Lake as Lake
    from gmm_dist.model.mixture import Mixture as Mixture
    from gmm_dist.model.parameters import Parameters as Parameters
    from gmm_dist.runs.load import load as load

__version__ = "0.1.0"

# Where the public names live. They are imported when first asked for, so that the mathematics
# runs where only torch is installed, and reading a lake does not wait for torch.
_HOMES = {
    "BayesianGaussianMixture": "estimators.bayesian_gaussian_mixture",
    "Cluster": "config",
    "GaussianMixture": "estimators.gaussian_mixture",
    "Lake": "lake.lake",
    "Mixture": "model.mixture",
    "Parameters": "model.parameters",
    "UserError": "errors",
    "bootstrap": "estimators.bootstrap",
    "find_clusters": "estimators.clusters",
    "load": "runs.load",
    "save": "estimators.save",
    "select": "estimators.select",
}

__all__ = [
    "BayesianGaussianMixture",
    "Cluster",
    "GaussianMixture",
    "Lake",
    "Mixture",
    "Parameters",
    "UserError",
    "bootstrap",
    "find_clusters",
    "load",
    "save",
    "select",
]


def __getattr__(name: str) -> object:
    if name == "open_lake":
        raise AttributeError(
            f"module {__name__!r} has no attribute 'open_lake': gmm_dist.Lake(url, ...) names a "
            "lake, and fit(lake, cluster=gmm_dist.Cluster(...)) says where its rows are held"
        )
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})

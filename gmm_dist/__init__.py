"""Gaussian mixtures over data lakes: EM on a Ray cluster, many k in the same passes.

- `GaussianMixture`, `BayesianGaussianMixture`: scikit-learn's estimators, of arrays and of lakes;
- `select`: a grid of mixtures fitted in the same passes, and ranked;
- `Lake`: rows of Parquet files, by name: what `fit` and `select` take in place of rows;
- `Cluster`: the Ray cluster that a lake's rows are held by;
- `load`, `save`: a model folder, such as the commands leave behind, as a `Mixture`; and one of
  ours written;
- `Mixture`: a fitted mixture put to use; its `Parameters` are float64 tensors;
- `UserError`: what is raised for input that a user can mend, a `ValueError`.
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

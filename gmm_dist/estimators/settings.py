"""Read the estimators' parameters as settings of a fit, and refuse wrong ones."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from sklearn.utils import check_random_state

from gmm_dist.config import Cluster, StartConfig
from gmm_dist.em.statistics import TotalMoments
from gmm_dist.estimators.init_params import SEARCH

if TYPE_CHECKING:
    from gmm_dist.estimators.base import BaseMixture


def require_lake_settings(
    sample_weight: Any, device: str | torch.device | None, n_shards: int | None, cluster: Any
) -> None:
    """Raise ValueError for settings of rows in memory where a lake is fitted.

    Raises TypeError for a `cluster` that is not a `Cluster`.
    """
    if sample_weight is not None:
        raise ValueError("sample_weight is for rows in memory: Lake(..., weight_column=)")
    if device is not None:
        raise ValueError(
            f"device={str(device)!r} is for rows in memory: cluster=Cluster(use_gpu=) is for a lake"
        )
    if n_shards is not None:
        raise ValueError(
            f"n_shards={n_shards} is for rows in memory: a lake's are planned from its files"
        )
    require_cluster(cluster)


def require_cluster(cluster: Any) -> None:
    """Raise TypeError unless `cluster` is a `Cluster` or None."""
    if cluster is not None and not isinstance(cluster, Cluster):
        raise TypeError(
            f"cluster is {cluster!r}: give gmm_dist.Cluster(address=..., num_workers=...), or None"
        )


def require_no_cluster(cluster: Any) -> None:
    """Raise ValueError where rows in memory come with a `cluster`."""
    if cluster is not None:
        raise ValueError(
            "cluster is for a lake, gmm_dist.Lake(...): rows in memory are worked on in this "
            "process, leave it out"
        )


def starts_of(estimator: BaseMixture, *, is_lake: bool) -> tuple[str, int]:
    """Return an estimator's `init_params` and `n_init`, with what None stands for."""
    init = estimator.init_params or (SEARCH if is_lake else "kmeans")
    searches = is_lake or init == SEARCH
    return init, estimator.n_init or (StartConfig().n_init if searches else 1)


def search_of(estimator: BaseMixture) -> StartConfig:
    """Return the settings of the search for an estimator's starts."""
    init, n_init = starts_of(estimator, is_lake=True)
    return StartConfig(
        n_init=n_init,
        init=StartConfig().init if init == SEARCH else init,
        random_state=seed_of(estimator.random_state),
    )


def seed_of(random_state: Any) -> int:
    """Return an int as it is, and one drawn from anything else."""
    if isinstance(random_state, Integral):
        return int(random_state)
    return int(check_random_state(random_state).randint(2**31 - 1))


def require_range(total: TotalMoments, names: Sequence[str]) -> None:
    """Raise ValueError for a feature whose squares float64 does not hold."""
    if features := total.overflowing_features():
        raise ValueError(
            f"feature {feature_name(features[0], names)} has values too large for their squares to "
            "be float64 numbers: divide it by a power of ten first"
        )


def feature_name(feature: int, names: Sequence[str]) -> str:
    return repr(str(names[feature])) if len(names) else f"{feature}"

"""Clusters of a fitted mixture, as a function: of rows in memory, and of a lake."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gmm_dist.config import Cluster
from gmm_dist.errors import UserError
from gmm_dist.estimators.local_rows import Resident, robust_centre
from gmm_dist.estimators.save import Estimator
from gmm_dist.estimators.settings import require_cluster, require_no_cluster
from gmm_dist.formats import counted
from gmm_dist.lake.lake import Lake
from gmm_dist.model.arrays import array_of, checked_for_model, require_rows_or_lake, viewed
from gmm_dist.model.mixture import Mixture
from gmm_dist.model.parameters import Parameters
from gmm_dist.selection import clustering
from gmm_dist.shards.local import one_thread


def find_clusters(
    model: Mixture | Estimator,
    X: Any,
    n_clusters: str | int = "auto",
    *,
    sample_weight: Any = None,
    cluster: Cluster | None = None,
) -> Mixture:
    """Merge a mixture's components into clusters, by rows; return it with its `clusters`.

    A mixture of many components draws clusters that are no Gaussians: those that overlap, or
    between which no valley lies, are one cluster. `clusters.trees` keep the merges down to one
    cluster, and `clusters.at(n)` is another number of them.

    >>> import numpy as np
    >>> import gmm_dist
    >>> one, other = np.random.default_rng(0).uniform(size=(2, 400, 2))
    >>> X = np.concatenate([one, other + 3])
    >>> model = gmm_dist.GaussianMixture(5, random_state=0).fit(X)
    >>> mixture = gmm_dist.find_clusters(model, X)
    >>> mixture.clusters.n_clusters
    2
    >>> mixture.predict([[0.5, 0.5], [3.5, 3.5]], clusters=True).tolist() in ([0, 1], [1, 0])
    True

    Args:
        model: a `Mixture`, or an estimator that is fitted.
        X: rows (n, d) in memory, or a `gmm_dist.Lake`: best those that it was fitted to.
        n_clusters: how many clusters; "auto" for as many as the components look like.
        sample_weight: of rows in memory, (n,): 0 is an absent row, 2 a doubled one.
        cluster: where a lake's rows are to be held, as for `fit`.

    Raises UserError for other rows than the model's, no rows, and for a number of clusters that is
    not from 1 to that of the components; TypeError for what is no model of ours.
    """
    model = mixture_of(model, "find_clusters")
    _require_number(n_clusters, model.n_components)
    require_rows_or_lake(X)
    with one_thread():
        if isinstance(X, Lake):
            # Only here are Ray and pyarrow needed.
            from gmm_dist.fitting.lake_clusters import clusters_of_lake

            if sample_weight is not None:
                raise UserError("sample_weight is for rows in memory: Lake(..., weight_column=)")
            require_cluster(cluster)
            found = clusters_of_lake(X, model, n_clusters, cluster=cluster)
        else:
            require_no_cluster(cluster)
            resident, about_centre = resident_of(model, X, sample_weight)
            found = clustering.find_clusters(resident.shards, about_centre, n_clusters)
    return replace(model, clusters=found)


def mixture_of(model: Mixture | Estimator, taker: str) -> Mixture:
    """Return the mixture of a model that a function has been given; refuse what is none."""
    if isinstance(model, Mixture):
        return model
    if isinstance(model, type) or not isinstance(model, Estimator):
        hint = ": give its best" if hasattr(model, "best") else ""
        raise TypeError(
            f"{taker} takes a Mixture or an estimator of gmm_dist, not a {type(model)}{hint}"
        )
    return model.to_mixture()


def resident_of(model: Mixture, X: Any, sample_weight: Any) -> tuple[Resident, Parameters]:
    """Return rows in memory about their centre, and the mixture about it.

    Raises UserError for other rows than the model's, and where none has a positive weight.
    """
    rows = viewed(checked_for_model(X, model.n_features, model.feature_names)).double()
    weight = None if sample_weight is None else _weights(sample_weight, len(rows))
    if len(rows) == 0 or (weight is not None and not float(weight.sum()) > 0):
        raise UserError("X has no rows of positive weight, by which to judge it: give one or more")
    whole = model.parameters.type.has_products
    resident = Resident.of(rows, weight, None, whole=whole, centre=robust_centre(rows))
    return resident, model.parameters.shifted(-resident.centre)


def _weights(sample_weight: Any, n_rows: int) -> Tensor:
    weight = np.array(array_of(sample_weight), dtype=np.float64)
    if weight.shape != (n_rows,):
        raise UserError(
            f"sample_weight has shape {weight.shape}: give one for each of {counted(n_rows, 'row')}"
        )
    if wrong := np.flatnonzero(~(np.isfinite(weight) & (weight >= 0))).tolist():
        raise UserError(
            f"sample_weight[{wrong[0]}] is {weight[wrong[0]]}: give finite weights >= 0"
        )
    return torch.from_numpy(weight)


def _require_number(n_clusters: Any, n_components: int) -> None:
    is_whole = isinstance(n_clusters, int) and not isinstance(n_clusters, bool)
    if n_clusters != "auto" and not (is_whole and 1 <= n_clusters <= n_components):
        raise UserError(
            f"n_clusters is {n_clusters!r}: give 'auto', or a whole number from 1 to "
            f"{n_components}, that of the components"
        )

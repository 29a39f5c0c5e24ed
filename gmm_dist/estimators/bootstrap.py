"""How sure a fitted mixture is, as a function: of rows in memory, and of a lake."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gmm_dist.config import Cluster, EMConfig, StartConfig
from gmm_dist.errors import UserError
from gmm_dist.estimators.clusters import mixture_of, resident_of
from gmm_dist.estimators.save import Estimator
from gmm_dist.estimators.settings import require_cluster, require_no_cluster
from gmm_dist.lake.lake import Lake
from gmm_dist.model.arrays import require_rows_or_lake
from gmm_dist.model.mixture import Mixture
from gmm_dist.selection.certainty import bootstrap as certainty
from gmm_dist.shards.local import one_thread


def bootstrap(
    model: Mixture | Estimator,
    X: Any,
    n_resamples: int = 50,
    *,
    sample_weight: Any = None,
    random_state: int = 0,
    cluster: Cluster | None = None,
) -> Mixture:
    """Resample the rows that a mixture was fitted to; return it with how sure it is.

    The mixture that is returned has `bootstrap`: standard errors of weights, means and standard
    deviations, and by its methods 95 % intervals. If the model has clusters (`find_clusters`), they
    get their `stability`.

    >>> import numpy as np
    >>> import gmm_dist
    >>> X = np.random.default_rng(0).normal(size=(400, 1))
    >>> X[::2] += 10
    >>> model = gmm_dist.GaussianMixture(2, random_state=0).fit(X)
    >>> mixture = gmm_dist.bootstrap(model, X)
    >>> means = mixture.bootstrap.of_means(mixture.parameters)
    >>> means.error.flatten().round(decimals=1).tolist()  # 1 / √200 = 0.07
    [0.1, 0.1]

    Args:
        model: a `Mixture`, or an estimator that is fitted.
        X: the rows (n, d) that it was fitted to, in memory, or a `gmm_dist.Lake`.
        n_resamples: how many resamples, two or more.
        sample_weight: of rows in memory, (n,): 0 is an absent row. A row is drawn as a whole,
            whatever its weight.
        random_state: the seed, >= 0.
        cluster: where a lake's rows are to be held, as for `fit`.

    Raises UserError for other rows than the model's, no rows, and too few resamples; TypeError for
    what is no model of ours.
    """
    model = mixture_of(model, "bootstrap")
    is_whole = isinstance(n_resamples, int) and not isinstance(n_resamples, bool)
    if not is_whole or n_resamples < 2:
        raise UserError(
            f"n_resamples is {n_resamples!r}: give a whole number from 2 up; 50 is a good one"
        )
    start = StartConfig(random_state=random_state)
    require_rows_or_lake(X)
    with one_thread():
        if isinstance(X, Lake):
            # Only here are Ray and pyarrow needed.
            from gmm_dist.fitting.lake_clusters import bootstrap_of_lake

            if sample_weight is not None:
                raise UserError("sample_weight is for rows in memory: Lake(..., weight_column=)")
            require_cluster(cluster)
            spread, clusters = bootstrap_of_lake(
                X, model, n_resamples, random_state=random_state, cluster=cluster
            )
        else:
            require_no_cluster(cluster)
            resident, about_centre = resident_of(model, X, sample_weight)
            resampling = certainty.Resampling(
                mixture=about_centre,
                n_resamples=n_resamples,
                config=EMConfig(),
                start=start,
                clusters=model.clusters,
            )
            spread, clusters = certainty.bootstrap(resident.shards, resampling)
    return replace(model, bootstrap=spread, clusters=clusters)

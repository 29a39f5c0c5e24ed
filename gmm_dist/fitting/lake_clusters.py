"""Clusters of a mixture, and how sure it is, by the rows of a lake."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gmm_dist.config import Cluster, EMConfig, StartConfig
from gmm_dist.fitting.lake_scores import plan_for
from gmm_dist.fitting.lake_sweep import loader_of, resident, with_resamples
from gmm_dist.lake.lake import Lake
from gmm_dist.model.bootstrap import Bootstrap
from gmm_dist.model.clusters import Clusters
from gmm_dist.model.mixture import Mixture
from gmm_dist.model.parameters import Parameters
from gmm_dist.selection.certainty.bootstrap import Resampling, bootstrap
from gmm_dist.selection.clustering import find_clusters
from gmm_dist.selection.ranking import Candidate
from gmm_dist.shards.protocol import WorkingShards


def clusters_of_lake(
    lake: Lake, mixture: Mixture, n_clusters: str | int = "auto", *, cluster: Cluster | None = None
) -> Clusters:
    """Merge a mixture's components into clusters, by a lake's rows in the memory of Ray's workers.

    Where the lake names no columns, they are the mixture's features, by name.

    Args:
        lake: which rows; held-out ones play no part.
        mixture: the mixture, in feature units.
        n_clusters: how many clusters, or "auto".
        cluster: who holds the rows; None for the Ray cluster that this process is connected to,
            else one that is started here.

    Raises UserError as `plan_of` and `resident` do, and for other features than the mixture's.
    """
    with _held(lake, mixture, cluster) as (shards, about_centre):
        return find_clusters(shards, about_centre, n_clusters)


def bootstrap_of_lake(
    lake: Lake,
    mixture: Mixture,
    n_resamples: int,
    *,
    random_state: int = 0,
    cluster: Cluster | None = None,
) -> tuple[Bootstrap, Clusters | None]:
    """Resample a lake's rows, and say how sure a mixture is; its clusters get their stability.

    Args:
        lake: which rows; held-out ones play no part.
        mixture: the mixture, in feature units.
        n_resamples: how many resamples, two or more.
        random_state: the seed.
        cluster: who holds the rows, as for `clusters_of_lake`.

    Raises UserError as `clusters_of_lake` does.
    """
    with _held(lake, mixture, cluster, n_resamples) as (shards, about_centre):
        resampling = Resampling(
            mixture=about_centre,
            n_resamples=n_resamples,
            config=EMConfig(),
            start=StartConfig(random_state=random_state),
            clusters=mixture.clusters,
        )
        return bootstrap(shards, resampling)


@contextmanager
def _held(
    lake: Lake, mixture: Mixture, cluster: Cluster | None, n_resamples: int = 0
) -> Iterator[tuple[WorkingShards, Parameters]]:
    """Hold a lake's rows in Ray's workers; yield them, and the mixture about their centre."""
    candidates = [Candidate(mixture.n_components, mixture.covariance_type)]
    cluster = cluster or Cluster()
    loader = loader_of(plan_for(lake, mixture), candidates, cluster)
    about_centre = mixture.parameters.shifted(-torch.from_numpy(loader.centre))
    lanes = with_resamples(candidates, n_resamples, mixture.n_features)
    with resident(loader, lanes, cluster) as (shards, _):
        yield shards, about_centre

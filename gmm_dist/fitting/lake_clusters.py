"""Merge a mixture's components into clusters, by the rows of a lake."""

from __future__ import annotations

import torch

from gmm_dist.config import Cluster
from gmm_dist.fitting.lake_scores import plan_for
from gmm_dist.fitting.lake_sweep import loader_of, resident
from gmm_dist.lake.lake import Lake
from gmm_dist.model.clusters import Clusters
from gmm_dist.model.mixture import Mixture
from gmm_dist.selection.clustering import find_clusters
from gmm_dist.selection.ranking import Candidate


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
    candidates = [Candidate(mixture.n_components, mixture.covariance_type)]
    cluster = cluster or Cluster()
    loader = loader_of(plan_for(lake, mixture), candidates, cluster)
    about_centre = mixture.parameters.shifted(-torch.from_numpy(loader.centre))
    with resident(loader, candidates, cluster) as (shards, _):
        return find_clusters(shards, about_centre, n_clusters)

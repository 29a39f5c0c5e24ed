"""How many clusters components are: of shapes whose number anyone sees."""

from __future__ import annotations

import mixtures
import pytest
import torch
from torch import Tensor

from gmm_dist.config import StartConfig
from gmm_dist.model.clusters import CHOSEN, MISCLASSIFICATION, TREES
from gmm_dist.model.parameters import Parameters
from gmm_dist.selection import clustering
from gmm_dist.selection.clustering import RULE, find_clusters
from gmm_dist.shards.local import LocalShards


def chain(centres: list[float], *, spread: float = 1.0) -> tuple[Parameters, Tensor]:
    """Return Gaussians on a line, and rows of them."""
    means = torch.tensor(centres, dtype=torch.float64)[:, None]
    k = len(centres)
    mixture = Parameters(
        weights=torch.full((k,), 1 / k, dtype=torch.float64),
        means=means,
        covariances=torch.full((k, 1, 1), spread**2, dtype=torch.float64),
        covariance_type="full",
    )
    return mixture, mixtures.rows(mixture, 4000)


@pytest.mark.parametrize(
    ("centres", "expected"),
    [
        ([0.0], 1),
        ([0.0, 1.0], 1),
        ([0.0, 5.0], 2),
        ([0.0, 2.2, 4.4, 6.6, 8.8], 1),  # pieces of something flat
        ([0.0, 2.2, 4.4, 10.0, 12.2], 2),
        ([0.0, 6.0, 12.0, 12.5], 3),
    ],
)
def test_the_number_is_what_one_sees(centres, expected):
    mixture, X = chain(centres)
    clusters = find_clusters(LocalShards.of(X), mixture)
    assert (clusters.n_clusters, clusters.rule, clusters.by) == (expected, RULE, MISCLASSIFICATION)
    assert clusters.n_sampled is None
    assert tuple(clusters.trees) == TREES


def test_a_bent_cluster_in_pieces_is_one_beside_another():
    angle = torch.linspace(0, torch.pi, 9, dtype=torch.float64)
    arc = 5 * torch.stack([angle.cos(), angle.sin()], 1)
    means = torch.cat([arc, torch.zeros(1, 2, dtype=torch.float64)])
    mixture = Parameters(
        weights=torch.full((10,), 0.1, dtype=torch.float64),
        means=means,
        covariances=torch.eye(2, dtype=torch.float64).repeat(10, 1, 1) * 0.5,
        covariance_type="full",
    )
    clusters = find_clusters(LocalShards.of(mixtures.rows(mixture, 5000)), mixture)
    assert clusters.of_component == (0,) * 9 + (1,)


def test_a_number_that_is_asked_for_is_kept_up_to_that_of_the_components():
    mixture, X = chain([0.0, 5.0, 10.0])
    for wanted, expected in ((1, 1), (2, 2), (3, 3), (7, 3)):
        clusters = find_clusters(LocalShards.of(X), mixture, wanted)
        assert (clusters.n_clusters, clusters.rule) == (expected, CHOSEN)


def test_weights_of_any_unit_are_the_same_rows():
    mixture, X = chain([0.0, 2.0, 7.0])
    weight = mixtures.row_weights(len(X))
    one = find_clusters(LocalShards.of(X, weight), mixture)
    for unit in (2.0**-900, 2.0**900):
        assert find_clusters(LocalShards.of(X, weight * unit), mixture) == one


def test_many_components_are_merged_by_a_sample_and_measured_by_all_rows(monkeypatch):
    monkeypatch.setattr(clustering, "MOST_BY_ALL_ROWS", 4)
    monkeypatch.setattr(clustering, "_MOST_NUMBERS", 1)
    monkeypatch.setattr(clustering, "_FEWEST_ROWS", 1500)
    mixture, X = chain([0.0, 2.2, 4.4, 10.0, 12.2])
    shards = LocalShards.of(X, n_shards=3)
    passes: list[tuple[int, int]] = []
    clusters = find_clusters(
        shards,
        mixture,
        start=StartConfig(n_sample=2000),
        watch=lambda done, total: passes.append((done, total)),
    )
    assert passes == [(i, 4) for i in range(1, 5)]
    assert clusters.n_sampled == 1500
    assert clusters.of_component == (0, 0, 0, 1, 1)
    orders = {
        by: [(merge.first, merge.second) for merge in tree.merges]
        for by, tree in clusters.trees.items()
    }
    assert dict(clusters.trees) == clustering.trees_of(shards, mixture, orders)

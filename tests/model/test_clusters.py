"""Clusters of components: where a tree is cut, and what rows belong to."""

from __future__ import annotations

import mixtures
import pytest
import torch

from gmm_dist import UserError
from gmm_dist.model.clusters import CHOSEN, Clusters, Merge, MergeTree, merged, spell_clusters
from gmm_dist.model.mixture import Mixture


def tree(*pairs: tuple[int, int]) -> MergeTree:
    n = len(pairs)
    merges = tuple(
        Merge(first=j, second=k, entropy=1.0 - (i + 1) / n, misclassification=0.1, share=0.5)
        for i, (j, k) in enumerate(pairs)
    )
    return MergeTree(entropy=1.0, merges=merges)


CLUSTERS = Clusters(
    n_clusters=2,
    by="misclassification",
    trees={
        "entropy": tree((0, 1), (0, 2), (0, 3)),
        "misclassification": tree((1, 3), (0, 2), (0, 1)),
    },
    rule="as one sees",
)


def test_a_cut_numbers_clusters_by_their_first_components():
    found = [CLUSTERS.at(n).of_component for n in (4, 3, 2, 1)]
    assert found == [(0, 1, 2, 3), (0, 1, 2, 1), (0, 1, 0, 1), (0, 0, 0, 0)]
    assert CLUSTERS.of_component == found[2]
    assert CLUSTERS.tree.entropies == pytest.approx((0.0, 1 / 3, 2 / 3, 1.0))
    other = CLUSTERS.at(3, by="entropy")
    assert (other.of_component, other.rule, other.by) == ((0, 0, 1, 2), CHOSEN, "entropy")
    assert spell_clusters(CLUSTERS) == "2 clusters (4 components)"


@pytest.mark.parametrize("n", [0, 5, True])
def test_a_number_that_is_none_of_the_trees_is_refused(n):
    with pytest.raises(UserError, match="give a whole number from 1 to 4"):
        CLUSTERS.at(n)


def test_a_tree_that_there_is_not_is_refused():
    with pytest.raises(UserError, match="by is 'ward': give one of entropy, misclassification"):
        CLUSTERS.at(2, by="ward")


def test_a_row_belongs_to_the_cluster_of_the_largest_sum():
    resp = torch.tensor([[0.4], [0.3], [0.0], [0.3]], dtype=torch.float64)
    assert merged(resp, CLUSTERS.of_component)[:, 0].tolist() == pytest.approx([0.4, 0.6])
    mixture = Mixture(parameters=mixtures.parameters("full", 4, 2), clusters=CLUSTERS)
    X = mixtures.rows(mixture.parameters, 300)
    sums = mixture.predict_proba(X) @ torch.eye(2, dtype=torch.float64)[[0, 1, 0, 1]]
    assert mixture.predict(X, clusters=True).tolist() == sums.argmax(1).tolist()
    assert mixture.predict(X[:0], clusters=True).tolist() == []
    assert mixture.predict(X).tolist() != mixture.predict(X, clusters=True).tolist()


def test_a_model_without_clusters_says_how_to_get_them():
    mixture = Mixture(parameters=mixtures.parameters("full", 4, 2))
    with pytest.raises(UserError, match='fit it with clusters="auto"'):
        mixture.predict([[0.0, 0.0]], clusters=True)

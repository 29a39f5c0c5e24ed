"""Trees of merges are those of a slow reference, whatever holds the rows."""

from __future__ import annotations

from dataclasses import astuple

import mixtures
import naive
import naive_clusters
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import FIXED

from gmm_dist.model.clusters import TREES, MergeTree
from gmm_dist.model.parameters import Parameters
from gmm_dist.selection.clustering import trees_of
from gmm_dist.selection.merging import _labels, merge_orders
from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import Shards


def trees(
    shards: Shards, mixture: Parameters, *, keeps: bool = False, compiled: bool = False
) -> dict[str, MergeTree]:
    orders = merge_orders(shards, mixture, keeps=keeps, compiled=compiled)
    return trees_of(shards, mixture, orders, compiled=compiled)


def a_case(k: int, seed: int, n: int = 120, d: int = 2) -> tuple[Parameters, torch.Tensor]:
    mixture = mixtures.parameters("full", k, d, seed=seed, spread=2.5)
    return mixture, mixtures.rows(mixture, n, seed=seed)


def as_sets(tree: MergeTree, n: int, places: list[int] | None = None) -> set[frozenset[int]]:
    """Return the clusters as sets of components, each under its number in `places`."""
    of_component = tree.of_component(n)
    places = list(range(len(of_component))) if places is None else places
    return {
        frozenset(places[c] for c, own in enumerate(of_component) if own == cluster)
        for cluster in range(n)
    }


@pytest.mark.parametrize("kind", mixtures.COVARIANCE_TYPES)
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_both_trees_are_the_references(kind, is_weighted, compiled):
    mixture = mixtures.parameters(kind, 6, 3, seed=4, spread=1.5)
    X = mixtures.rows(mixtures.parameters("full", 6, 3, seed=4, spread=1.5), 150)
    weight = mixtures.row_weights(150) if is_weighted else None
    resp = np.exp(naive.weighted_log_prob(X, mixture))
    resp /= resp.sum(1, keepdims=True)
    by_hand = np.ones(150) if weight is None else weight.numpy()
    found = trees(mixtures.shards(X, (40, 40, 110), weight), mixture, compiled=compiled)
    assert tuple(found) == TREES
    for by, tree in found.items():
        expected = naive_clusters.merges(resp, by_hand, by)
        assert [(m.first, m.second) for m in tree.merges] == [(m.first, m.second) for m in expected]
        numbers = np.array([astuple(merge) for merge in tree.merges])
        wanted = np.array([astuple(merge) for merge in expected])
        np.testing.assert_allclose(numbers, wanted, rtol=1e-9, atol=1e-12)
        before = naive_clusters.entropy_of(resp, by_hand)
        assert tree.entropy == pytest.approx(before, rel=1e-9)


@given(k=st.integers(2, 9), seed=st.integers(0, 99))
@FIXED
def test_no_merge_raises_the_entropy_and_one_cluster_has_none(k, seed):
    mixture, X = a_case(k, seed)
    for tree in trees(mixtures.shards(X), mixture).values():
        entropies = tree.entropies
        assert entropies[0] == 0.0
        assert list(entropies) == sorted(entropies)
        assert all(0 <= m.misclassification <= 1 and 0 <= m.share <= 1 for m in tree.merges)
        first = {0: tree.of_component(1), 1: tree.of_component(k)}
        assert first == {0: (0,) * k, 1: tuple(range(k))}


@given(cuts=st.lists(st.integers(0, 120), max_size=5), seed=st.integers(0, 30), n=st.integers(2, 4))
@FIXED
def test_any_deal_of_the_rows_gives_the_same_tree_and_any_threads_the_same_bits(cuts, seed, n):
    mixture, X = a_case(6, seed)
    whole = trees(mixtures.shards(X), mixture)
    dealt = trees(mixtures.shards(X, cuts), mixture)
    for by in TREES:
        one, other = whole[by], dealt[by]
        assert [(m.first, m.second) for m in one.merges] == [
            (m.first, m.second) for m in other.merges
        ]
        np.testing.assert_allclose(one.entropies, other.entropies, rtol=1e-11, atol=1e-15)
    alone = trees(LocalShards.of(X, n_shards=n, n_threads=0), mixture)
    assert trees(LocalShards.of(X, n_shards=n, n_threads=3), mixture) == alone
    assert trees(LocalShards.of(X, n_shards=n), mixture, keeps=True) == alone


@given(seed=st.integers(0, 99), data=st.data())
@FIXED
def test_permuted_components_make_the_same_clusters(seed, data):
    mixture, X = a_case(6, seed)
    order = data.draw(st.permutations(range(6)))
    permuted = Parameters(
        weights=mixture.weights[order],
        means=mixture.means[order],
        covariances=mixture.covariances[order],
        covariance_type="full",
    )
    shards = mixtures.shards(X)
    one, other = trees(shards, mixture), trees(shards, permuted)
    for by in TREES:
        for n in range(1, 7):
            assert as_sets(one[by], n) == as_sets(other[by], n, list(order))


def test_a_row_of_weight_two_is_the_row_twice_and_one_of_zero_is_none():
    mixture, X = a_case(7, 3)
    weight = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).repeat(len(X) // 3)
    repeated = X.repeat_interleave(weight.long(), 0)
    one = trees(mixtures.shards(X, (), weight), mixture)
    other = trees(mixtures.shards(repeated), mixture)
    for by in TREES:
        numbers = [np.array([astuple(m) for m in found[by].merges]) for found in (one, other)]
        np.testing.assert_allclose(*numbers, rtol=1e-10, atol=1e-14)


def test_one_component_is_a_tree_without_merges():
    mixture, X = a_case(1, 0)
    for tree in trees(mixtures.shards(X), mixture).values():
        assert (tree.merges, tree.entropies, tree.of_component(1)) == ((), (0.0,), (0,))


def test_an_empty_shard_and_a_component_without_rows_change_nothing():
    mixture, X = a_case(4, 1)
    far = torch.cat([mixture.means[:3], mixture.means.new_full((1, 2), 1e6)])
    mixture = Parameters(
        weights=mixture.weights,
        means=far,
        covariances=mixture.covariances,
        covariance_type="full",
    )
    found = trees(mixtures.shards(X, (0, 60)), mixture)
    for tree in found.values():
        # Nothing is ever taken for the empty component's, so it is merged last.
        assert 3 in (tree.merges[-1].first, tree.merges[-1].second)
        assert tree.merges[-1].misclassification == 0.0


def test_of_equal_responsibilities_the_first_has_the_label():
    resp = torch.tensor([[0.5, 0.1, 0.2], [0.5, 0.1, 0.4], [0.0, 0.8, 0.4]], dtype=torch.float64)
    assert _labels(resp).tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]

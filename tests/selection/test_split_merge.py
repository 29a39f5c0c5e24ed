"""Moves between mixtures: what a split gains and a merge loses, against sums over rows."""

from __future__ import annotations

import math
from dataclasses import replace

import mixtures
import naive
import numpy as np
import pytest
import torch

from gmm_dist.model.covariance import COVARIANCE_TYPES, TYPE_OF
from gmm_dist.model.parameters import Parameters
from gmm_dist.selection import split_merge
from gmm_dist.selection.kmeans import start_of
from gmm_dist.selection.split_merge import (
    Merge,
    Part,
    Split,
    apply,
    merges,
    split_and_merge,
    splits,
)

every_type = pytest.mark.parametrize("kind", COVARIANCE_TYPES)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def ones(n):
    return torch.ones(n, dtype=torch.float64)


def values(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def clusters(centres, sizes):
    """Return rows of unit normals about `centres`, and the number of each row's cluster."""
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return mixtures.normal_rows(len(labels), centres.shape[1]) + centres[labels], labels


def mixture_of(X, labels, k, kind, weight=None):
    """Return the parameters that maximise the likelihood of hard labels."""
    resp = torch.nn.functional.one_hot(labels, k).double().numpy()
    return naive.m_step(X, resp, kind, sample_weight=weight)


def hard_log_likelihood(X, labels, parameters, weight):
    """Return the log-likelihood of rows and labels together (nats)."""
    logits = naive.weighted_log_prob(X, parameters)
    return sum(float(weight[i]) * logits[i, int(label)] for i, label in enumerate(labels))


def assert_sound(parameters):
    assert float(parameters.weights.sum()) == pytest.approx(1)
    assert (parameters.weights >= 0).all()
    for value in (parameters.weights, parameters.means, parameters.covariances):
        assert torch.isfinite(value).all()


# --- merges ---


def merge_of(parameters, i, j, n_samples=100.0) -> Merge:
    (found,) = [merge for merge in merges(parameters, n_samples) if merge.pair == (i, j)]
    return found


def total_moments(weights, means, matrices):
    """Return the mean and the covariance of a mixture: E[x], E[x xᵀ] - E[x] E[x]ᵀ."""
    weights = weights / weights.sum()
    mean = sum(w * m for w, m in zip(weights, means, strict=True))
    second = sum(w * (S + np.outer(m, m)) for w, m, S in zip(weights, means, matrices, strict=True))
    return mean, second - np.outer(mean, mean)


@every_type
def test_a_merge_keeps_the_moments_of_the_pair(kind):
    """As many of them as the covariance type can hold: all, the diagonal, the trace."""
    mixture = mixtures.parameters(kind, 3, 4)
    matrices, d = naive.covariance_matrices(mixture), 4
    for merge in merges(mixture, 100.0):
        pair = list(merge.pair)
        means = mixture.means[pair].numpy()
        mean, covariance = total_moments(mixture.weights[pair].numpy(), means, matrices[pair])
        part = merge.part
        np.testing.assert_allclose(part.weight, mixture.weights[pair].sum(), rtol=1e-12)
        np.testing.assert_allclose(part.mean, mean, rtol=1e-10, atol=1e-12)
        expected = {
            "full": covariance,
            "diag": np.diag(covariance),
            "spherical": np.trace(covariance) / d,
        }[mixture.type.alone]
        expected = mixture.covariances.numpy() if mixture.type.is_shared else expected
        np.testing.assert_allclose(part.covariance, expected, rtol=1e-10, atol=1e-12)


@every_type
def test_the_loss_of_a_merge_is_what_hard_labels_lose(kind):
    """Sum over rows of log w N of each row's component, before the merge and after."""
    X, labels = clusters(values([0, 0], [1.5, 0], [5, 4]), [60, 30, 50])
    before, weight = mixture_of(X, labels, 3, kind), ones(len(X))
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        together = torch.where(labels == j, i, labels)
        after = mixture_of(X, together - (together > j).long(), 2, kind)
        loss = hard_log_likelihood(X, labels, before, weight)
        loss -= hard_log_likelihood(X, together - (together > j).long(), after, weight)
        assert merge_of(before, i, j, len(X)).loss == pytest.approx(loss, rel=1e-8)


@every_type
def test_twins_are_the_cheapest_merge_and_save_their_labels(kind):
    mixture = mixtures.parameters(kind, 4, 3, spread=10)
    mixture.means[2] = mixture.means[1]
    if not TYPE_OF[kind].is_shared:
        mixture.covariances[2] = mixture.covariances[1]
    found = merges(mixture, 1000.0)
    assert found[0].pair == (1, 2)
    w = mixture.weights[[1, 2]]
    label_entropy = float(-(w * (w / w.sum()).log()).sum())
    assert found[0].loss == pytest.approx(-1000 * label_entropy)
    assert [merge.loss for merge in found] == sorted(merge.loss for merge in found)


@every_type
def test_a_merge_of_distant_components_costs_much_and_more_the_farther(kind):
    losses = []
    for apart in (0.0, 2.0, 20.0, 200.0):
        mixture = mixtures.parameters(kind, 2, 3)
        means = torch.stack([torch.zeros(3), torch.full((3,), apart)]).double()
        losses.append(merge_of(replace(mixture, means=means), 0, 1, 1000.0).loss)
    assert losses == sorted(losses)
    assert losses[2] > 1000.0
    assert losses[3] > losses[2] + 1000.0


def test_units_of_the_features_change_no_neighbour_and_no_loss():
    mixture = mixtures.parameters("full", 12, 2, spread=5)
    scale = values(2.0**-20, 2.0**20)
    covariances = mixture.covariances * scale * scale[:, None]
    other = replace(mixture, means=mixture.means * scale, covariances=covariances)
    for one, two in zip(merges(mixture, 50.0), merges(other, 50.0), strict=True):
        assert one.pair == two.pair
        assert one.loss == pytest.approx(two.loss, rel=1e-8, abs=1e-8)


def test_the_nearest_pairs_are_among_those_looked_at():
    mixture = mixtures.parameters("full", 30, 3)
    spread = mixture.covariances.diagonal(dim1=1, dim2=2).mean(0).sqrt()
    distance = {
        (i, j): float(((mixture.means[i] - mixture.means[j]) / spread).norm())
        for i in range(30)
        for j in range(i + 1, 30)
    }
    pairs = {merge.pair for merge in merges(mixture, 10.0)}
    for i in range(30):
        own = sorted((pair for pair in distance if i in pair), key=distance.__getitem__)
        assert set(own[:6]) <= pairs
    assert len(pairs) <= 30 * 6


# --- splits ---


def two_in_one(kind, sizes=(300, 200, 100), apart=12.0):
    """Return rows of three clusters and a mixture whose first component has the first two."""
    X, cluster = clusters(values([0, -apart / 2], [0, apart / 2], [60, 0]), list(sizes))
    labels = (cluster == 2).long()
    return X, cluster, labels, mixture_of(X, labels, 2, kind)


@every_type
def test_a_component_of_two_clusters_is_split_between_them(kind):
    X, cluster, labels, mixture = two_in_one(kind)
    found = splits(mixture, X, ones(600), labels, generator())
    best = found[0]
    assert best.component == 0
    assert best.gain > 300
    parts = sorted(best.parts, key=lambda part: float(part.mean[1]))
    assert [float(part.weight) for part in parts] == pytest.approx([1 / 2, 1 / 3])
    for part, c in zip(parts, (0, 1), strict=True):
        torch.testing.assert_close(part.mean, X[cluster == c].mean(0))
    if TYPE_OF[kind].is_shared:
        assert all(torch.equal(part.covariance, mixture.covariances) for part in parts)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("d", [2, 8])
def test_two_clusters_are_found_among_many_features(d, seed):
    """Wherever the draw begins, and however many features say nothing."""
    centres = torch.zeros(3, d, dtype=torch.float64)
    centres[:, 0] = values(-6, 6, 60)
    X, cluster = clusters(centres, [300, 200, 100])
    labels = (cluster == 2).long()
    split = splits(mixture_of(X, labels, 2, "full"), X, ones(600), labels, generator(seed))[0]
    assert split.component == 0
    assert sorted(float(part.mean[0]) for part in split.parts) == pytest.approx([-6, 6], abs=0.5)


@pytest.mark.parametrize("kind", ["full", "diag", "spherical"])
def test_the_gain_of_a_split_is_what_hard_labels_gain(kind):
    """But for the few rows more that keep a part of few rows from being singular."""
    X, _, labels, _ = two_in_one(kind, sizes=(1500, 1000, 500))
    X = X * values(4, 1 / 2)
    weight = 0.5 + torch.arange(3000).remainder(3).double()
    before = mixture_of(X, labels, 2, kind, weight)
    found = {split.component: split for split in splits(before, X, weight, labels, generator())}
    means = torch.stack([part.mean for part in found[0].parts])
    halves = torch.where(labels == 1, 2, torch.cdist(X, means).argmin(1))
    after = mixture_of(X, halves, 3, kind, weight)
    gain = hard_log_likelihood(X, halves, after, weight)
    gain -= hard_log_likelihood(X, labels, before, weight)
    assert found[0].gain == pytest.approx(gain, rel=0.05)


@every_type
@pytest.mark.parametrize("d", [1, 2, 5])
def test_a_split_of_one_gaussian_loses(kind, d):
    X, labels = mixtures.normal_rows(800, d), torch.zeros(800, dtype=torch.int64)
    (split,) = splits(mixture_of(X, labels, 1, kind), X, ones(800), labels, generator())
    assert split.gain < 0
    assert len(split.parts) == 2


@every_type
def test_splits_come_best_first_and_keep_the_weight(kind):
    X, _, labels, _ = two_in_one(kind)
    labels = 1 - labels
    mixture = mixture_of(X, labels, 2, kind)
    found = splits(mixture, X, ones(600), labels, generator())
    assert [split.component for split in found] == [1, 0]
    assert found[0].gain > found[1].gain
    for split in found:
        both = float(split.parts[0].weight + split.parts[1].weight)
        assert both == pytest.approx(float(mixture.weights[split.component]))


def test_components_of_too_few_rows_are_not_split():
    """Too few rows of positive weight, or no rows at all."""
    enough = split_merge._ROWS * 3
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([50, enough - 1, enough]))
    X, weight = mixtures.normal_rows(len(labels), 2), ones(len(labels))
    mixture = mixtures.parameters("full", 4, 2)
    found = splits(mixture, X, weight, labels, generator())
    assert sorted(split.component for split in found) == [0, 2]
    weight[-1] = 0
    found = splits(mixture, X, weight, labels, generator())
    assert [split.component for split in found] == [0]


def test_rows_without_weight_change_no_split():
    X, _, labels, mixture = two_in_one("full")
    far = torch.full((50, 2), 500.0, dtype=torch.float64)
    weight = torch.cat([ones(600), torch.zeros(50, dtype=torch.float64)])
    padded = torch.cat([labels, torch.zeros(50, dtype=torch.int64)])
    alone = splits(mixture, X, ones(600), labels, generator())
    beside = splits(mixture, torch.cat([X, far]), weight, padded, generator())
    assert [split.gain for split in alone] == [split.gain for split in beside]
    assert torch.equal(alone[0].parts[1].mean, beside[0].parts[1].mean)


@every_type
def test_equal_rows_are_not_split(kind):
    X = torch.full((40, 2), 3.0, dtype=torch.float64)
    mixture, labels = mixtures.parameters(kind, 1, 2), torch.zeros(40, dtype=torch.int64)
    assert splits(mixture, X, ones(40), labels, generator()) == []


@every_type
def test_a_split_of_flat_rows_is_finite(kind):
    """A constant column, one column twice, and a row at 1e9."""
    X = mixtures.normal_rows(60, 4)
    X[:, 1], X[:, 2] = 7.0, X[:, 0]
    X[11, 3] = 1e9
    labels = torch.zeros(60, dtype=torch.int64)
    mixture = mixtures.parameters(kind, 1, 4)
    (split,) = splits(mixture, X, ones(60), labels, generator())
    assert math.isfinite(split.gain)
    after = apply(mixture, drop=[0], add=split.parts)
    assert_sound(after)
    matrices = torch.tensor(naive.covariance_matrices(after))
    assert (torch.linalg.cholesky_ex(matrices).info == 0).all()


# --- from one mixture to another ---


def part_of(kind, number, weight=0.25) -> Part:
    """Return a part whose mean says its number."""
    one = mixtures.parameters(kind, 1, 2, seed=number)
    covariance = one.covariances if TYPE_OF[kind].is_shared else one.covariances[0]
    return Part(values(weight)[0], torch.full((2,), float(number)).double(), covariance)


@every_type
def test_apply_drops_and_adds(kind):
    mixture = mixtures.parameters(kind, 4, 2)
    part = part_of(kind, 9, weight=0.5)
    after = apply(mixture, drop=[2, 0], add=[part])
    kept = [float(mixture.weights[1]), float(mixture.weights[3])]
    expected = np.array([*kept, 0.5])
    np.testing.assert_allclose(after.weights, expected / expected.sum())
    assert torch.equal(after.means, torch.stack([*mixture.means[[1, 3]], part.mean]))
    if TYPE_OF[kind].is_shared:
        assert torch.equal(after.covariances, mixture.covariances)
    else:
        own = [*mixture.covariances[[1, 3]], part.covariance]
        assert torch.equal(after.covariances, torch.stack(own))


@every_type
def test_apply_without_a_move_changes_nothing(kind):
    mixture = mixtures.parameters(kind, 3, 2)
    mixtures.assert_same(apply(mixture), mixture, rtol=1e-15, atol=0)


def made_up(kind, gains, losses):
    """Return splits and merges of a mixture of 6 with given gains, and parts that say whose."""
    found = [
        Split(c, (part_of(kind, 100 + c, 0.1), part_of(kind, 200 + c, 0.1)), gain)
        for c, gain in gains
    ]
    cheap = [Merge(pair, part_of(kind, 300 + i, 0.2), loss) for i, (pair, loss) in losses]
    return found, cheap


@every_type
def test_the_most_promising_moves_are_the_best_of_all_that_do_not_collide(kind):
    mixture = mixtures.parameters(kind, 6, 2)
    gains = [(4, 90.0), (0, 50.0), (2, -3.0)]
    losses = list(enumerate([((0, 1), -5.0), ((2, 4), 1.0), ((3, 5), 30.0), ((1, 3), 31.0)]))
    found, cheap = made_up(kind, gains, losses)
    limit = 3
    expected = sorted(
        (
            (gain - loss, c, i)
            for c, gain in gains
            for i, (pair, loss) in losses[:limit]
            if c not in pair
        ),
        reverse=True,
    )[:limit]
    moved = split_and_merge(mixture, found, cheap, limit)
    assert len(moved) == limit
    for after, (_, c, i) in zip(moved, expected, strict=True):
        numbers = after.means[-3:, 0].tolist()
        assert numbers == [100 + c, 200 + c, 300 + i]
        kept = [x for x in range(6) if x not in (c, *losses[i][1][0])]
        assert torch.equal(after.means[:-3], mixture.means[kept])
        assert after.n_components == 6
        assert_sound(after)


@every_type
def test_a_split_and_a_merge_mend_a_mixture_that_is_stuck(kind):
    """Two components share a cluster, one lies between two: the first proposal has each right."""
    centres = values([0, -8], [0, 8], [40, 0])
    X, cluster = clusters(centres, [200, 200, 400])
    stuck = torch.where(cluster == 2, 1 + (X[:, 0] > 40).long(), 0)
    mixture = mixture_of(X, stuck, 3, kind)
    found = splits(mixture, X, ones(800), stuck, generator())
    moved = split_and_merge(mixture, found, merges(mixture, 800.0), 4)
    assert moved
    best = moved[0]
    assert best.n_components == 3
    assert float(torch.cdist(centres, best.means).min(1).values.max()) < 0.5
    weights = best.weights[torch.cdist(centres, best.means).argmin(1)]
    torch.testing.assert_close(weights, values(0.25, 0.25, 0.5), rtol=1e-6, atol=1e-6)
    if TYPE_OF[kind].is_shared:
        assert torch.equal(best.covariances, mixture.covariances)


@every_type
def test_useless_components_go_where_splits_gain_most(kind):
    mixture = mixtures.parameters(kind, 6, 2)
    found, _ = made_up(kind, [(1, 9.0), (4, 8.0), (0, 7.0), (2, 6.0)], [])
    useless = torch.tensor([False, True, False, True, False, False])
    after = split_merge.replace(mixture, useless, found)
    assert after.n_components == 6
    assert torch.equal(after.means[:2], mixture.means[[2, 5]])
    assert after.means[2:, 0].tolist() == [104, 204, 100, 200]
    assert_sound(after)
    if TYPE_OF[kind].is_shared:
        assert torch.equal(after.covariances, mixture.covariances)


@every_type
def test_useless_components_stay_where_too_few_can_be_split(kind):
    mixture = mixtures.parameters(kind, 4, 2)
    found, _ = made_up(kind, [(1, 9.0), (2, 8.0)], [])
    useless = torch.tensor([True, True, False, True])
    assert split_merge.replace(mixture, useless, found) is None
    assert split_merge.replace(mixture, useless, []) is None


# --- the smallest, and the degenerate ---


@every_type
def test_one_component_has_no_merge(kind):
    X, labels = mixtures.normal_rows(100, 2), torch.zeros(100, dtype=torch.int64)
    mixture = mixtures.parameters(kind, 1, 2)
    assert merges(mixture, 100.0) == []
    found = splits(mixture, X, ones(100), labels, generator())
    assert split_and_merge(mixture, found, [], 4) == []
    assert apply(mixture, drop=[0], add=found[0].parts).n_components == 2


@every_type
def test_two_components_have_one_merge_and_no_split_beside_it(kind):
    X, _, labels, mixture = two_in_one(kind)
    cheap = merges(mixture, 600.0)
    assert [merge.pair for merge in cheap] == [(0, 1)]
    found = splits(mixture, X, ones(600), labels, generator())
    assert split_and_merge(mixture, found, cheap, 4) == []
    after = apply(mixture, drop=cheap[0].pair, add=[cheap[0].part])
    assert after.n_components == 1
    assert_sound(after)


def crippled(kind, weight) -> Parameters:
    """Return a mixture of 5, two of them of next to no weight, one of these nearly flat."""
    mixture = mixtures.parameters(kind, 5, 2)
    mixture.weights[[1, 3]] = weight
    if not TYPE_OF[kind].is_shared:
        mixture.covariances[3] *= 1e-30
    return replace(mixture, weights=mixture.weights / mixture.weights.sum())


@every_type
@pytest.mark.parametrize("weight", [1e-20, 1e-300, 0.0])
def test_components_without_rows_make_no_nan(kind, weight):
    mixture = crippled(kind, weight)
    X, labels = mixtures.normal_rows(90, 2), torch.tensor([0, 2, 4]).repeat(30)
    found, cheap = splits(mixture, X, ones(90), labels, generator()), merges(mixture, 90.0)
    assert sorted(split.component for split in found) == [0, 2, 4]
    assert all(math.isfinite(merge.loss) for merge in cheap)
    moved = split_and_merge(mixture, found, cheap, 10)
    assert moved
    mended = split_merge.replace(mixture, mixture.weights < 1e-9, found)
    assert mended is not None
    assert (mended.weights > 0.01).all()
    for after in [*moved, mended]:
        assert_sound(after)


@every_type
def test_copies_of_components_are_the_same_density_and_halves_nearly(kind):
    mixture = mixtures.parameters(kind, 3, 2)
    X = 2 * mixtures.normal_rows(400, 2)
    copied = split_merge.halved(mixture, 6, shift=0.0)
    assert copied.n_components == 6
    expected, found = (naive.e_step(X, p).log_likelihood for p in (mixture, copied))
    assert found == pytest.approx(expected, rel=1e-12)
    halved = split_merge.halved(mixture, 4)
    assert halved.n_components == 4
    near = naive.e_step(X, halved).log_likelihood
    assert near != expected
    assert near == pytest.approx(expected, abs=0.02 * len(X))
    assert float(halved.weights.sum()) == pytest.approx(1)
    # The largest was halved, and its halves lie on either side of its mean.
    largest = int(mixture.weights.argmax())
    torch.testing.assert_close(halved.means[-2:].mean(0), mixture.means[largest])


def test_many_components_are_moved_together_where_several_moves_promise_a_gain():
    """Three pairs of clusters share a component each, and three clusters have two."""
    generator = torch.Generator().manual_seed(0)
    places = torch.arange(9.0, dtype=torch.float64)[:, None] * 40
    X = torch.cat([p + torch.randn(200, 1, generator=generator).double() for p in places])
    labels = torch.cat([torch.full((200,), i) for i in (0, 0, 1, 1, 2, 2)])
    halves = torch.cat([3 + 2 * i + (torch.arange(200) % 2) for i in range(3)])
    mixture = start_of(X, ones(len(X)), torch.cat([labels, halves]), 9, "full")
    found = splits(mixture, X, ones(len(X)), torch.cat([labels, halves]), generator)
    cheap = merges(mixture, 1800.0)
    one_by_one = split_and_merge(mixture, found, cheap, 8)
    together = split_and_merge(mixture, found, cheap, 8, at_once=3)
    assert len(together) == 8
    assert torch.equal(together[1].means, one_by_one[0].means)
    means = together[0].means.flatten().sort().values
    torch.testing.assert_close(means, places.flatten(), rtol=0, atol=1.0)
    # Never more of them at once than may be, and no component twice.
    two = split_and_merge(mixture, found, cheap, 8, at_once=2)[0]
    assert two.n_components == 9
    assert len({round(m) for m in two.means.flatten().tolist()} & {20, 100, 180}) == 1

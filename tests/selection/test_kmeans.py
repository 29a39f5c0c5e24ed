"""Where components start: k-means|| is its definition, and weights are copies of rows."""

from __future__ import annotations

import collections
import itertools
import math
import random

import mixtures
import naive
import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from gmm_dist.em.estep import SumMoments
from gmm_dist.model.covariance import COVARIANCE_TYPES
from gmm_dist.selection import kmeans
from gmm_dist.selection.coreset import Whitening, whitening
from gmm_dist.selection.kmeans import (
    METHODS,
    assignments,
    k_means_parallel,
    lloyd,
    nearest,
    start_of,
)
from gmm_dist.shards import local, protocol
from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import ShardRows
from gmm_dist.shards.tree_sum import Partial, TreeSum, run_on
from gmm_dist.streams import Stream, keyed_generator

every_type = pytest.mark.parametrize("kind", COVARIANCE_TYPES)
every_method = pytest.mark.parametrize("method", METHODS)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def ones(n):
    return torch.ones(n, dtype=torch.float64)


# --- k-means||, over shards ---


def parallel(X, k, *, edges=(), sample_weight=None, rounds=5, random_state=0):
    shards = mixtures.shards(X, edges, sample_weight)
    total = shards.run(SumMoments(X.shape[1]))
    return k_means_parallel(shards, total, k, rounds=rounds, random_state=random_state)


def naive_k_means_parallel(Z, weight, edges, k, rounds, random_state):
    """Return the numbers of the rows chosen, and the weight nearest to each: Bahmani et al."""
    cuts = [0, *edges, len(Z)]
    shards = [range(a, b) for a, b in itertools.pairwise(cuts)]
    Z, weight = Z.numpy(), weight.tolist()

    def distance(i, chosen):
        return min(float(((Z[i] - Z[c]) ** 2).sum()) for c in chosen)

    def keyed(shard, round):
        if round == 0:
            return keyed_generator(Stream.FIRST_CENTRE, random_state, shard)
        return keyed_generator(Stream.MORE_CENTRES, random_state, shard, round)

    times = {}
    for shard, rows in enumerate(shards):
        clocks = torch.empty(len(rows), dtype=torch.float64)
        clocks.exponential_(generator=keyed(shard, 0))
        times |= {i: float(t) / weight[i] for i, t in zip(rows, clocks, strict=True) if weight[i]}
    chosen = [min(times, key=times.__getitem__)]
    for round in range(1, rounds + 1):
        cost = sum(weight[i] * distance(i, chosen) for i in range(len(Z)))
        new = []
        for shard, rows in enumerate(shards):
            draws = torch.rand(len(rows), dtype=torch.float64, generator=keyed(shard, round))
            for i, u in zip(rows, draws.tolist(), strict=True):
                if u < min(1.0, 2 * k * weight[i] * distance(i, chosen) / cost):
                    new.append(i)
        chosen = chosen + new
    counts = [0.0] * len(chosen)
    for i in range(len(Z)):
        distances = [float(((Z[i] - Z[c]) ** 2).sum()) for c in chosen]
        counts[int(np.argmin(distances))] += weight[i]
    return chosen, counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("edges", [[], [50], [0, 20, 20, 75, 130]])
def test_k_means_parallel_is_its_definition(edges, dtype):
    X = mixtures.rows(mixtures.parameters("full", 4, 3), 150).to(dtype)
    weight = mixtures.row_weights(150)
    weight[::9] = 0
    whiten = whitening(mixtures.shards(X, edges, weight).run(SumMoments(3)))
    Z = whiten(X.double())
    for seed in range(4):
        chosen, counts = naive_k_means_parallel(Z, weight, edges, 3, 4, seed)
        centres, found = parallel(
            X, 3, edges=edges, sample_weight=weight, rounds=4, random_state=seed
        )
        assert torch.equal(centres, X[chosen].double())
        assert 10 < len(chosen) < 45
        np.testing.assert_allclose(found, counts, rtol=1e-12)


def test_chunks_do_not_change_which_rows_are_candidates(monkeypatch):
    X = mixtures.normal_rows(3000, 2)
    whole, counts = parallel(X, 5, edges=[1000])
    for module in (kmeans, protocol):
        monkeypatch.setattr(module, "chunk_rows", lambda *_: 64)
    centres, weights = parallel(X, 5, edges=[1000])
    assert torch.equal(whole, centres)
    assert torch.equal(counts, weights)


class Scattered:
    """Shards that several workers hold, and that answer in any order."""

    def __init__(self, shards, n_workers, seed):
        self.n_shards, self._order = len(shards), random.Random(seed)
        self._workers = [[] for _ in range(n_workers)]
        for shard in shards:
            self._order.choice(self._workers).append(shard)

    def run(self, task):
        tree = TreeSum(self.n_shards)
        partials: list[Partial] = []
        for held in self._workers:
            partials += run_on(task, held, self.n_shards)
        self._order.shuffle(partials)
        for partial in partials:
            tree.push(partial)
        return tree.total()

    def jobs(self):
        return local.LocalJobs(len(self._workers))


@pytest.mark.parametrize("n_workers", [1, 3, 7])
def test_candidates_do_not_depend_on_who_holds_which_shard(n_workers):
    X, weight = mixtures.normal_rows(400, 3), mixtures.row_weights(400)
    cut = mixtures.blocks(X, [10, 10, 90, 100, 200, 210, 300, 330], weight)
    shards = [ShardRows(shard=i, blocks=[block]) for i, block in enumerate(cut)]
    total = LocalShards(shards).run(SumMoments(3))
    expected = k_means_parallel(LocalShards(shards), total, 4, random_state=5)
    for seed in range(5):
        found = k_means_parallel(Scattered(shards, n_workers, seed), total, 4, random_state=5)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_first_candidate_is_drawn_by_weight():
    X, weight = mixtures.normal_rows(8, 1), torch.arange(8.0, dtype=torch.float64)
    shards = mixtures.shards(X, [3, 3, 5], weight)
    rounds, counts = 1000, collections.Counter()
    for seed in range(rounds):
        one = shards.run(kmeans._DrawOne(seed, 1))
        counts[int((one.X == X).all(1).nonzero())] += 1
    expected = rounds * weight / weight.sum()
    assert counts[0] == 0
    assert chisquare([counts[i] for i in range(1, 8)], expected[1:].numpy()).pvalue > 0.001


def test_counts_are_all_of_the_weight_and_rows_without_weight_are_absent():
    X, weight = mixtures.normal_rows(300, 2), mixtures.row_weights(300)
    X[200:] *= 1000
    weight[200:] = 0
    centres, counts = parallel(X, 4, edges=[100, 250], sample_weight=weight)
    assert float(counts.sum()) == pytest.approx(float(weight.sum()))
    assert centres.abs().max() < 10
    assert (counts > 0).all()


def test_candidates_of_few_distinct_rows_cover_them():
    X = mixtures.normal_rows(3, 2).repeat(20, 1)
    centres, counts = parallel(X, 5, edges=[13])
    assert len(centres.unique(dim=0)) == 3
    assert float(counts.sum()) == pytest.approx(60)


def test_rows_that_are_all_the_same_have_one_candidate():
    X = torch.full((30, 2), 4.0, dtype=torch.float64)
    centres, counts = parallel(X, 3, edges=[10])
    assert centres.tolist() == [[4.0, 4.0]]
    assert counts.tolist() == [30.0]


def test_singular_columns_and_other_units_change_no_candidate():
    """Whitened coordinates are of the rows, not of how their columns are written."""
    X = mixtures.normal_rows(300, 2)
    wide = torch.cat([X, X[:, :1] + X[:, 1:], torch.full((300, 1), 3.0)], dim=1)
    wide = wide * torch.tensor([2.0**-20, 2.0**20, 1.0, 1.0], dtype=torch.float64)
    plain, counts = parallel(X, 4, edges=[70])
    found, same = parallel(wide, 4, edges=[70])
    assert torch.equal(found, wide[[int((c == X).all(1).nonzero()) for c in plain]])
    assert torch.equal(counts, same)


@pytest.mark.parametrize("columns", [[1], [0, 1, 2]])
def test_an_outlier_is_a_candidate_and_the_clusters_keep_theirs(columns):
    """Even where it squeezes all others into a billionth of the whitened spread."""
    labels = torch.arange(600) % 4
    X = mixtures.normal_rows(600, 3) + 100 * labels[:, None]
    X[17, columns] = 1e9
    centres, counts = parallel(X, 8, edges=[200])
    assert (centres[:, 1] > 1e8).sum() == 1
    assert float(counts[centres[:, 1] > 1e8]) == 1.0
    bulk = centres[centres[:, 1] < 1e8]
    assert set((bulk.mean(1) / 100).round().long().tolist()) == {0, 1, 2, 3}


def test_candidates_find_far_small_clusters_for_every_k():
    """Seeds of the candidates, as weighted rows: one in each of six clusters, one of 3 rows."""
    sizes = [4000, 2000, 1000, 500, 20, 3]
    labels = torch.repeat_interleave(torch.arange(6), torch.tensor(sizes))
    X = mixtures.normal_rows(len(labels), 6) + 100 * torch.eye(6, dtype=torch.float64)[labels]
    X = X[torch.randperm(len(X), generator=generator(0))]
    for seed in range(5):
        centres, counts = parallel(X, 6, edges=[1000, 3000], random_state=seed)
        tries = [assignments("kmeans", centres, counts, (3, 6), generator(n)) for n in range(4)]
        assert all(len(found[3].unique()) == 3 for found in tries)
        # One seeding misses the three rows once in six times; a search has several.
        none = torch.zeros(6, dtype=torch.float64)
        masses = [sorted(none.index_add(0, found[6], counts).tolist()) for found in tries]
        assert sorted(sizes) in masses


# --- on a sample ---


@every_method
def test_rows_of_zero_weight_play_no_part(method):
    """The start is one of the other rows alone, however far the absent rows are."""
    X, weight = mixtures.normal_rows(60, 2), mixtures.row_weights(60)
    X[30:] = X[30:] * 1000 + 5000
    weight[30:] = 0
    for seed in range(10):
        assignment = assignments(method, X, weight, [4], generator(seed))[4]
        start = start_of(X, weight, assignment, 4, "full")
        assert start.means.abs().max() < 5
        assert start.covariances.abs().max() < 20
        seeds = {
            "random_from_data": kmeans.random_rows,
            "k-means++": kmeans.k_means_plus_plus,
        }
        if method in seeds:
            assert (seeds[method](X, weight, 6, generator(seed)) < 30).all()


@pytest.mark.parametrize("choose", [kmeans.random_rows, kmeans.k_means_plus_plus])
def test_an_integer_weight_is_so_many_copies(choose):
    """The second seed's distribution, given as values, is the same for both."""
    X = torch.tensor([[0.0], [1.0], [3.0], [7.0]], dtype=torch.float64)
    weight = torch.tensor([1.0, 5.0, 2.0, 1.0], dtype=torch.float64)
    copies = X.repeat_interleave(weight.long(), dim=0)
    rounds = 1500
    tables = []
    for rows, w in ((X, weight), (copies, ones(len(copies)))):
        pairs = collections.Counter()
        for seed in range(rounds):
            chosen = choose(rows, w, 2, generator(seed))
            pairs[tuple(rows[chosen, 0].tolist())] += 1
        tables.append(pairs)
    for pair in tables[0] | tables[1]:
        one, other = (table[pair] / rounds for table in tables)
        spread = math.sqrt(max(one, other) * 2 / rounds)
        assert abs(one - other) < 4 * spread, pair


def test_random_rows_are_drawn_by_weight_without_replacement():
    X, weight = mixtures.normal_rows(5, 1), torch.tensor([1.0, 2, 3, 4, 0], dtype=torch.float64)
    rounds, pairs = 3000, collections.Counter()
    for seed in range(rounds):
        pairs[tuple(kmeans.random_rows(X, weight, 2, generator(seed)).tolist())] += 1
    w = weight.tolist()
    expected = {
        (i, j): w[i] / 10 * w[j] / (10 - w[i]) for i in range(4) for j in range(4) if i != j
    }
    assert set(pairs) == set(expected)
    frequencies = [pairs[pair] for pair in expected]
    assert chisquare(frequencies, [rounds * p for p in expected.values()]).pvalue > 0.001


def test_distinct_random_rows_that_run_out_are_repeated_in_turn():
    X = torch.tensor([[1.0], [5.0], [1.0], [9.0]], dtype=torch.float64)
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    for seed in range(10):
        values = X[kmeans.random_rows(X, weight, 5, generator(seed)), 0].tolist()
        assert set(values[:2]) == {1.0, 5.0}
        assert values == [*values[:2], *values[:2], values[0]]


def test_labels_are_of_the_seeds_or_of_the_centres_that_k_means_moved_them_to():
    X, weight = mixtures.normal_rows(200, 2), mixtures.row_weights(200)
    seeds = X[kmeans.k_means_plus_plus(X, weight, 5, generator(1))]
    found = {
        method: assignments(method, X, weight, [5], generator(1))[5]
        for method in ("kmeans", "k-means++")
    }
    assert torch.equal(found["k-means++"], nearest(X, seeds))
    assert torch.equal(found["kmeans"], nearest(X, lloyd(X, weight, seeds)))
    assert not torch.equal(found["kmeans"], found["k-means++"])


@every_method
def test_a_smaller_k_starts_from_the_first_seeds_of_a_larger(method):
    """A sweep's candidate does not depend on what else the sweep asks for."""
    X, weight = mixtures.normal_rows(80, 2), mixtures.row_weights(80)
    both = assignments(method, X, weight, (3, 7), generator(1))
    alone = assignments(method, X, weight, (3,), generator(1))
    if method == "random":
        first = both[7][:, :3]
        torch.testing.assert_close(both[3], first / first.sum(1, keepdim=True))
        torch.testing.assert_close(both[7].sum(1), ones(80))
        assert both[7].shape == (80, 7)
    else:
        assert torch.equal(both[3], alone[3])
        assert sorted(both[7].unique().tolist()) == list(range(7))


@every_method
@pytest.mark.parametrize("d", [0, 1, 3])
def test_fewer_distinct_rows_than_components_still_start(method, d):
    Z = mixtures.normal_rows(3, d).repeat(20, 1)
    assignment = assignments(method, Z, ones(60), [5], generator(0))[5]
    X = torch.cat([Z, Z, torch.full((60, 1), 2.0, dtype=torch.float64)], dim=1)
    start = start_of(X, ones(60), assignment, 5, "full")
    assert (torch.linalg.cholesky_ex(start.covariances).info == 0).all()
    assert torch.isfinite(start.means).all()
    if d > 0 and method in ("kmeans", "k-means++", "random_from_data"):
        assert len(assignment.unique()) == 3


def test_lloyd_is_weighted_k_means():
    Z, weight = mixtures.normal_rows(60, 2), mixtures.row_weights(60)
    centres = Z[:4].clone()
    for n_iter in range(1, 6):
        labels = [int(((centres - z) ** 2).sum(1).argmin()) for z in Z]
        for c in range(4):
            own = [i for i in range(60) if labels[i] == c]
            total = sum(weight[i] for i in own)
            centres[c] = sum(weight[i] * Z[i] for i in own) / total
        torch.testing.assert_close(lloyd(Z, weight, Z[:4], n_iter), centres)


def test_lloyd_stops_where_no_row_changes_sides():
    Z, weight = mixtures.normal_rows(200, 2), mixtures.row_weights(200)
    found = lloyd(Z, weight, Z[:5], 1000)
    torch.testing.assert_close(lloyd(Z, weight, found, 1), found)


def test_a_centre_without_rows_stays():
    Z = mixtures.normal_rows(20, 2)
    far = torch.full((1, 2), 100.0, dtype=torch.float64)
    assert torch.equal(lloyd(Z, ones(20), torch.cat([Z[:1], far]))[1:], far)


def test_nearest_is_the_nearest_in_any_number_of_rows():
    Z, centres = mixtures.normal_rows(5000, 3), mixtures.normal_rows(9, 3, seed=1)
    expected = (Z[:, None] - centres).square().sum(2).argmin(1)
    assert torch.equal(nearest(Z, centres), expected)


@every_type
def test_the_start_of_labels_is_that_of_their_responsibilities(kind):
    X, weight = mixtures.rows(mixtures.parameters("full", 3, 2), 50), mixtures.row_weights(50)
    labels = torch.arange(50) % 3
    one_hot = torch.nn.functional.one_hot(labels, 3).double()
    mixtures.assert_same(
        start_of(X, weight, labels, 3, kind), start_of(X, weight, one_hot, 3, kind)
    )


@every_type
def test_a_start_is_an_m_step_of_the_rows_and_a_few_more_per_component(kind):
    """Rows of the component's mean weight, spread like all rows about its mean: d + 1 or 2."""
    more = 3 if kind == "full" else 2
    X, weight = mixtures.rows(mixtures.parameters("full", 3, 2), 40), mixtures.row_weights(40)
    resp = (2 * mixtures.normal_rows(40, 3)).softmax(1)
    start = start_of(X, weight, resp, 3, kind)
    mean = (weight @ X) / weight.sum()
    pooled = torch.linalg.cholesky(((X - mean).T * weight) @ (X - mean) / weight.sum())
    rows, shares = [X], [resp]
    for c in range(3):
        own = weight * resp[:, c]
        centre, per_row = own @ X / own.sum(), own.sum() / resp[:, c].sum()
        # 2 d rows whose scatter about the centre is that of `more` rows of covariance `pooled`.
        arms = torch.cat([pooled.T, -pooled.T]) * 2**0.5
        rows.append(centre + arms)
        share = torch.zeros(4, 3, dtype=torch.float64)
        share[:, c] = more * per_row / 4
        shares.append(share)
    all_weights = torch.cat([weight, ones(12)])
    expected = naive.m_step(
        torch.cat(rows), torch.cat(shares).numpy(), kind, sample_weight=all_weights
    )
    mixtures.assert_same(start, expected, rtol=1e-7, atol=1e-7)


@every_type
def test_heavy_rows_of_a_coreset_do_not_start_singular(kind):
    """A weight of a million on each row shrinks covariances as a weight of one does."""
    X, labels = mixtures.normal_rows(40, 3), torch.zeros(40, dtype=torch.int64)
    labels[0] = 1  # one row; the third component has none
    light, heavy = (start_of(X, w * ones(40), labels, 3, kind) for w in (1.0, 2.0**20))
    mixtures.assert_same(light, heavy)
    matrices = torch.tensor(naive.covariance_matrices(heavy))
    assert (torch.linalg.eigvalsh(matrices) > 0.1).all()


def test_whitened_seeds_are_those_of_the_rows():
    """A linear map of the rows moves no seed: the whitened distances are the same."""
    X = mixtures.normal_rows(100, 2)
    turned = X @ torch.tensor([[4.0, 1.0], [-2.0, 0.25]], dtype=torch.float64)
    chosen = []
    for rows in (X, turned):
        whiten: Whitening = whitening(mixtures.shards(rows).run(SumMoments(2)))
        chosen.append(kmeans.k_means_plus_plus(whiten(rows), ones(100), 6, generator(2)))
    assert torch.equal(*chosen)


def test_seeds_are_far_apart():
    """One seed in each of six distant clusters, the smallest of three rows, whatever the draw."""
    sizes = [400, 200, 100, 50, 20, 3]
    labels = torch.repeat_interleave(torch.arange(6), torch.tensor(sizes))
    X = mixtures.normal_rows(len(labels), 6) + 100 * torch.eye(6, dtype=torch.float64)[labels]
    for seed in range(25):
        seeds = kmeans.k_means_plus_plus(X, ones(len(X)), 6, generator(seed))
        assert sorted(labels[seeds].tolist()) == list(range(6))


@every_type
def test_the_start_of_one_component_is_the_whole_sample(kind):
    X, weight = mixtures.rows(mixtures.parameters("full", 3, 2), 50), mixtures.row_weights(50)
    start = start_of(X, weight, torch.zeros(50, dtype=torch.int64), 1, kind)
    whole = naive.m_step(X, torch.ones(50, 1).numpy(), kind, sample_weight=weight)
    mixtures.assert_same(start, whole, rtol=1e-7)


@every_type
def test_a_start_is_positive_definite_whatever_the_partition(kind):
    X = mixtures.normal_rows(40, 3)
    X[:, 2] = X[:, 1]  # a column twice
    labels = torch.zeros(40, dtype=torch.int64)
    labels[0] = 1  # one row; the third component has none
    start = start_of(X, ones(40), labels, 3, kind)
    matrices = torch.tensor(naive.covariance_matrices(start))
    assert (torch.linalg.cholesky_ex(matrices).info == 0).all()
    assert float(start.weights.sum()) == pytest.approx(1)
    assert (start.weights > 0).all()


def test_many_seeds_are_as_far_apart_as_few_and_begin_with_them():
    """Beyond some number, distances are taken by products: they differ in the last digits."""
    k, generator = kmeans._MANY + 40, torch.Generator()
    centres = 100 * torch.randn(k, 3, dtype=torch.float64, generator=generator.manual_seed(1))
    Z = centres.repeat_interleave(20, 0) + mixtures.normal_rows(20 * k, 3) * 1e-3
    weight = torch.ones(len(Z), dtype=torch.float64)
    seeds = kmeans.k_means_plus_plus(Z, weight, k, generator.manual_seed(2))
    assert sorted((seeds // 20).tolist()) == list(range(k))
    few = kmeans.k_means_plus_plus(Z, weight, 10, generator.manual_seed(2))
    assert torch.equal(few, seeds[:10])

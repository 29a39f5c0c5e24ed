"""The search for starts leaves what EM is stuck in, never dies, and is its seed's to the bit."""

from __future__ import annotations

import itertools
import os

import mixtures
import naive
import pytest
import torch
from test_kmeans import Scattered

from gmm_dist.config import INITS, EMConfig, StartConfig
from gmm_dist.em import loop
from gmm_dist.em.estep import SumMoments
from gmm_dist.model.covariance import COVARIANCE_TYPES
from gmm_dist.model.parameters import Parameters
from gmm_dist.selection import search as search_steps
from gmm_dist.selection import starts as search_module
from gmm_dist.selection.kmeans import start_of
from gmm_dist.selection.ranking import Candidate
from gmm_dist.selection.starts import find_starts, repair_degenerate
from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import ShardRows

every_type = pytest.mark.parametrize("kind", COVARIANCE_TYPES)
every_init = pytest.mark.parametrize("init", INITS)

ONE_RESTART = {"n_init": 1, "init": "random_from_data"}
Finalists = list[list[Parameters]]
PAIRS = [(k, kind) for kind in COVARIANCE_TYPES for k in (1, 4)]


@pytest.fixture
def alone(monkeypatch):
    """Search each k by its restarts alone, as beyond the trail."""
    monkeypatch.setattr(search_module, "TRAIL", 0)


def ones(n):
    return torch.ones(n, dtype=torch.float64)


def searched(X, pairs, *, edges=(), sample_weight=None, warm=(), **start) -> Finalists:
    shards = mixtures.shards(X, edges, sample_weight)
    total, settings = shards.run(SumMoments(X.shape[1])), StartConfig(**start)
    candidates = [Candidate(k, kind) for k, kind in pairs]
    return find_starts(shards, candidates, EMConfig(), settings, total, warm=warm)


def best(X, pairs, **settings) -> list[Parameters]:
    return [found[0] for found in searched(X, pairs, **settings)]


def bound(X, start, n_iter=10) -> float:
    """Return the mean log-likelihood (nats per row) that some EM from a start comes to."""
    shards = mixtures.shards(X)
    config = EMConfig(max_iter=n_iter, tol=0.0, precision="float64")
    (fit,) = loop.fit(shards, [start], config, shards.run(SumMoments(X.shape[1])))
    return fit.lower_bounds[-1]


def clusters(centres, n):
    """Return centred rows of unit normals about `centres` (k, d), and their labels."""
    labels = torch.arange(n) % len(centres)
    X = mixtures.normal_rows(n, centres.shape[1]) + centres[labels]
    return X - X.mean(0), labels


def six_clusters(n=480):
    """Return rows of six distant clusters, where one restart from random rows gets stuck."""
    return clusters(15 * mixtures.normal_rows(6, 3, seed=5), n)


def assert_same_finalists(one: Finalists, other: Finalists) -> None:
    for mine, theirs in zip(one, other, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            mixtures.assert_same(a, b, rtol=0, atol=0)


def by_weight(mixture: Parameters) -> Parameters:
    order, covariances = mixture.weights.argsort(), mixture.covariances
    if not mixture.type.is_shared:
        covariances = covariances[order]
    return Parameters(
        weights=mixture.weights[order],
        means=mixture.means[order],
        covariances=covariances,
        covariance_type=mixture.covariance_type,
    )


def assert_positive_definite(start: Parameters) -> None:
    assert torch.isfinite(start.means).all()
    assert float(start.weights.sum()) == pytest.approx(1)
    assert (start.weights >= 0).all()
    matrices = torch.tensor(naive.covariance_matrices(start))
    assert torch.isfinite(matrices).all()
    assert (torch.linalg.cholesky_ex(matrices).info == 0).all()


# --- out of a local optimum ---


@pytest.mark.parametrize("random_state", [0, 1, 3])
def test_moves_leave_an_optimum_that_one_restart_is_stuck_in(alone, random_state):
    X, labels = six_clusters()
    # One spread for all, and a restart finds the six.
    pairs = [(6, kind) for kind in COVARIANCE_TYPES if kind != "tied-spherical"]
    settings = {**ONE_RESTART, "random_state": random_state}
    stuck = best(X, pairs, moves=0, **settings)
    moved = best(X, pairs, moves=4, **settings)
    for (_, kind), before, after in zip(pairs, stuck, moved, strict=True):
        top = bound(X, start_of(X, ones(len(X)), labels, 6, kind))
        assert bound(X, before) < top - 0.2, kind
        assert bound(X, after) > top - 1e-3, kind


@every_type
def test_many_restarts_find_what_one_misses(alone, kind):
    """Without moves. More restarts may end lower: which few go on is said after ten iterations."""
    X, labels = six_clusters()
    top = bound(X, start_of(X, ones(len(X)), labels, 6, kind))
    settings = {**ONE_RESTART, "random_state": 1, "moves": 0}
    (one,) = best(X, [(6, kind)], **settings)
    (many,) = best(X, [(6, kind)], **{**settings, "n_init": 24})
    assert bound(X, one) < top - 0.2
    assert bound(X, many) > top - 1e-3


@pytest.mark.parametrize("random_state", [8, 9])
def test_the_trail_leads_out_of_an_optimum_that_no_move_leaves(random_state, monkeypatch):
    """Two components that pair four clusters the long way cannot both split and merge.

    One component, split, is the better pairing.
    """
    corners = torch.tensor([[0, 0], [0, 8], [12, 0], [12, 8]], dtype=torch.float64)
    X, labels = clusters(corners, 800)
    top = bound(X, start_of(X, ones(800), (labels >= 2).long(), 2, "full"))
    settings = {**ONE_RESTART, "random_state": random_state, "moves": 4}
    (led,) = best(X, [(2, "full")], **settings)
    monkeypatch.setattr(search_module, "TRAIL", 0)
    (by_itself,) = best(X, [(2, "full")], **settings)
    assert bound(X, by_itself) < top - 0.2
    assert bound(X, led) > top - 1e-3


# --- a k by itself and in a grid


@pytest.mark.parametrize("init", ["k-means++", "k-means||", "random"])
def test_what_comes_of_a_k_has_the_same_bits_in_any_grid(init):
    """Of more rows than the samples have, and beside other covariance types."""
    X = mixtures.rows(mixtures.parameters("full", 4, 2), 500)
    X = X - X.mean(0)
    settings = {"n_init": 2, "n_sample": 80, "moves": 1, "init": init}
    (expected,) = searched(X, [(4, "diag")], **settings)
    pairs = [(3, "spherical"), (5, "diag"), (4, "diag"), (2, "diag")]
    found = searched(X, pairs, **settings)
    assert_same_finalists([found[2]], [expected])


def test_beyond_the_trail_each_k_has_its_own_restarts_alone(monkeypatch):
    monkeypatch.setattr(search_module, "TRAIL", 4)
    X = mixtures.rows(mixtures.parameters("full", 4, 2), 300)
    X, settings = X - X.mean(0), {"n_init": 2, "moves": 1}
    (expected,) = searched(X, [(6, "diag")], **settings)
    found = searched(X, [(k, "diag") for k in (6, 2, 5)], **settings)
    assert_same_finalists([found[0]], [expected])
    monkeypatch.setattr(search_module, "TRAIL", 0)
    assert_same_finalists(searched(X, [(6, "diag")], **settings), [expected])


@every_type
def test_warm_starts_join_the_candidates_of_their_shape(alone, kind):
    X, labels = six_clusters()
    warm = start_of(X, ones(len(X)), labels, 6, kind)
    settings = {**ONE_RESTART, "random_state": 1, "moves": 0}
    stranger = mixtures.parameters(kind, 3, 3)
    cold = searched(X, [(6, kind)], **settings)
    other = searched(X, [(6, kind)], warm=[stranger], **settings)
    assert_same_finalists(cold, other)
    (joined,) = best(X, [(6, kind)], warm=[stranger, warm], **settings)
    assert bound(X, cold[0][0]) < bound(X, warm) - 0.2
    assert bound(X, joined) > bound(X, warm) - 1e-3


@every_type
def test_a_poor_warm_start_does_no_harm(alone, kind):
    X, labels = six_clusters()
    settings = {"init": "k-means++", "n_init": 8, "moves": 0, "finalists": 1}
    poor = start_of(X, ones(len(X)), labels.clamp_max(4), 6, kind)
    (cold,) = best(X, [(6, kind)], **settings)
    (found,) = best(X, [(6, kind)], warm=[poor], **settings)
    assert bound(X, poor, 1) < bound(X, cold, 1) - 0.2
    assert bound(X, found, 1) > bound(X, cold, 1) - 1e-9  # nats per row: rounding


def test_mending_puts_useless_components_elsewhere():
    """Where too few can be split, there is nothing sound to return."""
    X, labels = six_clusters()
    start = start_of(X, ones(len(X)), labels.remainder(5), 6, "full")
    far = start.means.clone()
    far[5] = 1000.0
    lone = Parameters(
        weights=start.weights, means=far, covariances=start.covariances, covariance_type="full"
    )
    shards = mixtures.shards(X)
    (fit,) = loop.fit(shards, [lone], EMConfig(max_iter=2), shards.run(SumMoments(3)))
    assert fit.degenerate.tolist() == [False] * 5 + [True]
    total, settings = shards.run(SumMoments(3)), StartConfig()
    ((mended,),) = repair_degenerate(shards, [fit], EMConfig(), settings, total)
    assert bound(X, mended) > bound(X, start_of(X, ones(len(X)), labels, 6, "full")) - 1e-3
    all_useless = loop.fit(shards, [lone], EMConfig(max_iter=1), shards.run(SumMoments(3)))[0]
    all_useless.degenerate[:] = True
    assert repair_degenerate(shards, [all_useless], EMConfig(), settings, total) == [[]]


# --- what comes back ---


def test_there_are_finalists_for_each_candidate_in_their_order():
    X = mixtures.normal_rows(300, 2)
    found = searched(X, PAIRS, n_init=4, finalists=2, moves=1)
    assert len(found) == len(PAIRS)
    for (k, kind), starts in zip(PAIRS, found, strict=True):
        assert 1 <= len(starts) <= 2
        assert all((s.n_components, s.covariance_type) == (k, kind) for s in starts)


def test_finalists_are_the_best_first_and_different_optima(alone):
    X, _ = six_clusters()
    settings = {"n_init": 6, "init": "random_from_data", "moves": 0, "random_state": 1}
    (found,) = searched(X, [(6, "diag")], finalists=3, **settings)
    assert 1 < len(found) <= 3
    bounds = [bound(X, start, 1) for start in found]
    assert bounds == sorted(bounds, reverse=True)
    assert all(a - b > 1e-4 for a, b in itertools.pairwise(bounds))
    (one,) = searched(X, [(6, "diag")], finalists=1, **settings)
    assert len(one) == 1
    mixtures.assert_same(one[0], found[0], rtol=0, atol=0)


# --- the same bits ---


def test_the_random_state_decides_the_bits():
    X = mixtures.rows(mixtures.parameters("full", 4, 2), 400)
    X = X - X.mean(0)
    settings = {"n_init": 2, "n_sample": 100, "edges": [50, 170], "moves": 1}
    pairs = [(3, kind) for kind in COVARIANCE_TYPES]
    one, same = (searched(X, pairs, random_state=3, **settings) for _ in range(2))
    assert_same_finalists(one, same)
    (other,) = best(X, pairs[:1], random_state=4, **settings)
    assert not torch.equal(other.means, one[0][0].means)


@pytest.mark.parametrize("worth", [1, 1 << 26])
def test_threads_change_no_bit(monkeypatch, worth):
    """However many jobs there are."""
    monkeypatch.setattr(search_steps, "_WORTH", worth)
    X = mixtures.rows(mixtures.parameters("full", 3, 2), 900)
    X = X - X.mean(0)
    pairs = [(2, kind) for kind in COVARIANCE_TYPES]
    settings = {"n_init": 3, "n_sample": 500, "moves": 1}
    found = []
    for n_cores in (1, 3):
        monkeypatch.setattr(os, "cpu_count", lambda n_cores=n_cores: n_cores)
        found.append(searched(X, pairs, **settings))
    assert_same_finalists(*found)


@pytest.mark.parametrize("init", ["k-means++", "k-means||"])
def test_who_holds_which_shard_changes_no_bit(init):
    X, weight = mixtures.rows(mixtures.parameters("full", 3, 2), 500), mixtures.row_weights(500)
    X = X - (weight @ X) / weight.sum()
    cut = mixtures.blocks(X, [10, 10, 90, 100, 200, 210, 300, 330], weight)
    shards = [ShardRows(shard=i, blocks=[block]) for i, block in enumerate(cut)]
    total = LocalShards(shards).run(SumMoments(2))
    start = StartConfig(n_init=2, init=init, n_sample=120, moves=1)
    candidates = [Candidate(3, "full"), Candidate(2, "diag")]
    expected = find_starts(LocalShards(shards), candidates, EMConfig(), start, total)
    for n_workers in (1, 3):
        held = Scattered(shards, n_workers, seed=n_workers)
        assert_same_finalists(find_starts(held, candidates, EMConfig(), start, total), expected)


# --- rows of every sort ---


@every_init
def test_every_way_to_start_finds_plain_clusters(init):
    X, labels = clusters(10 * torch.eye(3, dtype=torch.float64), 450)
    pairs = [(k, kind) for kind in COVARIANCE_TYPES for k in (1, 3)]
    for (k, kind), start in zip(pairs, best(X, pairs, init=init, n_init=4), strict=True):
        assert_positive_definite(start)
        top = start_of(X, ones(450), labels if k == 3 else labels * 0, k, kind)
        assert bound(X, start) > bound(X, top) - 1e-3, (k, kind)


@every_init
def test_duplicates_a_constant_column_and_an_outlier_still_start(init):
    X = torch.zeros(400, 4, dtype=torch.float64)
    X[:, :2] = clusters(torch.tensor([[0, 0], [9, 0]], dtype=torch.float64), 400)[0]
    X[:, 2] = X[:, 0]
    X[200:] = X[:200]
    X[17, 1] = 1e9
    X[:, 3] = 5.0
    X = X - X.mean(0)
    pairs = [(k, kind) for kind in mixtures.FEW_TYPES for k in (1, 4)]
    for start in best(X, pairs, init=init, n_init=2, moves=1):
        assert_positive_definite(start)


# Random shares are so even that rounding would choose among the optima. Nothing hands over such
# rows: see test_estimator's and test_reading's rows of zero weight.
@pytest.mark.parametrize("init", [init for init in INITS if not init.startswith("random")])
def test_rows_of_zero_weight_are_absent(init):
    """However far away, they change no start."""
    X, _ = clusters(8 * torch.eye(3, dtype=torch.float64), 300)
    far = 1e4 + 100 * mixtures.normal_rows(60, 3, seed=1)
    weight = torch.cat([mixtures.row_weights(300), torch.zeros(60, dtype=torch.float64)])
    X = X - (weight[:300] @ X) / weight.sum()
    pairs = [(3, kind) for kind in mixtures.FEW_TYPES]
    settings = {"init": init, "n_init": 2, "moves": 1}
    alone = best(X, pairs, sample_weight=weight[:300], **settings)
    beside = best(torch.cat([X, far]), pairs, sample_weight=weight, **settings)
    # The same components, in whatever order: rounding may choose among ways to one optimum.
    for one, other in zip(alone, beside, strict=True):
        mixtures.assert_same(by_weight(one), by_weight(other), rtol=1e-4, atol=1e-4)


@every_type
@pytest.mark.parametrize("d", [1, 3])
def test_fewer_distinct_rows_than_components_still_run(kind, d):
    X = mixtures.normal_rows(3, d).repeat(20, 1)
    X = X - X.mean(0)
    shards = mixtures.shards(X)
    (start,) = best(X, [(5, kind)], n_init=2)
    (fit,) = loop.fit(shards, [start], EMConfig(), shards.run(SumMoments(d)))
    assert_positive_definite(start)
    assert_positive_definite(fit.parameters)


@every_type
def test_rows_that_are_all_the_same_still_run(kind):
    X = torch.zeros(30, 2, dtype=torch.float64)
    shards = mixtures.shards(X)
    (start,) = best(X, [(2, kind)], n_init=2)
    (fit,) = loop.fit(shards, [start], EMConfig(), shards.run(SumMoments(2)))
    assert fit.log_likelihood == pytest.approx(naive.e_step(X, fit.parameters).log_likelihood)


def test_a_sample_smaller_than_k_still_runs():
    X = mixtures.normal_rows(200, 2)
    (start,) = best(X, [(8, "full")], n_init=2, n_sample=4)
    assert start.n_components == 8
    assert_positive_definite(start)


@pytest.mark.parametrize(("n_features", "n_few"), [(1, 3), (2, 4)])
def test_a_few_rows_far_away_are_a_cluster_under_full_covariances_too(n_features, n_few):
    """More rows than a covariance needs, but fewer than twice as many."""
    far = mixtures.normal_rows(n_few, n_features, seed=8) - 30
    X = torch.cat([clusters(torch.tensor([[0.0], [12.0]]).expand(2, n_features), 200)[0], far])
    labels = torch.arange(200 + n_few) % 2
    labels[200:] = 2
    (found,) = best(X - X.mean(0), [(3, "full")], n_init=4)
    known = start_of(X - X.mean(0), ones(len(X)), labels, 3, "full")
    assert bound(X - X.mean(0), found) == pytest.approx(bound(X - X.mean(0), known), abs=1e-3)


def test_features_of_any_scale_start_alike():
    """Seeds are drawn, and components split, in units of each feature's spread."""
    X, _ = clusters(torch.tensor([[0, 0], [6, 0], [0, 6]], dtype=torch.float64), 300)
    scale = torch.tensor([2.0**-20, 2.0**20], dtype=torch.float64)
    found = []
    for Z in (X, X * scale):
        shards = mixtures.shards(Z)
        total, settings = shards.run(SumMoments(2)), StartConfig(n_init=2)
        starts = find_starts(
            shards, [Candidate(3, "full")], EMConfig(reg_covar=0.0), settings, total
        )
        found.append(starts[0][0])
    one, other = found
    torch.testing.assert_close(other.means / scale, one.means, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(other.weights, one.weights, rtol=1e-3, atol=1e-3)

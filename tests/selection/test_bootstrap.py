"""Resampled rows: which clusters are there again, and which K would have won."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import mixtures
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gmm_dist.config import EMConfig, StartConfig
from gmm_dist.em.lane import Snapshot
from gmm_dist.model.mixture import log_densities, responsibilities
from gmm_dist.selection.certainty.bootstrap import Resampling, bootstrap
from gmm_dist.selection.certainty.stability import N_AFRESH, jaccard
from gmm_dist.selection.certainty.wins import wins
from gmm_dist.selection.clustering import find_clusters
from gmm_dist.selection.ranking import Candidate, SweepResult
from gmm_dist.selection.sweep import sweep
from gmm_dist.shards.local import LocalShards, one_thread
from gmm_dist.shards.protocol import Block, ShardRows
from gmm_dist.streams import Stream

pytestmark = pytest.mark.unchecked
EM, START = EMConfig(), StartConfig(n_init=2)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that has so many resamples searched afresh."""
    return lambda n: monkeypatch.setattr("gmm_dist.selection.certainty.bootstrap.N_AFRESH", n)


def two_blobs(n: int = 600) -> torch.Tensor:
    X = mixtures.normal_rows(n, 2)
    X[::3] += 8.0
    return X


def swept(X, ks, *, criterion="bic") -> tuple[LocalShards, SweepResult]:
    shards = LocalShards.of(X, n_shards=2)
    candidates = [Candidate(k, "full") for k in ks]
    return shards, sweep(shards, candidates, EM, START, n_features=2, criterion=criterion)


def resampling(shards, result, n_clusters=None, n: int = 6) -> Resampling:
    mixture, clusters = result.best.fit.parameters, None
    if n_clusters is not None:
        clusters = find_clusters(shards, mixture, n_clusters, start=START)
    return Resampling(
        mixture=mixture,
        n_resamples=n,
        config=EM,
        start=START,
        clusters=clusters,
        spikes=result.total.spikes,
        result=result,
    )


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=40))
@mixtures.FIXED
def test_jaccard_is_that_of_sets(pairs):
    both = torch.zeros(4, 3, dtype=torch.float64)
    for a, b in pairs:
        both[a, b] += 1
    similar = jaccard(both)
    for a in range(4):
        one = {i for i, pair in enumerate(pairs) if pair[0] == a}
        for b in range(3):
            two = {i for i, pair in enumerate(pairs) if pair[1] == b}
            expected = len(one & two) / len(one | two) if one | two else 0.0
            assert float(similar[a, b]) == pytest.approx(expected)


def test_clusters_apart_are_stable_and_the_number_is_found_again():
    with one_thread():
        shards, result = swept(two_blobs(), (1, 2, 3))
        found, clusters = bootstrap(shards, resampling(shards, result, "auto"))
    assert clusters.stability.is_stable == (True, True)
    for recovery, n in ((clusters.stability.from_fit, 6), (clusters.stability.afresh, N_AFRESH)):
        assert recovery.n_resamples == recovery.n_whole == recovery.n_alike == n
        assert min(recovery.similarities) > 0.98
    assert found.n_used == 6
    assert [(win.k, win.n) for win in found.wins] == [(2, 6)]


def test_a_cluster_made_of_noise_is_unstable(searches):
    """Pieces of one uniform square lie elsewhere in each resample; the blob beside it does not."""
    searches(5)
    noise = np.random.default_rng(0).uniform(size=(700, 2))
    blob = np.random.default_rng(1).normal(size=(300, 2)) * 0.1 + 4
    X = torch.from_numpy(np.concatenate([noise, blob])) - 1.5
    with one_thread():
        shards, result = swept(X, (4,))
        _, clusters = bootstrap(shards, resampling(shards, result, 4))
    stable = dict(zip(clusters.stability.similarities, clusters.stability.is_stable, strict=True))
    assert sum(stable.values()) == 1
    assert max(stable) > 0.98
    # Fits that start from the fit flatter it.
    from_fit, afresh = clusters.stability.from_fit, clusters.stability.afresh
    assert np.mean(from_fit.similarities) > np.mean(afresh.similarities)


def test_a_broken_off_resampling_goes_on_to_the_same_bits(searches):
    searches(3)
    taken: list[Snapshot] = []
    with one_thread():
        shards, result = swept(two_blobs(300), (2,))
        what = resampling(shards, result, "auto", n=3)
        expected, clusters = bootstrap(shards, what, keep=lambda i, taking: taken.append(taking()))
        found_of = [len(snapshot.state["found"]) for snapshot in taken]
        for snapshot in (taken[0], taken[found_of.index(2)], taken[-1]):
            again, same = bootstrap(shards, what, resume=snapshot)
            assert torch.equal(again.means, expected.means)
            assert torch.equal(again.log_deviations, expected.log_deviations)
            assert same == clusters


def test_a_mixture_without_clusters_or_rivals_has_errors_alone():
    with one_thread():
        shards, result = swept(two_blobs(200), (2,))
        found, clusters = bootstrap(shards, resampling(shards, result, n=2))
    assert clusters is None
    assert found.wins == ()
    assert bool((found.means > 0).all())


@pytest.mark.parametrize("criterion", ["bic", "aic", "icl"])
@pytest.mark.parametrize("compiled", [False, True])
def test_wins_are_those_of_rows_drawn_so_often(criterion, compiled):
    X = mixtures.rows(mixtures.parameters("full", 3, 2, spread=1.2), 160)
    with one_thread():
        shards, result = swept(X, (1, 2, 3, 4), criterion=criterion)
        draws = resampling(shards, result).draws(Stream.RESAMPLES, 30)
        found = wins(shards, result, draws, n_samples=160.0, compiled=compiled)
    expected: Counter[int] = Counter()
    for draw in draws:
        counts = torch.cat([draw.weights(i, 80, X.device) for i in range(2)]).long()
        rows, n = X.repeat_interleave(counts, 0), int(counts.sum())
        values = []
        for scored in result.scored:
            mixture = scored.fit.parameters
            resp = responsibilities(mixture, rows)
            entropy = -float(torch.special.xlogy(resp, resp).sum())
            value = -2 * float(log_densities(mixture, rows).sum())
            value += scored.n_parameters * (2 if criterion == "aic" else np.log(n))
            value += 2 * entropy if criterion == "icl" else 0
            if scored.fit.is_ranked:
                values.append((value, scored.candidate.k))
        expected[min(values)[1]] += 1
    assert {win.k: win.n for win in found} == expected
    assert sum(win.n for win in found) == 30
    assert [win.n for win in found] == sorted((win.n for win in found), reverse=True)


def test_a_resample_without_held_out_rows_is_won_by_nobody():
    X = two_blobs(200)
    with one_thread():
        shards, result = swept(X, (1, 2))
        result = replace(result, criterion="holdout")
        blocks = [Block(X[:1].T.contiguous())]
        held = LocalShards([ShardRows(shard=0, blocks=[], held_out=blocks)])
        draws = resampling(shards, result).draws(Stream.RESAMPLES, 50)
        n_drawn = sum(float(draw.weights(0, 1, X.device)) > 0 for draw in draws)
        found = wins(held, result, draws, n_samples=200.0)
    assert 0 < n_drawn < 50
    assert sum(win.n for win in found) == n_drawn


def test_a_number_that_was_asked_for_is_cut_in_each_resample(searches):
    searches(2)
    with one_thread():
        shards, result = swept(two_blobs(300), (3,))
        what = resampling(shards, result, 2, n=2)
        _, clusters = bootstrap(shards, what)
        assert set(clusters.stability.afresh.n_clusters) == {2}
        assert clusters.at(1).stability is None
        by_rule = replace(what.clusters, rule="a rule")
        _, clusters = bootstrap(shards, replace(what, clusters=by_rule))
    assert clusters.stability.afresh.n_resamples == 2

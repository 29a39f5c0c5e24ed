"""The search's jobs and steps: who does a job, and when, changes nothing; laggards drop out."""

from __future__ import annotations

import pickle
import random
from contextlib import nullcontext
from dataclasses import replace

import mixtures
import pytest
import torch
from test_starts import assert_same_finalists, clusters, ones, six_clusters

from gmm_dist.config import EMConfig, StartConfig
from gmm_dist.em.estep import SumMoments
from gmm_dist.em.lane import Status
from gmm_dist.selection import search as search_module
from gmm_dist.selection.coreset import Coreset
from gmm_dist.selection.kmeans import assignments, start_of
from gmm_dist.selection.ranking import Candidate
from gmm_dist.selection.samples import Rows, Sampler, Samples
from gmm_dist.selection.search import Propose, Run, Search, run
from gmm_dist.selection.starts import find_starts
from gmm_dist.shards.local import LocalShards


def rows_of(X, weight=None) -> Rows:
    weight = ones(len(X)) if weight is None else weight
    total = LocalShards.of(X, weight).run(SumMoments(X.shape[1]))
    return Rows.of(Coreset(X, weight), total)


def random_starts(X, k, n) -> list:
    """Return starts from random rows: some lead to poor optima."""
    starts = []
    for seed in range(n):
        generator = torch.Generator().manual_seed(seed)
        labels = assignments("random_from_data", X, ones(len(X)), [k], generator)[k]
        starts.append(start_of(X, ones(len(X)), labels, k, "diag"))
    return starts


class Shuffled:
    """Shards whose jobs are done in a random order, each by someone who unpickles it."""

    def __init__(self, shards: LocalShards, seed: int) -> None:
        self.n_shards, self.run = shards.n_shards, shards.run
        self._random, self._waiting = random.Random(seed), []
        self.done = 0

    def jobs(self):
        return nullcontext(self)

    def share(self, value):
        return pickle.dumps(value)

    def submit(self, job, shared, *, order):
        self._waiting.append((self.done + len(self._waiting), pickle.dumps(job), shared))
        return self._waiting[-1][0]

    def next(self):
        which = self._random.randrange(len(self._waiting))
        self._waiting[which], self._waiting[-1] = self._waiting[-1], self._waiting[which]
        number, job, shared = self._waiting.pop()
        self.done += 1
        return number, pickle.loads(pickle.dumps(pickle.loads(job)(pickle.loads(shared))))


@pytest.mark.parametrize("worth", [1, 1 << 26])
def test_the_order_in_which_jobs_are_done_changes_no_bit(monkeypatch, worth):
    """Nor that jobs, samples and results travel; with many jobs, and with few."""
    monkeypatch.setattr(search_module, "_WORTH", worth)
    X = mixtures.rows(mixtures.parameters("full", 4, 2), 600)
    shards = LocalShards.of(X - X.mean(0))
    total, start = shards.run(SumMoments(2)), StartConfig(n_init=3, n_sample=200)
    candidates = [Candidate(k, kind) for k, kind in ((4, "full"), (2, "diag"), (3, "full"))]
    expected = find_starts(shards, candidates, EMConfig(), start, total)
    for seed in range(3):
        shuffled = Shuffled(shards, seed)
        found = find_starts(shuffled, candidates, EMConfig(), start, total)
        assert_same_finalists(found, expected)
        assert shuffled.done > 20


@pytest.mark.parametrize("by_columns", [False, True])
def test_a_sample_travels_to_the_bit(by_columns):
    X, weight = mixtures.normal_rows(50, 3), mixtures.row_weights(50)
    rows = rows_of(X.T.contiguous().T if by_columns else X, weight)
    there = pickle.loads(pickle.dumps(Samples(rows, rows, rows)))
    assert there.small is there.large
    assert torch.equal(there.small.sample.X, X)
    assert torch.equal(there.small.sample.sample_weight, weight)
    assert torch.equal(there.small.total.sum_xx, rows.total.sum_xx)
    (block,) = there.small.shards._shards[0].blocks
    assert (block.X.data_ptr() == there.small.sample.X.data_ptr()) == by_columns


def test_a_sieve_keeps_the_best_lanes():
    X, _ = six_clusters()
    starts, rows = random_starts(X, 6, 8), rows_of(X)
    config = EMConfig(max_iter=20, tol=1e-4)
    everyone = run(rows, starts, config)
    left = run(rows, starts, config, sieve=((3, 4), (6, 2)))
    assert len(everyone) == 8
    assert len(left) == 2
    best = max(fit.log_likelihood for fit in everyone)
    assert max(fit.log_likelihood for fit in left) == pytest.approx(best, abs=1e-6 * len(X))
    worst = min(fit.log_likelihood for fit in everyone)
    assert worst < best - 0.2 * len(X)


def test_a_sieve_drops_what_means_nothing_however_likely():
    """A component on two rows that are almost the same is as likely as one likes."""
    X, labels = clusters(10 * torch.eye(3, dtype=torch.float64), 300)
    X[1] = X[0] + 1e-9
    sound = start_of(X, ones(300), labels, 3, "full")
    spike = replace(sound, means=sound.means.clone(), covariances=sound.covariances.clone())
    spike.means[2], spike.covariances[2] = X[0], 1e-12 * torch.eye(3, dtype=torch.float64)
    (fit,) = run(rows_of(X), [spike, sound], EMConfig(max_iter=8), sieve=((3, 1),))
    assert fit.status is not Status.DEGENERATE
    assert not bool(fit.degenerate.any())


def test_rivals_that_fall_behind_are_dropped_and_the_best_goes_on():
    X, _ = six_clusters()
    starts, rows = random_starts(X, 6, 8), rows_of(X)
    config = EMConfig(max_iter=60)
    everyone, left = run(rows, starts, config), run(rows, starts, config, rivals=True)
    assert 1 <= len(left) < 8
    best = max(fit.log_likelihood for fit in everyone)
    assert max(fit.log_likelihood for fit in left) == pytest.approx(best, abs=1e-6 * len(X))


def asked(steps, samples) -> list:
    """Return the jobs that steps ask for until they end."""
    jobs, results = [], None
    while True:
        try:
            _, some = steps.send(results)
        except StopIteration:
            return jobs
        jobs += some
        results = [job(samples) for job in some]


def test_a_round_without_a_gain_goes_on_with_the_moves_that_promise_next_most():
    X, labels = six_clusters()
    shards = LocalShards.of(X)
    start = StartConfig(n_init=2, n_sample=300, moves=5)
    sampler = Sampler(shards, start, shards.run(SumMoments(3)))
    samples = sampler.samples(6)
    search = Search(
        candidate=Candidate(6, "full"),
        samples=samples,
        seeds=sampler.seeds(6),
        config=EMConfig(),
        start=start,
    )
    best = start_of(X, ones(len(X)), labels, 6, "full")
    jobs = asked(search.finalists([], [best]), samples)
    # Nothing is better than one component on each cluster: two rounds on either sample.
    first, second = (job for job in jobs if isinstance(job, Propose))
    for sample, propose in (("small", first), ("large", second)):
        proposed = propose(samples)
        trials = [job for job in jobs if isinstance(job, Run) and not job.config.accelerate]
        tried = [start for job in trials for start in job.starts]
        known = [start for start in tried if any(same(start, other) for other in proposed)]
        assert len(proposed) > search_module._PROPOSALS
        assert len(known) == len(proposed), sample


def same(one, other) -> bool:
    return torch.equal(one.means, other.means)


def test_many_components_of_few_rows_each_are_searched_for_by_their_variances():
    """Their covariances would have fewer rows than features; all rows give those in the end."""
    k, d = 40, 30
    mixture = mixtures.parameters("full", k, d, spread=30.0)
    X = mixtures.rows(mixture, 2400)
    shards = LocalShards.of(X, n_threads=0)
    total = shards.run(SumMoments(d))
    asked_of: list[Candidate] = []
    watched = search_module.Search.seeded

    def seeded(self):
        asked_of.append(self.candidate)
        return watched(self)

    few = StartConfig(n_init=2, moves=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module.Search, "seeded", seeded)
        (starts,) = find_starts(shards, [Candidate(k, "full")], EMConfig(), few, total)
        wide = find_starts(shards, [Candidate(4, "full")], EMConfig(), few, total)
    assert asked_of == [Candidate(k, "diag"), Candidate(4, "full")]
    assert {start.covariance_type for start in starts} == {"full"}
    assert starts[0].covariances.shape == (k, d, d)
    assert wide[0][0].covariance_type == "full"


def test_a_mixture_of_the_candidates_own_type_still_joins():
    k, d = 40, 30
    mixture = mixtures.parameters("full", k, d, spread=30.0)
    shards = LocalShards.of(mixtures.rows(mixture, 1500), n_threads=0)
    total = shards.run(SumMoments(d))
    few = StartConfig(n_init=1, moves=0)
    candidate = Candidate(k, "full")
    (starts,) = find_starts(shards, [candidate], EMConfig(), few, total, warm=[mixture])
    assert any(start is mixture for start in starts)

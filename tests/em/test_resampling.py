"""Fits to resampled rows: what is drawn, and that a weight is a row drawn so often."""

from __future__ import annotations

import math
from dataclasses import replace

import mixtures
import pytest
import torch

from gmm_dist.config import EMConfig
from gmm_dist.em import loop
from gmm_dist.em.estep import SumMoments
from gmm_dist.em.resampling import Draws, ResampledFits
from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import Block, ShardRows
from gmm_dist.streams import Stream

CPU = torch.device("cpu")
EXACT = EMConfig(precision="float64", max_iter=40)


def draws(n: int, seed: int = 0) -> list[Draws]:
    return [Draws(Stream.RESAMPLES, seed, i) for i in range(n)]


def resampled(shards, start, n=3, *, config=EXACT, seed=0) -> ResampledFits:
    total = shards.run(SumMoments(start.n_features))
    return ResampledFits(
        shards=shards, start=start, config=config, draws=draws(n, seed), total=total
    )


def test_draws_are_poisson_and_apart():
    n = 200_000
    counts = torch.stack([draw.weights(7, n, CPU) for draw in draws(3)])
    for k in range(6):
        expected = math.exp(-1) / math.factorial(k)
        share = (counts == k).double().mean(1)
        assert ((share - expected).abs() < 5 * math.sqrt(expected / n)).all()
    apart = torch.corrcoef(torch.cat([counts, counts[:1].roll(1), counts[:1].roll(64)]))
    assert (apart - torch.eye(5)).abs().max() < 5 / math.sqrt(n)
    other = Draws(Stream.RESAMPLES, 1, 0).weights(7, n, CPU)
    for changed in (other, draws(1)[0].weights(8, n, CPU)):
        assert not torch.equal(changed, counts[0])


def test_draws_know_their_row_however_rows_are_cut():
    (draw,) = draws(1)
    whole = draw.weights(2, 40_000, CPU)
    assert torch.equal(draw.weights(2, 300, CPU, first=17_000), whole[17_000:17_300])
    X, weight = torch.zeros(1, 1000), torch.rand(1000, dtype=torch.float64)
    blocks = [Block(X[:, :400], weight[:400]), Block(X[:, 400:], weight[400:])]
    (one,) = draw.of(ShardRows(shard=2, blocks=[Block(X)])).blocks
    parts = draw.of(ShardRows(shard=2, blocks=blocks)).blocks
    assert torch.equal(one.weights, whole[:1000])
    assert torch.equal(torch.cat([part.weights for part in parts]), weight * whole[:1000])


@mixtures.few_types
def test_a_fit_by_weights_is_the_fit_to_rows_drawn_so_often(kind):
    mixture = mixtures.parameters("full", 3, 3)
    start = mixtures.parameters(kind, 3, 3)
    X = mixtures.rows(mixture, 900)
    shards = LocalShards.of(X, n_shards=3)
    fits = resampled(shards, start)
    found = fits.run()
    for drawn, fit in zip(draws(3), found, strict=True):
        parts = [X[300 * i : 300 * (i + 1)] for i in range(3)]
        counts = [drawn.weights(i, 300, CPU).long() for i in range(3)]
        rows = [part.repeat_interleave(n, 0) for part, n in zip(parts, counts, strict=True)]
        copies = LocalShards(
            [ShardRows(shard=i, blocks=[Block(r.T.contiguous())]) for i, r in enumerate(rows)]
        )
        total = copies.run(SumMoments(3))
        (expected,) = loop.fit(copies, [start], fits.config, total)
        assert fit.n_samples == expected.n_samples
        assert fit.n_iter == expected.n_iter
        mixtures.assert_same(fit.parameters, expected.parameters, rtol=1e-9, atol=1e-9)
        assert fit.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-9)


def test_any_threads_and_turns_and_a_resume_give_the_same_bits(monkeypatch):
    start = mixtures.parameters("full", 3, 2)
    X = mixtures.rows(start, 2000)
    config = EMConfig()
    expected = resampled(LocalShards.of(X, n_shards=5), start, config=config).run()
    threads = LocalShards.of(X, n_shards=5, n_threads=3)
    broken, snapshots = resampled(threads, start, config=config), []
    broken.run(lambda done, n: snapshots.append(broken.snapshot()))
    assert len(snapshots) > 2
    resumed = resampled(threads, start, config=config)
    resumed.restore(snapshots[1])
    monkeypatch.setattr("gmm_dist.em.resampling._MOST_NUMBERS", 1)
    in_turns = resampled(threads, start, config=config)
    for other in (resumed.run(), in_turns.run()):
        for one, two in zip(expected, other, strict=True):
            assert torch.equal(one.parameters.means, two.parameters.means)
            assert torch.equal(one.parameters.covariances, two.parameters.covariances)
            assert one.lower_bounds == two.lower_bounds


def test_tied_scatter_is_the_resamples_own():
    start = mixtures.parameters("tied", 2, 2)
    X = mixtures.rows(mixtures.parameters("full", 2, 2), 400)
    (fit,) = resampled(LocalShards.of(X), start, n=1).run()
    counts = draws(1)[0].weights(0, 400, CPU)
    p = fit.parameters
    mean = (counts @ X) / counts.sum()
    about = X - mean
    whole = (about * counts[:, None]).T @ about / counts.sum()
    between = (p.means - mean).T @ ((p.means - mean) * p.weights[:, None])
    # Of a tied fit at its optimum, all scatter is that within and that between the components.
    torch.testing.assert_close(p.covariances + between, whole, rtol=1e-4, atol=1e-4)


def test_spread_is_that_of_the_mean_of_a_gaussian():
    X = mixtures.normal_rows(400, 1)
    start = replace(
        mixtures.parameters("full", 1, 1),
        weights=torch.ones(1, dtype=torch.float64),
        means=X.mean(0, keepdim=True),
        covariances=X.var(0)[:, None, None],
    )
    fits = resampled(LocalShards.of(X), start, n=200).run()
    means = torch.stack([fit.parameters.means for fit in fits])
    assert float(means.std()) == pytest.approx(float(X.std()) / 20, rel=0.2)

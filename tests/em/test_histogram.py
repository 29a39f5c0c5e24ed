"""Counts of log-densities are exact, and their quantiles those of the sorted values."""

from __future__ import annotations

import pickle
from dataclasses import replace

import mixtures
import numpy as np
import pytest
import torch

from gmm_dist.em.evaluate import Histograms, Tally, training_quantiles
from gmm_dist.errors import UserError
from gmm_dist.model.covariance import COVARIANCE_TYPES
from gmm_dist.model.mixture import Mixture
from gmm_dist.model.quantiles import LEVELS, Quantiles
from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import HeldOut, ShardRows

X = mixtures.normal_rows(20_000, 3)
WEIGHT = mixtures.row_weights(20_000) * (torch.arange(20_000) % 7 > 0)
LANES = tuple(mixtures.parameters(kind, k, 3, seed=k) for kind in COVARIANCE_TYPES for k in (1, 4))
ASKED = (0.0, 0.001, 0.01, 0.05, 0.3, 0.5, 0.9, 1.0)


def counted(X=X, lanes=LANES, *, weight=None, edges=(7, 7, 9000)) -> Histograms:
    return mixtures.shards(X, edges, weight).run(Tally(tuple(lanes)))


def weighted_quantiles(values: torch.Tensor, weight: torch.Tensor, levels) -> list[float]:
    """Return the smallest values whose rows and those below weigh as much as each level asks."""
    order = values.argsort()
    below = weight[order].cumsum(0)
    places = torch.searchsorted(below, torch.tensor(levels, dtype=torch.float64) * below[-1])
    return values[order][places.clamp_max(len(values) - 1)].tolist()


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["unweighted", "weighted"])
def test_quantiles_are_those_of_the_sorted_log_densities(weight):
    found = counted(weight=weight).quantiles(ASKED)
    w = torch.ones(len(X), dtype=torch.float64) if weight is None else weight
    for lane, values in zip(LANES, found.tolist(), strict=True):
        per_row = Mixture(parameters=lane).score_samples(X)
        kept = per_row[w > 0]
        assert values == pytest.approx(weighted_quantiles(kept, w[w > 0], ASKED), abs=0.03)
        assert [values[0], values[-1]] == [
            pytest.approx(float(kept.min()), rel=1e-12),
            pytest.approx(float(kept.max()), rel=1e-12),
        ]


def test_the_counts_are_exact_in_every_bin():
    found = counted()
    for lane, top, counts in zip(LANES, found.tops, found.counts, strict=True):
        gaps = (top - Mixture(parameters=lane).score_samples(X)).numpy()
        edges = 16 * np.sinh(np.arange(len(counts)) / 1024)
        assert counts.tolist() == np.histogram(gaps, [*edges, np.inf])[0].tolist()
        assert counts.sum() == len(X)


def test_the_mean_is_exact():
    found = counted(weight=WEIGHT)
    expected = [
        (WEIGHT * Mixture(parameters=lane).score_samples(X)).sum() / WEIGHT.sum() for lane in LANES
    ]
    torch.testing.assert_close(found.means, torch.stack(expected), rtol=1e-12, atol=0)


def test_shares_below_undo_quantiles():
    found = counted(weight=WEIGHT)
    quantiles = found.quantiles(ASKED)
    for lane, values in enumerate(quantiles):
        shares = found.shares_below(values)[lane]
        assert shares.tolist() == pytest.approx(ASKED, abs=1e-9)
    outside = torch.tensor([-1e12, 1e3], dtype=torch.float64)
    assert found.shares_below(outside).tolist() == [[0.0, 1.0]] * len(LANES)


def test_any_sharding_counts_the_same_and_rows_of_no_weight_are_absent():
    one, many = counted(weight=WEIGHT, edges=()), counted(weight=WEIGHT, edges=(1, 30, 30, 15_000))
    torch.testing.assert_close(one.counts, many.counts, rtol=1e-12, atol=0)
    assert torch.equal(one.quantiles([0.0, 1.0]), many.quantiles([0.0, 1.0]))
    without = counted(X[WEIGHT > 0], weight=WEIGHT[WEIGHT > 0], edges=())
    torch.testing.assert_close(one.counts, without.counts, rtol=1e-12, atol=0)
    assert torch.equal(one.minima, without.minima)


def test_far_rows_and_tight_components_keep_their_places():
    tight = replace(
        mixtures.parameters("spherical", 2, 3),
        means=torch.tensor([[1e6, 0.0, 0.0], [-1e6, 0.0, 0.0]], dtype=torch.float64),
        covariances=torch.full((2,), 1e-6, dtype=torch.float64),
    )
    rows = torch.cat([tight.means[torch.arange(1000) % 2] + 1e-3 * X[:1000], X[:10]])
    found = counted(rows, [tight])
    per_row = Mixture(parameters=tight).score_samples(rows).sort().values
    assert float(per_row[0]) < -1e17  # beyond the grid: in the last bin
    assert found.counts[0, -1] == 10
    values = found.quantiles([0.0, 0.02, 0.5])[0].tolist()
    wanted = [float(per_row[i]) for i in (0, int(0.02 * 1010), 505)]
    assert values == pytest.approx(wanted, abs=0.05, rel=1e-12)


def test_no_log_density_lies_above_the_top():
    for kind in COVARIANCE_TYPES:
        lane = mixtures.parameters(kind, 3, 2, spread=0.0)
        found = counted(lane.means, [lane], edges=())
        assert found.maxima <= found.tops
        assert found.maxima == pytest.approx(found.tops.item(), rel=1e-12)


def test_without_rows_there_are_none():
    found = counted(weight=0 * WEIGHT)
    assert found.quantiles([0.0, 0.5]).isnan().all()
    assert found.shares_below(torch.zeros(1, dtype=torch.float64)).isnan().all()


def test_it_counts_held_out_rows_and_travels():
    shards = LocalShards([ShardRows(shard=0, blocks=[], held_out=mixtures.blocks(X, ()))])
    task, summary = pickle.loads(pickle.dumps((HeldOut(Tally(LANES)), counted(edges=()))))
    assert torch.equal(shards.run(task).counts, summary.counts)


def test_a_model_keeps_a_table_with_fine_tails():
    table = training_quantiles(mixtures.shards(X, (9000,)), LANES[1])
    per_row = np.sort(Mixture(parameters=LANES[1]).score_samples(X).numpy())
    assert table.levels == LEVELS == tuple(sorted(set(LEVELS)))
    assert list(table.values) == sorted(table.values)
    for level in (0.001, 0.0125, 0.05, 0.123):
        assert np.mean(per_row < table.at(level)) == pytest.approx(level, rel=0.05)


def test_between_two_levels_the_logarithm_decides():
    table = Quantiles((0.0, 1e-6, 1e-2, 1.0), (-100.0, -60.0, -20.0, 0.0))
    assert table.at(1e-2) == -20
    assert table.at(1e-4) == pytest.approx(-40)


@pytest.mark.parametrize("level", [0.0, 1e-7, 1.0, 1.5, -0.1, float("nan")])
def test_other_levels_are_refused(level):
    with pytest.raises(UserError, match=r"give a share from 1e-06 to below 1"):
        Quantiles(LEVELS, LEVELS).at(level)

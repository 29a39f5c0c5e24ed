"""Drift figures are what was done to the components, in units that the features do not set."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import FIXED, parameters, rows, shards

from gmm_dist.model.mixture import Mixture
from gmm_dist.model.parameters import Parameters
from gmm_dist.nightly.drift import (
    DensityChange,
    DensityHistogram,
    Drift,
    Numbered,
    compare_densities,
    drift,
    spread_change,
)
from gmm_dist.nightly.matching import match
from gmm_dist.runs.json_files import to_json
from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import Block, ShardRows

DENSITIES = DensityChange(
    mean_before=-1.0,
    mean_tonight=-0.5,
    held_out_before=None,
    held_out_tonight=None,
    histogram=DensityHistogram((0.0, 1.0), (1.0,), (1.0,)),
)


def tensor(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def two(
    means: list[list[float]], covariances: list[list[list[float]]], *weights: float
) -> Parameters:
    return Parameters(
        weights=tensor(weights),
        means=tensor(means),
        covariances=tensor(covariances),
        covariance_type="full",
    )


def between(before: Parameters, after: Parameters) -> Drift:
    matching = match(before, after)
    known = tuple(range(10, 10 + before.n_components))
    ids = matching.ids(known, 50)
    names = tuple(f"x{j}" for j in range(before.n_features))
    old, new = Numbered("2026-11-20", before, known), Numbered("2026-11-21", after, ids)
    return drift(old, new, matching, DENSITIES, names)


def test_a_component_that_moves_and_one_that_turns_are_told_in_its_own_deviations() -> None:
    wide, upright = [[4.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 4.0]]
    before = two([[0.0, 0.0], [40.0, 0.0]], [wide, wide], 0.75, 0.25)
    after = two([[40.0, 0.0], [1.0, 0.5]], [upright, wide], 0.5, 0.5)
    turned, moved = between(before, after).components
    assert (moved.id, turned.id) == (10, 11)
    assert moved.mean_shift == pytest.approx((0.5, 0.5))
    assert moved.mahalanobis == pytest.approx(math.sqrt(0.5))
    assert moved.volume_ratio == pytest.approx(1)
    assert moved.shape_change == pytest.approx(0, abs=1e-12)
    assert moved.weight_change == pytest.approx(-0.25)
    # From variances (4, 1) to (1, 4): ln 1/4 and ln 4, whose mean is 0.
    assert turned.volume_ratio == pytest.approx(1)
    assert turned.shape_change == pytest.approx(math.log(4))
    assert turned.mahalanobis == 0
    assert turned.weight == 0.5


def test_twice_the_spread_is_four_times_the_variance_and_the_same_shape() -> None:
    covariance = tensor([[2.0, 0.7], [0.7, 1.0]])
    assert spread_change(covariance, 4 * covariance) == pytest.approx((4.0, 0.0), abs=1e-9)


@FIXED
@given(d=st.integers(1, 6), seed=st.integers(0, 999))
def test_no_change_of_units_changes_a_figure(d: int, seed: int) -> None:
    mixture = parameters("full", 2, d, seed=seed)
    change = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    change = (change + 3 * torch.eye(d)) * 10.0 ** torch.linspace(-5, 5, d).double()[:, None]
    one, other = mixture.covariances
    moved = change @ one @ change.T, change @ other @ change.T
    assert spread_change(*moved) == pytest.approx(spread_change(one, other), rel=1e-6, abs=1e-8)
    volume, _ = spread_change(one, other)
    assert volume == pytest.approx(math.exp(float(other.logdet() - one.logdet()) / d))


def test_born_and_dead_are_told_with_the_one_they_come_from() -> None:
    unit = [[1.0, 0.0], [0.0, 1.0]]
    before = two([[0.0, 0.0], [40.0, 0.0]], [unit, unit], 0.5, 0.5)
    after = two([[-0.2, 0.0], [3.0, 0.0], [0.0, 90.0]], [unit, unit, unit], 0.4, 0.4, 0.2)
    found = between(before, after)
    assert [c.id for c in found.components] == [10]
    assert [(b.id, b.nearest, b.mean) for b in found.born] == [
        (50, 10, (3.0, 0.0)),
        (51, None, (0.0, 90.0)),
    ]
    assert [(b.id, b.nearest, b.weight) for b in found.dead] == [(11, None, 0.5)]


def test_it_is_json_of_plain_numbers() -> None:
    before, after = parameters("diag", 3, 4), parameters("spherical", 2, 4, seed=1)
    found = between(before, after)
    content = json.loads(to_json(asdict(found)))
    for component in content["components"]:
        change = component["weight"] - component["weight_before"]
        assert component["weight_change"] == pytest.approx(change, abs=1e-15)
    assert content["feature_names"] == ["x0", "x1", "x2", "x3"]
    assert len(content["components"]) + len(content["born"]) == 2
    assert len(content["components"]) + len(content["dead"]) == 3


def test_rows_under_both_models_have_the_means_and_the_histogram_of_their_densities() -> None:
    tonight = parameters("full", 3, 2, seed=1)
    before = replace(tonight, means=tonight.means + 1.5)
    X = rows(tonight, 4000)
    held = rows(tonight, 500, seed=9)
    parts = [X[:1500], X[1500:]]
    local = LocalShards(
        [
            ShardRows(
                shard=i,
                blocks=[Block(part.T.contiguous())],
                counts=None,
                held_out=[Block(held[i::2].T.contiguous())],
            )
            for i, part in enumerate(parts)
        ]
    )
    found = compare_densities(local, before, tonight)
    old, new = Mixture(parameters=before), Mixture(parameters=tonight)
    assert found.mean_before == pytest.approx(old.score(X), rel=1e-12)
    assert found.mean_tonight == pytest.approx(new.score(X), rel=1e-12)
    assert found.held_out_before == pytest.approx(old.score(held), rel=1e-12)
    assert found.held_out_tonight == pytest.approx(new.score(held), rel=1e-12)
    for model, shares in ((old, found.histogram.before), (new, found.histogram.tonight)):
        counts, _ = np.histogram(model.score_samples(X).numpy(), found.histogram.edges)
        # Bins are counted by interpolation within much finer ones.
        np.testing.assert_allclose(shares, counts / len(X), atol=5e-3)
        assert 0.97 < sum(shares) <= 1 + 1e-12


def test_without_held_out_rows_there_is_no_such_figure() -> None:
    mixture = parameters("full", 2, 2)
    found = compare_densities(shards(rows(mixture, 50)), mixture, mixture)
    assert (found.held_out_before, found.held_out_tonight) == (None, None)
    # Two lanes of one product: the same sums, in an order that the processor chooses for each.
    assert found.mean_before == pytest.approx(found.mean_tonight, rel=1e-12)

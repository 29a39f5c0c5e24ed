"""The valley between two clusters is the density's, on the way from one to the other."""

from __future__ import annotations

import math

import pytest
import torch

from gmm_dist.model.parameters import Parameters
from gmm_dist.selection.valleys import ridgeline, valley


def of(means, spreads, weights=None, covariance_type="diag") -> Parameters:
    means = torch.tensor(means, dtype=torch.float64)
    k = len(means)
    return Parameters(
        weights=torch.full((k,), 1 / k, dtype=torch.float64)
        if weights is None
        else torch.tensor(weights, dtype=torch.float64),
        means=means,
        covariances=torch.tensor(spreads, dtype=torch.float64) ** 2,
        covariance_type=covariance_type,
    )


@pytest.mark.parametrize("apart", [0.5, 1.0, 1.9, 3.0, 4.0, 6.0, 40.0])
def test_of_two_equal_gaussians_it_is_the_height_half_way(apart):
    mixture = of([[0.0], [apart]], [[1.0], [1.0]])

    def density(x: float) -> float:
        return math.exp(-0.5 * x**2) + math.exp(-0.5 * (x - apart) ** 2)

    expected = min(1.0, density(apart / 2) / density(0.0))
    if apart <= 2:  # of one mode (Ray & Lindsay 2005)
        assert valley(mixture, [0], [1]) == 1.0
    else:
        assert valley(mixture, [0], [1]) == pytest.approx(expected, rel=1e-12)


def test_it_is_that_of_clusters_and_not_of_any_two_components():
    mixture = of([[0.0], [2.5], [5.0], [7.5]], [[1.0]] * 4)
    assert valley(mixture, [0, 1], [2, 3]) > 0.8
    assert valley(mixture, [0], [3]) < 0.01
    assert valley(mixture, [0, 1], [2, 3]) == valley(mixture, [2, 3], [0, 1])


def test_a_background_is_no_cluster_of_its_own():
    mixture = of([[0.0, 0.0], [1.0, 0.0], [9.0, 0.0]], [[0.5, 0.5], [20.0, 20.0], [0.5, 0.5]])
    assert valley(mixture, [0], [1]) == 1.0
    # Nor does it bridge what lies in it.
    assert valley(mixture, [0, 1], [2]) < 0.1


@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical", "tied-diag"])
def test_the_ridgeline_is_the_textbooks(kind):
    covariances = {
        "full": [[[2.0, 0.5], [0.5, 1.0]], [[1.0, -0.3], [-0.3, 0.5]]],
        "tied": [[2.0, 0.5], [0.5, 1.0]],
        "diag": [[2.0, 1.0], [0.5, 3.0]],
        "spherical": [2.0, 0.5],
        "tied-diag": [2.0, 0.5],
    }[kind]
    mixture = Parameters(
        weights=torch.tensor([0.3, 0.7], dtype=torch.float64),
        means=torch.tensor([[0.0, 1.0], [4.0, -2.0]], dtype=torch.float64),
        covariances=torch.tensor(covariances, dtype=torch.float64),
        covariance_type=kind,
    )
    points, between = ridgeline(mixture, 0, 1), mixture.means[1] - mixture.means[0]
    first, second = (p / (between @ p @ between) for p in mixture.covariance_matrices().inverse())
    for i, point in enumerate(points):
        a = i / (len(points) - 1)
        both = (1 - a) * first + a * second
        wanted = both.inverse() @ (
            (1 - a) * first @ mixture.means[0] + a * second @ mixture.means[1]
        )
        torch.testing.assert_close(point, wanted, rtol=1e-10, atol=1e-12)


def test_a_wide_component_does_not_leap_over_the_valley():
    mixture = of([[0.0], [9.0]], [[30.0], [0.1]], weights=[0.5, 0.5])
    points = ridgeline(mixture, 0, 1)[:, 0]
    torch.testing.assert_close(points, torch.linspace(0, 9, len(points), dtype=torch.float64))


@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_components_of_one_mean_are_one(spread):
    mixture = of([[0.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [spread, spread]])
    assert valley(mixture, [0], [1]) == 1.0
    assert ridgeline(mixture, 0, 1).abs().max() == 0.0

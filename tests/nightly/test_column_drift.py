"""A change of a whole column is told from clusters that move, split, are born and die."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from mixtures import parameters, rows
from scipy.stats import norm

from gmm_dist.model.mixture import Mixture
from gmm_dist.model.parameters import Parameters
from gmm_dist.nightly.column_drift import ColumnDrift, column_drift, sample_size
from gmm_dist.nightly.gate import Gate

NAMES = ("x", "y", "z")
MAX = Gate().max_drift
Change = Callable[[torch.Tensor], torch.Tensor]


def tensor(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mapped(mixture: Parameters, scale: list[float], shift: list[float]) -> Parameters:
    """The mixture of rows x → scale x + shift, column by column."""
    s = tensor(scale)
    covariances = mixture.covariance_matrices() * s[:, None] * s
    return Parameters(
        weights=mixture.weights,
        means=mixture.means * s + tensor(shift),
        covariances=covariances,
        covariance_type="full",
    )


def measured(before: Parameters, tonight: Parameters, n: int = 2000) -> ColumnDrift:
    X = rows(tonight, n, seed=3)
    return column_drift(before, tonight, X, torch.ones(n, dtype=torch.float64), NAMES)


def clusters(*means: tuple[float, float, float], spread: float = 1.0) -> Parameters:
    k = len(means)
    covariances = torch.eye(3, dtype=torch.float64).expand(k, 3, 3) * spread**2
    return Parameters(
        weights=tensor([1 / k] * k),
        means=tensor(means),
        covariances=covariances,
        covariance_type="full",
    )


FOUR = clusters((0, 0, 5), (12, 0, 9), (0, 12, 1), (9, 9, 9))


def test_equal_nights_have_none() -> None:
    found = measured(FOUR, FOUR)
    assert found.drift < 0.01
    assert found.divergence == pytest.approx(0, abs=1e-12)
    assert (found.strangers, found.columns, found.change) == (0, (), "")


@pytest.mark.parametrize(
    ("scale", "shift", "columns"),
    [
        ([1.6, 1, 1], [0, 0, 0], ("x",)),
        ([1, 0.625, 1], [0, 0, 0], ("y",)),
        ([1, 1, 1000], [0, 0, 0], ("z",)),
        ([1, 1, 0.001], [0, 0, 0], ("z",)),
        ([1, 1.8, 1], [0, 32, 0], ("y",)),
        ([1, 1, 1], [0, 3, 0], ("y",)),
        ([-1, 1, 1], [0, 0, 0], ("x",)),
        ([1.6, 1.6, 1.6], [0, 0, 0], ("x", "y", "z")),
    ],
)
def test_a_column_in_another_unit_is_found_and_named(
    scale: list[float], shift: list[float], columns: tuple[str, ...]
) -> None:
    found = measured(FOUR, mapped(FOUR, scale, shift))
    assert found.drift > 5 * MAX
    # Undone, the night is last night's: all that there is of divergence is explained.
    assert found.drift == pytest.approx(found.divergence, abs=0.03)
    assert set(found.columns) == set(columns)
    assert all(name in found.change for name in columns) or len(columns) > 1


def test_swapped_columns_are_found_and_named() -> None:
    order = [1, 0, 2]
    base = clusters((0, 40, 5), (3, 47, 9), (1, 52, 1))
    swapped = Parameters(
        weights=base.weights,
        means=base.means[:, order],
        covariances=base.covariances,
        covariance_type="full",
    )
    found = measured(base, swapped)
    assert found.drift > 5 * MAX
    assert set(found.columns) == {"x", "y"}
    assert found.change in ("'x' and 'y' are swapped", "'y' and 'x' are swapped")


@pytest.mark.parametrize("s", [1.6, 2.5])
def test_one_cluster_in_another_unit_has_the_divergence_of_two_gaussians(s: float) -> None:
    one = clusters((0, 0, 0))
    found = measured(one, mapped(one, [s, 1, 1], [0, 0, 0]), n=20_000)
    x = np.linspace(-30, 30, 60_001)  # the integral over the one feature that differs
    p, q = norm.pdf(x), norm.pdf(x, scale=s)
    expected = np.trapezoid(q * np.log(q / (0.99 * p + 0.01 * q)), x)
    assert found.divergence == pytest.approx(expected, abs=0.03)
    assert found.drift == pytest.approx(expected, abs=0.03)
    assert MAX < expected < (s * s - 1) / 2 - math.log(s)  # Kullback-Leibler's


def test_a_constant_column_is_found() -> None:
    still = mapped(FOUR, [1, 0, 1], [0, 5, 0])
    covariances = still.covariances + 1e-9 * torch.eye(3, dtype=torch.float64)
    found = measured(FOUR, replace(still, covariances=covariances))
    assert found.drift > 5 * MAX
    assert found.strangers > 0.9


@pytest.mark.parametrize(
    "tonight",
    [
        clusters((0.8, 0, 5), (12, 0, 9), (0, 12, 1), (9, 9, 9)),  # moved
        clusters((0, 0, 5), (12, 0, 9), (0, 12, 1)),  # died
        clusters((0, 0, 5), (12, 0, 9), (0, 12, 1), (9, 9, 9), (-60, 900, -4)),  # born
        clusters((0, 0, 5), (12, 0, 9), (-2.6, 12, 1), (2.6, 12, 1), (9, 9, 9)),  # split
        replace(FOUR, weights=tensor([0.1, 0.1, 0.1, 0.7])),  # grown
        replace(FOUR, covariances=FOUR.covariances * tensor([4.0, 1, 1, 1])[:, None, None]),
    ],
    ids=["moved", "died", "born", "split", "grown", "spread"],
)
def test_what_ordinary_nights_bring_is_no_change_of_columns(tonight: Parameters) -> None:
    found = measured(FOUR, tonight)
    assert found.drift < MAX / 2
    assert found.divergence > found.drift


def test_a_birth_costs_its_share_of_the_rows_wherever_it_is() -> None:
    for place in (40.0, 4e6):
        found = measured(FOUR, clusters(*FOUR.means.tolist(), (place, 0, 0)))
        assert found.strangers == pytest.approx(0.2, abs=0.03)
        # A fifth of rows at ln 100, and four fifths whose cluster is a fifth of less.
        expected = 0.2 * math.log(100) + 0.8 * math.log(0.8)
        assert found.divergence == pytest.approx(expected, abs=0.15)


def test_where_most_rows_are_strangers_all_of_the_divergence_counts() -> None:
    found = measured(clusters((0, 0, 0), (9, 0, 0)), clusters((50, 1, 4), (0, 80, 7), (0, 0, 99)))
    assert found.strangers == 1
    assert found.drift == found.divergence == pytest.approx(math.log(100), rel=1e-3)


def test_no_units_of_the_features_change_it() -> None:
    scale, shift = [1e-4, 1e5, 3.0], [1e-3, -7e6, 0.0]
    tonight = mapped(FOUR, [1, 1.3, 1], [0, 0, 0])
    one, weights = rows(tonight, 1000, seed=1), torch.ones(1000, dtype=torch.float64)
    other = one * tensor(scale) + tensor(shift)
    found = column_drift(FOUR, tonight, one, weights, NAMES)
    again = column_drift(
        mapped(FOUR, scale, shift), mapped(tonight, scale, shift), other, weights, NAMES
    )
    assert again.drift == pytest.approx(found.drift, rel=1e-3)
    assert again.divergence == pytest.approx(found.divergence, rel=1e-6)


def test_a_row_counts_as_often_as_it_weighs() -> None:
    tonight = mapped(FOUR, [1.2, 1, 1], [0, 0, 0])
    X = rows(tonight, 300, seed=1)
    weights = torch.randint(0, 4, (300,), generator=torch.Generator().manual_seed(0))
    found = column_drift(FOUR, tonight, X, weights.double(), NAMES)
    repeated = X.repeat_interleave(weights, dim=0)
    ones = torch.ones(len(repeated), dtype=torch.float64)
    again = column_drift(FOUR, tonight, repeated, ones, NAMES)
    assert found.divergence == pytest.approx(again.divergence, rel=1e-9)


def test_families_may_differ_and_one_feature_is_enough() -> None:
    one = parameters("spherical", 2, 1, spread=9)
    tonight = parameters("diag", 3, 1, seed=4, spread=9)
    X = 9 * torch.randn(500, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = column_drift(one, tonight, X, torch.ones(500, dtype=torch.float64), ("x",))
    ratio = Mixture(parameters=tonight).score_samples(X) - torch.logaddexp(
        Mixture(parameters=one).score_samples(X) + math.log(0.99),
        Mixture(parameters=tonight).score_samples(X) + math.log(0.01),
    )
    assert found.divergence == pytest.approx(float(ratio.mean()), rel=1e-9)


def test_wide_mixtures_are_measured_on_fewer_rows() -> None:
    assert sample_size(parameters("full", 3, 2)) == 4096
    assert sample_size(parameters("diag", 8, 384)) == 4096
    d = 1000
    means, eye = torch.zeros(2, d, dtype=torch.float64), torch.eye(d, dtype=torch.float64)
    wide = Parameters(
        weights=tensor([0.5, 0.5]),
        means=means,
        covariances=eye.expand(2, d, d),
        covariance_type="full",
    )
    assert sample_size(wide) == 2**30 // (2 * d * d)

"""Values that many rows share are named, and what can be ranked beside them is."""

from __future__ import annotations

import mixtures
import numpy as np
import pytest
import torch

from gmm_dist import UserError, select
from gmm_dist.selection.spikes import profile, profile_of

RNG = np.random.default_rng(1)
NOISE = RNG.normal(size=(1000, 2))
REG = torch.zeros(2, dtype=torch.float64)


def with_column(values) -> torch.Tensor:
    return torch.tensor(np.c_[values, NOISE[:, 1]])


def test_a_zero_inflated_column_is_named_and_ranked():
    amount = np.where(RNG.random(1000) < 0.5, 0.0, RNG.lognormal(3, 1, 1000))
    found = select(np.c_[amount, NOISE[:, 1]], [1, 2, 3], "full", n_init=4)
    (note,) = [line for line in found.warnings() if "x0" in line]
    assert f"{(amount == 0).mean():.0%} are exactly 0" in note
    assert "where" in note
    assert "reg_covar" in note
    assert found.rows()[0]["k"] > 1
    assert all(row["status"] != "degenerate" for row in found.rows())


def test_a_spike_at_the_mean_may_be_what_was_filled_in():
    """Which no filter tells, for it is asked of the values as they are stored."""
    amount = RNG.lognormal(3, 1, 1000)
    amount[::3] = np.delete(amount, np.s_[::3]).mean()
    found = select(np.c_[amount, NOISE[:, 1]], [1, 2], "diag", n_init=2)
    (note,) = [line for line in found.warnings() if "x0" in line]
    assert "the column's mean: where" in note
    assert "drop" in note
    assert "filter such" not in note


def test_of_a_column_that_is_all_spikes_no_rows_would_be_left():
    found = select(np.c_[RNG.random(1000) < 0.4, NOISE[:, 1]], [1, 2], "diag", n_init=2)
    (note,) = [line for line in found.warnings() if "x0" in line]
    assert "from that; raise reg_covar, or leave the column out" in note


def test_both_bounds_of_a_capped_column_are_spikes():
    found = profile_of(with_column(np.clip(NOISE[:, 0], -1, 1.5)), REG)
    assert sorted(spike.value for spike in found.spikes) == [-1, 1.5]
    shares = {spike.value: spike.share for spike in found.spikes}
    assert shares[-1] == pytest.approx((NOISE[:, 0] < -1).mean())
    assert all(spike.feature == 0 for spike in found.spikes)


@pytest.mark.parametrize("values", [NOISE[:, 0], np.round(NOISE[:, 0], 2), np.full(1000, 3.0)])
def test_no_column_is_accused_of_a_few_equal_values(values):
    assert profile_of(with_column(values), REG).spikes == ()


def test_a_rounded_column_is_one_of_few_values():
    (found,) = profile_of(with_column(np.round(NOISE[:, 0] * 2)), REG).rounded
    assert found.feature == 0
    assert found.n_values == len(np.unique(np.round(NOISE[:, 0] * 2)))
    assert found.value == 0


def test_values_far_out_drown_the_others():
    values = NOISE[:, 0].copy()
    values[::100] = -999999.0
    X = with_column(values)
    reg = 1e-6 * X.var(0)
    (found,) = profile_of(X, reg).dwarfed
    assert (found.feature, found.farthest) == (0, -999999.0)


def test_a_sample_of_many_shards_finds_the_same_value():
    X = with_column(np.where(RNG.random(1000) < 0.3, 7.0, NOISE[:, 0]))
    (spike,) = profile(mixtures.shards(X, [10, 10, 500]), 2, REG).spikes
    assert (spike.feature, spike.value) == (0, 7.0)


@pytest.mark.parametrize(("factor", "what"), [(1e160, "divide"), (1e-160, "multiply")])
def test_numbers_whose_squares_are_none_are_named(factor, what):
    with pytest.raises(UserError, match=rf"column 'x0' .* {what} it"):
        select(NOISE * [factor, 1], [1, 2], "full", n_init=2)


def test_whole_numbers_beyond_float64_are_told_from_constants():
    ids = 2**60 + np.arange(100) % 50
    found = select(np.c_[ids, NOISE[:100, 0]], [1, 2], "diag", n_init=2)
    (note,) = [line for line in found.warnings() if "x0" in line]
    assert "steps of 256" in note

"""Components are matched by their overlap, whatever the units and the order."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import FIXED, parameters
from torch import Tensor

from gmm_dist.model.covariance import COVARIANCE_TYPES
from gmm_dist.model.parameters import Parameters
from gmm_dist.nightly.matching import MIN_OVERLAP, match, overlaps

MIXTURES = {
    "covariance_type": st.sampled_from(COVARIANCE_TYPES),
    "k": st.integers(1, 6),
    "d": st.integers(1, 5),
    "seed": st.integers(0, 999),
}


def mixture(means: list[list[float]], variances: list[list[float]]) -> Parameters:
    k = len(means)
    return Parameters(
        weights=torch.full((k,), 1 / k, dtype=torch.float64),
        means=torch.tensor(means, dtype=torch.float64),
        covariances=torch.tensor(variances, dtype=torch.float64),
        covariance_type="diag",
    )


def permuted(p: Parameters, order: Tensor) -> Parameters:
    covariances = p.covariances if p.type.is_shared else p.covariances[order]
    return replace(p, weights=p.weights[order], means=p.means[order], covariances=covariances)


def jittered(p: Parameters, seed: int, size: float) -> Parameters:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(p.means.shape, dtype=torch.float64, generator=generator)
    return replace(p, means=p.means + size * noise)


# -------------------------------------------------------------------------------- the overlap


def test_in_one_dimension_it_is_the_integral_of_the_root_of_the_product() -> None:
    one, other = mixture([[0.3]], [[0.5]]), mixture([[1.4], [-2.0]], [[2.0], [0.1]])
    x = torch.linspace(-40, 40, 400_001, dtype=torch.float64)

    def density(mean: float, variance: float) -> Tensor:
        return (-((x - mean) ** 2) / 2 / variance).exp() / math.sqrt(2 * math.pi * variance)

    for j, (mean, variance) in enumerate([(1.4, 2.0), (-2.0, 0.1)]):
        product = (density(0.3, 0.5) * density(mean, variance)).sqrt()
        expected = float(torch.trapezoid(product, x))
        assert float(overlaps(one, other)[0, j]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("shift", "together"), [(3.5, True), (3.7, False)])
def test_the_threshold_is_a_shift_of_three_and_a_half_deviations(
    shift: float, together: bool
) -> None:
    found = match(mixture([[0.0, 0.0]], [[4.0, 1.0]]), mixture([[2 * shift, 0.0]], [[4.0, 1.0]]))
    assert bool(found.pairs) is together
    assert found.born == found.dead == (() if together else (0,))


def test_many_features_that_vary_a_little_more_are_the_same_cluster() -> None:
    wide = mixture([[0.0] * 64], [[2.0] * 64])
    assert float(overlaps(mixture([[0.0] * 64], [[1.0] * 64]), wide)) > 0.9


@FIXED
@given(**MIXTURES, other=st.sampled_from(COVARIANCE_TYPES))
def test_families_may_differ_and_all_agree_with_full(
    covariance_type: str, k: int, d: int, seed: int, other: str
) -> None:
    one, two = parameters(covariance_type, k, d, seed=seed), parameters(other, 3, d, seed=seed + 1)
    as_full = [
        replace(p, covariances=p.covariance_matrices().clone(), covariance_type="full")
        for p in (one, two)
    ]
    found = overlaps(one, two)
    torch.testing.assert_close(found, overlaps(*as_full), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found, overlaps(two, one).T, rtol=1e-9, atol=1e-12)
    assert bool(((found >= 0) & (found <= 1 + 1e-12)).all())
    torch.testing.assert_close(overlaps(one, one).diagonal(), torch.ones(k).double())


@FIXED
@given(k=MIXTURES["k"], d=MIXTURES["d"], seed=MIXTURES["seed"])
def test_no_change_of_units_changes_it(k: int, d: int, seed: int) -> None:
    one, two = parameters("full", k, d, seed=seed), parameters("full", 3, d, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, dtype=torch.float64, generator=generator) + 3 * torch.eye(d)
    change = mixing * 10.0 ** torch.linspace(-6, 6, d, dtype=torch.float64)[:, None]
    moved = [
        replace(p, means=p.means @ change.T + 5, covariances=change @ p.covariances @ change.T)
        for p in (one, two)
    ]
    torch.testing.assert_close(overlaps(*moved), overlaps(one, two), rtol=1e-6, atol=1e-9)


# -------------------------------------------------------------------------------- who is who


def brute_force(before: Parameters, after: Parameters) -> float:
    """The largest sum of overlaps beyond the threshold, over all ways to pair."""
    gain = (overlaps(before, after) - MIN_OVERLAP).clamp_min(0)
    if gain.shape[0] > gain.shape[1]:
        gain = gain.T
    ways = itertools.permutations(range(gain.shape[1]), gain.shape[0])
    return max(sum(float(gain[i, j]) for i, j in enumerate(way)) for way in ways)


@FIXED
@given(**MIXTURES, m=st.integers(1, 6), size=st.floats(0, 3))
def test_it_is_the_best_of_all_ways_to_pair(
    covariance_type: str, k: int, d: int, seed: int, m: int, size: float
) -> None:
    before = parameters(covariance_type, max(k, m), d, seed=seed)
    after = jittered(permuted(before, torch.arange(m)), seed, size)
    found = match(before, after)
    overlap = overlaps(before, after)
    assert all(float(overlap[i, j]) >= MIN_OVERLAP for i, j in found.pairs)
    assert sorted([i for i, _ in found.pairs] + list(found.dead)) == list(range(max(k, m)))
    assert sorted([j for _, j in found.pairs] + list(found.born)) == list(range(m))
    gained = sum(float(overlap[i, j]) - MIN_OVERLAP for i, j in found.pairs)
    assert gained == pytest.approx(brute_force(before, after), abs=1e-9)


@FIXED
@given(**MIXTURES, size=st.floats(0, 2))
def test_the_order_of_components_does_not_matter(
    covariance_type: str, k: int, d: int, seed: int, size: float
) -> None:
    before = parameters(covariance_type, k, d, seed=seed)
    after = jittered(before, seed + 1, size)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(k, generator=generator)
    ids = match(before, after).ids(range(100, 100 + k), 1000)
    mixed = match(before, permuted(after, order)).ids(range(100, 100 + k), 1000)
    # Newborns are numbered in order of place, so they may swap numbers among themselves.
    known = [min(ids[i], 1000) for i in order.tolist()]
    assert [min(i, 1000) for i in mixed] == known


@FIXED
@given(seeds=st.lists(st.integers(0, 99), min_size=2, max_size=8), k=st.lists(st.integers(1, 5)))
def test_ids_are_never_reused(seeds: list[int], k: list[int]) -> None:
    """Over many nights of any mixtures: an id that is gone does not come back, none is twice."""
    sizes = itertools.cycle(k or [3])
    before = parameters("full", next(sizes), 2, seed=seeds[0])
    ids, next_id = tuple(range(before.n_components)), before.n_components
    gone: set[int] = set()
    for seed in seeds[1:]:
        after = parameters("full", next(sizes), 2, seed=seed)
        found = match(before, after)
        new = found.ids(ids, next_id)
        assert len(set(new)) == after.n_components
        assert not gone & set(new)
        assert set(ids) - set(new) == {ids[i] for i in found.dead}
        assert set(new) - set(ids) == set(range(next_id, next_id + len(found.born)))
        gone |= set(ids) - set(new)
        before, ids, next_id = after, new, next_id + len(found.born)


def test_a_component_that_splits_keeps_its_number_once() -> None:
    before = mixture([[0.0, 0.0], [50.0, 0.0]], [[9.0, 1.0], [1.0, 1.0]])
    after = mixture([[50.0, 0.1], [-2.5, 0.0], [2.6, 0.0]], [[1.0, 1.0], [2.0, 1.0], [2.0, 1.0]])
    assert match(before, after).ids([7, 4], 9) == (4, 7, 9)
    assert match(after, before).ids([4, 7, 9], 10) == (7, 4)
    assert match(after, before).dead == (2,)


def test_a_pair_below_the_threshold_does_not_count_towards_the_sum() -> None:
    """Overlaps of 0.6 and 0, or of 0.18 and 0.55: the first, though 0.73 is more than 0.6."""
    before, after = mixture([[0.0], [4.21]], [[1.0]] * 2), mixture([[2.02], [-3.7]], [[1.0]] * 2)
    found = match(before, after)
    assert (found.pairs, found.born, found.dead) == (((0, 0),), (1,), (1,))

"""Passes that try again the pairs of earlier ones have the bits of passes that do not."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import mixtures
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gmm_dist import compiling
from gmm_dist.em.estep import EStep
from gmm_dist.em.forms import kept_pairs, pruned_form
from gmm_dist.em.forms.certificate import DEPTHS, Centred, reached
from gmm_dist.em.lane_batch import LaneBatch, Precision
from gmm_dist.model.covariance import COVARIANCE_TYPES
from gmm_dist.model.densities import Densities
from gmm_dist.model.natural import natural
from gmm_dist.model.parameters import Parameters, ParameterStack

pytestmark = pytest.mark.skipif(not compiling.can_compile(), reason="needs Numba")
D = 8  # with fewer features, what is kept would take more than a part of the rows' memory
every_type = pytest.mark.parametrize("kind", COVARIANCE_TYPES)


def task_of(lanes: list[Parameters]) -> EStep:
    theta = natural(ParameterStack.of(lanes)).theta
    thetas = theta.split([one.n_components for one in lanes])
    batch = LaneBatch.of(lanes, thetas, Precision.CENTRED, compiled=True)
    return EStep((batch,), lanes[0].n_features)


def moved(mixture: Parameters, by: float, generator: torch.Generator, *, of: float = 1.0):
    """Return a mixture of which a part of the components has moved, by so many spreads."""

    def normal(*shape: int):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    which = (torch.rand(mixture.n_components, generator=generator) < of).double()
    means = mixture.means + by * which[:, None] * normal(*mixture.means.shape)
    scale = torch.exp(by * which * normal(mixture.n_components))
    cell = [1] * (mixture.covariances.ndim - 1)
    of_each = scale.mean() if mixture.covariance_type.startswith("tied") else scale.view(-1, *cell)
    covariances = mixture.covariances * of_each
    weights = mixture.weights * torch.exp(by * normal(mixture.n_components))
    return Parameters(
        covariance_type=mixture.covariance_type,
        weights=weights / weights.sum(),
        means=means,
        covariances=covariances,
    )


def the_same(one, other) -> bool:
    return all(torch.equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))


@pytest.fixture
def screened(monkeypatch) -> list[int]:
    """For each product, of how many rows with how many components it was."""
    seen: list[int] = []
    products = pruned_form.PrunedForm._products

    def counted(self, columns, components):
        seen.append(columns.shape[1] * len(components))
        return products(self, columns, components)

    monkeypatch.setattr(pruned_form.PrunedForm, "_products", counted)
    return seen


@every_type
@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_kept_changes_no_bit(kind, weighted, screened):
    """While parameters move by little, by much, in part, and back; and rows lie anywhere."""
    generator = torch.Generator().manual_seed(0)
    lanes = [
        mixtures.parameters(kind, 24, D, seed=0, spread=40.0),
        mixtures.parameters(kind, 7, D, seed=1, spread=40.0),
    ]
    X = mixtures.rows(mixtures.parameters("full", 24, D, seed=0, spread=40.0), 7000)
    X[5], X[17], X[2500] = 1e7, -3e15, X[2500] * 30
    weight = mixtures.row_weights(7000) if weighted else None
    edges = [1, 3000, 3001]
    shards = mixtures.shards(X, edges, weight)
    steps = [0.0, 1e-4, 1e-3, (0.5, 0.1), 1e-3, 0.1, 1.0, 0.0, 1e-2, (3.0, 0.05), 1e-5]
    before = lanes
    for step in steps:
        by, of = step if isinstance(step, tuple) else (step, 1.0)
        lanes = [moved(lane, by, generator, of=of) for lane in lanes]
        (found,) = shards.run(task_of(lanes)).groups
        (expected,) = mixtures.shards(X, edges, weight).run(task_of(lanes)).groups
        assert the_same(found, expected), step
    # Lanes of other sizes, and the first ones again.
    for some in (lanes[:1], before, lanes):
        (found,) = shards.run(task_of(some)).groups
        (expected,) = mixtures.shards(X, edges, weight).run(task_of(some)).groups
        assert the_same(found, expected)
    whole = 7000 * 31
    passes = 2 * (len(steps) + 2) + 2 * 24 / 31
    assert sum(screened) < 0.95 * passes * whole  # something was not screened


def test_pairs_are_tried_again_without_a_product(screened):
    mixture = mixtures.parameters("full", 24, D, seed=0, spread=40.0)
    shards = mixtures.shards(mixtures.rows(mixture, 5000))
    shards.run(task_of([mixture]))
    assert sum(screened) == 5000 * 24
    screened.clear()
    shards.run(task_of([mixture]))
    generator = torch.Generator().manual_seed(0)
    shards.run(task_of([moved(mixture, 1e-4, generator)]))
    assert sum(screened) < 0.02 * 5000 * 24


def test_components_that_move_alone_are_screened_alone(screened):
    mixture = mixtures.parameters("full", 24, D, seed=0, spread=40.0)
    shards = mixtures.shards(mixtures.rows(mixture, 5000))
    shards.run(task_of([mixture]))
    screened.clear()
    mixture.means[3] += 1.0
    for _ in range(3):
        shards.run(task_of([mixture]))
    # Once: what was found of it is known then. The rows that it has left or come to are screened.
    assert 5000 <= sum(screened) < 5000 * 6


def test_where_components_overlap_nothing_is_kept(screened):
    mixture = mixtures.parameters("full", 8, D, seed=0, spread=6.0)
    X = mixtures.rows(mixture, 4000)
    shards = mixtures.shards(X)
    for _ in range(4):
        shards.run(task_of([mixture]))
    (rows,) = shards._shards
    kept = rows.kept["full"]
    if isinstance(kept, kept_pairs.KeptPairs):
        n_pairs = sum(len(piece.rows) for piece in kept.pieces)
        assert n_pairs <= 4000 * 8
    else:
        assert sum(screened) == 4 * 4000 * 8


def test_what_is_kept_takes_a_part_of_the_rows_memory(monkeypatch):
    mixture = mixtures.parameters("full", 24, D, seed=0, spread=40.0)
    X = mixtures.rows(mixture, 5000)
    shards = mixtures.shards(X)
    monkeypatch.setattr(kept_pairs, "_MOST_BYTES", 1e-3)
    (first,) = shards.run(task_of([mixture])).groups
    (rows,) = shards._shards
    assert rows.kept["full"] == kept_pairs._REST
    (second,) = shards.run(task_of([mixture])).groups
    assert rows.kept["full"] == kept_pairs._REST - 1
    assert the_same(first, second)


@settings(deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.0, 1e-3, 0.03, 0.3, 2.0]),
    st.sampled_from(["full", "diag"]),
)
def test_no_component_comes_nearer_than_its_bound(seed, by, kind):
    generator = torch.Generator().manual_seed(seed)
    before = mixtures.parameters(kind, 4, 3, seed=seed % 97, spread=10.0)
    now = moved(before, by, generator)
    was, has_come_to = centred(before), centred(now)
    peaks = torch.full((4,), float(was.peaks.max()), dtype=torch.float64)
    bounds = reached(was, has_come_to, peaks)
    X = 30 * torch.randn(3, 400, dtype=torch.float64, generator=generator)
    cpu = torch.device("cpu")
    old, new = (Densities.of(mixture, cpu)(X) for mixture in (before, now))
    for k in range(4):
        # The deepest of the depths that a row's logit was below.
        depth = torch.searchsorted(DEPTHS, peaks[k] - old[k], right=True) - 1
        known = depth >= 0
        most = bounds[k][depth[known]]
        assert bool((new[k][known] <= most + 1e-9 * most.abs()).all())
    if by == 0.0:  # nothing has moved: nothing has come nearer than it was
        highest = (peaks[:, None] - DEPTHS).clamp_max(was.peaks[:, None])
        torch.testing.assert_close(bounds, highest, rtol=1e-5, atol=1e-6)


def centred(mixture: Parameters) -> Centred:
    of = Densities.of(mixture, torch.device("cpu"))
    return Centred(of.means, of.factors.mT if of.factors.ndim == 3 else of.factors, of.peaks)


def test_a_component_that_moves_to_rows_far_along_its_axis_has_them():
    """Of them its logits, as screened, were off by more than of rows near it."""
    generator = torch.Generator().manual_seed(0)
    d, long, n, n_far = 8, 300.0, 60_000, 540
    axis = torch.tensor([1, 0.83, 1.21, 0.77, 1.1, 0.93, 1.07, 0.71], dtype=torch.float64)
    axis /= axis.norm()
    eye = torch.eye(d, dtype=torch.float64)
    narrow = 0.7 * eye + long**2 * axis[:, None] * axis
    start = Parameters(
        covariance_type="full",
        weights=torch.tensor([0.5, 0.5], dtype=torch.float64),
        means=torch.zeros(2, d, dtype=torch.float64),
        covariances=torch.stack([narrow, (1.12 * long) ** 2 * eye]),
    )
    along = long * torch.randn(n, dtype=torch.float64, generator=generator)
    far = torch.rand(n_far, dtype=torch.float64, generator=generator)
    along[:n_far] = long * (29 + 10 * far)
    noise = torch.randn(n, d, dtype=torch.float64, generator=generator)
    X = 0.8 * noise + along[:, None] * axis
    for by in (0.4, 0.6, 0.8, 1.2):
        shards = mixtures.shards(X)
        shards.run(task_of([start]))
        means = torch.stack([by * long * axis, start.means[1]])
        now = task_of([replace(start, means=means)])
        (found,), (expected,) = shards.run(now).groups, mixtures.shards(X).run(now).groups
        assert the_same(found, expected), by


def test_what_is_kept_does_not_outgrow_its_part_by_and_by():
    start = mixtures.parameters("full", 64, D, seed=0, spread=40.0)
    X = mixtures.rows(start, 20_000).float()
    shards = mixtures.shards(X)
    shards.run(task_of([start]))
    (rows,) = shards._shards
    covariances = start.covariances.clone()
    for i in range(4):  # they grow until all overlap
        covariances[i::4] *= 60.0
        shards.run(task_of([replace(start, covariances=covariances.clone())]))
        kept = rows.kept["full"]
        if isinstance(kept, kept_pairs.KeptPairs):
            assert kept.n_bytes <= X.nbytes / 6


def test_depths_are_in_one_ratio():
    ratios = DEPTHS[1:] / DEPTHS[:-1]
    assert float(ratios.max() - ratios.min()) < 1e-12
    assert math.isclose(float(DEPTHS[0]), 20.0)
    assert len(DEPTHS) < np.iinfo(np.int16).max

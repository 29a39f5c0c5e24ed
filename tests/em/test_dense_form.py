"""The dense form: all rows with all components, in compiled loops."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import mixtures
import naive
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gmm_dist import compiling
from gmm_dist.config import ABSOLUTE, EMConfig
from gmm_dist.em import lane, loop
from gmm_dist.em.estep import EStep, SumMoments
from gmm_dist.em.forms import compiled, dense_form, dense_loops
from gmm_dist.em.lane_batch import LaneBatch, Precision, cut
from gmm_dist.em.precision import most_survivors
from gmm_dist.model.covariance import COVARIANCE_TYPES, TYPE_OF
from gmm_dist.model.natural import natural
from gmm_dist.model.parameters import Parameters, ParameterStack

pytestmark = pytest.mark.skipif(not compiling.can_compile(), reason="needs Numba")
every_type = pytest.mark.parametrize("kind", COVARIANCE_TYPES)


def one_pass(X, lanes: list[Parameters], sample_weight=None, *, edges=(), all_pairs=True):
    """Return the sums of a centred pass in compiled loops."""
    theta = natural(ParameterStack.of(lanes)).theta
    thetas = theta.split([one.n_components for one in lanes])
    batch = LaneBatch.of(lanes, thetas, Precision.CENTRED, compiled=True, all_pairs=all_pairs)
    whole = mixtures.shards(X, edges, sample_weight).run(EStep((batch,), X.shape[1]))
    return whole.groups[0]


def logits(X, mixture: Parameters) -> torch.Tensor:
    return torch.from_numpy(naive.weighted_log_prob(X, mixture))


@every_type
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, 2, 5, 9])
def test_a_pass_sums_what_its_definition_says(kind, weighted, dtype, d):
    n = 300
    lanes = [mixtures.parameters(kind, k, d, seed=k) for k in (4, 1, 3)]
    X = (3 * torch.randn(n, d, generator=torch.Generator().manual_seed(d))).to(dtype)
    weight = mixtures.row_weights(n) if weighted else torch.ones(n, dtype=torch.float64)
    found = one_pass(X, lanes, weight if weighted else None, edges=[1, 128, 257])
    layout, first = TYPE_OF[TYPE_OF[kind].alone], 0
    for i, mixture in enumerate(lanes):
        log_p = logits(X, mixture)
        total = log_p.logsumexp(1)
        resp = (log_p - total[:, None]).exp()
        share = weight[:, None] * resp
        part = slice(first, first := first + mixture.n_components)
        z = X.double()[:, None] - mixture.means
        spread = torch.einsum("nk,nki,nkj->kij", share, z, z)
        second = layout.second(spread if layout.has_products else spread.diagonal(0, 1, 2))
        expected = layout.sums(share.sum(0), torch.einsum("nk,nki->ki", share, z), second)
        torch.testing.assert_close(found.moments[:, part], expected, rtol=1e-10, atol=1e-9)
        torch.testing.assert_close(found.log_likelihood[i], weight @ total, rtol=1e-12, atol=0)
        entropy = -(share * resp.clamp_min(1e-300).log()).sum()
        torch.testing.assert_close(found.entropy[i], entropy, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            found.squares[part], (share * weight[:, None]).sum(0), rtol=1e-10, atol=1e-12
        )
        near = (log_p >= log_p.amax(1, keepdim=True) - cut(mixture.n_components)).sum(1)
        torch.testing.assert_close(found.survivors[i], weight @ near.double(), rtol=1e-12, atol=0)


@every_type
@pytest.mark.parametrize("far", [1e7, 1e15, 1e150])
def test_far_rows_count_as_they_do_where_pairs_are_screened(kind, far):
    """They have few digits left, or are as far from one component as from another."""
    lanes = [mixtures.parameters(kind, 3, 4), mixtures.parameters(kind, 2, 4, seed=1)]
    X = mixtures.normal_rows(200, 4).double()
    X[[3, 130]] = far
    weight = mixtures.row_weights(200)
    weight[130] = 0.0
    found, other = (one_pass(X, lanes, weight, all_pairs=dense) for dense in (True, False))
    for field in fields(found):
        one, another = getattr(found, field.name), getattr(other, field.name)
        torch.testing.assert_close(one, another, rtol=1e-11, atol=1e-10)
    assert found.squares.sum() <= 2 * weight.square().sum() * (1 + 1e-12)


@every_type
@pytest.mark.parametrize("where", [math.inf, math.nan, 1e300])
def test_rows_of_no_weight_have_no_say_wherever_they_are(kind, where):
    lanes = [mixtures.parameters(kind, 3, 4), mixtures.parameters(kind, 2, 4, seed=1)]
    X, weight = mixtures.normal_rows(200, 4), mixtures.row_weights(200)
    weight[[3, 130]] = 0.0
    expected = one_pass(X, lanes, weight)
    X[[3, 130]] = where
    found = one_pass(X, lanes, weight)
    for field in fields(found):
        assert torch.equal(getattr(found, field.name), getattr(expected, field.name))


@pytest.mark.parametrize("kind", ["full", "diag"])
def test_the_loops_are_what_they_are_in_python(kind, monkeypatch):
    X, lanes = mixtures.normal_rows(150, 6), [mixtures.parameters(kind, 3, 6)]
    expected = one_pass(X, lanes)

    def in_python(has_products: bool) -> compiled.DenseLoops:
        return compiled.plain(compiled.DenseLoops, has_products)

    monkeypatch.setattr(dense_form, "dense_loops_for", in_python)
    found = one_pass(X, lanes)
    torch.testing.assert_close(found.moments, expected.moments, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood, rtol=1e-13, atol=0)


def shares_of(logits: np.ndarray, lowest: float = -1e12) -> np.ndarray:
    """Return the responsibilities (K, n) that loops give logits (K, n) of one lane."""
    k, n = logits.shape
    filled = np.zeros((2, k, -(-n // dense_loops.STRETCH) * dense_loops.STRETCH))
    filled[0, :, :n] = logits
    loops = compiled.dense_loops_for(True)
    cuts, weight, far = np.array([cut(k)]), np.ones(n), np.zeros(n, dtype=np.bool_)
    sums = np.zeros((2, k)), np.zeros((3, 1))
    loops.all_shares(np.array([0, k]), cuts, lowest, *filled, weight, far, *sums)
    return filled[1, :, :n]


@given(st.lists(st.floats(0, 60), min_size=1, max_size=130), st.floats(-1e6, 1e6))
@settings(max_examples=200, deadline=None)
def test_shares_are_exact_to_the_last_digits(below, top):
    """Responsibilities to a few units of the last place; none below the cut."""
    logits = np.array([np.full(len(below), top), top - np.array(below)])
    gap = logits[1] - logits[0]
    expected = np.where(gap >= -cut(2), np.exp(gap), 0.0)
    found = shares_of(logits)
    np.testing.assert_allclose(found[1], expected / (1 + expected), rtol=2e-15, atol=0)
    np.testing.assert_allclose(found[0], 1 / (1 + expected), rtol=1e-15, atol=0)


def test_a_pass_has_the_same_bits_wherever_its_arrays_lie():
    X, lanes = mixtures.normal_rows(3000, 7), [mixtures.parameters("full", 5, 7)]
    first, kept = one_pass(X, lanes), []
    for i in range(20):
        kept.append(np.empty(1000 + 8 * i))  # so that the next arrays lie elsewhere
        again = one_pass(X.clone(), [replace(lanes[0], means=lanes[0].means.clone())])
        assert all(
            torch.equal(getattr(first, f.name), getattr(again, f.name)) for f in fields(first)
        )


# ---- which lanes take it ----------------------------------------------------------------------


def passes_of(X, start: Parameters, **rules) -> list[tuple[Precision, bool]]:
    """Return of each pass of a fit its form, and whether it takes all pairs."""
    shards = mixtures.shards(X, [len(X) // 2])
    config = EMConfig(reg_covar=1e-6, reg_unit=ABSOLUTE, compile_from=0, **rules)
    total = shards.run(SumMoments(X.shape[1]))
    running = lane.Lane.start(start, config, total)
    forms = [(running.precision, running.policy.all_pairs)]

    def watch(lanes):
        forms.append((lanes[0].precision, lanes[0].policy.all_pairs))

    loop.run(shards, [running], config, total, watch=watch)
    return forms[:-1]


@pytest.mark.parametrize("precision", ["auto", "float64"])
def test_lanes_of_few_features_take_it_from_the_first_pass_to_the_last(precision):
    mixture = mixtures.parameters("full", 3, 2, spread=2.0)
    forms = passes_of(mixtures.rows(mixture, 3000), mixture, precision=precision)
    assert set(forms) == {(Precision.CENTRED, True)}


def test_lanes_of_many_separated_components_leave_pairs_out():
    mixture = mixtures.parameters("full", 200, 8, spread=40.0)
    forms = passes_of(mixtures.rows(mixture, 20_000), mixture, max_iter=4)
    assert forms[-1] == (Precision.CENTRED, False)


def test_what_asks_for_float32_gets_it():
    mixture = mixtures.parameters("full", 3, 2, spread=2.0)
    forms = passes_of(mixtures.rows(mixture, 300), mixture, precision="float32")
    # But for the last pass, which scores what it has come to.
    assert {form for form, _ in forms[:-1]} == {Precision.FLOAT32}
    assert forms[-1] == (Precision.CENTRED, True)


def test_all_pairs_are_taken_where_that_is_no_slower_than_products():
    """Of few features or components than float32's, and never much slower than float64's."""
    assert (
        most_survivors("full", 8, 4, compiled=True)[2]
        < most_survivors("full", 8, 4, compiled=True)[0]
    )
    float32, float64, every = most_survivors("full", 64, 64, compiled=True)
    assert float32 < every < 64
    assert float64 < 64


def test_lanes_in_different_forms_are_grouped_apart():
    total = mixtures.shards(mixtures.normal_rows(50, 2)).run(SumMoments(2))
    config = EMConfig(compile_from=0)
    first, second = (
        lane.Lane.start(mixtures.parameters("full", 3, 2, seed=s), config, total) for s in (0, 1)
    )
    assert len(lane.grouped([first, second])) == 1
    second.policy.survivors = second.policy.unscreened = -1e9
    assert len(lane.grouped([first, second])) == 2
    task = lane.task_of(lane.grouped([first, second]), 50)
    assert [group.all_pairs for group in task.groups] == [True, False]


@pytest.mark.parametrize("all_pairs", [True, False])
def test_what_a_pass_leaves_out_is_bounded_in_its_result(all_pairs, monkeypatch):
    mixture = mixtures.parameters("full", 6, 8, spread=1.5)
    X = mixtures.rows(mixture, 500)
    # So that something is left out.
    monkeypatch.setattr("gmm_dist.em.forms.about_means.cut", lambda size: cut(size, 3.0))
    monkeypatch.setattr("gmm_dist.em.precision.KEPT", 3.0)
    shards = mixtures.shards(X)
    config = EMConfig(compile_from=0, max_iter=1, accelerate=False)
    running = lane.Lane.start(mixture, config, shards.run(SumMoments(8)))
    running.policy.form, running.policy.survivors = Precision.CENTRED, math.inf
    if not all_pairs:
        running.policy.survivors = running.policy.unscreened = -1e9
    total = shards.run(SumMoments(8))
    loop.run(shards, [running], config, total)
    fit = loop.result_of(running, total)
    exact = float(logits(X, fit.parameters).logsumexp(1).mean())
    short = exact - fit.log_likelihood / 500
    assert 0 < short <= fit.left_out <= math.exp(-3.0)

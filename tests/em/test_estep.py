"""One pass over blocks of rows for many lanes, against the naive E-step."""

from __future__ import annotations

import itertools
from dataclasses import replace

import mixtures
import naive
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gmm_dist import chunks
from gmm_dist.em.estep import EStep, SumMoments
from gmm_dist.em.lane_batch import LaneBatch, Precision
from gmm_dist.model.covariance import COVARIANCE_TYPES, TYPE_OF, Moments
from gmm_dist.model.natural import maximise, natural
from gmm_dist.model.parameters import Parameters, ParameterStack
from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import Block, ShardRows

every_type = pytest.mark.parametrize("kind", COVARIANCE_TYPES)
exact_forms = pytest.mark.parametrize("precision", [Precision.FLOAT64, Precision.CENTRED])


def group(lanes: list[Parameters], precision: Precision) -> LaneBatch:
    """Put lanes of one covariance type into a pass."""
    theta = natural(ParameterStack.of(lanes)).theta
    return LaneBatch.of(lanes, theta.split([lane.n_components for lane in lanes]), precision)


def run(X, groups, sample_weight=None, *, edges=()):
    """Run one pass, and return the statistics of its groups and the moments of all rows."""
    shards = mixtures.shards(X, edges, sample_weight)
    d = X.shape[1]
    return shards.run(EStep(tuple(groups), d)), shards.run(SumMoments(d))


def moments_of(lanes, precision, sums, total) -> Moments:
    """Name the parts of the sums, which the centred form takes about the lanes' means."""
    kind = lanes[0].covariance_type
    if precision is not Precision.CENTRED:
        return TYPE_OF[kind].moments(sums, total.sum_xx)
    layout = TYPE_OF[TYPE_OF[kind].alone]
    own = layout.moments(sums, total.sum_xx)
    return Moments(
        nk=own.nk,
        sum_x=own.sum_x,
        sum_xx=own.sum_xx,
        about=torch.cat([lane.means for lane in lanes]),
    )


def left_out(lane, total) -> float:
    """Return what products leave out where all components have one quadratic form."""
    matrix = torch.tensor(naive.covariance_matrices(lane)[0])
    quadratic = 0.5 * float((torch.linalg.inv(matrix) * total.sum_xx).sum())
    return -quadratic if lane.type.is_shared else 0.0


def assert_naive(X, lanes, precision, whole, total, i, sample_weight=None, *, rtol=1e-8):
    """Assert that a group's statistics, and the M-step from them, are the naive ones."""
    sums, kind = whole.groups[i], lanes[0].covariance_type
    sizes = tuple(lane.n_components for lane in lanes)
    moments = moments_of(lanes, precision, sums.moments, total)
    stepped = maximise(
        kind, moments, sizes, torch.zeros_like(torch.cat([lane.means for lane in lanes]))
    )
    for j, (lane, new) in enumerate(zip(lanes, stepped.lanes(), strict=True)):
        scores = naive.e_step(X, lane, sample_weight)
        expected = naive.m_step(X, scores.resp, kind, sample_weight=sample_weight)
        mixtures.assert_same(new, expected, rtol=rtol, atol=rtol)
        found = float(sums.log_likelihood[j])
        if precision is not Precision.CENTRED:
            found += left_out(lane, total)
        assert found == pytest.approx(scores.log_likelihood, rel=rtol)
        if precision is not Precision.FLOAT32:
            assert float(sums.entropy[j]) == pytest.approx(scores.entropy, rel=rtol, abs=1e-9)


@every_type
@exact_forms
@pytest.mark.parametrize("weighted", [False, True])
def test_lanes_of_different_sizes_equal_the_naive_steps(kind, precision, weighted):
    X = mixtures.rows(mixtures.parameters("full", 3, 3), 60)
    weight = mixtures.row_weights(60) if weighted else None
    lanes = [mixtures.parameters(kind, k, 3, seed=k) for k in (2, 5, 1, 3, 2)]
    whole, total = run(X, [group(lanes, precision)], weight, edges=[25])
    assert_naive(X, lanes, precision, whole, total, 0, weight)
    assert whole.n_samples == pytest.approx(60.0 if weight is None else float(weight.sum()))


@pytest.mark.parametrize("weighted", [False, True])
def test_families_and_precisions_share_one_pass(weighted):
    X = mixtures.rows(mixtures.parameters("full", 3, 2), 50)
    weight = mixtures.row_weights(50) if weighted else None
    lanes = {
        (kind, precision): [mixtures.parameters(kind, k, 2, seed=k) for k in (1, 3)]
        for kind in COVARIANCE_TYPES
        for precision in Precision
    }
    groups = [group(own, precision) for (_, precision), own in lanes.items()]
    whole, total = run(X, groups, weight, edges=[10])
    for i, ((_, precision), own) in enumerate(lanes.items()):
        rtol = 1e-4 if precision is Precision.FLOAT32 else 1e-8
        assert_naive(X, own, precision, whole, total, i, weight, rtol=rtol)


@every_type
@pytest.mark.parametrize("d", [1, 7])
def test_one_feature_and_many(kind, d):
    X = mixtures.rows(mixtures.parameters("full", 2, d), 40)
    for precision in (Precision.FLOAT64, Precision.CENTRED):
        lanes = [mixtures.parameters(kind, k, d, seed=k) for k in (1, 2)]
        whole, total = run(X, [group(lanes, precision)])
        assert_naive(X, lanes, precision, whole, total, 0)


@every_type
def test_float32_rows_are_only_rounded(kind):
    X = mixtures.rows(mixtures.parameters("full", 2, 3), 40).float()
    lanes = [mixtures.parameters(kind, 2, 3)]
    for precision in (Precision.FLOAT64, Precision.CENTRED):
        whole, total = run(X, [group(lanes, precision)])
        assert_naive(X, lanes, precision, whole, total, 0)  # of the rounded rows, exactly


@every_type
def test_the_error_of_float32_is_measured(kind):
    X = mixtures.rows(mixtures.parameters("full", 2, 3), 200)
    lanes = [mixtures.parameters(kind, k, 3, seed=k) for k in (1, 4)]
    batches = [group(lanes, Precision.FLOAT32), group(lanes, Precision.FLOAT64)]
    weight = mixtures.row_weights(200)
    plain = mixtures.shards(X, [60], weight).run(EStep(tuple(batches), 3))
    assert plain.checked_weight == 0
    assert not plain.groups[0].float32_squares.any()
    checking = tuple(replace(batch, checks=True) for batch in batches)
    whole = mixtures.shards(X, [60], weight).run(EStep(checking, 3, check_every=5))
    # Of each shard the first of five rows.
    rows = torch.cat([torch.arange(0, 60, 5), torch.arange(60, 200, 5)])
    assert whole.checked_weight == pytest.approx(float(torch.as_tensor(weight)[rows].sum()))
    # What float32 makes of these rows, less what float64 does, whichever form measures it.
    whole = mixtures.shards(X, [60]).run(EStep(checking, 3, check_every=5))
    single, double = mixtures.shards(X[rows]).run(EStep(tuple(batches), 3)).groups
    expected = single.log_likelihood - double.log_likelihood
    for sums in whole.groups:
        torch.testing.assert_close(sums.float32_error, expected, rtol=1e-6, atol=1e-9)
        assert (sums.float32_squares >= expected.square() / len(rows)).all()
        assert (sums.float32_squares < 1e-10 * len(rows)).all()


@every_type
@pytest.mark.parametrize("precision", list(Precision))
@mixtures.FIXED
@given(
    cuts=st.lists(st.integers(0, 300), max_size=6),
    cuts_of_blocks=st.lists(st.integers(0, 300), max_size=6),
)
def test_any_split_gives_the_same_statistics(kind, precision, cuts, cuts_of_blocks):
    X, weight = mixtures.rows(mixtures.parameters("full", 3, 2), 300), mixtures.row_weights(300)
    lanes = [mixtures.parameters(kind, k, 2, seed=k) for k in (2, 3)]
    task = EStep((group(lanes, precision),), 2)
    whole = mixtures.shards(X, [], weight).run(task)
    pieces = mixtures.blocks(X, cuts_of_blocks, weight)
    in_blocks = LocalShards(
        [
            ShardRows(shard=0, blocks=[]),
            ShardRows(shard=1, blocks=pieces),
            ShardRows(shard=2, blocks=[]),
        ]
    ).run(task)
    in_shards = mixtures.shards(X, cuts, weight).run(task)
    rtol = 1e-5 if precision is Precision.FLOAT32 else 1e-12
    for other in (in_shards, in_blocks):
        assert other.n_samples == pytest.approx(whole.n_samples, rel=1e-12)
        for name in ("moments", "log_likelihood", "entropy"):
            mine, theirs = getattr(whole.groups[0], name), getattr(other.groups[0], name)
            # Sums of terms of both signs: relative to the largest.
            scale = float(mine.abs().max())
            torch.testing.assert_close(theirs, mine, rtol=rtol, atol=rtol * scale)


@every_type
@pytest.mark.parametrize("precision", list(Precision))
def test_several_chunks_equal_one_by_one(kind, precision):
    """Rows beyond one chunk, of uneven number, against the sum over single rows' densities."""
    n = 2 * chunks._ONE_THREAD.most + 77
    X = mixtures.rows(mixtures.parameters("full", 3, 2), n)
    weight = mixtures.row_weights(n)
    lane = mixtures.parameters(kind, 3, 2)
    whole, total = run(X, [group([lane], precision)], weight)
    matrices = torch.tensor(naive.covariance_matrices(lane))
    normal = torch.distributions.MultivariateNormal(lane.means, matrices)
    logits = normal.log_prob(X[:, None]) + lane.weights.log()
    rtol = 1e-4 if precision is Precision.FLOAT32 else 1e-10
    found = whole.groups[0].log_likelihood[0]
    if precision is not Precision.CENTRED:
        found = found + left_out(lane, total)
    torch.testing.assert_close(found, (weight * logits.logsumexp(1)).sum(), rtol=rtol, atol=0)
    moments = moments_of([lane], precision, whole.groups[0].moments, total)
    torch.testing.assert_close(moments.nk, weight @ logits.softmax(1), rtol=rtol, atol=0)


@every_type
@exact_forms
def test_zero_weight_is_an_absent_row(kind, precision):
    X, weight = mixtures.rows(mixtures.parameters("full", 2, 2), 40), mixtures.row_weights(40)
    weight[::3] = 0
    groups = [group([mixtures.parameters(kind, 3, 2)], precision)]
    with_zeros, _ = run(X, groups, weight)
    without, _ = run(X[weight > 0], groups, weight[weight > 0])
    assert_close(with_zeros, without)


@every_type
@exact_forms
def test_an_integer_weight_is_a_repeated_row(kind, precision):
    X = mixtures.rows(mixtures.parameters("full", 2, 2), 40)
    times = torch.arange(40) % 4
    groups = [group([mixtures.parameters(kind, 3, 2)], precision)]
    weighted, _ = run(X, groups, times.double())
    repeated, _ = run(X.repeat_interleave(times, 0), groups)
    assert_close(weighted, repeated)


@every_type
@exact_forms
def test_all_weights_two_is_all_rows_twice(kind, precision):
    X = mixtures.rows(mixtures.parameters("full", 2, 2), 40)
    groups = [group([mixtures.parameters(kind, 3, 2)], precision)]
    weighted, _ = run(X, groups, torch.full((40,), 2.0, dtype=torch.float64))
    twice, _ = run(torch.cat([X, X]), groups)
    assert_close(weighted, twice)


def assert_close(one, other, *, rtol=1e-12):
    assert one.n_samples == pytest.approx(other.n_samples, rel=rtol)
    for mine, theirs in zip(one.groups, other.groups, strict=True):
        for name in ("moments", "log_likelihood", "entropy"):
            expected = getattr(theirs, name)
            atol = rtol * float(expected.abs().max())
            torch.testing.assert_close(getattr(mine, name), expected, rtol=rtol, atol=atol)


@every_type
@pytest.mark.parametrize("precision", list(Precision))
def test_far_components_leave_no_nan(kind, precision):
    """Responsibilities underflow to zero, a row far from everything still has a density."""
    near = mixtures.parameters(kind, 3, 2)
    far = torch.tensor([[0.0, 0.0], [1e4, 0.0], [0.0, -3e4]], dtype=torch.float64)
    lane = Parameters(
        weights=near.weights, means=far, covariances=near.covariances, covariance_type=kind
    )
    X = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1e4, 0.0], [0.0, -3e4], [1e5, 1e5]])
    whole, total = run(X.double(), [group([lane], precision)])
    sums = whole.groups[0]
    moments = moments_of([lane], precision, sums.moments, total)
    for value in (sums.moments, sums.log_likelihood, sums.entropy):
        assert torch.isfinite(value).all()
    assert float(moments.nk.sum()) == pytest.approx(5)
    if precision is not Precision.FLOAT32:
        scores = naive.e_step(X, lane)
        torch.testing.assert_close(moments.nk, torch.tensor(scores.resp.sum(0)))
        assert float(sums.entropy[0]) == pytest.approx(scores.entropy, abs=1e-6)


@every_type
@exact_forms
def test_a_component_without_weight_gets_no_rows(kind, precision):
    mixture = mixtures.parameters(kind, 2, 2)
    empty = Parameters(
        weights=torch.tensor([1.0, 0.0]).double(),
        means=mixture.means,
        covariances=mixture.covariances,
        covariance_type=kind,
    )
    X = mixtures.normal_rows(30, 2)
    whole, total = run(X, [group([empty], precision)])
    moments = moments_of([empty], precision, whole.groups[0].moments, total)
    assert moments.nk.tolist() == [pytest.approx(30), 0.0]
    assert torch.isfinite(whole.groups[0].moments).all()
    assert whole.groups[0].entropy.tolist() == [pytest.approx(0, abs=1e-9)]


@pytest.mark.parametrize("precision", list(Precision))
def test_a_lanes_company_does_not_change_it(precision):
    X = mixtures.rows(mixtures.parameters("full", 3, 2), 100)
    lane = mixtures.parameters("full", 3, 2)
    alone, _ = run(X, [group([lane], precision)])
    others = [mixtures.parameters("full", k, 2, seed=k) for k in (7, 3, 1)]
    together, _ = run(X, [group([*others, lane], precision)])
    rtol = 1e-5 if precision is Precision.FLOAT32 else 1e-12
    torch.testing.assert_close(
        together.groups[0].log_likelihood[-1:], alone.groups[0].log_likelihood, rtol=rtol, atol=0
    )
    mine, theirs = alone.groups[0].moments, together.groups[0].moments[:, -3:]
    torch.testing.assert_close(theirs, mine, rtol=rtol, atol=rtol * float(mine.abs().max()))


def test_the_rows_are_not_changed():
    X = mixtures.normal_rows(50, 2)
    block = Block(X.T.contiguous(), mixtures.row_weights(50))
    shards = LocalShards([ShardRows(shard=0, blocks=[block])])
    before = block.X.clone(), block.sample_weight.clone()
    pairs = itertools.product(COVARIANCE_TYPES, Precision)
    groups = [group([mixtures.parameters(kind, 2, 2)], precision) for kind, precision in pairs]
    shards.run(EStep(tuple(groups), 2))
    assert torch.equal(block.X, before[0])
    assert torch.equal(block.sample_weight, before[1])


def test_a_pass_repeats_its_bits():
    X = mixtures.rows(mixtures.parameters("full", 3, 2), 5000)
    groups = [group([mixtures.parameters("full", 3, 2)], p) for p in Precision]
    one, other = (run(X, groups, edges=[1234])[0] for _ in range(2))
    for mine, theirs in zip(one.groups, other.groups, strict=True):
        assert torch.equal(mine.moments, theirs.moments)
        assert torch.equal(mine.log_likelihood, theirs.log_likelihood)


class Largest(TorchDispatchMode):
    """Note the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("precision", list(Precision))
def test_memory_does_not_grow_with_the_rows(precision):
    """The largest tensor of a pass is the same for twice the rows."""
    d, k = 8, 12
    task = EStep((group([mixtures.parameters("full", k, d)], precision),), d)
    largest = {}
    for n in (40_000, 80_000):
        X = torch.zeros(d, n)
        # In a thread of its own: the pass switches denormal numbers off in its thread.
        shards = LocalShards([ShardRows(shard=0, blocks=[Block(X)])])

        def watched(rows: ShardRows):
            with Largest() as mode:
                summary = task(rows)
            largest[rows.n_rows] = mode.elements
            return summary

        shards.run(watched)
    assert largest[80_000] == largest[40_000] < 40_000 * k

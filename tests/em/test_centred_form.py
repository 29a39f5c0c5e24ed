"""The centred form: which pairs it evaluates, and what becomes of those that it leaves out."""

from __future__ import annotations

import math
import sys
from dataclasses import fields, replace

import mixtures
import naive
import pytest
import torch

from gmm_dist import compiling
from gmm_dist.config import ABSOLUTE, EMConfig
from gmm_dist.em import lane, loop, precision
from gmm_dist.em.estep import EStep, SumMoments
from gmm_dist.em.forms import centred_form, compiled, pruned_form
from gmm_dist.em.forms.features import Features
from gmm_dist.em.lane_batch import MARGIN, LaneBatch, Precision, cut, screens
from gmm_dist.em.precision import most_survivors
from gmm_dist.em.statistics import TotalMoments
from gmm_dist.model.covariance import COVARIANCE_TYPES, TYPE_OF
from gmm_dist.model.covariance.features import CONSTANT_ROW
from gmm_dist.model.natural import natural
from gmm_dist.model.parameters import Parameters, ParameterStack

every_type = pytest.mark.parametrize("kind", COVARIANCE_TYPES)
both_ways = pytest.mark.parametrize("compiled", [False, True])


def one_pass(X, lanes: list[Parameters], sample_weight=None, *, edges=(), compiled=False):
    """Return the sums of a centred pass."""
    theta = natural(ParameterStack.of(lanes)).theta
    thetas = theta.split([one.n_components for one in lanes])
    batch = LaneBatch.of(lanes, thetas, Precision.CENTRED, compiled=compiled)
    whole = mixtures.shards(X, edges, sample_weight).run(EStep((batch,), X.shape[1]))
    return whole.groups[0]


def logits(X, mixture: Parameters) -> torch.Tensor:
    matrices = torch.tensor(naive.covariance_matrices(mixture))
    normal = torch.distributions.MultivariateNormal(mixture.means, matrices)
    return normal.log_prob(X.double()[:, None]) + mixture.weights.log()


def mass(sums, kind: str) -> torch.Tensor:
    """Return the weight that each component answers for."""
    return sums.moments[CONSTANT_ROW - TYPE_OF[TYPE_OF[kind].alone].rows(1).start]


def apart(kind: str, k: int, d: int, *, seed: int = 0) -> Parameters:
    """Return a mixture of which few components matter to a row."""
    return mixtures.parameters(kind, k, d, seed=seed, spread=12.0)


@both_ways
@every_type
@pytest.mark.parametrize("weighted", [False, True])
def test_survivors_are_the_components_near_the_best(kind, weighted, compiled):
    X = mixtures.rows(apart("full", 4, 3), 400)
    lanes = [apart(kind, 4, 3), mixtures.parameters(kind, 6, 3, seed=1)]
    weight = mixtures.row_weights(400) if weighted else torch.ones(400, dtype=torch.float64)
    sums = one_pass(X, lanes, weight if weighted else None, edges=[150], compiled=compiled)
    for i, mixture in enumerate(lanes):
        exact = logits(X, mixture)
        # A pair within rounding of the edge may go either way.
        below = exact.amax(1, keepdim=True) - exact
        edge = cut(mixture.n_components)
        least, most = ((below < edge + side).double().sum(1) @ weight for side in (-0.01, 0.01))
        assert float(least) <= float(sums.survivors[i]) * (1 + 1e-12)
        assert float(sums.survivors[i]) <= float(most) * (1 + 1e-12)
    assert float(sums.survivors[0]) < 0.9 * 4 * float(weight.sum())  # some were left out


@both_ways
@every_type
def test_what_is_left_out_is_below_its_bound(kind, compiled):
    X = mixtures.rows(apart("full", 5, 3), 500)
    mixture = apart(kind, 5, 3)
    sums = one_pass(X, [mixture], compiled=compiled)
    exact = logits(X, mixture)
    lost = (exact.logsumexp(1).sum() - sums.log_likelihood[0]) / len(X)
    assert abs(float(lost)) < math.exp(-28) + 1e-13 * abs(float(sums.log_likelihood[0])) / len(X)
    torch.testing.assert_close(
        mass(sums, kind), exact.softmax(1).sum(0), rtol=1e-10, atol=500 * math.exp(-28)
    )


@both_ways
@every_type
@pytest.mark.parametrize("far", [1e6, 1e15, 1e30, 1e100, 1e160])
def test_rows_that_float32_cannot_screen_are_evaluated_with_all(kind, far, compiled):
    """Far rows, whose logits in float32 are off by more than the margin, or no numbers."""
    X = mixtures.rows(mixtures.parameters("full", 3, 2), 300)
    X[7] = X.new_tensor([far, far / 3])
    X[200] = X.new_tensor([-far / 7, far])
    mixture = mixtures.parameters(kind, 3, 2)
    sums = one_pass(X, [mixture], mixtures.row_weights(300), edges=[100], compiled=compiled)
    near = torch.ones(300, dtype=torch.bool)
    near[[7, 200]] = False
    exact, weight = logits(X, mixture), mixtures.row_weights(300)
    for value in (sums.log_likelihood, sums.entropy, sums.squares):
        assert value.isfinite().all()
    near_mass = weight[near] @ exact[near].softmax(1)
    excess = mass(sums, kind) - near_mass
    # The far rows belong to someone, and to no one in part less than nothing.
    assert float(excess.sum()) == pytest.approx(float(weight[~near].sum()), rel=1e-6)
    assert bool((excess > -1e-9).all())


@pytest.mark.parametrize("kind", ["full", "diag", "spherical"])
@pytest.mark.parametrize("narrow", [1e-8, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("d", [2, 16])
@both_ways
def test_a_tight_component_far_out_keeps_its_rows(kind, narrow, d, compiled):
    """The screen puts its rows far from it, and near a wide one of which it is right."""
    X = torch.randn(400, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    X[:100] = X[:100] * narrow + 300.0
    wide = mixtures.parameters("full", 2, d)
    spread = torch.tensor([narrow, 100.0], dtype=torch.float64).square()
    eye = torch.eye(d, dtype=torch.float64)
    covariances = {
        "full": spread[:, None, None] * eye,
        "diag": spread[:, None].expand(-1, d).clone(),
        "spherical": spread,
    }[kind]
    means = torch.stack([torch.full((d,), 300.0), torch.zeros(d)]).double()
    mixture = replace(wide, means=means, covariances=covariances, covariance_type=kind)
    sums, exact = one_pass(X, [mixture], compiled=compiled), logits(X, mixture)
    assert float(sums.log_likelihood[0]) == pytest.approx(float(exact.logsumexp(1).sum()), rel=1e-9)
    torch.testing.assert_close(mass(sums, kind), exact.softmax(1).sum(0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["full", "diag", "spherical"])
@pytest.mark.parametrize("d", [1, 2, 8, 32, 64])
def test_where_components_are_screened_the_screen_is_within_its_margin(kind, d):
    """By its place or by its shape a component comes nearer and nearer to what is refused."""
    generator = torch.Generator().manual_seed(d)
    z = torch.randn(4000, d, generator=generator, dtype=torch.float64)
    refused = set()
    for power in range(12):
        for shape in ("far", "flat"):
            start = mixtures.parameters(kind, 1, d, seed=d)
            if shape == "far":
                start = replace(start, means=start.means * 3.0**power)
            elif kind == "full" and d > 1:
                narrow = 4.0**-power * torch.eye(d, dtype=torch.float64)
                start = replace(start, covariances=(1.0 + narrow)[None])
            else:
                continue
            stack = ParameterStack.of([start])
            theta = natural(stack).theta
            if not bool(screens(stack, theta).all()):
                refused.add(shape)
                continue
            X = start.means + z @ torch.linalg.cholesky(start.covariance_matrices()[0]).T
            features = Features(d, 4000, {kind}, torch.float32, X.device)
            features.fill(X.T.contiguous())
            screened = (theta.float() @ features.of[kind])[0]
            assert float((screened - logits(X, start)[:, 0]).abs().max()) < MARGIN / 2
    assert refused == ({"far", "flat"} if kind == "full" and d > 1 else {"far"})


@both_ways
@every_type
def test_parameters_beyond_float32_are_not_screened(kind, compiled):
    """Components so narrow that float32 does not hold their precisions."""
    mixture = mixtures.parameters(kind, 2, 2)
    tiny = Parameters(
        weights=mixture.weights,
        means=mixture.means * 1e-25,
        covariances=mixture.covariances * 1e-50,
        covariance_type=kind,
    )
    X = mixtures.rows(mixtures.parameters("full", 2, 2), 50)
    small = one_pass(X * 1e-25, [tiny], compiled=compiled)
    normal = one_pass(X, [mixture], compiled=compiled)
    shift = 50 * 2 * 25 * math.log(10)  # the density per unit of X
    assert float(small.log_likelihood[0]) - shift == pytest.approx(
        float(normal.log_likelihood[0]), rel=1e-9
    )
    torch.testing.assert_close(small.squares, normal.squares, rtol=1e-9, atol=0)


@both_ways
def test_rows_far_along_a_narrow_axis_keep_their_component(compiled):
    """There float32 errs by more than near the component, of which the screen was trusted."""
    generator = torch.Generator().manual_seed(0)
    d, long, n = 8, 300.0, 6000
    axis = torch.tensor([1, 0.83, 1.21, 0.77, 1.1, 0.93, 1.07, 0.71], dtype=torch.float64)
    axis /= axis.norm()
    eye = torch.eye(d, dtype=torch.float64)
    mixture = Parameters(
        covariance_type="full",
        weights=torch.tensor([0.5, 0.5], dtype=torch.float64),
        means=torch.zeros(2, d, dtype=torch.float64),
        covariances=torch.stack([0.7 * eye + long**2 * axis[:, None] * axis, (301.2**2) * eye]),
    )
    along = long * torch.randn(n, dtype=torch.float64, generator=generator)
    far = torch.rand(n // 20, dtype=torch.float64, generator=generator)
    along[: n // 20] = long * (40 + 160 * far)
    noise = torch.randn(n, d, dtype=torch.float64, generator=generator)
    X = 0.8 * noise + along[:, None] * axis
    sums, exact = one_pass(X, [mixture], compiled=compiled), logits(X, mixture)
    torch.testing.assert_close(mass(sums, "full"), exact.softmax(1).sum(0), rtol=1e-8, atol=0)
    torch.testing.assert_close(sums.log_likelihood[0], exact.logsumexp(1).sum(), rtol=1e-11, atol=0)


@pytest.mark.parametrize("kind", ["full", "diag", "tied-spherical"])
def test_pieces_and_chunks_change_nothing(kind, monkeypatch):
    X = mixtures.rows(apart("full", 3, 2), 9000)
    lanes = [apart(kind, 3, 2), mixtures.parameters(kind, 2, 2, seed=1)]
    weight = mixtures.row_weights(9000)
    whole = one_pass(X, lanes, weight)
    monkeypatch.setattr(centred_form, "_PIECE_ROWS", 1)  # a chunk at a time
    # In another order: the buffers of a pass are kept for lanes of the same sizes.
    small = one_pass(X, lanes[::-1], weight)
    torch.testing.assert_close(
        small.log_likelihood.flip(0), whole.log_likelihood, rtol=1e-12, atol=0
    )
    torch.testing.assert_close(small.survivors.flip(0), whole.survivors, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
@every_type
def test_compiled_loops_sum_what_torch_does(kind, weighted, dtype):
    """Pairs of few and of many components, in chunks of any length, of several lanes."""
    X = mixtures.rows(apart("full", 5, 3), 5000).to(dtype)
    lanes = [apart(kind, 5, 3), mixtures.parameters(kind, 11, 3, seed=1)]
    weight = mixtures.row_weights(5000) if weighted else None
    by_torch, by_loops = (
        one_pass(X, lanes, weight, edges=[1, 2000, 2001], compiled=compiled)
        for compiled in (False, True)
    )
    for field in fields(by_torch):
        one, other = getattr(by_loops, field.name), getattr(by_torch, field.name)
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("has_products", [False, True])
def test_the_loops_are_what_they_are_in_python(has_products, monkeypatch):
    kind = "full" if has_products else "diag"
    X, mixture = mixtures.rows(apart("full", 3, 4), 150), apart(kind, 3, 4)
    expected = one_pass(X, [mixture], compiled=True)

    def in_python(has_products: bool, _: str) -> compiled.Loops:
        return compiled.plain(compiled.Loops, has_products)

    monkeypatch.setattr(pruned_form, "loops_for", in_python)
    found = one_pass(X, [mixture], compiled=True)
    torch.testing.assert_close(found.moments, expected.moments, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("kind", "d", "n_rows", "expected"),
    [
        ("full", 128, 50_000, True),
        ("full", 128, 49_999, False),
        ("tied", 129, 10**9, False),
        ("diag", 129, 50_000, True),
        ("spherical", 2, 10**9, True),
    ],
)
def test_from_many_rows_on_the_loops_are_compiled(kind, d, n_rows, expected):
    mixture, one = mixtures.parameters(kind, 2, d), torch.ones(d, dtype=torch.float64)
    total = TotalMoments(
        n_samples=n_rows, n_rows=n_rows, sum_x=one, sum_xx=one * n_rows, compiles=True
    )
    running = lane.Lane.start(mixture, EMConfig(), total)
    (batch,) = lane.task_of([[running]], n_rows).groups
    assert batch.compiled == running.policy.compiled == expected
    elsewhere = lane.Lane.start(mixture, EMConfig(), replace(total, compiles=False))
    assert not elsewhere.policy.compiled


def test_rows_compile_where_all_who_hold_them_can(monkeypatch):
    rows = mixtures.shards(torch.ones(9, 2))
    total = rows.run(SumMoments(2))
    assert total.compiles == compiling.may_compile()
    assert not (total + replace(total, compiles=False)).compiles
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert not rows.run(SumMoments(2)).compiles


def test_numba_that_is_switched_off_is_not_asked(monkeypatch):
    numba = pytest.importorskip("numba")
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert not compiling.can_compile.__wrapped__()


def test_without_numba_torch_does_it(monkeypatch):
    """Numba is missing, or refuses the NumPy that there is."""
    X, lanes = mixtures.rows(apart("full", 3, 2), 100), [apart("full", 3, 2)]
    expected = one_pass(X, lanes)
    monkeypatch.setitem(sys.modules, "numba", None)
    compiling.can_compile.cache_clear()
    try:
        assert not compiling.can_compile()
        # As where the driver has what a worker lacks.
        assert torch.equal(
            one_pass(X[:99], lanes, compiled=True).moments, one_pass(X[:99], lanes).moments
        )
    finally:
        compiling.can_compile.cache_clear()
    assert torch.equal(one_pass(X, lanes).moments, expected.moments)


def test_loops_are_compiled_where_no_folder_keeps_them(monkeypatch):
    numba = pytest.importorskip("numba")
    calls = []

    def njit(signature, *, cache=False, **options):
        calls.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda loop: loop

    monkeypatch.setattr(numba, "njit", njit)
    compiled.loops_for.__wrapped__(True, "f")
    assert calls == [True, False] * len(fields(compiled.Loops))


# ---- which form a lane takes -----------------------------------------------------------------


def forms_of(X, start: Parameters, **settings) -> list[Precision]:
    """Return the form of each pass of a fit."""
    shards = mixtures.shards(X, [len(X) // 2])
    config = EMConfig(tol=1e-8, max_iter=12, reg_covar=1e-6, reg_unit=ABSOLUTE, **settings)
    total = shards.run(SumMoments(X.shape[1]))
    running = lane.Lane.start(start, config, total)
    forms = [running.precision]
    loop.run(shards, [running], config, total, watch=lambda lanes: forms.append(lanes[0].precision))
    return forms[:-1]


def test_a_lane_of_few_survivors_takes_the_centred_form():
    mixture = mixtures.parameters("full", 64, 64)
    few, *_ = most_survivors("full", 64, 64, compiled=False)
    assert few > 1.5
    X = mixtures.rows(mixture, 15_000)
    forms = forms_of(X, mixture)
    assert forms[0] is Precision.FLOAT32
    assert set(forms[1:]) == {Precision.CENTRED}
    assert Precision.CENTRED not in forms_of(X, mixture, precision="float32")


def test_a_lane_of_many_survivors_takes_products():
    mixture = mixtures.parameters("full", 24, 48, spread=0.2)
    alike = mixture.covariances[:1].expand(24, -1, -1).clone()
    mixture = replace(mixture, covariances=alike)
    forms = forms_of(mixtures.rows(mixture, 3000), mixture)
    assert Precision.CENTRED not in forms


def policy(**changes) -> precision.PrecisionPolicy:
    fields = {
        "mode": "auto",
        "tol": 1e-5,
        "form": Precision.FLOAT32,
        "least": Precision.FLOAT32,
        "next_check": 0,
        "unscreened": 0.0,
        "most_survivors": [2.0, 6.0, math.inf],
    }
    return precision.PrecisionPolicy(**(fields | changes))


def test_a_lane_stays_in_the_centred_form_until_survivors_are_well_above_the_limit():
    chosen = policy()
    for survivors, expected in [
        (3.0, Precision.FLOAT32),
        (2.0, Precision.CENTRED),
        (2.9, Precision.CENTRED),
        (3.1, Precision.FLOAT32),
    ]:
        chosen.next_check = chosen.n_passes  # each pass measures
        assert not chosen.has_lost(0.0, survivors=survivors, in_range=True)
        chosen.come_back(1.0)
        assert chosen.form is expected


def test_components_that_are_not_screened_count_as_survivors():
    chosen = policy(unscreened=1.5)
    assert not chosen.has_lost(0.0, survivors=1.0, in_range=True)
    chosen.come_back(1.0)
    assert chosen.form is Precision.FLOAT32
    chosen.unscreened = 1.0
    chosen.come_back(1.0)
    assert chosen.form is Precision.CENTRED
    assert not chosen.has_lost(0.0, survivors=2.0, in_range=True)  # with that of the one
    chosen.come_back(1.0)
    assert chosen.form is Precision.CENTRED


@pytest.mark.parametrize(
    ("survivors", "expected"), [(5.0, Precision.CENTRED), (7.0, Precision.FLOAT64)]
)
def test_what_float32_came_to_is_judged_by_the_faster_exact_form(survivors, expected):
    chosen = policy()
    assert not chosen.has_lost(0.0, survivors=survivors, in_range=True)
    assert chosen.exact is expected
    assert (
        chosen.has_lost(1.0, survivors=survivors, in_range=True) is False
    )  # this pass measured nothing
    chosen.next_check = chosen.n_passes
    assert chosen.has_lost(
        1.0, survivors=survivors, in_range=True
    )  # and this one found float32 wanting
    assert chosen.exact is expected


def test_products_are_never_slower_where_everything_survives():
    for kind in COVARIANCE_TYPES:
        for k, d in [(2, 1), (12, 6), (64, 64), (1024, 16), (512, 128)]:
            few, some, every = most_survivors(kind, k, d, compiled=False)
            assert few < some < k < every == math.inf
            assert most_survivors(kind, k, d, compiled=True)[2] < k

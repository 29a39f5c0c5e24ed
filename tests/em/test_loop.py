"""EM equals scikit-learn, never falls, and no lane harms another."""

from __future__ import annotations

import math
from dataclasses import replace

import mixtures
import naive
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from gmm_dist.config import ABSOLUTE, EMConfig, StartConfig
from gmm_dist.em.lane import Status
from gmm_dist.model.covariance import COVARIANCE_TYPES
from gmm_dist.model.densities import Densities
from gmm_dist.model.parameters import Parameters, ParameterStack
from gmm_dist.selection.kmeans import start_of as start_from
from gmm_dist.selection.ranking import Candidate
from gmm_dist.selection.sweep import sweep

every_type = pytest.mark.parametrize("kind", COVARIANCE_TYPES)
scikit_learns_types = pytest.mark.parametrize("kind", mixtures.SCIKIT_LEARNS)
every_precision = pytest.mark.parametrize("precision", ["auto", "float32", "float64"])
FEW = settings(mixtures.FIXED, max_examples=5)
# Plain EM, step by step as others take it.
EXACT = EMConfig(
    tol=0, max_iter=12, reg_covar=0.0, precision="float64", accelerate=False, reg_unit=ABSOLUTE
)


def overlapping(n=400, d=3, k=3, seed=0):
    """Return rows of clusters that overlap, so that EM takes its time."""
    return mixtures.rows(mixtures.parameters("full", k, d, seed=seed), n, seed=seed)


def start_of(X, labels, kind, k) -> Parameters:
    """Return the start that the jobs would make of a partition."""
    centre = X.mean(0)
    ones = torch.ones(len(X), dtype=torch.float64)
    return start_from(X - centre, ones, labels, k, kind).shifted(centre)


def scored(X, parameters: Parameters) -> float:
    """Return the sum of log p, each component centred, by torch."""
    densities = Densities(ParameterStack.of([parameters]), torch.device("cpu"))
    return float(densities(X.double().T).logsumexp(0).sum())


# ---- scikit-learn ----------------------------------------------------------------------------


def scikit_learn(X, start: Parameters, config: EMConfig, *, converges=False) -> GaussianMixture:
    """Fit scikit-learn's mixture from the same start."""
    precisions = np.linalg.inv(naive.covariance_matrices(start))
    kind = start.covariance_type
    given = {
        "full": precisions,
        "tied": precisions[0],
        "diag": np.diagonal(precisions, axis1=1, axis2=2),
        "spherical": precisions[:, 0, 0],
    }[kind]
    model = GaussianMixture(
        start.n_components,
        covariance_type=kind,
        tol=config.tol,
        max_iter=config.max_iter,
        reg_covar=config.reg_covar,
        weights_init=start.weights.numpy(),
        means_init=start.means.numpy(),
        precisions_init=given,
        init_params="random",
        random_state=0,
    )
    if converges:
        return model.fit(X.numpy())
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        return model.fit(X.numpy())


def parameters_of(model: GaussianMixture) -> Parameters:
    return Parameters(
        weights=torch.tensor(model.weights_),
        means=torch.tensor(model.means_),
        covariances=torch.tensor(model.covariances_),
        covariance_type=model.covariance_type,
    )


@scikit_learns_types
@pytest.mark.parametrize("reg_covar", [0.0, 1e-2])
@pytest.mark.parametrize("n_iter", [1, 12])
def test_equals_scikit_learn_after_the_same_number_of_iterations(kind, reg_covar, n_iter):
    X, start = (
        overlapping() + 50,
        mixtures.parameters(kind, 3, 3, seed=5).shifted(
            torch.full((3,), 50.0, dtype=torch.float64)
        ),
    )
    config = replace(EXACT, max_iter=n_iter, reg_covar=reg_covar)
    model = scikit_learn(X, start, config)
    (fit,) = mixtures.fit(X, [start], config, edges=[100, 100, 250])
    assert fit.n_iter == model.n_iter_ == n_iter
    assert fit.status is Status.MAX_ITER
    mixtures.assert_same(fit.parameters, parameters_of(model))
    # scikit-learn's lower_bound_ is that of the parameters before its last M-step.
    assert fit.lower_bounds[-2] == pytest.approx(model.lower_bound_, rel=1e-10)
    assert fit.log_likelihood == pytest.approx(model.score(X.numpy()) * len(X), rel=1e-10)


@scikit_learns_types
def test_converges_where_scikit_learn_does(kind):
    X, start = overlapping(), mixtures.parameters(kind, 3, 3, seed=5)
    config = replace(EXACT, tol=1e-4, max_iter=500)
    model = scikit_learn(X, start, config, converges=True)
    (fit,) = mixtures.fit(X, [start], config)
    assert fit.status is Status.CONVERGED
    assert fit.converged
    # Both see the small gain in the same pass; scikit-learn has one more M-step behind it.
    assert fit.n_iter == model.n_iter_ - 1
    assert fit.lower_bounds[-1] == pytest.approx(model.lower_bound_, rel=1e-10)
    mixtures.assert_same(naive.em(X, fit.parameters, 1)[0], parameters_of(model))


@every_type
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_the_naive_loop(kind, weighted):
    X = overlapping(n=60, d=2, k=2)
    weight = mixtures.row_weights(60) if weighted else None
    start = mixtures.parameters(kind, 2, 2, seed=5)
    config = replace(EXACT, max_iter=5, reg_covar=0.01)
    (fit,) = mixtures.fit(X, [start], config, sample_weight=weight, edges=[7])
    expected, bounds = naive.em(X, start, 5, reg_covar=0.01, sample_weight=weight)
    mixtures.assert_same(fit.parameters, expected)
    np.testing.assert_allclose(np.array(fit.lower_bounds[:-1]) * fit.n_samples, bounds, rtol=1e-10)


# ---- the likelihood --------------------------------------------------------------------------


@every_type
@pytest.mark.parametrize("precision", ["auto", "float64"])
@FEW
@given(seed=st.integers(0, 999), k=st.integers(1, 5), d=st.integers(1, 4))
def test_the_likelihood_never_falls(kind, precision, seed, k, d):
    X, start = overlapping(200, d, seed=seed), mixtures.parameters(kind, k, d, seed=seed + 1)
    config = EMConfig(tol=0, max_iter=15, reg_covar=0.0, precision=precision)
    (fit,) = mixtures.fit(X, [start], config)
    if not fit.is_ranked:  # a ladder of regularisation may lower it
        return
    rounding = 1e-12 if precision == "float64" else 5e-6
    gains = np.diff(fit.lower_bounds)
    assert gains.min() >= -rounding * max(1, abs(fit.lower_bounds[-1]))


@every_type
@every_precision
@pytest.mark.parametrize("config", [EMConfig(), EMConfig(tol=0, max_iter=7), EMConfig(max_iter=1)])
def test_the_likelihood_is_that_of_the_parameters_returned(kind, precision, config):
    X = overlapping(100)
    starts = [mixtures.parameters(kind, k, 3, seed=5) for k in (1, 3)]
    for fit in mixtures.fit(X, starts, replace(config, precision=precision), edges=[30]):
        scores = naive.e_step(X, fit.parameters)
        assert fit.log_likelihood == pytest.approx(scores.log_likelihood, rel=1e-9)
        assert fit.entropy == pytest.approx(scores.entropy, rel=1e-7, abs=1e-9)
        assert fit.lower_bounds[-1] == pytest.approx(fit.log_likelihood / fit.n_samples, rel=1e-12)
        np.testing.assert_allclose(fit.nk, scores.resp.sum(0), rtol=1e-7)
        assert len(fit.lower_bounds) == fit.n_iter + 1


@every_type
@every_precision
def test_max_iter_one_is_one_step(kind, precision):
    X, start = overlapping(100), mixtures.parameters(kind, 2, 3, seed=5)
    config = EMConfig(max_iter=1, tol=0, reg_covar=0.0, precision=precision)
    (fit,) = mixtures.fit(X, [start], config)
    assert (fit.n_iter, fit.status) == (1, Status.MAX_ITER)
    assert not fit.converged
    rtol = 1e-9 if precision == "float64" else 1e-4
    mixtures.assert_same(fit.parameters, naive.em(X, start, 1)[0], rtol=rtol, atol=rtol)


@every_precision
def test_tol_zero_runs_to_max_iter(precision):
    X = overlapping(100, d=2, k=2)
    start = mixtures.parameters("diag", 1, 2)  # at its maximum after one step
    (fit,) = mixtures.fit(X, [start], EMConfig(tol=0, max_iter=20, precision=precision))
    assert (fit.n_iter, fit.status) == (20, Status.MAX_ITER)
    assert "raise max_iter" in fit.status.value


@every_type
def test_a_lane_that_ran_out_of_iterations_says_so(kind):
    """A gain too small for float32 to see is not a gain below tol."""
    X, start = overlapping(20_000), mixtures.parameters(kind, 3, 3, seed=5)
    for max_iter in range(6, 13):
        (fit,) = mixtures.fit(X, [start], EMConfig(tol=0, max_iter=max_iter, reg_covar=0.0))
        assert (fit.n_iter, fit.status) == (max_iter, Status.MAX_ITER)


@every_type
def test_degenerate_is_judged_in_each_features_own_scale(kind):
    X, labels = scaled(16)
    starts = [start_of(X, labels, kind, 3)]
    (fit,) = mixtures.fit(X, starts, EMConfig(reg_covar=1e-15))
    assert fit.status is Status.CONVERGED


def test_tol_is_per_row():
    """The same rows ten times over take the same number of iterations."""
    X, start = overlapping(200), mixtures.parameters("full", 3, 3, seed=5)
    config = EMConfig(tol=1e-4, max_iter=300, precision="float64")
    (once,) = mixtures.fit(X, [start], config)
    (ten_times,) = mixtures.fit(X.repeat(10, 1), [start], config)
    assert once.n_iter == ten_times.n_iter
    mixtures.assert_same(once.parameters, ten_times.parameters)


@every_type
def test_auto_converges_however_small_tol_is(kind):
    """float32 cannot see gains that drown in its rounding; float64 can."""
    X, start = overlapping(5000), mixtures.parameters(kind, 3, 3, seed=5)
    config = EMConfig(tol=1e-10, max_iter=300, reg_covar=0.0)
    (auto,) = mixtures.fit(X, [start], config, edges=[1000])
    (exact,) = mixtures.fit(X, [start], replace(config, precision="float64"), edges=[1000])
    assert auto.status is exact.status is Status.CONVERGED
    assert auto.n_iter <= exact.n_iter + 5
    assert auto.log_likelihood == pytest.approx(exact.log_likelihood, abs=1e-6 * len(X))


# ---- invariants ------------------------------------------------------------------------------


@every_type
@every_precision
def test_shifting_the_rows_shifts_the_means_and_nothing_else(kind, precision):
    # Multiples of 2^-20, so that the shift itself loses no digits.
    X = (overlapping() * 2**20).round() / 2**20
    offset = torch.tensor([1e6, -1e6, 1e6], dtype=torch.float64)
    start = mixtures.parameters(kind, 3, 3, seed=5)
    config = EMConfig(tol=0, max_iter=10, precision=precision)
    (here,) = mixtures.fit(X, [start], config)
    (there,) = mixtures.fit(X + offset, [start.shifted(offset)], config)
    rtol = 1e-7 if precision == "float64" else 1e-4
    back = there.parameters.shifted(-offset)
    mixtures.assert_same(back, here.parameters, rtol=rtol, atol=rtol)
    assert there.log_likelihood == pytest.approx(here.log_likelihood, rel=rtol)


@every_type
@FEW
@given(seed=st.integers(0, 999), cuts=st.lists(st.integers(0, 200), max_size=5))
def test_the_order_and_the_shards_of_the_rows_change_nothing(kind, seed, cuts):
    X, weight = overlapping(200, d=2), mixtures.row_weights(200)
    starts = [mixtures.parameters(kind, k, 2, seed=5) for k in (2, 3)]
    config = replace(EXACT, max_iter=5, reg_covar=1e-6)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
    one = mixtures.fit(X, starts, config, sample_weight=weight)
    other = mixtures.fit(X[order], starts, config, sample_weight=weight[order], edges=cuts)
    for mine, theirs in zip(one, other, strict=True):
        mixtures.assert_same(mine.parameters, theirs.parameters, rtol=1e-9)
        assert mine.log_likelihood == pytest.approx(theirs.log_likelihood, rel=1e-12)


@every_type
def test_weights_are_repeated_rows(kind):
    X, times = overlapping(150), torch.arange(150) % 3
    starts = [mixtures.parameters(kind, 3, 3, seed=5)]
    config = replace(EXACT, reg_covar=1e-6)
    (weighted,) = mixtures.fit(X, starts, config, sample_weight=times.double())
    (repeated,) = mixtures.fit(X.repeat_interleave(times, 0), starts, config)
    assert weighted.n_samples == repeated.n_samples == 150
    mixtures.assert_same(weighted.parameters, repeated.parameters, rtol=1e-9)
    assert weighted.log_likelihood == pytest.approx(repeated.log_likelihood, rel=1e-12)


def test_a_fit_repeats_its_bits():
    X = overlapping(500).float()
    starts = [mixtures.parameters(kind, 3, 3, seed=5) for kind in COVARIANCE_TYPES]
    one, other = (mixtures.fit(X, starts, EMConfig(), edges=[100]) for _ in range(2))
    for mine, theirs in zip(one, other, strict=True):
        mixtures.assert_same(mine.parameters, theirs.parameters, rtol=0, atol=0)
        assert mine.lower_bounds == theirs.lower_bounds


# ---- lanes in company ------------------------------------------------------------------------


@every_type
@pytest.mark.parametrize("precision", ["auto", "float64"])
def test_a_lane_that_fails_does_not_touch_its_siblings(kind, precision):
    X = overlapping(200, d=2)
    good = [mixtures.parameters(kind, k, 2, seed=5) for k in (2, 3)]
    bad = mixtures.parameters(kind, 3, 2, seed=6)
    bad.covariances.neg_()
    config = EMConfig(tol=0, max_iter=8, precision=precision)
    alone = mixtures.fit(X, good, config)
    first, failed, second = mixtures.fit(X, [good[0], bad, good[1]], config)
    assert failed.status is Status.COLLAPSED
    assert failed.status.value.startswith("collapsed: a covariance is singular")
    assert not failed.is_ranked
    rtol = 1e-9 if precision == "float64" else 1e-4
    for mine, theirs in zip(alone, (first, second), strict=True):
        mixtures.assert_same(mine.parameters, theirs.parameters, rtol=rtol, atol=rtol)
        assert theirs.is_ranked


@every_type
@pytest.mark.parametrize("precision", ["auto", "float64"])
def test_a_lane_on_a_single_row_is_degenerate_and_alone(kind, precision):
    """A component that sits on one far row: its own covariance has nowhere to go but zero."""
    X = torch.cat([overlapping(200, d=2), torch.tensor([[60.0, 60.0]]).double()])
    labels = torch.zeros(201, dtype=torch.int64)
    labels[-1] = 1
    near = torch.arange(201) % 2
    starts = [start_of(X, near, kind, 2), start_of(X, labels, kind, 2)]
    config = EMConfig(tol=0, max_iter=25, reg_covar=0.0, precision=precision)
    (alone,) = mixtures.fit(X, starts[:1], config)
    together, degenerate = mixtures.fit(X, starts, config)
    assert degenerate.status is Status.DEGENERATE
    assert "fewer rows than its covariance needs" in degenerate.status.value
    assert not degenerate.is_ranked
    assert math.isfinite(degenerate.log_likelihood)
    assert positive_definite(degenerate.parameters)
    rtol = 1e-9 if precision == "float64" else 1e-4
    mixtures.assert_same(alone.parameters, together.parameters, rtol=rtol, atol=rtol)


def positive_definite(parameters: Parameters) -> bool:
    matrices = torch.tensor(naive.covariance_matrices(parameters))
    return bool((torch.linalg.cholesky_ex(matrices).info == 0).all())


@every_type
def test_a_column_that_is_constant_is_no_ones_fault(kind):
    """Directions in which all rows are flat lie on the floor in every lane, and do not count."""
    X = torch.cat([overlapping(300, d=2), torch.full((300, 1), 7.0).double()], 1)
    labels = (X[:, 0] > 0).long()
    (fit,) = mixtures.fit(X, [start_of(X, labels, kind, 2)], EMConfig())
    assert fit.status is Status.CONVERGED
    assert positive_definite(fit.parameters)


# ---- precision -------------------------------------------------------------------------------


@every_type
@pytest.mark.parametrize("precision", ["auto", "float64"])
def test_two_float32_rows_far_apart_have_the_variance_of_the_floor(kind, precision):
    """scikit-learn finds 112 instead of 0.1 (its issue 30382)."""
    X = torch.tensor([[9999.0], [0.0]], dtype=torch.float32)
    centred = mixtures.shards(X - X.double().mean(0).float())
    config = EMConfig(reg_covar=0.1, precision=precision, reg_unit=ABSOLUTE)
    found = sweep(centred, [Candidate(2, kind)], config, StartConfig(), n_features=1)
    fit = found.scored[0].fit
    expected = torch.full_like(fit.parameters.covariances, 0.1)
    torch.testing.assert_close(fit.parameters.covariances, expected, rtol=1e-6, atol=0)
    assert sorted(fit.parameters.means.flatten().tolist()) == pytest.approx([-4999.5, 4999.5])


def far_apart(distance: float, d: int, n: int = 600):
    """Return rows of three unit clusters, the farthest `distance` spreads from the first."""
    X, labels = mixtures.normal_rows(n, d), torch.arange(n) % 3
    centres = torch.zeros(3, d, dtype=torch.float64)
    centres[1, 0], centres[2, -1] = distance, -distance / 2
    return X + centres[labels], labels


def correlated(d: int):
    """Return rows whose features correlate at 0.99999, in two clusters."""
    X, labels = mixtures.normal_rows(600, d), torch.arange(600) % 2
    X[:, 1:] = 0.99999 * X[:, :1] + math.sqrt(1 - 0.99999**2) * X[:, 1:]
    return X + 4.0 * labels[:, None], labels


def scaled(d: int):
    """Return rows whose features have scales from 1e-6 to 1e6."""
    X, labels = mixtures.normal_rows(600, d), torch.arange(600) % 3
    X = X + 3 * mixtures.normal_rows(3, d, seed=1)[labels]
    return X * torch.logspace(-6, 6, d, dtype=torch.float64), labels


def overlapped(d: int):
    X, labels = mixtures.normal_rows(600, d), torch.arange(600) % 3
    return X + 2.0 * mixtures.normal_rows(3, d, seed=1)[labels], labels


HARD = {
    "overlapping": overlapped,
    "1000 spreads": lambda d: far_apart(1000.0, d),
    "3000 spreads": lambda d: far_apart(3000.0, d),
    "correlated": correlated,
    "scales": scaled,
}


@every_type
def test_auto_converges_in_the_last_step_that_max_iter_leaves(kind):
    X, labels = overlapped(2)
    config = EMConfig(tol=1e-2, reg_covar=0.0, accelerate=False, returns="stepped")
    start = start_of(X, labels.roll(60), kind, 3)
    (exact,) = mixtures.fit(X, [start], replace(config, precision="float64"))
    assert exact.status is Status.CONVERGED
    for max_iter, ends in ((exact.n_iter, Status.CONVERGED), (exact.n_iter - 1, Status.MAX_ITER)):
        (auto,) = mixtures.fit(X, [start], replace(config, max_iter=max_iter))
        assert (auto.status, auto.n_iter) == (ends, max_iter)


@every_type
@pytest.mark.parametrize("returns", ["scored", "stepped"])
def test_rows_whose_squares_have_a_sum_beyond_float32_converge(kind, returns):
    """Their log-densities are within its range, which the sums over thousands of rows are not."""
    X, labels = overlapped(2)
    X, labels = 10**18.5 * X, labels.roll(60)
    config = EMConfig(tol=1e-3, reg_covar=0.0, accelerate=False, returns=returns)
    start = start_of(X, labels, kind, 3)
    (auto,) = mixtures.fit(X, [start], config)
    (exact,) = mixtures.fit(X, [start], replace(config, precision="float64"))
    assert auto.status is exact.status is Status.CONVERGED
    assert auto.n_iter <= exact.n_iter + 1
    assert auto.log_likelihood == pytest.approx(exact.log_likelihood, abs=1e-3 * len(X))


@pytest.mark.parametrize("d", [1, 2, 16])
@pytest.mark.parametrize("name", HARD)
def test_auto_ends_where_float64_does(name, d):
    if d == 1 and name == "correlated":
        d = 3
    X, labels = HARD[name](d)
    noisy = labels.clone()
    noisy[::10] = (noisy[::10] + 1) % (int(labels.max()) + 1)
    starts = [start_of(X, noisy, kind, int(labels.max()) + 1) for kind in COVARIANCE_TYPES]
    config = EMConfig(tol=0, max_iter=15, reg_covar=0.0, accelerate=False)
    auto = mixtures.fit(X, starts, config, edges=[200])
    exact = mixtures.fit(X, starts, replace(config, precision="float64"), edges=[200])
    for mine, theirs in zip(auto, exact, strict=True):
        assert mine.status is theirs.status is Status.MAX_ITER
        assert positive_definite(mine.parameters)
        assert positive_definite(theirs.parameters)
        assert mine.log_likelihood == pytest.approx(theirs.log_likelihood, abs=1e-6 * len(X))
        assert mine.log_likelihood == pytest.approx(scored(X, mine.parameters), abs=1e-6 * len(X))
        found, expected = (naive.covariance_matrices(fit.parameters) for fit in (mine, theirs))
        spread = np.sqrt(np.diagonal(expected, axis1=1, axis2=2))
        scale = spread[:, :, None] * spread[:, None, :]
        assert np.abs((found - expected) / scale).max() < 1e-4


@every_type
@pytest.mark.parametrize("precision", ["auto", "float64"])
def test_clusters_a_million_spreads_apart_equal_the_naive_loop(kind, precision):
    """Where the matrix form loses its digits, the loop must have changed to a better one."""
    X, labels = far_apart(1e6, 2, n=90)
    start = start_of(X, labels, kind, 3)
    (fit,) = mixtures.fit(X, [start], replace(EXACT, max_iter=3, precision=precision))
    mixtures.assert_same(fit.parameters, naive.em(X, start, 3)[0], rtol=1e-7)


# ---- high dimensions -------------------------------------------------------------------------


@pytest.mark.parametrize("d", [20, 30, 60])
@mixtures.few_types
def test_separated_clusters_are_found_in_many_dimensions(kind, d):
    """Densities multiplied in probability space see one blob from d = 20 on."""
    k, n = 4, 1200
    labels = torch.arange(n) % k
    centres = 4 * mixtures.normal_rows(k, d, seed=d)
    X = (mixtures.normal_rows(n, d) + centres[labels]).float()
    found = sweep(
        mixtures.shards(X - X.double().mean(0).float(), [500]),
        [Candidate(k, kind)],
        EMConfig(),
        StartConfig(n_init=2),
        n_features=d,
    )
    fit = found.scored[0].fit
    assert fit.status is Status.CONVERGED
    means = fit.parameters.means + X.double().mean(0)
    distance = torch.cdist(centres, means)
    assert sorted(distance.argmin(1).tolist()) == list(range(k))
    assert float(distance.min(1).values.max()) < 1.0
    torch.testing.assert_close(fit.parameters.weights, torch.full((k,), 0.25).double())

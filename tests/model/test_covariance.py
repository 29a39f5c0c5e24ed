"""The covariance types: log-densities linear in the features, and the M-step from them."""

from __future__ import annotations

import itertools

import mixtures
import naive
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal

from gmm_dist.em.forms.features import Features
from gmm_dist.model.covariance import COVARIANCE_TYPES, TYPE_OF, Moments
from gmm_dist.model.covariance.features import n_feature_rows, product_pairs
from gmm_dist.model.criteria import n_parameters
from gmm_dist.model.densities import Densities
from gmm_dist.model.natural import NEVER, maximise, natural
from gmm_dist.model.parameters import Parameters, ParameterStack

CPU = torch.device("cpu")
every_type = pytest.mark.parametrize("kind", COVARIANCE_TYPES)


def features(X):
    """Return the feature matrix (P, n) as the docstring of `families` draws it."""
    n, d = X.shape
    rows = [X.square().sum(1), torch.ones(n, dtype=X.dtype)]
    rows += [X[:, i] for i in range(d)]
    rows += [X[:, i] ** 2 for i in range(d)]
    rows += [X[:, i] * X[:, j] for i, j in zip(*product_pairs(d), strict=True)]
    return torch.stack(rows)


@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 7, 8, 9, 16, 19])
def test_the_products_are_all_pairs_once_and_the_features_hold_them_in_that_order(d):
    pairs = [(int(i), int(j)) for i, j in zip(*product_pairs(d), strict=True)]
    assert sorted(pairs) == list(itertools.combinations(range(d), 2))
    X = mixtures.normal_rows(11, d, seed=d)
    held = Features(d, 20, set(COVARIANCE_TYPES), torch.float64, CPU)
    for n in (11, 5, 11):  # a chunk of another length in between
        held.fill(X[:n].T)
        for kind in COVARIANCE_TYPES:
            expected = features(X[:n])[TYPE_OF[kind].rows(d)]
            torch.testing.assert_close(held.of[kind], expected, rtol=1e-14, atol=0)


def exact_log_prob(X, mixture):
    """Return log w_k + log N(x; k), (k, n), by torch.distributions."""
    matrices = torch.tensor(naive.covariance_matrices(mixture))
    normal = MultivariateNormal(mixture.means, matrices)
    return (normal.log_prob(X[:, None]) + mixture.weights.log()).T


def test_there_is_a_family_for_every_covariance_type():
    assert set(TYPE_OF) == set(COVARIANCE_TYPES)


@every_type
@mixtures.FIXED
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    d=st.integers(1, 5),
    seed=st.integers(0, 999),
)
def test_theta_times_phi_is_the_weighted_log_density(kind, sizes, d, seed):
    lanes = [mixtures.parameters(kind, k, d, seed=seed + i) for i, k in enumerate(sizes)]
    X = mixtures.normal_rows(7, d, seed=seed)
    at, phi = natural(ParameterStack.of(lanes)), features(X)[TYPE_OF[kind].rows(d)]
    product = at.theta @ phi
    expected = torch.cat([exact_log_prob(X, lane) for lane in lanes])
    assert not at.failed.any()
    if TYPE_OF[kind].is_shared:  # the quadratic that all components of a lane share is left out
        halves = [-0.5 * _shared_quadratic(X, lane).expand(lane.n_components, -1) for lane in lanes]
        product = product + torch.cat(halves)
    torch.testing.assert_close(product, expected, rtol=1e-10, atol=1e-10)


def _shared_quadratic(X, lane):
    precision = torch.linalg.inv(torch.tensor(naive.covariance_matrices(lane)[0]))
    return torch.einsum("ni,ij,nj->n", X, precision, X)


@every_type
@mixtures.FIXED
@given(k=st.integers(1, 4), d=st.integers(1, 5), seed=st.integers(0, 999))
def test_densities_are_the_weighted_log_density(kind, k, d, seed):
    mixture = mixtures.parameters(kind, k, d, seed=seed)
    X = 5 * mixtures.normal_rows(7, d, seed=seed)
    logits = Densities(ParameterStack.of([mixture]), CPU)(X.T)
    torch.testing.assert_close(logits, exact_log_prob(X, mixture), rtol=1e-10, atol=1e-10)


@every_type
@pytest.mark.parametrize("d", [1, 2, 5])
def test_the_types_share_one_feature_matrix(kind, d):
    X = mixtures.normal_rows(3, d)
    phi = features(X)
    assert len(phi) == n_feature_rows(d) == 2 + 2 * d + d * (d - 1) // 2
    expected_length = {
        "full": d * (d + 1) // 2 + d + 1,
        "diag": 2 * d + 1,
        "spherical": d + 2,
        "tied": d + 1,
        "tied-diag": d + 1,
        "tied-spherical": d + 1,
    }
    assert len(phi[TYPE_OF[kind].rows(d)]) == expected_length[kind]


@pytest.mark.parametrize(
    ("kind", "k", "d", "expected"),
    [
        # By hand: k - 1 weights, k d means, and the free entries of the covariances.
        ("full", 1, 1, 2),
        ("full", 3, 2, 2 + 6 + 3 * 3),
        ("full", 10, 64, 9 + 640 + 10 * 2080),
        ("tied", 3, 2, 2 + 6 + 3),
        ("tied", 10, 64, 9 + 640 + 2080),
        ("diag", 3, 2, 2 + 6 + 6),
        ("diag", 10, 64, 9 + 640 + 640),
        ("spherical", 3, 2, 2 + 6 + 3),
        ("spherical", 10, 64, 9 + 640 + 10),
        ("tied-diag", 3, 2, 2 + 6 + 2),
        ("tied-diag", 10, 64, 9 + 640 + 64),
        ("tied-spherical", 3, 2, 2 + 6 + 1),
        ("tied-spherical", 10, 64, 9 + 640 + 1),
    ],
)
def test_free_parameters(kind, k, d, expected):
    assert n_parameters(kind, k, d) == expected


@every_type
@mixtures.FIXED
@given(
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    d=st.integers(1, 4),
    seed=st.integers(0, 999),
    reg=st.sampled_from([0.0, 0.01, 3.0]),
)
def test_maximise_is_the_m_step(kind, sizes, d, seed, reg):
    n = 12
    X, weight = mixtures.normal_rows(n, d, seed=seed), mixtures.row_weights(n, seed=seed)
    resp = [mixtures.normal_rows(n, k, seed=seed + i).softmax(1) for i, k in enumerate(sizes)]
    sums = features(X)[TYPE_OF[kind].rows(d)] @ (torch.cat(resp, 1) * weight[:, None])
    moments = TYPE_OF[kind].moments(sums, (X.T * weight) @ X)
    regs = torch.full((sum(sizes), d), reg, dtype=torch.float64)
    fitted = maximise(kind, moments, tuple(sizes), regs).lanes()
    for lane, own in zip(fitted, resp, strict=True):
        expected = naive.m_step(X, own.numpy(), kind, reg_covar=reg, sample_weight=weight)
        mixtures.assert_same(lane, expected, rtol=1e-10, atol=1e-10)


@every_type
def test_each_lane_has_a_regularisation_of_its_own(kind):
    d, sizes = 2, (2, 1)
    X = mixtures.normal_rows(12, d)
    resp = [mixtures.normal_rows(12, k, seed=k).softmax(1) for k in sizes]
    sums = features(X)[TYPE_OF[kind].rows(d)] @ torch.cat(resp, 1)
    moments = TYPE_OF[kind].moments(sums, X.T @ X)
    regs = torch.tensor([0.5, 0.5, 2.0], dtype=torch.float64)[:, None].expand(3, d)
    fitted = maximise(kind, moments, sizes, regs).lanes()
    for lane, own, reg in zip(fitted, resp, (0.5, 2.0), strict=True):
        mixtures.assert_same(lane, naive.m_step(X, own.numpy(), kind, reg_covar=reg))


@every_type
def test_moments_about_the_means_give_the_same_covariances(kind):
    """The centred pass hands its moments over in another layout."""
    d, k = 3, 2
    X, resp = mixtures.normal_rows(20, d), mixtures.normal_rows(20, k, seed=1).softmax(1)
    about = mixtures.normal_rows(k, d, seed=2)
    centred = X[None] - about[:, None]
    scatter = torch.einsum("nk,kni,knj->kij", resp, centred, centred)
    squares = scatter.diagonal(dim1=-2, dim2=-1)
    sum_xx = {"full": scatter, "diag": squares, "spherical": squares.sum(-1)}[TYPE_OF[kind].alone]
    moments = Moments(
        nk=resp.sum(0), sum_x=torch.einsum("nk,kni->ki", resp, centred), sum_xx=sum_xx, about=about
    )
    (fitted,) = maximise(kind, moments, (k,), torch.zeros_like(about)).lanes()
    mixtures.assert_same(fitted, naive.m_step(X, resp.numpy(), kind), rtol=1e-10)


@pytest.mark.parametrize("kind", mixtures.SCIKIT_LEARNS)
def test_precisions_cholesky_is_scikit_learns(kind):
    from sklearn.mixture._gaussian_mixture import _compute_precision_cholesky

    mixture = mixtures.parameters(kind, 3, 4)
    factors, failed = TYPE_OF[kind].precisions_cholesky(ParameterStack.of([mixture]).covariances)
    ours = TYPE_OF[kind].unstacked(factors)
    theirs = torch.tensor(_compute_precision_cholesky(mixture.covariances.numpy(), kind))
    assert not failed.any()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
@every_type
def test_a_covariance_that_is_not_positive_definite_is_marked_and_alone(kind, bad):
    good, singular = mixtures.parameters(kind, 2, 3), mixtures.parameters(kind, 2, 3, seed=1)
    singular.stacked_covariances[0] *= bad
    at, alone = natural(ParameterStack.of([good, singular])), natural(ParameterStack.of([good]))
    assert at.failed.tolist() == [False, False, True, TYPE_OF[kind].is_shared]
    assert torch.equal(at.theta[:2], alone.theta)


@every_type
def test_a_component_without_rows_has_a_finite_density(kind):
    mixture = mixtures.parameters(kind, 2, 2)
    empty = Parameters(
        weights=torch.tensor([1.0, 0.0]).double(),
        means=mixture.means,
        covariances=mixture.covariances,
        covariance_type=kind,
    )
    theta = natural(ParameterStack.of([empty])).theta
    assert torch.isfinite(theta).all()
    assert torch.isfinite(theta.float()).all()
    constant = theta[1, 1 if kind == "spherical" else 0]
    assert float(constant) == pytest.approx(NEVER)


@every_type
def test_condition_says_how_much_rounding_of_second_moments_is_amplified(kind):
    """A component `far` standard deviations from the centre loses the digits of far²."""
    for far in (1.0, 1e3, 1e6):
        near = mixtures.parameters(kind, 1, 2)
        mixture = Parameters(
            weights=near.weights,
            means=torch.full((1, 2), far).double(),
            covariances=near.covariances,
            covariance_type=kind,
        )
        condition = float(natural(ParameterStack.of([mixture])).condition)
        assert 0.1 * far**2 <= condition <= 100 * (far**2 + 1)


def test_a_stack_comes_apart_as_it_was_put_together():
    for kind in COVARIANCE_TYPES:
        lanes = [mixtures.parameters(kind, k, 2, seed=k) for k in (3, 1, 2)]
        stack = ParameterStack.of(lanes)
        assert stack.sizes == (3, 1, 2)
        assert stack.lane_of_component.tolist() == [0, 0, 0, 1, 2, 2]
        for one, other in zip(stack.lanes(), lanes, strict=True):
            mixtures.assert_same(one, other, rtol=0, atol=0)

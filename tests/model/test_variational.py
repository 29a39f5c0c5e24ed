"""The variational posterior equals its textbook, scikit-learn's, and its bound never falls."""

from __future__ import annotations

import itertools
import math

import mixtures
import numpy as np
import pytest
import torch
from scipy.special import betaln, digamma, gammaln, multigammaln
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import BayesianGaussianMixture

from gmm_dist.config import ABSOLUTE, EMConfig
from gmm_dist.em.estep import SumMoments
from gmm_dist.em.forms.features import Features
from gmm_dist.em.lane import Lane
from gmm_dist.em.lane_batch import Precision
from gmm_dist.em.loop import run
from gmm_dist.model.covariance import TYPE_OF, Moments
from gmm_dist.model.densities import Densities
from gmm_dist.model.mixture import Mixture
from gmm_dist.model.natural import natural
from gmm_dist.model.parameters import ParameterStack
from gmm_dist.model.variational import VARIATIONAL_TYPES, WEIGHT_PRIORS, Posterior, Prior, m_step

every_type = pytest.mark.parametrize("kind", VARIATIONAL_TYPES)
every_prior = pytest.mark.parametrize("weight_prior", WEIGHT_PRIORS)
CPU = torch.device("cpu")


def clustered(n=300, d=3, *, seed=0):
    """Return rows (n, d) of three clusters."""
    return mixtures.rows(mixtures.parameters("full", 3, d, seed=seed), n, seed=seed)


def responsibilities(n, k, *, seed=0):
    """Return responsibilities (n, k) that know nothing of the rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, k, dtype=torch.float64, generator=generator).softmax(1)


def prior_of(X, kind, weight_prior, *, k=4, reg_covar=0.0, **others) -> Prior:
    """Return the prior that scikit-learn takes for itself."""
    covariance = torch.atleast_2d(X.T.cov())
    values = {
        "weight_concentration": 1 / k,
        "mean_precision": 1.0,
        "mean": X.mean(0),
        "degrees_of_freedom": float(X.shape[1]),
        "covariance": {
            "diag": covariance.diagonal(),
            "spherical": covariance.diagonal().mean(),
        }.get(kind, covariance),
    }
    return Prior(
        covariance_type=kind, weight_prior=weight_prior, **{**values, **others}, reg_covar=reg_covar
    )


def moments_of(X, resp, kind) -> Moments:
    """Return the sums that a pass with these responsibilities brings back."""
    features = Features(X.shape[1], len(X), {kind}, torch.float64, CPU)
    features.fill(X.T.contiguous())
    return TYPE_OF[kind].moments(features.of[kind] @ resp, (resp.sum(1) * X.T) @ X)


def fitted(X, posteriors, *, tol=0.0, max_iter=30, edges=(), sample_weight=None, centre=None):
    """Run variational EM from posteriors, all in the same passes; rows are centred on the way."""
    centre = X.mean(0) if centre is None else centre
    shards = mixtures.shards(X - centre, edges, sample_weight)
    config = EMConfig(
        tol=tol,
        max_iter=max_iter,
        precision="float64",
        accelerate=False,
        reg_unit=ABSOLUTE,
        returns="stepped",
        on_singular="raise",
    )
    lanes = [Lane.of(posterior.shifted(-centre), config) for posterior in posteriors]
    run(shards, lanes, config, shards.run(SumMoments(X.shape[1])))
    return [(lane, lane.model.shifted(centre)) for lane in lanes]


# ---- the textbook ----------------------------------------------------------------------------


class Textbook:
    """Bishop 2006, section 10.2, for full covariances, one row and one component at a time.

    The stick-breaking weights are those of Blei & Jordan 2006, cut off at k components, with a
    beta of its own for the last piece, as in scikit-learn.
    """

    def __init__(self, X, resp, prior: Prior) -> None:
        self.X, self.prior, self.resp = X.numpy(), prior, resp.numpy()
        self.n, self.d = self.X.shape
        self.k = self.resp.shape[1]
        self.m0, self.W0_inv = prior.mean.numpy(), prior.covariance.numpy()
        self._m_step()

    def _m_step(self) -> None:
        prior, k = self.prior, self.k
        self.nk = self.resp.sum(0)
        self.beta, self.nu = prior.mean_precision + self.nk, prior.degrees_of_freedom + self.nk
        self.m, self.W = np.empty((k, self.d)), np.empty((k, self.d, self.d))
        for j in range(k):
            mean = sum(self.resp[i, j] * x for i, x in enumerate(self.X)) / self.nk[j]
            within = sum(
                self.resp[i, j] * np.outer(x - mean, x - mean) for i, x in enumerate(self.X)
            )
            away = mean - self.m0
            share = prior.mean_precision * self.nk[j] / self.beta[j]
            self.m[j] = (prior.mean_precision * self.m0 + self.nk[j] * mean) / self.beta[j]
            self.W[j] = np.linalg.inv(self.W0_inv + within + share * np.outer(away, away))
        self._expect()

    def _expect(self) -> None:
        self.log_det = np.array(
            [
                sum(digamma((self.nu[j] - i) / 2) for i in range(self.d))
                + self.d * math.log(2)
                + np.linalg.slogdet(self.W[j])[1]
                for j in range(self.k)
            ]
        )
        concentration = self.prior.weight_concentration
        if self.prior.weight_prior == "dirichlet_distribution":
            self.alpha = concentration + self.nk
            self.log_pi = digamma(self.alpha) - digamma(self.alpha.sum())
        else:
            self.a = 1 + self.nk
            self.b = np.array([concentration + self.nk[j + 1 :].sum() for j in range(self.k)])
            self.log_v = digamma(self.a) - digamma(self.a + self.b)
            self.log_rest = digamma(self.b) - digamma(self.a + self.b)
            self.log_pi = np.array([self.log_v[j] + self.log_rest[:j].sum() for j in range(self.k)])

    def log_rho(self):
        """Return equation 10.46, (n, k)."""
        result = np.empty((self.n, self.k))
        for i, j in itertools.product(range(self.n), range(self.k)):
            away = self.X[i] - self.m[j]
            distance = self.d / self.beta[j] + self.nu[j] * away @ self.W[j] @ away
            log_density = self.log_det[j] - self.d * math.log(2 * math.pi) - distance
            result[i, j] = self.log_pi[j] + 0.5 * log_density
        return result

    def e_step(self) -> None:
        log_rho = self.log_rho()
        self.resp = np.exp(log_rho - np.logaddexp.reduce(log_rho, axis=1)[:, None])

    def evidence_bound(self) -> float:
        """Return the sum of equations 10.71 to 10.77: ln p(X) is no less."""
        entropy = -float((self.resp * np.log(self.resp)).sum())
        expected = float((self.resp * self.log_rho()).sum())
        return expected + entropy - sum(self._divergences())

    def _divergences(self):
        prior, d = self.prior, self.d
        for j in range(self.k):
            nu, W, beta = self.nu[j], self.W[j], self.beta[j]
            away = self.m[j] - self.m0
            # KL of the normals for the mean, expected over the precision.
            ratio = prior.mean_precision / beta
            distance = prior.mean_precision * nu * away @ W @ away
            yield 0.5 * (distance + d * (ratio - 1 - math.log(ratio)))
            # KL of the Wisharts.
            log_q = self._log_wishart_norm(np.linalg.inv(W), nu)
            log_p = self._log_wishart_norm(self.W0_inv, prior.degrees_of_freedom)
            yield (
                log_q
                - log_p
                + 0.5 * (nu - prior.degrees_of_freedom) * self.log_det[j]
                - 0.5 * nu * d
                + 0.5 * nu * np.trace(self.W0_inv @ W)
            )
        yield self._weight_divergence()

    def _log_wishart_norm(self, W_inv, nu) -> float:
        log_det = np.linalg.slogdet(W_inv)[1]
        log_gamma = multigammaln(nu / 2, self.d)
        return 0.5 * nu * log_det - 0.5 * nu * self.d * math.log(2) - log_gamma

    def _weight_divergence(self) -> float:
        concentration = self.prior.weight_concentration
        if self.prior.weight_prior == "dirichlet_distribution":
            log_q = gammaln(self.alpha.sum()) - gammaln(self.alpha).sum()
            log_p = gammaln(self.k * concentration) - self.k * gammaln(concentration)
            return log_q - log_p + ((self.alpha - concentration) * self.log_pi).sum()
        log_q = -betaln(self.a, self.b)
        log_p = -betaln(1, concentration)
        tilt = (self.a - 1) * self.log_v + (self.b - concentration) * self.log_rest
        return float((log_q - log_p + tilt).sum())


@every_prior
def test_the_posterior_and_its_bound_are_the_textbooks(weight_prior):
    X, resp = clustered(60), responsibilities(60, 3)
    prior = prior_of(X, "full", weight_prior, degrees_of_freedom=4.5, mean_precision=0.7)
    book = Textbook(X, resp, prior)
    start = m_step(prior, moments_of(X, resp, "full"))
    [(trial, posterior)] = fitted(X, [start], max_iter=6)
    bounds = []
    for _ in range(6):
        book.e_step()
        book._m_step()
        bounds.append(book.evidence_bound())
    np.testing.assert_allclose(posterior.means, book.m, rtol=1e-9)
    np.testing.assert_allclose(posterior.degrees_of_freedom, book.nu, rtol=1e-9)
    covariances = np.linalg.inv(book.nu[:, None, None] * book.W)
    np.testing.assert_allclose(posterior.covariances, covariances, rtol=1e-9, atol=1e-11)
    # Ours is without the terms that do not change.
    np.testing.assert_allclose(np.diff(trial.lower_bounds), np.diff(bounds), atol=1e-8)
    assert np.diff(bounds).max() > 0.1


@every_prior
def test_the_densities_are_the_expected_ones(weight_prior):
    X, resp = clustered(40), responsibilities(40, 3)
    prior = prior_of(X, "full", weight_prior)
    posterior = m_step(prior, moments_of(X, resp, "full"))
    log_rho = Textbook(X, resp, prior).log_rho()
    np.testing.assert_allclose(
        Densities(ParameterStack.of([posterior.parameters]), CPU)(X.T).T,
        log_rho,
        rtol=1e-10,
    )
    features = Features(3, 40, {"full"}, torch.float64, CPU)
    features.fill(X.T.contiguous())
    products = natural(ParameterStack.of([posterior.parameters])).theta @ features.of["full"]
    np.testing.assert_allclose(products.T, log_rho, rtol=1e-9)


@every_type
@every_prior
def test_the_e_step_is_the_derivative_of_the_normaliser(kind, weight_prior):
    """What makes the bound rise: also where the families are scikit-learn's, not Bishop's."""
    X, resp = clustered(30), responsibilities(30, 4).requires_grad_()
    posterior = m_step(prior_of(X, kind, weight_prior), moments_of(X, resp, kind))
    [slope] = torch.autograd.grad(posterior.log_normaliser, resp, retain_graph=True)
    expected = Densities(ParameterStack.of([posterior.parameters]), CPU)(X.T).T.detach()
    offset = expected - slope
    torch.testing.assert_close(offset, offset[0, 0].expand_as(offset), rtol=0, atol=1e-8)
    assert slope.std() > 0.1


# ---- scikit-learn ----------------------------------------------------------------------------


class Peer(BayesianGaussianMixture):
    """scikit-learn's, which also tells the responsibilities that it starts from."""

    def _initialize(self, X, resp):
        self.start_ = torch.tensor(resp)
        super()._initialize(X, resp)


def peer(X, kind, weight_prior, *, converges=False, **settings) -> Peer:
    """Fit scikit-learn's mixture from random responsibilities."""
    settings = {"n_components": 4, "max_iter": 25, "tol": 0.0, **settings}
    model = Peer(
        covariance_type=kind,
        weight_concentration_prior_type=weight_prior,
        init_params="random",
        random_state=0,
        **settings,
    )
    if converges:
        return model.fit(X.numpy())
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        return model.fit(X.numpy())


def posterior_from(X, theirs: Peer, kind, weight_prior, **prior) -> Posterior:
    """Return the posterior that a peer's fit began with."""
    given = prior_of(X, kind, weight_prior, k=theirs.n_components, reg_covar=1e-6, **prior)
    centre = X.mean(0)
    return m_step(given.shifted(-centre), moments_of(X - centre, theirs.start_, kind)).shifted(
        centre
    )


def assert_same(ours: Posterior, theirs: Peer, *, rtol=1e-8) -> None:
    """Assert that two fits believe the same."""
    same = {"rtol": rtol, "atol": 1e-9}
    concentration = np.stack(theirs.weight_concentration_)
    np.testing.assert_allclose(ours.weight_concentration, concentration, **same)
    np.testing.assert_allclose(ours.mean_precision, theirs.mean_precision_, **same)
    np.testing.assert_allclose(ours.means, theirs.means_, **same)
    np.testing.assert_allclose(ours.degrees_of_freedom, theirs.degrees_of_freedom_, **same)
    np.testing.assert_allclose(ours.covariances, theirs.covariances_, **same)
    np.testing.assert_allclose(ours.weights, theirs.weights_, **same)


@every_type
@every_prior
def test_a_fit_equals_scikit_learns(kind, weight_prior):
    X = clustered() + torch.tensor([5.0, -3.0, 100.0])
    theirs = peer(X, kind, weight_prior)
    [(trial, posterior)] = fitted(
        X, [posterior_from(X, theirs, kind, weight_prior)], max_iter=25, edges=(100, 170)
    )
    assert_same(posterior, theirs)
    # Theirs has an axis of length one where covariances are tied.
    bounds = np.ravel([np.diag(np.atleast_2d(b))[0] for b in theirs.lower_bounds_])
    np.testing.assert_allclose(trial.lower_bounds, bounds, rtol=1e-9)
    mixture = Mixture(parameters=posterior.parameters)
    rows = X.numpy()
    np.testing.assert_allclose(mixture.score_samples(rows), theirs.score_samples(rows), rtol=1e-8)
    np.testing.assert_allclose(mixture.predict_proba(rows), theirs.predict_proba(rows), atol=1e-8)


@every_type
def test_a_fit_ends_where_scikit_learns_does(kind):
    X = clustered()
    theirs = peer(X, kind, "dirichlet_process", tol=1e-2, max_iter=300, converges=True)
    start = posterior_from(X, theirs, kind, "dirichlet_process")
    [(trial, posterior)] = fitted(X, [start], tol=1e-2, max_iter=300)
    assert trial.converged
    assert trial.n_iter == theirs.n_iter_
    assert_same(posterior, theirs, rtol=1e-6)


@every_prior
def test_beliefs_of_ones_own_equal_scikit_learns(weight_prior):
    X = clustered()
    own = {
        "weight_concentration": 20.0,
        "mean_precision": 3.5,
        "mean": torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64),
        "degrees_of_freedom": 7.5,
        "covariance": 2 * torch.eye(3, dtype=torch.float64) + 0.5,
    }
    theirs = peer(
        X,
        "full",
        weight_prior,
        weight_concentration_prior=20.0,
        mean_precision_prior=3.5,
        mean_prior=own["mean"].numpy(),
        degrees_of_freedom_prior=7.5,
        covariance_prior=own["covariance"].numpy(),
    )
    start = posterior_from(X, theirs, "full", weight_prior, **own)
    [(_, posterior)] = fitted(X, [start], max_iter=25)
    assert_same(posterior, theirs)


# ---- invariants ------------------------------------------------------------------------------


@every_type
@every_prior
def test_the_bound_never_falls(kind, weight_prior):
    X = clustered(200)
    start = m_step(prior_of(X, kind, weight_prior), moments_of(X, responsibilities(200, 4), kind))
    [(trial, _)] = fitted(X, [start], max_iter=60, centre=torch.zeros(3, dtype=torch.float64))
    gains = np.diff(trial.lower_bounds)
    assert gains.min() > -1e-12 * abs(trial.lower_bound)
    assert gains.max() > 0.1


@every_type
def test_many_starts_share_passes_and_change_nothing_of_each_other(kind):
    X = clustered()
    prior = prior_of(X, kind, "dirichlet_process")
    moments = [moments_of(X, responsibilities(300, 4, seed=seed), kind) for seed in range(3)]
    starts = [m_step(prior, each) for each in moments]
    together = fitted(X, starts, max_iter=10)
    for start, (trial, posterior) in zip(starts, together, strict=True):
        [(alone, by_itself)] = fitted(X, [start], max_iter=10)
        np.testing.assert_allclose(trial.lower_bounds, alone.lower_bounds, rtol=1e-12)
        torch.testing.assert_close(posterior.means, by_itself.means, rtol=1e-10, atol=1e-12)


@every_type
def test_a_weight_of_two_is_a_row_twice(kind):
    X, weight = clustered(150), torch.arange(150, dtype=torch.float64) % 3
    twice = torch.repeat_interleave(X, weight.long(), dim=0)
    prior = prior_of(twice, kind, "dirichlet_process")
    resp = responsibilities(150, 4)
    repeated = torch.repeat_interleave(resp, weight.long(), dim=0)
    start = m_step(prior, moments_of(twice, repeated, kind))
    [(one, by_weight)] = fitted(X, [start], sample_weight=weight, centre=twice.mean(0))
    [(other, by_copies)] = fitted(twice, [start])
    np.testing.assert_allclose(one.lower_bounds, other.lower_bounds, rtol=1e-10)
    torch.testing.assert_close(by_weight.covariances, by_copies.covariances, rtol=1e-8, atol=1e-10)


@every_type
def test_tiny_clusters_far_apart_are_fitted_about_their_means(kind):
    X = torch.cat(
        [1e-4 * mixtures.normal_rows(150, 2), 1 + 1e-4 * mixtures.normal_rows(150, 2, seed=1)]
    )
    beliefs = {"full": 1e-8 * torch.eye(2, dtype=torch.float64)}
    beliefs["tied"] = beliefs["full"]
    beliefs["diag"] = beliefs["full"].diagonal()
    beliefs["spherical"] = beliefs["full"][0, 0]
    own = {"covariance": beliefs[kind], "mean_precision": 1e-9, "weight_concentration": 0.25}
    prior = prior_of(X, kind, "dirichlet_distribution", **own)
    labels = torch.arange(300) // 150
    resp = torch.nn.functional.one_hot(labels, 2).double() * 0.8 + 0.1
    start = m_step(prior, moments_of(X, resp, kind))
    theirs = Peer(
        n_components=2,
        covariance_type=kind,
        weight_concentration_prior_type="dirichlet_distribution",
        covariance_prior=np.asarray(beliefs[kind]) if kind != "spherical" else 1e-8,
        weight_concentration_prior=0.25,
        mean_precision_prior=1e-9,
        reg_covar=0.0,
        tol=1e-9,
        max_iter=50,
        random_state=0,
    ).fit(X.numpy())
    [(trial, posterior)] = fitted(X, [start], tol=1e-9, max_iter=50)
    assert trial.converged
    assert trial.precision is Precision.CENTRED
    order = np.argsort(theirs.means_[:, 0])
    covariances = theirs.covariances_ if kind == "tied" else theirs.covariances_[order]
    np.testing.assert_allclose(posterior.covariances, covariances, rtol=1e-7, atol=1e-15)
    np.testing.assert_allclose(trial.lower_bound, np.ravel(theirs.lower_bound_)[0], rtol=1e-9)


# ---- log-weights -----------------------------------------------------------------------------


def test_a_component_nobody_believes_in_still_takes_the_row_nobody_else_does():
    """Its expected log-weight, -1e5, is a number below what a weight can be."""
    X = torch.cat([1e-3 * mixtures.normal_rows(100, 2), torch.zeros(1, 2, dtype=torch.float64)])
    prior = prior_of(
        X,
        "spherical",
        "dirichlet_distribution",
        weight_concentration=1e-5,
        covariance=torch.tensor(1.0, dtype=torch.float64),
    )
    resp = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(101, 2)
    posterior = m_step(prior, moments_of(X, resp, "spherical"))
    assert posterior.parameters.log_weights[1] < -9e4
    rows = np.array([[0.0, 0.0], [1e3, 0.0]])
    assert Mixture(parameters=posterior.parameters).predict(rows).tolist() == [0, 1]


def test_a_stack_keeps_log_weights_of_its_lanes():
    X = clustered(50)
    prior = prior_of(X, "diag", "dirichlet_process")
    lanes = [
        m_step(prior, moments_of(X, responsibilities(50, k), "diag")).parameters for k in (2, 3)
    ]
    again = ParameterStack.of(lanes).lanes()
    for lane, other in zip(lanes, again, strict=True):
        assert torch.equal(lane.log_weights, other.log_weights)
    with pytest.raises(AssertionError, match="with and without log_weights"):
        ParameterStack.of([lanes[0], mixtures.parameters("diag", 2, 3)])

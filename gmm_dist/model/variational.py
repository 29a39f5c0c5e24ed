"""The variational posterior over mixtures, and its update: Bishop 2006, section 10.2.

The posterior is a product of: a Dirichlet over the mixing weights, or a beta for each piece
that is broken off a stick (Blei & Jordan 2006); a normal for each component's mean, given its
precision Λ; a Wishart for Λ. Its E-step is that of a Gaussian mixture in disguise: the expected
log-density of a row under component k is

    E[log π] + ½ E[log |Λ|] - d / 2β - ½ ν (x - m)ᵀ W (x - m) - ½ d log 2π
      = log N(x | m, (ν W)⁻¹) + { E[log π] + ½ (E[log |Λ|] - log |ν W|) - d / 2β },

so with the term in braces as log-weights, the passes over the rows and their sums are those of
EM. `covariances` are (ν W)⁻¹, as in scikit-learn.

The covariance types other than `full` are also scikit-learn's: their W are those of a Wishart
in d dimensions, kept diagonal or a multiple of the unit matrix, and a tied one counts a k-th of
the rows for each component. That is sound: in all four, the E-step is the gradient of the
log-normaliser in the statistics, and this is convex, so the bound never falls (unless reg_covar
is added to the covariances of the M-step, which no prior explains).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.model.covariance import TYPE_OF, CovarianceType, Moments
from gmm_dist.model.natural import maximise
from gmm_dist.model.parameters import Parameters

VARIATIONAL_TYPES = ("full", "tied", "diag", "spherical")
"""The covariance types that have a posterior: scikit-learn's."""
WEIGHT_PRIORS = ("dirichlet_process", "dirichlet_distribution")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Prior:
    """Hold the prior over a mixture's parameters.

    - `weight_concentration`: of the Dirichlet over the weights (`weight_prior` is
      "dirichlet_distribution"), or of the beta distributions that break the stick
      ("dirichlet_process"); the smaller, the fewer components are used;
    - `mean_precision`: how many rows the prior mean `mean` (d,) counts for;
    - `degrees_of_freedom` (more than d - 1) and `covariance`: the Wishart's ν and W⁻¹, in
      squared feature units: full and tied (d, d), diag (d,), spherical ();
    - `reg_covar` (squared feature units) is added to the variances that a component's rows have.
    """

    covariance_type: str
    weight_prior: str
    weight_concentration: float
    mean_precision: float
    mean: Float64[Tensor, " d"]
    degrees_of_freedom: float
    covariance: Float64[Tensor, ...]
    reg_covar: float = 0.0

    @property
    def type(self) -> CovarianceType:
        return TYPE_OF[self.covariance_type]

    def shifted(self, offset: Float64[Tensor, " d"]) -> Prior:
        """Return the same prior for rows that were moved by `offset` (feature units)."""
        return replace(self, mean=self.mean + offset)


@dataclass(frozen=True, eq=False, kw_only=True)
class Posterior:
    """Hold the posterior over the parameters of a mixture of k components.

    `weight_concentration`: (k,) of the Dirichlet, or (2, k), the two parameters of each beta;
    `mean_precision` (k,); `means` (k, d); `degrees_of_freedom` (k,), tied (); `covariances`,
    the inverses of the expected precisions, as in `Parameters`.
    """

    prior: Prior
    weight_concentration: Float64[Tensor, ...]
    mean_precision: Float64[Tensor, " k"]
    means: Float64[Tensor, "k d"]
    degrees_of_freedom: Float64[Tensor, ...]
    covariances: Float64[Tensor, ...]

    def shifted(self, offset: Float64[Tensor, " d"]) -> Posterior:
        """Return the same posterior for rows that were moved by `offset` (feature units)."""
        return replace(self, prior=self.prior.shifted(offset), means=self.means + offset)

    @property
    def weights(self) -> Float64[Tensor, " k"]:
        """The expected mixing weights; of a stick that ends with the last component."""
        if self.prior.weight_prior == "dirichlet_distribution":
            return self.weight_concentration / self.weight_concentration.sum()
        broken_off, left = self.weight_concentration / self.weight_concentration.sum(0)
        weights: Tensor = broken_off * torch.cat([left.new_ones(1), left[:-1].cumprod(0)])
        return weights / weights.sum()

    @cached_property
    def parameters(self) -> Parameters:
        """The mixture that has the posterior's responsibilities: expected log-densities."""
        kind, d = self.prior.covariance_type, self.means.shape[1]
        # log |Λ| less log |ν W|: the precision's determinant is expected below that of its mean.
        shrinkage = (
            torch.digamma(self._halves).sum(0)
            + d * math.log(2)
            - d * self.degrees_of_freedom.log()
            - d / self.mean_precision
        )
        log_weights = self._expected_log_weights() + 0.5 * shrinkage
        return Parameters(
            weights=self.weights,
            means=self.means,
            covariances=self.covariances,
            covariance_type=kind,
            log_weights=log_weights,
        )

    @property
    def reg(self) -> Float64[Tensor, " d"]:
        """What is added to the variances that a component's rows have, squared feature units."""
        return torch.full_like(self.prior.mean, self.prior.reg_covar)

    @property
    def empty(self) -> float:
        """The rows added to each component: none, the prior stands in for them."""
        return 0.0

    def updated(self, nk: Float64[Tensor, " k"], fitted: Parameters) -> Posterior:
        """Return the posterior of components with `nk` rows of these means and covariances."""
        return updated(self.prior, nk, fitted)

    def lower_bound(self, log_likelihood: float, entropy: float, n_samples: float) -> float:
        """Return the lower bound on the log-evidence (nats, all rows), up to a constant.

        `entropy` is that of the responsibilities from which this posterior was computed.
        """
        return entropy + float(self.log_normaliser)

    @property
    def log_normaliser(self) -> Float64[Tensor, ""]:
        """The lower bound less the entropy of the responsibilities, up to a constant.

        Right after an M-step the expected log-densities of rows and parameters cancel, and only
        the logarithm of the posterior's normaliser is left (Bishop, exercise 10.16). Its
        derivative in a responsibility is the E-step's log-density.
        """
        d = self.means.shape[1]
        normal = -0.5 * d * self.mean_precision.log().sum()
        return normal + self._log_wishart() + self._log_dirichlet()

    @cached_property
    def _halves(self) -> Float64[Tensor, "d ..."]:
        """The arguments of a multivariate gamma function: (ν - i) / 2 for i < d."""
        i = torch.arange(self.means.shape[1], dtype=torch.float64)
        return 0.5 * (self.degrees_of_freedom - i.view(-1, *[1] * self.degrees_of_freedom.ndim))

    def _expected_log_weights(self) -> Float64[Tensor, " k"]:
        digamma = torch.digamma(self.weight_concentration)
        if self.prior.weight_prior == "dirichlet_distribution":
            return digamma - torch.digamma(self.weight_concentration.sum())
        broken_off, left = digamma - torch.digamma(self.weight_concentration.sum(0))
        log_weights: Tensor = broken_off + torch.cat([left.new_zeros(1), left[:-1].cumsum(0)])
        return log_weights

    def _log_dirichlet(self) -> Tensor:
        parts = torch.lgamma(self.weight_concentration).sum(0)
        return (parts - torch.lgamma(self.weight_concentration.sum(0))).sum()

    def _log_wishart(self) -> Tensor:
        """Return the log-normaliser of the Wisharts, without the powers of π."""
        family, (k, d) = self.prior.type, self.means.shape
        nu = self.degrees_of_freedom
        factors, _ = family.precisions_cholesky(family.stacked(self.covariances))
        half_log_det = family.half_log_det(factors, d).view(nu.shape) - 0.5 * d * nu.log()
        gamma = torch.lgamma(self._halves).sum(0)
        log_norms = nu * half_log_det + 0.5 * d * math.log(2) * nu + gamma
        return log_norms * k if family.is_shared else log_norms.sum()


def m_step(prior: Prior, moments: Moments) -> Posterior:
    """Return the posterior for the statistics of one mixture's rows."""
    nk = moments.nk
    reg = torch.full_like(moments.sum_x, prior.reg_covar)
    rows = maximise(prior.covariance_type, moments, (len(nk),), reg).lanes()[0]
    return updated(prior, nk, rows)


def updated(prior: Prior, nk: Float64[Tensor, " k"], rows: Parameters) -> Posterior:
    """Return the posterior when components have `nk` rows of these means and covariances.

    Bishop, equations 10.58 and 10.60 to 10.63; 10.62 with its terms divided by ν.
    """
    mean_precision = prior.mean_precision + nk
    means = prior.mean_precision * prior.mean + nk[:, None] * rows.means
    mass = nk / mean_precision * prior.mean_precision
    scatter = prior.type.outer(mass, rows.means - prior.mean)
    if prior.type.is_shared:
        nk_each, scatter = nk.mean(), scatter.mean(0)
    else:
        nk_each = nk
    degrees_of_freedom = prior.degrees_of_freedom + nk_each
    scatter = scatter + prior.covariance + _spread(nk_each, rows.covariances) * rows.covariances
    return Posterior(
        prior=prior,
        weight_concentration=_weight_concentration(prior, nk),
        mean_precision=mean_precision,
        means=means / mean_precision[:, None],
        degrees_of_freedom=degrees_of_freedom,
        covariances=scatter / _spread(degrees_of_freedom, scatter),
    )


def _weight_concentration(prior: Prior, nk: Float64[Tensor, " k"]) -> Tensor:
    if prior.weight_prior == "dirichlet_distribution":
        return prior.weight_concentration + nk
    beyond = torch.cat([nk.flip(0).cumsum(0)[:-1].flip(0), nk.new_zeros(1)])
    return torch.stack([1 + nk, prior.weight_concentration + beyond])


def _spread(values: Tensor, over: Tensor) -> Tensor:
    """Return values, one per covariance, with trailing axes to broadcast over covariances."""
    return values.view(*values.shape, *[1] * (over.ndim - values.ndim))

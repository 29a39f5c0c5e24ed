"""How sure a fit is of its parameters and its number of components, by resampled rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.model.parameters import Parameters

_NORMAL = 1.959963984540054  # standard deviations: 95 % of a Gaussian lie within
_LEAST = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Interval:
    """The standard errors of some parameters, and their 95 % intervals; of one shape."""

    error: Float64[Tensor, "*shape"]
    low: Float64[Tensor, "*shape"]
    high: Float64[Tensor, "*shape"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Win:
    """In how many resamples a candidate would have been the best one."""

    k: int
    covariance_type: str
    n: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Bootstrap:
    """The spread of fits to resampled rows, each of which started from the fit itself.

    Of `n_resamples` fits, `n_used` ended soundly; the others, in which a component had too few rows
    or collapsed, are left out. Standard deviations over them: `weights` (k,), `means` (k, d),
    feature units, and `deviations` (k, d), those of each feature within each component;
    `log_weights` and `log_deviations` of their logarithms. NaN where fewer than two were used.

    `wins` are how often each candidate of a sweep would have had the best criterion, the most
    frequent first; empty where there was one candidate.
    """

    n_resamples: int
    n_used: int
    random_state: int
    weights: Float64[Tensor, " k"]
    log_weights: Float64[Tensor, " k"]
    means: Float64[Tensor, "k d"]
    deviations: Float64[Tensor, "k d"]
    log_deviations: Float64[Tensor, "k d"]
    wins: tuple[Win, ...] = ()

    @classmethod
    def of(
        cls, fits: list[Parameters], k: int, d: int, *, n_resamples: int, random_state: int
    ) -> Bootstrap:
        """Return the spread of the sound ones of `n_resamples` fits of k components."""
        weights = torch.stack([fit.weights for fit in fits]) if fits else torch.ones(0, k)
        means = torch.stack([fit.means for fit in fits]) if fits else torch.ones(0, k, d)
        spreads = torch.stack([fit.variances().sqrt() for fit in fits]) if fits else means
        return cls(
            n_resamples=n_resamples,
            n_used=len(fits),
            random_state=random_state,
            weights=_spread(weights),
            log_weights=_spread(weights.clamp_min(_LEAST).log()),
            means=_spread(means),
            deviations=_spread(spreads),
            log_deviations=_spread(spreads.clamp_min(_LEAST).log()),
        )

    def of_weights(self, fitted: Parameters) -> Interval:
        """Return what is known of a fit's weights (k,); intervals are normal in the logarithm."""
        return _logarithmic(fitted.weights, self.weights, self.log_weights)

    def of_means(self, fitted: Parameters) -> Interval:
        """Return what is known of a fit's means (k, d), feature units; intervals are normal."""
        reach = _NORMAL * self.means
        return Interval(error=self.means, low=fitted.means - reach, high=fitted.means + reach)

    def of_deviations(self, fitted: Parameters) -> Interval:
        """Return what is known of a fit's standard deviations (k, d), as of the weights."""
        spreads = fitted.variances().sqrt()
        return _logarithmic(spreads, self.deviations, self.log_deviations)


def _spread(values: Tensor) -> Tensor:
    """Return the standard deviation of values (n, ...) over n."""
    if len(values) < 2:
        return torch.full(values.shape[1:], torch.nan, dtype=torch.float64)
    return values.double().std(0)


def _logarithmic(estimate: Tensor, error: Tensor, log_error: Tensor) -> Interval:
    factor = (_NORMAL * log_error).exp()
    return Interval(error=error, low=estimate / factor, high=estimate * factor)

"""The criteria that rank mixtures: free parameters, BIC, AIC, ICL."""

from __future__ import annotations

import numpy as np

from gmm_dist.model.covariance import TYPE_OF


def n_parameters(covariance_type: str, n_components: int, n_features: int) -> int:
    """Return the number of free parameters of a mixture (weights, means, covariances)."""
    family = TYPE_OF[covariance_type]
    others = n_components - 1 + n_components * n_features
    return others + family.n_covariance_parameters(n_components, n_features)


def most_components(covariance_type: str, n_rows: int, n_features: int) -> int:
    """Return the most components that a ranked fit to `n_rows` rows may have; 0 for none."""
    family = TYPE_OF[covariance_type]
    if n_rows < family.least_rows_in_all(n_features):
        return 0
    return n_rows // family.least_rows(n_features)


def bic(log_likelihood: float, n_free: int, n_samples: float) -> float:
    """Return -2 ll + p ln n; `log_likelihood` is the sum in nats, n the sum of weights."""
    return -2 * log_likelihood + n_free * float(np.log(n_samples))


def aic(log_likelihood: float, n_free: int) -> float:
    """Return -2 ll + 2 p."""
    return -2 * log_likelihood + 2 * n_free


def icl(bic: float, entropy: float) -> float:
    """Return BIC + 2 E, with the soft entropy E = -Σ r ln r of the responsibilities (nats)."""
    return bic + 2 * entropy

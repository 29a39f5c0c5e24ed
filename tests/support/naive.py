"""The slow, obvious reference: Gaussian mixtures in float64, one row and one component at a time.

Nothing here is shared with the package but the value `Parameters`; formulas are the textbook's
(Bishop 2006, section 9.2), with sample weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gmm_dist.model.parameters import Parameters

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """An E-step: responsibilities (n, k), log-densities (n,), and the weighted sums."""

    resp: Array
    log_norm: Array
    log_likelihood: float
    entropy: float


def covariance_matrices(parameters: Parameters) -> Array:
    """Return one matrix per component, (k, d, d), whatever the covariance type."""
    d, values = parameters.n_features, parameters.covariances.numpy()
    matrices = []
    for k in range(parameters.n_components):
        if parameters.covariance_type == "full":
            matrices.append(values[k])
        elif parameters.covariance_type == "tied":
            matrices.append(values)
        elif parameters.covariance_type == "tied-diag":
            matrices.append(np.diag(values))
        elif parameters.covariance_type == "tied-spherical":
            matrices.append(values * np.eye(d))
        elif parameters.covariance_type == "diag":
            matrices.append(np.diag(values[k]))
        else:
            matrices.append(values[k] * np.eye(d))
    return np.array(matrices)


def weighted_log_prob(X: npt.ArrayLike, parameters: Parameters) -> Array:
    """Return log w_k + log N(x_n; k), (n, k)."""
    rows, matrices = np.asarray(X, dtype=np.float64), covariance_matrices(parameters)
    result = np.empty((len(rows), parameters.n_components))
    for n, x in enumerate(rows):
        for k, matrix in enumerate(matrices):
            centred = x - parameters.means[k].numpy()
            # By the eigenvectors: as right as can be for matrices that are nearly singular.
            variances, axes = np.linalg.eigh(matrix)
            distance = float(((centred @ axes) ** 2 / variances).sum())
            log_det = float(np.log(variances).sum())
            weight = float(parameters.weights[k])
            log_weight = math.log(weight) if weight > 0 else -math.inf
            result[n, k] = log_weight - 0.5 * (len(x) * math.log(2 * math.pi) + log_det + distance)
    return result


def e_step(
    X: npt.ArrayLike, parameters: Parameters, sample_weight: npt.ArrayLike | None = None
) -> Scores:
    """Return responsibilities and log-densities of all rows."""
    logits = weighted_log_prob(X, parameters)
    row_weights = _row_weights(len(logits), sample_weight)
    resp, log_norm = np.empty_like(logits), np.empty(len(logits))
    log_likelihood = entropy = 0.0
    for n, logit in enumerate(logits):
        largest = max(logit)
        log_norm[n] = largest + math.log(sum(math.exp(value - largest) for value in logit))
        for k, value in enumerate(logit):
            r = resp[n, k] = math.exp(value - log_norm[n])
            entropy -= row_weights[n] * r * math.log(r) if r > 0 else 0.0
        log_likelihood += row_weights[n] * log_norm[n]
    return Scores(resp=resp, log_norm=log_norm, log_likelihood=log_likelihood, entropy=entropy)


def m_step(
    X: npt.ArrayLike,
    resp: Array,
    covariance_type: str,
    *,
    reg_covar: float = 0.0,
    sample_weight: npt.ArrayLike | None = None,
) -> Parameters:
    """Return the parameters that maximise the expected log-likelihood."""
    rows = np.asarray(X, dtype=np.float64)
    (n, d), k = rows.shape, resp.shape[1]
    mass = resp * _row_weights(n, sample_weight)[:, None]
    nk, means, scatter = np.zeros(k), np.zeros((k, d)), np.zeros((k, d, d))
    for j in range(k):
        for i in range(n):
            nk[j] += mass[i, j]
            means[j] += mass[i, j] * rows[i]
        means[j] /= nk[j]
        for i in range(n):
            scatter[j] += mass[i, j] * np.outer(rows[i] - means[j], rows[i] - means[j])
    covariances = _covariances(scatter, nk, covariance_type, reg_covar)
    return Parameters(
        weights=torch.tensor(nk / nk.sum()),
        means=torch.tensor(means),
        covariances=torch.tensor(covariances),
        covariance_type=covariance_type,
    )


def _covariances(scatter: Array, nk: Array, covariance_type: str, reg_covar: float) -> Array:
    d = scatter.shape[1]
    pooled = scatter.sum(0) / nk.sum() + reg_covar * np.eye(d)
    if covariance_type == "tied":
        return pooled
    if covariance_type == "tied-diag":
        return np.diag(pooled).copy()
    if covariance_type == "tied-spherical":
        return np.array(np.trace(pooled) / d)
    each = [own / mass + reg_covar * np.eye(d) for own, mass in zip(scatter, nk, strict=True)]
    if covariance_type == "full":
        return np.array(each)
    variances = np.array([np.diag(matrix) for matrix in each])
    return variances if covariance_type == "diag" else variances.mean(1)


def em(
    X: npt.ArrayLike,
    start: Parameters,
    n_iter: int,
    *,
    reg_covar: float = 0.0,
    sample_weight: npt.ArrayLike | None = None,
) -> tuple[Parameters, list[float]]:
    """Return the parameters after `n_iter` iterations, and the log-likelihoods before each."""
    parameters, log_likelihoods = start, []
    for _ in range(n_iter):
        scores = e_step(X, parameters, sample_weight)
        log_likelihoods.append(scores.log_likelihood)
        parameters = m_step(
            X,
            scores.resp,
            start.covariance_type,
            reg_covar=reg_covar,
            sample_weight=sample_weight,
        )
    return parameters, log_likelihoods


def _row_weights(n: int, sample_weight: npt.ArrayLike | None) -> Array:
    return np.ones(n) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)

"""Learned attributes (`means_` and others): set from parameters, read back, exchanged."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gmm_dist.estimators.init_params import SEARCH
from gmm_dist.model.arrays import (
    Space,
    array_of,
    is_foreign,
    tensor_of,
)
from gmm_dist.model.covariance import TYPE_OF, CovarianceType
from gmm_dist.model.parameters import Parameters

if TYPE_CHECKING:
    from gmm_dist.estimators.base import BaseMixture


def require_class(fitted: Any, wanted: type) -> None:
    """Raise TypeError unless `fitted` is an estimator of scikit-learn's class."""
    if not isinstance(fitted, wanted):
        kind = f"{type(fitted).__module__}.{type(fitted).__qualname__}"
        raise TypeError(f"from_sklearn takes a sklearn.mixture.{wanted.__name__}, not a {kind}")


def copied(parameters: Parameters) -> Parameters:
    """Return a copy of a plain mixture's parameters."""
    return replace(
        parameters,
        weights=parameters.weights.clone(),
        means=parameters.means.clone(),
        covariances=parameters.covariances.clone(),
    )


def publish(estimator: BaseMixture, learned: Parameters, space: Space) -> None:
    """Set an estimator's attributes to a mixture's parameters, in feature units."""
    family = learned.type
    factors, _ = family.precisions_cholesky(learned.stacked_covariances)
    precisions = family.precisions(factors)
    estimator.weights_ = space.of(learned.weights)
    estimator.means_ = space.of(learned.means)
    estimator.covariances_ = space.of(learned.covariances)
    estimator.precisions_cholesky_ = space.of(family.unstacked(factors))
    estimator.precisions_ = space.of(family.unstacked(precisions))


def exchanged(source: Any, target: Any) -> Any:
    """Copy to `target` the parameters that both have, and all that `source` has learned."""
    target_params = target.get_params(deep=False)
    source_params = source.get_params(deep=False).items()
    shared = {
        name: _plain(value)
        for name, value in source_params
        if name in target_params and not _is_ours_alone(name, value)
    }
    target.set_params(**shared)
    for name, value in vars(source).items():
        if name.endswith("_") and not name.startswith("_"):
            setattr(target, name, _plain(value))
    return target


def expanded(source: BaseMixture, target: Any) -> Any:
    """Give scikit-learn's estimator a type that it knows, with a covariance for each component."""
    family = TYPE_OF[source.covariance_type]
    if family.in_sklearn == family.name:
        return target
    target.covariance_type = family.in_sklearn
    means = getattr(target, "means_", target.means_init)
    for name in ("precisions_init", "covariances_", "precisions_", "precisions_cholesky_"):
        if (value := getattr(target, name, None)) is not None:
            stack = family.stacked(tensor_of(value))
            if means is None and stack.ndim < 2:
                raise ValueError(
                    "precisions_init is one number, and scikit-learn wants one for each feature: "
                    "give means_init too, or fit"
                )
            shape = (source.n_components, *stack.shape[1:]) if means is None else np.shape(means)
            each = family.variances(stack, shape[1]).expand(shape).contiguous().numpy()
            setattr(target, name, each.astype(np.asarray(value).dtype))
    return target


def _is_ours_alone(name: str, value: Any) -> bool:
    """Say whether a parameter has a value that scikit-learn lacks; its own default stands in."""
    return name in ("n_init", "init_params") and value in (None, SEARCH)


def have_factors(family: CovarianceType, covariances: Tensor, factors: Tensor) -> bool:
    """Say whether these are the factors of the covariances' precisions, up to rounding."""
    if not bool(factors.isfinite().all()):
        return False
    expected, failed = family.precisions_cholesky(covariances)
    atol = 1e-9 * float(factors.abs().max())
    return not bool(failed.any()) and torch.allclose(expected, factors, rtol=1e-9, atol=atol)


def covariances_of(family: CovarianceType, factors: Tensor) -> Tensor:
    """Return the inverses of U Uᵀ, or of 1/σ squared."""
    covariances = family.of_factors(factors)
    _, failed = family.precisions_cholesky(covariances)
    if bool(failed.any()):
        raise ValueError(
            "precisions_cholesky_ are not the factors of positive-definite precisions, or so "
            "near to singular that float64 does not hold their inverses: raise reg_covar, or "
            "scale the features"
        )
    return covariances


def _plain(value: Any) -> Any:
    """Return a tensor or array as a NumPy copy, a list as a copy, any other value unchanged."""
    if isinstance(value, Tensor) or is_foreign(value):
        return array_of(value).copy()
    return value.copy() if isinstance(value, np.ndarray | list) else value

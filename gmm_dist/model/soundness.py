"""Check that numbers from outside, such as a file's, make a valid mixture."""

from __future__ import annotations

import torch
from torch import Tensor

from gmm_dist.model.covariance import CovarianceType
from gmm_dist.model.parameters import Parameters

# Weights stored as float32 sum to one only up to their rounding.
_SUM_TOLERANCE = 1e-6
# Times two features' standard deviations. All asymmetry comes from the rounding of sums, which a
# fit keeps below this share of a covariance's smallest eigenvalue: beyond, it centres its passes.
_ASYMMETRY = 1e-4


def flaw(mixture: Parameters) -> str | None:
    """Say what keeps parameters of the right shapes from being a mixture; None for nothing.

    A mixture has finite numbers, weights that are not negative and sum to one within 1e-6, and
    covariances that are symmetric, up to rounding, and positive definite.
    """
    return _not_finite(mixture) or _of_weights(mixture.weights) or _of_covariances(mixture)


def _not_finite(mixture: Parameters) -> str | None:
    for name in ("weights", "means", "covariances"):
        values: Tensor = getattr(mixture, name)
        if (place := _first(~values.isfinite())) is not None:
            return f"{name}{list(place)} is {float(values[place]):g}"
    if mixture.log_weights is not None and bool(mixture.log_weights.isnan().any()):
        return "a log-weight is nan"
    return None


def _of_weights(weights: Tensor) -> str | None:
    if (place := _first(weights < 0)) is not None:
        return f"component {place[0]} has the weight {float(weights[place]):g}"
    if abs((total := float(weights.sum())) - 1) > _SUM_TOLERANCE:
        return f"the weights sum to {total:.9g}, not to 1"
    return None


def _of_covariances(mixture: Parameters) -> str | None:
    family, covariances = mixture.type, mixture.stacked_covariances
    _, failed = family.precisions_cholesky(covariances)
    if (place := _first(failed)) is not None:
        wrong = "a variance that is not positive"
        if family.has_products:
            wrong = "a covariance that is not positive definite"
        return _whose(family, place[0], wrong)
    if not family.has_products:
        return None
    spread = covariances.diagonal(dim1=-2, dim2=-1).sqrt()
    room = _ASYMMETRY * spread[:, :, None] * spread[:, None, :]
    if (place := _first((covariances - covariances.mT).abs() > room)) is not None:
        c, i, j = place
        cells = f"{float(covariances[c, i, j]):g} at ({i}, {j}), {float(covariances[c, j, i]):g}"
        return _whose(family, c, f"a covariance that is not symmetric: {cells} at ({j}, {i})")
    return None


def _whose(family: CovarianceType, component: int, wrong: str) -> str:
    whose = "all components share" if family.is_shared else f"component {component} has"
    return f"{whose} {wrong}"


def _first(wrong: Tensor) -> tuple[int, ...] | None:
    """Return the index of the first wrong element, None for none."""
    if not bool(wrong.any()):
        return None
    return tuple(int(i) for i in torch.nonzero(wrong)[0])

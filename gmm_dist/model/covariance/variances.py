"""Covariances of independent features: a variance for each feature, or one for all of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gmm_dist.model.covariance.covariance_type import TINY, CovarianceType, Moments, Shared
from gmm_dist.model.covariance.features import CONSTANT_ROW


class _Independent(CovarianceType):
    """What types have that hold variances alone; their factors are 1/σ."""

    has_products = False
    validity = "positive"

    def least_rows_in_all(self, n_features: int) -> int:
        return 2

    def conditional_variances(self, covariances: Tensor, n_features: int) -> Tensor:
        return self.variances(covariances, n_features)

    def matrices(self, covariances: Tensor, n_features: int) -> Tensor:
        return self.variances(covariances, n_features).diag_embed()

    def spread(self, covariances: Tensor, n_features: int) -> Tensor:
        return self.variances(covariances, n_features)

    def scatter(self, x: Tensor, weight: Tensor) -> Tensor:
        return weight @ x.square()

    def log_det(self, covariances: Tensor, n_features: int) -> Tensor:
        return self.variances(covariances, n_features).log().sum(-1)

    def of_factors(self, factors: Tensor) -> Tensor:
        return factors.square().reciprocal()

    def of_precisions(self, precisions: Tensor) -> Tensor | None:
        return precisions.reciprocal() if bool((precisions > 0).all()) else None

    def precisions(self, factors: Tensor) -> Tensor:
        return factors.square()

    def trace(self, factor: Tensor, second: Tensor) -> Tensor:
        return (factor.square() * second).sum()


class Diag(_Independent):
    """A variance for each component and feature."""

    name = alone = in_sklearn = "diag"

    def cell(self, n_features: int) -> tuple[int, ...]:
        return (n_features,)

    def n_values(self, n_features: int) -> int:
        return n_features

    def rows(self, n_features: int) -> slice:
        return slice(CONSTANT_ROW, 2 + 2 * n_features)

    def sum_xx(self, sums: Tensor, scatter: Tensor) -> Tensor:
        return sums[1 + len(scatter) :].T

    def sums(self, nk: Tensor, sum_x: Tensor, sum_xx: Tensor) -> Tensor:
        return torch.cat([nk[:, None], sum_x, sum_xx], dim=1).T

    def covariances(self, moments: Moments, lane: Tensor) -> Tensor:
        return moments.sum_xx / moments.nk.clamp_min(TINY)[:, None] - moments.shift.square()

    def outer(self, mass: Tensor, shift: Tensor) -> Tensor:
        return mass[:, None] * shift.square()

    def regularise(self, covariances: Tensor, reg: Tensor) -> None:
        covariances += reg

    def quadratic(self, precisions: Tensor) -> Tensor:
        return -0.5 * precisions

    def variances(self, covariances: Tensor, n_features: int) -> Tensor:
        return covariances

    def precisions_cholesky(self, covariances: Tensor) -> tuple[Tensor, Tensor]:
        failed = ~((covariances > 0) & torch.isfinite(covariances)).all(-1)
        return torch.where(failed[:, None], 1.0, covariances).rsqrt(), failed

    def half_log_det(self, factors: Tensor, n_features: int) -> Tensor:
        return factors.log().sum(-1)

    def precision_times(self, precisions: Tensor, x: Tensor) -> Tensor:
        return precisions * x

    def condition(self, precisions: Tensor, second: Tensor) -> Tensor:
        return (precisions * second).amax(-1)

    def mahalanobis(self, z: Tensor, factor: Tensor) -> Tensor:
        return (z * factor[:, None]).square().sum(0)

    def coordinates(self, covariances: Tensor, scale: Tensor) -> Tensor:
        return (covariances.log() / 2 - scale.log()).flatten()

    def at(self, coordinates: Tensor, scale: Tensor) -> Tensor:
        return (2 * (coordinates.view(-1, len(scale)) + scale.log())).exp()

    def offset(self, covariance: Tensor, typical: Tensor) -> Tensor:
        step = torch.zeros_like(covariance)
        widest = int((covariance / typical).argmax())
        step[widest] = covariance[widest].sqrt()
        return step

    def narrowed(self, covariance: Tensor, step: Tensor, shift: float) -> Tensor:
        return covariance - step.square()

    def log_det_ratio(
        self, covariance: Tensor, scale: Tensor, difference: Tensor, least: float = -1.0
    ) -> Tensor:
        return torch.log1p((scale * difference.square() / covariance).clamp_min(least)).sum()


class TiedDiag(Shared, Diag):
    """A variance for each feature, shared by all components of a lane."""

    name = "tied-diag"


class Spherical(_Independent):
    """One variance for each component, the same in every direction."""

    name = alone = in_sklearn = "spherical"

    def cell(self, n_features: int) -> tuple[int, ...]:
        return ()

    def n_values(self, n_features: int) -> int:
        return 1

    def rows(self, n_features: int) -> slice:
        return slice(0, 2 + n_features)

    def sum_xx(self, sums: Tensor, scatter: Tensor) -> Tensor:
        return sums[0]

    def sums(self, nk: Tensor, sum_x: Tensor, sum_xx: Tensor) -> Tensor:
        return torch.cat([sum_xx[:, None], nk[:, None], sum_x], dim=1).T

    def covariances(self, moments: Moments, lane: Tensor) -> Tensor:
        within = moments.sum_xx / moments.nk.clamp_min(TINY) - moments.shift.square().sum(-1)
        return within / moments.sum_x.shape[1]

    def outer(self, mass: Tensor, shift: Tensor) -> Tensor:
        return mass * shift.square().mean(1)

    def regularise(self, covariances: Tensor, reg: Tensor) -> None:
        covariances += reg.mean(-1)

    def added(self, reg: Tensor) -> Tensor:
        return reg.mean().expand_as(reg)

    def quadratic(self, precisions: Tensor) -> Tensor:
        return -0.5 * precisions[:, None]

    def theta(self, constant: Tensor, linear: Tensor, precisions: Tensor) -> Tensor:
        return torch.cat([self.quadratic(precisions), constant[:, None], linear], dim=1)

    def variances(self, covariances: Tensor, n_features: int) -> Tensor:
        return covariances[:, None].expand(-1, n_features)

    def second(self, scatter: Tensor) -> Tensor:
        return scatter.sum(-1)

    def nearest(self, spread: Tensor) -> Tensor:
        return spread.mean(-1)

    def precisions_cholesky(self, covariances: Tensor) -> tuple[Tensor, Tensor]:
        failed = ~((covariances > 0) & torch.isfinite(covariances))
        return torch.where(failed, 1.0, covariances).rsqrt(), failed

    def half_log_det(self, factors: Tensor, n_features: int) -> Tensor:
        return n_features * factors.log()

    def precision_times(self, precisions: Tensor, x: Tensor) -> Tensor:
        return precisions[:, None] * x

    def condition(self, precisions: Tensor, second: Tensor) -> Tensor:
        # Every feature's rounding enters the one variance.
        return precisions * second.sum(-1)

    def mahalanobis(self, z: Tensor, factor: Tensor) -> Tensor:
        return (z * factor).square().sum(0)

    def coordinates(self, covariances: Tensor, scale: Tensor) -> Tensor:
        return (covariances.log() / 2).flatten()

    def at(self, coordinates: Tensor, scale: Tensor) -> Tensor:
        return (2 * coordinates).exp()

    def offset(self, covariance: Tensor, typical: Tensor) -> Tensor:
        step = torch.zeros_like(typical)
        step[0] = covariance.sqrt()
        return step

    def narrowed(self, covariance: Tensor, step: Tensor, shift: float) -> Tensor:
        return covariance * (1 - shift**2 / len(step))

    def log_det_ratio(
        self, covariance: Tensor, scale: Tensor, difference: Tensor, least: float = -1.0
    ) -> Tensor:
        change = (scale * difference.square().mean() / covariance).clamp_min(least)
        return len(difference) * torch.log1p(change)


class TiedSpherical(Shared, Spherical):
    """One variance for all components of a lane, the same in every direction."""

    name = "tied-spherical"
    in_sklearn = "diag"

    def covariances(self, moments: Moments, lane: Tensor) -> Tensor:
        mean_squares = moments.sum_xx / moments.sum_x.shape[1]
        return super().covariances(replace(moments, sum_xx=mean_squares), lane)

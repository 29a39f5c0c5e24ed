"""Covariance matrices: one for each component, or one for all."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.model.covariance.covariance_type import TINY, CovarianceType, Moments, Shared
from gmm_dist.model.covariance.features import (
    CONSTANT_ROW,
    n_feature_rows,
    product_pairs,
    second_moment_rows,
)


class Full(CovarianceType):
    """One covariance matrix for each component."""

    name = alone = in_sklearn = "full"
    lighter = "diag"
    has_products = True
    validity = "symmetric, positive-definite"

    def cell(self, n_features: int) -> tuple[int, ...]:
        return (n_features, n_features)

    def of_variances(self, variances: Float64[Tensor, "C d"]) -> Tensor:
        matrices: Tensor = variances.diag_embed()
        return matrices

    def n_values(self, n_features: int) -> int:
        return n_features * (n_features + 1) // 2

    def least_rows_in_all(self, n_features: int) -> int:
        return n_features + 1

    def rows(self, n_features: int) -> slice:
        return slice(CONSTANT_ROW, n_feature_rows(n_features))

    def sum_xx(self, sums: Tensor, scatter: Tensor) -> Tensor:
        d = len(scatter)
        # Rows of `sums` are gathered: many times faster than to scatter single elements.
        rows = second_moment_rows(d).to(sums.device)
        return sums[1 + d :].index_select(0, rows).T.reshape(-1, d, d)

    def sums(self, nk: Tensor, sum_x: Tensor, sum_xx: Tensor) -> Tensor:
        d = sum_x.shape[1]
        i, j = product_pairs(d)
        products = sum_xx.reshape(-1, d * d).index_select(1, (i * d + j).to(sum_xx.device))
        squares = sum_xx.diagonal(dim1=-2, dim2=-1)
        return torch.cat([nk[:, None], sum_x, squares, products], dim=1).T

    def covariances(self, moments: Moments, lane: Tensor) -> Tensor:
        shift, nk = moments.shift, moments.nk.clamp_min(TINY)
        covariances = moments.sum_xx / nk[:, None, None]
        return covariances.addcmul_(shift[:, :, None], shift[:, None, :], value=-1)

    def outer(self, mass: Tensor, shift: Tensor) -> Tensor:
        return mass[:, None, None] * shift[:, :, None] * shift[:, None, :]

    def regularise(self, covariances: Tensor, reg: Tensor) -> None:
        covariances.diagonal(dim1=-2, dim2=-1).add_(reg)

    def quadratic(self, precisions: Tensor) -> Tensor:
        d = precisions.shape[-1]
        i, j = product_pairs(d)
        halves = -0.5 * precisions.diagonal(dim1=-2, dim2=-1)
        products = precisions.reshape(-1, d * d).index_select(1, (i * d + j).to(precisions.device))
        return torch.cat([halves, products.neg_()], dim=1)

    def variances(self, covariances: Tensor, n_features: int) -> Tensor:
        variances: Tensor = covariances.diagonal(dim1=-2, dim2=-1)
        return variances

    def conditional_variances(self, covariances: Tensor, n_features: int) -> Tensor:
        factors: Tensor = torch.linalg.cholesky_ex(covariances)[0]
        return factors.diagonal(dim1=-2, dim2=-1) ** 2

    def matrices(self, covariances: Tensor, n_features: int) -> Tensor:
        return covariances

    def spread(self, covariances: Tensor, n_features: int) -> Tensor:
        return covariances

    def scatter(self, x: Tensor, weight: Tensor) -> Tensor:
        return (x.T * weight) @ x

    def log_det(self, covariances: Tensor, n_features: int) -> Tensor:
        log_dets: Tensor = torch.linalg.slogdet(covariances).logabsdet
        return log_dets

    def precisions_cholesky(self, covariances: Tensor) -> tuple[Tensor, Tensor]:
        lower, info = torch.linalg.cholesky_ex(covariances)
        diagonal = lower.diagonal(dim1=-2, dim2=-1)
        failed = (info != 0) | ~torch.isfinite(diagonal).all(-1)
        eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        if bool(failed.any()):
            lower = torch.where(failed[:, None, None], eye, lower)
        return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False).mT, failed

    def of_factors(self, factors: Tensor) -> Tensor:
        eye = torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device)
        lower = torch.linalg.solve_triangular(factors.mT, eye.expand_as(factors), upper=False)
        covariances: Tensor = lower @ lower.mT
        return covariances

    def of_precisions(self, precisions: Tensor) -> Tensor | None:
        factors, info = torch.linalg.cholesky_ex(precisions)
        if bool((info != 0).any()) or not torch.allclose(precisions, precisions.mT):
            return None
        return torch.cholesky_inverse(factors)

    def half_log_det(self, factors: Tensor, n_features: int) -> Tensor:
        return factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def precisions(self, factors: Tensor) -> Tensor:
        return factors @ factors.mT

    def precision_times(self, precisions: Tensor, x: Tensor) -> Tensor:
        return (precisions @ x[:, :, None])[:, :, 0]

    def trace(self, factor: Tensor, second: Tensor) -> Tensor:
        return ((factor.T @ second) * factor.T).sum()

    def condition(self, precisions: Tensor, second: Tensor) -> Tensor:
        # In units of the second moments first: a precision's square may leave float64's range.
        root = second.sqrt()
        scaled = precisions * root[:, :, None] * root[:, None, :]
        return scaled.square().sum((-2, -1)).sqrt()

    def mahalanobis(self, z: Tensor, factor: Tensor) -> Tensor:
        return (factor.T @ z).square().sum(0)

    def distances(self, z: Tensor, factors: Tensor) -> Tensor:
        return torch.bmm(factors.mT, z).square_().sum(1)

    def coordinates(self, covariances: Tensor, scale: Tensor) -> Tensor:
        factors = torch.linalg.cholesky(covariances) / scale[:, None]
        diagonals = factors.diagonal(dim1=-2, dim2=-1).log()
        return torch.cat([diagonals.flatten(), factors.tril(-1).flatten()])

    def at(self, coordinates: Tensor, scale: Tensor) -> Tensor:
        d = len(scale)
        n_factors = len(coordinates) // (d + d * d)
        diagonals, below = coordinates.split([n_factors * d, n_factors * d * d])
        factors = below.view(-1, d, d).tril(-1) + torch.diag_embed(diagonals.view(-1, d).exp())
        factors = factors * scale[:, None]
        covariances: Tensor = factors @ factors.mT
        return covariances

    def offset(self, covariance: Tensor, typical: Tensor) -> Tensor:
        # A column of the Cholesky factor scales with the features' units.
        step: Tensor = torch.linalg.cholesky(covariance)[:, 0]
        return step

    def narrowed(self, covariance: Tensor, step: Tensor, shift: float) -> Tensor:
        return covariance - torch.outer(step, step)

    def log_det_ratio(
        self, covariance: Tensor, scale: Tensor, difference: Tensor, least: float = -1.0
    ) -> Tensor:
        distance = difference @ torch.linalg.solve(covariance, difference)
        return torch.log1p((scale * distance).clamp_min(least))


class Tied(Shared, Full):
    """One covariance matrix shared by all components of a lane."""

    name = in_sklearn = "tied"

"""The four covariance types as exponential families.

For each type the weighted log-density of a row is linear in fixed features of the row,
`log w_k + log N(x | k) = Θ_k · φ(x)`, and the M-step needs nothing but `Σ_n r_nk φ(x_n)`.
One matrix of features serves all types, because its rows are ordered so that each type's
features are contiguous:

    row            0     1   2 .. d+1   d+2 .. 2d+1   then
    feature      ‖x‖²    1      x_i         x_i²      x_i x_j (i < j, see product_pairs)
    spherical    |-----------------|
    tied                 |---------|
    diag                 |-----------------------|
    full                 |---------------------------------------|

The shared quadratic of `tied` cancels in the responsibilities, so it is left out of φ; its
scatter Σ w x xᵀ is a constant of the data.

`precisions_cholesky` is scikit-learn's: upper triangular U with U Uᵀ = Σ⁻¹ (full, tied),
1/σ (diag, spherical).
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from gmm_dist.model.parameters import ParameterStack, lane_numbers

LOG_2PI = math.log(2 * math.pi)
NEVER = -1e30
"""The log-density of a component that has no rows: finite in float32, so nothing turns NaN."""
PRODUCT_BLOCK = 4
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Moments:
    """Sums over the rows for one stack of K components, taken about `about` (K, d).

    `nk` (K,), `sum_x` (K, d) and `sum_xx`: full (K, d, d), diag (K, d), spherical (K,); for
    tied (d, d), the scatter of all rows, or (K, d, d) when taken about the means. `about` is
    zero, the shared centre of the rows, but for the centred pass, which takes the sums about
    each component's mean.
    """

    nk: Float64[Tensor, " K"]
    sum_x: Float64[Tensor, "K d"]
    sum_xx: Float64[Tensor, ...]
    about: Float64[Tensor, "K d"]

    @property
    def shift(self) -> Float64[Tensor, "K d"]:
        """Return each component's mean less `about`; 0 where a component has no rows."""
        return self.sum_x / self.nk.clamp_min(_TINY)[:, None]


@dataclass(frozen=True, slots=True, eq=False)
class Natural:
    """A stack's natural parameters, and how far they can be trusted.

    `theta` (K, P); `failed` (K,) marks covariances that are not positive definite;
    `condition` (K,) bounds by how much the relative rounding of second moments about the
    centre is amplified in each component's covariance.
    """

    theta: Float64[Tensor, "K P"]
    failed: Bool[Tensor, " K"]
    condition: Float64[Tensor, " K"]


class CovarianceType(Protocol):
    """What the E-step, the M-step and the criteria need from a covariance type."""

    def rows(self, n_features: int) -> slice:
        """Return which rows of the feature matrix are this type's φ."""

    def n_covariance_parameters(self, n_components: int, n_features: int) -> int:
        """Return the number of free parameters in the covariances."""

    def least_rows(self, n_features: int) -> int:
        """Return how many rows a component needs to be more than an outlier.

        That many give it positive variances; for a tied covariance see `least_rows_in_all`.
        """

    def least_rows_in_all(self, n_features: int) -> int:
        """Return how many rows all components together need."""

    def moments(self, sums: Float64[Tensor, "P K"], scatter: Float64[Tensor, "d d"]) -> Moments:
        """Name the parts of the product Φ Rᵀ; `scatter` is Σ w x xᵀ, read by tied alone."""

    def covariances(self, moments: Moments, lane: Int64[Tensor, " K"]) -> Tensor:
        """Return the maximum-likelihood covariances; `lane` names each component's lane."""

    def regularise(self, covariances: Tensor, reg: Float64[Tensor, "C d"]) -> None:
        """Add `reg` to the variances in place, one value per covariance of the stack."""

    def variances(self, covariances: Tensor, n_features: int) -> Float64[Tensor, "C d"]:
        """Return the variance of each feature under each covariance."""

    def precisions_cholesky(self, covariances: Tensor) -> tuple[Tensor, Bool[Tensor, " C"]]:
        """Return the factors, and which covariances are not positive definite."""

    def half_log_det(self, factors: Tensor, n_features: int) -> Float64[Tensor, " C"]:
        """Return half the log-determinants of the precisions."""

    def precisions(self, factors: Tensor) -> Tensor:
        """Return the precisions of the factors, laid out as the covariances are."""

    def precision_times(self, precisions: Tensor, x: Float64[Tensor, "K d"]) -> Tensor:
        """Return precision times vector for each component."""

    def quadratic(self, precisions: Tensor) -> Float64[Tensor, "K Q"]:
        """Return the natural parameters of the second-degree features."""

    def condition(self, precisions: Tensor, second: Float64[Tensor, "K d"]) -> Tensor:
        """Return the norm of each precision in units of the second moments `second`."""

    def mahalanobis(self, x: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
        """Return the squared distances (n,) of rows `x` (d, n) from one component."""


def n_feature_rows(n_features: int) -> int:
    """Return the number of rows of the feature matrix that serves all types."""
    return 2 + 2 * n_features + n_features * (n_features - 1) // 2


@functools.cache
def product_pairs(n_features: int) -> tuple[Int64[Tensor, " Q"], Int64[Tensor, " Q"]]:
    """Return i and j (i < j) of the products x_i x_j, in the order of the feature matrix.

    Features come in blocks of four: each block times all features after it, then, for each of
    the six pairs of places within a block, the pairs of all blocks. So a chunk's products are
    d / 4 + 5 multiplications instead of d - 1.
    """
    d, block = n_features, PRODUCT_BLOCK
    pairs = [
        (i, j)
        for first in range(0, d - block, block)
        for i in range(first, first + block)
        for j in range(first + block, d)
    ]
    for a, b in itertools.combinations(range(block), 2):
        pairs += [(j - b + a, j) for j in range(b, d, block)]
    i, j = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    return i, j


@functools.cache
def _second_moment_rows(n_features: int) -> Int64[Tensor, " dd"]:
    """Return, for each cell of a d × d matrix, its row among the squares and products."""
    i, j = product_pairs(n_features)
    rows = torch.arange(n_features).diag()
    rows[i, j] = rows[j, i] = n_features + torch.arange(len(i))
    return rows.flatten()


def _linear_moments(sums: Tensor, d: int, first: int) -> tuple[Tensor, Tensor, Tensor]:
    sum_x = sums[first + 1 : first + 1 + d].T
    return sums[first], sum_x, torch.zeros_like(sum_x)


class Full:
    """One covariance matrix per component."""

    def rows(self, n_features: int) -> slice:
        return slice(1, n_feature_rows(n_features))

    def n_covariance_parameters(self, n_components: int, n_features: int) -> int:
        return n_components * n_features * (n_features + 1) // 2

    def least_rows(self, n_features: int) -> int:
        return n_features + 1

    def least_rows_in_all(self, n_features: int) -> int:
        return n_features + 1

    def moments(self, sums: Tensor, scatter: Tensor) -> Moments:
        d = len(scatter)
        nk, sum_x, about = _linear_moments(sums, d, 0)
        # Rows of `sums` are gathered: many times faster than to scatter single elements.
        sum_xx = sums[1 + d :].index_select(0, _second_moment_rows(d))
        return Moments(nk=nk, sum_x=sum_x, sum_xx=sum_xx.T.reshape(-1, d, d), about=about)

    def covariances(self, moments: Moments, lane: Tensor) -> Tensor:
        shift, nk = moments.shift, moments.nk.clamp_min(_TINY)
        covariances = moments.sum_xx / nk[:, None, None]
        return covariances.addcmul_(shift[:, :, None], shift[:, None, :], value=-1)

    def regularise(self, covariances: Tensor, reg: Tensor) -> None:
        covariances.diagonal(dim1=-2, dim2=-1).add_(reg)

    def variances(self, covariances: Tensor, n_features: int) -> Tensor:
        variances: Tensor = covariances.diagonal(dim1=-2, dim2=-1)
        return variances

    def precisions_cholesky(self, covariances: Tensor) -> tuple[Tensor, Tensor]:
        lower, info = torch.linalg.cholesky_ex(covariances)
        diagonal = lower.diagonal(dim1=-2, dim2=-1)
        failed = (info != 0) | ~torch.isfinite(diagonal).all(-1)
        eye = torch.eye(lower.shape[-1], dtype=lower.dtype)
        if bool(failed.any()):
            lower = torch.where(failed[:, None, None], eye, lower)
        return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False).mT, failed

    def half_log_det(self, factors: Tensor, n_features: int) -> Tensor:
        return factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def precisions(self, factors: Tensor) -> Tensor:
        return factors @ factors.mT

    def precision_times(self, precisions: Tensor, x: Tensor) -> Tensor:
        return (precisions @ x[:, :, None])[:, :, 0]

    def quadratic(self, precisions: Tensor) -> Tensor:
        d = precisions.shape[-1]
        i, j = product_pairs(d)
        halves = -0.5 * precisions.diagonal(dim1=-2, dim2=-1)
        products = precisions.reshape(-1, d * d).index_select(1, i * d + j)
        return torch.cat([halves, products.neg_()], dim=1)

    def condition(self, precisions: Tensor, second: Tensor) -> Tensor:
        # In units of the second moments first: a precision's square may leave float64's range.
        root = second.sqrt()
        scaled = precisions * root[:, :, None] * root[:, None, :]
        return scaled.square().sum((-2, -1)).sqrt()

    def mahalanobis(self, x: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
        return (factor.T @ (x - mean[:, None])).square().sum(0)


class Tied(Full):
    """One covariance matrix shared by all components of a lane."""

    def rows(self, n_features: int) -> slice:
        return slice(1, 2 + n_features)

    def n_covariance_parameters(self, n_components: int, n_features: int) -> int:
        return n_features * (n_features + 1) // 2

    def least_rows(self, n_features: int) -> int:
        return 2

    def moments(self, sums: Tensor, scatter: Tensor) -> Moments:
        nk, sum_x, about = _linear_moments(sums, len(scatter), 0)
        return Moments(nk=nk, sum_x=sum_x, sum_xx=scatter, about=about)

    def covariances(self, moments: Moments, lane: Tensor) -> Tensor:
        shift, nk = moments.shift, moments.nk
        n_lanes, d = int(lane.max()) + 1, shift.shape[1]
        zeros = nk.new_zeros(n_lanes, d, d)
        explained = nk[:, None, None] * shift[:, :, None] * shift[:, None, :]
        total = nk.new_zeros(n_lanes).index_add(0, lane, nk)
        scatter = moments.sum_xx
        if scatter.ndim == 3:
            scatter = zeros.index_add(0, lane, scatter)
        return (scatter - zeros.index_add(0, lane, explained)) / total[:, None, None]

    def quadratic(self, precisions: Tensor) -> Tensor:
        return precisions.new_zeros(len(precisions), 0)


class Diag:
    """Independent features: a variance for each component and feature."""

    def rows(self, n_features: int) -> slice:
        return slice(1, 2 + 2 * n_features)

    def n_covariance_parameters(self, n_components: int, n_features: int) -> int:
        return n_components * n_features

    def least_rows(self, n_features: int) -> int:
        return 2

    def least_rows_in_all(self, n_features: int) -> int:
        return 2

    def moments(self, sums: Tensor, scatter: Tensor) -> Moments:
        d = len(scatter)
        nk, sum_x, about = _linear_moments(sums, d, 0)
        return Moments(nk=nk, sum_x=sum_x, sum_xx=sums[1 + d :].T, about=about)

    def covariances(self, moments: Moments, lane: Tensor) -> Tensor:
        return moments.sum_xx / moments.nk.clamp_min(_TINY)[:, None] - moments.shift.square()

    def regularise(self, covariances: Tensor, reg: Tensor) -> None:
        covariances += reg

    def variances(self, covariances: Tensor, n_features: int) -> Tensor:
        return covariances

    def precisions_cholesky(self, covariances: Tensor) -> tuple[Tensor, Tensor]:
        failed = ~((covariances > 0) & torch.isfinite(covariances)).all(-1)
        return torch.where(failed[:, None], 1.0, covariances).rsqrt(), failed

    def half_log_det(self, factors: Tensor, n_features: int) -> Tensor:
        return factors.log().sum(-1)

    def precisions(self, factors: Tensor) -> Tensor:
        return factors.square()

    def precision_times(self, precisions: Tensor, x: Tensor) -> Tensor:
        return precisions * x

    def quadratic(self, precisions: Tensor) -> Tensor:
        return -0.5 * precisions

    def condition(self, precisions: Tensor, second: Tensor) -> Tensor:
        return (precisions * second).amax(-1)

    def mahalanobis(self, x: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
        return ((x - mean[:, None]) * factor[:, None]).square().sum(0)


class Spherical:
    """One variance for each component, the same in every direction."""

    def rows(self, n_features: int) -> slice:
        return slice(0, 2 + n_features)

    def n_covariance_parameters(self, n_components: int, n_features: int) -> int:
        return n_components

    def least_rows(self, n_features: int) -> int:
        return 2

    def least_rows_in_all(self, n_features: int) -> int:
        return 2

    def moments(self, sums: Tensor, scatter: Tensor) -> Moments:
        nk, sum_x, about = _linear_moments(sums, len(scatter), 1)
        return Moments(nk=nk, sum_x=sum_x, sum_xx=sums[0], about=about)

    def covariances(self, moments: Moments, lane: Tensor) -> Tensor:
        within = moments.sum_xx / moments.nk.clamp_min(_TINY) - moments.shift.square().sum(-1)
        return within / moments.sum_x.shape[1]

    def regularise(self, covariances: Tensor, reg: Tensor) -> None:
        covariances += reg.mean(-1)

    def variances(self, covariances: Tensor, n_features: int) -> Tensor:
        return covariances[:, None].expand(-1, n_features)

    def precisions_cholesky(self, covariances: Tensor) -> tuple[Tensor, Tensor]:
        failed = ~((covariances > 0) & torch.isfinite(covariances))
        return torch.where(failed, 1.0, covariances).rsqrt(), failed

    def half_log_det(self, factors: Tensor, n_features: int) -> Tensor:
        return n_features * factors.log()

    def precisions(self, factors: Tensor) -> Tensor:
        return factors.square()

    def precision_times(self, precisions: Tensor, x: Tensor) -> Tensor:
        return precisions[:, None] * x

    def quadratic(self, precisions: Tensor) -> Tensor:
        return -0.5 * precisions[:, None]

    def condition(self, precisions: Tensor, second: Tensor) -> Tensor:
        # Every feature's rounding enters the one variance.
        return precisions * second.sum(-1)

    def mahalanobis(self, x: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
        return ((x - mean[:, None]) * factor).square().sum(0)


TYPE_OF: dict[str, CovarianceType] = {
    "full": Full(),
    "tied": Tied(),
    "diag": Diag(),
    "spherical": Spherical(),
}
"""The implementation of each of `COVARIANCE_TYPES`."""


def log_weights(stack: ParameterStack) -> Float64[Tensor, " K"]:
    """Return the logarithms of the mixing weights, with `NEVER` in place of -inf."""
    logs = stack.weights.log() if stack.log_weights is None else stack.log_weights
    return logs.clamp_min(NEVER)


def natural(stack: ParameterStack) -> Natural:
    """Return Θ with `log w_k + log N(x | k) = Θ_k · φ(x)`, of means about the shared centre."""
    family, d = TYPE_OF[stack.covariance_type], stack.means.shape[1]
    factors, failed = family.precisions_cholesky(stack.covariances)
    half_log_det = stack.per_component(family.half_log_det(factors, d))
    variances = stack.per_component(family.variances(stack.covariances, d))
    failed = stack.per_component(failed)
    precisions = stack.per_component(family.precisions(factors))
    linear = family.precision_times(precisions, stack.means)
    constant = log_weights(stack) + half_log_det - 0.5 * d * LOG_2PI
    constant = constant - 0.5 * (stack.means * linear).sum(-1)
    parts = [constant[:, None], linear, family.quadratic(precisions)]
    if stack.covariance_type == "spherical":  # its ‖x‖² stands before the others
        parts = [parts[2], parts[0], parts[1]]
    condition = family.condition(precisions, stack.means.square() + variances.clamp_min(0))
    return Natural(torch.cat(parts, dim=1), failed, condition)


def maximise(
    covariance_type: str, moments: Moments, sizes: tuple[int, ...], reg: Float64[Tensor, "K d"]
) -> ParameterStack:
    """Return the parameters that maximise the expected log-likelihood (the M-step).

    `reg` (K, d), squared feature units, is added to a component's variances (spherical: its
    mean over the features); tied takes that of each lane's first component.
    """
    family = TYPE_OF[covariance_type]
    lane = lane_numbers(sizes)
    covariances = family.covariances(moments, lane)
    if covariance_type == "tied":
        first = torch.tensor((0, *sizes[:-1])).cumsum(0)
        reg = reg[first]
    family.regularise(covariances, reg)
    total = moments.nk.new_zeros(len(sizes)).index_add(0, lane, moments.nk)
    return ParameterStack(
        weights=moments.nk / total[lane],
        means=moments.about + moments.shift,
        covariances=covariances,
        covariance_type=covariance_type,
        sizes=sizes,
    )

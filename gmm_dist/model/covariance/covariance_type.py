"""What a covariance type is: the interface, and what types with one shared covariance have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from gmm_dist.model.covariance.features import CONSTANT_ROW

TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Moments:
    """Sums over the rows for one stack of K components, taken about `about` (K, d).

    `nk` (K,), `sum_x` (K, d) and `sum_xx`: (K, d, d) where features are correlated, (K, d) of
    independent ones, (K,), their sum, for a single variance. Where `is_total`, `sum_xx` has no
    axis K: it is that of all rows, for components that share a covariance. `about` is zero,
    the shared centre of the rows, but for the centred pass, which takes the sums about each
    component's mean.
    """

    nk: Float64[Tensor, " K"]
    sum_x: Float64[Tensor, "K d"]
    sum_xx: Float64[Tensor, ...]
    about: Float64[Tensor, "K d"]
    is_total: bool = False

    @property
    def shift(self) -> Float64[Tensor, "K d"]:
        """Return each component's mean less `about`; 0 where a component has no rows."""
        return self.sum_x / self.nk.clamp_min(TINY)[:, None]


class CovarianceType(ABC):
    """All that depends on a covariance type.

    A stack holds C covariances, (C, *cell): one for each of its K components, or, where those
    of a lane share theirs, one for each lane. A mixture in public has (k, *cell), or (*cell)
    where it is shared. The spread of rows is their covariance matrix, or the variances alone
    of a type that takes features for independent.
    """

    name: ClassVar[str]
    # The type of one component by itself, which the centred pass takes the moments of too.
    alone: ClassVar[str]
    # scikit-learn's type that can say the same.
    in_sklearn: ClassVar[str]
    # The type of a mixture of like clusters that needs far fewer rows for each, if there is one.
    lighter: ClassVar[str | None] = None
    # Whether features are correlated, so that products of two of them are needed.
    has_products: ClassVar[bool]
    # Whether all components of a lane share one covariance.
    is_shared: ClassVar[bool] = False
    # What valid precisions and covariances are called.
    validity: ClassVar[str]

    @abstractmethod
    def cell(self, n_features: int) -> tuple[int, ...]:
        """Return the shape of one covariance."""

    def shape(self, n_components: int, n_features: int) -> tuple[int, ...]:
        """Return the shape of a mixture's covariances in public and in files."""
        cell = self.cell(n_features)
        return cell if self.is_shared else (n_components, *cell)

    def stacked(self, covariances: Tensor) -> Tensor:
        """Return a mixture's covariances, or what is laid out like them, as a stack (C, *cell)."""
        return covariances[None] if self.is_shared else covariances

    def unstacked(self, covariances: Tensor) -> Tensor:
        """Return the stack of one mixture in its public shape."""
        return covariances[0] if self.is_shared else covariances

    def of_variances(self, variances: Float64[Tensor, "C d"]) -> Tensor:
        """Return covariances of features that are not correlated; of types with a `lighter` one."""
        raise NotImplementedError

    # Counting.

    @abstractmethod
    def n_values(self, n_features: int) -> int:
        """Return the number of free parameters of one covariance."""

    def n_covariance_parameters(self, n_components: int, n_features: int) -> int:
        """Return the number of free parameters in a mixture's covariances."""
        return self.n_values(n_features) * (1 if self.is_shared else n_components)

    @abstractmethod
    def least_rows_in_all(self, n_features: int) -> int:
        """Return how many rows give one covariance positive variances."""

    def least_rows(self, n_features: int) -> int:
        """Return how many rows a component needs to be more than an outlier."""
        return 2 if self.is_shared else self.least_rows_in_all(n_features)

    # The E-step and the M-step.

    @abstractmethod
    def rows(self, n_features: int) -> slice:
        """Return which rows of the feature matrix are this type's φ."""

    def n_rows(self, n_features: int) -> int:
        """Return the length of this type's φ."""
        rows = self.rows(n_features)
        n: int = rows.stop - rows.start
        return n

    def moments(self, sums: Float64[Tensor, "P K"], scatter: Float64[Tensor, ...]) -> Moments:
        """Name the parts of the product Φ Rᵀ.

        `scatter`, Σ w x xᵀ of all rows or its diagonal, is read by types with a shared covariance.
        """
        d = len(scatter)
        constant = CONSTANT_ROW - self.rows(d).start
        sum_x = sums[constant + 1 : constant + 1 + d].T
        return Moments(
            nk=sums[constant],
            sum_x=sum_x,
            sum_xx=self.sum_xx(sums, scatter),
            about=torch.zeros_like(sum_x),
            is_total=self.is_shared,
        )

    @abstractmethod
    def sum_xx(self, sums: Tensor, scatter: Tensor) -> Tensor:
        """Return the second moments among the sums of a pass, as `Moments` has them."""

    @abstractmethod
    def sums(
        self, nk: Float64[Tensor, " K"], sum_x: Float64[Tensor, "K d"], sum_xx: Tensor
    ) -> Float64[Tensor, "P K"]:
        """Return moments of components that share nothing in the order of the rows of φ."""

    @abstractmethod
    def covariances(self, moments: Moments, lane: Int64[Tensor, " K"]) -> Tensor:
        """Return the maximum-likelihood covariances; `lane` names each component's lane."""

    @abstractmethod
    def outer(self, mass: Float64[Tensor, " K"], shift: Float64[Tensor, "K d"]) -> Tensor:
        """Return `mass` times the covariance (K, *cell) that a shift of the mean stands for."""

    @abstractmethod
    def regularise(self, covariances: Tensor, reg: Float64[Tensor, "C d"]) -> None:
        """Add `reg` to the variances in place, one value per covariance of the stack."""

    def added(self, reg: Float64[Tensor, " d"]) -> Float64[Tensor, " d"]:
        """Return what `regularise` adds to the variance of each feature."""
        return reg

    @abstractmethod
    def quadratic(self, precisions: Tensor) -> Float64[Tensor, "K Q"]:
        """Return the natural parameters of the second-degree features."""

    def theta(
        self, constant: Float64[Tensor, " K"], linear: Float64[Tensor, "K d"], precisions: Tensor
    ) -> Float64[Tensor, "K P"]:
        """Return the natural parameters in the order of the rows of φ."""
        return torch.cat([constant[:, None], linear, self.quadratic(precisions)], dim=1)

    def left_out(self, covariances: Tensor, scatter: Float64[Tensor, ...]) -> float:
        """Return what Θ φ leaves out of a lane's Σ w log p, nats; `scatter` is of all rows."""
        return 0.0

    # One covariance, and many, in other forms.

    @abstractmethod
    def variances(self, covariances: Tensor, n_features: int) -> Float64[Tensor, "C d"]:
        """Return the variance of each feature under each covariance."""

    @abstractmethod
    def conditional_variances(self, covariances: Tensor, n_features: int) -> Float64[Tensor, "C d"]:
        """Return the variance of each feature given those before it."""

    @abstractmethod
    def matrices(self, covariances: Tensor, n_features: int) -> Float64[Tensor, "C d d"]:
        """Return each covariance as a matrix (a view, if it can be)."""

    @abstractmethod
    def spread(self, covariances: Tensor, n_features: int) -> Float64[Tensor, "C ..."]:
        """Return the matrices, or the variances of independent features."""

    @abstractmethod
    def scatter(self, x: Float64[Tensor, "n d"], weight: Float64[Tensor, " n"]) -> Tensor:
        """Return Σ w x xᵀ (d, d), or its diagonal (d,) for independent features."""

    def second(self, scatter: Tensor) -> Tensor:
        """Return scatters (..., d, d) or (..., d) as `Moments.sum_xx` has them."""
        return scatter

    def nearest(self, spread: Tensor) -> Tensor:
        """Return the covariances (..., *cell) for spreads (..., d, d) or (..., d)."""
        return spread

    @abstractmethod
    def log_det(self, covariances: Tensor, n_features: int) -> Float64[Tensor, " C"]:
        """Return the logarithms of the determinants."""

    @abstractmethod
    def precisions_cholesky(self, covariances: Tensor) -> tuple[Tensor, Bool[Tensor, " C"]]:
        """Return the factors, and which covariances are not positive definite."""

    @abstractmethod
    def of_factors(self, factors: Tensor) -> Tensor:
        """Return the covariances of `precisions_cholesky`'s factors."""

    @abstractmethod
    def of_precisions(self, precisions: Tensor) -> Tensor | None:
        """Return the inverses of precisions in their public shape; None unless all are valid."""

    @abstractmethod
    def half_log_det(self, factors: Tensor, n_features: int) -> Float64[Tensor, " C"]:
        """Return half the log-determinants of the precisions."""

    @abstractmethod
    def precisions(self, factors: Tensor) -> Tensor:
        """Return the precisions of the factors, laid out as the covariances are."""

    @abstractmethod
    def precision_times(self, precisions: Tensor, x: Float64[Tensor, "K d"]) -> Tensor:
        """Return precision times vector for each component."""

    @abstractmethod
    def trace(self, factor: Tensor, second: Tensor) -> Float64[Tensor, ""]:
        """Return tr(Σ⁻¹ S) for one factor; `second` is the scatter S as `second` has it."""

    @abstractmethod
    def condition(self, precisions: Tensor, second: Float64[Tensor, "K d"]) -> Tensor:
        """Return the norm of each precision in units of the second moments `second`."""

    @abstractmethod
    def mahalanobis(self, z: Tensor, factor: Tensor) -> Tensor:
        """Return the squared distances (n,) of rows less one component's mean, `z` (d, n)."""

    def distances(self, z: Tensor, factors: Tensor) -> Tensor:
        """Return `mahalanobis` (B, n) of rows less each of B components' means, `z` (B, d, n)."""
        shaped = factors.view(len(factors), -1, 1)
        distances: Tensor = (z * shaped).square_().sum(1)
        return distances

    # SQUAREM's leaps.

    @abstractmethod
    def coordinates(self, covariances: Tensor, scale: Float64[Tensor, " d"]) -> Tensor:
        """Return public covariances as a vector of which every value is valid.

        Logarithms of standard deviations, in units of `scale`; of correlated features those on
        the diagonal of the Cholesky factors, and then what is below it.
        """

    @abstractmethod
    def at(self, coordinates: Tensor, scale: Float64[Tensor, " d"]) -> Tensor:
        """Return the stack of covariances at such coordinates."""

    # Moves of the search.

    def merged(
        self,
        covariances: Tensor,
        pair: Int64[Tensor, " 2"],
        share: Float64[Tensor, " 2"],
        shift: Float64[Tensor, "2 d"],
    ) -> Tensor:
        """Return the covariance of two components together.

        Args:
            covariances: The stack of their mixture.
            pair: Which components.
            share: What each has of their joint weight.
            shift: Their means less the joint one.
        """
        within: Tensor = torch.tensordot(share, covariances[pair], 1)
        return within + self.nearest(self.scatter(shift, share))

    @abstractmethod
    def offset(self, covariance: Tensor, typical: Float64[Tensor, " d"]) -> Float64[Tensor, " d"]:
        """Return a step of one standard deviation along which to halve a component.

        `typical` are the variances of components like it.
        """

    @abstractmethod
    def narrowed(self, covariance: Tensor, step: Float64[Tensor, " d"], shift: float) -> Tensor:
        """Return the covariance of halves that lie `step` to either side of their mean.

        That is `shift` times `offset`. Together they have the covariance given; a shared one
        stays as it is.
        """

    @abstractmethod
    def log_det_ratio(
        self,
        covariance: Tensor,
        scale: Tensor,
        difference: Float64[Tensor, " d"],
        least: float = -1.0,
    ) -> Tensor:
        """Return ln(|Σ + s δ δᵀ| / |Σ|) for one covariance, δ δᵀ as this type can have it.

        Args:
            covariance: Σ.
            scale: s.
            difference: δ.
            least: The lowest that a variance may change by, as a share of itself.
        """


class Shared(CovarianceType):
    """What types have of which all components of a lane share one covariance.

    The quadratic form is the same for all components: it cancels in the responsibilities, so it
    is left out of φ, and its scatter Σ w x xᵀ is a constant of the data.
    """

    is_shared = True

    def rows(self, n_features: int) -> slice:
        return slice(CONSTANT_ROW, CONSTANT_ROW + 1 + n_features)

    def sum_xx(self, sums: Tensor, scatter: Tensor) -> Tensor:
        return self._second_of_all(scatter)

    def covariances(self, moments: Moments, lane: Tensor) -> Tensor:
        nk, n_lanes = moments.nk, int(lane.max()) + 1
        explained = self.outer(nk, moments.shift)
        zeros = explained.new_zeros(n_lanes, *explained.shape[1:])
        total = nk.new_zeros(n_lanes).index_add(0, lane, nk)
        scatter = moments.sum_xx
        if not moments.is_total:
            scatter = zeros.index_add(0, lane, scatter)
        within: Tensor = scatter - zeros.index_add(0, lane, explained)
        return within / total.view(-1, *[1] * (zeros.ndim - 1))

    def theta(self, constant: Tensor, linear: Tensor, precisions: Tensor) -> Tensor:
        return torch.cat([constant[:, None], linear], dim=1)

    def left_out(self, covariances: Tensor, scatter: Tensor) -> float:
        factors, _ = self.precisions_cholesky(self.stacked(covariances))
        return -0.5 * float(self.trace(factors[0], self._second_of_all(scatter)))

    def merged(self, covariances: Tensor, pair: Tensor, share: Tensor, shift: Tensor) -> Tensor:
        shared: Tensor = covariances[0]
        return shared

    def narrowed(self, covariance: Tensor, step: Tensor, shift: float) -> Tensor:
        return covariance

    def _second_of_all(self, scatter: Tensor) -> Tensor:
        whole = self.has_products or scatter.ndim == 1
        return self.second(scatter if whole else scatter.diagonal())

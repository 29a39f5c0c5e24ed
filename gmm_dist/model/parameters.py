"""A mixture's weights, means and covariances, in float64; and many of them as one stack."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from gmm_dist.model.covariance import TYPE_OF, CovarianceType


@dataclass(frozen=True, eq=False, kw_only=True)
class Parameters:
    """Hold the parameters of one Gaussian mixture.

    Shapes (k components, d features), all float64, on the CPU but for a fit under way on a GPU:

    - `weights` (k,): mixing weights, sum to one;
    - `means` (k, d), in feature units;
    - `covariances`, in squared feature units: full (k, d, d), tied (d, d), diag (k, d),
      spherical (k,), as in scikit-learn; tied-diag (d,), tied-spherical ();
    - `log_weights` (k,): the expected log-weights of a posterior over mixtures (see
      `variational`), which densities use in place of ln `weights`; None for a plain mixture.
    """

    weights: Float64[Tensor, " k"]
    means: Float64[Tensor, "k d"]
    covariances: Float64[Tensor, ...]
    covariance_type: str
    log_weights: Float64[Tensor, " k"] | None = None

    @property
    def n_components(self) -> int:
        return self.weights.shape[0]

    @property
    def n_features(self) -> int:
        return self.means.shape[1]

    @property
    def type(self) -> CovarianceType:
        return TYPE_OF[self.covariance_type]

    @property
    def stacked_covariances(self) -> Float64[Tensor, "c ..."]:
        """The covariances with an axis to number them: one for each component, or one for all."""
        return self.type.stacked(self.covariances)

    def to(self, device: torch.device) -> Parameters:
        """Return the parameters on a device."""
        if self.means.device == device:
            return self
        return replace(
            self,
            weights=self.weights.to(device),
            means=self.means.to(device),
            covariances=self.covariances.to(device),
            log_weights=None if self.log_weights is None else self.log_weights.to(device),
        )

    def shifted(self, offset: Float64[Tensor, " d"]) -> Parameters:
        """Return the same mixture of rows that were moved by `offset` (feature units)."""
        return replace(self, means=self.means + offset)

    def covariance_matrices(self) -> Float64[Tensor, "k d d"]:
        """Return each component's covariance as a matrix, whatever the type (a view, if it can)."""
        matrices = self.type.matrices(self.stacked_covariances, self.n_features)
        return matrices.expand(self.n_components, -1, -1)

    def variances(self) -> Float64[Tensor, "k d"]:
        """Return each component's variance of each feature, whatever the type."""
        return self.type.variances(self.stacked_covariances, self.n_features).expand_as(self.means)


def of_lanes(values: Tensor, sizes: Sequence[int], dim: int = 0) -> Sequence[Tensor]:
    """Return each lane's part of `values` along `dim` (views); `sizes` are their lengths."""
    # Most calls at small shapes are for one lane, and torch's own takes as long as a product.
    return (values,) if len(sizes) == 1 else values.split(list(sizes), dim)


@functools.lru_cache(maxsize=64)
def lane_numbers(sizes: tuple[int, ...]) -> Int64[Tensor, " K"]:
    """Return the number of each component's lane; `sizes` are the lanes' components."""
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


@dataclass(frozen=True, eq=False, kw_only=True)
class ParameterStack:
    """Hold the parameters of L mixtures of one covariance type, component after component.

    K is the number of components of all lanes together: `weights` (K,), `means` (K, d),
    `covariances` as in `Parameters` with K in place of k, and (L, ...) where components share
    one; `log_weights` (K,) if the lanes have them.
    """

    weights: Float64[Tensor, " K"]
    means: Float64[Tensor, "K d"]
    covariances: Float64[Tensor, ...]
    covariance_type: str
    sizes: tuple[int, ...]
    log_weights: Float64[Tensor, " K"] | None = None

    @classmethod
    def of(cls, lanes: Sequence[Parameters]) -> ParameterStack:
        """Stack mixtures of one covariance type."""
        if len(lanes) == 1:
            return cls._of_one(lanes[0])
        covariance_type = lanes[0].covariance_type
        log_weights = [lane.log_weights for lane in lanes if lane.log_weights is not None]
        assert len(log_weights) in (0, len(lanes)), "lanes with and without log_weights"
        return cls(
            weights=torch.cat([lane.weights for lane in lanes]),
            means=torch.cat([lane.means for lane in lanes]),
            covariances=torch.cat([lane.stacked_covariances for lane in lanes]),
            covariance_type=covariance_type,
            sizes=tuple(lane.n_components for lane in lanes),
            log_weights=torch.cat(log_weights) if log_weights else None,
        )

    @classmethod
    def _of_one(cls, lane: Parameters) -> ParameterStack:
        """Return the stack of a single mixture without copying it: most calls at small shapes."""
        return cls(
            weights=lane.weights,
            means=lane.means,
            covariances=lane.stacked_covariances,
            covariance_type=lane.covariance_type,
            sizes=(lane.n_components,),
            log_weights=lane.log_weights,
        )

    @property
    def type(self) -> CovarianceType:
        return TYPE_OF[self.covariance_type]

    @property
    def lane_of_component(self) -> Int64[Tensor, " K"]:
        return lane_numbers(self.sizes)

    def per_component(self, values: Tensor) -> Tensor:
        """Return one value per component from values that come one per covariance."""
        return values[self.lane_of_component] if self.type.is_shared else values

    def unshared(self) -> ParameterStack:
        """Return the same mixtures as ones whose components share no covariance."""
        covariances, kind = self.per_component(self.covariances), self.type.alone
        return replace(self, covariances=covariances, covariance_type=kind)

    def lanes(self) -> list[Parameters]:
        """Return the mixtures, one by one (views)."""
        sizes = self.sizes
        counts = [1] * len(sizes) if self.type.is_shared else sizes
        covariances = map(self.type.unstacked, of_lanes(self.covariances, counts))
        logs: Sequence[Tensor | None] = [None] * len(sizes)
        if self.log_weights is not None:
            logs = of_lanes(self.log_weights, sizes)
        weights, means = of_lanes(self.weights, sizes), of_lanes(self.means, sizes)
        parts = zip(weights, means, covariances, logs, strict=True)
        return [
            Parameters(
                weights=w,
                means=m,
                covariances=c,
                covariance_type=self.covariance_type,
                log_weights=log,
            )
            for w, m, c, log in parts
        ]

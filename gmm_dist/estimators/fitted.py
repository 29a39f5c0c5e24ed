"""Use the mixture that an estimator has learned: labels, densities, samples, scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from gmm_dist.config import Cluster
from gmm_dist.estimators.attributes import copied, covariances_of, have_factors
from gmm_dist.estimators.settings import require_cluster, require_no_cluster
from gmm_dist.lake.lake import Lake
from gmm_dist.model.arrays import (
    Array,
    Rows,
    Space,
    array_of,
    checked,
    is_foreign,
    mean_of,
    require_rows_in_memory,
    space_of,
    tensor_of,
    viewed,
)
from gmm_dist.model.covariance import TYPE_OF, CovarianceType
from gmm_dist.model.mixture import Mixture, labels, log_densities, responsibilities
from gmm_dist.model.parameters import Parameters
from gmm_dist.model.soundness import flaw
from gmm_dist.shards.local import one_thread

if TYPE_CHECKING:
    from gmm_dist.fitting.lake_scores import LakeScores

_FEW_VALUES = 1 << 17
_MOST_WEIGHT = 1 + 1e-12  # that NumPy takes for all components but the last


class FittedMixture(DensityMixin, BaseEstimator):  # type: ignore[misc]
    """What both estimators offer once they are fitted."""

    covariance_type: str
    random_state: Any

    weights_: Any
    means_: Any
    covariances_: Any
    precisions_: Any
    precisions_cholesky_: Any
    n_features_in_: int
    feature_names_in_: Array
    # Of the fit: the sum of the weights, and the sum of w log p (nats).
    _n_samples: float
    _log_likelihood: float

    def predict(self, X: Any) -> Any:
        """Return the component of largest responsibility for each row, (n,) int64."""
        return self._of_rows(X, labels)

    def predict_proba(self, X: Any) -> Any:
        """Return the responsibilities, (n, k), each row summing to one."""
        return self._of_rows(X, responsibilities)

    def score_samples(self, X: Any) -> Any:
        """Return the log-density (nats) of each row, (n,)."""
        return self._of_rows(X, log_densities)

    def score(self, X: Any, y: object = None, *, cluster: Cluster | None = None) -> float:
        """Return the mean log-density (nats) of the rows.

        Args:
            X: rows (n, d) in memory, or a `gmm_dist.Lake`, whose weights are honoured and whose
                held-out rows play no part.
            y: is ignored.
            cluster: who reads and scores a lake's rows, as for `fit`.
        """
        if isinstance(X, Lake):
            return float(self._lake_scores(X, cluster).score)
        require_no_cluster(cluster)
        return mean_of(self.score_samples(X))

    def sample(self, n_samples: int = 1) -> tuple[Any, Any]:
        """Return rows (n, d), float64, drawn from the mixture, and their components (n,).

        With one `random_state` the rows are scikit-learn's. Raises ValueError for n < 1.
        """
        check_is_fitted(self)
        if n_samples < 1:
            raise ValueError(
                f"Invalid value for 'n_samples': {n_samples} . The sampling requires at least "
                "one sample."
            )
        # The covariances as they are published: scikit-learn draws from those.
        mixture = replace(self._parameters(), covariances=tensor_of(self.covariances_))
        X, y = _drawn(mixture, n_samples, check_random_state(self.random_state))
        space = replace(self._space(), dtype=torch.float64)
        return space.of(torch.from_numpy(X)), space.of(torch.from_numpy(y))

    def to_mixture(self) -> Mixture:
        """Return the mixture that was learned, as `gmm_dist.load` returns those of files.

        Its numbers are copies of `weights_`, `means_` and `covariances_`, in float64. A fit of
        ours adds `n_samples`, the sum of the weights, and `log_likelihood`: for a lake, and with
        `init_params="search"`, that of these parameters, else that of the last pass, one step
        before them.
        Raises NotFittedError.

        >>> from gmm_dist import GaussianMixture
        >>> GaussianMixture().fit([[0.0], [2.0]]).to_mixture().parameters.means
        tensor([[1.]], dtype=torch.float64)
        """
        check_is_fitted(self)
        # The published attributes: for a posterior, the plain mixture of its expectations.
        learned = FittedMixture._parameters(self)
        return Mixture(
            parameters=copied(learned),
            feature_names=tuple(str(name) for name in getattr(self, "feature_names_in_", ())),
            n_samples=getattr(self, "_n_samples", math.nan),
            log_likelihood=getattr(self, "_log_likelihood", math.nan),
        )

    @property
    def _type(self) -> CovarianceType:
        return TYPE_OF[self.covariance_type]

    def _parameters(self) -> Parameters:
        """Return the learned mixture, which densities use."""
        means = tensor_of(self.means_)
        return Parameters(
            weights=tensor_of(self.weights_),
            means=means,
            covariances=self._covariances(),
            covariance_type=self.covariance_type,
        )

    def _require_sound(self) -> None:
        """Raise ValueError where learned numbers from elsewhere are not those of a mixture."""
        if not all(hasattr(self, name) for name in ("weights_", "means_", "precisions_cholesky_")):
            return
        shapes = [np.shape(array_of(value)) for value in (self.weights_, self.means_)]
        if len(shapes[1]) != 2 or shapes[0] != shapes[1][:1]:
            raise ValueError(f"weights_ and means_ have shapes {shapes}, not (k,) and (k, d)")
        if (what := flaw(self._parameters())) is not None:
            raise ValueError(f"what was learned is no mixture: {what}; fit anew")

    def _covariances(self) -> Tensor:
        """Return the covariances of `precisions_cholesky_`, in float64.

        Published as float32, covariances may round to singular ones; factors do not. Where
        `covariances_` have these factors, they are returned unchanged.
        """
        family, (k, d) = self._type, tensor_of(self.means_).shape
        factors = tensor_of(self.precisions_cholesky_)
        shape = family.shape(k, d)
        if factors.shape != shape:
            raise ValueError(
                f"precisions_cholesky_ has shape {tuple(factors.shape)}, not {shape}, that of "
                f"{k} {family.name} covariances of {d} features: fit anew, without warm_start"
            )
        factors = family.stacked(factors)
        if hasattr(self, "covariances_"):
            covariances = tensor_of(self.covariances_)
            if covariances.shape == shape and have_factors(
                family, covariances.view(factors.shape), factors
            ):
                return covariances
        return covariances_of(family, factors).view(shape)

    def _lake_scores(self, lake: Lake, cluster: Cluster | None) -> LakeScores:
        # Only here are Ray and pyarrow needed: they would be most of the time of an import.
        from gmm_dist.fitting.lake_scores import scores_of_lake

        check_is_fitted(self)
        require_cluster(cluster)
        names = tuple(str(name) for name in getattr(self, "feature_names_in_", ()))
        return scores_of_lake(
            lake, Mixture(parameters=self._parameters(), feature_names=names), cluster=cluster
        )

    def _of_rows(self, X: Any, verb: Callable[[Parameters, Rows], Tensor]) -> Any:
        check_is_fitted(self)
        require_rows_in_memory(X)
        rows = checked(self, X, reset=False)
        tensor = viewed(rows)
        mixture = self._parameters()
        # Waking other threads costs more than scoring a few rows.
        with one_thread() if tensor.numel() < _FEW_VALUES else nullcontext():
            return space_of(X, rows).of(verb(mixture, tensor))

    def _name_features(self, n_features: int, names: Sequence[str]) -> None:
        """Set the number and names of features where `checked` has not seen the rows."""
        self.n_features_in_ = n_features
        if names:
            self.feature_names_in_ = np.array(names, dtype=object)
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_  # those of an earlier fit

    def _space(self) -> Space:
        means = self.means_
        return space_of(means, from_dlpack(means) if is_foreign(means) else means)


def _drawn(mixture: Parameters, n_samples: int, rng: np.random.RandomState) -> tuple[Array, Array]:
    """Draw rows and components in scikit-learn's order, from the same random numbers."""
    family, d = mixture.type, mixture.n_features
    spread = family.spread(mixture.stacked_covariances, d)
    spreads = spread.expand(mixture.n_components, *spread.shape[1:]).numpy()
    weights = mixture.weights.numpy()
    if weights[:-1].sum() > _MOST_WEIGHT:  # those of float32 rows sum to one up to its rounding
        weights = weights / weights.sum()
    counts = rng.multinomial(n_samples, weights)
    parts = []
    for mean, spread_of_one, n in zip(mixture.means.numpy(), spreads, counts, strict=True):
        if family.has_products:
            parts.append(rng.multivariate_normal(mean, spread_of_one, int(n)))
        else:
            parts.append(mean + rng.standard_normal(size=(n, d)) * np.sqrt(spread_of_one))
    return np.vstack(parts), np.repeat(np.arange(len(counts)), counts)

"""A fitted mixture put to use: densities, labels, samples and criteria of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.errors import UserError
from gmm_dist.families import Densities, n_parameters
from gmm_dist.parameters import Parameters, Stack
from gmm_dist.quantiles import Quantiles

Array = npt.NDArray[Any]
Rows = TypeVar("Rows", Array, Tensor)

_CHUNK_ELEMENTS = 1 << 22  # of log-densities at a time


@dataclass(frozen=True, eq=False)
class Mixture:
    """Score rows under a mixture; arrays in, arrays out, tensors in, tensors out.

    Rows are (n, d) in the feature units of the fit, in the order of `feature_names`. All
    arithmetic is float64 and centred per component, on the rows' device; results are float64
    and nats. `n_samples` and `log_likelihood` (sum, nats) are those of the fit, and so are
    `log_density_quantiles`, of the rows' log-densities; None for a model that keeps none.
    `ids` are the numbers that the components keep from night to night; None where they have none.
    """

    parameters: Parameters
    feature_names: tuple[str, ...] = ()
    n_samples: float = float("nan")
    log_likelihood: float = float("nan")
    log_density_quantiles: Quantiles | None = None
    ids: tuple[int, ...] | None = None

    @property
    def component_ids(self) -> tuple[int, ...]:
        """The components' numbers, in their order: `ids`, or else 0 to k - 1."""
        return tuple(range(self.n_components)) if self.ids is None else self.ids

    @property
    def n_components(self) -> int:
        return self.parameters.n_components

    @property
    def n_features(self) -> int:
        return self.parameters.n_features

    @property
    def covariance_type(self) -> str:
        return self.parameters.covariance_type

    @property
    def n_parameters(self) -> int:
        """The number of free parameters."""
        return n_parameters(self.covariance_type, self.n_components, self.n_features)

    def predict(self, X: Rows) -> Rows:
        """Return the component of largest responsibility for each row, (n,) int64."""
        labels = [logits.argmax(0) for logits in self._chunks(X)]
        return _like(X, torch.cat(labels))

    def predict_proba(self, X: Rows) -> Rows:
        """Return the responsibilities, (n, k), each row summing to one."""
        return _like(X, torch.cat([logits.softmax(0).T for logits in self._chunks(X)]))

    def score_samples(self, X: Rows) -> Rows:
        """Return the log-density of each row, (n,)."""
        return _like(X, torch.cat([logits.logsumexp(0) for logits in self._chunks(X)]))

    def score(self, X: Rows) -> float:
        """Return the mean log-density of the rows.

        Raises UserError when there are none.
        """
        if len(X) == 0:
            raise UserError("X has no rows, so they have no mean log-density: give one or more")
        return float(self.score_samples(X).mean())

    def bic(self, X: Rows) -> float:
        """Return the Bayesian information criterion on these rows; lower is better."""
        return bic(self.score(X) * len(X), self.n_parameters, len(X))

    def aic(self, X: Rows) -> float:
        """Return Akaike's information criterion on these rows; lower is better."""
        return aic(self.score(X) * len(X), self.n_parameters)

    def icl(self, X: Rows) -> float:
        """Return the BIC plus twice the soft entropy of the labels; lower is better."""
        resp = torch.as_tensor(self.predict_proba(X))
        return icl(self.bic(X), float(-torch.special.xlogy(resp, resp).sum()))

    def _chunks(self, X: Rows) -> Iterator[Float64[Tensor, "k b"]]:
        """Yield log w_k + log N(x | k) for a few rows at a time."""
        if X.ndim != 2 or X.shape[1] != self.n_features:
            names = f" ({', '.join(self.feature_names)})" if self.feature_names else ""
            raise UserError(
                f"X has shape {tuple(X.shape)}: give rows (n, {self.n_features}), "
                f"one column per feature of the mixture{names}"
            )
        device = X.device if isinstance(X, Tensor) else torch.device("cpu")
        densities = Densities(Stack.of([self.parameters]), device)
        n_chunk = max(1, _CHUNK_ELEMENTS // (self.n_components + self.n_features))
        for first in range(0, max(len(X), 1), n_chunk):
            yield densities(_columns(X[first : first + n_chunk]))


def bic(log_likelihood: float, n_free: int, n_samples: float) -> float:
    """Return -2 ll + p ln n; `log_likelihood` is the sum in nats, n the sum of weights."""
    return -2 * log_likelihood + n_free * float(np.log(n_samples))


def aic(log_likelihood: float, n_free: int) -> float:
    """Return -2 ll + 2 p."""
    return -2 * log_likelihood + 2 * n_free


def icl(bic: float, entropy: float) -> float:
    """Return BIC + 2 E, with the soft entropy E = -Σ r ln r of the responsibilities (nats)."""
    return bic + 2 * entropy


def _columns(X: Rows) -> Float64[Tensor, "d b"]:
    """Return a few rows as columns; a copy, for arrays may be read-only, reversed or swapped."""
    if isinstance(X, Tensor):
        return X.T.double()
    return torch.from_numpy(np.array(X.T, dtype=np.float64, order="C"))


def _like(X: Rows, result: Tensor) -> Rows:
    return result if isinstance(X, Tensor) else result.numpy()

"""A fitted mixture put to use: densities, labels, samples and criteria of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from gmm_dist.errors import Option, UserError
from gmm_dist.model.bootstrap import Bootstrap
from gmm_dist.model.clusters import Clusters, merged
from gmm_dist.model.criteria import aic, bic, icl, n_parameters
from gmm_dist.model.densities import Densities, Rows
from gmm_dist.model.parameters import Parameters
from gmm_dist.model.quantiles import Quantiles

_MOST_NAMES, _LONGEST_NAME = 4, 60  # of features, in a repr


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Mixture:
    """Score rows under a mixture; arrays in, arrays out, tensors in, tensors out.

    Rows are (n, d) in the feature units of the fit: arrays, tensors and lists in the order of
    `feature_names`, tables (pandas, polars, pyarrow) with these very columns, as scikit-learn
    asks for them. Other rows, or values that are not finite, raise UserError where the
    estimators raise ValueError; a path, a lake and sparse rows raise TypeError. All
    arithmetic is float64 and centred per component, on the rows' device; results are float64
    and nats. `n_samples` and `log_likelihood` (sum, nats) are those of the fit, and so are
    `log_density_quantiles`, of the rows' log-densities; None for a model that keeps none.
    `ids` are the numbers that the components keep from night to night; None where they have none.
    `clusters` say which components make up a cluster, `bootstrap` how sure the parameters are; None
    where that was not asked for.
    """

    parameters: Parameters
    feature_names: tuple[str, ...] = ()
    n_samples: float = float("nan")
    log_likelihood: float = float("nan")
    log_density_quantiles: Quantiles | None = None
    ids: tuple[int, ...] | None = None
    clusters: Clusters | None = None
    bootstrap: Bootstrap | None = None

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

    def predict(self, X: Any, *, clusters: bool = False) -> Any:
        """Return the component of largest responsibility for each row, (n,) int64.

        With `clusters` the cluster of largest responsibility, the sum of its components': not
        always the one that the row's component is part of. Both are places, from 0 up: of a
        night's model, `ids` and `clusters.numbers` have the numbers that they keep. Raises
        UserError where the mixture has no clusters.
        """
        if not clusters:
            return self._of_rows(X, labels)
        if self.clusters is None:
            raise UserError(
                "the model says of no components that they are one cluster: fit it with "
                + Option("clusters", "auto")
                + ", or ask find_clusters of its rows"
            )
        of_component = self.clusters.of_component
        return self._of_rows(X, lambda mixture, rows: cluster_labels(mixture, rows, of_component))

    def predict_proba(self, X: Any) -> Any:
        """Return the responsibilities, (n, k), each row summing to one."""
        return self._of_rows(X, responsibilities)

    def score_samples(self, X: Any) -> Any:
        """Return the log-density of each row, (n,)."""
        return self._of_rows(X, log_densities)

    def score(self, X: Any) -> float:
        """Return the mean log-density of the rows.

        Raises UserError when there are none.
        """
        return self._scored(X)[0]

    def bic(self, X: Any) -> float:
        """Return the Bayesian information criterion on these rows; lower is better."""
        mean, n = self._scored(X)
        return bic(mean * n, self.n_parameters, n)

    def aic(self, X: Any) -> float:
        """Return Akaike's information criterion on these rows; lower is better."""
        mean, n = self._scored(X)
        return aic(mean * n, self.n_parameters)

    def icl(self, X: Any) -> float:
        """Return the BIC plus twice the soft entropy of the labels; lower is better."""
        rows = self._checked(X)
        resp = responsibilities(self.parameters, rows)
        return icl(self.bic(rows), float(-torch.special.xlogy(resp, resp).sum()))

    def __repr__(self) -> str:
        names = [_short(repr(name)) for name in self.feature_names[:_MOST_NAMES]]
        names += ["..."] if len(self.feature_names) > _MOST_NAMES else []
        return (
            f"Mixture(n_components={self.n_components}, n_features={self.n_features}, "
            f"covariance_type={self.covariance_type!r}, feature_names=({', '.join(names)}))"
        )

    def _checked(self, X: Any) -> Rows:
        # scikit-learn, which checks them, is slow to import; jobs do not need it.
        from gmm_dist.model.arrays import checked_for_model

        return checked_for_model(X, self.n_features, self.feature_names)

    def _of_rows(self, X: Any, verb: Callable[[Parameters, Rows], Tensor]) -> Any:
        from gmm_dist.model.arrays import space_of

        rows = self._checked(X)
        space = replace(space_of(X, rows), dtype=torch.float64)
        return space.of(verb(self.parameters, rows))

    def _scored(self, X: Any) -> tuple[float, int]:
        """Return the mean log-density of the rows, and their number."""
        row_densities = log_densities(self.parameters, self._checked(X))
        if len(row_densities) == 0:
            raise UserError("X has no rows, so they have no mean log-density: give one or more")
        return float(row_densities.mean()), len(row_densities)


def labels(mixture: Parameters, X: Rows) -> Int64[Tensor, " n"]:
    """Return the component of largest responsibility for each of some checked rows (n, d)."""
    return torch.cat([logits.argmax(0) for logits in _chunks(mixture, X)])


def cluster_labels(
    mixture: Parameters, X: Rows, of_component: Sequence[int]
) -> Int64[Tensor, " n"]:
    """Return the cluster of largest responsibility for each of some checked rows (n, d)."""
    parts = [merged(logits.softmax(0), of_component).argmax(0) for logits in _chunks(mixture, X)]
    return torch.cat(parts)


def responsibilities(mixture: Parameters, X: Rows) -> Float64[Tensor, "n k"]:
    """Return the responsibilities for some checked rows (n, d)."""
    return torch.cat([logits.softmax(0).T for logits in _chunks(mixture, X)])


def log_densities(mixture: Parameters, X: Rows) -> Float64[Tensor, " n"]:
    """Return the log-density of each of some checked rows (n, d), nats."""
    return torch.cat([logits.logsumexp(0) for logits in _chunks(mixture, X)])


def _chunks(mixture: Parameters, X: Rows) -> Iterator[Float64[Tensor, "k b"]]:
    """Yield log w_k + log N(x | k) for a few rows at a time, on their device."""
    device = X.device if isinstance(X, Tensor) else torch.device("cpu")
    return Densities.of(mixture, device).chunks(X)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 4]}...'"

"""scikit-learn's face: `GaussianMixture`, and what it shares with its variational sister.

The estimators keep scikit-learn's contract: parameters are stored as given, learned attributes
end in `_` and are of the rows' own kind (array or tensor, dtype, device), the same start leads
to the same result. All arithmetic is float64, unless `precision` says otherwise.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_sample_weight, check_is_fitted
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from gmm_dist.config import PRECISIONS, Cluster
from gmm_dist.em.loop import Status
from gmm_dist.em.statistics import TotalMoments
from gmm_dist.em.trials import (
    Model,
    Rules,
    SingularCovarianceError,
    Trial,
    Watch,
    moments_of_shares,
    run,
)
from gmm_dist.estimators.attributes import copied, covariances_of, have_factors
from gmm_dist.estimators.init_params import INIT_PARAMS, shares_of
from gmm_dist.estimators.local_rows import Resident, one_thread
from gmm_dist.estimators.restarts import Reporter, ranked
from gmm_dist.estimators.settings import (
    require_cluster,
    require_lake_settings,
    require_no_cluster,
    require_range,
)
from gmm_dist.lake.lake import Lake
from gmm_dist.model.arrays import (
    Array,
    Rows,
    Space,
    array_of,
    checked,
    device_of,
    is_foreign,
    mean_of,
    require_rows_in_memory,
    require_rows_or_lake,
    space_of,
    tensor_of,
    unmasked,
    viewed,
)
from gmm_dist.model.covariance import Moments
from gmm_dist.model.mixture import Mixture, labels, log_densities, responsibilities
from gmm_dist.model.parameters import COVARIANCE_TYPES, Parameters
from gmm_dist.model.soundness import flaw
from gmm_dist.shards.protocol import Shards

if TYPE_CHECKING:
    from gmm_dist.fitting.lake_scores import LakeScores

SINGULAR = (
    "Fitting the mixture model failed because some components have ill-defined empirical "
    "covariance (for instance caused by singleton or collapsed samples). Try to decrease the "
    "number of components, increase reg_covar, or scale the input data."
)
NOT_CONVERGED = (
    "Best performing initialization did not converge. Try different init parameters, or "
    "increase max_iter, tol, or check for degenerate data."
)
_FEW_VALUES = 1 << 17
ARRAY_API_INITS = ("random", "random_from_data")


class CentredRows(Protocol):
    """Rows in shards, about `centre` (d,) and wherever they are, and their moments."""

    @property
    def centre(self) -> Tensor: ...

    @property
    def shards(self) -> Shards: ...

    @property
    def total(self) -> TotalMoments: ...


class BaseMixture(DensityMixin, BaseEstimator):  # type: ignore[misc]
    """What both estimators share: inputs, the loop over trials, and the use of a mixture.

    A subclass says what its models are, all about the rows' shared centre: `_first_model` of
    what an M-step reads of rows that were shared out (None where `_needs_shares` said no),
    `_fitted_model` of its own attributes; `_publish` sets the attributes of the best.
    `_fit_lake` does the same for rows that are elsewhere.
    `_check_parameters` raises ValueError for what rows of so many features cannot bear;
    `_parameters`, in feature units, are what densities are taken of.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "covariance_type": [StrOptions(set(COVARIANCE_TYPES))],
        "tol": [Interval(Real, 0.0, None, closed="left")],
        "reg_covar": [Interval(Real, 0.0, None, closed="left")],
        "max_iter": [Interval(Integral, 0, None, closed="left")],
        "n_init": [Interval(Integral, 1, None, closed="left")],
        "init_params": [StrOptions(set(INIT_PARAMS))],
        "random_state": ["random_state"],
        "warm_start": ["boolean"],
        "verbose": ["verbose"],
        "verbose_interval": [Interval(Integral, 1, None, closed="left")],
        "precision": [StrOptions(set(PRECISIONS)), None],
        "device": [str, torch.device, None],
        "n_shards": [Interval(Integral, 1, None, closed="left"), None],
    }

    # One where `lower_bound_` is a mean log-likelihood, nan where it is another bound.
    _bound_is_likelihood: ClassVar[float] = 1.0

    n_components: int
    covariance_type: str
    tol: float
    reg_covar: float
    max_iter: int
    n_init: int
    init_params: str
    random_state: Any
    warm_start: bool
    verbose: int
    verbose_interval: int
    precision: str | None
    device: str | torch.device | None
    n_shards: int | None

    weights_: Any
    means_: Any
    covariances_: Any
    precisions_: Any
    precisions_cholesky_: Any
    converged_: bool
    n_iter_: int
    lower_bound_: float
    lower_bounds_: list[float]
    n_features_in_: int
    feature_names_in_: Array
    _n_samples: float
    _log_likelihood: float

    def fit(
        self,
        X: Any,
        y: object = None,
        sample_weight: Any = None,
        *,
        cluster: Cluster | None = None,
    ) -> Self:
        """Fit the mixture to rows X (n, d), or to a lake, by EM.

        Args:
            X: rows (n, d) in memory, or a `gmm_dist.Lake`.
            y: is ignored.
            sample_weight: of rows in memory, (n,): 0 is an absent row, 2 a doubled one.
            cluster: where a lake's rows are to be held; None for the Ray cluster that this process
                is connected to, else one that is started here.

        Raises ValueError for bad parameters or rows, and for a singular covariance; warns with
        ConvergenceWarning where the best of the trials did not converge.
        """
        if isinstance(X, Lake):
            require_lake_settings(sample_weight, self.device, self.n_shards, cluster)
            self._fit_lake(X, cluster or Cluster())
        else:
            require_no_cluster(cluster)
            self._fit(X, sample_weight)
        return self

    def fit_predict(self, X: Any, y: object = None, sample_weight: Any = None) -> Any:
        """Fit the mixture and return the labels of its rows in memory, (n,)."""
        require_rows_in_memory(X)
        self._fit(X, sample_weight)
        return self.predict(X)

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

        Its numbers are copies of `weights_`, `means_` and `covariances_`, in float64. Where the
        fit was ours `n_samples`, the sum of the weights, goes along, and so does `log_likelihood`:
        of a lake that of these parameters, of rows in memory that of the last pass, one step
        before them. Raises NotFittedError.

        >>> from gmm_dist import GaussianMixture
        >>> GaussianMixture().fit([[0.0], [2.0]]).to_mixture().parameters.means
        tensor([[1.]], dtype=torch.float64)
        """
        check_is_fitted(self)
        # What is published: of a posterior, the plain mixture of its expectations.
        found = BaseMixture._parameters(self)
        return Mixture(
            copied(found),
            tuple(str(name) for name in getattr(self, "feature_names_in_", ())),
            getattr(self, "_n_samples", math.nan),
            getattr(self, "_log_likelihood", math.nan),
        )

    def __sklearn_tags__(self) -> Tags:
        tags: Tags = super().__sklearn_tags__()
        tags.array_api_support = self.init_params in ARRAY_API_INITS and not self.warm_start
        return tags

    # What a subclass says.

    def _check_parameters(self, rows: Rows) -> None:
        raise NotImplementedError

    def _in_unit(self, weight: Tensor | None) -> Tensor | None:
        """Return weights as passes take them: as they are, where they count rows."""
        return weight

    def _needs_shares(self) -> bool:
        return True

    def _first_model(self, moments: Moments | None, rows: Resident) -> Model:
        raise NotImplementedError

    def _fitted_model(self, rows: CentredRows) -> Model:
        raise NotImplementedError

    def _publish(self, model: Any, rows: CentredRows, space: Space) -> None:
        raise NotImplementedError

    def _fit_lake(self, lake: Lake, cluster: Cluster) -> None:
        raise NotImplementedError

    def _parameters(self) -> Parameters:
        """Return the learned mixture, of which densities are taken."""
        means = tensor_of(self.means_)
        return Parameters(
            tensor_of(self.weights_), means, self._covariances(), self.covariance_type
        )

    # What they share.

    def _require_sound(self) -> None:
        """Raise ValueError where learned numbers that come from elsewhere are no mixture's."""
        if not all(hasattr(self, name) for name in ("weights_", "means_", "precisions_cholesky_")):
            return
        shapes = [np.shape(array_of(value)) for value in (self.weights_, self.means_)]
        if len(shapes[1]) != 2 or shapes[0] != shapes[1][:1]:
            raise ValueError(f"weights_ and means_ have shapes {shapes}, not (k,) and (k, d)")
        if (what := flaw(self._parameters())) is not None:
            raise ValueError(f"what was learned is no mixture: {what}; fit anew")

    def _covariances(self) -> Tensor:
        """Return the covariances of `precisions_cholesky_`, in float64.

        Published as float32, covariances lose what tells them from singular ones, factors do
        not. Where `covariances_` have these very factors they are taken as they are.
        """
        kind, (k, d) = self.covariance_type, tensor_of(self.means_).shape
        factors = tensor_of(self.precisions_cholesky_)
        shape = {"full": (k, d, d), "tied": (d, d), "diag": (k, d), "spherical": (k,)}[kind]
        if factors.shape != shape:
            raise ValueError(
                f"precisions_cholesky_ has shape {tuple(factors.shape)}, not {shape}, that of "
                f"{k} {kind} covariances of {d} features: fit anew, without warm_start"
            )
        factors = factors[None] if kind == "tied" else factors
        if hasattr(self, "covariances_"):
            covariances = tensor_of(self.covariances_)
            if covariances.shape == shape and have_factors(
                kind, covariances.view(factors.shape), factors
            ):
                return covariances
        return covariances_of(kind, factors).view(shape)

    def _fit(self, X: Any, sample_weight: Any) -> None:
        require_rows_or_lake(X)
        self._validate_params()
        with one_thread():
            rows, weight = self._checked_rows(X, sample_weight)
            self._check_parameters(rows)
            n_samples = float(len(rows) if weight is None else weight.sum())
            weight = self._in_unit(weight)
            resident = self._resident(rows, weight)
            require_range(resident.total, getattr(self, "feature_names_in_", ()))
            best = self._best_trial(rows, weight, resident)
            self._publish(best.model, resident, space_of(X, rows))
        self._conclude(best, n_samples)

    def _conclude(self, best: Trial, n_samples: float) -> None:
        """Say how the best trial went; to be called by what `fit` calls."""
        self._n_samples = n_samples
        self._log_likelihood = self._bound_is_likelihood * best.lower_bound * n_samples
        self.converged_, self.n_iter_ = best.converged, best.n_iter
        self.lower_bound_, self.lower_bounds_ = best.lower_bound, best.lower_bounds
        if not best.converged and self.max_iter > 0:
            warnings.warn(
                f"{NOT_CONVERGED} ({Status.MAX_ITER.value})", ConvergenceWarning, stacklevel=4
            )

    def _checked_rows(self, X: Any, sample_weight: Any) -> tuple[Rows, Tensor | None]:
        rows = checked(self, X, reset=True, n_min=2)
        weight = None
        if sample_weight is not None:
            given = unmasked(sample_weight, "sample_weight")
            given = array_of(given) if hasattr(given, "__dlpack__") else given
            shape = np.empty((len(rows), 0))
            weight = tensor_of(
                _check_sample_weight(given, shape, dtype=np.float64, ensure_non_negative=True)
            )
        n_samples = len(rows) if weight is None else int((weight > 0).sum())
        if n_samples < self.n_components:
            raise ValueError(
                f"Expected n_samples >= n_components but got n_components = {self.n_components}, "
                f"n_samples = {n_samples}"
            )
        return (rows, None) if weight is None else _present(rows, weight)

    def _resident(self, rows: Rows, weight: Tensor | None) -> Resident:
        whole = self.covariance_type in ("full", "tied")
        X = viewed(rows)
        device = X.device if self.device is None else device_of(self.device)
        X = X.to(device, torch.float64)
        weight = None if weight is None else weight.to(device)
        return Resident.of(X, weight, self.n_shards, whole=whole)

    def _best_trial(self, rows: Rows, weight: Tensor | None, resident: Resident) -> Trial:
        if self.warm_start and hasattr(self, "converged_"):
            self._require_warm(rows.shape[1])
            trials = [Trial(self._fitted_model(resident), last_bound=self.lower_bound_)]
        else:
            trials = [Trial(model) for model in self._models(rows, weight, resident)]
            # Where none is iterated, scikit-learn keeps the last.
            trials = trials if self.max_iter > 0 else trials[-1:]
        # The first goes alone, in the very arithmetic of a fit of one start: so more starts never
        # end below it by a rounding. The others share their passes.
        return self._best_of((trials[:1], trials[1:]), resident)

    def _require_warm(self, n_features: int) -> None:
        n_fitted, fitted = tensor_of(self.means_).shape
        if n_fitted != self.n_components:
            raise ValueError(
                f"warm_start goes on from a fit of {n_fitted} components, but n_components is "
                f"{self.n_components}: set it back, or fit without warm_start"
            )
        if fitted != n_features:
            raise ValueError(
                f"warm_start goes on from a fit to {fitted} features, but X has {n_features}: "
                "give rows of the same features, or a new estimator"
            )

    def _best_of(self, batches: Sequence[Sequence[Trial]], rows: CentredRows) -> Trial:
        """Iterate the trials, those of a batch in the same passes, and return the best."""
        trials = list(itertools.chain.from_iterable(batches))
        teller = Reporter(trials, self.verbose, self.verbose_interval)
        for batch in batches:
            self._iterate(batch, rows, self.max_iter, watch=teller.stepped)
        teller.ended()
        return ranked(trials)[0]

    def _iterate(
        self,
        trials: Sequence[Trial],
        rows: CentredRows,
        max_iter: int,
        *,
        watch: Watch = lambda trial, change: None,
    ) -> None:
        rules = Rules(self.tol, max_iter, self.precision or "float64")
        try:
            run(rows.shards, trials, rules, rows.total, watch=watch)
        except SingularCovarianceError:
            raise ValueError(SINGULAR) from None

    def _models(self, rows: Rows, weight: Tensor | None, resident: Resident) -> list[Model]:
        random_state = check_random_state(self.random_state)
        models = []
        for _ in range(self.n_init):
            moments = None
            if self._needs_shares():
                share = shares_of(self.init_params, rows, weight, self.n_components, random_state)
                moments = moments_of_shares(
                    self.covariance_type,
                    resident.X,
                    share.to(resident.X.device),
                    resident.total,
                    resident.centre,
                )
            models.append(self._first_model(moments, resident))
        return models

    def _lake_scores(self, lake: Lake, cluster: Cluster | None) -> LakeScores:
        # Only here are Ray and pyarrow needed: they would be most of the time of an import.
        from gmm_dist.fitting.lake_scores import scores_of_lake

        check_is_fitted(self)
        require_cluster(cluster)
        names = tuple(str(name) for name in getattr(self, "feature_names_in_", ()))
        return scores_of_lake(lake, Mixture(self._parameters(), names), cluster=cluster)

    def _of_rows(self, X: Any, verb: Callable[[Parameters, Rows], Tensor]) -> Any:
        check_is_fitted(self)
        require_rows_in_memory(X)
        rows = checked(self, X, reset=False)
        tensor = viewed(rows)
        mixture = self._parameters()
        # To wake other threads costs more than a few rows do.
        with one_thread() if tensor.numel() < _FEW_VALUES else nullcontext():
            return space_of(X, rows).of(verb(mixture, tensor))

    def _name_features(self, n_features: int, names: Sequence[str]) -> None:
        """Note the features of rows that were not checked as rows in memory are."""
        self.n_features_in_ = n_features
        if names:
            self.feature_names_in_ = np.array(names, dtype=object)
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_  # those of an earlier fit

    def _space(self) -> Space:
        means = self.means_
        return space_of(means, from_dlpack(means) if is_foreign(means) else means)


def _present(rows: Rows, weight: Tensor) -> tuple[Rows, Tensor]:
    """Leave out rows of zero weight: they are no rows, and must not change a draw or a rounding."""
    there = weight > 0
    if bool(there.all()):
        return rows, weight
    mask = there.to(rows.device) if isinstance(rows, Tensor) else there.numpy()
    return rows[mask], weight[there]


def _drawn(mixture: Parameters, n_samples: int, rng: np.random.RandomState) -> tuple[Array, Array]:
    """Draw rows and components in scikit-learn's order, from the same random numbers."""
    kind, d = mixture.covariance_type, mixture.n_features
    means, covariances = mixture.means.numpy(), mixture.covariances.numpy()
    counts = rng.multinomial(n_samples, mixture.weights.numpy())
    parts = []
    for k, (mean, n) in enumerate(zip(means, counts, strict=True)):
        if kind in ("full", "tied"):
            covariance = covariances if kind == "tied" else covariances[k]
            parts.append(rng.multivariate_normal(mean, covariance, int(n)))
        else:
            parts.append(mean + rng.standard_normal(size=(n, d)) * np.sqrt(covariances[k]))
    return np.vstack(parts), np.repeat(np.arange(len(counts)), counts)

"""scikit-learn's face: `GaussianMixture`, and what it shares with its variational sister.

The estimators keep scikit-learn's contract: parameters are stored as given, learned attributes
end in `_` and are of the rows' own kind (array or tensor, dtype, device), the same start leads
to the same result. All arithmetic is float64, unless `precision` says otherwise.
"""

from __future__ import annotations

import itertools
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import sklearn.mixture
import torch
from sklearn import get_config
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_sample_weight, check_is_fitted
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from gmm_dist.config import ABSOLUTE, PRECISIONS, EMConfig, StartConfig
from gmm_dist.em.loop import FitResult, Status
from gmm_dist.em.statistics import TotalMoments
from gmm_dist.em.trials import (
    MaximumLikelihood,
    Model,
    Rules,
    SingularCovarianceError,
    Trial,
    Watch,
    maximised,
    mean_weight,
    moments_of_shares,
    run,
)
from gmm_dist.errors import UserError
from gmm_dist.lake.lake import Lake
from gmm_dist.model.arrays import (
    Array,
    Rows,
    Space,
    array_of,
    checked,
    checked_start,
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
from gmm_dist.model.covariance import FAMILIES, Moments
from gmm_dist.model.criteria import aic, bic, icl, n_parameters
from gmm_dist.model.mixture import labels, log_densities, responsibilities
from gmm_dist.model.parameters import Parameters
from gmm_dist.model.soundness import flaw
from gmm_dist.resident import Resident, one_thread
from gmm_dist.selection.ranking import Candidate
from gmm_dist.shards.protocol import Shards
from gmm_dist.shards.reweighted import unit_of
from gmm_dist.shares import INIT_PARAMS, shares_of

_SINGULAR = (
    "Fitting the mixture model failed because some components have ill-defined empirical "
    "covariance (for instance caused by singleton or collapsed samples). Try to decrease the "
    "number of components, increase reg_covar, or scale the input data."
)
_NOT_CONVERGED = (
    "Best performing initialization did not converge. Try different init parameters, or "
    "increase max_iter, tol, or check for degenerate data."
)
_FEW_VALUES = 1 << 17
_ROUNDING = 1e-10  # of a lower bound: what the iterations of a fit may have rounded away
_ARRAY_API_INITS = ("random", "random_from_data")


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
        "covariance_type": [StrOptions(set(FAMILIES))],
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
        "shards": [Interval(Integral, 1, None, closed="left"), None],
    }

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
    shards: int | None

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

    def fit(self, X: Any, y: object = None, sample_weight: Any = None) -> Self:
        """Fit the mixture to rows X (n, d) by EM; `y` is ignored.

        `sample_weight` (n,): 0 is an absent row, 2 a doubled one.

        Raises ValueError for bad parameters or rows, and for a singular covariance; warns with
        ConvergenceWarning where the best of the trials did not converge.
        """
        if isinstance(X, Lake):
            require_lake_settings(sample_weight, self.device, self.shards)
            self._fit_lake(X)
        else:
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

    def score(self, X: Any, y: object = None) -> float:
        """Return the mean log-density (nats) of the rows; `y` is ignored."""
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

    def __sklearn_tags__(self) -> Tags:
        tags: Tags = super().__sklearn_tags__()
        tags.array_api_support = self.init_params in _ARRAY_API_INITS and not self.warm_start
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

    def _fit_lake(self, opened: Lake) -> None:
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
            if covariances.shape == shape and _have_factors(
                kind, covariances.view(factors.shape), factors
            ):
                return covariances
        return _covariances_of(kind, factors).view(shape)

    def _fit(self, X: Any, sample_weight: Any) -> None:
        require_rows_or_lake(X)
        self._validate_params()
        with one_thread():
            rows, weight = self._checked_rows(X, sample_weight)
            self._check_parameters(rows)
            weight = self._in_unit(weight)
            resident = self._resident(rows, weight)
            _require_range(resident.total, getattr(self, "feature_names_in_", ()))
            best = self._best_trial(rows, weight, resident)
            self._publish(best.model, resident, space_of(X, rows))
        self._conclude(best)

    def _conclude(self, best: Trial) -> None:
        """Say how the best trial went; to be called by what `fit` calls."""
        self.converged_, self.n_iter_ = best.converged, best.n_iter
        self.lower_bound_, self.lower_bounds_ = best.lower_bound, best.lower_bounds
        if not best.converged and self.max_iter > 0:
            warnings.warn(
                f"{_NOT_CONVERGED} ({Status.MAX_ITER.value})", ConvergenceWarning, stacklevel=4
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
        return Resident.of(X, weight, self.shards, whole=whole)

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
        teller = _Teller(trials, self.verbose, self.verbose_interval)
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
            raise ValueError(_SINGULAR) from None

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

    def _of_rows(self, X: Any, verb: Callable[[Parameters, Rows], Tensor]) -> Any:
        check_is_fitted(self)
        require_rows_in_memory(X)
        rows = checked(self, X, reset=False)
        tensor = viewed(rows)
        mixture = self._parameters()
        # To wake other threads costs more than a few rows do.
        with one_thread() if tensor.numel() < _FEW_VALUES else nullcontext():
            return space_of(X, rows).of(verb(mixture, tensor))

    def _space(self) -> Space:
        means = self.means_
        return space_of(means, from_dlpack(means) if is_foreign(means) else means)


class GaussianMixture(BaseMixture):
    """Fit a mixture of Gaussians: a drop-in for scikit-learn's, with weights.

    The parameters are scikit-learn's, and three more: `precision` is the arithmetic of the
    passes ("float64"; "auto": float32 while its measured error is harmless; "float32"; None:
    float64 for rows in memory, auto for a lake), `device` where rows are worked on (None: where
    they are), `shards` into how many parts they are dealt (None: by their number; sums have the
    same bits for the same number of shards).

    A lake (`gmm_dist.open_lake`) is fitted on Ray, from the best starts that a search on a
    sample finds (`n_init` seeded ones by `init_params`; 16 where `n_init` is 1), leaping ahead
    of EM where that raises the likelihood; it stops where it has scored, a step before
    scikit-learn would. `verbose` tells nothing of it, and `device` and `shards` are refused.

    Learned: `weights_` (k,), `means_` (k, d), `covariances_`, `precisions_` and
    `precisions_cholesky_` (full (k, d, d), tied (d, d), diag (k, d), spherical (k,)),
    `converged_`, `n_iter_`, `lower_bound_` (nats per row) and `lower_bounds_`, `n_features_in_`
    and `feature_names_in_`.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **BaseMixture._parameter_constraints,
        "weights_init": ["array-like", None],
        "means_init": ["array-like", None],
        "precisions_init": ["array-like", None],
    }

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance_type: str = "full",
        tol: float = 1e-3,
        reg_covar: float = 1e-6,
        max_iter: int = 100,
        n_init: int = 1,
        init_params: str = "kmeans",
        weights_init: Any = None,
        means_init: Any = None,
        precisions_init: Any = None,
        random_state: Any = None,
        warm_start: bool = False,
        verbose: int = 0,
        verbose_interval: int = 10,
        precision: str | None = None,
        device: str | torch.device | None = None,
        shards: int | None = None,
    ) -> None:
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.tol = tol
        self.reg_covar = reg_covar
        self.max_iter = max_iter
        self.n_init = n_init
        self.init_params = init_params
        self.weights_init = weights_init
        self.means_init = means_init
        self.precisions_init = precisions_init
        self.random_state = random_state
        self.warm_start = warm_start
        self.verbose = verbose
        self.verbose_interval = verbose_interval
        self.precision = precision
        self.device = device
        self.shards = shards

    def bic(self, X: Any) -> float:
        """Return the Bayesian information criterion on rows X; lower is better."""
        n = _n_rows(scores := self.score_samples(X))
        return bic(mean_of(scores) * n, self._n_parameters(), n)

    def aic(self, X: Any) -> float:
        """Return Akaike's information criterion on rows X; lower is better."""
        scores = self.score_samples(X)
        return aic(mean_of(scores) * _n_rows(scores), self._n_parameters())

    def icl(self, X: Any) -> float:
        """Return the BIC plus twice the soft entropy of the labels; lower is better."""
        resp = tensor_of(self.predict_proba(X))
        return icl(self.bic(X), float(-torch.special.xlogy(resp, resp).sum()))

    def to_sklearn(self) -> Any:
        """Return scikit-learn's own GaussianMixture with these parameters and what was learned.

        Learned numbers are the same to the bit. Raises ImportError without scikit-learn.
        """
        return exchanged(self, sklearn.mixture.GaussianMixture())

    @classmethod
    def from_sklearn(cls, fitted: Any) -> Self:
        """Return our face on one of scikit-learn's, fitted or not; numbers are the same.

        Raises TypeError for any other class, ValueError where its numbers are no mixture's.
        """
        require_class(fitted, sklearn.mixture.GaussianMixture)
        made: Self = exchanged(fitted, cls())
        made._require_sound()
        return made

    def _n_parameters(self) -> int:
        k, d = self.means_.shape
        return n_parameters(self.covariance_type, k, d)

    def _check_parameters(self, rows: Rows) -> None:
        k, d = self.n_components, rows.shape[1]
        if get_config()["array_api_dispatch"] and self.init_params not in _ARRAY_API_INITS:
            raise NotImplementedError(
                f"Allowed `init_params` are {list(_ARRAY_API_INITS)} if 'array_api_dispatch' is "
                f"enabled. You passed init_params={self.init_params!r}: k-means runs on NumPy"
            )
        if self.weights_init is not None:
            _require_weights(checked_start(self.weights_init, (k,), "weights"))
        if self.means_init is not None:
            checked_start(self.means_init, (k, d), "means")
        if self.precisions_init is not None:
            self._covariances_init(d)

    def _in_unit(self, weight: Tensor | None) -> Tensor | None:
        return None if weight is None else weight * unit_of(float(weight.max()))

    def _covariances_init(self, d: int) -> Tensor:
        """Return the inverses of `precisions_init`."""
        kind, k = self.covariance_type, self.n_components
        shapes = {"full": (k, d, d), "tied": (d, d), "diag": (k, d), "spherical": (k,)}
        precisions = checked_start(self.precisions_init, shapes[kind], f"{kind} precision")
        if kind in ("diag", "spherical"):
            if not bool((precisions > 0).all()):
                raise ValueError(f"'{kind} precision' should be positive")
            return precisions.reciprocal()
        factors, info = torch.linalg.cholesky_ex(precisions)
        if bool((info != 0).any()) or not torch.allclose(precisions, precisions.mT):
            raise ValueError(f"'{kind} precision' should be symmetric, positive-definite")
        return torch.cholesky_inverse(factors)

    def _needs_shares(self) -> bool:
        return any(v is None for v in (self.weights_init, self.means_init, self.precisions_init))

    def _first_model(self, moments: Moments | None, rows: Resident) -> Model:
        kind, d = self.covariance_type, len(rows.centre)
        given: dict[str, Any] = {}
        if self.weights_init is not None:
            given["weights"] = tensor_of(self.weights_init)
        if self.means_init is not None:
            given["means"] = tensor_of(self.means_init) - rows.centre
        if self.precisions_init is not None:
            given["covariances"] = self._covariances_init(d)
        weight = mean_weight(rows.total)
        if moments is None:
            start = Parameters(**given, covariance_type=kind)
            return MaximumLikelihood(start, self.reg_covar, weight)
        estimated = maximised(kind, moments, self.reg_covar, weight)
        # Of all rows, as in scikit-learn: where seeds share out k rows only, they sum to k / n.
        shared = float(moments.nk.sum()) / rows.total.n_samples
        estimated = replace(estimated, weights=estimated.weights * shared)
        return MaximumLikelihood(replace(estimated, **given), self.reg_covar, weight)

    def _fitted_model(self, rows: CentredRows) -> Model:
        fitted = self._parameters().shifted(-rows.centre)
        return MaximumLikelihood(fitted, self.reg_covar, mean_weight(rows.total))

    def _fit_lake(self, opened: Lake) -> None:
        # Only here are Ray and pyarrow needed: they would be most of the time of an import.
        from gmm_dist.fitting.lake_sweep import sweep_lake

        self._validate_params()
        given = self._given_start(opened)
        candidate = Candidate(self.n_components, self.covariance_type)
        precision = self.precision or "auto"
        config = EMConfig(self.tol, self.max_iter, self.reg_covar, precision, reg_unit=ABSOLUTE)
        with one_thread(), in_python():
            found = sweep_lake(opened, [candidate], config, start_of(self), given=given)
        fit, space = found.result.scored[0].fit, Space(torch.float64)
        adopt(self, fit, found.centre, found.feature_names, space)
        names, total = found.feature_names, found.result.total
        _warn_if_drowned(fit.parameters, total, self.reg_covar, names, stacklevel=4)

    def _given_start(self, opened: Lake) -> Parameters | None:
        """Return the one start that the parameters give, if they do."""
        if self.warm_start and hasattr(self, "converged_"):
            self._require_warm(self.means_.shape[1])  # of the lake's columns the sweep tells
            return self._parameters()
        given = (self.weights_init, self.means_init, self.precisions_init)
        if all(value is None for value in given):
            return None
        if any(value is None for value in given):
            raise ValueError(
                "a lake takes weights_init, means_init and precisions_init together, or none"
            )
        means = tensor_of(self.means_init)
        covariances = self._covariances_init(means.shape[1])
        return Parameters(tensor_of(self.weights_init), means, covariances, self.covariance_type)

    def _publish(self, model: MaximumLikelihood, rows: CentredRows, space: Space) -> None:
        publish(self, model.parameters.shifted(rows.centre), space)
        names = getattr(self, "feature_names_in_", ())
        _warn_if_drowned(model.parameters, rows.total, self.reg_covar, names, stacklevel=5)


@contextmanager
def in_python() -> Iterator[None]:
    """Have a UserError name arguments: commands and estimators share what raises it."""
    try:
        yield
    except UserError as error:
        raise type(error)(of_arguments(str(error))) from error


def of_arguments(text: str) -> str:
    """Return a text with arguments for the commands' options: num_workers for --num-workers."""
    return re.sub(r"(?<!\S)--([a-z][a-z-]*)", lambda found: found[1].replace("-", "_"), text)


def require_lake_settings(
    sample_weight: Any, device: str | torch.device | None, shards: int | None
) -> None:
    """Raise ValueError where a lake is to be fitted with what is for rows in memory."""
    if sample_weight is not None:
        raise ValueError("sample_weight is for rows in memory: open_lake(..., weight_column=)")
    if device is not None:
        raise ValueError(f"device={str(device)!r} is for rows in memory: open_lake(..., use_gpu=)")
    if shards is not None:
        raise ValueError(
            f"shards={shards} is for rows in memory: a lake's are planned from its files"
        )


def require_class(fitted: Any, wanted: type) -> None:
    """Raise TypeError unless `fitted` is an estimator of scikit-learn's class."""
    if not isinstance(fitted, wanted):
        given = f"{type(fitted).__module__}.{type(fitted).__qualname__}"
        raise TypeError(f"from_sklearn takes a sklearn.mixture.{wanted.__name__}, not a {given}")


def publish(estimator: BaseMixture, learned: Parameters, space: Space) -> None:
    """Set the attributes of a mixture, in feature units."""
    family = FAMILIES[learned.covariance_type]
    tied = learned.covariance_type == "tied"
    covariances = learned.covariances[None] if tied else learned.covariances
    factors, _ = family.precisions_cholesky(covariances)
    precisions = family.precisions(factors)
    estimator.weights_ = space.of(learned.weights)
    estimator.means_ = space.of(learned.means)
    estimator.covariances_ = space.of(learned.covariances)
    estimator.precisions_cholesky_ = space.of(factors[0] if tied else factors)
    estimator.precisions_ = space.of(precisions[0] if tied else precisions)


def _present(rows: Rows, weight: Tensor) -> tuple[Rows, Tensor]:
    """Leave out rows of zero weight: they are no rows, and must not change a draw or a rounding."""
    there = weight > 0
    if bool(there.all()):
        return rows, weight
    mask = there.to(rows.device) if isinstance(rows, Tensor) else there.numpy()
    return rows[mask], weight[there]


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials, of the largest lower bound first; NaN comes last.

    Of those that rounding alone may have put above one another, the first comes first: which of
    two starts that mirror each other wins must not depend on the processor.
    """
    left = sorted(trials, key=lambda trial: _or_least(trial.lower_bound), reverse=True)
    order: list[Trial] = []
    while left:
        most = _or_least(left[0].lower_bound)
        level = most - _ROUNDING * max(1.0, abs(most)) if math.isfinite(most) else most
        tied = [trial for trial in left if _or_least(trial.lower_bound) >= level]
        order += sorted(tied, key=trials.index)
        left = left[len(tied) :]
    return order


def start_of(estimator: BaseMixture) -> StartConfig:
    """Return how a search on a sample is to look for an estimator's starts."""
    return StartConfig(
        estimator.n_init if estimator.n_init > 1 else StartConfig().n_init,
        estimator.init_params,
        random_state=seed_of(estimator.random_state),
    )


def adopt(
    estimator: BaseMixture,
    fit: FitResult,
    centre: Tensor,
    feature_names: Sequence[str],
    space: Space,
) -> None:
    """Have an estimator take a sweep's fit, about `centre`, for what it has learned.

    Raises ValueError where it collapsed; warns with ConvergenceWarning and the status sentence
    where it did not converge or means nothing.
    """
    if fit.status is Status.COLLAPSED:
        raise ValueError(f"{_SINGULAR} ({fit.status.value})")
    if fit.status is not Status.CONVERGED:
        warnings.warn(f"{_NOT_CONVERGED} ({fit.status.value})", ConvergenceWarning, stacklevel=4)
    publish(estimator, fit.parameters.shifted(centre), space)
    estimator.n_features_in_ = fit.parameters.n_features
    if feature_names:
        estimator.feature_names_in_ = np.array(feature_names, dtype=object)
    estimator.converged_, estimator.n_iter_ = fit.converged, fit.n_iter
    estimator.lower_bound_ = fit.log_likelihood / fit.n_samples
    estimator.lower_bounds_ = list(fit.lower_bounds)


def exchanged(source: Any, target: Any) -> Any:
    """Copy to `target` the parameters that both know, and all that `source` has learned."""
    known = target.get_params(deep=False)
    shared = {name: v for name, v in source.get_params(deep=False).items() if name in known}
    target.set_params(**{name: _plain(value) for name, value in shared.items()})
    for name, value in vars(source).items():
        if name.endswith("_") and not name.startswith("_"):
            setattr(target, name, _plain(value))
    return target


def seed_of(random_state: Any) -> int:
    """Return an int as it is, and one drawn from anything else."""
    if isinstance(random_state, Integral):
        return int(random_state)
    return int(check_random_state(random_state).randint(2**31 - 1))


def _require_range(total: TotalMoments, names: Sequence[str]) -> None:
    """Raise ValueError for a feature whose squares float64 does not hold."""
    if features := total.overflowing_features():
        raise ValueError(
            f"feature {_name(features[0], names)} has values too large for their squares to be "
            "float64 numbers: divide it by a power of ten first"
        )


def _warn_if_drowned(
    learned: Parameters,
    total: TotalMoments,
    reg_covar: float,
    names: Sequence[str],
    *,
    stacklevel: int,
) -> None:
    """Warn of a feature whose variances are mostly reg_covar, which does not know its unit."""
    own = (learned.variances() - reg_covar).amax(0)
    variances = total.variances
    # All components on one value each are no matter of units.
    drowned = (variances < reg_covar) | ((own < reg_covar) & (own > 1e-9 * reg_covar))
    drowned[list(total.constant_features())] = False
    if not bool(drowned.any()):
        return
    j = int(drowned.nonzero()[0])
    warnings.warn(
        f"reg_covar={reg_covar:g} is more than the variance of feature {_name(j, names)} in any "
        f"component, so that the components hardly differ in it: scale the feature, or set "
        f"reg_covar far below {float(variances[j]):.2g}, its variance over all rows",
        UserWarning,
        stacklevel=stacklevel,
    )


def _name(feature: int, names: Sequence[str]) -> str:
    return repr(str(names[feature])) if len(names) else f"{feature}"


def _have_factors(kind: str, covariances: Tensor, factors: Tensor) -> bool:
    """Say whether these are the factors of the covariances' precisions, up to rounding."""
    if not bool(factors.isfinite().all()):
        return False
    own, failed = FAMILIES[kind].precisions_cholesky(covariances)
    atol = 1e-9 * float(factors.abs().max())
    return not bool(failed.any()) and torch.allclose(own, factors, rtol=1e-9, atol=atol)


def _covariances_of(kind: str, factors: Tensor) -> Tensor:
    """Return the inverses of U Uᵀ, or of 1/σ squared."""
    if kind in ("full", "tied"):
        eye = torch.eye(factors.shape[-1], dtype=factors.dtype)
        lower = torch.linalg.solve_triangular(factors.mT, eye.expand_as(factors), upper=False)
        covariances: Tensor = lower @ lower.mT
    else:
        covariances = factors.square().reciprocal()
    _, failed = FAMILIES[kind].precisions_cholesky(covariances)
    if bool(failed.any()):
        raise ValueError(
            "precisions_cholesky_ are not the factors of positive-definite precisions, or so "
            "near to singular that float64 does not hold their inverses: raise reg_covar, or "
            "scale the features"
        )
    return covariances


def _n_rows(scores: Any) -> int:
    n: int = scores.shape[0]
    return n


def _plain(value: Any) -> Any:
    """Return an array of its own of a tensor or array, a list's own copy, and else the value."""
    if isinstance(value, Tensor) or is_foreign(value):
        return array_of(value).copy()
    return value.copy() if isinstance(value, np.ndarray | list) else value


def _require_weights(weights: Tensor) -> None:
    if bool((weights < 0).any() | (weights > 1).any()):
        # The least comes first in scikit-learn's message too, and its tests look for it.
        raise ValueError(
            "The parameter 'weights' should be in the range [0, 1], but got max value "
            f"{float(weights.min()):.5f}, min value {float(weights.max()):.5f}"
        )
    if not math.isclose(total := float(weights.sum()), 1, abs_tol=1e-6):
        raise ValueError(
            f"The parameter 'weights' should be normalized, but got sum(weights) = {total:.5f}"
        )


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


class _Teller:
    """Prints what scikit-learn prints of a fit, where `verbose` asks for it."""

    def __init__(self, trials: Sequence[Trial], verbose: int, interval: int) -> None:
        self._trials, self._verbose, self._interval = trials, verbose, interval
        self._began = self._last = time.monotonic()

    def stepped(self, trial: Trial, change: float) -> None:
        if not self._verbose or trial.n_iter % self._interval:
            return
        line = f"Initialization {self._trials.index(trial)}  Iteration {trial.n_iter}"
        if self._verbose > 1:
            now = time.monotonic()
            line += f"\t time lapse {now - self._last:.5f}s\t ll change {change:.5f}"
            self._last = now
        print(line)  # noqa: T201 - what `verbose` is for

    def ended(self) -> None:
        if not self._verbose:
            return
        for number, trial in enumerate(self._trials):
            line = f"Initialization {number} "
            line += "converged." if trial.converged else "did not converge."
            if self._verbose > 1:
                line += f" time lapse {time.monotonic() - self._began:.5f}s"
                line += f"\t lower bound {trial.lower_bound:.5f}."
            print(line)  # noqa: T201 - what `verbose` is for


def _or_least(bound: float) -> float:
    return -math.inf if math.isnan(bound) else bound

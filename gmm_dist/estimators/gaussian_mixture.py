"""scikit-learn's GaussianMixture, of arrays and of lakes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Self

import sklearn.mixture
import torch
from sklearn import get_config
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils._param_validation import Interval
from torch import Tensor

from gmm_dist.config import ABSOLUTE, Cluster, EMConfig
from gmm_dist.em.lane import MaximumLikelihood, Model, Status
from gmm_dist.em.loop import FitResult
from gmm_dist.em.mstep import maximised
from gmm_dist.em.statistics import TotalMoments
from gmm_dist.errors import UserError
from gmm_dist.estimators.attributes import copied, exchanged, expanded, publish, require_class
from gmm_dist.estimators.base import (
    ARRAY_API_INITS,
    NOT_CONVERGED,
    BaseMixture,
    CentredRows,
    singular,
)
from gmm_dist.estimators.init_params import empty_rows
from gmm_dist.estimators.local_rows import Resident
from gmm_dist.estimators.settings import feature_name, require_no_cluster, search_of, starts_of
from gmm_dist.lake.lake import Lake
from gmm_dist.model.arrays import (
    Rows,
    Space,
    checked_start,
    mean_of,
    require_rows_or_lake,
    space_of,
    tensor_of,
)
from gmm_dist.model.covariance import Moments
from gmm_dist.model.criteria import aic, bic, icl, n_parameters
from gmm_dist.model.mixture import Mixture
from gmm_dist.model.parameters import Parameters
from gmm_dist.model.soundness import flaw
from gmm_dist.selection.ranking import Candidate, SweepResult
from gmm_dist.selection.sweep import sweep
from gmm_dist.shards.local import one_thread
from gmm_dist.shards.reweighted import unit_of

if TYPE_CHECKING:
    from gmm_dist.estimators.kept import KeptFit
    from gmm_dist.lake.plan import Plan


class GaussianMixture(BaseMixture):
    """Fit a mixture of Gaussians: a drop-in for scikit-learn's, with weights.

    The parameters are scikit-learn's, and three more: `precision` is the arithmetic of the
    passes ("float64"; "auto": float32 while its measured error is harmless; "float32"; None:
    float64 for rows in memory, auto for a lake), `device` where rows are worked on (None: where
    they are), `n_shards` into how many parts they are dealt (None: by their number; sums have the
    same bits for the same number of shards).

    `init_params="search"` fits rows in memory as a lake is fitted: from the best starts that a
    search on a sample finds, by `n_init` seeded ones and moves of their components, leaping ahead
    of EM where that raises the likelihood; it stops where it has scored, a step before
    scikit-learn would. `init_params` and `n_init` are None by default: "kmeans" and 1 for rows in
    memory, as in scikit-learn, "search" and 16 for a lake; any other `init_params` seeds a lake's
    search.

    A lake (`gmm_dist.Lake`) is fitted on Ray. `verbose` tells nothing of a search, and `device` and
    `n_shards` are for rows in memory.

    Learned: `weights_` (k,), `means_` (k, d), `covariances_`, `precisions_` and
    `precisions_cholesky_` (full (k, d, d), tied (d, d), diag (k, d), spherical (k,), tied-diag
    (d,), tied-spherical ()),
    `converged_`, `n_iter_`, `lower_bound_` (nats per row) and `lower_bounds_`, `n_features_in_`
    and `feature_names_in_`; `init_params_` and `n_init_`, how it was started ("given": from
    parameters).
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **BaseMixture._parameter_constraints,
        "weights_init": ["array-like", None],
        "means_init": ["array-like", None],
        "precisions_init": ["array-like", Interval(Real, None, None, closed="neither"), None],
    }

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance_type: str = "full",
        tol: float = 1e-3,
        reg_covar: float = 1e-6,
        max_iter: int = 100,
        n_init: int | None = None,
        init_params: str | None = None,
        weights_init: Any = None,
        means_init: Any = None,
        precisions_init: Any = None,
        random_state: Any = None,
        warm_start: bool = False,
        verbose: int = 0,
        verbose_interval: int = 10,
        precision: str | None = None,
        device: str | torch.device | None = None,
        n_shards: int | None = None,
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
        self.n_shards = n_shards

    def bic(self, X: Any, *, cluster: Cluster | None = None) -> float:
        """Return the Bayesian information criterion on rows X, or on a lake; lower is better.

        `cluster` is as for `fit`.
        """
        if isinstance(X, Lake):
            return float(self._lake_scores(X, cluster).bic)
        require_no_cluster(cluster)
        n = _n_rows(scores := self.score_samples(X))
        return bic(mean_of(scores) * n, self._n_parameters(), n)

    def aic(self, X: Any, *, cluster: Cluster | None = None) -> float:
        """Return Akaike's information criterion on rows X, or on a lake; lower is better.

        `cluster` is as for `fit`.
        """
        if isinstance(X, Lake):
            return float(self._lake_scores(X, cluster).aic)
        require_no_cluster(cluster)
        scores = self.score_samples(X)
        return aic(mean_of(scores) * _n_rows(scores), self._n_parameters())

    def icl(self, X: Any, *, cluster: Cluster | None = None) -> float:
        """Return the BIC plus twice the soft entropy of the labels, of rows or of a lake.

        Lower is better; `cluster` is as for `fit`.
        """
        if isinstance(X, Lake):
            return float(self._lake_scores(X, cluster).icl)
        require_no_cluster(cluster)
        resp = tensor_of(self.predict_proba(X))
        return icl(self.bic(X), float(-torch.special.xlogy(resp, resp).sum()))

    @classmethod
    def from_mixture(cls, mixture: Mixture) -> Self:
        """Return an estimator that has learned this mixture, such as one that was loaded.

        Parameters that a mixture does not have keep their defaults. `n_iter_` is 0 and
        `converged_` False, because a mixture does not record how it was fitted; with `warm_start`
        a fit goes on from it. Quantiles and the components' numbers are dropped.

        >>> from gmm_dist import GaussianMixture
        >>> X = [[0.0], [1.0], [8.0], [9.0]]
        >>> mixture = GaussianMixture(2, random_state=0).fit(X).to_mixture()
        >>> sorted(GaussianMixture.from_mixture(mixture).predict([[0.5], [8.5]]).tolist())
        [0, 1]

        Raises TypeError for anything but a `Mixture`; UserError where its numbers are not a
        mixture's, or a posterior's.
        """
        if not isinstance(mixture, Mixture):
            raise TypeError(
                f"from_mixture takes a gmm_dist.Mixture, not a {type(mixture).__name__}: "
                "gmm_dist.load returns one, and so does an estimator's to_mixture"
            )
        learned = mixture.parameters
        if learned.log_weights is not None:
            raise UserError(
                "the mixture is a posterior's, with expected log-weights: give a plain one, "
                "BayesianGaussianMixture.to_mixture()"
            )
        if (what := flaw(learned)) is not None:
            raise UserError(f"the mixture's numbers are none: {what}; fit anew")
        estimator = cls(mixture.n_components, covariance_type=mixture.covariance_type)
        publish(estimator, copied(learned), Space(dtype=torch.float64))
        estimator._name_features(mixture.n_features, mixture.feature_names)
        estimator._n_samples = mixture.n_samples
        estimator._log_likelihood = mixture.log_likelihood
        mean = mixture.log_likelihood / mixture.n_samples if mixture.n_samples else math.nan
        estimator.converged_, estimator.n_iter_, estimator.lower_bounds_ = False, 0, []
        estimator.lower_bound_ = -math.inf if math.isnan(mean) else mean
        return estimator

    def to_sklearn(self) -> Any:
        """Return scikit-learn's own GaussianMixture with these parameters and what was learned.

        Learned numbers are the same to the bit. A covariance type that scikit-learn lacks becomes
        `diag`, with as many covariances as components: its `bic` and `aic` count them all.
        """
        return expanded(self, exchanged(self, sklearn.mixture.GaussianMixture()))

    @classmethod
    def from_sklearn(cls, fitted: Any) -> Self:
        """Return our estimator for one of scikit-learn's, fitted or not; numbers are the same.

        Raises TypeError for any other class, ValueError where its numbers are no mixture's.
        """
        require_class(fitted, sklearn.mixture.GaussianMixture)
        estimator: Self = exchanged(fitted, cls())
        estimator._require_sound()
        return estimator

    def _n_parameters(self) -> int:
        k, d = self.means_.shape
        return n_parameters(self.covariance_type, k, d)

    def _check_parameters(self, rows: Rows) -> None:
        k, d = self.n_components, rows.shape[1]
        init_params, _ = starts_of(self, is_lake=False)
        if get_config()["array_api_dispatch"] and init_params not in ARRAY_API_INITS:
            raise NotImplementedError(
                f"Allowed `init_params` are {list(ARRAY_API_INITS)} if 'array_api_dispatch' is "
                f"enabled. You passed init_params={init_params!r}: k-means runs on NumPy"
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
        shape, name = self._type.shape(self.n_components, d), f"{self._type.name} precision"
        covariances = self._type.of_precisions(checked_start(self.precisions_init, shape, name))
        if covariances is None:
            raise ValueError(f"'{name}' should be {self._type.validity}")
        return covariances

    def _needs_shares(self) -> bool:
        return any(v is None for v in (self.weights_init, self.means_init, self.precisions_init))

    def _first_model(self, moments: Moments | None, rows: Resident) -> Model:
        kind, d = self.covariance_type, len(rows.centre)
        initial: dict[str, Any] = {}
        if self.weights_init is not None:
            initial["weights"] = tensor_of(self.weights_init)
        if self.means_init is not None:
            initial["means"] = tensor_of(self.means_init) - rows.centre
        if self.precisions_init is not None:
            initial["covariances"] = self._covariances_init(d)
        if moments is None:
            return self._model(Parameters(**initial, covariance_type=kind), rows)
        estimated = maximised(kind, moments, self.reg_covar, empty_rows(rows.total))
        # Of all rows, as in scikit-learn: where seeds share out k rows only, they sum to k / n.
        shared = float(moments.nk.sum()) / rows.total.n_samples
        estimated = replace(estimated, weights=estimated.weights * shared)
        return self._model(replace(estimated, **initial), rows)

    def _fitted_model(self, rows: CentredRows) -> Model:
        return self._model(self._parameters().shifted(-rows.centre), rows)

    def _model(self, parameters: Parameters, rows: CentredRows) -> MaximumLikelihood:
        reg = torch.full_like(rows.total.sum_x, self.reg_covar)
        return MaximumLikelihood(parameters, reg, empty_rows(rows.total))

    def _fit_lake(self, plan: Plan, cluster: Cluster, kept: KeptFit) -> None:
        from gmm_dist.fitting.lake_sweep import sweep_lake

        swept = sweep_lake(
            plan,
            [self._candidate()],
            self._search_config(),
            search_of(self, kept.seed),
            cluster=cluster,
            initial_parameters=self._start_parameters(),
            resume=kept.latest,
            keep=kept.keep,
        )
        self._adopt(swept.result, swept.centre, swept.feature_names, Space(dtype=torch.float64))

    def _fit_searched(self, X: Any, sample_weight: Any) -> None:
        """Fit rows in memory as a lake is fitted, to the same bits."""
        require_rows_or_lake(X)
        self._validate_params()
        with one_thread():
            rows, weight = self._checked_rows(X, sample_weight)
            self._check_parameters(rows)
            is_warm, start = self._is_warm(), self._start_parameters()
            resident = self._resident(rows, weight)
            names = tuple(getattr(self, "feature_names_in_", ()))
            result = sweep(
                resident.shards,
                [self._candidate()],
                self._search_config(),
                search_of(self),
                n_features=rows.shape[1],
                feature_names=names,
                centre=resident.centre,
                initial=None if start is None else [start.shifted(-resident.centre)],
            )
        self._adopt(result, resident.centre, names, space_of(X, rows))
        self._note_starts(is_lake=False, is_warm=is_warm)

    def _candidate(self) -> Candidate:
        return Candidate(self.n_components, self.covariance_type)

    def _search_config(self) -> EMConfig:
        """Return the rules of EM from starts that a search finds."""
        return EMConfig(
            tol=self.tol,
            max_iter=self.max_iter,
            reg_covar=self.reg_covar,
            precision=self.precision or "auto",
            reg_unit=ABSOLUTE,
        )

    def _adopt(
        self, result: SweepResult, centre: Tensor, names: Sequence[str], space: Space
    ) -> None:
        fit = result.scored[0].fit
        adopt(self, fit, centre, names, space, stacklevel=5)
        _warn_if_drowned(fit.parameters, result.total, self.reg_covar, names, stacklevel=5)

    def _start_parameters(self) -> Parameters | None:
        """Return the start set by `warm_start` or the `*_init` parameters; None for neither."""
        if self.warm_start and hasattr(self, "converged_"):
            self._require_warm(self.means_.shape[1])  # the sweep checks the lake's columns
            return self._parameters()
        inits = (self.weights_init, self.means_init, self.precisions_init)
        if all(init is None for init in inits):
            return None
        if any(init is None for init in inits):
            raise ValueError(
                "a lake, and rows in memory with init_params='search', start from a search, or "
                "from all of weights_init, means_init, precisions_init: give all three, or none"
            )
        means = tensor_of(self.means_init)
        covariances = self._covariances_init(means.shape[1])
        return Parameters(
            weights=tensor_of(self.weights_init),
            means=means,
            covariances=covariances,
            covariance_type=self.covariance_type,
        )

    def _publish(self, model: MaximumLikelihood, rows: CentredRows, space: Space) -> None:
        publish(self, model.parameters.shifted(rows.centre), space)
        names = getattr(self, "feature_names_in_", ())
        _warn_if_drowned(model.parameters, rows.total, self.reg_covar, names, stacklevel=5)


def adopt(
    estimator: BaseMixture,
    fit: FitResult,
    centre: Tensor,
    feature_names: Sequence[str],
    space: Space,
    *,
    stacklevel: int = 4,
) -> None:
    """Set an estimator's learned attributes from a sweep's fit.

    Args:
        estimator: Receives the learned attributes.
        fit: A candidate's fit.
        centre: The centre (d,) that the fit is about, in feature units.
        feature_names: Names of the features, for messages.
        space: The kind of array that attributes are.
        stacklevel: That of the caller whom a warning names.

    Raises ValueError where the fit collapsed; warns with ConvergenceWarning and the status
    sentence where it did not converge or is degenerate.
    """
    if fit.status is Status.COLLAPSED:
        raise ValueError(f"{singular(estimator.precision)} ({fit.status.value})")
    if fit.status is not Status.CONVERGED:
        warnings.warn(
            f"{NOT_CONVERGED} ({fit.status.value})", ConvergenceWarning, stacklevel=stacklevel
        )
    publish(estimator, fit.parameters.shifted(centre), space)
    estimator._name_features(fit.parameters.n_features, feature_names)
    estimator._n_samples, estimator._log_likelihood = fit.n_samples, fit.log_likelihood
    estimator.converged_, estimator.n_iter_ = fit.converged, fit.n_iter
    estimator.lower_bound_ = fit.log_likelihood / fit.n_samples
    estimator.lower_bounds_ = list(fit.lower_bounds)


def _warn_if_drowned(
    learned: Parameters,
    total: TotalMoments,
    reg_covar: float,
    names: Sequence[str],
    *,
    stacklevel: int,
) -> None:
    """Warn of a feature whose variances are mostly reg_covar, which does not know its unit."""
    unregularised = (learned.variances() - reg_covar).amax(0)
    variances = total.variances
    # Where every component lies on a single value, units are not the matter.
    drowned = unregularised < reg_covar
    drowned &= unregularised > 1e-9 * reg_covar
    drowned |= variances < reg_covar
    drowned[list(total.constant_features())] = False
    if not bool(drowned.any()):
        return
    j = int(drowned.nonzero()[0])
    warnings.warn(
        f"reg_covar={reg_covar:g} is more than the variance of feature {feature_name(j, names)} in "
        f"any component, so that the components hardly differ in it: scale the feature, or set "
        f"reg_covar far below {float(variances[j]):.2g}, its variance over all rows",
        UserWarning,
        stacklevel=stacklevel,
    )


def _n_rows(scores: Any) -> int:
    return int(scores.shape[0])


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

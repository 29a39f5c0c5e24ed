"""scikit-learn's face of the variational mixture: `BayesianGaussianMixture`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import sklearn.mixture
import torch
from sklearn.utils._param_validation import Interval, StrOptions
from torch import Tensor

from gmm_dist.config import ABSOLUTE, Cluster, EMConfig, StartConfig
from gmm_dist.em.estep import SumMoments
from gmm_dist.em.lane import Lane, restore_lanes
from gmm_dist.em.statistics import TotalMoments
from gmm_dist.estimators.attributes import exchanged, publish, require_class
from gmm_dist.estimators.base import BaseMixture, CentredRows, no_watch
from gmm_dist.estimators.local_rows import Resident
from gmm_dist.estimators.restarts import ranked
from gmm_dist.estimators.settings import search_of
from gmm_dist.model.arrays import Rows, Space, array_of, checked_start, tensor_of
from gmm_dist.model.covariance import Moments
from gmm_dist.model.mixture import Mixture
from gmm_dist.model.parameters import Parameters
from gmm_dist.model.variational import (
    VARIATIONAL_TYPES,
    WEIGHT_PRIORS,
    Posterior,
    Prior,
    m_step,
    updated,
)
from gmm_dist.selection.ranking import Candidate
from gmm_dist.selection.starts import find_starts
from gmm_dist.selection.sweep import require_rows
from gmm_dist.shards.protocol import WorkingShards

if TYPE_CHECKING:
    from gmm_dist.estimators.kept import KeptFit
    from gmm_dist.lake.plan import Plan

_POSITIVE = Interval(Real, 0.0, None, closed="neither")
_SIZES = 12  # numbers of components that starts on a lake have, at the most
_FIRST, _KEPT = 3, 2  # passes over a lake for all starts, and how many go on


@dataclass(frozen=True, slots=True, eq=False)
class _LakeRows:
    """A lake's rows in Ray's workers, about `centre` (d,), and their moments."""

    centre: Tensor
    shards: WorkingShards
    total: TotalMoments


class BayesianGaussianMixture(BaseMixture):
    """Infer a posterior over mixtures of Gaussians; a drop-in for scikit-learn's, with weights.

    The parameters are scikit-learn's, and two more: `device` where rows are worked on (None:
    where they are) and `n_shards` into how many parts they are dealt (None: by their number).
    Passes are float64. As in scikit-learn `tol` is the change of the whole lower bound (nats),
    not of its mean over rows, so many rows want a larger one. Priors that are
    not given are scikit-learn's: the covariance prior is that of all rows, with n - 1 for n.

    A lake (`gmm_dist.Lake`) is fitted on Ray, also in float64. A search on a sample (`n_init`
    seeded starts; None for 16) finds mixtures of several numbers of components up to
    `n_components`; each, with empty components beside it, is a start, and those that lead after a
    few passes over all rows are followed to the end. `init_params="search"` does so with rows in
    memory; None is "kmeans" for these, as in scikit-learn.

    Learned: `weights_` (k,), `means_` (k, d), `covariances_`, `precisions_` and
    `precisions_cholesky_` as in `GaussianMixture`, `weight_concentration_` (k,), or two of them
    where the prior is a Dirichlet process, `mean_precision_` (k,), `degrees_of_freedom_` (k,),
    tied (); the priors that were used, `weight_concentration_prior_`, `mean_precision_prior_`,
    `mean_prior_`, `degrees_of_freedom_prior_`, `covariance_prior_`; `converged_`, `n_iter_`,
    `lower_bound_` (nats, without constants) and `lower_bounds_`, `n_features_in_` and
    `feature_names_in_`; `init_params_` and `n_init_`, how it was started ("given": from the last
    fit).
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **{k: v for k, v in BaseMixture._parameter_constraints.items() if k != "precision"},
        "covariance_type": [StrOptions(set(VARIATIONAL_TYPES))],
        "weight_concentration_prior_type": [StrOptions(set(WEIGHT_PRIORS))],
        "weight_concentration_prior": [None, _POSITIVE],
        "mean_precision_prior": [None, _POSITIVE],
        "mean_prior": [None, "array-like"],
        "degrees_of_freedom_prior": [None, _POSITIVE],
        "covariance_prior": [None, "array-like", _POSITIVE],
    }
    # The bound's entropy, to a tol over all rows, is beyond float32.
    precision = "float64"
    _bound_is_likelihood = math.nan

    weight_concentration_: Any
    mean_precision_: Any
    degrees_of_freedom_: Any
    weight_concentration_prior_: float
    mean_precision_prior_: float
    mean_prior_: Any
    degrees_of_freedom_prior_: float
    covariance_prior_: Any

    def __init__(
        self,
        *,
        n_components: int = 1,
        covariance_type: str = "full",
        tol: float = 1e-3,
        reg_covar: float = 1e-6,
        max_iter: int = 100,
        n_init: int | None = None,
        init_params: str | None = None,
        weight_concentration_prior_type: str = "dirichlet_process",
        weight_concentration_prior: float | None = None,
        mean_precision_prior: float | None = None,
        mean_prior: Any = None,
        degrees_of_freedom_prior: float | None = None,
        covariance_prior: Any = None,
        random_state: Any = None,
        warm_start: bool = False,
        verbose: int = 0,
        verbose_interval: int = 10,
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
        self.weight_concentration_prior_type = weight_concentration_prior_type
        self.weight_concentration_prior = weight_concentration_prior
        self.mean_precision_prior = mean_precision_prior
        self.mean_prior = mean_prior
        self.degrees_of_freedom_prior = degrees_of_freedom_prior
        self.covariance_prior = covariance_prior
        self.random_state = random_state
        self.warm_start = warm_start
        self.verbose = verbose
        self.verbose_interval = verbose_interval
        self.device = device
        self.n_shards = n_shards

    def to_mixture(self) -> Mixture:
        """Return the plain mixture of the expected `weights_`, `means_` and `covariances_`.

        Its densities differ a little from the posterior's, which take the expected logarithms of
        weights and determinants. Raises NotFittedError.
        """
        return super().to_mixture()

    def to_sklearn(self) -> Any:
        """Return scikit-learn's own BayesianGaussianMixture with what was set and learned.

        Learned numbers are the same to the bit.
        """
        return _detached(exchanged(self, sklearn.mixture.BayesianGaussianMixture()))

    @classmethod
    def from_sklearn(cls, fitted: Any) -> Self:
        """Return our estimator for one of scikit-learn's, fitted or not; numbers are the same.

        Raises TypeError for any other class, ValueError where its numbers are no mixture's.
        """
        require_class(fitted, sklearn.mixture.BayesianGaussianMixture)
        estimator: Self = _detached(exchanged(fitted, cls()))
        if hasattr(estimator, "lower_bound_"):
            # Theirs have an axis or two of length one where covariances are tied.
            bounds = estimator.lower_bounds_
            estimator.lower_bound_ = float(np.ravel(estimator.lower_bound_)[0])
            estimator.lower_bounds_ = [float(np.ravel(bound)[0]) for bound in bounds]
        estimator._require_sound()
        return estimator

    def _check_parameters(self, rows: Rows) -> None:
        self._check_beliefs(rows.shape[1])

    def _check_beliefs(self, d: int) -> None:
        nu = self.degrees_of_freedom_prior
        if nu is not None and nu <= d - 1:
            raise ValueError(
                "The parameter 'degrees_of_freedom_prior' should be greater than "
                f"{d - 1}, but got {nu:.3f}."
            )
        self._given_mean(d)
        self._given_covariance(d)

    def _first_model(self, moments: Moments | None, rows: Resident) -> Posterior:
        assert moments is not None
        return m_step(self._prior(rows), moments)

    def _fitted_model(self, rows: CentredRows) -> Posterior:
        return self._posterior(self._prior(rows).shifted(rows.centre)).shifted(-rows.centre)

    def _fit_lake(self, plan: Plan, cluster: Cluster, kept: KeptFit) -> None:
        from gmm_dist.fitting.lake_sweep import loader_of, resident

        self._check_beliefs(plan.n_features)
        if self._is_warm():
            self._require_warm(plan.n_features)
        # One lane per start in the first passes; each start has all the components.
        candidates = [
            Candidate(self.n_components, self.covariance_type) for _ in _sizes(self.n_components)
        ]
        loader = loader_of(plan, candidates, cluster)
        with resident(loader, candidates, cluster) as (shards, _):
            total = shards.run(SumMoments(plan.n_features))
            rows = _LakeRows(torch.from_numpy(loader.centre), shards, total)
            require_rows(candidates, rows.total.n_rows)
            best = self._best_searched(rows, kept)
        self._publish(best.model, rows, Space(dtype=torch.float64))
        self._name_features(plan.n_features, plan.feature_names)
        self._conclude(best, rows.total.n_samples)

    _fit_searched = BaseMixture._fit

    def _best_lane(self, rows: Rows, weight: Tensor | None, resident: Resident) -> Lane:
        if self._searches() and not self._is_warm():
            return self._best_searched(resident)
        return super()._best_lane(rows, weight, resident)

    def _best_searched(self, rows: CentredRows, kept: KeptFit | None = None) -> Lane:
        """Iterate starts of several sizes for a few passes, and those that lead to the end."""
        is_sifted = self._is_warm()
        if kept is not None and (saved := kept.latest) is not None:
            lanes, is_sifted = restore_lanes(saved), bool(saved.state["sifted"])
        elif is_sifted:
            lanes = [self._lane(self._fitted_model(rows), rows.total, self.lower_bound_)]
        else:
            lanes = self._searched_lanes(rows, search_of(self, kept.seed if kept else None))
        if not is_sifted:
            watch = kept.watch(sifted=False) if kept else no_watch
            self._iterate(lanes, rows, min(_FIRST, self.max_iter), watch=watch)
            lanes = ranked(lanes)[:_KEPT]
        watch = kept.watch(sifted=True) if kept else no_watch
        return self._best_of([lanes], rows, watch=watch)

    def _searched_lanes(self, rows: CentredRows, start: StartConfig) -> list[Lane]:
        """Return lanes from starts of several sizes.

        Maximum likelihood uses every component, and from there the bound rises slowly: mixtures
        of k components are hardly ever the best start for a posterior of k.
        """
        prior, k, n = self._prior(rows), self.n_components, rows.total.n_samples
        candidates = [Candidate(size, self.covariance_type) for size in _sizes(k)]
        # The search's tol is per row; ours is for the whole bound.
        config = EMConfig(reg_covar=float(self.reg_covar), reg_unit=ABSOLUTE)
        start = replace(start, finalists=1)
        starts = find_starts(rows.shards, candidates, config, start, rows.total)
        # The largest first: it is the one kept where max_iter is 0.
        mixtures = [_filled(best, k) for (best,) in reversed(starts)]
        models = [updated(prior, mixture.weights * n, mixture) for mixture in mixtures]
        return [self._lane(model, rows.total) for model in models]

    def _publish(self, model: Any, rows: CentredRows, space: Space) -> None:
        posterior = model.shifted(rows.centre)
        self._publish_prior(posterior.prior, space)
        concentration = posterior.weight_concentration
        if concentration.ndim == 2:
            self.weight_concentration_ = tuple(space.of(part) for part in concentration)
        else:
            self.weight_concentration_ = space.of(concentration)
        self.mean_precision_ = space.of(posterior.mean_precision)
        self.degrees_of_freedom_ = space.of(posterior.degrees_of_freedom)
        publish(self, posterior.parameters, space)

    def _publish_prior(self, prior: Prior, space: Space) -> None:
        d = len(prior.mean)
        mean, covariance = self._given_mean(d), self._given_covariance(d)
        self.weight_concentration_prior_ = prior.weight_concentration
        self.mean_precision_prior_ = prior.mean_precision
        nu = self.degrees_of_freedom_prior
        self.degrees_of_freedom_prior_ = d if nu is None else nu
        # Priors that the user set are published unchanged.
        self.mean_prior_ = space.of(prior.mean if mean is None else mean)
        self.covariance_prior_ = space.of(prior.covariance if covariance is None else covariance)[
            ()
        ]

    def _parameters(self) -> Parameters:
        prior = Prior(
            covariance_type=self.covariance_type,
            weight_prior=self.weight_concentration_prior_type,
            weight_concentration=self.weight_concentration_prior_,
            mean_precision=self.mean_precision_prior_,
            mean=tensor_of(self.mean_prior_),
            degrees_of_freedom=float(self.degrees_of_freedom_prior_),
            covariance=tensor_of(self.covariance_prior_),
        )
        return self._posterior(prior).parameters

    def _posterior(self, prior: Prior) -> Posterior:
        """Return the learned posterior, in feature units."""
        concentration = self.weight_concentration_
        if isinstance(concentration, tuple):
            weight_concentration = torch.stack([tensor_of(part) for part in concentration])
        else:
            weight_concentration = tensor_of(concentration)
        return Posterior(
            prior=prior,
            weight_concentration=weight_concentration,
            mean_precision=tensor_of(self.mean_precision_),
            means=tensor_of(self.means_),
            degrees_of_freedom=tensor_of(self.degrees_of_freedom_),
            covariances=self._covariances(),
        )

    def _prior(self, rows: CentredRows) -> Prior:
        """Return the prior, about the rows' shared centre."""
        d, concentration = len(rows.centre), self.weight_concentration_prior
        mean, covariance = self._given_mean(d), self._given_covariance(d)
        precision, nu = self.mean_precision_prior, self.degrees_of_freedom_prior
        return Prior(
            covariance_type=self.covariance_type,
            weight_prior=self.weight_concentration_prior_type,
            weight_concentration=1.0 / self.n_components
            if concentration is None
            else float(concentration),
            mean_precision=1.0 if precision is None else float(precision),
            mean=rows.total.mean if mean is None else mean - rows.centre,
            degrees_of_freedom=float(d if nu is None else nu),
            covariance=self._covariance_of(rows) if covariance is None else covariance,
            reg_covar=float(self.reg_covar),
        )

    def _covariance_of(self, rows: CentredRows) -> Tensor:
        """Return the covariance of all rows: unbiased where weights count rows."""
        n = rows.total.n_samples
        if n <= 1:
            raise ValueError(
                f"the rows' weights sum to {n:g}: the covariance of all rows, which is the default "
                "for covariance_prior, takes more than one row; give covariance_prior, or "
                "weights that count rows"
            )
        total = rows.total
        spread = total.covariance if self._type.has_products else total.variances
        return self._type.nearest(spread * (n / (n - 1)))

    def _given_mean(self, n_features: int) -> Tensor | None:
        if self.mean_prior is None:
            return None
        return checked_start(self.mean_prior, (n_features,), "means")

    def _given_covariance(self, n_features: int) -> Tensor | None:
        """Return covariance_prior in float64; raise ValueError if it is not a covariance."""
        if self.covariance_prior is None:
            return None
        name, shape = f"{self.covariance_type} covariance_prior", self._type.cell(n_features)
        covariance = checked_start(self.covariance_prior, shape, name)
        symmetric = covariance.ndim < 2 or torch.allclose(covariance, covariance.mT)
        _, failed = self._type.precisions_cholesky(covariance[None])
        if not symmetric or bool(failed.any()):
            raise ValueError(f"'{name}' should be {self._type.validity}")
        return covariance


def _sizes(k: int) -> list[int]:
    """Return numbers of components from one to k: all, or some at equal distances."""
    n = min(k, _SIZES)
    return [-(-k * i // n) for i in range(1, n + 1)]


def _filled(mixture: Parameters, k: int) -> Parameters:
    """Return the mixture with empty components, k in all; the largest come first.

    A broken stick expects them in that order.
    """
    size = mixture.n_components
    order = mixture.weights.argsort(descending=True)
    # Empty components: the posterior does not depend on their means and covariances.
    order = torch.cat([order, order[:1].expand(k - size)])
    weights = mixture.weights[order]
    weights[size:] = 0.0
    covariances = mixture.covariances
    if not mixture.type.is_shared:
        covariances = covariances[order]
    return replace(mixture, weights=weights, means=mixture.means[order], covariances=covariances)


def _detached(estimator: Any) -> Any:
    """Copy an estimator's pair of weight concentrations, which `exchanged` shares."""
    concentration = getattr(estimator, "weight_concentration_", None)
    if isinstance(concentration, tuple):
        estimator.weight_concentration_ = tuple(array_of(part).copy() for part in concentration)
    return estimator

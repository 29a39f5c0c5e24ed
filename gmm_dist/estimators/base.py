"""How both estimators fit: to rows in memory as scikit-learn does, to a lake on Ray.

The estimators keep scikit-learn's contract: parameters are stored as given, learned attributes
end in `_` and are of the rows' own kind (array or tensor, dtype, device), the same start leads
to the same result. All arithmetic is float64, unless `precision` says otherwise.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_sample_weight
from torch import Tensor

from gmm_dist import config
from gmm_dist.config import ABSOLUTE, PRECISIONS, Cluster, EMConfig
from gmm_dist.em.lane import Lane, Model, Status
from gmm_dist.em.loop import Watch, require_definite, run
from gmm_dist.em.mstep import SingularCovarianceError
from gmm_dist.em.statistics import TotalMoments
from gmm_dist.estimators.fitted import FittedMixture
from gmm_dist.estimators.init_params import INIT_PARAMS, SEARCH, moments_of_shares, shares_of
from gmm_dist.estimators.local_rows import Resident, robust_centre
from gmm_dist.estimators.restarts import Reporter, ranked
from gmm_dist.estimators.settings import (
    require_lake_settings,
    require_no_cluster,
    require_no_output,
    require_range,
    starts_of,
)
from gmm_dist.lake.lake import Lake
from gmm_dist.model.arrays import (
    Rows,
    Space,
    array_of,
    checked,
    device_of,
    require_rows_in_memory,
    require_rows_or_lake,
    space_of,
    tensor_of,
    unmasked,
    viewed,
)
from gmm_dist.model.covariance import COVARIANCE_TYPES, Moments
from gmm_dist.model.parameters import Parameters
from gmm_dist.shards.local import one_thread
from gmm_dist.shards.protocol import WorkingShards

if TYPE_CHECKING:
    from gmm_dist.estimators.kept import KeptFit
    from gmm_dist.lake.plan import Plan

SINGULAR = (
    "Fitting the mixture model failed because some components have ill-defined empirical "
    "covariance (for instance caused by singleton or collapsed samples). Try to decrease the "
    "number of components, increase reg_covar, or scale the input data."
)
NOT_CONVERGED = (
    "Best performing initialization did not converge. Try different init parameters, or "
    "increase max_iter, tol, or check for degenerate data."
)
ARRAY_API_INITS = ("random", "random_from_data")


def singular(precision: str | None) -> str:
    """Return what a singular covariance is told by: float32 may be all that is wrong."""
    if precision != "float32":
        return SINGULAR
    return (
        f"{SINGULAR} Or leave out precision='float32', which loses the digits of narrow components "
        "that lie far apart."
    )


def no_watch(lanes: Sequence[Lane]) -> None:
    """Let passes go by."""


class CentredRows(Protocol):
    """Rows in shards, about `centre` (d,), and their moments."""

    @property
    def centre(self) -> Tensor: ...

    @property
    def shards(self) -> WorkingShards: ...

    @property
    def total(self) -> TotalMoments: ...


class BaseMixture(FittedMixture):
    """What both estimators share of fitting: inputs, and the loop over starts.

    A subclass makes its models, all about the rows' shared centre: `_first_model` from the
    moments of rows shared out among components (None unless `_needs_shares`), `_fitted_model`
    from its learned attributes. `_publish` sets the attributes of the best model; `_fit_lake`
    fits rows in a lake. `_check_parameters` raises ValueError for parameters that do not suit
    the rows; densities use `_parameters`, in feature units.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "covariance_type": [StrOptions(set(COVARIANCE_TYPES))],
        "tol": [Interval(Real, 0.0, None, closed="left")],
        "reg_covar": [Interval(Real, 0.0, None, closed="left")],
        "max_iter": [Interval(Integral, 0, None, closed="left")],
        "n_init": [Interval(Integral, 1, None, closed="left"), None],
        "init_params": [StrOptions({*INIT_PARAMS, SEARCH}), None],
        "random_state": ["random_state"],
        "warm_start": ["boolean"],
        "verbose": ["verbose"],
        "verbose_interval": [Interval(Integral, 1, None, closed="left")],
        "precision": [StrOptions(set(PRECISIONS)), None],
        "device": [str, torch.device, None],
        "n_shards": [Interval(Integral, 1, None, closed="left"), None],
    }

    # 1 where `lower_bound_` is a mean log-likelihood, nan where it is another bound.
    _bound_is_likelihood: ClassVar[float] = 1.0

    n_components: int
    tol: float
    reg_covar: float
    max_iter: int
    n_init: int | None
    init_params: str | None
    warm_start: bool
    verbose: int
    verbose_interval: int
    precision: str | None
    device: str | torch.device | None
    n_shards: int | None

    init_params_: str
    n_init_: int
    converged_: bool
    n_iter_: int
    lower_bound_: float
    lower_bounds_: list[float]

    def fit(
        self,
        X: Any,
        y: object = None,
        sample_weight: Any = None,
        *,
        cluster: Cluster | None = None,
        output: str | os.PathLike[str] | None = None,
        resume: bool = False,
    ) -> Self:
        """Fit the mixture to rows X (n, d), or to a lake, by EM.

        A fit to a lake with an `output` survives its process: after each pass a checkpoint is
        written there. When the fit has ended, `gmm_dist.load(output)` returns the mixture that
        was learned, as if `to_mixture()` had been saved (so of a posterior the expected weights,
        means and covariances), and beside it lie all learned attributes, for `resume`.

        Args:
            X: rows (n, d) in memory, or a `gmm_dist.Lake`.
            y: is ignored.
            sample_weight: of rows in memory, (n,): 0 is an absent row, 2 a doubled one.
            cluster: where a lake's rows are to be held; None for the Ray cluster that this process
                is connected to, else one that is started here.
            output: a new folder or URL that keeps the fit to a lake; None for none.
            resume: go on, to the same bits, from the last checkpoint in `output`, if it has one. A
                fit that has ended is not repeated: what it learned is read.

        Raises ValueError for bad parameters or rows, and for a singular covariance; warns with
        ConvergenceWarning where the best of the starts did not converge.
        """
        if isinstance(X, Lake):
            require_lake_settings(sample_weight, self.device, self.n_shards, cluster)
            if resume and output is None:
                raise ValueError("resume=True is for a fit that an output keeps: give output=")
            url = config.optional(config.url)("output", output)
            is_warm = self._is_warm()
            self._validate_params()
            self._start_parameters()  # errors come before those of the lake
            # Only here are Ray and pyarrow needed: they would be most of the time of an import.
            from gmm_dist.estimators.kept import kept_fit, stay
            from gmm_dist.lake.plan import plan_of

            plan = plan_of(stay(X, url, resume=resume))
            with one_thread(), kept_fit(self, plan, url, resume=resume) as kept:
                if not kept.is_finished:
                    self._fit_lake(plan, cluster or Cluster(), kept)
            self._note_starts(is_lake=True, is_warm=is_warm)
        else:
            require_no_cluster(cluster)
            require_no_output(output, resume)
            self._fit_rows()(X, sample_weight)
        return self

    def fit_predict(self, X: Any, y: object = None, sample_weight: Any = None) -> Any:
        """Fit the mixture and return the labels of its rows in memory, (n,)."""
        require_rows_in_memory(X)
        self._fit_rows()(X, sample_weight)
        return self.predict(X)

    def __sklearn_tags__(self) -> Tags:
        tags: Tags = super().__sklearn_tags__()
        tags.array_api_support = self.init_params in ARRAY_API_INITS and not self.warm_start
        return tags

    # For subclasses.

    def _check_parameters(self, rows: Rows) -> None:
        raise NotImplementedError

    def _in_unit(self, weight: Tensor | None) -> Tensor | None:
        """Return the weights that passes use; unchanged unless a subclass rescales them."""
        return weight

    def _needs_shares(self) -> bool:
        return True

    def _first_model(self, moments: Moments | None, rows: Resident) -> Model:
        raise NotImplementedError

    def _fitted_model(self, rows: CentredRows) -> Model:
        raise NotImplementedError

    def _publish(self, model: Any, rows: CentredRows, space: Space) -> None:
        raise NotImplementedError

    def _start_parameters(self) -> Parameters | None:
        """Return the mixture that a lake's fit starts from; None for one to be found."""
        return None

    def _fit_lake(self, plan: Plan, cluster: Cluster, kept: KeptFit) -> None:
        raise NotImplementedError

    # Shared by both.

    def _fit_rows(self) -> Callable[[Any, Any], None]:
        """Return what fits rows in memory, called by `fit` itself: warnings name its caller."""
        return self._fit_searched if self._searches() else self._fit

    def _fit_searched(self, X: Any, sample_weight: Any) -> None:
        """Fit rows in memory from starts that a search finds."""
        raise NotImplementedError

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
            is_warm = self._is_warm()
            best = self._best_lane(rows, weight, resident)
            self._publish(best.model, resident, space_of(X, rows))
        self._conclude(best, n_samples)
        self._note_starts(is_lake=False, is_warm=is_warm)

    def _is_warm(self) -> bool:
        """Say whether a fit goes on from the last one."""
        return self.warm_start and hasattr(self, "converged_")

    def _note_starts(self, *, is_lake: bool, is_warm: bool) -> None:
        """Set the attributes that say where a fit started."""
        self.init_params_, self.n_init_ = starts_of(self, is_lake=is_lake)
        if is_warm or not self._needs_shares():
            self.init_params_, self.n_init_ = "given", 1

    def _conclude(self, best: Lane, n_samples: float) -> None:
        """Set the attributes that say how the best start ended; for `_fit` and `_fit_lake`."""
        self._n_samples = n_samples
        self._log_likelihood = self._bound_is_likelihood * best.lower_bound * n_samples
        self.converged_, self.n_iter_ = best.converged, best.n_iter
        self.lower_bound_, self.lower_bounds_ = best.lower_bound, best.lower_bounds
        if not self.converged_ and self.max_iter > 0:
            warnings.warn(
                f"{NOT_CONVERGED} ({Status.MAX_ITER.value})", ConvergenceWarning, stacklevel=4
            )

    def _checked_rows(self, X: Any, sample_weight: Any) -> tuple[Rows, Tensor | None]:
        rows = checked(self, X, reset=True, n_min=2)
        weight = None
        if sample_weight is not None:
            weights = unmasked(sample_weight, "sample_weight")
            weights = array_of(weights) if hasattr(weights, "__dlpack__") else weights
            shape = np.empty((len(rows), 0))
            weight = tensor_of(
                _check_sample_weight(weights, shape, dtype=np.float64, ensure_non_negative=True)
            )
        n_samples = len(rows) if weight is None else int((weight > 0).sum())
        if n_samples < self.n_components:
            raise ValueError(
                f"Expected n_samples >= n_components but got n_components = {self.n_components}, "
                f"n_samples = {n_samples}"
            )
        return (rows, None) if weight is None else _present(rows, weight)

    def _searches(self) -> bool:
        """Say whether a search finds the starts of rows in memory."""
        return starts_of(self, is_lake=False)[0] == SEARCH

    def _resident(self, rows: Rows, weight: Tensor | None, *, searched: bool = False) -> Resident:
        whole = self._type.has_products
        X = viewed(rows)
        device = X.device if self.device is None else device_of(self.device)
        X = X.to(device, torch.float64)
        weight = None if weight is None else weight.to(device)
        # A search works about the centre that a lake's rows have.
        centre = robust_centre(X) if searched or self._searches() else None
        return Resident.of(X, weight, self.n_shards, whole=whole, centre=centre)

    def _best_lane(self, rows: Rows, weight: Tensor | None, resident: Resident) -> Lane:
        if self._is_warm():
            self._require_warm(rows.shape[1])
            lanes = [self._lane(self._fitted_model(resident), resident.total, self.lower_bound_)]
        else:
            models = self._models(rows, weight, resident)
            lanes = [self._lane(model, resident.total) for model in models]
            # Where none is iterated, scikit-learn keeps the last.
            lanes = lanes if self.max_iter > 0 else lanes[-1:]
        # The first goes alone, in the very arithmetic of a fit of one start: so more starts never
        # end below it by a rounding. The others share their passes.
        return self._best_of((lanes[:1], lanes[1:]), resident)

    def _lane(self, model: Model, total: TotalMoments, last_bound: float | None = None) -> Lane:
        return Lane.of(model, self._rules(self.max_iter), total, last_bound)

    def _rules(self, max_iter: int) -> EMConfig:
        """Return scikit-learn's rules of EM."""
        return EMConfig(
            tol=self.tol,
            max_iter=max(max_iter, 1),
            reg_covar=self.reg_covar,
            precision=self.precision or "float64",
            accelerate=False,
            reg_unit=ABSOLUTE,
            returns="stepped",
            on_singular="raise",
        )

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

    def _best_of(
        self,
        batches: Sequence[Sequence[Lane]],
        rows: CentredRows,
        *,
        watch: Watch = no_watch,
    ) -> Lane:
        """Iterate the lanes, those of a batch in the same passes, and return the best."""
        lanes = list(itertools.chain.from_iterable(batches))
        reporter = Reporter(lanes, self.verbose, self.verbose_interval)

        def passed(lanes: Sequence[Lane]) -> None:
            watch(lanes)
            reporter.passed(lanes)

        for batch in batches:
            self._iterate(batch, rows, self.max_iter, watch=passed)
        reporter.ended()
        return ranked(lanes)[0]

    def _iterate(
        self,
        lanes: Sequence[Lane],
        rows: CentredRows,
        max_iter: int,
        *,
        watch: Watch = no_watch,
    ) -> None:
        """Have lanes go on until they have converged, or have come to `max_iter` steps."""
        for lane in lanes:
            if lane.status is Status.MAX_ITER and lane.n_iter < max_iter:
                lane.status = None
        try:
            require_definite(lanes)
            if max_iter > 0:
                run(rows.shards, lanes, self._rules(max_iter), rows.total, watch=watch)
        except SingularCovarianceError:
            raise ValueError(singular(self.precision)) from None

    def _models(self, rows: Rows, weight: Tensor | None, resident: Resident) -> list[Model]:
        random_state = check_random_state(self.random_state)
        models = []
        init_params, n_init = starts_of(self, is_lake=False)
        for _ in range(n_init):
            moments = None
            if self._needs_shares():
                share = shares_of(init_params, rows, weight, self.n_components, random_state)
                moments = moments_of_shares(
                    self.covariance_type,
                    resident.X,
                    share.to(resident.X.device),
                    resident.total,
                    resident.centre,
                )
            models.append(self._first_model(moments, resident))
        return models


def _present(rows: Rows, weight: Tensor) -> tuple[Rows, Tensor]:
    """Leave out rows of zero weight: they must not change a draw or a rounding."""
    is_present = weight > 0
    if bool(is_present.all()):
        return rows, weight
    mask = is_present.to(rows.device) if isinstance(rows, Tensor) else is_present.numpy()
    return rows[mask], weight[is_present]

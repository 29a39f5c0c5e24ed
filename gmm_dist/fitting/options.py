"""The options of a fit or a sweep, as plain values with the command line's defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, get_args

from gmm_dist import config
from gmm_dist.config import Cluster, EMConfig, FailureConfig, StartConfig, optional, several
from gmm_dist.errors import Option, UserError
from gmm_dist.formats import counted
from gmm_dist.lake.lake import Lake, Missing
from gmm_dist.lake.tables.snapshot import At, parse_at
from gmm_dist.model.covariance import COVARIANCE_TYPES
from gmm_dist.selection.ranking import CRITERIA

_EM, _START, _FAULTS = EMConfig(), StartConfig(), FailureConfig()


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """The settings of a fit, a sweep, or the fit of a night.

    Lists may be given for tuples, one value for several, and paths for URLs.

    Args:
        data: Folder or file of Parquet, local or any URL, or a table.
        output: A new folder or URL.
        k: Numbers of components. None: that of the model `start`.
        covariance_type: Covariance types, each fitted with each of `k`.
        criterion: What ranks the fits: "bic", "aic", "icl" or "holdout".
        clusters: Into how many clusters the best model's components are merged: "auto" for a
            number found by a rule, or a number; None not to ask.
        bootstrap: Resamples of the rows by which the best model's parameters, its clusters and its
            K are judged; 0 for none, 50 advised.
        start: A model's folder or URL: the fit goes on from its parameters.
        columns: Feature columns; None for every floating-point one.
        weight_column: Column of sample weights; 0 is no row, 2 is two.
        where: Filter of rows, see `gmm_dist.lake.filters`.
        missing: How nulls and NaN are treated: "error", "drop" or "mean".
        holdout: Share of the rows, in [0, 1), that nothing is fitted to.
        at: Version of a table: its number or snapshot id, or a time; None for the newest.
        init: How restarts are seeded.
        n_init: Restarts of each candidate, on a sample.
        tol: Gain of the mean log-likelihood (nats per row) below which a fit has converged.
        max_iter: Iterations over all rows at the most.
        accelerate: Leap ahead of EM where that raises the likelihood.
        reg_covar: Added to every variance, in units of the feature's variance over all rows.
        random_state: Seed, >= 0.
        precision: Arithmetic of the passes: "auto", "float32" or "float64".
        num_workers: Actors that hold rows; None for one per CPU or GPU.
        use_gpu: Whether each has a GPU of its own; None: if the cluster has any.
        spill: Folder on each worker's disk for rows that its memory does not hold; True for its
            temporary folder, False to refuse them.
        max_failures: Failures of workers or their storage that the run bears.
        grace: Seconds until others take over the rows of a lost worker.
        address: Ray cluster; None for the one the process runs in, else one started here.
        resume: Go on from the last checkpoint in `output`.
        checkpoint_seconds: Seconds between two checkpoints at least.

    Raises:
        UserError: a value is out of range.
    """

    data: str
    output: str
    k: tuple[int, ...] | None = None
    covariance_type: tuple[str, ...] = ("full",)
    criterion: str = "bic"
    clusters: str | int | None = "auto"
    bootstrap: int = 0
    start: str | None = None
    columns: tuple[str, ...] | None = None
    weight_column: str | None = None
    where: str | None = None
    missing: Missing = "error"
    holdout: float = 0.0
    at: At | str | None = None
    init: str = _START.init
    n_init: int = _START.n_init
    tol: float = _EM.tol
    max_iter: int = _EM.max_iter
    accelerate: bool = _EM.accelerate
    reg_covar: float = _EM.reg_covar
    random_state: int = _START.random_state
    precision: str = _EM.precision
    num_workers: int | None = None
    use_gpu: bool | None = None
    spill: bool | str = True
    max_failures: int = _FAULTS.max_failures
    grace: float = _FAULTS.grace
    address: str | None = None
    resume: bool = False
    checkpoint_seconds: float = 0.0

    def __post_init__(self) -> None:
        names = several(config.text)
        config.settle(
            self,
            data=config.url,
            output=config.url,
            k=optional(several(config.whole)),
            covariance_type=several(config.one_of(COVARIANCE_TYPES)),
            criterion=config.one_of(CRITERIA),
            clusters=optional(_clusters),
            bootstrap=config.whole,
            start=optional(config.url),
            columns=optional(names),
            weight_column=optional(config.text),
            where=optional(config.text),
            missing=config.one_of(get_args(Missing)),
            holdout=config.number,
            at=lambda name, value: parse_at(value),
            tol=config.number,
            max_iter=config.whole,
            accelerate=config.flag,
            reg_covar=config.number,
            random_state=config.whole,
            resume=config.flag,
            checkpoint_seconds=config.number,
        )
        # Each raises its own errors.
        _ = self.lake, self.em, self.search, self.faults, self.cluster
        if not (self.checkpoint_seconds >= 0 and math.isfinite(self.checkpoint_seconds)):
            raise UserError(
                f"is {self.checkpoint_seconds:g}",
                option="checkpoint_seconds",
                remedy="give seconds >= 0",
            )
        if self.k is None and self.start is None:
            k, start = Option("n_components"), Option("start")
            raise UserError("one of " + k + " and " + start + " is required")
        if self.bootstrap < 0 or self.bootstrap == 1:
            raise UserError(
                f"is {self.bootstrap}",
                option="bootstrap",
                remedy="give 0, or a number of resamples from 2 up: 50 is a good one",
            )
        if self.k is not None and min(self.k) < 1:
            raise UserError(f"is {min(self.k)}", option="k", remedy="give whole numbers >= 1")
        if self.criterion == "holdout" and self.holdout == 0:
            raise UserError(
                "needs rows to rank by",
                option=Option("criterion", "holdout"),
                remedy="add " + Option("holdout", 0.1),
            )

        if self.k is not None and isinstance(self.clusters, int) and max(self.k) < self.clusters:
            raise UserError(
                f"is {self.clusters}, but no candidate has more than "
                f"{counted(max(self.k), 'component')}",
                option="clusters",
                remedy="give larger " + Option("k") + ", or fewer clusters",
            )

    @property
    def lake(self) -> Lake:
        """The rows."""
        return Lake(
            self.data,
            columns=self.columns,
            where=self.where,
            weight_column=self.weight_column,
            missing=self.missing,
            holdout=self.holdout,
            at=self.at,
        )

    @property
    def em(self) -> EMConfig:
        """The settings of the EM loop."""
        return EMConfig(
            tol=self.tol,
            max_iter=self.max_iter,
            reg_covar=self.reg_covar,
            precision=self.precision,
            accelerate=self.accelerate,
        )

    @property
    def search(self) -> StartConfig:
        """The settings of the search for starts."""
        return StartConfig(n_init=self.n_init, init=self.init, random_state=self.random_state)

    @property
    def faults(self) -> FailureConfig:
        """How patient the run is with its workers."""
        return FailureConfig(max_failures=self.max_failures, grace=self.grace)

    @property
    def cluster(self) -> Cluster:
        """The Ray cluster, how many workers there are, and whether each has a GPU."""
        return Cluster(self.address, self.num_workers, self.use_gpu, self.spill)


def _clusters(name: str, value: Any) -> str | int:
    """Return "auto", or a number of clusters of 1 or more."""
    if isinstance(value, str):
        if value != "auto":
            raise UserError(
                f"is {value[:50]!r}", option=name, remedy='give "auto", a whole number or None'
            )
        return value
    n_clusters: int = config.whole(name, value)
    if n_clusters < 1:
        raise UserError(f"is {n_clusters}", option=name, remedy="give a whole number >= 1")
    return n_clusters

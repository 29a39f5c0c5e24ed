"""A sweep: candidates (k, covariance type), fitted together, ranked by a criterion."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gmm_dist import em, init
from gmm_dist.cohort import Lane, Outcome
from gmm_dist.config import EMConfig, StartConfig
from gmm_dist.errors import UserError
from gmm_dist.families import n_parameters
from gmm_dist.kernel import Total
from gmm_dist.mixture import aic, bic, icl
from gmm_dist.parameters import Parameters
from gmm_dist.shards import Shards
from gmm_dist.statistics import TotalMoments

CRITERIA = ("bic", "aic", "icl")


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """One mixture to be fitted."""

    k: int
    covariance_type: str


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """A candidate with its fit and criteria (lower is better); `seconds` until its lane ended."""

    candidate: Candidate
    fit: em.FitResult
    n_parameters: int
    bic: float
    aic: float
    icl: float
    seconds: float

    def value(self, criterion: str) -> float:
        return float(getattr(self, criterion))


@dataclass(frozen=True, slots=True, eq=False)
class SweepResult:
    """All candidates in the order asked for; `ranked` has the best first, failures last."""

    scored: tuple[Scored, ...]
    criterion: str
    total: TotalMoments

    @property
    def n_samples(self) -> float:
        """The sum of the sample weights: the number of rows without weights."""
        return self.total.n_samples

    @property
    def ranked(self) -> list[Scored]:
        # Ties: fewer parameters, then smaller k.
        return sorted(
            self.scored,
            key=lambda s: (
                not s.fit.is_ranked,
                s.value(self.criterion),
                s.n_parameters,
                s.candidate.k,
            ),
        )

    @property
    def best(self) -> Scored | None:
        """The candidate of the lowest criterion, or None when every one failed."""
        first = self.ranked[0]
        return first if first.fit.is_ranked else None

    def warnings(self, feature_names: Sequence[str]) -> list[str]:
        """Return what a reader of the table should know, each with what to do."""
        constant = [feature_names[j] for j in self.total.constant_features()]
        lines = [f"column {name!r} is constant: leave it out with --columns" for name in constant]
        if dependent := self.total.dependent_features():
            lines.append(
                f"{dependent} of {len(feature_names)} columns are duplicates or sums of others, so "
                "full covariances rest on --reg-covar: leave them out with --columns"
            )
        return lines + self._edge_warning()

    def _edge_warning(self) -> list[str]:
        ks = sorted({s.candidate.k for s in self.scored})
        if self.best is None or len(ks) == 1:
            return []
        k = self.best.candidate.k
        if k == ks[-1]:
            return [f"the best k is the largest tried: run again with --k {k}..{2 * k}"]
        if k == ks[0] and k > 1:
            return [f"the best k is the smallest tried: run again with --k 1..{k}"]
        return []


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a candidate stands after a pass, for progress."""

    candidate: Candidate
    is_running: bool
    n_iter: int
    lower_bound: float
    precision: str


Watch = Callable[[Sequence[Standing]], None]


def sweep(
    shards: Shards,
    candidates: Sequence[Candidate],
    config: EMConfig,
    start: StartConfig,
    *,
    n_features: int,
    criterion: str = "bic",
    given: Sequence[Parameters] | None = None,
    watch: Watch = lambda standings: None,
) -> SweepResult:
    """Fit every candidate in the same passes and rank them.

    `given` are starts about the rows' shared centre, one per candidate, instead of our own.

    Raises UserError when there are fewer rows than components.
    """
    began = time.monotonic()
    total = shards.run(Total(n_features))
    require_rows(candidates, total.n_rows)
    pairs = [(candidate.k, candidate.covariance_type) for candidate in candidates]
    first = given or init.starts(shards, pairs, config, start, n_features)
    ended: dict[int, float] = {}

    def watch_lanes(lanes: Sequence[Lane]) -> None:
        for i, lane in enumerate(lanes):
            if lane.outcome is not Outcome.RUNNING:
                ended.setdefault(i, time.monotonic() - began)
        watch([_standing(c, lane) for c, lane in zip(candidates, lanes, strict=True)])

    fits = em.fit(shards, first, config, total, watch=watch_lanes)
    scored = [
        _scored(candidate, fit, ended.get(i, 0.0))
        for i, (candidate, fit) in enumerate(zip(candidates, fits, strict=True))
    ]
    return SweepResult(tuple(scored), criterion, total)


def require_rows(candidates: Sequence[Candidate], n_rows: int) -> None:
    """Raise UserError when a candidate has more components than there are rows."""
    largest = max(candidate.k for candidate in candidates)
    if largest > n_rows:
        raise UserError(
            f"--k asks for {largest} components, but there are {n_rows} rows: "
            f"give k of at most {n_rows}"
        )


def _scored(candidate: Candidate, fit: em.FitResult, seconds: float) -> Scored:
    n_free = n_parameters(
        candidate.covariance_type, fit.parameters.n_components, fit.parameters.n_features
    )
    own_bic = bic(fit.log_likelihood, n_free, fit.n_samples)
    return Scored(
        candidate,
        fit,
        n_free,
        own_bic,
        aic(fit.log_likelihood, n_free),
        icl(own_bic, fit.entropy),
        seconds,
    )


def _standing(candidate: Candidate, lane: Lane) -> Standing:
    bound = lane.lower_bounds[-1] if lane.lower_bounds else float("nan")
    running = lane.outcome is Outcome.RUNNING
    return Standing(candidate, running, lane.n_iter, bound, lane.precision.name.lower())

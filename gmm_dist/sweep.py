"""A sweep: candidates (k, covariance type), fitted together in the same passes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gmm_dist import em
from gmm_dist.cohort import Lane
from gmm_dist.cohort import Outcome as LaneOutcome
from gmm_dist.config import EMConfig, StartConfig
from gmm_dist.errors import UserError
from gmm_dist.holdout import mean_log_likelihoods
from gmm_dist.kernel import Total
from gmm_dist.parameters import Parameters
from gmm_dist.search import Starts, search
from gmm_dist.selection import Candidate, Outcome, Scored, SweepResult
from gmm_dist.shards import HeldOut, Shards
from gmm_dist.statistics import TotalMoments


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
    holdout: bool = False,
    given: Sequence[Parameters] | None = None,
    warm: Sequence[Parameters] = (),
    watch: Watch = lambda standings: None,
) -> SweepResult:
    """Fit every candidate in the same passes and rank them.

    With `holdout` the fits are also scored on the held-out rows, in one pass more. `given` are
    starts about the rows' shared centre, one per candidate, instead of our own; `warm` ones
    compete with our own for the candidates of their shape.

    Raises UserError when there are fewer rows than components, or no held-out rows to rank by.
    """
    began = time.monotonic()
    total = shards.run(Total(n_features))
    require_rows(candidates, total.n_rows)
    if criterion == "holdout":
        _require_held_out(shards, n_features)
    race = _Race(shards, candidates, config, total, began, watch)
    if given is not None:
        race.run([[parameters] for parameters in given])
    else:
        pairs = [(candidate.k, candidate.covariance_type) for candidate in candidates]
        threads = os.cpu_count() or 1
        starts = search(shards, pairs, config, start, total, warm=warm, n_threads=threads)
        race.run(starts.finalists)
        race.run([_mended(starts, outcome.fit) for outcome in race.outcomes])
    likelihoods: Sequence[float | None] = [None] * len(candidates)
    if holdout or criterion == "holdout":
        likelihoods = mean_log_likelihoods(shards, [o.fit.parameters for o in race.outcomes])
    scored = [
        Scored.of(candidate, outcome, likelihood)
        for candidate, outcome, likelihood in zip(
            candidates, race.outcomes, likelihoods, strict=True
        )
    ]
    return SweepResult(tuple(scored), criterion, total, race.n_passes)


def _mended(starts: Starts, fit: em.FitResult) -> list[Parameters]:
    """Return another start for a fit that is not to be ranked, where there is hope."""
    mended = starts.mend(fit) if fit.status is em.Status.DEGENERATE else None
    return [] if mended is None else [mended]


class _Race:
    """Lanes over all rows: the best of each candidate's starts, as `outcomes`."""

    def __init__(
        self,
        shards: Shards,
        candidates: Sequence[Candidate],
        config: EMConfig,
        total: TotalMoments,
        began: float,
        watch: Watch,
    ) -> None:
        self._shards, self._candidates, self._config = shards, candidates, config
        self._total, self._began, self._watch = total, began, watch
        self._best: dict[int, Outcome] = {}
        self.n_passes = 0

    @property
    def outcomes(self) -> list[Outcome]:
        """The best of each candidate so far, in their order."""
        return [self._best[i] for i in range(len(self._candidates))]

    def run(self, starts: Sequence[Sequence[Parameters]]) -> None:
        """Fit all starts of all candidates in the same passes."""
        rivals = [i for i, own in enumerate(starts) for _ in own]
        first = [parameters for own in starts for parameters in own]
        ended = dict.fromkeys(rivals, 0.0)

        def see(lanes: Sequence[Lane]) -> None:
            self.n_passes += 1
            fields: dict[int, list[Lane]] = {}
            for i, lane in zip(rivals, lanes, strict=True):
                fields.setdefault(i, []).append(lane)
                if lane.outcome is LaneOutcome.RUNNING or not ended[i]:
                    ended[i] = time.monotonic() - self._began
            self._watch([self._standing(i, own) for i, own in fields.items()])

        fits = em.fit(self._shards, first, self._config, self._total, rivals=rivals, watch=see)
        for i, fit in zip(rivals, fits, strict=True):
            outcome = Outcome.of(fit, ended[i])
            self._best[i] = outcome if i not in self._best else self._best[i].against(outcome)

    def _standing(self, i: int, lanes: Sequence[Lane]) -> Standing:
        """Say where a candidate stands, by the lane that leads."""
        bounds = [lane.lower_bounds[-1] if lane.lower_bounds else math.nan for lane in lanes]
        lead = max(range(len(lanes)), key=lambda j: (not math.isnan(bounds[j]), bounds[j]))
        running = any(lane.outcome is LaneOutcome.RUNNING for lane in lanes)
        lane, precision = lanes[lead], lanes[lead].precision.name.lower()
        return Standing(self._candidates[i], running, lane.n_iter, bounds[lead], precision)


def require_rows(candidates: Sequence[Candidate], n_rows: int) -> None:
    """Raise UserError when a candidate has more components than there are rows."""
    largest = max(candidate.k for candidate in candidates)
    if largest > n_rows:
        raise UserError(
            f"--k asks for {largest} components, but there are {n_rows} rows: "
            f"give k of at most {n_rows}"
        )


def _require_held_out(shards: Shards, n_features: int) -> None:
    if shards.run(HeldOut(Total(n_features))).n_rows == 0:
        raise UserError(
            "--criterion holdout finds no held-out row of positive weight: give a larger --holdout"
        )

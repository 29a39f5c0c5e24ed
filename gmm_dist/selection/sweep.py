"""A sweep: candidates (k, covariance type), fitted together in the same passes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from gmm_dist.config import EMConfig, StartConfig
from gmm_dist.em import loop
from gmm_dist.em.estep import SumMoments
from gmm_dist.em.evaluate import mean_log_likelihoods
from gmm_dist.em.lane import Lane, Snapshot, Status, regularisation, restore_lanes, take_snapshot
from gmm_dist.em.lane_batch import Precision
from gmm_dist.em.statistics import TotalMoments, as_given, criterion_size, given_weight
from gmm_dist.errors import Option, TooFewRows, UserError
from gmm_dist.formats import counted
from gmm_dist.model.parameters import Parameters
from gmm_dist.selection import split_merge
from gmm_dist.selection.ranking import BestFit, Candidate, RankedCandidate, SweepResult
from gmm_dist.selection.spikes import profile
from gmm_dist.selection.starts import find_starts, repair_degenerate
from gmm_dist.shards.protocol import HeldOut, Shards
from gmm_dist.shards.reweighted import ReweightedShards, unit_of

_SLACK = 1e-7  # nats per row by which a fit may end below a smaller one: rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a candidate stands after a pass, for progress."""

    candidate: Candidate
    is_running: bool
    n_iter: int
    lower_bound: float
    precision: str


# Up to so many features their correlations cost nothing, and seeds are better for them.
_WIDE = 128

Watch = Callable[[Sequence[Standing]], None]
Keep = Callable[[int, Callable[[], Snapshot]], None]


def sweep(
    shards: Shards,
    candidates: Sequence[Candidate],
    config: EMConfig,
    start: StartConfig,
    *,
    n_features: int,
    feature_names: Sequence[str] = (),
    centre: Tensor | None = None,
    criterion: str = "bic",
    holdout: bool = False,
    given: Sequence[Parameters] | None = None,
    warm: Sequence[Parameters] = (),
    watch: Watch = lambda standings: None,
    resume: Snapshot | None = None,
    keep: Keep = lambda number, snapshot: None,
) -> SweepResult:
    """Fit every candidate in the same passes and rank them.

    Within a covariance type the likelihood of ranked fits does not fall as k grows: a fit that
    ends below one of fewer components goes on from that one, with components halved.

    Args:
        shards: All rows, about their shared centre.
        candidates: What is fitted: (k, covariance type) each.
        config: Settings of the loop.
        start: Settings of the search for starts.
        n_features: Number of features d.
        feature_names: Their names, for messages.
        centre: The rows' shared centre (d,), in feature units; None for zero.
        criterion: What ranks the fits.
        holdout: Score the fits on the held-out rows too, in one pass more.
        given: Starts about the centre, one per candidate, instead of our own.
        warm: Mixtures about the centre that compete with our own starts of their shape.
        watch: Sees where each candidate stands after each pass.
        resume: A snapshot of the same rows and settings: the sweep goes on from there to the same
            bits.
        keep: Is told each pass's number, and how to take a snapshot.

    Raises UserError when there are fewer rows than components, no held-out rows to rank by, or
    numbers beyond float64's range once they are squared.
    """
    began = time.monotonic()
    moments = SumMoments(n_features, n_features <= _WIDE or _read_products(candidates))
    total = shards.run(moments)
    scale = unit_of(total.max_weight)
    if scale != 1:
        shards = ReweightedShards(shards, scale)
        total = shards.run(moments)
    require_rows(candidates, total.n_rows)
    names = feature_names or [f"x{j}" for j in range(n_features)]
    _require_range(total.overflowing_features(), names, "large")
    seen = profile(shards, n_features, regularisation(config, total.scale))
    _require_range(seen.vanishing, names, "small")
    total = replace(total, spikes=seen.spikes)
    if criterion == "holdout":
        _require_held_out(shards, n_features)
    race = _Race(shards, candidates, config, total, began, watch, keep)
    threads = os.cpu_count() or 1
    if resume is not None:
        race.restore(resume)
    elif given is not None:
        race.enter([[parameters] for parameters in given])
    else:
        pairs = [(candidate.k, candidate.covariance_type) for candidate in candidates]
        race.enter(find_starts(shards, pairs, config, start, total, warm=warm, n_threads=threads))
    race.run()
    if not race.mended and given is None:
        race.mended = True
        fits = [outcome.fit for outcome in race.outcomes]
        race.enter(repair_degenerate(shards, fits, config, start, total, n_threads=threads))
        race.run()
    if given is None:
        race.lift()
    likelihoods: Sequence[float | None] = [None] * len(candidates)
    if holdout or criterion == "holdout":
        likelihoods = mean_log_likelihoods(shards, [o.fit.parameters for o in race.outcomes])
    size = criterion_size(total, scale)
    scored = [
        RankedCandidate.of(candidate, outcome.counted(size), likelihood)
        for candidate, outcome, likelihood in zip(
            candidates, race.outcomes, likelihoods, strict=True
        )
    ]
    return SweepResult(
        scored=tuple(scored),
        criterion=criterion,
        total=as_given(total, scale),
        n_passes=race.n_passes,
        profile=seen,
        centre=centre,
        weight=given_weight(total, scale),
    )


def _read_products(candidates: Sequence[Candidate]) -> bool:
    return any(c.covariance_type in ("full", "tied") for c in candidates)


class _Race:
    """Lanes over all rows: several for a candidate, of which the best is its `outcome`."""

    def __init__(
        self,
        shards: Shards,
        candidates: Sequence[Candidate],
        config: EMConfig,
        total: TotalMoments,
        began: float,
        watch: Watch,
        keep: Keep,
    ) -> None:
        self._shards, self._candidates, self._config = shards, candidates, config
        self._total, self._began, self._watch, self._keep = total, began, watch, keep
        self._lanes: list[Lane] = []
        self._owners: list[int] = []  # the candidate that each lane is for
        self._seconds: list[float] = []
        self.n_passes = 0
        self.mended = False
        self._lifted: list[int] = []  # the candidates that went on from one of fewer components

    def enter(self, starts: Sequence[Sequence[Parameters]]) -> None:
        """Add a lane for each start of each candidate."""
        scale = self._total.scale
        for i, own in enumerate(starts):
            for parameters in own:
                self._lanes.append(Lane.start(parameters, self._config, scale))
                self._owners.append(i)
                self._seconds.append(time.monotonic() - self._began)

    def run(self) -> None:
        """Fit the lanes that have not ended, all in the same passes."""
        loop.run(
            self._shards,
            self._lanes,
            self._config,
            self._total,
            rivals=self._owners,
            watch=self._passed,
        )

    def lift(self) -> None:
        """Have no ranked fit end below one of fewer components, of its covariance type."""
        best: dict[str, loop.FitResult] = {}
        outcomes = self.outcomes
        for i in sorted(range(len(self._candidates)), key=lambda i: self._candidates[i]):
            kind, fit = self._candidates[i].covariance_type, outcomes[i].fit
            floor = best.get(kind)
            if floor is not None and fit.is_ranked and self._lacks(fit, floor):
                self._go_on_from(floor.parameters, i)
                outcomes = self.outcomes
                fit = outcomes[i].fit
            if fit.is_ranked and (floor is None or fit.log_likelihood > floor.log_likelihood):
                best[kind] = fit

    def _lacks(self, fit: loop.FitResult, floor: loop.FitResult) -> bool:
        return floor.log_likelihood - fit.log_likelihood > _SLACK * self._total.n_samples

    def _go_on_from(self, smaller: Parameters, i: int) -> None:
        """Fit a candidate again from a smaller mixture; copies of components are the last resort.

        These are scored as they are. Steps of EM from the same density would stand still, but
        regularisation and rounding could lower what they come to. A candidate gets this once.
        """
        if i in self._lifted:
            return
        self._lifted.append(i)
        k, scale = self._candidates[i].k, self._total.scale
        copied = Lane.start(split_merge.halved(smaller, k, shift=0.0), self._config, scale)
        copied.policy.form, copied.verdict = Precision.CENTRED, Status.CONVERGED
        for lane in (Lane.start(split_merge.halved(smaller, k), self._config, scale), copied):
            self._lanes.append(lane)
            self._owners.append(i)
            self._seconds.append(time.monotonic() - self._began)
        self.run()

    @property
    def outcomes(self) -> list[BestFit]:
        """The best of each candidate so far, in their order."""
        best: dict[int, BestFit] = {}
        for i, lane, seconds in zip(self._owners, self._lanes, self._seconds, strict=True):
            outcome = BestFit.of(loop.result_of(lane, self._total), seconds)
            best[i] = outcome if i not in best else best[i].against(outcome)
        return [best[i] for i in range(len(self._candidates))]

    def snapshot(self) -> Snapshot:
        """Return all that the rest of the race depends on."""
        lanes = take_snapshot(self._lanes)
        own: dict[str, Any] = {
            "owners": list(self._owners),
            "seconds": list(self._seconds),
            "n_passes": self.n_passes,
            "mended": self.mended,
            "lifted": list(self._lifted),
        }
        return Snapshot(lanes.tensors, lanes.state | own)

    def restore(self, saved: Snapshot) -> None:
        """Go on where a race was that a snapshot was taken of."""
        self._lanes = restore_lanes(saved)
        self._owners, self._seconds = list(saved.state["owners"]), list(saved.state["seconds"])
        self.n_passes, self.mended = saved.state["n_passes"], saved.state["mended"]
        # Checkpoints of earlier versions do not have it.
        self._lifted = list(saved.state.get("lifted", []))

    def _passed(self, lanes: Sequence[Lane]) -> None:
        self.n_passes += 1
        fields: dict[int, list[Lane]] = {}
        for j, (i, lane) in enumerate(zip(self._owners, lanes, strict=True)):
            fields.setdefault(i, []).append(lane)
            if lane.is_running:
                self._seconds[j] = time.monotonic() - self._began
        self._keep(self.n_passes, self.snapshot)
        self._watch([self._standing(i, own) for i, own in fields.items()])

    def _standing(self, i: int, lanes: Sequence[Lane]) -> Standing:
        """Say where a candidate stands, by the lane that leads."""
        bounds = [lane.lower_bounds[-1] if lane.lower_bounds else math.nan for lane in lanes]
        lead = max(range(len(lanes)), key=lambda j: (not math.isnan(bounds[j]), bounds[j]))
        running = any(lane.is_running for lane in lanes)
        lane, precision = lanes[lead], lanes[lead].precision.name.lower()
        return Standing(
            candidate=self._candidates[i],
            is_running=running,
            n_iter=lane.n_iter,
            lower_bound=bounds[lead],
            precision=precision,
        )


def require_rows(candidates: Sequence[Candidate], n_rows: int) -> None:
    """Raise TooFewRows when a candidate has more components than there are rows."""
    largest = max(candidate.k for candidate in candidates)
    if largest > n_rows:
        rows = counted(n_rows, "row")
        raise TooFewRows(
            f"asks for {counted(largest, 'component')}, but there are {rows}",
            option="n_components",
            remedy=f"give at most {n_rows}",
        )


def _require_range(features: Sequence[int], names: Sequence[str], what: str) -> None:
    """Raise UserError for features whose squares leave the range of float64."""
    if features:
        others = f", and {len(features) - 1} more columns," if len(features) > 1 else ""
        verb = "divide" if what == "large" else "multiply"
        raise UserError(
            f"column {names[features[0]]!r}{others} has values too {what} for their squares to be "
            "float64 numbers",
            remedy=f"{verb} it by a power of ten, or leave it out with " + Option("columns"),
        )


def _require_held_out(shards: Shards, n_features: int) -> None:
    if shards.run(HeldOut(SumMoments(n_features))).n_rows == 0:
        raise UserError(
            "finds no held-out row of positive weight",
            option=Option("criterion", "holdout"),
            remedy="give a larger " + Option("holdout"),
        )

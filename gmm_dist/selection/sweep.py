"""A sweep: candidates (k, covariance type), fitted together in the same passes."""

from __future__ import annotations

import math
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
from gmm_dist.model.covariance import TYPE_OF
from gmm_dist.model.parameters import Parameters
from gmm_dist.selection import split_merge
from gmm_dist.selection.ranking import BestFit, Candidate, RankedCandidate, SweepResult
from gmm_dist.selection.spikes import profile
from gmm_dist.selection.starts import SearchProgress, find_starts, repair_degenerate
from gmm_dist.shards.protocol import HeldOut, Shards, WorkingShards
from gmm_dist.shards.reweighted import ReweightedShards, unit_of

_SLACK = 1e-7  # nats per row by which a fit may end below a smaller one: rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A candidate's progress after a pass."""

    candidate: Candidate
    is_running: bool
    n_iter: int
    lower_bound: float
    precision: str


# Up to so many features the moments include all products: they cost little, and seeds drawn in
# whitened coordinates are better.
_WIDE = 128

Watch = Callable[[Sequence[Standing]], None]
Searching = Callable[[SearchProgress], None]
Keep = Callable[[int, Callable[[], Snapshot]], None]


def sweep(
    shards: WorkingShards,
    candidates: Sequence[Candidate],
    config: EMConfig,
    start: StartConfig,
    *,
    n_features: int,
    feature_names: Sequence[str] = (),
    centre: Tensor | None = None,
    criterion: str = "bic",
    holdout: bool = False,
    initial: Sequence[Parameters] | None = None,
    warm: Sequence[Parameters] = (),
    watch: Watch = lambda standings: None,
    searching: Searching = lambda progress: None,
    resume: Snapshot | None = None,
    keep: Keep = lambda number, snapshot: None,
) -> SweepResult:
    """Fit every candidate in the same passes and rank them.

    Within a covariance type the likelihood of ranked fits does not fall as k grows: a fit that
    ends below one of fewer components is repeated from that one, with components halved.

    Args:
        shards: All rows, about their shared centre.
        candidates: The mixtures to be fitted: (k, covariance type) each.
        config: Settings of the loop.
        start: Settings of the search for starts.
        n_features: Number of features d.
        feature_names: Their names, for messages.
        centre: The rows' shared centre (d,), in feature units; None for zero.
        criterion: The criterion that ranks the fits.
        holdout: Whether one more pass scores the fits on the held-out rows.
        initial: Starts about the centre, one per candidate, in place of a search.
        warm: Mixtures about the centre that join the search for a candidate of their shape.
        watch: Gets each candidate's `Standing` after each pass.
        searching: Gets the progress of the search for starts.
        resume: A snapshot of a sweep with the same rows and settings, which goes on from there to
            the same bits.
        keep: Gets the pass's number after each pass, and a function that takes a snapshot; and
            pass 0 when the search for a candidate's starts is done.

    Raises UserError when there are fewer rows than components, no held-out rows to rank by, or
    numbers whose squares leave float64's range.
    """
    began = time.monotonic()
    has_products = any(TYPE_OF[c.covariance_type].has_products for c in candidates)
    shards, total, scale = in_unit(shards, n_features, has_products=has_products)
    require_rows(candidates, total.n_rows)
    names = feature_names or [f"x{j}" for j in range(n_features)]
    _require_range(total.overflowing_features(), names, "large")
    sample_profile = profile(shards, n_features, regularisation(config, total.scale))
    _require_range(sample_profile.vanishing, names, "small")
    total = replace(total, spikes=sample_profile.spikes)
    if criterion == "holdout":
        _require_held_out(shards, n_features)
    lanes = _CandidateLanes(shards, candidates, config, total, began, watch, keep)
    if resume is not None:
        lanes.restore(resume)
    elif initial is not None:
        lanes.add([[parameters] for parameters in initial])
    if left := lanes.without_start:
        find_starts(
            shards,
            [candidates[i] for i in left],
            config,
            start,
            total,
            warm=warm,
            done=lambda i, starts: lanes.add_searched(left[i], starts),
            watch=searching,
        )
        lanes.order()
    lanes.run()
    if not lanes.is_repaired and initial is None:
        lanes.is_repaired = True
        fits = [best.fit for best in lanes.best_fits]
        lanes.add(repair_degenerate(shards, fits, config, start, total))
        lanes.run()
    if initial is None:
        lanes.refit_below_smaller()
    likelihoods: Sequence[float | None] = [None] * len(candidates)
    if holdout or criterion == "holdout":
        likelihoods = mean_log_likelihoods(
            shards, [best.fit.parameters for best in lanes.best_fits], total
        )
    size = criterion_size(total, scale)
    scored = [
        RankedCandidate.of(candidate, best.counted(size), likelihood)
        for candidate, best, likelihood in zip(
            candidates, lanes.best_fits, likelihoods, strict=True
        )
    ]
    return SweepResult(
        scored=tuple(scored),
        criterion=criterion,
        total=as_given(total, scale),
        n_passes=lanes.n_passes,
        profile=sample_profile,
        centre=centre,
        weight=given_weight(total, scale),
    )


def in_unit(
    shards: WorkingShards, n_features: int, *, has_products: bool
) -> tuple[WorkingShards, TotalMoments, float]:
    """Return all rows with the largest weight from 1 to 2, their moments, and by how much it grew.

    Args:
        shards: All rows, about their shared centre.
        n_features: Number of features d.
        has_products: Whether mixtures need the products of two features.
    """
    moments = SumMoments(n_features, n_features <= _WIDE or has_products)
    total = shards.run(moments)
    scale = unit_of(total.max_weight)
    if scale != 1:
        shards = ReweightedShards(shards, scale)
        total = shards.run(moments)
    return shards, total, scale


class _CandidateLanes:
    """The lanes over all rows: several for each candidate, of which the best counts."""

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
        self._owners: list[int] = []  # each lane's candidate
        self._seconds: list[float] = []
        self.n_passes = 0
        self.is_repaired = False  # degenerate fits have been replaced
        self._refitted: list[int] = []  # candidates fitted again from one of fewer components

    def add(self, starts: Sequence[Sequence[Parameters]]) -> None:
        """Add a lane for each start of each candidate."""
        for i, candidate_starts in enumerate(starts):
            for parameters in candidate_starts:
                self._lanes.append(Lane.start(parameters, self._config, self._total))
                self._owners.append(i)
                self._seconds.append(time.monotonic() - self._began)

    @property
    def without_start(self) -> list[int]:
        """The candidates that have no lane yet."""
        return [i for i in range(len(self._candidates)) if i not in self._owners]

    def add_searched(self, i: int, starts: Sequence[Parameters]) -> None:
        """Add the lanes of a candidate whose search is done, and keep them."""
        self.add([starts if i == j else [] for j in range(len(self._candidates))])
        self._keep(self.n_passes, self.snapshot)

    def order(self) -> None:
        """Bring the lanes into the order of the candidates, whose searches end in any."""
        order = sorted(range(len(self._lanes)), key=lambda j: self._owners[j])
        self._lanes = [self._lanes[j] for j in order]
        self._seconds = [self._seconds[j] for j in order]
        self._owners.sort()

    def run(self) -> None:
        """Fit the lanes that have not ended, all in the same passes."""
        loop.run(
            self._shards,
            self._lanes,
            self._config,
            self._total,
            rivals=self._owners,
            watch=self._after_pass,
        )

    def refit_below_smaller(self) -> None:
        """Fit again each ranked candidate that ends below one of fewer components of its type."""
        best: dict[str, loop.FitResult] = {}
        best_fits = self.best_fits
        for i in sorted(range(len(self._candidates)), key=lambda i: self._candidates[i]):
            kind, fit = self._candidates[i].covariance_type, best_fits[i].fit
            floor = best.get(kind)
            if floor is not None and fit.is_ranked and self._is_below(fit, floor):
                self._refit_from(floor.parameters, i)
                best_fits = self.best_fits
                fit = best_fits[i].fit
            if fit.is_ranked and (floor is None or fit.log_likelihood > floor.log_likelihood):
                best[kind] = fit

    def _is_below(self, fit: loop.FitResult, floor: loop.FitResult) -> bool:
        return floor.log_likelihood - fit.log_likelihood > _SLACK * self._total.n_samples

    def _refit_from(self, smaller: Parameters, i: int) -> None:
        """Fit candidate `i` again from a smaller mixture, at most once.

        One lane starts from halved components. A second has copies of them, the same density, as
        the last resort: it is scored without a step of EM, for steps would not raise its
        likelihood, while regularisation and rounding could lower it.
        """
        if i in self._refitted:
            return
        self._refitted.append(i)
        k = self._candidates[i].k
        halves, copies = split_merge.halved(smaller, k), split_merge.halved(smaller, k, shift=0.0)
        halved, copied = (Lane.start(m, self._config, self._total) for m in (halves, copies))
        copied.policy.form, copied.verdict = Precision.CENTRED, Status.CONVERGED
        for lane in (halved, copied):
            self._lanes.append(lane)
            self._owners.append(i)
            self._seconds.append(time.monotonic() - self._began)
        self.run()

    @property
    def best_fits(self) -> list[BestFit]:
        """The best fit of each candidate so far, in the candidates' order."""
        best: dict[int, BestFit] = {}
        for i, lane, seconds in zip(self._owners, self._lanes, self._seconds, strict=True):
            fit = BestFit.of(loop.result_of(lane, self._total), seconds)
            best[i] = fit if i not in best else best[i].against(fit)
        return [best[i] for i in range(len(self._candidates))]

    def snapshot(self) -> Snapshot:
        """Return a snapshot from which the sweep can go on."""
        lanes = take_snapshot(self._lanes)
        sweep_state: dict[str, Any] = {
            "owners": list(self._owners),
            "seconds": list(self._seconds),
            "n_passes": self.n_passes,
            "mended": self.is_repaired,
            "lifted": list(self._refitted),
        }
        return Snapshot(lanes.tensors, lanes.state | sweep_state)

    def restore(self, saved: Snapshot) -> None:
        """Take up the state of a snapshot."""
        self._lanes = restore_lanes(saved)
        self._owners, self._seconds = list(saved.state["owners"]), list(saved.state["seconds"])
        self.n_passes, self.is_repaired = saved.state["n_passes"], saved.state["mended"]
        self._refitted = list(saved.state["lifted"])

    def _after_pass(self, lanes: Sequence[Lane]) -> None:
        self.n_passes += 1
        lanes_of: dict[int, list[Lane]] = {}
        for j, (i, lane) in enumerate(zip(self._owners, lanes, strict=True)):
            lanes_of.setdefault(i, []).append(lane)
            if lane.is_running:
                self._seconds[j] = time.monotonic() - self._began
        self._keep(self.n_passes, self.snapshot)
        self._watch([self._standing(i, group) for i, group in lanes_of.items()])

    def _standing(self, i: int, lanes: Sequence[Lane]) -> Standing:
        """Return a candidate's progress, that of its leading lane."""
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

"""Run one night: fit its rows, ask the gate, and publish the model or keep it back."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from gmm_dist.commands.night_options import NightlyOptions, NightRows
from gmm_dist.commands.progress import Progress
from gmm_dist.commands.stopping import holding
from gmm_dist.commands.tables import print_table
from gmm_dist.commands.talking import on_command_line, quiet, say, screen
from gmm_dist.errors import SchemaError, TooFewRows, Words, spelt
from gmm_dist.fitting import results
from gmm_dist.fitting.fit import Job, none_ranked
from gmm_dist.fitting.recipe import RECIPE, Recipe
from gmm_dist.fitting.results import Fitted, mixture_of, spell_best
from gmm_dist.lake.plan import Plan
from gmm_dist.model.mixture import Mixture
from gmm_dist.nightly import gate
from gmm_dist.nightly.clusters import as_gaussians, match_clusters
from gmm_dist.nightly.column_drift import ColumnDrift, column_drift, draw_rows
from gmm_dist.nightly.drift import (
    DensityChange,
    Drift,
    Numbered,
    changes,
    compare_densities,
    drift,
)
from gmm_dist.nightly.lineage import (
    DRIFT,
    GATE,
    LINEAGE,
    ClusterLineage,
    Lineage,
    Published,
)
from gmm_dist.nightly.matching import Matching, match
from gmm_dist.nightly.registry import Registry
from gmm_dist.report import of_fit
from gmm_dist.runs import commit
from gmm_dist.runs.claim import Run
from gmm_dist.runs.json_files import FORMAT_VERSION
from gmm_dist.runs.lease import Lease
from gmm_dist.selection.coreset import Coreset
from gmm_dist.selection.ranking import SweepResult
from gmm_dist.shards.connection import connected
from gmm_dist.shards.protocol import Shards

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Night:
    """One night's work, between the claim of its output and its commit."""

    options: NightlyOptions
    rows: NightRows
    registry: Registry
    before: Published | None
    session: ExitStack

    def candidate(self, run: Run) -> str:
        """Where the run's results are if the gate keeps them back."""
        return self.registry.candidate_url(self.options.night, run.attempt.id)

    @property
    def _night_before(self) -> str | None:
        return None if self.before is None else self.before.night

    def run(self, run: Run) -> list[str] | None:
        """Fit and commit; return the reasons to keep the model back, none if it is published.

        Returns None if nothing is committed: a night between this and the one before was published.
        """
        began = time.monotonic()
        try:
            work = self._fit(run)
        except (TooFewRows, SchemaError) as error:
            if self.before is None and isinstance(error, SchemaError):
                raise  # nothing to differ from: the command line or the lake is wrong
            reasons = [error.spelt(on_command_line)]
            self._keep_back(run, reasons)
            return reasons
        warnings = [*work.warnings, *self._warnings(work.columns)]
        more = {"warnings": warnings, "seconds": time.monotonic() - began}
        self.registry.await_earlier(self.options.night)
        if self.registry.came_between(self._night_before, self.options.night):
            return None
        if work.reasons:
            self._keep_back(run, work.reasons, work, more)
            print_table(work.fitted.result, warnings)
            return work.reasons
        with self.registry.turn() as turn:
            if self.registry.came_between(self._night_before, self.options.night):
                return None
            lineage = self._publish(run, work, more, turn)
        # Results are committed before anything is printed: the reader may have gone.
        print_table(work.fitted.result, warnings)
        say(f"best by {work.best}; {_spell(lineage)}")
        return []

    def _fit(self, run: Run) -> _Work:
        plan, requested_columns, reasons = self._plan()
        where = self.rows.where(days=self.options.days).text
        options = replace(self.options, where=where, columns=requested_columns)
        warm = None if self.before is None or reasons else self.before.mixture
        if warm is not None and self.before is not None:
            logger.info("warm start from %s, %s", self.before.night, _shape(warm, self.options))
        job = Job.of(options, plan, warm=warm, progress=Progress(screen(stderr=True)))
        comparisons: list[tuple[DensityChange, Coreset]] = []

        def look(shards: Shards, result: SweepResult) -> None:
            if job.warm and result.best is not None:
                tonight = result.best.fit.parameters
                seed = self.options.random_state
                rows = shards.run(draw_rows(job.warm[0], result.total, seed))
                comparisons.append((compare_densities(shards, job.warm[0], tonight), rows))

        if self.options.scores is not None:  # the scoring goes on with the fit's Ray
            cluster = options.cluster.at_most(max(plan.n_shards, len(plan.files)))
            self.session.enter_context(connected(cluster))
        fitted = job.fit(run, look)
        densities, columns = None, None
        if comparisons and self.before is not None:
            densities, rows = comparisons[0]
            columns = _columns_against(self.before, mixture_of(fitted, job.loader), job, rows)
        reasons += self._reasons(job, fitted, densities, columns)
        return _Work(job=job, fitted=fitted, densities=densities, columns=columns, reasons=reasons)

    def _plan(self) -> tuple[Plan, tuple[str, ...] | None, list[str]]:
        """Plan the rows, with their columns in last night's order.

        Returns the plan, the requested columns, and the reasons to keep the night back: how its
        columns differ from last night's.
        """
        options = self.options
        plan = self._planned(options.columns)
        if self.before is None:
            return plan, options.columns, []
        columns = self.before.lineage.columns
        reasons = _spelt(gate.on_columns(gate.kinds(plan.schema, plan.columns), columns))
        if reasons or plan.columns == tuple(columns):
            return plan, options.columns, reasons
        with quiet():
            return self._planned(tuple(columns)), tuple(columns), []

    def _planned(self, columns: Sequence[str] | None) -> Plan:
        options = self.options
        return self.rows.plan(days=options.days, missing=options.missing, columns=columns)

    def _warnings(self, columns: ColumnDrift | None) -> list[str]:
        if columns is None:
            return []
        warnings = _spelt(
            self.options.gate.warnings_of_drift(
                columns.drift,
                columns.change,
                divergence=columns.divergence,
                strangers=columns.strangers,
            )
        )
        for warning in warnings:
            logger.warning("%s: %s", self.options.night, warning)
        return warnings

    def _reasons(
        self,
        job: Job,
        fitted: Fitted,
        densities: DensityChange | None,
        columns: ColumnDrift | None,
    ) -> list[str]:
        before = None if self.before is None else self.before.lineage.n_rows
        reasons = self.options.gate.on_rows(fitted.n_rows, before)
        if fitted.result.best is None:
            return _spelt([*reasons, none_ranked(len(job.candidates))])
        if densities is not None:
            held_out = densities.held_out_tonight, densities.held_out_before
            reasons += self.options.gate.on_likelihood(*held_out)
        if columns is not None:
            reasons += self.options.gate.on_drift(
                columns.drift, columns.change, strangers=columns.strangers
            )
        return _spelt(reasons)

    def _publish(self, run: Run, work: _Work, more: dict[str, Any], turn: Lease) -> Lineage:
        mixture, reference = work.mixture, self._reference(work)
        known = () if reference is None else reference.lineage.ids
        matching = _match(reference, mixture)
        first = self.registry.new_ids(len(matching.born), above=known)
        lineage = Lineage(
            night=self.options.night,
            night_before=self._night_before,
            ids=(ids := matching.ids(known, first)),
            born=tuple(ids[i] for i in matching.born),
            dead=() if self.before is None else tuple(known[i] for i in matching.dead),
            n_rows=work.fitted.n_rows,
            columns=gate.kinds(work.job.plan.schema, work.job.plan.columns),
        )
        clusters = self._clusters(reference, mixture)
        if clusters is not None:
            lineage = replace(lineage, clusters=clusters)
            work = work.numbering(clusters.ids)
        drifted = self._drift(work, matching, ids)
        self._write(run.attempt, [], work, more, drifted, ids, ids)
        run.attempt.write_json(LINEAGE, lineage.to_json())
        run.attempt.write_json(RECIPE, self._recipe(work.job).content)
        logger.info("committing")
        turn.check()
        with holding():
            run.attempt.commit()
        self.registry.point_to(self.options.night)
        return lineage

    def _recipe(self, job: Job) -> Recipe:
        before = None if self.before is None or not job.warm else self.before.night
        warm = None if before is None else self.registry.model_url(before)
        return Recipe.of(job.options, job.identity, results.versions(), warm)

    def _clusters(self, reference: Published | None, mixture: Mixture) -> ClusterLineage | None:
        """Return who tonight's clusters are; None where there are none."""
        if mixture.clusters is None:
            return None
        known: tuple[int, ...] = ()
        matching = Matching((), tuple(range(mixture.clusters.n_clusters)), ())
        if reference is not None and reference.mixture.clusters is not None:
            matching = match_clusters(reference.mixture, mixture)
            known = reference.mixture.clusters.numbers
        first = max([self.registry.next_cluster_id(), *(i + 1 for i in known)])
        ids = matching.ids(known, first)
        return ClusterLineage(
            ids=ids,
            born=tuple(ids[i] for i in matching.born),
            dead=() if self.before is None else tuple(known[i] for i in matching.dead),
            next_id=first + len(matching.born),
        )

    def _keep_back(
        self,
        run: Run,
        reasons: list[str],
        work: _Work | None = None,
        more: dict[str, Any] | None = None,
    ) -> None:
        """Commit what there is to the candidates, in place of an earlier attempt's."""
        run.check()
        with commit.claim(self.candidate(run)) as attempt:
            drifted, numbers = None, None
            if work is not None and work.densities is not None and self.before is not None:
                matching = _match(self.before, work.mixture)
                known = {j: self.before.lineage.ids[i] for i, j in matching.pairs}
                numbers = tuple(known.get(j) for j in range(work.mixture.n_components))
                drifted = self._drift(work, matching, numbers)
            self._write(attempt, reasons, work, more or {}, drifted, numbers)
            attempt.commit()
        run.check()  # drawing the report takes time: a driver that took over keeps its own
        self.registry.forget_candidates(self.options.night, but=run.attempt.id)
        run.forget()

    def _write(
        self,
        attempt: commit.Attempt,
        reasons: list[str],
        work: _Work | None,
        more: dict[str, Any],
        drifted: Drift | None,
        numbers: Sequence[int | None] | None = None,
        ids: tuple[int, ...] | None = None,
    ) -> None:
        verdict = {
            "night": self.options.night,
            "night_before": self._night_before,
            "published": not reasons,
            "reasons": reasons,
            "where": self.rows.where(days=self.options.days).text,
            **({} if self.rows.snapshot is None else {"snapshot": self.rows.snapshot}),
            "n_rows": work and work.fitted.n_rows,
            "column_drift": work and work.columns and asdict(work.columns),
            "warnings": (more or {}).get("warnings", []),
            **asdict(self.options.gate),
        }
        attempt.write_json(GATE, {"format_version": FORMAT_VERSION, **verdict})
        night_report = {**verdict, "drift": None}
        if drifted is not None:
            night_report["drift"] = asdict(drifted)
            attempt.write_json(DRIFT, {"format_version": FORMAT_VERSION, **night_report["drift"]})
        if work is None:
            of_fit.write(attempt, None, nightly=night_report)
            return
        loader, settings = work.job.loader, work.job.settings
        results.write(
            attempt,
            work.fitted,
            loader,
            settings,
            more,
            ids=ids,
            draw=functools.partial(of_fit.write, numbers=numbers, nightly=night_report),
        )

    def _reference(self, work: _Work) -> Published | None:
        """Return the night that the components take their ids from.

        It is the night before; for a late night without one, the night after.
        """
        if self.before is not None:
            return self.before
        after = self.registry.oldest_after(self.options.night)
        names = work.job.plan.feature_names
        return after if after is not None and after.mixture.feature_names == names else None

    def _drift(self, work: _Work, matching: Matching, ids: Sequence[int | None]) -> Drift | None:
        if self.before is None or work.densities is None:
            return None
        old, mixture = self.before, work.mixture
        clusters = None
        if old.mixture.clusters is not None and mixture.clusters is not None:
            numbers: tuple[int | None, ...] = (None,) * mixture.clusters.n_clusters
            clusters = changes(
                Numbered(old.night, as_gaussians(old.mixture), old.mixture.clusters.numbers),
                Numbered(
                    self.options.night,
                    as_gaussians(mixture),
                    numbers if mixture.clusters.ids is None else mixture.clusters.ids,
                ),
                match_clusters(old.mixture, mixture),
            )
        return drift(
            Numbered(old.night, old.mixture.parameters, old.lineage.ids),
            Numbered(self.options.night, mixture.parameters, tuple(ids)),
            matching,
            work.densities,
            mixture.feature_names,
            work.columns,
            clusters,
        )


def _match(reference: Published | None, mixture: Mixture) -> Matching:
    if reference is None:
        return Matching((), tuple(range(mixture.n_components)), ())
    return match(reference.mixture.parameters, mixture.parameters)


def _columns_against(before: Published, tonight: Mixture, job: Job, rows: Coreset) -> ColumnDrift:
    """Measure whether whole columns have changed, on rows of tonight about their centre."""
    X = rows.X + torch.from_numpy(job.loader.centre)
    parameters = before.mixture.parameters, tonight.parameters
    return column_drift(*parameters, X, rows.sample_weight, tonight.feature_names)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Work:
    """The outcome of a night's fit; `reasons` to keep it back."""

    job: Job
    fitted: Fitted
    densities: DensityChange | None
    columns: ColumnDrift | None
    reasons: list[str]

    def numbering(self, ids: tuple[int, ...]) -> _Work:
        """Return the same with numbers for its clusters."""
        assert self.fitted.clusters is not None
        clusters = replace(self.fitted.clusters, ids=ids)
        return replace(self, fitted=replace(self.fitted, clusters=clusters))

    @property
    def mixture(self) -> Mixture:
        return mixture_of(self.fitted, self.job.loader)

    @property
    def best(self) -> str:
        best, criterion = self.fitted.result.best, self.fitted.result.criterion
        assert best is not None
        return spell_best(best, criterion)

    @property
    def warnings(self) -> list[str]:
        names = self.job.plan.feature_names
        sweep_warnings = self.fitted.result.warnings(
            names, lambda k: f"give --k {k} from the next night on", spelling=on_command_line
        )
        return [*_spelt(self.fitted.incomplete), *sweep_warnings]


def _spelt(lines: Sequence[Words]) -> list[str]:
    return [spelt(words, on_command_line) for words in lines]


def _shape(warm: Mixture, options: NightlyOptions) -> str:
    k, kind = warm.n_components, warm.covariance_type
    if k in (options.k or ()) and kind in options.covariance_type:
        return f"k={k} {kind}"
    return f"k={k} {kind}, which --k and --covariance-type do not ask for: it takes no part"


def _spell(lineage: Lineage) -> str:
    """Say in a line who was born and who died."""
    if lineage.night_before is None:
        first = f"the first night, components {_listed(lineage.ids)}"
        clusters = lineage.clusters
        return first if clusters is None else f"{first}; clusters {_listed(clusters.ids)}"
    kept = f"against {lineage.night_before}: {len(lineage.ids) - len(lineage.born)} stay"
    line = f"{kept}, {_told(lineage.born, 'born')}, {_told(lineage.dead, 'dead')}"
    if (clusters := lineage.clusters) is None:
        return line
    stay = len(clusters.ids) - len(clusters.born)
    return (
        f"{line}; of the clusters {stay} stay, {_told(clusters.born, 'born')}, "
        f"{_told(clusters.dead, 'dead')}"
    )


def _told(ids: Sequence[int], what: str) -> str:
    """Say how many are born or dead, and their numbers."""
    return f"{len(ids)} {what} ({_listed(sorted(ids))})" if ids else f"none {what}"


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids)) or "none"

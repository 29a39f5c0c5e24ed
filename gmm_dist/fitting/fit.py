"""A fit from its claim to its commit: plan, session, sweep, checkpoint, results."""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Self

import torch

from gmm_dist.em.evaluate import training_quantiles
from gmm_dist.errors import Option, Spelling, UserError, Words, in_python, spelt
from gmm_dist.fitting import results
from gmm_dist.fitting.checkpoints import FitCheckpoints
from gmm_dist.fitting.lake_sweep import loader_of, resident, with_resamples
from gmm_dist.fitting.options import FitOptions
from gmm_dist.fitting.progress import FitProgress, Silent
from gmm_dist.fitting.recipe import RECIPE, Recipe
from gmm_dist.fitting.results import DrawReport, Fitted, no_report, sample_of
from gmm_dist.formats import counted
from gmm_dist.lake.load import Counted, LakeLoader
from gmm_dist.lake.plan import Plan, plan_of
from gmm_dist.lake.tables.snapshot import stay_at
from gmm_dist.model.bootstrap import Bootstrap
from gmm_dist.model.clusters import Clusters
from gmm_dist.model.mixture import Mixture
from gmm_dist.model.parameters import Parameters
from gmm_dist.runs import claim, load
from gmm_dist.runs.checkpoint import RunIdentity, environment
from gmm_dist.runs.claim import Run
from gmm_dist.runs.folder import lies_within
from gmm_dist.selection.certainty.bootstrap import Resampling, bootstrap
from gmm_dist.selection.clustering import find_clusters
from gmm_dist.selection.ranking import Candidate, SweepResult
from gmm_dist.selection.sweep import sweep
from gmm_dist.shards.local import one_thread
from gmm_dist.shards.protocol import Shards, WorkingShards
from gmm_dist.urls import redacted

logger = logging.getLogger(__name__)

_ASKED = ("where", "weight_column", "missing", "holdout", "clusters", "bootstrap")
"""Options that sweep.json tells beside the settings of EM and of the search."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class FitOutcome:
    """The outcome of a fit that has committed, or that could rank no candidate.

    `result` is None where the run had committed before; `mixture` is the best model, in feature
    units; `has_report` says whether there is a report.html. Where `result.best` is None there is no
    model, and the output is free again.
    """

    output: str
    result: SweepResult | None
    warnings: list[str]
    mixture: Mixture | None = None
    has_report: bool = False


def fit_lake(
    options: FitOptions,
    *,
    progress: FitProgress | None = None,
    draw: DrawReport = no_report,
    next_run: Callable[[str], Words] = lambda k: f"fit k={k} next",
    spelling: Spelling = in_python,
    reading: Spelling = in_python,
    finish: Callable[[], None] = lambda: None,
) -> FitOutcome:
    """Claim the output, plan, load, fit, rank and commit.

    With `options.resume` the fit goes on from the output's last checkpoint, and a run that has
    committed is left as it is.

    Args:
        options: What is fitted, and how.
        progress: Receives the fit's progress.
        draw: Draws report.html.
        next_run: Says how a grid of K, such as "12..24", is fitted next, for a warning.
        spelling: Spells the options that warnings name.
        reading: Spells them for the readers of the report.
        finish: Is called before the commit, which must not be interrupted.

    Raises:
        UserError: the output is taken, or rows or settings are not fit for it.
        RunFailed: too much has failed.
    """
    began = time.monotonic()
    # Sums have the same bits whatever the cores of this machine, whose setting is not ours.
    with one_thread(), claim.claim(options.output, resume=options.resume) as run:
        if run.committed:
            return FitOutcome(output=options.output, result=None, warnings=[])
        options = replace(options, at=stay_at(options.at, run.begun_with()))
        start_model = None if options.start is None else load.load(options.start)
        job = Job.of(options, start_model=start_model, progress=progress)
        fitted = job.fit(run)
        result = fitted.result
        warnings = job.warnings(fitted, spelling, next_run)
        if result.best is None:
            run.forget()
            return FitOutcome(output=options.output, result=result, warnings=warnings)
        more = {
            "warnings": warnings,
            "notes": job.warnings(fitted, reading),
            "date": datetime.now(UTC).isoformat(sep=" ", timespec="minutes"),
            "asked": {name: getattr(options, name) for name in _ASKED},
            "seconds": time.monotonic() - began,
        }
        has_report = results.write(run.attempt, fitted, job.loader, job.settings, more, draw=draw)
        recipe = Recipe.of(options, job.identity, results.versions())
        run.attempt.write_json(RECIPE, recipe.content)
        logger.info("committing")
        finish()
        run.attempt.commit()
    return FitOutcome(
        output=options.output,
        result=result,
        warnings=warnings,
        mixture=results.mixture_of(fitted, job.loader),
        has_report=has_report,
    )


def _too_few(clusters: Clusters | None, wanted: str | int | None) -> list[Words]:
    """Say that the best model has fewer components than clusters were asked for, if it has."""
    if clusters is None or not isinstance(wanted, int) or clusters.n_clusters == wanted:
        return []
    components = counted(clusters.n_components, "component")
    return [
        Option("clusters", wanted)
        + f": the best model has {components}, so there are no more clusters"
    ]


def none_ranked(n_candidates: int) -> Words:
    """Say that there is no model, and what to do."""
    none = f"none of the {n_candidates:,} candidates" if n_candidates > 1 else "the one candidate"
    return (
        f"{none} could{'' if n_candidates > 1 else ' not'} be ranked, see the table: "
        "use smaller "
        + Option("n_components")
        + ", more rows, or leave out constant and duplicated columns"
    )


def _run_again(k: str) -> Words:
    return "run again with " + Option("n_components") + f" {k}"


Look = Callable[[Shards, SweepResult], None]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Job:
    """A fit: its candidates, rows and settings.

    `initial_parameters` and `warm` are about the rows' centre.
    """

    options: FitOptions
    candidates: list[Candidate]
    loader: LakeLoader
    initial_parameters: list[Parameters] | None
    warm: list[Parameters]
    progress: FitProgress

    @classmethod
    def of(
        cls,
        options: FitOptions,
        plan: Plan | None = None,
        *,
        start_model: Mixture | None = None,
        warm: Mixture | None = None,
        progress: FitProgress | None = None,
    ) -> Self:
        """Take the settings, and plan the rows unless that was done before.

        Args:
            options: What is fitted, and how.
            plan: The rows; None to plan them.
            start_model: A model that the fit goes on from.
            warm: A model that competes with other starts of its shape in a sweep.
            progress: Receives the fit's progress; None for silence.
        """
        candidates = _candidates(options, start_model)
        plan = plan or plan_of(options.lake)
        if plan.snapshot is not None and lies_within(options.output, plan.url):
            raise UserError(
                f"{redacted(options.output)} lies inside the table, whose VACUUM would remove the "
                "model",
                remedy="give a folder outside",
            )
        loader = loader_of(plan, candidates, options.cluster)
        starts, guests = (
            None if model is None else [about_centre(model, loader)]
            for model in (start_model, warm)
        )
        return cls(
            options=options,
            candidates=candidates,
            loader=loader,
            initial_parameters=starts,
            warm=guests or [],
            progress=progress or Silent(),
        )

    @property
    def plan(self) -> Plan:
        return self.loader.plan

    @property
    def settings(self) -> dict[str, Any]:
        return {"em": asdict(self.options.em), "start": asdict(self.options.search)}

    @property
    def identity(self) -> RunIdentity:
        """All that decides the model's bits."""
        options = self.options
        option_names = ("columns", "weight_column", "where", "missing", "holdout", "criterion")
        settings = {
            **self.settings,
            **{name: getattr(options, name) for name in option_names},
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "start_model": None
            if self.initial_parameters is None
            else _digest(self.initial_parameters),
        }
        if options.bootstrap:
            settings["bootstrap"] = options.bootstrap
        if self.warm:
            settings["warm_start"] = _digest(self.warm)
        return RunIdentity(
            plan_hash=self.plan.hash,
            files=self.plan.versions,
            settings=settings,
            environment=environment(),
            snapshot=self.plan.snapshot_content,
        )

    def warnings(
        self,
        fitted: Fitted,
        spelling: Spelling,
        next_run: Callable[[str], Words] = _run_again,
    ) -> list[str]:
        """Return what a reader should know of a fit, a line each, with its remedy."""
        names = self.plan.feature_names
        lines = [spelt(words, spelling) for words in fitted.incomplete]
        lines += fitted.result.warnings(names, next_run, spelling=spelling)
        too_few = _too_few(fitted.clusters, self.options.clusters)
        return [*lines, *(spelt(words, spelling) for words in too_few)]

    def fit(self, run: Run, look: Look = lambda shards, result: None) -> Fitted:
        """Load the rows and fit, from the last checkpoint where there is one.

        `look` is called with the shards and the result, while the rows are resident.
        """
        options, progress = self.options, self.progress
        checkpoints = FitCheckpoints(
            run, self.identity, resume=options.resume, seconds=options.checkpoint_seconds
        )
        with progress.shown(), self.resident(progress) as (shards, counted):
            if checkpoints.latest is not None:
                progress.resuming(checkpoints.number)
            elif self.initial_parameters is None:
                progress.starting(options.n_init)
            result = self._sweep(shards, checkpoints)
            quantiles = None
            if result.best is not None:
                quantiles = training_quantiles(shards, result.best.fit.parameters, result.total)
            clusters = self._clusters(shards, result, run)
            resampled, clusters = self._resampled(shards, result, clusters, checkpoints)
            sample = sample_of(shards, result, options.random_state)
            look(shards, result)
        return Fitted(
            result=result,
            counted=counted,
            quantiles=quantiles,
            clusters=clusters,
            bootstrap=resampled,
            sample=sample,
        )

    def _resampled(
        self,
        shards: WorkingShards,
        result: SweepResult,
        clusters: Clusters | None,
        checkpoints: FitCheckpoints,
    ) -> tuple[Bootstrap | None, Clusters | None]:
        """Resample the rows, if that is asked for; the clusters then have their stability."""
        options = self.options
        if result.best is None or not options.bootstrap:
            return None, clusters
        resampling = Resampling(
            mixture=result.best.fit.parameters,
            n_resamples=options.bootstrap,
            config=options.em,
            start=options.search,
            clusters=clusters,
            spikes=result.total.spikes,
            result=result,
        )
        return bootstrap(
            shards,
            resampling,
            watch=self.progress.resampling,
            resume=checkpoints.resampled,
            keep=lambda step, taken: checkpoints.keep_resampled(result.n_passes + step, taken),
        )

    def _clusters(self, shards: WorkingShards, result: SweepResult, run: Run) -> Clusters | None:
        """Merge the best candidate's components into clusters, if that is asked for."""
        options = self.options
        if result.best is None or options.clusters is None:
            return None

        def watch(done: int, n_passes: int) -> None:
            run.check()
            self.progress.merging(done, n_passes)

        return find_clusters(
            shards,
            result.best.fit.parameters,
            options.clusters,
            start=options.search,
            watch=watch,
        )

    @contextmanager
    def resident(self, progress: FitProgress) -> Iterator[tuple[WorkingShards, Counted]]:
        """Keep the rows in the memory of a cluster's workers, and count them."""
        options = self.options
        candidates = with_resamples(self.candidates, options.bootstrap, self.plan.n_features)

        def loaded(done: int, n_rows: int) -> None:
            progress.loading(done, self.plan.n_shards, n_rows)

        with resident(
            self.loader, candidates, options.cluster, options.faults, watch=loaded
        ) as rows:
            yield rows

    def _sweep(self, shards: WorkingShards, checkpoints: FitCheckpoints) -> SweepResult:
        return sweep(
            shards,
            self.candidates,
            self.options.em,
            self.options.search,
            n_features=self.plan.n_features,
            feature_names=self.plan.feature_names,
            centre=torch.from_numpy(self.loader.centre),
            criterion=self.options.criterion,
            holdout=self.plan.holdout > 0,
            initial=self.initial_parameters,
            warm=self.warm,
            watch=self.progress.standings,
            searching=self.progress.searching,
            resume=checkpoints.latest,
            keep=checkpoints.keep,
        )


def _digest(mixtures: Sequence[Parameters]) -> str:
    digest = hashlib.sha256()
    for parameters in mixtures:
        for part in (parameters.weights, parameters.means, parameters.covariances):
            digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _candidates(options: FitOptions, start_model: Mixture | None) -> list[Candidate]:
    if start_model is None:
        pairs = itertools.product(options.covariance_type, options.k or ())
        return [Candidate(k, kind) for kind, k in pairs]
    if options.k not in (None, (start_model.n_components,)):
        components = counted(start_model.n_components, "component")
        k, start = Option("n_components"), Option("start")
        raise UserError(
            f"is {options.k[0]} but the model of " + start + f" has {components}",
            option=k,
            remedy="leave out " + k,
        )
    return [Candidate(start_model.n_components, start_model.covariance_type)]


def about_centre(model: Mixture, loader: LakeLoader) -> Parameters:
    """Return a model's parameters about the rows' shared centre; refuse other features."""
    plan = loader.plan
    if model.feature_names != plan.feature_names:
        raise UserError(
            "the model of "
            + Option("start")
            + f" has the features {', '.join(model.feature_names)}, the data "
            f"{', '.join(plan.feature_names)}",
            remedy="name the model's with " + Option("columns") + ", in its order",
        )
    return model.parameters.shifted(-torch.from_numpy(loader.centre))

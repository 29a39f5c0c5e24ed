"""A scoring from its claim to its commit: model, plan, workers, files."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, Self

import pyarrow as pa

from gmm_dist.config import COMPILE_FROM, FailureConfig
from gmm_dist.errors import Option, UserError
from gmm_dist.formats import counted
from gmm_dist.lake.lake import Lake
from gmm_dist.lake.plan import Plan, plan_of
from gmm_dist.lake.tables.snapshot import stay_at
from gmm_dist.model.mixture import Mixture
from gmm_dist.runs import load
from gmm_dist.runs.checkpoint import RunIdentity, environment
from gmm_dist.runs.claim import Run
from gmm_dist.runs.model_folder import model_sha256
from gmm_dist.scoring.delta import DeltaScores, in_delta
from gmm_dist.scoring.files import Scored, ScoreFiles
from gmm_dist.scoring.options import ScoreOptions
from gmm_dist.scoring.run import begun_with, claim, commit
from gmm_dist.scoring.scorer import Scoring
from gmm_dist.scoring.target import Target, scored_path
from gmm_dist.shards.ray_shards import session
from gmm_dist.shards.work import Done, summary
from gmm_dist.urls import redacted

logger = logging.getLogger(__name__)


class ScoreProgress(Protocol):
    """Receives the progress of a scoring."""

    def shown(self) -> AbstractContextManager[None]:
        """Return a context in which it is shown."""

    def scoring(self, done: int, n_files: int, n_rows: int) -> None:
        """Note how many files are scored, and their rows so far."""


class _Silent:
    """Shows nothing."""

    def shown(self) -> AbstractContextManager[None]:
        return nullcontext()

    def scoring(self, done: int, n_files: int, n_rows: int) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class ScoreOutcome:
    """What a scoring has written; None where the run had committed before."""

    output: str
    scored: Scored | None
    sentence: str = ""


def score_lake(
    options: ScoreOptions,
    *,
    progress: ScoreProgress | None = None,
    finish: Callable[[], None] = lambda: None,
) -> ScoreOutcome:
    """Plan, claim the output, score what is not scored yet, and commit.

    `progress` receives how far it is; `finish` is called before the commit, which must not be
    interrupted. Raises UserError and RunFailed as `gmm_dist.scoring.run.claim` does.
    """
    began = time.monotonic()
    job = _Job.of(options, progress or _Silent())
    target, table = job.target, job.table
    if table is not None and table.has_run():
        return ScoreOutcome(options.output, None)
    with claim(target, job.plan, job.identity, resume=options.resume) as run:
        if run.committed:
            return ScoreOutcome(options.output, None)
        scored = job.score(run)
        more = {**job.facts, "seconds": time.monotonic() - began}
        finish()
        commit(target, run, job.identity, scored, more, table)
    return ScoreOutcome(options.output, scored, job.sentence(scored))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Job:
    """A scoring: the rows, the mixture and the settings."""

    options: ScoreOptions
    progress: ScoreProgress
    mixture: Mixture
    plan: Plan
    scoring: Scoring

    @classmethod
    def of(cls, options: ScoreOptions, progress: ScoreProgress) -> Self:
        mixture = load.load(options.model)
        if not mixture.feature_names:
            raise UserError(
                f"{redacted(options.model)} keeps no names of its features, by which a lake's "
                "columns are found: pass a model that a fit or a sweep wrote"
            )
        threshold = _threshold(mixture, options)
        rows = Lake(
            options.data,
            columns=mixture.feature_names,
            where=options.where,
            missing="mean",  # a row with a hole keeps its place
            at=stay_at(options.at, _begun_with(options, _settings(options, mixture, threshold))),
        )
        remedy = "the model needs all its features: score files that have them"
        plan = plan_of(rows, keep=options.keep, remedy=remedy)
        if plan.feature_names != mixture.feature_names:
            raise UserError(
                f"{redacted(plan.url)} has the features {', '.join(plan.feature_names)}, the model "
                "of " + Option("model") + f" {', '.join(mixture.feature_names)}",
                remedy="score the columns that it was fitted to",
            )
        scoring = Scoring(
            mixture=mixture.parameters,
            kept=_kept(plan, options),
            is_placed=plan.snapshot is not None or options.write == "delta",
            probabilities=options.probabilities,
            threshold=threshold,
            ids=mixture.ids,
            clusters=None if mixture.clusters is None else mixture.clusters.of_component,
            cluster_ids=None if mixture.clusters is None else mixture.clusters.ids,
            compiled=plan.n_rows >= COMPILE_FROM,
        )
        return cls(options=options, progress=progress, mixture=mixture, plan=plan, scoring=scoring)

    @property
    def target(self) -> Target:
        """Where the scores go."""
        is_table = self.options.write == "delta"
        return Target(self.options.output, self.identity.key if is_table else None)

    @property
    def table(self) -> DeltaScores | None:
        """The Delta table that they go to, if any."""
        if self.target.run is None:
            return None
        return DeltaScores(
            target=self.target, overwrite=self.options.overwrite, schema=self.scoring.schema
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What scored.json says beside the counts, as plain JSON values."""
        return {
            "data": redacted(self.plan.url),
            "plan_hash": self.plan.hash,
            **({} if self.plan.snapshot is None else {"snapshot": self.plan.snapshot_content}),
            "model": redacted(self.options.model),
            "feature_names": self.plan.feature_names,
            "columns": self.scoring.schema.names,
            "config": self._settings,
            "versions": environment(),
        }

    @property
    def identity(self) -> RunIdentity:
        """All that decides the files' bytes."""
        return RunIdentity(
            plan_hash=self.plan.hash,
            files=self.plan.versions,
            settings=self._settings,
            environment=environment(),
            snapshot=self.plan.snapshot_content,
        )

    @property
    def _settings(self) -> dict[str, Any]:
        return _settings(self.options, self.mixture, self.scoring.threshold)

    def score(self, run: Run) -> Scored:
        """Have the workers score all files that are not scored yet."""
        options, n_files = self.options, len(self.plan.files)
        work = ScoreFiles(self.plan, self.scoring, self.target, self.identity, run.attempt.id)
        progress = self.progress

        def watch(done: int, n_rows: int) -> None:
            run.check()
            progress.scoring(done, n_files, n_rows)

        workers = session(Done(work), n_files, options.cluster, self._faults)
        with workers as shards, progress.shown():
            shards.load(watch)
            return shards.run(summary(work))

    @property
    def _faults(self) -> FailureConfig:
        """The failure settings, with deadlines long enough for the largest file."""
        options, usual = self.options, FailureConfig()
        sizes = [file.size for file in self.plan.files]
        skew = max(sizes) / statistics.median(sizes)
        return FailureConfig(
            max_failures=options.max_failures,
            grace=options.grace,
            deadline_factor=usual.deadline_factor * skew,
            straggling_factor=usual.straggling_factor * skew,
        )

    def sentence(self, scored: Scored) -> str:
        """Say in one line what was done."""
        options, k, counts = self.options, self.mixture.n_components, scored.counts
        rows, files = counted(counts.rows, "row"), counted(len(scored.files), "file")
        by = f"k={k}"
        if (clusters := self.mixture.clusters) is not None:
            by += f", {counted(clusters.n_clusters, 'cluster')}"
        parts = [f"scored {rows} of {files} by {by}"]
        if counts.filtered:
            parts.append(f"{counted(counts.filtered, 'other')} in them did not pass the filter")
        if counts.missing:
            verb = "misses" if counts.missing == 1 else "miss"
            parts.append(f"{counted(counts.missing, 'row')} {verb} a feature")
        if options.outliers is not None:
            parts.append(counted(counts.outliers, "outlier"))
        if (snapshot := self.plan.snapshot) is not None:
            parts.append(f"of {snapshot.shown}")
        return f"{'; '.join(parts)}; in {options.output.rstrip('/')}"


def _begun_with(options: ScoreOptions, settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the version of a table with which the run has begun that goes on, if any."""
    if not options.resume:
        return None
    return begun_with(Target(options.output), settings, is_table=options.write == "delta")


def _settings(options: ScoreOptions, mixture: Mixture, threshold: float | None) -> dict[str, Any]:
    """Return what decides the scores beside the rows, as plain JSON values."""
    settings = {name: getattr(options, name) for name in ("keep", "where", "probabilities")}
    if options.write == "delta":
        settings |= {"write": "delta", "overwrite": options.overwrite}
    # A run of a model without clusters goes on from what an earlier version left of it.
    if mixture.clusters is not None:
        settings["clusters"] = mixture.clusters.of_component
        if mixture.clusters.ids is not None:
            settings["cluster_ids"] = mixture.clusters.ids
    return {
        **settings,
        "outliers": options.outliers,
        "threshold": threshold,
        "component_ids": mixture.ids,
        "model_sha256": model_sha256(mixture.parameters),
    }


def _kept(plan: Plan, options: ScoreOptions) -> pa.Schema:
    """Return the columns that go along: not those that the paths of all scored files tell."""
    is_table = options.write == "delta"
    fields = []
    for name in dict.fromkeys(options.keep):
        if name in plan.kept:
            fields.append(plan.schema.field(name))
        elif is_table or (plan.snapshot is not None and not _is_told(plan, name)):
            fields.append(plan.keys.field(name))
        else:
            what = "a hive key, which the path has; no column is written"
            logger.info("%s %s: %s", Option("keep"), name, what)
    return pa.schema(map(in_delta, fields) if is_table else fields)


def _is_told(plan: Plan, name: str) -> bool:
    """Say whether the paths of all scored files tell a partition value."""
    return all(f"/{name}=" in f"/{scored_path(file)}" for file in plan.files)


def _threshold(mixture: Mixture, options: ScoreOptions) -> float | None:
    """Return the log-density (nats) below which a row is an outlier."""
    if options.outliers is None:
        return None
    if mixture.log_density_quantiles is None:
        raise UserError(
            f"{redacted(options.model)} keeps no quantiles of its training log-density, as models "
            "of older versions do not",
            remedy="fit it again (with "
            + Option("start")
            + " a fit goes on from it), or leave out "
            + Option("outliers"),
        )
    try:
        return mixture.log_density_quantiles.at(options.outliers)
    except UserError as error:
        raise UserError(Option("outliers") + f": {error}") from error

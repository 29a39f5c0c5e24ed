"""Verify a committed fit: fit it again from its recipe and compare the bits, or score its rows."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gmm_dist.config import FailureConfig
from gmm_dist.errors import Option, UserError
from gmm_dist.fitting import results
from gmm_dist.fitting.fit import Job
from gmm_dist.fitting.lake_scores import scores_of_lake
from gmm_dist.fitting.options import FitOptions
from gmm_dist.fitting.progress import FitProgress
from gmm_dist.fitting.recipe import RECIPE, Recipe, changed
from gmm_dist.lake.tables.snapshot import At, shown, stay_at
from gmm_dist.model.mixture import Mixture
from gmm_dist.runs import claim, load
from gmm_dist.runs.checkpoint import environment
from gmm_dist.runs.commit import Result
from gmm_dist.runs.folder import Folder
from gmm_dist.runs.json_files import parse_plain
from gmm_dist.runs.model_folder import model_sha256
from gmm_dist.shards.local import one_thread
from gmm_dist.storage import explained

NEAR = 1e-6  # nats per row: what rows kept in float32 may move a mean log-likelihood by
_NEVER = 1e9  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Say whether a fit was found again.

    `reasons` say what is known to differ where it was not, `notes` what differs where it was;
    `what` names the rows, and what was compared.
    """

    is_same: bool
    what: str
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """The settings of a verification.

    Args:
        output: The output of a fit or sweep, or a night's model in a registry.
        fast: Check the hashes of its files and score its rows once, in place of fitting again.
        at: Another version of the table to be read; None for the one that was fitted.
        num_workers: Actors that hold rows; None for one per CPU or GPU.
        use_gpu: Whether each has a GPU of its own; None: if the cluster has any.
        max_failures: Failures of workers or their storage that it bears.
        grace: Seconds until others take over the rows of a lost worker.
        address: Ray cluster; None for the one the process runs in, else one started here.
    """

    output: str
    fast: bool = False
    at: At | str | None = None
    num_workers: int | None = None
    use_gpu: bool | None = None
    spill: bool | str = True
    max_failures: int = FailureConfig().max_failures
    grace: float = FailureConfig().grace
    address: str | None = None

    @property
    def cluster(self) -> dict[str, Any]:
        """Where it is fitted again, as `FitOptions` takes it."""
        names = ("num_workers", "use_gpu", "spill", "max_failures", "grace", "address")
        return {name: getattr(self, name) for name in names}


def verify(options: VerifyOptions, *, progress: FitProgress | None = None) -> Verdict:
    """Verify what is committed at `options.output`.

    Raises:
        UserError: nothing is committed there, a file of it is damaged, or it was written without a
            recipe; the rows, or a model that it started from, cannot be read any more.
        RunFailed: too much has failed.
    """
    folder = Folder.of(options.output)
    with explained(folder.url):
        result = Result.at(folder)
        if RECIPE not in result.files:
            raise UserError(
                f"has no {RECIPE}, as fits in Python and those of earlier versions have none",
                where=str(folder.url),
                remedy="fit it again by gmm-dist, with the same options, and compare the models",
            )
        files = {name: result.read(name) for name in result.files}  # each fits its hash
    recipe = Recipe.read(files[RECIPE], folder.url)
    saved = load.load(options.output)
    with tempfile.TemporaryDirectory() as scratch, one_thread():
        fit_options = FitOptions(
            **recipe.options,
            **options.cluster,
            output=str(Path(scratch) / "fit"),
            clusters=None,
            checkpoint_seconds=_NEVER,
            at=stay_at(options.at, recipe.snapshot),
        )
        job = _job(fit_options, recipe, progress, fast=options.fast)
        inputs, notes = recipe.differences(job.identity, starts=not options.fast)
        with_what = changed(recipe.made_by, {**results.versions(), **environment()})
        what = f"the {job.plan.n_rows:,} rows of {job.plan.url}"
        if job.plan.snapshot is not None:
            what = f"the live rows of {shown(job.plan.snapshot.content)}"
        if options.fast:
            found = _scored(saved, fit_options, files, folder.url)
        else:
            found = _fitted(saved, job)
    is_same = not found
    reasons = [*inputs, *found, *notes, *with_what] if not is_same else []
    notes = [*notes, *inputs, *with_what] if is_same else []
    return Verdict(is_same=is_same, what=what, reasons=tuple(reasons), notes=tuple(notes))


def _job(options: FitOptions, recipe: Recipe, progress: FitProgress | None, *, fast: bool) -> Job:
    """Plan the fit; its starts are not needed to score the rows, and may be gone."""
    start = None if options.start is None or fast else load.load(options.start)
    if fast or recipe.warm is None:
        return Job.of(options, start_model=start, progress=progress)
    try:
        warm = load.load(recipe.warm)
    except UserError as error:
        raise UserError(
            f"started from the model of the night before, which is gone ({error})",
            remedy="give " + Option("fast") + ", which fits nothing",
        ) from error
    return Job.of(options, start_model=start, warm=warm, progress=progress)


def _fitted(saved: Mixture, job: Job) -> list[str]:
    """Fit again; say how the model differs."""
    with claim.claim(job.options.output) as run:
        fitted = job.fit(run)
    if fitted.result.best is None:
        return ["fitted again, no candidate can be ranked"]
    again = results.mixture_of(fitted, job.loader)
    if model_sha256(again.parameters) == model_sha256(saved.parameters):
        return []
    if again.n_components != saved.n_components or again.covariance_type != saved.covariance_type:
        return [
            f"k={again.n_components} {again.covariance_type} is best, not "
            f"k={saved.n_components} {saved.covariance_type}"
        ]
    difference = abs(again.log_likelihood / again.n_samples - _mean(saved))
    return [f"the parameters have other bits, the mean log-likelihood differs by {difference:.3g}"]


def _mean(mixture: Mixture) -> float:
    return float(mixture.log_likelihood or 0.0) / float(mixture.n_samples or 1.0)


def _scored(saved: Mixture, options: FitOptions, files: Mapping[str, bytes], url: str) -> list[str]:
    """Score the rows once; say how they differ from those that were fitted."""
    report = parse_plain(files[load.REPORT], load.REPORT, url)
    lake = replace(options.lake, columns=saved.feature_names)
    scores = scores_of_lake(lake, saved, cluster=options.cluster)
    n_fitted = report["n_rows"]
    if scores.n_rows != n_fitted:
        return [f"{n_fitted:,} rows were fitted, and there are {scores.n_rows:,}"]
    difference = abs(scores.score - _mean(saved))
    if difference <= NEAR * max(1.0, abs(scores.score)):
        return []
    return [f"the rows' mean log-likelihood differs by {difference:.3g} nats"]

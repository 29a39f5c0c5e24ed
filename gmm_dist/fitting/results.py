"""Write a fit's results: the model, sweep.json, and report.html by a function handed in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gmm_dist import __version__
from gmm_dist.errors import Option, Words
from gmm_dist.formats import one_line
from gmm_dist.lake.load import Counted, LakeLoader
from gmm_dist.lake.plan import Plan
from gmm_dist.model.bootstrap import Bootstrap
from gmm_dist.model.clusters import Clusters
from gmm_dist.model.mixture import Mixture
from gmm_dist.model.quantiles import Quantiles
from gmm_dist.runs import load
from gmm_dist.runs.bootstrap_json import plain_bootstrap
from gmm_dist.runs.cluster_json import plain
from gmm_dist.runs.load import Attempt
from gmm_dist.selection.coreset import DrawCoreset
from gmm_dist.selection.ranking import CRITERIA, RankedCandidate, SweepResult
from gmm_dist.selection.table import COLUMNS, label, saved
from gmm_dist.shards.protocol import Shards
from gmm_dist.streams import Stream, keyed_generator

_PACKAGES = ("torch", "numpy", "pyarrow", "ray", "fsspec", "s3fs", "safetensors")

logger = logging.getLogger(__name__)

# A coreset weighs no row more than twice the mean, so that half of it is a fair sample.
_DRAWN, _KEPT = 4096, 2000  # rows

DrawReport = Callable[[Attempt, Mapping[str, Any], Mixture | None, torch.Tensor | None], bool]
"""Draws report.html of sweep.json's content, the mixture and some rows; says whether it did."""


def no_report(
    attempt: Attempt,
    content: Mapping[str, Any],
    mixture: Mixture | None,
    sample: torch.Tensor | None,
) -> bool:
    """Draw nothing."""
    return False


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Fitted:
    """The outcome of a fit.

    `quantiles` are those of the best candidate's log-density, `clusters` are made of its
    components and `bootstrap` of resampled rows where asked for, `sample` (m, d) are some rows
    about their centre; None for no best.
    """

    result: SweepResult
    counted: Counted
    quantiles: Quantiles | None
    clusters: Clusters | None = None
    bootstrap: Bootstrap | None = None
    sample: torch.Tensor | None = None

    @property
    def n_rows(self) -> int:
        """The rows that were fitted or held out."""
        return self.counted.n_rows + self.counted.counts.held_out

    @property
    def incomplete(self) -> list[Words]:
        """Say how many rows, or values, were left out or filled as missing: no line or one."""
        counts = self.counted.counts
        n_rows = counts.read - counts.filtered
        if counts.dropped:
            return [Option("missing", "drop") + f" left out {counts.dropped:,} of {n_rows:,} rows"]
        if counts.imputed:
            values = "1 value" if counts.imputed == 1 else f"{counts.imputed:,} values"
            return [Option("missing", "mean") + f" filled {values} in {n_rows:,} rows"]
        return []


def write(
    attempt: Attempt,
    fitted: Fitted,
    loader: LakeLoader,
    settings: dict[str, Any],
    more: dict[str, Any],
    *,
    ids: tuple[int, ...] | None = None,
    draw: DrawReport = no_report,
) -> bool:
    """Write the best candidate's model, if any, and the reports on all of them.

    Args:
        attempt: Where the files go.
        fitted: The outcome of the fit.
        loader: The rows' loader, which knows their plan and centre.
        settings: The fit's settings, as plain JSON values.
        more: What else sweep.json says.
        ids: Numbers that the model's components keep from night to night.
        draw: Draws report.html.

    Returns whether a report was drawn.
    """
    result, plan = fitted.result, loader.plan
    content = _report(result, plan, fitted.counted, settings) | more
    content["clusters"] = plain(fitted.clusters)
    content["bootstrap"] = plain_bootstrap(fitted.bootstrap)
    mixture = sample = None
    if result.best is not None:
        mixture = mixture_of(fitted, loader, ids)
        attempt.write_model(mixture, _provenance(result.best, plan, settings))
    if fitted.sample is not None:
        sample = fitted.sample + torch.from_numpy(loader.centre)
    attempt.write_json(load.REPORT, content)
    return draw(attempt, content, mixture, sample)


def spell_best(best: RankedCandidate, criterion: str) -> str:
    """Name the best candidate and what ranked it."""
    name = f"k={best.candidate.k} {best.candidate.covariance_type}"
    if criterion == "holdout":
        return f"{label(criterion)}: {name}, {best.holdout:.6f} nats per row"
    return f"{label(criterion)}: {name}, {best.value(criterion):,.1f}"


def mixture_of(fitted: Fitted, loader: LakeLoader, ids: tuple[int, ...] | None = None) -> Mixture:
    """Return the best candidate's mixture, in feature units."""
    assert fitted.result.best is not None
    fit = fitted.result.best.fit
    return Mixture(
        parameters=fit.parameters.shifted(torch.from_numpy(loader.centre)),
        feature_names=loader.plan.feature_names,
        n_samples=fit.n_samples,
        log_likelihood=fit.log_likelihood,
        log_density_quantiles=fitted.quantiles,
        clusters=fitted.clusters,
        bootstrap=fitted.bootstrap,
        ids=ids,
    )


def _provenance(best: RankedCandidate, plan: Plan, settings: dict[str, Any]) -> load.Provenance:
    criteria = {name: COLUMNS[name].value(best) for name in CRITERIA}
    return load.Provenance(
        criteria={name: value for name, value in criteria.items() if value is not None},
        status=best.fit.status.value,
        converged=best.fit.converged,
        n_iter=best.fit.n_iter,
        config=settings,
        plan_hash=plan.hash,
        versions=versions(),
        snapshot=plan.snapshot_content,
    )


def _report(
    result: SweepResult, plan: Plan, counted: Counted, settings: dict[str, Any]
) -> dict[str, Any]:
    best = result.best
    return {
        "criterion": result.criterion,
        "best": None if best is None else asdict(best.candidate),
        "candidates": saved(result),
        "n_passes": result.n_passes,
        "n_samples": result.n_samples,
        "n_rows": counted.n_rows,
        "n_held_out": counted.counts.held_out,
        "rows": asdict(counted.counts),
        "feature_names": plan.feature_names,
        "data": plan.url,
        "plan_hash": plan.hash,
        "config": settings,
        "versions": versions(),
        **({} if plan.snapshot is None else {"snapshot": plan.snapshot.content}),
    }


def versions() -> dict[str, str | None]:
    """Return our version, and those of what computes and reads."""
    # Ours is asked of the package itself: a Ray job's working directory is not installed.
    return {"gmm_dist": __version__, **load.library_versions(_PACKAGES)}


def sample_of(shards: Shards, result: SweepResult, random_state: int) -> torch.Tensor | None:
    """Return a fair sample (m, d) of the fitted rows, about their centre, for the picture.

    One pass over the rows. None, and a line in the log, where that fails: a missing picture must
    not lose a fit.
    """
    if result.best is None:
        return None
    try:
        task = DrawCoreset.of(result.total, _DRAWN, Stream.PICTURE_ROWS, random_state)
        coreset = shards.run(task)
        return coreset.fair(_KEPT, keyed_generator(Stream.PICTURE, random_state))
    except Exception as error:
        logger.warning("the report will have no picture of the rows: %s", one_line(error))
        return None

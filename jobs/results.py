"""What a fit leaves behind: the table on the screen, the model, sweep.json, report.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from progress import notes, ranking
from talking import bearing, say, screen

from gmm_dist import __version__
from gmm_dist.lake.load import Counted, LakeLoader
from gmm_dist.lake.plan import Plan
from gmm_dist.model.mixture import Mixture
from gmm_dist.model.quantiles import Quantiles
from gmm_dist.report import of_fit
from gmm_dist.runs import load
from gmm_dist.runs.load import Attempt
from gmm_dist.selection.ranking import Scored, SweepResult

_PACKAGES = ("torch", "numpy", "pyarrow", "ray", "fsspec", "s3fs", "safetensors")


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """What came of a fit.

    `quantiles` are those of the best candidate's log-density, `sample` (m, d) some rows about
    their centre; None for no best.
    """

    result: SweepResult
    counted: Counted
    quantiles: Quantiles | None
    sample: torch.Tensor | None = None

    @property
    def n_rows(self) -> int:
        """The rows that were fitted or held out."""
        return self.counted.n_rows + self.counted.counts.held_out

    @property
    def incomplete(self) -> list[str]:
        """Say how many rows, or values, --missing has left out or filled: no line or one."""
        counts = self.counted.counts
        n_rows = counts.read - counts.filtered
        if counts.dropped:
            return [f"--missing drop left out {counts.dropped:,} of {n_rows:,} rows"]
        if counts.imputed:
            values = "1 value" if counts.imputed == 1 else f"{counts.imputed:,} values"
            return [f"--missing mean filled {values} in {n_rows:,} rows"]
        return []


def write(
    attempt: Attempt,
    fitted: Fitted,
    loader: LakeLoader,
    settings: dict[str, Any],
    more: dict[str, Any],
    *,
    ids: tuple[int, ...] | None = None,
    numbers: Sequence[int | None] | None = None,
    nightly: Mapping[str, Any] | None = None,
) -> bool:
    """Write the best candidate's model, if any, and the reports on all of them.

    `ids` are the numbers that the model's components keep from night to night; `numbers` and
    `nightly` are for report.html alone, see `reporting.write`. Return whether that was written.
    """
    result, plan = fitted.result, loader.plan
    content = _report(result, plan, fitted.counted, settings) | more
    mixture = sample = None
    if result.best is not None:
        mixture = mixture_of(fitted, loader, ids)
        attempt.write_model(mixture, _provenance(result.best, plan, settings))
    if fitted.sample is not None:
        sample = fitted.sample + torch.from_numpy(loader.centre)
    attempt.write_json(load.REPORT, content)
    return of_fit.write(attempt, content, mixture, sample, numbers=numbers, nightly=nightly)


def spell_best(best: Scored, criterion: str) -> str:
    """Name the best candidate and what ranked it."""
    name = f"k={best.candidate.k} {best.candidate.covariance_type}"
    if criterion == "holdout":
        return f"held-out log-likelihood: {name}, {best.holdout:.6f} nats per row"
    return f"{criterion.upper()}: {name}, {best.value(criterion):,.1f}"


def mixture_of(fitted: Fitted, loader: LakeLoader, ids: tuple[int, ...] | None = None) -> Mixture:
    """Return the best candidate's mixture, in feature units."""
    assert fitted.result.best is not None
    fit = fitted.result.best.fit
    return Mixture(
        fit.parameters.shifted(torch.from_numpy(loader.centre)),
        loader.plan.feature_names,
        fit.n_samples,
        fit.log_likelihood,
        fitted.quantiles,
        ids,
    )


def _provenance(best: Scored, plan: Plan, settings: dict[str, Any]) -> load.Provenance:
    criteria = {"bic": best.bic, "aic": best.aic, "icl": best.icl}
    if best.holdout is not None:
        criteria["holdout"] = best.holdout
    return load.Provenance(
        criteria=criteria,
        status=best.fit.status.value,
        converged=best.fit.converged,
        n_iter=best.fit.n_iter,
        config=settings,
        plan_hash=plan.hash,
        versions=_versions(),
    )


def _report(
    result: SweepResult, plan: Plan, counted: Counted, settings: dict[str, Any]
) -> dict[str, Any]:
    best, ranked = result.best, result.ranked
    return {
        "criterion": result.criterion,
        "best": None if best is None else asdict(best.candidate),
        "candidates": [_entry(s, ranked.index(s) + 1) for s in result.scored],
        "n_passes": result.n_passes,
        "n_samples": result.n_samples,
        "n_rows": counted.n_rows,
        "n_held_out": counted.counts.held_out,
        "rows": asdict(counted.counts),
        "feature_names": plan.feature_names,
        "data": plan.url,
        "plan_hash": plan.hash,
        "config": settings,
        "versions": _versions(),
    }


def _versions() -> dict[str, str | None]:
    # Ours is asked of the package itself: a Ray job's working directory is not installed.
    return {"gmm_dist": __version__, **load.library_versions(_PACKAGES)}


def _entry(scored: Scored, rank: int) -> dict[str, Any]:
    fit = scored.fit
    return {
        **asdict(scored.candidate),
        "rank": rank if fit.is_ranked else None,
        "status": fit.status.value,
        "converged": fit.converged,
        "n_iter": fit.n_iter,
        "n_starts": scored.outcome.n_starts,
        "n_dropped": scored.outcome.n_dropped,
        "passes_saved": scored.outcome.passes_saved,
        "log_likelihood": fit.log_likelihood,
        "lower_bounds": fit.lower_bounds,
        "n_parameters": scored.n_parameters,
        "bic": scored.bic,
        "aic": scored.aic,
        "icl": scored.icl,
        "holdout": scored.holdout,
        "seconds": scored.outcome.seconds,
    }


def print_table(result: SweepResult, warnings: Sequence[str]) -> None:
    """Print the ranked table, and what a reader of it should know; never fails."""
    with bearing():
        console = screen()
        console.print(ranking(result, console.width))
    for line in [*notes(result), *(f"warning: {warning}" for warning in warnings)]:
        say(line)

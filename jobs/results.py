"""What a fit leaves behind: the table on the screen, the model, and sweep.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from progress import notes, ranking
from rich.console import Console

from gmm_dist import __version__, artifacts
from gmm_dist.artifacts import Attempt
from gmm_dist.lake import Plan
from gmm_dist.loading import Counted, LakeLoader
from gmm_dist.mixture import Mixture
from gmm_dist.selection import Scored, SweepResult

_PACKAGES = ("torch", "numpy", "pyarrow", "ray", "fsspec", "s3fs", "safetensors")


def write(
    attempt: Attempt,
    result: SweepResult,
    loader: LakeLoader,
    counted: Counted,
    settings: dict[str, Any],
    more: dict[str, Any],
) -> None:
    """Write the best candidate's model, and the report on all of them."""
    best, plan = result.best, loader.plan
    assert best is not None
    attempt.write_model(_mixture(best, plan, loader), _provenance(best, plan, settings))
    attempt.write_json(artifacts.REPORT, _report(result, plan, counted, settings) | more)


def spell_best(best: Scored, criterion: str) -> str:
    """Name the best candidate and what ranked it."""
    name = f"k={best.candidate.k} {best.candidate.covariance_type}"
    if criterion == "holdout":
        return f"held-out log-likelihood: {name}, {best.holdout:.6f} nats per row"
    return f"{criterion.upper()}: {name}, {best.value(criterion):,.1f}"


def _mixture(best: Scored, plan: Plan, loader: LakeLoader) -> Mixture:
    parameters = best.fit.parameters.shifted(torch.from_numpy(loader.centre))
    return Mixture(parameters, plan.feature_names, best.fit.n_samples, best.fit.log_likelihood)


def _provenance(best: Scored, plan: Plan, settings: dict[str, Any]) -> artifacts.Provenance:
    criteria = {"bic": best.bic, "aic": best.aic, "icl": best.icl}
    if best.holdout is not None:
        criteria["holdout"] = best.holdout
    return artifacts.Provenance(
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
    assert best is not None
    return {
        "criterion": result.criterion,
        "best": asdict(best.candidate),
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
    return {"gmm_dist": __version__, **artifacts.library_versions(_PACKAGES)}


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
    """Print the ranked table, and what a reader of it should know."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(ranking(result, console.width))
    for line in [*notes(result), *(f"warning: {warning}" for warning in warnings)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

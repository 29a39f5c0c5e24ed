"""What sweep.py and fit.py assemble: lake, cluster, sweep, artifacts."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from progress import Progress, notes, ranking
from rich.console import Console

from gmm_dist import __version__, artifacts, lake
from gmm_dist.cluster import RayShards, ScalingConfig, connected
from gmm_dist.config import EMConfig, StartConfig
from gmm_dist.errors import UserError
from gmm_dist.failures import FaultConfig
from gmm_dist.lake import Plan
from gmm_dist.limits import RowsNeed, lane_bytes, require_memory, require_room
from gmm_dist.loading import Counted, LakeLoader, column_means, count_rows, loader_for
from gmm_dist.mixture import Mixture
from gmm_dist.parameters import Parameters
from gmm_dist.selection import Candidate, Scored, SweepResult
from gmm_dist.sweep import require_rows, sweep

_PACKAGES = ("torch", "numpy", "pyarrow", "ray", "fsspec", "s3fs", "safetensors")


def fit_lake(options: argparse.Namespace, command: Callable[[str], str] = "--k {}".format) -> None:
    """Plan, load, fit, rank and commit; print the ranked table and where the model is.

    `command` spells the command line that does the same for another grid of k.
    """
    torch.set_num_threads(1)  # sums have the same bits whatever the machine's cores
    began = time.monotonic()
    em_config = EMConfig(
        options.tol, options.max_iter, options.reg_covar, options.precision, options.accelerate
    )
    start_config = StartConfig(options.n_init, options.init, random_state=options.random_state)
    scaling = ScalingConfig(options.num_workers, options.use_gpu)
    faults = FaultConfig(max_failures=options.max_failures, grace=options.grace)
    given = _given(options)
    candidates = _candidates(options, given)
    plan = lake.plan(
        options.data,
        columns=options.columns,
        weight_column=options.weight_column,
        where=options.where,
        missing=options.missing,
        holdout=options.holdout,
    )
    require_rows(candidates, plan.n_rows)
    loader = loader_for(plan)
    starts = None if given is None else [_about_centre(given, plan, loader)]
    progress = Progress(Console(stderr=True))
    with artifacts.claim(options.output) as attempt:
        with connected(options.address, scaling), progress.shown():
            lanes = [(candidate.k, candidate.covariance_type) for candidate in candidates]
            statistics = lane_bytes(lanes, plan.n_features)
            shards = RayShards(loader, plan.n_shards, scaling, faults, reserve=statistics)
            available = shards.worker_memory()
            require_memory(lanes, plan.n_features, available)
            need = _rows_need(plan, loader)
            # Loading is over when the statistics come.
            beside = statistics if shards.on_gpu else max(statistics, need.loading)
            require_room(need, shards.n_workers, available, beside=beside)
            counted = _load(shards, loader, progress)
            if starts is None:
                progress.starting(start_config.n_init)
            result = sweep(
                shards,
                candidates,
                em_config,
                start_config,
                n_features=plan.n_features,
                criterion=options.criterion,
                holdout=plan.holdout > 0,
                given=starts,
                watch=progress.standings,
            )
            shards.close()
        warnings = result.warnings(plan.feature_names, lambda k: f"next run: {command(k)}")
        print_table(result, warnings)
        if result.best is None:
            raise UserError(
                f"none of the {len(candidates)} candidates could be ranked, see the table: "
                "use smaller --k, more rows, or leave out constant and duplicated columns"
            )
        mixture = _mixture(result.best, plan, loader)
        settings = {"em": asdict(em_config), "start": asdict(start_config)}
        attempt.write_model(mixture, _provenance(result.best, plan, settings))
        report = _report(result, plan, counted, settings)
        seconds = time.monotonic() - began
        attempt.write_json(artifacts.REPORT, report | {"warnings": warnings, "seconds": seconds})
        attempt.commit()
    best = result.best
    print(f"best by {_value(best, result.criterion)}; model in {options.output.rstrip('/')}/model")


def _value(best: Scored, criterion: str) -> str:
    name = f"k={best.candidate.k} {best.candidate.covariance_type}"
    if criterion == "holdout":
        return f"held-out log-likelihood: {name}, {best.holdout:.6f} nats per row"
    return f"{criterion.upper()}: {name}, {best.value(criterion):,.1f}"


def _given(options: argparse.Namespace) -> Mixture | None:
    start = getattr(options, "start", None)
    return None if start is None else artifacts.load(start)


def _candidates(options: argparse.Namespace, given: Mixture | None) -> list[Candidate]:
    if given is None:
        pairs = itertools.product(options.covariance_type, options.k)
        return [Candidate(k, kind) for kind, k in pairs]
    if options.k not in (None, [given.n_components]):
        raise UserError(
            f"--k is {options.k[0]} but the model of --start has {given.n_components} components: "
            "leave out --k"
        )
    return [Candidate(given.n_components, given.covariance_type)]


def _about_centre(given: Mixture, plan: Plan, loader: LakeLoader) -> Parameters:
    if given.feature_names != plan.feature_names:
        raise UserError(
            f"the model of --start has the features {', '.join(given.feature_names)}, the data "
            f"{', '.join(plan.feature_names)}: name the model's with --columns, in its order"
        )
    return given.parameters.shifted(-torch.from_numpy(loader.centre))


def _rows_need(plan: Plan, loader: LakeLoader) -> RowsNeed:
    source = 8 if plan.float64_source else 4
    n_values = plan.n_features + len(plan.read_columns) - len(plan.columns)
    largest = max(plan.files[p.file].rows[p.row_group] for shard in plan.shards for p in shard)
    return RowsNeed(
        plan.n_rows,
        plan.n_features,
        plan.n_shards,
        itemsize=loader.dtype.itemsize,
        row_bytes=8 if plan.weight_column else 0,
        decoded=largest * n_values * source,
        is_bound=plan.row_filter is not None or plan.missing == "drop",
    )


def _load(shards: RayShards, loader: LakeLoader, progress: Progress) -> Counted:
    """Have the workers load their rows; where values are missing, after a pass for the means."""
    plan = loader.plan

    def watch(done: int, n_rows: int) -> None:
        progress.loading(done, plan.n_shards, n_rows)

    n_rows = shards.load(watch)
    if n_rows == 0:
        filters = f" after --where {str(plan.where)!r}" if plan.where else ""
        smaller = ", or give a smaller --holdout" if plan.holdout else ""
        raise UserError(
            f"{plan.url}: no rows are left of {plan.n_rows:,}{filters}: "
            f"loosen --where or choose another --missing{smaller}"
        )
    if plan.missing == "mean":
        fill = column_means(shards, loader)
        shards.replace(LakeLoader(plan, loader.centre, loader.dtype, fill))
        shards.load(watch)
    return shards.run(count_rows)


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

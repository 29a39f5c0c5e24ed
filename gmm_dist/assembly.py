"""Lake, cluster and sweep put together: what the jobs and the estimators share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist import lake
from gmm_dist.config import EMConfig, StartConfig
from gmm_dist.em.memory import RowsNeed, lane_bytes, require_memory, require_room
from gmm_dist.errors import TooFewRows, UserError
from gmm_dist.lake import Plan
from gmm_dist.loading import Counted, LakeLoader, column_means, count_rows, loader_for
from gmm_dist.model.parameters import Parameters
from gmm_dist.opened import Lake
from gmm_dist.selection.ranking import Candidate, SweepResult
from gmm_dist.selection.sweep import require_rows, sweep
from gmm_dist.shards.failures import FaultConfig
from gmm_dist.shards.ray_shards import RayShards, ScalingConfig, connected, most_memory

logger = logging.getLogger(__name__)

Loaded = Callable[[int, int], None]
"""Told of the shards and the rows that have been loaded."""


@dataclass(frozen=True, slots=True, eq=False)
class LakeSweep:
    """A sweep over a lake: `result` is about `centre` (d,), the features have names."""

    result: SweepResult
    centre: Float64[Tensor, " d"]
    feature_names: tuple[str, ...]


def sweep_lake(
    opened: Lake,
    candidates: Sequence[Candidate],
    config: EMConfig,
    start: StartConfig,
    *,
    criterion: str = "bic",
    given: Parameters | None = None,
) -> LakeSweep:
    """Plan, load on Ray, fit and rank. `given`, in feature units, is the one candidate's start.

    Raises UserError as `lake.plan`, `cluster.connected` and `sweep.sweep` do.
    """
    plan = plan_of(opened)
    if given is not None and given.n_features != plan.n_features:
        raise UserError(
            f"the start has {given.n_features} features, but {opened.url} has {plan.n_features} "
            f"({', '.join(plan.feature_names)}): give a start of as many, or choose columns"
        )
    with resident_lake(opened, plan, candidates) as (shards, centre):
        result = sweep(
            shards,
            candidates,
            config,
            start,
            n_features=plan.n_features,
            feature_names=plan.feature_names,
            centre=centre,
            criterion=criterion,
            holdout=plan.holdout > 0,
            given=None if given is None else [given.shifted(-centre)],
        )
    return LakeSweep(result, centre, plan.feature_names)


def plan_of(opened: Lake) -> Plan:
    """Return which rows a lake's name stands for, as `lake.plan` does, and raise as it does."""
    return lake.plan(
        opened.url,
        columns=opened.columns,
        weight_column=opened.weight_column,
        where=opened.where,
        missing=opened.missing,
        holdout=opened.holdout,
    )


@contextmanager
def resident_lake(
    opened: Lake, plan: Plan, candidates: Sequence[Candidate]
) -> Iterator[tuple[RayShards, Float64[Tensor, " d"]]]:
    """Hold a lake's rows in Ray's workers until the block ends, for passes with such candidates.

    Yields the shards, and their rows' shared centre (d,) in feature units. Raises UserError as
    `cluster.connected` does, and where rows or memory are too few.
    """
    scaling = ScalingConfig(opened.num_workers, opened.use_gpu).at_most(plan.n_shards)
    require_means(plan, candidates, scaling, opened.address)
    loader = loader_for(plan)
    with connected(opened.address, scaling):
        shards = start_workers(loader, candidates, scaling)
        load_rows(shards, loader)
        yield shards, torch.from_numpy(loader.centre)
        shards.close()


def require_means(
    plan: Plan, candidates: Sequence[Candidate], scaling: ScalingConfig, address: str | None
) -> None:
    """Raise UserError where rows or memory are too few, as far as that is known without Ray."""
    require_rows(candidates, plan.n_rows)
    available = most_memory(address, scaling, plan.n_shards)
    require_memory(_lanes(candidates), plan.n_features, available)


def _lanes(candidates: Sequence[Candidate]) -> list[tuple[int, str]]:
    return [(candidate.k, candidate.covariance_type) for candidate in candidates]


def start_workers(
    loader: LakeLoader,
    candidates: Sequence[Candidate],
    scaling: ScalingConfig,
    faults: FaultConfig | None = None,
) -> RayShards:
    """Start workers, and hold what they will need against their memory.

    Raises UserError when it is too much.
    """
    plan = loader.plan
    lanes = _lanes(candidates)
    statistics = lane_bytes(lanes, plan.n_features)
    shards = RayShards(loader, plan.n_shards, scaling, faults, reserve=statistics)
    available = shards.worker_memory()
    require_memory(lanes, plan.n_features, available)
    need = _rows_need(plan, loader)
    # Loading is over when the statistics come.
    beside = statistics if shards.on_gpu else max(statistics, need.loading)
    require_room(need, shards.n_workers, available, beside=beside)
    return shards


def load_rows(
    shards: RayShards, loader: LakeLoader, watch: Loaded = lambda done, rows: None
) -> Counted:
    """Have the workers load their rows; where values are missing, after a pass for the means.

    Raises TooFewRows when none is left.
    """
    plan = loader.plan
    n_rows = shards.load(watch)
    if n_rows == 0:
        filters = f" after --where {str(plan.where)!r}" if plan.where else ""
        smaller = ", or give a smaller --holdout" if plan.holdout else ""
        weighing = f", and weights {plan.weight_column!r} above 0" if plan.weight_column else ""
        raise TooFewRows(
            f"{plan.url}: no rows are left of {plan.n_rows:,}{filters}: "
            f"loosen --where or choose another --missing{smaller}{weighing}"
        )
    if plan.missing == "mean":
        fill = column_means(shards, loader)
        shards.replace(LakeLoader(plan, loader.centre, loader.dtype, fill))
        shards.load(watch)
    counted = shards.run(count_rows)
    if counted.counts.dropped:
        logger.info("missing=drop left out %s rows", f"{counted.counts.dropped:,}")
    return counted


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

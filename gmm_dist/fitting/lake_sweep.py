"""A lake planned, held by Ray's workers, swept: what the command line and the estimators share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.config import Cluster, EMConfig, FailureConfig, StartConfig
from gmm_dist.em.lane import Snapshot
from gmm_dist.em.memory import lane_bytes, require_memory
from gmm_dist.em.resampling import at_once
from gmm_dist.errors import UserError
from gmm_dist.lake.load import Counted, LakeLoader, loader_for
from gmm_dist.lake.plan import Plan
from gmm_dist.lake.session import Loaded, load_rows, make_room
from gmm_dist.model.parameters import Parameters
from gmm_dist.selection.ranking import Candidate, SweepResult
from gmm_dist.selection.sweep import Keep, require_rows, sweep
from gmm_dist.shards.connection import most_memory
from gmm_dist.shards.ray_shards import RayShards, session


@dataclass(frozen=True, slots=True, eq=False)
class LakeSweep:
    """A sweep over a lake: parameters in `result` are about `centre` (d,)."""

    result: SweepResult
    centre: Float64[Tensor, " d"]
    feature_names: tuple[str, ...]


def sweep_lake(
    plan: Plan,
    candidates: Sequence[Candidate],
    config: EMConfig,
    start: StartConfig,
    *,
    cluster: Cluster,
    criterion: str = "bic",
    initial_parameters: Parameters | None = None,
    resume: Snapshot | None = None,
    keep: Keep = lambda number, snapshot: None,
) -> LakeSweep:
    """Load on Ray, fit and rank.

    Args:
        plan: which rows.
        candidates: what is fitted to them, in the same passes.
        config: how EM goes, and when it stops.
        start: how starts are searched for, where `initial_parameters` is None.
        cluster: who holds the rows.
        criterion: what ranks the candidates.
        initial_parameters: the one candidate's start, in feature units.
        resume: a snapshot to go on from, as `sweep` takes it.
        keep: gets a snapshot after each pass, as `sweep` has it.

    Raises UserError as `resident` and `sweep` do.
    """
    if initial_parameters is not None and initial_parameters.n_features != plan.n_features:
        raise UserError(
            f"the start has {initial_parameters.n_features} features, but {plan.url} has "
            f"{plan.n_features} ({', '.join(plan.feature_names)}): give a start of as many, or "
            "choose columns"
        )
    loader = loader_of(plan, candidates, cluster)
    centre = torch.from_numpy(loader.centre)
    with resident(loader, candidates, cluster) as (shards, _):
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
            initial=None if initial_parameters is None else [initial_parameters.shifted(-centre)],
            resume=resume,
            keep=keep,
        )
    return LakeSweep(result, centre, plan.feature_names)


def loader_of(plan: Plan, candidates: Sequence[Candidate], cluster: Cluster) -> LakeLoader:
    """Return the loader of a lake's rows, to fit the candidates to.

    Raises UserError where rows or memory are too few, as far as that is known without Ray.
    """
    require_rows(candidates, plan.n_rows)
    available = most_memory(cluster, plan.n_shards)
    require_memory(_lanes(candidates), plan.n_features, available)
    return loader_for(plan)


@contextmanager
def resident(
    loader: LakeLoader,
    candidates: Sequence[Candidate],
    cluster: Cluster,
    faults: FailureConfig | None = None,
    *,
    watch: Loaded = lambda done, rows: None,
) -> Iterator[tuple[RayShards, Counted]]:
    """Hold a lake's rows in Ray's workers until the block ends, to fit the candidates to.

    Args:
        loader: The rows.
        candidates: What is fitted to them, in the same passes.
        cluster: Who holds them.
        faults: How patient the fit is with its workers.
        watch: Gets the numbers of shards and of rows that are loaded.

    Yields the shards, and what was counted as they were loaded. Raises UserError as `connected`
    and `load_rows` do, and where memory is too small.
    """
    lanes, plan = _lanes(candidates), loader.plan
    on_cpu, on_gpu = (lane_bytes(lanes, plan.n_features, on_gpu=there) for there in (False, True))
    reserves = {"reserve": on_cpu, "gpu_reserve": on_gpu}
    with session(loader, plan.n_shards, cluster, faults, **reserves) as shards:
        available = shards.worker_memory()
        require_memory(lanes, plan.n_features, available, on_gpu=shards.on_gpu)
        reserve = on_gpu if shards.on_gpu else on_cpu
        make_room(shards, loader, cluster.spill, available=available, reserve=reserve)
        yield shards, load_rows(shards, loader, watch)


def with_resamples(
    candidates: Sequence[Candidate], n_resamples: int, n_features: int
) -> Sequence[Candidate]:
    """Return the candidates, or the resamples of the largest one, whichever take more memory."""
    if not n_resamples:
        return candidates
    largest = max(candidates, key=lambda candidate: lane_bytes(_lanes([candidate]), n_features))
    most = at_once(largest.covariance_type, largest.k, n_features)
    resamples = [largest] * min(n_resamples, most)
    return max(candidates, resamples, key=lambda of: lane_bytes(_lanes(of), n_features))


def _lanes(candidates: Sequence[Candidate]) -> list[tuple[int, str]]:
    return [(candidate.k, candidate.covariance_type) for candidate in candidates]

"""Score a whole lake under a mixture: mean log-likelihood, BIC, AIC, ICL, in one pass.

Workers read a shard, score it and let it go: a lake may be larger than their memory. The
arithmetic is that of rows in memory, to the bit but for the order of sums: float64, in feature
units, each row about each component's mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Generic

import numpy as np
import torch

from gmm_dist.config import Cluster
from gmm_dist.em.evaluate import ScoreSums, SumScores
from gmm_dist.errors import Option, TooFewRows, UserError
from gmm_dist.formats import first_few
from gmm_dist.lake import read
from gmm_dist.lake.lake import Lake
from gmm_dist.lake.load import LakeLoader, column_means
from gmm_dist.lake.plan import Plan, plan_of
from gmm_dist.model.criteria import aic, bic, icl
from gmm_dist.model.mixture import Mixture
from gmm_dist.model.parameters import Parameters
from gmm_dist.shards.protocol import Block, Loader, Parted, S, ShardRows, Task
from gmm_dist.shards.ray_shards import RayShards, session

_MOST_NAMED = 12  # features, in a remedy


@dataclass(frozen=True, slots=True, kw_only=True)
class LakeScores:
    """A mixture's scores on a lake's rows; held-out rows and those of weight 0 do not count.

    `score` is the mean log-likelihood per row (nats), weights honoured; of `bic`, `aic` and `icl`
    lower is better. Their n, `n_samples`, is the sum of the weights, or where these do not count
    rows (Σw)²/Σw², as in a sweep. `n_rows` counts rows.
    """

    score: float
    bic: float
    aic: float
    icl: float
    n_samples: float
    n_rows: int


def scores_of_lake(
    lake: Lake, model: Mixture | Parameters, *, cluster: Cluster | None = None
) -> LakeScores:
    """Score a lake's rows under a mixture, in one pass of Ray's workers.

    Where the lake names no columns, they are the mixture's features, by name. Filling missing
    values with means takes one pass more.

    Args:
        lake: which rows.
        model: the mixture, in feature units.
        cluster: who reads and scores; None for the Ray cluster that this process is connected to,
            else one that is started here.

    Raises UserError as `plan_lake` and `connected` do, for other features than the mixture's, and
    where no row is left.
    """
    mixture = model if isinstance(model, Mixture) else Mixture(parameters=model)
    plan = plan_for(lake, mixture)
    loader = LakeLoader(plan=plan, centre=np.zeros(plan.n_features), dtype=torch.float64)
    with session(loader, plan.n_shards, cluster or Cluster()) as workers:
        shards = _StreamedShards(loader, workers)
        if plan.missing == "mean":
            shards.loader = replace(loader, fill=column_means(shards, loader))
        sums = shards.run(SumScores(mixture.parameters))
    if sums.n_rows == 0:
        raise TooFewRows(
            f"{plan.url}: no rows are left of {plan.n_rows:,} to be scored",
            remedy="loosen " + Option("where") + " or choose another " + Option("missing"),
        )
    return _scores(sums, mixture)


def _scores(sums: ScoreSums, mixture: Mixture) -> LakeScores:
    n, n_free = sums.criterion_size, mixture.n_parameters
    mean, entropy = sums.log_likelihood / sums.n_samples, sums.entropy / sums.n_samples
    own_bic = bic(mean * n, n_free, n)
    return LakeScores(
        score=mean,
        bic=own_bic,
        aic=aic(mean * n, n_free),
        icl=icl(own_bic, entropy * n),
        n_samples=n,
        n_rows=sums.n_rows,
    )


def plan_for(lake: Lake, mixture: Mixture) -> Plan:
    """Plan the rows, of the mixture's features; raise UserError for others."""
    names = mixture.feature_names
    chosen = lake.columns is None and len(names) > 0
    plan = plan_of(replace(lake, columns=names) if chosen else lake)
    d = mixture.n_features
    if (names and plan.feature_names != names) or plan.n_features != d:
        wanted = f"{d} features" + (f" ({first_few(names)})" if names else "")
        few = 0 < len(names) <= _MOST_NAMED
        remedy = f"give columns={list(names)}" if few else "name its columns"
        raise UserError(
            f"{plan.url} has {plan.n_features} features ({first_few(plan.feature_names)}), the "
            f"mixture {wanted}: {remedy}, or give a mixture that was fitted to these"
        )
    return plan


@dataclass(frozen=True, slots=True)
class _Reduced(Generic[S]):
    """The loader that holds a task's summary of a shard in place of its rows."""

    loader: Loader
    task: Task[S]

    def part(self, shards: range) -> _Reduced[S]:
        loader = self.loader.part(shards) if isinstance(self.loader, Parted) else self.loader
        return _Reduced(loader, self.task)

    def __call__(self, shard: int) -> ShardRows:
        # Where a worker has a GPU, it is the only one that it sees.
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        rows = self.loader(shard).to(device)
        # Rows without features: they take no memory, and are counted like any others.
        return ShardRows(
            shard=shard, blocks=[Block(torch.empty(0, rows.n_rows))], counts=self.task(rows)
        )


def _summary(rows: ShardRows) -> Any:
    """Return the summary that `_Reduced` has made of a shard; the reading is over."""
    read.release()
    return rows.counts


class _StreamedShards:
    """Shards of which a worker holds one at a time: each `run` reads the rows again."""

    def __init__(self, loader: LakeLoader, workers: RayShards) -> None:
        self.loader = loader
        self._workers = workers

    @property
    def n_shards(self) -> int:
        return self._workers.n_shards

    def run(self, task: Task[S]) -> S:
        """Apply the task to every shard once and add the summaries along the fixed tree."""
        self._workers.replace(_Reduced(self.loader, task))
        self._workers.load()
        summary: S = self._workers.run(_summary)
        return summary

"""Rows in this process, ready for passes: centred, dealt to shards, one thread each."""

from __future__ import annotations

import os
from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor

from gmm_dist.em.estep import SumMoments
from gmm_dist.em.statistics import TotalMoments
from gmm_dist.shards.local import LocalShards

_SHARD_ROWS, _MOST_SHARDS = 16_384, 64


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Resident:
    """Rows about `centre` (d,), float64: `X` (n, d) and the same in shards; their moments.

    Peak memory: twice the rows in float64.
    """

    X: Float64[Tensor, "n d"]
    sample_weight: Float64[Tensor, " n"] | None
    centre: Float64[Tensor, " d"]
    shards: LocalShards
    total: TotalMoments

    @classmethod
    def of(
        cls,
        X: Float64[Tensor, "n d"],
        sample_weight: Float64[Tensor, " n"] | None,
        n_shards: int | None,
        *,
        whole: bool = True,
    ) -> Resident:
        """Centre rows and deal them to `n_shards` shards; None: as their number suggests.

        `whole` is as in `estep.SumMoments`.
        """
        n = len(X)
        wanted = min(n // _SHARD_ROWS, _MOST_SHARDS) if n_shards is None else min(n_shards, n)
        wanted = max(wanted, 1)
        centre = X.mean(0)
        columns = (X - centre).T.contiguous()
        # One shard is worked on in the caller's thread: a call to another thread costs more than a
        # pass over a thousand rows.
        n_threads = 0 if wanted == 1 else min(wanted, os.cpu_count() or 1)
        shards = LocalShards.of(columns.T, sample_weight, n_shards=wanted, n_threads=n_threads)
        total = shards.run(SumMoments(X.shape[1], whole))
        return cls(
            X=columns.T,
            sample_weight=sample_weight,
            centre=centre.cpu(),
            shards=shards,
            total=total,
        )

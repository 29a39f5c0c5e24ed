"""Rows in this process, ready for passes: centred, dealt to shards, one thread each."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.em.estep import SumMoments
from gmm_dist.em.statistics import TotalMoments
from gmm_dist.shards.local import LocalShards

_SHARD_ROWS, _MOST_SHARDS = 16_384, 64
_PROBED_PLACES, _PROBED_EACH = 16, 1024


def robust_centre(X: Float64[Tensor, "n d"]) -> Float64[Tensor, " d"]:
    """Return the median (d,) of rows spread over X: of all, where they are few.

    A lake's rows have the same centre: one outlier must not move it away from the rows.
    """
    n, most = len(X), _PROBED_PLACES * _PROBED_EACH
    if n > most:
        # In float32, which has no odd numbers beyond 2^24, the last would lie beyond the rows.
        places = torch.linspace(0, n - _PROBED_EACH, _PROBED_PLACES, dtype=torch.float64)
        first = places.round().long()
        X = X[(first[:, None] + torch.arange(_PROBED_EACH)).flatten().to(X.device)]
    return torch.from_numpy(np.median(X.cpu().numpy(), axis=0))


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
        centre: Float64[Tensor, " d"] | None = None,
    ) -> Resident:
        """Centre rows and deal them to `n_shards` shards.

        Args:
            X: Rows (n, d).
            sample_weight: Their weights (n,).
            n_shards: Number of shards; None: as the number of rows suggests.
            whole: As in `estep.SumMoments`.
            centre: The rows' shared centre (d,); None for their mean.
        """
        n = len(X)
        wanted = min(n // _SHARD_ROWS, _MOST_SHARDS) if n_shards is None else min(n_shards, n)
        wanted = max(wanted, 1)
        centre = X.mean(0) if centre is None else centre.to(X.device)
        columns = (X - centre).T.contiguous()
        # One shard is worked on in the caller's thread: a call to another thread costs more than a
        # pass over a thousand rows. So are all on a GPU: each thread would have buffers of its own
        # there, and none would make the card faster.
        alone = wanted == 1 or X.device.type != "cpu"
        n_threads = 0 if alone else min(wanted, os.cpu_count() or 1)
        shards = LocalShards.of(columns.T, sample_weight, n_shards=wanted, n_threads=n_threads)
        total = shards.run(SumMoments(X.shape[1], whole))
        return cls(
            X=columns.T,
            sample_weight=sample_weight,
            centre=centre.cpu(),
            shards=shards,
            total=total,
        )

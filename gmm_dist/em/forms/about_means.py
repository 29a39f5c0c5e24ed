"""The sums of a pass about the components' own means, which compiled loops add to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.em.lane_batch import cut
from gmm_dist.em.statistics import SufficientStatistics
from gmm_dist.model.covariance import CovarianceType
from gmm_dist.model.density_loops import padded


class Sums:
    """The sums of one shard about the components' means, which compiled loops add to.

    `edges` (L + 1,) are the first component of each lane, and K; `cuts` (L,) say how far below the
    largest logit of a row a component still matters, nats.
    """

    def __init__(self, sizes: Sequence[int], kind: CovarianceType, d: int) -> None:
        self._type, self._d = kind, d
        self.edges = np.array(list(itertools.accumulate(sizes, initial=0)))
        self.cuts = np.array([cut(size) for size in sizes])
        n_components = sum(sizes)
        cell = (padded(d), padded(d)) if kind.has_products else (d,)
        self.by_component, self.by_lane = np.zeros((2, n_components)), np.zeros((3, len(sizes)))
        self.sum_x, self.scatter = np.zeros((n_components, d)), np.zeros((n_components, *cell))

    def clear(self) -> None:
        """Forget what was summed, before the next shard."""
        for total in (self.by_component, self.by_lane, self.sum_x, self.scatter):
            total.fill(0)

    def statistics(self, checks: Float64[Tensor, "3 L"]) -> SufficientStatistics:
        """Return what was summed; no `checks` are made of what is exact."""
        second = torch.from_numpy(self.scatter)
        if self._type.has_products:
            second = second[:, : self._d, : self._d]
        nk, squares = torch.from_numpy(self.by_component.copy())
        log_likelihood, entropy, survivors = torch.from_numpy(self.by_lane.copy())
        sum_x = torch.from_numpy(self.sum_x)
        return SufficientStatistics(
            moments=self._type.sums(nk, sum_x, self._type.second(second)),
            log_likelihood=log_likelihood,
            entropy=entropy,
            float32_error=checks[0],
            float32_squares=checks[1],
            squares=squares,
            survivors=survivors,
        )

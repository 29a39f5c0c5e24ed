"""What a pass about the components' own means needs of them, and the sums that it makes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.em.forms.screening_loops import Array
from gmm_dist.em.lane_batch import cut
from gmm_dist.em.statistics import SufficientStatistics
from gmm_dist.model.covariance import CovarianceType
from gmm_dist.model.densities import Densities
from gmm_dist.model.parameters import ParameterStack

_CPU = torch.device("cpu")


def padded(d: int) -> int:
    """Return how many lines the factors of d correlated features have, in compiled loops."""
    return -(-d // 4) * 4


@dataclass(frozen=True, slots=True, eq=False)
class Components:
    """The components of all lanes, as compiled loops have them.

    `means` (K, d), `peaks` (K,) the logits there, and `factors`, lower triangular (K, D, D) or, of
    independent features, (K, d): the distance of z from a mean is |F z|. `own` are the factors as
    they are, (K, d, d) or (K, d); `densities` evaluates rows whose distances have few digits left.
    """

    means: Float64[Tensor, "K d"]
    own: Float64[Tensor, "K ..."]
    peaks: Float64[Tensor, " K"]
    factors: Array
    densities: Densities

    @classmethod
    def of(cls, stack: ParameterStack, kind: CovarianceType) -> Components:
        """Take the components of a stack, each by itself; `kind` is the type of one alone."""
        densities = Densities(stack, _CPU)
        factors, peaks = densities.factors, densities.peaks
        # Of its own, row by row: a stack's may be a part of something that changes.
        means = densities.means.clone(memory_format=torch.contiguous_format)
        n, d = means.shape
        if kind.has_products:
            size = padded(d)
            filled = factors.new_zeros(n, size, size)
            filled[:, :d, :d] = factors.mT
            return cls(means, filled[:, :d, :d], peaks, filled.numpy(), densities)
        # A spherical component's factor is one number.
        own = factors.reshape(n, -1).expand(-1, d).contiguous()
        return cls(means, own, peaks, own.numpy(), densities)


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

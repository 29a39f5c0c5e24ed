"""The centred form by compiled loops, for all rows with all components.

It screens nothing and keeps nothing in mind: where features are few, or many components matter to
each row, to evaluate a pair takes no longer than to find out whether it matters. It has no matrix
product and no features of rows. As each component is evaluated about its own mean, it is exact
whatever the condition of the covariances.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.chunks import STAGGER, cuts
from gmm_dist.em.forms.about_means import Sums
from gmm_dist.em.forms.compiled import dense_loops_for
from gmm_dist.em.lane_batch import LaneBatch
from gmm_dist.em.statistics import SufficientStatistics
from gmm_dist.model.covariance import TYPE_OF
from gmm_dist.model.densities import FAR, Densities
from gmm_dist.model.density_loops import STRETCH, Array
from gmm_dist.shards.protocol import ShardRows

_NUMBERS = 1 << 16  # logits of a chunk, which with the shares stay in a core's second cache
_MOST_ROWS = 4096


class DenseForm:
    """Sums the statistics of lanes about their components' means, in float64, on a CPU."""

    def __init__(self, group: LaneBatch, n_features: int) -> None:
        self._type = TYPE_OF[TYPE_OF[group.covariance_type].alone]
        self._sums = Sums(group.sizes, self._type, n_features)
        n_components = sum(group.sizes)
        most = min(_NUMBERS // n_components, _MOST_ROWS) // STRETCH * STRETCH
        self._n_chunk = max(most, STRETCH)
        self._logits, self._shares = np.zeros((2, n_components, self._n_chunk))
        self._x = np.zeros((n_features, self._n_chunk + STAGGER))
        self._far = np.empty(self._n_chunk, dtype=np.bool_)
        self._loops = dense_loops_for(self._type.has_products)
        self.begin(group)

    def begin(self, group: LaneBatch) -> None:
        """Take the parameters of the next passes."""
        assert group.stack is not None
        self._densities = Densities(group.stack, torch.device("cpu"), compiled=True)

    def statistics(self, rows: ShardRows, checks: Float64[Tensor, "3 L"]) -> SufficientStatistics:
        """Return the sums over the rows; no `checks` are made of what is exact."""
        self._sums.clear()
        for block in rows.blocks:
            X, weight = block.X.numpy(), block.weights.numpy()
            for part in cuts(X.shape[1], self._n_chunk):
                self._add(X[:, part], weight[part])
        return self._sums.statistics(checks)

    def _add(self, x: Array, weight: Array) -> None:
        """Add rows `x` (d, n)."""
        densities, far = self._densities, self._far[: x.shape[1]]
        self._fill(x)
        densities.fill(x.shape[1], self._x, self._logits)
        if self._share_out(weight, FAR, far):
            # Their logits have few digits left: these come from distances to one another.
            which = np.flatnonzero(far)
            x = x[:, which].astype(np.float64)
            self._fill(x)
            self._logits[:, : len(which)] = densities(torch.from_numpy(x)).numpy()
            self._share_out(weight[which], -np.inf, far[: len(which)])

    def _fill(self, x: Array) -> None:
        """Take rows (d, n) as float64, and zeros up to whole stretches."""
        n = x.shape[1]
        self._x[:, :n] = x
        self._x[:, n : -(-n // STRETCH) * STRETCH] = 0.0

    def _share_out(self, weight: Array, lowest: float, far: Array) -> int:
        """Add the rows whose logits are there; return how many are below `lowest`."""
        sums, n = self._sums, len(weight)
        by_component, by_lane = sums.by_component, sums.by_lane
        arrays = self._logits, self._shares, weight, far, by_component, by_lane
        n_far = self._loops.all_shares(sums.edges, sums.cuts, lowest, *arrays)
        if n_far < n:
            means = self._densities.means.numpy()
            self._loops.all_moments(n, self._x, means, self._shares, sums.sum_x, sums.scatter)
        return int(n_far)

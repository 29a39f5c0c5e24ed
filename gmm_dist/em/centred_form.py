"""The E-step in centred form: one component at a time, rows minus that component's own mean."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.em.features import Features
from gmm_dist.em.lane_batch import LaneBatch
from gmm_dist.em.statistics import SufficientStatistics
from gmm_dist.model.covariance import TYPE_OF
from gmm_dist.model.densities import Densities
from gmm_dist.shards.protocol import Block


class CentredForm:
    """Sums the statistics of lanes about their components' means, in float64.

    Right where the matrix form has lost its digits to cancellation, and many times slower. The
    moments come in the layout of the type that one component alone has.
    """

    def __init__(self, group: LaneBatch, n_max: int, device: torch.device) -> None:
        assert group.stack is not None
        self._sizes = list(group.sizes)
        layout = TYPE_OF[group.covariance_type].alone
        d = group.stack.means.shape[1]
        self._features = Features(d, n_max, {layout}, torch.float64, device)
        self._layout, rows = layout, TYPE_OF[layout].rows(d)
        shape = (rows.stop - rows.start, sum(group.sizes))
        self._sums = torch.zeros(shape, dtype=torch.float64, device=device)
        self._log_likelihood = self._sums.new_zeros(len(group.sizes))
        self._entropy = torch.zeros_like(self._log_likelihood)
        self._squares = self._sums.new_zeros(sum(group.sizes))
        self.begin(group)

    def begin(self, group: LaneBatch) -> None:
        """Take the parameters of the next passes."""
        assert group.stack is not None
        self._densities = Densities(group.stack, self._sums.device)
        self._means = group.stack.means.to(self._sums.device)

    def clear(self) -> None:
        """Forget what was summed, before the next shard."""
        for total in (self._sums, self._log_likelihood, self._entropy, self._squares):
            total.zero_()

    def add(self, chunk: Block) -> None:
        """Add the statistics of a chunk."""
        x = chunk.X.double()
        weight = 1.0 if chunk.sample_weight is None else chunk.sample_weight
        parts = []
        for lane, logit in enumerate(self._densities(x).split(self._sizes)):
            log_norm = logit.logsumexp(0)
            r = (logit - log_norm).exp()
            self._log_likelihood[lane] += (log_norm * weight).sum()
            self._entropy[lane] += ((log_norm - (r * logit).sum(0)) * weight).sum()
            parts.append(r * weight)
        shares = torch.cat(parts)
        self._squares += (shares * weight).sum(1)
        for k, (mean, r) in enumerate(zip(self._means, shares, strict=True)):
            self._features.fill(x - mean[:, None])
            self._sums[:, k] += self._features.of[self._layout] @ r

    def statistics(self, float32: Float64[Tensor, "2 L"]) -> SufficientStatistics:
        """Return the sums since `clear`; `float32` are the errors of float32."""
        sums = (self._sums, self._log_likelihood, self._entropy, self._squares)
        moments, log_likelihood, entropy, squares = (total.cpu().clone() for total in sums)
        return SufficientStatistics(
            moments=moments,
            log_likelihood=log_likelihood,
            entropy=entropy,
            float32_error=float32[0],
            float32_squares=float32[1],
            squares=squares,
        )

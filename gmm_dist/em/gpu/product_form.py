"""The E-step in product form on a GPU: aligned products, a softmax of its own, longer carries."""

from __future__ import annotations

import torch
from torch import Tensor

from gmm_dist.em.forms.product_form import ProductForm, Work
from gmm_dist.em.lane_batch import KEPT_ON_GPU

_ALIGNED = 8  # numbers: 16 bytes of the narrowest that products take
_CARRY_ROWS = 4096  # of float32; longer sums err more: 6.7e-7 of a component's rows at 25,600


class GpuProductForm(ProductForm):
    """The product form as a GPU likes it. The figures are an H200's, docs/gpu-measured.md.

    - Θ is stored (P, K), lines of K a multiple of 8: P is odd as often as not, and a product whose
      lines begin at odd places takes up to twice as long (float64: 46 and 63 TFLOP/s).
    - `torch.softmax` over components takes 62 ms where its parts, written out, take 18.
    - Entropies are linear in the sums, Σ w log p - Σ Θ·G: no pass over the logits.
    """

    kept = KEPT_ON_GPU

    def _empty_theta(self, like: Tensor, n_places: int, n_features: int) -> Tensor:
        line = -(-n_places // _ALIGNED) * _ALIGNED
        return like.new_zeros(n_features, line)[:, :n_places].T

    def _responsibilities(self, logits: Tensor, resp: Tensor) -> Tensor:
        top = logits.amax(1, keepdim=True)
        torch.sub(logits, top, out=resp).exp_()
        total = resp.sum(1, keepdim=True)
        resp.div_(total)
        return top.add_(total.log_())[:, 0]

    def _add_entropy(self, work: Work, log_norm: Tensor, weight: Tensor | None) -> None:
        pass

    def _entropies(self) -> Tensor:
        if self._theta.dtype != torch.float64:
            return self._entropy
        expected = (self._theta.T * self._sums).sum(0)
        of_lanes, first = [], 0
        for bucket in self._buckets:
            places = expected[first : first + bucket.n_places]
            of_lanes.append(places.view(len(bucket.lanes), bucket.size).sum(1))
            first += bucket.n_places
        return self._log_likelihood - torch.cat(of_lanes)

    def _add_moments(self, phi: Tensor, resp_t: Tensor) -> None:
        n = phi.shape[1]
        step = _CARRY_ROWS if phi.dtype == torch.float32 else n
        for first in range(0, n, step):
            part = slice(first, first + step)
            torch.mm(phi[:, part], resp_t[part], out=self._carried)
            self._sums += self._carried

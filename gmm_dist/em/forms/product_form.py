"""The E-step in product form: two matrix products per chunk of rows, for many mixtures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.em.forms.features import Features
from gmm_dist.em.lane_batch import KEPT, LaneBatch, cut
from gmm_dist.em.statistics import SufficientStatistics
from gmm_dist.model.covariance import TYPE_OF
from gmm_dist.model.covariance.features import CONSTANT_ROW
from gmm_dist.model.natural import NEVER
from gmm_dist.shards.protocol import Block

_CARRY_ROWS = 2048  # rows after which sums in the working precision are carried to float64
_MAX_VIEWS = 256
_PADDING = 0.75  # lanes share a softmax while the smaller has this part of the larger's places


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Lanes that share one softmax: each has `size` places, the last ones maybe empty."""

    size: int
    lanes: tuple[int, ...]

    @property
    def n_places(self) -> int:
        return self.size * len(self.lanes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Buffers for one chunk length: logits and responsibilities (K, n), and per bucket."""

    logits: Tensor
    resp: Tensor
    resp_t: Tensor
    buckets: list[tuple[Tensor, Tensor]]


class ProductForm:
    """Sums `Φ Rᵀ` of a group's lanes over chunks; keeps its buffers from pass to pass.

    Components are laid out in buckets of lanes of like size, padded to the largest, so that
    one softmax serves a whole bucket. `begin` starts a pass with new natural parameters.
    """

    kept = KEPT

    def __init__(self, group: LaneBatch, features: Features, n_max: int) -> None:
        self.features = features
        self._kind = group.covariance_type
        self._constant = CONSTANT_ROW - TYPE_OF[self._kind].rows(features.d).start
        self._buckets, places = _lay_out(group.sizes)
        self._cuts = [
            features.empty.new_tensor(
                [cut(group.sizes[lane], self.kept) for lane in bucket.lanes]
            ).view(-1, 1, 1)
            for bucket in self._buckets
        ]
        lanes = [lane for bucket in self._buckets for lane in bucket.lanes]
        self._n_lanes = len(lanes)
        n_places = sum(bucket.n_places for bucket in self._buckets)
        like = features.empty
        self._places, self._lanes = places.to(like.device), torch.tensor(lanes).to(like.device)
        self._theta = self._empty_theta(like, n_places, group.theta.shape[1])
        self._flat = like.new_empty(2, n_places * n_max)
        self._work: dict[int, Work] = {}
        self._carried = like.new_zeros(group.theta.shape[1], n_places)
        self._sums = torch.zeros_like(self._carried, dtype=torch.float64)
        self._n_carried = 0
        self._log_likelihood = self._sums.new_zeros(len(group.sizes))
        self._entropy = torch.zeros_like(self._log_likelihood)
        self._squares = self._sums.new_zeros(n_places)
        self._is_weighted = False

    def begin(self, group: LaneBatch) -> None:
        """Take the parameters of the next passes."""
        if len(group.sizes) == 1:  # nothing to lay out, nor below
            self._theta.copy_(group.theta)
            return
        of_group = group.theta.to(self._theta.device)
        theta = of_group.new_zeros(self._theta.shape)
        theta[:, self._constant] = NEVER
        theta[self._places] = of_group
        self._theta.copy_(theta)

    def clear(self) -> None:
        """Forget what was summed, before the next shard."""
        self._sums.zero_()
        self._n_carried = 0
        self._log_likelihood.zero_()
        self._entropy.zero_()
        self._squares.zero_()
        self._is_weighted = False

    def add(self, chunk: Block) -> None:
        """Add the statistics of the rows that the features hold."""
        phi = self.features.of[self._kind]
        work = self._buffers(phi.shape[1])
        log_norm = self._softmax(phi, work)
        weight = chunk.sample_weight
        if work.resp.dtype == torch.float64:
            self._add_entropy(work, log_norm, weight)
        if weight is not None:
            weight = weight.to(work.resp.dtype)
            work.resp.mul_(weight)
            self._squares += work.resp.mv(weight)
            self._is_weighted = True
            log_norm = log_norm * weight
        self._log_likelihood += log_norm.sum(1, dtype=torch.float64)
        self._add_moments(phi, work.resp_t)

    def log_norm(self) -> Tensor:
        """Return log p (L, n) of the rows that the features hold."""
        phi = self.features.of[self._kind]
        return self._in_order(self._softmax(phi, self._buffers(phi.shape[1])))

    def survivors(self, n: int) -> Float64[Tensor, "L n"]:
        """Return how many components matter to each of the `n` rows of the last `log_norm`.

        Those within `cut` of the row's largest logit.
        """
        pairs = zip(self._buffers(n).buckets, self._cuts, strict=True)
        n_matter = [(b[0] >= b[0].amax(1, keepdim=True) - cuts).sum(1) for b, cuts in pairs]
        return self._in_order(torch.cat(n_matter)).double()

    def statistics(self, checks: Float64[Tensor, "3 L"]) -> SufficientStatistics:
        """Return the sums since `clear`, lanes in the group's order, on the rows' device.

        `checks` are the errors of float32, their squares, and the components that matter.
        """
        self._carry()
        squares = self._squares if self._is_weighted else self._sums[self._constant]
        return SufficientStatistics(
            moments=self._by_component(self._sums),
            log_likelihood=self._in_order(self._log_likelihood),
            entropy=self._in_order(self._entropies()),
            float32_error=checks[0],
            float32_squares=checks[1],
            squares=self._by_component(squares),
            survivors=checks[2],
        )

    def _empty_theta(self, like: Tensor, n_places: int, n_features: int) -> Tensor:
        return like.new_zeros(n_places, n_features)

    def _add_moments(self, phi: Tensor, resp_t: Tensor) -> None:
        if self._n_carried + phi.shape[1] > _CARRY_ROWS:
            self._carry()
        if self._n_carried == 0:
            torch.mm(phi, resp_t, out=self._carried)
        else:
            self._carried.addmm_(phi, resp_t)
        self._n_carried += phi.shape[1]

    def _carry(self) -> None:
        if self._n_carried:
            self._sums += self._carried
            self._n_carried = 0

    def _softmax(self, phi: Tensor, work: Work) -> Tensor:
        """Fill logits and responsibilities, lane by lane; return log p (L, n), bucket order."""
        torch.mm(self._theta, phi, out=work.logits)
        log_norms = [self._responsibilities(logits, resp) for logits, resp in work.buckets]
        return log_norms[0] if len(log_norms) == 1 else torch.cat(log_norms)

    def _responsibilities(self, logits: Tensor, resp: Tensor) -> Tensor:
        """Fill the responsibilities of a bucket's logits, and return log p."""
        torch.softmax(logits, 1, out=resp)
        # The largest responsibility is exp(its logit - log p), and at least 1 / size.
        return logits.amax(1).sub_(resp.amax(1).log_())

    def _add_entropy(self, work: Work, log_norm: Tensor, weight: Tensor | None) -> None:
        expected = torch.cat([(logits * resp).sum(1) for logits, resp in work.buckets])
        entropy = log_norm - expected
        if weight is not None:
            entropy = entropy * weight
        self._entropy += entropy.sum(1)

    def _entropies(self) -> Tensor:
        """Return the lanes' entropies since `clear`, bucket order."""
        return self._entropy

    def _by_component(self, values: Tensor) -> Tensor:
        return values.clone() if self._n_lanes == 1 else values[..., self._places]

    def _in_order(self, values: Tensor) -> Tensor:
        if self._n_lanes == 1:
            return values.clone()
        ordered = torch.empty_like(values)
        ordered[self._lanes] = values
        return ordered

    def _buffers(self, n: int) -> Work:
        if n not in self._work:
            if len(self._work) >= _MAX_VIEWS:
                self._work.clear()
            k = len(self._theta)
            logits, resp = (flat[: k * n].view(k, n) for flat in self._flat)
            buckets, first = [], 0
            for bucket in self._buckets:
                part = slice(first, first + bucket.n_places)
                shape = (len(bucket.lanes), bucket.size, n)
                buckets.append((logits[part].view(shape), resp[part].view(shape)))
                first = part.stop
            self._work[n] = Work(logits=logits, resp=resp, resp_t=resp.T, buckets=buckets)
        return self._work[n]


def _lay_out(sizes: Sequence[int]) -> tuple[list[_Bucket], Tensor]:
    """Group lanes of like size; return the buckets and each component's place, in lane order."""
    buckets: list[tuple[int, list[int]]] = []
    for lane in sorted(range(len(sizes)), key=lambda lane: -sizes[lane]):
        # Padding costs its share of both products, one more softmax costs its dispatch.
        if not buckets or sizes[lane] < _PADDING * buckets[-1][0]:
            buckets.append((sizes[lane], []))
        buckets[-1][1].append(lane)
    places: dict[int, range] = {}
    first = 0
    for size, lanes in buckets:
        for lane in lanes:
            places[lane] = range(first, first + sizes[lane])
            first += size
    order = [place for lane in range(len(sizes)) for place in places[lane]]
    return [_Bucket(size, tuple(lanes)) for size, lanes in buckets], torch.tensor(order)

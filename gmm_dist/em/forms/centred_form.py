"""The E-step in centred form: float64, each component about its own mean, for pairs that matter.

A pair of a row and a component counts whose logit is within `28 + ln k` nats of the largest of its
row and lane: what is left out has a responsibility of e^-28 at most, of all k together. One cheap
product in float32 screens all pairs, with a margin for its rounding. Those that it lets through
are evaluated by the component's Cholesky factor. They show what the screen was worth:
a row of which one logit was off by half the margin is evaluated with all components. That does not
show what was left out wrongly, by a component that is tight and far from the centre of the rows. So
a component whose logits float32 cannot tell (`lane_batch.screens`) counts for all rows.

`pruned_form` does the same by compiled loops, on a CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from gmm_dist.chunks import STAGGER
from gmm_dist.em.forms.features import Features
from gmm_dist.em.lane_batch import GROWTH, MARGIN, LaneBatch, cut, screening_error
from gmm_dist.em.statistics import SufficientStatistics
from gmm_dist.model.covariance import TYPE_OF
from gmm_dist.model.densities import Densities
from gmm_dist.shards.protocol import Block

_PIECE_ROWS, _PIECE_LOGITS = 1 << 15, 1 << 21  # rows screened before their pairs are evaluated
_GATHERED = 1 << 17  # numbers of rows about means, at once: they stay in a cache
_DENSE = 1 << 20  # logits of rows with all components, at once


class CentredForm:
    """Sums the statistics of lanes about their components' means, in float64.

    Right where products about the shared centre have lost their digits to cancellation, and the
    fastest form where few components matter to a row. The moments come in the layout of the type
    that one component alone has.
    """

    def __init__(self, group: LaneBatch, features: Features, n_max: int) -> None:
        assert group.stack is not None
        self._type = TYPE_OF[TYPE_OF[group.covariance_type].alone]
        self._features, self._sizes = features, group.sizes
        n_components, d = group.stack.means.shape
        edges = itertools.accumulate(self._sizes, initial=0)
        self._of_lane = list(itertools.starmap(slice, itertools.pairwise(edges)))
        like = features.empty
        self._n_piece = max(n_max, min(_PIECE_LOGITS // n_components, _PIECE_ROWS))
        self._logits = like.new_empty(n_components, self._n_piece + STAGGER)
        self._matter = torch.empty_like(self._logits, dtype=torch.bool)
        self._unsure = self._matter.new_empty(self._n_piece)
        zeros = like.double().new_zeros
        cell = (d, d) if self._type.has_products else (d,)
        self._sum_x, self._scatter = zeros(n_components, d), zeros(n_components, *cell)
        self._by_component = zeros(2, n_components)
        self._by_lane = zeros(3, len(self._sizes))
        self._nk, self._squares = self._by_component
        self._log_likelihood, self._entropy, self._survivors = self._by_lane
        self._of_component = list(zip(self._sum_x, self._scatter, strict=True))  # views
        self._waiting: list[Block] = []
        self._n_waiting = 0
        self.begin(group)

    def begin(self, group: LaneBatch) -> None:
        """Take the parameters of the next passes."""
        assert group.stack is not None
        device = self._logits.device
        self._densities = Densities(group.stack, device)
        self._means = group.stack.means.T.contiguous().to(device)
        self._peaks = self._densities.peaks.to(device)
        self._theta = group.theta.to(device, self._logits.dtype)
        self._screens = bool(self._theta.isfinite().all())
        errors = screening_error(group.stack.unshared(), group.theta).to(device)
        trusted = errors <= MARGIN / 2  # NaN is not
        growth = GROWTH * errors
        allowed = torch.stack([errors, growth, growth * self._peaks])
        self._allowed = allowed.to(self._logits.dtype)
        self._trusted, self._unscreened = trusted, torch.nonzero(~trusted)[:, 0]

    def clear(self) -> None:
        """Forget what was summed, before the next shard."""
        for total in (self._sum_x, self._scatter, self._by_component, self._by_lane):
            total.zero_()

    def add(self, chunk: Block) -> None:
        """Screen the rows that the features hold; their pairs are evaluated with those of more."""
        if not self._screens:
            self._add_densely(chunk)
            return
        n = chunk.X.shape[1]
        phi = self._features.of[self._type.name]
        if self._n_waiting + n > self._n_piece:
            self._add_screened()
        place = slice(self._n_waiting, self._n_waiting + n)
        self._fill_logits(phi, place)
        self._screen(place)
        self._waiting.append(chunk)
        self._n_waiting = place.stop

    def statistics(self, checks: Float64[Tensor, "3 L"]) -> SufficientStatistics:
        """Return the sums since `clear`; no `checks` are made of what is exact."""
        if self._n_waiting:
            self._add_screened()
        moments = self._type.sums(self._nk, self._sum_x, self._type.second(self._scatter))
        sums = (self._log_likelihood, self._entropy, self._squares, self._survivors)
        log_likelihood, entropy, squares, survivors = (total.clone() for total in sums)
        return SufficientStatistics(
            moments=moments,
            log_likelihood=log_likelihood,
            entropy=entropy,
            float32_error=checks[0],
            float32_squares=checks[1],
            squares=squares,
            survivors=survivors,
        )

    def _fill_logits(self, phi: Tensor, place: slice) -> None:
        torch.mm(self._theta, phi, out=self._logits[:, place])
        if len(self._unscreened):
            self._logits[self._unscreened, place] = -torch.inf

    def _add_screened(self) -> None:
        """Add the rows that wait, with the components that matter to each."""
        rows, logits = _joined(self._waiting), self._logits
        unsure = self._unsure[: self._n_waiting]
        pairs = _Pairs.of(self._matter[:, : self._n_waiting].contiguous())
        self._waiting, self._n_waiting = [], 0
        distances = rows.X.new_empty(len(pairs.rows), dtype=torch.float64)
        for k, part, z in self._about_means(rows, pairs):
            distances[part] = self._type.mahalanobis(z, self._densities.factors[k])
        exact = self._peaks.index_select(0, pairs.components) - 0.5 * distances
        screened = logits.view(-1).take(pairs.components * logits.stride(0) + pairs.rows)
        off = ~((exact - screened).abs() <= MARGIN / 2)  # NaN is off, too
        off &= self._trusted.index_select(0, pairs.components)
        unsure[pairs.rows[off]] = True
        if bool(unsure.any()):
            trusted = ~unsure[pairs.rows]
            pairs, exact = pairs.where(trusted), exact[trusted]
            self._add_densely(Block(rows.X[:, unsure], rows.weights[unsure]))
        self._add_pairs(rows, pairs, exact)

    def _screen(self, place: slice) -> None:
        """Note which pairs of some rows matter, and of which rows the screen cannot say."""
        unsure = self._unsure[place].zero_()
        for lane, size in zip(self._of_lane, self._sizes, strict=True):
            logits = self._logits[lane, place]
            top = logits.amax(0)
            unsure |= ~top.isfinite()
            # Half the margin is for the largest logit. The other errs by more further out.
            least = top.sub_(cut(size) + MARGIN / 2)
            near, growth, rise = (of_each[lane, None] for of_each in self._allowed)
            limit = torch.minimum(least - near, torch.addcmul(-rise, least, 1 + growth))
            torch.ge(logits, limit, out=self._matter[lane, place])
        self._matter[self._unscreened, place] = True

    def _add_pairs(self, rows: Block, pairs: _Pairs, exact: Float64[Tensor, " p"]) -> None:
        """Add the statistics of pairs with the logits `exact`; rows without pairs add nothing."""
        n, weight = rows.X.shape[1], rows.weights
        of_pairs = weight.index_select(0, pairs.rows)
        shares, edges = torch.empty_like(exact), pairs.edges
        for i, lane in enumerate(self._of_lane):
            part = slice(edges[lane.start], edges[lane.stop])
            of_row, logit = pairs.rows[part], exact[part]
            top = exact.new_full((n,), -torch.inf).scatter_reduce_(0, of_row, logit, "amax")
            r = logit - top.index_select(0, of_row)
            matters = r >= -cut(self._sizes[i])
            r.exp_().masked_fill_(~matters, 0)
            total = _sum_by_row(r, of_row, n)
            log_norm = top + total.log()
            r /= total.index_select(0, of_row)
            torch.mul(r, of_pairs[part], out=shares[part])
            self._log_likelihood[i] += torch.where(total > 0, log_norm * weight, 0.0).sum()
            self._entropy[i] += torch.special.entr(r) @ of_pairs[part]
            self._survivors[i] += matters.double() @ of_pairs[part]
        self._nk += pairs.sums(shares)
        self._squares += pairs.sums(shares * of_pairs)
        for k, part, z in self._about_means(rows, pairs):
            self._add_moments(k, z, shares[part])

    def _add_densely(self, rows: Block) -> None:
        """Add rows with all components, in chunks."""
        step = max(_DENSE // len(self._nk), 1)
        for first in range(0, rows.X.shape[1], step):
            chunk = rows.part(slice(first, first + step))
            x, weight = chunk.X.double(), chunk.weights
            logits = self._densities(x)
            for i, lane in enumerate(self._of_lane):
                below = logits[lane] - logits[lane].amax(0)
                mattering = torch.where(below >= -cut(self._sizes[i]), logits[lane], -torch.inf)
                log_norm = mattering.logsumexp(0)
                shares = (mattering - log_norm).exp()
                self._log_likelihood[i] += (log_norm * weight).sum()
                self._entropy[i] += torch.special.entr(shares).sum(0) @ weight
                self._survivors[i] += (mattering > -torch.inf).double().sum(0) @ weight
                shares *= weight
                self._nk[lane] += shares.sum(1)
                self._squares[lane] += shares @ weight
                for k, r in zip(range(lane.start, lane.stop), shares, strict=True):
                    self._add_moments(k, x - self._means[:, k, None], r)

    def _add_moments(self, k: int, z: Float64[Tensor, "d n"], r: Float64[Tensor, " n"]) -> None:
        sum_x, scatter = self._of_component[k]
        sum_x.addmv_(z, r)
        scatter.add_(self._type.scatter(z.T, r))

    def _about_means(
        self, rows: Block, pairs: _Pairs
    ) -> Iterator[tuple[int, slice, Float64[Tensor, "d m"]]]:
        """Yield each component that has pairs, its part of them, and its rows about its mean.

        Those of a few components at a time are gathered at once: calls cost time, too.
        """
        edges = pairs.edges
        for few in pairs.groups(_GATHERED // len(rows.X)):
            first, last = edges[few.start], edges[few.stop]
            x = rows.X.index_select(1, pairs.rows[first:last])
            means = self._means.index_select(1, pairs.components[first:last])
            z = torch.sub(x, means, out=means)
            for k in few:
                if edges[k] < edges[k + 1]:
                    part = slice(edges[k], edges[k + 1])
                    yield k, part, z[:, edges[k] - first : edges[k + 1] - first]


@dataclass(frozen=True, slots=True, eq=False)
class _Pairs:
    """Pairs of a component and a row, component by component.

    Component k has the `rows` from edges[k] to edges[k + 1].
    """

    rows: Int64[Tensor, " p"]
    components: Int64[Tensor, " p"]
    edges: list[int]

    @classmethod
    def of(cls, matter: Bool[Tensor, "K n"]) -> _Pairs:
        n = matter.shape[1]
        flat = _nonzero(matter.view(-1))
        firsts = torch.arange(len(matter) + 1, device=flat.device) * n
        components = flat.div(n, rounding_mode="floor")
        edges = torch.searchsorted(flat, firsts).tolist()
        return cls(flat - components * n, components, edges)

    def groups(self, most: int) -> Iterator[range]:
        """Yield ranges of components of at most so many pairs together, or of one component."""
        first = 0
        for k in range(1, len(self.edges)):
            is_last = k == len(self.edges) - 1
            if is_last or self.edges[k + 1] - self.edges[first] > most:
                yield range(first, k)
                first = k

    def sums(self, values: Float64[Tensor, " p"]) -> Float64[Tensor, " K"]:
        """Sum values of the pairs for each component."""
        lengths = torch.tensor(self.edges, device=values.device).diff()
        sums: Tensor = torch.segment_reduce(values, "sum", lengths=lengths)
        return sums

    def where(self, kept: Bool[Tensor, " p"]) -> _Pairs:
        """Return some of the pairs."""
        before = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])
        return _Pairs(self.rows[kept], self.components[kept], before[self.edges].tolist())


def _joined(chunks: Sequence[Block]) -> Block:
    if len(chunks) == 1:
        return chunks[0]
    weights = [chunk.sample_weight for chunk in chunks if chunk.sample_weight is not None]
    return Block(
        torch.cat([chunk.X for chunk in chunks], dim=1),
        torch.cat(weights) if weights else None,
    )


def _nonzero(mask: Bool[Tensor, " n"]) -> Int64[Tensor, " m"]:
    """Return where a mask is set; on a CPU by NumPy, which takes a third of torch's time."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero()[:, 0]


def _sum_by_row(
    values: Float64[Tensor, " p"], of_row: Int64[Tensor, " p"], n: int
) -> Float64[Tensor, " n"]:
    """Sum the values of each row, in their order."""
    sums = values.new_zeros(n)
    if values.device.type == "cpu":
        return sums.index_add_(0, of_row, values)
    return sums.index_put_((of_row,), values, accumulate=True)  # sorts, where index_add_ races

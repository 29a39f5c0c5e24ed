"""The centred form by compiled loops, which keeps in mind what was far from each row.

As in `centred_form` one product in float32 finds the pairs of a row and a component that may
matter, and these are evaluated exactly, about the component's mean. Those within `cut` of the
largest logit of their row and lane go on: what a row adds depends on its exact logits alone.

So it makes no difference to any bit which pairs were tried, as long as all that matter were. The
form therefore keeps, with the rows, the pairs that a pass has tried, taken further down than it
needed, and in later passes tries these again without any product. `certificate` bounds what the
components left out may have come to since. A row in which one may have come to matter is screened
anew, and so is a component that has moved far, in all rows. When there are many of either, all are,
and kept. What is kept may be lost at any time: it is made again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.chunks import STAGGER, chunk_rows, cuts
from gmm_dist.em.forms.about_means import Sums
from gmm_dist.em.forms.certificate import DEPTHS, Centred
from gmm_dist.em.forms.compiled import Loops, loops_for
from gmm_dist.em.forms.features import Features
from gmm_dist.em.forms.kept_pairs import KeptPiece, Memory
from gmm_dist.em.lane_batch import MARGIN, LaneBatch, screening_error
from gmm_dist.em.statistics import SufficientStatistics
from gmm_dist.model.covariance import TYPE_OF
from gmm_dist.model.densities import FAR, Densities
from gmm_dist.model.density_loops import Array
from gmm_dist.shards.protocol import Block, ShardRows

_CPU = torch.device("cpu")
_ROWS_PER_COMPONENT = 64  # of a piece, so that a component's rows are worked on together
_LEAST_PIECE, _MOST_PIECE = 4096, 32_768
_MOST_PAIRS = 1 << 24  # of a piece, if all components matter to all rows
_DENSE = 1 << 20  # pairs of rows with all components, at once
_GRID, _NO_GRID = DEPTHS.numpy(), np.empty(0)


@dataclass(frozen=True, slots=True, eq=False)
class _Pairs:
    """Pairs of a piece as `screening_loops` has them, and the exact logit of each."""

    firsts: Array
    rows: Array
    logits: Array

    def replaced(self, which: Array, other: _Pairs, loops: Loops) -> _Pairs:
        """Return these, but of some rows (bool) others."""
        n = len(self.rows) + len(other.rows)
        merged = _Pairs(np.empty_like(self.firsts), np.empty(n, dtype=np.int32), np.empty(n))
        mine, theirs, both = (
            (pairs.firsts, pairs.rows, pairs.logits) for pairs in (self, other, merged)
        )
        loops.merge(*mine, which, *theirs, *both)
        return merged


class PrunedForm:
    """Sums the statistics of lanes about their components' means, in float64, on a CPU."""

    def __init__(self, group: LaneBatch, n_features: int) -> None:
        self._type = TYPE_OF[TYPE_OF[group.covariance_type].alone]
        self._sizes, self._d = group.sizes, n_features
        n_components, d = sum(self._sizes), n_features
        self._sums = Sums(self._sizes, self._type, d)
        self._edges, self._cuts = self._sums.edges, self._sums.cuts
        most = min(_ROWS_PER_COMPONENT * n_components, _MOST_PIECE, _MOST_PAIRS // n_components)
        self._n_piece = max(most, _LEAST_PIECE)
        self._n_chunk = chunk_rows(group.theta.shape[1] + n_components, _CPU)
        self._features = Features(d, self._n_chunk, {self._type.name}, torch.float32, _CPU)
        self._screened = torch.empty(n_components, self._n_chunk + STAGGER)
        self._limit = np.empty((len(self._sizes), self._n_chunk), dtype=np.float32)
        self._of_lane = np.repeat(np.arange(len(self._sizes)), self._sizes)
        self._X = np.empty((self._n_piece, d))
        self.begin(group)

    def begin(self, group: LaneBatch) -> None:
        """Take the parameters of the next passes."""
        assert group.stack is not None
        of = self._densities = Densities(group.stack, _CPU, compiled=True)
        self._means, self._peaks = of.means.numpy(), of.peaks.numpy()
        self._theta = group.theta.float()
        self._screens = bool(self._theta.isfinite().all())
        self._now = Centred(of.means, of.own, of.peaks)
        self._highest_peaks = self._now.highest(self._sizes).numpy()
        errors = screening_error(group.stack.unshared(), group.theta).numpy()
        self._trusted = errors <= MARGIN / 2  # NaN is not
        self._allowed = self._of_lane, ~self._trusted, self._peaks, errors

    def statistics(self, rows: ShardRows, checks: Float64[Tensor, "3 L"]) -> SufficientStatistics:
        """Return the sums over the rows; no `checks` are made of what is exact."""
        self._sums.clear()
        memory = Memory(rows, self._type.name, self._now, self._sizes, screens=self._screens)
        for i, piece in enumerate(self._pieces(rows)):
            self._add(piece, memory, i)
        memory.leave()
        return self._sums.statistics(checks)

    def _pieces(self, rows: ShardRows) -> Iterator[Block]:
        for block in rows.blocks:
            yield from map(block.part, cuts(block.X.shape[1], self._n_piece))

    def _add(self, piece: Block, memory: Memory, i: int) -> None:
        """Add the i-th piece of the rows."""
        n, columns = piece.X.shape[1], piece.X.numpy()
        loops = loops_for(self._type.has_products, columns.dtype.char)
        X = self._X[:n]
        loops.transpose(columns, X)
        if memory.known is None:
            pairs, depths = self._screen(loops, piece.X, X, None, keeps=memory.keeps)
            tried, n_stale, top = pairs, n, self._top(loops, pairs, n)
        else:
            pairs, depths = self._try_again(loops, piece.X, X, memory, memory.known.pieces[i])
            tried, stale = pairs, np.empty(n, dtype=np.bool_)
            top = self._top(loops, pairs, n)
            n_stale = loops.stale(top, depths, memory.bounds, self._cuts, stale)
            if n_stale:
                fresh, _ = self._screen(loops, piece.X, X, stale, keeps=False)
                pairs = pairs.replaced(stale, fresh, loops)
                top = self._top(loops, pairs, n)
        of_piece = None
        if memory.keeps or memory.moved.any():
            of_piece = KeptPiece.of(tried.firsts, tried.rows, depths)
        if (far := ~(top > FAR).all(0)).any():
            pairs = pairs.replaced(far, self._far(X, far), loops)
            top = self._top(loops, pairs, n)
        n_mattered = self._sum(loops, X, piece.weights.numpy(), pairs, top)
        memory.note(of_piece, n_stale, n_mattered)

    def _sum(self, loops: Loops, X: Array, weight: Array, pairs: _Pairs, top: Array) -> int:
        """Add the statistics of pairs; return how many matter."""
        firsts, rows = np.empty_like(pairs.firsts), np.empty_like(pairs.rows)
        loops.shares(
            self._edges,
            self._cuts,
            top,
            pairs.firsts,
            pairs.rows,
            pairs.logits,
            weight,
            np.empty(len(weight)),
            firsts,
            rows,
            self._sums.by_component,
            self._sums.by_lane,
        )
        sum_x, scatter = self._sums.sum_x, self._sums.scatter
        loops.moments(X, self._means, firsts, rows, pairs.logits, sum_x, scatter)
        return int(firsts[-1])

    def _exact(self, loops: Loops, X: Array, firsts: Array, rows: Array) -> _Pairs:
        logits = np.empty(len(rows))
        factors = self._densities.filled
        loops.distances(X, self._means, factors, self._peaks, firsts, rows, logits)
        return _Pairs(firsts, rows, logits)

    def _top(self, loops: Loops, pairs: _Pairs, n: int) -> Array:
        top = np.empty((len(self._sizes), n))
        loops.highest(self._edges, pairs.firsts, pairs.rows, pairs.logits, top)
        return top

    def _try_again(
        self, loops: Loops, columns: Tensor, X: Array, memory: Memory, known: KeptPiece
    ) -> tuple[_Pairs, Array]:
        """Return the pairs that an earlier pass has tried, and how deep they go.

        Those of components that have moved far are found anew.
        """
        rows = known.rows.astype(np.int32)
        if not bool(memory.moved.any()):
            return self._exact(loops, X, known.firsts, rows), known.depths
        assert memory.known is not None
        moved = memory.moved.numpy()
        stays = np.repeat(~moved, np.diff(known.firsts))
        lengths = np.where(moved, 0, np.diff(known.firsts))
        firsts = np.concatenate([[0], np.cumsum(lengths)])
        old = self._exact(loops, X, firsts, rows[stays])
        found = _Found(np.flatnonzero(moved), len(self._means))
        for logits, part in self._products(columns, found.components):
            depths_of = (part.start, memory.known.peaks, _GRID, known.depths)
            loops.depth_limits(*depths_of, self._limit)
            found.select(loops, logits, part, self._allowed, self._limit)
        fresh, unsure = self._exact_of(loops, X, found, np.arange(len(X), dtype=np.int32))
        depths = np.where(unsure, np.int16(-1), known.depths)
        return old.replaced(np.zeros(len(X), dtype=np.bool_), fresh, loops), depths

    def _screen(
        self, loops: Loops, columns: Tensor, X: Array, which: Array | None, *, keeps: bool
    ) -> tuple[_Pairs, Array]:
        """Return the pairs of some rows (bool; None: all) that may matter, and how deep they go.

        Rows of which a logit was off by half the margin are evaluated with all components. Only
        pairs that a pass keeps go deeper than they need.
        """
        chosen = np.arange(len(X), dtype=np.int32)
        if which is not None:
            chosen = chosen[which]
            columns = columns[:, torch.from_numpy(which)]
        depths = np.full((len(self._sizes), len(chosen)), -1, dtype=np.int16)
        if not self._screens:
            return self._all(loops, X, chosen), depths
        grid, limit = _GRID if keeps else _NO_GRID, self._limit
        found = _Found(np.arange(len(self._means)), len(self._means))
        for logits, part in self._products(columns, found.components):
            at = (logits, part.stop - part.start, part.start, self._edges, self._cuts + MARGIN / 2)
            loops.limits(*at, self._highest_peaks, grid, depths, limit)
            found.select(loops, logits, part, self._allowed, limit)
        pairs, unsure = self._exact_of(loops, X, found, chosen)
        if unsure.any():
            every = self._all(loops, X, np.flatnonzero(unsure).astype(np.int32))
            pairs = pairs.replaced(unsure, every, loops)
            depths[:, unsure[chosen]] = -1
        return pairs, depths

    def _products(self, columns: Tensor, components: Array) -> Iterator[tuple[Array, slice]]:
        """Yield the float32 logits of some components, of some rows at a time."""
        theta, logits = self._theta[components], self._screened[: len(components)]
        untrusted = torch.from_numpy(~self._trusted[components])
        for part in cuts(columns.shape[1], self._n_chunk):
            self._features.fill(columns[:, part])
            m = part.stop - part.start
            torch.mm(theta, self._features.of[self._type.name], out=logits[:, :m])
            if bool(untrusted.any()):
                logits[untrusted, :m] = -torch.inf
            yield logits.numpy(), part

    def _exact_of(
        self, loops: Loops, X: Array, found: _Found, chosen: Array
    ) -> tuple[_Pairs, Array]:
        """Return the pairs found, of rows `chosen`, and the rows (bool) of which some were off."""
        firsts, rows, screened = found.arranged(loops)
        pairs = self._exact(loops, X, firsts, chosen[rows])
        unsure = np.zeros(len(X), dtype=np.bool_)
        exact, trusted = pairs.logits, self._trusted
        loops.unsure(exact, screened, trusted, MARGIN / 2, firsts, pairs.rows, unsure)
        return pairs, unsure

    def _all(self, loops: Loops, X: Array, which: Array) -> _Pairs:
        """Return the pairs of rows with all components, those that matter."""
        parts = []
        n_components = len(self._means)
        for part in cuts(len(which), max(_DENSE // n_components, 16)):
            rows = which[part]
            firsts = np.arange(n_components + 1) * len(rows)
            pairs = self._exact(loops, X, firsts, np.tile(rows, n_components))
            parts.append(self._mattering(rows, pairs.logits.reshape(n_components, -1)))
        return _in_order(parts, n_components)

    def _far(self, X: Array, which: Array) -> _Pairs:
        """Return the pairs of rows (bool) so far out that their logits have few digits left."""
        logits = self._densities(torch.from_numpy(X[which]).T).numpy()
        rows = np.flatnonzero(which).astype(np.int32)
        return _in_order([self._mattering(rows, logits)], len(logits))

    def _mattering(self, rows: Array, logits: Array) -> tuple[Array, Array, Array]:
        """Return components, rows and logits of pairs among (K, n) that are not below the cut."""
        matter = np.empty(logits.shape, dtype=np.bool_)
        for lane, (first, last) in enumerate(itertools.pairwise(self._edges)):
            top = logits[first:last].max(0)
            matter[first:last] = ~(logits[first:last] < top - self._cuts[lane])
        of, column = np.nonzero(matter)
        return of, rows[column], logits[of, column]


class _Found:
    """The pairs of some components that a screen has found, chunk by chunk."""

    def __init__(self, components: Array, n_components: int) -> None:
        self.components, self._n_components = components, n_components
        self._n_pairs = 0
        self._of = self._rows = np.empty(0, dtype=np.int32)
        self._screened = np.empty(0, dtype=np.float32)

    def select(
        self, loops: Loops, logits: Array, part: slice, allowed: tuple[Array, ...], limit: Array
    ) -> None:
        """Add the pairs of some rows, as `screening_loops.select` does."""
        n = part.stop - part.start
        most = self._n_pairs + len(self.components) * n
        if len(self._of) < most:  # what no pair has come to use is memory in name alone
            size = max(most, 2 * len(self._of))
            self._of, self._rows = _longer(self._of, size), _longer(self._rows, size)
            self._screened = _longer(self._screened, size)
        place = (n, part.start, self.components, *allowed, limit)
        arrays = self._of, self._rows, self._screened
        self._n_pairs = loops.select(logits, *place, *arrays, self._n_pairs)

    def arranged(self, loops: Loops) -> tuple[Array, Array, Array]:
        """Return the pairs component by component: firsts, rows and screened logits."""
        n = self._n_pairs
        firsts = np.empty(self._n_components + 1, dtype=np.int64)
        rows, screened = np.empty(n, dtype=np.int32), np.empty(n, dtype=np.float32)
        found = self._of, self._rows, self._screened
        loops.arrange(n, *found, firsts, rows, screened)
        return firsts, rows, screened


def _longer(values: Array, size: int) -> Array:
    longer = np.empty(size, dtype=values.dtype)
    longer[: len(values)] = values
    return longer


def _in_order(parts: list[tuple[Array, Array, Array]], n_components: int) -> _Pairs:
    """Return pairs whose rows rise from part to part component by component."""
    of, rows, logits = (np.concatenate(values) for values in zip(*parts, strict=True))
    order = np.argsort(of, kind="stable")
    firsts = np.searchsorted(of[order], np.arange(n_components + 1))
    return _Pairs(firsts, rows[order], logits[order])

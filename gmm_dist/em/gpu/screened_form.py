"""The E-step in centred form on a GPU: a rough product for all pairs, float64 for a few.

As `forms.centred_form` in what it computes. One rough product gives the logits of a chunk's rows
with all components. Pairs within `cut` and a margin of their row's largest are gathered component
by component into tiles of rows, and evaluated in float64 about the component's mean; so are their
moments. The host waits twice for a chunk: to know how many pairs there are, and whether any of them
shows that the rough logits were off by half the margin. Rows that do are taken with all components.

No sum depends on the order in which threads come: pairs are sorted, and summed by segments.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from gmm_dist.em.forms.features import Features
from gmm_dist.em.gpu.half_screen import MARGIN, HalfScreen, half_error
from gmm_dist.em.gpu.prices import TILE
from gmm_dist.em.lane_batch import (
    GROWTH,
    KEPT_ON_GPU,
    LaneBatch,
    cut,
    screening_error,
)
from gmm_dist.em.statistics import SufficientStatistics
from gmm_dist.model.covariance import TYPE_OF
from gmm_dist.model.densities import FAR, Densities
from gmm_dist.shards.protocol import Block

_AT_ONCE = 1 << 25  # numbers of rows about means in tiles: 256 MiB, three times


class ScreenedForm:
    """Sums the statistics of lanes about their components' means, in float64, on a GPU.

    Peak memory beside the rows: the features of a chunk, (P, n) in float16 (float32 where that
    would be too rough), its logits (n, K) in float32, and 1.3 GiB for tiles.
    """

    def __init__(self, group: LaneBatch, d: int, n_max: int, device: torch.device) -> None:
        self._type = TYPE_OF[TYPE_OF[group.covariance_type].alone]
        self._sizes, self._device = group.sizes, device
        edges = itertools.accumulate(self._sizes, initial=0)
        self._of_lane = list(itertools.starmap(slice, itertools.pairwise(edges)))
        k = sum(self._sizes)
        lanes = torch.arange(len(self._sizes)).repeat_interleave(torch.tensor(self._sizes))
        self._lane_of = lanes.to(device)
        cuts = torch.tensor([cut(size, KEPT_ON_GPU) for size in self._sizes], dtype=torch.float64)
        self._cuts = cuts.to(device)
        self._d, self._n_max = d, n_max
        self._at_once = max(1, _AT_ONCE // (TILE * d))  # tiles
        self._half: HalfScreen | None = None
        self._features: Features | None = None
        zeros = self._cuts.new_zeros
        cell = (d, d) if self._type.has_products else (d,)
        self._sum_x, self._scatter = zeros(k, d), zeros(k, *cell)
        self._by_component, self._by_lane = zeros(2, k), zeros(3, len(self._sizes))
        self.begin(group)

    def begin(self, group: LaneBatch) -> None:
        """Take the parameters of the next passes."""
        assert group.stack is not None
        device, alone = self._device, group.stack.unshared()
        self._densities = Densities(group.stack, device)
        theta = group.theta.to(device)
        errors = half_error(alone, group.theta)
        is_fine = self._type.has_products and bool((errors <= MARGIN / 2).all())
        if not is_fine:
            errors = screening_error(alone, group.theta)
        self._screen = self._rough(theta) if is_fine else self._single(theta)
        trusted = errors <= MARGIN / 2  # NaN is not
        # For each lane the worst of its components: what is allowed then depends on the row alone.
        errors = torch.where(trusted, errors, 0.0)
        self._near = [float(errors[lane].max()) for lane in self._of_lane]
        self._peak = torch.stack([self._densities.peaks[lane].max() for lane in self._of_lane])
        self._all_trusted, self._trusted = bool(trusted.all()), trusted.to(device)

    def _rough(self, theta: Tensor) -> HalfScreen:
        if self._half is None:
            self._half = HalfScreen(self._d, self._n_max, self._device)
        self._half.begin(theta)
        return self._half

    def _single(self, theta: Tensor) -> _SingleScreen:
        if self._features is None:
            kinds = {self._type.name}
            self._features = Features(self._d, self._n_max, kinds, torch.float32, self._device)
        return _SingleScreen(self._features, self._type.name, theta.T.float().contiguous())

    def clear(self) -> None:
        """Forget what was summed, before the next shard."""
        for total in (self._sum_x, self._scatter, self._by_component, self._by_lane):
            total.zero_()

    def add(self, chunk: Block) -> None:
        """Add the statistics of a chunk's rows."""
        with _sums_of_halves_in_float32():
            logits = self._screen(chunk.X)
        matter, sure = self._matter(logits)
        pairs = _Pairs.of(matter)
        tiles = self._tiled(chunk.X, pairs)
        exact = self._evaluated(pairs, tiles())
        bad = self._bad(logits, pairs, exact, sure)
        if bool(bad.any()):
            matter |= bad[:, None]
            pairs = _Pairs.of(matter)
            tiles = self._tiled(chunk.X, pairs)
            exact = self._evaluated(pairs, tiles())
            self._replace_far(chunk.X, bad, pairs, exact)
        self._sum(chunk, pairs, exact, tiles())

    def statistics(self, checks: Float64[Tensor, "3 L"]) -> SufficientStatistics:
        """Return the sums since `clear`, on the device; no `checks` are made of what is exact."""
        nk, squares = self._by_component
        log_likelihood, entropy, survivors = (total.clone() for total in self._by_lane)
        return SufficientStatistics(
            moments=self._type.sums(nk, self._sum_x, self._type.second(self._scatter)),
            log_likelihood=log_likelihood,
            entropy=entropy,
            float32_error=checks[0],
            float32_squares=checks[1],
            squares=squares.clone(),
            survivors=survivors,
        )

    # Which pairs.

    def _matter(self, logits: Tensor) -> tuple[Bool[Tensor, "n K"], Bool[Tensor, " n"]]:
        """Return which pairs may matter, and which rows' logits are numbers."""
        if not self._all_trusted:
            logits.masked_fill_(~self._trusted, -torch.inf)
        matter = torch.empty(logits.shape, dtype=torch.bool, device=logits.device)
        sure = matter.new_ones(len(logits))
        for i, (lane, size) in enumerate(zip(self._of_lane, self._sizes, strict=True)):
            of_lane = logits[:, lane]
            top = of_lane.amax(1, keepdim=True)
            sure &= top[:, 0].isfinite()
            # Half the margin is for the largest logit. The other errs by more further out.
            least = top.sub_(cut(size, KEPT_ON_GPU) + MARGIN / 2)
            depth = (self._peak[i].float() - least).mul_(GROWTH).clamp_min_(1.0)
            torch.ge(of_lane, least.sub_(depth.mul_(self._near[i])), out=matter[:, lane])
        if not self._all_trusted:
            matter |= ~self._trusted
        matter |= ~sure[:, None]
        return matter, sure

    def _bad(
        self, logits: Tensor, pairs: _Pairs, exact: Float64[Tensor, " p"], sure: Tensor
    ) -> Bool[Tensor, " n"]:
        """Return the rows of which the screen said wrong things, or that lie too far out."""
        rough = logits[pairs.rows, pairs.components]
        off = ~((exact - rough).abs() <= MARGIN / 2)  # NaN is off, too
        off &= self._trusted[pairs.components] & sure[pairs.rows]
        off |= ~(exact > FAR)
        # The last place is for the pairs that are right; all write the same, so none races.
        bad = off.new_zeros(len(logits) + 1)
        return bad.index_fill_(0, torch.where(off, pairs.rows, len(logits)), True)[:-1]

    def _replace_far(
        self, X: Tensor, bad: Bool[Tensor, " n"], pairs: _Pairs, exact: Float64[Tensor, " p"]
    ) -> None:
        """Give rows with all components logits with a single largest one, however far they lie."""
        rows = bad.nonzero()[:, 0]
        exact[bad[pairs.rows]] = self._densities(X[:, rows].double()).T.flatten()

    # Pairs in tiles.

    def _tiled(self, X: Tensor, pairs: _Pairs) -> Callable[[], Iterable[_Tiles]]:
        """Return a function that yields the pairs' tiles: the same each time, if memory allows."""
        if pairs.n_tiles > self._at_once:
            return lambda: self._tiles(X, pairs)
        kept = list(self._tiles(X, pairs))
        return lambda: kept

    def _evaluated(self, pairs: _Pairs, in_tiles: Iterable[_Tiles]) -> Float64[Tensor, " p"]:
        """Return the exact logits of pairs."""
        exact = self._cuts.new_empty(pairs.n_pairs + 1)
        for tiles in in_tiles:
            k, factors = tiles.components, self._densities.factors[tiles.components]
            if self._type.has_products:
                y = torch.bmm(tiles.z, factors)
            else:
                y = tiles.z * factors.view(len(k), 1, -1)
            distances = y.square_().sum(2)
            exact[tiles.pairs] = self._densities.peaks[k, None] - 0.5 * distances
        return exact[:-1]

    def _sum(
        self,
        chunk: Block,
        pairs: _Pairs,
        exact: Float64[Tensor, " p"],
        in_tiles: Iterable[_Tiles],
    ) -> None:
        weight, n_lanes = chunk.weights, len(self._sizes)
        lane = self._lane_of[pairs.components]
        place = pairs.rows * n_lanes + lane
        places = torch.arange(len(weight) * n_lanes + 1, device=place.device)
        counts = torch.searchsorted(place, places).diff()

        def by_row(values: Tensor, how: str = "sum") -> Tensor:
            # As a column: a thread for each segment, where a vector has a block of them for each.
            return torch.segment_reduce(values[:, None], how, lengths=counts, unsafe=True)[:, 0]

        top = by_row(exact, "max")
        below = exact - top[place]
        matters = below >= -self._cuts[lane]
        shares = torch.where(matters, below.exp(), 0.0)
        total = by_row(shares)
        shares /= total[place]
        of_rows = [top + total.log(), by_row(torch.special.entr(shares)), by_row(matters.double())]
        self._by_lane += torch.stack([weight @ part.view(-1, n_lanes) for part in of_rows])
        of_pairs = weight[pairs.rows]
        shares *= of_pairs
        none = shares.new_zeros(1)
        shares, squares = torch.cat([shares, none]), torch.cat([shares * of_pairs, none])
        for tiles in in_tiles:
            r = shares[tiles.pairs]
            weighted = tiles.z * r[:, :, None]
            if self._type.has_products:
                scatter = torch.bmm(weighted.mT, tiles.z)
            else:
                scatter = (weighted * tiles.z).sum(1)
            parts = torch.stack([r.sum(1), squares[tiles.pairs].sum(1)], 1)
            self._by_component += tiles.by_component(parts).T
            self._sum_x += tiles.by_component(weighted.sum(1))
            self._scatter += tiles.by_component(scatter.flatten(1)).view_as(self._scatter)

    def _tiles(self, X: Tensor, pairs: _Pairs) -> Iterator[_Tiles]:
        """Yield the pairs in tiles, as many at once as memory allows."""
        places = torch.arange(TILE, device=X.device)
        rows = X.T.contiguous()  # gathered by lines; a column of (d, n) lies in d places
        for first in range(0, pairs.n_tiles, self._at_once):
            part = slice(first, first + self._at_once)
            at = pairs.first[part, None] + places
            is_filled = at < pairs.stop[part, None]
            at = torch.where(is_filled, at, pairs.n_pairs)
            of_tiles = pairs.order[at]  # the pair's number; the last one's for an empty place
            k = pairs.tile_of[part]
            z = rows[pairs.padded_rows[of_tiles]].double().sub_(self._densities.means[k][:, None])
            z.masked_fill_(~is_filled[:, :, None], 0.0)
            edges = pairs.edges.clamp(first, first + len(k))
            yield _Tiles(k, of_tiles, z, edges.diff())


@dataclass(frozen=True, slots=True, eq=False)
class _SingleScreen:
    """Logits by a float32 product: where float16 would be too rough, and of variances alone."""

    features: Features
    kind: str
    theta: Tensor

    def __call__(self, X: Tensor) -> Tensor:
        self.features.fill(X)
        return torch.mm(self.features.of[self.kind].T, self.theta)


@dataclass(frozen=True, slots=True, eq=False)
class _Tiles:
    """Tiles of one component each: which, the numbers of their pairs, rows about the mean.

    `lengths` (K,) say how many of them each component has.
    """

    components: Int64[Tensor, " B"]
    pairs: Int64[Tensor, "B T"]
    z: Float64[Tensor, "B T d"]
    lengths: Int64[Tensor, " K"]

    def by_component(self, values: Float64[Tensor, "B v"]) -> Float64[Tensor, "K v"]:
        """Sum the tiles of each component, in their order."""
        sums: Tensor = torch.segment_reduce(values, "sum", lengths=self.lengths, unsafe=True)
        return sums


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Pairs:
    """Pairs of a row and a component, row by row; and their places in tiles of one component each.

    `order` (p + 1,) numbers the pairs component by component, `padded_rows` are their rows and one
    more. Tile t is of component `tile_of[t]` and has the places `first[t]` to `stop[t]` of that
    order, `TILE` at most; a component's tiles are those from `edges[k]` to `edges[k + 1]`. How many
    tiles are needed only the device knows: the last ones may be empty.
    """

    rows: Int64[Tensor, " p"]
    components: Int64[Tensor, " p"]
    order: Int64[Tensor, " q"]
    padded_rows: Int64[Tensor, " q"]
    tile_of: Int64[Tensor, " B"]
    first: Int64[Tensor, " B"]
    stop: Int64[Tensor, " B"]
    edges: Int64[Tensor, " e"]

    @property
    def n_pairs(self) -> int:
        return len(self.rows)

    @property
    def n_tiles(self) -> int:
        return len(self.tile_of)

    @classmethod
    def of(cls, matter: Bool[Tensor, "n K"]) -> _Pairs:
        rows, components = matter.nonzero().T
        n_pairs, k = len(rows), matter.shape[1]
        # 16 bits are sorted in half of the passes over them; there are no more components.
        keys = components.short() if k < 1 << 15 else components
        keys, order = keys.sort(stable=True)
        of_each = torch.arange(k, dtype=keys.dtype, device=keys.device)
        ends = torch.searchsorted(keys, of_each, right=True)
        counts = ends.diff(prepend=ends.new_zeros(1))
        n_tiles = (counts + TILE - 1) // TILE
        tile_ends = n_tiles.cumsum(0)
        tile = torch.arange(n_pairs // TILE + min(k, n_pairs), device=matter.device)
        of_tile = torch.searchsorted(tile_ends, tile, right=True)
        is_used, of_tile = of_tile < k, of_tile.clamp_max(k - 1)
        first = (ends - counts)[of_tile] + (tile - (tile_ends - n_tiles)[of_tile]) * TILE
        stop = torch.minimum(first + TILE, ends[of_tile])
        last = rows.new_full((1,), n_pairs)
        return cls(
            rows=rows,
            components=components,
            order=torch.cat([order, last]),
            padded_rows=torch.cat([rows, rows.new_zeros(1)]),
            tile_of=of_tile,
            first=first,
            stop=torch.where(is_used, stop, first),
            edges=torch.cat([tile_ends.new_zeros(1), tile_ends]),
        )


@contextmanager
def _sums_of_halves_in_float32() -> Iterator[None]:
    """Have no product of halves be added up in halves, whatever this process has set."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_fp16_reduced_precision_reduction = before

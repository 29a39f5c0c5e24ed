"""The features Φ of one chunk of rows, built once for the lanes of all covariance types."""

from __future__ import annotations

import itertools
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import Tensor

from gmm_dist.model.covariance import TYPE_OF
from gmm_dist.model.covariance.features import CONSTANT_ROW, PRODUCT_BLOCK, n_feature_rows

_MAX_VIEWS = 256  # chunk lengths whose views are kept


@dataclass(frozen=True, slots=True, kw_only=True)
class _Views:
    """Φ for one chunk length: each covariance type's rows, and the parts that a fill writes."""

    of: dict[str, Tensor]
    x: Tensor
    ones: Tensor
    squares: Tensor
    norm: Tensor
    products: list[tuple[Tensor, Tensor, Tensor]]


class Features:
    """Φ (P, n), as model/covariance lays it out: a buffer that is filled again for each chunk.

    `of` has each covariance type's rows of it, (P of the type, n).

    A column of Φ is a row's features, a row of Φ one contiguous line, so the products x_i x_j
    are a few multiplications of lines. The views that these write into are made once for each
    chunk length. Only the rows are filled that `kinds` of covariance need.
    """

    def __init__(
        self, d: int, n_max: int, kinds: AbstractSet[str], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.d, self.dtype = d, dtype
        self._kinds = kinds
        rows = [TYPE_OF[kind].rows(d) for kind in kinds]
        last: int = max(part.stop for part in rows)
        self._has_norm = any(part.start < CONSTANT_ROW for part in rows)
        self._has_squares = self._has_norm or last > 2 + d
        self._has_products = last > 2 + 2 * d
        n_rows = n_feature_rows(d) if self._has_products else 2 + 2 * d
        self._buffer = torch.empty(n_rows, n_max, dtype=dtype, device=device).view(-1)
        self._n_rows = n_rows
        self._views: dict[int, _Views] = {}
        self.of: dict[str, Tensor] = {}

    @property
    def empty(self) -> Tensor:
        """No features, of the working precision and on the device: to make buffers like it."""
        return self._buffer[:0]

    def fill(self, X: Tensor) -> None:
        """Make `of` each type's features of a chunk X (d, n)."""
        n = X.shape[1]
        views = self._views.get(n) or self._make_views(n)
        if self.of is not views.of:  # else the ones of the chunk before are still there
            self.of = views.of
            views.ones.fill_(1)
        views.x.copy_(X)
        if self._has_squares:
            torch.mul(views.x, views.x, out=views.squares)
        if self._has_norm:
            torch.sum(views.squares, 0, out=views.norm)
        for left, right, out in views.products:
            torch.mul(left, right, out=out)

    def _make_views(self, n: int) -> _Views:
        if len(self._views) >= _MAX_VIEWS:
            self._views.clear()
        d = self.d
        phi = self._buffer[: self._n_rows * n].view(self._n_rows, n)
        x = phi[2 : 2 + d]
        products = product_cells(x, phi[2 + 2 * d :]) if self._has_products else []
        of = {kind: phi[TYPE_OF[kind].rows(d)] for kind in self._kinds}
        views = _Views(
            of=of,
            x=x,
            ones=phi[CONSTANT_ROW],
            squares=phi[2 + d : 2 + 2 * d],
            norm=phi[0],
            products=products,
        )
        self._views[n] = views
        return views


def product_cells(x: Tensor, out: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the multiplications that fill `out` (Q, n) in the order of `product_pairs`."""
    d, n = x.shape
    multiplications, first = [], 0
    for start in range(0, d - PRODUCT_BLOCK, PRODUCT_BLOCK):
        block, after = x[start : start + PRODUCT_BLOCK], x[start + PRODUCT_BLOCK :]
        last = first + len(block) * len(after)
        cells = out[first:last].view(len(block), len(after), n)
        multiplications.append((block[:, None], after[None], cells))
        first = last
    for a, b in itertools.combinations(range(PRODUCT_BLOCK), 2):
        right = x[b::PRODUCT_BLOCK]
        last = first + len(right)
        multiplications.append((x[a::PRODUCT_BLOCK][: len(right)], right, out[first:last]))
        first = last
    return multiplications

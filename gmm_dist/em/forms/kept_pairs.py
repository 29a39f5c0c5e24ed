"""The pairs of rows and components that a pass has tried, kept with the rows for later passes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from gmm_dist.em.forms.certificate import DEPTHS, Centred, reached
from gmm_dist.em.forms.screening_loops import room
from gmm_dist.em.lane_batch import MARGIN
from gmm_dist.model.density_loops import Array
from gmm_dist.shards.protocol import ShardRows

_FEW, _MANY = 0.01, 0.1  # of the rows
_MOST_MOVED = 0.25  # of the components, before all pairs are found anew
_MOST_BYTES = 1 / 6  # of those of the rows
_MOST_PAIRS = 2.0  # tried for one that matters, beside one for each row
_REST = 3  # passes after which to try again, where pairs were too many


@dataclass(frozen=True, slots=True, eq=False)
class KeptPiece:
    """The pairs of a piece, as `screening_loops` has them, and how deep they go: (L, n), int16.

    A row's go down to a depth of DEPTHS in each lane, or to none: -1. The `rows` are uint16.
    """

    firsts: Array
    rows: Array
    depths: Array

    @classmethod
    def of(cls, firsts: Array, rows: Array, depths: Array) -> KeptPiece:
        """Copy the pairs of a piece of 65,536 rows at most."""
        return cls(firsts, rows[: firsts[-1]].astype(np.uint16), depths)

    @property
    def n_bytes(self) -> int:
        return int(self.firsts.nbytes + self.rows.nbytes + self.depths.nbytes)


@dataclass(frozen=True, slots=True, eq=False)
class KeptPairs:
    """The pairs of a shard, tried with lanes of `sizes` whose components were as `before`.

    Depths are counted from the lanes' highest `peaks` (L,); `counts` (L, G) has how many rows go
    down to each.
    """

    sizes: tuple[int, ...]
    before: Centred
    peaks: Array
    pieces: tuple[KeptPiece, ...]
    counts: Array

    @property
    def n_bytes(self) -> int:
        return sum(piece.n_bytes for piece in self.pieces)


class Memory:
    """What a pass over a shard knows of earlier ones, and leaves to later ones.

    `known` are pairs to try, or None. Those of components that have `moved` (K,) far since are to
    be found anew, to the same depths; `bounds` (L, G) are of those left out of the others. Whether
    the pass `keeps` the pairs that it tries, it has to know before. None are found, nor kept, where
    it cannot screen any.
    """

    def __init__(
        self,
        rows: ShardRows,
        kind: str,
        now: Centred,
        sizes: tuple[int, ...],
        *,
        screens: bool,
    ) -> None:
        self._rows, self._kind, self._now, self._sizes = rows, kind, now, sizes
        found = rows.kept.get(kind, 0)
        self.known: KeptPairs | None = None
        self.moved = torch.zeros(len(now.peaks), dtype=torch.bool)
        self.bounds = np.empty((len(sizes), 0))
        self._rest = found if isinstance(found, int) else 0
        if isinstance(found, KeptPairs) and found.sizes == sizes:
            self._look_at(found, screens=screens)
        self.keeps = screens and self.known is None and self._rest == 0
        self._pieces: list[KeptPiece] = []
        self._n_stale = self._n_mattered = 0

    def note(self, tried: KeptPiece | None, n_stale: int, n_mattered: int) -> None:
        """Take note of a piece: its pairs, if kept, the rows screened, the pairs that mattered."""
        if tried is not None:
            self._pieces.append(tried)
        self._n_stale += n_stale
        self._n_mattered += n_mattered

    def leave(self) -> None:
        """Leave to later passes what they may use."""
        kept = self._rows.kept
        if self.keeps:
            kept[self._kind] = self._worth_keeping() or _REST
        elif self.known is None:
            kept[self._kind] = max(self._rest - 1, 0)
        elif self._n_stale > _MANY * self._rows.n_rows:
            kept[self._kind] = 0
        elif bool(self.moved.any()):
            now = replace(self.known, pieces=tuple(self._pieces))
            kept[self._kind] = now if self._is_small(now) else 0

    def _look_at(self, found: KeptPairs, *, screens: bool) -> None:
        """See which components have moved too far for what is known of them to be of use."""
        lanes = torch.repeat_interleave(torch.arange(len(self._sizes)), torch.tensor(self._sizes))
        peaks, counts = torch.from_numpy(found.peaks), torch.from_numpy(found.counts)
        bounds = reached(found.before, self._now, peaks[lanes])
        # Of most rows the largest logit is what it was.
        edge = peaks[:, None] - room(DEPTHS, MARGIN / 2)
        parts = counts / counts.sum(1, keepdim=True).clamp_min(1)
        moved = ((bounds >= edge[lanes]) * parts[lanes]).sum(1) > _FEW
        if float(moved.sum()) > (_MOST_MOVED * len(moved) if screens else 0):
            return
        self.known, self.moved = found, moved
        if bool(moved.any()):
            self.known = replace(found, before=found.before.renewed(moved, self._now))
            bounds[moved] = peaks[lanes[moved], None] - DEPTHS  # they are found to these depths
        self.bounds = np.stack([part.amax(0).numpy() for part in bounds.split(self._sizes)])

    def _worth_keeping(self) -> KeptPairs | None:
        """Return the pairs of this pass, unless they are many or take too much memory."""
        n_pairs = sum(len(piece.rows) for piece in self._pieces)
        n_rows = self._rows.n_rows * len(self._sizes)
        if n_pairs > _MOST_PAIRS * self._n_mattered + n_rows:
            return None
        counts = np.zeros((len(self._sizes), len(DEPTHS)))
        for piece in self._pieces:
            for of_lane, depths in zip(counts, piece.depths, strict=True):
                of_lane += np.bincount(depths[depths >= 0], minlength=len(DEPTHS))
        peaks = self._now.highest(self._sizes).numpy()
        kept = KeptPairs(self._sizes, self._now, peaks, tuple(self._pieces), counts)
        return kept if self._is_small(kept) else None

    def _is_small(self, kept: KeptPairs) -> bool:
        """Say whether pairs and those of other layouts take but a part of the rows' memory."""
        # A copy: another thread may add a layout of its own.
        kept_now = list(self._rows.kept.items())
        others = (other for kind, other in kept_now if kind != self._kind)
        size = kept.n_bytes + sum(o.n_bytes for o in others if isinstance(o, KeptPairs))
        return size <= _MOST_BYTES * sum(block.X.nbytes for block in self._rows.blocks)

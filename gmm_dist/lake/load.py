"""Load a lake's rows into memory: centred in float64, then cast, in column-major blocks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gmm_dist.lake import read
from gmm_dist.lake.plan import Plan
from gmm_dist.lake.probe import probe as some_rows
from gmm_dist.lake.read import RowCounts
from gmm_dist.shards.protocol import Block, ShardRows, Shards

# float32 rounds a value by 6e-8 of its distance from the centre: harmless below a thousandth
# of the spread around it.
_MAX_DISTANCE_IN_SPREADS = 1e-3 / 2.0**-24
_SMALL_BYTES = 1 << 30  # up to here float64 rows are kept as they are: it costs nothing
_WINDOW = 0.05  # the share of rows that a cluster worth keeping exact holds


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LakeLoader:
    """Make a shard's rows from the lake: the same bits on every machine and every time.

    `centre` (d,) is subtracted in float64 before the cast to `dtype`; `fill` (d,) replaces
    missing values under missing="mean" (without it they stay NaN). Held-out rows go beside the
    others, where only a `HeldOut` task sees them.
    """

    plan: Plan
    centre: npt.NDArray[np.float64]
    dtype: torch.dtype
    fill: npt.NDArray[np.float64] | None = None

    def part(self, shards: range) -> LakeLoader:
        """Return the loader of some shards, which knows their files alone."""
        return replace(self, plan=self.plan.part(shards))

    def __call__(self, shard: int) -> ShardRows:
        fitted, held_out, counts = _Parts(), _Parts(), RowCounts()
        for rows in read.read(self.plan, shard, fill=self.fill):
            counts = counts + rows.counts
            centred = rows.X.T - self.centre[:, None]  # float64, whatever the source
            X = torch.from_numpy(centred).to(self.dtype)
            weight = None if rows.sample_weight is None else torch.from_numpy(rows.sample_weight)
            if rows.held_out is None:
                fitted.add(X, weight)
            else:
                held = torch.from_numpy(rows.held_out)
                fitted.add(*_those(~held, X, weight))
                held_out.add(*_those(held, X, weight))
        return ShardRows(
            shard=shard, blocks=fitted.blocks(), counts=counts, held_out=held_out.blocks()
        )


@dataclass(frozen=True, slots=True)
class _Parts:
    """Collect rows (d, n) and their weights, to be one block."""

    X: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def add(self, X: Tensor, weight: Tensor | None) -> None:
        self.X.append(X)
        if weight is not None:
            self.weights.append(weight)

    def blocks(self) -> list[Block]:
        if not self.X:
            return []
        return [Block(torch.cat(self.X, 1), torch.cat(self.weights) if self.weights else None)]


def _those(mask: Tensor, X: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return X[:, mask], None if weight is None else weight[mask]


@dataclass(frozen=True, slots=True)
class Counted:
    """How many rows are to be fitted, and what reading them counted."""

    n_rows: int
    counts: RowCounts

    def __add__(self, other: Counted) -> Counted:
        return Counted(self.n_rows + other.n_rows, self.counts + other.counts)


def count_rows(rows: ShardRows) -> Counted:
    """Count a shard's rows: the first task after loading, which ends the reading."""
    read.release()
    counts = rows.counts if isinstance(rows.counts, RowCounts) else RowCounts()
    return Counted(rows.n_rows, counts)


@dataclass(frozen=True, slots=True, eq=False)
class ColumnSums:
    """Sums (d,) and counts (d,) of the values that are there, of rows with holes."""

    sums: Tensor
    counts: Tensor

    def __add__(self, other: ColumnSums) -> ColumnSums:
        return ColumnSums(self.sums + other.sums, self.counts + other.counts)


@dataclass(frozen=True, slots=True)
class SumColumns:
    """The task that sums what is there of each column; weights play no part."""

    n_features: int

    def __call__(self, rows: ShardRows) -> ColumnSums:
        zeros = torch.zeros(self.n_features, dtype=torch.float64)
        total = ColumnSums(zeros, zeros)
        for block in rows.blocks:
            x = block.X.double()
            present = (~x.isnan()).sum(1).double()
            total = total + ColumnSums(x.nansum(1).cpu(), present.cpu())
        return total


def column_means(shards: Shards, loader: LakeLoader) -> npt.NDArray[np.float64]:
    """Return the mean (d,) of the values that are there, in feature units; the centre for none.

    Held-out rows play no part: what is imputed into other rows must not depend on them.
    """
    total = shards.run(SumColumns(loader.plan.n_features))
    means: npt.NDArray[np.float64] = (total.sums / total.counts.clamp_min(1)).numpy()
    return loader.centre + means


def loader_for(plan: Plan) -> LakeLoader:
    """Choose the centre and the resident precision from a few rows spread over the plan."""
    probe = some_rows(plan)
    # The median, not the mean: one outlier must not move the centre away from the rows.
    centre = np.median(probe, axis=0) if len(probe) else np.zeros(plan.n_features)
    small = 8 * plan.n_rows * plan.n_features <= _SMALL_BYTES
    matters = small or _rounding_matters(np.abs(probe - centre), probe)
    exact = plan.float64_source and matters
    return LakeLoader(plan=plan, centre=centre, dtype=torch.float64 if exact else torch.float32)


def _rounding_matters(distance: npt.NDArray[np.float64], probe: npt.NDArray[np.float64]) -> bool:
    """Say whether values lie too far from the centre for the spread they have among themselves.

    The spread of a column is the width of the narrowest window that holds a twentieth of the
    rows and is not a single repeated value.
    """
    if len(probe) < 2:
        return False
    step = max(1, int(_WINDOW * len(probe)))
    ordered = np.sort(probe, axis=0)
    widths = ordered[step:] - ordered[:-step]
    spread = np.where(widths > 0, widths, np.inf).min(axis=0)
    far = np.quantile(distance, 0.99, axis=0)
    return bool((far > spread * _MAX_DISTANCE_IN_SPREADS).any())

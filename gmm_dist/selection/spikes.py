"""Features that no Gaussian fits: values that many rows share, seen on a sample of the rows.

If half of a column is exactly 0, or values above a bound were set to it, a component on these
rows is as narrow as regularisation allows. Such a component reflects the data, so it does not
make a fit degenerate (`em.degenerate`), but readers should know of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.em.statistics import Spike
from gmm_dist.shards.protocol import ShardRows, Shards
from gmm_dist.streams import Stream, keyed_generator

_ROWS, _VALUES = 8192, 1 << 22  # of the sample, at the most
_SHARE, _COUNT = 0.05, 10  # of the sample's rows, at least, that share a value
_ALONE = 4.0  # times as many rows as any value that is no spike
_MOST = 3  # spikes of one feature
_REPEATS = 10  # rows for each different value: a rounded column


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """A feature of few different values; `value`, about the centre, is the most frequent."""

    feature: int
    n_values: int
    value: float
    share: float


@dataclass(frozen=True, slots=True)
class Dwarfed:
    """A feature with values so far out that `reg_covar` exceeds the spread of half of the rows.

    `width` is that of the middle half, `farthest` the value farthest out, about the centre.
    """

    feature: int
    width: float
    farthest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The features by a sample; `vanishing` ones have squares too small for float64."""

    spikes: tuple[Spike, ...] = ()
    rounded: tuple[Rounded, ...] = ()
    dwarfed: tuple[Dwarfed, ...] = ()
    vanishing: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class _Drawn:
    X: Float64[Tensor, "m d"]

    def __add__(self, other: _Drawn) -> _Drawn:
        return _Drawn(torch.cat([self.X, other.X]))


@dataclass(frozen=True, slots=True)
class _Draw:
    """The task that draws up to `size` rows of positive weight from a shard, uniformly."""

    size: int
    n_features: int

    def __call__(self, rows: ShardRows) -> _Drawn:
        # Not by the user's seed: it is the rows that readers are told of.
        generator = keyed_generator(Stream.PROFILE, 0, rows.shard)
        parts = [torch.empty(0, self.n_features, dtype=torch.float64)]
        n = sum(int((block.weights > 0).sum()) for block in rows.blocks)
        for block in rows.blocks:
            present = (block.weights > 0).nonzero()[:, 0].cpu()
            share = math.ceil(self.size * len(present) / n) if n > self.size else len(present)
            chosen = present[torch.randperm(len(present), generator=generator)[:share]]
            parts.append(block.X[:, chosen.to(block.X.device)].T.double().cpu())
        return _Drawn(torch.cat(parts))


def profile(shards: Shards, n_features: int, reg: Float64[Tensor, " d"]) -> Profile:
    """Profile a sample of the rows; `reg` (squared feature units) is added to the variances."""
    n_rows = min(_ROWS, max(1, _VALUES // n_features))
    size = math.ceil(n_rows / shards.n_shards)
    return profile_of(shards.run(_Draw(size, n_features)).X, reg)


def profile_of(X: Float64[Tensor, "m d"], reg: Float64[Tensor, " d"]) -> Profile:
    """Return the profile of rows (m, d)."""
    m = len(X)
    if m < 2 * _COUNT:
        return Profile(vanishing=_vanishing(X))
    ordered = X.T.contiguous().sort(1).values
    n_values = (ordered[:, 1:] != ordered[:, :-1]).sum(1) + 1
    many = max(_COUNT, math.ceil(_SHARE * m))
    crowded = (ordered[:, many - 1 :] == ordered[:, : m - many + 1]).any(1) & (n_values > 1)
    spikes, rounded = [], []
    for j in (crowded | (_REPEATS * n_values <= m)).nonzero().flatten().tolist():
        if n_values[j] == 1:
            continue
        values, counts = ordered[j].unique_consecutive(return_counts=True)
        feature_spikes = _spikes(j, values, counts, many)
        spikes += feature_spikes
        if not feature_spikes and _REPEATS * len(values) <= m:
            top = int(counts.argmax())
            share = float(counts[top]) / m
            rounded.append(
                Rounded(feature=j, n_values=len(values), value=float(values[top]), share=share)
            )
    with_spikes = {spike.feature for spike in spikes}
    dwarfed = [each for each in _dwarfed(ordered, reg) if each.feature not in with_spikes]
    return Profile(
        spikes=tuple(spikes),
        rounded=tuple(rounded),
        dwarfed=tuple(dwarfed),
        vanishing=_vanishing(X),
    )


def _spikes(feature: int, values: Tensor, counts: Tensor, many: int) -> list[Spike]:
    """Return the values with many rows each, many times those of any other value."""
    order = counts.argsort(descending=True, stable=True)
    most = counts[order].tolist()
    most.append(0)
    total = float(counts.sum())
    for n in range(min(_MOST, len(order)), 0, -1):
        if most[n - 1] >= max(many, _ALONE * most[n]):
            return [
                Spike(feature, float(values[place]), float(counts[place]) / total)
                for place in order[:n].tolist()
            ]
    return []


def _dwarfed(ordered: Float64[Tensor, "d m"], reg: Float64[Tensor, " d"]) -> list[Dwarfed]:
    m = ordered.shape[1]
    width = ordered[:, (3 * m) // 4] - ordered[:, m // 4]
    ends = ordered[:, [0, m - 1]]
    # The middle half of a Gaussian is 1.35 standard deviations wide.
    drowned = (width > 0) & ((width / 1.35).square() < reg)
    return [
        Dwarfed(j, float(width[j]), float(ends[j][int(ends[j].abs().argmax())]))
        for j in drowned.nonzero().flatten().tolist()
    ]


def _vanishing(X: Float64[Tensor, "m d"]) -> tuple[int, ...]:
    largest = X.abs().amax(0) if len(X) else X.new_zeros(X.shape[1])
    # Squares of smaller values lose digits, or are 0.
    lost = (largest > 0) & (largest < 1e-140)
    return tuple(int(j) for j in lost.nonzero().flatten())

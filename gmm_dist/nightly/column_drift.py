"""Measure whether whole columns have changed since last night, as when a unit changes.

At a row x, tonight's density q differs from last night's density p by

    r(x) = ln q(x) - ln((1 - ε) p(x) + ε q(x)),    ε = 0.01,

whose mean over tonight's rows, the divergence D in nats per row, is Lee's skew divergence of q and
p: 0 where they are equal, and at most ln 100 = 4.6 however strange a row is to p. So a cluster
that is born adds its share of the rows times 4.6, and where it lies does not matter.

A column in another unit moves *all* clusters by one map, x → s x + t. With the map undone, D is
only what other changes leave. No such map undoes a birth, a death or a split: it would misplace
the clusters that stayed. Hence

    column drift = D - min D'    over p with columns in other units,

the nats per row that changes of whole columns explain; no units of the features change it. The
maps tried are those that the columns' means and standard deviations suggest, for each of the
columns that changed most and for many at once, and columns that are negated or swapped; the best
one of a single column is refined. Where more than half of tonight's rows are strangers to p
(r > ln 10), too little has stayed to tell a birth from a bug, and the drift is D itself.

A shift of every cluster by t standard deviations gives t² / 2 nats, and s times their spread about
the same means (s² - 1) / 2 - ln s, of which ε takes a tenth or so (more where r is large).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from scipy.optimize import minimize
from torch import Tensor

from gmm_dist.em.statistics import TotalMoments
from gmm_dist.model.mixture import Mixture
from gmm_dist.model.parameters import Parameters
from gmm_dist.selection.coreset import DrawCoreset
from gmm_dist.streams import Stream

_EPSILON = 0.01
_STRANGE = math.log(1 / _EPSILON) / 2
_MOST_CHANGED = 8  # columns of which each alone, and each pair, may have changed
_REFINEMENTS = 60  # evaluations of D
_SLIGHT = 0.02  # nats per row: due to chance, and too few to prefer many columns to one
_MOST_ROWS, _FEWEST_ROWS, _WORK = 4096, 256, 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnDrift:
    """How much of the difference to last night's model changes of whole columns explain.

    `drift` and `divergence` are in nats per row, see the module; `strangers` is the share of
    tonight's rows that last night's model finds strange. `columns` are those whose change explains
    most, and `change` says which it was; both are empty where none explains anything.
    """

    drift: float
    divergence: float
    strangers: float
    columns: tuple[str, ...]
    change: str


def draw_rows(before: Parameters, total: TotalMoments, random_state: int) -> DrawCoreset:
    """Return the task that draws the rows to measure on, `total` all of tonight's."""
    return DrawCoreset.of(total, sample_size(before), Stream.NIGHT, random_state)


def sample_size(mixture: Parameters) -> int:
    """Return how many rows to measure on: fewer where each takes long."""
    k, d = mixture.means.shape
    squares = d * d if mixture.type.has_products else d
    return max(_FEWEST_ROWS, min(_MOST_ROWS, _WORK // (k * squares)))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Change:
    """Columns that were mapped: tonight's x is `scales` times last night's, plus `shifts`.

    Before that, `columns` stand in the places of `sources` (the same, unless swapped).
    """

    columns: tuple[int, ...]
    sources: tuple[int, ...]
    scales: Float64[Tensor, " m"]
    shifts: Float64[Tensor, " m"]

    def undone(self, X: Float64[Tensor, "n d"]) -> Float64[Tensor, "n d"]:
        restored = X.clone()
        restored[:, list(self.columns)] = (X[:, list(self.sources)] - self.shifts) / self.scales
        return restored

    @property
    def log_volume(self) -> float:
        return float(self.scales.abs().log().sum())

    def spelt(self, names: Sequence[str]) -> str:
        if self.columns != self.sources:
            return f"{names[self.columns[0]]!r} and {names[self.columns[1]]!r} are swapped"
        if len(self.columns) > 1:
            return f"{len(self.columns)} columns have other means and spreads"
        scale, shift = float(self.scales[0]), float(self.shifts[0])
        return f"{names[self.columns[0]]!r} is {scale:.4g} times what it was, {shift:+.4g}"


def column_drift(
    before: Parameters,
    tonight: Parameters,
    X: Float64[Tensor, "n d"],
    sample_weight: Float64[Tensor, " n"],
    feature_names: Sequence[str],
) -> ColumnDrift:
    """Measure whether columns have changed as a whole, on rows of tonight.

    Takes some 150 times the densities of `X` under `before`.

    Args:
        before: Last night's mixture, in feature units.
        tonight: Tonight's mixture, in feature units.
        X: Rows of tonight (n, d), in feature units.
        sample_weight: How many rows each of them stands for (n,).
        feature_names: Names of the features.
    """
    measure = _Measure(
        before=Mixture(parameters=before),
        log_tonight=Mixture(parameters=tonight).score_samples(X),
        X=X,
        sample_weight=sample_weight,
    )
    ratios = measure.ratios(X)
    divergence = measure.mean(ratios)
    strangers = measure.mean((ratios > _STRANGE).double())
    left, best_change = _best(measure, before, tonight)
    explained = max(divergence - left, 0.0)
    drift = divergence if strangers > 0.5 else explained
    if explained <= _SLIGHT:
        return ColumnDrift(
            drift=drift, divergence=divergence, strangers=strangers, columns=(), change=""
        )
    columns = tuple(feature_names[j] for j in best_change.columns)
    return ColumnDrift(
        drift=drift,
        divergence=divergence,
        strangers=strangers,
        columns=columns,
        change=best_change.spelt(feature_names),
    )


def _best(measure: _Measure, before: Parameters, tonight: Parameters) -> tuple[float, _Change]:
    """Return the divergence that is left, and the change that explains most: of one, if close."""
    tried = [(measure.divergence(change), change) for change in _changes(before, tonight)]
    left, best_change = min(tried, key=lambda pair: pair[0])
    alone = min((pair for pair in tried if len(pair[1].columns) == 1), key=lambda pair: pair[0])
    refined = _refined(measure, alone[1], before)
    alone = min(alone, (measure.divergence(refined), refined), key=lambda pair: pair[0])
    return alone if alone[0] < left + _SLIGHT else (left, best_change)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Measure:
    """Computes divergences from last night's mixture, with or without a change undone."""

    before: Mixture
    log_tonight: Float64[Tensor, " n"]
    X: Float64[Tensor, "n d"]
    sample_weight: Float64[Tensor, " n"]

    def divergence(self, change: _Change) -> float:
        return self.mean(self.ratios(change.undone(self.X), change.log_volume))

    def ratios(self, X: Float64[Tensor, "n d"], log_volume: float = 0.0) -> Float64[Tensor, " n"]:
        log_before = self.before.score_samples(X) - log_volume
        # The difference alone: either may be far below what exp can hold.
        difference = (log_before - self.log_tonight).nan_to_num(nan=-math.inf)
        mixed = torch.logaddexp(
            difference + math.log1p(-_EPSILON), torch.full_like(difference, math.log(_EPSILON))
        )
        return -mixed

    def mean(self, values: Float64[Tensor, " n"]) -> float:
        return float(values @ self.sample_weight / self.sample_weight.sum())


def _changes(before: Parameters, tonight: Parameters) -> Iterator[_Change]:
    """Yield the changes that the two nights' means and standard deviations suggest."""
    (mean, spread), (mean_now, spread_now) = _moments(before), _moments(tonight)
    scale = (spread_now / spread).clamp(1e-150, 1e150)
    change = (scale.square() - 1 + ((mean_now - mean) / spread).square()) / 2 - scale.log()
    order = change.argsort(descending=True, stable=True).tolist()
    none = torch.ones_like(scale)
    maps = [
        (scale, mean_now - scale * mean),
        (none, mean_now - mean),
        (scale, torch.zeros_like(mean)),
        (torch.where(mean * mean_now > 0, mean_now / mean, none), torch.zeros_like(mean)),
        (-none, torch.zeros_like(mean)),
    ]
    first = order[:_MOST_CHANGED]
    sizes = [2**i for i in range(1, len(order).bit_length()) if 2**i < len(order)]
    together = [order[:size] for size in dict.fromkeys((*sizes, len(order))) if size > 1]
    for columns in (*([j] for j in first), *together):
        at = tuple(columns)
        for scales, shifts in maps:
            yield _Change(columns=at, sources=at, scales=scales[columns], shifts=shifts[columns])
    for one, other in itertools.combinations(first, 2):
        yield _Change(
            columns=(one, other),
            sources=(other, one),
            scales=none[:2],
            shifts=torch.zeros_like(none[:2]),
        )


def _refined(measure: _Measure, change: _Change, before: Parameters) -> _Change:
    """Return the best change of the same column that is found nearby."""
    (spread,) = _moments(before)[1][list(change.columns)].tolist()
    scale, shift = float(change.scales[0]), float(change.shifts[0])

    def at(point: list[float]) -> _Change:
        scales = change.scales.new_tensor([scale * math.exp(max(-50.0, min(50.0, point[0])))])
        shifts = change.shifts.new_tensor([shift + spread * point[1]])
        return _Change(columns=change.columns, sources=change.sources, scales=scales, shifts=shifts)

    start = [[0.0, 0.0], [0.1, 0.0], [0.0, 0.2]]
    options = {"maxfev": _REFINEMENTS, "initial_simplex": start}
    optimum = minimize(
        lambda point: measure.divergence(at(point.tolist())),
        start[0],
        method="Nelder-Mead",
        options=options,
    )
    return at(optimum.x.tolist())


def _moments(mixture: Parameters) -> tuple[Float64[Tensor, " d"], Float64[Tensor, " d"]]:
    """Return the mean and the standard deviation of each feature over all components."""
    mean = mixture.weights @ mixture.means
    within = mixture.weights @ mixture.variances()
    between = mixture.weights @ (mixture.means - mean).square()
    return mean, (within + between).clamp_min(1e-300).sqrt()

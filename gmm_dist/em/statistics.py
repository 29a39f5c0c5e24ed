"""Sufficient statistics of a pass over the rows, and their sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.config import COMPILE_FROM
from gmm_dist.devices import to_host

_FEW = 0.1  # of the rows: weights that sum to less do not count them
_MANY = 1e290  # more are no counts, and their products with log-densities no numbers
CONSTANT = 1e-13
"""Of a feature's second moment: a variance below it is rounding, the feature has one value."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SufficientStatistics:
    """All that the M-step needs to know about a set of rows, for a stack of lanes.

    The lanes (one mixture each) are of one covariance type; their components stand one after
    another. A commutative monoid: `+` merges the statistics of disjoint sets of rows, so shards
    may be reduced in any order (equal up to float64 rounding; the plan's fixed tree makes a fit
    reproducible).

    - `moments` (P, K): the sums over rows of w_n r_nk φ(x_n), P features of the covariance
      type (see `families`), K components of all lanes;
    - `log_likelihood` (L,): sums of w_n log p(x_n), nats, one per lane;
    - `entropy` (L,): sums of -w_n Σ_k r_nk ln r_nk, nats; measured by float64 lanes, else 0;
    - `float32_error` (L,): sums of w_n (log p in float32 - log p in float64) over the checked rows,
      `float32_squares` (L,) of the squares of these terms; 0 where a pass checks none;
    - `survivors` (L,): sums of w times the number of components that matter to the row
      (`centred_form.cut`), over all rows in centred passes, over the checked rows in others;
    - `squares` (K,): the sums of w_n² r_nk, of which Kish's number of rows is made
      (`effective_rows`); without weights those of r_nk.
    """

    moments: Float64[Tensor, "P K"]
    log_likelihood: Float64[Tensor, " L"]
    entropy: Float64[Tensor, " L"]
    float32_error: Float64[Tensor, " L"]
    float32_squares: Float64[Tensor, " L"]
    squares: Float64[Tensor, " K"]
    survivors: Float64[Tensor, " L"]

    def __add__(self, other: SufficientStatistics) -> SufficientStatistics:
        return SufficientStatistics(
            moments=self.moments + other.moments,
            log_likelihood=self.log_likelihood + other.log_likelihood,
            entropy=self.entropy + other.entropy,
            float32_error=self.float32_error + other.float32_error,
            float32_squares=self.float32_squares + other.float32_squares,
            squares=self.squares + other.squares,
            survivors=self.survivors + other.survivors,
        )

    def __reduce__(self) -> tuple[Callable[..., SufficientStatistics], tuple[dict[str, Any]]]:
        # As arrays, which travel without a copy where the pickler takes buffers out of band
        # (Ray does): a tensor would be written out byte by byte, 69 MB at K = 1024, d = 128.
        arrays = {field.name: getattr(self, field.name).numpy() for field in fields(self)}
        return _revived, (arrays,)


def _revived(arrays: Mapping[str, object]) -> SufficientStatistics:
    return SufficientStatistics(**{name: torch.tensor(array) for name, array in arrays.items()})


def effective_rows(
    nk: Float64[Tensor, " k"], squares: Float64[Tensor, " k"]
) -> Float64[Tensor, " k"]:
    """Return how many rows of equal weight tell as much: (Σ w r)² / Σ w² r (Kish 1965).

    It is `nk` without weights, and whatever all weights are multiplied by.
    """
    return torch.where(squares > 0, nk / squares * nk, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class PassStatistics:
    """What one pass over the rows brings back: statistics per group of lanes, and row counts.

    `n_samples` is the sum of the sample weights (the number of rows without weights);
    `checked_weight` is that of the rows whose float32 log-density was held against float64.
    """

    groups: tuple[SufficientStatistics, ...]
    n_samples: float
    checked_weight: float

    def __add__(self, other: PassStatistics) -> PassStatistics:
        pairs = zip(self.groups, other.groups, strict=True)
        return PassStatistics(
            tuple(mine + theirs for mine, theirs in pairs),
            self.n_samples + other.n_samples,
            self.checked_weight + other.checked_weight,
        )

    def landed(self, *, stay: Sequence[bool] = ()) -> PassStatistics:
        """Return them on the host; moments `stay` where they are for the groups that say so."""
        groups = []
        stay = stay or [False] * len(self.groups)
        tensors = [
            getattr(group, part.name)
            for group, stays in zip(self.groups, stay, strict=True)
            for part in fields(group)
            if not (stays and part.name == "moments")
        ]
        here = iter(to_host(tensors))
        for group, stays in zip(self.groups, stay, strict=True):
            moments = {"moments": group.moments} if stays else {}
            rest = {part.name: next(here) for part in fields(group) if part.name not in moments}
            groups.append(SufficientStatistics(**moments, **rest))
        return PassStatistics(tuple(groups), self.n_samples, self.checked_weight)


@dataclass(frozen=True, slots=True)
class Spike:
    """A value of a feature, about the centre, that a `share` of the rows have to the digit."""

    feature: int
    value: float
    share: float


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TotalMoments:
    """Moments of all rows together, about the shared centre: a constant of the data.

    `n_samples` is the sum of the weights, `sum_x` (d,) and `sum_xx` (d, d) the weighted sums of
    x and x xᵀ; where all covariances are diagonal and rows wide, `sum_xx` (d,) is the diagonal
    alone. `n_rows` counts rows of positive weight. `sum_ww` sums the squared weights, and
    `max_weight` is the largest; 0 where that is not known. `spikes` are known of all rows only
    (`spikes`): a sum has none. `compiles` says whether all who hold rows can take compiled loops,
    and `float64_price` how much longer than in float32 products take in float64, on the GPU of
    whoever it takes longest; 0 on CPUs.
    """

    n_samples: float
    n_rows: int
    sum_x: Float64[Tensor, " d"]
    sum_xx: Float64[Tensor, ...]
    sum_ww: float = 0.0
    max_weight: float = 0.0
    spikes: tuple[Spike, ...] = ()
    compiles: bool = False
    float64_price: float = 0.0

    def __add__(self, other: TotalMoments) -> TotalMoments:
        return TotalMoments(
            n_samples=self.n_samples + other.n_samples,
            n_rows=self.n_rows + other.n_rows,
            sum_x=self.sum_x + other.sum_x,
            sum_xx=self.sum_xx + other.sum_xx,
            sum_ww=self.sum_ww + other.sum_ww,
            max_weight=max(self.max_weight, other.max_weight),
            compiles=self.compiles and other.compiles,
            float64_price=max(self.float64_price, other.float64_price),
        )

    def loops_pay(self, compile_from: int = COMPILE_FROM) -> bool:
        """Say whether passes over these rows may take compiled loops, and win back their load."""
        return self.compiles and self.n_rows >= compile_from

    @property
    def n_effective(self) -> float:
        """How many rows of equal weight tell as much: (Σ w)² / Σ w² (Kish 1965)."""
        if self.sum_ww == 0:
            return float(self.n_rows)
        return self.n_samples / self.sum_ww * self.n_samples

    @property
    def mean(self) -> Float64[Tensor, " d"]:
        return self.sum_x / self.n_samples

    @property
    def is_whole(self) -> bool:
        """Whether products of two features are known."""
        return self.sum_xx.ndim == 2

    @property
    def second(self) -> Float64[Tensor, " d"]:
        """The mean square of each feature, about the centre."""
        return (self.sum_xx.diagonal() if self.is_whole else self.sum_xx) / self.n_samples

    @property
    def variances(self) -> Float64[Tensor, " d"]:
        return self.second - self.mean.square()

    @property
    def covariance(self) -> Float64[Tensor, "d d"]:
        return self.sum_xx / self.n_samples - self.mean[:, None] * self.mean

    def overflowing_features(self) -> tuple[int, ...]:
        """Return the features whose squares float64 does not hold, or hardly."""
        return tuple(int(j) for j in (~(self.second < 1e280)).nonzero().flatten())

    @property
    def scale(self) -> Float64[Tensor, " d"]:
        """The spread of each feature over all rows; of the widest, where a feature has none."""
        variances = self.variances.clamp_min(0)
        variances[list(self.constant_features())] = variances.max()
        return torch.where(variances > 0, variances, 1.0).sqrt()

    def constant_features(self) -> tuple[int, ...]:
        """Return the features that have one value in all rows, up to rounding."""
        flat = self.variances <= CONSTANT * self.second
        return tuple(int(j) for j in flat.nonzero().flatten())

    def dependent_features(self) -> int:
        """Return how many of the features that vary are linear functions of the others."""
        varying = [j for j in range(len(self.sum_x)) if j not in self.constant_features()]
        covariance = self.covariance[varying][:, varying]
        scale = covariance.diagonal().sqrt()
        correlation = covariance / (scale[:, None] * scale)
        return int((torch.linalg.eigvalsh(correlation) < 1e-10).sum())


def criterion_size(total: TotalMoments, scale: float) -> float:
    """Return the n of the criteria: Σ w, or Kish's number of rows where that is far below.

    `total` are moments of rows that weigh `scale` times what was given. Where the given weights
    sum to less than a tenth of the rows, or to more than float64 can count with, they are no
    counts; then n = (Σ w)² / Σ w².
    """
    weight = given_weight(total, scale)
    return weight if counts_rows(weight, total.n_rows) else total.n_effective


def given_weight(total: TotalMoments, scale: float) -> float:
    """Return the sum of the weights as they were given, inf where float64 does not hold it."""
    return total.n_samples / scale


def counts_rows(weight: float, n_rows: int) -> bool:
    """Say whether the sum of the weights can be a number of rows."""
    return _FEW * n_rows <= weight <= _MANY


def as_given(total: TotalMoments, scale: float) -> TotalMoments:
    """Return the moments of rows as they were given, before they weighed `scale` times as much.

    Where float64 would not hold these, the moments stay in the unit that they are in.
    """
    weight = given_weight(total, scale)
    if weight > _MANY:
        return total
    return replace(
        total,
        n_samples=weight,
        sum_x=total.sum_x / scale,
        sum_xx=total.sum_xx / scale,
        sum_ww=total.sum_ww / scale / scale,
        max_weight=total.max_weight / scale,
    )

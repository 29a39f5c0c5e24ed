"""Passes that only score rows: log-likelihoods of held-out rows, the spread of log-densities.

The spread is counted exactly, on a grid that the mixture alone decides.

A mixture's density nowhere exceeds `top`, the sum of its components' peaks:

    p(x) = Σ w_k N(x; k) <= Σ w_k N(μ_k; k)

so the gap `top - log p(x)` of a row is never negative, and the edges of the bins are gaps

    s sinh(i δ), i = 0, 1, ..., with s = 16 nats and δ = 1/1024

which needs no pass to find them, and serves any rows. At a gap g the bins are
√(s² + g²) δ nats wide: 0.016 at the top, 0.02 where most rows of 16 features lie, and a thousandth
of the gap far out, down to 1e9 nats below the top. Within a bin rows are taken to lie evenly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.em.statistics import TotalMoments, criterion_size
from gmm_dist.model.densities import Densities
from gmm_dist.model.parameters import Parameters
from gmm_dist.model.quantiles import LEVELS, Quantiles
from gmm_dist.shards.protocol import HeldOut, ShardRows, Shards
from gmm_dist.shards.reweighted import unit_of

_SCALE, _STEP = 16.0, 1 / 1024
_LAST_GAP = 1e9
_N_BINS = math.ceil(math.asinh(_LAST_GAP / _SCALE) / _STEP) + 1  # the last one has no end


@dataclass(frozen=True, slots=True, eq=False)
class LogLikelihoods:
    """Sums of w log p (L,), nats, one per mixture, and of the weights w."""

    sums: Float64[Tensor, " L"]
    n_samples: float

    def __add__(self, other: LogLikelihoods) -> LogLikelihoods:
        return LogLikelihoods(self.sums + other.sums, self.n_samples + other.n_samples)


def _log_norms(
    rows: ShardRows, densities: Sequence[Densities]
) -> Iterator[tuple[Float64[Tensor, " b"], Float64[Tensor, "L b"]]]:
    """Yield the weights of a chunk's rows, and their log-density under each mixture."""
    for chunk in rows.chunks(max(density.width for density in densities)):
        x = chunk.X.double()
        yield chunk.weights, torch.stack([density(x).logsumexp(0) for density in densities])


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """The task that sums the rows' log-likelihood under each mixture.

    In the centred form, which is right for any mixture of positive definite covariances, and
    without the moments; `compiled`, by loops where these suit. Peak memory beside the rows: the
    log-densities (k, b) of a chunk of b rows under one mixture.
    """

    mixtures: tuple[Parameters, ...]
    compiled: bool = False

    def __call__(self, rows: ShardRows) -> LogLikelihoods:
        densities = [Densities.of(m, rows.device, compiled=self.compiled) for m in self.mixtures]
        sums = torch.zeros(len(densities), dtype=torch.float64, device=rows.device)
        n_samples = torch.zeros((), dtype=torch.float64, device=rows.device)
        for weight, log_norm in _log_norms(rows, densities):
            sums += log_norm @ weight
            n_samples += weight.sum()
        return LogLikelihoods(sums.cpu(), float(n_samples))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSums:
    """Sums over rows under one mixture, of which its score and criteria are made; a Summary.

    `log_likelihood` sums w log p and `entropy` -w Σ_k r_k ln r_k, nats; `n_samples` sums w,
    `sum_ww` w²; `n_rows` counts rows. All w are the weights times `unit`, a power of two by which
    the largest is from 1 to 2: weights of any unit stay within float64's range.
    """

    log_likelihood: float
    entropy: float
    n_samples: float
    sum_ww: float
    n_rows: int
    unit: float

    def __add__(self, other: ScoreSums) -> ScoreSums:
        one, two = self._in(other), other._in(self)
        return ScoreSums(
            log_likelihood=one.log_likelihood + two.log_likelihood,
            entropy=one.entropy + two.entropy,
            n_samples=one.n_samples + two.n_samples,
            sum_ww=one.sum_ww + two.sum_ww,
            n_rows=one.n_rows + two.n_rows,
            unit=two.unit if one.n_rows == 0 else one.unit,
        )

    def _in(self, other: ScoreSums) -> ScoreSums:
        """Return the sums in the unit of the larger weights of the two."""
        if self.n_rows == 0 or other.n_rows == 0 or self.unit <= other.unit:
            return self
        by = other.unit / self.unit
        return ScoreSums(
            log_likelihood=self.log_likelihood * by,
            entropy=self.entropy * by,
            n_samples=self.n_samples * by,
            sum_ww=self.sum_ww * by * by,
            n_rows=self.n_rows,
            unit=other.unit,
        )

    @property
    def criterion_size(self) -> float:
        """The n of the criteria: Σ w as given, or Kish's number of rows (`criterion_size`)."""
        empty = torch.zeros(0, dtype=torch.float64)
        moments = TotalMoments(
            n_samples=self.n_samples,
            n_rows=self.n_rows,
            sum_x=empty,
            sum_xx=empty,
            sum_ww=self.sum_ww,
        )
        return criterion_size(moments, self.unit)


@dataclass(frozen=True, slots=True, eq=False)
class SumScores:
    """The task that scores the rows under one mixture, in float64 and the centred form.

    Peak memory beside the rows: log-densities and responsibilities (k, b) of a chunk of b rows.
    """

    mixture: Parameters

    def __call__(self, rows: ShardRows) -> ScoreSums:
        density = Densities.of(self.mixture, rows.device)
        weights = [block.weights for block in rows.blocks if block.X.shape[1]]
        unit = unit_of(max((float(w.max()) for w in weights), default=1.0))
        sums = torch.zeros(4, dtype=torch.float64, device=rows.device)
        for chunk in rows.chunks(density.width):
            logits, weight = density(chunk.X.double()), chunk.weights * unit
            resp = logits.softmax(0)
            entropy = -torch.special.xlogy(resp, resp).sum(0)
            of_rows = torch.stack([logits.logsumexp(0), entropy, torch.ones_like(weight), weight])
            sums += of_rows @ weight
        log_likelihood, entropy, n_samples, sum_ww = sums.tolist()
        return ScoreSums(
            log_likelihood=log_likelihood,
            entropy=entropy,
            n_samples=n_samples,
            sum_ww=sum_ww,
            n_rows=rows.n_rows,
            unit=unit,
        )


def mean_log_likelihoods(
    shards: Shards, mixtures: Sequence[Parameters], total: TotalMoments | None = None
) -> list[float | None]:
    """Return each mixture's mean log-likelihood of the held-out rows: Σ w log p / Σ w, nats.

    The mixtures are about the rows' shared centre, of which `total` tells whether compiled loops
    pay. None for one whose covariance is singular, and for all where no row of positive weight is
    held out.
    """
    sound = [i for i, mixture in enumerate(mixtures) if _has_density(mixture)]
    means: list[float | None] = [None] * len(mixtures)
    if not sound:
        return means
    task = Score(tuple(mixtures[i] for i in sound), compiled=_pays(total))
    found = shards.run(HeldOut(task))
    if found.n_samples > 0:
        for i, value in zip(sound, (found.sums / found.n_samples).tolist(), strict=True):
            means[i] = value
    return means


def _pays(total: TotalMoments | None) -> bool:
    return total is not None and total.loops_pay()


def _has_density(mixture: Parameters) -> bool:
    _, failed = mixture.type.precisions_cholesky(mixture.stacked_covariances)
    return not bool(failed.any()) and math.isfinite(float(mixture.means.sum()))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Histograms:
    """The weights of rows by log-density, for L mixtures; a Summary.

    `counts` (L, B) are the weights in each bin, the highest densities first, and `tops` (L,) the
    upper edges of the first; `sums` (L,) are Σ w log p, nats, and `n_samples` Σ w; `minima` and
    `maxima` (L,) are those of the rows of positive weight, ±inf where there are none.
    """

    tops: Float64[Tensor, " L"]
    counts: Float64[Tensor, "L B"]
    sums: Float64[Tensor, " L"]
    minima: Float64[Tensor, " L"]
    maxima: Float64[Tensor, " L"]
    n_samples: float

    def __add__(self, other: Histograms) -> Histograms:
        return Histograms(
            tops=self.tops,
            counts=self.counts + other.counts,
            sums=self.sums + other.sums,
            minima=torch.minimum(self.minima, other.minima),
            maxima=torch.maximum(self.maxima, other.maxima),
            n_samples=self.n_samples + other.n_samples,
        )

    @property
    def means(self) -> Float64[Tensor, " L"]:
        """The mean log-density under each mixture, exact but for float64 rounding."""
        return self.sums / self.n_samples

    def quantiles(self, levels: Sequence[float]) -> Float64[Tensor, "L Q"]:
        """Return the log-density that each share of the rows lies below, to within its bin.

        Levels 0 and 1 are the smallest and the largest, exactly. NaN where there are no rows.
        """
        wanted = torch.tensor(levels, dtype=torch.float64)
        found = [self._quantiles(lane, wanted) for lane in range(len(self.tops))]
        return torch.stack(found)

    def shares_below(self, values: Float64[Tensor, " V"]) -> Float64[Tensor, "L V"]:
        """Return the share of rows whose log-density is below each value, to within a bin."""
        return torch.stack([self._shares(lane, values) for lane in range(len(self.tops))])

    def _quantiles(self, lane: int, levels: Float64[Tensor, " Q"]) -> Float64[Tensor, " Q"]:
        if not self.n_samples > 0:
            return torch.full_like(levels, math.nan)
        values, below = self._curve(lane)
        target = levels * below[-1]
        # The first place that is high enough: below it lies a bin that is not empty.
        i = torch.searchsorted(below, target).clamp(1, len(below) - 1)
        part = (target - below[i - 1]) / (below[i] - below[i - 1])
        inner = values[i - 1] + part.clamp(0, 1) * (values[i] - values[i - 1])
        return torch.where(levels <= 0, self.minima[lane], inner)

    def _shares(self, lane: int, at: Float64[Tensor, " V"]) -> Float64[Tensor, " V"]:
        if not self.n_samples > 0:
            return torch.full_like(at, math.nan)
        values, below = self._curve(lane)
        i = torch.searchsorted(values, at).clamp(1, len(values) - 1)
        width = values[i] - values[i - 1]
        part = torch.where(width > 0, (at - values[i - 1]) / width, 1.0).clamp(0, 1)
        return (below[i - 1] + part * (below[i] - below[i - 1])) / below[-1]

    def _curve(self, lane: int) -> tuple[Float64[Tensor, " E"], Float64[Tensor, " E"]]:
        """Return ascending log-densities, and the weight of the rows below each of them."""
        edges = (self.tops[lane] - _gaps()).clamp(self.minima[lane], self.maxima[lane])
        values = torch.cat([self.minima[lane, None], edges.flip(0)])
        below = self.counts[lane].flip(0).cumsum(0)
        return values, torch.cat([below.new_zeros(1), below])


@dataclass(frozen=True, slots=True, eq=False)
class Tally:
    """The task that counts the rows by their log-density under each mixture.

    The mixtures are about the rows' shared centre, of positive definite covariances. In the
    centred form and float64; `compiled`, by loops where these suit. Peak memory beside the rows:
    the log-densities (k, b) of a chunk of b rows under one mixture, and 150 KB of counts for each.
    """

    mixtures: tuple[Parameters, ...]
    compiled: bool = False

    def __call__(self, rows: ShardRows) -> Histograms:
        densities = [Densities.of(m, rows.device, compiled=self.compiled) for m in self.mixtures]
        tally = _Counter(torch.stack([density.peaks.logsumexp(0) for density in densities]))
        for weight, log_norm in _log_norms(rows, densities):
            tally.add(log_norm.cpu(), weight.cpu())
        return tally.histograms()


class _Counter:
    """Counts a shard's rows, chunk after chunk: on the CPU, where sums come in one order."""

    def __init__(self, tops: Float64[Tensor, " L"]) -> None:
        self._tops = tops.cpu()
        self._counts = torch.zeros(len(tops), _N_BINS, dtype=torch.float64)
        self._sums = torch.zeros_like(self._tops)
        self._minima = torch.full_like(self._tops, math.inf)
        self._maxima = torch.full_like(self._tops, -math.inf)
        self._n_samples = 0.0

    def add(self, log_norm: Float64[Tensor, "L n"], weight: Float64[Tensor, " n"]) -> None:
        gaps = (self._tops[:, None] - log_norm).clamp_min(0)
        bins = (torch.asinh(gaps / _SCALE) / _STEP).clamp_max(_N_BINS - 1).long()
        for counts, own in zip(self._counts, bins, strict=True):
            counts.index_add_(0, own, weight)
        self._sums += log_norm @ weight
        self._n_samples += float(weight.sum())
        counted = log_norm[:, weight > 0]
        if counted.shape[1]:
            self._minima = torch.minimum(self._minima, counted.amin(1))
            self._maxima = torch.maximum(self._maxima, counted.amax(1))

    def histograms(self) -> Histograms:
        return Histograms(
            tops=self._tops,
            counts=self._counts,
            sums=self._sums,
            minima=self._minima,
            maxima=self._maxima,
            n_samples=self._n_samples,
        )


def _gaps() -> Float64[Tensor, " B"]:
    """Return each bin's smaller gap."""
    return _SCALE * torch.sinh(_STEP * torch.arange(_N_BINS, dtype=torch.float64))


def training_quantiles(
    shards: Shards, mixture: Parameters, total: TotalMoments | None = None
) -> Quantiles:
    """Return the table of quantiles that a model keeps, in one pass over the rows fitted.

    The mixture is about the rows' shared centre; `total` tells whether compiled loops pay.
    """
    found = shards.run(Tally((mixture,), compiled=_pays(total)))
    return Quantiles(LEVELS, tuple(found.quantiles(LEVELS)[0].tolist()))

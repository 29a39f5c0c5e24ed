"""The bootstrap: EM on resampled rows, many resamples in the same passes.

A resample is the rows themselves, each with the weight of how often it is drawn: Poisson(1), which
is what drawing as many rows as there are, with replacement, comes to for many rows, and needs no
word between shards. The number is a hash of the seed, the resample, the shard and the row's number
in the shard. So no draw is kept, and none depends on who holds the rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.config import EMConfig
from gmm_dist.em.estep import SumMoments
from gmm_dist.em.lane import Lane, Snapshot, grouped, restore_lanes, take_snapshot, task_of
from gmm_dist.em.loop import FitResult, result_of
from gmm_dist.em.mstep import advance
from gmm_dist.em.statistics import Spike, TotalMoments
from gmm_dist.model.covariance import TYPE_OF
from gmm_dist.model.parameters import Parameters
from gmm_dist.shards.protocol import Block, S, ShardRows, Shards, Task
from gmm_dist.streams import Stream, keyed_seed

_TOL = 0.01
"""Nats of all rows together: what the last step of a resampled fit may still gain.

A parameter's standard error is where half a nat is lost; a fit that stops far from its optimum
would be too near the one that it started from.
"""

_MOST_NUMBERS = 1 << 23  # statistics of a pass: 64 MB; more resamples take turns

_GOLDEN, _MIX_1, _MIX_2 = (
    number - (1 << 64) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
_BITS = 53
_PIECE = 1 << 14  # rows at once: their numbers stay in a core's cache


def _thresholds() -> Tensor:
    """Return the whole numbers of 53 bits at which Poisson(1)'s distribution function rises."""
    # e^-1 / k!; above 17 lies less than one of the 2^53.
    chances = [0.36787944117144233 / math.factorial(k) for k in range(18)]
    return torch.tensor([round(p * (1 << _BITS)) for p in itertools.accumulate(chances)])


_THRESHOLDS = _thresholds()


@dataclass(frozen=True, slots=True)
class Draws:
    """How often one resample draws each row: `number` is the resample's in its stream."""

    stream: Stream
    random_state: int
    number: int

    def weights(
        self, shard: int, n: int, device: torch.device, *, first: int = 0
    ) -> Float64[Tensor, " n"]:
        """Return the draws of `n` rows of a shard, from row `first` on: whole numbers."""
        seed = keyed_seed(self.stream, self.random_state, self.number, shard)
        offset = seed - (1 << 63)  # torch's whole numbers have a sign
        thresholds = _THRESHOLDS.to(device)
        drawn = torch.empty(n, dtype=torch.float64, device=device)
        for at in range(0, n, _PIECE):
            part = drawn[at : at + _PIECE]
            numbers = torch.arange(first + at + 1, first + at + len(part) + 1, device=device)
            uniform = _hashed(numbers * _GOLDEN + offset)
            part.copy_(torch.bucketize(uniform, thresholds, right=True, out_int32=True))
        return drawn

    def of(self, rows: ShardRows) -> ShardRows:
        """Return rows with their weights times how often they are drawn."""
        blocks, first = [], 0
        for block in rows.blocks:
            n = block.X.shape[1]
            drawn = self.weights(rows.shard, n, rows.device, first=first)
            weight = block.sample_weight
            blocks.append(Block(block.X, drawn if weight is None else drawn * weight.double()))
            first += n
        return ShardRows(shard=rows.shard, blocks=blocks)


def at_once(covariance_type: str, n_components: int, n_features: int) -> int:
    """Return how many resamples of a mixture share their passes, at most."""
    numbers: int = TYPE_OF[covariance_type].n_rows(n_features) * n_components
    return max(1, _MOST_NUMBERS // numbers)


def _hashed(x: Tensor) -> Tensor:
    """Return the 53 leading bits of SplitMix64's outputs (Steele, Lea & Flood 2014)."""
    x = (x ^ _shifted(x, 30)) * _MIX_1  # products wrap around
    x = (x ^ _shifted(x, 27)) * _MIX_2
    return _shifted(x ^ _shifted(x, 31), 64 - _BITS)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Return 64-bit numbers shifted to the right, filled with zeros."""
    return (x >> by) & ((1 << (64 - by)) - 1)


@dataclass(frozen=True, slots=True, eq=False)
class Each(Generic[S]):
    """The summaries of several resamples; a Summary."""

    summaries: tuple[S, ...]

    def __add__(self, other: Each[S]) -> Each[S]:
        pairs = zip(self.summaries, other.summaries, strict=True)
        return Each(tuple(mine + theirs for mine, theirs in pairs))


@dataclass(frozen=True, slots=True)
class OfResamples(Generic[S]):
    """The task that applies to each of several resamples of the rows a task of its own.

    Peak memory beside the rows: a weight for each row of a shard, and that of one task.
    """

    tasks: tuple[tuple[Draws, Task[S]], ...]

    def __call__(self, rows: ShardRows) -> Each[S]:
        return Each(tuple(task(draws.of(rows)) for draws, task in self.tasks))


@dataclass(slots=True, eq=False, kw_only=True)
class ResampledFits:
    """The fits of one mixture to resamples of the rows, from that mixture's parameters.

    Args:
        shards: The rows, about their shared centre, the largest weight from 1 to 2.
        start: The mixture, about that centre.
        config: The settings of the loop; fits go on until a step gains no more than 0.01 nats of
            all rows.
        draws: How often each resample draws the rows.
        total: Moments of all rows, whose spikes are those of the resamples.
    """

    shards: Shards
    start: Parameters
    config: EMConfig
    draws: Sequence[Draws]
    total: TotalMoments
    lanes: list[Lane] = field(default_factory=list)

    def __post_init__(self) -> None:
        tol = min(self.config.tol, _TOL / self.total.n_effective)
        self.config = replace(self.config, tol=tol, returns="scored", on_singular="regularise")

    def run(self, watch: Callable[[int, int], None] = lambda done, n: None) -> list[FitResult]:
        """Fit all resamples; `watch` gets, after each pass, how many are done, and their number.

        Lanes that a snapshot holds go on from there, to the same bits.
        """
        totals = [total for part in self._turns for total in self._totals(part)]
        for of_lane in totals[len(self.lanes) :]:
            self.lanes.append(Lane.start(self.start, self.config, of_lane))
        for part in self._turns:
            while running := [i for i in part if self.lanes[i].is_running]:
                self._pass(running, totals)
                watch(sum(not lane.is_running for lane in self.lanes), len(self.lanes))
        pairs = zip(self.lanes, totals, strict=True)
        return [result_of(lane, of_lane) for lane, of_lane in pairs]

    def _pass(self, running: Sequence[int], totals: Sequence[TotalMoments]) -> None:
        groups = {i: grouped([self.lanes[i]]) for i in running}
        tasks = tuple((self.draws[i], task_of(groups[i], totals[i].n_rows)) for i in running)
        for i, sums in zip(running, self.shards.run(OfResamples(tasks)).summaries, strict=True):
            advance(groups[i][0], sums.groups[0], sums, totals[i], self.config)

    def _totals(self, part: Sequence[int]) -> Iterator[TotalMoments]:
        """Yield the moments of some resamples."""
        spikes: tuple[Spike, ...] = self.total.spikes
        moments = SumMoments(self.start.n_features, self.total.is_whole)
        each = self.shards.run(OfResamples(tuple((self.draws[i], moments) for i in part)))
        for total in each.summaries:
            yield replace(total, spikes=spikes)

    @property
    def _turns(self) -> list[range]:
        """The resamples that share passes."""
        start, n = self.start, len(self.draws)
        step = at_once(start.covariance_type, start.n_components, start.n_features)
        return [range(i, min(i + step, n)) for i in range(0, n, step)]

    def snapshot(self) -> Snapshot:
        """Return a snapshot from which the fits can go on."""
        return take_snapshot(self.lanes)

    def restore(self, saved: Snapshot) -> None:
        """Take up the lanes of a snapshot."""
        self.lanes = restore_lanes(saved)

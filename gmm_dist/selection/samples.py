"""The samples on which mixtures are searched for, and the seeded starts that they give."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from gmm_dist.config import StartConfig
from gmm_dist.em.estep import SumMoments
from gmm_dist.em.statistics import Spike, TotalMoments
from gmm_dist.model.densities import Densities
from gmm_dist.model.parameters import Parameters
from gmm_dist.selection import kmeans, split_merge
from gmm_dist.selection.coreset import Coreset, DrawCoreset, Whitening, whitening
from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import Shards
from gmm_dist.streams import Stream, keyed_generator

_ROWS_PER_MEAN = 50  # rows of the small sample, per value in the means
_TIER = 8  # all k up to this one share a sample, then all up to the next power of two
_FEWEST_ROWS, _MOST_ROWS = (2048, 10_000), 65_536
_TRAIL_ROWS = 4096  # of the small sample, and half of it: as many lead to a mixture
_POOL, _FEWEST_POOL = 4, 32_768  # the larger sample: times the small one, and rows at least


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A sample as one shard in this process, with its moments."""

    sample: Coreset
    shards: LocalShards
    total: TotalMoments

    @classmethod
    def of(cls, sample: Coreset, whole: TotalMoments) -> Rows:
        """Take a sample of rows whose moments are `whole`."""
        return cls._of(sample, whole.is_whole, whole.spikes)

    @classmethod
    def _of(cls, sample: Coreset, is_whole: bool, spikes: tuple[Spike, ...]) -> Rows:
        shards = LocalShards.of(sample.X, sample.sample_weight, n_threads=0)
        total = shards.run(SumMoments(sample.X.shape[1], is_whole))
        return cls(sample, shards, replace(total, spikes=spikes))

    def __reduce__(self) -> tuple[Callable[..., Rows], tuple[Any, ...]]:
        # Once, and as arrays, which the object store takes without a copy. Strides are kept.
        X, weight = self.sample.X.numpy(), self.sample.sample_weight.numpy()
        return _revived, (X, weight, self.total.is_whole, self.total.spikes)

    def to(self, device: torch.device) -> Rows:
        """Return the sample with its shard on a device."""
        if device.type == "cpu":
            return self
        return Rows(self.sample, self.shards.to(device), self.total)

    def splits(self, parameters: Parameters, generator: torch.Generator) -> list[split_merge.Split]:
        """Return the splits of the mixture's components, computed from these rows' labels."""
        X, weight = self.sample.X, self.sample.sample_weight
        return split_merge.splits(parameters, X, weight, _labels(parameters, X), generator)

    @property
    def n_features(self) -> int:
        return self.sample.X.shape[1]


def _revived(X: Any, weight: Any, is_whole: bool, spikes: tuple[Spike, ...]) -> Rows:
    # Arrays from the object store cannot be written to, of which torch warns.
    columns = X.strides[0] < X.strides[-1]
    rows = torch.tensor(X.T).T if columns else torch.tensor(X)
    return Rows._of(Coreset(rows, torch.tensor(weight)), is_whole, spikes)


def _labels(parameters: Parameters, X: Float64[Tensor, "m d"]) -> Int64[Tensor, " m"]:
    densities = Densities.of(parameters, X.device)
    return torch.cat([logits.argmax(0) for logits in densities.chunks(X)])


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """The samples on which one k is searched, each a part of the next.

    On `trail` a mixture is led to from smaller ones, on `small` it is moved, on `large` finished.
    """

    trail: Rows
    small: Rows
    large: Rows

    def __getitem__(self, name: str) -> Rows:
        return {"trail": self.trail, "small": self.small, "large": self.large}[name]

    def to(self, device: torch.device) -> Samples:
        """Return the samples with their shards on a device."""
        return Samples(*(rows.to(device) for rows in (self.trail, self.small, self.large)))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Seeds:
    """The source of seeded starts: the method, and k-means||'s candidates from all rows."""

    start: StartConfig
    total: TotalMoments
    stream: Stream
    parallel: tuple[Float64[Tensor, "c d"], Float64[Tensor, " c"]] | None = None

    def starts(self, sample: Coreset, k: int, kind: str, rounds: Iterable[int]) -> list[Parameters]:
        """Return the seeded starts of some rounds, of k components."""
        X, weight = sample.X, sample.sample_weight
        starts, pooled = [], kmeans.Pooled.of(X, weight, kind)
        maps: dict[int, tuple[Whitening, Tensor]] = {}
        whitenings = self._maps()
        for round in rounds:
            which = round % len(whitenings)
            if which not in maps:
                maps[which] = whitenings[which], whitenings[which](X)
            generator = keyed_generator(self.stream, self.start.random_state, round)
            shares = self._assignment(weight, k, *maps[which], generator)
            starts.append(kmeans.start_of(X, weight, shares, k, kind, pooled))
        return starts

    def n_starts(self, k: int) -> int:
        """Return the number of rounds; of one component all starts would be the same."""
        return self.start.n_init if k > 1 else 1

    def _maps(self) -> list[Whitening]:
        """Return the coordinates that seeded starts use in turn.

        Whitened ones separate clusters along a direction in which all rows together vary little;
        scaled ones separate clusters far apart in many dimensions, which whitening draws close.
        """
        scaled = Whitening(self.total.mean, self.total.scale.reciprocal())
        return [scaled, whitening(self.total)] if self.total.is_whole else [scaled]

    def _assignment(
        self, weight: Tensor, k: int, whiten: Whitening, Z: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Share rows, at `Z` in the coordinates of `whiten`, among k components."""
        if self.parallel is None:
            return kmeans.assignments(self.start.init, Z, weight, [k], generator)[k]
        rows, mass_near = self.parallel
        candidates = whiten(rows)
        labels = kmeans.assignments("kmeans", candidates, mass_near, [k], generator)[k]
        member = torch.nn.functional.one_hot(labels, k).double() * mass_near[:, None]
        mass = member.sum(0).clamp_min(1e-300)
        return kmeans.nearest(Z, (member.T @ candidates) / mass[:, None])


class Sampler:
    """Draws the samples for each k, which depend on the rows, the random state and k alone."""

    def __init__(self, shards: Shards, start: StartConfig, total: TotalMoments) -> None:
        self._shards, self._start, self._total = shards, start, total
        self._samples: dict[int, Samples] = {}
        self._seeds: dict[int, Seeds] = {}

    def samples(self, k: int) -> Samples:
        """Return the samples for k; the first ones of a size take a pass over all rows."""
        size = self._size(k)
        if size not in self._samples:
            self._samples[size] = self._draw(size)
        return self._samples[size]

    def seeds(self, k: int) -> Seeds:
        """Return the source of seeded starts; k-means|| takes a few passes over all rows."""
        tier, parallel = _tier(k), None
        if tier not in self._seeds:
            if self._start.init == "k-means||":
                parallel = kmeans.k_means_parallel(
                    self._shards, self._total, tier, random_state=self._start.random_state
                )
            self._seeds[tier] = Seeds(
                start=self._start, total=self._total, stream=Stream.STARTS, parallel=parallel
            )
        return self._seeds[tier]

    def _draw(self, size: int) -> Samples:
        n_pool, seed = _pool_size(size, self._total), self._start.random_state
        pool = self._shards.run(DrawCoreset.of(self._total, n_pool, Stream.POOL, seed))
        part = pool.part(size, keyed_generator(Stream.SAMPLE, seed))
        small = trail = Rows.of(part.per_row(), self._total)
        if (n_trail := max(_TRAIL_ROWS, size // 2)) < len(part.X):
            few = Coreset(part.X[:n_trail], part.sample_weight[:n_trail])
            trail = Rows.of(few.per_row(), self._total)
        if len(pool.X) == len(part.X):
            return Samples(trail, small, small)
        # Its rows are hardly ever looked at one by one: no copy beside the columns of the shard.
        whole = Coreset(pool.X.T.contiguous().T, pool.sample_weight)
        return Samples(trail, small, Rows.of(whole.per_row(), self._total))

    def _size(self, k: int) -> int:
        """Return the number of rows of the small sample: `n_sample`, or enough for k's means."""
        if self._start.n_sample:
            return self._start.n_sample
        wanted, n_rows = _ROWS_PER_MEAN * _tier(k) * len(self._total.sum_x), self._total.n_rows
        few, many = _FEWEST_ROWS
        return min(max(wanted, min(max(n_rows // 16, few), many)), _MOST_ROWS)


def _tier(k: int) -> int:
    return max(_TIER, 1 << (k - 1).bit_length())


def _pool_size(size: int, total: TotalMoments) -> int:
    wanted = max(_POOL * size, _FEWEST_POOL)
    # Where half of the rows would be drawn, take all: a coreset of twice their number keeps each.
    return wanted if 2 * wanted < total.n_rows else 2 * total.n_rows

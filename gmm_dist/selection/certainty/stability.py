"""Whether clusters are there again when rows are resampled (Hennig, CSDA 52, 2007).

On a sample of the rows, resampled: a mixture's components are merged anew, and each cluster of the
fit is compared with its best match among the new clusters, by the Jaccard similarity of the two
sets of rows: those in both by those in either. The mixtures are fits to resamples of all rows that
started from the fit, and fits to resamples of the sample whose starts are searched for afresh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from gmm_dist.config import EMConfig, StartConfig
from gmm_dist.em.resampling import Draws
from gmm_dist.em.statistics import TotalMoments
from gmm_dist.model.clusters import CHOSEN, MISCLASSIFICATION, STABLE, Clusters, Recovery
from gmm_dist.model.mixture import cluster_labels
from gmm_dist.model.parameters import Parameters
from gmm_dist.selection.clustering import number_of_clusters, trees_of
from gmm_dist.selection.coreset import Coreset, DrawCoreset
from gmm_dist.selection.merging import merge_orders
from gmm_dist.selection.ranking import Candidate
from gmm_dist.selection.sweep import sweep
from gmm_dist.shards.local import LocalJobs, LocalShards
from gmm_dist.shards.protocol import Shards, WorkingShards
from gmm_dist.streams import Stream

N_AFRESH = 20
"""Resamples whose starts are searched for anew."""

_ROWS, _ROWS_PER_PARAMETER = 16_384, 8  # of the sample, at least

Found = tuple[int, tuple[float, ...]]
"""The number of clusters of a resample, and how similar each of the fit's is to its best match."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Reference:
    """A sample of the rows, about their centre, and the clusters of the fit on it; Movable.

    `n_clusters` is None where a rule chose the number, which it then does in each resample.
    """

    sample: Coreset
    labels: Int64[Tensor, " m"]
    n_labels: int
    n_clusters: int | None

    @classmethod
    def of(
        cls,
        shards: Shards,
        mixture: Parameters,
        clusters: Clusters,
        total: TotalMoments,
        random_state: int,
    ) -> Reference:
        """Draw a sample of all rows, in a pass over them."""
        k, d = mixture.n_components, mixture.n_features
        size = max(_ROWS, _ROWS_PER_PARAMETER * k * mixture.type.n_rows(d))
        # Where half of the rows would be drawn, take all.
        size = size if 2 * size < total.n_rows else 2 * total.n_rows
        task = DrawCoreset.of(total, size, Stream.STABILITY_ROWS, random_state)
        sample = shards.run(task).per_row()
        return cls(
            sample=sample,
            labels=cluster_labels(mixture, sample.X, clusters.of_component),
            n_labels=clusters.n_clusters,
            n_clusters=clusters.n_clusters if clusters.rule == CHOSEN else None,
        )

    def to(self, device: torch.device) -> Reference:
        """Stay where it is: all that is done with it is done on a CPU."""
        return self

    def resampled(self, draws: Draws) -> tuple[Coreset, Int64[Tensor, " m"]]:
        """Return the rows of the sample that a resample draws, with their weights; and labels."""
        weight = self.sample.sample_weight
        weight = weight * draws.weights(0, len(weight), weight.device)
        kept = weight > 0
        return Coreset(self.sample.X[kept], weight[kept]), self.labels[kept]

    def found(self, mixture: Parameters, draws: Draws) -> Found:
        """Merge the components of a mixture by a resample, and compare the clusters."""
        drawn, ours = self.resampled(draws)
        rows = LocalShards.of(drawn.X, drawn.sample_weight, n_threads=0)
        orders = merge_orders(rows, mixture, keeps=True)
        tree = trees_of(rows, mixture, orders)[MISCLASSIFICATION]
        n = number_of_clusters(mixture, tree) if self.n_clusters is None else self.n_clusters
        theirs = cluster_labels(mixture, drawn.X, tree.of_component(n))
        both = torch.zeros(self.n_labels * n, dtype=torch.float64)
        both = both.index_add(0, ours * n + theirs, drawn.sample_weight).reshape(self.n_labels, n)
        return n, tuple(jaccard(both).amax(1).tolist())


def jaccard(both: Float64[Tensor, "a b"]) -> Float64[Tensor, "a b"]:
    """Return the similarity of each set of one partition to each of another, by their overlaps.

    A set without rows is similar to none.
    """
    either = both.sum(1, keepdim=True) + both.sum(0) - both
    return torch.where(either > 0, both / either, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class FromFit:
    """The job that compares the clusters of a fit to resampled rows."""

    mixture: Parameters
    draws: Draws

    def __call__(self, reference: Reference) -> Found:
        return reference.found(self.mixture, self.draws)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Afresh:
    """The job that searches a resample of the sample for a mixture, and compares its clusters."""

    candidate: Candidate
    config: EMConfig
    start: StartConfig
    draws: Draws

    def __call__(self, reference: Reference) -> Found:
        drawn, _ = reference.resampled(self.draws)
        start = replace(self.start, random_state=self.start.random_state + 1 + self.draws.number)
        rows = _Alone.of(drawn.X, drawn.sample_weight, n_threads=0)
        d = drawn.X.shape[1]
        best = sweep(rows, [self.candidate], self.config, start, n_features=d).best
        if best is None:  # nothing was found that could be ranked
            return 0, (0.0,) * reference.n_labels
        return reference.found(best.fit.parameters, self.draws)


class _Alone(LocalShards):
    """Rows whose holder is a worker itself, and does the jobs of its own search."""

    @contextmanager
    def jobs(self) -> Iterator[LocalJobs]:
        with LocalJobs(1) as jobs:
            yield jobs


Job = FromFit | Afresh


def compare(
    shards: WorkingShards,
    reference: Reference,
    jobs: Sequence[Job],
    known: dict[int, Found],
    note: Callable[[], None],
) -> list[Found]:
    """Have those who hold the shards do the jobs whose results are not `known` yet.

    `known` gets each result as it comes, by the job's place, and then `note` is called.
    """
    left = [i for i in range(len(jobs)) if i not in known]
    with shards.jobs() as queue:
        handle: Any = queue.share(reference) if left else None
        places = {queue.submit(jobs[i], handle, order=(i,)): i for i in left}
        while places:
            number, found = queue.next()
            known[places.pop(number)] = found
            note()
    return [known[i] for i in range(len(jobs))]


def recovery(found: Sequence[Found], n_clusters: int) -> Recovery:
    """Sum up what resamples have found of the clusters."""
    similarities = [similar for _, similar in found]
    means = tuple(sum(each) / len(found) for each in zip(*similarities, strict=True))
    return Recovery(
        n_resamples=len(found),
        similarities=means if found else (0.0,) * n_clusters,
        n_whole=sum(min(similar) >= STABLE for similar in similarities),
        n_clusters=tuple(n for n, _ in found),
    )

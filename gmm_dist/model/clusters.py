"""Clusters made of a mixture's components: trees of merges, and where a tree is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.errors import UserError
from gmm_dist.formats import counted

ENTROPY, MISCLASSIFICATION = "entropy", "misclassification"
TREES = (ENTROPY, MISCLASSIFICATION)
"""What chooses the two clusters of the next merge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """A merge of two clusters: `second` joins `first`; each bears its first component's number.

    `entropy` is that of the clusters' labels once they are merged, -Σ w r ln r / Σ w (nats per
    row). Of the two before the merge, `misclassification` is the larger chance that a row of one
    is labelled as of the other, and `share` that of the rows labelled as of either.
    """

    first: int
    second: int
    entropy: float
    misclassification: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeTree:
    """Merges of k components, one after another, into one cluster.

    `entropy` is that of the components' labels, before any merge (nats per row).
    """

    entropy: float
    merges: tuple[Merge, ...]

    @property
    def n_components(self) -> int:
        return len(self.merges) + 1

    @property
    def entropies(self) -> tuple[float, ...]:
        """The entropy of 1, 2, ... k clusters, nats per row; ascending."""
        return (*reversed([merge.entropy for merge in self.merges]), self.entropy)

    def of_component(self, n_clusters: int) -> tuple[int, ...]:
        """Return each component's cluster, of `n_clusters`; numbered by their first components."""
        leaders = list(range(self.n_components))
        for merge in self.merges[: self.n_components - n_clusters]:
            leaders = [merge.first if c == merge.second else c for c in leaders]
        numbers = {leader: number for number, leader in enumerate(sorted(set(leaders)))}
        return tuple(numbers[leader] for leader in leaders)


STABLE = 0.75
"""The mean Jaccard similarity from which a cluster is stable (Hennig, CSDA 52, 2007)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """How well clusters are found again in `n_resamples` resamples of the rows.

    `similarities` are those of each cluster to its best match, in the mean: the Jaccard similarity,
    rows in both by rows in either. `n_whole` counts the resamples in which each cluster's was 0.75
    or more, and `n_clusters` has how many clusters each resample had.
    """

    n_resamples: int
    similarities: tuple[float, ...]
    n_whole: int
    n_clusters: tuple[int, ...]

    @property
    def n_alike(self) -> int:
        """In how many resamples there were as many clusters as in the fit."""
        return sum(n == len(self.similarities) for n in self.n_clusters)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stability:
    """Whether clusters are there again when rows are resampled: on a sample of `n_rows`.

    `from_fit` is of fits to all rows, resampled, that started from the fit, and so flatter it;
    `afresh` of fits whose starts were searched for anew. In both, components were merged anew.
    """

    n_rows: int
    from_fit: Recovery
    afresh: Recovery

    @property
    def similarities(self) -> tuple[float, ...]:
        """The lower of each cluster's two figures."""
        pairs = zip(self.from_fit.similarities, self.afresh.similarities, strict=True)
        return tuple(min(pair) for pair in pairs)

    @property
    def is_stable(self) -> tuple[bool, ...]:
        """Whether each cluster is: by both figures."""
        return tuple(similarity >= STABLE for similarity in self.similarities)


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """Which components make up a cluster: a tree of merges, cut at `n_clusters`.

    `trees` are named by what chose their merges (`TREES`); `by` names the one that is cut.
    `rule` says how the number came about. `n_sampled` is the number of rows that chose the merges
    where these were a sample, None for all; the numbers of each merge are those of all rows.
    `stability` is that of these clusters, None where rows were not resampled. `ids` are the numbers
    that they keep from night to night, None where they have none.
    """

    n_clusters: int
    by: str
    trees: Mapping[str, MergeTree]
    rule: str
    n_sampled: int | None = None
    stability: Stability | None = None
    ids: tuple[int, ...] | None = None

    @property
    def numbers(self) -> tuple[int, ...]:
        """The clusters' numbers, in their order: `ids`, or else from 0 up."""
        return tuple(range(self.n_clusters)) if self.ids is None else self.ids

    @property
    def tree(self) -> MergeTree:
        """The tree that is cut."""
        return self.trees[self.by]

    @property
    def n_components(self) -> int:
        return self.tree.n_components

    @property
    def of_component(self) -> tuple[int, ...]:
        """Each component's cluster, from 0 up, in the order of their first components."""
        return self.tree.of_component(self.n_clusters)

    def at(self, n_clusters: int, *, by: str | None = None) -> Clusters:
        """Return the same components as another number of clusters, perhaps of another tree.

        Raises UserError for a number that is not from 1 to that of the components, and for a tree
        that there is not.
        """
        by = self.by if by is None else by
        if by not in self.trees:
            raise UserError(f"by is {by!r}: give one of {', '.join(self.trees)}")
        if isinstance(n_clusters, bool) or n_clusters not in range(1, self.n_components + 1):
            components = counted(self.n_components, "component")
            raise UserError(
                f"{n_clusters!r} clusters of {components}: give a whole number from 1 to "
                f"{self.n_components}"
            )
        return replace(self, n_clusters=n_clusters, by=by, rule=CHOSEN, stability=None, ids=None)

    def merged(self, resp: Float64[Tensor, "k n"]) -> Float64[Tensor, "c n"]:
        """Return the clusters' responsibilities, the sums of their components'."""
        return merged(resp, self.of_component)


CHOSEN = "the number was asked for"


def merged(resp: Float64[Tensor, "k n"], clusters: Sequence[int]) -> Float64[Tensor, "c n"]:
    """Return the sums of the components' rows by cluster; `clusters` is each component's."""
    member = resp.new_zeros(max(clusters) + 1, len(clusters))
    member[list(clusters), torch.arange(len(clusters))] = 1.0
    return member @ resp


def spell_stability(stability: Stability) -> str:
    """Say in how many resamples all clusters were found again."""
    one, two = stability.from_fit, stability.afresh
    every = "it was" if len(one.similarities) == 1 else "each was"
    return (
        f"{every} found again in {one.n_whole} of {one.n_resamples} resamples, and in "
        f"{two.n_whole} of {two.n_resamples} that were searched afresh"
    )


def spell_clusters(clusters: Clusters) -> str:
    """Say how many clusters there are, and of how many components."""
    components = counted(clusters.n_components, "component")
    return f"{counted(clusters.n_clusters, 'cluster')} ({components})"

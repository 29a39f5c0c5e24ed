"""Clusters out of a mixture's components: the trees of merges, and the number that suits them."""

from __future__ import annotations

import os

from gmm_dist.config import StartConfig
from gmm_dist.model.clusters import CHOSEN, MISCLASSIFICATION, Clusters, MergeTree
from gmm_dist.model.parameters import Parameters
from gmm_dist.selection.coreset import Coreset
from gmm_dist.selection.merging import Pair, Passed, SumTrees, merge_orders
from gmm_dist.selection.samples import Sampler
from gmm_dist.selection.sweep import in_unit
from gmm_dist.selection.valleys import valley
from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import Shards, WorkingShards

MOST_BY_ALL_ROWS = 64
"""Components whose merges all rows choose, at most: of more, a sample does."""

_MOST_NUMBERS = 1 << 24  # of a sample's responsibilities: 128 MB
_FEWEST_ROWS = 16_384  # of such a sample, however many components
_SHARDS = 8  # of it

# Two clusters are one if a row of one is so often labelled as of the other,
_OVERLAPPING = 0.1
# or so often, where no valley is so deep between them.
_TOUCHING, _VALLEY = 0.018, 1 / 3

RULE = (
    "merged while a row of one cluster has a chance of 10\u202f% to be labelled as of the other, "
    "or of 1.8\u202f% if the density between them nowhere falls below a third of the lower peak"
)
"""What `number_of_clusters` does, in words."""


def find_clusters(
    shards: WorkingShards,
    mixture: Parameters,
    n_clusters: str | int = "auto",
    *,
    start: StartConfig | None = None,
    watch: Passed = lambda done, total: None,
) -> Clusters:
    """Merge a mixture's components into clusters, by the rows that it was fitted to.

    Up to 64 components, all rows choose each merge, in k - 1 passes over them. Of more, the sample
    on which the mixture was searched for does. One more pass over all rows measures each merge.

    Args:
        shards: All rows, about their shared centre.
        mixture: The mixture, about the centre.
        n_clusters: How many clusters; "auto" for as many as `number_of_clusters` says. At most
            one for each component.
        start: The settings of the search, which decide its sample.
        watch: Gets the number of passes done, and that of all.
    """
    has_products = mixture.type.has_products
    shards, total, _ = in_unit(shards, mixture.n_features, has_products=has_products)
    n_sampled, compiled = None, total.loops_pay()
    if mixture.n_components <= MOST_BY_ALL_ROWS:
        orders = merge_orders(shards, mixture, compiled=compiled, watch=watch)
    else:
        sample = _sample(Sampler(shards, start or StartConfig(), total), mixture.n_components)
        n_sampled = len(sample.X)
        # The number of shards decides the bits, that of threads does not.
        rows = LocalShards.of(
            sample.X, sample.sample_weight, n_shards=_SHARDS, n_threads=os.cpu_count() or 1
        )
        orders = merge_orders(rows, mixture, keeps=True, watch=watch)
    trees = trees_of(shards, mixture, orders, compiled=compiled)
    tree = trees[MISCLASSIFICATION]
    is_asked = isinstance(n_clusters, int)
    wanted = n_clusters if isinstance(n_clusters, int) else number_of_clusters(mixture, tree)
    return Clusters(
        n_clusters=min(wanted, mixture.n_components),
        by=MISCLASSIFICATION,
        trees=trees,
        rule=CHOSEN if is_asked else RULE,
        n_sampled=n_sampled,
    )


def trees_of(
    shards: Shards, mixture: Parameters, orders: dict[str, list[Pair]], *, compiled: bool = False
) -> dict[str, MergeTree]:
    """Return trees of given merges, each merge measured by all rows, in one pass."""
    pairs = tuple(map(tuple, orders.values()))
    task = SumTrees(mixture, pairs, compiled=compiled)
    return dict(zip(orders, shards.run(task).trees(pairs), strict=True))


def number_of_clusters(mixture: Parameters, tree: MergeTree) -> int:
    """Return how many clusters a mixture's components are: the merges of `RULE`, in their order.

    Overlap alone tells clusters apart that are Gaussian or skewed (Hennig, ADAC 4, 2010); pieces
    of one flat or bent cluster overlap as little as two clusters that touch. Between these the
    density's valley decides.
    """
    members = {c: [c] for c in range(mixture.n_components)}
    for done, merge in enumerate(tree.merges):
        ours, theirs = members[merge.first], members.pop(merge.second)
        chance = merge.misclassification
        is_one = chance >= _OVERLAPPING or (
            chance >= _TOUCHING and valley(mixture, ours, theirs) >= _VALLEY
        )
        if not is_one:
            return mixture.n_components - done
        members[merge.first] = ours + theirs
    return 1


def _sample(sampler: Sampler, k: int) -> Coreset:
    """Return rows of the sample on which a mixture of so many components is searched for."""
    rows = sampler.samples(k).small.sample
    n_rows = max(_FEWEST_ROWS, _MOST_NUMBERS // k)
    return Coreset(rows.X[:n_rows], rows.sample_weight[:n_rows])

"""Clusters and their trees of merges as plain JSON values, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from numbers import Real
from typing import Any

from gmm_dist.model.clusters import Clusters, Merge, MergeTree, Recovery, Stability

_NUMBERS = ("entropy", "misclassification", "share")


def plain(clusters: Clusters | None) -> dict[str, Any] | None:
    """Return clusters as plain JSON values, with each component's cluster; None for none."""
    if clusters is None:
        return None
    return {
        "n_clusters": clusters.n_clusters,
        "by": clusters.by,
        "rule": clusters.rule,
        "n_sampled": clusters.n_sampled,
        "of_component": list(clusters.of_component),
        "ids": None if clusters.ids is None else list(clusters.ids),
        "stability": None if clusters.stability is None else asdict(clusters.stability),
        "trees": {name: asdict(tree) for name, tree in clusters.trees.items()},
    }


def parse_clusters(content: Mapping[str, Any] | None, n_components: int) -> Clusters | None:
    """Return the clusters of a mixture's components; None where a model keeps none.

    Raises ValueError, TypeError or KeyError for what describes no clusters of these components.
    """
    if content is None:
        return None
    trees = {
        str(name): _tree(tree, n_components)
        for name, tree in _mapping(content["trees"], "trees").items()
    }
    n_clusters, n_sampled = content["n_clusters"], content.get("n_sampled")
    if not _is_whole(n_clusters) or not 1 <= n_clusters <= n_components:
        raise ValueError(f"{n_clusters!r} clusters of {n_components} components")
    if n_sampled is not None and not _is_whole(n_sampled):
        raise ValueError(f"n_sampled is {n_sampled!r}")
    if content["by"] not in trees:
        raise ValueError(f"no tree by {content['by']!r}")
    return Clusters(
        n_clusters=n_clusters,
        by=content["by"],
        trees=trees,
        rule=str(content["rule"]),
        n_sampled=n_sampled,
        stability=_stability(content.get("stability"), n_clusters),
        ids=_ids(content.get("ids"), n_clusters),
    )


def _ids(content: Any, n_clusters: int) -> tuple[int, ...] | None:
    if content is None:
        return None
    ids = tuple(content)
    is_distinct = len(set(ids)) == len(ids) == n_clusters
    if not is_distinct or not all(_is_whole(i) and i >= 0 for i in ids):
        raise ValueError(f"{ids!r} are not {n_clusters} different whole numbers from 0 up")
    return ids


def _stability(content: Any, n_clusters: int) -> Stability | None:
    """Return how stable clusters are; None where rows were not resampled."""
    if content is None:
        return None
    content = _mapping(content, "stability")
    if not _is_whole(content["n_rows"]):
        raise ValueError(f"n_rows is {content['n_rows']!r}")
    return Stability(
        n_rows=content["n_rows"],
        from_fit=_recovery(content["from_fit"], n_clusters),
        afresh=_recovery(content["afresh"], n_clusters),
    )


def _recovery(content: Any, n_clusters: int) -> Recovery:
    content = _mapping(content, "a recovery")
    similarities = tuple(_number(value, "a similarity") for value in content["similarities"])
    found = tuple(content["n_clusters"])
    counts = (content["n_resamples"], content["n_whole"], *found)
    if not all(map(_is_whole, counts)) or len(found) != content["n_resamples"]:
        raise ValueError(f"{content['n_resamples']!r} resamples found clusters {found!r}")
    if len(similarities) != n_clusters:
        raise ValueError(f"{len(similarities)} similarities of {n_clusters} clusters")
    return Recovery(
        n_resamples=content["n_resamples"],
        similarities=similarities,
        n_whole=content["n_whole"],
        n_clusters=found,
    )


def _tree(content: Any, n_components: int) -> MergeTree:
    """Return a tree in which each component but the first joins another, once."""
    merges, alive = [], set(range(n_components))
    for entry in _mapping(content, "a tree")["merges"]:
        first, second = entry["first"], entry["second"]
        is_pair = _is_whole(first) and _is_whole(second) and first < second
        if not is_pair or not {first, second} <= alive:
            raise ValueError(f"the clusters {first!r} and {second!r} cannot be merged")
        alive.remove(second)
        numbers = {name: _number(entry[name], name) for name in _NUMBERS}
        merges.append(Merge(first=first, second=second, **numbers))
    if len(alive) != 1:
        raise ValueError(f"{len(merges)} merges of {n_components} components")
    return MergeTree(entropy=_number(content["entropy"], "entropy"), merges=tuple(merges))


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: a {type(value).__name__} where an object should be")
    return value


def _number(value: Any, name: str) -> float:
    """Return a number; None stands for one that was not finite."""
    if value is None:
        return math.nan
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}")
    return float(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

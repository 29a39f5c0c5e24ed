"""Clusters are in a model's card to the bit, or are refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mixtures
import pytest

from gmm_dist import Mixture, load, save
from gmm_dist.model.clusters import Clusters
from gmm_dist.runs.cluster_json import parse_clusters, plain
from gmm_dist.runs.json_files import to_json
from gmm_dist.selection.clustering import find_clusters


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    parameters = mixtures.parameters("full", 4, 2)
    clusters = find_clusters(mixtures.shards(mixtures.rows(parameters, 200)), parameters)
    return Mixture(parameters=parameters, feature_names=("x", "y"), clusters=clusters)


def test_they_load_as_they_were_saved(mixture: Mixture, tmp_path: Path) -> None:
    assert isinstance(mixture.clusters, Clusters)
    for i, clusters in enumerate((mixture.clusters, mixture.clusters.at(2, by="entropy"), None)):
        model = replace(mixture, clusters=clusters)
        assert load(save(model, tmp_path / str(i))).clusters == clusters
    card = json.loads((tmp_path / "1" / "model" / "model.json").read_text())
    assert card["clusters"]["of_component"] == list(
        mixture.clusters.trees["entropy"].of_component(2)
    )
    # A model of an earlier version says nothing of clusters.
    assert parse_clusters(None, 4) is None


BAD: dict[str, tuple[tuple[str | int, ...], Any]] = {
    "too many": (("n_clusters",), 5),
    "none": (("n_clusters",), 0),
    "as text": (("n_clusters",), "2"),
    "truth": (("n_clusters",), True),
    "another tree": (("by",), "ward"),
    "trees as list": (("trees",), [1]),
    "a tree as text": (("trees", "entropy"), "abc"),
    "a merge with itself": (("trees", "entropy", "merges", 0, "second"), 0),
    "one that is gone": (("trees", "entropy", "merges", 2, "second"), None),
    "a number as text": (("trees", "entropy", "merges", 1, "share"), "much"),
    "half a sample": (("n_sampled",), 0.5),
}


@pytest.mark.parametrize(("path", "value"), BAD.values(), ids=BAD)
def test_what_describes_no_clusters_is_refused(
    mixture: Mixture, path: tuple[str | int, ...], value: Any
) -> None:
    content: Any = json.loads(to_json(plain(mixture.clusters)))
    at = content
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises((ValueError, TypeError)):
        parse_clusters(content, 4)


def test_too_few_merges_are_no_tree(mixture: Mixture) -> None:
    content: Any = json.loads(to_json(plain(mixture.clusters)))
    content["trees"]["entropy"]["merges"].pop()
    with pytest.raises(ValueError, match="2 merges of 4 components"):
        parse_clusters(content, 4)

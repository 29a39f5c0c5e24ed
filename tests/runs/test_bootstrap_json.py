"""What was resampled is in a model's card to the bit, or is refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mixtures
import pytest
import torch

from gmm_dist import Mixture, UserError, load, save
from gmm_dist.model.bootstrap import Bootstrap, Win
from gmm_dist.model.clusters import Clusters, Merge, MergeTree, Recovery, Stability

ARRAYS = ("weights", "log_weights", "means", "deviations", "log_deviations")


def mixture() -> Mixture:
    fits = [mixtures.parameters("full", 2, 3, seed=seed) for seed in range(4)]
    bootstrap = Bootstrap.of(fits, 2, 3, n_resamples=5, random_state=7)
    bootstrap = replace(bootstrap, wins=(Win(k=2, covariance_type="full", n=5),))
    one = Recovery(n_resamples=2, similarities=(0.9, 0.7), n_whole=1, n_clusters=(2, 3))
    merge = Merge(first=0, second=1, entropy=0.0, misclassification=0.01, share=1.0)
    trees = {"misclassification": MergeTree(entropy=0.1, merges=(merge,))}
    clusters = Clusters(
        n_clusters=2,
        by="misclassification",
        trees=trees,
        rule="a rule",
        stability=Stability(n_rows=100, from_fit=one, afresh=replace(one, n_whole=0)),
    )
    return Mixture(parameters=fits[0], bootstrap=bootstrap, clusters=clusters)


def test_it_loads_as_it_was_saved(tmp_path: Path) -> None:
    saved = mixture()
    loaded = load(save(saved, tmp_path / "model"))
    assert loaded.clusters == saved.clusters
    assert isinstance(loaded.bootstrap, Bootstrap)
    assert isinstance(saved.bootstrap, Bootstrap)
    for name in ARRAYS:
        assert torch.equal(getattr(loaded.bootstrap, name), getattr(saved.bootstrap, name))
    assert loaded.bootstrap.wins == saved.bootstrap.wins
    assert (loaded.bootstrap.n_resamples, loaded.bootstrap.n_used) == (5, 4)
    assert loaded.bootstrap.random_state == 7


def test_what_is_not_known_stays_unknown(tmp_path: Path) -> None:
    few = Bootstrap.of([], 2, 3, n_resamples=5, random_state=0)
    loaded = load(save(replace(mixture(), bootstrap=few), tmp_path / "model"))
    assert isinstance(loaded.bootstrap, Bootstrap)
    assert loaded.bootstrap.means.shape == (2, 3)
    assert bool(loaded.bootstrap.means.isnan().all())
    assert loaded.bootstrap.weights.shape == (2,)


BAD: dict[str, tuple[tuple[str | int, ...], Any]] = {
    "half a resample": (("bootstrap", "n_resamples"), 2.5),
    "fewer than none": (("bootstrap", "n_used"), -1),
    "other weights": (("bootstrap", "standard_errors", "weights"), [1.0]),
    "other features": (("bootstrap", "standard_errors", "means"), [[1.0], [2.0]]),
    "text": (("bootstrap", "standard_errors", "means", 0, 1), "1"),
    "no list": (("bootstrap", "standard_errors", "deviations"), 3),
    "a win of text": (("bootstrap", "wins", 0, "n"), "all"),
    "no wins": (("bootstrap", "wins"), None),
    "stability as text": (("clusters", "stability"), "yes"),
    "other clusters": (("clusters", "stability", "afresh", "similarities"), [1.0]),
    "other resamples": (("clusters", "stability", "from_fit", "n_resamples"), 3),
    "a sample of text": (("clusters", "stability", "n_rows"), "100"),
}


@pytest.mark.parametrize(("path", "value"), BAD.values(), ids=BAD)
def test_what_describes_none_is_refused(
    path: tuple[str | int, ...], value: Any, tmp_path: Path
) -> None:
    save(mixture(), tmp_path / "whole")
    folder = tmp_path / "whole" / "model"
    card: Any = json.loads((folder / "model.json").read_text())
    at = card
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "model.json").write_text(json.dumps(card))
    (copy / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="copy"):
        load(copy)

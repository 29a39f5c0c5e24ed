"""Clusters keep their numbers while their components split, join and shift."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mixtures
import nights
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gmm_dist
from gmm_dist.commands import nightly
from gmm_dist.errors import UserError
from gmm_dist.model.clusters import CHOSEN, MISCLASSIFICATION, Clusters, Merge, MergeTree
from gmm_dist.model.mixture import Mixture
from gmm_dist.model.parameters import Parameters
from gmm_dist.nightly.clusters import as_gaussians, match_clusters, similarities
from gmm_dist.nightly.drift import spread_change
from gmm_dist.nightly.lineage import DRIFT, ClusterLineage, Lineage, Published
from gmm_dist.nightly.matching import overlaps
from gmm_dist.nightly.registry import Registry
from gmm_dist.runs import load

pytestmark = pytest.mark.unchecked


def merged(groups: list[int]) -> Clusters:
    """Return clusters of components, of which each is given."""
    firsts = {group: groups.index(group) for group in sorted(set(groups), key=groups.index)}
    joins = [(firsts[g], c) for c, g in enumerate(groups) if firsts[g] != c]
    joins += [(0, first) for first in list(firsts.values())[1:]]
    merges = tuple(
        Merge(first=a, second=b, entropy=0.0, misclassification=0.1, share=0.1) for a, b in joins
    )
    trees = {MISCLASSIFICATION: MergeTree(entropy=0.1, merges=merges)}
    return Clusters(n_clusters=len(firsts), by=MISCLASSIFICATION, trees=trees, rule=CHOSEN)


def mixture(groups: list[int], d: int = 2, *, kind: str = "full", seed: int = 0) -> Mixture:
    parameters = mixtures.parameters(kind, len(groups), d, seed=seed, spread=4.0)
    return Mixture(parameters=parameters, clusters=merged(groups))


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=6),
    st.lists(st.integers(0, 2), min_size=1, max_size=6),
    st.sampled_from(mixtures.FEW_TYPES),
)
@mixtures.FIXED
def test_similarity_is_the_formulas(one, other, kind):
    before, after = mixture(one, kind=kind), mixture(other, kind=kind, seed=1)
    overlap = overlaps(before.parameters, after.parameters).tolist()
    p, q = before.parameters.weights.tolist(), after.parameters.weights.tolist()
    found = similarities(before, after)
    of_before, of_after = before.clusters.of_component, after.clusters.of_component
    for i in range(before.clusters.n_clusters):
        ours = [a for a, group in enumerate(of_before) if group == i]
        for j in range(after.clusters.n_clusters):
            theirs = [b for b, group in enumerate(of_after) if group == j]
            there = sum(p[a] * max(overlap[a][b] for b in theirs) for a in ours)
            back = sum(q[b] * max(overlap[a][b] for a in ours) for b in theirs)
            expected = there / sum(p[a] for a in ours) + back / sum(q[b] for b in theirs)
            assert float(found[i, j]) == pytest.approx(expected / 2)
    same = similarities(before, before)
    assert torch.allclose(same.diagonal(), torch.ones(len(same), dtype=torch.float64))


@pytest.mark.parametrize("kind", ["full", "tied", "diag", "tied-spherical"])
def test_gaussians_of_clusters_have_their_moments(kind):
    made = mixture([0, 1, 0, 1, 1], 3, kind=kind)
    found = as_gaussians(made)
    p = made.parameters
    for c in range(2):
        own = [i for i, group in enumerate(made.clusters.of_component) if group == c]
        w = p.weights[own] / p.weights[own].sum()
        mean = w @ p.means[own]
        apart = p.means[own] - mean
        matrix = (w[:, None, None] * p.covariance_matrices()[own]).sum(0)
        matrix = matrix + (w[:, None] * apart).T @ apart
        torch.testing.assert_close(found.weights[c], p.weights[own].sum())
        torch.testing.assert_close(found.means[c], mean)
        expected = matrix if p.type.has_products else matrix.diagonal()
        torch.testing.assert_close(found.covariances[c], expected)
    assert spread_change(torch.eye(3).double(), torch.eye(3).double())[0] == pytest.approx(1)


def test_a_split_keeps_the_larger_part_and_no_clusters_match_none():
    wide = mixture([0, 0, 0, 1])
    parts = replace(wide, clusters=merged([0, 0, 1, 2]))
    weights = torch.tensor([0.4, 0.2, 0.1, 0.3], dtype=torch.float64)
    parts = replace(parts, parameters=replace(wide.parameters, weights=weights))
    matching = match_clusters(replace(wide, parameters=parts.parameters), parts)
    assert matching.pairs == ((0, 0), (1, 2))
    assert matching.born == (1,)
    none = replace(wide, clusters=None)
    assert match_clusters(none, parts).born == (0, 1, 2)
    assert match_clusters(parts, none).dead == (0, 1, 2)


# ------------------------------------------------------------------------- nights


def square(x: float, y: float, n: int, *, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform((x, y), (x + 6, y + 6), size=(n, 2))


def blob(x: float, y: float, n: int, *, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal((x, y), size=(n, 2))


class Nights:
    """Nights of a square, which takes several components, and of blobs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.registry = folder, Registry(str(folder / "reg"))

    def run(self, day: int, k: str, parts: list[np.ndarray], *options: str) -> int:
        X = np.concatenate(parts)
        night = f"2026-11-{day:02d}"
        table = pa.table({"x": X[:, 0], "y": X[:, 1], "id": np.arange(len(X))})
        nights.write_night(self.folder / "lake", night, table)
        argv = [str(self.folder / "lake"), "--registry", str(self.folder / "reg")]
        argv += ["--night", night, "--partition", "ds", "--columns", "x", "y", "--k", k]
        # What differs between these nights is no drift of whole columns.
        argv += ["--n-init", "1", "--max-drift", "inf", "--max-drop", "1e9", *options]
        return nightly.main(argv)

    def url(self, day: int) -> str:
        return self.registry.model_url(f"2026-11-{day:02d}")

    def at(self, day: int, **places: tuple[float, float]) -> dict[str, int]:
        """Return the number of the cluster at some places."""
        model = gmm_dist.load(self.url(day))
        assert model.clusters.ids == Lineage.read(self.url(day)).clusters.ids
        own = model.predict(np.array(list(places.values())), clusters=True)
        return {name: model.clusters.numbers[c] for name, c in zip(places, own, strict=True)}


@pytest.mark.parametrize("n_nights", [4, pytest.param(10, marks=pytest.mark.long)])
def test_nights_keep_clusters_while_a_component_splits(n_nights, tmp_path, in_process):
    """The square is drawn by 3, 4, 5, ... components; it moves, a blob dies, another is born."""
    on = Nights(tmp_path)
    first: dict[str, int] = {}
    kept = {"square": (3.0, 3.0), "blob": (20.0, 0.0)}
    for day, k in enumerate((4, 5, 6, 4, 5, 3, 4, 6, 5, 4)[:n_nights], start=1):
        shift = 0.3 * day
        parts = [square(shift, 0, 900, seed=day), blob(20, 0, 300, seed=100 + day)]
        places = {"square": (3.0 + shift, 3.0), "blob": kept["blob"]}
        if day < 4:
            parts.append(blob(0, 20, 300, seed=200 + day))
            places["dies"] = (0.0, 20.0)
        if day > 6:
            parts.append(blob(20, 20, 300, seed=300 + day))
            places["born"] = (20.0, 20.0)
        n = str(len(parts))
        assert on.run(day, str(k + len(parts) - 2), parts, "--clusters", n) == 0
        found = on.at(day, **places)
        first |= {name: i for name, i in found.items() if name not in first}
        assert found == {name: first[name] for name in places}, day
        lineage = Lineage.read(on.url(day))
        assert lineage.clusters.next_id == len(first)
        assert len(lineage.clusters.ids) == len(places)
    assert sorted(first.values()) == list(range(len(first)))
    assert Lineage.read(on.url(4)).clusters.dead == (first["dies"],)
    # Components came and went meanwhile.
    assert all(Lineage.read(on.url(day)).born for day in (2, 3))
    if n_nights < 7:
        return
    assert Lineage.read(on.url(7)).clusters.born == (first["born"],)
    drift: Any = load.read_report(on.url(7), DRIFT)["clusters"]
    assert {c["id"] for c in drift["components"]} == {first["square"], first["blob"]}
    (moved,) = [c for c in drift["components"] if c["id"] == first["square"]]
    assert moved["mean_shift"][0] == pytest.approx(0.3 / np.sqrt(3), abs=0.15)
    assert [c["id"] for c in drift["born"]] == [first["born"]]
    html = (tmp_path / "reg" / "models" / "2026-11-07" / "report.html").read_text()
    assert "Clusters that stayed, most changed first" in html
    assert "Clusters born and died" in html


def test_a_late_night_takes_no_number_that_is_taken_and_scores_bear_numbers(tmp_path, in_process):
    on = Nights(tmp_path)
    a, b = blob(0, 0, 600, seed=1), blob(12, 0, 600, seed=2)
    c, d = blob(0, 12, 600, seed=3), blob(12, 12, 600, seed=4)
    assert on.run(1, "2", [a, b]) == 0
    assert on.run(3, "2", [b, c], "--scores", str(tmp_path / "scores"), "--keep", "id") == 0
    assert on.run(2, "3", [a, b, d]) == 0
    ids = on.at(1, a=(0, 0), b=(12, 0))
    assert on.at(3, b=(12, 0), c=(0, 12)) == {"b": ids["b"], "c": 2}
    assert on.at(2, a=(0, 0), b=(12, 0), d=(12, 12)) == {**ids, "d": 3}
    (file,) = (tmp_path / "scores").rglob("*.parquet")
    scores = pq.read_table(file)
    assert set(scores["cluster"].to_pylist()) == {ids["b"], 2}
    # Without clusters nothing is numbered, and the next night begins anew above them.
    assert on.run(4, "2", [b, c], "--clusters", "none") == 0
    assert Lineage.read(on.url(4)).clusters is None
    assert on.run(5, "2", [b, c]) == 0
    assert set(Lineage.read(on.url(5)).clusters.ids) == {4, 5}


def test_lineages_of_other_clusters_are_refused(tmp_path, in_process, monkeypatch):
    on = Nights(tmp_path)
    assert on.run(1, "2", [blob(0, 0, 600, seed=1), blob(12, 0, 600, seed=2)]) == 0
    whole = Lineage.read(on.url(1))
    assert Published.read(on.url(1)).mixture.clusters.ids == whole.clusters.ids
    for ids in ((0,), (0, 1, 2)):
        other = replace(whole, clusters=replace(whole.clusters, ids=ids))
        monkeypatch.setattr(Lineage, "read", lambda url, other=other: other)
        with pytest.raises(UserError, match="clusters, the model has 2"):
            Published.read(on.url(1))
    assert ClusterLineage.parse(None) is None
    with pytest.raises(ValueError, match="different whole numbers"):
        ClusterLineage.parse({"ids": [0, 0], "born": [], "dead": [], "next_id": 1})


def test_parameters_of_wide_mixtures_stay_variances():
    assert isinstance(as_gaussians(mixture([0, 1], 40, kind="diag")), Parameters)
    assert as_gaussians(mixture([0, 1], 40, kind="diag")).covariances.shape == (2, 40)

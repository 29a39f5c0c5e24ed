"""How many clusters: the number that our rule finds, beside BIC's K, ICL's K and HDBSCAN.

python benchmarks/clusters.py --seed 2027 --out benchmarks/results/clusters.jsonl
python benchmarks/clusters.py --table benchmarks/results/clusters.jsonl

Draws are those of `shapes`: six families, 3 to 6 clusters. The rule and its constants were fixed on
seed 101. A draw that the file has already is not repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
import shapes
from sklearn.cluster import HDBSCAN
from sklearn.metrics import adjusted_rand_score
from sklearn.preprocessing import StandardScaler

import gmm_dist
from gmm_dist.model.clusters import ENTROPY, MISCLASSIFICATION, MergeTree

GRID = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20)
_MOST_ROWS = 20_000  # for HDBSCAN
_HENNIG = 0.025  # Hennig's threshold, of misclassification alone


def measured(draw: shapes.Draw) -> dict[str, Any]:
    """Return what each method makes of a draw."""
    began = time.perf_counter()
    selection = gmm_dist.select(draw.X, n_components=GRID, covariance_type="full")
    fitted = time.perf_counter()
    model = gmm_dist.find_clusters(selection.best, draw.X)
    assert model.clusters is not None
    merged = time.perf_counter()
    trees, result = model.clusters.trees, selection.result
    ranked = [scored for scored in result.scored if scored.fit.is_ranked]
    icl = min(ranked, key=lambda scored: scored.icl)
    by_icl = gmm_dist.Mixture(parameters=icl.fit.parameters.shifted(_centre(result)))
    elbow = model.clusters.at(elbow_of(trees[ENTROPY]), by=ENTROPY)
    hennig = model.clusters.at(_below(trees[MISCLASSIFICATION], _HENNIG))
    found = {
        "ours": (model.clusters.n_clusters, model.predict(draw.X, clusters=True)),
        "bic": (model.n_components, model.predict(draw.X)),
        "icl": (icl.candidate.k, by_icl.predict(draw.X)),
        "elbow": (elbow.n_clusters, _labels(model, elbow, draw.X)),
        "hennig": (hennig.n_clusters, _labels(model, hennig, draw.X)),
    }
    seconds = {"select": fitted - began, "find_clusters": merged - fitted}
    if len(draw.X) <= _MOST_ROWS:
        labels = hdbscan(draw.X)
        seconds["hdbscan"] = time.perf_counter() - merged
        found["hdbscan"] = (len(set(labels.tolist()) - {-1}), labels)
    is_of_cluster = draw.labels != shapes.NOISE
    return {
        "family": draw.family,
        "number": draw.number,
        "seed": draw.seed,
        "n": len(draw.X),
        "d": draw.X.shape[1],
        "n_clusters": draw.n_clusters,
        "found": {name: n for name, (n, _) in found.items()},
        # Rows that belong to no cluster do not count.
        "ari": {
            name: float(adjusted_rand_score(draw.labels[is_of_cluster], labels[is_of_cluster]))
            for name, (_, labels) in found.items()
        },
        "seconds": {name: round(s, 2) for name, s in seconds.items()},
    }


def hdbscan(X: shapes.Floats) -> shapes.Labels:
    """Return HDBSCAN's labels of the standardised rows, -1 for those of no cluster.

    Its smallest cluster is 2 % of the rows: of 0.1, 0.5, 1, 2 and 5 % what found the right number
    most often in the draws of seed 101.
    """
    search = HDBSCAN(min_cluster_size=max(5, len(X) // 50), min_samples=10, copy=True)
    labels: shapes.Labels = search.fit_predict(StandardScaler().fit_transform(X))
    return labels


def elbow_of(tree: MergeTree) -> int:
    """Return the number of clusters at the elbow of the entropy (Baudry et al. 2010).

    Two straight lines are fitted to the entropy against the rows merged so far; the one at which
    they meet with the least squares is chosen.
    """
    entropy = np.array([tree.entropy, *(merge.entropy for merge in tree.merges)])
    rows = np.cumsum([0.0, *(merge.share for merge in tree.merges)])
    k = tree.n_components
    if k < 4:
        return k
    breaks = range(1, k - 1)
    errors = [
        _error(rows[: b + 1], entropy[: b + 1]) + _error(rows[b:], entropy[b:]) for b in breaks
    ]
    return k - breaks[int(np.argmin(errors))]


def _error(x: shapes.Floats, y: shapes.Floats) -> float:
    """Return the sum of squares that a straight line leaves."""
    line = np.column_stack([np.ones_like(x), x])
    left = y - line @ np.linalg.lstsq(line, y, rcond=None)[0]
    return float(left @ left)


def _below(tree: MergeTree, threshold: float) -> int:
    """Return the number of clusters once a merge is below a misclassification."""
    chances = [merge.misclassification for merge in tree.merges]
    done = next((i for i, chance in enumerate(chances) if chance < threshold), len(chances))
    return tree.n_components - done


def _labels(model: Any, clusters: Any, X: shapes.Floats) -> Any:
    proba = model.predict_proba(X)
    return np.column_stack(
        [proba[:, np.array(clusters.of_component) == c].sum(1) for c in range(clusters.n_clusters)]
    ).argmax(1)


def _centre(result: Any) -> Any:
    return 0.0 if result.centre is None else result.centre


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return the results as a table in Markdown, a line for each family."""
    methods = [("ours", "clusters"), ("bic", "BIC's K"), ("icl", "ICL's K"), ("hdbscan", "HDBSCAN")]
    heads = [f"{name}: right, mean found - true, ARI" for _, name in methods]
    rows = [["family", "draws", *heads]]
    for family in [*shapes.FAMILIES, "all"]:
        ours = [line for line in lines if family in (line["family"], "all")]
        if ours:
            rows.append([family, str(len(ours)), *(_cell(ours, name) for name, _ in methods)])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(lines: Sequence[dict[str, Any]], method: str) -> str:
    ours = [line for line in lines if method in line["found"]]
    off = [line["found"][method] - line["n_clusters"] for line in ours]
    ari = [line["ari"][method] for line in ours]
    of = f" of {len(ours)}"
    return f"{off.count(0)}{of}, {np.mean(off):+.1f}, {np.mean(ari):.3f}"


def main() -> int:
    """Measure draws, or print the table of those that were."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=2027)
    parser.add_argument("--draws", type=int, default=10, help="of each family")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of these results")
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(_read(arguments.table)))
        return 0
    done = {_key(line) for line in _read(arguments.out)}
    for number in range(arguments.draws):
        for family in shapes.FAMILIES:
            if (family, number, arguments.seed) not in done:
                line = measured(shapes.draw(family, number, arguments.seed))
                machine.append(line | {"machine": machine.description()}, arguments.out)
    return 0


def _key(line: dict[str, Any]) -> tuple[str, int, int]:
    return line["family"], line["number"], line["seed"]


def _read(path: Path | None) -> list[dict[str, Any]]:
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    raise SystemExit(main())

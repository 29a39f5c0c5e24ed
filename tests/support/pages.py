"""Make what a report is made of, and read a page back."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import mixtures
import numpy as np

from gmm_dist.model.mixture import Mixture
from gmm_dist.report.page import Sample
from gmm_dist.report.projection import Clusters

_VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Read HTML, and hold what is wrong with it: tags that do not match, ids that repeat."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id" and value is not None]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if "tr" in self.open and self.open[-1] not in ("tr", "tbody", "table"):
            self.rows[-1][-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def clusters(k: int, d: int, covariance_type: str = "full", *, seed: int = 0) -> Clusters:
    """Return a random mixture whose features have units of very different size."""
    made = mixtures.parameters(covariance_type, k, d, seed=seed, spread=4.0)
    return Clusters(
        weights=made.weights.numpy(),
        means=made.means.numpy(),
        covariances=made.type.spread(made.stacked_covariances, d).numpy(),
        feature_names=tuple(f"feature {j}" for j in range(d)),
        numbers=tuple(str(c) for c in range(k)),
    )


def sample(k: int, d: int, n: int = 2000, *, seed: int = 0) -> Sample:
    """Return rows of `clusters(k, d)`."""
    made = mixtures.parameters("full", k, d, seed=seed, spread=4.0)
    X = mixtures.rows(made, n).numpy()
    return Sample(X, Mixture(parameters=made).predict(X))


def candidate(k: int, rank: int | None, **other: Any) -> dict[str, Any]:
    """Return a line of sweep.json's candidates."""
    bound = -10.0 + 0.1 * k
    return {
        "k": k,
        "covariance_type": "full",
        "rank": rank,
        "status": "converged: the gain in mean log-likelihood fell below tol",
        "converged": True,
        "n_iter": 5,
        "log_likelihood": bound * 1e6,
        "lower_bounds": list(bound - 0.1 * np.exp(-np.arange(5.0)) + 0.1 * np.exp(-4.0)),
        "n_parameters": 10 * k,
        "bic": 2e7 + (k - 3) ** 2 * 1234.5,
        "aic": 2e7 + (k - 4) ** 2 * 1234.5,
        "icl": 2e7 + k,
        "holdout": None,
        "seconds": 0.5,
    } | other


def content(candidates: list[dict[str, Any]], d: int, **other: Any) -> dict[str, Any]:
    """Return what sweep.json holds; the best candidate is the one of rank 1."""
    best = next((c for c in candidates if c["rank"] == 1), None)
    return {
        "criterion": "bic",
        "best": best and {"k": best["k"], "covariance_type": best["covariance_type"]},
        "candidates": candidates,
        "n_samples": 1e6,
        "n_rows": 1_000_000,
        "rows": {
            "read": 1_250_000,
            "filtered": 249_990,
            "dropped": 10,
            "held_out": 0,
            "imputed": 7,
        },
        "feature_names": [f"feature {j}" for j in range(d)],
        "data": "s3://lake/points",
        "plan_hash": "ab12",
        "config": {"em": {"tol": 1e-5, "max_iter": 100}, "start": {"n_init": 16}},
        "versions": {"python": "3.11", "s3fs": None},
        "warnings": ["column 'flat' is constant: leave it out with --columns"],
        "seconds": 3723.0,
    } | other


def drift(ids: tuple[int, ...], names: tuple[str, ...]) -> dict[str, Any]:
    """Return a `drift.Drift` as JSON: what `ids` had become, one born and one dead."""
    components = [
        {
            "id": i,
            "weight_before": 0.25,
            "weight": 0.125 + 0.01 * i,
            "weight_change": -0.125 + 0.01 * i,
            "mean_shift": [0.1 * i] * len(names),
            "mahalanobis": 0.3 * i,
            "volume_ratio": 1.5,
            "shape_change": 0.25,
            "overlap": 0.9 - 0.1 * i,
        }
        for i in ids
    ]
    alone = {"weight": 0.03, "mean": [0.0] * len(names), "nearest": ids[0], "overlap": 0.01}
    shares = [0.2, 0.5, 0.3]
    return {
        "night_before": "2026-11-20",
        "night": "2026-11-21",
        "feature_names": list(names),
        "components": components,
        "born": [alone | {"id": None}],
        "dead": [alone | {"id": 77}],
        "clusters": {
            "components": components[:1],
            "born": [alone | {"id": None}],
            "dead": [alone | {"id": 7}],
        },
        "columns": {
            "drift": 0.05,
            "divergence": 0.2,
            "strangers": 0.01,
            "columns": list(names[:1]),
            "change": "scale",
        },
        "densities": {
            "mean_before": -10.5,
            "mean_tonight": -10.25,
            "held_out_before": None,
            "held_out_tonight": None,
            "histogram": {"edges": [-9.0, -6, -3, 0], "before": shares, "tonight": shares[::-1]},
        },
    }

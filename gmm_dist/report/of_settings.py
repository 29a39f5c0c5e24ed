"""What the page says of a run: when, of which rows, with which settings, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gmm_dist.errors import Option
from gmm_dist.formats import counted, printable, shortened
from gmm_dist.report.of_night import Json
from gmm_dist.selection.table import label

_MOST_NAMED = 12  # columns

_ASKED = {
    "where": "rows where",
    "weight_column": "weights of rows",
    "missing": "missing values",
    "holdout": "share of rows held out",
    "clusters": "number of clusters",
    "bootstrap": "resamples",
}
# Of a fit, and of the search for its starts; what no option sets is left out.
_SETTINGS = {
    "em": {
        "tol": "a fit has converged when it gains less, nats per row",
        "max_iter": "iterations at most",
        "reg_covar": "added to each variance",
        "reg_unit": "in units of the",
        "precision": "arithmetic",
        "accelerate": "leaps ahead of EM",
    },
    "start": {
        "n_init": "starts of each K, on a sample",
        "init": "starts are seeded by",
        "random_state": "seed",
    },
}
_WORDS = {
    "n_components": "K",
    "k": "K",
    "columns": "another choice of columns",
    "where": "a condition on rows",
    "reg_covar": "the regularisation",
    "clusters": "the number of clusters",
    "missing": "missing values",
    "holdout": "a held-out share",
    "criterion": "ranking",
}
_MISSING = {
    "drop": "\u201cleave out rows with missing values\u201d",
    "mean": "\u201cfill missing values with the mean\u201d",
}
_VALUES: dict[tuple[str, object], str] = {
    ("missing", "error"): "refused",
    ("missing", "drop"): "their rows are left out",
    ("missing", "mean"): "filled with the column's mean",
    ("clusters", "auto"): "found by a rule",
    ("clusters", None): "not asked for",
    ("bootstrap", 0): "none",
    ("holdout", 0.0): "none",
}


def in_words(option: Option) -> str:
    """Spell an option for a reader who does not type: `reg_covar` is "the regularisation"."""
    words = _WORDS.get(option.name, option.name.replace("_", " "))
    if option.value is None:
        return words
    if option.name == "criterion":
        return f"ranking by {label(str(option.value))}"
    if option.name == "missing":
        return _MISSING.get(str(option.value), words)
    return f"{words} of {option.value}"


def settings(content: Json, command: str | None) -> list[tuple[str, str]]:
    """Return the settings of a run, a line each: what, and how it was set."""
    lines = []
    if content.get("date") is not None:
        lines.append(("date", str(content["date"])))
    if command:
        lines.append(("command", command))
    lines.append(("data", str(content["data"])))
    lines.append(("columns", _columns(content["feature_names"])))
    candidates = content["candidates"]
    lines.append(("numbers of components K", _grid({c["k"] for c in candidates})))
    kinds = dict.fromkeys(c["covariance_type"] for c in candidates)
    lines.append(("covariances", ", ".join(kinds)))
    lines.append(("ranked by", label(content["criterion"])))
    asked = content.get("asked") or {}
    for name, words in _ASKED.items():
        value = asked.get(name)
        if name in asked and (value is not None or (name, None) in _VALUES):
            lines.append((words, _VALUES.get((name, value), str(value))))
    for section, names in _SETTINGS.items():
        values = content["config"].get(section)
        if isinstance(values, Mapping):
            lines += [(words, _spelt(values[n])) for n, words in names.items() if n in values]
    return [(printable(name), printable(value)) for name, value in lines]


def _spelt(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _columns(names: Sequence[str]) -> str:
    shown = ", ".join(shortened(name, 40) for name in names[:_MOST_NAMED])
    more = f" and {len(names) - _MOST_NAMED:,} more" if len(names) > _MOST_NAMED else ""
    return f"{counted(len(names), 'column')}: {shown}{more}"


def _grid(ks: set[int]) -> str:
    """Spell numbers, those that follow one another as a range: 2 to 8, 10."""
    parts: list[list[int]] = []
    for k in sorted(ks):
        if parts and parts[-1][-1] == k - 1:
            parts[-1].append(k)
        else:
            parts.append([k])
    spelt = [
        f"{run[0]:,} to {run[-1]:,}" if len(run) > 2 else ", ".join(f"{k:,}" for k in run)
        for run in parts
    ]
    return ", ".join(spelt)

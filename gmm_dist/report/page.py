"""Write report.html: one HTML page that needs nothing else.

It opens offline, in light and dark, on a phone and on paper. Everything that comes from the
lake, names of columns first, is escaped, and the page forbids itself to load anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gmm_dist.formats import (
    ABSENT,
    count,
    counted,
    duration,
    fixed,
    number,
    printable,
    share,
    shortened,
    signed,
)
from gmm_dist.lake.tables.snapshot import shown
from gmm_dist.model import clusters as model
from gmm_dist.report import figures
from gmm_dist.report.of_clusters import cluster_table
from gmm_dist.report.of_components import Intervals, component_table
from gmm_dist.report.of_night import Json, Table, drift_table, gate_table, number_or_nan
from gmm_dist.report.of_settings import settings
from gmm_dist.report.projection import Clusters, Floats, plane
from gmm_dist.report.svg import N_COLOURS, Drawing
from gmm_dist.selection.ranking import CRITERIA
from gmm_dist.selection.table import COLUMNS, label

_MOST_CLUSTERS = 100  # of the tables and the heat map
_MOST_LINES = 240  # candidates in the chart of iterations
_MOST_WINS = 5  # candidates that resamples chose, by name
_LONGEST_NAME = 64  # of a feature, in a sentence
_ROWS = (
    ("read", "rows read"),
    ("filtered", "left out by the filter"),
    ("dropped", "dropped for a missing value"),
    ("held_out", "held out of the fit"),
    ("absent", "of weight 0"),
)


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Some rows `X` (m, d), in data units, and the index of each one's component, (m,).

    `clusters` (m,) are the rows' clusters, where components are merged into such.
    """

    X: Floats
    labels: npt.NDArray[np.int64]
    clusters: npt.NDArray[np.int64] | None = None


def render(
    content: Json | None,
    clusters: Clusters | None = None,
    sample: Sample | None = None,
    nightly: Json | None = None,
    merged: model.Clusters | None = None,
    intervals: Intervals | None = None,
    *,
    title: str | None = None,
    command: str | None = None,
) -> str:
    """Return the report as HTML; equal input gives equal bytes.

    `content` is what sweep.json holds, `clusters` the best mixture; None where nothing was
    fitted, or nothing could be ranked. Without a `sample` there is no picture. Numbers may be
    None or NaN: they are shown as absent. `nightly` makes it the report of a night: `night`,
    `published`, `reasons` (why not: the gate's sentences), and `drift` (a `drift.Drift` as JSON;
    None or absent on the first night). `merged` are the clusters that
    components are merged into, and `intervals` those of their parameters; None where that was not
    asked for. `title` heads the page in place of the answer, and `command` is what the run was
    started by.
    """
    chosen = _chosen(content) if content is not None and clusters is not None else None
    view: dict[str, Any] = {
        **dict.fromkeys(("data", "facts", "candidates", "clusters", "merged", "rows")),
        **dict.fromkeys(("picture", "criteria", "iterations", "why", "warnings"), ()),
        **_headed(title, _title(clusters, nightly, merged)),
        "gate": gate_table(nightly),
        "drift": drift_table(nightly),
    }
    if content is not None:
        view["measure"] = "rows" if content["n_samples"] == content["n_rows"] else "weight"
        view |= _told(content, command)
        view |= {"why": _why(content, chosen), "candidates": _candidates(content)}
    if content is not None and clusters is not None and chosen is not None:
        kept = _largest(clusters)
        view |= {
            "facts": _facts(content, chosen, clusters),
            "criteria": _criteria(content, chosen),
            "clusters": component_table(clusters, kept, content, intervals),
            "merged": cluster_table(merged, clusters, number_or_nan(content["n_samples"])),
            "picture": _picture(clusters, sample, kept),
            "iterations": _iterations(content, chosen),
        }
    return _environment().get_template("report.html.j2").render(view)


def _headed(title: str | None, answer: str) -> Table:
    """Return the page's heading, and the answer where it is not the heading itself."""
    if not title:
        return {"title": answer, "answer": None}
    return {"title": printable(title), "answer": answer}


def _told(content: Json, command: str | None) -> Table:
    """Return the parts of sweep.json that are shown as they are."""
    return {
        "data": printable(str(content["data"])),
        "warnings": [printable(str(line)) for line in _notes(content)],
        "rows": _rows(content),
        "settings": settings(content, command),
        "versions": [(name, version or ABSENT) for name, version in content["versions"].items()],
        "plan_hash": content["plan_hash"],
        "snapshot": _snapshot(content.get("snapshot")),
    }


def _notes(content: Json) -> Sequence[str]:
    """Return the warnings, for those who do not type where there are such."""
    notes: Sequence[str] = content.get("notes") or content.get("warnings", ())
    return notes


def _snapshot(snapshot: Json | None) -> str | None:
    """Name the version of the table that the rows are of, if they are of one."""
    if snapshot is None:
        return None
    return printable(shown(snapshot))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("gmm_dist.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = _svg
    return environment


def _svg(drawing: Drawing) -> Markup:
    # Ours, and text in it was escaped as XML when it was drawn.
    return Markup(drawing.svg)


def _title(clusters: Clusters | None, nightly: Json | None, merged: model.Clusters | None) -> str:
    what = "no model"
    if merged is not None:
        what = model.spell_clusters(merged)
        if merged.stability is not None:
            what += f": {model.spell_stability(merged.stability)}"
    elif clusters is not None:
        k = len(clusters.weights)
        what = f"Gaussian mixture of {k:,} component{'s' if k > 1 else ''}"
    if nightly is None:
        return what[0].upper() + what[1:]
    return f"Night of {printable(str(nightly['night']))}: {what}"


def _named(candidate: Json) -> str:
    return f"K = {candidate['k']} {candidate['covariance_type']}"


def _chosen(content: Json) -> Json:
    best = content["best"]
    return next(
        c for c in content["candidates"] if all(c[key] == value for key, value in best.items())
    )


def _per_row(content: Json, candidate: Json) -> float:
    n = number_or_nan(content["n_samples"])
    return number_or_nan(candidate["log_likelihood"]) / n if n else math.nan


def _facts(content: Json, chosen: Json, clusters: Clusters) -> list[tuple[str, str]]:
    criterion = content["criterion"]
    facts = [
        ("components K", f"{chosen['k']:,}"),
        ("covariances", str(chosen["covariance_type"])),
        ("rows fitted", count(content["n_rows"])),
        ("features", f"{len(clusters.feature_names):,}"),
        ("log-likelihood", f"{fixed(_per_row(content, chosen), 4)} nats per row"),
    ]
    if criterion == "holdout":
        facts.append(("held-out", f"{fixed(number_or_nan(chosen['holdout']), 4)} nats per row"))
    else:
        facts.append((label(criterion), f"{fixed(number_or_nan(chosen[criterion]), 1)} nats"))
    if content.get("seconds") is not None:
        facts.append(("took", duration(content["seconds"])))
    return facts


def _why(content: Json, chosen: Json | None) -> list[str]:
    """Say in sentences what decided, by how much, and what the other criteria would have chosen."""
    ranked = sorted(
        (c for c in content["candidates"] if c["rank"] is not None), key=lambda c: c["rank"]
    )
    criterion, n = content["criterion"], len(content["candidates"])
    if chosen is None:
        none = f"None of the {n:,} candidates could" if n > 1 else "The one candidate could not"
        return [f"{none} be ranked, for reasons below the table."]
    if n == 1:
        return [f"One candidate was fitted, {_named(chosen)}: {chosen['status']}."]
    order = "highest" if criterion == "holdout" else "lowest"
    line = f"{_named(chosen)} has the {order} {label(criterion)} of {n:,} candidates"
    if len(ranked) > 1:
        gap = abs(number_or_nan(ranked[1][criterion]) - number_or_nan(chosen[criterion]))
        unit = "nats per row" if criterion == "holdout" else "nats"
        line += f", {number(gap)} {unit} ahead of the next, {_named(ranked[1])}"
    others = [
        f"{label(name)} would choose {_named(choice)}"
        for name in _present(content)
        if name != criterion and (choice := _best_by(name, ranked)) is not None and choice != chosen
    ]
    if wins := (content.get("bootstrap") or {}).get("wins"):
        others.append(_won(wins, sum(win["n"] for win in wins)))
    n_failed = n - len(ranked)
    failed = [f"Not ranked, for reasons below the table: {n_failed:,}."] if n_failed else []
    return [f"{line}.", *([f"{'; '.join(others)}."] if others else []), *failed]


def _won(wins: Sequence[Json], n: int) -> str:
    """Say which candidates would have been the best in how many resamples."""
    each = [f"{_named(win)} in {win['n']:,}" for win in wins[:_MOST_WINS]]
    more = f", and {len(wins) - _MOST_WINS} others" if len(wins) > _MOST_WINS else ""
    return f"of {n:,} resamples of the rows, the best would have been {', '.join(each)}{more}"


def _present(content: Json) -> list[str]:
    """Return the criteria that any candidate has, the one that ranked first."""
    names = [
        name for name in CRITERIA if any(c.get(name) is not None for c in content["candidates"])
    ]
    return sorted(names, key=lambda name: name != content["criterion"])


def _best_by(criterion: str, ranked: Sequence[Json]) -> Json | None:
    finite = [c for c in ranked if math.isfinite(number_or_nan(c[criterion]))]
    sign = -1 if criterion == "holdout" else 1
    return min(finite, key=lambda c: sign * number_or_nan(c[criterion]), default=None)


def _criteria(content: Json, chosen: Json) -> list[Drawing]:
    """Draw how far candidates are from the best by each criterion; nothing for a single K."""
    if len({c["k"] for c in content["candidates"]}) == 1:
        return []
    drawings = []
    ranked = [c for c in content["candidates"] if c["rank"] is not None]
    for name in _present(content):
        best = _best_by(name, ranked)
        if best is None:
            continue
        sign, axis = 1, f"{label(name)} above its lowest, nats"
        if name == "holdout":
            sign, axis = -1, "held-out below its highest, nats/row"
        families: dict[str, list[figures.Point]] = {}
        for c in content["candidates"]:
            gap = sign * (number_or_nan(c[name]) - number_or_nan(best[name]))
            point = figures.Point(c["k"], gap, c["rank"] is not None)
            families.setdefault(c["covariance_type"], []).append(point)
        choice = (chosen["k"], chosen["covariance_type"])
        drawings.append(figures.criterion(f"by-{name}", axis, families, choice))
    return drawings


def _candidates(content: Json) -> Table:
    numbers = ["n_parameters", *_present(content), "mean_log_likelihood", "n_iter", "seconds"]
    names = ["k", "covariance_type", *numbers, "status"]
    head = ["rank", *(COLUMNS[name].head_with_unit for name in names)]
    ordered = sorted(content["candidates"], key=lambda c: (c["rank"] is None, c["rank"] or 0))
    rows = []
    for c in ordered:
        values = {**c, "mean_log_likelihood": _per_row(content, c)}
        cells = [ABSENT if c["rank"] is None else f"{c['rank']}", f"{c['k']:,}"]
        cells.append(c["covariance_type"])
        cells += [fixed(number_or_nan(values[name]), COLUMNS[name].digits or 0) for name in numbers]
        cells.append(_word(c))
        rows.append({"cells": cells, "is_chosen": c["rank"] == 1, "is_ranked": c["rank"]})
    statuses: dict[str, list[str]] = {}
    for c in ordered:
        if not c["converged"]:
            statuses.setdefault(c["status"], []).append(_named(c))
    notes = [f"{', '.join(names)}: {status}." for status, names in statuses.items()]
    return {"head": head, "rows": rows, "words": (2, len(head) - 1), "notes": notes}


def _word(candidate: Json) -> str:
    """Return the word that a status begins with."""
    return "not converged" if "max_iter" in (s := candidate["status"]) else s.partition(":")[0]


def _largest(clusters: Clusters) -> list[int]:
    """Return the indices of the largest components, largest first."""
    order = np.argsort(-clusters.weights, kind="stable")
    return [int(c) for c in order[:_MOST_CLUSTERS]]


def _picture(clusters: Clusters, sample: Sample | None, kept: Sequence[int]) -> Table | None:
    if sample is None or len(sample.X) == 0:
        return None
    n_rows, radius = min(len(sample.X), figures.MOST_POINTS), figures.radius(len(kept))
    if clusters.means.shape[1] == 1:
        one = f"A sample of {counted(n_rows, 'row')}, and each component's share of the density."
        return {"drawing": figures.densities("picture", clusters, sample.X, kept), "said": [one]}
    picture_plane = plane(clusters)
    if sample.clusters is None:
        hues = np.array(figures.colours(clusters))[sample.labels]
    else:
        hues = sample.clusters
        if clusters.group_numbers is not None:
            hues = np.array(clusters.group_numbers)[hues]
    drawing = figures.scatter("picture", clusters, picture_plane, sample.X, hues, kept)
    said = [
        f"A sample of {counted(n_rows, 'row')} in {picture_plane.kind}; ellipses reach {radius:g} "
        f"standard deviation{'s' if radius > 1 else ''} and bear their component's number."
    ]
    for axis, features in zip(picture_plane.labels, picture_plane.made_of, strict=False):
        parts = ", ".join(
            f"{shortened(printable(name), _LONGEST_NAME)} {signed(r, 2)}" for name, r in features
        )
        said.append(f"{axis.capitalize()} goes along with (correlation): {parts}.")
    if clusters.groups is not None:
        said.append("Rows and ellipses have the colour of their cluster.")
    if len(set(figures.colours(clusters))) > N_COLOURS:
        said.append(f"Colours repeat after {N_COLOURS}; the numbers do not.")
    if n_out := figures.n_outside(clusters, picture_plane, sample.X):
        said.append(f"Rows of the sample that lie outside the frame: {n_out:,}.")
    return {"drawing": drawing, "said": said}


def _iterations(content: Json, chosen: Json) -> list[Drawing]:
    """Draw the candidates' log-likelihoods over iterations, the chosen one in front."""
    fits = [c for c in content["candidates"] if c["lower_bounds"]]
    others = [c for c in fits if c is not chosen and c["rank"] is not None][:_MOST_LINES]
    if chosen not in fits:
        return []
    lines = [(_named(c), [number_or_nan(b) for b in c["lower_bounds"]]) for c in [chosen, *others]]
    drawings = [figures.climb("climb", lines)]
    if len(lines[0][1]) > 2:
        tol = number_or_nan(content["config"].get("em", {}).get("tol"))
        drawings.append(figures.approach("approach", lines, tol))
    return drawings


def _rows(content: Json) -> list[tuple[str, str, str]]:
    """Return what happened to the rows: what, how many, and their share of the rows read."""
    counts = content["rows"]
    read = counts["read"]
    lines = []
    for key, what in _ROWS:
        n = counts.get(key, 0)
        lines.append((what, count(n), share(n / read if read else None)))
    fitted = content["n_rows"]
    lines.append(("fitted", count(fitted), share(fitted / read if read else None)))
    if content["n_samples"] != fitted:
        lines.append(("sum of their weights", count(content["n_samples"]), ""))
    filled = "missing values filled with the column's mean"
    lines.append((filled, counted(counts["imputed"], "value"), ""))
    return lines

"""What the page says of a night: its verdict, and what has changed since the one before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gmm_dist.formats import (
    ABSENT,
    counted,
    fixed,
    printable,
    share,
    shortened,
    signed,
)
from gmm_dist.report import figures
from gmm_dist.report.svg import N_COLOURS

Json = Mapping[str, Any]
Table = dict[str, Any]


def gate_table(nightly: Json | None) -> Table | None:
    if nightly is None:
        return None
    drift, summary = nightly.get("drift"), ""
    if drift is not None:
        born, dead, stayed = (len(drift[key]) for key in ("born", "dead", "components"))
        summary = f"{counted(stayed, 'component')} stayed, {born:,} born, {dead:,} died."
        if (clusters := drift.get("clusters")) is not None:
            born, dead, stayed = (len(clusters[key]) for key in ("born", "dead", "components"))
            summary = (
                f"{counted(stayed, 'cluster')} stayed, {born:,} born, {dead:,} died; {summary}"
            )
    return {
        "is_published": bool(nightly["published"]),
        "reasons": [printable(str(reason)) for reason in nightly.get("reasons", ())],
        "summary": summary,
    }


def drift_table(nightly: Json | None) -> Table | None:
    """Return what has changed since the night before, the component most changed first."""
    drift = nightly.get("drift") if nightly is not None else None
    if drift is None:
        return None
    names = [printable(name) for name in drift["feature_names"]]
    ordered = sorted(drift["components"], key=lambda c: number_or_nan(c["overlap"]))
    # Where there are clusters, a component has its cluster's colour, which only they know.
    hue = {"colour": None} if drift.get("clusters") is not None else {}
    drawings = []
    if ordered:
        numbers = [str(c["id"]) for c in ordered]
        shifts = [number_or_nan(c["mahalanobis"]) for c in ordered]
        weights = [number_or_nan(c["weight"]) - number_or_nan(c["weight_before"]) for c in ordered]
        drawings.append(figures.changes("changes", numbers, shifts, weights))
    densities = drift["densities"]
    histogram = densities["histogram"]
    edges = [number_or_nan(edge) for edge in histogram["edges"]]
    if len(edges) > 1 and all(map(math.isfinite, edges)):
        shares = {"last model": histogram["before"], "tonight's": histogram["tonight"]}
        series = {title: [number_or_nan(v) for v in values] for title, values in shares.items()}
        label = "log-density of tonight's rows, nats"
        drawings.append(figures.histograms("densities", label, edges, series))
    return {
        "before": printable(str(drift["night_before"])),
        "clusters": _of_clusters(drift.get("clusters"), names),
        "components": [_changed(c, names) | hue for c in ordered],
        "born": [_alone(c, "born") for c in drift["born"]],
        "dead": [_alone(c, "died") for c in drift["dead"]],
        "drawings": drawings,
        "densities": [_compared(densities, *row) for row in _DENSITIES],
    }


def _of_clusters(changes: Json | None, names: Sequence[str]) -> Table | None:
    """Return what has changed of the clusters, the most changed first; None for none."""
    if changes is None:
        return None
    ordered = sorted(changes["components"], key=lambda c: number_or_nan(c["overlap"]))
    return {
        "stayed": [_changed(c, names) for c in ordered],
        "alone": [
            _alone(c, what)
            for key, what in (("born", "born"), ("dead", "died"))
            for c in changes[key]
        ],
    }


_DENSITIES = (("rows fitted", "mean"), ("rows held out", "held_out"))


def _compared(densities: Json, what: str, key: str) -> tuple[str, ...]:
    before, tonight = (number_or_nan(densities[f"{key}_{when}"]) for when in ("before", "tonight"))
    return what, fixed(before, 6), fixed(tonight, 6), signed(tonight - before, 6)


def _changed(component: Json, names: Sequence[str]) -> Table:
    shifts = [number_or_nan(shift) for shift in component["mean_shift"]]
    order = sorted(range(len(shifts)), key=lambda j: -abs(shifts[j]))[:2]
    change = number_or_nan(component["weight"]) - number_or_nan(component["weight_before"])
    return {
        "number": component["id"],
        "colour": component["id"] % N_COLOURS,
        "cells": [
            share(number_or_nan(component["weight_before"])),
            share(number_or_nan(component["weight"])),
            signed(100 * change, 2),
            fixed(number_or_nan(component["mahalanobis"]), 2),
            f"× {fixed(number_or_nan(component['volume_ratio']), 2)}",
            fixed(number_or_nan(component["shape_change"]), 2),
            fixed(number_or_nan(component["overlap"]), 2),
        ],
        "where": ", ".join(f"{shortened(names[j], 32)} {signed(shifts[j], 2)}" for j in order),
    }


def _alone(component: Json, what: str) -> tuple[str, ...]:
    number, nearest = component["id"], component["nearest"]
    return (
        "new" if number is None else str(number),
        what,
        share(number_or_nan(component["weight"])),
        ABSENT if nearest is None else str(nearest),
        fixed(number_or_nan(component["overlap"]), 2),
    )


def number_or_nan(value: Any) -> float:
    return math.nan if value is None else float(value)

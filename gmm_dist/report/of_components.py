"""What the page says of components: how large they are, what sets them apart, where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gmm_dist.formats import (
    ABSENT,
    count,
    fixed,
    measured,
    number,
    printable,
    share,
    shortened,
    signed,
)
from gmm_dist.model.mixture import Mixture
from gmm_dist.report import figures
from gmm_dist.report.description import described
from gmm_dist.report.of_night import Json, Table, number_or_nan
from gmm_dist.report.projection import Clusters, Floats
from gmm_dist.report.svg import N_COLOURS

_MOST_FEATURES = 60  # of the tables and the heat map
_LONGEST_NAME = 64  # of a feature, in a table; drawings have less room
_STANDS_OUT = 0.5  # standard deviations from the mean of all rows


def component_table(
    clusters: Clusters, kept: Sequence[int], content: Json, intervals: Intervals | None = None
) -> Table:
    """Return what the page shows of the components `kept`.

    Args:
        clusters: All components.
        kept: Those that are shown, the largest first.
        content: That of sweep.json.
        intervals: Their 95 % intervals, if they are known.
    """
    features = clusters.telling(_MOST_FEATURES)
    shown = clusters.narrowed(features)
    standardised, hues = clusters.standardised, figures.colours(clusters)
    n_samples = number_or_nan(content["n_samples"])
    unlike = described(replace(clusters, groups=None))
    overview = [
        {
            "number": clusters.numbers[c],
            "cluster": None if clusters.groups is None else hues[c],
            "colour": hues[c] % N_COLOURS,
            "share": share(float(clusters.weights[c])),
            "interval": "" if intervals is None else _percents(intervals.shares, c),
            "bar": f"{100 * clusters.weights[c] / clusters.weights.max():.1f}",
            "rows": count(round(float(clusters.weights[c]) * n_samples)),
            "stands_out": _stands_out(clusters, standardised[c]),
            "unlike": _unlike(clusters, unlike[c].nearest, unlike[c].words),
        }
        for c in kept
    ]
    spreads = np.sqrt(shown.variances)
    means = [
        [
            {"mean": mean, "spread": spread, "bounds": _bounds(intervals, c, j)}
            for j, (mean, spread) in zip(features, cells, strict=True)
        ]
        for c in kept
        for cells in [map(measured, shown.means[c].tolist(), spreads[c].tolist())]
    ]
    names = [shortened(printable(name), _LONGEST_NAME) for name in shown.feature_names]
    numbers = [clusters.numbers[c] for c in kept]
    # The longer side goes down, where there is room.
    across = len(names) > 8 and len(names) > len(numbers)
    return {
        "overview": overview,
        "means": list(zip(*means, strict=True)) if across else means,
        "down": names if across else numbers,
        "across": numbers if across else names,
        "is_across": across,
        "heat_map": figures.heat_map("heat-map", shown, sorted(kept)),
        "left_out": _left_out(clusters, len(kept), len(names)),
        "has_intervals": intervals is not None,
    }


def _bounds(intervals: Intervals | None, c: int, j: int) -> list[str]:
    """Return the intervals of a component's mean and standard deviation of a feature."""
    if intervals is None:
        return []
    return [_spelt(intervals.means, c, j), f"± {_spelt(intervals.deviations, c, j)}"]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Intervals:
    """The 95 % intervals of a mixture's parameters: pairs of arrays, the lower and upper bounds.

    Of `shares` (k,), and of `means` and `deviations` (k, d), in data units.
    """

    shares: tuple[Floats, Floats]
    means: tuple[Floats, Floats]
    deviations: tuple[Floats, Floats]

    @classmethod
    def of(cls, mixture: Mixture) -> Intervals | None:
        """Return those of a mixture; None where it has none."""
        bootstrap, fitted = mixture.bootstrap, mixture.parameters
        if bootstrap is None or bootstrap.n_used < 2:
            return None
        shares, means, deviations = (
            (interval.low.numpy(), interval.high.numpy())
            for interval in (
                bootstrap.of_weights(fitted),
                bootstrap.of_means(fitted),
                bootstrap.of_deviations(fitted),
            )
        )
        return cls(shares=shares, means=means, deviations=deviations)


def _percents(bounds: tuple[Floats, Floats], c: int) -> str:
    low, high = (100 * float(bound[c]) for bound in bounds)
    decimals = 2 if high - low < 0.2 else 1
    return f"{fixed(low, decimals)} to {fixed(high, decimals)}\u202f%"


def _spelt(bounds: tuple[Floats, Floats], c: int, j: int) -> str:
    low, high = (float(bound[c, j]) for bound in bounds)
    return " to ".join(measured(bound, high - low)[0] for bound in (low, high))


def _unlike(clusters: Clusters, nearest: int | None, words: str) -> str:
    return ABSENT if nearest is None else f"{clusters.numbers[nearest]}: {words}"


def _stands_out(clusters: Clusters, standardised: Floats) -> str:
    """Name the features in which a component lies farthest from the mean of all rows."""
    order = np.argsort(-np.abs(standardised), kind="stable")[:3]
    said = [
        f"{shortened(printable(clusters.feature_names[j]), 32)} {signed(float(standardised[j]))}"
        for j in order
        if abs(standardised[j]) >= _STANDS_OUT
    ]
    return ", ".join(said) or f"no feature by {number(_STANDS_OUT)} or more"


def _left_out(clusters: Clusters, n_clusters: int, n_features: int) -> str:
    k, d = clusters.means.shape
    parts = []
    if n_clusters < k:
        parts.append(f"the {n_clusters:,} largest of {k:,} components")
    if n_features < d:
        parts.append(f"the {n_features:,} of {d:,} features that tell them best apart")
    return f"Shown are {' and '.join(parts)}; the model's files have all." if parts else ""

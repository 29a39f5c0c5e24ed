"""Pictures of a sweep and its best mixture: arrays in, SVG out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from gmm_dist.formats import number, printable, shortened, signed
from gmm_dist.report.labels import numbered
from gmm_dist.report.projection import Clusters, Floats, Plane
from gmm_dist.report.svg import ACCENT, GRID, HALO, INK, MUTED, N_COLOURS, SERIES, Drawing, drawn

Labels = npt.NDArray[np.int64]

MOST_POINTS = 2000
"""Rows of a sample that a picture shows."""

# Colours of a heat map, visible on white and on black; values near the middle are transparent.
_ABOVE, _BELOW = (0xE8, 0x71, 0x0A), (0x2A, 0x8F, 0xD8)
_STRONGEST, _BEND = 0.9, 0.8  # opacity, and its power of the value: small ones show in the dark
_PANEL = (360, 250)  # CSS pixels: three side by side, one on a phone
_MARKERS = ("o", "s", "^", "D")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))  # where colours repeat
_TICKS_APART = 0.12  # of the height of a panel
_LEAST = 1e-300  # smallest distance from the best that a chart shows: parts of less underflow
_FEW = 12  # components whose ellipses may be wide without hiding each other


@dataclass(frozen=True, slots=True)
class Point:
    """One candidate in a chart over k; `is_ranked` is false where the value means nothing."""

    k: int
    value: float
    is_ranked: bool = True


def criterion(
    name: str, label: str, families: Mapping[str, Sequence[Point]], chosen: tuple[int, str]
) -> Drawing:
    """Draw how far candidates are from the best by one criterion, over k; the chosen k marked.

    `label` says what the values are, with their unit; 0 is the best. `families` of covariances
    are lines. Values that are not finite are left out. The scale is that of square roots: small k
    are far from the best, and differences near it matter most.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (family, points) in enumerate(families.items()):
            _family(axes, family, points, i)
        k, family = chosen
        axes.axvline(k, color=ACCENT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        for point in families.get(family, ()):
            if point.k == k and math.isfinite(point.value):
                style: dict[str, Any] = {"markerfacecolor": "none", "clip_on": False}
                height = max(point.value, 0.0)
                axes.plot([k], [height], "o", markersize=12, mec=ACCENT, mew=2, **style)
        axes.set_xlabel("number of components K")
        axes.set_ylabel(label)
        _whole(axes)
        axes.margins(x=0.06)
        _square_root(axes)
        if len(families) > 1:
            figure.legend(loc="outside upper center", ncols=len(families), handlelength=1.6)

    description = "; ".join(_described(family, points) for family, points in families.items())
    title = f"{label}, over the number of components; chosen K = {chosen[0]}"
    return drawn(name, _PANEL, draw, title, description)


def heat_map(name: str, clusters: Clusters, shown: Sequence[int]) -> Drawing:
    """Draw the standardised means of the components `shown`, a line each; features across."""
    values = clusters.standardised[shown]
    k, d = values.shape
    cell_width, cell = min(90.0, max(14.0, 640 / d)), min(30.0, max(14.0, 240 / k))
    names = [shortened(printable(f), 22) for f in clusters.feature_names]
    is_wide = cell_width >= 6.6 * max(map(len, names))
    left = 44.0
    top = 24.0 if is_wide else 12 + 6.4 * max(map(len, names))
    width, height = max(330.0, left + cell_width * d + 10), top + cell * k + 52
    most = float(np.abs(values).max(initial=0.0)) or 1.0
    limit = min(most, 3.0)

    def draw(figure: Figure) -> None:
        figure.set_layout_engine("none")
        place = (left / width, 52 / height, cell_width * d / width, cell * k / height)
        axes = figure.add_axes(place)
        axes.imshow(_tinted(values / limit), aspect="auto", interpolation="none")
        axes.grid(visible=False)
        axes.xaxis.tick_top()
        axes.tick_params(length=0, pad=4)
        for spine in axes.spines.values():
            spine.set_visible(False)
        turned: dict[str, Any] = (
            {}
            if is_wide
            else {"rotation": 90, "rotation_mode": "anchor", "ha": "left", "va": "center"}
        )
        axes.set_xticks(range(d), names, **turned)
        axes.set_yticks(range(k), [clusters.numbers[c] for c in shown])
        if cell_width >= 36 and cell >= 17:
            for i, j in np.ndindex(k, d):
                text = signed(float(values[i, j]))
                axes.text(j, i, text, ha="center", va="center_baseline", fontsize=10)
        _scale(figure, limit, is_cut=most > limit, left=left, size=(width, height))

    title = "Heat map of the standardised means"
    description = (
        f"{k} components by {d} features; the table of clusters has the same means as numbers"
    )
    return drawn(name, (width, height), draw, title, description)


def scatter(
    name: str, clusters: Clusters, plane: Plane, X: Floats, hues: Labels, shown: Sequence[int]
) -> Drawing:
    """Draw rows of several components in a plane, with ellipses.

    Args:
        name: Begins the drawing's ids.
        clusters: The mixture's components.
        plane: The plane of the picture.
        X: Rows (m, d) in feature units.
        hues: The colour (m,) of each row, as `colours` has it.
        shown: Indices of the components that have ellipses.
    """
    points, hues = plane(X[:MOST_POINTS]), hues[:MOST_POINTS]
    means, covariances = plane(clusters.means), clusters.projected(plane.axes)
    outlines = colours(clusters)
    size = (520.0, 480.0)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(visible=False)
        for i, colour in enumerate(SERIES):
            ours = points[hues % N_COLOURS == i]
            axes.plot(*ours.T, "o", markersize=2.6, markeredgewidth=0, color=colour, alpha=0.5)
        for c in shown:
            axes.add_patch(_ellipse(means[c], covariances[c], radius(len(shown)), outlines[c]))
        xlim, ylim = _frame(points, means)
        axes.set(xlim=xlim, ylim=ylim)
        axes.set_xlabel(shortened(printable(plane.labels[0]), 48))
        axes.set_ylabel(shortened(printable(plane.labels[1]), 40))
        _numbers(axes, "x")
        _numbers(axes, "y")
        figure.draw_without_rendering()  # places the axes, by which the labels go
        numbered(axes, means[list(shown)], [clusters.numbers[c] for c in shown])

    title = f"A sample of rows in {plane.kind}, with the components"
    description = f"{len(points):,} rows, {len(shown)} components as ellipses, each with its number"
    return drawn(name, size, draw, title, description)


def densities(name: str, clusters: Clusters, X: Floats, shown: Sequence[int]) -> Drawing:
    """Draw the histogram of rows X (m, 1), and the densities of the components `shown`."""
    x, means = X[:, 0], clusters.means[:, 0]
    spreads = np.sqrt(clusters.projected(np.eye(1))[:, 0, 0])
    (low, high), _ = _frame(np.column_stack([x, x]), np.column_stack([means, means]))
    grid, hues = np.linspace(low, high, 400), colours(clusters)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        inside = x[(x >= low) & (x <= high)]
        if len(inside):
            weight = np.full(len(inside), 1 / (len(x) * (high - low) / 60))
            axes.hist(inside, 60, range=(low, high), weights=weight, color=GRID, label="rows")
        heights = clusters.weights / (spreads * math.sqrt(2 * math.pi))
        apart = (grid[:, None] - means) / spreads
        curves = heights * np.exp(-0.5 * apart**2)
        style: dict[str, Any] = {"ha": "center", "va": "bottom", "gid": HALO}
        for c in shown:
            axes.plot(grid, curves[:, c], color=SERIES[hues[c] % N_COLOURS], linewidth=1.6)
            if low <= means[c] <= high:
                at = (means[c], heights[c])
                axes.annotate(clusters.numbers[c], at, (0, 3), textcoords="offset pixels", **style)
        axes.plot(
            grid, curves.sum(1), color=INK, linewidth=1, linestyle=(0, (4, 3)), label="mixture"
        )
        axes.set_xlabel(shortened(printable(clusters.feature_names[0]), 48))
        axes.set_ylabel("density, per unit of the feature")
        _numbers(axes, "x")
        _numbers(axes, "y")
        figure.legend(loc="outside upper center", ncols=2)

    title = "Rows of the one feature, with the components' densities"
    return drawn(name, (520, 320), draw, title, f"{len(x):,} rows, {len(shown)} components")


def climb(name: str, lines: Sequence[tuple[str, Sequence[float]]]) -> Drawing:
    """Draw mean log-likelihoods per row over iterations; the first line is the chosen one."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (_, bounds) in enumerate(lines):
            _line(axes, np.asarray(bounds, dtype=np.float64), is_chosen=i == 0)
        axes.set_xlabel("iteration")
        axes.set_ylabel("mean log-likelihood, nats per row")
        _whole(axes)
        _numbers(axes, "y")
        axes.margins(x=0.03, y=0.08)

    description = f"{len(lines)} candidates; the thick line is the chosen one, {lines[0][0]}"
    return drawn(name, _PANEL, draw, "Mean log-likelihood over iterations", description)


def approach(name: str, lines: Sequence[tuple[str, Sequence[float]]], tol: float) -> Drawing:
    """Draw what was left to gain up to each fit's last value, on a logarithmic scale."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (_, bounds) in enumerate(lines):
            values = np.asarray(bounds, dtype=np.float64)
            left = values[-1] - values[:-1]
            _line(axes, np.where(left > 0, left, np.nan), is_chosen=i == 0)
        axes.set_yscale("log")
        if tol > 0:
            axes.axhline(tol, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            place = ("axes fraction", "data")
            axes.annotate(f"tol {tol:g}", (0.01, tol), xycoords=place, va="bottom", gid=HALO)
        axes.set_xlabel("iteration")
        axes.set_ylabel("left to gain, nats per row")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        _whole(axes)

    title = "What was left to gain at each iteration"
    description = f"{len(lines)} candidates; the thick line is the chosen one, {lines[0][0]}"
    return drawn(name, _PANEL, draw, title, description)


def histograms(
    name: str, label: str, edges: Sequence[float], series: Mapping[str, Sequence[float]]
) -> Drawing:
    """Draw distributions over the same bins as outlines; `series` are shares of rows."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (title, shares) in enumerate(series.items()):
            axes.stairs(
                shares,
                edges,
                color=SERIES[i],
                linewidth=2,
                label=title,
                linestyle=("-", (0, (4, 2)))[i % 2],
            )
        axes.set_xlabel(label)
        axes.set_ylabel("share of rows")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g} %"))
        _numbers(axes, "x")
        figure.legend(loc="outside upper center", ncols=len(series))

    return drawn(name, _PANEL, draw, f"Distributions of {label}", ", ".join(series))


def changes(
    name: str, numbers: Sequence[str], shifts: Sequence[float], weights: Sequence[float]
) -> Drawing:
    """Draw each component's change of weight (of one) over the shift of its mean (sd)."""
    points = np.column_stack([shifts, 100 * np.asarray(weights)])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.plot(*points.T, "o", color=ACCENT, markersize=4, alpha=0.6, markeredgewidth=0)
        axes.set_xlabel("shift of the mean, standard deviations")
        axes.set_ylabel("change of share, points")
        axes.margins(0.1)
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        _numbers(axes, "x")
        _numbers(axes, "y")
        figure.draw_without_rendering()  # places the axes, by which the labels go
        order = np.argsort(-np.abs(points).sum(1), kind="stable")
        numbered(axes, points[order], [numbers[i] for i in order])

    description = f"{len(points)} components that were there the night before, each with its number"
    return drawn(name, _PANEL, draw, "What has changed of each component", description)


def n_outside(clusters: Clusters, plane: Plane, X: Floats) -> int:
    """Return how many of the rows that `scatter` draws lie outside its frame."""
    points = plane(X[:MOST_POINTS])
    (x0, x1), (y0, y1) = _frame(points, plane(clusters.means))
    x, y = points.T
    return int(((x < x0) | (x > x1) | (y < y0) | (y > y1)).sum())


def colours(clusters: Clusters) -> list[int]:
    """Return the colour of each component: by its number, so that it stays from night to night.

    Taken modulo N_COLOURS; components of one colour differ in their dashes. Components that are
    merged have their cluster's colour.
    """
    if clusters.groups is not None:
        numbers = clusters.group_numbers or range(max(clusters.groups) + 1)
        return [numbers[group] for group in clusters.groups]
    pairs = enumerate(clusters.numbers)
    return [int(name) if name.isdecimal() else i for i, name in pairs]


def radius(n_components: int) -> float:
    """Return how many standard deviations the ellipses of a picture reach."""
    return 2.0 if n_components <= _FEW else 1.0


def _family(axes: Axes, family: str, points: Sequence[Point], i: int) -> None:
    finite = sorted((p for p in points if math.isfinite(p.value)), key=lambda p: p.k)
    ranked = [p for p in finite if p.is_ranked]
    style: dict[str, Any] = {"color": SERIES[i % N_COLOURS], "markersize": 4.5, "clip_on": False}
    marker = _MARKERS[i % len(_MARKERS)]
    axes.plot(
        [p.k for p in ranked], [p.value for p in ranked], marker=marker, label=family, **style
    )
    # Values that mean nothing must not decide the scale.
    highest = max((p.value for p in ranked), default=0.0)
    failed = [p for p in finite if not p.is_ranked]
    heights = [min(max(p.value, 0.0), highest) for p in failed]
    axes.plot([p.k for p in failed], heights, "x", color=MUTED, markersize=6, clip_on=False)


def _square_root(axes: Axes) -> None:
    """Give the y-axis the scale of square roots, from 0 up, with round ticks."""
    high = axes.dataLim.y1
    high = high if math.isfinite(high) and high > _LEAST else 1.0
    axes.set_ylim(0, 1.12 * high)
    axes.set_yscale("function", functions=(lambda v: np.sqrt(np.abs(v)), np.square))
    ticks = [0.0]
    for part in (0.25, 0.45, 0.65, 0.85, 1.0):
        tick = high * part**2
        unit = 10.0 ** math.floor(math.log10(tick))
        tick = math.floor(tick / unit + 1e-9) * unit
        if math.sqrt(tick / high) - math.sqrt(ticks[-1] / high) > _TICKS_APART:
            ticks.append(tick)
    axes.set_yticks(ticks, [number(tick, 1) for tick in ticks])


def _line(axes: Axes, values: Floats, *, is_chosen: bool) -> None:
    colour, width, z = (ACCENT, 2.2, 4) if is_chosen else (MUTED, 0.9, 2)
    (line,) = axes.plot(values, color=colour, linewidth=width, zorder=z)
    if is_chosen or len(values) == 1:
        line.set(marker="o", markersize=3)


def _described(family: str, points: Sequence[Point]) -> str:
    values = [f"K {p.k}: {number(p.value, 6)}" for p in points if p.is_ranked]
    return f"{family}: {', '.join(values)}"


def _ellipse(mean: Floats, covariance: Floats, radius: float, hue: int) -> Ellipse:
    variances, axes = np.linalg.eigh(covariance)
    width, height = 2 * radius * np.sqrt(variances.clip(0))
    angle = math.degrees(math.atan2(axes[1, 0], axes[0, 0]))
    style = {"edgecolor": SERIES[hue % N_COLOURS], "linestyle": _DASHES[hue // N_COLOURS % 3]}
    at = (float(mean[0]), float(mean[1]))
    return Ellipse(at, width, height, angle=angle, fill=False, linewidth=1.4, **style)


def _frame(points: Floats, means: Floats) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the limits of a picture: nearly all rows, and the means that lie not far off.

    All rows, where nearly all are equal; a margin about them, where all are.
    """
    result = []
    for x, m in zip(points.T, means.T, strict=True):
        x = x if len(x) else m
        low, high = np.quantile(x, [0.005, 0.995])
        if low == high:
            low, high = x.min(), x.max()
        reach = high - low
        near = m[(m >= low - reach) & (m <= high + reach)]
        low, high = min([low, *near]), max([high, *near])
        margin = 0.06 * (high - low) or max(1.0, 1e-3 * abs(low))
        result.append((float(low - margin), float(high + margin)))
    return result[0], result[1]


def _tinted(values: Floats) -> npt.NDArray[np.uint8]:
    """Return colours (k, d, 4) of values in [-1, 1]: none at 0, so that the page shows through."""
    colours = np.empty((*values.shape, 4), dtype=np.uint8)
    colours[..., :3] = np.where(values[..., None] > 0, _ABOVE, _BELOW)
    colours[..., 3] = np.round(255 * _STRONGEST * np.abs(values).clip(0, 1) ** _BEND)
    return colours


def _scale(
    figure: Figure, limit: float, *, is_cut: bool, left: float, size: tuple[float, float]
) -> None:
    width, height = size
    axes = figure.add_axes((left / width, 30 / height, min(200.0, width - 60) / width, 9 / height))
    axes.imshow(
        _tinted(np.linspace(-1, 1, 41)[None]),
        aspect="auto",
        interpolation="none",
        extent=(-limit, limit, 0, 1),
    )
    axes.grid(visible=False)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    beyond = (" or less", " or more") if is_cut else ("", "")
    ends = [f"\u2212{limit:.1f}{beyond[0]}", "0", f"+{limit:.1f} sd{beyond[1]}"]
    axes.set_xticks([-limit, 0, limit], ends)
    axes.tick_params(length=0)


def _whole(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=9))


def _numbers(axes: Axes, which: str) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))

    def spelt(value: float, _: int | None) -> str:
        step = np.diff(axis.get_majorticklocs()).min(initial=math.inf)
        if not 1e-4 <= abs(step) < 1e12:
            return f"{value:g}".replace("-", "\u2212")
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        return f"{value:,.{decimals}f}".replace("-", "\u2212")

    axis.set_major_formatter(FuncFormatter(spelt))

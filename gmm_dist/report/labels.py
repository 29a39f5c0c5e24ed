"""Labels placed beside points so that none hides another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from gmm_dist.report.projection import Floats
from gmm_dist.report.svg import HALO, MUTED

_RINGS, _LINE = 14, 12.0  # of places tried for a label; its height, pixels


def numbered(axes: Axes, points: Floats, texts: Sequence[str]) -> None:
    """Write a text near each point, the first ones nearest, none on another."""
    box = axes.get_window_extent()
    taken: list[tuple[Floats, float]] = []
    for point, text in zip(points, texts, strict=True):
        at = axes.transData.transform(point)
        if not box.contains(*at):
            continue
        half = 3.6 * len(text) + 1.5
        spot = _free_spot(at, taken, half)
        taken.append((spot, half))
        is_moved = np.hypot(*(spot - at)) > 10
        axes.annotate(
            text,
            point,
            xytext=tuple(spot - at),
            textcoords="offset pixels",
            ha="center",
            va="center_baseline",
            fontsize=10.5,
            fontweight="bold",
            gid=HALO,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.8} if is_moved else None,
        )


def _free_spot(at: Floats, taken: Sequence[tuple[Floats, float]], half: float) -> Floats:
    """Return the place nearest to `at`, pixels, where a text of half that width hits no other."""
    for ring in range(_RINGS):
        n_turns = max(1, 8 * ring)
        for turn in range(n_turns):
            angle = 2 * math.pi * turn / n_turns
            spot = at + 8.0 * ring * np.array([math.cos(angle), math.sin(angle)])
            if all(
                abs(spot[0] - other[0]) > half + width or abs(spot[1] - other[1]) > _LINE
                for other, width in taken
            ):
                return np.asarray(spot)
    return at

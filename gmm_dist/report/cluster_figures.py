"""Pictures of the clusters that components are merged into: the entropy, and the tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gmm_dist.formats import number
from gmm_dist.model.clusters import ENTROPY, MISCLASSIFICATION, Clusters
from gmm_dist.report.svg import ACCENT, INK, MUTED, N_COLOURS, SERIES, Drawing, drawn

_PANEL = (400, 270)  # CSS pixels
_MOST_LEAVES = 60
_LEAF = 15.0  # CSS pixels of height
_NAMES = {MISCLASSIFICATION: "by misclassification", ENTROPY: "by entropy"}


def entropy_curve(name: str, clusters: Clusters) -> Drawing:
    """Draw the entropy of the clusters' labels over their number, with the chosen one marked."""
    n, series = clusters.n_clusters, clusters.tree.entropies
    others = {key: tree for key, tree in clusters.trees.items() if key != clusters.by}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        style: dict[str, Any] = {"markersize": 4, "clip_on": False}
        axes.plot(
            range(1, len(series) + 1),
            series,
            "o-",
            color=SERIES[0],
            label=_NAMES.get(clusters.by, clusters.by),
            **style,
        )
        for i, (key, tree) in enumerate(others.items(), start=1):
            label = _NAMES.get(key, key)
            values = tree.entropies
            axes.plot(
                range(1, len(values) + 1),
                values,
                "s",
                linestyle=(0, (4, 2)),
                color=SERIES[i],
                label=label,
                **style,
            )
        axes.axvline(n, color=ACCENT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        ring: dict[str, Any] = {"markerfacecolor": "none", "clip_on": False}
        axes.plot([n], [series[n - 1]], "o", markersize=12, mec=ACCENT, mew=2, **ring)
        axes.set_xlabel("number of clusters")
        axes.set_ylabel("entropy of the labels, nats per row")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=9))
        axes.margins(x=0.06)
        axes.set_ylim(bottom=0)
        if others:
            figure.legend(loc="outside upper center", ncols=2, handlelength=1.6)

    values = ", ".join(f"{i}: {number(value)}" for i, value in enumerate(series, start=1))
    title = f"Entropy of the labels over the number of clusters; chosen: {n}"
    return drawn(name, _PANEL, draw, title, f"{_NAMES.get(clusters.by, clusters.by)}: {values}")


def tree(name: str, clusters: Clusters, numbers: Sequence[str], colours: Sequence[int]) -> Drawing:
    """Draw the merges from the components, at the left, to one cluster; the cut marked.

    Of more than 60 components the first merges are left out: a leaf then stands for several.

    Args:
        name: Begins the drawing's ids.
        clusters: The clusters.
        numbers: The components' names.
        colours: The components' colours.
    """
    merges, k = clusters.tree.merges, clusters.n_components
    n_leaves = min(k, _MOST_LEAVES)
    members = _members(clusters, n_leaves)
    leaves = _order(clusters, list(members), n_leaves)
    heights = {leader: float(i) for i, leader in enumerate(leaves)}
    size = (_PANEL[0], max(150.0, 70 + _LEAF * n_leaves))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(visible=False)
        reach, height = dict.fromkeys(leaves, float(n_leaves)), dict(heights)
        for i, merge in enumerate(merges[k - n_leaves :]):
            left = n_leaves - 1.0 - i
            hue = SERIES[colours[merge.first] % N_COLOURS] if left >= clusters.n_clusters else MUTED
            line: dict[str, Any] = {"color": hue, "linewidth": 1.6, "solid_capstyle": "round"}
            pair = (merge.first, merge.second)
            for c in pair:
                axes.plot([reach[c], left], [height[c]] * 2, **line)
            axes.plot([left] * 2, [height[c] for c in pair], **line)
            reach[merge.first] = left
            height[merge.first] = sum(height[c] for c in pair) / 2
        cut = clusters.n_clusters
        if cut < n_leaves:
            axes.axvline(cut - 0.5, color=ACCENT, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlim(n_leaves + 0.3, 0.7)
        axes.set_ylim(n_leaves - 0.4, -0.6)
        axes.set_yticks(range(n_leaves), [_leaf(members[c], numbers) for c in leaves])
        for label, leader in zip(axes.get_yticklabels(), leaves, strict=True):
            label.set_color(SERIES[colours[leader] % N_COLOURS] if k > 1 else INK)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=9))
        axes.set_xlabel("number of clusters after the merge")

    title = f"The tree of merges, cut at {clusters.n_clusters} clusters"
    description = "; ".join(
        f"cluster {clusters.numbers[c]}: components "
        + ", ".join(numbers[i] for i, own in enumerate(clusters.of_component) if own == c)
        for c in range(clusters.n_clusters)
    )
    return drawn(name, size, draw, title, description)


def _members(clusters: Clusters, n: int) -> dict[int, list[int]]:
    """Return the components of each of `n` clusters, by the first of them."""
    groups: dict[int, list[int]] = {}
    for c, group in enumerate(clusters.tree.of_component(n)):
        groups.setdefault(group, []).append(c)
    return {own[0]: own for own in groups.values()}


def _order(clusters: Clusters, leaders: list[int], n_leaves: int) -> list[int]:
    """Return the leaves so that no lines of the tree cross."""
    order = {leader: [leader] for leader in leaders}
    for merge in clusters.tree.merges[clusters.n_components - n_leaves :]:
        order[merge.first] += order.pop(merge.second)
    (whole,) = order.values()
    return whole


def _leaf(members: Sequence[int], numbers: Sequence[str]) -> str:
    more = f" +{len(members) - 1}" if len(members) > 1 else ""
    return numbers[members[0]] + more

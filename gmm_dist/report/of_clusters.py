"""What the page says of clusters: how many, why, and which components they are made of."""

from __future__ import annotations

from typing import Any

from gmm_dist.formats import count, counted, share
from gmm_dist.model import clusters as model
from gmm_dist.report import cluster_figures, figures
from gmm_dist.report.projection import Clusters
from gmm_dist.report.svg import N_COLOURS

_MOST_NAMED = 12  # components of a cluster, by number


def cluster_table(
    found: model.Clusters | None, components: Clusters, n_samples: float
) -> dict[str, Any] | None:
    """Return what the page shows of clusters; None where none were asked for."""
    if found is None:
        return None
    weights, of_component = components.weights, found.of_component
    shares = [
        sum(float(w) for w, own in zip(weights, of_component, strict=True) if own == c)
        for c in range(found.n_clusters)
    ]
    rows = [
        {
            "number": c,
            "colour": c % N_COLOURS,
            "share": share(shares[c]),
            "bar": f"{100 * shares[c] / max(shares):.1f}",
            "rows": count(round(shares[c] * n_samples)),
            "components": _named(found, components, c),
        }
        for c in sorted(range(found.n_clusters), key=lambda c: (-shares[c], c))
    ]
    drawings = []
    if found.n_components > 1:
        hues = figures.colours(components)
        drawings = [
            cluster_figures.entropy_curve("entropy", found),
            cluster_figures.tree("tree", found, components.numbers, hues),
        ]
    return {"rows": rows, "why": _why(found), "drawings": drawings}


def _named(found: model.Clusters, components: Clusters, cluster: int) -> str:
    """Name the components of a cluster, the largest first."""
    own = [i for i, c in enumerate(found.of_component) if c == cluster]
    own.sort(key=lambda i: -components.weights[i])
    names = ", ".join(components.numbers[i] for i in own[:_MOST_NAMED])
    return names + (f" and {len(own) - _MOST_NAMED:,} more" if len(own) > _MOST_NAMED else "")


def _why(found: model.Clusters) -> list[str]:
    """Say how the number came about, and which rows chose the merges."""
    k = found.n_components
    if k == 1:
        return ["One component is one cluster."]
    if found.rule == model.CHOSEN:
        first = f"{counted(found.n_clusters, 'cluster')} were asked for."
        if found.n_clusters == 1:
            first = "One cluster was asked for."
    else:
        first = f"Components are {found.rule}."
    chosen = "all rows"
    if found.n_sampled is not None:
        chosen = f"a sample of {counted(found.n_sampled, 'row')}"
    lines = [first, f"The merges were chosen by {chosen} and measured by all rows."]
    if found.n_clusters > 1:
        nxt = found.tree.merges[k - found.n_clusters]
        lines.append(
            f"Of the two clusters that would be merged next, {share(nxt.misclassification)} of the "
            "rows of one would be taken for the other's."
        )
    return lines

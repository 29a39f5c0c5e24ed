"""What the page says of clusters: how many, why, and which components they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gmm_dist.formats import ABSENT, count, counted, fixed, share
from gmm_dist.model import clusters as model
from gmm_dist.report import cluster_figures, figures
from gmm_dist.report.description import Description, described
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
    every = described(replace(components, groups=of_component))
    rows = [
        {
            "number": found.numbers[c],
            "colour": found.numbers[c] % N_COLOURS,
            "share": share(shares[c]),
            "bar": f"{100 * shares[c] / max(shares):.1f}",
            "rows": count(round(shares[c] * n_samples)),
            "unlike": _unlike(every[c], found.numbers),
            "components": _named(found, components, c),
            **_stability(found.stability, c),
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
    return {"rows": rows, "why": _why(found), "stable": _stable(found), "drawings": drawings}


def _unlike(one: Description, numbers: Sequence[int]) -> str:
    return ABSENT if one.nearest is None else f"{numbers[one.nearest]}: {one.words}"


def _stability(stability: model.Stability | None, c: int) -> dict[str, str]:
    """Return how stable a cluster is."""
    if stability is None:
        return {}
    from_fit, afresh = stability.from_fit.similarities[c], stability.afresh.similarities[c]
    return {
        "stable": "yes" if stability.is_stable[c] else "no",
        "from_fit": fixed(from_fit, 2),
        "afresh": fixed(afresh, 2),
    }


def _stable(found: model.Clusters) -> list[str]:
    """Say how stable the clusters are, and what is meant by that."""
    stability = found.stability
    if stability is None:
        return []
    one, two = stability.from_fit, stability.afresh
    lines = [
        "Stable: how similar a cluster is to its best match in resampled rows, those in both by "
        f"those in either, in the mean; from {model.STABLE} it is stable. {one.n_resamples:,} "
        "fits to resamples of all rows started from this fit, and so flatter it; "
        f"{two.n_resamples:,} were searched for afresh, on a sample of "
        f"{counted(stability.n_rows, 'row')}. Components were merged anew in each."
    ]
    if found.rule != model.CHOSEN:
        lines.append(
            f"As many clusters as here were found in {one.n_alike:,} of {one.n_resamples:,} and in "
            f"{two.n_alike:,} of {two.n_resamples:,} of them."
        )
    return lines


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

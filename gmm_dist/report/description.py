"""Say in a few words what sets each cluster apart from its nearest one, in data units."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gmm_dist.formats import number, printable, shortened
from gmm_dist.model.mixture import Mixture
from gmm_dist.report.projection import Clusters, Floats

_MOST = 3  # features that are named
_LONGEST_NAME = 32
_APART = 0.5  # standard deviations between two means
_WIDER = 1.5  # times as wide


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Description:
    """A cluster: its share of the rows, `mean` and standard deviations `spread` (d,), data units.

    `nearest` is the cluster that is least far away, None where there is one cluster; `words` say
    what is different there.
    """

    share: float
    mean: Floats
    spread: Floats
    nearest: int | None
    words: str


def arrays_of(mixture: Mixture, numbers: tuple[str, ...] | None = None) -> Clusters:
    """Return a mixture's components as arrays, by the names `numbers` or their own ids."""
    parameters, merged = mixture.parameters, mixture.clusters
    names = mixture.feature_names or tuple(f"x{j}" for j in range(mixture.n_features))
    spread = parameters.type.spread(parameters.stacked_covariances, mixture.n_features)
    return Clusters(
        weights=parameters.weights.numpy(),
        means=parameters.means.numpy(),
        covariances=spread.numpy(),
        feature_names=tuple(names),
        numbers=numbers or tuple(map(str, mixture.component_ids)),
        groups=None if merged is None else merged.of_component,
        group_numbers=None if merged is None else merged.numbers,
    )


def described(components: Clusters) -> list[Description]:
    """Describe the clusters that components are merged into, or else each component.

    The nearest is that of the least Σ_j (m_j - n_j)² / s_j², m and n being the means and s² the
    mean of the two variances.
    """
    groups = components.groups or tuple(range(len(components.weights)))
    moments = [_moments(components, c, groups) for c in range(max(groups) + 1)]
    shares, means, spreads = (np.array(each) for each in zip(*moments, strict=True))
    found = []
    for c in range(len(shares)):
        nearest = _nearest(c, means, spreads)
        words = "" if nearest is None else _words(components, c, nearest, means, spreads)
        found.append(
            Description(
                share=float(shares[c]),
                mean=means[c],
                spread=spreads[c],
                nearest=nearest,
                words=words,
            )
        )
    return found


def _moments(components: Clusters, c: int, groups: tuple[int, ...]) -> tuple[float, Floats, Floats]:
    """Return the share, mean and standard deviations of a cluster."""
    own = [i for i, group in enumerate(groups) if group == c]
    share = float(components.weights[own].sum())
    weights = components.weights[own] / share if share > 0 else np.full(len(own), 1 / len(own))
    first = components.means[own[0]]
    mean = first + weights @ (components.means[own] - first)
    within = weights @ components.variances[own]
    # Features may have units whose squares float64 does not hold.
    between = np.sqrt(weights)[:, None] * np.abs(components.means[own] - mean)
    return share, mean, np.hypot(np.sqrt(within), np.hypot.reduce(between, axis=0))


def _apart(c: int, means: Floats, spreads: Floats) -> Floats:
    """Return how far each cluster lies from cluster `c` (n, d), in standard deviations."""
    both = np.hypot(spreads, spreads[c]) / np.sqrt(2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.nan_to_num(np.abs(means - means[c]) / both, nan=0.0, posinf=1e9))


def _nearest(c: int, means: Floats, spreads: Floats) -> int | None:
    if len(means) == 1:
        return None
    distances = np.linalg.norm(_apart(c, means, spreads), axis=1)
    distances[c] = np.inf
    return int(np.argmin(distances))


def _words(components: Clusters, c: int, other: int, means: Floats, spreads: Floats) -> str:
    """Name the features whose means differ most, then those whose spreads do."""
    apart = _apart(c, means, spreads)[other]
    with np.errstate(divide="ignore", invalid="ignore"):
        wider = np.abs(np.nan_to_num(np.log(spreads[c] / spreads[other]), nan=0.0))
    by_mean = [j for j in np.argsort(-apart, kind="stable")[:_MOST] if apart[j] >= _APART]
    by_spread = [j for j in np.argsort(-wider, kind="stable") if wider[j] >= np.log(_WIDER)]
    said = [
        f"{_name(components, j)} {number(means[c, j], 3)} ({number(means[other, j], 3)})"
        for j in by_mean
    ]
    said += [
        f"spread of {_name(components, j)} {number(spreads[c, j], 2)} "
        f"({number(spreads[other, j], 2)})"
        for j in by_spread[: _MOST - len(said)]
    ]
    return ", ".join(said) or "how the features go together"


def _name(components: Clusters, j: int) -> str:
    return shortened(printable(components.feature_names[j]), _LONGEST_NAME)

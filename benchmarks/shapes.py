"""Draw rows of clusters that are not Gaussian, whose number is known: what `clusters` asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Rng = np.random.Generator

NOISE = -1  # the label of rows that belong to no cluster

# Rows of the draws of a family, in turn, and their features: few are large.
_ROWS = (5_000, 8_000, 12_000, 20_000, 10_000, 5_000, 16_000, 6_000, 50_000, 200_000)
_FEATURES = (2, 3, 5, 10, 20, 2, 4, 2, 8, 2)
_TAIL = 0.99  # of a cluster's rows lie, along the line to another, before the gap between the two


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Draw:
    """Rows `X` (n, d), in random order, and each one's cluster; `NOISE` for none."""

    family: str
    number: int
    seed: int
    X: Floats
    labels: Labels

    @property
    def n_clusters(self) -> int:
        return len(set(self.labels.tolist()) - {NOISE})


@dataclass(frozen=True, slots=True, eq=False)
class _Shape:
    """Rows about 0, of one cluster or two (`labels` from 0 up)."""

    X: Floats
    labels: Labels


def draw(family: str, number: int, seed: int) -> Draw:
    """Return a draw: 3 to 6 clusters; equal arguments give equal rows.

    Clusters are laid down one after another, each in a random direction, as near to the others
    as leaves a gap: of two clusters 99 % of the rows, along the line that joins them, lie on
    their own side of a gap of 0.25 to 1 of their mean standard deviation.
    """
    rng = np.random.default_rng((seed, number, list(FAMILIES).index(family)))
    n, d = _ROWS[number % len(_ROWS)], _FEATURES[number % len(_FEATURES)]
    n_clusters = int(rng.integers(3, 7))
    make = FAMILIES[family]
    shapes: list[_Shape] = []
    left = n_clusters
    shares = rng.dirichlet(np.full(n_clusters, 8.0)).clip(0.05)
    sizes = np.maximum((n * shares / shares.sum()).astype(int), 50)
    while left:
        shape = make(rng, sizes[:left][-2:], d, is_first=not shapes)
        shapes.append(shape)
        left -= len(set(shape.labels.tolist()))
    X, labels = _laid_out(rng, shapes)
    if family == "t with noise":
        low, high = np.quantile(X, (0.001, 0.999), axis=0)
        margin = 0.1 * (high - low)
        noise = rng.uniform(low - margin, high + margin, (len(X) // 19, d))
        X = np.concatenate([X, noise])
        labels = np.concatenate([labels, np.full(len(noise), NOISE)])
    order = rng.permutation(len(X))
    return Draw(family=family, number=number, seed=seed, X=X[order], labels=labels[order])


def _laid_out(rng: Rng, shapes: list[_Shape]) -> tuple[Floats, Labels]:
    placed: list[tuple[Floats, Floats]] = []  # each shape's rows about 0, and its place
    labels, n_labels = [], 0
    for shape in shapes:
        at = np.zeros(shape.X.shape[1])
        if placed:
            direction = _direction(rng, len(at))
            gap = rng.uniform(0.25, 1.0)
            unit = float(np.mean([other.std(0).mean() for other, _ in placed]))
            step = 0.0
            while not all(
                _are_apart(shape.X, step * direction, other, place, gap) for other, place in placed
            ):
                step += 0.05 * unit
            at = step * direction
        placed.append((shape.X, at))
        labels.append(shape.labels + n_labels)
        n_labels += int(shape.labels.max()) + 1
    return np.concatenate([X + at for X, at in placed]), np.concatenate(labels)


def _are_apart(X: Floats, at: Floats, other: Floats, place: Floats, gap: float) -> bool:
    between = at - place
    distance = float(np.linalg.norm(between))
    if distance == 0:
        return False
    line = between / distance
    ours, theirs = -(X[:2000] @ line), other[:2000] @ line
    spread = (ours.std() + theirs.std()) / 2
    reach = np.quantile(ours, _TAIL) + np.quantile(theirs, _TAIL)
    return bool(distance > reach + gap * spread)


def _direction(rng: Rng, d: int) -> Floats:
    line = rng.standard_normal(d)
    return np.asarray(line / np.linalg.norm(line))


def _rotation(rng: Rng, d: int) -> Floats:
    return np.asarray(np.linalg.qr(rng.standard_normal((d, d)))[0])


def _alone(X: Floats) -> _Shape:
    return _Shape(X, np.zeros(len(X), dtype=np.int64))


def _gaussian(rng: Rng, sizes: Labels, d: int, *, is_first: bool) -> _Shape:
    scales = np.exp(rng.uniform(-0.5, 0.5, d))
    return _alone(rng.standard_normal((sizes[-1], d)) * scales @ _rotation(rng, d))


def _lognormal(rng: Rng, sizes: Labels, d: int, *, is_first: bool) -> _Shape:
    """Skewed in up to three directions, with a sigma of 0.4 to 0.8; Gaussian in the others."""
    X = rng.standard_normal((sizes[-1], d))
    for j in range(min(d, 3)):
        sigma = rng.uniform(0.4, 0.8)
        skewed = np.exp(sigma * X[:, j])
        X[:, j] = (skewed - skewed.mean()) / skewed.std()
    return _alone(X @ _rotation(rng, d))


def _square(rng: Rng, sizes: Labels, d: int, *, is_first: bool) -> _Shape:
    """Uniform in a box, in up to three directions; Gaussian in the others."""
    X = rng.standard_normal((sizes[-1], d)) * 0.5
    flat = min(d, 3)
    X[:, :flat] = rng.uniform(-1, 1, (sizes[-1], flat)) * np.exp(rng.uniform(-0.4, 0.4, flat))
    return _alone(X @ _rotation(rng, d))


def _ring(rng: Rng, sizes: Labels, d: int, *, is_first: bool) -> _Shape:
    """A ring about a disc, as two clusters, first; then Gaussians."""
    if not is_first:
        return _gaussian(rng, sizes, d, is_first=False)
    n_ring, n_disc = sizes
    angle, radius = rng.uniform(0, 2 * np.pi, n_ring), 3 + 0.2 * rng.standard_normal(n_ring)
    ring = radius[:, None] * np.column_stack([np.cos(angle), np.sin(angle)])
    angle, radius = rng.uniform(0, 2 * np.pi, n_disc), 1.3 * np.sqrt(rng.uniform(0, 1, n_disc))
    disc = radius[:, None] * np.column_stack([np.cos(angle), np.sin(angle)])
    return _embedded(rng, ring, disc, d)


def _moons(rng: Rng, sizes: Labels, d: int, *, is_first: bool) -> _Shape:
    """Two moons, as two clusters, first; then Gaussians."""
    if not is_first:
        return _gaussian(rng, sizes, d, is_first=False)
    halves = []
    for n, sign, shift in ((sizes[0], 1, (0.0, 0.0)), (sizes[1], -1, (1.0, 0.5))):
        angle = rng.uniform(0, np.pi, n)
        arc = np.column_stack([sign * np.cos(angle), sign * np.sin(angle)]) + np.array(shift)
        halves.append(3 * (arc + 0.07 * rng.standard_normal((n, 2))))
    return _embedded(rng, *halves, d)


def _embedded(rng: Rng, first: Floats, second: Floats, d: int) -> _Shape:
    """Return two clusters of a plane in d dimensions, Gaussian in the others."""
    X = np.concatenate([first, second])
    X = np.column_stack([X - X.mean(0), rng.standard_normal((len(X), d - 2))])
    labels = np.repeat(np.arange(2), (len(first), len(second)))
    return _Shape(X @ _rotation(rng, d), labels)


def _student(rng: Rng, sizes: Labels, d: int, *, is_first: bool) -> _Shape:
    """A multivariate t of 3 to 6 degrees of freedom."""
    freedom = rng.uniform(3, 6)
    X = _gaussian(rng, sizes, d, is_first=is_first).X
    return _alone(X / np.sqrt(rng.chisquare(freedom, (len(X), 1)) / freedom))


FAMILIES: dict[str, Callable[..., Any]] = {
    "Gaussian": _gaussian,
    "lognormal": _lognormal,
    "squares": _square,
    "ring and disc": _ring,
    "two moons": _moons,
    "t with noise": _student,
}

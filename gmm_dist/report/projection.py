"""A mixture's clusters as arrays, and the plane in which a picture shows them best."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_DEPENDENT = 1e-8  # of the largest eigenvalue: below it a direction has no variance
_MOST_FEATURES = 256  # of a plane: its eigenvectors cost d³


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Clusters:
    """A mixture as arrays, in data units, float64.

    `weights` (k,), `means` (k, d), `covariances` (c, d, d), or (c, d) for the variances of
    independent features, where c is 1 if all components share them, else k. `numbers` (k) are
    the components' names. `groups` (k) are the clusters that they are merged into, from 0 up, if
    they are, and `group_numbers` the numbers that these go by.
    """

    weights: Floats
    means: Floats
    covariances: Floats
    feature_names: tuple[str, ...]
    numbers: tuple[str, ...]
    groups: tuple[int, ...] | None = None
    group_numbers: tuple[int, ...] | None = None

    @property
    def variances(self) -> Floats:
        """The variance (k, d) of each feature within each component."""
        each = self.covariances
        each = np.diagonal(each, axis1=1, axis2=2) if self._has_matrices else each
        return np.broadcast_to(each, self.means.shape)

    @property
    def _has_matrices(self) -> bool:
        return self.covariances.ndim == 3

    @property
    def centre(self) -> Floats:
        """The mean (d,) of the whole mixture; where all means are equal, exactly that mean."""
        first = self.means[0]
        return np.asarray(first + self.weights @ (self.means - first))

    @property
    def scale(self) -> Floats:
        """The standard deviation (d,) of each feature over the whole mixture; 1 where it is 0."""
        total = np.hypot(*self._spreads)
        return np.asarray(np.where(total > 0, total, 1.0))

    @property
    def standardised(self) -> Floats:
        """The means (k, d) as distances from the whole mixture's, in its standard deviations."""
        return np.asarray((self.means - self.centre) / self.scale)

    @property
    def _spreads(self) -> tuple[Floats, Floats]:
        """The standard deviation (d,) of each feature between the components and within them."""
        apart = self.means - self.centre
        # Features may have units whose squares float64 does not hold.
        size = np.abs(apart).max(0)
        size = np.where(size > 0, size, 1.0)
        between = size * np.sqrt(self.weights @ (apart / size) ** 2)
        return between, np.sqrt(self.weights @ self.variances)

    def telling(self, most: int) -> npt.NDArray[np.intp]:
        """Return, in their order, the `most` features that tell the components best apart.

        The share of a feature's variance that lies between the components decides.
        """
        apart = self._spreads[0] / self.scale
        return np.sort(np.argsort(-apart, kind="stable")[:most])

    def narrowed(self, kept: npt.NDArray[np.intp]) -> Clusters:
        """Return the mixture over some of its features."""
        cells = (kept[:, None], kept) if self._has_matrices else (kept,)
        covariances = self.covariances[:, *cells]
        names = tuple(self.feature_names[j] for j in kept)
        return replace(
            self, means=self.means[:, kept], covariances=covariances, feature_names=names
        )

    def projected(self, axes: Floats) -> Floats:
        """Return the covariances (k, m, m) of the components along `axes` (d, m)."""
        each = self.covariances
        if self._has_matrices:
            projected = axes.T @ each @ axes
        else:
            projected = np.einsum("dm,cd,dn->cmn", axes, each, axes, optimize=True)
        return np.broadcast_to(projected, (len(self.weights), *projected.shape[1:]))

    @property
    def within(self) -> Floats:
        """The covariance (d, d) within the components, by weight."""
        is_shared = len(self.covariances) < len(self.weights)
        mean = np.tensordot(np.ones(1) if is_shared else self.weights, self.covariances, 1)
        return mean if self._has_matrices else np.diag(mean)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Plane:
    """Two directions `axes` (d, 2) in which to look at rows, about `centre` (d,).

    `kind` says which they are; `labels` name them; `made_of` has, for each, the features that it
    goes along with and their correlation with it.
    """

    axes: Floats
    centre: Floats
    kind: str
    labels: tuple[str, str]
    made_of: tuple[tuple[tuple[str, float], ...], ...] = ()

    def __call__(self, X: Floats) -> Floats:
        """Return rows (m, d) as points (m, 2)."""
        return np.asarray((X - self.centre) @ self.axes)


def plane(clusters: Clusters) -> Plane:
    """Return the plane that tells a mixture's components best apart; d must be 2 or more.

    Two features are a plane already. Otherwise it is spanned by Fisher's discriminants, the
    directions in which the variance between the components is largest against all variance
    (Rao 1948; the same as against that within), and where the means span fewer than two, by
    the principal directions of the standardised rows uncorrelated with them.
    """
    d = clusters.means.shape[1]
    if d == 2:
        x, y = clusters.feature_names
        return Plane(axes=np.eye(2), centre=np.zeros(2), kind="the two features", labels=(x, y))
    places = clusters.telling(_MOST_FEATURES)
    kept = clusters.narrowed(places)
    scale = kept.scale
    apart = kept.standardised
    between = np.asarray((kept.weights[:, None] * apart).T @ apart)
    total = between + kept.within / scale[:, None] / scale
    directions = _discriminants(between, total)
    n_discriminants = directions.shape[1]
    while directions.shape[1] < 2:
        directions = np.column_stack([directions, _principal(total, directions)])
    kind, labels = _KINDS[n_discriminants]
    correlations = [_correlations(total, axis) for axis in directions.T]
    signs = [np.sign(c[np.argmax(np.abs(c))]) or 1.0 for c in correlations]
    made_of = tuple(
        tuple((kept.feature_names[j], float(sign * c[j])) for j in np.argsort(-np.abs(c))[:3])
        for c, sign in zip(correlations, signs, strict=True)
    )
    axes = np.zeros((d, 2))
    axes[places] = directions * signs / scale[:, None]
    return Plane(axes=axes, centre=clusters.centre, kind=kind, labels=labels, made_of=made_of)


_KINDS = {
    2: ("the discriminant plane", ("discriminant 1", "discriminant 2")),
    1: (
        "the plane of the discriminant and the first principal direction beside it",
        ("discriminant", "principal direction"),
    ),
    0: ("the principal plane", ("principal direction 1", "principal direction 2")),
}


def _discriminants(between: Floats, total: Floats) -> Floats:
    """Return up to two directions (d, 0..2) of unit total variance that part the means."""
    variances, axes = np.linalg.eigh(total)
    kept = variances > _DEPENDENT * variances[-1]
    whiten = axes[:, kept] / np.sqrt(variances[kept])
    shares, directions = np.linalg.eigh(whiten.T @ between @ whiten)
    best = [i for i in range(len(shares) - 1, -1, -1)[:2] if shares[i] > _DEPENDENT]
    return np.asarray(whiten @ directions[:, best])


def _principal(total: Floats, directions: Floats) -> Floats:
    """Return the direction (d,) of most variance among those uncorrelated with `directions`."""
    keep = np.eye(len(total))
    for axis in directions.T:
        taken = keep @ total @ axis
        length = np.linalg.norm(taken)
        if length > 0:
            keep = keep - np.outer(taken, taken) / length**2
    return np.asarray(np.linalg.eigh(keep @ total @ keep)[1][:, -1])


def _correlations(total: Floats, axis: Floats) -> npt.NDArray[Any]:
    spread = np.sqrt(max(float(axis @ total @ axis), 1e-300))
    return np.asarray((total @ axis) / spread / np.sqrt(np.diagonal(total).clip(1e-300)))

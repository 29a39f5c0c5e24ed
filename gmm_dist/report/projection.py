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

    `weights` (k,), `means` (k, d), `covariances` as scikit-learn has them for `covariance_type`:
    full (k, d, d), tied (d, d), diag (k, d), spherical (k,). `numbers` (k) are the
    components' names.
    """

    weights: Floats
    means: Floats
    covariances: Floats
    covariance_type: str
    feature_names: tuple[str, ...]
    numbers: tuple[str, ...]

    @property
    def variances(self) -> Floats:
        """The variance (k, d) of each feature within each component."""
        k, d = self.means.shape
        if self.covariance_type == "full":
            return np.diagonal(self.covariances, axis1=1, axis2=2)
        if self.covariance_type == "tied":
            return np.broadcast_to(np.diagonal(self.covariances), (k, d))
        if self.covariance_type == "diag":
            return self.covariances
        return np.broadcast_to(self.covariances[:, None], (k, d))

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
        covariances = self.covariances
        if self.covariance_type in ("full", "tied"):
            covariances = covariances[..., kept[:, None], kept]
        elif self.covariance_type == "diag":
            covariances = covariances[:, kept]
        names = tuple(self.feature_names[j] for j in kept)
        return replace(
            self, means=self.means[:, kept], covariances=covariances, feature_names=names
        )

    def projected(self, axes: Floats) -> Floats:
        """Return the covariances (k, m, m) of the components along `axes` (d, m)."""
        if self.covariance_type == "full":
            return np.asarray(axes.T @ self.covariances @ axes)
        if self.covariance_type == "tied":
            once = axes.T @ self.covariances @ axes
            return np.broadcast_to(once, (len(self.weights), *once.shape))
        return np.asarray(np.einsum("dm,kd,dn->kmn", axes, self.variances, axes, optimize=True))

    @property
    def within(self) -> Floats:
        """The covariance (d, d) within the components, by weight."""
        if self.covariance_type == "tied":
            return self.covariances
        if self.covariance_type == "full":
            return np.asarray(np.tensordot(self.weights, self.covariances, 1))
        return np.asarray(np.diag(self.weights @ self.variances))


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

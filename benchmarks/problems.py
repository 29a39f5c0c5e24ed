"""A problem that all contenders solve: the same rows, the same starts, the same iterations."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Mixture:
    """Parameters in float64: `weights` (k,), `means` (k, d), `covariances` (k, d, d) or (k, d)."""

    weights: Array
    means: Array
    covariances: Array


@dataclass(frozen=True)
class Shape:
    """The size of a problem: `k` has one number of components for each start.

    `apart` is how far apart the components are that the rows are drawn from, in standard
    deviations, roughly.
    """

    n: int
    d: int
    k: tuple[int, ...]
    covariance_type: str
    apart: float = 3.0

    def __str__(self) -> str:
        ks = str(self.k[0]) if len(self.k) == 1 else f"{self.k[0]}..{self.k[-1]}"
        apart = f", {self.apart:g} sd apart" if self.is_separated else ""
        return f"{self.covariance_type} n={self.n:,} d={self.d} K={ks}{apart}"

    @property
    def is_separated(self) -> bool:
        """Whether few components matter to a row."""
        return self.apart > 3.0


@dataclass(frozen=True)
class Problem:
    """Rows `X` (n, d), float32 and centred, and the starts."""

    shape: Shape
    X: npt.NDArray[np.float32]
    starts: list[Mixture]

    @classmethod
    def make(cls, shape: Shape, *, seed: int = 0) -> Problem:
        """Draw rows of a mixture; starts are near random rows.

        Of a separated one they are near its components, where most passes of a fit are made.
        """
        k, distance = max(shape.k), shape.apart
        table = datasets.blobs(shape.n, shape.d, k, distance=distance, seed=seed)
        rows = np.column_stack([column.to_numpy() for column in table.columns]).astype(np.float64)
        X = (rows - rows.mean(axis=0)).astype(np.float32)
        if shape.is_separated:
            means = datasets.centres(np.random.default_rng(seed), shape.d, k, distance=distance)
            return cls(shape, X, [_near(means - rows.mean(axis=0), shape.covariance_type)])
        order = np.random.default_rng(seed + 1).permutation(shape.n)
        return cls(shape, X, [_start(X, order[:k], shape.covariance_type) for k in shape.k])

    def save(self, folder: Path) -> None:
        np.save(folder / "X.npy", self.X)
        (folder / "shape.json").write_text(json.dumps(asdict(self.shape)))
        save_mixtures(self.starts, folder / "starts.npz")

    @classmethod
    def load(cls, folder: Path) -> Problem:
        shape = json.loads((folder / "shape.json").read_text())
        shape["k"] = tuple(shape["k"])
        X, starts = np.load(folder / "X.npy"), load_mixtures(folder / "starts.npz")
        return cls(Shape(**shape), X, starts)


def _start(X: npt.NDArray[np.float32], rows: npt.NDArray[np.int64], kind: str) -> Mixture:
    covariance = np.cov(X.T.astype(np.float64), bias=True)
    one = covariance if kind == "full" else np.diag(covariance)
    k = len(rows)
    # Rows themselves, in 64 dimensions, are so far out that some component is left with fewer
    # rows than features: singular, and most peers fail. Half way from the centre none is.
    means = 0.5 * X[rows].astype(np.float64)
    return Mixture(np.full(k, 1 / k), means, np.stack([one] * k))


def _near(means: Array, kind: str) -> Mixture:
    k, d = means.shape
    one = 1.5 * np.eye(d) if kind == "full" else np.full(d, 1.5)
    return Mixture(np.full(k, 1 / k), means + 0.3, np.stack([one] * k))


def save_mixtures(mixtures: list[Mixture], path: Path) -> None:
    arrays = {
        f"{name}{i}": value for i, m in enumerate(mixtures) for name, value in vars(m).items()
    }
    np.savez(path, **arrays)


def load_mixtures(path: Path) -> list[Mixture]:
    with np.load(path) as arrays:
        names = ("weights", "means", "covariances")
        count = len(arrays) // len(names)
        return [Mixture(*(arrays[f"{name}{i}"] for name in names)) for i in range(count)]


def mean_log_likelihood(mixture: Mixture, X: npt.NDArray[np.float32], *, rows: int) -> float:
    """Return the mean log-density in nats of the first `rows` rows: NumPy, float64, no tricks."""
    x = X[:rows].astype(np.float64)
    log_prob = np.empty((len(mixture.weights), len(x)))
    parts = zip(mixture.weights, mixture.means, mixture.covariances, strict=True)
    for k, (weight, mean, covariance) in enumerate(parts):
        full = covariance if covariance.ndim == 2 else np.diag(covariance)
        lower = np.linalg.cholesky(full)
        z = np.linalg.solve(lower, (x - mean).T)
        log_det = 2 * np.log(np.diag(lower)).sum() + x.shape[1] * np.log(2 * np.pi)
        log_prob[k] = np.log(weight) - 0.5 * (log_det + (z * z).sum(axis=0))
    top = log_prob.max(axis=0)
    return float((top + np.log(np.exp(log_prob - top).sum(axis=0))).mean())

"""Frozen, validated settings of a fit and of a sweep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

from gmm_dist.errors import UserError

PRECISIONS = ("auto", "float32", "float64")
RELATIVE, ABSOLUTE = "variance of the feature over all rows", "squared feature unit"
REG_UNITS = (RELATIVE, ABSOLUTE)
INITS = ("k-means||", "k-means++", "kmeans", "random", "random_from_data")


@dataclass(frozen=True, slots=True)
class EMConfig:
    """Settings of the EM loop.

    `tol` is the gain in mean log-likelihood per row (nats) below which a lane has converged;
    it does not depend on the number of rows. `reg_covar` is added to the diagonal of every
    covariance, in units of `reg_unit`: each feature's variance over all rows, so that the
    features' own units do not matter, or squared feature units, as scikit-learn has it.
    `precision` is the arithmetic of the passes: `auto` uses float32 while its measured error is
    harmless (see `em`). `accelerate` has SQUAREM leap ahead of EM where that raises the
    likelihood.

    Raises UserError for a value out of range.
    """

    tol: float = 1e-5
    max_iter: int = 100
    reg_covar: float = 1e-6
    precision: str = "auto"
    accelerate: bool = True
    reg_unit: str = RELATIVE

    def __post_init__(self) -> None:
        _require(_is_size(self.tol), "tol", self.tol, "a number >= 0")
        _require(_is_whole(self.max_iter, 1), "max_iter", self.max_iter, "a whole number >= 1")
        _require(_is_size(self.reg_covar), "reg_covar", self.reg_covar, "a number >= 0")
        units = " or ".join(REG_UNITS)
        _require(self.reg_unit in REG_UNITS, "reg_unit", self.reg_unit, units)
        allowed = ", ".join(PRECISIONS)
        _require(self.precision in PRECISIONS, "precision", self.precision, f"one of {allowed}")


@dataclass(frozen=True, slots=True)
class StartConfig:
    """Settings of the search for starts (`search`).

    `n_init` seeded restarts per candidate, by the method `init`; `moves` rounds of splits and
    merges at the most; `finalists` of each go on to passes over all rows. `n_sample` rows make
    the small sample (None: as many as k asks for).

    Raises UserError for a value out of range.
    """

    n_init: int = 16
    init: str = "k-means++"
    moves: int = 3
    finalists: int = 2
    n_sample: int | None = None
    random_state: int = 0

    def __post_init__(self) -> None:
        _require(_is_whole(self.n_init, 1), "n_init", self.n_init, "a whole number >= 1")
        _require(self.init in INITS, "init", self.init, f"one of {', '.join(INITS)}")
        _require(_is_whole(self.moves, 0), "moves", self.moves, "a whole number >= 0")
        _require(_is_whole(self.finalists, 1), "finalists", self.finalists, "a whole number >= 1")
        sample_ok = self.n_sample is None or _is_whole(self.n_sample, 1)
        _require(sample_ok, "n_sample", self.n_sample, "a whole number >= 1")
        seed_ok = _is_whole(self.random_state, 0) and self.random_state < 2**63
        _require(seed_ok, "random_state", self.random_state, "a whole number from 0 to 2**63 - 1")


def _is_size(value: object) -> bool:
    return isinstance(value, Real) and 0 <= float(value) < math.inf


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, Integral) and int(value) >= least


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise UserError(f"is {value}", option=name, remedy=f"give {wanted}")

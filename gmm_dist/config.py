"""Frozen, validated settings: of the cluster, of a fit and of a sweep."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from gmm_dist.errors import UserError
from gmm_dist.urls import Url

PRECISIONS = ("auto", "float32", "float64")
RELATIVE, ABSOLUTE = "variance of the feature over all rows", "squared feature unit"
REG_UNITS = (RELATIVE, ABSOLUTE)
COMPILE_FROM = 50_000
"""Rows from which on compiled loops win back the time that it takes to load them."""

INITS = ("k-means||", "k-means++", "kmeans", "random", "random_from_data")


@dataclass(frozen=True, slots=True)
class Cluster:
    """The Ray cluster that holds a lake's rows, and how many workers do.

    Connects to nothing yet: a fit does, and leaves again. A process that is connected to Ray
    already, such as a notebook, uses that cluster and stays connected.

    >>> Cluster(num_workers=4)
    Cluster(address=None, num_workers=4, use_gpu=None, spill=True)

    Args:
        address: HOST:PORT of the cluster's head, ray://HOST:10001, "auto" for the one that runs on
            this machine, or "local" to start Ray here. None: the cluster that this process is
            connected to, else that of RAY_ADDRESS, else Ray is started here.
        num_workers: Ray actors that hold rows; None for one per CPU, or per GPU.
        use_gpu: whether each worker has a GPU of its own; None for whether the cluster has any.
        spill: a folder on each worker's disk for rows that its memory does not hold; True for its
            temporary folder, False to refuse such rows.

    Raises UserError for a value out of range.
    """

    address: str | None = None
    num_workers: int | None = None
    use_gpu: bool | None = None
    spill: bool | str = True

    def __post_init__(self) -> None:
        address, n, gpu = self.address, self.num_workers, self.use_gpu
        address_ok = address is None or (isinstance(address, str) and address.strip() != "")
        _require(address_ok, "address", repr(address), "HOST:PORT of a Ray cluster's head, or None")
        n_ok = n is None or (_is_whole(n, 1) and not isinstance(n, bool))
        _require(n_ok, "num_workers", n, "a whole number >= 1")
        _require(gpu is None or isinstance(gpu, bool), "use_gpu", repr(gpu), "True, False or None")
        spill = os.fspath(self.spill) if isinstance(self.spill, os.PathLike) else self.spill
        spill_ok = isinstance(spill, bool) or (isinstance(spill, str) and Path(spill).is_absolute())
        _require(spill_ok, "spill", repr(spill), "an absolute path of a folder, True or False")
        object.__setattr__(self, "spill", spill)

    def at_most(self, n_shards: int) -> Cluster:
        """Return the cluster with at most one worker per shard: Ray starts all of them at once."""
        if self.num_workers is None:
            return self
        return replace(self, num_workers=min(self.num_workers, max(1, n_shards)))


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureConfig:
    """How patient a run is with its workers; all times in seconds.

    `max_failures`: failures that a run survives; those within `together` count as one, as a host
    that dies takes all its workers with it. `grace`: until survivors take over the shards of a
    lost worker; `forsaken`: until shards that no worker has room for end the run. `silence`: a
    worker that has shown no sign of work on its call for so long is lost. A working one may
    take `deadline` for a call, or `deadline_factor` times as long as its siblings if that is
    more; before a sibling has replied, `longest`. A call that lasts longer than `straggling` and
    `straggling_factor` times its siblings is repeated elsewhere. A worker rests for `backoff`
    after its first failure, twice as long after each further one in a row, `max_backoff` at most.
    """

    max_failures: int = 16
    grace: float = 60.0
    together: float = 10.0
    forsaken: float = 900.0
    # Ray itself needs 65 s to see that a host is cut off, and lost messages stall for up to 30 s.
    silence: float = 60.0
    deadline: float = 300.0  # readers wait for a storage that is out of order
    deadline_factor: float = 20.0
    longest: float = 86_400.0
    straggling: float = 30.0
    straggling_factor: float = 4.0
    backoff: float = 0.5
    max_backoff: float = 30.0

    def __post_init__(self) -> None:
        n_ok = _is_whole(self.max_failures, 0)
        _require(n_ok, "max_failures", self.max_failures, "a whole number >= 0")
        _require(_is_size(self.grace), "grace", self.grace, "seconds >= 0")

    @property
    def tick(self) -> float:
        """Return how often to look at the clock while nothing happens."""
        return min(1.0, self.silence / 8, self.straggling / 8, max(self.grace / 4, 0.05))

    def rest(self, failures: int) -> float:
        """Return how long a worker rests after so many failures in a row."""
        return float(min(self.max_backoff, self.backoff * 2.0 ** min(failures - 1, 60)))


@dataclass(frozen=True, slots=True, kw_only=True)
class EMConfig:
    """Settings of the EM loop.

    `tol` is the gain in mean log-likelihood per row (nats) below which a lane has converged;
    it does not depend on the number of rows. `reg_covar` is added to the diagonal of every
    covariance, in units of `reg_unit`: each feature's variance over all rows, so that the
    features' own units do not matter, or squared feature units, as scikit-learn has it.
    `precision` is the arithmetic of the passes: `auto` uses float32 while its measured error is
    harmless (`em.precision`). `accelerate` has SQUAREM leap ahead of EM where that raises the
    likelihood. A fit `returns` the parameters that were "scored" last, or those "stepped" from
    them, as scikit-learn does. `on_singular` says what becomes of covariances that are not
    positive definite: "regularise" raises their variances, "raise" ends the fit. Passes over
    `compile_from` rows or more may take loops that Numba compiles: for fewer, to load it takes
    longer than they do.

    Raises UserError for a value out of range.
    """

    tol: float = 1e-5
    max_iter: int = 100
    reg_covar: float = 1e-6
    precision: str = "auto"
    accelerate: bool = True
    reg_unit: str = RELATIVE
    returns: str = "scored"
    on_singular: str = "regularise"
    compile_from: int = COMPILE_FROM

    def __post_init__(self) -> None:
        _require(_is_size(self.tol), "tol", self.tol, "a number >= 0")
        _require(_is_whole(self.max_iter, 1), "max_iter", self.max_iter, "a whole number >= 1")
        _require(_is_size(self.reg_covar), "reg_covar", self.reg_covar, "a number >= 0")
        units = " or ".join(REG_UNITS)
        _require(self.reg_unit in REG_UNITS, "reg_unit", self.reg_unit, units)
        allowed = ", ".join(PRECISIONS)
        _require(self.precision in PRECISIONS, "precision", self.precision, f"one of {allowed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StartConfig:
    """Settings of the search for starts (`selection.starts`).

    `n_init` seeded restarts per candidate, by the method `init`; `moves` rounds of splits and
    merges at the most; `finalists` of each go on to passes over all rows. `n_sample` rows make
    the small sample (None: as many as k asks for).

    Raises UserError for a value out of range.
    """

    n_init: int = 16
    init: str = "k-means++"
    moves: int = 6
    finalists: int = 2
    n_sample: int | None = None
    random_state: int = 0

    def __post_init__(self) -> None:
        _require(_is_whole(self.n_init, 1), "n_init", self.n_init, "a whole number >= 1")
        _require(self.init in INITS, "init_params", self.init, f"one of {', '.join(INITS)}")
        _require(_is_whole(self.moves, 0), "moves", self.moves, "a whole number >= 0")
        _require(_is_whole(self.finalists, 1), "finalists", self.finalists, "a whole number >= 1")
        sample_ok = self.n_sample is None or _is_whole(self.n_sample, 1)
        _require(sample_ok, "n_sample", self.n_sample, "a whole number >= 1")
        seed_ok = _is_whole(self.random_state, 0) and self.random_state < 2**63
        _require(seed_ok, "random_state", self.random_state, "a whole number from 0 to 2**63 - 1")


# ------------------------------------------------------- values that options are given in Python

Rule = Callable[[str, Any], Any]
"""Takes an option's name and value, and returns its canonical form or raises UserError."""


def settle(options: object, **rules: Rule) -> None:
    """Bring the fields of a frozen value into their canonical form.

    So equal settings are equal values, and the same JSON: lists become tuples, NumPy's numbers
    Python's, and a URL shows no credentials.

    Raises:
        UserError: a value does not fit its option.
    """
    for name, rule in rules.items():
        object.__setattr__(options, name, rule(name, getattr(options, name)))


def url(name: str, value: Any) -> Url:
    """Take a path or URL, but no empty one, such as a variable that is not set."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    is_ok = isinstance(text, str) and text.strip() != ""
    _require(is_ok, name, repr(value), "a path or URL")
    # A Url is left as it is: as text it would lose its credentials.
    return value if isinstance(value, Url) else Url(str(text))


def text(name: str, value: Any) -> str:
    """Take a text."""
    _require(isinstance(value, str), name, repr(value), "a text")
    return str(value)


def flag(name: str, value: Any) -> bool:
    """Take True or False."""
    _require(isinstance(value, bool), name, repr(value), "True or False")
    return bool(value)


def number(name: str, value: Any) -> float:
    """Take a number; its range is checked elsewhere."""
    is_ok = isinstance(value, Real) and not isinstance(value, bool)
    _require(is_ok, name, repr(value), "a number")
    return float(value)


def whole(name: str, value: Any) -> int:
    """Take a whole number; its range is checked elsewhere."""
    is_ok = isinstance(value, Integral) and not isinstance(value, bool)
    _require(is_ok, name, repr(value), "a whole number")
    return int(value)


def one_of(choices: Collection[str]) -> Rule:
    """Take one of some words."""

    def rule(name: str, value: Any) -> str:
        is_ok = isinstance(value, str) and value in choices
        _require(is_ok, name, repr(value), f"one of {', '.join(choices)}")
        return str(value)

    return rule


def optional(rule: Rule) -> Rule:
    """Take None too."""
    return lambda name, value: None if value is None else rule(name, value)


def several(rule: Rule, *, least: int = 1) -> Rule:
    """Take a list of values of `rule`, or one alone; a text is one value, not its letters."""

    def all_of(name: str, value: Any) -> tuple[Any, ...]:
        is_one = isinstance(value, str | bytes) or not isinstance(value, Iterable)
        values = (value,) if is_one else tuple(value)
        _require(len(values) >= least, name, repr(value), f"{least} value at least")
        return tuple(rule(name, each) for each in values)

    return all_of


def _is_size(value: object) -> bool:
    return isinstance(value, Real) and 0 <= float(value) < math.inf


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, Integral) and int(value) >= least


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise UserError(f"is {value}", option=name, remedy=f"give {wanted}")

"""The sweep as a function: `select` fits a grid of mixtures in the same passes and ranks them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from gmm_dist.config import Cluster, EMConfig, StartConfig
from gmm_dist.errors import TooFewRows, UserError
from gmm_dist.estimators.gaussian_mixture import GaussianMixture, adopt
from gmm_dist.estimators.init_params import SEARCH
from gmm_dist.estimators.settings import (
    require_lake_settings,
    require_no_cluster,
    seed_of,
)
from gmm_dist.formats import counted
from gmm_dist.lake.lake import Lake
from gmm_dist.model.arrays import Space, require_rows_or_lake, space_of
from gmm_dist.model.covariance import COVARIANCE_TYPES
from gmm_dist.model.criteria import most_components
from gmm_dist.selection.ranking import CRITERIA, Candidate, RankedCandidate, SweepResult
from gmm_dist.selection.sweep import require_rows, sweep
from gmm_dist.selection.table import label, listed
from gmm_dist.shards.local import one_thread

SIZES, KINDS = range(2, 21), ("full", "diag")
"""The default grid; `select` leaves out candidates for which rows in memory are too few."""

_COLUMNS = ("rank", "k", "covariance_type", "bic", "aic", "icl", "log_likelihood", "status")
_PER_ROW = "mean log-likelihood, nats per row"


@dataclass(frozen=True, eq=False, kw_only=True)
class Selection:
    """What `select` found: prints as a table, the best first; `best` is fitted.

    `result` has all measurements, about the rows' shared centre; only a lake (`is_lake`) can
    have held-out rows. `left_out` says which of the default candidates were not fitted because
    the rows are too few for them; "" for none.
    """

    result: SweepResult
    best: GaussianMixture
    feature_names: tuple[str, ...]
    is_lake: bool = False
    left_out: str = ""

    @property
    def criterion(self) -> str:
        return self.result.criterion

    def rows(self) -> list[dict[str, Any]]:
        """Return one dictionary per candidate, the best first; those of no rank have None.

        `log_likelihood` is the sum over all rows (nats), as in sweep.json, and
        `mean_log_likelihood` that per row; of `bic`, `aic` and `icl` lower is better.
        """
        return listed(self.result)

    def warnings(self) -> list[str]:
        """Return what a reader of the table should know, each with what to do."""
        d = self.best.n_features_in_
        names = self.feature_names or tuple(f"x{j}" for j in range(d))
        notes = self.result.warnings(names, _select_again, holds_out=self.is_lake)
        return [self.left_out, *notes] if self.left_out else notes

    def to_frame(self) -> Any:
        """Return `rows` as a pandas DataFrame. Raises ImportError without pandas."""
        import pandas as pd

        return pd.DataFrame(self.rows())

    def plot(self, ax: Any = None) -> Any:
        """Draw the criterion over k, a line for each covariance type; return matplotlib's Axes.

        Raises ImportError without matplotlib.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            _, ax = plt.subplots()
        ranked = [s for s in self.result.ranked if s.fit.is_ranked]
        for kind in dict.fromkeys(s.candidate.covariance_type for s in self.result.scored):
            of_kind = [s for s in ranked if s.candidate.covariance_type == kind]
            if line := sorted(_point(s, self.criterion) for s in of_kind):
                ax.plot(*zip(*line, strict=True), marker="o", label=kind)
        ax.plot(*_point(ranked[0], self.criterion), marker="*", markersize=14, linestyle="none")
        per_row = " per row" if self.criterion == "holdout" else ""
        ax.set(xlabel="k", ylabel=label(self.criterion) + per_row)
        ax.legend()
        return ax

    def __str__(self) -> str:
        rows = [row | {_PER_ROW: row["mean_log_likelihood"]} for row in self.rows()]
        shown = [_PER_ROW if name == "log_likelihood" else name for name in _COLUMNS]
        shown += ["holdout"] if "holdout" in rows[0] else []
        cells = [shown, *([_cell(row[name]) for name in shown] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        pairs = (zip(line, widths, strict=True) for line in cells)
        lines = ["  ".join(cell.rjust(w) for cell, w in line).rstrip() for line in pairs]
        return "\n".join(lines + [f"note: {text}" for text in self.warnings()])

    __repr__ = __str__


def select(
    X: Any,
    n_components: int | Iterable[int] = SIZES,
    covariance_type: str | Sequence[str] = KINDS,
    criterion: str = "bic",
    *,
    sample_weight: Any = None,
    tol: float = 1e-5,
    max_iter: int = 100,
    reg_covar: float = 1e-6,
    n_init: int = 16,
    init_params: str = "k-means++",
    random_state: Any = 0,
    precision: str = "auto",
    device: str | torch.device | None = None,
    n_shards: int | None = None,
    cluster: Cluster | None = None,
) -> Selection:
    """Fit every number of components with every covariance type, and rank the fits.

    All are fitted in the same passes over the rows, from starts that a search on a sample finds:
    `n_init` seeded ones, split and merged.

    >>> import numpy as np
    >>> X = np.r_[np.random.default_rng(0).normal(0, 1, (200, 2)), np.full((200, 2), 9.0)]
    >>> X[200:] += np.random.default_rng(1).normal(0, 1, (200, 2))
    >>> select(X, n_components=[1, 2, 3], covariance_type="spherical", n_init=2).best.n_components
    2

    Args:
        X: what `GaussianMixture.fit` takes: rows (n, d) in memory, or a `gmm_dist.Lake`.
        n_components: numbers of components. Default ones for which rows in memory are too few are
            left out; those named here are fitted in any case, even if they cannot be ranked.
        covariance_type: "full", "tied", "diag", "spherical", "tied-diag", "tied-spherical", or
            several of them.
        criterion: "bic", "aic", "icl" (lower is better), or "holdout", the mean log-likelihood of
            a lake's held-out rows.
        sample_weight: of rows in memory, (n,).
        tol: the gain in mean log-likelihood (nats per row) below which a fit has converged.
        max_iter: iterations over all rows at the most.
        reg_covar: is added to every variance, in units of the feature's variance over all rows, as
            in the jobs, so that the features' units change nothing; a fit of `GaussianMixture`
            itself takes it as scikit-learn does, in squared feature units.
        n_init: seeded starts of each candidate.
        init_params: how they are seeded: "k-means++", "k-means||", "kmeans", "random" or
            "random_from_data".
        random_state: what scikit-learn takes.
        precision: the arithmetic of the passes: "auto", "float32" or "float64".
        device: where rows in memory are worked on; None for where they are.
        n_shards: into how many parts rows in memory are dealt; None for by their number.
        cluster: where a lake's rows are held; None for the Ray cluster that this process is
            connected to, else one that is started here.

    Raises TypeError for a path, which is no `Lake` yet; UserError, a ValueError, for settings out
    of range, and when no candidate is ranked.
    """
    candidates = _candidates(n_components, covariance_type)
    if criterion not in CRITERIA:
        raise UserError(f"criterion is {criterion!r}: give one of {', '.join(CRITERIA)}")
    seed = seed_of(random_state)
    best = GaussianMixture(
        tol=tol,
        max_iter=max_iter,
        reg_covar=reg_covar,
        random_state=random_state,
        precision=precision,
        device=device,
        n_shards=n_shards,
        covariance_type=candidates[0].covariance_type,
    )
    best._validate_params()
    config = EMConfig(tol=tol, max_iter=max_iter, reg_covar=reg_covar, precision=precision)
    start = StartConfig(n_init=n_init, init=init_params, random_state=seed)
    require_rows_or_lake(X)
    with one_thread():
        if isinstance(X, Lake):
            # Ray and pyarrow are needed only here.
            from gmm_dist.fitting.lake_sweep import sweep_lake
            from gmm_dist.lake.plan import plan_of

            require_lake_settings(sample_weight, device, n_shards, cluster)
            swept = sweep_lake(
                plan_of(X),
                candidates,
                config,
                start,
                cluster=cluster or Cluster(),
                criterion=criterion,
            )
            space = Space(dtype=torch.float64)
            return _selected(
                best, start, swept.result, swept.centre, swept.feature_names, space, is_lake=True
            )
        require_no_cluster(cluster)
        if criterion == "holdout":
            raise UserError("criterion 'holdout' is for lakes: Lake(..., holdout=0.1)")
        rows, weight = best._checked_rows(X, sample_weight)
        if n_components is not SIZES:
            require_rows(candidates, len(rows))
        requested, n, d = candidates, len(rows), rows.shape[1]
        any_k, any_kind = n_components is SIZES, covariance_type is KINDS
        candidates = _bearable(requested, n, d, any_k=any_k, any_kind=any_kind)
        left_out = _left_out(requested, candidates, n, d)
        best.set_params(covariance_type=candidates[0].covariance_type)
        names = tuple(getattr(best, "feature_names_in_", ()))
        resident = best._resident(rows, weight, searched=True)
        result = sweep(
            resident.shards,
            candidates,
            config,
            start,
            n_features=d,
            feature_names=names,
            centre=resident.centre,
            criterion=criterion,
        )
        space = space_of(X, rows)
        return _selected(best, start, result, resident.centre, names, space, left_out=left_out)


def _candidates(k: int | Iterable[int], kinds: str | Sequence[str]) -> list[Candidate]:
    ks = list(k) if isinstance(k, Iterable) and not isinstance(k, str) else [k]
    if wrong := [size for size in ks if not isinstance(size, Integral) or isinstance(size, bool)]:
        raise UserError(f"n_components has {wrong[0]!r}: give a whole number >= 1, or several")
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    if unknown := [kind for kind in kinds if kind not in COVARIANCE_TYPES]:
        raise UserError(
            f"covariance_type has {unknown[0]!r}: give some of {', '.join(COVARIANCE_TYPES)}"
        )
    if not ks or not kinds or min(ks) < 1:
        raise UserError(
            f"n_components is {ks}, covariance_type {kinds}: give whole numbers >= 1, and one of "
            "each at least"
        )
    return [Candidate(int(size), kind) for kind, size in itertools.product(kinds, ks)]


def _bearable(
    candidates: Sequence[Candidate], n_rows: int, d: int, *, any_k: bool, any_kind: bool
) -> list[Candidate]:
    """Return the candidates without those of the default grid that `n_rows` rows cannot rank.

    `any_k` and `any_kind` say whether numbers of components, covariance types are the default
    ones. Raises TooFewRows where none is left.
    """
    least = min(candidate.k for candidate in candidates)
    kept = []
    for candidate in candidates:
        most = most_components(candidate.covariance_type, n_rows, d)
        if not (any_k and candidate.k > most) and not (any_kind and least > most):
            kept.append(candidate)
    if not kept:
        kinds = " or ".join(dict.fromkeys(candidate.covariance_type for candidate in candidates))
        raise TooFewRows(
            f"{counted(n_rows, 'row')} of {counted(d, 'feature')} are too few for "
            f"{counted(least, 'component')}, {kinds}: give more rows, or smaller n_components or "
            "another covariance_type"
        )
    return kept


def _left_out(
    requested: Sequence[Candidate], kept: Sequence[Candidate], n_rows: int, d: int
) -> str:
    """Say which requested candidates were not kept; "" for none."""
    omissions = []
    for kind in dict.fromkeys(c.covariance_type for c in requested if c not in kept):
        most = max((c.k for c in kept if c.covariance_type == kind), default=0)
        omissions.append(f"{kind} with k above {most}" if most else f"{kind} covariances")
    rows = f"{counted(n_rows, 'row')} of {counted(d, 'feature')} are too few for them"
    return f"not tried: {' and '.join(omissions)}, for {rows}" if omissions else ""


def _selected(
    best: GaussianMixture,
    start: StartConfig,
    result: SweepResult,
    centre: Tensor,
    names: tuple[str, ...],
    space: Space,
    *,
    is_lake: bool = False,
    left_out: str = "",
) -> Selection:
    if result.best is None:
        raise UserError(
            f"none of the {len(result.scored)} candidates could be ranked: give smaller "
            "n_components, more rows, or leave out constant and duplicated columns"
        )
    candidate = result.best.candidate
    best.set_params(n_components=candidate.k, covariance_type=candidate.covariance_type)
    # Fitted again, it searches as it was searched for.
    best.set_params(n_init=start.n_init, init_params=SEARCH)
    adopt(best, result.best.fit, centre, names, space)
    best.init_params_, best.n_init_ = start.init, start.n_init
    return Selection(
        result=result, best=best, feature_names=names, is_lake=is_lake, left_out=left_out
    )


def _select_again(k: str) -> str:
    """Spell the next grid of k, `3..6` or `3,5,9`, as Python reads it."""
    first, dots, last = k.partition("..")
    grid = f"range({first}, {int(last) + 1})" if dots else f"({k.replace(',', ', ')})"
    return f"select again with n_components={grid}"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.4f}" if isinstance(value, float) else str(value)


def _point(scored: RankedCandidate, criterion: str) -> tuple[int, float]:
    value = scored.value(criterion)
    return scored.candidate.k, -value if criterion == "holdout" else value

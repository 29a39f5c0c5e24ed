"""The table of a sweep: what is known of each candidate, by which name, and how people read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gmm_dist.em.lane import Status
from gmm_dist.selection.ranking import RankedCandidate, SweepResult

ABSENT = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One thing that is known of each candidate.

    `head` is what stands above it for people, and `digits` how many they read after the point;
    None for what is no such number. `is_saved` is whether sweep.json has it, `is_listed` whether
    the rows of a selection do.
    """

    value: Callable[[RankedCandidate], Any]
    head: str = ""
    unit: str = ""
    digits: int | None = None
    is_saved: bool = True
    is_listed: bool = True

    @property
    def head_with_unit(self) -> str:
        return f"{self.head}, {self.unit}" if self.unit else self.head

    def text(self, value: Any) -> str:
        """Return a value as people read it."""
        if value is None:
            return ABSENT
        if isinstance(value, Status):
            return value.name.lower()
        return str(value) if self.digits is None else f"{value:,.{self.digits}f}"


COLUMNS: Mapping[str, Column] = {
    "k": Column(value=lambda s: s.candidate.k, head="k"),
    "covariance_type": Column(value=lambda s: s.candidate.covariance_type, head="covariance"),
    "bic": Column(value=lambda s: s.bic, head="BIC", unit="nats", digits=1),
    "aic": Column(value=lambda s: s.aic, head="AIC", unit="nats", digits=1),
    "icl": Column(value=lambda s: s.icl, head="ICL", unit="nats", digits=1),
    "holdout": Column(value=lambda s: s.holdout, head="held-out", unit="nats/row", digits=6),
    "log_likelihood": Column(value=lambda s: s.fit.log_likelihood),
    "mean_log_likelihood": Column(
        value=lambda s: s.mean_log_likelihood,
        head="mean log-likelihood",
        unit="nats/row",
        digits=6,
        is_saved=False,
    ),
    "n_parameters": Column(value=lambda s: s.n_parameters, head="parameters", digits=0),
    "n_iter": Column(value=lambda s: s.fit.n_iter, head="iterations", digits=0),
    "converged": Column(value=lambda s: s.fit.converged),
    "status": Column(value=lambda s: s.fit.status, head="status"),
    "n_starts": Column(value=lambda s: s.outcome.n_starts, head="starts", is_listed=False),
    "n_dropped": Column(value=lambda s: s.outcome.n_dropped, is_listed=False),
    "passes_saved": Column(value=lambda s: s.outcome.passes_saved, is_listed=False),
    "left_out": Column(value=lambda s: s.fit.left_out, is_listed=False),
    "seconds": Column(value=lambda s: s.outcome.seconds, head="seconds", digits=1, is_listed=False),
    "lower_bounds": Column(value=lambda s: s.fit.lower_bounds, is_listed=False),
}
"""By the names in sweep.json and in the rows of a selection; all have a `rank`, too."""


def ranks(result: SweepResult) -> list[tuple[int | None, RankedCandidate]]:
    """Return the candidates, the best first, each with its rank; None for those of no rank."""
    places = enumerate(result.ranked, start=1)
    return [(place if scored.fit.is_ranked else None, scored) for place, scored in places]


def saved(result: SweepResult) -> list[dict[str, Any]]:
    """Return what sweep.json says of each candidate, in the order of the call."""
    places = {id(scored): rank for rank, scored in ranks(result)}
    names = [name for name, column in COLUMNS.items() if column.is_saved]
    return [
        {"rank": places[id(scored)]}
        | {name: COLUMNS[name].value(scored) for name in names}
        | {"status": scored.fit.status.value}
        for scored in result.scored
    ]


def listed(result: SweepResult) -> list[dict[str, Any]]:
    """Return the rows of a selection, the best first; `holdout` only where rows were held out."""
    names = [name for name, column in COLUMNS.items() if column.is_listed]
    if all(scored.holdout is None for scored in result.scored):
        names.remove("holdout")
    return [
        {"rank": rank}
        | {name: COLUMNS[name].value(scored) for name in names}
        | {"status": COLUMNS["status"].text(scored.fit.status)}
        for rank, scored in ranks(result)
    ]


def label(criterion: str) -> str:
    """Return what people call a criterion."""
    return "held-out log-likelihood" if criterion == "holdout" else COLUMNS[criterion].head

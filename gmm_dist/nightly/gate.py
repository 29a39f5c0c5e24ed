"""The gate before a night's model is published: reasons to keep last night's instead."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from gmm_dist.errors import Option, UserError, Words

_FEWEST_ROWS = 1000
_YELLOW = 0.5  # of the default gate: a larger drift is worth a warning
_STRANGERS = 0.1  # of the rows
_SHARE = 10  # a night of less than a tenth of last night's rows has probably not arrived yet


@dataclass(frozen=True, slots=True)
class Gate:
    """Say what a night needs to be published.

    `min_rows` (None: 1,000, and a tenth of last night's) counts the rows fitted and held out.
    `max_drop` is how much worse than last night's model tonight's may score the held-out rows,
    in nats per row. `max_drift` is how much of the difference to last night's model changes of
    whole columns may explain, in nats per row, see `column_drift`: of 140 pairs of nights whose
    clusters move, split, are born and die, none had more than 0.13, while a unit 1.6 times as
    large gives 0.27 where there is but one cluster, about zero, and far more elsewhere.

    Raises UserError for a value out of range.
    """

    min_rows: int | None = None
    max_drop: float = 0.05
    max_drift: float = 0.2

    def __post_init__(self) -> None:
        if self.min_rows is not None and self.min_rows < 0:
            wanted = "give a whole number >= 0"
            raise UserError(f"is {self.min_rows}", option="min_rows", remedy=wanted)
        if not self.max_drop >= 0:
            wanted = "give a number of nats >= 0"
            raise UserError(f"is {self.max_drop:g}", option="max_drop", remedy=wanted)
        if not self.max_drift >= 0:
            wanted = "give a number of nats >= 0, or inf for any"
            raise UserError(f"is {self.max_drift:g}", option="max_drift", remedy=wanted)

    def on_rows(self, n_rows: int, n_before: int | None) -> list[Words]:
        """Return why `n_rows` are too few after a night of `n_before`: no reason or one."""
        fewest = max(_FEWEST_ROWS, (n_before or 0) // _SHARE)
        if self.min_rows is not None:
            fewest = self.min_rows
        if n_rows >= fewest:
            return []
        requirement = f"at least {fewest:,} are asked for (" + Option("min_rows") + ")"
        return [f"{n_rows:,} rows are too few, " + requirement]

    def on_likelihood(self, tonight: float | None, before: float | None) -> list[Words]:
        """Return why tonight's mean held-out log-likelihood is too low: no reason or one."""
        if tonight is None:
            return ["no held-out row to compare the models on: give a larger " + Option("holdout")]
        if before is None or before - tonight <= self.max_drop:
            return []
        return [
            f"tonight's model scores the held-out rows {before - tonight:.4g} nats per row below "
            f"last night's ({tonight:.6f} against {before:.6f}), more than {self.max_drop:g} ("
            + Option("max_drop")
            + ")"
        ]

    def on_drift(self, drift: float, change: str, *, strangers: float) -> list[Words]:
        """Return why tonight's columns are not last night's: no reason or one."""
        if drift <= self.max_drift:
            return []
        return [
            f"whole columns or most rows have changed since last night: {drift:.4g} nats per row, "
            f"more than {self.max_drift:g} ("
            + Option("max_drift")
            + f"){_spelt(change)}; {strangers:.0%} of the rows are strange to last night's model; "
            "see whether a unit or a source has changed, and accept it, if it is meant, by "
            + Option("max_drift", math.inf)
            + " for this night alone"
        ]

    def warnings_of_drift(
        self, drift: float, change: str, *, divergence: float, strangers: float
    ) -> list[Words]:
        """Return warnings of drift that does not keep the night back."""
        if drift > self.max_drift:
            return []  # a reason already
        warnings: list[Words] = []
        if drift > _YELLOW * Gate().max_drift:
            warnings.append(
                f"columns have changed since last night by {drift:.4g} nats per row, of "
                f"{self.max_drift:g} that the gate allows ("
                + Option("max_drift")
                + f"){_spelt(change)}"
            )
        if strangers > _STRANGERS:
            warnings.append(
                f"{strangers:.0%} of tonight's rows are strange to last night's model, which tells "
                f"them from its own by {divergence:.4g} nats per row: clusters were born or have "
                "changed, see drift.json"
            )
        return warnings


def _spelt(change: str) -> str:
    return f": {change}" if change else ""


def kinds(schema: pa.Schema, columns: Sequence[str]) -> dict[str, str]:
    """Return the kind of each feature column: integer, floating, decimal, or a list of them.

    The width of a number is no part of it: float and double are the same kind.
    """
    return {name: _kind(schema.field(name).type) for name in columns}


def _kind(type_: pa.DataType) -> str:
    if pa.types.is_fixed_size_list(type_):
        return f"list of {type_.list_size} {_kind(type_.value_type)}"
    tests = {
        "integer": pa.types.is_integer,
        "floating": pa.types.is_floating,
        "decimal": pa.types.is_decimal,
    }
    return next((kind for kind, holds in tests.items() if holds(type_)), str(type_))


def on_columns(tonight: Mapping[str, str], before: Mapping[str, str]) -> list[Words]:
    """Return how the feature columns and their kinds differ from last night's, in any order."""
    changes = [f"{name!r} is gone" for name in before if name not in tonight]
    changes += [f"{name!r} is new" for name in tonight if name not in before]
    changes += [
        f"{name!r} was {kind}, is {tonight[name]}"
        for name, kind in before.items()
        if tonight.get(name, kind) != kind
    ]
    if not changes:
        return []
    shown = ", ".join(changes[:5]) + (f" and {len(changes) - 5} more" if len(changes) > 5 else "")
    return [
        f"the feature columns differ from last night's ({shown}): name last night's with "
        + Option("columns")
        + ", or begin another "
        + Option("registry")
    ]

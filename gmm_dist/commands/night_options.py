"""The options of a night as plain values, and the rows of the lake that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from typing import Any

from gmm_dist import config
from gmm_dist.commands.talking import quiet
from gmm_dist.config import optional
from gmm_dist.errors import NoRows, UserError
from gmm_dist.fitting.options import FitOptions
from gmm_dist.lake import nights
from gmm_dist.lake.filters.text import parse
from gmm_dist.lake.filters.where import Where
from gmm_dist.lake.lake import Missing
from gmm_dist.lake.plan import Plan, plan_of
from gmm_dist.lake.tables.find import find
from gmm_dist.lake.tables.snapshot import At, stay_at
from gmm_dist.nightly.gate import Gate
from gmm_dist.nightly.lineage import night_of
from gmm_dist.nightly.registry import Registry
from gmm_dist.scoring.options import require_share


@dataclass(frozen=True, kw_only=True)
class NightlyOptions(FitOptions):
    """The settings of a night: those of its fit, and more; `output` is the registry's.

    Args:
        registry: Folder or URL of the nights' models.
        night: The date, such as 2026-11-21.
        partition: Hive key or column that tells the night, or the three of year, month and day.
        days: Fit so many days up to the night.
        min_rows: Publish nothing fitted to fewer; None for 1,000, and a tenth of last night's.
        max_drop: Publish nothing that scores held-out rows so much worse than last night's model,
            in nats per row.
        max_drift: Publish nothing whose columns have changed as a whole by more, in nats per row.
        scores: Once published, score the night's rows into this URL, under the date.
        keep: Columns to go along with the scores.
        outliers: Mark rows of a lower log-density than this share of the training rows.
        keep_models: Remove published models but the newest so many; 0 keeps all.

    Raises:
        UserError: a value is out of range.
    """

    registry: str
    night: str
    partition: tuple[str, ...]
    output: str = field(default="", init=False)
    holdout: float = 0.1
    bootstrap: int = field(default=0, init=False)
    days: int = 1
    min_rows: int | None = None
    max_drop: float = Gate().max_drop
    max_drift: float = Gate().max_drift
    scores: str | None = None
    keep: tuple[str, ...] = ()
    outliers: float | None = None
    keep_models: int = 0

    def __post_init__(self) -> None:
        config.settle(
            self,
            night=_night,
            registry=config.url,
            partition=config.several(config.text),
            days=config.whole,
            min_rows=optional(config.whole),
            max_drop=config.number,
            max_drift=config.number,
            scores=optional(config.url),
            keep=config.several(config.text, least=0),
            outliers=optional(config.number),
            keep_models=config.whole,
        )
        output = Registry(self.registry).model_url(self.night)
        object.__setattr__(self, "output", output)
        super().__post_init__()
        if self.holdout == 0:
            raise UserError(
                "the gate compares two models on held-out rows: give a --holdout above 0"
            )
        if self.days < 1 or self.keep_models < 0:
            raise UserError("--days is 1 or more, --keep-models 0 or more")
        _ = self.gate
        if self.scores is None and (self.keep or self.outliers is not None):
            raise UserError(
                "--keep and --outliers are for --scores: give that too, or leave them out"
            )
        require_share(self.outliers)

    @property
    def gate(self) -> Gate:
        """What the night needs to be published."""
        return Gate(self.min_rows, self.max_drop, self.max_drift)


def _night(name: str, value: Any) -> str:
    if isinstance(value, date) and not isinstance(value, datetime):
        return value.isoformat()
    return night_of(config.text(name, value))


class NightRows:
    """The rows of a lake that are a night's and pass the user's own filter.

    Of a table they are those of one version: the newest when it is first looked at, unless `pin`
    has named one before.
    """

    def __init__(self, options: NightlyOptions) -> None:
        self._options = options
        self.snapshot: Mapping[str, Any] | None = None
        self._key: nights.NightKey | None = None

    def pin(self, snapshot: Mapping[str, Any] | None) -> None:
        """Stay with the version of a table that the night has begun with, None for none."""
        if snapshot is not None and snapshot != self.snapshot:
            self.snapshot, self._key = snapshot, None

    @property
    def key(self) -> nights.NightKey:
        """How the lake spells a night."""
        if self._key is None:
            with quiet("gmm_dist.lake.listing"):  # planning lists the same files
                lake_listing = find(self._options.data, self.at)
                self._key = nights.key_of(lake_listing, self._options.partition)
            if lake_listing.snapshot is not None:
                self.snapshot = lake_listing.snapshot.content
        return self._key

    @property
    def at(self) -> At | None:
        """The version of the table, None for no table, or none yet."""
        return stay_at(None, self.snapshot)

    def where(self, *, days: int) -> Where:
        """Return the filter of the rows of so many days up to the night."""
        options = self._options
        last = date.fromisoformat(options.night)
        user_clauses = parse(options.where).clauses if options.where is not None else ()
        try:
            clauses = *user_clauses, *self.key.clauses(last - timedelta(days - 1), last)
        except OverflowError as error:
            raise UserError(
                f"--days {days} up to --night {last}: no calendar has so many; give fewer days"
            ) from error
        return Where.all_of(clauses)

    def plan(
        self,
        *,
        days: int,
        missing: Missing,
        columns: Sequence[str] | None,
        keep: Sequence[str] = (),
    ) -> Plan:
        """Plan the rows of so many days; say so where there are none yet."""
        options = self._options
        try:
            where = self.where(days=days).text
            rows = replace(options.lake, columns=columns, where=where, missing=missing, at=self.at)
            return plan_of(rows, keep=keep)
        except NoRows as error:
            also = f" that match --where {options.where!r}" if options.where else ""
            raise NoRows(
                f"no rows of {options.night} ({', '.join(self.key.names)}){also} yet: run "
                "again when they have arrived"
            ) from error

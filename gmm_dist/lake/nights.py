"""How a lake's columns or hive keys spell a night, and the filter for the rows of some nights.

These spellings are understood, with or without a time of day behind them:

    2026-11-21, 2026/11/21, 2026.11.21, 2026_11_21    texts and hive keys: ds=2026-11-21T00:00:00
    20261121, 2026112105                              texts, hive keys and integers: dt=20261121
    dates and timestamps                              columns; UTC where they have a time zone
    year=2026/month=11/day=21                         three hive keys or integer columns

All of them but the last sort by time, so that a half-open range finds the rows of any days. Three
hive keys become one, `date(year, month, day)`, with values such as 2026-11-21.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from typing import TypeVar

import pyarrow as pa

from gmm_dist import storage
from gmm_dist.errors import Option, UserError
from gmm_dist.lake import listing
from gmm_dist.lake.filters.where import Clause, Filter
from gmm_dist.lake.listing import LakeFile, Listing
from gmm_dist.lake.opening import opened as opened_file
from gmm_dist.lake.tables.columns import LakeFileReader
from gmm_dist.lake.tables.find import find as find_files

logger = logging.getLogger(__name__)

T = TypeVar("T")

UNDERSTOOD = (
    "understood are 2026-11-21 (also with / . or _ and with a time behind it), 20261121 or "
    "2026112105 (text or integer), dates, timestamps, and year, month and day in three ("
    + Option("partition", ("year", "month", "day"))
    + ")"
)
_DATE = re.compile(
    r"(\d{4})([-/._]?)(\d{2})\2(\d{2})(?!\d)"
    r"|(\d{4})()(\d{2})(\d{2})(?:\d\d){1,3}(?!\d)",  # hours, minutes, seconds
    re.ASCII,
)
_LOOKS_LIKE_A_DATE = re.compile(r"\d{1,4}[-/._ ]\d{1,2}[-/._ ]\d{1,4}|\d{6,}")
_PARTS = (("year", "yyyy", "yr", "y"), ("month", "mm", "mon", "m"), ("day", "dd", "d"))


@dataclass(frozen=True, slots=True, kw_only=True)
class NightKey:
    """The columns or hive keys that hold a row's night, one or three, and its spelling.

    `separator` stands between year, month and day. `digits` is the length of an integer date,
    None for text. `is_path` says that `names` are three hive keys.
    """

    names: tuple[str, ...]
    separator: str = "-"
    digits: int | None = None
    is_path: bool = False

    def clauses(self, first: date, last: date) -> tuple[Clause, ...]:
        """Return the comparisons that keep the rows of the days from `first` to `last`.

        Raises:
            UserError: the days are of several months, and the night is in three columns, which
                are compared one by one.
        """
        until = last + timedelta(1)
        if len(self.names) == 1:
            (name,) = self.names
            return (name, ">=", self._spelt(first)), (name, "<", self._spelt(until))
        if self.is_path:
            name = _joined(self.names)
            return (name, ">=", first.isoformat()), (name, "<", until.isoformat())
        if (first.year, first.month) != (last.year, last.month):
            raise UserError(
                f"{' '.join(self.names)}: the days from {first} to {last} are of several months, "
                "which three columns in the files cannot be asked for",
                option="partition",
                remedy="give fewer " + Option("days") + ", or a column that has the whole date",
            )
        year, month, day = self.names
        days = ((day, ">=", first.day), (day, "<=", last.day))
        return (year, "==", first.year), (month, "==", first.month), *days

    def _spelt(self, day: date) -> str | int:
        text = day.strftime(f"%Y{self.separator}%m{self.separator}%d").zfill(8)
        return text if self.digits is None else int(text) * 10 ** (self.digits - 8)


def find(url: str, names: Sequence[str]) -> NightKey:
    """Return how columns `names` (one, or those of year, month and day) spell a night in a lake.

    One of three hive keys, such as `day`, stands for all three; a table's partition columns are
    such keys.

    Raises:
        UserError: there is no such column, or its values are no nights in a known spelling.
    """
    return key_of(find_files(url), names)


def key_of(lake_listing: Listing, names: Sequence[str]) -> NightKey:
    """Return how columns spell a night in the lake of a listing, as `find` does."""
    columns = (
        lake_listing.keys
        if set(names) <= set(lake_listing.keys.names)
        else columns_of(lake_listing)
    )
    for name in names:
        if name not in columns.names:
            shown = ", ".join(columns.names[:20])
            raise UserError(
                f"{name!r} is no column; columns are {shown}; name the one that tells the night",
                option="partition",
            )
    if len(names) == 1:
        names = _all_three(names[0], columns.names)
    if len(names) == 1:
        return _single(lake_listing, names[0], columns.field(names[0]).type)
    if len(names) != 3:
        raise UserError(
            f"{' '.join(names)}",
            option="partition",
            remedy="give one column, or those of year, month and day",
        )
    return _three(lake_listing, names, columns)


def with_dates(lake_listing: Listing, condition: Filter | None) -> Listing:
    """Add the hive keys `date(year, month, day)` that a filter names, made of those three."""
    for name in condition.columns if condition else ():
        parts = _parts(name)
        if (
            parts
            and set(parts) <= set(lake_listing.keys.names)
            and name not in lake_listing.keys.names
        ):
            files = [
                replace(file, partition=_dated(file, name, parts)) for file in lake_listing.files
            ]
            keys = lake_listing.keys.append(pa.field(name, pa.string()))
            lake_listing = replace(lake_listing, files=tuple(files), keys=keys)
    return lake_listing


def _joined(names: Iterable[str]) -> str:
    return f"date({', '.join(names)})"


def _parts(name: str) -> tuple[str, ...]:
    parts = tuple(name[5:-1].split(", ")) if name.startswith("date(") and name[-1] == ")" else ()
    return parts if len(parts) == 3 else ()


def _dated(
    file: LakeFile, name: str, parts: Sequence[str]
) -> tuple[tuple[str, str | int | None], ...]:
    values = dict(file.partition)
    return (*file.partition, (name, _day(*(values.get(part) for part in parts))))


def _day(year: object, month: object, day: object) -> str | None:
    try:
        return date(*(int(str(part)) for part in (year, month, day))).isoformat()
    except (ValueError, OverflowError):
        return None


def columns_of(lake_listing: Listing) -> pa.Schema:
    """Return the hive keys and the columns of the first file with rows; keys come first.

    A table tells its columns itself.
    """
    if lake_listing.columns is not None:
        return pa.schema([*lake_listing.keys, *lake_listing.columns.schema])
    footers = (
        _opened(lake_listing, file, lambda opened: (opened.metadata.num_rows, opened.schema))
        for file in lake_listing.files
    )
    schema = next((schema for n_rows, schema in footers if n_rows), pa.schema([]))
    others = [field for field in schema if field.name not in lake_listing.keys.names]
    return pa.schema([*lake_listing.keys, *others])


def _all_three(name: str, columns: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of year, month and day if `name` is one of them, else it alone."""
    lowered = {column.lower(): column for column in reversed(columns)}
    three = [next((lowered[a] for a in names if a in lowered), None) for names in _PARTS]
    known = tuple(column for column in three if column is not None)
    return known if len(known) == 3 and name in known else (name,)


def _three(lake_listing: Listing, names: Sequence[str], columns: pa.Schema) -> NightKey:
    is_path = set(names) <= set(lake_listing.keys.names)
    if is_path:
        days = [_dated(file, "", names)[-1][1] for file in lake_listing.files]
        if any(days):
            return NightKey(names=tuple(names), is_path=True)
    elif all(pa.types.is_integer(columns.field(name).type) for name in names):
        return NightKey(names=tuple(names))
    raise UserError(
        f"{' '.join(names)}: no numbers of a year, a month and a day, in this order, all in the "
        "path or all integer columns; " + UNDERSTOOD,
        option="partition",
    )


def _single(lake_listing: Listing, name: str, type_: pa.DataType) -> NightKey:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if pa.types.is_date(type_) or pa.types.is_timestamp(type_):
        return NightKey(names=(name,))
    is_integer = pa.types.is_integer(type_)
    views = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_null,
    )
    if not is_integer and not any(test(type_) for test in views):
        raise _not_understood(name, f"its type is {type_}")
    values = sorted(map(str, _values(lake_listing, name)))
    if not values:
        return NightKey(names=(name,), digits=8 if is_integer else None)
    spelt = {value: _separator(value) for value in values}
    separators = {separator for separator in spelt.values() if separator is not None}
    odd = [value for value, separator in spelt.items() if separator is None]
    alike = [value for value in odd if _LOOKS_LIKE_A_DATE.match(value)]
    lengths = {len(value) for value in values}
    if len(separators) != 1 or alike or (is_integer and (odd or len(lengths) > 1)):
        first, last = (alike or odd or values)[0], values[-1]
        raise _not_understood(name, f"its values are such as {first!r} and {last!r}")
    if odd:
        logger.warning(
            "%s %s: %d values are no nights, such as %r",
            Option("partition"),
            name,
            len(odd),
            odd[0],
        )
    return NightKey(
        names=(name,), separator=separators.pop(), digits=min(lengths) if is_integer else None
    )


def _separator(value: str) -> str | None:
    """Return what stands between year, month and day; None where no date comes first."""
    if (match := _DATE.match(value)) is None:
        return None
    year, separator, month, day = (group for group in match.groups() if group is not None)
    return None if _day(year, month, day) is None else separator


def _not_understood(name: str, why: str) -> UserError:
    return UserError(
        f"{name!r} does not tell the night in one spelling that is understood: {why}; "
        + UNDERSTOOD,
        option="partition",
    )


def _values(lake_listing: Listing, name: str) -> set[object]:
    """Return the values of a hive key, or of a column in the first and last file with rows."""
    if name in lake_listing.keys.names:
        values: set[object] = {dict(file.partition).get(name) for file in lake_listing.files}
    else:
        orders = (lake_listing.files, lake_listing.files[::-1])
        first = (
            next(filter(None, (_column(lake_listing, f, name) for f in o)), set()) for o in orders
        )
        values = set().union(*first)
    return values - {None}


def _column(lake_listing: Listing, file: LakeFile, name: str) -> set[object]:
    """Return the values of a column in a file's first row group."""

    def values(opened: LakeFileReader) -> set[object]:
        if name not in opened.schema.names or not opened.metadata.num_row_groups:
            return set()
        return set(opened.read_row_group(0, [name])[name].unique().to_pylist())

    return _opened(lake_listing, file, values)


def _opened(lake_listing: Listing, file: LakeFile, look: Callable[[LakeFileReader], T]) -> T:
    fs, path = storage.open_url(lake_listing.root)
    name = listing.name_of(lake_listing.root, file)

    def read() -> T:
        with opened_file(fs, path, lake_listing.root, file, footer=True) as source:
            return look(LakeFileReader(source, lake_listing.columns, name))

    return storage.patiently(read, name)

"""Values of a column compared with literals: exactly, in the type that they are stored in."""

from __future__ import annotations

import functools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, time, timedelta
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

Literal = bool | int | float | str
Operand = Literal | tuple[Literal, ...] | None
"""What a column is compared with: `in` has several literals, `is` and `is not` have null, None."""
Key = int | float | bytes
"""A stored value as Python compares it: an instant or a decimal counts its type's units."""

_TICKS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}  # in a second
_UNITS = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
_DAY = 86_400
_EPOCH = datetime(1970, 1, 1)
_MOST_DIGITS = 400  # no number of any type has more: 1e999999999 must not be spelt out
_FLOATS: Mapping[pa.DataType, Any] = {
    pa.float16(): np.float16,
    pa.float32(): np.float32,
    pa.float64(): np.float64,
}


class DoesNotFit(ValueError):  # noqa: N818 - it says what is wrong
    """Report a literal that is no value of a type, nor can be compared with one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passing:
    """Say which values of a column of type `type` pass: a range, less the `excluded` keys.

    `lower` and `upper` are a key and whether it is itself left out, `among` the only keys that
    may pass, sorted (None: any). Null and NaN never pass; where `missing`, only they do.
    """

    type: pa.DataType
    lower: tuple[Key, bool] | None = None
    upper: tuple[Key, bool] | None = None
    excluded: frozenset[Key] = frozenset()
    among: tuple[Key, ...] | None = None
    never: bool = False
    missing: bool = False

    @classmethod
    def of(cls, type_: pa.DataType, comparisons: Iterable[tuple[str, Operand]]) -> Passing:
        """Return what passes comparisons (operator, literal) all at once.

        Each literal is replaced by the largest value of the type that is not above it, which
        decides every comparison exactly: `x > 0.5` of whole numbers is `x > 0`.

        Raises:
            DoesNotFit: a literal, its argument, cannot be compared with the column.
        """
        type_ = value_type(type_)
        passing = cls(type=type_)
        excluded: set[Key] = set()
        pairs = list(comparisons)
        for operator, operand in pairs:
            if operator in ("is", "is not") or pa.types.is_null(type_):
                continue
            if isinstance(operand, tuple):
                passing = passing._among(operand)
                continue
            assert operand is not None
            key, is_equal = _floor(type_, operand)
            if operator == "!=":
                excluded.update((key,) if is_equal and key is not None else ())
            else:
                passing = passing._narrowed(operator, key, is_equal)
        missing = [operator == "is" for operator, _ in pairs]
        never = passing.never or ((any(missing) or pa.types.is_null(type_)) and not all(missing))
        return replace(passing, excluded=frozenset(excluded), never=never, missing=any(missing))

    def _among(self, literals: tuple[Literal, ...]) -> Passing:
        floors = (_floor(self.type, literal) for literal in literals)
        keys = {key for key, is_equal in floors if is_equal and key is not None}
        common = keys if self.among is None else keys.intersection(self.among)
        return replace(self, among=tuple(sorted(common)))

    def _narrowed(self, operator: str, key: Key | None, is_equal: bool) -> Passing:
        if key is None:  # every value of the type is above the literal
            return self if operator in (">", ">=") else replace(self, never=True)
        if operator == "==" and not is_equal:
            return replace(self, never=True)
        lower, upper = self.lower, self.upper
        if operator in (">", ">=", "=="):
            bound = key, operator == ">" or not is_equal
            lower = bound if lower is None else max(lower, bound)
        if operator in ("<", "<=", "=="):
            bound = key, operator == "<" and is_equal
            upper = bound if upper is None else min(upper, bound, key=lambda b: (b[0], not b[1]))
        return replace(self, lower=lower, upper=upper)

    def may_hold(self, low: Key, high: Key) -> bool:
        """Say whether a value from `low` to `high` may pass."""
        if self.never:
            return False
        if self.among is not None:
            first = bisect_left(self.among, low)
            if first == bisect_right(self.among, high):
                return False
        if self.lower is not None and (high, False) < self.lower:
            return False
        if self.upper is not None and (low, self.upper[1]) > (self.upper[0], False):
            return False
        return not (low == high and low in self.excluded)

    def mask(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """Say of each value whether it passes; `column` is of the type, however it is stored."""
        column = _comparable(column)
        passes = column.is_valid()
        if self.never:
            return pc.and_(passes, False)
        if pa.types.is_floating(column.type):
            passes = pc.and_(passes, pc.equal(column, column)).fill_null(False)  # no NaN
        if self.missing:
            return pc.invert(passes)
        if self.lower is not None:
            above = pc.greater if self.lower[1] else pc.greater_equal
            passes = pc.and_(passes, above(column, as_scalar(self.type, self.lower[0])))
        if self.upper is not None:
            below = pc.less if self.upper[1] else pc.less_equal
            passes = pc.and_(passes, below(column, as_scalar(self.type, self.upper[0])))
        if self.excluded:
            is_excluded = pc.is_in(
                column, value_set=_value_set(self.type, self.excluded, column.type)
            )
            passes = pc.and_(passes, pc.invert(is_excluded))
        if self.among is not None:
            is_among = pc.is_in(column, value_set=_value_set(self.type, self.among, column.type))
            passes = pc.and_(passes, is_among)
        return passes.fill_null(False)


@functools.lru_cache(maxsize=64)
def _value_set(
    type_: pa.DataType, wanted: frozenset[Key] | tuple[Key, ...], comparable: pa.DataType
) -> pa.Array:
    """Return keys of a type as values of the type that `_comparable` leaves."""
    if pa.types.is_temporal(comparable):  # as_py() has no nanoseconds
        whole = pa.int32() if comparable.bit_width == 32 else pa.int64()
        return pa.array(sorted(wanted), whole).cast(comparable)
    keys: set[Key] = {*wanted}
    if pa.types.is_floating(comparable) and 0.0 in keys:
        keys = {key for key in keys if key != 0} | {0.0}
        return pa.array([*sorted(keys), -0.0], comparable)  # hashing tells them apart
    return pa.array([as_scalar(type_, key).as_py() for key in sorted(keys)], comparable)


@dataclass(frozen=True, slots=True)
class PassingRows:
    """Say which rows pass: those that pass in all `columns`, and one at least of each `any_of`."""

    columns: tuple[tuple[str, Passing], ...]
    any_of: tuple[tuple[PassingRows, ...], ...] = ()

    def may_hold(self, may_pass: Callable[[str, Passing], bool]) -> bool:
        """Say whether rows may pass, by whether values of a column may."""
        return all(may_pass(*test) for test in self.columns) and all(
            any(tests.may_hold(may_pass) for tests in several) for several in self.any_of
        )

    def mask(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        """Say of each row of `table` (n,) whether it passes."""
        mask = np.ones(table.num_rows, dtype=np.bool_)
        for name, passing in self.columns:
            mask &= passing.mask(table.column(name)).to_numpy()
        for several in self.any_of:
            mask &= np.logical_or.reduce([tests.mask(table) for tests in several])
        return mask


def value_type(type_: pa.DataType) -> pa.DataType:
    """Return the type of a column's values, without dictionary or extension around them."""
    if pa.types.is_dictionary(type_):
        return value_type(type_.value_type)
    if isinstance(type_, pa.BaseExtensionType):
        return value_type(type_.storage_type)
    return type_


def extremes(statistics: pq.Statistics | None, type_: pa.DataType) -> tuple[Key, Key] | None:
    """Return least and largest key of a column in a row group, None if its footer has none.

    They are bounds: a writer may have cut long texts. Some writers have them the wrong way round;
    these are ignored.
    """
    if statistics is None or not statistics.has_min_max:
        return None
    bounds = _bounds(statistics, type_)
    return None if bounds is None or bounds[0] > bounds[1] else bounds


def _bounds(statistics: pq.Statistics, type_: pa.DataType) -> Any:
    low, high = statistics.min_raw, statistics.max_raw
    if pa.types.is_floating(type_) and not pa.types.is_float16(type_):
        return None if low != low or high != high else (low, high)
    if _is_bytes(type_):
        return (low, high) if isinstance(low, bytes) and isinstance(high, bytes) else None
    if pa.types.is_decimal(type_) and isinstance(low, bytes):
        return int.from_bytes(low, "big", signed=True), int.from_bytes(high, "big", signed=True)
    if not isinstance(low, int) or not _is_counted(type_):
        return None
    if not _is_same_unit(type_, statistics.logical_type):
        return None
    if pa.types.is_unsigned_integer(type_):
        return low % 2**type_.bit_width, high % 2**type_.bit_width
    return int(low), int(high)


def _is_same_unit(type_: pa.DataType, logical: Any) -> bool:
    """Say whether a footer counts time in the unit that Arrow reads."""
    if not (pa.types.is_timestamp(type_) or pa.types.is_time(type_)):
        return True
    return f'"timeUnit":"{_UNITS[type_.unit]}"' in logical.to_json().replace(" ", "")


def _is_bytes(type_: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(type_) for test in tests) or _is_binary(type_)


def _is_binary(type_: pa.DataType) -> bool:
    tests = (
        *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view),
        pa.types.is_fixed_size_binary,
    )
    return any(test(type_) for test in tests)


def _is_counted(type_: pa.DataType) -> bool:
    """Say whether keys of a type are whole numbers."""
    tests = (
        *(pa.types.is_boolean, pa.types.is_integer, pa.types.is_decimal),
        *(pa.types.is_date, pa.types.is_time, pa.types.is_timestamp),
    )
    return any(test(type_) for test in tests)


def _floor(type_: pa.DataType, literal: Literal) -> tuple[Key | None, bool]:
    """Return the largest key of a type that is not above a literal, and whether it is equal.

    None where every value is above.
    """
    if pa.types.is_floating(type_):
        return _floor_of_floats(_FLOATS[type_], literal)
    if _is_bytes(type_) and isinstance(literal, str):
        try:
            return literal.encode(), True
        except UnicodeEncodeError as error:
            raise DoesNotFit(literal) from error
    if not _is_counted(type_):
        raise DoesNotFit(literal)
    exact, (least, largest) = _counted(type_, literal), _range(type_)
    if exact < least:
        return None, False
    floor = min(exact.numerator // exact.denominator, largest)
    return floor, floor == exact


def _range(type_: pa.DataType) -> tuple[int, int]:
    if pa.types.is_boolean(type_):
        return 0, 1
    if pa.types.is_unsigned_integer(type_):
        return 0, 2**type_.bit_width - 1
    if pa.types.is_decimal(type_):
        return 1 - 10**type_.precision, 10**type_.precision - 1
    bits = 32 if pa.types.is_date(type_) else type_.bit_width
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _counted(type_: pa.DataType, literal: Literal) -> Fraction:
    """Return what a literal is in units of a type whose keys are whole numbers."""
    if pa.types.is_boolean(type_) != isinstance(literal, bool):
        raise DoesNotFit(literal)
    if isinstance(literal, bool):
        return Fraction(literal)
    if pa.types.is_integer(type_):
        return _number(literal)
    if pa.types.is_decimal(type_):
        return _number(literal) * Fraction(10) ** int(type_.scale)
    if not isinstance(literal, str):
        raise DoesNotFit(literal)
    if pa.types.is_time(type_):
        return _seconds_of_day(literal) * _TICKS[type_.unit]
    seconds = _seconds(literal, is_utc=pa.types.is_timestamp(type_) and type_.tz is not None)
    return seconds / _DAY if pa.types.is_date(type_) else seconds * _TICKS[type_.unit]


def _number(literal: int | float | str) -> Fraction:
    """Return a number as it is written: 0.1 is a tenth."""
    if isinstance(literal, int):
        return Fraction(literal)
    try:
        number = Decimal(repr(literal) if isinstance(literal, float) else literal)
    except InvalidOperation as error:
        raise DoesNotFit(literal) from error
    if not number.is_finite():
        raise DoesNotFit(literal)
    if number and abs(number.adjusted()) > _MOST_DIGITS:
        sign = -1 if number < 0 else 1
        return sign * Fraction(10) ** (_MOST_DIGITS if number.adjusted() > 0 else -_MOST_DIGITS)
    return Fraction(number)


def _floor_of_floats(float_: Any, literal: Literal) -> tuple[float, bool]:
    if isinstance(literal, bool):
        raise DoesNotFit(literal)
    if isinstance(literal, str) and literal.strip().lower().lstrip("+-") in ("inf", "infinity"):
        return float(literal), True
    exact = _number(literal)
    with np.errstate(over="ignore"):
        near = float_(_nearest(exact))
    if np.isinf(near):
        return (float(np.finfo(float_).max), False) if near > 0 else (-np.inf, False)
    if not isinstance(literal, int):
        return float(near), True  # 0.1 of a float column is the number that such columns hold
    while Fraction(float(near)) > exact:
        near = np.nextafter(near, float_(-np.inf))
    return float(near), Fraction(float(near)) == exact


def _nearest(exact: Fraction) -> float:
    try:
        return float(exact)
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")


def _fraction(text: str) -> tuple[str, Fraction]:
    """Cut a fraction of a second out of a time's text: Python reads six digits of it."""
    match = re.search(r"(:\d\d)[.,](\d+)", text)
    if match is None:
        return text, Fraction(0)
    digits = match[2][:_MOST_DIGITS]
    return text[: match.end(1)] + text[match.end() :], Fraction(int(digits), 10 ** len(digits))


def _seconds(text: str, *, is_utc: bool) -> Fraction:
    """Return the seconds since 1970 of a date or a time, which is UTC where it has no offset."""
    whole, fraction = _fraction(text.strip())
    try:
        moment = datetime.fromisoformat(whole)
    except ValueError as error:
        raise DoesNotFit(text) from error
    if moment.tzinfo is not None:
        if not is_utc:
            raise DoesNotFit(text)
        moment = moment.replace(tzinfo=None) - (moment.utcoffset() or timedelta())
    return Fraction((moment - _EPOCH) // timedelta(seconds=1)) + fraction


def _seconds_of_day(text: str) -> Fraction:
    whole, fraction = _fraction(text.strip())
    try:
        moment = time.fromisoformat(whole)
    except ValueError as error:
        raise DoesNotFit(text) from error
    if moment.tzinfo is not None:
        raise DoesNotFit(text)
    return Fraction(moment.hour * 3600 + moment.minute * 60 + moment.second) + fraction


def stored(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column as it is stored, without an extension around its type."""
    if isinstance(column.type, pa.BaseExtensionType):
        return stored(column.cast(column.type.storage_type))
    return column


def _comparable(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column in a type that Arrow compares; every value stays the same.

    Lists and such are never compared.
    """
    column = stored(column)
    if pa.types.is_nested(column.type):
        return column
    return column.cast(_comparable_type(column.type))


def _comparable_type(type_: pa.DataType) -> pa.DataType:
    type_ = value_type(type_)
    if pa.types.is_float16(type_):
        return pa.float32()
    if pa.types.is_date(type_):
        return pa.date32()
    if pa.types.is_decimal(type_) and type_.bit_width < 128:
        return pa.decimal128(type_.precision, type_.scale)
    if _is_bytes(type_):
        return pa.large_binary() if _is_binary(type_) else pa.large_string()
    return type_


def as_scalar(type_: pa.DataType, key: Key) -> pa.Scalar:
    """Return a key as a value of the type that `_comparable` leaves."""
    comparable = _comparable_type(type_)
    if isinstance(key, bytes):
        return pa.scalar(key if _is_binary(comparable) else key.decode(), comparable)
    if pa.types.is_decimal(comparable):
        digits = tuple(map(int, str(abs(int(key)))))
        return pa.scalar(Decimal((int(key < 0), digits, -comparable.scale)), comparable)
    return pa.scalar(bool(key) if pa.types.is_boolean(comparable) else key, comparable)

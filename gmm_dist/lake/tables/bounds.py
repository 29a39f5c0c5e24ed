"""Which files of a table may hold rows that pass a filter, by the statistics in its log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Self

import pyarrow as pa

from gmm_dist.errors import UserError
from gmm_dist.lake.filters.where import Filter, Where
from gmm_dist.lake.parquet.comparing import Passing

_UNDER_MILLISECOND = {"s": 0, "ms": 0, "us": 999, "ns": 999_999}  # units, at the most


@dataclass(frozen=True, slots=True, eq=False)
class Bounds:
    """Hold the least and the largest value of columns in each file, None where it is unknown.

    Of whole numbers, dates and times alone: logs cut texts short, and may print few digits of
    floats. Values are in units of their types. Deleted rows count, too.
    """

    types: pa.Schema
    least: Mapping[str, Sequence[int | None]]
    largest: Mapping[str, Sequence[int | None]]

    @classmethod
    def of(cls, types: pa.Schema, least: pa.Table, largest: pa.Table) -> Self:
        """Take the statistics of columns of such types, a row for each file."""
        fields = [
            field
            for field in types
            if is_counted(field.type)
            and field.name in least.column_names
            and field.name in largest.column_names
        ]
        return cls(
            types=pa.schema(fields),
            least={field.name: _units(least.column(field.name), field.type) for field in fields},
            largest={
                field.name: [
                    None if unit is None else unit + _slack(field.type)
                    for unit in _units(largest.column(field.name), field.type)
                ]
                for field in fields
            },
        )

    def matching(self, condition: Filter, files: Sequence[int]) -> list[int]:
        """Return those of some files, by their numbers, that may hold a row that passes."""
        known = condition.restricted(self.types.names) if isinstance(condition, Where) else None
        if known is None:
            return list(files)
        with suppress(UserError):  # raised later, when the columns of the files are known
            tests = known.tests(self.types)
            return [file for file in files if tests.may_hold(partial(self._may_pass, file))]
        return list(files)

    def _may_pass(self, file: int, name: str, passing: Passing) -> bool:
        low, high = self.least[name][file], self.largest[name][file]
        if passing.missing or low is None or high is None or low > high:
            return not passing.never
        return passing.may_hold(low, high)


def is_counted(type_: pa.DataType) -> bool:
    """Say whether values of a type are whole numbers of some unit, of which bounds are kept."""
    tests = (pa.types.is_integer, pa.types.is_date32, pa.types.is_timestamp)
    return any(test(type_) for test in tests)


def _units(column: pa.ChunkedArray, type_: pa.DataType) -> list[int | None]:
    integers = pa.int32() if pa.types.is_date32(type_) else pa.int64()
    units: list[int | None] = column.cast(type_).cast(integers).to_pylist()
    return units


def _slack(type_: pa.DataType) -> int:
    """Return by how many units a largest value may be too small: logs cut times to milliseconds."""
    return _UNDER_MILLISECOND[type_.unit] if pa.types.is_timestamp(type_) else 0

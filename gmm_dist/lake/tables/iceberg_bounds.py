"""Bounds of columns in the files of an Iceberg table: by its metrics, and by partition values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from gmm_dist.lake.tables.bounds import Bounds, is_counted
from gmm_dist.lake.tables.iceberg_files import TableFile

if TYPE_CHECKING:
    from pyiceberg.partitioning import PartitionSpec
    from pyiceberg.schema import Schema

Range = tuple[int | None, int | None]
_EPOCH = date(1970, 1, 1)
_DAY = 24 * 3600
_SECONDS = {"hour": 3600, "day": _DAY}


def bounds_of(
    files: Sequence[TableFile],
    specs: Mapping[int, PartitionSpec],
    schema: Schema,
    types: pa.Schema,
) -> Bounds:
    """Return what is known of the whole numbers, dates and times of some columns in files.

    Partition values bound the columns that they are made of, too: a day its timestamps.
    """
    ids = {field.name: field.field_id for field in schema.fields}
    fields = [field for field in types if is_counted(field.type)]
    ranges = {
        field.name: [_range(file, specs[file.spec], ids[field.name], field.type) for file in files]
        for field in fields
    }
    return Bounds(
        types=pa.schema(fields),
        least={name: [low for low, _ in each] for name, each in ranges.items()},
        largest={name: [high for _, high in each] for name, each in ranges.items()},
    )


def _range(file: TableFile, spec: PartitionSpec, field_id: int, type_: pa.DataType) -> Range:
    known = [(_metric(file.lower, field_id, type_), _metric(file.upper, field_id, type_))]
    for part, value in zip(spec.fields, file.partition, strict=True):
        if part.source_id == field_id and isinstance(value, int):
            known.append(_preimage(str(part.transform), value, type_))
    lows = [low for low, _ in known if low is not None]
    highs = [high for _, high in known if high is not None]
    return max(lows, default=None), min(highs, default=None)


def _metric(bounds: Mapping[int, bytes], field_id: int, type_: pa.DataType) -> int | None:
    stored = bounds.get(field_id)
    # Types may have been promoted since: whole numbers to longer ones, dates to times.
    if not stored or (pa.types.is_timestamp(type_) and len(stored) != 8):
        return None
    return int.from_bytes(stored, "little", signed=True)


def _preimage(transform: str, value: int, type_: pa.DataType) -> Range:
    """Return the least and largest value of a column that a transform makes such a value of."""
    if transform == "identity":
        return value, value
    if transform.startswith("truncate[") and pa.types.is_integer(type_):
        return value, value + int(transform[9:-1]) - 1
    if value < 0:  # old writers have rounded these towards 1970
        return None, None
    first, last = _start(transform, value), _start(transform, value + 1)
    if first is None or last is None:
        return None, None
    if pa.types.is_date(type_):
        return first // _DAY, last // _DAY - 1
    unit: Any = {"us": 10**6, "ns": 10**9}.get(getattr(type_, "unit", ""))
    return (None, None) if unit is None else (first * unit, last * unit - 1)


def _start(transform: str, value: int) -> int | None:
    """Return the first second, since 1970, of an hour, day, month or year since then."""
    if transform in _SECONDS:
        return value * _SECONDS[transform]
    months = {"month": value, "year": 12 * value}.get(transform)
    if months is None:
        return None
    return (date(1970 + months // 12, months % 12 + 1, 1) - _EPOCH).days * _DAY

"""The types of columns: which are numbers, or lists of them, and the common type of two."""

from __future__ import annotations

import pyarrow as pa

from gmm_dist.lake.parquet.comparing import value_type

_UNITS = ("s", "ms", "us", "ns")
_DIGITS = {8: 3, 16: 5, 32: 10, 64: 19}
_LISTS = (
    (pa.types.is_list, pa.list_),
    (pa.types.is_large_list, pa.large_list),
    (pa.types.is_list_view, pa.list_view),
    (pa.types.is_large_list_view, pa.large_list_view),
)
_MANTISSAS = ((11, pa.float16()), (24, pa.float32()))


def is_numeric(type_: pa.DataType) -> bool:
    """Say whether a column of this type can be a feature."""
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    return any(test(type_) for test in tests)


def is_list(type_: pa.DataType) -> bool:
    """Say whether a type is a list, of any kind; a tensor of fixed shape is a list."""
    tests = (
        *(pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list),
        *(pa.types.is_list_view, pa.types.is_large_list_view),
    )
    return any(test(value_type(type_)) for test in tests)


def is_embedding(type_: pa.DataType) -> bool:
    """Say whether a column of this type may hold all features of a row: a list of numbers."""
    return is_list(type_) and is_numeric(value_type(type_).value_type) and width(type_) != 0


def width(type_: pa.DataType) -> int | None:
    """Return how many values the lists of a type have; None where the type does not say."""
    type_ = value_type(type_)
    return type_.list_size if pa.types.is_fixed_size_list(type_) else None


def number_type(type_: pa.DataType) -> pa.DataType:
    """Return the type of a column's numbers, those of its lists where it has lists."""
    return value_type(type_).value_type if is_list(type_) else type_


def without_views(type_: pa.DataType) -> pa.DataType:
    """Return a type whose texts are no views: Arrow cannot filter those."""
    if pa.types.is_string_view(type_):
        return pa.large_string()
    if pa.types.is_binary_view(type_):
        return pa.large_binary()
    if pa.types.is_struct(type_):
        return pa.struct([_bare(field) for field in type_])
    if pa.types.is_map(type_):
        return pa.map_(_bare(type_.key_field), _bare(type_.item_field), type_.keys_sorted)
    if pa.types.is_fixed_size_list(type_):
        return pa.list_(_bare(type_.value_field), type_.list_size)
    for is_kind, kind in _LISTS:
        if is_kind(type_):
            return kind(_bare(type_.value_field))
    return type_


def _bare(field: pa.Field) -> pa.Field:
    return field.with_type(without_views(field.type))


def join(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """Return the type that holds the values of both, None when there is none.

    float64 stands for whole numbers of more than 53 bits beside floats, and a finer unit for
    a coarser one, though neither holds every value; for decimals beside floats only where they
    are numbers to compute with: see `loses`.
    """
    if a == b:
        return a
    a, b = value_type(a), value_type(b)
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if is_list(a) and is_list(b):
        return _join_lists(a, b)
    if is_numeric(a) and is_numeric(b):
        return _join_numbers(a, b)
    if _is_text(a) and _is_text(b):
        return _join_text(a, b)
    if pa.types.is_temporal(a) and pa.types.is_temporal(b):
        return _join_times(a, b)
    return _permissive(a, b) if pa.types.is_nested(a) and pa.types.is_nested(b) else None


def loses(stored: pa.DataType, common: pa.DataType) -> bool:
    """Say whether a cast to a common type may silently round a value."""
    stored, common = value_type(stored), value_type(common)
    if is_list(stored) and is_list(common):
        return loses(stored.value_type, common.value_type)
    return bool(pa.types.is_decimal(stored) and pa.types.is_floating(common))


def _join_lists(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    inner = join(a.value_type, b.value_type)
    widths = {length for length in (width(a), width(b)) if length is not None}
    if inner is None or len(widths) > 1:
        return None
    if width(a) is not None and width(b) is not None:
        return pa.list_(inner, width(a))
    large = any(pa.types.is_large_list(t) or pa.types.is_large_list_view(t) for t in (a, b))
    return pa.large_list(inner) if large else pa.list_(inner)


def _join_numbers(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    if pa.types.is_decimal(a) or pa.types.is_decimal(b):
        if pa.types.is_floating(a) or pa.types.is_floating(b):
            return pa.float64()
        return _join_decimals(a, b)
    if pa.types.is_floating(a) and pa.types.is_floating(b):
        return max(a, b, key=lambda type_: type_.bit_width)
    if pa.types.is_floating(a) or pa.types.is_floating(b):
        return _join_floats(*((a, b) if pa.types.is_floating(a) else (b, a)))
    if pa.types.is_signed_integer(a) == pa.types.is_signed_integer(b):
        return max(a, b, key=lambda type_: type_.bit_width)
    signed, unsigned = (a, b) if pa.types.is_signed_integer(a) else (b, a)
    if unsigned.bit_width == 64:
        return pa.decimal128(20, 0)
    bits = max(signed.bit_width, 2 * unsigned.bit_width)
    return {16: pa.int16(), 32: pa.int32(), 64: pa.int64()}[bits]


def _join_floats(floating: pa.DataType, whole: pa.DataType) -> pa.DataType:
    bits = whole.bit_width - pa.types.is_signed_integer(whole)
    for mantissa, type_ in _MANTISSAS:
        if floating.bit_width <= type_.bit_width and bits <= mantissa:
            return type_
    return pa.float64()


def _join_decimals(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    shapes = [_digits(type_) for type_ in (a, b)]
    scale = max(scale for _, scale in shapes)
    precision = max(before for before, _ in shapes) + scale
    if precision > 76:
        return None
    return pa.decimal128(precision, scale) if precision <= 38 else pa.decimal256(precision, scale)


def _digits(type_: pa.DataType) -> tuple[int, int]:
    """Return how many digits a type's numbers have before the point, and after it."""
    if pa.types.is_decimal(type_):
        return max(type_.precision - type_.scale, 0), max(type_.scale, 0)
    return (20 if type_ == pa.uint64() else _DIGITS[type_.bit_width]), 0


def _is_text(type_: pa.DataType) -> bool:
    tests = (
        *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
        *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view),
        pa.types.is_fixed_size_binary,
    )
    return any(test(type_) for test in tests)


def _join_text(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    names = f"{a} {b}"
    if "binary" not in names:
        return pa.large_string() if "large" in names else pa.string()
    return pa.large_binary() if "large" in names else pa.binary()


def _join_times(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    if pa.types.is_date(a) and pa.types.is_date(b):
        return pa.date32()
    if pa.types.is_date(a) or pa.types.is_date(b):
        other = b if pa.types.is_date(a) else a
        return other if pa.types.is_timestamp(other) and other.tz is None else None
    if pa.types.is_timestamp(a) and pa.types.is_timestamp(b):
        if (a.tz is None) != (b.tz is None):
            return None  # a time without a zone may be any of several instants
        return pa.timestamp(_finer(a, b), a.tz if a.tz == b.tz else "UTC")
    if pa.types.is_time(a) and pa.types.is_time(b):
        unit = _finer(a, b)
        return pa.time32(unit) if unit in ("s", "ms") else pa.time64(unit)
    if pa.types.is_duration(a) and pa.types.is_duration(b):
        return pa.duration(_finer(a, b))
    return None


def _finer(a: pa.DataType, b: pa.DataType) -> str:
    finer: str = max(a.unit, b.unit, key=_UNITS.index)
    return finer


def _permissive(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    try:
        schemas = [pa.schema([("", a)]), pa.schema([("", b)])]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None

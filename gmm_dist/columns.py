"""The columns of a lake: unified by name over files, and chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from gmm_dist import storage
from gmm_dist.errors import SchemaError, UserError
from gmm_dist.listing import LakeFile, name_of
from gmm_dist.where import Where

# Float32 holds every value of these types.
_EXACT_IN_FLOAT32 = (
    *(pa.null(), pa.float16(), pa.float32()),
    *(pa.int8(), pa.int16(), pa.uint8(), pa.uint16()),
)


@dataclass(frozen=True, slots=True)
class Chosen:
    """Hold the columns that a plan reads.

    `columns` holds the features' columns and `feature_names` (d,) the features; `schema` the
    columns that are read, filtered by or kept, their types unified over files; `float64_source`
    says that float32 cannot hold some feature's every value; `kept` are the kept columns that
    are in the files, the others being hive keys.
    """

    columns: tuple[str, ...]
    feature_names: tuple[str, ...]
    schema: pa.Schema
    float64_source: bool
    kept: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Columns:
    """Hold the lake's columns by name, over all files.

    `types` are unified; `schemas` has each distinct schema of a file and the first such file;
    `problems` say why a column cannot be used, for those who want to use it.
    """

    root: str
    types: Mapping[str, pa.DataType]
    schemas: Mapping[pa.Schema, LakeFile]
    problems: Mapping[str, str]
    keys: pa.Schema

    @classmethod
    def unify(
        cls, root: str, found: Iterable[tuple[pa.Schema, LakeFile]], keys: pa.Schema
    ) -> Columns:
        """Unify the files' schemas by name; `keys` are the types of the hive keys."""
        schemas: dict[pa.Schema, LakeFile] = {}
        for schema, file in found:
            schemas.setdefault(schema, file)
        first: dict[str, LakeFile] = {}
        types: dict[str, pa.DataType] = {}
        problems: dict[str, str] = {}
        for schema, file in schemas.items():
            for name in dict.fromkeys(schema.names):
                if len(schema.get_all_field_indices(name)) > 1:
                    problems[name] = f"{name_of(root, file)}: column {name!r} occurs twice"
                    types.setdefault(name, pa.null())
                    continue
                type_, known = schema.field(name).type, types.get(name)
                if known is None or (joined := _join(known, type_)) is not None:
                    types[name] = type_ if known is None else joined
                    first.setdefault(name, file)
                    continue
                problems[name] = (
                    f"{name_of(root, file)}: column {name!r} {_differs(type_, known)} in "
                    f"{name_of(root, first[name])}"
                )
        return cls(root, types, schemas, problems, keys)

    def choose(
        self,
        columns: Sequence[str] | None,
        weight: str | None,
        tested: Where | None,
        keep: Sequence[str] = (),
        *,
        remedy: str = "name the feature columns with --columns",
    ) -> Chosen:
        """Choose the feature columns, by name or by default; check them, weight and filter.

        `tested` are the comparisons to be made row by row. By default every floating-point
        column is a feature, or else the one fixed-size-list column, whose features may also be
        named one by one: all, in order, `emb[0]`, `emb[1]`, ... `keep` are columns to go along,
        which some files may lack. `remedy` says what helps when a feature is missing.

        Raises:
            SchemaError: a feature or the weight is missing from a file, duplicate, or of a wrong
                type.
            UserError: the same of any other column, or it is named twice.
        """
        features = self._features(columns, weight, remedy)
        self._check_weight(weight, features)
        self._check_filter(tested)
        kept = self._kept(keep)
        weights, tests = (weight,) if weight else (), tested.columns if tested else ()
        names = dict.fromkeys((*features, *weights, *tests, *kept))
        schema = pa.schema([(name, self.types[name]) for name in names])
        float64_source = self._is_float64_source(features)
        return Chosen(features, _feature_names(schema, features), schema, float64_source, kept)

    def _features(
        self, columns: Sequence[str] | None, weight: str | None, remedy: str
    ) -> tuple[str, ...]:
        """Return the feature columns, asked for or by default; each is fit for use."""
        names = self._default_features(weight) if columns is None else self._whole_list(columns)
        if not names:
            raise UserError("no feature columns were named; name at least one with --columns")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"feature column {twice!r} is named twice; name it once")
        for name in names:
            self._check_present(name, remedy)
        self._check_feature_types(names)
        return names

    def _whole_list(self, columns: Sequence[str]) -> tuple[str, ...]:
        """Return the list column all of whose features were named, else the names as they are."""
        name, bracket, _ = columns[0].rpartition("[") if columns else ("", "", "")
        if bracket and is_embedding(self.types.get(name, pa.null())):
            found = pa.schema([(name, self.types[name])])
            if _feature_names(found, [name]) == tuple(columns):
                return (name,)
        return tuple(columns)

    def _kept(self, keep: Sequence[str]) -> tuple[str, ...]:
        """Return the columns to keep that the path does not hold already."""
        for name in keep:
            if name in self.problems and name not in self.keys.names:
                raise UserError(f"{self.problems[name]}; mend the files or leave out --keep {name}")
            if name not in self.types and name not in self.keys.names:
                raise UserError(
                    f"{storage.redacted(self.root)}: --keep {name!r} is no column among "
                    f"{_quoted(self.types)}; name one of them"
                )
        return tuple(name for name in dict.fromkeys(keep) if name not in self.keys.names)

    def _default_features(self, weight: str | None) -> tuple[str, ...]:
        free = [name for name in self.types if name not in (*self.keys.names, weight)]
        floating = tuple(name for name in free if self._is_ever(name, pa.types.is_floating))
        lists = tuple(name for name in free if self._is_ever(name, is_embedding))
        if floating or len(lists) == 1:
            return floating or lists
        raise SchemaError(
            f"{storage.redacted(self.root)}: no floating-point column and {len(lists)} "
            f"fixed-size-list columns among {_quoted(self.types)}; name the feature columns "
            "with --columns"
        )

    def _is_ever(self, name: str, test: Callable[[pa.DataType], bool]) -> bool:
        return any(test(field.type) for s in self.schemas for field in s if field.name == name)

    def _check_present(self, name: str, remedy: str) -> None:
        if name in self.problems:
            raise SchemaError(f"{self.problems[name]}; mend the files or leave the column out")
        if name not in self.types and name in self.keys.names:
            raise SchemaError(
                f"{storage.redacted(self.root)}: {name!r} is a hive key of the path, not a column "
                "of the files; use it in --where"
            )
        for schema, file in self.schemas.items():
            if name not in schema.names:
                raise SchemaError(
                    f"{name_of(self.root, file)}: no column {name!r} among "
                    f"{_quoted(schema.names)}; {remedy}"
                )

    def _check_feature_types(self, names: Sequence[str]) -> None:
        for name in names:
            type_ = self.types[name]
            if _is_numeric(type_) or (is_embedding(type_) and len(names) == 1):
                continue
            remedy = "name numeric columns, or one fixed-size-list column of numbers alone"
            if pa.types.is_list(type_) or pa.types.is_large_list(type_):
                remedy = "write it as a fixed-size list, such as pyarrow.list_(pa.float32(), 64)"
            fields = ((schema.field(name), file) for schema, file in self.schemas.items())
            file = next(file for field, file in fields if not _is_numeric(field.type))
            raise SchemaError(
                f"{name_of(self.root, file)}: feature column {name!r} has type {type_}; {remedy}"
            )

    def _check_weight(self, weight: str | None, features: Sequence[str]) -> None:
        """Raise unless the weight column, if any, is numeric and no feature."""
        if weight is None:
            return
        self._check_present(weight, "name another weight column")
        if weight in features:
            raise UserError(f"column {weight!r} is a feature and the weight; name it once")
        if not _is_numeric(self.types[weight]):
            raise SchemaError(
                f"{storage.redacted(self.root)}: weight column {weight!r} has type "
                f"{self.types[weight]}; name a numeric column"
            )

    def _check_filter(self, condition: Where | None) -> None:
        """Raise unless every column of the filter is known and of one type."""
        for name in condition.columns if condition else ():
            if name in self.problems:
                raise UserError(f"{self.problems[name]}; take it out of the filter")
        if condition:
            condition.expression(
                pa.unify_schemas([pa.schema(self.types.items()), self._pure_keys()])
            )

    def _pure_keys(self) -> pa.Schema:
        return pa.schema([field for field in self.keys if field.name not in self.types])

    def _is_float64_source(self, features: Sequence[str]) -> bool:
        """Say whether any file stores a feature in a type that float32 cannot hold."""
        stored = (schema.field(name).type for schema in self.schemas for name in features)
        return any(_number_type(type_) not in _EXACT_IN_FLOAT32 for type_ in stored)


def _join(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """Return the type that holds values of both, None when there is none."""
    if a == b:
        return a
    if pa.types.is_fixed_size_list(a) or pa.types.is_fixed_size_list(b):
        return _join_lists(a, b)
    try:
        schemas = [pa.schema([("", a)]), pa.schema([("", b)])]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None


def _join_lists(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    # Arrow would join two widths to a list of any length.
    if pa.types.is_null(a) or pa.types.is_null(b):
        return b if pa.types.is_null(a) else a
    if not (is_embedding(a) and is_embedding(b) and a.list_size == b.list_size):
        return None
    return pa.list_(_join(a.value_type, b.value_type), a.list_size)


def _differs(found: pa.DataType, known: pa.DataType) -> str:
    if is_embedding(found) and is_embedding(known) and found.list_size != known.list_size:
        return f"has embedding width {found.list_size}, but {known.list_size}"
    return f"has type {found}, but {known}"


def _is_numeric(type_: pa.DataType) -> bool:
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    return any(test(type_) for test in tests)


def is_embedding(type_: pa.DataType) -> bool:
    """Say whether a column of this type holds all features of a row: a list of one length."""
    return bool(pa.types.is_fixed_size_list(type_)) and _is_numeric(type_.value_type)


def _number_type(type_: pa.DataType) -> pa.DataType:
    return type_.value_type if pa.types.is_fixed_size_list(type_) else type_


def _feature_names(schema: pa.Schema, features: Sequence[str]) -> tuple[str, ...]:
    type_ = schema.field(features[0]).type
    if is_embedding(type_):
        return tuple(f"{features[0]}[{i}]" for i in range(type_.list_size))
    return tuple(features)


def _quoted(names: Iterable[str]) -> str:
    listed = [repr(name) for name in names]
    more = f" and {len(listed) - 20} more" if len(listed) > 20 else ""
    return (", ".join(listed[:20]) or "none") + more

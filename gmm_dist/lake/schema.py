"""The columns of a lake: matched by name over all files; some are chosen as features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from gmm_dist import storage
from gmm_dist.errors import Option, SchemaError, UserError, Words
from gmm_dist.lake.filters.where import Filter
from gmm_dist.lake.listing import LakeFile, name_of
from gmm_dist.lake.parquet.column_types import (
    is_embedding,
    is_numeric,
    join,
    loses,
    number_type,
    width,
    without_views,
)

# Float32 holds every value of these types.
_EXACT_IN_FLOAT32 = (
    *(pa.null(), pa.float16(), pa.float32()),
    *(pa.int8(), pa.int16(), pa.uint8(), pa.uint16()),
)
_COLUMNS, _KEEP = Option("columns"), Option("keep")
NAME_COLUMNS = "name the feature columns with " + _COLUMNS
_SHOWN = 12  # columns of a line that says which are used


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Hold the columns that a plan reads.

    `columns` holds the features' columns and `feature_names` (d,) the features; `schema` the
    columns that are read, filtered by or kept, their types unified over files; `float64_source`
    says that float32 cannot hold some feature's every value; `kept` are the kept columns that
    are in the files, the others being hive keys. `unmeasured` is the one column of lists whose
    types do not say how long they are: then there are no feature names yet.
    """

    columns: tuple[str, ...]
    feature_names: tuple[str, ...]
    schema: pa.Schema
    float64_source: bool
    kept: tuple[str, ...] = ()
    unmeasured: str | None = None

    def measured(self, length: int) -> Chosen:
        """Return the same columns, with lists of this length."""
        assert self.unmeasured is not None
        at = self.schema.get_field_index(self.unmeasured)
        type_ = pa.list_(number_type(self.schema.field(at).type), length)
        return replace(
            self,
            feature_names=_feature_names(self.unmeasured, length),
            schema=self.schema.set(at, pa.field(self.unmeasured, type_)),
            unmeasured=None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Hold the lake's columns by name, over all files.

    `types` are unified; `stored` has the types of each distinct schema, by name, and the first
    file that has it; `problems` say why a column cannot be used;
    `indices` are columns that pandas wrote an index to.
    """

    root: str
    types: Mapping[str, pa.DataType]
    stored: Sequence[tuple[Mapping[str, pa.DataType], LakeFile]]
    problems: Mapping[str, str]
    keys: pa.Schema
    indices: frozenset[str] = frozenset()

    @classmethod
    def unify(
        cls,
        root: str,
        schemas: Iterable[tuple[pa.Schema, LakeFile]],
        keys: pa.Schema,
        indices: frozenset[str] = frozenset(),
    ) -> Columns:
        """Unify the files' schemas by name; `keys` are the types of the hive keys."""
        first_with: dict[int, tuple[pa.Schema, LakeFile]] = {}
        for schema, file in schemas:
            first_with.setdefault(id(schema), (schema, file))
        first: dict[str, LakeFile] = {}
        types: dict[str, pa.DataType] = {}
        problems: dict[str, str] = {}
        stored = []
        for schema, file in first_with.values():
            file_types = dict(zip(schema.names, schema.types, strict=True))
            stored.append((file_types, file))
            for name in [name for name, n in Counter(schema.names).items() if n > 1]:
                problems[name] = f"{name_of(root, file)}: column {name!r} occurs twice"
                types.setdefault(name, pa.null())
            for name, type_ in file_types.items():
                known = types.get(name)
                joined = type_ if known is None else join(known, type_)
                if joined is not None:
                    types[name] = without_views(joined)
                    if known is None or pa.types.is_null(known):
                        first[name] = file
                elif name not in problems:
                    problems[name] = (
                        f"{name_of(root, file)}: column {name!r} {_differs(type_, known)} in "
                        f"{name_of(root, first.get(name, file))}"
                    )
        return cls(
            root=root, types=types, stored=stored, problems=problems, keys=keys, indices=indices
        )

    def choose(
        self,
        columns: Sequence[str] | None,
        weight: str | None,
        tested: Filter | None,
        keep: Sequence[str] = (),
        *,
        remedy: Words = NAME_COLUMNS,
    ) -> Chosen:
        """Choose the feature columns, by name or by default; check them, weight and filter.

        By default every floating-point column is a feature, but for pandas' indices, or else the
        one column of lists of numbers (of a fixed size, or else of floating-point numbers). The
        features of such a column may also be named one by one: all, in order, `emb[0]`, `emb[1]`,
        ...

        Args:
            columns: Names of the feature columns; None for the default.
            weight: Name of the column of sample weights; None for none.
            tested: The part of the filter that is tested row by row.
            keep: Columns to go along, which some files may lack.
            remedy: What helps when a feature is missing.

        Raises:
            SchemaError: a feature or the weight is missing from a file, duplicate, or of a wrong
                type.
            UserError: the same of any other column, or it is named twice.
        """
        features, length = self._features(columns, weight, remedy)
        self._check_weight(weight, features)
        self._check_filter(tested)
        kept = self._kept(keep)
        weights = (weight,) if weight else ()
        tests = [name for name in tested.columns if name not in self.keys.names] if tested else ()
        names = dict.fromkeys((*features, *weights, *tests, *kept))
        schema = pa.schema([(name, self.types[name]) for name in names])
        float64_source = self._is_float64_source(features)
        if not is_embedding(self.types[features[0]]):
            return Chosen(
                columns=features,
                feature_names=features,
                schema=schema,
                float64_source=float64_source,
                kept=kept,
            )
        chosen = Chosen(
            columns=features,
            feature_names=(),
            schema=schema,
            float64_source=float64_source,
            kept=kept,
            unmeasured=features[0],
        )
        return chosen if length is None else chosen.measured(length)

    def described(self, chosen: Chosen, weight: str | None) -> str:
        """Say in a line of bounded length which columns are features, and which could be."""
        used = {*chosen.columns, *self.keys.names, weight}
        left = [
            f"{_short(name)} ({'an index of pandas' if name in self.indices else type_})"
            for name, type_ in self.types.items()
            if name not in used and (is_numeric(type_) or is_embedding(type_))
        ]
        features = _some([_short(name) for name in chosen.feature_names])
        weights = "" if weight is None else f"; weights: {_short(weight)}"
        others = f"; numeric columns left out: {_some(left)}" if left else ""
        n = len(chosen.feature_names)
        return f"{n:,} feature{'' if n == 1 else 's'}: {features}{weights}{others}"

    def _features(
        self, columns: Sequence[str] | None, weight: str | None, remedy: Words
    ) -> tuple[tuple[str, ...], int | None]:
        """Return the feature columns, named or default, checked, and the length of their lists.

        The length is None for numbers, and where types do not give it.
        """
        if columns is None:
            names, length = self._default_features(weight), None
        else:
            names, length = self._whole_list(columns)
        if not names:
            raise UserError("no feature columns were named; name at least one with " + _COLUMNS)
        twice = next((name for name, n in Counter(names).items() if n > 1), None)
        if twice is not None:
            raise UserError(f"feature column {twice!r} is named twice; name it once")
        for name in names:
            self._check_present(name, remedy)
        self._check_feature_types(names)
        self._check_unambiguous(names)
        fixed = self._width(names[0])
        return names, length if fixed is None else fixed

    def _whole_list(self, columns: Sequence[str]) -> tuple[tuple[str, ...], int | None]:
        """Return the list column all of whose features were named, else the names as they are."""
        name, bracket, _ = columns[0].rpartition("[") if columns else ("", "", "")
        if bracket and is_embedding(self.types.get(name, pa.null())):
            length = self._width(name) or len(columns)
            if _feature_names(name, length) == tuple(columns):
                return (name,), length
        return tuple(columns), None

    def _width(self, name: str) -> int | None:
        """Return the length of a column's lists, from the first file whose type gives it."""
        widths = (width(type_) for type_, _ in self._stored(name))
        return next((length for length in widths if length is not None), None)

    def _stored(self, name: str) -> Iterator[tuple[pa.DataType, LakeFile]]:
        """Return the types that a column has in files, and a file for each."""
        return ((types[name], file) for types, file in self.stored if name in types)

    def _kept(self, keep: Sequence[str]) -> tuple[str, ...]:
        """Return the columns to keep that the path does not hold already."""
        for name in keep:
            if name in self.problems and name not in self.keys.names:
                raise UserError(
                    f"{self.problems[name]}; mend the files or leave out " + _KEEP + f" {name!r}"
                )
            if name not in self.types and name not in self.keys.names:
                raise UserError(
                    f"{name!r} is no column among {_quoted(self.types)}",
                    where=storage.redacted(self.root),
                    option=_KEEP,
                    remedy="name one of them",
                )
        kept = tuple(name for name in dict.fromkeys(keep) if name not in self.keys.names)
        for name in kept:
            self._check_exact(name)
        return kept

    def _check_exact(self, name: str) -> None:
        """Raise where the common type of a kept column would silently round values."""
        common = self.types[name]
        rounded = [(type_, file) for type_, file in self._stored(name) if loses(type_, common)]
        if rounded:
            raise self.no_common_type(name, rounded[0])

    def no_common_type(self, name: str, first: tuple[pa.DataType, LakeFile]) -> UserError:
        """Return the error for a kept column: no type holds the values of all files."""
        type_, file = first
        others = [stored for stored in self._stored(name) if stored[0] != type_]
        numeric = [stored for stored in others if is_numeric(stored[0])]
        other = (*numeric, *others, first)[0]
        return UserError(
            f"column {name!r} has type {type_}, but {other[0]} in "
            f"{name_of(self.root, other[1])}, and no type holds the values of both",
            where=name_of(self.root, file),
            remedy="write the files with one type or leave out " + _KEEP + f" {name!r}",
        )

    def _default_features(self, weight: str | None) -> tuple[str, ...]:
        left_out = {*self.keys.names, weight, *self.indices}
        # In any file: a column may be whole numbers in one and not in another.
        ever: dict[str, list[pa.DataType]] = {}
        for types, _ in self.stored:
            for name, type_ in types.items():
                if name not in left_out:
                    ever.setdefault(name, []).append(type_)
        floating = _where_any(ever, pa.types.is_floating)
        fixed = _where_any(ever, lambda t: is_embedding(t) and width(t) is not None)
        lists = fixed or _where_any(
            ever, lambda t: is_embedding(t) and pa.types.is_floating(number_type(t))
        )
        if floating or len(lists) == 1:
            return floating or lists
        numbers = [_short(name) for name in ever if all(is_numeric(type_) for type_ in ever[name])]
        which = f", of the numeric {_some(numbers)}" if numbers else ""
        raise SchemaError(
            f"no floating-point column and {len(lists)} columns of lists of numbers among "
            f"{_quoted(self.types)}{self._but_indices()}",
            where=storage.redacted(self.root),
            remedy=NAME_COLUMNS + which,
        )

    def _but_indices(self) -> str:
        named = [name for name in self.types if name in self.indices]
        return f" ({_quoted(named)}: an index of pandas)" if named else ""

    def _check_present(self, name: str, remedy: Words) -> None:
        if name in self.problems:
            raise SchemaError(f"{self.problems[name]}; mend the files or leave the column out")
        if name not in self.types and name in self.keys.names:
            raise SchemaError(
                f"{name!r} is a hive key of the path, not a column of the files",
                where=storage.redacted(self.root),
                remedy="use it in " + Option("where"),
            )
        for types, file in self.stored:
            if name not in types:
                raise SchemaError(
                    f"no column {name!r} among {_quoted(types)}",
                    where=name_of(self.root, file),
                    remedy=remedy,
                )

    def _check_feature_types(self, names: Sequence[str]) -> None:
        for name in names:
            fits = is_numeric
            if len(names) == 1 and is_embedding(self.types[name]):
                fits = is_embedding
            if fits(self.types[name]) and all(
                fits(type_) or pa.types.is_null(type_) for type_, _ in self._stored(name)
            ):
                continue
            type_, file = next(
                (type_, file) for type_, file in self._stored(name) if not fits(type_)
            )
            raise SchemaError(
                f"{name_of(self.root, file)}: feature column {name!r} has type {type_}; name "
                "numeric columns, or one column of lists of numbers alone"
            )

    def _check_unambiguous(self, names: Sequence[str]) -> None:
        """Raise where columns have the names of a list's features: a model could mean either."""
        name = names[0] if is_embedding(self.types[names[0]]) else names[0].rpartition("[")[0]
        first = f"{name}[0]"
        if first in self.types and is_embedding(self.types.get(name, pa.null())):
            both = next(
                (file for types, file in self.stored if {name, first} <= types.keys()),
                self.stored[0][1],
            )
            raise SchemaError(
                f"{name_of(self.root, both)}: {first!r} is a column and the first feature of the "
                f"lists in column {name!r}; rename one of them"
            )

    def _check_weight(self, weight: str | None, features: Sequence[str]) -> None:
        """Raise unless the weight column, if any, is numeric and no feature."""
        if weight is None:
            return
        self._check_present(weight, "name another weight column")
        if weight in features:
            raise UserError(f"column {weight!r} is a feature and the weight; name it once")
        if not is_numeric(self.types[weight]):
            raise SchemaError(
                f"{storage.redacted(self.root)}: weight column {weight!r} has type "
                f"{self.types[weight]}; name a numeric column"
            )

    def _check_filter(self, condition: Filter | None) -> None:
        """Raise unless every column of the filter is known, and of types that go together."""
        if condition is None:
            return
        for name in condition.columns:
            if name in self.problems:
                raise UserError(f"{self.problems[name]}; take it out of the filter")
        known = [*self.types.items(), *((field.name, field.type) for field in self._pure_keys())]
        condition.check(pa.schema(known), (types for types, _ in self.stored))

    def _pure_keys(self) -> pa.Schema:
        return pa.schema([field for field in self.keys if field.name not in self.types])

    def _is_float64_source(self, features: Sequence[str]) -> bool:
        """Say whether any file stores a feature in a type that float32 cannot hold."""
        stored = {types[name] for types, _ in self.stored for name in features}
        return any(number_type(type_) not in _EXACT_IN_FLOAT32 for type_ in stored)


def _where_any(
    ever: Mapping[str, Collection[pa.DataType]], holds: Callable[[pa.DataType], bool]
) -> tuple[str, ...]:
    return tuple(name for name, types in ever.items() if any(map(holds, types)))


def _short(name: str) -> str:
    """Write a column's name on one line, whatever it holds."""
    cut = name if len(name) <= 60 else f"{name[:60]}..."
    return cut if cut.isprintable() and cut else repr(cut)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _differs(type_: pa.DataType, known: pa.DataType) -> str:
    if is_embedding(type_) and is_embedding(known) and None not in (width(type_), width(known)):
        return f"has embedding width {width(type_)}, but {width(known)}"
    return f"has type {type_}, but {known}"


def _feature_names(name: str, n: int) -> tuple[str, ...]:
    return tuple(f"{name}[{i}]" for i in range(n))


def _quoted(names: Iterable[str]) -> str:
    listed = list(names)
    shown = [repr(name if len(name) <= 100 else f"{name[:100]}...") for name in listed[:20]]
    more = f" and {len(listed) - 20} more" if len(listed) > 20 else ""
    return (", ".join(shown) or "none") + more

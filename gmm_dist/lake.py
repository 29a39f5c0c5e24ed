"""Plan and read a lake: Parquet files on any fsspec URL, dealt to shards by rows."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from gmm_dist import storage
from gmm_dist.errors import UserError
from gmm_dist.where import Where, parse

logger = logging.getLogger(__name__)

Missing = Literal["error", "drop", "mean"]
Float = np.float32 | np.float64

_MIN_ROWS_PER_SHARD = 8192
_MAX_ROWS_PER_SHARD = 2**20
_FOOTERS_AT_ONCE = 32
_PROBED_ROW_GROUPS = 16
_CACHED_BYTES = 2**30
_SMALL_BYTES = 2**21
_SUFFIXES = (".parquet", ".parq", ".pq")
# Float32 holds every value of these types.
_EXACT_IN_FLOAT32 = (
    *(pa.null(), pa.float16(), pa.float32()),
    *(pa.int8(), pa.int16(), pa.uint8(), pa.uint16()),
)


@dataclass(frozen=True, slots=True)
class RowRange:
    """Name rows [start, stop) of one row group; `file` is an index into `Plan.files`."""

    file: int
    row_group: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class LakeFile:
    """Name one Parquet file and the version that was planned.

    `path` is relative to the plan's url, `version` the ETag or mtime, `rows` the rows of each
    row group, `partition` the hive keys and values of the path (None: null).
    """

    path: str
    size: int
    version: str
    rows: tuple[int, ...]
    partition: tuple[tuple[str, str | int | None], ...]


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Count what happened to rows: read = filtered + dropped + rows handed out.

    `filtered`: rows that did not pass `where`; `dropped`: rows with a missing value under
    missing="drop"; `imputed`: *cells* (not rows) missing under missing="mean".
    """

    read: int = 0
    filtered: int = 0
    dropped: int = 0
    imputed: int = 0

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(
            self.read + other.read,
            self.filtered + other.filtered,
            self.dropped + other.dropped,
            self.imputed + other.imputed,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Hold the rows of one row range.

    `X` (n, d) in Fortran order (X.T is C-contiguous), feature units, float32 when the plan's
    `float64_source` is False, else float64; `sample_weight` (n,) float64 or None.
    """

    X: npt.NDArray[Float]
    sample_weight: npt.NDArray[np.float64] | None
    counts: RowCounts


@dataclass(frozen=True, slots=True)
class Plan:
    """Say which rows and columns a job reads, and how they are dealt to shards.

    A picklable value. `hash` is the same for the same files and settings, wherever they are
    mounted (`url` is not part of it); `n_rows` counts rows before the row-level filter;
    `schema` has the file columns that are read or filtered by, their types unified over files;
    `float64_source` says that float32 cannot hold some feature's every value.
    """

    url: str
    files: tuple[LakeFile, ...]
    schema: pa.Schema
    columns: tuple[str, ...]
    feature_names: tuple[str, ...]
    weight_column: str | None
    where: Where | None
    missing: Missing
    shards: tuple[tuple[RowRange, ...], ...]
    float64_source: bool
    hash: str

    @property
    def n_rows(self) -> int:
        return sum(part.stop - part.start for shard in self.shards for part in shard)

    @property
    def n_features(self) -> int:
        return len(self.feature_names)

    @property
    def n_shards(self) -> int:
        return len(self.shards)

    @property
    def row_filter(self) -> Where | None:
        """Return what is left of `where` to test row by row: files were chosen by hive keys."""
        return self.where.restricted(self.schema.names) if self.where else None

    @property
    def read_columns(self) -> tuple[str, ...]:
        """Name the file columns that reading needs: features, weight, filter; each once."""
        weight = (self.weight_column,) if self.weight_column else ()
        tested = self.row_filter.columns if self.row_filter else ()
        return tuple(dict.fromkeys((*self.columns, *weight, *tested)))


@dataclass(frozen=True, slots=True)
class _Footer:
    """Hold what planning needs of one file's footer; the fragment only under a filter."""

    file: LakeFile
    schema: pa.Schema
    fragment: ds.ParquetFileFragment | None


def plan(
    url: str,
    *,
    columns: Sequence[str] | None = None,
    weight_column: str | None = None,
    where: str | None = None,
    missing: Missing = "error",
    n_shards: int | None = None,
) -> Plan:
    """Plan the Parquet file or folder at `url`; reads footers only.

    In a folder every `*.parquet`, `*.parq` and `*.pq` counts, at any depth, but for empty files
    and path parts that begin with `_` or `.`. `columns` are numeric columns or one
    fixed-size-list column; default: every floating-point column, or else the one
    fixed-size-list column. `where` is a filter in `gmm_dist.where`'s syntax over columns and
    hive keys: it leaves out whole files and row groups here, rows in `read`. `n_shards`
    overrides the number of shards, which else depends on the number of rows alone.

    Raises:
        UserError: the path, bucket or credentials are wrong; there is no Parquet file, or it is
            corrupt, or part of a Delta, Iceberg or Hudi table; a column is missing from a file,
            duplicate, or of a wrong or incompatible type; no rows, or none that match.
    """
    condition = parse(where) if where is not None else None
    root, fs, found = _list_files(url)
    files, keys = _partitioned(found)
    files = _matching_files(files, keys, condition, root)
    tested = condition.restricted(_others(condition, keys)) if condition else None
    footers = _read_footers(fs, root, files, keep_fragments=tested is not None)
    lake = _Columns.unify(root, footers, keys)
    features = lake.features(columns, weight_column)
    lake.check_weight(weight_column, features)
    lake.check_filter(tested)
    used = (*features, *((weight_column,) if weight_column else ()))
    schema = lake.schema((*used, *(tested.columns if tested else ())))
    groups = _row_groups(root, footers, tested, schema)
    result = Plan(
        url=root,
        files=tuple(footer.file for footer in footers),
        schema=schema,
        columns=features,
        feature_names=_feature_names(schema, features),
        weight_column=weight_column,
        where=condition,
        missing=missing,
        shards=_deal(groups, n_shards),
        float64_source=lake.float64_source(features),
        hash="",
    )
    logger.info("%s: %d files, %d rows", storage.redacted(root), len(files), result.n_rows)
    return replace(result, hash=_hash(result))


def read(plan: Plan, shard: int, *, fill: npt.NDArray[np.float64] | None = None) -> Iterator[Rows]:
    """Yield the rows of one shard, one `Rows` per row range, in file order.

    The filter comes first, then missing values (null, NaN, a null list or list element): an
    error, or the row is dropped, or the cell becomes `fill[j]` (d,) and, without `fill`, stays
    NaN for a first pass that computes the means. Infinite values are always an error. Peak
    memory: one decoded row group (its read columns) and twice the row range's X.

    Raises:
        UserError: a bad value (the row in the message counts from 0 within its row group), a
            file that changed since the plan was made, is corrupt or cannot be reached.
    """
    fs, root = storage.open_url(plan.url)
    for index, parts in groupby(plan.shards[shard], key=lambda part: part.file):
        file = plan.files[index]
        with _opened(fs, root, plan.url, file) as source:
            for part in parts:
                yield _Extract(plan, file, part).rows(_decoded(plan, source, part), fill)


def probe(plan: Plan, *, max_rows: int = 16384) -> npt.NDArray[np.float64]:
    """Return some complete, finite rows (m, d), m <= max_rows, for choosing a centre.

    They are the first that pass `where` in up to 16 row groups spread evenly over the plan; m
    is 0 when none of these row groups has one. Bad values are left out: `read` reports them.
    """
    groups = list(dict.fromkeys((p.file, p.row_group) for shard in plan.shards for p in shard))
    n = min(len(groups), _PROBED_ROW_GROUPS, max_rows)
    chosen = [groups[i] for i in np.linspace(0, len(groups) - 1, n).round().astype(int)]
    fs, root = storage.open_url(plan.url)
    parts = []
    for index, row_group in chosen:
        file = plan.files[index]
        with _opened(fs, root, plan.url, file) as source:
            parts.append(_first_rows(plan, source, row_group, max_rows // n))
    return np.concatenate([np.empty((0, plan.n_features)), *parts])


def release() -> None:
    """Forget the last decoded row group, to give its memory back after loading."""
    _last_decoded.forget()


# --- which files -----------------------------------------------------------------------------


def _list_files(url: str) -> tuple[str, AbstractFileSystem, list[LakeFile]]:
    """Return the root's URL, its file system, and data files by relative path, in its order."""
    root = storage.absolute(url)
    fs, path = storage.open_url(root)
    # fsspec would pass over a local folder that it may not read.
    options = {"on_error": "raise"} if isinstance(fs, LocalFileSystem) else {}
    with storage.explained(root):
        found = fs.find(path, detail=True, **options)
        if not found or not found.get(path, True):
            info = fs.info(path)  # raises when there is nothing
            found = {path: info} if info["type"] == "file" else {}
    if path in found:
        parent, _, name = root.rpartition("/")
        return parent or "/", fs, [_listed(fs, name, found[path])]
    relative = {name.removeprefix(path).lstrip("/"): info for name, info in found.items()}
    _refuse_table_formats(root, relative)
    _refuse_linked_folders(root, relative)
    files = [_listed(fs, name, relative[name]) for name in sorted(relative) if _is_data(name)]
    files = [file for file in files if file.size > 0]
    if not files:
        names = ", ".join(sorted(relative)[:3]) or "nothing"
        raise UserError(
            f"{storage.redacted(root)}: no Parquet file (*.parquet, *.parq, *.pq that is not "
            f"empty) among {len(relative)} files (found {names}); check the path"
        )
    return root, fs, files


def _is_data(name: str) -> bool:
    """Leave out directory markers (`dt=1/`), `_SUCCESS`, `_temporary/`, `.part.crc` and such."""
    return not _is_hidden(name) and name.lower().endswith(_SUFFIXES)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(("_", ".")) for part in name.split("/"))


def _listed(fs: AbstractFileSystem, name: str, info: Mapping[str, Any]) -> LakeFile:
    return LakeFile(name, info["size"], storage.version(fs, info), (), _partition(name))


def _refuse_table_formats(root: str, names: Iterable[str]) -> None:
    # Such a folder still holds the files of deleted and replaced rows.
    for name in names:
        _, is_delta, _ = f"/{name}".partition("/_delta_log/")
        is_iceberg = re.search(r"(^|/)metadata/[^/]*\.metadata\.json$", name)
        _, is_hudi, _ = f"/{name}".partition("/.hoodie/")
        if is_delta or is_iceberg or is_hudi:
            kind = "a Delta" if is_delta else "an Iceberg" if is_iceberg else "a Hudi"
            raise UserError(
                f"{storage.redacted(root)}: {kind} table ({name}), whose folder also holds "
                "deleted rows; export its current rows to a folder of Parquet files and give that"
            )


def _refuse_linked_folders(root: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    # fsspec lists a link to a folder as if it were a file, and so its rows would be passed over.
    for name, info in found.items():
        if info.get("islink") and not _is_hidden(name) and Path(info["name"]).is_dir():
            raise UserError(
                f"{storage.join(root, name)}: a link to a folder, which is not followed; give the "
                "folder itself, or move it into the lake"
            )


def _partition(name: str) -> tuple[tuple[str, str | int | None], ...]:
    pairs = [part.partition("=") for part in name.split("/")[:-1] if "=" in part]
    values = {unquote(key): unquote(value) for key, _, value in pairs}
    null = "__HIVE_DEFAULT_PARTITION__"
    return tuple((key, None if value == null else value) for key, value in values.items())


def _partitioned(files: list[LakeFile]) -> tuple[list[LakeFile], pa.Schema]:
    """Type the hive keys: int64 when every value is an integer, else string."""
    values: dict[str, set[str]] = {}
    for file in files:
        for key, value in file.partition:
            values.setdefault(key, set()).update(() if value is None else (str(value),))
    integers = {k for k, vs in values.items() if vs and all(map(_is_int64, vs))}
    typed = [
        replace(
            file,
            partition=tuple(
                (key, int(value) if value is not None and key in integers else value)
                for key, value in file.partition
            ),
        )
        for file in files
    ]
    keys = [(key, pa.int64() if key in integers else pa.string()) for key in values]
    return typed, pa.schema(keys)


def _is_int64(text: str) -> bool:
    return bool(re.fullmatch(r"-?[0-9]{1,19}", text)) and -(2**63) <= int(text) < 2**63


def _others(condition: Where, keys: pa.Schema) -> set[str]:
    return set(condition.columns) - set(keys.names)


def _matching_files(
    files: list[LakeFile], keys: pa.Schema, condition: Where | None, root: str
) -> list[LakeFile]:
    by_key = condition.restricted(keys.names) if condition else None
    if condition is None or by_key is None:
        return files
    table = pa.Table.from_pylist([dict(file.partition) for file in files], schema=keys)
    matches = _mask(table, by_key)
    if not matches.any():
        raise _nothing_matches(root, condition, f"any of {len(files)} files' hive keys")
    return [file for file, match in zip(files, matches, strict=True) if match]


def _nothing_matches(root: str, condition: Where, what: str) -> UserError:
    return UserError(
        f"{storage.redacted(root)}: no rows match the filter {condition.text}, by {what}; "
        "widen the filter"
    )


def _mask(table: pa.Table, condition: Where) -> npt.NDArray[np.bool_]:
    expression = condition.expression(table.schema)
    matches = ds.InMemoryDataset(table).to_table(columns={"match": expression})["match"]
    mask: npt.NDArray[np.bool_] = matches.fill_null(False).to_numpy()
    return mask


# --- footers ---------------------------------------------------------------------------------


@contextmanager
def _opened(
    fs: AbstractFileSystem, root: str, url: str, file: LakeFile, *, footer: bool = False
) -> Iterator[Any]:
    """Open a planned file, if it still is the version that was planned, and explain errors."""
    whole = not footer and file.size <= _SMALL_BYTES
    path, name = storage.join(root, file.path), _name(url, file)
    changed = UserError(f"{name}: changed since the plan was made; run again")
    try:
        with storage.explained(name), _open(fs, path, whole) as source:
            # Opened first, then compared: s3fs reads on with If-Match of these very details.
            info = getattr(source, "details", None) or fs.info(path)
            if (info["size"], storage.version(fs, info)) != (file.size, file.version):
                raise changed
            yield source
    except UserError as error:
        raise (changed if isinstance(error.__cause__, FileNotFoundError) else error) from error
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        if type(error).__name__ == "FileExpired":  # s3fs: the store answered 412
            raise changed from error
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name}: cannot be read as Parquet ({reason}); write the file again or move it away"
        ) from error


def _open(fs: AbstractFileSystem, path: str, whole: bool) -> Any:
    if isinstance(fs, LocalFileSystem):
        return pa.OSFile(path)  # reads without Python in between
    # Arrow asks for the ranges it needs, and fsspec's readahead would fetch up to 50 MiB more;
    # of a small file one request for all is faster.
    return fs.open(path, "rb", cache_type="all" if whole else "none")


def _name(url: str, file: LakeFile) -> str:
    return storage.redacted(storage.join(url, file.path))


def _read_footers(
    fs: AbstractFileSystem, root: str, files: list[LakeFile], *, keep_fragments: bool
) -> list[_Footer]:
    _, path = storage.open_url(root)

    def footer(file: LakeFile) -> _Footer:
        with _opened(fs, path, root, file, footer=True) as source:
            fragment = ds.ParquetFileFormat().make_fragment(source)
            fragment.ensure_complete_metadata()
            rows = tuple(group.num_rows for group in fragment.row_groups)
            schema = fragment.physical_schema.remove_metadata()
        return _Footer(replace(file, rows=rows), schema, fragment if keep_fragments else None)

    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        try:
            return list(pool.map(footer, files))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# --- columns ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Columns:
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
    def unify(cls, root: str, footers: list[_Footer], keys: pa.Schema) -> _Columns:
        schemas: dict[pa.Schema, LakeFile] = {}
        for footer in footers:
            schemas.setdefault(footer.schema, footer.file)
        first: dict[str, LakeFile] = {}
        types: dict[str, pa.DataType] = {}
        problems: dict[str, str] = {}
        for schema, file in schemas.items():
            for name in schema.names:
                if len(schema.get_all_field_indices(name)) > 1:
                    problems[name] = f"{_name(root, file)}: column {name!r} occurs twice"
                    types.setdefault(name, pa.null())
                    continue
                found, known = schema.field(name).type, types.get(name)
                if known is None or (joined := _join(known, found)) is not None:
                    types[name] = found if known is None else joined
                    first.setdefault(name, file)
                    continue
                problems[name] = (
                    f"{_name(root, file)}: column {name!r} {_differs(found, known)} in "
                    f"{_name(root, first[name])}"
                )
        return cls(root, types, schemas, problems, keys)

    def features(self, columns: Sequence[str] | None, weight: str | None) -> tuple[str, ...]:
        """Return the feature columns, asked for or by default; each is fit for use."""
        names = tuple(columns) if columns is not None else self._default_features(weight)
        if not names:
            raise UserError("no feature columns were named; name at least one with --columns")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"feature column {twice!r} is named twice; name it once")
        for name in names:
            self._check_present(name, "name the feature columns with --columns")
        self._check_feature_types(names)
        return names

    def _default_features(self, weight: str | None) -> tuple[str, ...]:
        free = [name for name in self.types if name not in (*self.keys.names, weight)]
        floating = tuple(name for name in free if self._is_ever(name, pa.types.is_floating))
        lists = tuple(name for name in free if self._is_ever(name, _is_embedding))
        if floating or len(lists) == 1:
            return floating or lists
        raise UserError(
            f"{storage.redacted(self.root)}: no floating-point column and {len(lists)} "
            f"fixed-size-list columns among {_quoted(self.types)}; name the feature columns "
            "with --columns"
        )

    def _is_ever(self, name: str, test: Callable[[pa.DataType], bool]) -> bool:
        return any(test(field.type) for s in self.schemas for field in s if field.name == name)

    def _check_present(self, name: str, remedy: str) -> None:
        if name in self.problems:
            raise UserError(f"{self.problems[name]}; mend the files or leave the column out")
        if name not in self.types and name in self.keys.names:
            raise UserError(
                f"{storage.redacted(self.root)}: {name!r} is a hive key of the path, not a column "
                "of the files; use it in --where"
            )
        for schema, file in self.schemas.items():
            if name not in schema.names:
                raise UserError(
                    f"{_name(self.root, file)}: no column {name!r} among {_quoted(schema.names)}; "
                    f"{remedy}"
                )

    def _check_feature_types(self, names: Sequence[str]) -> None:
        for name in names:
            type_ = self.types[name]
            if _is_numeric(type_) or (_is_embedding(type_) and len(names) == 1):
                continue
            remedy = "name numeric columns, or one fixed-size-list column of numbers alone"
            if pa.types.is_list(type_) or pa.types.is_large_list(type_):
                remedy = "write it as a fixed-size list, such as pyarrow.list_(pa.float32(), 64)"
            fields = ((schema.field(name), file) for schema, file in self.schemas.items())
            file = next(file for field, file in fields if not _is_numeric(field.type))
            raise UserError(
                f"{_name(self.root, file)}: feature column {name!r} has type {type_}; {remedy}"
            )

    def check_weight(self, weight: str | None, features: Sequence[str]) -> None:
        """Raise unless the weight column, if any, is numeric and no feature."""
        if weight is None:
            return
        self._check_present(weight, "name another weight column")
        if weight in features:
            raise UserError(f"column {weight!r} is a feature and the weight; name it once")
        if not _is_numeric(self.types[weight]):
            raise UserError(
                f"{storage.redacted(self.root)}: weight column {weight!r} has type "
                f"{self.types[weight]}; name a numeric column"
            )

    def check_filter(self, condition: Where | None) -> None:
        """Raise unless every column of the filter is known and of one type."""
        for name in condition.columns if condition else ():
            if name in self.problems:
                raise UserError(f"{self.problems[name]}; take it out of the filter")
        if condition:
            condition.expression(pa.unify_schemas([self.schema(self.types), self._pure_keys()]))

    def _pure_keys(self) -> pa.Schema:
        return pa.schema([field for field in self.keys if field.name not in self.types])

    def schema(self, names: Iterable[str]) -> pa.Schema:
        return pa.schema([(name, self.types[name]) for name in dict.fromkeys(names)])

    def float64_source(self, features: Sequence[str]) -> bool:
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
    if not (_is_embedding(a) and _is_embedding(b) and a.list_size == b.list_size):
        return None
    return pa.list_(_join(a.value_type, b.value_type), a.list_size)


def _differs(found: pa.DataType, known: pa.DataType) -> str:
    if _is_embedding(found) and _is_embedding(known) and found.list_size != known.list_size:
        return f"has embedding width {found.list_size}, but {known.list_size}"
    return f"has type {found}, but {known}"


def _is_numeric(type_: pa.DataType) -> bool:
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    return any(test(type_) for test in tests)


def _is_embedding(type_: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(type_)) and _is_numeric(type_.value_type)


def _number_type(type_: pa.DataType) -> pa.DataType:
    return type_.value_type if pa.types.is_fixed_size_list(type_) else type_


def _feature_names(schema: pa.Schema, features: Sequence[str]) -> tuple[str, ...]:
    type_ = schema.field(features[0]).type
    if _is_embedding(type_):
        return tuple(f"{features[0]}[{i}]" for i in range(type_.list_size))
    return tuple(features)


def _quoted(names: Iterable[str]) -> str:
    listed = [repr(name) for name in names]
    more = f" and {len(listed) - 20} more" if len(listed) > 20 else ""
    return (", ".join(listed[:20]) or "none") + more


# --- dealing rows to shards ------------------------------------------------------------------


def _row_groups(
    root: str, footers: list[_Footer], condition: Where | None, schema: pa.Schema
) -> list[RowRange]:
    """Return the row groups that may hold a matching row, whole."""
    groups = []
    for index, footer in enumerate(footers):
        rows = footer.file.rows
        for group in range(len(rows)) if condition is None else _kept(footer, condition, schema):
            groups.append(RowRange(index, group, 0, rows[group]))
    groups = [group for group in groups if group.stop > 0]
    if not any(sum(footer.file.rows) for footer in footers):
        raise UserError(
            f"{storage.redacted(root)}: no rows in {len(footers)} Parquet files; check the path"
        )
    if condition is not None and not groups:
        raise _nothing_matches(root, condition, "the row groups' statistics")
    return groups


def _kept(footer: _Footer, condition: Where, schema: pa.Schema) -> list[int]:
    if set(condition.columns) - set(footer.schema.names):
        return []  # an added column: null in this file, and null never matches
    assert footer.fragment is not None
    tested = pa.schema([schema.field(name) for name in condition.columns])
    subset = footer.fragment.subset(filter=condition.expression(tested), schema=tested)
    return [group.id for group in subset.row_groups]


def _deal(groups: Sequence[RowRange], n_shards: int | None) -> tuple[tuple[RowRange, ...], ...]:
    """Cut the rows, in order, into shards of equal size, give or take a row."""
    total = sum(group.stop for group in groups)
    count = _default_shards(total) if n_shards is None else n_shards
    if count < 1:
        raise UserError(f"{count} shards; at least one is needed")
    edges = [i * total // count for i in range(count + 1)]
    shards: list[list[RowRange]] = [[] for _ in range(count)]
    offset = shard = 0
    for group in groups:
        start = 0
        while start < group.stop:
            while edges[shard + 1] <= offset + start:
                shard += 1
            stop = min(group.stop, edges[shard + 1] - offset)
            shards[shard].append(replace(group, start=start, stop=stop))
            start = stop
        offset += group.stop
    return tuple(map(tuple, shards))


def _default_shards(n_rows: int) -> int:
    """Return a power of two: up to 64 with enough rows each, up to 1024 to keep shards small."""
    count = 1
    while count < 64 and n_rows >= 2 * count * _MIN_ROWS_PER_SHARD:
        count *= 2
    while count < 1024 and n_rows > count * _MAX_ROWS_PER_SHARD:
        count *= 2
    return count


def _hash(plan: Plan) -> str:
    content = {
        "format": 1,
        "files": [(file.path, file.size, file.version, file.rows) for file in plan.files],
        "row_groups": sorted({(p.file, p.row_group) for shard in plan.shards for p in shard}),
        "columns": plan.columns,
        "feature_names": plan.feature_names,
        "weight_column": plan.weight_column,
        "where": plan.where.text if plan.where else None,
        "missing": plan.missing,
        "n_shards": plan.n_shards,
    }
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


# --- reading rows ----------------------------------------------------------------------------


class _LastDecoded:
    """Keep the row group that was decoded last, for the shards that share it.

    A writer such as pandas puts everything into one row group, which Parquet can only decode
    from its start; a worker reads its shards in order, so that one entry saves all repetition.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entry: tuple[tuple[object, ...], pa.Table] | None = None

    def get(self, key: tuple[object, ...]) -> pa.Table | None:
        with self._lock:
            return self._entry[1] if self._entry is not None and self._entry[0] == key else None

    def put(self, key: tuple[object, ...], table: pa.Table) -> None:
        with self._lock:
            self._entry = (key, table) if table.nbytes <= _CACHED_BYTES else None

    def forget(self) -> None:
        with self._lock:
            self._entry = None


_last_decoded = _LastDecoded()


def _decoded(plan: Plan, source: Any, part: RowRange) -> pa.Table:
    """Return the rows of `part`, the plan's read columns."""
    file, columns = plan.files[part.file], plan.read_columns
    key = (plan.url, file.path, file.version, part.row_group, columns)
    table = _last_decoded.get(key)
    if table is None:
        _last_decoded.forget()  # before the next is decoded, not after
        parquet = pq.ParquetFile(source, pre_buffer=True)
        table = parquet.read_row_group(part.row_group, columns=list(columns))
    if part.stop < file.rows[part.row_group]:
        _last_decoded.put(key, table)
    else:
        _last_decoded.forget()
    return table.slice(part.start, part.stop - part.start)


def _first_rows(plan: Plan, source: Any, row_group: int, n: int) -> npt.NDArray[np.float64]:
    """Return the first n complete, finite rows of a row group that pass the filter."""
    found: list[npt.NDArray[np.float64]] = []
    batches = pq.ParquetFile(source, pre_buffer=True).iter_batches(
        batch_size=n, row_groups=[row_group], columns=list(plan.read_columns)
    )
    for batch in batches:
        table, _ = _filtered(plan, pa.Table.from_batches([batch]))
        X = _columns(plan, table).T
        found.append(X[np.isfinite(X).all(axis=1)].astype(np.float64))
        if sum(map(len, found)) >= n:
            break
    return np.concatenate([np.empty((0, plan.n_features)), *found])[:n]


def _filtered(plan: Plan, table: pa.Table) -> tuple[pa.Table, npt.NDArray[np.intp] | None]:
    """Return the rows that pass the filter and, under a filter, their positions."""
    condition = plan.row_filter
    if condition is None:
        return table, None
    tested = pa.schema([plan.schema.field(name) for name in condition.columns])
    mask = _mask(table.select(condition.columns).cast(tested), condition)
    return table.filter(pa.array(mask)), np.flatnonzero(mask)


def _columns(plan: Plan, table: pa.Table) -> npt.NDArray[Float]:
    """Return the features (d, n), C-contiguous, null as NaN."""
    dtype = np.float64 if plan.float64_source else np.float32
    columns = np.empty((plan.n_features, table.num_rows), dtype)
    first = plan.schema.field(plan.columns[0]).type
    if _is_embedding(first):
        _fill_embedding(columns, table.column(plan.columns[0]).cast(first))
    else:
        for j, name in enumerate(plan.columns):
            columns[j] = _to_numpy(table.column(name), dtype)
    return columns


def _fill_embedding(columns: npt.NDArray[Float], lists: pa.ChunkedArray) -> None:
    start = 0
    for chunk in lists.chunks:
        stop, width = start + len(chunk), len(columns)
        # `.values` ignores the slice and `.flatten()` drops null rows: cut the values ourselves.
        values = chunk.values.slice(chunk.offset * width, len(chunk) * width)
        columns[:, start:stop] = _to_numpy(values, columns.dtype).reshape(-1, width).T
        columns[:, start:stop][:, chunk.is_null().to_numpy(zero_copy_only=False)] = np.nan
        start = stop


def _to_numpy(array: pa.Array | pa.ChunkedArray, dtype: npt.DTypeLike) -> npt.NDArray[Float]:
    floats = array.cast(pa.from_numpy_dtype(dtype), safe=False)
    if isinstance(floats, pa.ChunkedArray):
        floats = floats.combine_chunks()
    numbers: npt.NDArray[Float] = floats.to_numpy(zero_copy_only=False)
    return numbers


@dataclass(frozen=True, slots=True)
class _Extract:
    """Turn decoded rows of one row range into `Rows`, or say which value is wrong."""

    plan: Plan
    file: LakeFile
    part: RowRange

    def rows(self, decoded: pa.Table, fill: npt.NDArray[np.float64] | None) -> Rows:
        table, positions = _filtered(self.plan, decoded)
        weight = self._weight(table, positions)
        columns = _columns(self.plan, table)
        dropped = imputed = 0
        if not np.isfinite(columns).all():
            self._check(columns, positions)
            missing = np.isnan(columns)
            if self.plan.missing == "drop":
                complete = ~missing.any(axis=0)
                columns = np.ascontiguousarray(columns[:, complete])
                weight = None if weight is None else weight[complete]
                dropped = table.num_rows - columns.shape[1]
            else:
                imputed = int(np.count_nonzero(missing))
                if fill is not None:
                    columns[missing] = np.broadcast_to(fill[:, None], columns.shape)[missing]
        filtered = decoded.num_rows - table.num_rows
        return Rows(columns.T, weight, RowCounts(decoded.num_rows, filtered, dropped, imputed))

    def _weight(
        self, table: pa.Table, positions: npt.NDArray[np.intp] | None
    ) -> npt.NDArray[np.float64] | None:
        name = self.plan.weight_column
        if name is None:
            return None
        weight = _to_numpy(table.column(name), np.float64).astype(np.float64)
        bad = ~(np.isfinite(weight) & (weight >= 0))
        if bad.any():
            row = int(bad.argmax())
            raise UserError(
                f"{self._row(row, positions)}: weight {name!r} is {_spell(weight[row])}; weights "
                "are finite and not negative: mend it or filter such rows with --where"
            )
        return weight

    def _check(self, columns: npt.NDArray[Float], positions: npt.NDArray[np.intp] | None) -> None:
        """Raise for the first row with an infinite or, if that is an error, missing value."""
        allowed = np.isnan if self.plan.missing != "error" else np.zeros_like
        bad = ~(np.isfinite(columns) | allowed(columns).astype(bool))
        if not bad.any():
            return
        row = int(bad.any(axis=0).argmax())
        feature = int(bad[:, row].argmax())
        value = columns[feature, row]
        remedy = "impute such rows first, or filter them with --where"
        if np.isnan(value):
            remedy = "pass --missing drop or impute such rows first"
        raise UserError(
            f"{self._row(row, positions)}: column {self.plan.feature_names[feature]!r} is "
            f"{_spell(value)}; {remedy}"
        )

    def _row(self, row: int, positions: npt.NDArray[np.intp] | None) -> str:
        at = self.part.start + (row if positions is None else int(positions[row]))
        return f"{_name(self.plan.url, self.file)}, row group {self.part.row_group}, row {at}"


def _spell(value: Float) -> str:
    return "NaN" if np.isnan(value) else f"{value:g}"

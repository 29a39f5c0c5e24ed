"""The data files of a lake: found by listing, opened only as they were listed."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from gmm_dist import storage
from gmm_dist.errors import UserError
from gmm_dist.urls import Url

_SMALL_BYTES = 2**21
_SUFFIXES = (".parquet", ".parq", ".pq")


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
class Listing:
    """Hold the data files under `root`, an absolute URL, by name; `keys` types their hive keys."""

    root: Url
    files: tuple[LakeFile, ...]
    keys: pa.Schema


def find(url: str) -> Listing:
    """List the data files at `url`: one file whatever its name, or those of a folder.

    In a folder every `*.parquet`, `*.parq` and `*.pq` counts, at any depth, but for empty files
    and path parts that begin with `_` or `.`. A hive key is int64 when each of its values is an
    integer, null when it has none, else string.

    Raises:
        UserError: the path, bucket or credentials are wrong; there is no Parquet file; the folder
            is or holds a Delta, Iceberg or Hudi table, or a link to a folder.
    """
    root = storage.absolute(url)
    fs, path = storage.open_url(root)
    found = _found(fs, path, root)
    if path in found:
        parent, name = storage.parent_and_name(root)
        return _partitioned(parent, [_listed(fs, name, found[path])])
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
    return _partitioned(root, files)


def _found(fs: AbstractFileSystem, path: str, root: str) -> Mapping[str, Mapping[str, Any]]:
    """Return all files under `path`, or `path` itself when it is a file, with their details."""
    # fsspec would pass over a local folder that it may not read.
    options = {"on_error": "raise"} if isinstance(fs, LocalFileSystem) else {}

    def find() -> Mapping[str, Mapping[str, Any]]:
        found: Mapping[str, Mapping[str, Any]] = fs.find(path, detail=True, **options)
        if not found or not found.get(path, True):
            info = fs.info(path)  # raises when there is nothing
            found = {path: info} if info["type"] == "file" else {}
        return found

    with storage.explained(root):
        return storage.patiently(find, root)


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


def _partitioned(root: Url, files: list[LakeFile]) -> Listing:
    """Type the hive keys over all files."""
    values: dict[str, set[str]] = {}
    for file in files:
        for key, value in file.partition:
            values.setdefault(key, set()).update(() if value is None else (str(value),))
    types = {key: _key_type(found) for key, found in values.items()}
    typed = [
        replace(file, partition=tuple((k, _typed(v, types[k])) for k, v in file.partition))
        for file in files
    ]
    return Listing(root, tuple(typed), pa.schema(types.items()))


def _key_type(values: set[str]) -> pa.DataType:
    if not values:
        return pa.null()
    return pa.int64() if all(map(_is_int64, values)) else pa.string()


def _typed(value: str | int | None, type_: pa.DataType) -> str | int | None:
    return int(value) if value is not None and pa.types.is_int64(type_) else value


def _is_int64(text: str) -> bool:
    return bool(re.fullmatch(r"-?[0-9]{1,19}", text)) and -(2**63) <= int(text) < 2**63


@contextmanager
def opened(
    fs: AbstractFileSystem, root: str, url: str, file: LakeFile, *, footer: bool = False
) -> Iterator[Any]:
    """Open a planned file, if it still is the version that was planned, and explain errors.

    `fs` and `root` are what `storage.open_url(url)` returns; `footer` says that only the footer
    will be read.

    Fit for `storage.patiently`, around the whole block.

    Raises:
        UserError: it changed, is corrupt or cannot be reached, from here to the block's end.
    """
    whole = not footer and file.size <= _SMALL_BYTES
    path, name = storage.join(root, file.path), name_of(url, file)
    changed = UserError(f"{name}: changed since the plan was made; run again")
    try:
        with storage.explained(name), _open(fs, path, whole) as source:
            # Opened first, then compared: s3fs reads on with If-Match of these very details.
            info = getattr(source, "details", None) or fs.info(path)
            if (info["size"], storage.version(fs, info)) != (file.size, file.version):
                raise changed
            yield source if isinstance(source, pa.NativeFile) else _Exact(source, file.size)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise changed from error
        raise
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        if type(error).__name__ == "FileExpired":  # s3fs: the store answered 412
            raise changed from error
        if isinstance(error, OSError) and (error.errno is not None or storage.is_transient(error)):
            raise
        reason = storage.line_of(error)
        # What the disk holds does not change on the way here.
        kind = UserError if isinstance(fs, LocalFileSystem) else storage.DamagedError
        raise kind(
            f"{name}: cannot be read as Parquet ({reason}); write the file again or move it away"
        ) from error


def _open(fs: AbstractFileSystem, path: str, whole: bool) -> Any:
    if isinstance(fs, LocalFileSystem):
        return pa.OSFile(path)  # reads without Python in between
    # Arrow asks for the ranges it needs, and fsspec's readahead would fetch up to 50 MiB more;
    # of a small file one request for all is faster.
    return fs.open(path, "rb", cache_type="all" if whole else "none")


class _Exact(io.RawIOBase):
    """A file that reads as many bytes as are asked for and there, or raises TornReadError.

    Arrow would take what it gets, and blame the file.
    """

    def __init__(self, source: Any, size: int) -> None:
        self._source, self._size = source, size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._source.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._source.seek(offset, whence))

    def read(self, size: int = -1) -> bytes:
        start = self.tell()
        there = max(self._size - start, 0)
        wanted = there if size is None or size < 0 else min(size, there)
        data: bytes = self._source.read(wanted)
        if len(data) != wanted:
            raise storage.TornReadError(f"{len(data)} of {wanted} bytes came from {start} on")
        return data


def name_of(url: str, file: LakeFile) -> str:
    """Return the file's whole name, fit for messages."""
    return storage.redacted(storage.join(url, file.path))

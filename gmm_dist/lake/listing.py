"""The data files of a lake: found by listing, opened only as they were listed."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from gmm_dist import storage
from gmm_dist.errors import UserError
from gmm_dist.lake import data_files, table_formats
from gmm_dist.urls import Url

logger = logging.getLogger(__name__)

_SMALL_BYTES = 2**21
_INFOS_AT_ONCE = 32
_SHOWN = 3  # names in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class LakeFile:
    """Name one Parquet file and the version that was planned.

    `path` is relative to the plan's url, `version` the ETag or mtime, `rows` the rows of each
    row group, `partition` the hive keys and values of the path (None: null). `identity` is what
    else tells a local file from one that replaces it, within a run (see `storage.identity`): a
    copy of the lake is the same lake.
    """

    path: str
    size: int
    version: str
    rows: tuple[int, ...]
    partition: tuple[tuple[str, str | int | None], ...]
    identity: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Listing:
    """Hold the data files under `root`, an absolute URL, by name; `keys` types their hive keys."""

    root: Url
    files: tuple[LakeFile, ...]
    keys: pa.Schema


def key_table(files: Sequence[LakeFile], keys: pa.Schema) -> pa.Table:
    """Return the files' hive keys, a row for each file."""
    return pa.Table.from_pylist([dict(file.partition) for file in files], schema=keys)


def find(url: str) -> Listing:
    """List the data files at `url`: one file whatever its name, or those of a folder.

    In a folder every `*.parquet`, `*.parq` and `*.pq` counts, at any depth, and every other file
    whose first or last bytes are Parquet's, but for empty files, path parts that begin with `_`
    or `.`, and names of other things (`*.csv`, `*.bak`). Files that are passed over are logged.
    A hive key is int64 when each of its values is an integer, null when it has none, else string.

    Raises:
        UserError: the path, bucket or credentials are wrong; there is no Parquet file; the folder
            holds, is or lies in a Delta, Iceberg, Hudi or such table; it has a link to a folder
            or to nothing, or a data file whose name is not UTF-8.
    """
    _check_name(url, url)
    root = storage.absolute(url)
    fs, path = storage.open_url(root)
    infos = _infos_by_path(fs, path, root)
    if path in infos:
        if isinstance(fs, LocalFileSystem) and not Path(path).is_file():
            raise UserError(
                f"{root}: neither a file nor a folder (a pipe or a device); check the path"
            )
        parent, name = storage.parent_and_name(root)
        table_formats.refuse_within(root, [name])
        table_formats.refuse_around(fs, path.rpartition("/")[0], root)
        _refuse_links_into_tables(fs, root, {path: infos[path]})
        return _partitioned(parent, [_listed(fs, parent, name, infos[path])])
    relative = {name.removeprefix(path).lstrip("/"): info for name, info in infos.items()}
    table_formats.refuse_within(root, relative)
    with storage.explained(root):
        table_formats.refuse_uncommitted(fs, root, relative)
    table_formats.refuse_around(fs, path, root)
    with storage.explained(root):
        files = [_listed(fs, root, *item) for item in _data_files(fs, root, relative)]
    return _partitioned(root, files)


def _infos_by_path(fs: AbstractFileSystem, path: str, root: str) -> Mapping[str, Mapping[str, Any]]:
    """Return all files under `path`, or `path` itself when it is a file, with their details."""
    # fsspec would pass over a local folder that it may not read.
    options = {"on_error": "raise"} if isinstance(fs, LocalFileSystem) else {}

    def find() -> Mapping[str, Mapping[str, Any]]:
        infos: Mapping[str, Mapping[str, Any]] = fs.find(path, detail=True, **options)
        if not infos or not infos.get(path, True):
            info = fs.info(path)  # raises when there is nothing
            infos = {path: info} if info["type"] == "file" else {}
        return infos

    with storage.explained(root):
        return storage.patiently(find, root)


def _data_files(
    fs: AbstractFileSystem, root: str, infos: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the Parquet files among all files of a folder, by name; log what is left out."""
    visible = {name: info for name, info in infos.items() if not data_files.is_hidden(name)}
    if storage.is_http(fs):
        visible = _with_details(
            fs, {name: info for name, info in visible.items() if "?" not in name}
        )
    if isinstance(fs, LocalFileSystem):
        _refuse_links(root, visible)
        visible = {name: info for name, info in visible.items() if Path(info["name"]).is_file()}
        _refuse_links_into_tables(fs, root, visible)
    empty = sorted(name for name, info in visible.items() if not info["size"])
    full = {name: visible[name] for name in sorted(visible.keys() - set(empty))}
    data, foreign = data_files.of(fs, root, full)
    empty = [name for name in empty if data_files.is_named_parquet(name)]
    if not data:
        some = _some([*foreign, *empty] or sorted(infos)) or "nothing"
        raise UserError(
            f"{storage.redacted(root)}: no Parquet file that is not empty among {len(infos)} files "
            f"(found {some}); check the path"
        )
    hidden = sorted(name for name in infos.keys() - visible.keys() if _looks_like_rows(name))
    kinds = (
        *((foreign, "that are not Parquet"), (empty, "that are empty")),
        (hidden, "that a name with _ or . in front hides"),
    )
    for names, kind in ((names, kind) for names, kind in kinds if names):
        logger.warning(
            "%s: passed over %d of %d files, %s: %s",
            *(storage.redacted(root), len(names), len(visible) + len(hidden), kind, _some(names)),
        )
    for name in data:
        _check_name(name, storage.join(root, name))
    return [(name, full[name]) for name in data]


def _looks_like_rows(name: str) -> bool:
    """Say whether a hidden file may have been meant as data, as `_metadata` never is."""
    is_hidden = data_files.is_named_parquet(name) and data_files.is_hidden(name)
    return is_hidden and not name.rpartition("/")[2].startswith("._")  # macOS's beside each file


def _with_details(
    fs: AbstractFileSystem, index_infos: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """Return the details of files of an index page, which has neither sizes nor versions."""

    def details(info: Mapping[str, Any]) -> Mapping[str, Any]:
        name = info["name"]
        with storage.explained(name):
            answer: Mapping[str, Any] = storage.patiently(lambda: fs.info(name), name)
        return _sized(name, answer)

    wanted = {name: info for name, info in index_infos.items() if not data_files.is_foreign(name)}
    with ThreadPoolExecutor(_INFOS_AT_ONCE) as pool:
        infos = dict(zip(wanted, pool.map(details, wanted.values()), strict=True))
    return {name: infos.get(name, {**info, "size": 1}) for name, info in index_infos.items()}


def _sized(url: str, info: Mapping[str, Any]) -> Mapping[str, Any]:
    if info["size"] is None:
        raise UserError(
            f"{storage.redacted(url)}: the server does not tell the size of the file; copy it to a "
            "disk or an object store"
        )
    return info


def _some(names: Sequence[str]) -> str:
    """Return the first few names, in characters that any terminal can show."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(_shown, names[:_SHOWN])) + more


def _shown(name: str) -> str:
    spelt = name.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in spelt)


def _check_name(name: str, where: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{_shown(storage.redacted(where))}: its name is not UTF-8; rename it"
        ) from None


def _listed(fs: AbstractFileSystem, root: Url, name: str, info: Mapping[str, Any]) -> LakeFile:
    size = _sized(storage.join(root, name), info)["size"]
    # A web server's index spells names as URLs do.
    partition = _partition(unquote(name) if storage.is_http(fs) else name)
    version, identity = storage.version(fs, info), storage.identity(fs, info)
    return LakeFile(
        path=name, size=size, version=version, rows=(), partition=partition, identity=identity
    )


def _refuse_links(root: str, infos: Mapping[str, Mapping[str, Any]]) -> None:
    # fsspec lists a link to a folder as if it were a file, and so its rows would be passed over.
    for name, info in infos.items():
        path = Path(info["name"])
        if not info.get("islink") or path.is_file():
            continue
        if path.is_dir():
            raise UserError(
                f"{storage.join(root, name)}: a link to a folder, which is not followed; give the "
                "folder itself, or move it into the lake"
            )
        if not path.exists() and not data_files.is_foreign(name):
            raise UserError(
                f"{_shown(storage.join(root, name))}: a link to {_shown(str(path.readlink()))}, "
                "which is not there; mend the link or remove it"
            )


def _refuse_links_into_tables(
    fs: AbstractFileSystem, root: str, infos: Mapping[str, Mapping[str, Any]]
) -> None:
    linked = (info["name"] for info in infos.values() if info.get("islink"))
    for folder in sorted({Path(name).resolve().parent for name in linked}):
        table_formats.refuse_around(fs, folder.as_posix(), root)


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
    types = {key: _key_type(texts) for key, texts in values.items()}
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

    Fit for `storage.patiently`, around the whole block.

    Args:
        fs: The file system that `storage.open_url(url)` returns.
        root: The path that it returns.
        url: The lake's URL, for messages.
        file: The planned file.
        footer: Whether only the footer will be read.

    Raises:
        UserError: it changed, is corrupt or cannot be reached, from here to the block's end.
    """
    path, name = storage.join(root, file.path), name_of(url, file)
    changed = UserError(f"{name}: changed since the plan was made; run again")
    try:
        with storage.explained(name), _open(fs, path, file, footer=footer) as source:
            # Opened first, then compared: s3fs reads on with If-Match of these very details.
            info = getattr(source, "details", None) or fs.info(path)
            if _is_other(fs, info, file):
                raise changed
            is_native = isinstance(source, pa.NativeFile)
            yield source if is_native else _Exact(source, file.size, is_http=storage.is_http(fs))
    except UserError as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            raise UserError(
                f"{name}: the name of a column is not UTF-8; write the file again under other names"
            ) from error
        is_gone = isinstance(error.__cause__, FileNotFoundError)
        if (is_gone and not storage.is_transient(error)) or _is_refused_as_other(error):
            raise changed from error
        raise
    except Exception as error:
        if type(error).__name__ == "FileExpired":  # s3fs: the store answered 412
            raise changed from error
        if isinstance(error, _NoParts) or _is_about_parts(fs, error):
            raise UserError(
                f"{name}: the server sends no parts of the file; copy it to a disk or an object "
                "store"
            ) from error
        if storage.is_transient(error) or not _is_about_the_file(error):
            raise
        reason = storage.line_of(error)
        # What the disk holds does not change on the way here.
        kind = UserError if isinstance(fs, LocalFileSystem) else storage.DamagedError
        raise kind(
            f"{name}: cannot be read as Parquet ({reason}); write the file again or move it away"
        ) from error


def _is_other(fs: AbstractFileSystem, info: Mapping[str, Any], file: LakeFile) -> bool:
    """Say whether `info` describes another version of the file than was planned."""
    if (info["size"], storage.version(fs, info)) != (file.size, file.version):
        return True
    return storage.is_replaced(file.identity, storage.identity(fs, info))


def _is_refused_as_other(error: Exception) -> bool:
    """Say whether a web server responds that the file is gone, or another version."""
    return storage.http_status(error) in (404, 410, 412)


def _is_about_parts(fs: AbstractFileSystem, error: Exception) -> bool:
    # fsspec's error for a web server that sends only whole files.
    is_arrows = isinstance(error, pa.ArrowInvalid)
    return storage.is_http(fs) and isinstance(error, ValueError) and not is_arrows


def _is_about_the_file(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno is None
    return isinstance(error, pa.ArrowInvalid | pa.ArrowNotImplementedError)


def _open(fs: AbstractFileSystem, path: str, file: LakeFile, *, footer: bool) -> Any:
    if isinstance(fs, LocalFileSystem):
        return pa.OSFile(path)  # reads without Python in between
    # Arrow asks for the ranges it needs, and fsspec's readahead would fetch up to 50 MiB more;
    # of a small file one request for all is faster.
    small = file.size <= _SMALL_BYTES
    if storage.is_http(fs):
        return _open_http(fs, path, "all" if small else "none")
    return fs.open(path, "rb", cache_type="all" if small and not footer else "none")


def _open_http(fs: AbstractFileSystem, path: str, cache_type: str) -> Any:
    """Open a file of a web server, such that it answers 412 once the file has changed.

    fsspec asks a server for details when it opens a file, but keeps its size alone.
    """
    info = fs.info(path)
    headers = dict(storage.UNCOMPRESSED)
    tag, date = info.get("ETag", ""), info.get("Last-Modified")
    if tag and not tag.startswith("W/"):  # a weak one never matches
        headers["If-Match"] = tag
    elif date:
        headers["If-Unmodified-Since"] = date
    size = _sized(path, info)["size"]
    source = fs.open(path, "rb", cache_type=cache_type, size=size, headers=headers)
    source.details = info
    return source


class _NoParts(Exception):  # noqa: N818 - it says what is wrong
    """Report that a web server refuses to send a part of a file: fsspec returns no bytes."""


class _Exact(io.RawIOBase):
    """A file that reads all bytes requested, up to its end, or raises TornReadError.

    Arrow would accept a short read, and call the file corrupt.
    """

    def __init__(self, source: Any, size: int, *, is_http: bool = False) -> None:
        self._source, self._size, self._is_http = source, size, is_http

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
        if self._is_http and wanted and not data:
            raise _NoParts(f"{wanted} bytes from {start} on")
        if len(data) != wanted:
            raise storage.TornReadError(f"{len(data)} of {wanted} bytes came from {start} on")
        return data


def name_of(url: str, file: LakeFile) -> str:
    """Return the file's whole name, fit for messages."""
    return storage.redacted(storage.join(url, file.path))

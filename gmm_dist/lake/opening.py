"""Open a planned file, only as it was planned, and say in one line what is wrong with it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from gmm_dist import storage
from gmm_dist.errors import Option, UserError
from gmm_dist.lake.listing import LakeFile, name_of, sized

_SMALL_BYTES = 2**21


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
    with opened_first(fs, root, url, file, footer=footer) as (source, _):
        yield source


@contextmanager
def opened_first(
    fs: AbstractFileSystem, root: str, url: str, file: LakeFile, *, footer: bool = False
) -> Iterator[tuple[Any, LakeFile]]:
    """Open a file as `opened` does, and yield it with its version, if that was not known yet."""
    path, name = storage.join(root, file.path), name_of(url, file)
    if file.entry is not None and file.entry.is_outside:
        fs, path = storage.open_url(file.path)
    changed = UserError(f"{name}: changed since the plan was made; run again")
    gone = changed if file.entry is None else _vacuumed(name)
    try:
        with storage.explained(name), _open(fs, path, file, footer=footer) as source:
            # Opened first, then compared: s3fs reads on with If-Match of these very details.
            info = getattr(source, "details", None) or fs.info(path)
            if not file.version:
                file = _as_it_is(fs, info, file, name)
            elif _is_other(fs, info, file):
                raise changed
            is_native = isinstance(source, pa.NativeFile)
            is_http = storage.is_http(fs)
            yield source if is_native else _Exact(source, file.size, is_http=is_http), file
    except UserError as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            raise UserError(
                f"{name}: the name of a column is not UTF-8; write the file again under other names"
            ) from error
        is_gone = isinstance(error.__cause__, FileNotFoundError)
        if is_gone and not storage.is_transient(error):
            raise gone from error
        if _is_refused_as_other(error):
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


def _vacuumed(name: str) -> UserError:
    return UserError(
        "the table's log names this file, but it is gone, as VACUUM or expiring snapshots leave "
        "the files of older versions",
        where=name,
        remedy="read a newer version (" + Option("at") + "); a run that was to go on with this one "
        "starts afresh in another " + Option("output"),
    )


def _as_it_is(
    fs: AbstractFileSystem, info: Mapping[str, Any], file: LakeFile, name: str
) -> LakeFile:
    """Return a file that only a log has told of, with its version."""
    if info["size"] != file.size:
        raise UserError(
            f"{name}: {info['size']:,} bytes where the table's log has {file.size:,}; restore the "
            "file, or read a version without it"
        )
    version, identity = storage.version(fs, info), storage.identity(fs, info)
    return replace(file, version=version, identity=identity)


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
    size = sized(path, info)["size"]
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

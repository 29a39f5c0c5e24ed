"""Open any fsspec URL, outlast its outages, and say in one line what is wrong with it."""

from __future__ import annotations

import errno
import logging
import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from gmm_dist.errors import RunFailed, UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LOG_SECONDS = 10.0  # between two lines that say what is being tried again
_REREADS = 2  # of a file that seems damaged
_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or an instance role"


def open_url(url: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of `url` and the path within it.

    Credentials, region and endpoint are those of this process (AWS_* variables, AWS_ENDPOINT_URL,
    FSSPEC_S3_ENDPOINT_URL, profile, instance role), so that a URL may travel to other machines
    and carry no secret. Opens no connection.

    Raises:
        UserError: the protocol is unknown or its package is not installed.
    """
    options = _s3_options() if url.startswith(("s3://", "s3a://")) else {}
    with explained(url):
        fs, path = fsspec.core.url_to_fs(url, **options)
    # Instances are shared within a process, and others write to the lake while we run.
    fs.invalidate_cache()
    return fs, path


def _s3_options() -> dict[str, Any]:
    # Three attempts for hiccups. Outages are `patiently`'s: botocore stops retrying after some
    # hundred retries of all requests together, which 32 readers use up within seconds. Timeouts
    # are for a silence, so that a hung connection cannot hang a job and slow reads may go on.
    config: dict[str, Any] = {"connect_timeout": 10, "read_timeout": 60}
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        config["retries"] = {"max_attempts": 3, "mode": "standard"}
    return {"config_kwargs": config, "use_listings_cache": False}


@dataclass(frozen=True, slots=True)
class Patience:
    """Say for how long a failing storage is asked again, with growing pauses (seconds)."""

    seconds: float = 180.0
    first_pause: float = 0.25
    longest_pause: float = 10.0


class StorageFailed(RunFailed):
    """Report in one line that a storage has failed for longer than we wait: run again later."""


class TornReadError(OSError):
    """Report that fewer bytes came than were asked for and are there."""


class DamagedError(UserError):
    """Report a file whose bytes make no sense, if they came as they are stored."""


PATIENCE = Patience()


def patiently(call: Callable[[], T], url: str, *, patience: Patience | None = None) -> T:
    """Return what `call` returns, calling it again while the storage at `url` is out of order.

    That is: no connection, a connection cut or timed out, a torn read, 408, 429 or 5xx; anything
    else is raised at once. After a `DamagedError` it is called up to twice again, lest the way
    here did the damage. `call` must mean the same when it is repeated, even when only the answer
    was lost; so it opens what it reads. It may run within `explained`, or contain it.

    Raises:
        StorageFailed: it has failed for longer than `patience.seconds`.
    """
    trouble = _Trouble(redacted(url), patience or PATIENCE)
    while True:
        try:
            return call()
        except Exception as error:
            if not trouble.may_pass(error):
                raise
            trouble.wait(error)


class _Trouble:
    """One call's trouble with a storage: what may pass, how long it lasts, when to ask again."""

    def __init__(self, url: str, patience: Patience) -> None:
        self._url, self._patience = url, patience
        self._began: float | None = None
        self._last_line = -math.inf
        self._pause = patience.first_pause
        self._rereads = 0

    def may_pass(self, error: Exception) -> bool:
        if isinstance(error, DamagedError):
            self._rereads += 1
            return self._rereads <= _REREADS
        return is_transient(error)

    def wait(self, error: Exception) -> None:
        """Say what is wrong, and pause; raise StorageFailed when it is too much."""
        now = time.monotonic()
        self._began = now if self._began is None else self._began
        lasted, budget = now - self._began, self._patience.seconds
        root = _root(error)
        reason = " ".join(str(root).split()) or type(root).__name__
        if lasted + self._pause > budget:
            raise StorageFailed(
                f"{self._url}: the storage failed for {lasted:.0f} s ({reason}); check the network "
                "and the endpoint, and run again when it works"
            ) from error
        if now - self._last_line >= _LOG_SECONDS:
            self._last_line = now
            logger.warning(
                "%s: the storage fails for %.0f s now, trying for up to %.0f s (%s)",
                *(self._url, lasted, budget, reason),
            )
        # Of many workers that wait for one storage, not all should come back at once.
        time.sleep(self._pause * random.uniform(0.5, 1))
        self._pause = min(2 * self._pause, self._patience.longest_pause)


def absolute(url: str) -> str:
    """Return `url` such that it means the same in another working directory.

    A local path or file:// URL becomes an absolute path; any other URL stays as it is, less
    trailing slashes.
    """
    fs, path = open_url(url)
    return path if isinstance(fs, LocalFileSystem) else url.rstrip("/")


def join(url: str, *parts: str) -> str:
    """Append path parts to `url`, with one slash between any two."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def redacted(url: str) -> str:
    """Return `url` without user, password and query, fit for messages and reports."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    # Object keys may hold `?` and `#`; only http's query is one, and may hold a signature.
    if parts.scheme not in ("http", "https"):
        head, _, tail = url.partition("://")
        host, slash, path = tail.partition("/")
        return f"{head}://{host.rpartition('@')[2]}{slash}{path}"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


# For a web server: a range of a compressed answer has other bytes than the file.
UNCOMPRESSED = {"Accept-Encoding": "identity"}


def is_http(fs: AbstractFileSystem) -> bool:
    """Say whether files lie behind a plain web server."""
    return bool({"http", "https"} & {fs.protocol, *fs.protocol})


_VERSIONS = (
    *("ETag", "etag", "mtime", "LastModified", "last_modified", "Last-Modified", "created"),
    *("Content-MD5", "Digest", "modified", "modify", "modificationTime", "last_write_time"),
)


def version(fs: AbstractFileSystem, info: Mapping[str, Any]) -> str:
    """Return what changes when the file that `info` describes changes: its ETag, else its mtime.

    "" where the store tells neither.
    """
    if isinstance(fs, LocalFileSystem):
        return str(os.stat(info["name"]).st_mtime_ns)  # noqa: PTH116 - of a link's target
    for key in _VERSIONS:
        if info.get(key):
            # Of a weak ETag (W/"...") too the opaque part alone is to be compared.
            return str(info[key]).removeprefix("W/").strip('"')
    return ""


def identity(fs: AbstractFileSystem, info: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what else changes when a local file is replaced, though its mtime is set back.

    To be compared within a run alone: a copy of the lake differs, and so may another host's view
    of it. Hence the first part says where it was seen (this boot of a kernel, the device), and
    only what was seen at the same place compares: see `is_replaced`. Empty for other stores.
    """
    if not isinstance(fs, LocalFileSystem):
        return ()
    found = os.stat(info["name"])  # noqa: PTH116 - of a link's target
    # Network and user-space file systems (no device of their own: major 0) may number a file anew
    # while it stays the same.
    inode = found.st_ino if os.major(found.st_dev) else 0
    return (f"{_boot_id()} {found.st_dev}", f"{found.st_ctime_ns} {inode}")


def is_replaced(then: tuple[str, ...], now: tuple[str, ...]) -> bool:
    """Say whether two identities of a path are of two files, or of one that was written to."""
    return then[:1] == now[:1] and then != now


@cache
def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return platform.node()


# Names instead of classes: botocore and aiohttp are imported only when a URL needs them.
_OUTAGES = {
    *("EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError", "TornReadError"),
    *("HTTPClientError", "IncompleteReadError", "ResponseParserError"),  # botocore
    *("ClientPayloadError", "ClientConnectionError"),  # aiohttp: a body cut short
}
_BUSY_STATUS = {408, 429, 500, 502, 503, 504}
# Answers 400, 403 or 409, of S3 that asks to come again.
_BUSY_CODES = {"RequestTimeout", "SlowDown", "ConditionalRequestConflict", "OperationAborted"}


def is_transient(error: BaseException) -> bool:
    """Say whether an error, or one that caused it, is the storage's and may pass."""
    return any(map(_is_outage, _causes(error)))


def _is_outage(error: BaseException) -> bool:
    names = {cls.__name__ for cls in type(error).__mro__}
    if "SSLError" in names:
        return False
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status in _BUSY_STATUS or answer.get("Error", {}).get("Code") in _BUSY_CODES
    if (status := getattr(error, "status", None)) is not None:  # aiohttp
        return status in _BUSY_STATUS
    return bool(names & _OUTAGES) or isinstance(error, ConnectionError | TimeoutError)


def http_status(error: BaseException) -> int | None:
    """Return the status with which a web server refused, None when it is not about that."""
    return next((cause.status for cause in _causes(error) if hasattr(cause, "status")), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:  # an error may be raised from itself
        seen.append(error)
        yield error
        error = error.__cause__


def _root(error: BaseException) -> BaseException:
    *_, root = _causes(error)
    return root


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn errors of the storage at `url` that a user can mend into a UserError.

    Covers missing paths and buckets, missing or wrong credentials, denied access, unreachable
    endpoints and unknown protocols. Do not ask `fs.exists` inside: it swallows all of these and
    answers False; `fs.info`, `fs.ls` and `fs.find` raise (`find` of a missing path is empty).

    Raises:
        UserError: what is wrong, where, and the remedy. Other errors pass unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (message := _explanation(error)) is None:
            raise
        raise UserError(f"{redacted(url)}: {message}") from error


def _explanation(error: Exception) -> str | None:
    reason = " ".join(str(error).split())
    # Names instead of classes: botocore is imported only when a URL needs it.
    names = {cls.__name__ for cls in type(error).__mro__}
    if "NoCredentialsError" in names or "PartialCredentialsError" in names:
        return f"no complete credentials found; {_CREDENTIALS}"
    if "EndpointConnectionError" in names or "ConnectTimeoutError" in names:
        return f"no connection ({reason}); check the network and AWS_ENDPOINT_URL"
    if isinstance(error, ConnectionError):
        return f"no connection ({reason}); check the network and the endpoint"
    if isinstance(error, PermissionError):
        return f"access denied ({reason}); check the permissions and the credentials"
    response = getattr(error.__cause__, "response", None) or {}
    if response.get("Error", {}).get("Code") == "NoSuchBucket":
        return "the bucket does not exist; check its name and AWS_ENDPOINT_URL"
    if (status := http_status(error)) in (401, 403):
        return f"access denied (HTTP status {status}); check the permissions and the address"
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "no such file or folder; check the path"
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return f"no such file or folder ({os.strerror(error.errno)}); check the path"
    if isinstance(error, ValueError) and reason == "embedded null byte":
        return "no such file or folder, for no name holds a null byte; check the path"
    if isinstance(error, ValueError) and reason.startswith("Protocol not known"):
        return "unknown protocol; use a local path or a URL such as s3://bucket/path"
    if isinstance(error, ImportError):
        return f"this protocol needs a package that is not installed: {reason}"
    return None

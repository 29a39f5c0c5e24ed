"""Open any fsspec URL, outlast its outages, and say in one line what is wrong with it."""

from __future__ import annotations

import errno
import logging
import math
import os
import platform
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential

from gmm_dist.errors import RunFailed, UserError
from gmm_dist.urls import Url, links_of, reveal, split_query, without_secrets
from gmm_dist.urls import redacted as redacted

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LOG_SECONDS = 10.0  # between two lines that say what is being tried again
_REREADS = 2  # of a file that seems damaged
_CHAINING = {"simplecache", "filecache", "blockcache", "cached", "zip", "tar", "libarchive", "dir"}
_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or an instance role"
_MOST_WORDS = 200  # characters of an error that is not ours


def open_url(url: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of `url` and the path within it.

    Credentials, region and endpoint are those of this process (AWS_* variables, AWS_ENDPOINT_URL,
    FSSPEC_S3_ENDPOINT_URL, profile, instance role), so that a URL may travel to other machines
    and carry no secret. Opens no connection.

    Raises:
        UserError: the protocol is unknown or its package is not installed; an s3 URL with
            credentials in it.
    """
    url = Url(url)
    is_s3 = url.startswith(("s3://", "s3a://"))
    for link in links_of(reveal(url)):
        if link.startswith(("s3://", "s3a://")):
            _refuse_no_bucket(Url(link))
    with explained(url):
        try:
            fs, path = _opened(reveal(url), _s3_options() if is_s3 else {})
        except ValueError as error:
            if "://" not in url or "Protocol not known" in str(error):
                raise
            raise UserError(f"{url}: no URL ({line_of(error)}); check its spelling") from error
        except OSError as error:
            if error.errno is not None:
                raise
            # No file was requested yet: the protocol's client is incomplete, or its host missing.
            reason = line_of(error)[:_MOST_WORDS]
            raise UserError(
                f"{url}: this protocol cannot be spoken here ({reason}); check the host, and "
                "install what the protocol needs, as hdfs needs Java and Hadoop"
            ) from error
    # Instances are shared within a process, and others write to the lake while we run.
    fs.invalidate_cache()
    return fs, path


def _opened(url: str, options: dict[str, Any]) -> tuple[AbstractFileSystem, str]:
    protocol = fsspec.core.split_protocol(url)[0] or "file"
    if url.partition("::")[0].partition("://")[0] in _CHAINING:
        fs, path = fsspec.core.url_to_fs(url, **options)
        return fs, path
    # Names may hold `::`, which url_to_fs would take for a chain.
    cls = fsspec.get_filesystem_class(protocol)
    options = {**cls._get_kwargs_from_urls(url), **options}
    if protocol in ("http", "https"):
        from gmm_dist.web_folders import WebFolders  # aiohttp, only when a URL needs it

        return WebFolders(**options), cls._strip_protocol(url)
    return fsspec.filesystem(protocol, **options), cls._strip_protocol(url)


def _refuse_no_bucket(url: Url) -> None:
    # Credentials would be taken for parts of names, and go into messages.
    if url.is_secret:
        raise UserError(
            f"{url}: an s3 URL holds a bucket and a key, and no credentials: leave them out; "
            f"{_CREDENTIALS}"
        )
    bucket = url.partition("://")[2].partition("/")[0]
    if not re.fullmatch(r"[\w.-]+|arn:[\w.:-]+", bucket, re.ASCII):
        raise UserError(f"{url}: no bucket has the name {bucket!r}; check the URL")


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
    """Say for how long a failing storage is retried, with growing pauses (seconds)."""

    seconds: float = 180.0
    first_pause: float = 0.25
    longest_pause: float = 10.0


class StorageFailed(RunFailed):
    """Report in one line that a storage has failed for longer than we wait: run again later."""


class TornReadError(OSError):
    """Report that fewer bytes came than were requested, though the file has them."""


class DamagedError(UserError):
    """Report a file whose bytes make no sense; the transfer may have damaged them."""


PATIENCE = Patience()


def patiently(call: Callable[[], T], url: str, *, patience: Patience | None = None) -> T:
    """Return what `call` returns, and repeat it while the storage at `url` is out of order.

    An outage is no connection, a connection cut or timed out, a torn read, 408, 429 or 5xx. Other
    errors are raised at once. A `DamagedError` is retried up to twice, as the transfer may have
    done the damage. `call` must be idempotent, even when only the response was lost; so it opens
    what it reads. It may run within `explained`, or contain it.

    Raises:
        StorageFailed: it has failed for longer than `patience.seconds`.
    """
    outage = _Outage(redacted(url), patience or PATIENCE)
    retrying = Retrying(
        retry=retry_if_exception(outage.may_pass),
        wait=outage.pause,
        stop=outage.is_too_long,
        before_sleep=outage.report,
        retry_error_callback=outage.give_up,
    )
    return retrying(call)


class _Outage:
    """What is ours of one call's retries: which errors may pass, how long, and what is said."""

    def __init__(self, url: str, patience: Patience) -> None:
        self._url, self._patience = url, patience
        self._growing = wait_exponential(patience.first_pause, max=patience.longest_pause)
        self._began: float | None = None
        self._last_line = -math.inf
        self._rereads = 0

    def may_pass(self, error: BaseException) -> bool:
        if self._began is None:
            self._began = time.monotonic()
        if isinstance(error, DamagedError):
            self._rereads += 1
            return self._rereads <= _REREADS
        return isinstance(error, Exception) and is_transient(error)

    def pause(self, state: RetryCallState) -> float:
        # Of many workers that wait for one storage, not all should come back at once.
        return self._growing(state) * random.uniform(0.5, 1)

    @property
    def _lasted(self) -> float:
        """Return the seconds since the first failure: what came before was no outage."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    def is_too_long(self, state: RetryCallState) -> bool:
        return self._lasted + state.upcoming_sleep > self._patience.seconds

    def report(self, state: RetryCallState) -> None:
        now = time.monotonic()
        if now - self._last_line >= _LOG_SECONDS:
            self._last_line = now
            logger.warning(
                "%s: the storage fails for %.0f s now, trying for up to %.0f s (%s)",
                *(self._url, self._lasted, self._patience.seconds, line_of(_root(_error(state)))),
            )

    def give_up(self, state: RetryCallState) -> NoReturn:
        error = _error(state)
        raise StorageFailed(
            f"{self._url}: the storage failed for {self._lasted:.0f} s ({line_of(_root(error))}); "
            "check the network and the endpoint, and run again when it works"
        ) from error


def _error(state: RetryCallState) -> BaseException:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert error is not None
    return error


def absolute(url: str) -> Url:
    """Return `url` such that it means the same in another working directory.

    A local path or file:// URL becomes an absolute path; any other URL stays as it is, less
    trailing slashes.
    """
    fs, path = open_url(url)
    if isinstance(fs, LocalFileSystem):
        return Url(path)
    head, query = split_query(reveal(url))
    return Url(head.rstrip("/") + query)


def join(url: str, *parts: str) -> str:
    """Append path parts to `url`, with one slash between any two; http's query stays last.

    Of a `Url` it is one again.
    """
    head, query = split_query(reveal(url))
    joined = "/".join([head.rstrip("/"), *(part.strip("/") for part in parts)]) + query
    return Url(joined) if isinstance(url, Url) else joined


def parent_and_name(url: Url) -> tuple[Url, str]:
    """Return the folder of a file's URL, and the file's name."""
    head, query = split_query(reveal(url))
    parent, _, name = head.rpartition("/")
    return Url((parent or "/") + query), name


# Headers for a web server: a range of a compressed response has other bytes than the file.
UNCOMPRESSED = {"Accept-Encoding": "identity"}


def is_http(fs: AbstractFileSystem) -> bool:
    """Say whether files lie behind a plain web server."""
    return bool({"http", "https"} & {fs.protocol, *fs.protocol})


_VERSIONS = (
    *("ETag", "etag", "mtime", "LastModified", "last_modified", "Last-Modified", "created"),
    *("Content-MD5", "Digest", "modified", "modify", "modificationTime", "last_write_time"),
)


def version(fs: AbstractFileSystem, info: Mapping[str, Any]) -> str:
    """Return the version of the file that `info` describes: its ETag, else its mtime.

    "" where the store has neither.
    """
    if isinstance(fs, LocalFileSystem):
        return str(os.stat(info["name"]).st_mtime_ns)  # noqa: PTH116 - of a link's target
    for key in _VERSIONS:
        if info.get(key):
            # Of a weak ETag (W/"...") too the opaque part alone is to be compared.
            return str(info[key]).removeprefix("W/").strip('"')
    return ""


def identity(fs: AbstractFileSystem, info: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what tells a local file from one that replaces it with the same mtime.

    Compare it within one run only: a copy of the lake differs, and so may another host's view of
    it. The first part says where the file was looked at (this boot of a kernel, the device); only
    identities with the same first part are compared, see `is_replaced`. Empty for other stores.
    """
    if not isinstance(fs, LocalFileSystem):
        return ()
    stat = os.stat(info["name"])  # noqa: PTH116 - of a link's target
    # Network and user-space file systems (no device of their own: major 0) may number a file anew
    # while it stays the same.
    inode = stat.st_ino if os.major(stat.st_dev) else 0
    return (f"{_boot_id()} {stat.st_dev}", f"{stat.st_ctime_ns} {inode}")


def is_replaced(then: tuple[str, ...], now: tuple[str, ...]) -> bool:
    """Say whether a path's file was replaced or written to between two identities of it."""
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
# S3's codes that ask for a retry, with status 400, 403 or 409.
_BUSY_CODES = {"RequestTimeout", "SlowDown", "ConditionalRequestConflict", "OperationAborted"}


def is_transient(error: BaseException) -> bool:
    """Say whether an error, or one of its causes, is an outage of the storage that may pass."""
    return any(map(_is_outage, _causes(error)))


def _is_outage(error: BaseException) -> bool:
    names = {cls.__name__ for cls in type(error).__mro__}
    if "SSLError" in names:
        return False
    if "ClientResponseError" in names:  # aiohttp
        return getattr(error, "status", None) in _BUSY_STATUS
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status in _BUSY_STATUS or answer.get("Error", {}).get("Code") in _BUSY_CODES
    return bool(names & _OUTAGES) or isinstance(error, ConnectionError | TimeoutError)


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status with which a web server refused, None for other errors."""
    statuses = (getattr(cause, "status", None) for cause in _causes(error))
    return next((status for status in statuses if isinstance(status, int)), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:  # an error may be raised from itself
        seen.append(error)
        yield error
        error = error.__cause__


def line_of(error: BaseException) -> str:
    """Return an error's text in one line, without credentials: libraries quote whole URLs."""
    return without_secrets(" ".join(str(error).split())) or type(error).__name__


def _root(error: BaseException) -> BaseException:
    *_, root = _causes(error)
    return root


_NO_ROOM = {
    errno.ENOSPC: "no space is left on the device: make room, and run again",
    errno.EDQUOT: "the disk quota is used up: make room, and run again",
}
_HOPELESS = {
    errno.EROFS: "the file system is read-only: pass a place that can be written to",
    errno.ENAMETOOLONG: "a name is too long for this file system: use shorter names, or an "
    "object store",
    errno.ELOOP: "links lead round in a circle: give the folder itself",
    errno.EISDIR: "a folder, where a file should be; check the path",
    errno.EFBIG: "a file is too large for this file system: pass another place",
}


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn errors of the storage at `url` that a user can mend into a UserError.

    Covers missing paths and buckets, missing or wrong credentials, denied access, unreachable
    endpoints and unknown protocols. Do not call `fs.exists` inside: it swallows all of these and
    returns False; `fs.info`, `fs.ls` and `fs.find` raise (`find` of a missing path is empty).

    Raises:
        UserError: what is wrong, where, and the remedy. Other errors pass unchanged.
        StorageFailed: there is no room left, which no repetition mends.
    """
    try:
        yield
    except (UserError, RunFailed):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise StorageFailed(f"{_where(error, url)}: {_NO_ROOM[error.errno]}") from error
        if (message := _explanation(error)) is None:
            raise
        raise UserError(f"{redacted(url)}: {message}") from error


def _where(error: OSError, url: str) -> str:
    """Name the path of an error, which may lie outside `url`: large files may grow elsewhere."""
    shown = redacted(url)
    name = error.filename
    if isinstance(name, str) and name.startswith("/") and not name.startswith(f"{shown}/"):
        return f"{shown} (at {name})"
    return shown


def _explanation(error: Exception) -> str | None:
    reason = line_of(error)
    # Names instead of classes: botocore is imported only when a URL needs it.
    names = {cls.__name__ for cls in type(error).__mro__}
    if "NoCredentialsError" in names or "PartialCredentialsError" in names:
        return f"no complete credentials found; {_CREDENTIALS}"
    if "EndpointConnectionError" in names or "ConnectTimeoutError" in names:
        return f"no connection ({reason}); check the network and AWS_ENDPOINT_URL"
    if isinstance(error, ConnectionError):
        return f"no connection ({reason}); check the network and the endpoint"
    if isinstance(error, OSError) and error.errno in _HOPELESS:
        return _HOPELESS[error.errno]
    if isinstance(error, UnicodeError):
        return "a name is no UTF-8, which this store asks for: rename it"
    if "ParamValidationError" in names:
        return f"no bucket or key can have such a name ({reason}); check the URL"
    if "ClientResponseError" in names:  # aiohttp
        return f"the server answers {getattr(error, 'status', '?')}; check the URL and the rights"
    if "InvalidURL" in names or (isinstance(error, ValueError) and "IPv6" in reason):
        return "no URL that can be opened; check its spelling"
    if isinstance(error, PermissionError):
        return f"access denied ({reason}); check the permissions and the credentials"
    response = getattr(error.__cause__, "response", None) or {}
    if response.get("Error", {}).get("Code") == "NoSuchBucket":
        return "the bucket does not exist; check its name and AWS_ENDPOINT_URL"
    if (status := http_status(error)) in (401, 403):
        return f"access denied (HTTP status {status}); check the permissions and the address"
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "no such file or folder; check the path"
    if isinstance(error, ValueError) and reason == "embedded null byte":
        return "no such file or folder, for no name holds a null byte; check the path"
    if isinstance(error, ValueError) and reason.startswith("Protocol not known"):
        return "unknown protocol; use a local path or a URL such as s3://bucket/path"
    if isinstance(error, ImportError):
        return f"this protocol needs a package that is not installed: {reason}"
    return None

"""Open any fsspec URL, and say in one line what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from gmm_dist.errors import UserError

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
    # Ten attempts survive an outage of at least 16 s (botocore's default of 5 does not) and give
    # an unreachable endpoint up after about a minute; a 403 or 404 is never retried. Timeouts are
    # per request, so that a hung connection cannot hang a job.
    config: dict[str, Any] = {"connect_timeout": 10, "read_timeout": 60}
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        config["retries"] = {"max_attempts": 10, "mode": "standard"}
    return {"config_kwargs": config, "use_listings_cache": False}


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


def version(fs: AbstractFileSystem, info: Mapping[str, Any]) -> str:
    """Return what changes when the file that `info` describes changes: its ETag, else its mtime."""
    if isinstance(fs, LocalFileSystem):
        return str(os.stat(info["name"]).st_mtime_ns)  # noqa: PTH116 - of a link's target
    for key in ("ETag", "etag", "mtime", "LastModified", "last_modified", "created"):
        if info.get(key) is not None:
            return str(info[key]).strip('"')
    return ""


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
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "no such file or folder; check the path"
    if isinstance(error, ValueError) and reason.startswith("Protocol not known"):
        return "unknown protocol; use a local path or a URL such as s3://bucket/path"
    if isinstance(error, ImportError):
        return f"this protocol needs a package that is not installed: {reason}"
    return None

"""Have deltalake reach a table where this process's own storage does: paths, keys, failures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fsspec.asyn import sync
from fsspec.implementations.local import LocalFileSystem

from gmm_dist import storage
from gmm_dist.errors import Option, RunFailed, UserError, Words
from gmm_dist.urls import Url, reveal

_OUTAGE = re.compile(
    r"error sending request|connection (refused|reset|closed)|timed? ?out|HTTP error: 5\d\d"
    r"|status: 5\d\d|max_retries",
    re.IGNORECASE,
)
_FEATURE = re.compile(
    r"Feature '([^']+)' is not supported|Unsupported table features required: \[([^\]]+)\]"
)
_AWS = ".amazonaws.com"
_READ_ON = "mend the table, or name a version that can be read with " + Option("at")


def require_deltalake(root: str, verb: str = "read") -> None:
    """Raise UserError where deltalake is not installed, which is to read or write the table."""
    if find_spec("deltalake") is None:
        raise UserError(
            f"a Delta table, which takes the package deltalake to {verb}",
            where=storage.redacted(root),
            remedy="pip install 'gmm_dist[delta]'",
        )


def uri_and_options(root: Url) -> tuple[str, dict[str, str]]:
    """Return what deltalake opens a table by: its URI, and options of the storage.

    Keys, region and endpoint are those with which `storage.open_url` reaches the files, wherever
    they come from (AWS_* variables, FSSPEC_S3_*, profile, instance role).

    Raises:
        UserError: deltalake cannot open tables there.
    """
    fs, path = storage.open_url(root)
    if isinstance(fs, LocalFileSystem):
        if "%" in path:
            raise UserError(
                f"{root}: deltalake opens no table below a folder with % in its name; rename the "
                "folder, or give a link to the table"
            )
        return Path(path).as_uri(), {}
    if not root.startswith(("s3://", "s3a://")):
        scheme = root.partition("://")[0]
        raise UserError(
            f"{root}: Delta tables are on local disks and S3, not on {scheme}; copy the "
            "table with its _delta_log there"
        )
    with storage.explained(root):
        options = storage.patiently(lambda: _s3_options(fs, path.partition("/")[0]), root)
    return reveal(root), options


def _s3_options(fs: Any, bucket: str) -> dict[str, str]:
    meta = fs.connect().meta
    options = {"AWS_REGION": meta.region_name or "us-east-1"}
    key, secret, token = sync(fs.loop, _credentials, fs)
    if key is None:
        options["AWS_SKIP_SIGNATURE"] = "true"
    else:
        options |= {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
        options |= {"AWS_SESSION_TOKEN": token} if token else {}
    endpoint: str = meta.endpoint_url
    if not endpoint.partition("://")[2].partition("/")[0].endswith(_AWS):
        options["AWS_ENDPOINT_URL"] = endpoint
        options["AWS_ALLOW_HTTP"] = "true" if endpoint.startswith("http://") else "false"
    else:
        # deltalake, unlike botocore, does not follow a bucket to another region.
        answer = fs.call_s3("head_bucket", Bucket=bucket)
        headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        options["AWS_REGION"] = headers.get("x-amz-bucket-region", options["AWS_REGION"])
    return options


async def _credentials(fs: Any) -> tuple[str | None, str | None, str | None]:
    """Return key, secret and token, no key where requests are not signed."""
    if fs.anon:
        return None, None, None
    if fs.key is not None:
        return fs.key, fs.secret, fs.token
    found = await fs.session.get_credentials()
    if found is None:
        return None, None, None
    frozen = await found.get_frozen_credentials()
    return frozen.access_key, frozen.secret_key, frozen.token


@contextmanager
def told_in_a_line(
    root: str, doing: str = "read the table's log", remedy: Words = _READ_ON
) -> Iterator[None]:
    """Turn what deltalake raises into one line; it has waited for an outage to pass by itself."""

    def told(reason: str) -> UserError | None:
        feature = _FEATURE.search(reason)
        return None if feature is None else unknown_feature(root, feature[1] or feature[2])

    with in_a_line(
        root,
        during=f"as deltalake was to {doing}",
        cannot=f"deltalake cannot {doing}",
        remedy=remedy,
        is_outage=lambda error: _OUTAGE.search(storage.line_of(error)) is not None,
        told=told,
    ):
        yield


@contextmanager
def in_a_line(
    root: str,
    *,
    during: str,
    cannot: str,
    remedy: Words,
    is_outage: Callable[[Exception], bool],
    told: Callable[[str], UserError | None] = lambda reason: None,
) -> Iterator[None]:
    """Turn what a library that reads tables raises into one line.

    Args:
        root: The table.
        during: When the storage has failed, if it has.
        cannot: What the library cannot do, if it is anything else.
        remedy: What helps then.
        is_outage: Whether an error is one of the storage.
        told: What is known better of some errors, by their lines; None for nothing.
    """
    try:
        yield
    except (UserError, RunFailed):
        raise
    except Exception as error:
        reason = storage.line_of(error)
        if is_outage(error):
            raise storage.StorageFailed(
                f"{storage.redacted(root)}: the storage failed {during} "
                f"({reason}); check the network and the endpoint, and run again when it works"
            ) from error
        if (known := told(reason)) is not None:
            raise known from error
        raise UserError(
            f"{cannot} ({reason})", where=storage.redacted(root), remedy=remedy
        ) from error


def unknown_feature(root: str, name: str) -> UserError:
    """Return the error for a table that asks of its readers what we do not know."""
    return UserError(
        f"the table asks its readers for {name!r}, which is not known here",
        where=storage.redacted(root),
        remedy="drop the feature from the table, or export its rows to Parquet files",
    )

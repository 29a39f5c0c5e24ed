"""JSON files of ours: strict, with a format version, told apart from damaged ones."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gmm_dist.errors import UserError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class FileEntry:
    """Identify the bytes of one file: its sha256 (hexadecimal) and size (bytes)."""

    sha256: str
    size: int

    @classmethod
    def of(cls, data: bytes) -> FileEntry:
        return cls(hashlib.sha256(data).hexdigest(), len(data))

    def fits(self, data: bytes | None) -> bool:
        return data is not None and self == FileEntry.of(data)


def to_json(value: object) -> bytes:
    """Return `value` as strict JSON: numbers that are not finite become null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def parse(data: bytes, name: str, url: str) -> dict[str, Any]:
    """Return a JSON file's object, or refuse what this version cannot read.

    Raises:
        UserError: `data` is damaged, or a newer gmm_dist wrote it.
    """
    try:
        content = dict(json.loads(data))
        version = int(content["format_version"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{url}: {name} is damaged or not ours ({type(error).__name__}: {error}): restore it, "
            "or run again with another --output"
        ) from error
    require_readable(version, name, url)
    return content


def require_readable(version: int, name: str, url: str) -> None:
    """Raise UserError when a newer gmm_dist wrote the file `name` at `url`."""
    if version > FORMAT_VERSION:
        raise UserError(
            f"{url}: {name} has format version {version}, this gmm_dist reads {FORMAT_VERSION} at "
            "most: upgrade gmm_dist"
        )


@contextmanager
def whole(name: str, url: str) -> Iterator[None]:
    """Turn an entry that is missing from a file of ours into a UserError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{url}: {name} lacks an entry ({type(error).__name__}: {error}): restore it, or run "
            "again with another --output"
        ) from error

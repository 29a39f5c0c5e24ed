"""Read and write our JSON files: strictly, with a format version; damaged ones are refused."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Never
from urllib.parse import unquote

from gmm_dist.errors import Option, UserError

FORMAT_VERSION = 1
_RESTORE = "restore it, or run again with another " + Option("output")
_LEADS_AWAY = re.compile(r"[\\\x00-\x1f]|^[A-Za-z]:|:$")  # `s3:`, of s3://


@dataclass(frozen=True)
class FileEntry:
    """Identify the bytes of one file: its sha256 (hexadecimal) and size (bytes)."""

    sha256: str
    size: int

    def __post_init__(self) -> None:
        if not (isinstance(self.sha256, str) and type(self.size) is int):
            raise TypeError(f"sha256 {self.sha256!r:.70}, size {self.size!r:.70}")

    @classmethod
    def of(cls, data: bytes) -> FileEntry:
        return cls(hashlib.sha256(data).hexdigest(), len(data))

    def fits(self, data: bytes | None) -> bool:
        return data is not None and self == FileEntry.of(data)


def to_json(value: object) -> bytes:
    """Return `value` as strict JSON: numbers that are not finite become null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    # Names of files need not be UTF-8: what is not is escaped, as JSON has it.
    return f"{text}\n".encode(errors="backslashreplace")


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
    content = parse_plain(data, name, url)
    if "format_version" not in content:
        raise _damaged(name, url, "KeyError: 'format_version'")
    version = content["format_version"]
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise _damaged(name, url, f"format_version is {_short(version)}")
    require_readable(version, name, url)
    return content


def parse_plain(data: bytes, name: str, url: str) -> dict[str, Any]:
    """Return a JSON file's object, of whatever format version.

    Raises:
        UserError: `data` is not strict JSON, or no object.
    """
    try:
        content = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _damaged(name, url, _short(f"{type(error).__name__}: {error}")) from error
    if not isinstance(content, dict):
        raise _damaged(name, url, f"a {type(content).__name__} where an object should be")
    return content


def _refuse_constant(text: str) -> Never:
    raise ValueError(f"{text} is no JSON")


def _damaged(name: str, url: str, why: str) -> UserError:
    return UserError(f"{url}: {name} is damaged or not ours ({why})", remedy=_RESTORE)


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def name_within(value: object, name: str, url: str) -> str:
    """Return `value`, which the file `name` gives as a path below its folder, if it is one.

    Raises:
        UserError: it is no path, or may lead elsewhere: up, to a root or to another store.
    """
    parts = value.split("/") if isinstance(value, str) else []
    if not parts or any(map(_leads_away, parts)):
        raise _damaged(name, url, f"it names {_short(value)!r}, which is no path below its folder")
    return "/".join(parts)


def require_readable(version: int, name: str, url: str, *, newest: int = FORMAT_VERSION) -> None:
    """Raise UserError when a newer gmm_dist wrote the file `name` at `url`."""
    if version > newest:
        raise UserError(
            f"{url}: {name} has format version {version}, this gmm_dist reads {newest} at most: "
            "upgrade gmm_dist"
        )


def _leads_away(part: str) -> bool:
    plain = unquote(part)  # some servers decode names
    return plain in ("", ".", "..") or "/" in plain or _LEADS_AWAY.search(plain) is not None


@contextmanager
def whole(name: str, url: str) -> Iterator[None]:
    """Raise UserError for an entry of a file of ours that is missing or makes no sense."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError) as error:
        lacks = isinstance(error, KeyError)
        raise UserError(
            f"{url}: {name} {'lacks an entry' if lacks else 'has an entry that makes no sense'} "
            f"({type(error).__name__}: {_short(str(error))})",
            remedy=_RESTORE,
        ) from error

"""A snapshot of a table: which version of which table was read; and how users name a version."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from gmm_dist.errors import UserError


@dataclass(frozen=True, slots=True)
class Pinned:
    """A version that a run has begun with; of an Iceberg table, with the columns of a schema."""

    version: int
    schema: int | None = None


At = int | datetime | Pinned
"""A version of a table: its number, or a moment, for the version that was the newest then."""

_WANTED = "give the number of a version, or a time such as 2026-11-21 or 2026-11-21T08:30:00+01:00"


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Name one version of one table.

    `masks` is the sha256 of which rows the version has deleted without rewriting their files;
    None where there are none. Of an Iceberg table the version is the snapshot's id, and `schema`
    the number of the schema whose columns are read. Equal snapshots hold equal rows.
    """

    format: str
    table: str
    version: int
    masks: str | None = None
    schema: int | None = None

    @property
    def content(self) -> dict[str, Any]:
        """All of it, as plain JSON values."""
        content = asdict(self)
        if self.schema is None:
            del content["schema"]
        return content

    @property
    def shown(self) -> str:
        """Name the version in a message."""
        return shown(self.content)


def shown(content: Mapping[str, Any]) -> str:
    """Name the version of a table whose snapshot has such a content."""
    word = "version" if content["format"] == "Delta" else "snapshot"
    return f"{word} {content['version']} of the {content['format']} table {content['table']}"


def stay_at(at: object, begun_with: Mapping[str, Any] | None) -> At | None:
    """Return the version that a run reads which goes on: the one that it has begun with.

    `begun_with` is the content of that snapshot, None where nothing has begun, or with no table.
    A version that the user names is read in any case; if it is another one, the run's identity
    differs.
    """
    if at is not None or begun_with is None:
        return parse_at(at)
    version, schema = begun_with.get("version"), begun_with.get("schema")
    if not isinstance(version, int):
        return None
    return version if schema is None else Pinned(version, schema)


def parse_at(at: object) -> At | None:
    """Read a version as users give it: digits are its number, all else is a time.

    A time without an offset is UTC.

    Raises:
        UserError: it is neither.
    """
    if at is None or isinstance(at, datetime):
        return at if at is None or at.tzinfo is not None else at.replace(tzinfo=UTC)
    if isinstance(at, Pinned) or (isinstance(at, int) and not isinstance(at, bool) and at >= 0):
        return at
    if isinstance(at, str):
        text = at.strip()
        if re.fullmatch(r"[0-9]{1,19}", text):
            return int(text)
        try:
            return parse_at(datetime.fromisoformat(text))
        except ValueError:
            pass
    raise UserError(f"is {at!r}", option="at", remedy=_WANTED)

"""Which version of a Delta table was the newest at a moment, by its log's commits.

deltalake can tell it, too, but only by the times of the log's files: tables may keep the times of
their commits within them, as files that are copied get other times.
"""

from __future__ import annotations

import itertools
import json
import re
from bisect import bisect_right
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from fsspec import AbstractFileSystem

from gmm_dist import storage
from gmm_dist.errors import UserError

_COMMIT = re.compile(r"(?:.*/)?(\d{20})\.json")
_KEPT_IN_COMMITS = "delta.enableInCommitTimestamps"
_KEPT_SINCE = "delta.inCommitTimestampEnablementVersion"


def version_at(
    fs: AbstractFileSystem, log: str, moment: datetime, *, root: str, settings: Mapping[str, str]
) -> int:
    """Return the version that was the newest at a moment, which has an offset.

    Args:
        fs: The file system of the table.
        log: The path of its log.
        moment: When.
        root: The table's URL, for messages.
        settings: The table's properties.

    Raises:
        UserError: there was no version yet, or the moment is still to come.
    """
    if moment > datetime.now(UTC):
        remedy = "give a time that has come"
        raise UserError(f"is {moment.isoformat()}", option="at", remedy=remedy)
    infos = storage.patiently(lambda: fs.ls(log, detail=True), log)
    commits = {int(match[1]): info for info in infos if (match := _COMMIT.fullmatch(info["name"]))}
    versions = sorted(commits)
    file_times = itertools.accumulate((_file_time(commits[v]) for v in versions), max)
    times = dict(zip(versions, file_times, strict=True))
    since = int(settings.get(_KEPT_SINCE, 0)) if settings.get(_KEPT_IN_COMMITS) == "true" else None

    def time_of(version: int) -> float:
        if since is None or version < since:
            return times[version]
        return _commit_time(fs, commits[version]["name"])

    place = bisect_right(versions, moment.timestamp(), key=time_of)
    if place == 0:
        first = f" (version {versions[0]}: {_shown(time_of(versions[0]))})" if versions else ""
        raise UserError(
            f"is {moment.isoformat()}, and no version that the log holds is as old{first}",
            where=root,
            option="at",
            remedy="give a later time or the number of a version",
        )
    return versions[place - 1]


def _file_time(info: Mapping[str, Any]) -> float:
    """Return when a file was written, in seconds: local ones tell a number, others a date."""
    when = next(info[key] for key in ("mtime", "LastModified", "created") if info.get(key))
    return when.timestamp() if isinstance(when, datetime) else float(when)


def _commit_time(fs: AbstractFileSystem, path: str) -> float:
    """Return the time that a commit keeps in its first line, in seconds."""
    text = storage.patiently(lambda: fs.cat_file(path), path)
    line = text.split(b"\n", 1)[0]
    return float(json.loads(line)["commitInfo"]["inCommitTimestamp"]) / 1000


def _shown(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")

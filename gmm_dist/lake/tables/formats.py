"""Recognise table formats (Delta, Iceberg and others); refuse all but roots of those we read."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from gmm_dist import storage
from gmm_dist.errors import UserError

logger = logging.getLogger(__name__)

_LOOKS_AT_ONCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Format:
    """Name a table format and its mark: a folder that a table has, and the files in it.

    `mark` is matched against the path of a file within the table; `file` against names in
    `folder`, None where the folder alone is the mark.
    """

    kind: str
    mark: re.Pattern[str]
    folder: str | None = None
    file: re.Pattern[str] | None = None


_DELTA = _Format(kind="a Delta table", mark=re.compile(r"(^|/)_delta_log/"), folder="_delta_log")
_ICEBERG = "an Iceberg table"
_FORMATS = (
    _DELTA,
    _Format(
        kind=_ICEBERG,
        mark=re.compile(r"(^|/)metadata/[^/]*\.metadata\.json(\.gz)?$"),
        folder="metadata",
        file=re.compile(r"\.metadata\.json(\.gz)?$"),
    ),
    _Format(kind="a Hudi table", mark=re.compile(r"(^|/)\.hoodie/"), folder=".hoodie"),
    _Format(
        kind="a Lance dataset",
        mark=re.compile(r"(^|/)_versions/[^/]*\.manifest$"),
        folder="_versions",
        file=re.compile(r"\.manifest$"),
    ),
    _Format(kind="a Hudi table", mark=re.compile(r"(^|/)\.hoodie_partition_metadata(\.\w+)?$")),
    _Format(
        kind="a Spark sink", mark=re.compile(r"(^|/)_spark_metadata/"), folder="_spark_metadata"
    ),
    _Format(
        kind="a Paimon table",
        mark=re.compile(r"(^|/)manifest/manifest-list-[^/]*$"),
        folder="manifest",
        file=re.compile(r"^manifest-list-"),
    ),
    # Their catalogue is elsewhere, or only the folder of data was copied.
    _Format(
        kind="a DuckLake table", mark=re.compile(r"(^|/)ducklake-[0-9a-f-]{36}(-delete)?\.parquet$")
    ),
    _Format(
        kind=_ICEBERG,
        mark=re.compile(r"(^|/)\d{5}-\d+-[0-9a-f-]{36}-\d+-deletes\.parquet$"),
    ),
    # Seven digits: a date has eight.
    _Format(
        kind="a transactional Hive table",
        mark=re.compile(r"(^|/)(base_\d{7}|(delete_)?delta_\d{7}_\d{7}(_\d{4})?)(_v\d+)?/"),
    ),
)


def refuse_within(root: str, names: Iterable[str]) -> None:
    """Raise a UserError when one of the files below `root` is part of such a table."""
    for name in names:
        for known in _FORMATS:
            if known.mark.search(name):
                table = storage.join(root, _root_of(known, name)).rstrip("/")
                raise _refusal(root, known, name, table)


_MARK = re.compile(r"(?P<folder>(?:.*/)?)_(?P<step>started|committed)_(?P<id>\d+)")
_TID = re.compile(r"(?P<folder>(?:.*/)?)[^/]*-tid-(?P<id>\d+)-[^/]*")


def refuse_uncommitted(
    fs: AbstractFileSystem, root: str, files: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raise a UserError for files of a Databricks write that was not committed, or was undone.

    Databricks writes `_started_7` and, when all files `*-tid-7-*` are there, `_committed_7`. That
    lists the files that were added and those that were removed, which may still be there.

    Raises:
        UserError: there are such among `files`, those of a folder by name.
    """
    marks = [(name, mark) for name in sorted(files) if (mark := _MARK.fullmatch(name))]
    steps = {(mark["folder"], mark["id"], mark["step"]) for _, mark in marks}
    for name in sorted(files) if marks else ():
        part = _TID.fullmatch(name)
        if part is None:
            continue
        is_started, is_committed = (
            (part["folder"], part["id"], step) in steps for step in ("started", "committed")
        )
        if is_started and not is_committed:
            started = f"{part['folder']}_started_{part['id']}"
            raise _uncommitted(root, name, f"was never committed ({started})")
    for name, mark in marks:
        if mark["step"] == "committed":
            for removed in _removed(fs, files[name]["name"]):
                if mark["folder"] + removed in files:
                    raise _uncommitted(root, mark["folder"] + removed, f"was removed ({name})")


def _uncommitted(root: str, name: str, what: str) -> UserError:
    return UserError(
        f"{storage.redacted(storage.join(root, name))}: a file of Databricks that {what}; remove "
        "such files (VACUUM does), or export the rows to a folder of Parquet files and give that"
    )


def _removed(fs: AbstractFileSystem, path: str) -> list[str]:
    text = storage.patiently(lambda: fs.cat_file(path), path)
    listed: object = []
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        listed = json.loads(text)["removed"]
    return [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []


def refuse_around(fs: AbstractFileSystem, folder: str, root: str) -> None:
    """Raise a UserError when `folder`, a path of `fs`, lies in such a table.

    Looks at every folder from `folder` up to the top of the file system or bucket. Skips
    folders that it cannot look into.
    """
    above = list(_folders_up(fs, folder))
    for path, known in itertools.product(above, _FORMATS):
        if known.mark.search(name := f"{path}/"):
            raise _refusal(root, known, name, _address(fs, _root_of(known, name)))
    looks = [
        partial(_mark_in, fs, path, known) for path in above for known in _FORMATS if known.folder
    ]
    if isinstance(fs, LocalFileSystem):
        marks = [look() for look in looks]
    else:
        with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
            marks = list(pool.map(lambda look: look(), looks))
    for look, mark in zip(looks, marks, strict=True):
        if mark is not None:
            raise _refusal(root, look.args[2], storage.redacted(mark), _address(fs, look.args[1]))


def is_delta(fs: AbstractFileSystem, path: str, url: str) -> bool:
    """Say whether `url`, a path of `fs`, is the root of a Delta table."""
    return _mark_in(fs, path, _DELTA, url) is not None


def _refusal(root: str, known: _Format, mark: str, table: str) -> UserError:
    """Return the error for what is not a table's root, or of a format that is not read.

    `table` is the URL of the table, as far as its mark tells.
    """
    if known.kind == _ICEBERG:
        return UserError(
            f"{storage.redacted(root)}: {known.kind} ({mark}), whose folder also holds deleted "
            "rows; give it as iceberg://CATALOG/NAMESPACE.TABLE, or give its newest metadata file, "
            "metadata/*.metadata.json"
        )
    if known is _DELTA:
        return UserError(
            f"{storage.redacted(root)}: not the root of a Delta table ({mark}), whose folder also "
            f"holds deleted rows; give the table itself, {storage.redacted(table)}"
        )
    return UserError(
        f"{storage.redacted(root)}: {known.kind} ({mark}), whose folder also holds deleted rows; "
        "export its current rows to a folder of Parquet files and give that"
    )


def _root_of(known: _Format, name: str) -> str:
    """Return the path of a table's root, by that of a file or folder in it."""
    match = known.mark.search(name)
    return name[: match.start()] if match else name


def _address(fs: AbstractFileSystem, path: str) -> str:
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))


def _folders_up(fs: AbstractFileSystem, folder: str) -> Iterator[str]:
    """Yield a folder and those above it; of a link, those above its target too."""
    if isinstance(fs, LocalFileSystem):
        local_path, target = Path(folder), Path(folder).resolve()
        yield from dict.fromkeys(
            path.as_posix() for path in (local_path, *local_path.parents, target, *target.parents)
        )
        return
    scheme, separator, path = folder.partition("?")[0].rpartition("://")
    while path:
        yield f"{scheme}{separator}{path}"
        path = path.rstrip("/").rpartition("/")[0]


def _mark_in(
    fs: AbstractFileSystem, path: str, known: _Format, url: str | None = None
) -> str | None:
    """Return the mark of a table format that lies in a folder, None where there is none.

    `url` names the folder when its storage fails.
    """
    folder = storage.join(path, known.folder or "")
    try:
        return storage.patiently(lambda: _look_for_mark(fs, path, folder, known), url or folder)
    except Exception as error:
        # Whoever may read a folder need not be allowed to see those above.
        if not (isinstance(error, OSError) or storage.is_http(fs)):
            raise
        logger.debug("%s: not looked at (%s)", storage.redacted(folder), error)
        return None


def _look_for_mark(fs: AbstractFileSystem, path: str, folder: str, known: _Format) -> str | None:
    if storage.is_http(fs):
        # Some servers answer every address with a page: only what an index names is there.
        listed = fs.ls(f"{path}/", detail=False)
        if not any(name.rstrip("/") == folder for name in listed):
            return None
    if known.file is None:
        return folder if storage.is_http(fs) or fs.info(folder)["type"] == "directory" else None
    names = (name.rpartition("/")[2] for name in fs.ls(folder, detail=False))
    file = next((name for name in names if known.file.search(name)), None)
    return file and storage.join(folder, file)

"""Where a lease is kept: one small value beside a run, changed only if it still is as read."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from fsspec import AbstractFileSystem

from gmm_dist.errors import UserError
from gmm_dist.runs.compare_and_swap import S3Object
from gmm_dist.runs.folder import Folder, is_foreign, is_s3, remove_local

SECONDS = 15.0

_LONGEST = 86_400.0

_HELD = re.compile(
    r"(\w[\w.-]{0,199}),(\d{1,18}),(\d+(?:\.\d+)?(?:e[+-]?\d{1,3})?),(held|decided)", re.ASCII
)


@dataclass(frozen=True, kw_only=True)
class Held:
    """Say who holds a lease: an attempt, for `seconds` after each change.

    `count` goes up with each change and each takeover. `decided`: the holder commits, and
    whoever finds this may complete the commit, but not take the run over.
    """

    attempt: str
    count: int
    seconds: float
    state: Literal["held", "decided"] = "held"

    @property
    def text(self) -> str:
        """Write the value such that it can be a file's name."""
        return f"{self.attempt},{self.count},{self.seconds:g},{self.state}"

    @classmethod
    def parse(cls, text: str) -> Held:
        """Return the value that `text` spells.

        Raises ValueError for any other text: an attempt is part of paths, and a lease must end.
        """
        match = _HELD.fullmatch(text)
        if match is None or not 0 < float(match[3]) <= _LONGEST:
            raise ValueError(text)
        state: Literal["held", "decided"] = "decided" if match[4] == "decided" else "held"
        return cls(attempt=match[1], count=int(match[2]), seconds=float(match[3]), state=state)


@dataclass(frozen=True)
class Stored:
    """A value as it is stored, and the tag that a change of it must name."""

    held: Held
    tag: str


class Cell(Protocol):
    """One value, which changes only if it still is the one that was read.

    `replace` and `create` return what is stored now, or None when the condition did not hold;
    `remove` does nothing then. Other failures raise; the change may have been made.
    """

    def read(self) -> Stored | None: ...
    def create(self, held: Held) -> Stored | None: ...
    def replace(self, old: Stored, new: Held) -> Stored | None: ...
    def remove(self, old: Stored) -> None: ...


class _LocalCell:
    """A folder with one file, whose name is the value; changes are renames.

    Of several renames of one file one succeeds. There is no lock that a stopped process could
    keep, and no step leaves half a value. Names are unique: a value that is gone does not return.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def read(self) -> Stored | None:
        # A listing may miss a file that is being renamed: once more, then.
        for pause in (0.005, 0.02, 0.0):
            try:
                names = os.listdir(self._folder)  # noqa: PTH208 - names, not paths
            except FileNotFoundError:
                return None
            # Systems put files of theirs into any folder.
            ours = [name for name in names if not is_foreign(name)]
            if ours:
                held = (_stored(name, at=str(self._folder)) for name in ours)
                return max(held, key=lambda s: s.held.count)
            time.sleep(pause)
        return None

    def create(self, held: Held) -> Stored | None:
        made = self._folder.with_name(f"{self._folder.name}-{secrets.token_hex(4)}")
        made.mkdir(parents=True)
        try:
            (made / held.text).touch()
            made.rename(self._folder)  # Replaces an empty folder, and no other.
        except OSError as error:
            shutil.rmtree(made, ignore_errors=True)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            self._remove_foreign()
            return None
        return _stored(held.text)

    def _remove_foreign(self) -> None:
        """Make room for a lease where a system's own file stands in a folder that holds none."""
        with suppress(FileNotFoundError):
            for entry in list(self._folder.iterdir()):
                if is_foreign(entry.name):
                    remove_local(entry)

    def replace(self, old: Stored, new: Held) -> Stored | None:
        try:
            (self._folder / old.tag).rename(self._folder / new.text)
        except FileNotFoundError:
            # NFS may ask twice, and answer the second time.
            return _stored(new.text) if (self._folder / new.text).exists() else None
        return _stored(new.text)

    def remove(self, old: Stored) -> None:
        with suppress(FileNotFoundError):
            (self._folder / old.tag).unlink()
        with suppress(OSError):
            self._remove_foreign()
            self._folder.rmdir()


class _S3Cell:
    """An object, replaced on condition of its ETag; no request lasts longer than `timeout`."""

    def __init__(self, fs: AbstractFileSystem, path: str, timeout: float) -> None:
        self._object, self._path = S3Object(fs, path, timeout), path

    def read(self) -> Stored | None:
        response = self._object.call("get_object")
        return (
            None if response is None else _stored(response["Body"], response["ETag"], at=self._path)
        )

    def create(self, held: Held) -> Stored | None:
        return self._put(held, IfNoneMatch="*")

    def replace(self, old: Stored, new: Held) -> Stored | None:
        return self._put(new, IfMatch=old.tag)

    def _put(self, held: Held, **condition: str) -> Stored | None:
        put = self._object.call("put_object", Body=held.text.encode(), **condition)
        return None if put is None else Stored(held, put["ETag"])

    def remove(self, old: Stored) -> None:
        # Some stores have no conditional deletion, hence the read. In the moment after it a
        # successor may lose its lease and stop, but two can never commit.
        if self.read() == old:
            self._object.call("delete_object", IfMatch=old.tag)


class _SharedCell:
    """A file of a store without conditional replacement: exact within one process only."""

    _lock = threading.Lock()

    def __init__(self, folder: Folder) -> None:
        self._cell_file = folder

    def read(self) -> Stored | None:
        data = self._cell_file.read()
        return None if data is None else _stored(data, at=self._cell_file.path)

    def create(self, held: Held) -> Stored | None:
        with self._lock:
            try:
                self._cell_file.create(held.text.encode(), scratch="")
            except FileExistsError:
                return None
        return _stored(held.text)

    def replace(self, old: Stored, new: Held) -> Stored | None:
        with self._lock:
            if self.read() != old:
                return None
            self._cell_file.write(new.text.encode())
        return _stored(new.text)

    def remove(self, old: Stored) -> None:
        with self._lock:
            if self.read() == old:
                self._cell_file.remove()


def _stored(value: str | bytes, tag: str | None = None, *, at: str = "") -> Stored:
    try:
        text = value if isinstance(value, str) else value.decode()
        return Stored(Held.parse(text), text if tag is None else tag)
    except ValueError as error:
        raise UserError(
            f"{at}: holds {value[:80]!r}, which is no lease of ours: remove it, if no run is at "
            "work there"
        ) from error


def cell_at(folder: Folder, seconds: float = SECONDS) -> Cell:
    """Return the cell in `folder`, of the kind that suits its store.

    Compare-and-swap is exact on local disks and on S3 (and stores that honour its If-Match);
    on others it is exact within a process, and the manifest alone keeps two runs apart.
    """
    if folder.is_local:
        return _LocalCell(folder.path)
    if is_s3(folder.fs):
        # A renewal that hangs must leave time for another.
        return _S3Cell(folder.fs, folder.path, timeout=max(seconds / 3, 3.0))
    return _SharedCell(folder)

"""A small file that changes only if it still is what was read: one cell, three stores.

Leases, a registry's pointer, its counter and its list of the pruned are such cells, and a
manifest is one that is created and never changes. Of several that change a cell at once one
succeeds, whatever their clocks say. On a local disk renames decide it, on S3 the store does
(If-Match, If-None-Match). Other stores have no such condition: there it is exact within one
process only, and the manifest alone keeps two processes apart.

What a process may still hold that was stopped (SIGSTOP, a suspended machine) or cut off, and goes
on after others have taken its work over:

- Its version of a cell. The next change of it fails, for the cell has changed: so a driver learns
  that its lease is lost, and cannot decide to commit.
- A turn at a cell on a local disk. Who waits for it ends it after `_LONGEST_TURN`, and what was
  to be renamed in that turn is gone: nothing waits longer, and nothing is overwritten.
- A request to S3 that was under way. The store judges its condition when it arrives.
- The step that it was at. A lease is checked before a step, not within it, so a step may come
  late. All such steps do no harm then: an attempt's files lie in a folder of its own, a
  checkpoint's name is that of its contents, and a night is removed only once it is on the list of
  the pruned.

Two things are weaker. Deleting on S3 is conditional only where the store knows how: else a late
deletion may hit a successor's lease, which then stops; two never commit. On stores without
conditions a late change overwrites a successor's.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from fsspec import AbstractFileSystem, asyn

from gmm_dist.errors import UserError
from gmm_dist.runs.folder import Folder, answer, is_s3, sync, write_out

_LONGEST_TURN = 3.0  # seconds for what takes milliseconds: one read and one rename
_POLL = 0.005


@dataclass(frozen=True, slots=True)
class Version:
    """What a cell held when it was read, and the tag by which S3 knows it."""

    data: bytes
    tag: str = ""


@runtime_checkable
class Cell(Protocol):
    """One value, which changes only if it still is the one that was read.

    Stores that are out of order are not waited for here: `storage.patiently` does that.
    """

    def read(self) -> Version | None:
        """Return the value as it is, None where there is none."""

    def swap(self, old: Version | None, new: bytes) -> Version | None:
        """Store `new` if the cell still holds `old` (None: nothing), and return it as stored.

        A value that comes back counts as unchanged, so values that matter have a counter in them.
        After None, or an error, read again: an answer may have been lost, and `new` be there.
        """

    def remove(self, old: Version) -> None:
        """Remove the value if it still is `old`, else do nothing."""


def cell_at(
    folder: Folder, *parts: str, timeout: float | None = 30.0, scratch: Folder | None = None
) -> Cell:
    """Return the cell at a path in `folder`, of the kind that suits its store.

    Args:
        folder: where the cell lies.
        parts: its path in it.
        timeout: the seconds after which a request to S3 is given up; None for no such limit.
        scratch: a folder of the same disk for what is not in its place yet, instead of `folder`.
    """
    path = folder.at(*parts)
    if folder.is_local:
        place = Path(path).parent if scratch is None else Path(scratch.path)
        return _LocalCell(Path(path), place)
    if is_s3(folder.fs):
        return _S3Cell(folder.fs, path, timeout)
    return _SharedCell(folder.fs, path)


@dataclass(frozen=True)
class _LocalCell:
    """A file. It is created by a hard link, which never replaces another, and changed in turns.

    A turn is a folder of a unique name in the folder `.NAME.turn`, which has room for one. What
    is renamed in a turn goes out of that folder or into it. Whoever has watched a turn for too
    long ends it by moving it away: then the rename finds no such path, be it in its last moment.
    """

    path: Path
    scratch: Path

    def read(self) -> Version | None:
        try:
            return Version(self.path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except IsADirectoryError as error:
            raise UserError(
                f"{self.path}: a folder, where a file of ours should be (an earlier version kept "
                "its lease so): remove it, if no run is at work there"
            ) from error

    def swap(self, old: Version | None, new: bytes) -> Version | None:
        stored = self._create(new) if old is None else self._replace(old, new)
        if stored:
            sync(self.path.parent)
        return Version(new) if stored else None

    def _create(self, new: bytes) -> bool:
        for folder in (self.path.parent, self.scratch):
            folder.mkdir(parents=True, exist_ok=True)
        made = self.scratch / f".{secrets.token_hex(8)}.part"
        try:
            write_out(made, new, sync=True)
            self.path.hardlink_to(made)
        except FileExistsError:
            return False
        finally:
            made.unlink(missing_ok=True)
        return True

    def _replace(self, old: Version, new: bytes) -> bool:
        if self.read() != old:  # needs no turn
            return False
        with self._turn(new) as turn:
            return self.read() == old and _renamed(turn / "new", self.path)

    def remove(self, old: Version) -> None:
        if self.read() != old:
            return
        with self._turn() as turn:
            if self.read() == old:
                _renamed(self.path, turn / "old")

    @property
    def _turns(self) -> Path:
        return self.path.with_name(f".{self.path.name}.turn")

    @contextmanager
    def _turn(self, new: bytes | None = None) -> Iterator[Path]:
        name = secrets.token_hex(8)
        made = self._beside()
        made.mkdir()
        try:
            (made / name).mkdir()
            if new is not None:
                write_out(made / name / "new", new, sync=True)
            self._await(made)
            yield self._turns / name
        finally:
            for rest in (made, self._turns / name):
                shutil.rmtree(rest, ignore_errors=True)
            with suppress(OSError):  # another's turn by now
                self._turns.rmdir()

    def _await(self, made: Path) -> None:
        """Rename `made` to the folder of turns as soon as that is empty; end a turn that lasts."""
        seen, since = [""], time.monotonic()
        while True:
            try:
                made.rename(self._turns)  # replaces an empty folder, and no other
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            names = self._at_turn()
            if names != seen:
                seen, since = names, time.monotonic()
            elif time.monotonic() - since > _LONGEST_TURN:
                self._end(names)
            time.sleep(_POLL)

    def _at_turn(self) -> list[str]:
        try:
            return sorted(os.listdir(self._turns))  # noqa: PTH208 - names, not paths
        except FileNotFoundError:
            return []

    def _end(self, names: list[str]) -> None:
        """Move turns, and what systems have left among them, out of the folder of turns."""
        away = self._beside()
        away.mkdir()
        for name in names:
            _renamed(self._turns / name, away / name)
        shutil.rmtree(away, ignore_errors=True)

    def _beside(self) -> Path:
        return self.path.with_name(f".{self.path.name}-{secrets.token_hex(8)}")


def _renamed(path: Path, target: Path) -> bool:
    """Rename a file or folder; say whether both ends of it were there."""
    try:
        path.rename(target)
    except FileNotFoundError:
        return False
    return True


class _S3Cell:
    """An object and the conditions that S3 honours; no request lasts longer than `timeout`."""

    def __init__(self, fs: AbstractFileSystem, path: str, timeout: float | None) -> None:
        self._fs, self._timeout = fs, timeout
        bucket, key, _ = fs.split_path(path)
        self._object = {"Bucket": bucket, "Key": key}

    def read(self) -> Version | None:
        response = self._call("get_object")
        return None if response is None else Version(response["Body"], response["ETag"])

    def swap(self, old: Version | None, new: bytes) -> Version | None:
        condition = {"IfNoneMatch": "*"} if old is None else {"IfMatch": old.tag}
        put = self._call("put_object", Body=new, **condition)
        return None if put is None else Version(new, put["ETag"])

    def remove(self, old: Version) -> None:
        if self.read() == old:  # for stores without conditional deletion
            self._call("delete_object", IfMatch=old.tag)

    def _call(self, method: str, **arguments: Any) -> Mapping[str, Any] | None:
        """Return the answer, None when the object is gone or a condition does not hold.

        A 409 (another conditional request is under way) decides nothing, and is raised.
        """

        async def call() -> Mapping[str, Any]:
            answered = await self._fs._call_s3(method, **self._object, **arguments)
            if method != "get_object":
                return dict(answered)
            async with answered["Body"] as body:
                return {**answered, "Body": await body.read()}

        try:
            result: Mapping[str, Any] = asyn.sync(self._fs.loop, call, timeout=self._timeout)
        except FileNotFoundError as error:
            if answer(error).get("Error", {}).get("Code") == "NoSuchBucket":
                raise
            return None
        except OSError as error:
            # By its number: s3fs knows AWS's wording of "precondition failed" and no other store's.
            if answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode") == 412:
                return None
            raise
        return result


@dataclass(frozen=True)
class _SharedCell:
    """A file of a store without conditional replacement: exact within one process only."""

    fs: AbstractFileSystem
    path: str

    # A store that calls back, as tests have one do, may come here again in the same thread.
    _lock: ClassVar[threading.RLock] = threading.RLock()

    def read(self) -> Version | None:
        try:
            return Version(self.fs.cat_file(self.path))
        except FileNotFoundError:
            return None

    def swap(self, old: Version | None, new: bytes) -> Version | None:
        with self._lock:
            if old is None:  # Of processes that create a file one succeeds, if the store can tell.
                with suppress(FileExistsError):
                    self.fs.pipe_file(self.path, new, mode="create")
                    return Version(new)
            elif self.read() == old:
                self.fs.pipe_file(self.path, new)
                return Version(new)
        return None

    def remove(self, old: Version) -> None:
        with self._lock:
            if self.read() == old:
                self.fs.rm_file(self.path)

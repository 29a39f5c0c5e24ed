"""A run's lease: of several drivers of one run, one is at work.

A lease is one small value beside the run, and every change of it is conditional on what it was
before: created if absent, renewed or taken over if unchanged. Of those that compete one
succeeds, whatever their clocks say. Whoever waits for a lease measures with a clock of its own
how long the value has not changed; times of two machines are never compared.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

from fsspec import AbstractFileSystem

from gmm_dist.conditional import S3Object
from gmm_dist.errors import RunFailed, UserError
from gmm_dist.places import Place, is_foreign, is_s3, remove_local
from gmm_dist.storage import line_of, patiently

logger = logging.getLogger(__name__)

SECONDS = 15.0
# With `wait`, a lease that is being renewed is watched for so many times its length: its holder
# may be a driver that is being stopped.
_PATIENCE = 3


_LONGEST = 86_400.0
_HELD = re.compile(
    r"(\w[\w.-]{0,199}),(\d{1,18}),(\d+(?:\.\d+)?(?:e[+-]?\d{1,3})?),(held|decided)", re.ASCII
)


class LeaseLost(RunFailed):
    """Say that another attempt has taken the run over: this one must stop."""


@dataclass(frozen=True)
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
        """Return what `text` was made of.

        Raises ValueError where it was not: an attempt is part of paths, and a lease ends one day.
        """
        match = _HELD.fullmatch(text)
        if match is None or not 0 < float(match[3]) <= _LONGEST:
            raise ValueError(text)
        state: Literal["held", "decided"] = "decided" if match[4] == "decided" else "held"
        return cls(match[1], int(match[2]), float(match[3]), state)


@dataclass(frozen=True)
class Stored:
    """A value as it is stored, and the tag that a change of it must name."""

    held: Held
    tag: str


class Cell(Protocol):
    """One value that changes only on condition of what it was.

    `replace` and `create` return what is stored now, or None when the condition did not hold;
    `remove` does nothing then. Other failures raise, and their fate is unknown.
    """

    def read(self) -> Stored | None: ...
    def create(self, held: Held) -> Stored | None: ...
    def replace(self, old: Stored, new: Held) -> Stored | None: ...
    def remove(self, old: Stored) -> None: ...


# ---------------------------------------------------------------------------- where it is stored


class _LocalCell:
    """A folder with one file, whose name is the value; changes are renames.

    Of several renames of one file one succeeds. No lock is held that a stopped process could
    keep, no step leaves a half; names are unique, so what is gone does not come back.
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
        found = self._object.call("get_object")
        return None if found is None else _stored(found["Body"], found["ETag"], at=self._path)

    def create(self, held: Held) -> Stored | None:
        return self._put(held, IfNoneMatch="*")

    def replace(self, old: Stored, new: Held) -> Stored | None:
        return self._put(new, IfMatch=old.tag)

    def _put(self, held: Held, **condition: str) -> Stored | None:
        put = self._object.call("put_object", Body=held.text.encode(), **condition)
        return None if put is None else Stored(held, put["ETag"])

    def remove(self, old: Stored) -> None:
        # Stores that know no conditional deletion are asked first; what is left is a moment
        # in which a successor could be made to stop, and none in which two commit.
        if self.read() == old:
            self._object.call("delete_object", IfMatch=old.tag)


class _SharedCell:
    """A file of a store without conditional replacement: exact within one process only."""

    _lock = threading.Lock()

    def __init__(self, place: Place) -> None:
        self._place = place

    def read(self) -> Stored | None:
        data = self._place.read()
        return None if data is None else _stored(data, at=self._place.path)

    def create(self, held: Held) -> Stored | None:
        with self._lock:
            try:
                self._place.create(held.text.encode(), scratch="")
            except FileExistsError:
                return None
        return _stored(held.text)

    def replace(self, old: Stored, new: Held) -> Stored | None:
        with self._lock:
            if self.read() != old:
                return None
            self._place.write(new.text.encode())
        return _stored(new.text)

    def remove(self, old: Stored) -> None:
        with self._lock:
            if self.read() == old:
                self._place.remove()


def _stored(value: str | bytes, tag: str | None = None, *, at: str = "") -> Stored:
    try:
        text = value if isinstance(value, str) else value.decode()
        return Stored(Held.parse(text), text if tag is None else tag)
    except ValueError as error:
        raise UserError(
            f"{at}: holds {value[:80]!r}, which is no lease of ours: remove it, if no run is at "
            "work there"
        ) from error


def cell_at(place: Place, seconds: float = SECONDS) -> Cell:
    """Return the cell at `place`, by the means of its store.

    Compare-and-swap is exact on local disks and on S3 (and stores that honour its If-Match);
    on others it is exact within a process, and the manifest alone keeps two runs apart.
    """
    if place.is_local:
        return _LocalCell(place.path)
    if is_s3(place.fs):
        # A renewal that hangs must leave time for another.
        return _S3Cell(place.fs, place.path, timeout=max(seconds / 3, 3.0))
    return _SharedCell(place)


# ---------------------------------------------------------------------------- waiting for it


@dataclass(frozen=True)
class Terms:
    """Say how a lease is asked for.

    It lasts `seconds` after each renewal. With `wait` a holder that lives is watched for three
    times as long as its lease lasts before the request is refused: it may be about to end; or
    for `patience` seconds. `url` and `who` (which describes an attempt) are for messages.
    """

    url: str
    seconds: float = SECONDS
    wait: bool = False
    who: Callable[[str], str] = str
    patience: float = 0.0

    def longest(self, holder: Held) -> float:
        """Return the seconds for which a holder that lives is watched."""
        return max(self.patience, _PATIENCE * holder.seconds if self.wait else 0.0)


class _Watch:
    """Measure how long a value has been seen unchanged, by this process's clock."""

    def __init__(self) -> None:
        self._last: Stored | None = None
        self._first = self._since = self._answered = time.monotonic()
        self.changes = -1
        self.announced = False

    def read(self, cell: Cell, terms: Terms) -> Stored | None:
        """Read the cell; a store that fails to answer is waited for."""
        asked = time.monotonic()
        found = patiently(cell.read, terms.url)
        self._answered = time.monotonic()
        if found is not None and found != self._last:
            self._last, self._since, self.changes = found, self._answered, self.changes + 1
        elif found is not None and self._answered - asked > found.held.seconds / 3:
            # What happened meanwhile was not seen, and the holder may have been as blind.
            self._since = self._answered
        return found

    @property
    def idle(self) -> float:
        """Return the seconds for which the value has been seen unchanged."""
        return self._answered - self._since

    @property
    def total(self) -> float:
        return self._answered - self._first


def acquire(
    cell: Cell, attempt: str, terms: Terms, *, finish: Callable[[str], None]
) -> Lease | None:
    """Take the lease for `attempt`, if need be from a holder that no longer renews it.

    Every holder is watched, for as long as its lease lasts, before it counts as dead. A dead
    holder that had decided to commit keeps its right: `finish` is called with its attempt to
    complete the commit, and None is returned.

    Raises:
        UserError: another attempt is at work, or the store cannot keep a lease.
    """
    watch = _Watch()
    while True:
        since = time.monotonic()
        found = watch.read(cell, terms)
        stored = None
        if found is None:
            stored = patiently(partial(cell.create, Held(attempt, 0, terms.seconds)), terms.url)
            if stored is not None:
                _require_conditions(cell, stored, terms)
        elif found.held.attempt == attempt:
            stored, since = found, -math.inf  # An answer was lost, we do not know when.
        elif watch.idle < found.held.seconds:
            _refuse_living(watch, found.held, terms)
            time.sleep(min(found.held.seconds / 20, 1.0))
        elif found.held.state == "decided":
            finish(found.held.attempt)
            cell.remove(found)
            return None
        else:
            ours = Held(attempt, found.held.count + 1, terms.seconds)
            stored = patiently(partial(cell.replace, found, ours), terms.url)
            if stored is not None:
                logger.info("%s: goes on after %s", terms.url, terms.who(found.held.attempt))
        if stored is not None:
            return Lease(cell, stored, terms, since=since)


def await_end(cell: Cell, url: str) -> None:
    """Wait until nobody holds the lease in `cell`, or its holder no longer renews it."""
    watch = _Watch()
    while (found := watch.read(cell, Terms(url))) is not None:
        if watch.idle >= found.held.seconds:
            return
        time.sleep(min(found.held.seconds / 20, 1.0))


def _refuse_living(watch: _Watch, holder: Held, terms: Terms) -> None:
    """Say once that a holder is waited for; refuse to wait longer for one that lives."""
    if watch.changes == 0:
        if not watch.announced:
            watch.announced = True
            logger.info(
                "%s: held by %s; waiting up to %g s to see whether it still renews its lease",
                *(terms.url, terms.who(holder.attempt), holder.seconds),
            )
        return
    if watch.total >= terms.longest(holder):
        raise UserError(
            f"{terms.url}: another driver is at work on this run and renews its lease "
            f"({terms.who(holder.attempt)}): wait until it has ended, or pass another --output"
        )


def _require_conditions(cell: Cell, stored: Stored, terms: Terms) -> None:
    """Refuse a store that replaces a value without regard to the condition."""
    stale = Stored(stored.held, '"00000000000000000000000000000000"')
    if cell.replace(stale, replace(stored.held, count=1)) is not None:
        raise UserError(
            f"{terms.url}: the store overwrites where a conditional replacement was asked for, so "
            "two drivers could not tell who holds the run: pass an --output on S3 or a local disk"
        )


# ---------------------------------------------------------------------------- holding it


class Lease:
    """Hold a run's lease and renew it in the background, until `release`.

    A store that fails, even for longer than the lease lasts, does not end it: nobody has taken
    it over before a renewal says so.
    """

    def __init__(self, cell: Cell, stored: Stored, terms: Terms, *, since: float) -> None:
        self._cell, self._stored, self._terms = cell, stored, terms
        self._lock = threading.Lock()
        self._lost: LeaseLost | None = None
        self._stop = threading.Event()
        # Counted from before the request: the store saw the change later than that. A fifth is
        # kept back: clocks differ in speed, and writes take time.
        self._until = since + 0.8 * terms.seconds
        self._thread = threading.Thread(target=self._renew_all, name="lease", daemon=True)
        self._thread.start()

    @property
    def is_current(self) -> bool:
        """Say whether nobody can have taken the lease over yet, by this process's clock."""
        return self._lost is None and time.monotonic() < self._until

    def check(self) -> None:
        """Raise when the lease is another's; ask the store where this process cannot know.

        Raises:
            LeaseLost: another attempt has taken the run over.
        """
        if self._lost is None and not self.is_current:
            self._renew()
        if self._lost is not None:
            raise self._lost

    def decide(self) -> None:
        """Replace the lease by the decision to commit, on condition that it is still held.

        Raises:
            LeaseLost: another attempt has taken the run over. After any other error it is open
                whether the decision was stored.
        """
        self._stop.set()
        patiently(self._decide, self._terms.url)

    def _decide(self) -> None:
        with self._lock:
            if self._lost is not None:
                raise self._lost
            self._advance("decided")

    @property
    def is_lost(self) -> bool:
        """Say whether it is known that another attempt has taken the run over."""
        return self._lost is not None

    def release(self, *, keep: bool = False) -> None:
        """Stop renewing, and give the lease back unless it is another's.

        With `keep` it stays as it is, for whoever waits it out.
        """
        self._stop.set()
        self._thread.join(self._terms.seconds)
        if keep or self._lost is not None:
            return
        try:
            self._cell.remove(self._stored)
        except Exception as error:
            # Never in place of the error that ended the run; whoever comes next waits it out.
            logger.warning("%s: the lease was not released: %s", self._terms.url, line_of(error))

    def _renew_all(self) -> None:
        while not self._stop.wait(self._terms.seconds / 3):
            self._renew()

    def _renew(self) -> None:
        with self._lock:
            if self._lost is not None or self._stored.held.state == "decided":
                return
            sent = time.monotonic()
            try:
                self._advance("held")
            except LeaseLost as error:
                logger.warning("%s", error)
                self._stop.set()
            except Exception as error:
                logger.warning("%s: the lease was not renewed: %s", self._terms.url, line_of(error))
            else:
                self._until = sent + 0.8 * self._terms.seconds

    def _advance(self, state: Literal["held", "decided"]) -> None:
        """Replace our value by its successor."""
        for _ in range(3):
            ours = self._stored.held
            stored = self._cell.replace(
                self._stored, replace(ours, count=ours.count + 1, state=state)
            )
            if stored is None:
                stored = self._cell.read()
                if stored is None or stored.held.attempt != ours.attempt:
                    self._lost = self._lost_to(stored)
                    raise self._lost
            self._stored = stored
            # Else the answer to an earlier change had been lost: its tag is known now.
            if stored.held.count > ours.count and stored.held.state == state:
                return
        raise OSError("the lease changes while it is being changed")

    def _lost_to(self, stored: Stored | None) -> LeaseLost:
        holder = "nobody holds it now" if stored is None else self._terms.who(stored.held.attempt)
        return LeaseLost(
            f"{self._terms.url}: the lease of this run (attempt {self._stored.held.attempt}) has "
            f"passed to another driver ({holder}): this one stops"
        )

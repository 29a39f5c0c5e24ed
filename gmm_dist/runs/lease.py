"""A run's lease: of several drivers of one run, it lets one work.

A lease is one small value beside the run, and every change of it is conditional on what it was
before: created if absent, renewed or taken over if unchanged. Of those that compete one
succeeds, whatever their clocks say. Whoever waits for a lease measures with a clock of its own
how long the value has not changed; times of two machines are never compared. What one that was
stopped may still hold, `compare_and_swap` says.
"""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from gmm_dist.errors import Option, RunFailed, UserError
from gmm_dist.runs.compare_and_swap import Cell, Version, cell_at
from gmm_dist.runs.folder import Folder
from gmm_dist.storage import line_of, patiently

logger = logging.getLogger(__name__)

SECONDS = 15.0
_LONGEST = 86_400.0

# With `wait`, a lease that is being renewed is watched for so many times its length: its holder
# may be a driver that is being stopped.
_PATIENCE = 3


class LeaseLost(RunFailed):
    """Say that another attempt has taken the run over: this one must stop."""


# ---------------------------------------------------------------------------- where it is kept

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
        """Write the value as one line."""
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
    """A value as it is stored, and the version that a change of it must name."""

    held: Held
    version: Version


class LeaseCell:
    """A cell that holds a lease; `at` is for messages."""

    def __init__(self, cell: Cell, at: str) -> None:
        self._cell, self._at = cell, at

    def read(self) -> Stored | None:
        version = self._cell.read()
        if version is None:
            return None
        try:
            return Stored(Held.parse(version.data.decode()), version)
        except ValueError as error:
            raise UserError(
                f"{self._at}: holds {version.data[:80]!r}, which is no lease of ours: remove it, "
                "if no run is at work there"
            ) from error

    def swap(self, old: Stored | None, new: Held) -> Stored | None:
        """Store `new` if the cell still holds `old`, see `Cell.swap`."""
        version = self._cell.swap(None if old is None else old.version, new.text.encode())
        return None if version is None else Stored(new, version)

    def remove(self, old: Stored) -> None:
        self._cell.remove(old.version)


def lease_at(folder: Folder, *parts: str, seconds: float = SECONDS) -> LeaseCell:
    """Return where a lease that lasts `seconds` is kept."""
    # A renewal that hangs must leave time for another.
    cell = cell_at(folder, *parts, timeout=max(seconds / 3, 3.0))
    return LeaseCell(cell, folder.at(*parts))


# ---------------------------------------------------------------------------- waiting for it


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Say how a lease is requested.

    It lasts `seconds` after each renewal. A request is refused after watching a holder renew its
    lease for `patience` seconds, and with `wait` for three times as long as that lease lasts: its
    holder may be about to end. `url` and `who` (which describes an attempt) are for messages.
    """

    url: str
    seconds: float = SECONDS
    wait: bool = False
    who: Callable[[str], str] = str
    patience: float = 0.0

    def longest(self, holder: Held) -> float:
        """Return the seconds for which a holder that renews its lease is watched."""
        return max(self.patience, _PATIENCE * holder.seconds if self.wait else 0.0)


class _Watch:
    """Measure how long a value has been seen unchanged, by this process's clock."""

    def __init__(self) -> None:
        self._last: Stored | None = None
        self._first = self._since = self._answered = time.monotonic()
        self.changes = -1
        self.announced = False

    def read(self, cell: LeaseCell, terms: Terms) -> Stored | None:
        """Read the cell; a store that fails to answer is waited for."""
        sent = time.monotonic()
        current = patiently(cell.read, terms.url)
        self._answered = time.monotonic()
        if current is not None and current != self._last:
            self._last, self._since, self.changes = current, self._answered, self.changes + 1
        elif current is not None and self._answered - sent > current.held.seconds / 3:
            # Renewals meanwhile were not seen, or the holder could not reach the store either.
            self._since = self._answered
        return current

    @property
    def idle(self) -> float:
        """Return the seconds for which the value has been seen unchanged."""
        return self._answered - self._since

    @property
    def total(self) -> float:
        return self._answered - self._first


def acquire(
    cell: LeaseCell, attempt: str, terms: Terms, *, finish: Callable[[str], None]
) -> Lease | None:
    """Take the lease for `attempt`, if need be from a holder that no longer renews it.

    A holder counts as dead once its lease has not changed for as long as it lasts. If a dead
    holder had decided to commit, `finish` is called with its attempt to complete the commit, and
    None is returned.

    Raises:
        UserError: another attempt is at work, or the store cannot keep a lease.
    """
    watch = _Watch()
    while True:
        since = time.monotonic()
        current = watch.read(cell, terms)
        stored = None
        if current is None:
            stored = patiently(
                partial(cell.swap, None, Held(attempt=attempt, count=0, seconds=terms.seconds)),
                terms.url,
            )
            if stored is not None:
                _require_conditions(cell, stored, terms)
        elif current.held.attempt == attempt:
            stored, since = current, -math.inf  # An answer was lost, we do not know when.
        elif watch.idle < current.held.seconds:
            _refuse_living(watch, current.held, terms)
            time.sleep(min(current.held.seconds / 20, 1.0))
        elif current.held.state == "decided":
            finish(current.held.attempt)
            cell.remove(current)
            return None
        else:
            ours = Held(attempt=attempt, count=current.held.count + 1, seconds=terms.seconds)
            stored = patiently(partial(cell.swap, current, ours), terms.url)
            if stored is not None:
                logger.info("%s: goes on after %s", terms.url, terms.who(current.held.attempt))
        if stored is not None:
            return Lease(cell, stored, terms, since=since)


def await_end(cell: LeaseCell, url: str) -> None:
    """Wait until nobody holds the lease in `cell`, or its holder no longer renews it."""
    watch = _Watch()
    while (current := watch.read(cell, Terms(url=url))) is not None:
        if watch.idle >= current.held.seconds:
            return
        time.sleep(min(current.held.seconds / 20, 1.0))


def _refuse_living(watch: _Watch, holder: Held, terms: Terms) -> None:
    """Log once that a holder is waited for; raise UserError once one has renewed for too long."""
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
            f"({terms.who(holder.attempt)})",
            remedy="wait until it has ended, or pass another " + Option("output"),
        )


def _require_conditions(cell: LeaseCell, stored: Stored, terms: Terms) -> None:
    """Refuse a store that replaces a value without regard to the condition."""
    never = Version(b"never stored", '"00000000000000000000000000000000"')
    if cell.swap(Stored(stored.held, never), replace(stored.held, count=1)) is not None:
        raise UserError(
            f"{terms.url}: the store overwrites where a conditional replacement was asked for, so "
            "two drivers could not tell who holds the run",
            remedy="pass another " + Option("output") + ", on S3 or a local disk",
        )


# ---------------------------------------------------------------------------- holding it


class Lease:
    """Hold a run's lease and renew it in the background, until `release`.

    A store that fails, even for longer than the lease lasts, does not end it: nobody has taken
    it over before a renewal says so.
    """

    def __init__(self, cell: LeaseCell, stored: Stored, terms: Terms, *, since: float) -> None:
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
        """Raise when the lease is another's; ask the store where this process cannot tell.

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
            LeaseLost: another attempt has taken the run over. After any other error the decision
                may or may not be stored.
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
            # Not raised in place of the error that ended the run; the next driver waits it out.
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
            new = replace(ours, count=ours.count + 1, state=state)
            stored = self._cell.swap(self._stored, new)
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

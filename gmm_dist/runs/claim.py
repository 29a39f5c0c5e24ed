"""Claim an output for a run: the lease, the attempt, and the checkpoints to go on from."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from gmm_dist.errors import UserError
from gmm_dist.runs import commit
from gmm_dist.runs.checkpoint import (
    CHECKPOINTS,
    CheckpointStore,
    RunIdentity,
    begun_with,
    checkpoint_names,
)
from gmm_dist.runs.commit import ATTEMPTS, LEASE, MANIFEST, MODEL, Attempt, Result
from gmm_dist.runs.folder import Folder
from gmm_dist.runs.lease import SECONDS, Lease, LeaseCell, Terms, acquire, lease_at
from gmm_dist.storage import explained, line_of

logger = logging.getLogger(__name__)


class Run:
    """Hold an output for one run: `attempt` to write to and commit, and its checkpoints.

    `committed` says that an earlier attempt has committed: there is nothing left to do, and no
    `attempt`. Made by `claim`.
    """

    def __init__(self, folder: Folder, attempt: Attempt | None, lease: Lease | None) -> None:
        self._folder, self._attempt, self._lease = folder, attempt, lease
        self._checkpoints: CheckpointStore | None = None

    @property
    def committed(self) -> bool:
        return self._attempt is None

    @property
    def attempt(self) -> Attempt:
        assert self._attempt is not None, "the run has been committed before"
        return self._attempt

    def check(self) -> None:
        """Raise LeaseLost when another driver has taken the run over; cheap, so call it often."""
        if self._lease is not None:
            self._lease.check()

    def checkpoints(
        self, identity: RunIdentity, *, keep: int = 2, seconds: float = 0.0
    ) -> CheckpointStore:
        """Open the run's checkpoints; at most one is written in `seconds`."""
        assert self._lease is not None, "the run has been committed before"
        lease = self._lease
        self._checkpoints = CheckpointStore(
            self._folder, identity, keep=keep, seconds=seconds, guard=lambda: lease.is_current
        )
        return self._checkpoints

    def begun_with(self) -> Mapping[str, Any] | None:
        """Return the version of a table that the run has begun with; None for none."""
        return begun_with(self._folder)

    def forget(self) -> None:
        """Remove the checkpoints: the run has ended and cannot be resumed."""
        if self._checkpoints is not None:
            self._checkpoints.clear()

    def end(self) -> None:
        """Give the lease back; see `claim` for what stays."""
        if self._attempt is None or self._lease is None:
            return
        if self._checkpoints is not None:
            self._checkpoints.close(flush=not (self._attempt.committed or self._lease.is_lost))
        if self._attempt.committed:
            _tidy(self._folder, self._attempt.id)
        # An open decision stays for whoever comes next to complete.
        self._lease.release(keep=self._attempt.is_undecided)
        if not self._attempt.committed:
            self._attempt.abandon()


@contextmanager
def claim(url: str, *, resume: bool = False, lease_seconds: float = SECONDS) -> Iterator[Run]:
    """Claim the output `url` for a run, before any work is done.

    With `resume`, `Run.committed` is true if a run has committed here; a dead driver's lease is
    waited out, and its checkpoints can be resumed from. Leaving the block without a commit gives
    the lease back, keeps the checkpoints and removes all else that the attempt wrote.

    Raises:
        UserError: another driver is at work; the place holds other files or cannot hold results;
            without `resume`, it holds a result or an unfinished run's checkpoints.
        LeaseLost: at the commit or in `Run.check`, another driver has taken the run over.
    """
    folder = Folder.of(url)
    with explained(folder.url):
        run = _opened(folder, resume, lease_seconds)
    try:
        yield run
    finally:
        run.end()


def _opened(folder: Folder, resume: bool, seconds: float) -> Run:
    cell = lease_at(folder, ATTEMPTS, LEASE, seconds=seconds)
    if (winner := _winner(folder, resume)) is None:
        attempt = Attempt(folder)
        lease = _acquired(folder, attempt, cell, resume, seconds)
        if lease is not None:
            attempt.lease = lease
            run = Run(folder, attempt, lease)
            try:
                # Somebody may have committed while we waited.
                winner = _winner(folder, resume)
                if winner is None:
                    attempt.begin(leased=True)
                    commit.remove_superseded(folder, attempt.id)
                    return run
            except BaseException:
                run.end()
                raise
            lease.release()
        else:
            winner = Result.at(folder).attempt
            _winner(folder, resume)  # refuses it without `resume`
    logger.info("%s: committed before by %s", folder.url, commit.who(folder, winner))
    commit.copy_for_people(folder)
    _tidy(folder, winner, cell)
    return Run(folder, None, None)


def _acquired(
    folder: Folder, attempt: Attempt, cell: LeaseCell, resume: bool, seconds: float
) -> Lease | None:
    terms = Terms(url=folder.url, seconds=seconds, wait=resume, who=partial(commit.who, folder))
    try:
        with commit.can_hold_results(folder):
            return acquire(cell, attempt.id, terms, finish=partial(commit.finish, folder))
    except BaseException:
        attempt.abandon()
        raise


def _winner(folder: Folder, resume: bool) -> str | None:
    """Return the attempt that has committed, if any; refuse an output with no room for this run."""
    names = folder.names()
    if resume and MANIFEST in names:
        return Result.at(folder).attempt
    commit.refuse_taken(folder, names - {ATTEMPTS, CHECKPOINTS})
    if not resume and CHECKPOINTS in names and checkpoint_names(folder):
        raise UserError(
            f"{folder.url} holds the checkpoints of an unfinished run",
            remedy=commit.RESUME_OR_OTHER,
        )
    return None


def _tidy(folder: Folder, winner: str, cell: LeaseCell | None = None) -> None:
    """Remove what is no longer needed once `winner` has committed."""
    try:
        folder.remove(CHECKPOINTS)
        commit.remove_superseded(folder, winner)
        for each in (folder, folder.below(MODEL)):
            each.remove_abandoned_parts()
        if cell is not None and (stale := cell.read()) is not None:
            cell.remove(stale)
    except Exception as error:
        logger.warning("%s: not all that is left over was removed: %s", folder.url, line_of(error))

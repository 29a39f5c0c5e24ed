"""Write a run's results so that they are complete or absent.

    OUT/_attempts/<attempt>/model/model.safetensors    what a run writes
    OUT/_attempts/<attempt>/model/model.json
    OUT/_attempts/<attempt>/sweep.json
    OUT/manifest.json                                  the commit: attempt, files, sha256
    OUT/model/..., OUT/sweep.json                      plain copies, for people

The manifest is created only if there is none, in one step, and never changes. Readers follow
it and verify what they read, so they see nothing of a run that has not committed, and a late
writer cannot change a result.

A run that holds a lease commits in two steps. It writes the manifest among its own files, and
then *decides*: the lease is replaced by one that says so, on condition that it is still this
run's. Whoever comes next can complete the rest (`finish`). So a run that has lost its lease
cannot commit, whatever its clock says and however long it has paused.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from gmm_dist.errors import Option, UserError, Words
from gmm_dist.model.mixture import Mixture
from gmm_dist.runs import model_folder
from gmm_dist.runs.compare_and_swap import cell_at
from gmm_dist.runs.folder import Folder, sync
from gmm_dist.runs.json_files import (
    FORMAT_VERSION,
    FileEntry,
    name_within,
    parse,
    parse_plain,
    to_json,
    whole,
)
from gmm_dist.runs.lease import Lease, LeaseLost
from gmm_dist.runs.model_folder import Provenance
from gmm_dist.storage import explained, line_of, patiently

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
ATTEMPTS = "_attempts"
MODEL = "model"
LEASE = "lease"
WHO = "attempt.json"

OTHER_OUTPUT = "pass another " + Option("output")
RESUME_OR_OTHER = (
    "pass " + Option("resume", True) + " to go on with it, or another " + Option("output")
)


@contextmanager
def claim(url: str) -> Iterator[Attempt]:
    """Open an attempt at the output `url`, before any work is done; it holds no lease.

    Leaving the block without `Attempt.commit` removes all that the attempt wrote, and the
    folders that it made. Meant for local disks, object stores and `memory://`: folders are
    made on local disks only.

    Raises:
        UserError: the place holds a result or other files already, cannot be written to, or
            cannot create a file only if there is none.
    """
    folder = Folder.of(url)
    attempt = Attempt(folder)
    with explained(folder.url):
        refuse_taken(folder, folder.names() - {ATTEMPTS})
    try:
        attempt.begin()
        yield attempt
    finally:
        if not attempt.committed:
            attempt.abandon()


def refuse_taken(folder: Folder, names: set[str]) -> None:
    """Raise UserError when `names`, which are in the folder, leave no room for a result."""
    if names == {""}:
        what = "is a file, and results need a folder"
    elif MANIFEST in names:
        what = f"already holds a committed result ({MANIFEST})"
    elif names:
        what = f"is not empty ({len(names)} entries, first {min(names)!r})"
    else:
        return
    raise UserError(f"{folder.url} {what}", remedy=OTHER_OUTPUT + ", or delete it first")


@contextmanager
def can_hold_results(folder: Folder) -> Iterator[None]:
    """Turn a failure to write the first file into a UserError.

    Read-only disks, file systems without hard links, stores without conditions fail so.
    """
    try:
        yield
    except OSError as error:
        reason = line_of(error)
        raise UserError(
            f"{folder.url} cannot hold results ({reason})", remedy=OTHER_OUTPUT
        ) from error


class Attempt:
    """Write one run's results to a place of their own, and commit them in one step.

    `id` names the attempt: the UTC time it began and a random part. `lease`, if set before
    `begin`, fences the commit. Made by `claim`, or by `runs.claim`.
    """

    def __init__(self, folder: Folder) -> None:
        self.id = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
        self.committed = False
        self.lease: Lease | None = None
        self._folder = folder
        self._home = folder.below(ATTEMPTS, self.id)
        self._files: dict[str, FileEntry] = {}
        home = Path(self._home.path)
        self._made = (
            [folder for folder in (home, *home.parents) if not folder.exists()]
            if folder.is_local
            else []
        )
        self._undecided = False

    @property
    def is_undecided(self) -> bool:
        """Say whether a manifest may name the attempt, or come to do so."""
        return self._undecided

    def begin(self, *, leased: bool = False) -> None:
        """Write the attempt's first file the way the manifest will be written.

        So whatever would make the commit fail at the end (rights, credentials, a store that
        ignores the condition) fails before the work. Later holders of the lease may remove
        `leased` attempts.

        Raises:
            UserError: the place cannot be written to, or cannot create a file only if there is
                none.
        """
        with can_hold_results(self._folder), explained(self._folder.url):
            self._begin(leased)

    def _begin(self, leased: bool) -> None:
        if self._home.is_local:
            Path(self._home.path).mkdir(parents=True)
        facts = {"attempt": self.id, "host": socket.gethostname(), "pid": os.getpid()}
        who = to_json(facts | {"began": datetime.now(UTC).isoformat(), "leased": leased})
        _create(self._home, WHO, who, scratch=self._home)  # There now, be an answer lost or not.
        if _create(self._home, WHO, who, scratch=self._home):
            raise UserError(
                f"{self._folder.url} overwrites files where create-if-absent was asked for, so "
                "two runs could destroy each other's results",
                remedy=OTHER_OUTPUT + ", on S3 or a local disk",
            )

    def write(self, name: str, data: bytes) -> None:
        """Write one file of the result; `name` is its path below the output."""
        with explained(self._folder.url):
            self._home.write(data, name)
        self._files[name] = FileEntry.of(data)

    def write_json(self, name: str, value: object) -> None:
        """Write one file of the result as strict JSON, see `to_json`."""
        self.write(name, to_json(value))

    def write_model(self, mixture: Mixture, provenance: Provenance) -> None:
        """Write the model folder; equal parameters give an equal model.safetensors."""
        for name, data in model_folder.dump(mixture, provenance).items():
            self.write(f"{MODEL}/{name}", data)

    def commit(self) -> None:
        """Make the attempt's files the result, all at once, and copy them for people.

        Raises:
            UserError: another run has committed to this output before.
            LeaseLost: another attempt has taken the run over.
        """
        manifest = to_json(
            {
                "format_version": FORMAT_VERSION,
                "attempt": self.id,
                "files": {name: asdict(entry) for name, entry in self._files.items()},
            }
        )
        with explained(self._folder.url):
            if self.lease is not None:
                self._home.write(manifest, MANIFEST)
            self._sync_files()
            self._decide()
            winner = self._settle(manifest)
            self._undecided = False
            if winner != self.id:
                raise UserError(
                    f"{self._folder.url}: another run committed its result (attempt {winner}) "
                    f"while this one (attempt {self.id}) was at work",
                    remedy="use that result, or " + OTHER_OUTPUT,
                )
            self.committed = True
            self._sync_folders()
        copy_for_people(self._folder)

    def _decide(self) -> None:
        if self.lease is None:
            return
        self._undecided = True
        try:
            self.lease.decide()
        except LeaseLost:
            self._undecided = False
            raise

    def _settle(self, manifest: bytes) -> str:
        """Create the manifest if there is none, and return the attempt that it names."""
        decided, self._undecided = self._undecided, True
        try:
            # If there is one already, it is our own if the answer to an earlier try was lost.
            _create(self._folder, MANIFEST, manifest, scratch=self._home)
        except Exception:
            # A disk shows whether it is there; a request to a store may still be under way.
            is_absent = self._folder.is_local and self._folder.read(MANIFEST) is None
            self._undecided = decided or not is_absent
            raise
        return Result.at(self._folder).attempt

    def _sync_files(self) -> None:
        """Push the attempt's files to the disk: a manifest must not outlive what it names."""
        if self._home.is_local:
            home = Path(self._home.path)
            for path in (*home.rglob("*"), home, home.parent):
                sync(path)

    def _sync_folders(self) -> None:
        """Push the manifest's name, and those of the folders that were made, to the disk."""
        if self._folder.is_local:
            for path in {Path(self._folder.path), *(folder.parent for folder in self._made)}:
                sync(path)

    def abandon(self) -> None:
        """Remove the attempt's files, and the folders that it made and nobody else uses."""
        if self._undecided:
            # To remove files that a manifest may name would destroy a committed result.
            logger.warning(
                "%s: unknown whether attempt %s was committed; its files stay in %s",
                *(self._folder.url, self.id, self._home.path),
            )
            return
        try:
            self._home.remove()
        except Exception as error:
            # Never in place of the error that ended the run.
            logger.warning(
                "%s: %s was not removed: %s", self._folder.url, self._home.path, line_of(error)
            )
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()


def _create(folder: Folder, name: str, data: bytes, *, scratch: Folder) -> bool:
    """Create a file with all of its bytes in one step if there is none; say whether there was none.

    Where an answer was lost, the file that is there may be ours.
    """
    cell = cell_at(folder, name, timeout=None, scratch=scratch)
    return patiently(partial(cell.swap, None, data), folder.url) is not None


def finish(folder: Folder, attempt: str) -> None:
    """Complete the commit of an attempt that had decided to; several processes may at once.

    Raises:
        UserError: the attempt's manifest is gone.
    """
    manifest = folder.read(ATTEMPTS, attempt, MANIFEST)
    if manifest is None:
        raise UserError(
            f"{folder.url}: attempt {attempt} had decided to commit, and its {MANIFEST} is gone",
            remedy="delete the output and run again, or " + OTHER_OUTPUT,
        )
    _create(folder, MANIFEST, manifest, scratch=folder.below(ATTEMPTS, attempt))
    if folder.is_local:
        sync(Path(folder.path))
    logger.info("%s: completed the commit of attempt %s", folder.url, attempt)


def who(folder: Folder, attempt: str) -> str:
    """Describe an attempt in messages: host, process and the time it began."""
    try:
        facts = parse_plain(folder.read(ATTEMPTS, attempt, WHO) or b"{}", WHO, folder.url)
        return f"attempt {attempt}, process {facts['pid']} on {facts['host']}, {facts['began']}"
    except (OSError, ValueError, KeyError):
        return f"attempt {attempt}"


def remove_superseded(folder: Folder, winner: str) -> None:
    """Remove what earlier holders of the lease left: none of them can commit any more.

    Attempts without a lease are left alone: they may be at work.
    """
    for name in sorted(folder.below(ATTEMPTS).names() - {winner, LEASE}):
        data = folder.read(ATTEMPTS, name, WHO)
        if data is None:  # begun a moment ago, or by a process that was killed in that moment
            folder.remove_abandoned(ATTEMPTS, name)
            continue
        with suppress(ValueError):
            if parse_plain(data, WHO, folder.url).get("leased"):
                folder.remove(ATTEMPTS, name)


def repair(url: str) -> tuple[str, ...]:
    """Make the copies of a committed result again where they are missing or differ.

    Returns:
        The names of the files that were made again.

    Raises:
        UserError: nothing is committed at `url`, or a committed file is missing or damaged.
    """
    folder = Folder.of(url)
    with explained(folder.url):
        return _make_copies(Result.at(folder))


def copy_for_people(folder: Folder) -> None:
    """Make the copies of a committed result, or warn: our readers need none."""
    try:
        _make_copies(Result.at(folder))
    except Exception as error:
        logger.warning("%s: no copies for people were made: %s", folder.url, line_of(error))


def _make_copies(result: Result) -> tuple[str, ...]:
    for name in result.files:
        _refuse_link(result.folder, name)
    stale = [
        name for name, entry in result.files.items() if not entry.fits(result.folder.read(name))
    ]
    for name in stale:
        result.folder.write(result.read(name), name)
    return tuple(stale)


def _of_result(name: str, url: str) -> str:
    """Return a name that a manifest lists, if it can be that of a result's file."""
    name_within(name, MANIFEST, url)
    if name == MANIFEST or name.split("/")[0].startswith("_"):
        raise ValueError(f"{name} is no file of a result")
    return name


def _refuse_link(folder: Folder, *parts: str) -> None:
    if folder.leads_out(*parts):
        raise UserError(
            f"{folder.url}: {'/'.join(parts)} leads out of the folder by a link, where a manifest "
            "has no say: put the files themselves in its place"
        )


@dataclass(frozen=True)
class Result:
    """What a manifest says: the attempt that committed, and its files."""

    folder: Folder
    attempt: str
    files: Mapping[str, FileEntry]

    @classmethod
    def at(cls, folder: Folder) -> Result:
        result = cls.find(folder)
        if result is None:
            raise UserError(nothing_at(folder))
        return result

    @classmethod
    def find(cls, folder: Folder) -> Result | None:
        data = folder.read(MANIFEST)
        if data is None:
            return None
        content = parse(data, MANIFEST, folder.url)
        with whole(MANIFEST, folder.url):
            files = {
                _of_result(name, folder.url): FileEntry(**entry)
                for name, entry in content["files"].items()
            }
            attempt = name_within(content["attempt"], MANIFEST, folder.url)
            if "/" in attempt:
                raise ValueError(f"the attempt {attempt}")
            return cls(folder, attempt, files)

    def read(self, name: str) -> bytes:
        """Return a file's verified bytes, the attempt's own or else those of its copy."""
        if name not in self.files:
            raise UserError(
                f"{self.folder.url}: {MANIFEST} lists no {name!r} but {', '.join(self.files)}: "
                "pass the output of a run that wrote one"
            )
        # People tidy away folders whose names begin with an underscore: equal bytes will do.
        for parts in ((ATTEMPTS, self.attempt, name), (name,)):
            _refuse_link(self.folder, *parts)
            data = self.folder.read(*parts)
            if data is not None and self.files[name].fits(data):
                return data
        raise UserError(
            f"{self.folder.url}: {name} is missing or damaged (no copy fits {MANIFEST}'s sha256)",
            remedy=f"restore {ATTEMPTS}/{self.attempt}/{name}, or run again with another "
            + Option("output"),
        )


def nothing_at(folder: Folder) -> Words:
    """Say why nothing can be read from a place without a manifest."""
    if ATTEMPTS in folder.names():
        return (
            f"{folder.url} holds unfinished attempts and no {MANIFEST}: the run is at work, or "
            "died before its commit; wait for it, or run it again"
        )
    return (
        f"{folder.url} holds no result, neither {MANIFEST} nor {model_folder.CARD}: pass the "
        + Option("output")
        + " of a run that has finished, or its model folder"
    )

"""Where scores go: a folder of files beside the lake's own, or a Delta table.

    OUT/<path in the lake>                     a scored file, whole whenever it is there
    OUT/_scored/                               the run's own files
or, of a Delta table,
    OUT/scores-<file's number>-<run>.parquet   a scored file, seen by readers once the log has it
    OUT/_scored/runs/<run>/                    the run's own files

Readers of folders, and a table's VACUUM, pass over names with an underscore in front.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass

from gmm_dist.lake.listing import LakeFile
from gmm_dist.runs.checkpoint import CHECKPOINTS
from gmm_dist.runs.folder import Folder
from gmm_dist.storage import absolute, join
from gmm_dist.urls import reveal

HOME = "_scored"
_RUNS = "runs"
_RECORDS = "files"
_DIGITS = 16  # of a run's key, in names
_OF_A_RUN = re.compile(rf"scores-\d+-[0-9a-f]{{{_DIGITS}}}\.parquet")


@dataclass(frozen=True, slots=True)
class Target:
    """An output of scores; `run` is the run's key where it is a Delta table: many write to that."""

    url: str
    run: str | None = None

    @property
    def folder(self) -> Folder:
        """The output."""
        return Folder.of(absolute(self.url))

    @property
    def home(self) -> Folder:
        """The folder, within the output, of the run's own files."""
        return self.folder.below(*self._home)

    @property
    def home_url(self) -> str:
        """The URL of `home`."""
        return join(absolute(self.url), *self._home)

    def runs(self) -> list[Target]:
        """Return the output as each run sees it that has files of its own there."""
        keys = self.folder.below(HOME, _RUNS).names()
        return [Target(self.url, key) for key in sorted(keys)]

    @property
    def records(self) -> Folder:
        """The folder of the records of finished files."""
        return self.home.below(CHECKPOINTS, _RECORDS)

    @property
    def _home(self) -> tuple[str, ...]:
        return (HOME,) if self.run is None else (HOME, _RUNS, self.run[:_DIGITS])

    def path(self, file: LakeFile, number: int) -> str:
        """Return the path of the scores of a plan's file, which has such a number there."""
        if self.run is None:
            return scored_path(file)
        return f"scores-{number:05d}-{self.run[:_DIGITS]}.parquet"

    def others(self, names: set[str]) -> set[str]:
        """Return those of the names in the output that no run of scoring has made."""
        others = names - {HOME}
        if self.run is None or HOME not in names:
            return others
        return {name for name in others if not _OF_A_RUN.fullmatch(name)}


def scored_path(file: LakeFile) -> str:
    """Return the path of a data file's scores within a folder: as in the lake, if it lies there.

    For files elsewhere, such as those of a shallow clone, there is the folder `outside`.
    """
    if file.entry is None or not file.entry.is_outside:
        return file.path
    number = hashlib.sha256(os.fsencode(reveal(file.path))).hexdigest()[:_DIGITS]
    return f"outside/{number}/{file.path.rpartition('/')[2]}"

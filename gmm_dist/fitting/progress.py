"""The progress that a fit reports; the command line shows it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from gmm_dist.selection.starts import SearchProgress
from gmm_dist.selection.sweep import Standing


class FitProgress(Protocol):
    """Receives the progress of a fit."""

    def shown(self) -> AbstractContextManager[None]:
        """Return a context in which it is shown."""

    def loading(self, done: int, n_shards: int, n_rows: int) -> None:
        """Note how many shards are loaded, and their rows so far."""

    def starting(self, n_init: int) -> None:
        """Note that restarts run on a sample."""

    def searching(self, progress: SearchProgress) -> None:
        """Note how far the search for starts is."""

    def merging(self, done: int, n_passes: int) -> None:
        """Note how many passes of those that merge components into clusters are done."""

    def resampling(self, what: str, done: int, n: int) -> None:
        """Note how much of what resampling consists of is done, and of how much."""

    def resuming(self, number: int) -> None:
        """Note after which pass the run resumes."""

    def standings(self, standings: Sequence[Standing]) -> None:
        """Note where each candidate stands after a pass over the rows."""


class Silent:
    """Shows nothing."""

    def shown(self) -> AbstractContextManager[None]:
        return nullcontext()

    def loading(self, done: int, n_shards: int, n_rows: int) -> None: ...

    def starting(self, n_init: int) -> None: ...

    def searching(self, progress: SearchProgress) -> None: ...

    def merging(self, done: int, n_passes: int) -> None: ...

    def resampling(self, what: str, done: int, n: int) -> None: ...

    def resuming(self, number: int) -> None: ...

    def standings(self, standings: Sequence[Standing]) -> None: ...

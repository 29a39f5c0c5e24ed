"""Progress of a fit: a live table on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gmm_dist.commands.talking import bearing
from gmm_dist.formats import counted
from gmm_dist.selection.starts import SearchProgress
from gmm_dist.selection.sweep import Standing

logger = logging.getLogger("gmm_dist.commands.progress")

_LOG_SECONDS = 1.0  # between two log lines of loading or scoring
_SEARCH_SECONDS = 5.0  # of searching


class Progress:
    """Shows where a job stands; one object for the whole run."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._passes = 0
        self._last_line = -_LOG_SECONDS

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Keep the live display up, where there is a terminal to show it on."""
        if not self._console.is_terminal or self._console.is_dumb_terminal:
            yield
            return
        live = Live(console=self._console, transient=True, refresh_per_second=8)
        with bearing():
            live.start()
            self._live = live
        try:
            yield
        finally:
            self._live = None
            with bearing():
                live.stop()

    def loading(self, done: int, n_shards: int, n_rows: int) -> None:
        """Show how many shards are loaded, and their rows so far."""
        self._advance(
            f"loaded {done} of {counted(n_shards, 'shard')}, {counted(n_rows, 'row')}",
            done,
            n_shards,
        )

    def scoring(self, done: int, n_files: int, n_rows: int) -> None:
        """Show how many files are scored, and their rows so far."""
        line = f"scored {done:,} of {counted(n_files, 'file')}, {counted(n_rows, 'row')}"
        self._advance(line, done, n_files)

    def _advance(self, line: str, done: int, total: int, *, seconds: float = _LOG_SECONDS) -> None:
        if self._live is not None:
            self._draw(Group(Text(line), ProgressBar(total=total, completed=done)))
        elif done == total or time.monotonic() - self._last_line > seconds:
            self._last_line = time.monotonic()
            logger.info("%s", line)

    def starting(self, n_init: int) -> None:
        """Say that restarts run on a sample."""
        self._say(f"choosing the best of {counted(n_init, 'start')} on a sample")

    def searching(self, progress: SearchProgress) -> None:
        """Show how far the search for starts is."""
        done, n = progress.n_done, progress.n_candidates
        passes = counted(progress.n_passes, "pass")
        line = f"searched {done} of {counted(n, 'candidate')} in {passes} over samples"
        if progress.seconds_left is not None and done < n:
            line += f", about {progress.seconds_left:.0f} s left"
        self._advance(line, done, n, seconds=_SEARCH_SECONDS)

    def merging(self, done: int, n_passes: int) -> None:
        """Show how many passes of those that merge components are done."""
        self._advance(f"merging components: {done} of {counted(n_passes, 'pass')}", done, n_passes)

    def resampling(self, what: str, done: int, n: int) -> None:
        """Show how far the resampling is."""
        self._advance(f"{what}: {done} of {n:,}", done, n)

    def resuming(self, number: int) -> None:
        """Say after which pass the run goes on, and count from there; 0: in the search."""
        self._passes = number
        self._say(f"resuming after pass {number}" if number else "resuming the search for starts")

    def _say(self, line: str) -> None:
        if self._live is not None:
            self._draw(Text(line))
        else:
            logger.info("%s", line)

    def _draw(self, what: RenderableType) -> None:
        assert self._live is not None
        with bearing():
            self._live.update(what)

    def standings(self, standings: Sequence[Standing]) -> None:
        """Show each candidate after a pass over the rows."""
        self._passes += 1
        if self._live is not None:
            self._draw(_standings_table(standings, self._passes))
            return
        running = [s for s in standings if s.is_running]
        shown = ", ".join(
            f"k={s.candidate.k} {s.candidate.covariance_type} {_bound(s)} ({s.precision})"
            for s in (running or standings)[:4]
        )
        logger.info(
            "pass %d: %d of %d running; mean log-likelihood: %s%s",
            self._passes,
            len(running),
            len(standings),
            shown,
            ", ..." if len(running or standings) > 4 else "",
        )


def _bound(standing: Standing) -> str:
    # Not yet scored: the first pass is being repeated in a better precision.
    return "..." if math.isnan(standing.lower_bound) else f"{standing.lower_bound:.6f}"


def _standings_table(standings: Sequence[Standing], passes: int) -> RenderableType:
    table = Table(title=f"pass {passes}", title_justify="left", box=None)
    for name in ("k", "covariance", "state", "iteration", "mean log-likelihood"):
        table.add_column(name, justify="left" if name in ("covariance", "state") else "right")
    for s in standings:
        state = f"running, {s.precision}" if s.is_running else "done"
        row = (str(s.candidate.k), s.candidate.covariance_type, state, str(s.n_iter))
        table.add_row(*row, _bound(s), style="" if s.is_running else "dim")
    return table

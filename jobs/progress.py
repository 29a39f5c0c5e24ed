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

from gmm_dist.sweep import Standing, SweepResult

logger = logging.getLogger("gmm_dist.progress")

_LOG_SECONDS = 1.0  # between two log lines of loading


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
        if not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, transient=True, refresh_per_second=8) as self._live:
            yield
        self._live = None

    def loading(self, done: int, n_shards: int, n_rows: int) -> None:
        """Show how many shards are loaded, and their rows so far."""
        line = f"loaded {done} of {n_shards} shards, {n_rows:,} rows"
        if self._live is not None:
            self._live.update(Group(Text(line), ProgressBar(total=n_shards, completed=done)))
        elif done == n_shards or time.monotonic() - self._last_line > _LOG_SECONDS:
            self._last_line = time.monotonic()
            logger.info("%s", line)

    def starting(self, n_init: int) -> None:
        """Say that restarts run on a sample."""
        line = f"choosing the best of {n_init} starts on a sample"
        if self._live is not None:
            self._live.update(Text(line))
        else:
            logger.info("%s", line)

    def standings(self, standings: Sequence[Standing]) -> None:
        """Show each candidate after a pass over the rows."""
        self._passes += 1
        if self._live is not None:
            self._live.update(_standings_table(standings, self._passes))
            return
        running = [s for s in standings if s.is_running]
        shown = ", ".join(
            f"k={s.candidate.k} {s.candidate.covariance_type} {_bound(s)}"
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


def ranking(result: SweepResult) -> Table:
    """Return the ranked table of a sweep, best first."""
    table = Table(box=None, pad_edge=False)
    for name in ("rank", "k", "covariance", "BIC", "AIC", "ICL", "mean log-lik.", "iter."):
        table.add_column(name, justify="left" if name == "covariance" else "right", no_wrap=True)
    table.add_column("status", overflow="fold")
    for rank, s in enumerate(result.ranked, start=1):
        best = s is result.best
        table.add_row(
            str(rank) if s.fit.is_ranked else "-",
            str(s.candidate.k),
            s.candidate.covariance_type,
            f"{s.bic:,.1f}",
            f"{s.aic:,.1f}",
            f"{s.icl:,.1f}",
            f"{s.fit.log_likelihood / result.n_samples:.6f}",
            str(s.fit.n_iter),
            s.fit.status.value,
            style="bold" if best else "" if s.fit.is_ranked else "dim",
        )
    return table

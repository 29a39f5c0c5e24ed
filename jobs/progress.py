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

from gmm_dist.em import Status
from gmm_dist.selection import Scored, SweepResult
from gmm_dist.sweep import Standing

logger = logging.getLogger("gmm_dist.progress")

_LOG_SECONDS = 1.0  # between two log lines of loading or scoring


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
        self._advance(f"loaded {done} of {n_shards} shards, {n_rows:,} rows", done, n_shards)

    def scoring(self, done: int, n_files: int, n_rows: int) -> None:
        """Show how many files are scored, and their rows so far."""
        self._advance(f"scored {done:,} of {n_files:,} files, {n_rows:,} rows", done, n_files)

    def _advance(self, line: str, done: int, total: int) -> None:
        if self._live is not None:
            self._live.update(Group(Text(line), ProgressBar(total=total, completed=done)))
        elif done == total or time.monotonic() - self._last_line > _LOG_SECONDS:
            self._last_line = time.monotonic()
            logger.info("%s", line)

    def starting(self, n_init: int) -> None:
        """Say that restarts run on a sample."""
        self._say(f"choosing the best of {n_init} starts on a sample")

    def resuming(self, number: int) -> None:
        """Say after which pass the run goes on, and count from there."""
        self._passes = number
        self._say(f"resuming after pass {number}")

    def _say(self, line: str) -> None:
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


def ranking(result: SweepResult, width: int) -> Table:
    """Return the ranked table of a sweep, best first; a narrow one has fewer columns."""
    table = Table(box=None, pad_edge=False)
    columns = _columns(width, has_holdout=any(s.holdout is not None for s in result.scored))
    for name in columns:
        left = name in ("covariance", "status")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for rank, s in enumerate(result.ranked, start=1):
        cells = {
            "rank": str(rank) if s.fit.is_ranked else "-",
            "k": str(s.candidate.k),
            "covariance": s.candidate.covariance_type,
            "BIC": f"{s.bic:,.1f}",
            "AIC": f"{s.aic:,.1f}",
            "ICL": f"{s.icl:,.1f}",
            "mean log-lik.": f"{s.fit.log_likelihood / result.n_samples:.6f}",
            "held-out": "-" if s.holdout is None else f"{s.holdout:.6f}",
            "starts": _starts(s),
            "iter.": str(s.fit.n_iter),
            "status": s.fit.status.name.lower(),
        }
        style = "bold" if s is result.best else "" if s.fit.is_ranked else "dim"
        table.add_row(*(cells[name] for name in columns), style=style)
    return table


def _columns(width: int, *, has_holdout: bool) -> list[str]:
    criteria = ["BIC", "AIC", "ICL"] if width >= 110 else ["BIC"]
    likelihoods = ["mean log-lik.", "held-out"] if has_holdout else ["mean log-lik."]
    starts = ["starts"] if width >= 110 else []
    return ["rank", "k", "covariance", *criteria, *likelihoods, *starts, "iter.", "status"]


def _starts(scored: Scored) -> str:
    """Say how many starts were fitted on all rows, and how many of them fell behind."""
    dropped = scored.outcome.n_dropped
    return f"{scored.outcome.n_starts}" + (f", {dropped} dropped" if dropped else "")


def notes(result: SweepResult) -> list[str]:
    """Return the sentence of each status that is not plain convergence, with whom it concerns."""
    concerned: dict[Status, list[str]] = {}
    for s in result.scored:
        if s.fit.status is not Status.CONVERGED:
            name = f"k={s.candidate.k} {s.candidate.covariance_type}"
            concerned.setdefault(s.fit.status, []).append(name)
    lines = [f"{', '.join(names)}: {status.value}" for status, names in concerned.items()]
    return [*lines, _economy(result)]


def _economy(result: SweepResult) -> str:
    """Say what the fits took of passes, and what was spared."""
    dropped = sum(s.outcome.n_dropped for s in result.scored)
    saved = sum(s.outcome.passes_saved for s in result.scored)
    line = f"{result.n_passes} passes over all rows"
    if dropped:
        n_starts = sum(s.outcome.n_starts for s in result.scored)
        line += f"; {dropped} of {n_starts} starts fell behind another and were dropped early"
    if saved >= 1:
        line += f"; leaping ahead saved at least {saved:,.0f} iterations of EM"
    return line

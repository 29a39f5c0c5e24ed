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
from talking import bearing

from gmm_dist.em.loop import Status
from gmm_dist.formats import counted
from gmm_dist.selection.ranking import Scored, SweepResult
from gmm_dist.selection.sweep import Standing

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

    def _advance(self, line: str, done: int, total: int) -> None:
        if self._live is not None:
            self._draw(Group(Text(line), ProgressBar(total=total, completed=done)))
        elif done == total or time.monotonic() - self._last_line > _LOG_SECONDS:
            self._last_line = time.monotonic()
            logger.info("%s", line)

    def starting(self, n_init: int) -> None:
        """Say that restarts run on a sample."""
        self._say(f"choosing the best of {counted(n_init, 'start')} on a sample")

    def resuming(self, number: int) -> None:
        """Say after which pass the run goes on, and count from there."""
        self._passes = number
        self._say(f"resuming after pass {number}")

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


_PER_ROW = "mean log-likelihood,\nnats per row"  # on two lines: most terminals have 80 columns
_ALL = ("rank", "k", "covariance", "BIC", "AIC", "ICL", _PER_ROW, "held-out", "starts")
_MOST = ("AIC", "ICL", "starts")  # what a narrow table goes without


def ranking(result: SweepResult, width: int) -> RenderableType:
    """Return the ranked candidates, best first: as a table where there is room, else a list.

    No number is cut: a table that does not fit has fewer columns, and then none.
    """
    names = [*_ALL, "iter.", "status"]
    if all(s.holdout is None for s in result.scored):
        names.remove("held-out")
    rows = [(_cells(s, rank), _style(s, result)) for rank, s in _ranks(result)]
    for columns in (names, [name for name in names if name not in _MOST]):
        if _natural_width(columns, rows) <= width:
            return _table(columns, rows)
    return _list(names, rows)


_Rows = Sequence[tuple[dict[str, str], str]]


def _ranks(result: SweepResult) -> Iterator[tuple[str, Scored]]:
    for rank, s in enumerate(result.ranked, start=1):
        yield str(rank) if s.fit.is_ranked else "-", s


def _style(scored: Scored, result: SweepResult) -> str:
    return "bold" if scored is result.best else "" if scored.fit.is_ranked else "dim"


def _cells(s: Scored, rank: str) -> dict[str, str]:
    return {
        "rank": rank,
        "k": str(s.candidate.k),
        "covariance": s.candidate.covariance_type,
        "BIC": f"{s.bic:,.1f}",
        "AIC": f"{s.aic:,.1f}",
        "ICL": f"{s.icl:,.1f}",
        _PER_ROW: f"{s.mean_log_likelihood:.6f}",
        "held-out": "-" if s.holdout is None else f"{s.holdout:.6f}",
        "starts": _starts(s),
        "iter.": str(s.fit.n_iter),
        "status": s.fit.status.name.lower(),
    }


def _natural_width(columns: Sequence[str], rows: _Rows) -> int:
    widths = [
        max(map(len, [*name.split("\n"), *(cells[name] for cells, _ in rows)])) for name in columns
    ]
    return sum(widths) + 2 * len(widths)  # two spaces after each


def _table(columns: Sequence[str], rows: _Rows) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in columns:
        left = name in ("covariance", "status")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for cells, style in rows:
        table.add_row(*(cells[name] for name in columns), style=style)
    return table


def _list(names: Sequence[str], rows: _Rows) -> Group:
    """Return a few lines for each candidate, one for each number."""
    lines = []
    for cells, style in rows:
        head = f"{cells['rank']}. k={cells['k']} {cells['covariance']}"
        lines.append(Text(head, style=style))
        texts = "\n".join(f"{name} {cells[name]}" for name in names[3:])
        lines += [Text(f"  {line}", style=style) for line in texts.split("\n")]
    return Group(*lines)


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
    line = f"{counted(result.n_passes, 'pass')} over all rows"
    if dropped:
        n_starts = sum(s.outcome.n_starts for s in result.scored)
        fell = "fell behind another and was" if dropped == 1 else "fell behind others and were"
        line += f"; {dropped} of {counted(n_starts, 'start')} {fell} dropped early"
    if saved >= 1:
        line += f"; leaping ahead saved at least {counted(saved, 'iteration')} of EM"
    return line

"""The table of ranked candidates, and the lines below it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gmm_dist.commands.talking import bearing, say, screen
from gmm_dist.em.lane import Status
from gmm_dist.formats import count, counted, share
from gmm_dist.model.bootstrap import Win
from gmm_dist.model.clusters import spell_clusters, spell_stability
from gmm_dist.model.mixture import Mixture
from gmm_dist.report.description import arrays_of, described
from gmm_dist.selection.ranking import Candidate, RankedCandidate, SweepResult
from gmm_dist.selection.table import ABSENT, COLUMNS, ranks

# As in `selection.table`, or shorter: most terminals have 80 columns.
_SHOWN = {
    "rank": "rank",
    **{name: COLUMNS[name].head for name in ("k", "covariance_type", "bic", "aic", "icl")},
    "mean_log_likelihood": COLUMNS["mean_log_likelihood"].head + ",\nnats per row",
    "holdout": COLUMNS["holdout"].head,
    "wins": "resamples\nwon",
    "n_starts": COLUMNS["n_starts"].head,
    "n_iter": "iter.",
    "status": COLUMNS["status"].head,
}

_NARROW = 100  # columns: there, what sets clusters apart takes several lines
_MOST_CLUSTERS = 15

_MOST = ("aic", "icl", "n_starts")  # what a narrow table goes without


def ranking(result: SweepResult, width: int, wins: Sequence[Win] = ()) -> RenderableType:
    """Return the ranked candidates, best first: as a table where there is room, else a list.

    No number is cut: a table that does not fit has fewer columns, and then none. `wins` are in how
    many resamples each would have been the best.
    """
    names = list(_SHOWN)
    if all(s.holdout is None for s in result.scored):
        names.remove("holdout")
    if not wins:
        names.remove("wins")
    won = {Candidate(win.k, win.covariance_type): win.n for win in wins}
    rows = [
        (_cells(s, rank) | {"wins": str(won.get(s.candidate, 0))}, _style(s, result))
        for rank, s in ranks(result)
    ]
    for columns in (names, [name for name in names if name not in _MOST]):
        if _natural_width(columns, rows) <= width:
            return _table(columns, rows)
    return _list(names, rows)


_Rows = Sequence[tuple[dict[str, str], str]]


def _style(scored: RankedCandidate, result: SweepResult) -> str:
    return "bold" if scored is result.best else "" if scored.fit.is_ranked else "dim"


def _cells(s: RankedCandidate, rank: int | None) -> dict[str, str]:
    shown = {name: COLUMNS[name] for name in _SHOWN if name in COLUMNS}
    cells = {name: column.text(column.value(s)) for name, column in shown.items()}
    return {"rank": ABSENT if rank is None else str(rank)} | cells | {"n_starts": _starts(s)}


def _natural_width(columns: Sequence[str], rows: _Rows) -> int:
    widths = [
        max(map(len, [*_SHOWN[name].split("\n"), *(cells[name] for cells, _ in rows)]))
        for name in columns
    ]
    return sum(widths) + 2 * len(widths)  # two spaces after each


def _table(columns: Sequence[str], rows: _Rows) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in columns:
        left = name in ("covariance_type", "status")
        table.add_column(_SHOWN[name], justify="left" if left else "right", no_wrap=True)
    for cells, style in rows:
        table.add_row(*(cells[name] for name in columns), style=style)
    return table


def _list(names: Sequence[str], rows: _Rows) -> Group:
    """Return a few lines for each candidate, one for each number."""
    lines = []
    for cells, style in rows:
        head = f"{cells['rank']}. k={cells['k']} {cells['covariance_type']}"
        lines.append(Text(head, style=style))
        texts = "\n".join(f"{_SHOWN[name]} {cells[name]}" for name in names[3:])
        lines += [Text(f"  {line}", style=style) for line in texts.split("\n")]
    return Group(*lines)


def _starts(scored: RankedCandidate) -> str:
    """Say how many starts were fitted on all rows, and how many of them fell behind."""
    dropped = scored.outcome.n_dropped
    return f"{scored.outcome.n_starts}" + (f", {dropped} dropped" if dropped else "")


def notes(result: SweepResult) -> list[str]:
    """Return a line for each status but plain convergence, with its candidates; and the passes."""
    concerned: dict[Status, list[str]] = {}
    for s in result.scored:
        if s.fit.status is not Status.CONVERGED:
            name = f"k={s.candidate.k} {s.candidate.covariance_type}"
            concerned.setdefault(s.fit.status, []).append(name)
    lines = [f"{', '.join(names)}: {status.value}" for status, names in concerned.items()]
    return [*lines, _economy(result)]


def _economy(result: SweepResult) -> str:
    """Say how many passes the fits took, and what was saved."""
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


def clusters_table(
    mixture: Mixture, n_samples: float, width: int, *, weighted: bool = False
) -> RenderableType:
    """Return a line for each cluster, the largest first: its share, and what sets it apart.

    `n_samples` are the rows, or if they are `weighted` the sum of their weights.
    """
    clusters = mixture.clusters
    assert clusters is not None
    every = described(arrays_of(mixture))
    stability = clusters.stability
    table = Table(box=None, pad_edge=False, width=width if width < _NARROW else None)
    counts = "weight" if weighted else "rows"
    for name in ("cluster", "share", counts, *(("stable",) if stability else ())):
        table.add_column(name, justify="left" if name == "stable" else "right", no_wrap=True)
    table.add_column("unlike its nearest: mean here (there)", justify="left")
    order = sorted(range(len(every)), key=lambda c: (-every[c].share, c))
    for c in order[:_MOST_CLUSTERS]:
        one = every[c]
        cells = [str(clusters.numbers[c]), share(one.share), count(round(one.share * n_samples))]
        if stability is not None:
            word = "yes" if stability.is_stable[c] else "no"
            cells.append(f"{word}, {stability.similarities[c]:.2f}")
        what = ABSENT if one.nearest is None else f"{clusters.numbers[one.nearest]}: {one.words}"
        table.add_row(*cells, what)
    if len(order) <= _MOST_CLUSTERS:
        return table
    return Group(table, Text(f"and {counted(len(order) - _MOST_CLUSTERS, 'smaller cluster')}"))


def on_resamples(mixture: Mixture) -> list[str]:
    """Return what resampled rows say of the fit and of its clusters, a line each."""
    lines = []
    if mixture.clusters is not None and mixture.clusters.stability is not None:
        clusters = mixture.clusters
        lines.append(f"{spell_clusters(clusters)}: {spell_stability(mixture.clusters.stability)}")
    if (bootstrap := mixture.bootstrap) is not None and bootstrap.n_used < bootstrap.n_resamples:
        n_lost = bootstrap.n_resamples - bootstrap.n_used
        lines.append(
            f"{n_lost} of {counted(bootstrap.n_resamples, 'resample')} had a component with too "
            "few rows, and are left out of standard errors and stability"
        )
    return lines


def print_table(
    result: SweepResult, warnings: Sequence[str], mixture: Mixture | None = None
) -> None:
    """Print the ranked table, what a reader of it should know, and the clusters; never fails."""
    bootstrap = None if mixture is None else mixture.bootstrap
    with bearing():
        console = screen()
        wins = () if bootstrap is None else bootstrap.wins
        console.print(ranking(result, console.width, wins))
    lines = [*notes(result), *(f"warning: {warning}" for warning in warnings)]
    for line in [*lines, *(() if mixture is None else on_resamples(mixture))]:
        say(line)
    if mixture is not None and mixture.clusters is not None:
        with bearing():
            weighted = result.n_samples != result.total.n_rows
            table = clusters_table(mixture, result.n_samples, console.width, weighted=weighted)
            console.print(table)

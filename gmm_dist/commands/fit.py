"""Fit one Gaussian mixture to a lake.

gmm-dist fit ./points --k 8 --output ./points-8
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

from gmm_dist.commands.ending import note, run, said_how_to_resume
from gmm_dist.commands.options import (
    CommandLine,
    Parser,
    add_bootstrap,
    add_clusters,
    add_common,
    add_title,
    options_of,
    parse_k,
    parse_url,
    program,
)
from gmm_dist.commands.progress import Progress
from gmm_dist.commands.stopping import finish
from gmm_dist.commands.tables import print_table
from gmm_dist.commands.talking import on_command_line, say, screen
from gmm_dist.errors import UserError
from gmm_dist.fitting.fit import fit_lake, none_ranked
from gmm_dist.fitting.options import FitOptions
from gmm_dist.fitting.results import spell_best
from gmm_dist.model.clusters import Clusters, spell_clusters
from gmm_dist.report import of_fit
from gmm_dist.report.of_settings import in_words


def fit(argv: Sequence[str]) -> None:
    """Parse the command line and run the fit."""
    parser = Parser(
        prog="gmm-dist fit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common(parser)
    add_clusters(parser)
    add_bootstrap(parser)
    add_title(parser)
    parser.add_argument("--k", type=parse_k, help="number of components (default: --start's)")
    parser.add_argument(
        "--start", type=parse_url, metavar="MODEL", help="go on from this model's parameters"
    )
    arguments = parser.parse_args(argv)
    if arguments.start is None and arguments.k is None:
        parser.error("one of --k and --start is required")
    if (arguments.k is not None and len(arguments.k) != 1) or len(arguments.covariance_type) != 1:
        parser.error("fit takes one k and one covariance type: use sweep for several")
    command_line = CommandLine(program("fit"), argv)
    fit_and_tell(options_of(FitOptions, arguments), command_line, arguments.title)


def fit_and_tell(options: FitOptions, command_line: CommandLine, title: str | None = None) -> None:
    """Fit, commit, and print the outcome; `title` heads the report.

    Raises UserError where nothing could be ranked, and as `fit_lake` does.
    """
    output = options.output.rstrip("/")
    note(output=output)
    with said_how_to_resume(command_line):
        outcome = fit_lake(
            options,
            progress=Progress(screen(stderr=True)),
            draw=partial(of_fit.write, title=title, command=command_line.spelt()),
            spelling=on_command_line,
            reading=in_words,
            next_run=lambda k: f"next run: {command_line.for_k(k)}",
            finish=finish,  # the rest takes a moment, and must not be reported as broken off
        )
        if outcome.result is None:
            say(f"{options.output}: the run has committed before, nothing is left to do")
            return
        if outcome.result.best is None:
            print_table(outcome.result, outcome.warnings)
            raise UserError(none_ranked(len(outcome.result.scored)))
    # Results are committed before anything is printed: the reader may have gone.
    result, best = outcome.result, outcome.result.best
    mixture = outcome.mixture
    assert mixture is not None
    print_table(result, outcome.warnings, mixture)
    report = f"{output}/{of_fit.NAME}" if outcome.has_report else None
    note(
        model=f"{output}/model",
        report=report,
        k=best.candidate.k,
        covariance_type=best.candidate.covariance_type,
        **_of_clusters(mixture.clusters),
        criterion=result.criterion,
        value=best.holdout if result.criterion == "holdout" else best.value(result.criterion),
        warnings=outcome.warnings,
    )
    clusters = mixture.clusters
    found = f"; {spell_clusters(clusters)}" if clusters is not None else ""
    report_note = "" if report is None else f", report in {report}"
    best_line = f"best by {spell_best(best, result.criterion)}"
    say(f"{best_line}{found}; model in {output}/model{report_note}")


def _of_clusters(clusters: Clusters | None) -> dict[str, int | None]:
    """Return what a line of JSON says of clusters: how many, and how many of them are stable."""
    if clusters is None:
        return {"n_clusters": None, "n_stable": None}
    stability = clusters.stability
    n_stable = None if stability is None else sum(stability.is_stable)
    return {"n_clusters": clusters.n_clusters, "n_stable": n_stable}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; return its exit status."""
    return run(fit, argv)

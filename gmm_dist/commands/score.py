"""Score every row of a lake under a fitted mixture, and write the lake's files anew.

gmm-dist score s3://lake/points --model s3://models/points --output s3://lake/scored --keep id
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from gmm_dist.commands.ending import note, run, said_how_to_resume
from gmm_dist.commands.options import (
    CommandLine,
    Parser,
    add_at,
    add_cluster,
    add_json,
    options_of,
    parse_url,
    program,
)
from gmm_dist.commands.progress import Progress
from gmm_dist.commands.stopping import finish
from gmm_dist.commands.talking import say, screen
from gmm_dist.scoring.options import WRITES, ScoreOptions
from gmm_dist.scoring.score import score_lake


def score(argv: Sequence[str]) -> None:
    """Parse the command line and score the lake."""
    parser = Parser(
        prog="gmm-dist score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_score(parser)
    score_and_tell(
        options_of(ScoreOptions, parser.parse_args(argv)), CommandLine(program("score"), argv)
    )


def add_score(parser: argparse.ArgumentParser) -> None:
    """Add the options of scoring."""
    parser.add_argument(
        "data",
        type=parse_url,
        metavar="DATA",
        help="folder or file of Parquet, local or any URL, or a table",
    )
    parser.add_argument(
        "--model",
        required=True,
        type=parse_url,
        help="a fit's output, its model folder, or a registry, which gives its latest",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=parse_url,
        metavar="OUT",
        help="a new folder or URL; with --write delta a Delta table, new or not",
    )
    rows = parser.add_argument_group("rows")
    rows.add_argument(
        "--keep",
        nargs="+",
        default=[],
        metavar="COLUMN",
        help="columns to go along (default: none)",
    )
    rows.add_argument("--where", metavar="TEXT", help="score and write only rows where this holds")
    add_at(rows)
    rows.add_argument(
        "--probabilities",
        action="store_true",
        help="write the probabilities of all components too, as a fixed-size list",
    )
    rows.add_argument(
        "--outliers",
        type=float,
        metavar="Q",
        help="mark rows of a lower log-density than this share of the training rows, e.g. 0.001",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--write",
        choices=WRITES,
        default=WRITES[0],
        help="files beside the lake's own, or one commit to a Delta table (default: files)",
    )
    output.add_argument(
        "--overwrite",
        action="store_true",
        help="with --write delta: in place of the table's rows, not appended to them",
    )
    add_cluster(parser.add_argument_group("cluster"))
    parser.add_argument(
        "--resume", action="store_true", help="go on with a run of the same rows, model and options"
    )
    add_json(parser)


def score_and_tell(options: ScoreOptions, command_line: CommandLine) -> None:
    """Score, commit, and say what was done."""
    note(scores=options.output.rstrip("/"))
    with said_how_to_resume(command_line):
        outcome = score_lake(
            options,
            progress=Progress(screen(stderr=True)),
            finish=finish,  # the rest takes a moment, and must not be reported as broken off
        )
    if outcome.scored is None:
        say(f"{options.output}: the run has committed before, nothing is left to do")
        return
    counts = outcome.scored.counts
    note(n_rows_scored=counts.rows, n_outliers=counts.outliers)
    say(outcome.sentence)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; return its exit status."""
    return run(score, argv)

"""Fit a Gaussian mixture for every k asked for, rank them, keep the best.

gmm-dist sweep s3://lake/points --k 2..20 --output s3://models/points
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from gmm_dist.commands.ending import run
from gmm_dist.commands.fit import fit_and_tell
from gmm_dist.commands.options import (
    CommandLine,
    Parser,
    add_bootstrap,
    add_clusters,
    add_common,
    add_title,
    options_of,
    parse_k,
    program,
)
from gmm_dist.fitting.options import FitOptions
from gmm_dist.selection.ranking import CRITERIA


def sweep(argv: Sequence[str]) -> None:
    """Parse the command line and run the sweep."""
    parser = Parser(
        prog="gmm-dist sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common(parser)
    add_clusters(parser)
    add_bootstrap(parser)
    add_title(parser)
    parser.add_argument("--k", required=True, type=parse_k, help="8, 4,8,16 or 2..20 (inclusive)")
    parser.add_argument(
        "--criterion", choices=CRITERIA, default="bic", help="what ranks the fits (default: bic)"
    )
    arguments = parser.parse_args(argv)
    if arguments.criterion == "holdout" and arguments.holdout == 0:
        parser.error("--criterion holdout needs rows to rank by: add --holdout 0.1")
    command_line = CommandLine(program("sweep"), argv)
    fit_and_tell(options_of(FitOptions, arguments), command_line, arguments.title)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; return its exit status."""
    return run(sweep, argv)

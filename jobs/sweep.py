"""Fit a Gaussian mixture for every k asked for, rank them, keep the best.

python jobs/sweep.py s3://lake/points --k 2..20 --output s3://models/points
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import early  # noqa: F401 - first: signals while the rest is loaded
from ending import run
from fitting import fit_lake
from options import Again, Parser, add_common, parse_k

from gmm_dist.selection.ranking import CRITERIA


def sweep(argv: Sequence[str]) -> None:
    """Parse the command line and run the sweep."""
    parser = Parser(
        prog="sweep.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common(parser)
    parser.add_argument("--k", required=True, type=parse_k, help="8, 4,8,16 or 2..20 (inclusive)")
    parser.add_argument(
        "--criterion", choices=CRITERIA, default="bic", help="what ranks the fits (default: bic)"
    )
    options = parser.parse_args(argv)
    if options.criterion == "holdout" and options.holdout == 0:
        parser.error("--criterion holdout needs rows to rank by: add --holdout 0.1")
    fit_lake(options, Again(__file__, argv))


def main(argv: Sequence[str] | None = None) -> int:
    return run(sweep, argv)


if __name__ == "__main__":
    sys.exit(main())

"""Fit one Gaussian mixture to a lake.

python jobs/fit.py ./points --k 8 --output ./points-8
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import early  # noqa: F401 - first: signals while the rest is loaded
from ending import run
from fitting import fit_lake
from options import Again, Parser, add_common, parse_k, parse_url


def fit(argv: Sequence[str]) -> None:
    """Parse the command line and run the fit."""
    parser = Parser(
        prog="fit.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common(parser)
    parser.add_argument("--k", type=parse_k, help="number of components (default: --start's)")
    parser.add_argument(
        "--start", type=parse_url, metavar="MODEL", help="go on from this model's parameters"
    )
    options = parser.parse_args(argv)
    if options.start is None and options.k is None:
        parser.error("one of --k and --start is required")
    if (options.k is not None and len(options.k) != 1) or len(options.covariance_type) != 1:
        parser.error("fit takes one k and one covariance type: use sweep.py for several")
    options.criterion = "bic"
    fit_lake(options, Again(__file__, argv))


def main(argv: Sequence[str] | None = None) -> int:
    return run(fit, argv)


if __name__ == "__main__":
    sys.exit(main())

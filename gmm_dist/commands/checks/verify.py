"""Verify a committed fit: plan the same rows, fit them again, and compare the model's bits.

gmm-dist verify s3://models/points
gmm-dist verify s3://models/registry/models/2026-11-21 --fast

Exit status 0: the same. 3: other bits, and the line says what differs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from gmm_dist.commands.ending import KEPT_BACK, note, run
from gmm_dist.commands.options import (
    Parser,
    add_at,
    add_cluster,
    add_json,
    add_spill,
    options_of,
    parse_url,
)
from gmm_dist.commands.progress import Progress
from gmm_dist.commands.talking import say, screen
from gmm_dist.fitting.replay import VerifyOptions, verify


def verify_output(argv: Sequence[str]) -> int:
    """Parse the command line and verify; return the exit status."""
    parser = Parser(
        prog="gmm-dist verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "output",
        type=parse_url,
        metavar="OUT",
        help="the output of a fit or sweep, or a night's model, REG/models/DATE",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="check the files' hashes and score the rows once, in place of fitting them again",
    )
    add_at(parser.add_argument_group("rows"))
    cluster = parser.add_argument_group("cluster")
    add_cluster(cluster)
    add_spill(cluster)
    add_json(parser)
    options = options_of(VerifyOptions, parser.parse_args(argv))
    verdict = verify(options, progress=Progress(screen(stderr=True)))
    note(verified=verdict.is_same, reasons=[*verdict.reasons] or None)
    output = options.output.rstrip("/")
    for line in verdict.notes:
        say(f"note: {line}")
    if verdict.is_same:
        how = "its files are whole, and score" if options.fast else "the same bits, fitted again to"
        say(f"{output}: {how} {verdict.what}{' as they did' if options.fast else ''}")
        return 0
    differ = "other scores of" if options.fast else "other bits, fitted again to"
    say(f"{output}: {differ} {verdict.what}: {'; '.join(verdict.reasons)}")
    return KEPT_BACK


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; return its exit status."""
    return run(verify_output, argv)

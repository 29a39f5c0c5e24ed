"""The command line that the jobs share, and how they end."""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from gmm_dist.config import INITS, PRECISIONS, EMConfig, StartConfig
from gmm_dist.errors import RunFailed, UserError
from gmm_dist.failures import FaultConfig
from gmm_dist.parameters import COVARIANCE_TYPES
from gmm_dist.storage import redacted

FAILED = 1
USER_CAN_MEND = 2
KEPT_BACK = 3  # nightly: the gate kept the latest model
_EM, _START = EMConfig(), StartConfig()  # the defaults
_MAX_K = 100_000
_URL = re.compile(r"(--\w+=)?[\w+.-]+://")


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the command line in one line, and ends with status 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parse_k(text: str) -> list[int]:
    """Read `8`, `4,8,16` or `2..20` (inclusive), or several of them joined by commas.

    Raises argparse.ArgumentTypeError, whose message names the part that is wrong.
    """
    ks: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*\.\.\s*(\d+))?\s*", part)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not like 8, 4,8,16 or 2..20")
        first, last = int(match[1]), int(match[2] or match[1])
        if first < 1 or last < first or last > _MAX_K:
            raise argparse.ArgumentTypeError(f"{part!r} is not a range of whole numbers from 1 up")
        ks.update(dict.fromkeys(range(first, last + 1)))
    return list(ks)


def add_common(parser: argparse.ArgumentParser, *, output: bool = True) -> None:
    """Add the options that every fitting job has; `output` where it is the user's to say."""
    parser.add_argument("data", metavar="DATA", help="folder or file of Parquet, local or any URL")
    if output:
        parser.add_argument("--output", required=True, metavar="OUT", help="a new folder or URL")
    _add_rows(parser.add_argument_group("rows"))
    _add_fit(parser.add_argument_group("fit"))
    add_cluster(parser.add_argument_group("cluster"))
    _add_run(parser.add_argument_group("run"))


def _add_rows(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--columns",
        nargs="+",
        metavar="COLUMN",
        help="numeric columns, or one fixed-size-list column (default: all float columns)",
    )
    group.add_argument("--weight-column", metavar="COLUMN", help="sample weights, not negative")
    group.add_argument(
        "--where",
        metavar="TEXT",
        help="""keep rows where this holds, e.g. "ds >= '2026-11-01' and income > 0" """,
    )
    group.add_argument(
        "--missing",
        choices=("error", "drop", "mean"),
        default="error",
        help="what to do about nulls and NaN (default: %(default)s)",
    )
    group.add_argument(
        "--holdout",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="score the fits on this share of the rows, kept out of them (default: %(default)g)",
    )


def _add_fit(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--covariance-type",
        nargs="+",
        choices=COVARIANCE_TYPES,
        default=["full"],
        help="families to fit, all in the same passes (default: full)",
    )
    group.add_argument(
        "--init",
        choices=INITS,
        default=_START.init,
        help="how restarts are seeded (default: %(default)s)",
    )
    group.add_argument(
        "--n-init",
        type=int,
        default=_START.n_init,
        help="restarts of each candidate, on a sample (default: %(default)s)",
    )
    group.add_argument(
        "--tol",
        type=float,
        default=_EM.tol,
        help="stop when the mean log-likelihood gains less, in nats per row (default: %(default)s)",
    )
    group.add_argument("--max-iter", type=int, default=_EM.max_iter, help="(default: %(default)s)")
    group.add_argument(
        "--accelerate",
        action=argparse.BooleanOptionalAction,
        default=_EM.accelerate,
        help="leap ahead of EM where that raises the likelihood (default: yes)",
    )
    group.add_argument(
        "--reg-covar",
        type=float,
        default=1e-6,
        help="added to every variance, in squared feature units (default: %(default)s)",
    )
    group.add_argument("--random-state", type=int, default=0, help="seed (default: %(default)s)")
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="arithmetic of the passes; auto measures what is needed (default: %(default)s)",
    )


def add_cluster(group: argparse._ArgumentGroup) -> None:
    """Add the options of workers and where they run."""
    group.add_argument(
        "--num-workers", type=int, help="actors that hold rows (default: one per CPU or GPU)"
    )
    group.add_argument(
        "--use-gpu",
        action=argparse.BooleanOptionalAction,
        help="give each worker a GPU (default: if the cluster has any)",
    )
    faults = FaultConfig()
    group.add_argument(
        "--max-failures",
        type=int,
        default=faults.max_failures,
        help="failures of workers or their storage that a run bears (default: %(default)s)",
    )
    group.add_argument(
        "--grace",
        type=float,
        default=faults.grace,
        metavar="SECONDS",
        help="until others take over the rows of a lost worker (default: %(default)g)",
    )
    group.add_argument(
        "--address", help="Ray cluster (default: the one the job runs in, else one started here)"
    )


def _add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in OUT; start afresh where there is none",
    )
    group.add_argument(
        "--checkpoint-seconds",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="between two checkpoints at least (default: one after each pass)",
    )


@dataclass(frozen=True, slots=True)
class Again:
    """The command line of a job, to be spelt as for a shell with something changed.

    Without credentials, where a URL had any: it goes into logs.
    """

    script: str
    argv: Sequence[str]

    def for_k(self, k: str) -> str:
        """Return the command that does the same for `k`, to another output."""
        words = [word for word in self.argv if word != "--resume"]
        for i, word in enumerate(words):
            name, equals, value = word.partition("=")
            # A name may be cut short, as argparse allows; no other option begins like these two.
            if len(name) < 3 or not (name == "--k" or "--output".startswith(name)):
                continue
            at, old = (i, value) if equals else (i + 1, words[i + 1])
            new = k if name == "--k" else _renamed(old, k)
            words[at] = f"{name}={new}" if equals else new
        return self._spelt(words)

    def to_resume(self) -> str:
        """Return the command that goes on with the same run."""
        return self._spelt([*(word for word in self.argv if word != "--resume"), "--resume"])

    def _spelt(self, words: Sequence[str]) -> str:
        shown = [redacted(word) if _URL.match(word) else word for word in words]
        return shlex.join(["python", os.path.relpath(self.script), *shown])


def _renamed(output: str, k: str) -> str:
    ks = re.findall(r"\d+", k)
    stem = re.sub(r"-k\d+-\d+$", "", output.rstrip("/"))
    return f"{stem}-k{ks[0]}-{ks[-1]}"


def run(job: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a job and return its exit status: its own, 2 what the user can mend, 1 the world's."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    logging.getLogger("gmm_dist").setLevel(logging.INFO)
    try:
        return job(sys.argv[1:] if argv is None else argv) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_CAN_MEND
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED

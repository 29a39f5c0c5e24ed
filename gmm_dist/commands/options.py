"""The arguments that several jobs share, and the commands that messages tell a user to run."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

from gmm_dist import __version__
from gmm_dist.config import INITS, PRECISIONS, EMConfig, FailureConfig, StartConfig
from gmm_dist.errors import UserError
from gmm_dist.formats import printable
from gmm_dist.model.covariance import COVARIANCE_TYPES
from gmm_dist.urls import Url, redacted, without_secrets

_EM, _START = EMConfig(), StartConfig()  # the defaults
_MAX_K = 100_000
_CLI = ("gmm_dist", "commands", "cli.py")  # what python -m gmm_dist.commands.cli runs


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the command line in one line, and ends with status 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        """Read the command line; --version is answered at once."""
        self.add_argument("--version", action="version", version=f"gmm-dist {__version__}")
        return super().parse_args(args)


T = TypeVar("T")


def options_of(kind: Callable[..., T], arguments: argparse.Namespace) -> T:
    """Return the options that a command line asks for.

    Raises UserError for a value out of range.
    """
    names = {field.name for field in fields(cast(Any, kind))}
    return kind(**{name: value for name, value in vars(arguments).items() if name in names})


def parse_k(text: str) -> list[int]:
    """Read `8`, `4,8,16` or `2..20` (inclusive), or several of them joined by commas.

    Raises argparse.ArgumentTypeError, whose message names the part that is wrong.
    """
    ks: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:\s*\.\.\s*(\d{1,9}))?\s*", part)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text[:50]!r} is not like 8, 4,8,16 or 2..20")
        first, last = int(match[1]), int(match[2] or match[1])
        if first < 1 or last < first or last > _MAX_K:
            raise argparse.ArgumentTypeError(f"{part!r} is not a range of whole numbers from 1 up")
        ks.update(dict.fromkeys(range(first, last + 1)))
    return list(ks)


def parse_clusters(text: str) -> str | int | None:
    """Read `auto`, `none` or a number of clusters."""
    if text in ("auto", "none"):
        return None if text == "none" else text
    if re.fullmatch(r"\d{1,6}", text) is None or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text[:50]!r} is not auto, none or a number from 1 up")
    return int(text)


def add_clusters(parser: argparse.ArgumentParser) -> None:
    """Add --clusters, for the jobs that merge components."""
    parser.add_argument(
        "--clusters",
        type=parse_clusters,
        default="auto",
        metavar="auto|N|none",
        help="merge the best model's components into clusters: as many as they look like, or N "
        "(default: auto)",
    )


def add_bootstrap(parser: argparse.ArgumentParser) -> None:
    """Add --bootstrap, for the jobs that resample."""
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=0,
        metavar="B",
        help="resample the rows so many times, and say how sure the best model's parameters, its "
        "clusters and its k are: 50 is a good number (default: %(default)s, none)",
    )


def add_title(parser: argparse.ArgumentParser) -> None:
    """Add --title, for the jobs that draw a report."""
    parser.add_argument(
        "--title",
        metavar="TEXT",
        help="the report's heading (default: how many clusters there are)",
    )


def parse_url(text: str) -> Url:
    """Read a path or URL; refuse an empty one, as of a variable that is not set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: give a path or URL, . for this folder")
    return Url(text)


def add_common(parser: argparse.ArgumentParser, *, output: bool = True) -> None:
    """Add the options that every fitting job has, --output only if `output` is true.

    A job changes a default by the parser's `set_defaults`, which --help shows too.
    """
    parser.add_argument(
        "data",
        type=parse_url,
        metavar="DATA",
        help="folder or file of Parquet, local or any URL, or a table",
    )
    if output:
        parser.add_argument(
            "--output", required=True, type=parse_url, metavar="OUT", help="a new folder or URL"
        )
    rows = parser.add_argument_group("rows")
    _add_rows(rows)
    if output:
        add_at(rows)
    _add_fit(parser.add_argument_group("fit"))
    cluster = parser.add_argument_group("cluster")
    add_cluster(cluster)
    add_spill(cluster)
    _add_run(parser.add_argument_group("run"))


def _add_rows(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--columns",
        nargs="+",
        metavar="COLUMN",
        help="numeric columns, or one column of lists of one length (default: all float columns "
        "but pandas' indices, else the one column of lists)",
    )
    group.add_argument(
        "--weight-column", metavar="COLUMN", help="sample weights: 0 is no row, 2 is two"
    )
    group.add_argument(
        "--where",
        metavar="TEXT",
        help="""keep rows where this holds, e.g. "ds >= '2026-11-01' and (income > 0 or kind in
        ('a', 'b'))"; also not, is null, is not null; a comparison with null or NaN is unknown, as
        in SQL, and such rows are left out""",
    )
    group.add_argument(
        "--missing",
        choices=("error", "drop", "mean"),
        default="error",
        help="nulls and NaN: refuse them, drop the row, or put the column's mean (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--holdout",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="score the fits on this share of the rows, kept out of them (default: %(default)g)",
    )


def add_at(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--at",
        metavar="VERSION",
        help="of a table: the number of a version, or a time, for the newest version of then, "
        "e.g. 2026-11-21T08:30:00+01:00 (default: the newest)",
    )


def _add_fit(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--covariance-type",
        nargs="+",
        choices=COVARIANCE_TYPES,
        default=["full"],
        help="covariance types to fit, all in the same passes (default: full)",
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
    group.add_argument(
        "--max-iter",
        type=int,
        default=_EM.max_iter,
        help="iterations over all rows at most (default: %(default)s)",
    )
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
        help="added to every variance, in units of the feature's variance over all rows, so that "
        "units of measurement do not matter (default: %(default)s)",
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
    faults = FailureConfig()
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


def add_spill(group: argparse._ArgumentGroup) -> None:
    """Add the options of rows beyond memory."""
    where = group.add_mutually_exclusive_group()
    where.add_argument(
        "--spill",
        metavar="DIR",
        default=True,
        help="folder on each worker's disk, by an absolute path, for rows that its memory does not "
        "hold (default: its temporary folder)",
    )
    where.add_argument(
        "--no-spill",
        dest="spill",
        action="store_false",
        help="refuse rows that memory does not hold",
    )


def add_json(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """Add --json, by which schedulers read how a job ended."""
    group.add_argument(
        "--json", action="store_true", help="end with a line of JSON on stdout that says what came"
    )


def _add_run(group: argparse._ArgumentGroup) -> None:
    add_json(group)
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


def is_option(word: str, option: str) -> bool:
    """Say whether a word of a valid command line is this option, perhaps abbreviated.

    Argparse takes any beginning of a name that no other option has.
    """
    return len(word) > len("--") and option.startswith(word)


def asks_for_json(words: Sequence[str]) -> bool:
    """Say whether a command line, parsed or not, has --json."""
    options = itertools.takewhile(lambda word: word != "--", words)
    return any(is_option(word, "--json") for word in options)


def program(job: str) -> tuple[str, ...]:
    """Return the words by which this process was called: gmm-dist, a script of jobs/, python -m."""
    called = Path(sys.argv[0])
    if called.name == f"{job}.py":
        return "python", os.path.relpath(called)
    if called.parts[-2:] == ("gmm_dist", "__main__.py") or called.parts[-3:] == _CLI:
        return "python", "-m", "gmm_dist", job
    return "gmm-dist", job


@dataclass(frozen=True, slots=True)
class CommandLine:
    """The command line of a job, to be spelt as for a shell with something changed.

    `program` are the words before the arguments. Credentials of URLs are left out: it goes into
    logs.
    """

    program: Sequence[str]
    argv: Sequence[str]

    def for_k(self, k: str) -> str:
        """Return the command that does the same for `k`, to another output."""
        words = self._words(resume=False)
        for i, word in enumerate(words):
            name, equals, value = word.partition("=")
            if name == "--":
                break
            if not (name == "--k" or is_option(name, "--output")):
                continue
            at, old = (i, value) if equals else (i + 1, words[i + 1])
            new = k if name == "--k" else _renamed(old, k)
            words[at] = f"{name}={new}" if equals else new
        return self._spelt(words)

    def spelt(self) -> str:
        """Return the command as it was given."""
        return self._spelt(self.argv)

    def to_resume(self) -> str:
        """Return the command that goes on with the same run."""
        return self._spelt(self._words(resume=True))

    def _words(self, *, resume: bool) -> list[str]:
        """Return the arguments with --resume or without; after `--` come no more options."""
        end = self.argv.index("--") if "--" in self.argv else len(self.argv)
        options = [word for word in self.argv[:end] if not is_option(word, "--resume")]
        return [*options, *(["--resume"] if resume else []), *self.argv[end:]]

    def _spelt(self, words: Sequence[str]) -> str:
        shown = [_without_secrets(word) for word in words]
        hint = "" if shown == words else " (with the credentials, which are left out here)"
        return " ".join(map(_quoted, [*self.program, *shown])) + hint


def _without_secrets(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + equals + without_secrets(redacted(value))


def _quoted(word: str) -> str:
    """Quote a word for a shell, in printable characters only."""
    if printable(word) == word:
        return shlex.quote(word)
    # Bytes that are no text came as surrogates; $'...' is understood by bash, zsh and ksh.
    spelt = "".join(
        chr(byte) if 32 <= byte < 127 and chr(byte) not in "'\\" else f"\\x{byte:02x}"
        for byte in os.fsencode(word)
    )
    return f"$'{spelt}'"


def _renamed(output: str, k: str) -> str:
    ks = re.findall(r"\d+", k)
    stem = re.sub(r"-k\d+-\d+$", "", output.rstrip("/"))
    return f"{stem}-k{ks[0]}-{ks[-1]}"

"""The command `gmm-dist`: pick one of four jobs and hand it the rest of the command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from gmm_dist import __version__

JOBS = {
    "fit": "fit one mixture",
    "sweep": "fit many K in the same passes, rank them, keep the best",
    "score": "score every row of a lake under a fitted mixture",
    "nightly": "fit tonight's rows, follow the clusters, publish if they are fit for it",
}


def main(job: str | None = None, argv: Sequence[str] | None = None) -> int:
    """Run a job, by default the one that the first argument names; return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if job is None:
        if words[:1] == ["--version"]:
            print(f"gmm-dist {__version__}")
            return 0
        if not words or words[0] in ("-h", "--help"):
            print(usage())
            return 0 if words else 2
        if words[0] not in JOBS:
            print(
                f"error: {words[0]!r} is no job: give {', '.join(JOBS)}; see gmm-dist --help",
                file=sys.stderr,
            )
            return 2
        job, words = words[0], words[1:]
    module = importlib.import_module(f"gmm_dist.commands.{job}")
    status: int = module.main(words)
    return status


def usage() -> str:
    """Return what --help prints."""
    width = max(map(len, JOBS))
    lines = [f"  {name:<{width}}  {what}" for name, what in JOBS.items()]
    return "\n".join(
        [
            "usage: gmm-dist JOB ..., gmm-dist JOB --help, gmm-dist --version",
            "",
            "Gaussian mixtures over data lakes.",
            "",
            *lines,
        ]
    )

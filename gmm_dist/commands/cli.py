"""The command `gmm-dist`: pick one of the jobs and hand it the rest of the command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from gmm_dist import __version__
from gmm_dist.commands import early, talking

JOBS = {
    "fit": "fit one mixture",
    "sweep": "fit many K in the same passes, rank them, keep the best",
    "score": "score every row of a lake under a fitted mixture",
    "nightly": "fit tonight's rows, follow the clusters, publish if they are fit for it",
    "verify": "fit a committed model again, and compare the bits",
}
_MODULES = {"verify": "checks.verify"}


def main(job: str | None = None, argv: Sequence[str] | None = None) -> int:
    """Run a job, by default the one that the first argument names; return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if job is None:
        if not words or words[0] not in JOBS:
            with talking.unfailing():
                return _without_job(words)
        job, words = words[0], words[1:]
    module = importlib.import_module(f"gmm_dist.commands.{_MODULES.get(job, job)}")
    status: int = module.main(words)
    return status


def _without_job(words: Sequence[str]) -> int:
    """Say what there is to know before a job is named; return the exit status."""
    if words[:1] == ["--version"]:
        talking.say(f"gmm-dist {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        for line in usage().splitlines():
            talking.say(line)
        return 0 if words else 2
    jobs = ", ".join(JOBS)
    talking.complain(f"error: {words[0]!r} is no job: give {jobs}; see gmm-dist --help")
    return 2


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


if __name__ == "__main__":
    early.main()

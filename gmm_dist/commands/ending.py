"""How jobs end: with one line and an exit status, never with a traceback.

0: done. 1: the world's failure, or ours. 2: something that the user can mend. 3: nightly's gate.
128 + n: signal n. Where a run can be resumed, its line ends with the command that goes on with it.
"""

from __future__ import annotations

import errno
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gmm_dist.commands import early, talking
from gmm_dist.commands.options import CommandLine, asks_for_json
from gmm_dist.commands.stopping import Stopper, stopper
from gmm_dist.errors import RunFailed, UserError
from gmm_dist.formats import printable
from gmm_dist.runs.lease import LeaseLost
from gmm_dist.shards.failures import cause_in_worker, is_full, is_of_ray
from gmm_dist.urls import without_secrets

logger = logging.getLogger("gmm_dist.commands.ending")

FAILED = 1
USER_CAN_MEND = 2
KEPT_BACK = 3  # nightly: the gate kept the latest model
_LONGEST = 600  # characters of an error that is not ours

_REMEDIES = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there, or ask for a larger quota",
    errno.EROFS: "make it writable",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit of open files",
    errno.ENOMEM: "use a machine with more memory, or fewer rows and columns",
    errno.EIO: "check the disk",
    errno.ENAMETOOLONG: "give shorter names",
}

# What --json reports of the job, beside its exit status.
_facts: dict[str, object] = {}

# The command that resumes the job; None where there is nothing to resume.
_to_resume: list[str | None] = [None]


@contextmanager
def said_how_to_resume(command_line: CommandLine) -> Iterator[None]:
    """Have the error line name the command that resumes, if the block fails."""
    before, _to_resume[0] = _to_resume[0], command_line.to_resume()
    yield
    _to_resume[0] = before


def note(**facts: object) -> None:
    """Add facts to the line that --json prints; those that are None are left out."""
    _facts.update({name: value for name, value in facts.items() if value is not None})


def run(job: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a job and return its exit status; an error is printed as one line on stderr."""
    words = sys.argv[1:] if argv is None else argv
    _to_resume[0] = None
    _facts.clear()
    with talking.unfailing(), stopper(_last_words, talking.hurry) as stop:
        early.begun()
        status = FAILED
        try:
            status = job(words) or 0
            stop.finish()
        except BaseException as error:
            stop.finish()
            if stop.number is None and not isinstance(error, Exception | KeyboardInterrupt):
                raise  # SystemExit, of --help
            logger.debug("ended by", exc_info=error)
            status = _told(error, stop)
        if asks_for_json(words):
            talking.say(json.dumps({"exit_status": status, **_facts}))
        return status


def _told(error: BaseException, stop: Stopper) -> int:
    if stop.number is not None or isinstance(error, KeyboardInterrupt):
        return _complain(f"stopped by {stop.name}", stop.status, _go_on())
    if isinstance(error, UserError):
        return _complain(error.spelt(talking.on_command_line), USER_CAN_MEND)
    # After a lost lease there is nothing to resume: another driver goes on with the run.
    return _complain(_line(error), FAILED, "" if isinstance(error, LeaseLost) else _go_on())


def _complain(line: str, status: int, go_on: str = "") -> int:
    """Say what went wrong, also to whoever asked for --json; return the exit status."""
    talking.complain(f"error: {line}{go_on}")
    note(error=printable(without_secrets(line)), resume=_to_resume[0] if go_on else None)
    return status


def _last_words(stop: Stopper) -> None:
    talking.complain(f"error: stopped by {stop.name}, before all was tidied up{_go_on()}")


def _go_on() -> str:
    return "" if _to_resume[0] is None else f"; go on with: {_to_resume[0]}"


def _line(error: BaseException) -> str:
    """Say in one line what happened, where, and what to do."""
    if isinstance(error, RunFailed | UserError):
        return error.spelt(talking.on_command_line)
    if (cause := cause_in_worker(error)) is not None:
        return f"in a worker: {_line(cause)}"
    if isinstance(error, OSError) and error.errno is not None:
        return _of_system(error)
    if isinstance(error, MemoryError):
        return "out of memory: use a machine with more, or fewer rows, columns and components"
    name, words = type(error).__name__, _shortened(str(error))
    if is_of_ray(error):
        return f"Ray failed ({name}: {words}): look at the cluster"
    return f"{name}: {words}{_spot(error)} ({talking.DEBUG}=1 shows the traceback)"


def _of_system(error: OSError) -> str:
    paths = [str(path) for path in (error.filename, error.filename2) if path is not None]
    if not paths and is_full(error):  # the system names no file where one that is open is full
        paths = ["the output, or the folder for temporary files (TMPDIR)"]
    where = f"{' -> '.join(paths)}: " if paths else ""
    remedy = _REMEDIES.get(error.errno or 0)
    what = _shortened(error.strerror or str(error))
    return f"{where}{what}{'' if remedy is None else f': {remedy}'}{'' if paths else _spot(error)}"


def _shortened(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]}..."


def _spot(error: BaseException) -> str:
    """Name the innermost line of our code in the error's traceback."""
    root = Path(__file__).resolve().parent.parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(root):
            return f" (at {path.name}, line {frame.lineno})"
    return ""

"""Start a program: a signal that comes while the libraries still load ends it in one line.

`main` is where every program begins; importing this module changes nothing. Once a job has begun,
its own handlers take over; after it, a signal that comes while the interpreter ends changes
nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
_has_begun = False


def begun() -> None:
    """Note that a job has begun, and set its own handlers."""
    global _has_begun
    _has_begun = True


def _end(number: int, frame: FrameType | None) -> None:
    if _has_begun:
        return
    try:
        os.write(2, f"error: {signal.Signals(number).name}: nothing was begun yet\n".encode())
    finally:
        os._exit(128 + number)


def main(job: str | None = None) -> NoReturn:
    """Run a job, or the one that the command line names, and end with its status."""
    for name in _SIGNALS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    # This import takes seconds, in which signals are handled already.
    from gmm_dist.commands.cli import main as run

    sys.exit(run(job))

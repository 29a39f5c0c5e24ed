"""End quietly when told to while the libraries are still being loaded: nothing is held yet.

Imported before all else by the scripts, and of no effect where they are imported themselves.
Once a job has begun, its own handlers take over; after it, a signal that comes while the
interpreter ends changes nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType

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


def _is_script() -> bool:
    main = getattr(sys.modules["__main__"], "__file__", None)
    return main is not None and Path(main).resolve().parent == Path(__file__).resolve().parent


if _is_script():
    for _name in _SIGNALS:
        _number = getattr(signal, _name, None)
        if _number is not None and signal.getsignal(_number) is not signal.SIG_IGN:
            signal.signal(_number, _end)

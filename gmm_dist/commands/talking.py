"""Print what a job has to say: lines, the log, the table. Output that fails ends no job.

A reader that has gone, a full disk behind a redirection, a closed descriptor, a terminal that
knows ASCII alone, a log handler that fails: what is said is lost then, or spelt otherwise, and
the work goes on. What comes from the data (names of files and columns) is printed with control
characters escaped, so that it can neither move the cursor nor begin a line of its own.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import io
import logging
import os
import select
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from gmm_dist.errors import Option, RunFailed, Text, UserError, spelt
from gmm_dist.formats import printable
from gmm_dist.urls import without_secrets

logger = logging.getLogger("gmm_dist.commands.talking")

DEBUG = "GMM_DIST_DEBUG"  # an environment variable; 1 shows tracebacks and what else is traced
_WIDE = 160  # columns, where there is no terminal
_READER_SECONDS = 0.5  # for a stream to take more, once the job has been told to end
_GUARDED = "_gmm_dist_guarded"


_COMMAND_LINE = {"n_components": "k", "init_params": "init"}  # where its names differ


def on_command_line(option: Option) -> str:
    """Spell an option as the command line has it: `--missing`, or `--missing drop` with a value."""
    name, value = _COMMAND_LINE.get(option.name, option.name).replace("_", "-"), option.value
    if value is None or value is True:
        return f"--{name}"
    if value is False:
        return f"--no-{name}"
    return f"--{name} {' '.join(value) if isinstance(value, tuple) else _short(value)}"


def _short(value: str | float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def say(line: str) -> None:
    """Print a line of the result on stdout."""
    with bearing():
        print(printable(line), flush=True)


def complain(line: str) -> None:
    """Print a line about what went wrong on stderr."""
    with bearing():
        print(printable(without_secrets(line)), file=sys.stderr, flush=True)


def hurry() -> None:
    """Keep a reader that has stopped reading from holding up a job that has to end.

    For a signal's handler: a write that it interrupted goes on, and into nothing if the stream
    takes no more.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Unfailing):
            stream.give_up_if_stuck(_READER_SECONDS)


@contextlib.contextmanager
def quiet(name: str = "gmm_dist") -> Iterator[None]:
    """Log nothing below an error in the block, where the same is logged again after it."""
    log = logging.getLogger(name)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


@contextlib.contextmanager
def bearing() -> Iterator[None]:
    """Ignore any error while something is printed; rich even exits where a pipe is cut."""
    try:
        yield
    except (Exception, SystemExit):
        with contextlib.suppress(Exception):
            logger.debug("something could not be said", exc_info=True)


class Unfailing(io.TextIOBase):
    """A text stream whose writes never fail, even if the stream below it does."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.lost: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def fileno(self) -> int:
        return int(self._stream.fileno())

    def isatty(self) -> bool:
        try:
            return bool(self._stream.isatty())
        except (AttributeError, OSError, ValueError):
            return False

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.lost is None:
            try:
                self._stream.write(self._encodable(text))
            except (Exception, SystemExit) as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        if self.lost is None:
            try:
                self._stream.flush()
            except (Exception, SystemExit) as error:
                self._lose(error)

    def close(self) -> None:
        """Leave the stream below as it is: it is not ours."""

    def give_up_if_stuck(self, seconds: float) -> None:
        """Write nothing more if the descriptor takes nothing within so many seconds."""
        if self.lost is None and not self._takes_more(seconds):
            self._lose(BrokenPipeError(errno.EPIPE, "its reader has stopped to read"))

    def _takes_more(self, seconds: float) -> bool:
        try:
            poll = select.poll()
            poll.register(self.fileno(), select.POLLOUT)
            return bool(poll.poll(1000 * seconds))
        except (AttributeError, OSError, ValueError):
            return True  # no descriptor that could be full

    def _encodable(self, text: str) -> str:
        try:
            text.encode(self.encoding)
        except (UnicodeError, LookupError):
            escaped = text.encode("ascii", "backslashreplace")
            with contextlib.suppress(LookupError):
                escaped = text.encode(self.encoding, "backslashreplace")
                return escaped.decode(self.encoding)
            return escaped.decode()
        return text

    def _lose(self, error: BaseException) -> None:
        """Write nothing more, not even when the interpreter flushes the descriptor at its end."""
        self.lost = error if isinstance(error, Exception) else OSError(str(error))
        with contextlib.suppress(Exception):
            number = self._stream.fileno()
            if number in (1, 2):
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, number)
                os.close(nothing)


@contextlib.contextmanager
def unfailing() -> Iterator[None]:
    """Give the process streams and a log that cannot fail, for as long as the job runs."""
    _open_closed()
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as opened:
        for name, stream in zip(("stdout", "stderr"), before, strict=True):
            if stream is None:  # it was closed when the interpreter started
                stream = opened.enter_context(open(os.devnull, "w"))  # noqa: PTH123 - no path
            setattr(sys, name, Unfailing(stream))
        ours = sys.stdout, sys.stderr
        try:
            with _logging():
                yield
        finally:
            for stream in ours:
                stream.flush()
            _tell_of_loss(*ours)
            sys.stdout, sys.stderr = before


def _tell_of_loss(out: Any, err: Any) -> None:
    """Say on stderr that what was said on stdout is lost, unless its reader went on purpose."""
    if out.lost is not None and not isinstance(out.lost, BrokenPipeError):
        reason = getattr(out.lost, "strerror", None) or out.lost
        err.write(f"what was printed could not be written to stdout ({reason})\n")
        err.flush()


def _open_closed() -> None:
    """Put the null device where a standard descriptor is closed.

    Else the next file to be opened gets its number, and all that is printed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != number:
                os.dup2(nothing, number)
                os.close(nothing)


# ---------------------------------------------------------------------------- the log


class _Lines(logging.Handler):
    """Writes a line for each record to what stderr is now: beside a live display, above it."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"{self.format(record)}\n")
        sys.stderr.flush()


class _OneLine(logging.Formatter):
    """Formats a record as one line, whatever comes from the data; only tracebacks have more.

    Credentials of URLs are left out, whoever logged them; options are spelt as a command line's.
    """

    def format(self, record: logging.LogRecord) -> str:
        shown = copy.copy(record)
        if isinstance(shown.args, tuple):
            shown.args = tuple(map(_spelt, shown.args))
        return without_secrets(super().format(shown))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        record.message = printable(record.message)
        return super().formatMessage(record)


def _spelt(value: object) -> object:
    """Spell the options in a value to be logged."""
    if isinstance(value, UserError | RunFailed):
        return value.spelt(on_command_line)
    return spelt(value, on_command_line) if isinstance(value, Option | Text) else value


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Show the log on stderr, and have no handler's failure reach those who log."""
    root, ours = logging.getLogger(), logging.getLogger("gmm_dist")
    level = ours.level
    ours.setLevel(logging.DEBUG if os.environ.get(DEBUG, "0") not in ("", "0") else logging.INFO)
    handler = _Lines()
    handler.setFormatter(_OneLine("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    root.addHandler(handler)
    root_level, silent = root.level, logging.raiseExceptions
    logging.raiseExceptions = False
    for each in (*root.handlers, *ours.handlers):
        _guard(each)
    try:
        yield
    finally:
        root.removeHandler(handler)
        ours.setLevel(level)
        root.setLevel(root_level)
        logging.raiseExceptions = silent


def _guard(handler: logging.Handler) -> None:
    if getattr(handler, _GUARDED, False):
        return
    emit = handler.emit

    def guarded(record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception, SystemExit):
            emit(record)

    handler.emit = guarded  # type: ignore[method-assign]
    setattr(handler, _GUARDED, True)


# ---------------------------------------------------------------------------- the screen


def screen(*, stderr: bool = False) -> Console:
    """Return a console of the width that there is: the terminal's, COLUMNS, or a wide page.

    Only a real terminal is drawn upon: FORCE_COLOR asks for colours, not for a display that
    moves within a file.
    """
    stream = sys.stderr if stderr else sys.stdout
    on_terminal = stream.isatty()
    return Console(
        stderr=stderr,
        width=_columns(on_terminal),
        force_terminal=True if on_terminal else False if stderr else None,
    )


def _columns(on_terminal: bool) -> int:
    requested_width = os.environ.get("COLUMNS", "")
    if requested_width.isdigit() and int(requested_width) > 0:
        return int(requested_width)
    return shutil.get_terminal_size().columns if on_terminal else _WIDE

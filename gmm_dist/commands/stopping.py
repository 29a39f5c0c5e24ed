"""What a signal does to a running job: the job cleans up, gives back what it holds, and ends.

The first SIGINT, SIGTERM or SIGHUP raises KeyboardInterrupt in the main thread, so that every
block on its way out cleans up: checkpoints, the lease, Ray. Further ones change nothing. A job
that has not ended some seconds later is ended hard, as a kill would, which a run survives.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SECONDS = 15.0  # from the signal until a job that still runs is ended hard
_SAYING = 1.0  # seconds for its last words
_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class Stopper:
    """Notes the signal that ends the job; `holding` protects a block from being broken off."""

    def __init__(self, hurry: Callable[[], None] = lambda: None) -> None:
        self.number: int | None = None
        self._hurry = hurry
        self._held = 0
        self._noticed, self._over = threading.Event(), threading.Event()

    @property
    def name(self) -> str:
        """The signal that came, or the one that KeyboardInterrupt stands for."""
        return signal.Signals(self.number or signal.SIGINT).name

    @property
    def status(self) -> int:
        """The exit status that stands for the signal."""
        return 128 + (self.number or signal.SIGINT)

    @contextlib.contextmanager
    def listening(self, last_words: Callable[[], None]) -> Iterator[None]:
        """Take the signals; `last_words` are said where the job has to be ended hard."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the main thread's
            return
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        watch = threading.Thread(target=self._watch, args=(last_words,), daemon=True, name="stop")
        watch.start()
        # What a parent has had ignored (nohup) stays so.
        ours = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
        for number in ours:
            signal.signal(number, self._stop)
        try:
            yield
        finally:
            for number in ours:
                signal.signal(number, before[number] or signal.SIG_DFL)
            self._over.set()
            self._noticed.set()

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Let nothing break off the block: a signal that comes meanwhile ends the job after it."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self.number is not None and not self._held:
            raise KeyboardInterrupt

    def finish(self) -> None:
        """Let no signal change how the job ends: it ends by itself, in a moment."""
        self._held += 1

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            return
        self.number = number
        self._noticed.set()
        self._hurry()
        if not self._held:
            raise KeyboardInterrupt

    def _watch(self, last_words: Callable[[], None]) -> None:
        self._noticed.wait()
        if not self._over.wait(SECONDS):
            # The reader of stderr may have stopped reading: writing would never return then.
            saying = threading.Thread(target=last_words, daemon=True)
            saying.start()
            saying.join(_SAYING)
            os._exit(self.status)


_current: list[Stopper] = []


@contextlib.contextmanager
def stopper(
    last_words: Callable[[Stopper], None], hurry: Callable[[], None] = lambda: None
) -> Iterator[Stopper]:
    """Have signals end the block; `holding` and `finish` are then about this one.

    `hurry` is called as the first signal comes, by its handler.
    """
    one = Stopper(hurry)
    _current.append(one)
    try:
        with one.listening(lambda: last_words(one)):
            yield one
    finally:
        _current.remove(one)


@contextlib.contextmanager
def holding() -> Iterator[None]:
    """Let no signal break off the block; see `Stopper.holding`."""
    with _current[-1].holding() if _current else contextlib.nullcontext():
        yield


def finish() -> None:
    """Let no signal change how the job ends; see `Stopper.finish`."""
    if _current:
        _current[-1].finish()

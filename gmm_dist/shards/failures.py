"""What a failed call means, and how many failures a run tolerates."""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass, field

from ray.exceptions import (
    ActorUnavailableError,
    RayActorError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from gmm_dist.config import FailureConfig
from gmm_dist.errors import Option, RunFailed
from gmm_dist.formats import counted

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
# Repetition does not help with a forbidden or an impossible name either.
_PERMANENT = _FULL | {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}


class Verdict(enum.Enum):
    """What the dispatcher does about a failed call."""

    REPEAT = "its call is repeated"  # the worker may be alive, and may even have finished it
    REPLACE = "it starts anew"
    PREEMPTED = "its host is being taken away: it starts anew elsewhere"
    OUTSIDE = "it tries again"  # the storage that it reads from failed
    HOPELESS = "the run ends"  # an error of the user's, or a bug: no repetition helps


def judge(error: Exception) -> Verdict:
    """Say what an exception that Ray raised for a call means."""
    if isinstance(error, RayTaskError):  # the call itself raised
        # Files, network, memory may recover. A wrong value in a row, a bug, a storage whose retries
        # are used up, and a full disk do not.
        outside = isinstance(error.cause, OSError | EOFError | MemoryError)
        outside = outside and not is_permanent(error.cause)
        return Verdict.OUTSIDE if outside else Verdict.HOPELESS
    if isinstance(error, ActorUnavailableError):
        return Verdict.REPEAT
    if isinstance(error, RayActorError):
        if getattr(error, "actor_init_failed", False):
            return Verdict.HOPELESS
        return Verdict.PREEMPTED if getattr(error, "preempted", False) else Verdict.REPLACE
    if isinstance(error, RuntimeEnvSetupError) or not isinstance(error, RayError):
        return Verdict.HOPELESS
    return Verdict.REPEAT  # the reply was lost on its way: ObjectLostError and its like


def is_full(error: BaseException) -> bool:
    """Say whether a disk is full or read-only."""
    return isinstance(error, OSError) and error.errno in _FULL


def is_permanent(error: BaseException) -> bool:
    """Say whether the system refuses for good, so that waiting does not help."""
    return isinstance(error, OSError) and error.errno in _PERMANENT


def reason(error: Exception) -> str:
    """Return an exception in a few words, for a line of the log."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    words = " ".join(str(cause).split())
    if isinstance(error, RayError) and not isinstance(error, RayTaskError):
        return type(error).__name__  # Ray's own text fills a page
    return f"{type(cause).__name__}: {words[:200]}"


@dataclass(slots=True)
class Budget:
    """Counts the failures of a run."""

    config: FailureConfig
    used: int = 0
    _began: float = field(default=float("-inf"))

    def charge(self, what: str, now: float) -> str:
        """Count a failure at time `now`, and say its number.

        Raises RunFailed when there have been too many.
        """
        if now - self._began > self.config.together:
            self.used, self._began = self.used + 1, now
        if self.used > self.config.max_failures:
            raise RunFailed(
                f"more than {counted(self.config.max_failures, 'failure')} ("
                + Option("max_failures")
                + f"); the last: {what}"
            )
        return f"failure {self.used} of {self.config.max_failures}"


def cause_in_worker(error: BaseException) -> Exception | None:
    """Return the exception that a task raised in a worker; None where Ray reports another."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        return error.cause
    return None


def is_of_ray(error: BaseException) -> bool:
    """Say whether Ray itself has failed."""
    return isinstance(error, RayError)

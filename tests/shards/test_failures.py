"""What failures mean, how long to rest after them, and when there are too many."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any

import pytest
from ray.core.generated import common_pb2
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    ObjectLostError,
    RayTaskError,
)

from gmm_dist.commands.ending import run
from gmm_dist.config import FailureConfig
from gmm_dist.errors import RunFailed, UserError
from gmm_dist.shards.failures import Budget, Verdict, judge, reason


def raised(cause: Exception) -> Exception:
    error: Exception = RayTaskError("load", "a traceback", cause).as_instanceof_cause()
    return error


# As Ray makes it of the death of a host that was being drained.
PROTOCOL: Any = common_pb2
DRAINED = PROTOCOL.NodeDeathInfo(reason=PROTOCOL.NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED)
PREEMPTED = ActorDiedError(
    PROTOCOL.ActorDiedErrorContext(actor_id=16 * b"0", node_death_info=DRAINED)
)

VERDICTS = [
    (ActorDiedError(), Verdict.REPLACE),
    (PREEMPTED, Verdict.PREEMPTED),
    (ActorUnavailableError("gone", b"0" * 16), Verdict.REPEAT),
    (ObjectLostError("00" * 28, None, "site"), Verdict.REPEAT),
    (GetTimeoutError("slow"), Verdict.REPEAT),
    (raised(OSError("disk")), Verdict.OUTSIDE),
    (raised(ConnectionResetError("cut")), Verdict.OUTSIDE),
    (raised(OSError(errno.ENOSPC, "No space left on device")), Verdict.HOPELESS),
    (raised(OSError(errno.EDQUOT, "Disk quota exceeded")), Verdict.HOPELESS),
    (raised(OSError(errno.EROFS, "Read-only file system")), Verdict.HOPELESS),
    (raised(MemoryError()), Verdict.OUTSIDE),
    (raised(UserError("row 17 is NaN")), Verdict.HOPELESS),
    (raised(RunFailed("the storage failed for 180 s")), Verdict.HOPELESS),
    (raised(ZeroDivisionError("ours")), Verdict.HOPELESS),
    (KeyError("ours, in the driver"), Verdict.HOPELESS),
]


@pytest.mark.parametrize(("error", "verdict"), VERDICTS)
def test_what_a_failed_call_means(error: Exception, verdict: Verdict) -> None:
    assert judge(error) is verdict


def test_reasons_are_short_and_of_one_line() -> None:
    assert reason(raised(OSError("a\nb" + 300 * "c"))).startswith("OSError: a b")
    assert len(reason(raised(OSError("a\nb" + 300 * "c")))) < 250
    assert reason(ActorDiedError()) == "ActorDiedError"


def test_rests_double_up_to_a_limit() -> None:
    faults = FailureConfig(backoff=0.5, max_backoff=3.0)
    assert [faults.rest(n) for n in (1, 2, 3, 4, 10_000)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_failures_that_come_together_are_one() -> None:
    budget = Budget(FailureConfig(max_failures=2, together=10.0))
    said = [budget.charge("worker 0 died", now) for now in (0.0, 5.0, 10.0, 10.1, 20.0)]
    assert said == 3 * ["failure 1 of 2"] + 2 * ["failure 2 of 2"]
    wanted = r"^more than 2 failures \(max_failures\); the last: worker 3 died$"
    with pytest.raises(RunFailed, match=wanted):
        budget.charge("worker 3 died", 21.0)


def test_no_failures_may_be_asked_for() -> None:
    with pytest.raises(RunFailed, match="more than 0 failures"):
        Budget(FailureConfig(max_failures=0)).charge("worker 0 died", 0.0)


def test_negative_settings_are_refused() -> None:
    with pytest.raises(UserError, match="max_failures is -1: give"):
        FailureConfig(max_failures=-1)
    with pytest.raises(UserError, match="grace is -2: give"):
        FailureConfig(grace=-2)


def test_a_job_whose_run_failed_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def job(argv: Sequence[str]) -> None:
        raise RunFailed("more than 16 failures")

    assert run(job, []) == 1
    assert capsys.readouterr().err == "error: more than 16 failures\n"

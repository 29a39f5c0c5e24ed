"""Signals end a job at once, with its status; nothing else does that they did not ask for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from test_jobs import ROOT, Errors
from test_resume import data  # noqa: F401 - a lake large enough to be at work on

from gmm_dist.commands import early, ending, stopping, talking
from gmm_dist.commands.ending import run, said_how_to_resume
from gmm_dist.commands.options import CommandLine
from gmm_dist.errors import UserError

COMMAND_LINE = CommandLine(("gmm-dist", "sweep"), ["D", "--k", "2", "--output", "O"])
STATUSES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture(autouse=True)
def _signals_as_a_terminal_leaves_them() -> Iterator[None]:
    """Have no signal ignored, though nohup may run the tests."""
    before = {number: signal.getsignal(number) for number in STATUSES}
    for number in STATUSES:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STATUSES)
def test_a_signal_ends_the_job_with_its_status_and_the_command_that_goes_on(
    capfd: Errors, number: signal.Signals
) -> None:
    tidied = []

    def job(argv: Sequence[str]) -> None:
        with said_how_to_resume(COMMAND_LINE):
            try:
                os.kill(os.getpid(), number)
                time.sleep(30)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)  # one who is impatient changes nothing
                time.sleep(0.1)
                tidied.append(True)

    before = [signal.getsignal(each) for each in STATUSES]
    assert run(job, []) == STATUSES[number]
    assert tidied == [True]
    err = capfd.readouterr().err
    assert err.startswith(f"error: stopped by {number.name}; go on with: gmm-dist ")
    assert err.endswith("gmm-dist sweep D --k 2 --output O --resume\n")
    assert [signal.getsignal(each) for each in STATUSES] == before


def test_a_signal_as_the_interpreter_ends_changes_nothing(
    capfd: Errors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early, "_has_begun", False)
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("the process was ended"))
    before = signal.signal(signal.SIGTERM, early._end)
    try:
        assert run(lambda argv: None, []) == 0
        signal.raise_signal(signal.SIGTERM)  # the handler that it had before is there again
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("number", STATUSES)
def test_a_signal_that_the_parent_has_ignored_stays_ignored(number: signal.Signals) -> None:
    done = []

    def job(argv: Sequence[str]) -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        done.append(True)

    signal.signal(number, signal.SIG_IGN)
    assert run(job, []) == 0
    assert done == [True]


def test_an_error_that_a_signal_caused_is_told_as_the_signal(capfd: Errors) -> None:
    def job(argv: Sequence[str]) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        except KeyboardInterrupt:
            raise UserError("what was cut off looks damaged") from None

    assert run(job, []) == 143
    assert capfd.readouterr().err == "error: stopped by SIGTERM\n"


def test_a_commit_is_not_broken_off_and_then_the_signal_counts(capfd: Errors) -> None:
    done = []

    def job(argv: Sequence[str]) -> None:
        with stopping.holding():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            done.append("committed")
        done.append("more")

    assert run(job, []) == 143
    assert done == ["committed"]


def test_what_ends_by_itself_in_a_moment_ends_with_its_own_status() -> None:
    def job(argv: Sequence[str]) -> None:
        stopping.finish()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)

    assert run(job, []) == 0


def test_a_job_that_does_not_end_is_ended(tmp_path: Path) -> None:
    code = (
        "import os, signal, time; from gmm_dist.commands import stopping, ending\n"
        "stopping.SECONDS = 0.5\n"
        "def job(argv):\n"
        "    stopping.finish(); os.kill(os.getpid(), signal.SIGTERM)\n"
        "    while True: time.sleep(1)\n"
        "ending.run(job, [])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 143
    assert done.stderr == b"error: stopped by SIGTERM, before all was tidied up\n"


def test_last_words_that_nobody_reads_keep_no_job_from_ending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A full pipe takes no more, and who should empty it may have stopped."""
    ended, read = threading.Event(), threading.Event()
    monkeypatch.setattr(stopping, "SECONDS", 0.05)
    monkeypatch.setattr(stopping, "_SAYING", 0.05)
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())
    stop = stopping.Stopper()
    with stop.listening(lambda: read.wait(60)):  # type: ignore[arg-type, return-value]
        stop.finish()
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended.wait(30)
    read.set()


@pytest.mark.parametrize("is_committed", [False, True])
def test_a_reader_that_has_stopped_holds_up_no_job_that_is_told_to_end(
    is_committed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once all is committed, the job also ends as if all had been read."""
    reader, writer = os.pipe()
    monkeypatch.setattr(os, "_exit", lambda status: os.close(reader))  # were it not so
    kept = os.dup(1)
    os.dup2(writer, 1)
    stdout, sys.stdout = sys.stdout, open(1, "w", closefd=False)  # noqa: SIM115

    def job(argv: Sequence[str]) -> None:
        if is_committed:
            stopping.finish()
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        talking.say("x" * 1_000_000)

    began = time.monotonic()
    try:
        status = run(job, [])
        sys.stdout.close()
    finally:
        sys.stdout = stdout
        os.dup2(kept, 1)
        for descriptor in (writer, kept):
            os.close(descriptor)
    assert time.monotonic() - began < stopping.SECONDS / 2
    assert status == (0 if is_committed else 143)
    os.close(reader)


def test_jobs_run_in_threads_too() -> None:
    """Handlers of signals are the main thread's to set."""
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(run(lambda argv: 3, [])))
    thread.start()
    thread.join()
    assert statuses == [ending.KEPT_BACK]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("number", "phrase", "to_group"),
    [
        (signal.SIGTERM, "starting Ray", False),
        (signal.SIGTERM, "pass 10:", False),
        (signal.SIGINT, "pass 10:", True),
    ],
)
def test_a_stopped_job_leaves_neither_processes_nor_its_lease(
    tmp_path: Path,
    data: str,  # noqa: F811
    number: signal.Signals,
    phrase: str,
    to_group: bool,
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "jobs" / "sweep.py"), data, "--output", str(out)]
    command += ["--k", "3,6", "--tol", "0", "--max-iter", "60", "--precision", "float64"]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    job = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    assert job.stderr is not None
    for line in job.stderr:
        if phrase in line:
            break
    time.sleep(0.5)
    began = time.monotonic()
    (os.killpg if to_group else os.kill)(job.pid, number)
    said = job.communicate(timeout=120)[1]
    assert time.monotonic() - began < stopping.SECONDS + 10
    assert job.returncode == 128 + number
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith(f"error: stopped by {number.name}")
    assert said.rstrip().endswith("--resume")
    assert not (out / "_attempts" / "lease").exists()
    deadline = time.monotonic() + 20
    while session := _session(job.pid):
        assert time.monotonic() < deadline, session
        time.sleep(0.2)


def _session(leader: int) -> list[str]:
    """Return the processes of a session that are still there."""
    listed = subprocess.run(
        ["ps", "-eo", "sid=,stat=,args="], capture_output=True, text=True, check=True
    ).stdout
    found = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [args[-1] for args in found if args[0] == str(leader) and "Z" not in args[1]]

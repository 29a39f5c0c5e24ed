"""Whatever ends a job is told in one line, with its status and the command that goes on."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

import botocore.exceptions
import pyarrow as pa
import pytest
import ray.exceptions
from test_jobs import Errors

from gmm_dist.commands.ending import run, said_how_to_resume
from gmm_dist.commands.options import CommandLine
from gmm_dist.errors import RunFailed, UserError
from gmm_dist.runs.lease import LeaseLost

COMMAND_LINE = CommandLine(("gmm-dist", "fit"), ["D", "--k", "2", "--output", "O"])
GO_ON = f"; go on with: {COMMAND_LINE.to_resume()}"


def ended_by(error: BaseException, capfd: Errors) -> tuple[int, str]:
    def job(argv: Sequence[str]) -> None:
        with said_how_to_resume(COMMAND_LINE):
            raise error

    status = run(job, [])
    err = capfd.readouterr().err
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return status, err.rstrip("\n")


def of_ray(cause: Exception) -> Exception:
    return ray.exceptions.RayTaskError("load", "Traceback: a page of it\n" * 9, cause)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/out/model"),
            "/out/model: No space left on device: free space there",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "/out"),
            "/out: Read-only file system",
        ),
        (OSError(errno.EMFILE, "Too many open files", "/a"), "/a: Too many open files: raise"),
        (OSError(errno.ENOSPC, "No space left on device"), "the output, or the folder for temp"),
        (MemoryError(), "out of memory: use a machine with more"),
        (ray.exceptions.RaySystemError("the raylet\nis gone"), "Ray failed (RaySystemError: "),
        (of_ray(OSError(errno.EIO, "Input/output error", "/d/a.parquet")), "in a worker: /d/a.par"),
        (of_ray(KeyError("x")), "in a worker: KeyError: 'x'"),
        (
            botocore.exceptions.ClientError({"Error": {"Code": "Odd", "Message": "m"}}, "Get"),
            "ClientError: An error occurred (Odd)",
        ),
        (pa.ArrowInvalid("not\nparquet"), "ArrowInvalid: not parquet"),
        (RecursionError("maximum recursion depth exceeded"), "RecursionError: maximum recursion"),
        (RunFailed("machines failed"), "machines failed; go on with"),
    ],
)
def test_the_worlds_failures_are_one_line_with_the_command_that_goes_on(
    capfd: Errors, error: Exception, line: str
) -> None:
    status, said = ended_by(error, capfd)
    assert status == 1
    assert said.startswith(f"error: {line}")
    assert said.endswith(GO_ON)


def test_what_no_resuming_mends_names_no_command(capfd: Errors) -> None:
    assert ended_by(UserError("a hole"), capfd) == (2, "error: a hole")
    assert ended_by(LeaseLost("it has passed on"), capfd) == (1, "error: it has passed on")


def test_the_debug_log_has_the_traceback(capfd: Errors, monkeypatch: pytest.MonkeyPatch) -> None:
    def job(argv: Sequence[str]) -> None:
        raise KeyError("x")

    assert run(job, []) == 1
    hint = capfd.readouterr().err
    assert "(GMM_DIST_DEBUG=1 shows the traceback)" in hint
    monkeypatch.setenv("GMM_DIST_DEBUG", "1")
    assert run(job, []) == 1
    err = capfd.readouterr().err
    assert "Traceback (most recent call last):" in err
    assert "in job" in err
    assert err.endswith(hint)


def test_help_ends_with_0(capfd: Errors) -> None:
    def job(argv: Sequence[str]) -> None:
        raise SystemExit(0)

    with pytest.raises(SystemExit) as ended:
        run(job, [])
    assert ended.value.code == 0


def test_the_command_that_goes_on_is_printable_and_means_the_same() -> None:
    name = "a'\x1b\nb" + os.fsdecode(b"\xff")
    words = CommandLine(("gmm-dist", "fit"), [name, "--k", "2"]).to_resume()
    assert words == r"gmm-dist fit $'a\x27\x1b\x0ab\xff' --k 2 --resume"

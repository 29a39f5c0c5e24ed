"""Whatever becomes of those who listen, a job's work goes on and its results are there."""

from __future__ import annotations

import errno
import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rich.console
from test_jobs import ROOT, table

import gmm_dist
from gmm_dist.commands import sweep as sweep_job
from gmm_dist.commands import talking
from gmm_dist.commands.progress import Progress
from gmm_dist.commands.talking import Unfailing
from gmm_dist.errors import UserError
from gmm_dist.formats import counted, printable

NAMES = ["größe", "an\x1b[2Jother\nline"]


class Broken(io.TextIOBase):
    """A stream that fails at each write or flush, as told."""

    encoding = "utf-8"

    def __init__(self, error: BaseException, *, at: str = "write") -> None:
        self._error, self._at = error, at

    def write(self, text: str) -> int:
        if self._at == "write":
            raise self._error
        return len(text)

    def flush(self) -> None:
        if self._at == "flush":
            raise self._error


def ascii_stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")


def lake(folder: Path) -> str:
    """Write rows whose columns have names that no ASCII terminal can show, and worse."""
    folder.mkdir()
    rows = table()
    columns = {NAMES[0]: rows["x"], NAMES[1]: rows["y"]}
    pq.write_table(pa.table(columns), folder / "a.parquet")
    return str(folder)


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("out", "err"),
    [
        (lambda: Broken(BrokenPipeError(errno.EPIPE, "Broken pipe")), io.StringIO),
        (lambda: Broken(FULL, at="flush"), lambda: Broken(FULL)),
        (ascii_stream, ascii_stream),
        (lambda: None, lambda: None),
    ],
    ids=["no-reader", "full-disk", "ascii", "closed"],
)
def test_a_sweep_commits_whoever_listens(
    tmp_path: Path,
    in_process: None,
    monkeypatch: pytest.MonkeyPatch,
    out: Callable[[], io.TextIOBase | None],
    err: Callable[[], io.TextIOBase | None],
) -> None:
    data, output = lake(tmp_path / "lake"), tmp_path / "out"
    heard, read = out(), err()
    monkeypatch.setattr(sys, "stdout", heard)
    monkeypatch.setattr(sys, "stderr", read)
    argv = [data, "--columns", *NAMES, "--k", "2,3", "--output", str(output)]
    assert sweep_job.main(argv) == 0
    assert (sys.stdout, sys.stderr) == (heard, read)
    assert gmm_dist.load(str(output)).feature_names == tuple(NAMES)
    if isinstance(heard, io.TextIOWrapper):
        heard.flush()
        said = heard.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
        assert said.splitlines()[-1].startswith("best by BIC: k=3 full, ")


def test_a_log_handler_and_a_table_that_fail_cost_nothing(
    tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("the log's collector has gone")

    def exits(*args: object, **options: object) -> None:
        raise SystemExit(1)  # as rich does where a pipe is cut

    monkeypatch.setattr(rich.console.Console, "print", exits)
    handlers = {"": Failing(), "gmm_dist": Failing()}
    for name, handler in handlers.items():
        logging.getLogger(name).addHandler(handler)
    try:
        argv = [lake(tmp_path / "lake"), "--columns", *NAMES, "--k", "2"]
        argv += ["--output", str(tmp_path / "out")]
        assert sweep_job.main(argv) == 0
    finally:
        for name, handler in handlers.items():
            logging.getLogger(name).removeHandler(handler)
    assert gmm_dist.load(str(tmp_path / "out")).n_components == 2


def test_names_from_the_data_neither_move_the_cursor_nor_begin_a_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a\x1b[31m\nlake"
    argv = [lake(folder), "--columns", NAMES[1], "no\rpe", "--k", "2", "--output", "s3://x/\u202ey"]
    assert sweep_job.main([*argv[:-1], str(tmp_path / "out")]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "\x1b" not in err
    assert "\r" not in err
    assert r"no\rpe" in err
    assert r"an\x1b[2Jother\nline" in err


def test_an_error_of_ours_escapes_what_names_hold() -> None:
    assert str(UserError("file 'a\x1b\n\u202eb'")) == r"file 'a\x1b\n\u202eb'"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("größe 東京 a\u00a0b", "größe 東京 a\u00a0b"),
        ("\x00\x1b[0m\x7f\x9b", r"\x00\x1b[0m\x7f\x9b"),
        ("a\r\n\tb\u2028", r"a\r\n\tb\u2028"),
        ("\udcff\u202e\u200b\ufeff", r"\udcff\u202e\u200b\ufeff"),
    ],
)
def test_control_characters_are_escaped_and_letters_stay(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_one_thing_is_counted_in_the_singular() -> None:
    words = [counted(n, noun) for noun in ("worker", "pass") for n in (0, 1, 1234)]
    assert words == ["0 workers", "1 worker", "1,234 workers", "0 passes", "1 pass", "1,234 passes"]


def test_a_stream_that_failed_once_is_left_alone() -> None:
    stream = Unfailing(Broken(FULL))
    assert stream.write("one") == 3
    assert stream.lost is FULL
    stream.flush()
    assert stream.write("two") == 3


def test_a_full_disk_behind_stdout_is_told_of_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    err = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Broken(FULL))
    monkeypatch.setattr(sys, "stderr", err)
    with talking.unfailing():
        talking.say("the result")
    assert err.getvalue() == (
        "what was printed could not be written to stdout (No space left on device)\n"
    )


class Terminal(io.StringIO):
    """A terminal, as far as `isatty` tells."""

    def isatty(self) -> bool:
        return True


def test_log_lines_stand_above_the_live_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    with talking.unfailing():
        progress = Progress(talking.screen(stderr=True))
        with progress.shown():
            progress.loading(1, 8, 77)
            logging.getLogger("gmm_dist").info("a line of the log")
            progress.loading(2, 8, 99)
    lines = [line for line in terminal.getvalue().split("\n") if "a line of the log" in line]
    assert len(lines) == 1
    # What rich writes before a line of its own: back to the display's first column, and wiped.
    before = lines[0].partition("a line")[0]
    assert "loaded" not in before.rpartition("\x1b[2K")[2]
    assert not lines[0].rstrip().endswith("rows")


@pytest.mark.parametrize("setting", [{"FORCE_COLOR": "1"}, {"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_no_display_is_drawn_where_there_is_no_terminal_for_it(
    monkeypatch: pytest.MonkeyPatch, setting: dict[str, str]
) -> None:
    stream = Terminal() if "TERM" in setting else io.StringIO()
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", stream)
    with talking.unfailing():
        progress = Progress(talking.screen(stderr=True))
        with progress.shown():
            progress.loading(8, 8, 1)
    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue().endswith("loaded 8 of 8 shards, 1 row\n")


def test_descriptors_that_are_closed_and_full_leave_the_status_alone(tmp_path: Path) -> None:
    """The interpreter flushes once more as it ends, and would end with 120."""
    code = (
        "import os, sys; from gmm_dist.commands import talking\n"
        "with talking.unfailing():\n"
        "    talking.say('x' * 100_000); talking.complain('y')\n"
        "    assert os.open('data', os.O_CREAT | os.O_WRONLY) > 2\n"
        "sys.exit(0)\n"
    )
    for redirected in (">&- 2>&-", ">/dev/full 2>/dev/full", "<&- >&-", "| true"):
        shell = f'cd {tmp_path}; PYTHONPATH={ROOT} "$0" -c "$1" {redirected}; '
        shell += "exit ${PIPESTATUS[0]}"
        done = subprocess.run(
            ["bash", "-c", shell, sys.executable, code],
            capture_output=True,
            env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"},
            timeout=120,
            check=False,
        )
        assert (done.returncode, done.stderr) in ((0, b""), (0, b"y\n"), (0, done.stderr)), done
        assert b"Traceback" not in done.stderr
        assert b"Exception ignored" not in done.stderr

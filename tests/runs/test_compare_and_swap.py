"""A cell changes only if it is what was read: in three stores, whoever is stopped or killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from botocore.exceptions import ClientError

from gmm_dist.errors import UserError
from gmm_dist.runs import compare_and_swap
from gmm_dist.runs.compare_and_swap import Cell, Version, _LocalCell, cell_at
from gmm_dist.runs.folder import Folder
from gmm_dist.storage import is_transient

ROOT = Path(__file__).parents[2]
SHORT = 0.3  # seconds that a turn may last


@pytest.fixture(params=["local", "s3", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "s3":
        return Folder.of(f"{request.getfixturevalue('s3_lake').url}/reg")
    if request.param == "memory":
        return Folder.of(f"memory://cells/{tmp_path.name}")
    return Folder.of(str(tmp_path / "reg"))


@pytest.fixture
def cell(folder: Folder) -> Cell:
    return cell_at(folder, "p.json")


@pytest.fixture
def here(tmp_path: Path) -> Cell:
    return cell_at(Folder.of(str(tmp_path)), "p.json")


def put(cell: Cell, data: bytes) -> Version:
    stored = cell.swap(cell.read(), data)
    assert stored is not None
    return stored


def test_a_cell_changes_only_on_condition_of_what_it_was(cell: Cell) -> None:
    assert cell.read() is None
    first = cell.swap(None, b"one")
    assert first is not None
    assert cell.read() == first
    assert cell.swap(None, b"two") is None
    second = cell.swap(first, b"three")
    assert second is not None
    assert cell.read() == second
    assert second.data == b"three"
    assert cell.swap(first, b"four") is None
    cell.remove(first)
    assert cell.read() == second
    cell.remove(second)
    assert cell.read() is None
    assert cell.swap(second, b"five") is None
    assert cell.read() is None
    assert cell.swap(None, b"six") is not None


def test_what_a_cell_holds_is_a_plain_file(folder: Folder, cell: Cell) -> None:
    put(cell, b"one")
    put(cell, b"two")
    assert folder.read("p.json") == b"two"
    assert folder.names() == {"p.json"}
    folder.write(b"restored from a backup", "p.json")
    put(cell, b"three")
    assert folder.read("p.json") == b"three"


# SeaweedFS lets those that compete for a key wait for whole seconds.
@pytest.mark.parametrize(
    ("folder", "turns"), [("local", 10), ("s3", 1), ("memory", 10)], indirect=["folder"]
)
def test_of_many_at_once_one_succeeds(folder: Folder, turns: int) -> None:
    start = threading.Barrier(12)
    cells = [cell_at(folder, "p.json") for _ in range(12)]

    def change(number: int, old: Version | None) -> Version | None:
        start.wait()
        return cells[number].swap(old, b"%d after %s" % (number, (old and old.data) or b"none"))

    def winner(old: Version | None) -> Version:
        (stored,) = [s for s in threads.map(change, range(12), [old] * 12) if s is not None]
        return stored

    with ThreadPoolExecutor(12) as threads:
        for _ in range(turns):
            created = winner(None)
            assert cells[0].read() == created
            taken = winner(created)
            assert cells[0].read() == taken
            cells[0].remove(taken)
    assert folder.names() == set()


def test_two_that_race_for_an_absent_file_leave_one_whole(tmp_path: Path) -> None:
    """What grows lies in a folder that the caller names, and nothing of it stays."""
    out, scratch = Folder.of(str(tmp_path)), Folder.of(str(tmp_path / "_attempts" / "1"))
    one, two = (cell_at(out, "manifest.json", scratch=scratch) for _ in range(2))
    assert one.swap(None, b"1") is not None
    assert two.swap(None, b"2") is None
    assert out.read("manifest.json") == b"1"
    assert out.names() == {"manifest.json", "_attempts"}
    assert scratch.names() == set()


def test_a_folder_in_a_cells_place_is_one_line(tmp_path: Path, here: Cell) -> None:
    (tmp_path / "p.json" / "attempt,1,15,held").mkdir(parents=True)
    with pytest.raises(UserError, match=r"p\.json: a folder, where a file of ours should be"):
        here.read()


@pytest.mark.parametrize(("status", "code"), [(409, "ConditionalRequestConflict"), (412, "")])
@pytest.mark.parametrize("folder", ["s3"], indirect=True)
def test_a_conflict_of_requests_decides_nothing(
    folder: Folder, cell: Cell, monkeypatch: pytest.MonkeyPatch, status: int, code: str
) -> None:
    async def refused(*method: str, **arguments: object) -> None:
        meta = {"HTTPStatusCode": status}
        cause = ClientError({"Error": {"Code": code}, "ResponseMetadata": meta}, "PutObject")
        raise OSError("what the store says") from cause

    first = put(cell, b"one")
    monkeypatch.setattr(folder.fs, "_call_s3", refused)
    if status == 412:
        assert cell.swap(first, b"two") is None
    else:
        with pytest.raises(OSError, match="what the store says") as raised:
            cell.swap(first, b"two")
        assert is_transient(raised.value)


# ------------------------------------------------------------------------- in the middle of a turn


@contextmanager
def stopped(path: Path, change: str, *, by: str = "STOP") -> Iterator[subprocess.Popen[str]]:
    """Run a process that a signal stops between the last look at a local cell and the change."""
    script = textwrap.dedent(f"""
        import os, signal, sys
        sys.path[:0] = [{str(ROOT)!r}]
        from gmm_dist.runs import compare_and_swap
        from gmm_dist.runs.folder import Folder
        cell = compare_and_swap.cell_at(Folder.of({str(path.parent)!r}), {path.name!r})
        old, rename = cell.read(), compare_and_swap._renamed
        compare_and_swap._LONGEST_TURN = {SHORT}
        def stop(*paths):
            if not {{"new", "old"}} & {{path.name for path in paths}}:
                return rename(*paths)  # of another's turn
            compare_and_swap._renamed = rename
            print("stopped", flush=True)
            os.kill(os.getpid(), signal.SIG{by})
            return rename(*paths)
        compare_and_swap._renamed = stop
        print({change}, flush=True)
    """)
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "stopped\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def goes_on(process: subprocess.Popen[str]) -> str:
    """Let a stopped process end, and return what it says of its change."""
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    os.kill(process.pid, signal.SIGCONT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return said.strip()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_and_swap, "_LONGEST_TURN", SHORT)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("change", ["cell.swap(old, b'late')", "cell.remove(old)"])
def test_who_was_stopped_in_its_turn_changes_nothing(
    tmp_path: Path, here: Cell, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    put(here, b"old")
    with stopped(tmp_path / "p.json", change) as zombie:
        began = time.monotonic()
        put(here, b"new")
        assert time.monotonic() - began >= SHORT
        monkeypatch.setattr(_LocalCell, "_end", lambda *turns: pytest.fail("it is over for good"))
        new = put(here, b"newer")
        assert goes_on(zombie) == "None"
    assert here.read() == new
    assert list(tmp_path.iterdir()) == [tmp_path / "p.json"]


@pytest.mark.usefixtures("impatient")
def test_who_was_stopped_while_others_have_their_turn_takes_nobodys_away(
    tmp_path: Path, here: Cell
) -> None:
    """It goes on while its successor is between its own last look and its change."""
    put(here, b"old")
    with (
        stopped(tmp_path / "p.json", "cell.swap(old, b'late')") as first,
        stopped(tmp_path / "p.json", "cell.swap(old, b'second')") as second,
    ):
        assert goes_on(first) == "None"
        assert here.read() == Version(b"old")
        assert "second" in goes_on(second)
    assert here.read() == Version(b"second")
    assert list(tmp_path.iterdir()) == [tmp_path / "p.json"]


@pytest.mark.usefixtures("impatient")
def test_who_was_killed_in_its_turn_is_waited_out(tmp_path: Path, here: Cell) -> None:
    put(here, b"old")
    with stopped(tmp_path / "p.json", "cell.swap(old, b'late')", by="KILL") as dead:
        dead.wait()
        assert (tmp_path / ".p.json.turn").exists()
        new = put(here, b"new")
    assert here.read() == new
    assert list(tmp_path.iterdir()) == [tmp_path / "p.json"]


def test_turns_that_follow_each_other_are_waited_for(
    tmp_path: Path, here: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long they last in all: each of them is short."""
    put(here, b"old")
    turns = tmp_path / ".p.json.turn"
    (turns / "0").mkdir(parents=True)
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += 1.0
        if clock[0] == 10.0:
            (turns / "9").rmdir()
        else:
            (turns / f"{clock[0] - 1:.0f}").rename(turns / f"{clock[0]:.0f}")

    fake = SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep)
    monkeypatch.setattr(compare_and_swap, "time", fake)
    monkeypatch.setattr(_LocalCell, "_end", lambda *turns: pytest.fail("it was short"))
    assert put(here, b"new") == Version(b"new")
    assert clock == [10.0]


@pytest.mark.parametrize("left", [".nfs0001", ".DS_Store"])
@pytest.mark.usefixtures("impatient")
def test_what_systems_leave_among_turns_is_moved_away(
    tmp_path: Path, here: Cell, left: str
) -> None:
    put(here, b"old")
    (tmp_path / ".p.json.turn").mkdir()
    (tmp_path / ".p.json.turn" / left).touch()
    assert put(here, b"new") == Version(b"new")
    assert list(tmp_path.iterdir()) == [tmp_path / "p.json"]


def counting(url: str, times: int) -> subprocess.Popen[str]:
    script = textwrap.dedent(f"""
        import sys
        sys.path[:0] = [{str(ROOT)!r}]
        from gmm_dist.runs.compare_and_swap import cell_at
        from gmm_dist.runs.folder import Folder
        cell = cell_at(Folder.of({url!r}), "count")
        for _ in range({times}):
            old = cell.read()
            while cell.swap(old, b"%d" % (1 + int(old.data) if old else 1)) is None:
                old = cell.read()
    """)
    return subprocess.Popen([sys.executable, "-c", script])


def test_processes_at_once_lose_no_change(tmp_path: Path) -> None:
    processes = [counting(str(tmp_path), 40) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert cell_at(Folder.of(str(tmp_path)), "count").read() == Version(b"80")

"""A few cells of the kill matrix; `python -m tools.chaos` runs them all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import hosts
from tools import chaos
from tools.chaos import Cell, Matrix


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Matrix, str]]:
    """Yield a matrix on three hosts and the sha256 of the undisturbed run's model."""
    if (why := hosts.missing()) is not None:
        pytest.skip(why)
    with hosts.hosts(2, s3_rate="20mbit") as all_:
        chaos.put_lake(all_, n_rows=chaos.QUICK_ROWS)
        logs: Path = tmp_path_factory.mktemp("chaos")
        cells = Matrix(all_, logs, quick=True)
        wanted, _ = cells.undisturbed()
        yield cells, wanted


@pytest.mark.faults
@pytest.mark.parametrize("name", chaos.QUICK)
def test_a_fault_changes_no_bit(matrix: tuple[Matrix, str], name: str) -> None:
    cells, wanted = matrix
    cell = cells.cell(*name.split(":"), wanted)
    assert cell.is_same, f"{cell.outcome}\n{cells.log(cell)}"


def test_cells_become_a_table() -> None:
    cells = [
        Cell("actor", "load", "same", 12.4),
        Cell("actor", "commit", "DIFFERENT", 1),
        Cell("s3", "commit", "status 1", 200),
    ]
    assert chaos.table(cells).splitlines() == [
        "| fault | load | commit |",
        "|---|---|---|",
        "| actor | same, 12 s | DIFFERENT, 1 s |",
        "| s3 | – | status 1, 200 s |",
    ]


def test_a_wrong_cell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        chaos.main(["--cells", "actor:lunch"])
    assert "'actor:lunch' is not FAULT:PHASE of actor, host, gone" in capsys.readouterr().err


def test_nothing_is_left_on_this_machine_after_an_error() -> None:
    if (why := hosts.missing()) is not None:
        pytest.skip(why)
    network = hosts.Network()
    host = network.add("a")
    sleeper = hosts.subprocess.Popen(["ip", "netns", "exec", host.namespace, "sleep", "99"])
    host.processes.append(sleeper)
    while sleeper.pid not in host.pids():
        pass
    network.close()
    assert sleeper.wait(5) == -hosts.signal.SIGKILL
    left = hosts.subprocess.check_output(["ip", "netns", "list"], text=True)
    assert host.namespace not in left

"""Of several that want a lease one has it: on a local disk, on S3, within a process."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from gmm_dist.errors import UserError
from gmm_dist.runs.compare_and_swap import Version
from gmm_dist.runs.folder import Folder
from gmm_dist.runs.lease import Held, Lease, LeaseCell, LeaseLost, Terms, acquire, lease_at

SHORT = 0.6  # seconds

pytestmark = pytest.mark.faults  # leases of a second: not beside other work


@pytest.fixture(params=["local", "s3", "memory"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_lake').url}/out/_attempts/lease"
    if request.param == "memory":
        return f"memory://leases/{tmp_path.name}/lease"
    return str(tmp_path / "out" / "_attempts" / "lease")


@pytest.fixture
def cell(out: str) -> LeaseCell:
    return lease_at(Folder.of(out), seconds=SHORT)


def never(attempt: str) -> None:
    pytest.fail(f"the commit of {attempt} was completed")


@contextmanager
def held(
    cell: LeaseCell, attempt: str, *, wait: bool = False, seconds: float = SHORT
) -> Iterator[Lease]:
    lease = acquire(cell, attempt, Terms(url="OUT", seconds=seconds, wait=wait), finish=never)
    assert lease is not None
    try:
        yield lease
    finally:
        lease.release()


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ------------------------------------------------------------------------- asking for it


def test_a_dead_holder_is_waited_out(cell: LeaseCell, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gmm_dist.runs.lease")
    cell.swap(None, Held(attempt="dead", count=41, seconds=SHORT))
    began = time.monotonic()
    with held(cell, "next") as lease:
        assert time.monotonic() - began >= SHORT
        lease.check()
        found = cell.read()
        assert found is not None
        assert found.held.attempt == "next"
        assert found.held.count >= 42
    assert cell.read() is None
    first, second = (record.getMessage() for record in caplog.records)
    assert (
        first == f"OUT: held by dead; waiting up to {SHORT:g} s to see whether it still renews "
        "its lease"
    )
    assert second == "OUT: goes on after dead"


@pytest.mark.parametrize("wait", [False, True])
def test_a_living_holder_is_left_alone(cell: LeaseCell, wait: bool) -> None:
    began = time.monotonic()
    with (
        held(cell, "living", seconds=2.5 * SHORT),
        pytest.raises(UserError, match=r"OUT: another driver is at work .*\(living\): wait until"),
        held(cell, "next", wait=wait),
    ):
        pytest.fail("two hold it")
    assert (time.monotonic() - began >= 7.5 * SHORT) == wait


def test_who_waits_gets_it_when_the_holder_ends(cell: LeaseCell) -> None:
    with ThreadPoolExecutor(1) as threads, held(cell, "first", seconds=30):

        def second() -> float:
            with held(cell, "second", wait=True, seconds=30):
                return time.monotonic()

        waiting = threads.submit(second)
        time.sleep(0.2)
        assert not waiting.done()
        ended = time.monotonic()
    assert waiting.result() > ended


@pytest.mark.parametrize("out", ["local", "s3"], indirect=True)
def test_of_many_that_wait_one_takes_over(cell: LeaseCell) -> None:
    cell.swap(None, Held(attempt="dead", count=0, seconds=SHORT))
    at_work, most = 0, 0
    lock = threading.Lock()

    def run(number: int) -> bool:
        nonlocal at_work, most
        try:
            with held(cell, f"next-{number}", seconds=20):
                with lock:
                    at_work += 1
                    most = max(most, at_work)
                time.sleep(1)
                with lock:
                    at_work -= 1
            return True
        except UserError:
            return False

    with ThreadPoolExecutor(8) as threads:
        worked = list(threads.map(run, range(8)))
    assert most == 1
    assert any(worked)
    assert cell.read() is None


def test_a_dead_holders_decision_is_completed(cell: LeaseCell) -> None:
    cell.swap(None, Held(attempt="decided", count=7, seconds=SHORT, state="decided"))
    completed: list[str] = []
    assert acquire(cell, "next", Terms(url="OUT", seconds=SHORT), finish=completed.append) is None
    assert completed == ["decided"]
    assert cell.read() is None


class Careless:
    """A store that replaces whatever the condition says."""

    stored: Version | None = None

    def read(self) -> Version | None:
        return self.stored

    def swap(self, old: Version | None, new: bytes) -> Version | None:
        self.stored = Version(new)
        return self.stored

    def remove(self, old: Version) -> None:
        self.stored = None


def test_a_store_without_conditional_replacement_is_refused() -> None:
    careless = LeaseCell(Careless(), "OUT/_attempts/lease")
    with pytest.raises(UserError, match="overwrites where a conditional"), held(careless, "any"):
        pytest.fail("work began")


# ------------------------------------------------------------------------- holding it


def test_a_held_lease_is_renewed(cell: LeaseCell) -> None:
    with held(cell, "holder") as lease:
        for _ in range(2):
            before = cell.read()
            until(lambda before=before: cell.read() != before)
        assert lease.is_current
        lease.check()


def test_a_lease_that_was_taken_over_is_lost(
    cell: LeaseCell, caplog: pytest.LogCaptureFixture
) -> None:
    with held(cell, "zombie") as lease:
        taken = None
        while taken is None:
            found = cell.read()
            assert found is not None
            taken = cell.swap(found, Held(attempt="next", count=found.held.count + 1, seconds=60))
        until(lambda: lease.is_lost)
        assert not lease.is_current
        with pytest.raises(LeaseLost, match=r"\(attempt zombie\) has passed to .* \(next\)"):
            lease.check()
        with pytest.raises(LeaseLost):
            lease.decide()
    assert cell.read() == taken
    assert "has passed to another driver (next): this one stops" in caplog.text


def test_a_decision_ends_the_renewals(cell: LeaseCell) -> None:
    with held(cell, "holder") as lease:
        lease.decide()
        decided = cell.read()
        assert decided is not None
        assert decided.held.state == "decided"
        time.sleep(SHORT)
        assert cell.read() == decided
        lease.release(keep=True)
        assert cell.read() == decided


def test_a_decision_needs_the_lease(cell: LeaseCell) -> None:
    with held(cell, "zombie", seconds=60) as lease:
        found = cell.read()
        assert found is not None
        taken = cell.swap(found, Held(attempt="next", count=found.held.count + 1, seconds=60))
        # Its clock says that the lease is good; the store knows better.
        assert lease.is_current
        with pytest.raises(LeaseLost):
            lease.decide()
    assert cell.read() == taken


class Stumbling(MemoryFileSystem):
    """A store that fails now and then, before or after it has done what it was asked to."""

    protocol = "stumbling"
    store: dict[str, Any] = {}  # noqa: RUF012 - fsspec's own way: one store per class
    pseudo_dirs = [""]  # noqa: RUF012
    before = after = 0

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        if Stumbling.before > 0:
            Stumbling.before -= 1
            raise OSError("stumbled before")
        super().pipe_file(path, value, mode=mode)
        if Stumbling.after > 0:
            Stumbling.after -= 1
            raise OSError("stumbled after")


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failed_renewal_is_no_end(when: str, caplog: pytest.LogCaptureFixture) -> None:
    fsspec.register_implementation("stumbling", Stumbling, clobber=True)
    Stumbling.store.clear()
    cell = lease_at(Folder.of("stumbling://lease"), seconds=SHORT)
    with held(cell, "holder") as lease:
        setattr(Stumbling, when, 1)
        until(lambda: f"OUT: the lease was not renewed: stumbled {when}" in caplog.text)
        failed = cell.read()
        until(lambda: cell.read() != failed)
        until(lambda: lease.is_current)
        lease.check()
        lease.decide()
    assert cell.read() is None


def test_a_lease_that_ran_out_unseen_is_still_ours(caplog: pytest.LogCaptureFixture) -> None:
    """A store may fail for longer than a lease lasts: nobody could take it over either."""
    fsspec.register_implementation("stumbling", Stumbling, clobber=True)
    Stumbling.store.clear()
    cell = lease_at(Folder.of("stumbling://lease"), seconds=SHORT)
    with held(cell, "holder") as lease:
        Stumbling.before = 1_000_000
        until(lambda: not lease.is_current)
        lease.check()
        Stumbling.before = 0
        lease.check()
        assert lease.is_current

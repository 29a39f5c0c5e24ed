"""Faults, real ones: whatever happens to workers, sums have the same bits and rows count once."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from gmm_dist.config import Cluster, FailureConfig
from gmm_dist.errors import RunFailed, UserError
from gmm_dist.shards.connection import connected
from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import Block, Loader, ShardRows
from gmm_dist.shards.ray_shards import RayShards, session

N_SHARDS, D = 9, 3
# What takes minutes in life takes seconds here; each test shortens what it is about.
CALM = FailureConfig(backoff=0.05, grace=30.0, together=0.0)
STRAGGLING = FailureConfig(backoff=0.05, grace=30.0, straggling=1.0)


@dataclass(frozen=True)
class Value:
    """A float sum that shows the order of its additions in its last bits, with its workers."""

    value: float
    n_rows: int
    pids: tuple[int, ...]

    def __add__(self, other: Value) -> Value:
        n_rows, pids = self.n_rows + other.n_rows, self.pids + other.pids
        return Value(self.value + other.value, n_rows, pids)

    @property
    def counted(self) -> tuple[float, int]:
        return self.value, self.n_rows


def odd_sum(rows: ShardRows) -> Value:
    value = float(rows.blocks[0].X.double().sum()) * 0.1**rows.shard
    return Value(value, rows.n_rows, (os.getpid(),))


def rows_of(shard: int) -> ShardRows:
    generator = torch.Generator().manual_seed(shard)
    return ShardRows(
        shard=shard, blocks=[Block(torch.randn(D, 30 + 5 * shard, generator=generator))]
    )


def first_time(folder: Path, name: str) -> bool:
    """Say whether no process asked this before."""
    try:
        os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


Fault = Callable[[], None]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError("the disk is on fire")


@dataclass(frozen=True)
class Sleep:
    seconds: float

    def __call__(self) -> None:
        time.sleep(self.seconds)


@dataclass(frozen=True)
class Wait:
    """Wait until there are `count` files of such a name, and then leave one of one's own."""

    folder: Path
    pattern: str
    count: int = 1
    then: str = "waited"

    def __call__(self) -> None:
        while len(list(self.folder.glob(self.pattern))) < self.count:
            time.sleep(0.05)
        time.sleep(0.3)  # for a reply to arrive
        (self.folder / self.then).touch()


@dataclass(frozen=True)
class Load:
    """A loader that leaves a file for each load; at `shard` something happens, `times` times.

    `again` happens at every load of a shard that was loaded before.
    """

    folder: Path
    shard: int = -1
    fault: Fault = fail
    times: int = 1
    again: Fault | None = None

    def __call__(self, shard: int) -> ShardRows:
        # Named for the shard, its process and the number of its loads so far.
        earlier = len(list(self.folder.glob(f"load-{shard}-*")))
        (self.folder / f"load-{shard}-{os.getpid()}-{earlier}").touch()
        if earlier and self.again is not None:
            self.again()
        if shard == self.shard and any(
            first_time(self.folder, f"fault-{i}") for i in range(self.times)
        ):
            self.fault()
        return rows_of(shard)

    def counts(self) -> Counter[int]:
        return Counter(int(file.name.split("-")[1]) for file in self.folder.glob("load-*"))


@dataclass(frozen=True)
class Sum:
    """The task `odd_sum`, which leaves a file for each shard; at `shard` something happens once."""

    folder: Path
    shard: int
    fault: Fault

    def __call__(self, rows: ShardRows) -> Value:
        if rows.shard == self.shard and first_time(self.folder, "task"):
            self.fault()
        (self.folder / f"ran-{rows.shard}-{os.getpid()}").touch()
        return odd_sum(rows)


@dataclass(frozen=True)
class Divide:
    by: int

    def __call__(self, rows: ShardRows) -> Value:
        return Value(1 / self.by, rows.n_rows, ())


class Blocker:
    """Takes CPUs away from the workers."""

    def ready(self) -> None: ...


@contextmanager
def blocked(n_cpus: int) -> Iterator[Callable[[], None]]:
    actor: Any = ray.remote(Blocker)
    blocker = actor.options(num_cpus=n_cpus).remote()
    ray.get(blocker.ready.remote())
    yield lambda: ray.kill(blocker)
    ray.kill(blocker)


@pytest.fixture(scope="module")
def cluster(ray_address: str) -> Iterator[None]:
    with connected(Cluster(ray_address)):
        yield


@contextmanager
def shards_on(
    loader: Loader, faults: FailureConfig = CALM, n_workers: int = 2, reserve: int = 0
) -> Iterator[RayShards]:
    with session(
        loader, N_SHARDS, Cluster(num_workers=n_workers), faults, reserve=reserve
    ) as shards:
        yield shards


@pytest.fixture(scope="module")
def undisturbed() -> tuple[float, int]:
    return LocalShards([rows_of(shard) for shard in range(N_SHARDS)]).run(odd_sum).counted


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gmm_dist")


pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.faults]


def test_of_a_worker_that_dies_in_a_pass_only_its_shards_are_loaded_again(
    tmp_path: Path, undisturbed: tuple[float, int], caplog: pytest.LogCaptureFixture
) -> None:
    load = Load(tmp_path)
    with shards_on(load, n_workers=3) as shards:
        shards.load()
        assert shards.run(Sum(tmp_path, 4, die)).counted == undisturbed
        assert load.counts() == Counter({s: 2 if s in (3, 4, 5) else 1 for s in range(N_SHARDS)})
        assert shards.run(odd_sum).counted == undisturbed
    line = "ActorDiedError; it starts anew and loads its 3 shards (failure 1 of 16)"
    assert line in caplog.text


def test_a_worker_that_dies_while_loading_starts_again_and_rows_count_once(
    tmp_path: Path, undisturbed: tuple[float, int]
) -> None:
    load, seen = Load(tmp_path, 5, die), []
    with shards_on(load) as shards:
        assert shards.load(lambda done, n_rows: seen.append((done, n_rows))) == undisturbed[1]
        assert [done for done, _ in seen] == list(range(1, N_SHARDS + 1))
        assert seen[-1][1] == undisturbed[1]
        assert shards.run(odd_sum).counted == undisturbed
    assert load.counts() == Counter({s: 2 if s in (4, 5) else 1 for s in range(N_SHARDS)})


def test_storage_that_fails_twice_is_asked_again_by_the_same_worker(
    tmp_path: Path, undisturbed: tuple[float, int], caplog: pytest.LogCaptureFixture
) -> None:
    load = Load(tmp_path, 7, fail, times=2)
    with shards_on(load) as shards:
        shards.load()
        assert shards.run(odd_sum).counted == undisturbed
    assert load.counts() == Counter({s: 3 if s == 7 else 1 for s in range(N_SHARDS)})
    assert len({file.name.split("-")[2] for file in tmp_path.glob("load-7-*")}) == 1
    assert "OSError: the disk is on fire; it tries again (failure 2 of 16)" in caplog.text


def test_too_many_failures_end_the_run_in_one_line(tmp_path: Path) -> None:
    load = Load(tmp_path, 7, fail, times=99)
    faults = FailureConfig(max_failures=2, backoff=0.01, together=0.0)
    wanted = (
        r"^more than 2 failures \(max_failures\); the last: worker 1 \(.*, pid \d+\): "
        "OSError: the disk is on fire$"
    )
    with shards_on(load, faults) as shards, pytest.raises(RunFailed, match=wanted):
        shards.load()
    assert load.counts()[7] == 3


def test_our_bugs_are_not_tried_again(tmp_path: Path) -> None:
    with shards_on(Load(tmp_path)) as shards:
        shards.load()
        with pytest.raises(ZeroDivisionError):
            shards.run(Divide(0))


def test_a_silent_worker_is_replaced(
    tmp_path: Path, undisturbed: tuple[float, int], caplog: pytest.LogCaptureFixture
) -> None:
    load, faults = Load(tmp_path), FailureConfig(silence=2.0, backoff=0.05, grace=30.0)
    with shards_on(load, faults) as shards:
        shards.load()
        silent = shards.run(odd_sum).pids[0]
        os.kill(silent, signal.SIGSTOP)
        after = shards.run(odd_sum)
        assert after.counted == undisturbed
        assert silent not in after.pids
    assert load.counts() == Counter({s: 2 if s < 4 else 1 for s in range(N_SHARDS)})
    assert "s; it starts anew and loads its 4 shards (failure 1 of 16)" in caplog.text
    assert "no sign of work for" in caplog.text


def test_a_slow_call_that_shows_signs_of_work_is_waited_for(
    tmp_path: Path, undisturbed: tuple[float, int], caplog: pytest.LogCaptureFixture
) -> None:
    load, faults = Load(tmp_path), FailureConfig(silence=1.5, backoff=0.05)
    with shards_on(load, faults) as shards:
        shards.load()
        assert shards.run(Sum(tmp_path, 4, Sleep(3))).counted == undisturbed
    assert "starts anew" not in caplog.text


def test_a_call_that_lasts_beyond_its_deadline_is_given_up(
    tmp_path: Path, undisturbed: tuple[float, int], caplog: pytest.LogCaptureFixture
) -> None:
    load = Load(tmp_path, 5, Sleep(60))
    faults = FailureConfig(deadline=1.5, deadline_factor=2.0, backoff=0.05)
    with shards_on(load, faults) as shards:
        assert shards.load() == undisturbed[1]
        assert shards.run(odd_sum).counted == undisturbed
    assert load.counts() == Counter({s: 2 if s in (4, 5) else 1 for s in range(N_SHARDS)})
    assert "no reply for" in caplog.text


def test_a_stragglers_share_is_done_by_its_siblings_and_counts_once(
    tmp_path: Path, undisturbed: tuple[float, int], caplog: pytest.LogCaptureFixture
) -> None:
    load = Load(tmp_path)
    with shards_on(load, STRAGGLING, n_workers=3) as shards:
        shards.load()
        workers = set(shards.run(odd_sum).pids)
        relieved = shards.run(Sum(tmp_path, 4, Wait(tmp_path, "go")))
        assert relieved.counted == undisturbed
        assert len(set(relieved.pids)) == 2
        # Its late reply comes in a later pass, and is not counted; then it has its share again.
        after = [shards.run(odd_sum) for _ in range(3)]
        assert all(set(total.pids) == set(relieved.pids) for total in after)
        (tmp_path / "go").touch()
        deadline = time.monotonic() + 20
        while set(after[-1].pids) != workers and time.monotonic() < deadline:
            after.append(shards.run(odd_sum))
        assert all(total.counted == undisturbed for total in after)
        assert set(after[-1].pids) == workers
    assert load.counts() == Counter({s: 2 if s in (3, 4, 5) else 1 for s in range(N_SHARDS)})
    assert "3 shards of it are done by 2 others too (not counted)" in caplog.text


def test_a_straggler_may_still_be_the_first_to_reply(
    tmp_path: Path, undisturbed: tuple[float, int], caplog: pytest.LogCaptureFixture
) -> None:
    load = Load(tmp_path, again=Wait(tmp_path, "go"))
    with shards_on(load, STRAGGLING, n_workers=3) as shards:
        shards.load()
        # It goes on when its siblings have begun to load what it is to do.
        total = shards.run(Sum(tmp_path, 4, Wait(tmp_path, "load-[345]-*-1")))
        assert total.counted == undisturbed
        assert len(set(total.pids)) == 3
        (tmp_path / "go").touch()
        assert [shards.run(odd_sum).counted for _ in range(3)] == [undisturbed] * 3
    assert "are done by 2 others too" in caplog.text


def test_a_stragglers_reply_is_dropped_whole_where_part_of_it_was_counted(
    tmp_path: Path, undisturbed: tuple[float, int], caplog: pytest.LogCaptureFixture
) -> None:
    # One sibling does shard 3; the other cannot do 4 and 5 before the straggler has replied,
    # which waits for the first of them.
    load = Load(tmp_path, 4, Wait(tmp_path, "replied"), times=2)
    (tmp_path / "fault-0").touch()  # not when it is loaded first
    (tmp_path / "replied").touch()
    with shards_on(load, STRAGGLING, n_workers=3) as shards:
        shards.load()
        (tmp_path / "fault-1").unlink()
        (tmp_path / "replied").unlink()
        total = shards.run(Sum(tmp_path, 4, Wait(tmp_path, "ran-3-*", 2, "replied")))
        assert total.counted == undisturbed
        assert [shards.run(odd_sum).counted for _ in range(3)] == [undisturbed] * 3
    assert len(list(tmp_path.glob("ran-3-*"))) == 2
    assert "are done by 2 others too" in caplog.text


def test_a_frozen_worker_that_wakes_up_changes_nothing(
    tmp_path: Path, undisturbed: tuple[float, int]
) -> None:
    with shards_on(Load(tmp_path), STRAGGLING, n_workers=3) as shards:
        shards.load()
        zombie = max(shards.run(odd_sum).pids)
        os.kill(zombie, signal.SIGSTOP)
        assert zombie not in shards.run(odd_sum).pids
        os.kill(zombie, signal.SIGCONT)
        assert all(shards.run(odd_sum).counted == undisturbed for _ in range(20))
        assert zombie in shards.run(odd_sum).pids


def test_a_loader_that_hangs_is_left_behind(tmp_path: Path, undisturbed: tuple[float, int]) -> None:
    load = Load(tmp_path, 4, Sleep(60))
    with shards_on(load, STRAGGLING, n_workers=3) as shards:
        assert shards.load() == undisturbed[1]
        total = shards.run(odd_sum)
        assert total.counted == undisturbed
        assert len(set(total.pids)) == 2
    assert load.counts()[4] == 2


def test_workers_that_find_no_place_are_done_without_and_join_when_there_is_one(
    tmp_path: Path, undisturbed: tuple[float, int], caplog: pytest.LogCaptureFixture
) -> None:
    load, faults = Load(tmp_path), FailureConfig(grace=2.0, backoff=0.05)
    with blocked(2) as unblock, shards_on(load, faults, n_workers=4) as shards:
        assert shards.load() == undisturbed[1]
        first = shards.run(odd_sum)
        assert first.counted == undisturbed
        assert len(set(first.pids)) == 2
        assert load.counts() == Counter(range(N_SHARDS))
        unblock()
        deadline = time.monotonic() + 20
        total = first
        while len(set(total.pids)) < 4 and time.monotonic() < deadline:
            total = shards.run(Sum(tmp_path, -1, die))
            assert total.counted == undisturbed
        assert len(set(total.pids)) == 4
    assert "has been away for" in caplog.text
    assert "shards again" in caplog.text


def test_survivors_take_over_from_a_worker_that_is_lost_for_good(
    tmp_path: Path, undisturbed: tuple[float, int], caplog: pytest.LogCaptureFixture
) -> None:
    load, faults = Load(tmp_path), FailureConfig(grace=2.0, backoff=30.0)
    with shards_on(load, faults, n_workers=3) as shards:
        shards.load()
        lost = shards.run(odd_sum).pids[4]
        os.kill(lost, signal.SIGKILL)
        total = shards.run(odd_sum)
        assert total.counted == undisturbed
        assert len(set(total.pids)) == 2
    assert load.counts() == Counter({s: 2 if s in (3, 4, 5) else 1 for s in range(N_SHARDS)})
    assert "its 3 shards go to 2 others" in caplog.text


def test_survivors_without_room_end_the_run_in_one_line(tmp_path: Path) -> None:
    began = time.monotonic()
    reserve = memory_of_workers(loads=True) - 4 * D * sum(30 + 5 * s for s in range(4, 9))
    # At the start, too, workers may be missing for so long.
    forsaken = 2 * (time.monotonic() - began)
    faults = FailureConfig(grace=forsaken, forsaken=forsaken, backoff=60.0)
    wanted = (
        r"^no worker for 4 shards in \d+ s, and no room where one is up \(1 worker\): "
        "add machines or memory$"
    )
    with shards_on(Load(tmp_path), faults, reserve=reserve) as shards:
        shards.load()
        os.kill(shards.run(odd_sum).pids[0], signal.SIGKILL)
        with pytest.raises(RunFailed, match=wanted):
            shards.run(odd_sum)


def memory_of_workers(*, loads: bool = False) -> int:
    """Return what each of two workers has on the tests' one machine."""
    with shards_on(rows_of) as shards:
        if loads:
            shards.load()
        return shards.worker_memory()


def test_no_workers_at_all_end_the_run_in_one_line(tmp_path: Path) -> None:
    faults = FailureConfig(grace=0.2, forsaken=0.5)
    with (
        blocked(4),
        shards_on(Load(tmp_path), faults) as shards,
        pytest.raises(RunFailed, match=r"no worker has come up for .*: add machines$"),
    ):
        shards.load()


def test_rows_that_do_not_fit_are_said_before_memory_ends(tmp_path: Path) -> None:
    reserve = memory_of_workers() - 4 * D * (30 + 35)  # the first two shards
    with (
        shards_on(Load(tmp_path), reserve=reserve) as shards,
        pytest.raises(
            UserError, match=r"of its [45] shards, .* GiB of rows, and has .*: use .* fewer columns"
        ),
    ):
        shards.load()

"""Rows beyond memory lie in files: the same bits, no file left, one line where there is no room."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks import odd_sum, pid

from gmm_dist.config import Cluster, EMConfig, StartConfig
from gmm_dist.errors import UserError
from gmm_dist.selection.ranking import Candidate
from gmm_dist.selection.sweep import sweep
from gmm_dist.shards import spill
from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import Block, HeldOut, ShardRows, Shards
from gmm_dist.shards.ray_shards import session
from gmm_dist.shards.spill import Spill, SpilledShard, Store, size_of

CPU = torch.device("cpu")
NOTHING = Spill(folder=None, memory=0, on_disk=0)  # stays in memory
N_SHARDS, D = 7, 3


def block(n: int, dtype: torch.dtype, *, weighted: bool, seed: int) -> Block:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(D, n, generator=generator, dtype=dtype)
    return Block(X, torch.rand(n, generator=generator).double() if weighted else None)


def same(one: ShardRows, other: ShardRows) -> bool:
    pairs = [*zip(one.blocks, other.blocks, strict=True)]
    pairs += zip(one.held_out, other.held_out, strict=True)
    return (one.shard, one.counts) == (other.shard, other.counts) and all(
        a.X.dtype == b.X.dtype and torch.equal(a.X, b.X) and torch.equal(a.weights, b.weights)
        for a, b in pairs
    )


@given(
    sizes=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 50)), min_size=1, max_size=9),
    weighted=st.booleans(),
    double=st.booleans(),
    memory=st.integers(0, 200_000),
)
@settings(max_examples=30, deadline=None)
def test_shards_come_back_in_their_order_with_their_bits(sizes, weighted, double, memory):
    dtype, store = torch.float64 if double else torch.float32, Store(CPU)
    place, held = Spill(folder=None, memory=memory, on_disk=0), []
    rows = [
        ShardRows(
            shard=i,
            blocks=[block(n, dtype, weighted=weighted, seed=i)] if n else [],
            held_out=[block(m, dtype, weighted=weighted, seed=-1 - i)] if m else [],
            counts=f"of {i}",
        )
        for i, (n, m) in enumerate(sizes)
    ]
    for each in rows:
        held.append(store.hold(each, place, held))
    assert sum(size_of(h) for h in held if isinstance(h, ShardRows)) <= memory
    for _ in range(2):
        for found, expected in zip(store.each(iter(held)), rows, strict=True):
            assert same(found, expected)
    assert [h.n_rows for h in held] == [r.n_rows for r in rows]


def test_without_a_place_all_stay_in_memory() -> None:
    rows = ShardRows(shard=0, blocks=[block(9, torch.float32, weighted=False, seed=0)])
    assert isinstance(Store(CPU).hold(rows, None, []), ShardRows)


def n_open() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


def test_files_have_no_name_and_go_with_their_shards(tmp_path) -> None:
    store, place = Store(CPU), Spill(folder=str(tmp_path), memory=0, on_disk=0)
    rows = ShardRows(shard=0, blocks=[block(1000, torch.float32, weighted=True, seed=0)])
    before = n_open()
    held = store.hold(rows, place, [])
    assert isinstance(held, SpilledShard)
    assert not [*tmp_path.iterdir()]
    assert n_open() == before + 1
    del held
    assert n_open() == before


def test_a_task_that_fails_ends_the_reading() -> None:
    store, held = Store(CPU), []
    for i in range(3):
        rows = ShardRows(shard=i, blocks=[block(99, torch.float32, weighted=False, seed=i)])
        held.append(store.hold(rows, NOTHING, held))
    for rows in store.each(held):
        assert rows.shard == 0
        break
    assert [rows.shard for rows in store.each(held)] == [0, 1, 2]


def hold_one(folder: str, on_disk: int = 0) -> None:
    rows = ShardRows(shard=0, blocks=[block(1000, torch.float32, weighted=False, seed=0)])
    Store(CPU).hold(rows, Spill(folder=folder, memory=0, on_disk=on_disk), [])


def test_a_disk_without_room_is_one_line_before_anything_is_written(tmp_path) -> None:
    wanted = r"has [\d,.]+ GiB free for spilled rows, which need 931,322\.6 GiB"
    with pytest.raises(UserError, match=wanted) as error:
        hold_one(str(tmp_path), on_disk=10**15)
    assert str(tmp_path) in str(error.value)
    assert "larger disk" in str(error.value)


def test_a_disk_that_runs_full_is_one_line(tmp_path, monkeypatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="free for spilled rows"):
        hold_one(str(tmp_path))


@pytest.mark.parametrize("folder", ["/nowhere/at/all", "/proc"])
def test_a_folder_that_takes_no_files_is_one_line(folder: str) -> None:
    with pytest.raises(UserError, match="rows cannot be spilled there"):
        hold_one(folder)


@pytest.mark.skipif(spill._file_system("/dev/shm") != "tmpfs", reason="no tmpfs there")
def test_memory_is_no_disk() -> None:
    with pytest.raises(UserError, match="is no disk but memory"):
        hold_one("/dev/shm")


# ---- on Ray -------------------------------------------------------------------------------------


def load(shard: int) -> ShardRows:
    generator = torch.Generator().manual_seed(shard)
    X = torch.randn(D, 300 + 50 * shard, generator=generator)
    X[:, ::2] += 6
    return ShardRows(
        shard=shard,
        blocks=[Block(X)],
        held_out=[block(20, torch.float32, weighted=False, seed=shard)],
    )


def bits(shards: Shards) -> Sequence[object]:
    candidates = [Candidate(k, "full") for k in (1, 2, 3)]
    start = StartConfig(n_init=2)
    result = sweep(shards, candidates, EMConfig(), start, n_features=D)  # type: ignore[arg-type]
    arrays = [
        part.numpy().tobytes()
        for scored in result.scored
        for part in (scored.fit.parameters.means, scored.fit.parameters.covariances)
    ]
    return [*arrays, shards.run(odd_sum), shards.run(HeldOut(odd_sum))]


@pytest.mark.parametrize("memory", [0, 12_000])
def test_spilled_rows_give_the_same_bits_and_a_killed_worker_reads_its_own_again(
    memory: int, ray_address: str
) -> None:
    torch.set_num_threads(1)
    expected = bits(LocalShards([load(shard) for shard in range(N_SHARDS)]))
    with session(load, N_SHARDS, Cluster(ray_address, num_workers=2)) as shards:
        shards.spill(Spill(folder=None, memory=memory, on_disk=1))
        shards.load()
        assert bits(shards) == expected
        os.kill(min(shards.run(pid).pids), signal.SIGKILL)
        assert [shards.run(odd_sum), shards.run(HeldOut(odd_sum))] == expected[-2:]


def test_a_workers_disk_without_room_ends_the_loading_in_one_line(ray_address: str) -> None:
    with session(load, N_SHARDS, Cluster(ray_address, num_workers=2)) as shards:
        shards.spill(Spill(folder=None, memory=0, on_disk=10**18))
        with pytest.raises(UserError, match="free for spilled rows"):
            shards.load()

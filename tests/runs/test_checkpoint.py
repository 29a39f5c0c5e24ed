"""A checkpoint comes back exactly, or is known to be torn or another run's."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch
from fsspec.implementations.memory import MemoryFileSystem

from gmm_dist.errors import UserError
from gmm_dist.runs.checkpoint import (
    FORMAT_VERSION,
    Checkpoint,
    CheckpointStore,
    RunIdentity,
    checkpoint_names,
    environment,
)
from gmm_dist.runs.folder import Folder

IDENTITY = RunIdentity(
    plan_hash="c0ffee",
    files=(("a.parquet", 1000, "v1"), ("b.parquet", 2000, "v1")),
    settings={"em": {"tol": 1e-3, "precision": "auto"}, "k": [2, 3]},
    environment={"torch": "2.13.0", "processor": "EPYC"},
)


@pytest.fixture(params=["local", "s3", "memory"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "s3":
        return Folder.of(f"{request.getfixturevalue('s3_lake').url}/out")
    if request.param == "memory":
        return Folder.of(f"memory://checkpoints/{tmp_path.name}")
    return Folder.of(str(tmp_path / "out"))


@pytest.fixture
def local(tmp_path: Path) -> Folder:
    return Folder.of(str(tmp_path / "out"))


def checkpoint(number: int) -> Checkpoint:
    return Checkpoint(number, {"means": torch.full((3, 2), float(number))}, {"number": number})


def write(place: Folder, *numbers: int, identity: RunIdentity = IDENTITY, keep: int = 2) -> None:
    store = CheckpointStore(place, identity, keep=keep)
    for number in numbers:
        store.put(checkpoint(number))
        assert store.flush()
    store.close()


def latest(place: Folder, identity: RunIdentity = IDENTITY) -> Checkpoint | None:
    return CheckpointStore(place, identity).latest()


def numbers(place: Folder) -> list[int]:
    return [int(name.split("-")[0]) for name in checkpoint_names(place)]


def folder(place: Folder) -> Path:
    return Path(place.path) / "_checkpoints"


def test_a_checkpoint_comes_back_bit_for_bit(out: Folder) -> None:
    assert latest(out) is None
    draw = torch.Generator().manual_seed(0)
    square = torch.randn(3, 3, generator=draw, dtype=torch.float64)
    tensors = {
        "float64": torch.tensor([0.1, -0.0, math.inf, math.nan, 5e-324], dtype=torch.float64),
        "view": square.T,
        "same": square,
        "int64": torch.tensor([[2**63 - 1], [-(2**63)]]),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(1 / 3, dtype=torch.float64),
        "empty": torch.empty(0, 4, dtype=torch.float64),
    }
    state = {
        "history": [0.1, 1 / 3, -math.inf, 5e-324],
        "nested": {"größe": None, "done": True, "iteration": 2**60},
    }
    store = CheckpointStore(out, IDENTITY)
    store.put(Checkpoint(12, tensors, state))
    store.close()
    found = latest(out)
    assert found is not None
    assert found.number == 12
    assert found.state == state
    assert set(found.tensors) == set(tensors)
    for name, tensor in tensors.items():
        back = found.tensors[name]
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        assert back.numpy().tobytes() == tensor.contiguous().numpy().tobytes(), name


def test_what_was_taken_is_a_copy(local: Folder) -> None:
    store = CheckpointStore(local, IDENTITY)
    means = torch.zeros(4)
    store.put(Checkpoint(1, {"means": means}, {}))
    means += 1
    store.close()
    found = latest(local)
    assert found is not None
    assert torch.equal(found.tensors["means"], torch.zeros(4))


def test_old_checkpoints_are_removed(out: Folder) -> None:
    write(out, 1, 2, 3, 4)
    assert numbers(out) == [3, 4]
    write(out, 99_999_999, 100_000_000, keep=3)
    assert numbers(out) == [4, 99_999_999, 100_000_000]
    found = latest(out)
    assert found is not None
    assert found.number == 100_000_000


def test_all_are_removed_at_the_end(out: Folder) -> None:
    store = CheckpointStore(out, IDENTITY)
    store.put(checkpoint(1))
    store.flush()
    assert numbers(out) == [1]
    store.clear()
    assert set(out.fs.find(out.path)) <= {out.path}  # SeaweedFS lists an emptied folder


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_torn_checkpoint_is_passed_over(
    out: Folder, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    write(out, 1, 2)
    name = checkpoint_names(out)[-1]
    data = out.read("_checkpoints", name)
    assert data is not None
    out.write(data[:size], "_checkpoints", name)
    found = latest(out)
    assert found is not None
    assert found.number == 1
    assert f"_checkpoints/{name} is torn: ignored" in caplog.text


def test_a_changed_byte_is_noticed(local: Folder) -> None:
    write(local, 1)
    (name,) = checkpoint_names(local)
    data = bytearray(local.read("_checkpoints", name) or b"")
    data[-1] ^= 1
    local.write(bytes(data), "_checkpoints", name)
    assert latest(local) is None


def test_files_of_a_dead_writer_are_ignored_and_removed(local: Folder) -> None:
    write(local, 1)
    left = folder(local) / ".00000009-aa.safetensors.0123abcd.part"
    left.write_bytes(b"half")
    found = latest(local)
    assert found is not None
    assert found.number == 1
    write(local, 2)
    assert not left.exists()


# ------------------------------------------------------------------------- whose it is


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"files": (("a.parquet", 1000, "v1"), ("b.parquet", 2048, "v2")), "plan_hash": "x"},
            r"files have changed: b.parquet had 2,000 bytes, version v1, has 2,048, v2: give back",
        ),
        (
            {"files": (("a.parquet", 1000, "v1"),), "plan_hash": "x"},
            r"files have changed: b.parquet \(2,000 bytes\) is gone: ",
        ),
        (
            {"files": (("0.parquet", 7, "v"), ("a.parquet", 1, "v"), *IDENTITY.files[1:])},
            r"0.parquet \(7 bytes\) is new and 1 more: ",
        ),
        (
            {"settings": {"em": {"tol": 0.01, "precision": "auto"}, "k": [2]}},
            r"the settings differ: em.tol was 0.001, is 0.01, k was \[2, 3\], is \[2\]: ",
        ),
        ({"plan_hash": "x"}, r"the plan \(columns, filter or rows\) differs: "),
    ],
)
def test_another_runs_checkpoint_is_refused(
    local: Folder, changes: dict[str, Any], message: str
) -> None:
    write(local, 5)
    with pytest.raises(UserError, match=rf"cannot resume from checkpoint 5: .*{message}") as raised:
        latest(local, replace(IDENTITY, **changes))
    assert "\n" not in str(raised.value)


def test_a_difference_that_cannot_be_named(local: Folder) -> None:
    write(local, 5)
    (folder(local) / "run.json").unlink()
    with pytest.raises(UserError, match="the lake's files, the columns or the settings differ"):
        latest(local, replace(IDENTITY, plan_hash="x"))


def test_a_newer_format_is_refused(local: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as newer:
        newer.setattr("gmm_dist.runs.checkpoint.FORMAT_VERSION", FORMAT_VERSION + 1)
        write(local, 5)
    versions = f"has format version {FORMAT_VERSION + 1}, this gmm_dist reads {FORMAT_VERSION}"
    with pytest.raises(UserError, match=f"{versions} at most"):
        latest(local)


def test_an_older_format_is_refused_in_one_line(local: Folder) -> None:
    """Of this very run: so the lanes, which then had other parts, are not looked into."""
    lane = {"n_iter": 4, "outcome": "RUNNING", "precision": "FLOAT64", "covariance_type": "full"}
    content = {
        "format_version": 1,
        "key": IDENTITY.key,
        "environment": dict(IDENTITY.environment),
        "number": 4,
        "state": {"lanes": [lane], "owners": [0], "seconds": [1.0], "n_passes": 4},
    }
    tensors = {"0.parameters.means": torch.zeros(1, 2, dtype=torch.float64)}
    data = safetensors.torch.save(tensors, metadata={"checkpoint": json.dumps(content)})
    sha256 = hashlib.sha256(data).hexdigest()
    local.write(data, "_checkpoints", f"00000004-{sha256}.safetensors")
    with pytest.raises(UserError) as raised:
        latest(local)
    assert str(raised.value) == (
        f"{local.url}: an older gmm_dist wrote checkpoint 4 (format version 1, this "
        f"one resumes from {FORMAT_VERSION} only): finish the run with that gmm_dist, or pass "
        "another output to "
        "start afresh"
    )


def test_another_environment_is_only_said(local: Folder, caplog: pytest.LogCaptureFixture) -> None:
    write(local, 5)
    caplog.clear()
    assert latest(local) is not None
    assert not caplog.records
    elsewhere = replace(IDENTITY, environment={"torch": "2.14.0", "processor": "EPYC"})
    assert latest(local, elsewhere) is not None
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "resumed elsewhere (torch 2.13.0 is now 2.14.0): the last bits may differ"
    )


def test_the_environment_names_libraries_and_processor() -> None:
    facts = environment()
    assert facts["torch"] == torch.__version__
    assert facts["processor"]
    json.dumps(facts)


# ------------------------------------------------------------------------- written aside


class Gated(MemoryFileSystem):
    """A store that holds up or fails what is written to it."""

    protocol = "gated"
    store: dict[str, Any] = {}  # noqa: RUF012 - fsspec's own way: one store per class
    pseudo_dirs = [""]  # noqa: RUF012
    gate = threading.Event()
    begun = threading.Event()
    failing = False

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        Gated.begun.set()
        assert Gated.gate.wait(30)
        if Gated.failing:
            raise OSError("no space\nleft")
        super().pipe_file(path, value, mode=mode)


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> Folder:
    fsspec.register_implementation("gated", Gated, clobber=True)
    Gated.store.clear()
    for name in ("gate", "begun"):
        monkeypatch.setattr(Gated, name, threading.Event())
    monkeypatch.setattr(Gated, "failing", False)
    return Folder.of("gated://out")


def test_the_newest_wins_while_one_is_written(gated: Folder) -> None:
    store = CheckpointStore(gated, IDENTITY, keep=9)
    store.put(checkpoint(1))
    assert Gated.begun.wait(30)
    for number in (2, 3, 4):
        store.put(checkpoint(number))
    assert not store.flush(timeout=0)
    Gated.gate.set()
    store.close()
    assert numbers(gated) == [1, 4]


def test_failing_storage_does_not_end_the_run(
    gated: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    Gated.gate.set()
    store = CheckpointStore(gated, IDENTITY)
    Gated.failing = True
    store.put(checkpoint(1))
    assert store.flush()
    Gated.failing = False
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert record.getMessage().endswith(
        "checkpoint 1 was not written, the run goes on: no space left"
    )
    store.put(checkpoint(2))
    store.close()
    assert numbers(gated) == [2]


def test_at_most_one_in_an_interval(local: Folder) -> None:
    store = CheckpointStore(local, IDENTITY, seconds=3600)
    assert store.is_due
    store.put(checkpoint(1))
    assert not store.is_due
    store.put(checkpoint(2))
    store.close()
    assert numbers(local) == [1]


def test_a_guarded_store_writes_nothing(local: Folder) -> None:
    may = [True, False]
    store = CheckpointStore(local, IDENTITY, guard=lambda: may.pop(0))
    for number in (1, 2):
        store.put(checkpoint(number))
        store.flush()
    store.close()
    assert numbers(local) == [1]

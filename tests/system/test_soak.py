"""The soak's own judgement: what a round's plan, its leftovers and its drivers' ends amount to."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from gmm_dist.runs import claim
from tools import soak


def test_a_seed_gives_the_same_faults_whatever_came_before() -> None:
    rounds = [soak.plan(3, number, ["laptop", "cluster"]) for number in range(200)]
    assert soak.plan(3, 17, ["cluster", "laptop"]) == rounds[17]
    assert soak.plan(4, 17, ["cluster", "laptop"]) != rounds[17]
    for name in ("laptop", "cluster"):
        kinds = {fault.kind for r in rounds if r.world == name for fault in r.faults}
        assert kinds == set(soak.KINDS[name])
    assert {kind for kinds in soak.KINDS.values() for kind in kinds} == set(soak.FAULTS)


def found_in(output: Path) -> list[str]:
    manifest = (output / "manifest.json").read_bytes()
    return soak.faults_of(soak.listing(str(output)), manifest)


def test_a_commit_leaves_nothing_that_is_not_its_own(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with claim.claim(str(output)) as run:
        run.attempt.write_json("sweep.json", {"k": 3})
        run.attempt.write("model/model.safetensors", b"1234")
        run.attempt.commit()
    assert found_in(output) == []
    (output / "_attempts" / "lease-1234").mkdir()
    (output / "_checkpoints").mkdir()
    (output / "_checkpoints" / ".1.part").touch()
    (output / "model" / "model.safetensors").write_bytes(b"1235")
    assert found_in(output) == [
        "damaged: model/model.safetensors",
        "left behind: _attempts/lease-1234/",
        "left behind: _checkpoints/.1.part",
    ]


def test_a_process_is_found_by_its_mark_however_it_was_orphaned() -> None:
    mark = f"{os.getpid()}-test"
    command = ["sh", "-c", "sleep 60 & echo $!"]
    environment = os.environ | {"GMM_SOAK_ROUND": mark}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
    try:
        # The shell tells the number of its copy, which becomes the command a moment later.
        deadline = time.monotonic() + 30
        while b"sleep\0" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert soak.marked("GMM_SOAK_ROUND", mark) == {pid: "sleep 60"}
        assert soak.marked("GMM_SOAK_ROUND", f"{mark}-other") == {}
    finally:
        os.kill(pid, 9)


@pytest.mark.parametrize(
    ("status", "text", "end"),
    [
        (0, "best by BIC: k=3", "done"),
        (1, "error: s3://b: it failed; go on with: python jobs/sweep.py a --resume\n", "resumable"),
        (1, "error: s3://b: it failed\n", "WRONG: status 1: error: s3://b: it failed"),
        (1, "error: the lease has passed to another driver (x): this one stops", "yields"),
        (2, "error: another driver is at work on this run and renews", "yields"),
        (2, "error: --k is not like 8", "WRONG: status 2: error: --k is not like 8"),
        (0, "Traceback (most recent call last)", "WRONG: a traceback, status 0"),
        (-9, "", "WRONG: status -9: (silent)"),
    ],
)
def test_every_end_of_a_driver_is_one_of_four(status: int, text: str, end: str) -> None:
    assert soak.end_of(status, text) == end

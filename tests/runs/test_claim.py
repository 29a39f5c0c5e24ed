"""A run goes on where a dead driver left it; who was taken over can change nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from conftest import S3Server, forget_connections, running, wait_until_ready, weed_command
from fsspec.implementations.memory import MemoryFileSystem
from test_commit import PROVENANCE, attempts, files, number_of, race_model, read_once

from gmm_dist.errors import UserError
from gmm_dist.runs import load as artifacts
from gmm_dist.runs.checkpoint import Checkpoint, RunIdentity
from gmm_dist.runs.claim import Run, claim
from gmm_dist.runs.lease import LeaseLost as LeaseLost  # for the drivers below
from gmm_dist.runs.load import load
from gmm_dist.storage import open_url

ROOT = Path(__file__).parents[2]
SECONDS = 1.5
IDENTITY = RunIdentity(plan_hash="c0ffee", files=(("a.parquet", 1, "v"),), settings={"tol": 1e-3})
FILES = {"manifest.json", "model/model.safetensors", "model/model.json", "sweep.json"}

pytestmark = pytest.mark.faults  # leases of a second: not beside other work


@pytest.fixture(params=["local", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_lake').url}/deep/out"
    return str(tmp_path / "deep" / "out")


@pytest.fixture
def local(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def write(run: Run, number: int = 1) -> None:
    run.attempt.write_model(race_model(number), PROVENANCE)
    run.attempt.write_json("sweep.json", {"number": number})


def put(run: Run, number: int) -> None:
    store = run.checkpoints(IDENTITY)
    store.put(Checkpoint(number, {"x": torch.tensor([float(number)])}, {"number": number}))
    assert store.flush()


def commit(url: str, number: int = 1, *, resume: bool = False) -> str:
    with claim(url, resume=resume, lease_seconds=SECONDS) as run:
        write(run, number)
        run.attempt.commit()
    return run.attempt.id


def everything(url: str) -> set[str]:
    """All files below `url`, those of attempts and checkpoints included."""
    fs, path = open_url(url)
    fs.invalidate_cache()
    # SeaweedFS goes on to list an emptied folder.
    return {name[len(path) :].lstrip("/") for name in fs.find(path)} - {""}


@contextmanager
def driver(url: str, body: str) -> Iterator[subprocess.Popen[str]]:
    """Run a driver in a process of its own, up to the point where it has said that it is ready."""
    script = textwrap.dedent("""
        import glob, os, signal, sys
        root = sys.argv[1]
        sys.path[:0] = [root, root + "/tests", *glob.glob(root + "/tests/*/")]
        from test_claim import LeaseLost, SECONDS, claim, put, write
        try:
            with claim(sys.argv[2], lease_seconds=SECONDS) as run:
        BODY
        except LeaseLost as error:
            print("lost", error, flush=True)
    """).replace("BODY", textwrap.indent(textwrap.dedent(body), " " * 8))
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(ROOT), url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.communicate()


READY = """
print("ready", flush=True)
sys.stdin.readline()
"""


# ------------------------------------------------------------------------- one driver


def test_a_run_commits_and_leaves_nothing_else(out: str) -> None:
    with claim(out, lease_seconds=SECONDS) as run:
        put(run, 7)
        assert any(name.startswith("_checkpoints/00000007-") for name in everything(out))
        assert any(name.startswith("_attempts/lease") for name in everything(out))
        run.check()
        write(run)
        run.attempt.commit()
    assert files(out) == FILES
    assert attempts(out) == {run.attempt.id}
    assert number_of(load(out)) == 1


def test_a_failed_run_keeps_its_checkpoints_alone(out: str) -> None:
    def fail() -> None:
        with claim(out, lease_seconds=SECONDS) as run:
            put(run, 7)
            write(run)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert {name.split("-")[0] for name in everything(out)} == {
        "_checkpoints/run.json",
        "_checkpoints/00000007",
    }
    with pytest.raises(UserError, match=r"holds the checkpoints of an unfinished run: pass res"):
        commit(out)
    with claim(out, resume=True, lease_seconds=SECONDS) as run:
        found = run.checkpoints(IDENTITY).latest()
        assert found is not None
        assert (found.number, found.state) == (7, {"number": 7})
        write(run)
        run.attempt.commit()
    assert files(out) == FILES


def test_a_failed_run_without_checkpoints_leaves_nothing(out: str) -> None:
    def fail() -> None:
        with claim(out, lease_seconds=SECONDS) as run:
            write(run)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert everything(out) == set()
    assert not Path(out).parent.exists()


def test_what_waits_to_be_written_is_written_when_a_run_fails(local: str) -> None:
    def fail() -> None:
        with claim(local) as run:
            run.checkpoints(IDENTITY).put(Checkpoint(3, {}, {}))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert any("00000003-" in name for name in everything(local))


def test_without_a_checkpoint_a_resumed_run_starts_fresh(out: str) -> None:
    with claim(out, resume=True, lease_seconds=SECONDS) as run:
        assert not run.committed
        assert run.checkpoints(IDENTITY).latest() is None


def test_to_resume_a_committed_run_is_nothing_to_do(out: str) -> None:
    commit(out)
    before = everything(out)
    fs, path = open_url(out)
    manifest = fs.cat_file(f"{path}/manifest.json")
    fs.rm_file(f"{path}/sweep.json")
    with claim(out, resume=True) as run:
        assert run.committed
    assert everything(out) == before  # the copy is repaired
    assert fs.cat_file(f"{path}/manifest.json") == manifest
    with pytest.raises(UserError, match="already holds a committed result"):
        commit(out)


def test_a_place_that_cannot_be_written_is_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"/sys/out cannot hold results"), claim("/sys/out"):
        pytest.fail("work began")


# ------------------------------------------------------------------------- a driver is lost


def test_a_killed_drivers_run_goes_on(out: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with driver(out, "put(run, 7)\nwrite(run, 9)\n" + READY) as dead:
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        with claim(out, resume=True, lease_seconds=SECONDS) as run:
            found = run.checkpoints(IDENTITY).latest()
            assert found is not None
            assert found.number == 7
            # What it wrote is removed.
            assert attempts(out) == {run.attempt.id, "lease"}
            write(run)
            run.attempt.commit()
        assert rf"process {dead.pid} on " in caplog.text
        assert "to see whether it still renews its lease" in caplog.text
    assert attempts(out) == {run.attempt.id}
    assert files(out) == FILES
    assert number_of(load(out)) == 1


def test_a_living_driver_is_left_alone(out: str) -> None:
    with driver(out, READY) as living:
        with pytest.raises(UserError, match=rf"is at work .* process {living.pid} on .*, 2\d{{3}}"):
            commit(out)
        assert everything(out)


def test_a_zombie_cannot_commit(out: str) -> None:
    with driver(out, "write(run, 9)\n" + READY + "run.attempt.commit()") as zombie:
        zombie.send_signal(signal.SIGSTOP)
        winner = commit(out, 1, resume=True)
        fs, path = open_url(out)
        manifest = fs.cat_file(f"{path}/manifest.json")
        zombie.send_signal(signal.SIGCONT)
        said, _ = zombie.communicate("go\n")
        assert said.startswith("lost ")
        assert "has passed to another driver" in said
    assert fs.cat_file(f"{path}/manifest.json") == manifest
    assert attempts(out) == {winner}
    assert files(out) == FILES
    assert number_of(load(out)) == 1


def test_a_zombie_cannot_commit_while_its_successor_works(out: str) -> None:
    with driver(out, "write(run, 9)\n" + READY + "run.attempt.commit()") as zombie:
        zombie.send_signal(signal.SIGSTOP)
        with claim(out, resume=True, lease_seconds=SECONDS) as run:
            zombie.send_signal(signal.SIGCONT)
            said, _ = zombie.communicate("go\n")
            assert "has passed to another driver" in said
            assert "manifest.json" not in files(out)
            write(run)
            run.attempt.commit()
    assert attempts(out) == {run.attempt.id}
    assert number_of(load(out)) == 1


def test_a_run_that_was_taken_over_is_told(local: str) -> None:
    with driver(local, READY + "put(run, 8)\nrun.check()") as zombie:
        zombie.send_signal(signal.SIGSTOP)
        with claim(local, resume=True, lease_seconds=SECONDS) as run:
            zombie.send_signal(signal.SIGCONT)
            said, _ = zombie.communicate("go\n")
            assert "has passed to another driver" in said
            # It wrote no checkpoint either.
            assert run.checkpoints(IDENTITY).latest() is None


def test_a_driver_killed_after_its_decision_has_committed(out: str) -> None:
    """The commit of one that died between decision and manifest is completed."""
    body = """
    write(run, 9)
    from gmm_dist.runs import commit
    def die(folder, name, data, *, scratch):
        print("ready", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    commit._create = die
    run.attempt.commit()
    """
    with driver(out, body) as dead:
        dead.wait()
    assert "manifest.json" not in files(out)
    with claim(out, resume=True, lease_seconds=SECONDS) as run:
        assert run.committed
    assert files(out) == FILES
    assert read_once(out) == 9
    assert len(attempts(out)) == 1


class Late(MemoryFileSystem):
    """A store on which others may be at work before a manifest is created."""

    protocol = "late"
    store: dict[str, Any] = {}  # noqa: RUF012 - fsspec's own way: one store per class
    pseudo_dirs = [""]  # noqa: RUF012
    others: Any = None

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        if path.endswith("out/manifest.json") and Late.others is not None:
            others, Late.others = Late.others, None
            others()
        super().pipe_file(path, value, mode=mode)


def test_a_decided_commit_that_others_completed_is_ours() -> None:
    fsspec.register_implementation("late", Late, clobber=True)
    Late.store.clear()
    completed = []

    def other() -> None:
        with claim("late://out", resume=True, lease_seconds=SECONDS) as run:
            completed.append(run.committed)

    Late.others = other
    winner = commit("late://out", 4)
    assert completed == [True]
    assert attempts("late://out") == {winner}
    assert read_once("late://out") == 4


class Refusing(MemoryFileSystem):
    """A store that does not answer when manifests are created."""

    protocol = "refusing"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    refuse = True

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        if path.endswith("out/manifest.json") and Refusing.refuse:
            raise OSError("refused")
        super().pipe_file(path, value, mode=mode)


def test_a_decision_that_could_not_be_carried_out_stays() -> None:
    fsspec.register_implementation("refusing", Refusing, clobber=True)
    Refusing.store.clear()
    with pytest.raises(OSError, match="refused"):
        commit("refusing://out", 4)
    Refusing.refuse = False
    with claim("refusing://out", resume=True) as run:
        assert run.committed
    assert read_once("refusing://out") == 4
    assert files("refusing://out") == FILES
    assert len(attempts("refusing://out")) == 1


def test_attempts_without_a_lease_are_left_alone(local: str) -> None:
    """They may be at work: only the manifest is between them and us."""
    with artifacts.claim(local) as other:
        other.write("sweep.json", b"{}")
        winner = commit(local)
        assert attempts(local) == {other.id, winner}


def test_what_a_kill_left_in_the_middle_of_a_step_goes_once_it_is_old(local: str) -> None:
    """A lease or an attempt that was being made, and a copy that was being written."""
    commit(local)
    root = Path(local)
    left = ["_attempts/lease-00c0ffee/x", "_attempts/1/scratch/x", ".sweep.json.1a2b.part"]
    left += ["model/.model.json.1a2b.part"]
    for name in left:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with claim(local, resume=True) as run:
        assert run.committed
    assert everything(local) >= set(left)  # somebody may be at it
    hour_ago = time.time() - 3600
    for name in left:
        path = root / name
        for part in (path, *list(path.parents)[: len(Path(name).parents) - 1]):
            os.utime(part, (hour_ago, hour_ago))
    with claim(local, resume=True) as run:
        assert run.committed
    assert not everything(local) & set(left)
    assert load(local).n_components


def test_an_outage_longer_than_the_lease_is_outlived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server stops while a run holds its lease, and comes back while the run commits."""
    command, endpoint = weed_command(tmp_path)
    server = S3Server(endpoint, "tester", "secret", "s3://lake")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    forget_connections()
    with ExitStack() as stack:
        with running(command, tmp_path, server.environment):
            wait_until_ready(server, tmp_path / "log")
            run = stack.enter_context(claim("s3://lake/out", lease_seconds=SECONDS))
            write(run)
            store = run.checkpoints(IDENTITY)
        time.sleep(2 * SECONDS)
        run.check()
        store.put(Checkpoint(1, {}, {}))
        with ThreadPoolExecutor(1) as threads:
            committed = threads.submit(run.attempt.commit)
            time.sleep(SECONDS)
            assert not committed.done()
            stack.enter_context(running(command, tmp_path, server.environment))
            committed.result()
        run.end()
        assert files("s3://lake/out") == FILES
        assert attempts("s3://lake/out") == {run.attempt.id}
        assert read_once("s3://lake/out") == 1
    forget_connections()


# ------------------------------------------------------------------------- the race

RACER = textwrap.dedent("""
    import glob, sys, threading
    root = sys.argv[1]
    sys.path[:0] = [root, root + "/tests", *glob.glob(root + "/tests/*/")]
    from test_claim import UserError, claim, write

    url, first, lock, ready = sys.argv[2], int(sys.argv[3]), threading.Lock(), threading.Barrier(6)

    def run(number):
        ready.wait()
        try:
            with claim(url, resume=True, lease_seconds=3) as run:
                if run.committed:
                    outcome = "found"
                else:
                    write(run, number)
                    run.attempt.commit()
                    outcome = f"won {number}"
        except UserError as error:
            outcome = f"refused {error}"
        with lock:
            print(outcome, flush=True)

    threads = [threading.Thread(target=run, args=[first + i]) for i in range(5)]
    [thread.start() for thread in threads]
    print("ready", flush=True)
    sys.stdin.readline()
    ready.wait()
    [thread.join() for thread in threads]
""")


def test_of_twenty_drivers_at_once_one_works(out: str) -> None:
    with ExitStack() as stack:
        racers = []
        for first in (0, 5, 10, 15):
            command = [sys.executable, "-c", RACER, str(ROOT), out, str(first)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            racer = stack.enter_context(subprocess.Popen(command, text=True, **pipes))
            stack.callback(racer.kill)
            assert racer.stdout.readline() == "ready\n"
            racers.append(racer)
        seen = {read_once_if_any(out)}
        for racer in racers:
            racer.stdin.write("go\n")
            racer.stdin.flush()
        while any(racer.poll() is None for racer in racers):
            seen.add(read_once_if_any(out))
        outcomes = [line for racer in racers for line in racer.communicate()[0].splitlines()]
    assert [racer.returncode for racer in racers] == [0] * 4
    won = [int(line.split()[1]) for line in outcomes if line.startswith("won")]
    assert len(outcomes) == 20
    assert len(won) == 1
    assert seen <= {None, won[0]}
    assert read_once(out) == won[0]
    assert len(attempts(out)) == 1
    assert files(out) == FILES


def read_once_if_any(url: str) -> int | None:
    try:
        return read_once(url)
    except UserError as error:
        if "holds no result" in str(error):
            return None
        raise

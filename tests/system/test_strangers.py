"""What others leave in our folders, where outputs may not be, and disks that take no more."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from operator import add
from pathlib import Path

import pytest
from conftest import S3Server
from ray.exceptions import RayTaskError
from test_commit import PROVENANCE, mixture
from test_scored_files import days, score, work_of
from test_scoring_run import claimed

from gmm_dist import storage
from gmm_dist.errors import RunFailed, UserError
from gmm_dist.lake.plan import plan_lake
from gmm_dist.nightly.registry import Registry
from gmm_dist.runs import claim, load
from gmm_dist.runs import folder as places
from gmm_dist.runs.checkpoint import checkpoint_names
from gmm_dist.runs.folder import Folder, is_foreign, lies_within
from gmm_dist.runs.lease import Held
from gmm_dist.scoring import run as score_runs
from gmm_dist.scoring.files import Scored, ScoreFiles
from gmm_dist.shards.failures import Verdict, judge

FOREIGN = [".DS_Store", "._file", ".nfs000a1", "Thumbs.db", "desktop.ini", "x_$folder$"]


def litter(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in FOREIGN:
        (folder / name).write_bytes(b"\xff not ours")


def test_what_systems_leave_in_our_folders_is_passed_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in (".", "_attempts", "_checkpoints", "model"):
        litter(out / name)
    (out / "model" / "x").unlink(missing_ok=True)
    litter(tmp_path / "empty")
    with claim.claim(str(tmp_path / "empty")) as run:
        run.attempt.write_model(mixture(), PROVENANCE)
        run.attempt.commit()
    for name in ("_attempts", "model", f"_attempts/{run.attempt.id}"):
        litter(tmp_path / "empty" / name)
    load.load(str(tmp_path / "empty"))
    assert load.repair(str(tmp_path / "empty")) == ()
    with claim.claim(str(tmp_path / "empty"), resume=True) as again:
        assert again.committed


def test_a_lease_is_taken_where_others_left_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("_attempts", "_checkpoints"):
        litter(out / name)
    assert checkpoint_names(Folder.of(str(out))) == []
    with claim.claim(str(out)) as run:
        litter(out / "_attempts")
        run.check()
        run.attempt.write_model(mixture(), PROVENANCE)
        run.attempt.commit()
    load.load(str(out))


def test_a_registry_with_others_files_is_read(tmp_path: Path) -> None:
    for name in (".", "models", "candidates", "models/2026-11-21"):
        litter(tmp_path / name)
    place = Registry(str(tmp_path))
    assert place.nights() == []
    assert place.latest() is None
    assert place.prune(1, night="2026-11-21") == []


def test_scores_are_written_and_resumed_beside_others_files(tmp_path: Path) -> None:
    data, out = days(tmp_path / "lake"), tmp_path / "out"
    for name in (".", "_scored", "_scored/_checkpoints", "_scored/_checkpoints/files", "ds=1"):
        litter(out / name)
    (out / "ds=1").rename(tmp_path / "elsewhere")
    with claimed(data, out):
        score(work_of(data, out))
    with claimed(data, out, resume=True):
        assert score(work_of(data, out)).counts.rows == 900


@pytest.mark.parametrize("name", ["model", "manifest.json", "_attempts", "part-0.parquet", ".part"])
def test_what_is_ours_or_a_users_is_not_foreign(name: str) -> None:
    assert not is_foreign(name)


def test_a_folder_marker_of_s3_is_no_file(s3_lake: S3Server) -> None:
    fs, url = s3_lake.file_system(), f"{s3_lake.url}/out"
    path = Folder.of(url).path
    for marker in ("/", "/_attempts/", "/_checkpoints/", "_$folder$", "/_attempts_$folder$"):
        fs.pipe_file(f"{path}{marker}", b"")
    with claim.claim(url) as run:
        run.attempt.write_model(mixture(), PROVENANCE)
        run.attempt.commit()
    load.load(url)


@pytest.mark.parametrize(
    "text", ["../x,0,15,held", "a/b,0,15,held", "a,0,nan,held", "a,0,inf,held"]
)
def test_a_lease_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="held"):
        Held.parse(text)
    if "/" not in text:
        (tmp_path / "_attempts").mkdir()
        (tmp_path / "_attempts" / "lease").write_text(text)
        with (
            pytest.raises(UserError, match=r"which is no lease of ours: remove it"),
            claim.claim(str(tmp_path)),
        ):
            pass


def test_the_longest_names_that_a_disk_takes_are_scored_and_resumed(tmp_path: Path) -> None:
    data, out = days(tmp_path / "lake"), tmp_path / "out"
    one = next(data.rglob("*.parquet"))
    for name in ("ü" * 123 + ".parquet", "x" * 247 + ".parquet"):
        one.with_name(name).write_bytes(one.read_bytes())
    with claimed(data, out):
        first = _all(work_of(data, out))
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    with claimed(data, out, resume=True):
        assert _all(work_of(data, out)) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")} == times
    assert len(times) == 5


def _all(work: ScoreFiles) -> Scored:
    return reduce(add, (work(shard) for shard in range(5)))


def test_an_output_of_a_name_too_long_is_refused(tmp_path: Path) -> None:
    for act in (lambda url: claim.claim(url).__enter__(), load.load):
        with pytest.raises(UserError, match="a name is too long for this file system"):
            act(f"{tmp_path}/{'x' * 300}/out")


def test_an_output_of_a_name_that_is_not_utf8_is_written_and_read(tmp_path: Path) -> None:
    out = os.fsdecode(os.fsencode(tmp_path) + b"/a\xff\xfe")
    with claim.claim(out) as run:
        run.attempt.write_model(mixture(), PROVENANCE)
        run.attempt.write_json("sweep.json", {"data": out})
        run.attempt.commit()
    assert load.load(out).n_components == mixture().n_components
    assert load.read_report(out)["data"] == out


def test_a_name_that_is_not_utf8_is_refused_by_s3_in_one_line(s3_lake: S3Server) -> None:
    with pytest.raises(UserError, match="is no UTF-8"), claim.claim(f"{s3_lake.url}/a\udcff"):
        pass


# ------------------------------------------------------------------------- not into the lake


def spellings(folder: Path) -> list[str]:
    """Return other names of a folder on a local disk."""
    link, above = folder.parent / "link", folder.parent / "above"
    link.symlink_to(folder)
    above.symlink_to(folder.parent.parent)
    return [
        *(str(folder), f"{folder}/", f"{folder}//", f"file://{folder}", f"local://{folder}"),
        *(f"{folder}/../{folder.name}", f"{folder}/./.", str(link), f"{link}/"),
        *(f"{folder.parent}//{folder.name}", f"{above}/{folder.parent.name}/{folder.name}"),
        os.path.relpath(folder),
    ]


def test_an_output_in_the_lake_is_refused_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    data = days(tmp_path / "d" / "lake")
    beside = tmp_path / "d" / "lake2"
    beside.mkdir()
    (data / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "inside").symlink_to(data / "sub")
    names = spellings(data)
    for name in names:
        plan = plan_lake(name, columns=["x", "y"])
        for output in (*names, f"{data}/new", f"{tmp_path}/inside/x/y", f"{beside}/../lake/x"):
            assert score_runs.lies_inside(plan, output), (name, output)
        for output in (str(beside), f"{data}2", f"{data}-x/y", f"{data}/../x", str(tmp_path)):
            assert not score_runs.lies_inside(plan, output), (name, output)


def test_a_job_refuses_to_score_into_its_lake(tmp_path: Path) -> None:
    data = days(tmp_path / "lake")
    (tmp_path / "link").symlink_to(data)
    before = sorted(data.rglob("*"))
    for out in (tmp_path / "link" / "out", data / ".." / "lake" / "out", data):
        with (
            pytest.raises(UserError, match=r"lies inside the lake, whose rows would double"),
            claimed(data, out),
        ):
            pass
    assert sorted(data.rglob("*")) == before


def test_the_folder_of_a_lake_that_is_one_file_is_the_lakes(tmp_path: Path) -> None:
    data = days(tmp_path / "lake")
    plan = plan_lake(str(next(data.rglob("*.parquet"))), columns=["x", "y"])
    folder = next(data.rglob("*.parquet")).parent
    assert score_runs.lies_inside(plan, str(folder / "out"))
    assert not score_runs.lies_inside(plan, str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("output", "inside"),
    [
        ("s3://lake/points", True),
        ("s3a://lake/points/out", True),
        ("s3://lake/points//out", True),
        ("s3://lake//points/out", True),
        ("s3://lake/x/../points/out", True),
        ("s3://lake/points/../x", True),  # a key that S3 takes as it stands
        ("s3://lake/points2", False),
        ("s3://lake/Points/out", False),
        ("s3://other/points/out", False),
        ("s3://lake", False),
        ("/lake/points/out", False),
        ("memory://lake/points/out", False),
    ],
)
def test_names_on_s3_are_compared_as_servers_may_read_them(output: str, inside: bool) -> None:
    for name in ("s3://lake/points", "s3a://lake/points/", "simplecache::s3://lake/points"):
        assert lies_within(output, name) == inside


def test_what_a_fit_leaves_in_a_lake_is_not_read_as_rows(tmp_path: Path) -> None:
    data = days(tmp_path / "lake")
    before = plan_lake(str(data), columns=["x", "y"])
    with claim.claim(str(data / "model")) as run:
        run.attempt.write_model(mixture(), PROVENANCE)
        run.attempt.write("report.html", b"<html>")
        assert plan_lake(str(data), columns=["x", "y"]) == before
        run.attempt.commit()
    assert plan_lake(str(data), columns=["x", "y"]) == before


# ------------------------------------------------------------------------- no room


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, number: int, after: int) -> Iterator[list[int]]:
    """Let writes to files fail with an errno, after so many that succeed."""
    calls: list[int] = []
    write_out = places.write_out

    def write(path: Path, data: bytes, *, sync: bool) -> None:
        calls.append(1)
        if len(calls) > after:
            raise OSError(number, os.strerror(number), str(path))
        write_out(path, data, sync=sync)

    with monkeypatch.context() as patch:
        patch.setattr(places, "write_out", write)
        yield calls


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOSPC, RunFailed, "no space is left on the device: make room, and run again"),
        (errno.EDQUOT, RunFailed, "the disk quota is used up: make room, and run again"),
        (errno.EROFS, UserError, "the file system is read-only"),
        (errno.EACCES, UserError, "access denied"),
        (errno.ENAMETOOLONG, UserError, "a name is too long"),
    ],
)
def test_a_disk_that_takes_no_more_ends_a_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type, words: str
) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(kind, match=rf"^{out}.*: {words}"),
        claim.claim(str(out)) as run,
        failing(monkeypatch, number, after=0) as calls,
    ):
        run.attempt.write_model(mixture(), PROVENANCE)
    assert len(calls) == 1
    assert not storage.is_transient(OSError(number, ""))


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG]
)
def test_no_worker_tries_again_what_a_disk_will_not_take(number: int) -> None:
    error = RayTaskError("run", "traceback", OSError(number, os.strerror(number)))
    assert judge(error) is Verdict.HOPELESS


@pytest.mark.faults
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk_ends_a_job_in_one_line_that_says_how_to_go_on(tmp_path: Path) -> None:
    data = days(tmp_path / "lake")
    (tmp_path / "small").mkdir()
    job = Path(__file__).parents[2] / "jobs" / "fit.py"
    command = (
        f"mount -t tmpfs -o size=48k tmpfs {tmp_path}/small && "
        f"exec python {job} {data} --columns x y --missing drop --k 2 --output {tmp_path}/small/o"
    )
    ended = subprocess.run(
        ["unshare", "-m", "bash", "-c", command], capture_output=True, text=True, timeout=170
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}/small/o: no space is left on the device: make room")
    assert last.endswith("--resume")

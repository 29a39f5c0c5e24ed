"""A run of scoring has its output to itself, and leaves it so that it can go on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_scored_files import days, score, work_of

from gmm_dist.errors import UserError
from gmm_dist.lake.plan import plan_lake
from gmm_dist.runs import claim
from gmm_dist.runs.checkpoint import RunIdentity
from gmm_dist.runs.claim import Run
from gmm_dist.runs.lease import LeaseLost
from gmm_dist.scoring import run as score_runs
from gmm_dist.scoring.target import Target

RUN = "_scored/_checkpoints/run.json"


@contextmanager
def claimed(data: Path, out: Path, key: str = "", *, resume: bool = False) -> Iterator[Run]:
    plan = plan_lake(str(data), columns=["x", "y"], missing="mean", keep=["id"])
    identity = RunIdentity(plan_hash=plan.hash, files=(), settings={"k": key})
    with score_runs.claim(Target(str(out)), plan, identity, resume=resume) as run:
        yield run


def test_a_run_whose_first_record_failed_can_go_on(tmp_path: Path) -> None:
    data, out = days(tmp_path / "lake"), tmp_path / "out"
    in_the_way = out / "_scored" / "_checkpoints" / "files"

    def fail() -> None:
        with claimed(data, out):
            in_the_way.write_text("")
            score(work_of(data, out))

    with pytest.raises(UserError, match="no such file or folder"):
        fail()
    assert len(list(out.rglob("*.parquet"))) == 1
    in_the_way.unlink()
    with pytest.raises(UserError, match="pass resume=True to go on with it"), claimed(data, out):
        pass
    with claimed(data, out, resume=True):
        assert score(work_of(data, out)).counts.rows == 900


def test_a_run_that_wrote_nothing_leaves_the_place_to_any_other(tmp_path: Path) -> None:
    data, out = days(tmp_path / "lake"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), claimed(data, out):
        raise KeyboardInterrupt
    assert not (out / RUN).exists()
    with claimed(data, out, "other"):
        assert (out / RUN).exists()


def test_who_has_lost_the_lease_takes_nothing_from_the_successor(tmp_path: Path) -> None:
    data, out = days(tmp_path / "lake"), tmp_path / "out"
    with pytest.raises(LeaseLost), claimed(data, out):
        raise LeaseLost("another has taken the run over")
    assert (out / RUN).exists()


def test_what_came_while_the_lease_was_waited_for_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = days(tmp_path / "lake"), tmp_path / "out"
    home, said = out / "_scored", []

    def wait() -> None:
        try:
            with claimed(data, out, "mine", resume=True):
                pass
        except UserError as error:
            said.append(str(error))

    waiting, begun = threading.Thread(target=wait), threading.Event()
    ask = score_runs.runs.claim

    def asked(*args: object, **options: object) -> object:
        begun.set()  # the first look at the output lies behind us
        return ask(*args, **options)

    with claim.claim(str(home), resume=True, lease_seconds=3.0):
        monkeypatch.setattr(score_runs.runs, "claim", asked)
        waiting.start()
        assert begun.wait(20)
        (out / RUN).parent.mkdir(parents=True)
        theirs = RunIdentity(plan_hash="p", files=(), settings={"k": "theirs"}).canonical
        (out / RUN).write_bytes(theirs)
        (out / "a.parquet").write_bytes(b"rows")
    waiting.join(60)
    assert len(said) == 1
    assert 'holds the scores of an unfinished run: the settings differ: k was "theirs"' in said[0]
    assert (out / RUN).read_bytes() == theirs

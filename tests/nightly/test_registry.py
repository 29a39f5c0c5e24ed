"""A registry's pointer moves forward alone, and its ids are given once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import S3Server
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import FIXED
from test_commit import PROVENANCE, race_model

import gmm_dist
from gmm_dist.errors import UserError
from gmm_dist.nightly.lineage import LINEAGE, Lineage, night_of
from gmm_dist.nightly.registry import Registry
from gmm_dist.runs import claim, commit
from gmm_dist.runs.checkpoint import CHECKPOINTS
from gmm_dist.runs.folder import Folder
from gmm_dist.runs.lease import Held, lease_at
from gmm_dist.storage import open_url

ROOT = Path(__file__).parents[2]
NIGHTS = [f"2026-11-{day:02d}" for day in range(1, 10)]


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_lake').url}/reg"
    return str(tmp_path / "reg")


def lineage(night: str, ids: tuple[int, ...] = (0, 1), dead: tuple[int, ...] = ()) -> Lineage:
    return Lineage(
        night=night,
        night_before=None,
        ids=ids,
        born=ids,
        dead=dead,
        n_rows=1000,
        columns={"y": "floating", "x": "integer"},
    )


def publish(url: str, night: str, number: int = 1, who: Lineage | None = None) -> None:
    with commit.claim(Registry(url).model_url(night)) as attempt:
        attempt.write_model(race_model(number), PROVENANCE)
        attempt.write_json(LINEAGE, (who or lineage(night)).to_json())
        attempt.commit()


def everything(url: str) -> set[str]:
    fs, path = open_url(url)
    fs.invalidate_cache()
    # SeaweedFS goes on to list an emptied folder.
    return {name[len(path) :].lstrip("/") for name in fs.find(path)} - {""}


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ((0, 1, 2, 3, 4), "lineage.json numbers 5 components, the model has "),
        ((0, 0), "0, 0 are not different whole numbers from 0 up"),
        ((0, -1), "0, -1 are not different whole numbers from 0 up"),
        ((0, True), "0, True are not different whole numbers from 0 up"),
    ],
)
def test_numbers_that_are_not_the_models_are_refused(tmp_path: Path, ids, said: str) -> None:
    publish(str(tmp_path), NIGHTS[0], who=lineage(NIGHTS[0], ids))
    with pytest.raises(UserError, match=said):
        Registry(str(tmp_path)).newest_before(NIGHTS[1])


def test_a_copied_folder_is_no_night_of_its_own(tmp_path: Path) -> None:
    place = Registry(str(tmp_path))
    publish(str(tmp_path), NIGHTS[0])
    shutil.copytree(tmp_path / "models" / NIGHTS[0], tmp_path / "models" / NIGHTS[1])
    said = f"{NIGHTS[1]}: lineage.json is that of {NIGHTS[0]}, as in a copied or renamed folder"
    with pytest.raises(UserError, match=said):
        place.newest_before(NIGHTS[2])
    with pytest.raises(UserError, match="restore this night's own, or remove the folder"):
        place.oldest_after(NIGHTS[0])


@pytest.mark.unchecked  # such a lineage cannot be made where annotations are executed
@pytest.mark.parametrize("count", ["1200", 1e3, -1, True, None])
def test_rows_that_are_no_number_are_one_line(tmp_path: Path, count) -> None:
    publish(str(tmp_path), NIGHTS[0], who=replace(lineage(NIGHTS[0]), n_rows=count))
    with pytest.raises(UserError, match=f"lineage.json has an entry.*{count!r} is no number of"):
        Registry(str(tmp_path)).newest_before(NIGHTS[1])


@pytest.mark.parametrize("nights", ["2026-11-01", ["yesterday"], [["2026-11-01"]], {}, 7])
def test_a_list_of_the_pruned_that_is_none_is_one_line(tmp_path: Path, nights) -> None:
    content = {"format_version": 1, "next_id": 3, "nights": nights}
    (tmp_path / "pruned.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"pruned\.json has an entry that makes no sense"):
        Registry(str(tmp_path)).is_pruned(NIGHTS[0])


def test_pruning_leaves_what_is_no_candidate_of_ours(tmp_path: Path) -> None:
    place = Registry(str(tmp_path))
    for night in NIGHTS[:2]:
        publish(str(tmp_path), night)
        (tmp_path / "candidates" / night / "1").mkdir(parents=True)
    for name in (".DS_Store", "2025 notes"):
        (tmp_path / "candidates" / name).write_text("mine")
    place.prune(1, night=NIGHTS[1])
    assert {path.name for path in (tmp_path / "candidates").iterdir()} == {
        ".DS_Store",
        "2025 notes",
        NIGHTS[1],
    }


# ------------------------------------------------------------------------- ids


def counts(url: str, times: int) -> str:
    """A process that takes ids, one after another."""
    script = textwrap.dedent(f"""
        import sys
        sys.path[:0] = [{str(ROOT)!r}]
        from gmm_dist.nightly.registry import Registry
        registry = Registry({url!r})
        print(*[registry.new_ids(1) for _ in range({times})])
    """)
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_processes_at_once_never_get_the_same_id(url: str) -> None:
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(counts, [url] * 2, [20] * 2))
    assert sorted(int(i) for text in found for i in text.split()) == list(range(40))
    assert Registry(url).new_ids(5) == 40
    assert Registry(url).new_ids(0) == 45


def test_a_lost_counter_goes_on_above_the_ids_in_use(url: str) -> None:
    place = Registry(url)
    assert place.new_ids(2, above=(3, 17, 4)) == 18
    assert place.new_ids(1, above=(3,)) == 20


def test_a_lost_counter_goes_on_above_all_nights_and_those_that_were_pruned(url: str) -> None:
    place = Registry(url)
    publish(url, NIGHTS[0], who=lineage(NIGHTS[0], (40, 3)))
    publish(url, NIGHTS[1], who=lineage(NIGHTS[1], (0, 2), dead=(7,)))
    assert place.new_ids(0) == 41
    assert place.prune(1, night=NIGHTS[1]) == [NIGHTS[0]]
    assert place.new_ids(0) == 41
    Folder.of(url).remove("pruned.json")
    assert place.new_ids(0) == 8
    place.new_ids(60)
    publish(url, NIGHTS[2])
    place.prune(1, night=NIGHTS[2])
    Folder.of(url).remove("ids.json")
    assert place.new_ids(1) == 68  # what a late night took and nobody published, too


@pytest.mark.parametrize("rolled_back", ['{"format_version": 1, "next_id": 2}', None])
def test_a_counter_of_a_backup_goes_on_above_all_that_was_given(
    url: str, rolled_back: str | None
) -> None:
    place = Registry(url)
    assert place.new_ids(9) == 0
    publish(url, NIGHTS[0], who=lineage(NIGHTS[0], (7, 8)))
    publish(url, NIGHTS[1], who=lineage(NIGHTS[1], (0, 5), dead=(6,)))
    place.prune(1, night=NIGHTS[1])
    Folder.of(url).remove("ids.json")
    if rolled_back is not None:
        Folder.of(url).write(rolled_back.encode(), "ids.json")
    assert place.new_ids(2) == 9
    assert place.new_ids(1) == 11


def test_ids_of_what_was_kept_back_are_not_given_again(tmp_path: Path) -> None:
    url = str(tmp_path)
    place = Registry(url)
    with commit.claim(place.candidate_url(NIGHTS[1], "a")) as held:
        told = {"components": [{"id": 3}], "born": [{"id": None}], "dead": [{"id": 12}]}
        held.write_json("drift.json", {"format_version": 1, **told})
        held.commit()
    with commit.claim(place.candidate_url(NIGHTS[2], "b")) as held:
        held.write_json("drift.json", ["damaged"])
        held.commit()
    assert place.new_ids(1) == 13


@pytest.mark.parametrize("value", ["-1", "true", '"7"', "1.5", "null", "1e400", "9" * 400, "[1]"])
@pytest.mark.parametrize("name", ["ids.json", "pruned.json"])
def test_a_counter_that_is_no_number_is_one_line(tmp_path: Path, name: str, value: str) -> None:
    (tmp_path / name).write_text(f'{{"format_version": 1, "nights": [], "next_id": {value}}}')
    with pytest.raises(UserError, match=rf"{name} has the next_id .*no whole number") as told:
        Registry(str(tmp_path)).new_ids(1)
    assert "\n" not in str(told.value)


# ------------------------------------------------------------------------- nights


def test_nights_are_found_by_date_and_only_when_they_are_committed(url: str) -> None:
    place = Registry(url)
    assert place.nights() == []
    assert place.newest_before(NIGHTS[5]) is None
    for i in (3, 0, 1):
        publish(url, NIGHTS[i], i)
    with commit.claim(place.model_url(NIGHTS[2])) as attempt:
        attempt.write_model(race_model(9), PROVENANCE)
        assert place.nights() == [NIGHTS[0], NIGHTS[1], NIGHTS[3]]
        before = place.newest_before(NIGHTS[3])
    assert before is not None
    assert before.lineage == lineage(NIGHTS[1])
    assert list(before.lineage.columns) == ["y", "x"]
    expected = gmm_dist.load(place.model_url(NIGHTS[1])).parameters
    assert before.mixture.parameters.means.equal(expected.means)
    assert place.newest_before(NIGHTS[0]) is None


def test_the_pointer_never_moves_back(url: str) -> None:
    place = Registry(url)
    for i, night in enumerate(NIGHTS[:4]):
        publish(url, night, i + 1)
    assert place.latest() is None
    assert place.point_to(NIGHTS[1])
    assert place.point_to(NIGHTS[3])
    assert not place.point_to(NIGHTS[2])
    assert place.point_to(NIGHTS[3])
    assert place.latest() == NIGHTS[3]
    pointer = json.loads(Folder.of(url).read("latest.json") or b"")
    assert gmm_dist.load(url).parameters.means.equal(race_model(4).parameters.means)
    assert pointer == {"format_version": 1, "night": NIGHTS[3], "model": f"models/{NIGHTS[3]}"}


@pytest.mark.parametrize(
    ("night", "model"),
    [
        ("tonight", "models/tonight"),
        ("2026-11-31", "models/2026-11-31"),
        ("20261203", "models/20261203"),
        ("2026-12-3", "models/2026-12-3"),
        ("9999-12-31", "models/9999-12-31"),
        (NIGHTS[0], f"models/{NIGHTS[1]}"),
        (20261203, "models"),
        (None, None),
        ([], "../elsewhere"),
    ],
)
def test_a_pointer_to_no_published_night_is_replaced_with_a_line(
    tmp_path: Path, night: object, model: object, caplog: pytest.LogCaptureFixture
) -> None:
    url = str(tmp_path)
    place = Registry(url)
    publish(url, NIGHTS[0])
    pointer = {"format_version": 1, "night": night, "model": model}
    (tmp_path / "latest.json").write_text(json.dumps(pointer))
    assert place.latest() is None
    assert "which is no published night: the next night replaces it" in caplog.text
    assert place.prune(1, night=NIGHTS[0]) == []
    assert place.point_to(NIGHTS[0])
    assert place.latest() == NIGHTS[0]


def test_a_pointer_ahead_of_the_calendar_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = str(tmp_path)
    for night in (NIGHTS[0], "2999-01-01"):
        publish(url, night)
    assert Registry(url).point_to("2999-01-01")
    assert not Registry(url).point_to(NIGHTS[0])
    assert "names 2999-01-01, a night ahead of the calendar, and stays there" in caplog.text


def test_a_night_that_was_pruned_before_it_was_pointed_to_is_not_pointed_to(url: str) -> None:
    place = Registry(url)
    for night in NIGHTS[:2]:
        publish(url, night)
    assert place.prune(1, night=NIGHTS[1]) == [NIGHTS[0]]  # nobody has pointed yet
    assert not place.point_to(NIGHTS[0])
    assert place.latest() is None
    assert place.point_to(NIGHTS[1])


def test_of_many_that_point_at_once_the_newest_wins(url: str) -> None:
    for night in NIGHTS[:5]:
        publish(url, night)

    def point(night: str) -> bool:
        return Registry(url).point_to(night)

    with ThreadPoolExecutor(5) as pool:
        found = list(pool.map(point, NIGHTS[:5]))
    assert Registry(url).latest() == NIGHTS[4]
    assert found[4]


@settings(FIXED, max_examples=6)
@given(order=st.permutations(NIGHTS[:4]))
def test_whatever_the_order_the_pointer_is_at_the_newest_so_far(
    order: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    url = str(tmp_path_factory.mktemp("reg"))
    for i, night in enumerate(order):
        publish(url, night)
        Registry(url).point_to(night)
        assert Registry(url).latest() == max(order[: i + 1])


# ------------------------------------------------------------------------- in their order


def test_who_comes_while_an_earlier_night_is_at_work_waits_for_it(url: str) -> None:
    place = Registry(url)
    publish(url, NIGHTS[0])
    with ThreadPoolExecutor(1) as pool:
        with claim.claim(place.model_url(NIGHTS[2]), lease_seconds=3) as run:
            waiting = pool.submit(place.await_earlier, NIGHTS[3])
            place.await_earlier(NIGHTS[2])  # not for itself, nor for what is published
            place.await_earlier(NIGHTS[0])
            time.sleep(0.5)
            assert not waiting.done()
            run.attempt.write_model(race_model(1), PROVENANCE)
            run.attempt.write_json(LINEAGE, lineage(NIGHTS[2]).to_json())
            run.attempt.commit()
        waiting.result(timeout=60)
    before = place.newest_before(NIGHTS[3])
    assert before is not None
    assert before.night == NIGHTS[2]


def test_a_dead_run_of_an_earlier_night_is_not_waited_for_longer_than_its_lease(
    tmp_path: Path,
) -> None:
    place = Registry(str(tmp_path))
    cell = lease_at(Folder.of(place.model_url(NIGHTS[0])), "_attempts", "lease")
    assert cell.swap(None, Held(attempt="dead", count=3, seconds=0.3)) is not None
    began = time.monotonic()
    place.await_earlier(NIGHTS[1])
    assert time.monotonic() - began >= 0.3
    # One that published since makes older ones nobody's concern.
    publish(str(tmp_path), NIGHTS[1])
    assert cell.read() is not None
    place.await_earlier(NIGHTS[2])


def test_one_at_a_time_publishes_or_prunes(url: str) -> None:
    place = Registry(url)
    for night in NIGHTS[:3]:
        publish(url, night)
    inside: list[int] = []

    def enter(number: int) -> None:
        with Registry(url).turn(seconds=5) as turn:
            inside.append(number)
            time.sleep(0.2)
            turn.check()
            assert inside[-1] == number
            inside.append(number)

    with ThreadPoolExecutor(4) as pool:
        entered = [pool.submit(enter, number) for number in range(3)]
        pruning = pool.submit(place.prune, 1, night=NIGHTS[2])
        for done in entered:
            done.result(timeout=120)
        assert pruning.result(timeout=120) == NIGHTS[:2]
    assert inside[::2] == inside[1::2]
    assert sorted(inside[::2]) == [0, 1, 2]


def test_a_dead_holder_of_the_registry_is_waited_out(tmp_path: Path) -> None:
    cell = lease_at(Folder.of(str(tmp_path)), "_turn")
    assert cell.swap(None, Held(attempt="dead", count=7, seconds=0.3)) is not None
    with Registry(str(tmp_path)).turn(seconds=1) as turn:
        turn.check()
    assert cell.read() is None


def test_a_night_that_is_pruned_while_it_is_read_makes_room_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path)
    place = Registry(url)
    for night in NIGHTS[:3]:
        publish(url, night)
    read = Lineage.read

    def pruned_meanwhile(found: str) -> Lineage:
        if found.endswith(NIGHTS[1]):
            monkeypatch.undo()
            place._bury([NIGHTS[1]])
            place._remove(NIGHTS[1])
        return read(found)

    monkeypatch.setattr(Lineage, "read", pruned_meanwhile)
    before, after = place.newest_before(NIGHTS[2]), place.oldest_after(NIGHTS[0])
    assert before is not None
    assert after is not None
    assert (before.night, after.night) == (NIGHTS[0], NIGHTS[2])
    assert place.came_between(None, NIGHTS[2])
    assert not place.came_between(NIGHTS[0], NIGHTS[2])
    assert not place.came_between(None, NIGHTS[0])


# ------------------------------------------------------------------------- pruning


def test_pruning_keeps_the_newest_and_leaves_nothing_of_the_others(url: str) -> None:
    place = Registry(url)
    for night in NIGHTS[:5]:
        publish(url, night)
    place.point_to(NIGHTS[4])
    assert place.prune(2, night=NIGHTS[4]) == NIGHTS[:3]
    assert place.nights() == NIGHTS[3:5]
    assert not [name for name in everything(url) if any(n in name for n in NIGHTS[:3])]
    assert gmm_dist.load(place.model_url(NIGHTS[3])).n_components == 2
    assert place.prune(2, night=NIGHTS[4]) == []
    assert [place.is_pruned(n) for n in NIGHTS[:5]] == [True] * 3 + [False] * 2
    assert place.newest_before(NIGHTS[3]) is None
    assert place.prune(1, night=NIGHTS[4]) == [NIGHTS[3]]
    assert all(place.is_pruned(n) for n in NIGHTS[:4])


def test_a_removal_that_was_cut_off_at_its_beginning_leaves_no_night_to_start_from(
    url: str,
) -> None:
    place = Registry(url)
    publish(url, NIGHTS[0])
    publish(url, NIGHTS[2])
    place._bury([NIGHTS[0]])
    assert not place.is_published(NIGHTS[0])
    assert place.nights() == [NIGHTS[2]]
    assert place.newest_before(NIGHTS[1]) is None
    assert place.prune(5, night=NIGHTS[2]) == []
    assert not [name for name in everything(url) if NIGHTS[0] in name]


def test_pruning_spares_what_a_night_can_be_resumed_from(tmp_path: Path) -> None:
    url = str(tmp_path / "reg")
    place = Registry(url)
    for night in (NIGHTS[0], NIGHTS[1], NIGHTS[3], NIGHTS[4]):
        publish(url, night)
    saved = Folder.of(url).below("models", NIGHTS[2], CHECKPOINTS)
    saved.write(b"{}", f"00000001-{'0' * 64}.safetensors")
    assert place.prune(1, night=NIGHTS[4]) == [NIGHTS[0], NIGHTS[3]]
    saved.remove()
    assert place.prune(1, night=NIGHTS[4]) == [NIGHTS[1]]


def test_pruning_spares_the_pointed_to_and_what_a_run_at_work_started_from(url: str) -> None:
    place = Registry(url)
    for night in (NIGHTS[0], NIGHTS[1], NIGHTS[3], NIGHTS[5], NIGHTS[6]):
        publish(url, night)
    place.point_to(NIGHTS[3])
    with claim.claim(place.model_url(NIGHTS[2])):  # a late night, from the second
        assert place.prune(1, night=NIGHTS[6]) == [NIGHTS[0], NIGHTS[5]]
    assert place.nights() == [NIGHTS[1], NIGHTS[3], NIGHTS[6]]
    assert place.prune(1, night=NIGHTS[1]) == []
    assert place.prune(1, night=NIGHTS[6]) == [NIGHTS[1]]


def test_a_removal_that_was_cut_off_is_made_complete(url: str) -> None:
    place = Registry(url)
    publish(url, NIGHTS[0])
    publish(url, NIGHTS[1])
    place.point_to(NIGHTS[1])
    Folder.of(url).remove("models", NIGHTS[0], "manifest.json")
    assert place.nights() == [NIGHTS[1]]
    place.prune(5, night=NIGHTS[1])
    assert not [name for name in everything(url) if NIGHTS[0] in name]


def test_candidates_go_with_the_models_of_their_time(url: str) -> None:
    place = Registry(url)
    for night in (NIGHTS[0], NIGHTS[2], NIGHTS[4]):
        publish(url, night)
    place.point_to(NIGHTS[4])
    for night, attempt in ((NIGHTS[1], "a"), (NIGHTS[3], "a"), (NIGHTS[3], "b")):
        with commit.claim(place.candidate_url(night, attempt)) as held:
            held.write_json("gate.json", {})
            held.commit()
    place.forget_candidates(NIGHTS[3], but="b")
    place.prune(2, night=NIGHTS[4])
    kept = {"/".join(n.split("/")[1:3]) for n in everything(url) if n.startswith("candidates")}
    assert kept == {f"{NIGHTS[3]}/b"}
    place.forget_candidates(NIGHTS[3], but="")
    assert not [name for name in everything(url) if name.startswith("candidates")]


# ------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize("text", ["2026-02-30", "20261121", "tonight", "2026-1-1", "../x"])
def test_a_night_is_a_date(text: str) -> None:
    with pytest.raises(UserError, match=r"is not a night: give a date such as 2026-11-21"):
        night_of(text)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("latest.json", lambda r: r.latest()),
        ("ids.json", lambda r: r.new_ids(1)),
        ("pruned.json", lambda r: r.nights()),
    ],
)
def test_a_damaged_pointer_or_counter_is_one_line(
    tmp_path: Path, name: str, call: Callable[[Registry], object]
) -> None:
    for text, message in (("{", "is damaged or not ours"), ('{"format_version": 1}', "lacks an")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=rf"{name} {message}"):
            call(Registry(str(tmp_path)))


def test_wrong_credentials_are_one_line(s3_lake: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match="check the permissions and the credentials"):
        Registry(f"{s3_lake.url}/reg").is_published(NIGHTS[0])

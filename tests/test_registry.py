"""A registry's pointer moves forward alone, and its ids are given once."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import S3Server
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import FIXED
from test_artifacts import PROVENANCE, race_model

import gmm_dist
from gmm_dist import commit, conditional, runs
from gmm_dist.checkpoint import CHECKPOINTS
from gmm_dist.errors import UserError
from gmm_dist.places import Place
from gmm_dist.registry import LINEAGE, Lineage, Registry, night_of
from gmm_dist.storage import open_url

ROOT = Path(__file__).parent.parent
NIGHTS = [f"2026-11-{day:02d}" for day in range(1, 10)]


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_lake').url}/reg"
    return str(tmp_path / "reg")


def lineage(night: str, ids: tuple[int, ...] = (0, 1), dead: tuple[int, ...] = ()) -> Lineage:
    return Lineage(night, None, ids, ids, dead, 1000, {"y": "floating", "x": "integer"})


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


# ------------------------------------------------------------------------- compare and swap


def test_a_file_is_replaced_only_if_it_is_what_it_was(url: str) -> None:
    place = Place.of(url)
    assert conditional.read(place, "p.json") is None
    assert conditional.swap(place, "p.json", None, b"one")
    assert not conditional.swap(place, "p.json", None, b"two")
    first = conditional.read(place, "p.json")
    assert first is not None
    assert first.data == b"one"
    assert conditional.swap(place, "p.json", first, b"three")
    assert not conditional.swap(place, "p.json", first, b"four")
    now = conditional.read(place, "p.json")
    assert now is not None
    assert now.data == b"three"
    place.remove("p.json")
    assert not conditional.swap(place, "p.json", now, b"five")


def counts(url: str, times: int) -> str:
    """A process that takes ids, one after another."""
    script = textwrap.dedent(f"""
        import sys
        sys.path[:0] = [{str(ROOT)!r}]
        from gmm_dist.registry import Registry
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
    Place.of(url).remove("pruned.json")
    assert place.new_ids(0) == 8
    place.new_ids(60)
    publish(url, NIGHTS[2])
    place.prune(1, night=NIGHTS[2])
    Place.of(url).remove("ids.json")
    assert place.new_ids(1) == 68  # what a late night took and nobody published, too


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
    pointer = json.loads(Place.of(url).read("latest.json") or b"")
    assert gmm_dist.load(url).parameters.means.equal(race_model(4).parameters.means)
    assert pointer == {"format_version": 1, "night": NIGHTS[3], "model": f"models/{NIGHTS[3]}"}


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
    saved = Place.of(url).below("models", NIGHTS[2], CHECKPOINTS)
    saved.write(b"{}", f"00000001-{'0' * 64}.safetensors")
    assert place.prune(1, night=NIGHTS[4]) == [NIGHTS[0], NIGHTS[3]]
    saved.remove()
    assert place.prune(1, night=NIGHTS[4]) == [NIGHTS[1]]


def test_pruning_spares_the_pointed_to_and_what_a_run_at_work_started_from(url: str) -> None:
    place = Registry(url)
    for night in (NIGHTS[0], NIGHTS[1], NIGHTS[3], NIGHTS[5], NIGHTS[6]):
        publish(url, night)
    place.point_to(NIGHTS[3])
    with runs.claim(place.model_url(NIGHTS[2])):  # a late night, from the second
        assert place.prune(1, night=NIGHTS[6]) == [NIGHTS[0], NIGHTS[5]]
    assert place.nights() == [NIGHTS[1], NIGHTS[3], NIGHTS[6]]
    assert place.prune(1, night=NIGHTS[1]) == []
    assert place.prune(1, night=NIGHTS[6]) == [NIGHTS[1]]


def test_a_removal_that_was_cut_off_is_made_complete(url: str) -> None:
    place = Registry(url)
    publish(url, NIGHTS[0])
    publish(url, NIGHTS[1])
    place.point_to(NIGHTS[1])
    Place.of(url).remove("models", NIGHTS[0], "manifest.json")
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

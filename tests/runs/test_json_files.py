"""JSON files of ours that are damaged, or that a stranger wrote, end in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_commit import commit

from gmm_dist.errors import UserError
from gmm_dist.nightly.registry import Registry
from gmm_dist.runs.checkpoint import RunIdentity
from gmm_dist.runs.folder import Folder
from gmm_dist.runs.json_files import name_within, parse, to_json
from gmm_dist.runs.load import load, read_report, repair

BROKEN = {
    "deep": b'{"format_version": 1, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "NaN": b'{"format_version": 1, "x": NaN}',
    "infinite": b'{"format_version": 1, "x": -Infinity}',
    "not UTF-8": b'{"format_version": 1, "x": "\xff\xfe"}',
    "huge version": b'{"format_version": 1e999}',
    "huge number": b'{"format_version": ' + b"9" * 5000 + b"}",
    "version as text": b'{"format_version": "1"}',
    "version as bool": b'{"format_version": true}',
    "version zero": b'{"format_version": 0}',
    "list": b"[1]",
    "null": b"null",
    "pairs": b'[["format_version", 1]]',
    "empty": b"",
    "zeros": bytes(4096),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_in_one_short_line(data: bytes) -> None:
    with pytest.raises(UserError, match=r"^REG: ids.json is damaged or not ours") as raised:
        parse(data, "ids.json", "REG")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("name", ["latest.json", "ids.json", "pruned.json"])
@pytest.mark.parametrize("data", [*BROKEN.values(), b'{"format_version": 1}'])
def test_a_registry_says_which_of_its_files_is_broken(
    tmp_path: Path, name: str, data: bytes
) -> None:
    (tmp_path / name).write_bytes(data)
    place = Registry(str(tmp_path))
    act = {"latest.json": place.latest, "ids.json": lambda: place.new_ids(1)}
    with pytest.raises(UserError, match=rf"^{tmp_path}: {name}"):
        act.get(name, place.nights)()


@pytest.mark.parametrize("content", [{"next_id": "x"}, {"next_id": None}, {"next_id": []}])
def test_a_counter_that_makes_no_sense_is_refused(tmp_path: Path, content: object) -> None:
    assert isinstance(content, dict)
    (tmp_path / "ids.json").write_bytes(to_json({"format_version": 1, **content}))
    with pytest.raises(
        UserError, match=r"ids.json has the next_id .*, which is no whole number >= 0"
    ):
        Registry(str(tmp_path)).new_ids(1)


AWAY = [
    *("../x", "..", ".", "", "/etc/x", "a/../../x", "a//b", "a/", "./a", "a/./b", "s3://other/x"),
    *("file:///x", "..\\x", "a\\..\\b", "C:x", "a\x00b", "a\nb", "%2e%2e/x", "a%2Fb", "memory://x"),
]


@pytest.mark.parametrize("name", [*AWAY, 7, None, ["a"], {"a": 1}])
def test_a_name_that_leads_elsewhere_is_refused(name: object) -> None:
    with pytest.raises(UserError, match=r"^OUT: manifest.json is damaged or not ours \(it names"):
        name_within(name, "manifest.json", "OUT")


@pytest.mark.parametrize("name", ["model/model.json", "a b", "ü", "dt=2026-11-21/x", "...", "a..b"])
def test_a_name_below_is_itself(name: str) -> None:
    assert name_within(name, "manifest.json", "OUT") == name


@pytest.fixture(params=["local", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_lake').url}/deep/out"
    return str(tmp_path / "deep" / "out")


def test_a_manifest_names_nothing_outside_of_its_folder(out: str) -> None:
    commit(out)
    place, above = Folder.of(out), Folder.of(out.rpartition("/")[0])
    manifest = json.loads(place.read("manifest.json") or b"")
    entry = manifest["files"]["sweep.json"]
    above.write(b"theirs", "file")
    names = [*AWAY, "manifest.json", "_attempts/lease", "_checkpoints/x"]
    for name in names if place.is_local else names[:3]:
        files = {**manifest["files"], name: entry}
        _replace(place, {**manifest, "files": files})
        for act in (load, repair, read_report):
            with pytest.raises(UserError, match=r": manifest.json "):
                act(out)
    for attempt in ("..", "../..", "a/b", "", None, 3):
        _replace(place, {**manifest, "attempt": attempt})
        for act in (load, repair):
            with pytest.raises(UserError, match=r": manifest.json "):
                act(out)
    assert above.read("file") == b"theirs"
    assert above.names() == {"file", "out"}
    _replace(place, manifest)
    load(out)


def _replace(place: Folder, manifest: dict[str, object]) -> None:
    place.write(json.dumps(manifest).encode(), "manifest.json")


def test_a_repair_writes_through_no_link_out_of_the_folder(tmp_path: Path) -> None:
    out, theirs = tmp_path / "out", tmp_path / "theirs"
    commit(str(out))
    theirs.mkdir()
    (out / "model").rename(tmp_path / "away")
    (out / "model").symlink_to(theirs)
    with pytest.raises(UserError, match=r"model/model.*leads out of the folder by a link"):
        repair(str(out))
    assert list(theirs.iterdir()) == []
    load(str(out))  # from the attempt's own files


@pytest.mark.parametrize("model", [*AWAY, "models", 7, None])
def test_a_pointer_names_nothing_outside_of_its_registry(tmp_path: Path, model: object) -> None:
    commit(str(tmp_path / "x"))
    registry = tmp_path / "reg"
    registry.mkdir()
    (registry / "models").mkdir()
    (registry / "latest.json").write_bytes(to_json({"format_version": 1, "model": model}))
    with pytest.raises(UserError, match=rf"^{registry}.*"):
        load(str(registry))


def test_a_pointer_that_points_to_a_pointer_ends(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "models" / "a"):
        folder.mkdir(parents=True, exist_ok=True)
        data = to_json({"format_version": 1, "night": "2026-11-21", "model": "models/a"})
        (folder / "latest.json").write_bytes(data)
    (tmp_path / "models" / "a" / "models").symlink_to(tmp_path / "models")
    with pytest.raises(UserError, match="holds no result"):
        load(str(tmp_path))


def test_a_pointer_leads_out_by_no_link(tmp_path: Path) -> None:
    commit(str(tmp_path / "x"))
    (tmp_path / "reg" / "models").mkdir(parents=True)
    (tmp_path / "reg" / "models" / "2026-11-21").symlink_to(tmp_path / "x")
    data = to_json({"format_version": 1, "model": "models/2026-11-21"})
    (tmp_path / "reg" / "latest.json").write_bytes(data)
    with pytest.raises(UserError, match=r"which latest.json names, is a link out of there"):
        load(str(tmp_path / "reg"))


@pytest.mark.parametrize("data", [b"[]", b"{", b"{}", b'{"files": 3, "settings": 4}', b"\xff"])
def test_a_broken_identity_is_one_that_differs(data: bytes) -> None:
    import hashlib

    identity = RunIdentity(plan_hash="hash", files=(), settings={})
    told = identity.difference(data, hashlib.sha256(data).hexdigest())
    assert "damaged" in told or "differ" in told


def test_names_that_are_not_utf8_survive_in_json() -> None:
    name = b"a\xff\xfe.parquet".decode(errors="surrogateescape")
    data = to_json({"format_version": 1, name: "ü"})
    data.decode()  # is UTF-8
    assert parse(data, "x", "y")[name] == "ü"

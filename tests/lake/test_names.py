"""A name is a name: no output, file or model is taken for a pattern, a query or a chain."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import S3Server
from test_commit import PROVENANCE, mixture

from gmm_dist.errors import UserError
from gmm_dist.runs import claim, load
from gmm_dist.runs.folder import Folder

ROOT = Path(__file__).parents[2]
ODD = [
    "run[12]",
    "run*",
    "run?",
    "{a,b}",
    "a#b",
    "a%20b",
    "a+b",
    "a b",
    "q?x=1",
    "x::y",
    "~",
    "[",
    "]",
]
NEIGHBOURS = ["run1", "run2", "runs", "a", "b", "ab", "q", "x", "y"]


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3_lake").url)
    return str(tmp_path)


def files(place: Folder) -> set[str]:
    """Return the files that hold something: SeaweedFS lists emptied folders too."""
    return {name for name, size in place.sizes().items() if size}


def test_a_run_in_a_folder_of_an_odd_name_touches_no_other(root: str) -> None:
    for name in NEIGHBOURS:
        Folder.of(f"{root}/{name}").write(b"theirs", "_checkpoints", "file")
        Folder.of(f"{root}/{name}").write(b"theirs", "_attempts", "file")
    for name in ODD:
        url = f"{root}/{name}"
        with claim.claim(url) as run:
            run.attempt.write_model(mixture(), PROVENANCE)
            run.attempt.commit()
        assert load.load(url).n_components == mixture().n_components
        assert Folder.of(url).names() == {"_attempts", "manifest.json", "model"}
    for name in NEIGHBOURS:
        for folder in ("_checkpoints", "_attempts"):
            assert Folder.of(f"{root}/{name}").read(folder, "file") == b"theirs"
    Folder.of(root).remove(ODD[0])
    assert {name.split("/")[0] for name in files(Folder.of(root))} == {*NEIGHBOURS, *ODD[1:]}


def test_removing_takes_a_folder_its_files_and_no_more(root: str) -> None:
    place = Folder.of(root)
    for name in ("a[b]", "ab", "a"):
        place.write(b"1", name, "x*", "y?")
        place.write(b"1", name, "xz", "y1")
    place.remove("a[b]", "x*")
    assert files(place) == {
        *("a[b]/xz/y1", "ab/x*/y?", "ab/xz/y1", "a/x*/y?", "a/xz/y1"),
    }
    before = files(place)
    place.remove("a*")
    assert files(place) == before
    place.remove("a[b]")
    assert files(place) == {name for name in before if not name.startswith("a[b]/")}


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_bytes(b"1")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path / "theirs")
    (tmp_path / "out" / "dangling").symlink_to(tmp_path / "nowhere")
    place = Folder.of(str(tmp_path / "out"))
    place.remove("link")
    place.remove("dangling")
    place.remove("file", "below")
    assert files(place) == set()
    assert (tmp_path / "theirs" / "file").read_bytes() == b"1"


def test_more_files_than_one_request_takes_are_removed(
    s3_lake: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gmm_dist.runs.folder._KEYS_AT_ONCE", 7)
    place, fs = Folder.of(f"{s3_lake.url}/many"), s3_lake.file_system()
    bucket_path = place.path
    fs.pipe_file(f"{bucket_path}/sub/", b"")  # the marker of a folder
    for number in range(30):
        place.write(b"1", "sub", str(number))
    place.remove("sub")
    assert files(place) == set()


@pytest.mark.parametrize(
    "url", ["s3://b[1]", "s3://b[1]/x", "s3://b*/x", "s3://B_ü/x", "s3://a b/x"]
)
def test_a_bucket_that_cannot_be_is_refused_in_one_line(s3_lake: S3Server, url: str) -> None:
    for act in (load.load, lambda url: claim.claim(url).__enter__()):
        with pytest.raises(UserError, match=r"^s3://") as raised:
            act(url)
        assert "\n" not in str(raised.value)


def test_a_version_of_an_object_is_no_folder(s3_lake: S3Server) -> None:
    with pytest.raises(UserError, match="versionId"):
        Folder.of(f"{s3_lake.url}/out?versionId=1")


# Methods of fsspec that take one name for one name; the others (rm, get, put, cat, pipe, copy, mv,
# glob, expand_path, du...) look for `*`, `?` and `[` in it.
BY_NAME = {
    *("cat_file", "exists", "find", "info", "invalidate_cache", "loop", "ls", "makedirs", "open"),
    *("pipe_file", "protocol", "put_file", "rm_file", "rmdir", "split_path", "close_session"),
    *("_call_s3", "call_s3", "_s3", "_strip_protocol", "unstrip_protocol"),
    *("anon", "connect", "key", "secret", "session", "token"),  # of S3's
}
FILE_SYSTEMS = {"fs", "_fs"}


def calls_of(path: Path) -> list[tuple[str, int]]:
    """Return the attributes that a file asks of file systems, and of what makes them."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value
        name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", None)
        made = isinstance(owner, ast.Call) and getattr(owner.func, "attr", "") == "file_system"
        if name in FILE_SYSTEMS or made:
            found.append((node.attr, node.lineno))
    return found


@pytest.mark.parametrize("folder", ["gmm_dist", "jobs", "benchmarks", "tests"])
def test_no_call_takes_a_pattern_where_a_name_is_meant(folder: str) -> None:
    wrong = [
        f"{path.name}:{line}: .{name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name, line in calls_of(path)
        if name not in BY_NAME
    ]
    assert not wrong


def test_url_to_fs_and_open_files_are_asked_in_one_place() -> None:
    for folder in ("gmm_dist", "jobs"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "storage.py":
                text = path.read_text()
                for name in ("url_to_fs", "open_files", "fsspec.open", "fsspec.filesystem"):
                    assert name not in text, f"{path.name}: {name}"

"""Files appear whole or not at all."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gmm_dist.runs.folder import Folder


@pytest.fixture(params=["local", "s3", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "s3":
        return Folder.of(f"{request.getfixturevalue('s3_lake').url}/out/")
    if request.param == "memory":
        return Folder.of(f"memory://places/{tmp_path.name}")
    return Folder.of(str(tmp_path / "out"))


def test_files_and_folders(place: Folder) -> None:
    assert place.names() == set()
    assert place.read("a", "b") is None
    place.remove("a")
    place.write(b"one", "a", "b")
    place.write(b"two", "c", durable=True)
    assert place.names() == {"a", "c"}
    assert place.below("a").names() == {"b"}
    assert (place.read("a", "b"), place.read("c")) == (b"one", b"two")
    assert place.below("c").names() == {""}
    place.write(b"", "c")
    assert place.read("c") == b""
    place.remove("a")
    assert place.read("a", "b") is None
    place.remove("c")
    assert place.read("c") is None


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    place = Folder.of(str(tmp_path))
    place.write(bytes(2**20), "file")
    done = threading.Event()

    def write() -> None:
        for number in range(50):
            place.write(bytes([number]) * 2**20, "file")
        done.set()

    with ThreadPoolExecutor(1) as threads:
        written = threads.submit(write)
        while not done.is_set() and not written.done():
            data = place.read("file")
            assert data is not None
            assert len(data) == 2**20
            assert len(set(data)) == 1
        written.result()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Folder.of(str(tmp_path))
    place.write(b"old", "file")
    with monkeypatch.context() as broken:

        def fail(descriptor: int) -> None:
            raise OSError("disk full")

        broken.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            place.write(b"new", "file", durable=True)
    assert place.read("file") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

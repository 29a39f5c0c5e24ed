"""A folder on any fsspec URL: whole files, and files created only where there are none."""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from gmm_dist.storage import join, open_url, patiently, version
from gmm_dist.urls import Url

_PART = ".part"
_ABANDONED = 300.0  # seconds after which a step that takes milliseconds is not under way any more


@dataclass(frozen=True)
class Place:
    """A folder to write to or read from; `url` prints itself without credentials.

    Stores that are out of order are waited for, see `storage.patiently`.
    """

    fs: AbstractFileSystem
    path: str
    url: Url

    @classmethod
    def of(cls, url: str) -> Place:
        """Open `url`; nothing is asked of the store yet."""
        fs, path = open_url(url)
        return cls(fs, path.rstrip("/") or path, Url(url))

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def at(self, *parts: str) -> str:
        return join(self.path, *parts)

    def below(self, *parts: str) -> Place:
        """Return a folder within, whose `url` stays that of the whole."""
        return Place(self.fs, self.at(*parts), self.url)

    def names(self) -> set[str]:
        """Return the names in the folder: none where there is no folder, "" for a file."""
        self.fs.invalidate_cache()
        try:
            listed = patiently(lambda: self.fs.ls(self.path, detail=True), self.url)
        except FileNotFoundError as error:
            if answer(error).get("Error", {}).get("Code") == "NoSuchBucket":
                raise
            return set()
        entries = {entry["name"]: entry["type"] for entry in listed}
        if entries == {self.path: "file"}:
            return {""}
        # Some object stores list the folder itself: a marker, or what deleted files have left.
        names = {name.rstrip("/") for name in entries} - {self.path}
        return {name.rpartition("/")[2] for name in names}

    def read(self, *parts: str) -> bytes | None:
        """Return a file's bytes, or None where there is no such file."""
        try:
            data: bytes = patiently(lambda: self.fs.cat_file(self.at(*parts)), self.url)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return data

    def write(self, data: bytes, *parts: str, durable: bool = False) -> None:
        """Write a file that readers see whole or not at all; `durable` survives a power cut."""
        path = self.at(*parts)
        if not self.is_local:
            patiently(lambda: self.fs.pipe_file(path, data), self.url)
            return
        final = Path(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        scratch = final.with_name(f".{final.name}.{secrets.token_hex(4)}{_PART}")
        try:
            _write_out(scratch, data, sync=durable)
            scratch.replace(final)
        except BaseException:
            with suppress(OSError):
                scratch.unlink()
            raise
        if durable:
            sync(final.parent)

    def remove_abandoned(self, *parts: str) -> None:
        """Remove a file or folder that a process on this disk was killed over, long ago."""
        with suppress(FileNotFoundError):
            age = time.time() - Path(self.at(*parts)).stat().st_mtime if self.is_local else 0.0
            if age > _ABANDONED:
                self.remove(*parts)

    def remove_abandoned_parts(self) -> None:
        """Remove the beginnings of files in this folder whose writer was killed, long ago."""
        for part in Path(self.path).glob(f".*{_PART}") if self.is_local else ():
            self.remove_abandoned(part.name)

    @contextmanager
    def writing(self, *parts: str, scratch: Place) -> Iterator[Path]:
        """Give a path on this machine for a large file; leaving the block puts it in its place.

        Readers see it whole or not at all. On a local disk it grows in the folder `scratch`, of
        the same file system; for other stores in this machine's folder for temporary files.
        """
        final = self.at(*parts)
        if self.is_local:
            Path(scratch.path).mkdir(parents=True, exist_ok=True)
            growing = Path(scratch.at(f"{secrets.token_hex(8)}{_PART}"))
            try:
                yield growing
                sync(growing)
                Path(final).parent.mkdir(parents=True, exist_ok=True)
                growing.replace(final)
            finally:
                growing.unlink(missing_ok=True)
            return
        with tempfile.TemporaryDirectory() as folder:
            growing = Path(folder) / "file"
            yield growing
            patiently(lambda: self.fs.put_file(str(growing), final), self.url)

    def stamp(self, *parts: str) -> list[object] | None:
        """Return a file's size and ETag (or time, see `storage.version`), None without a file."""
        try:
            info = patiently(lambda: self.fs.info(self.at(*parts)), self.url)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return [info["size"], version(self.fs, info)] if info["type"] == "file" else None

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every file in the folder, at any depth, by its path in it."""
        self.fs.invalidate_cache()
        found = patiently(lambda: self.fs.find(self.path, detail=True), self.url)
        return {name.removeprefix(f"{self.path}/"): info["size"] for name, info in found.items()}

    def create(self, data: bytes, *parts: str, scratch: str) -> None:
        """Create a file with all of its bytes in one step, or raise FileExistsError.

        fsspec's mode="create" looks and then writes on a local disk, which loses races; a
        hard link to a finished file appears in one step and never replaces another. Where a
        store's answer was lost, the file that exists may be ours.
        """
        path = self.at(*parts)
        if self.is_local:
            _write_out(Path(scratch), data, sync=True)
            try:
                Path(path).hardlink_to(scratch)
            finally:
                Path(scratch).unlink()
            return
        try:
            patiently(lambda: self.fs.pipe_file(path, data, mode="create"), self.url)
        except OSError as error:
            # s3fs recognises AWS's wording of "precondition failed" and no other store's.
            if answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode") == 412:
                raise FileExistsError(path) from error
            raise

    def remove(self, *parts: str) -> None:
        """Remove a file, or a folder with all that is in it; absent is fine."""
        path = self.at(*parts)
        self.fs.invalidate_cache()
        with suppress(FileNotFoundError):
            self.fs.rm(path, recursive=True)


def answer(error: OSError) -> Mapping[str, Any]:
    """Return what the object store answered, as botocore tells it; empty for other stores."""
    told: Mapping[str, Any] = getattr(error.__cause__, "response", {})
    return told


def sync(path: Path) -> None:
    """Push a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_out(path: Path, data: bytes, *, sync: bool) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        if sync:
            os.fsync(file.fileno())

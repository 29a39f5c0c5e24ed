"""A folder on any fsspec URL, of files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import posixpath
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from gmm_dist.errors import UserError
from gmm_dist.storage import join, open_url, patiently, version
from gmm_dist.urls import Url, reveal

_PART = ".part"
_KEYS_AT_ONCE = 1000  # that a request to remove objects may name
_ABANDONED = 300.0  # seconds after which a step that takes milliseconds is not under way any more


@dataclass(frozen=True)
class Folder:
    """A folder to write to or read from; `url` prints itself without credentials.

    Stores that are out of order are waited for, see `storage.patiently`.
    """

    fs: AbstractFileSystem
    path: str
    url: Url

    @classmethod
    def of(cls, url: str) -> Folder:
        """Open `url`; no request is sent to the store yet."""
        fs, path = open_url(url)
        if is_s3(fs) and "?versionId=" in path:  # s3fs would leave out the rest of any name
            raise UserError(f"{Url(url)}: a version of an object, and no folder; give a folder")
        return cls(fs, path.rstrip("/") or path, Url(url))

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def at(self, *parts: str) -> str:
        return join(self.path, *parts)

    def below(self, *parts: str) -> Folder:
        """Return a folder within this one; its `url`, for messages, stays this one's."""
        return Folder(self.fs, self.at(*parts), self.url)

    def leads_out(self, *parts: str) -> bool:
        """Say whether links on a local disk lead from a path in the folder to one outside of it."""
        if not self.is_local:
            return False
        return not Path(self.at(*parts)).resolve().is_relative_to(Path(self.path).resolve())

    def names(self) -> set[str]:
        """Return the names in the folder: none where there is no folder, "" for a file.

        Files that systems and other programs leave in any folder are left out, see `is_foreign`.
        """
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
        paths = {name.rstrip("/") for name in entries} - {self.path}
        names = {name.rpartition("/")[2] for name in paths}
        return {name for name in names if not is_foreign(name)}

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
        # Not made of the file's name, which may be as long as names can be.
        scratch = final.with_name(f".{secrets.token_hex(8)}{_PART}")
        try:
            write_out(scratch, data, sync=durable)
            scratch.replace(final)
        except BaseException:
            with suppress(OSError):
                scratch.unlink()
            raise
        if durable:
            sync(final.parent)

    def remove_abandoned(self, *parts: str) -> None:
        """Remove a local file or folder that a process left behind when it was killed long ago."""
        with suppress(FileNotFoundError):
            age = time.time() - Path(self.at(*parts)).stat().st_mtime if self.is_local else 0.0
            if age > _ABANDONED:
                self.remove(*parts)

    def remove_abandoned_parts(self) -> None:
        """Remove partly written files in this folder whose writer was killed long ago."""
        for part in Path(self.path).glob(f".*{_PART}") if self.is_local else ():
            self.remove_abandoned(part.name)

    @contextmanager
    def writing(self, *parts: str, scratch: Folder) -> Iterator[Path]:
        """Yield a local path to write a large file to; leaving the block moves it to its place.

        Readers see it whole or not at all. On a local disk it is written in the folder `scratch`,
        of the same file system; for other stores in this machine's folder for temporary files.
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
        files = patiently(lambda: self.fs.find(self.path, detail=True), self.url)
        return {name.removeprefix(f"{self.path}/"): info["size"] for name, info in files.items()}

    def remove(self, *parts: str) -> None:
        """Remove a file, or a folder with all that is in it; absent is fine.

        Removes by name: fsspec's `rm` takes `*`, `?` and `[...]` for patterns, and would remove
        files in other folders.
        """
        path = self.at(*parts)
        if self.is_local:
            remove_local(Path(path))
            return
        self.fs.invalidate_cache()
        entries = self.fs.find(path, withdirs=True, detail=True)
        if is_s3(self.fs):
            # A file may have the name of the folder, and markers are listed as folders.
            _remove_objects(self.fs, sorted({path, *entries}))
        else:
            self._remove_each(path, entries)
        self.fs.invalidate_cache()

    def _remove_each(self, path: str, entries: Mapping[str, Mapping[str, Any]]) -> None:
        folders = {name for name, info in entries.items() if info["type"] == "directory"}
        for name in {path, *entries} - folders:
            with suppress(FileNotFoundError):
                self.fs.rm_file(name)
        for name in sorted(folders | {path}, reverse=True):
            with suppress(OSError, NotImplementedError):  # stores without folders
                self.fs.rmdir(name)


def answer(error: OSError) -> Mapping[str, Any]:
    """Return the object store's response, in botocore's form; empty for other stores."""
    response: Mapping[str, Any] = getattr(error.__cause__, "response", {})
    return response


_FOREIGN = re.compile(
    r"\.DS_Store|\._.*|\.nfs.*|\.fuse_hidden.*|\.(Spotlight-V100|Trashes|Trash-\d+|fseventsd)"
    r"|\.TemporaryItems|\.afp.*|\.snapshots?|lost\+found|@eaDir|#recycle|.*_\$folder\$"
    r"|(?i:thumbs\.db|desktop\.ini|System Volume Information|\$RECYCLE\.BIN)"
)


def is_foreign(name: str) -> bool:
    """Say whether systems and file browsers put files of this name into any folder.

    macOS, Windows, NFS, FUSE, NAS boxes and Hadoop (its markers of folders on S3) do.
    """
    return _FOREIGN.fullmatch(name) is not None


def is_s3(fs: AbstractFileSystem) -> bool:
    """Say whether a file system is S3's."""
    return "s3" in fs.protocol


def _remove_objects(fs: AbstractFileSystem, paths: Sequence[str]) -> None:
    bucket = fs.split_path(paths[0])[0]
    keys = [path.removeprefix(f"{bucket}/") for path in paths]
    for first in range(0, len(keys), _KEYS_AT_ONCE):
        objects = [{"Key": key} for key in keys[first : first + _KEYS_AT_ONCE]]
        answered = fs.call_s3(
            "delete_objects", Bucket=bucket, Delete={"Objects": objects, "Quiet": True}
        )
        for failed in answered.get("Errors", ()):
            raise OSError(
                errno.EIO, f"{failed.get('Code')}: {failed.get('Message')}", failed.get("Key")
            )


def remove_local(path: Path) -> None:
    """Remove what is at a path; of a link, the link alone."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        if path.is_dir():  # somebody else removes it too
            shutil.rmtree(path, ignore_errors=True)
    except NotADirectoryError:
        pass  # a file where a folder on the way to it would be
    except OSError as error:
        # NFS keeps a removed file that is open elsewhere under such a name, until it is closed.
        left = [name for _, _, names in os.walk(path) for name in names]
        if error.errno not in (errno.ENOTEMPTY, errno.EBUSY) or not all(
            name.startswith(".nfs") for name in left
        ):
            raise


def lies_within(url: str, folder: str, *, parts: Iterable[str] = ()) -> bool:
    """Say whether a listing of `folder` would include files written to `url`.

    On a local disk the folders themselves are compared, so that links, relative paths, another
    case and mounts (of the folder, and of those in it that `parts` names) make no difference.
    Elsewhere their names are, in each way that servers may resolve `//` and `..`.
    """
    (fs, path), (other, root) = open_url(url), open_url(_cached(folder))
    if isinstance(fs, LocalFileSystem) and isinstance(other, LocalFileSystem):
        return _is_below(Path(path), [Path(root), *(Path(join(root, part)) for part in parts)])
    if type(fs) is not type(other):
        return False
    return any(
        f"{spell(path)}/".startswith(f"{spell(root).rstrip('/')}/")
        for spell in (_less_slashes, _less_dots)
    )


def _cached(url: str) -> str:
    """Return where the files of a chain such as simplecache::s3://... come from."""
    return Url(re.sub(r"^((simple|file|block)?cached?(://)?::)+", "", reveal(url)))


def _less_slashes(path: str) -> str:
    return "/" + re.sub("/+", "/", path).strip("/")


def _less_dots(path: str) -> str:
    return posixpath.normpath(_less_slashes(path))


def _is_below(path: Path, folders: Sequence[Path]) -> bool:
    resolved = path.resolve()
    if resolved.is_relative_to(folders[0].resolve()):
        return True
    # A folder that is mounted a second time has another path, and the same number.
    above = {key for folder in (resolved, *resolved.parents) if (key := _folder_key(folder))}
    return any(_folder_key(folder) in above for folder in folders)


def _folder_key(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino)


def sync(path: Path) -> None:
    """Push a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_out(path: Path, data: bytes, *, sync: bool) -> None:
    """Write a local file; with `sync` it is on the disk when this returns."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        if sync:
            os.fsync(file.fileno())

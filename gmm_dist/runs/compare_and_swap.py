"""A small file that is replaced only if it still is what was read: compare and swap.

On S3 the store judges the condition (If-Match, If-None-Match). On a local disk a lock file
beside it does (flock): the kernel lets go of it when its holder dies, so none is left behind.
On other stores it is exact within one process only.
"""

from __future__ import annotations

import fcntl
import hashlib
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem, asyn

from gmm_dist.errors import RunFailed
from gmm_dist.runs.folder import Folder, answer, is_s3
from gmm_dist.storage import patiently

_TIMEOUT = 30.0  # of one request, and of waiting for another's lock (seconds)
_POLL = 0.01


@dataclass(frozen=True, slots=True)
class Version:
    """What a file held when it was read, and the tag that a replacement of it must name."""

    data: bytes
    tag: str


class S3Object:
    """One object and the conditions that S3 honours; no request lasts longer than `timeout`."""

    def __init__(self, fs: AbstractFileSystem, path: str, timeout: float) -> None:
        self._fs, self._timeout = fs, timeout
        bucket, key, _ = fs.split_path(path)
        self._object = {"Bucket": bucket, "Key": key}

    def call(self, method: str, **arguments: Any) -> Mapping[str, Any] | None:
        """Return the answer, None when the object is gone or a condition does not hold."""

        async def call() -> Mapping[str, Any]:
            answered = await self._fs._call_s3(method, **self._object, **arguments)
            if method != "get_object":
                return dict(answered)
            async with answered["Body"] as body:
                return {**answered, "Body": await body.read()}

        try:
            result: Mapping[str, Any] = asyn.sync(self._fs.loop, call, timeout=self._timeout)
        except FileNotFoundError as error:
            if answer(error).get("Error", {}).get("Code") == "NoSuchBucket":
                raise
            return None
        except OSError as error:
            # 409: another conditional request was under way.
            if answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode") in (409, 412):
                return None
            raise
        return result


def read(folder: Folder, name: str) -> Version | None:
    """Return the file as it is, None where there is none."""
    if is_s3(folder.fs):
        response = patiently(lambda: _object(folder, name).call("get_object"), folder.url)
        return None if response is None else Version(response["Body"], response["ETag"])
    data = folder.read(name)
    return None if data is None else _version(data)


def swap(folder: Folder, name: str, old: Version | None, new: bytes) -> bool:
    """Write `new` if the file is still `old` (None: absent), and say whether it was.

    After False, or an error, read again: an answer may have been lost, and `new` be there.

    Raises:
        RunFailed: another process has held the lock on a local disk for half a minute.
    """
    if is_s3(folder.fs):
        condition = {"IfNoneMatch": "*"} if old is None else {"IfMatch": old.tag}
        put = patiently(
            lambda: _object(folder, name).call("put_object", Body=new, **condition), folder.url
        )
        return put is not None
    with _locked(folder, name):
        if read(folder, name) != old:
            return False
        folder.write(new, name, durable=True)
    return True


def _object(folder: Folder, name: str) -> S3Object:
    return S3Object(folder.fs, folder.at(name), _TIMEOUT)


def _version(data: bytes) -> Version:
    return Version(data, hashlib.sha256(data).hexdigest())


_ours = threading.Lock()


@contextmanager
def _locked(folder: Folder, name: str) -> Iterator[None]:
    """Hold the file's lock: this process's own, and on a local disk that of all processes."""
    with _ours:
        if not folder.is_local:
            yield
            return
        lock = Path(folder.at(f".{name}.lock"))
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("wb") as file:
            _wait_for(file.fileno(), lock)
            yield


def _wait_for(descriptor: int, lock: Path) -> None:
    deadline = time.monotonic() + _TIMEOUT
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"{lock}: another process has held this lock for {_TIMEOUT:g} s: see whether a "
                    "job is stopped there, and run again"
                ) from error
            time.sleep(_POLL)

"""Write a run's state beside its output as it works, and find it again.

    OUT/_checkpoints/run.json                             whose run it is, see `RunIdentity`
    OUT/_checkpoints/<number>-<sha256>.safetensors        tensors, and state as JSON metadata

A name holds the sha256 of its file's bytes, so that a torn file is never taken for a whole one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from gmm_dist import devices
from gmm_dist.errors import Option, UserError
from gmm_dist.runs.folder import Folder
from gmm_dist.runs.json_files import require_readable
from gmm_dist.runs.model_folder import library_versions
from gmm_dist.storage import line_of

logger = logging.getLogger(__name__)

CHECKPOINTS = "_checkpoints"
# Of checkpoints alone: 1 held lanes of maximum likelihood only, in another shape; 2 did not count
# the components that matter to a row, 3 not those that cannot be screened.
FORMAT_VERSION = 5
_IDENTITY = "run.json"
_NAME = re.compile(r"(\d{8,})-([0-9a-f]{64})\.safetensors")
_KEYS = {"format_version", "key", "environment", "number", "state"}
_REMEDY = "give back what it was, or pass another " + Option("output") + " to start afresh"


@dataclass(frozen=True)
class Checkpoint:
    """Hold what a run needs to resume: tensors by name, and `state` as plain JSON values.

    `number` orders a run's checkpoints. Tensors and state come back exactly: float64, int64 and
    bool tensors bit for bit, JSON floats too, infinite ones and NaN included; tuples come back as
    lists.
    """

    number: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """Say what decides a run's bits: the plan, and `settings` as plain JSON values.

    `files` are the plan's, as (path, size in bytes, version), so that messages can name one that
    has changed; `snapshot` says which version of a table the rows are of, None for no table.
    `environment` (library versions, processors) is not part of `key`: in another one a run
    resumes, and may differ in the last bits.
    """

    plan_hash: str
    files: tuple[tuple[str, int, str], ...]
    settings: Mapping[str, Any]
    environment: Mapping[str, str | None] = field(default_factory=dict)
    snapshot: Mapping[str, Any] | None = None

    @property
    def key(self) -> str:
        return hashlib.sha256(self.canonical).hexdigest()

    @property
    def canonical(self) -> bytes:
        """The bytes whose sha256 is `key`; they are kept beside a run."""
        content = {"plan_hash": self.plan_hash, "files": self.files, "settings": self.settings}
        if self.snapshot is not None:  # runs of no table keep the key that they always had
            content["snapshot"] = self.snapshot
        return json.dumps(content, sort_keys=True).encode()

    def difference(self, saved: bytes | None, key: str) -> str:
        """Say what differs from the run whose `run.json` is `saved` and whose key is `key`."""
        if saved is None or hashlib.sha256(saved).hexdigest() != key:
            return "the lake's files, the columns or the settings differ"
        now = json.loads(self.canonical)
        try:
            then = json.loads(saved)
            changes = _other_snapshot(then.get("snapshot"), now.get("snapshot"))
            changes = changes or _changed_files(then["files"], now["files"])
            was, are = _flat(then["settings"]), _flat(now["settings"])
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return f"{_IDENTITY} is damaged, or not ours"
        if changes:
            return changes
        changed = [
            f"{name} was {json.dumps(was.get(name))}, is {json.dumps(are.get(name))}"
            for name in sorted(was.keys() | are.keys())
            if was.get(name) != are.get(name)
        ]
        if changed:
            return f"the settings differ: {', '.join(changed)}"
        return "the plan (columns, filter or rows) differs"


def _other_snapshot(then: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> str | None:
    if then == now:
        return None
    was, is_now = (
        "no table"
        if snapshot is None
        else f"{'version' if snapshot['format'] == 'Delta' else 'snapshot'} {snapshot['version']} "
        f"of the {snapshot['format']} table {snapshot['table']}"
        for snapshot in (then, now)
    )
    if was == is_now:
        return f"other rows of {was} are deleted than were"
    return f"the rows were those of {was}, and are of {is_now}"


def _changed_files(then: list[list[Any]], now: list[list[Any]]) -> str | None:
    was, are = ({path: facts for path, *facts in files} for files in (then, now))
    changed = sorted(path for path in was.keys() | are.keys() if was.get(path) != are.get(path))
    if not changed:
        return None
    path = changed[0]
    if path not in are:
        what = f"{path} ({was[path][0]:,} bytes) is gone"
    elif path not in was:
        what = f"{path} ({are[path][0]:,} bytes) is new"
    else:
        (size, version), (new_size, new_version) = was[path], are[path]
        what = f"{path} had {size:,} bytes, version {version}, has {new_size:,}, {new_version}"
    more = f" and {len(changed) - 1:,} more" if len(changed) > 1 else ""
    return f"the lake's files have changed: {what}{more}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def environment() -> dict[str, str | None]:
    """Return what, in this process, may change a sum's last bits: libraries and processor."""
    on_gpu = torch.cuda.is_available()
    return {
        **library_versions(["torch", "numpy"]),
        "processor": _processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        **(devices.libraries() if on_gpu else {}),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    match = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def checkpoint_names(folder: Folder) -> list[str]:
    """Return the names of the checkpoints in a run's output, the oldest first."""
    return _sorted(folder.below(CHECKPOINTS).names())


def begun_with(folder: Folder) -> Mapping[str, Any] | None:
    """Return the version of a table with which a run has begun that can be resumed.

    As `RunIdentity.snapshot` has it; None where there is no such run, or no table.
    """
    return snapshot_in(folder.read(CHECKPOINTS, _IDENTITY)) if checkpoint_names(folder) else None


def snapshot_in(saved: bytes | None) -> Mapping[str, Any] | None:
    """Return the snapshot that a `run.json` names, None where it names none or is damaged."""
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        snapshot = json.loads(saved or b"{}")["snapshot"]
        return snapshot if isinstance(snapshot, dict) else None
    return None


def _sorted(names: set[str]) -> list[str]:
    matches = [match for match in map(_NAME.fullmatch, names) if match]
    return [match[0] for match in sorted(matches, key=lambda match: (int(match[1]), match[2]))]


class CheckpointStore:
    """Keep the newest checkpoints of one run, written by a thread of its own.

    The newest wins: one that waits to be written is dropped for a newer one. With `seconds`, at
    most one is taken in that time. `guard` is asked before each write: a run that may have been
    taken over writes none. Failing storage never ends a run: it is logged, and the next
    checkpoint is tried.
    """

    def __init__(
        self,
        output: Folder,
        identity: RunIdentity,
        *,
        keep: int = 2,
        seconds: float = 0.0,
        guard: Callable[[], bool] = lambda: True,
    ) -> None:
        self._folder = output.below(CHECKPOINTS)
        self._identity, self._keep, self._seconds, self._guard = identity, keep, seconds, guard
        self._key = identity.key
        self._taken: float | None = None
        self._changed = threading.Condition()
        self._pending: Checkpoint | None = None
        self._busy = self._closed = self._identified = False
        self._thread: threading.Thread | None = None

    def latest(self) -> Checkpoint | None:
        """Return the newest whole checkpoint, None where there is none.

        Raises:
            UserError: it belongs to another run (other files, columns or settings), or an older
                or newer gmm_dist wrote it.
        """
        for name in reversed(_sorted(self._folder.names())):
            data = self._folder.read(name)
            content = None if data is None else _whole(name, data)
            if data is None or content is None:
                logger.warning("%s: %s/%s is torn: ignored", self._folder.url, CHECKPOINTS, name)
                continue
            self._refuse_other(name, content)
            return Checkpoint(content["number"], safetensors.torch.load(data), content["state"])
        return None

    def _refuse_other(self, name: str, content: Mapping[str, Any]) -> None:
        url = self._folder.url
        version = content["format_version"]
        require_readable(version, name, url, newest=FORMAT_VERSION)
        if version < FORMAT_VERSION:
            raise UserError(
                f"{url}: an older gmm_dist wrote checkpoint {content['number']} (format version "
                f"{version}, this one resumes from {FORMAT_VERSION} only)",
                remedy="finish the run with that gmm_dist, or pass another "
                + Option("output")
                + " to start afresh",
            )
        if content["key"] != self._key:
            saved = self._folder.read(_IDENTITY)
            raise UserError(
                f"{url}: cannot resume from checkpoint {content['number']}: "
                f"{self._identity.difference(saved, content['key'])}",
                remedy=_REMEDY,
            )
        was, now = content["environment"], self._identity.environment
        changes = [
            f"{what} {was.get(what)} is now {now.get(what)}"
            for what in sorted({*was, *now})
            if was.get(what) != now.get(what)
        ]
        if changes:
            logger.warning(
                "%s: resumed elsewhere (%s): the last bits may differ", url, ", ".join(changes)
            )

    @property
    def is_due(self) -> bool:
        """Say whether `put` would take a checkpoint now."""
        return self._taken is None or time.monotonic() - self._taken >= self._seconds

    def put(self, checkpoint: Checkpoint) -> None:
        """Take a copy of a checkpoint to be written soon, if one is due; returns at once."""
        if not self.is_due:
            return
        self._taken = time.monotonic()
        # Contiguous copies: the run goes on to change its own, and safetensors shares no memory.
        copies = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in checkpoint.tensors.items()
        }
        with self._changed:
            assert not self._closed
            self._pending = Checkpoint(checkpoint.number, copies, dict(checkpoint.state))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._write_all, name="checkpoint", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def flush(self, timeout: float = 60.0) -> bool:
        """Wait until what was put is written or has failed; say whether that was in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy and self._pending is None, timeout)

    def close(self, *, flush: bool = True, timeout: float = 60.0) -> None:
        """End the thread, after writing what was put last unless `flush` is False."""
        in_time = self.flush(timeout) if flush else True
        with self._changed:
            self._pending, self._closed = None, True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout if in_time else 0.0)
            if self._thread.is_alive():
                logger.warning("%s: a checkpoint is still being written", self._folder.url)

    def clear(self) -> None:
        """End the thread and remove all checkpoints: the run has committed."""
        self.close(flush=False)
        self._folder.remove()

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed or self._pending is not None)
                checkpoint, self._pending = self._pending, None
                if checkpoint is None:
                    return
                self._busy = True
            try:
                if self._guard():
                    self._write(checkpoint)
            except Exception as error:
                logger.warning(
                    "%s: checkpoint %d was not written, the run goes on: %s",
                    *(self._folder.url, checkpoint.number, line_of(error)),
                )

    def _write(self, checkpoint: Checkpoint) -> None:
        if not self._identified:
            logger.info("writing checkpoints to %s", self._folder.url)
            self._folder.write(self._identity.canonical, _IDENTITY, durable=True)
            self._identified = True
        content = {
            "format_version": FORMAT_VERSION,
            "key": self._key,
            "environment": dict(self._identity.environment),
            "number": checkpoint.number,
            "state": checkpoint.state,
        }
        data = safetensors.torch.save(
            dict(checkpoint.tensors), metadata={"checkpoint": json.dumps(content)}
        )
        name = f"{checkpoint.number:08d}-{hashlib.sha256(data).hexdigest()}.safetensors"
        self._folder.write(data, name, durable=True)
        self._prune(name)

    def _prune(self, newest: str) -> None:
        """Remove all but the newest, older ones of the newest's number, and torn ones."""
        names = self._folder.names()
        torn = {name for name in names if name.endswith(".part")}
        number = newest.split("-")[0]
        older = {name for name in names if name.startswith(f"{number}-") and name != newest}
        for name in [*_sorted(names - older)[: -self._keep], *sorted(older | torn)]:
            self._folder.remove(name)


def _whole(name: str, data: bytes) -> dict[str, Any] | None:
    """Return a checkpoint file's content, None where its sha256 is not the one in its name."""
    match = _NAME.fullmatch(name)
    if match is None or hashlib.sha256(data).hexdigest() != match[2]:
        return None
    try:
        header = int.from_bytes(data[:8], "little")
        content = dict(json.loads(json.loads(data[8 : 8 + header])["__metadata__"]["checkpoint"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return content if content.keys() >= _KEYS else None

"""Write a run's results so that they are complete or absent, and read them back.

    OUT/_attempts/<attempt>/model/model.safetensors    what a run writes
    OUT/_attempts/<attempt>/model/model.json
    OUT/_attempts/<attempt>/sweep.json
    OUT/manifest.json                                  the commit: attempt, files, sha256
    OUT/model/..., OUT/sweep.json                      plain copies, for people

The manifest is created only if there is none, in one step, and never changes. Readers follow
it and verify what they read, so they see nothing of a run that has not committed, and a late
writer cannot change a result.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from gmm_dist.errors import UserError
from gmm_dist.mixture import Mixture
from gmm_dist.parameters import COVARIANCE_TYPES, Parameters
from gmm_dist.storage import explained, join, open_url, redacted

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
ATTEMPTS = "_attempts"
MODEL = "model"
REPORT = "sweep.json"
_TENSORS = "model.safetensors"
_CARD = "model.json"
# Seconds between tries to create the manifest on a store that failed to answer.
_PAUSES = (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class FileEntry:
    """Identify the bytes of one file: its sha256 (hexadecimal) and size (bytes)."""

    sha256: str
    size: int

    @classmethod
    def of(cls, data: bytes) -> FileEntry:
        return cls(hashlib.sha256(data).hexdigest(), len(data))

    def fits(self, data: bytes | None) -> bool:
        return data is not None and self == FileEntry.of(data)


@dataclass(frozen=True)
class Provenance:
    """Say how a model came about: all of model.json that is not the mixture itself.

    `criteria` are `bic`, `aic`, `icl`; `status` is the sentence that says why EM stopped;
    `config` is the run's settings as plain JSON values; `plan_hash` names the rows that were
    read; `versions` are those of `library_versions`.
    """

    criteria: Mapping[str, float]
    status: str
    converged: bool
    n_iter: int
    config: Mapping[str, Any]
    plan_hash: str
    versions: Mapping[str, str | None]


def library_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the versions of Python and of installed `packages`; None for one not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def to_json(value: object) -> bytes:
    """Return `value` as strict JSON: numbers that are not finite become null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


@dataclass(frozen=True)
class _Place:
    """A folder to write to or read from; `url` is fit for messages."""

    fs: AbstractFileSystem
    path: str
    url: str

    @classmethod
    def of(cls, url: str) -> _Place:
        fs, path = open_url(url)
        return cls(fs, path.rstrip("/") or path, redacted(url))

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def at(self, *parts: str) -> str:
        return join(self.path, *parts)

    def names(self) -> set[str]:
        """Return the names in the folder: none where there is no folder, "" for a file."""
        try:
            self.fs.invalidate_cache()
            entries = {entry["name"]: entry["type"] for entry in self.fs.ls(self.path, detail=True)}
        except FileNotFoundError as error:
            if _answer(error).get("Error", {}).get("Code") == "NoSuchBucket":
                raise
            return set()
        if entries == {self.path: "file"}:
            return {""}
        # Some object stores list the folder itself: a marker, or what deleted files have left.
        names = {name.rstrip("/") for name in entries} - {self.path}
        return {name.rpartition("/")[2] for name in names}

    def read(self, *parts: str) -> bytes | None:
        """Return a file's bytes, or None where there is no such file."""
        try:
            data: bytes = self.fs.cat_file(self.at(*parts))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return data

    def write(self, data: bytes, *parts: str) -> None:
        path = self.at(*parts)
        if self.is_local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.fs.pipe_file(path, data)

    def create(self, data: bytes, *parts: str, scratch: str) -> None:
        """Create a file with all of its bytes in one step, or raise FileExistsError.

        fsspec's mode="create" looks and then writes on a local disk, which loses races; a
        hard link to a finished file appears in one step and never replaces another.
        """
        path = self.at(*parts)
        if self.is_local:
            with Path(scratch).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                Path(path).hardlink_to(scratch)
            finally:
                Path(scratch).unlink()
            return
        try:
            self.fs.pipe_file(path, data, mode="create")
        except OSError as error:
            # s3fs recognises AWS's wording of "precondition failed" and no other store's.
            if _answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode") == 412:
                raise FileExistsError(path) from error
            raise


def _answer(error: OSError) -> Mapping[str, Any]:
    """Return what the object store answered, as botocore tells it; empty for other stores."""
    answer: Mapping[str, Any] = getattr(error.__cause__, "response", {})
    return answer


# ---------------------------------------------------------------------------- writing


@contextmanager
def claim(url: str) -> Iterator[Attempt]:
    """Open an attempt at the output `url`, before any work is done.

    Leaving the block without `Attempt.commit` removes all that the attempt wrote, and the
    folders that it made. Meant for local disks, object stores and `memory://`: folders are
    made on local disks only.

    Raises:
        UserError: the place holds a result or other files already, cannot be written to, or
            cannot create a file only if there is none.
    """
    place = _Place.of(url)
    attempt = Attempt(place)
    with explained(place.url):
        _refuse_taken(place)
    try:
        try:
            with explained(place.url):
                attempt.begin()
        except OSError as error:
            # Read-only disks, file systems without hard links, stores without conditions.
            reason = " ".join(str(error).split())
            raise UserError(
                f"{place.url} cannot hold results ({reason}): pass another --output"
            ) from error
        yield attempt
    finally:
        if not attempt.committed:
            attempt.abandon()


def _refuse_taken(place: _Place) -> None:
    remedy = "pass another --output, or delete it first"
    names = place.names()
    if names == {""}:
        raise UserError(f"{place.url} is a file, and results need a folder: {remedy}")
    if MANIFEST in names:
        raise UserError(f"{place.url} already holds a committed result ({MANIFEST}): {remedy}")
    if others := sorted(names - {ATTEMPTS}):
        raise UserError(
            f"{place.url} is not empty ({len(others)} entries, first {others[0]!r}): {remedy}"
        )


class Attempt:
    """Write one run's results to a place of their own, and commit them in one step.

    `id` names the attempt: the UTC time it began and a random part. Made by `claim`.
    """

    def __init__(self, place: _Place) -> None:
        self.id = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
        self.committed = False
        self._place = place
        self._home = replace(place, path=place.at(ATTEMPTS, self.id))
        self._files: dict[str, FileEntry] = {}
        self._made: list[Path] = []
        self._undecided = False

    def begin(self) -> None:
        """Write the attempt's first file the way the manifest will be written.

        What would make the commit fail at the end (rights, credentials, a store that ignores
        the condition) so fails before the work.
        """
        if self._home.is_local:
            home = Path(self._home.path)
            self._made = [folder for folder in (home, *home.parents) if not folder.exists()]
            home.mkdir(parents=True)
        who = to_json({"attempt": self.id, "host": socket.gethostname(), "pid": os.getpid()})
        first, scratch = "attempt.json", self._home.at("scratch")
        self._home.create(who, first, scratch=scratch)
        try:
            self._home.create(who, first, scratch=scratch)
        except FileExistsError:
            return
        raise UserError(
            f"{self._place.url} overwrites files where create-if-absent was asked for, so two runs "
            "could destroy each other's results: pass an --output on S3 or a local disk"
        )

    def write(self, name: str, data: bytes) -> None:
        """Write one file of the result; `name` is its path below the output."""
        with explained(self._place.url):
            self._home.write(data, name)
        self._files[name] = FileEntry.of(data)

    def write_json(self, name: str, value: object) -> None:
        """Write one file of the result as strict JSON, see `to_json`."""
        self.write(name, to_json(value))

    def write_model(self, mixture: Mixture, provenance: Provenance) -> None:
        """Write the model folder; equal parameters give an equal model.safetensors."""
        tensors = _tensor_bytes(mixture.parameters)
        self.write(f"{MODEL}/{_TENSORS}", tensors)
        self.write_json(f"{MODEL}/{_CARD}", _card(mixture, provenance, FileEntry.of(tensors)))

    def commit(self) -> None:
        """Make the attempt's files the result, all at once, and copy them for people.

        Raises:
            UserError: another run has committed to this output before.
        """
        manifest = {
            "format_version": FORMAT_VERSION,
            "attempt": self.id,
            "files": {name: asdict(entry) for name, entry in self._files.items()},
        }
        with explained(self._place.url):
            self._sync_files()
            winner = self._settle(to_json(manifest))
            self._undecided = False
            if winner != self.id:
                raise UserError(
                    f"{self._place.url}: another run committed its result (attempt {winner}) while "
                    f"this one (attempt {self.id}) was at work: use that result, or pass another "
                    "--output"
                )
            self.committed = True
            self._sync_folders()
        try:
            _make_copies(_Result.at(self._place))
        except (OSError, UserError) as error:
            # The result is committed, and our readers need no copies.
            logger.warning("%s: no copies for people were made: %s", self._place.url, error)

    def _settle(self, manifest: bytes) -> str:
        """Create the manifest if there is none, and return the attempt that it names."""
        scratch = self._home.at("scratch")
        self._undecided = True
        for pause in (*(() if self._place.is_local else _PAUSES), None):
            try:
                self._place.create(manifest, MANIFEST, scratch=scratch)
            except FileExistsError:
                break  # Our own, if the answer to an earlier try was lost.
            except Exception as error:
                if pause is None:
                    # A disk has answered; a request to a store may still be under way.
                    self._undecided = not self._place.is_local
                    raise
                logger.warning("%s: the commit failed, trying again: %s", self._place.url, error)
                time.sleep(pause)
            else:
                break
        return _Result.at(self._place).attempt

    def _sync_files(self) -> None:
        """Push the attempt's files to the disk: a manifest must not outlive what it names."""
        if self._home.is_local:
            home = Path(self._home.path)
            for path in (*home.rglob("*"), home, home.parent):
                _fsync(path)

    def _sync_folders(self) -> None:
        """Push the manifest's name, and those of the folders that were made, to the disk."""
        if self._place.is_local:
            for path in {Path(self._place.path), *(folder.parent for folder in self._made)}:
                _fsync(path)

    def abandon(self) -> None:
        """Remove the attempt's files, and the folders that it made and nobody else uses."""
        if self._undecided:
            # To remove files that a manifest may name would destroy a committed result.
            logger.warning(
                "%s: unknown whether attempt %s was committed; its files stay in %s",
                *(self._place.url, self.id, self._home.path),
            )
            return
        try:
            self._home.fs.invalidate_cache()
            with suppress(FileNotFoundError):
                self._home.fs.rm(self._home.path, recursive=True)
        except Exception as error:
            # Never in place of the error that ended the run.
            logger.warning("%s: %s was not removed: %s", self._place.url, self._home.path, error)
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def repair(url: str) -> tuple[str, ...]:
    """Make the copies of a committed result again where they are missing or differ.

    Returns:
        The names of the files that were made again.

    Raises:
        UserError: nothing is committed at `url`, or a committed file is missing or damaged.
    """
    place = _Place.of(url)
    with explained(place.url):
        return _make_copies(_Result.at(place))


def _make_copies(result: _Result) -> tuple[str, ...]:
    stale = [
        name for name, entry in result.files.items() if not entry.fits(result.place.read(name))
    ]
    for name in stale:
        result.place.write(result.read(name), name)
    return tuple(stale)


# ---------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Result:
    """What a manifest says: the attempt that committed, and its files."""

    place: _Place
    attempt: str
    files: Mapping[str, FileEntry]

    @classmethod
    def at(cls, place: _Place) -> _Result:
        result = cls.find(place)
        if result is None:
            raise UserError(_nothing_at(place))
        return result

    @classmethod
    def find(cls, place: _Place) -> _Result | None:
        data = place.read(MANIFEST)
        if data is None:
            return None
        content = _parse(data, MANIFEST, place.url)
        with _whole(MANIFEST, place.url):
            files = {name: FileEntry(**entry) for name, entry in content["files"].items()}
            return cls(place, content["attempt"], files)

    def read(self, name: str) -> bytes:
        """Return a file's verified bytes, the attempt's own or else those of its copy."""
        if name not in self.files:
            raise UserError(
                f"{self.place.url}: {MANIFEST} lists no {name!r} but {', '.join(self.files)}: pass "
                "the output of a run that wrote one"
            )
        # People tidy away folders whose names begin with an underscore: equal bytes will do.
        for parts in ((ATTEMPTS, self.attempt, name), (name,)):
            data = self.place.read(*parts)
            if data is not None and self.files[name].fits(data):
                return data
        raise UserError(
            f"{self.place.url}: {name} is missing or damaged (no copy fits {MANIFEST}'s sha256): "
            f"restore {ATTEMPTS}/{self.attempt}/{name}, or run again with another --output"
        )


def load(url: str) -> Mixture:
    """Return the model in `url`: a run's output, its `model` folder, or a copy of that folder.

    Raises:
        UserError: there is no committed model, it is damaged, or a newer gmm_dist wrote it.
    """
    place = _Place.of(url)
    with explained(place.url):
        read = _model_reader(place)
        card = _parse(read(_CARD), _CARD, place.url)
        tensors = read(_TENSORS)
    with _whole(_CARD, place.url):
        expected = FileEntry(**card["files"][_TENSORS])
        if not expected.fits(tensors):
            raise UserError(
                f"{place.url}: {_TENSORS} is damaged: {len(tensors)} bytes where {_CARD} says "
                f"{expected.size}, or another sha256: copy the model folder again"
            )
        return _mixture(card, tensors, place.url)


def read_report(url: str, name: str = REPORT) -> dict[str, Any]:
    """Return the JSON file `name` of the result committed at `url`.

    Raises:
        UserError: nothing is committed at `url`, it has no such file, or the file is damaged.
    """
    place = _Place.of(url)
    with explained(place.url):
        return dict(json.loads(_Result.at(place).read(name)))


def _model_reader(place: _Place) -> Callable[[str], bytes]:
    """Return what reads a model's files by name, through the manifest if there is one."""
    if ATTEMPTS in place.path.split("/"):
        raise UserError(
            f"{place.url} lies inside {ATTEMPTS}, where nothing is committed: pass the --output of "
            "the run"
        )
    if (result := _Result.find(place)) is not None:
        return lambda name: result.read(f"{MODEL}/{name}")
    parent, _, folder = place.path.rpartition("/")
    above = _Result.find(replace(place, path=parent)) if parent else None
    if above is not None and f"{folder}/{_CARD}" in above.files:
        return lambda name: above.read(f"{folder}/{name}")
    return lambda name: _read_alone(place, name)


def _read_alone(place: _Place, name: str) -> bytes:
    data = place.read(name)
    if data is not None:
        return data
    if name == _CARD:
        raise UserError(_nothing_at(place))
    raise UserError(f"{place.url}: {name} is missing beside {_CARD}: copy the model folder again")


def _nothing_at(place: _Place) -> str:
    if ATTEMPTS in place.names():
        return (
            f"{place.url} holds unfinished attempts and no {MANIFEST}: the run is at work, or died "
            "before its commit; wait for it, or run it again"
        )
    return (
        f"{place.url} holds no result, neither {MANIFEST} nor {_CARD}: pass the --output of a run "
        "that has finished, or its model folder"
    )


def _parse(data: bytes, name: str, url: str) -> dict[str, Any]:
    """Return a JSON file's object, or refuse what this version cannot read."""
    try:
        content = dict(json.loads(data))
        version = int(content["format_version"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{url}: {name} is damaged or not ours ({type(error).__name__}: {error}): restore it, "
            "or run again with another --output"
        ) from error
    if version > FORMAT_VERSION:
        raise UserError(
            f"{url}: {name} has format version {version}, this gmm_dist reads {FORMAT_VERSION} at "
            "most: upgrade gmm_dist"
        )
    return content


@contextmanager
def _whole(name: str, url: str) -> Iterator[None]:
    """Turn an entry that is missing from a file of ours into a UserError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{url}: {name} lacks an entry ({type(error).__name__}: {error}): restore it, or run "
            "again with another --output"
        ) from error


# ---------------------------------------------------------------------------- the model's files


def _tensor_bytes(parameters: Parameters) -> bytes:
    tensors = {
        "weights": parameters.weights,
        "means": parameters.means,
        "covariances": parameters.covariances,
    }
    # Contiguous copies: safetensors refuses views that share memory. No metadata: see the top.
    return safetensors.torch.save(
        {
            name: tensor.detach()
            .to("cpu", torch.float64)
            .clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
    )


def _card(mixture: Mixture, provenance: Provenance, tensors: FileEntry) -> dict[str, Any]:
    parameters = mixture.parameters
    return {
        "format_version": FORMAT_VERSION,
        "covariance_type": parameters.covariance_type,
        "n_components": parameters.n_components,
        "n_features": parameters.n_features,
        "feature_names": list(mixture.feature_names),
        "n_samples": mixture.n_samples,
        "log_likelihood": mixture.log_likelihood,
        **asdict(provenance),
        "files": {_TENSORS: asdict(tensors)},
    }


def _mixture(card: Mapping[str, Any], tensors: bytes, url: str) -> Mixture:
    covariance_type, k, d = card["covariance_type"], card["n_components"], card["n_features"]
    parts = safetensors.torch.load(tensors)
    shapes = {"full": (k, d, d), "tied": (d, d), "diag": (k, d), "spherical": (k,)}
    expected = {"weights": (k,), "means": (k, d), "covariances": shapes.get(covariance_type)}
    found = {name: tuple(part.shape) for name, part in parts.items()}
    if covariance_type not in COVARIANCE_TYPES or found != expected:
        raise UserError(
            f"{url}: {_TENSORS} holds {found}, and {_CARD} says {covariance_type!r}, "
            f"{k} components, {d} features: copy the model folder again"
        )
    return Mixture(
        parameters=Parameters(**parts, covariance_type=covariance_type),
        feature_names=tuple(card["feature_names"]),
        n_samples=_number(card["n_samples"]),
        log_likelihood=_number(card["log_likelihood"]),
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)

"""The data files of a lake, found by listing."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from gmm_dist import storage
from gmm_dist.errors import UserError
from gmm_dist.lake import data_files
from gmm_dist.lake.tables import formats
from gmm_dist.lake.tables.bounds import Bounds
from gmm_dist.lake.tables.columns import TableColumns
from gmm_dist.lake.tables.entry import Entry, Mask
from gmm_dist.lake.tables.snapshot import Snapshot
from gmm_dist.urls import Url

logger = logging.getLogger(__name__)

_INFOS_AT_ONCE = 32
_SHOWN = 3  # names in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class LakeFile:
    """Name one Parquet file and the version that was planned.

    `path` is relative to the plan's url, `version` the ETag or mtime ("": not known yet), `rows`
    the rows of each row group, `partition` the hive keys and values of the path, or a table's
    partition values (None: null). `identity` is what else tells a local file from one that replaces
    it, within a run (see `storage.identity`): a copy of the lake is the same lake. `entry` is what
    a table's log says of the file; `path` is the whole URL of a file that lies outside the table.
    """

    path: str
    size: int
    version: str
    rows: tuple[int, ...]
    partition: tuple[tuple[str, Any], ...]
    identity: tuple[str, ...] = field(default=(), compare=False)
    entry: Entry | None = None

    def live(self, row_group: int) -> Mask | None:
        """Say of each row of a row group (n,) whether it is live; None where all are."""
        if self.entry is None or self.entry.deleted is None:
            return None
        first = sum(self.rows[:row_group])
        return self.entry.deleted.live(first, first + self.rows[row_group])

    @property
    def live_rows(self) -> tuple[int, ...]:
        """The rows of each row group that no table has deleted."""
        if self.entry is None or self.entry.deleted is None:
            return self.rows
        edges = list(itertools.accumulate(self.rows, initial=0))
        live = self.entry.deleted.live(0, edges[-1])
        return tuple(int(live[a:b].sum()) for a, b in itertools.pairwise(edges))


@dataclass(frozen=True, slots=True)
class Listing:
    """Hold the data files under `root`, an absolute URL, by name; `keys` types their hive keys.

    Of a table, `columns` are those that its files hold, `snapshot` says which version it is, and
    `bounds` has the files' statistics.
    """

    root: Url
    files: tuple[LakeFile, ...]
    keys: pa.Schema
    columns: TableColumns | None = None
    snapshot: Snapshot | None = None
    bounds: Bounds | None = None


def key_table(files: Sequence[LakeFile], keys: pa.Schema) -> pa.Table:
    """Return the files' hive keys, a row for each file."""
    return pa.Table.from_pylist([dict(file.partition) for file in files], schema=keys)


def find(url: str) -> Listing:
    """List the data files at `url`: one file whatever its name, or those of a folder.

    In a folder every `*.parquet`, `*.parq` and `*.pq` counts, at any depth, and every other file
    whose first or last bytes are Parquet's, but for empty files, path parts that begin with `_`
    or `.`, and names of other things (`*.csv`, `*.bak`). Files that are passed over are logged.
    A hive key is int64 when each of its values is an integer, null when it has none, else string.

    Raises:
        UserError: the path, bucket or credentials are wrong; there is no Parquet file; the folder
            holds, is or lies in a Delta, Iceberg, Hudi or such table; it has a link to a folder
            or to nothing, or a data file whose name is not UTF-8.
    """
    check_name(url, url)
    root = storage.absolute(url)
    fs, path = storage.open_url(root)
    infos = _infos_by_path(fs, path, root)
    if path in infos:
        if isinstance(fs, LocalFileSystem) and not Path(path).is_file():
            raise UserError(
                f"{root}: neither a file nor a folder (a pipe or a device); check the path"
            )
        parent, name = storage.parent_and_name(root)
        formats.refuse_within(root, [name])
        formats.refuse_around(fs, path.rpartition("/")[0], root)
        _refuse_links_into_tables(fs, root, {path: infos[path]})
        return _partitioned(parent, [_listed(fs, parent, name, infos[path])])
    relative = {name.removeprefix(path).lstrip("/"): info for name, info in infos.items()}
    formats.refuse_within(root, relative)
    with storage.explained(root):
        formats.refuse_uncommitted(fs, root, relative)
    formats.refuse_around(fs, path, root)
    with storage.explained(root):
        files = [_listed(fs, root, *item) for item in _data_files(fs, root, relative)]
    return _partitioned(root, files)


def _infos_by_path(fs: AbstractFileSystem, path: str, root: str) -> Mapping[str, Mapping[str, Any]]:
    """Return all files under `path`, or `path` itself when it is a file, with their details."""
    # fsspec would pass over a local folder that it may not read.
    options = {"on_error": "raise"} if isinstance(fs, LocalFileSystem) else {}

    def find() -> Mapping[str, Mapping[str, Any]]:
        infos: Mapping[str, Mapping[str, Any]] = fs.find(path, detail=True, **options)
        if not infos or not infos.get(path, True):
            info = fs.info(path)  # raises when there is nothing
            infos = {path: info} if info["type"] == "file" else {}
        return infos

    with storage.explained(root):
        return storage.patiently(find, root)


def _data_files(
    fs: AbstractFileSystem, root: str, infos: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the Parquet files among all files of a folder, by name; log what is left out."""
    visible = {name: info for name, info in infos.items() if not data_files.is_hidden(name)}
    if storage.is_http(fs):
        visible = _with_details(
            fs, {name: info for name, info in visible.items() if "?" not in name}
        )
    if isinstance(fs, LocalFileSystem):
        _refuse_links(root, visible)
        visible = {name: info for name, info in visible.items() if Path(info["name"]).is_file()}
        _refuse_links_into_tables(fs, root, visible)
    empty = sorted(name for name, info in visible.items() if not info["size"])
    full = {name: visible[name] for name in sorted(visible.keys() - set(empty))}
    data, foreign = data_files.of(fs, root, full)
    empty = [name for name in empty if data_files.is_named_parquet(name)]
    if not data:
        some = _some([*foreign, *empty] or sorted(infos)) or "nothing"
        raise UserError(
            f"{storage.redacted(root)}: no Parquet file that is not empty among {len(infos)} files "
            f"(found {some}); check the path"
        )
    hidden = sorted(name for name in infos.keys() - visible.keys() if _looks_like_rows(name))
    kinds = (
        *((foreign, "that are not Parquet"), (empty, "that are empty")),
        (hidden, "that a name with _ or . in front hides"),
    )
    for names, kind in ((names, kind) for names, kind in kinds if names):
        logger.warning(
            "%s: passed over %d of %d files, %s: %s",
            *(storage.redacted(root), len(names), len(visible) + len(hidden), kind, _some(names)),
        )
    for name in data:
        check_name(name, storage.join(root, name))
    return [(name, full[name]) for name in data]


def _looks_like_rows(name: str) -> bool:
    """Say whether a hidden file may have been meant as data, as `_metadata` never is."""
    is_hidden = data_files.is_named_parquet(name) and data_files.is_hidden(name)
    return is_hidden and not name.rpartition("/")[2].startswith("._")  # macOS's beside each file


def _with_details(
    fs: AbstractFileSystem, index_infos: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """Return the details of files of an index page, which has neither sizes nor versions."""

    def details(info: Mapping[str, Any]) -> Mapping[str, Any]:
        name = info["name"]
        with storage.explained(name):
            answer: Mapping[str, Any] = storage.patiently(lambda: fs.info(name), name)
        return sized(name, answer)

    wanted = {name: info for name, info in index_infos.items() if not data_files.is_foreign(name)}
    with ThreadPoolExecutor(_INFOS_AT_ONCE) as pool:
        infos = dict(zip(wanted, pool.map(details, wanted.values()), strict=True))
    return {name: infos.get(name, {**info, "size": 1}) for name, info in index_infos.items()}


def sized(url: str, info: Mapping[str, Any]) -> Mapping[str, Any]:
    if info["size"] is None:
        raise UserError(
            f"{storage.redacted(url)}: the server does not tell the size of the file; copy it to a "
            "disk or an object store"
        )
    return info


def _some(names: Sequence[str]) -> str:
    """Return the first few names, in characters that any terminal can show."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(_shown, names[:_SHOWN])) + more


def _shown(name: str) -> str:
    spelt = name.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in spelt)


def check_name(name: str, where: str) -> None:
    """Raise UserError for a name that is not UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{_shown(storage.redacted(where))}: its name is not UTF-8; rename it"
        ) from None


def _listed(fs: AbstractFileSystem, root: Url, name: str, info: Mapping[str, Any]) -> LakeFile:
    size = sized(storage.join(root, name), info)["size"]
    # A web server's index spells names as URLs do.
    partition = _partition(unquote(name) if storage.is_http(fs) else name)
    version, identity = storage.version(fs, info), storage.identity(fs, info)
    return LakeFile(
        path=name, size=size, version=version, rows=(), partition=partition, identity=identity
    )


def _refuse_links(root: str, infos: Mapping[str, Mapping[str, Any]]) -> None:
    # fsspec lists a link to a folder as if it were a file, and so its rows would be passed over.
    for name, info in infos.items():
        path = Path(info["name"])
        if not info.get("islink") or path.is_file():
            continue
        if path.is_dir():
            raise UserError(
                f"{storage.join(root, name)}: a link to a folder, which is not followed; give the "
                "folder itself, or move it into the lake"
            )
        if not path.exists() and not data_files.is_foreign(name):
            raise UserError(
                f"{_shown(storage.join(root, name))}: a link to {_shown(str(path.readlink()))}, "
                "which is not there; mend the link or remove it"
            )


def _refuse_links_into_tables(
    fs: AbstractFileSystem, root: str, infos: Mapping[str, Mapping[str, Any]]
) -> None:
    linked = (info["name"] for info in infos.values() if info.get("islink"))
    for folder in sorted({Path(name).resolve().parent for name in linked}):
        formats.refuse_around(fs, folder.as_posix(), root)


def _partition(name: str) -> tuple[tuple[str, str | int | None], ...]:
    pairs = [part.partition("=") for part in name.split("/")[:-1] if "=" in part]
    values = {unquote(key): unquote(value) for key, _, value in pairs}
    null = "__HIVE_DEFAULT_PARTITION__"
    return tuple((key, None if value == null else value) for key, value in values.items())


def _partitioned(root: Url, files: list[LakeFile]) -> Listing:
    """Type the hive keys over all files."""
    values: dict[str, set[str]] = {}
    for file in files:
        for key, value in file.partition:
            values.setdefault(key, set()).update(() if value is None else (str(value),))
    types = {key: _key_type(texts) for key, texts in values.items()}
    typed = [
        replace(file, partition=tuple((k, _typed(v, types[k])) for k, v in file.partition))
        for file in files
    ]
    return Listing(root, tuple(typed), pa.schema(types.items()))


def _key_type(values: set[str]) -> pa.DataType:
    if not values:
        return pa.null()
    return pa.int64() if all(map(_is_int64, values)) else pa.string()


def _typed(value: str | int | None, type_: pa.DataType) -> str | int | None:
    return int(value) if value is not None and pa.types.is_int64(type_) else value


def _is_int64(text: str) -> bool:
    return bool(re.fullmatch(r"-?[0-9]{1,19}", text)) and -(2**63) <= int(text) < 2**63


def name_of(url: str, file: LakeFile) -> str:
    """Return the file's whole name, fit for messages."""
    return storage.redacted(address_of(url, file))


def address_of(url: str, file: LakeFile) -> str:
    """Return the URL of a file, `url` being the lake's: it may lie outside a table."""
    is_outside = file.entry is not None and file.entry.is_outside
    return file.path if is_outside else storage.join(url, file.path)

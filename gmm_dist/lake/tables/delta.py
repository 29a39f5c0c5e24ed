"""A Delta table as a lake: one version's files, partition values and deleted rows, by its log.

deltalake reads the log and its deletion vectors. Rows are read by the same code as those of
Parquet folders: its own readers tell nothing of the order of rows, by which they are dealt, and
`to_pyarrow_table` returns nulls for mapped columns.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa

from gmm_dist import storage
from gmm_dist.errors import NoRows, UserError
from gmm_dist.lake.listing import LakeFile, Listing
from gmm_dist.lake.tables.access import (
    require_deltalake,
    told_in_a_line,
    unknown_feature,
    uri_and_options,
)
from gmm_dist.lake.tables.bounds import Bounds
from gmm_dist.lake.tables.columns import TableColumns, has_names
from gmm_dist.lake.tables.entry import Deleted, Entry, hash_of_deleted
from gmm_dist.lake.tables.history import version_at
from gmm_dist.lake.tables.snapshot import At, Pinned, Snapshot
from gmm_dist.urls import Url

if TYPE_CHECKING:
    from deltalake import DeltaTable

logger = logging.getLogger(__name__)

FORMAT = "Delta"
# What a table may ask of its readers, and how it is met: deletion vectors are masks, columns are
# found by their mapping, types are unified over files; of the others nothing reaches the rows.
_KNOWN_FEATURES = {
    *("columnMapping", "deletionVectors", "timestampNtz", "typeWidening", "typeWidening-preview"),
    *("v2Checkpoint", "vacuumProtocolCheck"),
}
_NEWEST_READER = 3
_MAPPING = "delta.columnMapping"
_MAPPED_BY = {"none": None, "name": f"{_MAPPING}.physicalName", "id": f"{_MAPPING}.id"}


def find(root: Url, at: At | None = None) -> Listing:
    """List the files of a version of the Delta table at `root`, the newest by default.

    Partition columns become the listing's keys, in the types of the table.

    Raises:
        UserError: deltalake is not installed; the table, or that version of it, cannot be read or
            asks for what is not known here.
        NoRows: it has no files.
        StorageFailed: the storage has failed for minutes.
    """
    table = _opened(root, at)
    _refuse_unknown(root, table)
    with told_in_a_line(root):
        actions = pa.table(table.get_add_actions(flatten=False))
        schema = pa.schema(table.schema().to_arrow())
        # deltalake refuses to look for vectors in tables of some features, whose log it does read.
        features = table.protocol().reader_features or ()
        masks = _masks(table) if "deletionVectors" in features else iter(())
    partitions = table.metadata().partition_columns
    keys = pa.schema([(name, schema.field(name).type) for name in partitions])
    deleted = _by_path(root, table, actions, masks)
    files = list(_files(root, actions, deleted, keys))
    order = sorted(range(len(files)), key=lambda i: files[i].path)
    files, actions = [files[i] for i in order], actions.take(pa.array(order, pa.int64()))
    snapshot = Snapshot(
        format=FORMAT,
        table=str(table.metadata().id),
        version=table.version(),
        masks=hash_of_deleted((file.path, file.entry) for file in files),
    )
    logger.info("%s: %s", storage.redacted(root), snapshot.shown)
    if not files:
        raise NoRows(f"{storage.redacted(root)}: no rows in {snapshot.shown}; check the version")
    fields = json.loads(table.schema().to_json())["fields"]
    columns = _columns(root, table, schema, fields, keys.names)
    return Listing(
        root=root,
        files=tuple(files),
        keys=keys,
        columns=columns,
        snapshot=snapshot,
        bounds=_bounds(actions, columns.schema, fields),
    )


def _opened(root: Url, at: At | None) -> DeltaTable:
    require_deltalake(root)
    from deltalake import DeltaTable

    uri, options = uri_and_options(root)

    def version(number: int | None) -> DeltaTable:
        with told_in_a_line(root):
            return DeltaTable(uri, version=number, storage_options=options)

    newest = version(None)
    if at is None:
        return newest
    if isinstance(at, Pinned):
        at = at.version
    if not isinstance(at, int):
        fs, path = storage.open_url(root)
        settings = newest.metadata().configuration
        log = storage.join(path, "_delta_log")
        with storage.explained(root):
            at = version_at(fs, log, at, root=storage.redacted(root), settings=settings)
    if at > newest.version():
        raise UserError(
            f"is {at}, and the newest version is {newest.version()}",
            where=storage.redacted(root),
            option="at",
            remedy="give that or an older one",
        )
    return newest if at == newest.version() else version(at)


def _refuse_unknown(root: Url, table: DeltaTable) -> None:
    """Raise UserError for what a table asks of its readers that is not known here."""
    protocol = table.protocol()
    if protocol.min_reader_version > _NEWEST_READER:
        raise unknown_feature(root, f"reader version {protocol.min_reader_version}")
    for name in sorted(protocol.reader_features or ()):
        if name not in _KNOWN_FEATURES:
            raise unknown_feature(root, name)


def _masks(table: DeltaTable) -> Iterator[tuple[str, Deleted | None]]:
    """Return the URI of each file with a deletion vector, and what that deletes."""
    batches = pa.table(table.deletion_vectors())
    # The vectors of all files are in memory by now, a bit a row.
    return (
        (str(uri), Deleted.of(np.asarray(kept.values.to_numpy(zero_copy_only=False))))
        for uri, kept in zip(batches.column(0), batches.column(1), strict=True)
    )


def _by_path(
    root: Url,
    table: DeltaTable,
    actions: pa.Table,
    masks: Iterator[tuple[str, Deleted | None]],
) -> Mapping[str, Deleted | None]:
    """Return what is deleted of files, by their paths in the log."""
    paths: Sequence[str] = actions.column("path").to_pylist()
    base = _plain(table.table_uri).rstrip("/")
    uris = [_plain(p) if _is_absolute(p) else f"{base}/{unquote(p)}" for p in paths]
    if twice := [uri for uri, n in Counter(uris).items() if n > 1]:
        raise UserError(
            f"{storage.redacted(root)}: the table's log names {storage.redacted(twice[0])} twice "
            "in one version, so that its rows would count twice; mend the table"
        )
    of_uri = dict(zip(uris, paths, strict=True))
    deleted = {_plain(uri): mask for uri, mask in masks}
    if strangers := deleted.keys() - of_uri.keys():
        # Never read on: their deleted rows would count.
        raise UserError(
            f"{storage.redacted(root)}: rows of {storage.redacted(min(strangers))} are deleted, "
            "which is no file of this version; mend the table"
        )
    return {of_uri[uri]: mask for uri, mask in deleted.items()}


def _plain(uri: str) -> str:
    """Return a URI in one spelling: `file:/a%20b` is `file:///a b`, and so is `/a%20b`."""
    plain = unquote(uri)
    return re.sub(r"^(file:)?/+", "file:///", plain)


def _files(
    root: Url, actions: pa.Table, deleted: Mapping[str, Deleted | None], keys: pa.Schema
) -> Iterator[LakeFile]:
    names = ("path", "size_bytes", "num_records")
    columns = [actions.column(name).to_pylist() for name in names]
    partitions: Sequence[Mapping[str, Any]] = (
        actions.column("partition").to_pylist() if len(keys) else [{}] * len(actions)
    )
    for path, size, n_rows, partition in zip(*columns, partitions, strict=True):
        entry = Entry(is_outside=_is_absolute(path), n_rows=n_rows, deleted=deleted.get(path))
        yield LakeFile(
            path=_location(root, path),
            size=size,
            version="",  # the log does not know it: the storage is asked as the footer is read
            rows=(),
            partition=tuple((name, partition[name]) for name in keys.names),
            entry=entry,
        )


def _is_absolute(path: str) -> bool:
    scheme, colon, _ = path.partition(":")
    is_url = bool(colon) and scheme.replace("+", "").isalnum() and scheme[:1].isalpha()
    return path.startswith("/") or is_url


def _location(root: Url, path: str) -> str:
    """Return a file's path within the table or, if it lies outside, its own URL or path.

    The log spells all of them as URIs do.
    """
    plain = unquote(path)
    if not _is_absolute(path):
        return plain
    if path.startswith("file:"):
        return "/" + plain.removeprefix("file:").lstrip("/")
    if path.startswith("/") and "://" in root:
        raise UserError(
            f"{root}: the table's log names {plain}, an absolute path of a disk; copy the table's "
            "files below its own folder"
        )
    return Url(plain)


def _bounds(
    actions: pa.Table, types: pa.Schema, fields: Sequence[Mapping[str, Any]]
) -> Bounds | None:
    """Return the statistics of files in the log; None where it has none."""
    names = {f["metadata"].get(_MAPPED_BY["name"], f["name"]): f["name"] for f in fields}
    extremes = []
    for which in ("min", "max"):
        if which not in actions.column_names:
            return None
        kept = actions.column(which).combine_chunks()
        if not pa.types.is_struct(kept.type):
            return None
        parts = zip(kept.type, kept.flatten(), strict=True)
        extremes.append(pa.table({names.get(f.name, f.name): part for f, part in parts}))
    return Bounds.of(types, *extremes)


def _columns(
    root: Url,
    table: DeltaTable,
    schema: pa.Schema,
    fields: Sequence[Mapping[str, Any]],
    partition_names: Sequence[str],
) -> TableColumns:
    mode = table.metadata().configuration.get(f"{_MAPPING}.mode", "none")
    if mode not in _MAPPED_BY:
        raise unknown_feature(root, f"column mapping by {mode}")
    key = _MAPPED_BY[mode]
    stored = {f["name"]: f["name"] if key is None else f["metadata"][key] for f in fields}
    names = [name for name in schema.names if name not in partition_names]
    if mode != "none":
        # What is nested in them has other names in the files, too.
        nested = [name for name in names if has_names(schema.field(name).type)]
        if nested:
            names = [name for name in names if name not in nested]
            logger.info(
                "%s: columns of structs are left out, as the table maps its columns: %s",
                *(storage.redacted(root), ", ".join(map(repr, nested))),
            )
    return TableColumns(
        schema=pa.schema([(name, schema.field(name).type) for name in names]),
        stored=tuple(stored[name] for name in names),
        by_id=mode == "id",
    )

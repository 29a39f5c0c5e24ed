"""An Iceberg table as a lake: one snapshot's files and deleted rows, by its metadata.

pyiceberg reads catalogs, metadata and manifests. Rows are read by the same code as those of Parquet
folders, columns by their field ids. https://iceberg.apache.org/spec/
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from gmm_dist import storage
from gmm_dist.errors import NoRows, UserError
from gmm_dist.lake.listing import LakeFile, Listing
from gmm_dist.lake.tables.access import in_a_line, unknown_feature, uri_and_options
from gmm_dist.lake.tables.columns import TableColumns, has_names
from gmm_dist.lake.tables.entry import Entry, hash_of_deleted
from gmm_dist.lake.tables.iceberg_bounds import bounds_of
from gmm_dist.lake.tables.iceberg_files import ManifestFiles, TableFile
from gmm_dist.lake.tables.snapshot import At, Pinned, Snapshot
from gmm_dist.urls import Url

if TYPE_CHECKING:
    from pyiceberg.partitioning import PartitionSpec
    from pyiceberg.schema import Schema
    from pyiceberg.table import Table
    from pyiceberg.table.snapshots import Snapshot as TableSnapshot

logger = logging.getLogger(__name__)

FORMAT = "Iceberg"
_SCHEME = "iceberg://"
_METADATA = re.compile(r"\.metadata\.json(\.gz)?$")
_OF_S3 = {
    "AWS_ACCESS_KEY_ID": "s3.access-key-id",
    "AWS_SECRET_ACCESS_KEY": "s3.secret-access-key",
    "AWS_SESSION_TOKEN": "s3.session-token",
    "AWS_REGION": "s3.region",
    "AWS_ENDPOINT_URL": "s3.endpoint",
    "AWS_SKIP_SIGNATURE": "s3.anonymous",
}
_Keys = Mapping[int, str]  # field ids of columns, with their names


def names_table(url: str) -> bool:
    """Say whether a URL names an Iceberg table: by its catalog, or as a metadata file."""
    return is_in_catalog(url) or _METADATA.search(url) is not None


def is_in_catalog(url: str) -> bool:
    """Say whether a URL names an Iceberg table by its catalog."""
    return url.startswith(_SCHEME)


def find(url: Url, at: At | None = None) -> Listing:
    """List the files of a snapshot of an Iceberg table, the current one by default.

    Columns by whose values all files are partitioned become the listing's keys.

    Args:
        url: `iceberg://CATALOG/NAMESPACE.TABLE`, a catalog of pyiceberg's configuration; or the
            path or URL of a metadata file.
        at: The snapshot's id, or a time.

    Raises:
        UserError: pyiceberg is not installed; the table, or that snapshot of it, cannot be read,
            has equality deletes, or asks for what is not known here.
        NoRows: it has no files.
        StorageFailed: the storage has failed.
    """
    if find_spec("pyiceberg") is None:
        raise UserError(
            "an Iceberg table, which takes the package pyiceberg to read",
            where=storage.redacted(url),
            remedy="pip install 'gmm_dist[iceberg]'",
        )
    with told_in_a_line(url):
        table = _opened(url)
        chosen = _snapshot(url, table, at)
        schema = _schema(table, chosen, at)
        arrow = schema.as_arrow()
        manifested = ManifestFiles.of(table.io, chosen)
        deleted = manifested.deleted(storage.redacted(url))
    _refuse_defaults(url, schema)
    data = sorted(manifested.data, key=lambda file: file.path)
    specs = table.specs()
    types = pa.schema([(field.name, field.type) for field in arrow])
    keys = _keys(schema, data, specs)
    root = storage.absolute(_plain(table.location()))
    files = tuple(
        _file(root, file, deleted.get(file.path), specs[file.spec], keys, schema) for file in data
    )
    snapshot = Snapshot(
        format=FORMAT,
        table=str(table.metadata.table_uuid),
        version=chosen.snapshot_id,
        masks=hash_of_deleted((file.path, file.entry) for file in files),
        schema=schema.schema_id,
    )
    logger.info("%s: %s", storage.redacted(url), snapshot.shown)
    if not files:
        raise NoRows(f"{storage.redacted(url)}: no rows in {snapshot.shown}; check the snapshot")
    columns = _columns(url, table, schema, types, keys)
    return Listing(
        root=root,
        files=files,
        keys=pa.schema([types.field(name) for name in keys.values()]),
        columns=columns,
        snapshot=snapshot,
        bounds=bounds_of(data, specs, schema, columns.schema),
    )


@contextmanager
def told_in_a_line(url: str) -> Iterator[None]:
    """Turn what pyiceberg raises into one line."""
    with in_a_line(
        url,
        during="as the table's metadata was read",
        cannot="pyiceberg cannot read the table",
        remedy="check its name, and the catalog in pyiceberg's configuration "
        "(.pyiceberg.yaml, PYICEBERG_CATALOG__* variables)",
        is_outage=storage.is_transient,
    ):
        yield


def _opened(url: Url) -> Table:
    if is_in_catalog(url):
        from pyiceberg.catalog import load_catalog

        catalog, _, name = url.removeprefix(_SCHEME).partition("/")
        if not catalog or "." not in name:
            remedy = f"give {_SCHEME}CATALOG/NAMESPACE.TABLE"
            raise UserError("names no table of a catalog", where=url, remedy=remedy)
        return load_catalog(catalog).load_table(name)
    from pyiceberg.table import StaticTable

    location = storage.absolute(url)
    if not location.startswith(("s3://", "s3a://")):
        return StaticTable.from_metadata(location)
    uri, options = uri_and_options(location)
    return StaticTable.from_metadata(
        uri, {_OF_S3[name]: value for name, value in options.items() if name in _OF_S3}
    )


def _snapshot(url: str, table: Table, at: At | None) -> TableSnapshot:
    current = table.current_snapshot()
    if current is None:
        raise NoRows(f"{storage.redacted(url)}: the Iceberg table has no snapshot, and so no rows")
    if at is None:
        return current
    if isinstance(at, datetime):
        return _snapshot_at(url, table, at)
    number = at if isinstance(at, int) else at.version
    found = table.snapshot_by_id(number)
    if found is None:
        raise UserError(
            f"is {number}, and the table has no such snapshot; the current one is "
            f"{current.snapshot_id}",
            where=storage.redacted(url),
            option="at",
            remedy="give the id of one that it has, or a time",
        )
    return found


def _snapshot_at(url: str, table: Table, moment: datetime) -> TableSnapshot:
    if moment > datetime.now(UTC):
        remedy = "give a time that has come"
        raise UserError(f"is {moment.isoformat()}", option="at", remedy=remedy)
    found = table.snapshot_as_of_timestamp(int(moment.timestamp() * 1000))
    if found is None:
        first = datetime.fromtimestamp(min(s.timestamp_ms for s in table.snapshots()) / 1000, UTC)
        raise UserError(
            f"is {moment.isoformat()}, and no snapshot that the table has is as old (first: "
            f"{first.isoformat(timespec='seconds')})",
            where=storage.redacted(url),
            option="at",
            remedy="give a later time or the id of a snapshot",
        )
    return found


def _schema(table: Table, chosen: TableSnapshot, at: At | None) -> Schema:
    """Return the columns: a table's own of today or, of a snapshot that is named, its own."""
    number = at.schema if isinstance(at, Pinned) else None if at is None else chosen.schema_id
    return table.schema() if number is None else table.schemas()[number]


def _refuse_defaults(url: str, schema: Schema) -> None:
    for field in schema.fields:
        if field.initial_default is not None:
            what = f"initial-default of column {field.name}"
            raise unknown_feature(url, what)


def _plain(path: str) -> str:
    """Return a path or URL in one spelling: `file:/a` is `/a`. Nothing is percent-encoded."""
    return re.sub(r"^file:/+", "/", path)


def _keys(schema: Schema, data: Sequence[TableFile], specs: Mapping[int, PartitionSpec]) -> _Keys:
    """Return the columns whose values all files have as partition values."""
    used = {file.spec for file in data}
    everywhere = [set(_identities(specs[number])) for number in used]
    ids = set.intersection(*everywhere) if everywhere else set()
    return {field.field_id: field.name for field in schema.fields if field.field_id in ids}


def _identities(spec: PartitionSpec) -> Mapping[int, int]:
    """Return where the partition values are that are columns' own, by the columns' field ids."""
    places = enumerate(spec.fields)
    return {part.source_id: i for i, part in places if str(part.transform) == "identity"}


def _file(
    root: Url,
    file: TableFile,
    deleted: Any,
    spec: PartitionSpec,
    keys: _Keys,
    schema: Schema,
) -> LakeFile:
    places = _identities(spec)
    names = {field.field_id: field.name for field in schema.fields}
    prefix, plain = f"{root.rstrip('/')}/", _plain(file.path)
    inside = plain.removeprefix(prefix)
    is_outside = inside == plain or inside.startswith("/")
    return LakeFile(
        path=Url(plain) if is_outside else inside,
        size=file.size,
        version="",  # the metadata does not know it: the storage is asked as the footer is read
        rows=(),
        partition=tuple((name, file.partition[places[i]]) for i, name in keys.items()),
        entry=Entry(
            is_outside=is_outside,
            n_rows=file.n_rows,
            deleted=deleted,
            told=tuple(names[i] for i in places if i in names and i not in keys),
        ),
    )


def _columns(url: str, table: Table, schema: Schema, types: pa.Schema, keys: _Keys) -> TableColumns:
    fields = [field for field in schema.fields if field.field_id not in keys]
    # What is nested in them goes by field ids in the files, too.
    nested = [field.name for field in fields if has_names(types.field(field.name).type)]
    if nested:
        logger.info(
            "%s: columns of structs are left out: %s",
            *(storage.redacted(url), ", ".join(map(repr, nested))),
        )
    fields = [field for field in fields if field.name not in nested]
    mapping = table.metadata.name_mapping()
    others = {} if mapping is None else {m.field_id: tuple(m.names) for m in mapping.root}
    return TableColumns(
        schema=pa.schema([types.field(field.name) for field in fields]),
        stored=tuple(field.field_id for field in fields),
        by_id=True,
        without_ids=None
        if mapping is None
        else tuple(others.get(field.field_id, ()) for field in fields),
    )

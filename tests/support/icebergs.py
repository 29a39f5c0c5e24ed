"""Write Iceberg tables as pyiceberg does, and what it does not write, from the specification.

https://iceberg.apache.org/spec/ and https://iceberg.apache.org/puffin-spec/
"""

from __future__ import annotations

import json
import struct
import uuid
import zlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import deltas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg import manifest
from pyiceberg.avro.file import AvroOutputFile
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.io.pyarrow import PyArrowFileIO
from pyiceberg.manifest import (
    DataFile,
    DataFileContent,
    FileFormat,
    ManifestContent,
    ManifestEntry,
    ManifestEntryStatus,
    ManifestFile,
    ManifestWriterV2,
)
from pyiceberg.table import Table

NAME = "db.t"
_IDS = {"file_path": 2147483546, "pos": 2147483545}


def catalog(folder: Path) -> SqlCatalog:
    """Make, or open, a catalog of tables in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    made = SqlCatalog(
        "lake", uri=f"sqlite:///{folder}/catalog.db", warehouse=f"file://{folder}/warehouse"
    )
    made.create_namespace_if_not_exists("db")
    return made


def write(folder: Path, columns: Mapping[str, Any] | pa.Table, **properties: str) -> Table:
    """Write a table of one snapshot."""
    rows = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
    settings = {"format-version": "2", **properties}
    table = catalog(folder).create_table(NAME, schema=rows.schema, properties=settings)
    table.append(rows)
    return table


def place(table: Table) -> str:
    """Return the path of a table's metadata file."""
    return table.metadata_location.removeprefix("file://")


def rows_by_pyiceberg(
    table: Table, names: Sequence[str], snapshot: int | None = None
) -> Counter[tuple[Any, ...]]:
    """Return a table's rows as pyiceberg reads them; NaN for null."""
    return deltas.counted(table.scan(snapshot_id=snapshot).to_arrow().select(names).columns)


def data_files(table: Table) -> list[str]:
    """Return the paths of a table's live data files, in its metadata's spelling."""
    return sorted(task.file.file_path for task in table.scan().plan_files())


def delete_rows(
    table: Table, rows: Mapping[str, Collection[int]], kind: str = "positions", **more: Any
) -> Table:
    """Delete rows of data files; return the table with a snapshot more.

    Args:
        table: The table; its catalog has the new one, too.
        rows: The numbers of deleted rows, by the paths of data files.
        kind: "positions": a position delete file of version 2 for each partition; "vectors":
            deletion vectors of version 3, all in one Puffin file; "equality": rows of a value in
            the column that `more` has (`column`, `values`).
    """
    files = {task.file.file_path: task.file for task in table.scan().plan_files()}
    home = Path(table.location().removeprefix("file://"))
    (home / "data").mkdir(parents=True, exist_ok=True)
    version = 3 if kind == "vectors" else 2
    if kind == "vectors":
        deletes = _vectors(home, rows, files)
    elif kind == "positions":
        deletes = [
            _positions(home, {path: rows[path] for path in paths}, files[paths[0]])
            for paths in _by_partition(rows, files)
        ]
    else:
        (path,) = rows
        deletes = [_equality(home, table, files[path], **more)]
    return _committed(table, deletes, version)


def _by_partition(
    rows: Mapping[str, Collection[int]], files: Mapping[str, DataFile]
) -> list[list[str]]:
    groups: dict[tuple[int, str], list[str]] = {}
    for path in rows:
        groups.setdefault((files[path].spec_id, str(files[path].partition)), []).append(path)
    return list(groups.values())


def _of(version: int, like: DataFile, path: Path, **facts: Any) -> DataFile:
    file = DataFile.from_args(
        _table_format_version=version,
        file_path=f"file://{path}",
        partition=like.partition,
        file_size_in_bytes=path.stat().st_size,
        **{name: {} for name in ("column_sizes", "value_counts", "null_value_counts")},
        **{name: {} for name in ("nan_value_counts", "lower_bounds", "upper_bounds")},
        **facts,
    )
    file.spec_id = like.spec_id
    return file


def _positions(home: Path, rows: Mapping[str, Collection[int]], like: DataFile) -> DataFile:
    pairs = sorted((path, row) for path, each in rows.items() for row in each)
    path = home / "data" / f"{uuid.uuid4()}-deletes.parquet"
    schema = pa.schema(
        [
            pa.field(name, type_, metadata={"PARQUET:field_id": str(_IDS[name])})
            for name, type_ in (("file_path", pa.string()), ("pos", pa.int64()))
        ]
    )
    columns = [[pair[0] for pair in pairs], [pair[1] for pair in pairs]]
    pq.write_table(pa.table(dict(zip(schema.names, columns, strict=True)), schema=schema), path)
    return _of(
        2,
        like,
        path,
        content=DataFileContent.POSITION_DELETES,
        file_format=FileFormat.PARQUET,
        record_count=len(pairs),
    )


def _equality(
    home: Path, table: Table, like: DataFile, *, column: str, values: Sequence[Any]
) -> DataFile:
    field = table.schema().find_field(column)
    path = home / "data" / f"{uuid.uuid4()}-equality.parquet"
    type_ = table.schema().as_arrow().field(column).type
    metadata = {"PARQUET:field_id": str(field.field_id)}
    schema = pa.schema([pa.field(column, type_, metadata=metadata)])
    pq.write_table(pa.table({column: pa.array(values, type_)}, schema=schema), path)
    return _of(
        2,
        like,
        path,
        content=DataFileContent.EQUALITY_DELETES,
        file_format=FileFormat.PARQUET,
        record_count=len(values),
        equality_ids=[field.field_id],
    )


def _vectors(
    home: Path, rows: Mapping[str, Collection[int]], files: Mapping[str, DataFile]
) -> list[DataFile]:
    path = home / "data" / f"{uuid.uuid4()}.puffin"
    body, blobs, places = b"PFA1", [], []
    for name, deleted in rows.items():
        vector = deltas.bitmap(sorted(deleted))
        size, checksum = struct.pack(">I", len(vector)), struct.pack(">I", zlib.crc32(vector))
        blob = size + vector + checksum
        facts = {"referenced-data-file": name, "cardinality": str(len(deleted))}
        blobs.append(
            {
                "type": "deletion-vector-v1",
                "fields": [],
                "snapshot-id": -1,
                "sequence-number": -1,
                "offset": len(body),
                "length": len(blob),
                "properties": facts,
            }
        )
        places.append((name, len(body), len(blob), len(deleted)))
        body += blob
    payload = json.dumps({"blobs": blobs, "properties": {}}).encode()
    footer = b"PFA1" + payload + struct.pack("<I", len(payload)) + b"\0" * 4 + b"PFA1"
    path.write_bytes(body + footer)
    return [
        _of(
            3,
            files[name],
            path,
            content=DataFileContent.POSITION_DELETES,
            file_format=FileFormat.PUFFIN,
            record_count=n_rows,
            referenced_data_file=name,
            content_offset=offset,
            content_size_in_bytes=length,
        )
        for name, offset, length, n_rows in places
    ]


class _Deletes(ManifestWriterV2):
    """Writes a manifest of delete files."""

    table_version = 2

    def content(self) -> ManifestContent:
        return ManifestContent.DELETES

    @property
    def version(self) -> Any:
        return self.table_version

    @property
    def _meta(self) -> dict[str, str]:
        return {**super()._meta, "content": "deletes"}

    def new_writer(self) -> AvroOutputFile[ManifestEntry]:
        schema = self._with_partition(self.version)
        return AvroOutputFile[ManifestEntry](
            output_file=self._output_file,
            file_schema=schema,
            record_schema=schema,
            schema_name="manifest_entry",
            metadata=self._meta,
        )


def _committed(table: Table, deletes: Sequence[DataFile], version: int) -> Table:
    """Add a snapshot with delete files to a table."""
    io, before = PyArrowFileIO(), table.current_snapshot()
    assert before is not None
    content = json.loads(Path(place(table)).read_text())
    number = int(np.random.default_rng(len(content["snapshots"])).integers(1 << 62))
    sequence = content["last-sequence-number"] + 1
    folder = f"{table.location()}/metadata"
    manifests = [*before.manifests(io), *_manifests(table, deletes, version, number, folder)]
    listed = io.new_output(f"{folder}/snap-{number}.avro")
    with manifest.write_manifest_list(
        2, listed, number, before.snapshot_id, sequence, "null"
    ) as writer:
        writer.add_manifests(manifests)
    when = content["last-updated-ms"] + 1
    content |= {
        "format-version": version,
        "last-sequence-number": sequence,
        "last-updated-ms": when,
        "current-snapshot-id": number,
        "refs": {"main": {"snapshot-id": number, "type": "branch"}},
        **({"next-row-id": 0} if version == 3 else {}),
    }
    content["snapshots"].append(
        {
            "snapshot-id": number,
            "parent-snapshot-id": before.snapshot_id,
            "sequence-number": sequence,
            "timestamp-ms": when,
            "manifest-list": listed.location,
            "summary": {"operation": "delete"},
            "schema-id": content["current-schema-id"],
        }
    )
    content["snapshot-log"].append({"snapshot-id": number, "timestamp-ms": when})
    path = f"{folder}/{sequence:05d}-{uuid.uuid4()}.metadata.json"
    Path(path.removeprefix("file://")).write_text(json.dumps(content))
    table.catalog.drop_table(NAME)
    return table.catalog.register_table(NAME, path)


def _manifests(
    table: Table, deletes: Sequence[DataFile], version: int, snapshot: int, folder: str
) -> list[ManifestFile]:
    made = []
    for spec in {file.spec_id for file in deletes}:
        output = PyArrowFileIO().new_output(f"{folder}/{uuid.uuid4()}-m0.avro")
        writer = _Deletes(table.specs()[spec], table.schema(), output, snapshot, "null")
        writer.table_version = version
        with writer:
            for file in deletes:
                if file.spec_id == spec:
                    entry = ManifestEntry.from_args(
                        _table_format_version=version,
                        status=ManifestEntryStatus.ADDED,
                        snapshot_id=snapshot,
                        sequence_number=None,
                        file_sequence_number=None,
                        data_file=file,
                    )
                    writer.add_entry(entry)
        made.append(writer.to_manifest_file())
    return made

"""The files that the manifests of an Iceberg snapshot name, and which of their rows are deleted.

Which delete file applies to which data file: https://iceberg.apache.org/spec/#scan-planning
"""

from __future__ import annotations

import struct
import zlib
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from gmm_dist import storage
from gmm_dist.errors import UserError
from gmm_dist.lake.parquet.decoding import parquet_file
from gmm_dist.lake.tables.entry import Deleted

if TYPE_CHECKING:
    from pyiceberg.io import FileIO
    from pyiceberg.manifest import ManifestEntry, ManifestFile
    from pyiceberg.table.snapshots import Snapshot

Rows = npt.NDArray[np.int64]
_DATA, _POSITIONS, _EQUALITY = range(3)
_AT_ONCE = 16
_MAGIC = b"\xd1\xd3\x39\x64"
_LEAST = 12  # bytes of a vector: its length, the magic number, a checksum
_PATH, _POS = "file_path", "pos"
_DELETE = "have the table's own engine compact it, as rewrite_data_files does"


@dataclass(frozen=True, slots=True, kw_only=True)
class TableFile:
    """Name a data or delete file as a manifest does.

    `partition` are its values, in the order of the partition spec with the number `spec`;
    `sequence` says when it was added; `lower` and `upper` bound columns, by field id. `referenced`,
    `offset` and `length` say of a deletion vector whose rows it deletes, and where it lies.
    """

    content: int
    path: str
    format: str
    size: int
    n_rows: int
    spec: int
    partition: tuple[Any, ...]
    sequence: int
    lower: Mapping[int, bytes]
    upper: Mapping[int, bytes]
    referenced: str | None
    offset: int | None
    length: int | None

    @property
    def group(self) -> Hashable:
        """What a data file and the deletes of its partition have in common."""
        return self.spec, self.partition


@dataclass(frozen=True, slots=True)
class ManifestFiles:
    """The live files of a snapshot: those with rows, and those that delete some."""

    io: FileIO
    data: tuple[TableFile, ...]
    deletes: tuple[TableFile, ...]

    @classmethod
    def of(cls, io: FileIO, snapshot: Snapshot) -> Self:
        """Read the manifests of a snapshot."""
        manifests = snapshot.manifests(io)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            listed = pool.map(lambda manifest: list(_files(io, manifest)), manifests)
            files = [file for each in listed for file in each]
        return cls(
            io,
            tuple(file for file in files if file.content == _DATA),
            tuple(file for file in files if file.content != _DATA),
        )

    def deleted(self, table: str) -> Mapping[str, Deleted | None]:
        """Return what is deleted of data files, by their paths. `table` is for messages.

        Raises:
            UserError: rows are deleted by their values, or in a way that is not known here.
        """
        self._refuse_unread(table)
        vectors: dict[str, list[TableFile]] = defaultdict(list)
        groups: dict[Hashable, list[TableFile]] = defaultdict(list)
        for file in self.deletes:
            if file.format == "PUFFIN":
                vectors[str(file.referenced)].append(file)
            elif file.content == _POSITIONS:
                groups[file.group].append(file)
        applied = {}
        for file in self.data:
            later = [v for v in vectors.get(file.path, ()) if v.sequence >= file.sequence]
            # A vector has all that position deletes had deleted before it.
            others = (d for d in groups.get(file.group, ()) if d.sequence >= file.sequence)
            applied[file.path] = later or list(others)
        needed = {
            (delete.path, delete.offset): delete for each in applied.values() for delete in each
        }
        wanted = {path for path, each in applied.items() if each}
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = pool.map(lambda delete: self._rows(delete, wanted), needed.values())
            rows = dict(zip(needed, found, strict=True))
        return {
            file.path: _mask(file, [rows[d.path, d.offset] for d in applied[file.path]])
            for file in self.data
            if applied[file.path]
        }

    def _refuse_unread(self, table: str) -> None:
        for file in self.deletes:
            if file.content == _EQUALITY and any(_deletes_of(file, data) for data in self.data):
                raise UserError(
                    f"rows are deleted by their values ({storage.redacted(file.path)}), as "
                    "equality deletes do, which are not read here",
                    where=table,
                    remedy=_DELETE,
                )
        for file in (*self.data, *(d for d in self.deletes if d.content == _POSITIONS)):
            known = ("PARQUET",) if file.content == _DATA else ("PARQUET", "PUFFIN")
            if file.format not in known:
                raise UserError(
                    f"{storage.redacted(file.path)} is {file.format}, and only Parquet is read",
                    where=table,
                    remedy="have the table written anew as Parquet",
                )

    def _rows(self, delete: TableFile, wanted: set[str]) -> Mapping[str, Rows]:
        """Return the rows that a delete file deletes, by the paths of those files that count."""
        if delete.format == "PUFFIN":
            return {str(delete.referenced): self._vector(delete)}
        with self.io.new_input(delete.path).open() as source:
            table = parquet_file(source, read_dictionary=[_PATH]).read([_PATH, _POS])
        path = table.column(_PATH)
        names = [name for name in path.unique().to_pylist() if name in wanted]
        rows = table.column(_POS)
        return {name: rows.filter(pc.equal(path, name)).to_numpy() for name in names}

    def _vector(self, delete: TableFile) -> Rows:
        from pyroaring import BitMap64

        with self.io.new_input(delete.path).open() as source:
            source.seek(delete.offset or 0)
            blob = source.read(delete.length or 0)
        vector, checksum = blob[4:-4], blob[-4:]
        is_sound = (
            len(blob) > _LEAST
            and struct.unpack(">I", blob[:4])[0] == len(vector)
            and vector.startswith(_MAGIC)
            and struct.unpack(">I", checksum)[0] == zlib.crc32(vector)
        )
        rows = BitMap64.deserialize(bytes(vector[4:])) if is_sound else BitMap64()
        if not is_sound or len(rows) != delete.n_rows:
            raise UserError(
                "the deletion vector is damaged, or not there",
                where=f"{storage.redacted(delete.path)}, byte {delete.offset}",
                remedy="restore the file, or name an older snapshot",
            )
        return np.fromiter(rows, np.int64, len(rows))


def _deletes_of(equality: TableFile, data: TableFile) -> bool:
    """Say whether an equality delete is about a data file: older, and of the same partition."""
    return data.sequence < equality.sequence and (
        not equality.partition or equality.group == data.group
    )


def _files(io: FileIO, manifest: ManifestFile) -> Iterator[TableFile]:
    from pyiceberg.avro.file import AvroFile
    from pyiceberg.manifest import (
        MANIFEST_ENTRY_SCHEMAS,
        DataFile,
        DataFileContent,
        FileFormat,
        ManifestEntry,
        ManifestEntryStatus,
    )

    # `fetch_manifest_entry` reads what version 2 has alone: it does not tell where vectors lie.
    with AvroFile[ManifestEntry](
        io.new_input(manifest.manifest_path),
        MANIFEST_ENTRY_SCHEMAS[3],
        read_types={-1: ManifestEntry, 2: DataFile},
        read_enums={0: ManifestEntryStatus, 101: FileFormat, 134: DataFileContent},
    ) as entries:
        for entry in entries:
            if entry.status != ManifestEntryStatus.DELETED:
                yield _file(entry, manifest)


def _file(entry: ManifestEntry, manifest: ManifestFile) -> TableFile:
    file = entry.data_file
    named = dict(zip(_names(), file._data, strict=True))
    sequence = entry.sequence_number
    if sequence is None:  # files that a manifest adds have its own
        sequence = manifest.sequence_number
    return TableFile(
        content=int(named["content"] or 0),
        path=named["file_path"],
        format=named["file_format"].value,
        size=named["file_size_in_bytes"],
        n_rows=named["record_count"],
        spec=manifest.partition_spec_id,
        partition=tuple(file.partition[i] for i in range(len(file.partition))),
        sequence=sequence or 0,
        lower=named["lower_bounds"] or {},
        upper=named["upper_bounds"] or {},
        referenced=named["referenced_data_file"],
        offset=named["content_offset"],
        length=named["content_size_in_bytes"],
    )


def _names() -> Sequence[str]:
    from pyiceberg.manifest import DATA_FILE_TYPE

    return [field.name for field in DATA_FILE_TYPE[3].fields]


def _mask(file: TableFile, parts: Sequence[Mapping[str, Rows]]) -> Deleted | None:
    kept = np.ones(file.n_rows, dtype=np.bool_)
    for part in parts:
        rows = part.get(file.path)
        if rows is None:
            continue
        if len(rows) and (rows.min() < 0 or rows.max() >= file.n_rows):
            raise UserError(
                f"row {rows.max():,} is deleted of {file.n_rows:,}",
                where=storage.redacted(file.path),
                remedy="mend the table, or name an older snapshot",
            )
        kept[rows] = False
    return Deleted.of(kept)

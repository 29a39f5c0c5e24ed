"""Write Delta tables as deltalake does, and what it does not write, from the protocol.

https://github.com/delta-io/delta/blob/master/PROTOCOL.md
"""

from __future__ import annotations

import json
import struct
import uuid
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lakes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, QueryBuilder, write_deltalake

from gmm_dist.lake.plan import Plan

Action = Mapping[str, Any]
_Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_MAGIC = 1681511377
_PORTABLE = 12346  # the cookie of a 32-bit bitmap without runs
_MOST_IN_ARRAY = 4096


def write(root: Path, columns: Mapping[str, Any] | pa.Table, **options: Any) -> Path:
    """Write a version of a table, by deltalake."""
    table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
    write_deltalake(root.as_uri(), table, **{"mode": "append", **options})
    return root


def opened(root: Path | str, version: int | None = None, **options: Any) -> DeltaTable:
    """Open a table, by deltalake."""
    uri = root.as_uri() if isinstance(root, Path) else root
    return DeltaTable(uri, version=version, **options)


def rows_by_deltalake(table: DeltaTable, names: Sequence[str]) -> Counter[tuple[Any, ...]]:
    """Return a table's rows as its query engine has them; NaN for null."""
    listed = ", ".join(f'"{name}"' for name in names)
    found = QueryBuilder().register("t", table).execute(f"select {listed} from t")
    return counted(pa.table(found).columns)


def rows_of(plan: Plan) -> Counter[tuple[Any, ...]]:
    """Return the rows of a plan's features."""
    return counted([pa.array(column) for column in lakes.read_all(plan, fill=None)[0].T])


def counted(columns: Iterable[Any]) -> Counter[tuple[Any, ...]]:
    """Return the rows of columns of numbers with their counts; all that is missing is alike."""
    values = [
        ["missing" if v is None or v != v else float(v) for v in c.to_pylist()] for c in columns
    ]
    return Counter(zip(*values, strict=True))


def log_of(root: Path, version: int) -> Path:
    """Return the file of the log that has a version's commit."""
    return root / "_delta_log" / f"{version:020d}.json"


def actions_of(root: Path, version: int) -> list[dict[str, Any]]:
    """Return the actions of a version's commit."""
    return [json.loads(line) for line in log_of(root, version).read_text().splitlines()]


def commit(root: Path, *actions: Action) -> int:
    """Add a commit to a table's log; return its version."""
    (root / "_delta_log").mkdir(parents=True, exist_ok=True)
    version = len(list((root / "_delta_log").glob("*.json")))
    rewrite(root, version, actions)
    return version


def rewrite(root: Path, version: int, actions: Iterable[Action]) -> None:
    """Replace a version's commit."""
    log_of(root, version).write_text("\n".join(map(json.dumps, actions)) + "\n")


def protocol(*features: str) -> Action:
    """Return the action that asks readers for features."""
    both = {"readerFeatures": list(features), "writerFeatures": list(features)}
    return {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, **both}}


def metadata(
    fields: Sequence[Mapping[str, Any]],
    *,
    partitions: Sequence[str] = (),
    table: str = "made-here",
    **settings: str,
) -> Action:
    """Return the action that has a table's columns, as the protocol's JSON has them."""
    content = {
        "id": table,
        "format": {"provider": "parquet", "options": {}},
        "schemaString": json.dumps({"type": "struct", "fields": list(fields)}),
        "partitionColumns": list(partitions),
        "configuration": {name.replace("_", "."): value for name, value in settings.items()},
        "createdTime": 0,
    }
    return {"metaData": content}


def field(name: str, type_: str, **more: Any) -> dict[str, Any]:
    """Return a column of `metadata`."""
    return {"name": name, "type": type_, "nullable": True, "metadata": more}


def add(path: str, file: Path, **more: Any) -> dict[str, Any]:
    """Return the action that adds a file under a path of the log."""
    stats = json.dumps({"numRecords": pq.read_metadata(file).num_rows})
    content = {
        "path": path,
        "partitionValues": {},
        "size": file.stat().st_size,
        "modificationTime": 0,
        "dataChange": True,
        "stats": stats,
    }
    return {"add": content | more}


def delete_rows(
    root: Path, rows: Mapping[str, Collection[int]], kind: str = "bin", **more: Any
) -> int:
    """Delete rows of files by deletion vectors; return the version.

    Args:
        root: The table.
        rows: The numbers of deleted rows, by the paths of files in the log.
        kind: "inline", "bin" or "absolute": where the vectors are kept.
        more: Members of the vectors' descriptors.
    """
    adds: dict[str, dict[str, Any]] = {}
    version = opened(root).version()
    features = set(opened(root).protocol().reader_features or ()) | {"deletionVectors"}
    for v in range(version + 1):
        for action in actions_of(root, v):
            if "add" in action:
                adds[action["add"]["path"]] = action["add"]
            elif "remove" in action:
                adds.pop(action["remove"]["path"], None)
    actions: list[Action] = [protocol(*sorted(features))]
    for path, deleted in rows.items():
        old = adds[path]
        removed = {
            name: old[name]
            for name in ("path", "partitionValues", "size", "deletionVector")
            if name in old
        }
        vector = _descriptor(root, sorted(deleted), kind) | more
        fresh = {"deletionTimestamp": 0, "dataChange": True, "extendedFileMetadata": True}
        actions += [{"remove": removed | fresh}, {"add": old | {"deletionVector": vector}}]
    return commit(root, *actions)


def _descriptor(root: Path, rows: Sequence[int], kind: str) -> dict[str, Any]:
    data = bitmap(rows)
    facts: dict[str, Any] = {"sizeInBytes": len(data), "cardinality": len(rows)}
    if kind == "inline":
        return {"storageType": "i", "pathOrInlineDv": z85(data + b"\0" * (-len(data) % 4)), **facts}
    name = uuid.uuid4()
    file = root / f"deletion_vector_{name}.bin"
    size, checksum = struct.pack(">I", len(data)), struct.pack(">I", zlib.crc32(data))
    file.write_bytes(b"\x01" + size + data + checksum)
    if kind == "absolute":
        return {"storageType": "p", "pathOrInlineDv": file.as_uri(), "offset": 1, **facts}
    return {"storageType": "u", "pathOrInlineDv": z85(name.bytes), "offset": 1, **facts}


def bitmap(rows: Sequence[int]) -> bytes:
    """Return row numbers as a RoaringBitmapArray in its portable form."""
    numbers = np.array(sorted(rows), dtype=np.uint64)
    highs = np.unique(numbers >> np.uint64(32))
    whole = struct.pack("<IQ", _MAGIC, len(highs))
    for high in highs:
        lows = (numbers[numbers >> np.uint64(32) == high] & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        whole += struct.pack("<I", int(high)) + _bitmap32(lows)
    return whole


def _bitmap32(numbers: np.ndarray[Any, Any]) -> bytes:
    keys = np.unique(numbers >> 16)
    parts = [(numbers[numbers >> 16 == key] & 0xFFFF).astype(np.uint16) for key in keys]
    head = struct.pack("<II", _PORTABLE, len(keys))
    head += b"".join(
        struct.pack("<HH", int(key), len(part) - 1) for key, part in zip(keys, parts, strict=True)
    )
    bodies = [_container(part) for part in parts]
    starts = np.cumsum([len(head) + 4 * len(keys), *map(len, bodies)])[:-1]
    return head + starts.astype("<u4").tobytes() + b"".join(bodies)


def _container(part: np.ndarray[Any, Any]) -> bytes:
    if len(part) <= _MOST_IN_ARRAY:
        return part.astype("<u2").tobytes()
    bits = np.zeros(1 << 16, dtype=np.bool_)
    bits[part] = True
    return np.packbits(bits, bitorder="little").tobytes()


def z85(data: bytes) -> str:
    """Return bytes, a multiple of four, as text of base 85 (ZeroMQ's RFC 32)."""
    words = struct.unpack(f">{len(data) // 4}I", data)
    return "".join(_Z85[word // 85**power % 85] for word in words for power in range(4, -1, -1))

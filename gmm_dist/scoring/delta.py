"""Scores in a Delta table: files that no reader sees until one commit of its log has them all.

The commit has the action `txn` with the run's id, by which a second run of the same knows that its
scores are there: https://github.com/delta-io/delta/blob/master/PROTOCOL.md#transaction-identifiers
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from gmm_dist.errors import Option, UserError, Words
from gmm_dist.lake.tables import formats
from gmm_dist.lake.tables.access import require_deltalake, told_in_a_line, uri_and_options
from gmm_dist.scoring.target import Target
from gmm_dist.storage import absolute, explained, open_url, redacted
from gmm_dist.urls import Url

if TYPE_CHECKING:
    from deltalake import DeltaTable
    from deltalake import Schema as DeltaSchema

LOG = "_delta_log"
_APP = "gmm_dist.score"
_RUN = "gmm_dist.run"  # the run's key, in the commit's information
_CHANGING = {"DELETE", "UPDATE", "MERGE", "TRUNCATE", "REPLACE TABLE", "CREATE OR REPLACE TABLE"}
# What a table may ask of its writers that files which are only added, or all removed, meet.
_MET = {"appendOnly", "invariants", "timestampNtz", "changeDataFeed"}
_NTZ = "timestampNtz"
_UNFIT = re.compile(r"[ ,;{}()\n\t=]")
_WIDER = {
    pa.uint8(): pa.int16(),
    pa.uint16(): pa.int32(),
    pa.uint32(): pa.int64(),
    pa.uint64(): pa.decimal128(20, 0),
    pa.float16(): pa.float32(),
    pa.date64(): pa.date32(),
}
_AS_THEY_ARE = {
    *(pa.bool_(), pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.float32(), pa.float64()),
    *(pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()),
    *(pa.binary_view(), pa.date32()),
}
_NEW_TABLE = "give a new " + Option("output")


def in_delta(field: pa.Field) -> pa.Field:
    """Return a column as Delta tables can hold it; times are kept to the microsecond.

    Raises:
        UserError: they cannot.
    """
    type_ = _in_delta(field.type)
    if type_ is None:
        raise _unfit(f"column {field.name!r} has type {field.type}, which Delta tables lack")
    if _UNFIT.search(field.name):
        raise _unfit(f"column {field.name!r} has a character that names in Delta tables lack")
    return pa.field(field.name, type_)


def _unfit(what: str) -> UserError:
    return UserError(what, option="keep", remedy="leave it out, or write files")


def _in_delta(type_: pa.DataType) -> pa.DataType | None:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if type_ in _AS_THEY_ARE or pa.types.is_decimal128(type_):
        return type_
    if pa.types.is_timestamp(type_):
        return pa.timestamp("us", None if type_.tz is None else "UTC")
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or _is_fixed(type_):
        inner = _in_delta(type_.value_type)
        return type_ if inner == type_.value_type else None
    return _WIDER.get(type_)


def _is_fixed(type_: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(type_))


def _taken_away(history: Iterable[Mapping[str, Any]], run: str | None) -> str | None:
    """Say which commit has taken away or changed the rows of a run's, None for none.

    `history` are the commits that the log still has, the newest first. Where it has the run's no
    longer, that is not known, and None.
    """
    newest = math.inf  # the version that the table was restored to, by what was looked at so far
    changed = restored = None
    for entry in history:
        operation, version = entry.get("operation"), entry["version"]
        parameters = entry.get("operationParameters") or {}
        if entry.get(_RUN) == run:
            return changed if version <= newest else restored
        if version > newest:
            continue
        what = f"version {version} ({str(operation).lower()})"
        if operation == "RESTORE" and parameters.get("version") is not None:
            newest, restored = int(parameters["version"]), what
        elif operation in _CHANGING or parameters.get("mode") == "Overwrite":
            changed = what
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaScores:
    """The Delta table that a run's scores go to, which may not be there yet.

    `overwrite` has them take the place of all rows that it has when they are committed. `schema`
    are the scores' columns.
    """

    target: Target
    overwrite: bool
    schema: pa.Schema

    def has_run(self) -> bool:
        """Say whether the table has this run's scores; refuse a table that cannot take them.

        Raises:
            UserError: deltalake is not installed; the place holds other files; the table has other
                columns, partitions, or asks of its writers what is not known here; it had the
                scores, and others have taken them away since.
        """
        table = self._table()
        if table is None:
            return False
        if table.transaction_version(self._app_id) is not None:
            if taken := _taken_away(table.history(), self.target.run):
                raise self._unfit(
                    f"had the scores of this run, which has committed before, until {taken}",
                    "restore the version before, or write them to a new " + Option("output"),
                )
            return True
        self._refuse_unfit(table)
        return False

    def commit(self, files: Mapping[str, tuple[int, int]]) -> None:
        """Add files to the table in one commit, unless it has this run's; files are in their place.

        Args:
            files: Their sizes in bytes and numbers of rows, by their paths in the table.

        Raises:
            UserError: another has changed the table such that it cannot take them any more.
        """
        from deltalake.transaction import (
            AddAction,
            CommitProperties,
            Transaction,
            create_table_with_add_actions,
        )

        adds = [
            AddAction(path, size, {}, 0, True, json.dumps({"numRecords": n_rows}))
            for path, (size, n_rows) in sorted(files.items())
            if n_rows
        ]
        run = Transaction(self._app_id, 1, None)
        properties = CommitProperties(
            app_transactions=[run], custom_metadata={_RUN: str(self.target.run)}
        )
        table = self._table()
        if table is not None and table.transaction_version(self._app_id) is not None:
            return
        with told_in_a_line(self._root, "commit to the table", _AGAIN):
            if table is None:
                uri, options = uri_and_options(self._root)
                create_table_with_add_actions(
                    uri,
                    self._delta_schema,
                    adds,
                    storage_options=options,
                    commit_properties=properties,
                )
                return
            self._refuse_unfit(table)
            mode = "overwrite" if self.overwrite else "append"
            table.create_write_transaction(
                list(adds), mode, self._delta_schema, commit_properties=properties
            )

    @property
    def _app_id(self) -> str:
        return f"{_APP}:{self.target.run}"

    @property
    def _root(self) -> Url:
        return Url(absolute(self.target.url))

    @property
    def _delta_schema(self) -> DeltaSchema:
        from deltalake import Schema

        return Schema.from_arrow(self.schema)

    def _table(self) -> DeltaTable | None:
        require_deltalake(self._root, "write")
        from deltalake import DeltaTable

        fs, path = open_url(self._root)
        with explained(self._root):
            if not formats.is_delta(fs, path, self._root):
                return None
        uri, options = uri_and_options(self._root)
        with told_in_a_line(self._root):
            return DeltaTable(uri, storage_options=options)

    def _refuse_unfit(self, table: DeltaTable) -> None:
        metadata, protocol = table.metadata(), table.protocol()
        asked = {*(protocol.reader_features or ()), *(protocol.writer_features or ())} - _MET
        settings = [
            name
            for name in metadata.configuration
            if name.startswith("delta.constraints.") or name == "delta.columnMapping.mode"
        ]
        fields = json.loads(table.schema().to_json())["fields"]
        ours = json.loads(self._delta_schema.to_json())["fields"]
        if metadata.partition_columns:
            raise self._unfit(f"is partitioned, by {', '.join(metadata.partition_columns)}")
        if asked or settings or any(field["metadata"] for field in fields):
            what = ", ".join(sorted(asked) or settings) or "rules for the values of its columns"
            raise self._unfit(f"asks of its writers what is not known here, {what}")
        have, want = ({f["name"]: json.dumps(f["type"]) for f in each} for each in (fields, ours))
        if not self.overwrite and have != want:
            name = next(n for n in {**want, **have} if have.get(n) != want.get(n))
            shown = [each.get(name, "none").strip('"') for each in (have, want)]
            raise self._unfit(
                f"has other columns than the scores: {name!r} is {shown[0]} there, {shown[1]} here",
                "give options that give the columns of the table, "
                + Option("overwrite", True)
                + ", or a new "
                + Option("output"),
            )
        is_new = '"timestamp_ntz"' in self._delta_schema.to_json()
        if is_new and _NTZ not in (protocol.writer_features or ()):
            raise self._unfit("has no times without a zone yet, which the scores would bring")

    def _unfit(self, what: str, remedy: Words = _NEW_TABLE) -> UserError:
        return UserError(f"the Delta table {what}", where=redacted(self._root), remedy=remedy)


_AGAIN = "run again with " + Option("resume", True)

"""Rows of Iceberg tables: those that pyiceberg reads, each once."""

from __future__ import annotations

import datetime as dt
import sys
from pathlib import Path
from typing import Any

import deltas
import icebergs
import lakes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg import catalog as pyiceberg_catalog
from pyiceberg.table import StaticTable, Table
from pyiceberg.transforms import (
    BucketTransform,
    DayTransform,
    HourTransform,
    IdentityTransform,
    MonthTransform,
    TruncateTransform,
    YearTransform,
)
from pyiceberg.types import DoubleType, LongType
from pyiceberg.utils.config import Config

from gmm_dist.errors import NoRows, UserError
from gmm_dist.lake.lake import Lake
from gmm_dist.lake.plan import Plan, plan_of
from gmm_dist.lake.read import RowCounts
from gmm_dist.lake.tables.snapshot import Pinned, stay_at

XY = ["x", "y"]
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")


def plan(table: Table | str, columns: list[str] | None = None, **options: Any) -> Plan:
    """Plan a table's features; "mean" keeps rows with holes where they are."""
    url = table if isinstance(table, str) else icebergs.place(table)
    return plan_of(Lake(url, **{"columns": columns, "missing": "mean", **options}))


def some(n: int = 20, first: int = 0, seed: int = 0) -> pa.Table:
    """Return rows whose column `i` numbers them."""
    x, y = lakes.numbers(n, seed), lakes.numbers(n, seed + 1)
    return pa.table({"x": x, "y": y, "i": np.arange(first, first + n)})


def same_rows(table: Table, columns: list[str], **options: Any) -> Plan:
    """Check that a plan has the rows that pyiceberg reads; return it."""
    found = plan(table, columns, **options)
    expected = icebergs.rows_by_pyiceberg(table, columns, options.get("at"))
    assert deltas.rows_of(found) == expected
    assert found.n_rows == expected.total()
    return found


def test_every_snapshot_has_the_rows_that_pyiceberg_has(tmp_path: Path) -> None:
    table = icebergs.write(tmp_path, some())
    table.append(some(30, first=20, seed=2))
    table.delete("i > 11 and i < 25")
    table.overwrite(some(5, first=100), "i < 3")
    with table.update_schema() as update:
        update.add_column("z", DoubleType())
    table.append(some(10, first=200).append_column("z", pa.array(np.arange(10.0))))
    seen = set()
    for snapshot in table.snapshots():
        names = [*XY, "i"]
        found = same_rows(table, names, at=snapshot.snapshot_id)
        assert found.snapshot is not None
        assert found.snapshot.version == snapshot.snapshot_id
        assert found.snapshot.format == "Iceberg"
        seen.add(found.hash)
    assert len(seen) == len(table.snapshots()) > 4
    found = same_rows(table, [*XY, "z"])
    assert found.snapshot.table == str(table.metadata.table_uuid)
    with pytest.raises(UserError, match="no column 'z'"):
        plan(table, ["z"], at=table.snapshots()[0].snapshot_id)


@pytest.mark.parametrize("kind", ["positions", "vectors"])
def test_deleted_rows_are_not_read(tmp_path: Path, kind: str) -> None:
    table = icebergs.write(tmp_path, some(1000))
    table.append(some(100, first=1000))
    before = plan(table, [*XY, "i"])
    dead = {path: [0, 1, 50, 99] for path in icebergs.data_files(table)}
    table = icebergs.delete_rows(table, dead, kind)
    found = same_rows(table, [*XY, "i"])
    assert found.n_rows == 1092
    assert lakes.read_all(found)[2] == RowCounts(read=1092)
    assert before.snapshot.masks is None
    assert found.snapshot.masks is not None
    assert len({before.hash, found.hash}) == 2
    assert plan(table, [*XY, "i"], at=before.snapshot.version).n_rows == 1100


def test_a_vector_takes_the_place_of_position_deletes(tmp_path: Path) -> None:
    table = icebergs.write(tmp_path, some(1000))
    (path,) = icebergs.data_files(table)
    table = icebergs.delete_rows(table, {path: [3, 4]})
    table = icebergs.delete_rows(table, {path: [3, 4, 5, 999]}, "vectors")
    same_rows(table, ["i"])
    assert plan(table, ["i"]).n_rows == 996


def test_deletes_are_about_files_of_their_partition_that_are_not_newer(tmp_path: Path) -> None:
    rows = some(100).append_column("kind", pa.array(["a", "b"] * 50))
    table = icebergs.catalog(tmp_path).create_table(icebergs.NAME, schema=rows.schema)
    with table.update_spec() as update:
        update.add_field("kind", IdentityTransform(), "kind")
    table.append(rows)
    paths = icebergs.data_files(table)
    table = icebergs.delete_rows(table, {path: [1, 7] for path in paths})
    table.append(rows)
    found = same_rows(table, [*XY, "i"])
    assert found.n_rows == 196
    assert found.keys.names == ["kind"]
    only = plan(table, ["i"], where="kind == 'b'")
    assert only.n_rows == 98
    assert all("kind=b" in file.path for file in only.files)
    table = icebergs.delete_rows(table, {icebergs.data_files(table)[0]: range(30)}, "vectors")
    same_rows(table, ["i"])


def test_many_deleted_rows_in_one_file(tmp_path: Path) -> None:
    n = 150_000
    table = icebergs.write(tmp_path, {"x": np.arange(float(n))})
    (path,) = icebergs.data_files(table)
    dead = [*range(10, 60_000), *range(70_000, n, 3)]
    table = icebergs.delete_rows(table, {path: dead}, "vectors")
    X = lakes.read_all(plan(table))[0].ravel()
    assert X.tolist() == sorted({*range(n)} - {*dead})


def test_equality_deletes_are_refused_where_they_are_about_a_file(tmp_path: Path) -> None:
    table = icebergs.write(tmp_path, some(100))
    before = table.current_snapshot().snapshot_id
    (path,) = icebergs.data_files(table)
    table = icebergs.delete_rows(table, {path: []}, "equality", column="i", values=[3, 4])
    with pytest.raises(ValueError, match="equality deletes"):
        table.scan().to_arrow()
    place = icebergs.place(table)
    message = rf"^{place}: rows are deleted by their values \(.*-equality.parquet\), as equality de"
    with pytest.raises(UserError, match=message) as told:
        plan(table)
    assert "\n" not in str(told.value)
    assert "as rewrite_data_files does" in str(told.value)
    assert plan(table, at=before).n_rows == 100


def test_renamed_added_and_widened_columns_go_by_field_id(tmp_path: Path) -> None:
    rows = pa.table(
        {
            "x": pa.array([1.0, 2.0], pa.float32()),
            "n": pa.array([1, 2], pa.int32()),
            "gone": [7.0, 7.0],
            "s": [{"inner": 1.0}] * 2,
        }
    )
    table = icebergs.write(tmp_path, rows)
    first = table.current_snapshot().snapshot_id
    with table.update_schema() as update:
        update.update_column("x", DoubleType())
        update.update_column("n", LongType())
        update.delete_column("gone")
    with table.update_schema() as update:
        update.rename_column("x", "new x")
        update.add_column("gone", DoubleType())
    assert same_rows(table, ["new x", "n", "gone"]).n_rows == 2
    assert lakes.read_all(plan(table, ["gone"]), fill=None)[2].imputed == 2
    later = pa.table({"new x": [3.5], "n": [2**40], "gone": [5.0], "s": [{"inner": 2.0}]})
    table.append(later)
    found = same_rows(table, ["new x", "n", "gone"])
    assert plan(table).columns == ("new x", "gone")
    assert found.snapshot.schema != plan(table, ["x"], at=first).snapshot.schema
    assert sorted(lakes.read_all(plan(table, ["x"], at=first))[0].ravel()) == [1, 2]
    assert lakes.read_all(plan(table, ["n"], where="gone is null"))[0].ravel().tolist() == [1, 2]


def test_a_run_stays_with_its_snapshot_and_its_columns(tmp_path: Path) -> None:
    table = icebergs.write(tmp_path, some())
    with table.update_schema() as update:
        update.rename_column("x", "a")
    begun = plan(table)
    pinned = stay_at(None, begun.snapshot.content)
    assert isinstance(pinned, Pinned)
    with table.update_schema() as update:
        update.rename_column("a", "b")
    table.append(some(5).rename_columns(["b", "y", "i"]))
    assert plan(table, at=pinned).hash == begun.hash
    assert plan(table, at=pinned).columns == ("a", "y")
    assert plan(table, at=begun.snapshot.version).columns == ("x", "y")


WHEN = dt.datetime(2026, 11, 1, 12, 30, 0, 5)


def timed(n: int = 8) -> pa.Table:
    """Return rows of many times, a day and 7 hours apart."""
    times = [WHEN + i * dt.timedelta(days=1, hours=7) for i in range(n)]
    return pa.table(
        {
            "x": np.arange(float(n)),
            "i": np.arange(n) * 10,
            "when": pa.array(times, pa.timestamp("us", "UTC")),
            "day": pa.array([t.date() for t in times]),
            "kind": [f"k{i}" for i in range(n)],
        }
    )


@pytest.mark.parametrize("metrics", ["full", "none"])
@pytest.mark.parametrize(
    ("column", "transform", "where", "files"),
    [
        ("when", DayTransform(), "when >= '2026-11-04' and when < '2026-11-05'", 1),
        ("when", HourTransform(), "when >= '2026-11-02T19:00:00' and when < '2026-11-02T20:00'", 1),
        ("when", MonthTransform(), "when >= '2026-12-01'", 0),
        ("when", YearTransform(), "when < '2026-01-01'", 0),
        ("day", MonthTransform(), "day < '2026-11-01'", 0),
        ("day", DayTransform(), "day == '2026-11-04'", 1),
        ("i", TruncateTransform(20), "i == 30", 1),
        ("i", TruncateTransform(20), "i >= 60", 1),
        ("kind", IdentityTransform(), "kind in ('k1', 'k3')", 2),
        ("day", IdentityTransform(), "day >= '2026-11-04'", 6),
        ("kind", BucketTransform(4), "kind == 'k1'", None),
        ("kind", TruncateTransform(1), "kind == 'k1'", None),
    ],
)
def test_partition_transforms_leave_out_files(
    tmp_path: Path, column: str, transform: Any, where: str, files: int | None, metrics: str
) -> None:
    rows = timed()
    properties = {"write.metadata.metrics.default": metrics}
    table = icebergs.catalog(tmp_path).create_table(
        icebergs.NAME, schema=rows.schema, properties=properties
    )
    with table.update_spec() as update:
        update.add_field(column, transform, "part")
    table.append(rows)
    if files == 0:
        with pytest.raises(NoRows, match=r"by the statistics of \d files in the table's log"):
            plan(table, ["x"], where=where)
        return
    plain = str(lakes.write(tmp_path / "plain" / "a.parquet", rows))
    expected = sorted(lakes.read_all(plan(plain, ["x"], where=where))[0].ravel())
    found = plan(table, ["x"], where=where)
    assert sorted(lakes.read_all(found)[0].ravel()) == expected
    assert files is None or len(found.files) == files


def test_partitions_that_evolved(tmp_path: Path) -> None:
    rows = timed()
    table = icebergs.write(tmp_path, rows)
    with table.update_spec() as update:
        update.add_field("kind", IdentityTransform(), "kind")
    table.append(rows)
    with table.update_spec() as update:
        update.add_field("when", DayTransform(), "d")
        update.remove_field("kind")
    table.append(rows)
    assert same_rows(table, ["x", "i"]).n_rows == 24
    found = plan(table, ["x"], where="kind == 'k2' and when < '2026-11-05'")
    assert lakes.read_all(found)[0].ravel().tolist() == [2, 2, 2]
    assert found.keys.names == []


def test_identity_partitions_of_all_types_are_keys(tmp_path: Path) -> None:
    rows = lakes.partitioned()
    table = icebergs.catalog(tmp_path).create_table(icebergs.NAME, schema=rows.schema)
    with table.update_spec() as update:
        for name in rows.column_names[1:]:
            update.add_field(name, IdentityTransform(), name)
    table.append(rows)
    for where, wanted in lakes.PARTITION_FILTERS:
        found = plan(table, where=where)
        assert sorted(lakes.read_all(found)[0].ravel().tolist()) == wanted
    assert plan(table).columns == ("x",)
    assert {*plan(table).keys.names} == {*rows.column_names[1:]}


def test_files_without_field_ids_go_by_the_name_mapping(tmp_path: Path) -> None:
    plain = lakes.write(tmp_path / "elsewhere" / "a.parquet", some(10, first=50))
    table = icebergs.write(tmp_path, some())
    table.add_files([f"file://{plain}"])
    with table.update_schema() as update:
        update.rename_column("i", "j")
    found = same_rows(table, [*XY, "j"])
    assert [file.path for file in found.files if file.entry.is_outside] == [str(plain)]


def test_times_and_snapshots_are_named(tmp_path: Path) -> None:
    table = icebergs.write(tmp_path, some())
    first = table.current_snapshot()
    table.append(some(5))
    moment = dt.datetime.fromtimestamp(first.timestamp_ms / 1000, dt.UTC)
    assert plan(table, ["x"], at=moment).n_rows == 20
    assert plan(table, ["x"], at=str(first.snapshot_id)).n_rows == 20
    assert plan(table, ["x"], at=dt.datetime.now(dt.UTC)).n_rows == 25
    for at, message in (
        (7, "at is 7, and the table has no such snapshot; the current one is "),
        ("2020-01-01", "at is 2020-01-01T.*, and no snapshot that the table has is as old"),
        (dt.datetime(2999, 1, 1, tzinfo=dt.UTC), "at is 2999-01-01.*: give a time that has come"),
        ("yesterday", "at is 'yesterday': give the number of a version"),
    ):
        with pytest.raises(UserError, match=message):
            plan(table, ["x"], at=at)


def test_a_catalog_of_pyicebergs_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = icebergs.write(tmp_path, some())
    monkeypatch.setenv("PYICEBERG_CATALOG__MINE__URI", f"sqlite:///{tmp_path}/catalog.db")
    monkeypatch.setenv("PYICEBERG_CATALOG__MINE__WAREHOUSE", f"file://{tmp_path}/warehouse")
    monkeypatch.setattr(pyiceberg_catalog, "_ENV_CONFIG", Config())
    # A SQL catalog has tables by the catalog's name, too.
    named = icebergs.SqlCatalog("mine", uri=f"sqlite:///{tmp_path}/catalog.db")
    named.create_namespace_if_not_exists("db")
    named.register_table("db.t", table.metadata_location)
    found = plan("iceberg://mine/db.t", XY)
    assert found.hash == plan(table, XY).hash
    assert found.url == table.location().removeprefix("file://")
    for url, message in (
        (
            "iceberg://mine/db.other",
            r"pyiceberg cannot read the table \(.*db.other.*check its",
        ),
        ("iceberg://mine", "names no table of a catalog; give iceberg://CATALOG/NAMESPACE.TABLE"),
        ("iceberg://nobody/db.t", r"pyiceberg cannot read the table \(.*; check its name, and the"),
        (f"{tmp_path}/no.metadata.json", r"pyiceberg cannot read the table"),
    ):
        with pytest.raises(UserError, match=message) as told:
            plan(url, XY)
        assert "\n" not in str(told.value)


def test_what_is_no_table_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = icebergs.write(tmp_path, some())
    root = table.location().removeprefix("file://")
    (data,) = (path.removeprefix("file://") for path in icebergs.data_files(table))
    for part in (root, f"{root}/data", data):
        with pytest.raises(UserError, match=r"an Iceberg table .*give it as iceberg://CATALOG/NAM"):
            plan(part)
    empty = icebergs.catalog(tmp_path).create_table("db.empty", schema=some().schema)
    with pytest.raises(NoRows, match="the Iceberg table has no snapshot, and so no rows"):
        plan(empty)
    table.delete("i >= 0")
    with pytest.raises(NoRows, match=r"no rows in snapshot .*; check the snapshot"):
        plan(table)
    Path(data).unlink()
    with pytest.raises(UserError, match="but it is gone, as VACUUM or expiring snapshots leave"):
        plan(table, at=table.snapshots()[0].snapshot_id)
    monkeypatch.setitem(sys.modules, "pyiceberg", None)
    message = r"an Iceberg table, which takes the package pyiceberg to read; pip install 'gmm_"
    with pytest.raises(UserError, match=message):
        plan("iceberg://mine/db.t")


@pytest.mark.parametrize("damage", ["checksum", "magic", "length", "rows"])
def test_a_damaged_vector_is_one_line(tmp_path: Path, damage: str) -> None:
    table = icebergs.write(tmp_path, some(100))
    (path,) = icebergs.data_files(table)
    dead = [5, 100] if damage == "rows" else [5, 6]
    table = icebergs.delete_rows(table, {path: dead}, "vectors")
    (puffin,) = tmp_path.rglob("*.puffin")
    data = bytearray(puffin.read_bytes())
    at = {"length": 4, "magic": 8, "checksum": 30, "rows": None}[damage]
    if at is not None:
        data[at] ^= 0xFF
        puffin.write_bytes(data)
    message = "row 100 is deleted of 100" if at is None else "the deletion vector is damaged, or"
    with pytest.raises(UserError, match=message):
        plan(table)


def test_a_default_of_a_new_column_is_refused(tmp_path: Path) -> None:
    table = icebergs.write(tmp_path, some(10))
    table = icebergs.delete_rows(table, {icebergs.data_files(table)[0]: [1]}, "vectors")
    path = Path(icebergs.place(table))
    text = path.read_text()
    path.write_text(text.replace('"name": "y"', '"initial-default": 1.5, "name": "y"'))
    assert path.read_text() != text
    assert StaticTable.from_metadata(str(path)).schema().find_field("y").initial_default == 1.5
    with pytest.raises(UserError, match="asks its readers for 'initial-default of column y'"):
        plan(str(path))


def test_a_file_that_lacks_what_its_partition_tells_is_refused(tmp_path: Path) -> None:
    rows = some(10).append_column("kind", pa.array(["a"] * 10))
    table = icebergs.write(tmp_path, rows)
    with table.update_spec() as update:
        update.add_field("kind", IdentityTransform(), "kind")
    table.append(rows)
    (data,) = (p for p in icebergs.data_files(table) if "kind=a" in p)
    path = Path(data.removeprefix("file://"))
    size = path.stat().st_size
    lacking = pq.ParquetFile(path).read().drop_columns(["kind"])
    for n in range(size):  # of the same size
        with pq.ParquetWriter(path, lacking.schema, store_schema=False) as writer:
            writer.write_table(lacking)
            writer.add_key_value_metadata({"p": "p" * n})
        if path.stat().st_size == size:
            break
    with pytest.raises(
        UserError, match="lacks the column 'kind', which the table's partitions tel"
    ):
        plan(table, ["x"])

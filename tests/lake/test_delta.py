"""Rows of Delta tables: those that deltalake's own query engine has, each once."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import deltas
import lakes
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from gmm_dist.errors import UserError
from gmm_dist.lake import probe
from gmm_dist.lake.plan import Plan, plan_lake
from gmm_dist.lake.read import RowCounts

REAL = Path(__file__).parents[1] / "data" / "delta"
XY = ["x", "y"]


def plan(root: Path | str, columns: list[str] | None = None, **options: Any) -> Plan:
    """Plan a table's features; "mean" keeps rows with holes where they are."""
    return plan_lake(str(root), **{"columns": columns, "missing": "mean", **options})


def some(n: int = 20, first: int = 0, seed: int = 0) -> dict[str, Any]:
    """Return rows whose column `i` numbers them."""
    x, y = lakes.numbers(n, seed), lakes.numbers(n, seed + 1)
    return {"x": x, "y": y, "i": np.arange(first, first + n)}


def only_file(root: Path) -> str:
    """Return the path in the log of a table's one file."""
    (path,) = pa.table(deltas.opened(root).get_add_actions())["path"].to_pylist()
    return str(path)


def test_every_version_has_the_rows_that_deltalake_has(tmp_path):
    root = deltas.write(tmp_path / "t", some())
    deltas.write(root, some(30, first=20, seed=2))
    table = deltas.opened(root)
    table.delete("i % 7 = 3")
    table.update(updates={"y": "y + 100"}, predicate="i < 9")
    merged = pa.table({"x": [1.0, 2.0], "y": [3.0, 4.0], "i": [5, 99]})
    on = table.merge(merged, "t.i = s.i", source_alias="s", target_alias="t")
    on.when_matched_update_all().when_not_matched_insert_all().execute()
    deltas.write(root, {**some(10, first=200), "z": range(10)}, schema_mode="merge")
    deltas.opened(root).optimize.compact()
    assert deltas.opened(root).version() == 6
    seen = set()
    for version in range(7):
        names = [*XY, "i", *(["z"] if version >= 5 else [])]
        found = plan(root, names, at=version)
        expected = deltas.rows_by_deltalake(deltas.opened(root, version), names)
        assert deltas.rows_of(found) == expected
        assert found.n_rows == expected.total()
        assert found.snapshot is not None
        assert found.snapshot.version == version
        seen.add(found.hash)
    assert len(seen) == 7
    assert plan(root, XY).snapshot == plan(root, XY, at=6).snapshot


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("table-with-dv-small", ["value"]),
        ("checkpoint-v2-table", ["id"]),
        ("delta-0.8.0-special-partition", ["y"]),
    ],
)
def test_tables_that_spark_wrote(name, columns):
    root = REAL / name
    expected = deltas.rows_by_deltalake(deltas.opened(root), columns)
    assert deltas.rows_of(plan(root, columns)) == expected


def test_a_mapped_table_that_spark_wrote(tmp_path):
    # Its columns are all texts.
    root = REAL / "table_with_column_mapping"
    with pytest.raises(UserError, match=r"no floating-point column .* among 'Super Name';"):
        plan(root)
    with pytest.raises(UserError, match="'Company Very Short' is a hive key"):
        plan(root, ["Company Very Short"])
    with pytest.raises(UserError, match=r"feature column 'Super Name' has type (large_)?string"):
        plan(root, ["Super Name"])


@pytest.mark.parametrize("kind", ["inline", "bin", "absolute"])
def test_deleted_rows_are_not_read(tmp_path, kind):
    root = deltas.write(tmp_path / "a table", some(1000))
    deltas.delete_rows(root, {only_file(root): [0, 1, 500, 998]}, kind)
    found = plan(root, [*XY, "i"])
    expected = deltas.rows_by_deltalake(deltas.opened(root), [*XY, "i"])
    assert deltas.rows_of(found) == expected
    assert lakes.read_all(found)[2] == RowCounts(read=996)
    assert found.n_rows == 996
    # A second vector takes the place of the first.
    deltas.delete_rows(root, {only_file(root): [0, 1, 2]}, kind)
    again = plan(root, [*XY, "i"])
    assert again.n_rows == 997
    assert again.snapshot.masks != found.snapshot.masks is not None
    assert plan(root, ["x"], at=0).snapshot.masks is None
    assert plan(root, [*XY, "i"], at=1).hash == found.hash


def by_hand(root: Path, files: dict[str, pa.Table], *, rows_per_group: int, **more: Any) -> Path:
    """Write a table whose files have the row groups that a test needs."""
    first = next(iter(files.values()))
    names = {pa.float64(): "double", pa.float32(): "float", pa.int64(): "long"}
    names |= {
        pa.list_(pa.float32()): {"type": "array", "elementType": "float", "containsNull": True}
    }
    fields = [deltas.field(f.name, names[f.type]) for f in first.schema]
    adds = []
    for name, rows in files.items():
        lakes.write(root / name, rows, rows_per_group=rows_per_group)
        adds.append(deltas.add(name, root / name, **more))
    deltas.commit(root, deltas.protocol("deletionVectors"), deltas.metadata(fields), *adds)
    return root


@pytest.mark.parametrize("n_shards", [1, 3, 11])
def test_live_rows_keep_their_order_over_row_groups_and_shards(tmp_path, n_shards):
    tables = {
        f"{name}.parquet": pa.table(some(100, first)) for name, first in (("b", 0), ("a", 100))
    }
    root = by_hand(tmp_path / "t", tables, rows_per_group=13)
    dead = {"a.parquet": [0, 12, 13, *range(26, 39), 99], "b.parquet": list(range(60))}
    deltas.delete_rows(root, dead)
    found = plan(root, ["i"], n_shards=n_shards)
    live = [100 + i for i in range(100) if i not in dead["a.parquet"]] + list(range(60, 100))
    assert lakes.read_all(found)[0].ravel().tolist() == live
    sizes = [sum(part.stop - part.start for part in shard) for shard in found.shards]
    assert max(sizes) - min(sizes) <= 1
    assert deltas.rows_by_deltalake(deltas.opened(root), ["i"]) == deltas.rows_of(found)
    assert probe.probe(found).ravel().tolist() == live


def test_vectors_of_many_rows(tmp_path):
    # One that is a bitmap, and rows beyond 16 bits.
    n = 150_000
    root = deltas.write(tmp_path / "t", {"x": np.arange(float(n))})
    dead = [*range(10, 60_000), *range(70_000, n, 3)]
    deltas.delete_rows(root, {only_file(root): dead})
    live = np.setdiff1d(np.arange(n), dead)
    found = plan(root)
    np.testing.assert_array_equal(lakes.read_all(found)[0].ravel(), live)
    assert deltas.rows_by_deltalake(deltas.opened(root), ["x"]).total() == len(live)
    assert found.files[0].entry is not None
    assert len(found.files[0].entry.deleted.packed) < 2_000  # as it travels
    places = [round(i * (len(live) - 1024) / 15) for i in range(16)]
    probed = [live[place + row] for place in places for row in range(1024)]
    assert probe.probe(found).ravel().tolist() == probed


def test_a_table_may_lose_all_its_rows(tmp_path):
    root = deltas.write(tmp_path / "t", some())
    deltas.delete_rows(root, {only_file(root): range(20)})
    with pytest.raises(UserError, match=f"^{root}: no rows in 1 Parquet file; check"):
        plan(root)
    deltas.opened(root).delete()
    with pytest.raises(UserError, match=f"^{root}: no rows in version 2 of the Delta table"):
        plan(root)


def test_messages_number_rows_as_the_file_does(tmp_path):
    x = lakes.numbers(10)
    x[7] = np.inf
    root = by_hand(tmp_path / "t", {"a.parquet": pa.table({"x": x})}, rows_per_group=5)
    deltas.delete_rows(root, {"a.parquet": [0, 5]})
    for where in (None, "x > -100"):
        with pytest.raises(UserError, match=r"a.parquet, row group 1, row 2: column 'x' is inf"):
            lakes.read_all(plan(root, where=where))


def test_nulls_of_deleted_rows_are_no_error(tmp_path):
    root = deltas.write(tmp_path / "t", {"x": pa.array([1.0, None, 2.0])})
    with pytest.raises(UserError, match="column 'x' has 1 null"):
        plan(root, missing="error")
    deltas.delete_rows(root, {only_file(root): [1]})
    assert lakes.read_all(plan(root, missing="error"))[0].ravel().tolist() == [1, 2]


def test_columns_that_came_later_are_null_before(tmp_path):
    root = deltas.write(tmp_path / "t", {"x": [1.0]})
    deltas.write(root, {"x": [2.0], "z": [3.0]}, schema_mode="merge")
    assert plan(root).columns == ("x", "z")
    with pytest.raises(UserError, match=r"\.parquet, row group 0: column 'z' has 1 null; pass"):
        plan(root, missing="error")
    X, _, counts = lakes.read_all(plan(root, missing="drop"))
    assert X.tolist() == [[2, 3]]
    assert counts == RowCounts(read=2, dropped=1)
    assert lakes.read_all(plan(root, ["x"], where="z is null"))[0].tolist() == [[1]]
    assert lakes.read_all(plan(root, ["x"], where=pc.field("z").is_null()))[0].tolist() == [[1]]


def test_the_first_live_list_tells_the_length_of_all(tmp_path):
    lists = pa.array([[1.0], [2.0, 3.0], None, [4.0, 5.0]], pa.list_(pa.float32()))
    root = by_hand(tmp_path / "t", {"a.parquet": pa.table({"emb": lists})}, rows_per_group=4)
    deltas.delete_rows(root, {"a.parquet": [0]})
    found = plan(root)
    assert found.feature_names == ("emb[0]", "emb[1]")
    assert found.first_list.endswith("row group 0, row 1")
    assert lakes.read_all(plan(root, missing="drop"))[0].tolist() == [[2, 3], [4, 5]]


PARTITIONS = lakes.partitioned().column_names[1:]


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        *lakes.PARTITION_FILTERS,
        (pc.field("day") == dt.date(2026, 11, 2), [2]),
        (pc.field("ok").is_null() & (pc.field("x") > 0), [3]),
    ],
)
def test_partition_columns_filter_in_the_tables_types(tmp_path, where, rows):
    root = deltas.write(tmp_path / "t", lakes.partitioned(), partition_by=PARTITIONS)
    found = plan(root, where=where)
    assert sorted(lakes.read_all(found)[0].ravel().tolist()) == rows
    assert found.columns == ("x",)
    assert {*found.keys.names} == {*PARTITIONS}


def test_partitions_may_have_deleted_rows(tmp_path):
    rows = pa.table({"x": np.arange(8.0), "kind": ["a b/c"] * 4 + ["é%"] * 4})
    root = deltas.write(tmp_path / "t", rows, partition_by=["kind"])
    paths = pa.table(deltas.opened(root).get_add_actions())["path"].to_pylist()
    deltas.delete_rows(root, {path: [1, 3] for path in paths})
    assert deltas.rows_of(plan(root)) == deltas.rows_by_deltalake(deltas.opened(root), ["x"])
    assert lakes.read_all(plan(root, where="kind == 'é%'"))[0].ravel().tolist() == [4, 6]


def mapped(root: Path, by: str, *, ids: bool = True) -> Path:
    """Write a table that maps its columns by "name" or "id"; one was dropped, one came later."""
    parts = [("c-1", pa.float64(), 2), ("c-2", pa.float32(), 1), ("gone", pa.float64(), 9)]
    schema = pa.schema(
        [
            pa.field(name, type_, metadata={"PARQUET:field_id": str(number)} if ids else None)
            for name, type_, number in parts
        ]
    )
    columns = {"c-1": [1.0, 2.0, 9.0], "c-2": [3.0, 4.0, 9.0], "gone": [7.0, 7.0, 7.0]}
    file = lakes.write(root / "sub dir" / "f.parquet", pa.table(columns, schema))

    def place(number: int, name: str) -> dict[str, Any]:
        return {"delta.columnMapping.id": number, "delta.columnMapping.physicalName": name}

    struct = {"type": "struct", "fields": [deltas.field("inner", "double", **place(6, "c-6"))]}
    fields = [
        deltas.field("x", "float", **place(1, "c-2")),
        deltas.field("y z", "double", **place(2, "c-1")),
        deltas.field("late", "double", **place(3, "c-3")),
        deltas.field("day", "date", **place(4, "c-4")),
        deltas.field("nested", struct, **place(5, "c-5")),
    ]
    settings = {"delta_columnMapping_mode": by, "delta_columnMapping_maxColumnId": "6"}
    deltas.commit(
        root,
        deltas.protocol("columnMapping", "deletionVectors"),
        deltas.metadata(fields, partitions=["day"], **settings),
        deltas.add("sub%20dir/f.parquet", file, partitionValues={"c-4": "2026-11-01"}),
    )
    deltas.delete_rows(root, {"sub%20dir/f.parquet": [2]})
    return root


@pytest.mark.parametrize("by", ["name", "id"])
def test_mapped_columns_are_found_by_their_names(tmp_path, by):
    root = mapped(tmp_path / "t", by)
    found = plan(root)
    assert found.columns == ("x", "y z", "late")
    expected = deltas.rows_by_deltalake(deltas.opened(root), ["x", "y z", "late"])
    assert deltas.rows_of(found) == expected
    filtered = plan(root, ["x"], where="col('y z') > 1 and late is null and day > '2026-10-31'")
    assert lakes.read_all(filtered)[0].tolist() == [[4]]
    for name in ("gone", "c-1", "nested"):
        with pytest.raises(UserError, match=f"no column '{name}' among 'x', 'y z', 'late'"):
            plan(root, [name])


def test_a_file_without_field_ids_is_refused_where_columns_go_by_them(tmp_path):
    root = mapped(tmp_path / "t", "id", ids=False)
    message = r"sub dir/f\.parquet: the table finds its columns by field ids, and this file has no"
    with pytest.raises(UserError, match=message):
        plan(root)


def test_types_may_have_been_widened(tmp_path):
    root = tmp_path / "t"
    narrow = lakes.write(
        root / "a.parquet",
        {"x": pa.array([1, 2], pa.int32()), "y": pa.array([0.1], pa.float32()).take([0, 0])},
    )
    wide = lakes.write(root / "b.parquet", {"x": [2**40], "y": [0.3]})
    deltas.commit(
        root,
        deltas.protocol("typeWidening"),
        deltas.metadata([deltas.field("x", "long"), deltas.field("y", "double")]),
        deltas.add("a.parquet", narrow),
        deltas.add("b.parquet", wide),
    )
    X = lakes.read_all(plan(root, XY))[0]
    assert X.tolist() == [[1, np.float32(0.1)], [2, np.float32(0.1)], [2**40, 0.3]]


def test_times_without_a_zone_are_those_of_the_table(tmp_path):
    # Spark writes INT96, others say UTC.
    root, day = tmp_path / "t", dt.datetime(2026, 11, 1)
    times = pa.table(
        {"x": [1.0, 2.0], "t": pa.array([day, day + dt.timedelta(1)], pa.timestamp("us"))}
    )
    old = root / "a.parquet"
    root.mkdir()
    pa.parquet.write_table(times, old, use_deprecated_int96_timestamps=True)
    new = lakes.write(
        root / "b.parquet", {"x": [3.0], "t": pa.array([day], pa.timestamp("us", "UTC"))}
    )
    fields = [deltas.field("x", "double"), deltas.field("t", "timestamp")]
    adds = [deltas.add("a.parquet", old), deltas.add("b.parquet", new)]
    start = {"protocol": {"minReaderVersion": 1, "minWriterVersion": 2}}
    deltas.commit(root, start, deltas.metadata(fields), *adds)
    for where in (
        "t < '2026-11-02'",
        pc.field("t") < pa.scalar(day + dt.timedelta(1), pa.timestamp("us", "UTC")),
    ):
        assert lakes.read_all(plan(root, where=where))[0].ravel().tolist() == [1, 3]


@pytest.mark.parametrize("spelling", ["file://", "file:", ""])
def test_files_outside_the_root_are_read(tmp_path, spelling):
    # As of a shallow clone.
    source = deltas.write(tmp_path / "the source é", some(10))
    outside, clone = source / only_file(source), tmp_path / "clone"
    own = lakes.write(clone / "own.parquet", {"x": [1.0], "y": [2.0], "i": [77]})
    facts = [action for action in deltas.actions_of(source, 0) if "metaData" in action]
    path = spelling + outside.as_uri().removeprefix("file://")
    adds = [deltas.add("own.parquet", own), deltas.add(path, outside)]
    deltas.commit(clone, deltas.protocol("deletionVectors"), *facts, *adds)
    found = plan(clone, ["i"])
    assert sorted(lakes.read_all(found)[0].ravel().tolist()) == [*range(10), 77]
    assert [file.path for file in found.files if file.entry.is_outside] == [str(outside)]
    if spelling:  # deltalake looks for a path without it below the root
        deltas.delete_rows(clone, {path: [4, 9]})
        live = [*range(4), *range(5, 9), 77]
        assert sorted(lakes.read_all(plan(clone, ["i"]))[0].ravel().tolist()) == live


def test_a_file_that_a_version_has_twice_is_refused(tmp_path):
    root = deltas.write(tmp_path / "t", some(10))
    path = only_file(root)
    deltas.commit(root, deltas.add((root / path).as_uri(), root / path))
    with pytest.raises(UserError, match=rf"^{root}: the table's log names file:.*{path} twice"):
        plan(root)


def test_holdout_weights_and_filters_go_by_live_rows(tmp_path):
    columns = {**some(2000), "w": np.tile([1.0, 2.0, 0.0, 3.0], 500)}
    root = by_hand(tmp_path / "t", {"a.parquet": pa.table(columns)}, rows_per_group=300)
    options = {"columns": ["i"], "weight_column": "w", "holdout": 0.3}
    held = lakes.held_out(plan(root, **options))
    dead = set(range(0, 2000, 3))
    deltas.delete_rows(root, {"a.parquet": dead})
    found = plan(root, **options, where="i < 1400")
    live = [i for i in range(1400) if i not in dead and columns["w"][i] > 0]
    X, weight, counts = lakes.read_all(found)
    assert X.ravel().tolist() == live
    assert weight.tolist() == columns["w"][live].tolist()
    # A row that is held out stays so, whatever other rows are deleted.
    assert lakes.held_out(found) == held & set(live)
    # The last two row groups are left out.
    assert counts.read == sum(i not in dead for i in range(1500)) == found.n_rows
    assert counts.filtered == sum(i not in dead for i in range(1400, 1500))


def test_row_groups_are_left_out_by_their_statistics(tmp_path):
    root = by_hand(tmp_path / "t", {"a.parquet": pa.table(some(100))}, rows_per_group=10)
    deltas.delete_rows(root, {"a.parquet": [*range(10, 20), 25]})
    assert plan(root, ["i"], where="i >= 18 and i < 33").n_rows == 19
    with pytest.raises(UserError, match="no rows match the filter"):
        plan(root, ["i"], where="i >= 10 and i < 20")


WHEN = dt.datetime(2026, 11, 1, 12, 30, 0, 999_999)


@pytest.mark.parametrize(
    ("where", "files", "rows"),
    [
        ("n < 10", 1, 10),
        ("n == 9 or n in (20, 99)", 2, 2),
        ("not n < 20 and x is not null", 1, 10),
        ("day > '2026-11-02' and kind == 'a'", 1, 10),
        ("day > '2026-11-02' or kind == 'a'", 3, 30),
        ("t >= '2026-11-01T12:30:00.999999'", 3, 21),
        ("t > '2026-11-01T12:30:00.9999995'", 2, 20),
        ("n is null", 3, 0),
        (pc.field("n") < 10, 3, 10),
    ],
)
def test_files_are_left_out_by_the_statistics_of_the_log(tmp_path, where, files, rows):
    root = tmp_path / "t"
    for i in range(3):
        times = [WHEN + dt.timedelta(days=i) - dt.timedelta(seconds=9 - j) for j in range(10)]
        columns = {
            "x": lakes.numbers(10, i),
            "n": np.arange(10 * i, 10 * i + 10),
            "day": [WHEN.date() + dt.timedelta(days=i)] * 10,
            "t": pa.array(times, pa.timestamp("us", "UTC")),
            "kind": ["a"] * 10,
        }
        deltas.write(root, columns, partition_by=["kind"])
    if rows == 0:
        with pytest.raises(
            UserError, match="no rows match the filter n is null, by the row groups"
        ):
            plan(root, ["x"], where=where)
        return
    found = plan(root, ["x"], where=where)
    assert len(found.files) == files
    assert len(lakes.read_all(found)[0]) == rows
    with pytest.raises(
        UserError, match=r"no rows match the filter .*, by the statistics of 3 files"
    ):
        plan(root, ["x"], where="n > 99")


def test_mapped_columns_have_statistics(tmp_path):
    root = mapped(tmp_path / "t", "name")
    stats = {"numRecords": 3, "minValues": {"c-7": 5}, "maxValues": {"c-7": 7}}
    fields = [
        deltas.field(
            "n", "long", **{"delta.columnMapping.physicalName": "c-7", "delta.columnMapping.id": 7}
        )
    ]
    file = lakes.write(root / "g.parquet", {"c-7": [5, 6, 7]})
    settings = {"delta_columnMapping_mode": "name", "delta_columnMapping_maxColumnId": "7"}
    (old,) = (action["add"] for action in deltas.actions_of(root, 1) if "add" in action)
    kept = {name: old[name] for name in ("path", "size", "deletionVector")}
    remove = {"remove": kept | {"dataChange": True}}
    added = deltas.add("g.parquet", file, stats=json.dumps(stats))
    deltas.commit(root, remove, deltas.metadata(fields, **settings), added)
    assert lakes.read_all(plan(root, ["n"], where="n == 6"))[0].ravel().tolist() == [6]
    with pytest.raises(UserError, match="no rows match the filter n == 8, by the statistics of "):
        plan(root, ["n"], where="n == 8")


@pytest.mark.parametrize("deleted", [False, True])
def test_a_table_on_s3_has_the_same_rows(tmp_path, s3_lake, deleted):
    root = deltas.write(
        tmp_path / "t", {**some(50), "kind": ["a b", "é/%"] * 25}, partition_by=["kind"]
    )
    if deleted:
        paths = pa.table(deltas.opened(root).get_add_actions())["path"].to_pylist()
        deltas.delete_rows(root, {paths[0]: [3], paths[1]: range(20)})
    url = lakes.upload(root, s3_lake.file_system(), f"{s3_lake.url}/a-table")
    here, there = plan(root, XY, where="kind == 'é/%'"), plan(url, XY, where="kind == 'é/%'")
    assert here.snapshot == there.snapshot
    assert [file.path for file in here.files] == [file.path for file in there.files]
    np.testing.assert_array_equal(lakes.read_all(here)[0], lakes.read_all(there)[0])
    np.testing.assert_array_equal(probe.probe(here), probe.probe(there))
    assert deltas.rows_of(plan(url, XY)) == deltas.rows_by_deltalake(deltas.opened(root), XY)

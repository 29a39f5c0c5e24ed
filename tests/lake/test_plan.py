"""The plan: rows dealt to shards, a value, filtered by statistics; real Parquet files."""

from __future__ import annotations

import datetime as dt
import hashlib
import math
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lakes
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gmm_dist
from gmm_dist.errors import NoRows, UserError
from gmm_dist.lake import listing, stream
from gmm_dist.lake.deal import RowRange, deal
from gmm_dist.lake.plan import Plan, _row_hashes, plan_lake
from gmm_dist.lake.probe import probe
from gmm_dist.lake.read import RowCounts

NAN = float("nan")


@pytest.fixture
def two_files(tmp_path):
    return lakes.numbered(tmp_path)


# --- sharding


@given(
    groups=st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=4),
    n_shards=st.integers(1, 40),
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_number_of_shards_reads_the_rows_that_arrow_reads(tmp_path, groups, n_shards):
    shutil.rmtree(tmp_path / "lake", ignore_errors=True)
    first = 0
    for number, sizes in enumerate([[3], *groups]):
        path = tmp_path / "lake" / f"{number}.parquet"
        path.parent.mkdir(exist_ok=True)
        schema = pa.schema([("x", pa.float64()), ("y", pa.float32()), ("w", pa.int32())])
        with lakes.pq.ParquetWriter(path, schema) as writer:
            for size in sizes:
                i = np.arange(first, first + size)
                first += size
                table = pa.table({"x": i / 3, "y": i * 2.0, "w": i + 1}).cast(schema)
                writer.write_table(table, row_group_size=max(size, 1))
    plan = plan_lake(str(tmp_path / "lake"), weight_column="w", n_shards=n_shards)
    X, weight, counts = lakes.read_all(plan)
    table = ds.dataset(tmp_path / "lake").to_table()
    np.testing.assert_array_equal(X, np.stack([table["x"], table["y"]], axis=1))
    np.testing.assert_array_equal(weight, table["w"])
    assert counts == RowCounts(read=first)
    assert plan.n_rows == first
    sizes = [sum(part.stop - part.start for part in shard) for shard in plan.shards]
    assert len(sizes) == n_shards
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("n_rows", "expected"),
    [
        (1, 1),
        (32_767, 1),
        (32_768, 2),
        (65_535, 2),
        (64 * 16_384 - 1, 32),
        (64 * 16_384, 64),
        (64 * 2**20, 64),
        (64 * 2**20 + 1, 128),
        (2**30, 1024),
        (2**34, 1024),
    ],
)
def test_the_number_of_shards_depends_on_the_rows_alone(n_rows, expected):
    assert len(deal([RowRange(file=0, row_group=0, start=0, stop=n_rows)], None)) == expected


def test_a_shard_may_begin_and_end_within_a_row_group(two_files):
    plan = plan_lake(str(two_files), n_shards=8)
    assert plan.shards[1] == (
        RowRange(file=0, row_group=0, start=6, stop=7),
        RowRange(file=0, row_group=1, start=0, stop=5),
    )
    assert [len(shard) for shard in plan_lake(str(two_files), n_shards=60).shards].count(0) == 10


def test_no_shards_is_refused(two_files):
    with pytest.raises(UserError, match="0 shards; at least one is needed"):
        plan_lake(str(two_files), n_shards=0)


def test_no_rows_at_all_is_an_error(tmp_path):
    for name in ("a", "b"):
        lakes.write(tmp_path / f"{name}.parquet", {"x": pa.array([], pa.float64())})
    with pytest.raises(UserError, match=f"{tmp_path}: no rows in 2 Parquet files; check the path"):
        plan_lake(str(tmp_path))


def test_the_spread_of_shard_sizes_over_many_keys(tmp_path, s3_lake):
    for i in range(40):
        lakes.write(tmp_path / f"{i:02}.parquet", {"x": lakes.numbers(11, seed=i)})
    plan = plan_lake(lakes.upload(tmp_path, s3_lake.file_system(), s3_lake.url), n_shards=7)
    assert {sum(p.stop - p.start for p in shard) for shard in plan.shards} == {
        math.floor(440 / 7),
        math.ceil(440 / 7),
    }


# --- the plan is a value


def test_the_plan_is_a_small_value_that_travels(two_files):
    plan = plan_lake(str(two_files), where="i >= 3 and dt <= '2026-11-02'", weight_column="i")
    again = plan_lake(str(two_files), where="dt <= '2026-11-02' and i >= 3", weight_column="i")
    assert plan == again
    assert len(plan.hash) == 64
    travelled = pickle.loads(pickle.dumps(plan))
    assert travelled == plan
    np.testing.assert_array_equal(lakes.read_all(travelled)[0], lakes.read_all(plan)[0])
    assert len(pickle.dumps(plan)) < 3000


def test_the_hash_is_the_same_in_another_process_and_by_another_spelling(two_files):
    plan = plan_lake(str(two_files))
    code = "from gmm_dist.lake.plan import plan_lake; print(plan_lake('./').hash)"
    environment = os.environ | {
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": str(Path(gmm_dist.__file__).parents[1]),
    }
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=two_files,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == plan.hash
    assert plan_lake(f"file://{two_files}").hash == plan.hash


@pytest.mark.parametrize(
    "options",
    [
        {"columns": ["x"]},
        {"columns": ["y", "x"]},
        {"weight_column": "i"},
        {"where": "i > 3"},
        {"missing": "drop"},
        {"n_shards": 3},
        {"holdout": 0.1},
    ],
)
def test_the_hash_changes_with_every_setting(two_files, options):
    assert plan_lake(str(two_files), **options).hash != plan_lake(str(two_files)).hash


def test_the_hash_changes_with_a_file(two_files):
    before = plan_lake(str(two_files)).hash
    path = two_files / "dt=2026-11-01" / "a.parquet"
    os.utime(path, ns=(1, 1))
    assert plan_lake(str(two_files)).hash != before


def test_a_lake_on_s3_gives_the_same_shards_and_rows(two_files, s3_lake):
    url = lakes.upload(two_files, s3_lake.file_system(), s3_lake.url)
    local = plan_lake(str(two_files), where="i != 3", n_shards=5)
    remote = plan_lake(url, where="i != 3", n_shards=5)
    assert remote.shards == local.shards
    assert remote.schema == local.schema
    assert [f.path for f in remote.files] == [f.path for f in local.files]
    assert plan_lake(f"{url}/", where="i != 3", n_shards=5) == remote
    np.testing.assert_array_equal(lakes.read_all(remote)[0], lakes.read_all(local)[0])
    np.testing.assert_array_equal(probe(remote), probe(local))


# --- files without rows


@pytest.mark.parametrize("where", [None, "i >= 0", "dt >= '2026-11-01' and i < 99"])
@pytest.mark.parametrize(
    "empty",
    [
        pa.table({}),
        pa.table({"other": pa.array([], pa.string())}),
        pa.table({"x": pa.array([], pa.string()), "y": [], "i": pa.array([], pa.date32())}),
    ],
    ids=["without columns", "with others", "of other types"],
)
def test_a_file_without_rows_does_not_block_a_lake(two_files, empty, where):
    whole = lakes.read_all(plan_lake(str(two_files)))[0]
    lakes.write(two_files / "dt=2026-11-01" / "0.parquet", empty)  # the first, too
    lakes.write(two_files / "dt=2026-11-03" / "a.parquet", empty)
    plan = plan_lake(str(two_files), where=where, keep=["i"], missing="mean")
    np.testing.assert_array_equal(lakes.read_all(plan)[0], whole)
    assert [sum(file.rows) for file in plan.files] == [0, 25, 25, 0]
    groups = stream.row_groups(plan)
    streamed = [sum(X.shape[1] for _, X in stream.stream(plan, i, groups[i])) for i in range(4)]
    assert streamed == [0, 25, 25, 0]


def test_a_lake_without_rows_is_said(tmp_path):
    for table in (pa.table({"x": pa.array([], pa.float64())}), pa.table({})):
        lakes.write(tmp_path / "dt=1" / "a.parquet", table)
        for where in (None, "dt == 1", "x > 0"):
            with pytest.raises(NoRows, match="no rows in 1 Parquet file; check the path"):
                plan_lake(str(tmp_path), where=where)


# --- the filter


@pytest.mark.parametrize(
    ("where", "files", "rows", "kept"),
    [
        ("dt == '2026-11-02'", 1, 25, range(25, 50)),
        ("dt > '2026-11-01' and i < 30", 1, 7, range(25, 30)),
        ("10 <= i < 12", 2, 7, range(10, 12)),
        ("x == 15 and y > 0.5", 2, 7, range(10, 11)),
        ("i != 3", 2, 50, [i for i in range(50) if i != 3]),
        ("dt != 'x'", 2, 50, range(50)),
    ],
)
def test_a_filter_leaves_out_files_row_groups_and_rows(two_files, where, files, rows, kept):
    plan = plan_lake(str(two_files), columns=["i"], where=where, n_shards=3)
    X, _, counts = lakes.read_all(plan)
    assert (len(plan.files), plan.n_rows) == (files, rows)
    assert X[:, 0].tolist() == list(kept)
    assert counts == RowCounts(read=rows, filtered=rows - len(kept))


def test_a_filter_on_dates_and_nulls(tmp_path):
    days = [dt.date(2026, 11, day) for day in (1, 2)]
    columns = {"x": lakes.numbers(4), "day": [*days, None, days[1]], "v": [1.0, NAN, 1.0, None]}
    path = str(lakes.write(tmp_path / "a.parquet", columns))
    kept = lakes.read_all(plan_lake(path, columns=["x"], where="day >= '2026-11-02'"))[0]
    assert kept[:, 0].tolist() == lakes.numbers(4)[[1, 3]].tolist()
    kept = lakes.read_all(plan_lake(path, columns=["x"], where="v != 5"))[0]
    assert kept[:, 0].tolist() == lakes.numbers(4)[[0, 2]].tolist()


def test_a_null_hive_key_and_a_column_that_a_file_lacks_do_not_match(tmp_path):
    lakes.write(tmp_path / "k=__HIVE_DEFAULT_PARTITION__" / "a.parquet", {"x": [1.0]})
    lakes.write(tmp_path / "k=2" / "a.parquet", {"x": [2.0]})
    lakes.write(tmp_path / "k=2" / "b.parquet", {"x": [3.0], "added": [3]})
    assert lakes.read_all(plan_lake(str(tmp_path), where="k != 1"))[0].tolist() == [[2.0], [3.0]]
    assert lakes.read_all(plan_lake(str(tmp_path), where="added != 1"))[0].tolist() == [[3.0]]


@pytest.mark.parametrize(
    ("where", "match"), [("v > 1", 7), ("v == 'a'", "a"), ("v != 1 and x > 0", 7)]
)
def test_a_column_of_nothing_but_null_matches_nothing(tmp_path, where, match):
    lakes.write(tmp_path / "a.parquet", {"x": lakes.numbers(9), "v": pa.nulls(9)})
    with pytest.raises(UserError, match=r"no rows match the filter .*, by the row groups' stat"):
        plan_lake(str(tmp_path), where=where)
    lakes.write(tmp_path / "b.parquet", {"x": [5.0], "v": [match]})
    assert lakes.read_all(plan_lake(str(tmp_path), where=where))[0].tolist() == [[5.0]]


def test_a_hive_key_of_nothing_but_null_matches_nothing(tmp_path):
    lakes.write(tmp_path / "k=__HIVE_DEFAULT_PARTITION__" / "a.parquet", {"x": [1.0]})
    for where in ("k == 1", "k != 'a'"):
        with pytest.raises(UserError, match=r"no rows match the filter .*, by any of 1 files' hi"):
            plan_lake(str(tmp_path), where=where)


def test_a_filter_compares_in_the_type_of_all_files(tmp_path):
    lakes.write(
        tmp_path / "a.parquet", {"x": lakes.numbers(3), "n": pa.array([1, 2, 3], pa.int8())}
    )
    lakes.write(tmp_path / "b.parquet", {"x": lakes.numbers(3), "n": [1, 2, 300]})
    plan = plan_lake(str(tmp_path), columns=["n"], where="n >= 3")
    assert lakes.read_all(plan)[0].tolist() == [[3], [300]]


def test_the_path_decides_on_a_column_that_is_also_a_hive_key(tmp_path):
    lakes.write(tmp_path / "k=1" / "a.parquet", {"x": [1.0], "k": pa.array([7], pa.int32())})
    assert plan_lake(str(tmp_path), where="k == 1").n_rows == 1


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("dt == '1999-01-01'", "no rows match the filter dt == '1999-01-01', by any of 2 files'"),
        ("i > 999", "no rows match the filter i > 999, by the row groups' statistics; widen"),
        ("i = 3", "equality is written '==', not '='"),
    ],
)
def test_a_filter_that_nothing_passes_is_an_error(two_files, where, message):
    with pytest.raises(UserError, match=message):
        plan_lake(str(two_files), where=where)


# --- held-out rows


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, NAN])
def test_a_share_that_is_none_is_refused(two_files, share):
    with pytest.raises(UserError, match=f"holdout is {share:g}: give a share of the rows, 0 <="):
        plan_lake(str(two_files), holdout=share)


def splitmix64(seed, n):
    """Return the first n numbers of SplitMix64, one by one."""
    state, numbers = seed, []
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        numbers.append(z ^ (z >> 31))
    return numbers


def test_rows_are_drawn_by_splitmix64_seeded_by_the_path():
    # The first numbers of the generator's page on Rosetta Code.
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]
    seed = int.from_bytes(hashlib.sha256(b"dt=1/a.parquet").digest()[:8], "little")
    expected = splitmix64(seed, 300)
    assert _row_hashes("dt=1/a.parquet", 0, 300).tolist() == expected
    assert _row_hashes("dt=1/a.parquet", 17, 212).tolist() == expected[17:212]


def test_plans_without_held_out_rows_keep_their_hash():
    file = listing.LakeFile(path="a.parquet", size=10, version="v1", rows=(5,), partition=())
    shards = ((RowRange(file=0, row_group=0, start=0, stop=5),),)
    plan = Plan(
        url="/lake",
        files=(file,),
        schema=pa.schema([]),
        columns=("x",),
        feature_names=("x",),
        weight_column=None,
        where=None,
        missing="error",
        shards=shards,
        float64_source=False,
    )
    # As computed by the version before there was a holdout.
    assert plan.hash == "bf596b7d507356ea2348ce8d5e9f02b556eea55fc3e1035184efd359472295e4"
    assert replace(plan, holdout=0.1).hash != replace(plan, holdout=0.2).hash != plan.hash


def test_the_share_is_of_every_file_and_no_file_like_another(tmp_path):
    n = 20_000
    for name in "ab":
        lakes.write(tmp_path / f"{name}.parquet", {"x": np.arange(float(n))}, rows_per_group=3000)
    held = {
        name: lakes.held_out(plan_lake(str(tmp_path / name), holdout=0.1))
        for name in ("a.parquet", "b.parquet")
    }
    for rows in held.values():
        # Five standard deviations of a binomial count.
        assert abs(len(rows) - 0.1 * n) < 5 * math.sqrt(0.09 * n)
    both = len(held["a.parquet"] & held["b.parquet"])
    assert abs(both - 0.01 * n) < 5 * math.sqrt(0.01 * n)


def test_a_larger_share_holds_the_rows_of_a_smaller_one(two_files):
    small, large = (lakes.held_out(plan_lake(str(two_files), holdout=f)) for f in (0.2, 0.6))
    assert small < large


def test_the_same_rows_are_held_out_whatever_else_is_asked_for(two_files, tmp_path):
    def held(url=two_files, **options):
        plan = plan_lake(str(url), columns=["i"], holdout=0.3, **options)
        return lakes.held_out(plan)

    rows = held()
    assert 5 < len(rows) < 25
    for n_shards in (1, 3, 50):
        assert held(n_shards=n_shards) == rows
    # The filters leave out row groups, rows within them, and files.
    assert held(where="i >= 10") == {i for i in rows if i >= 10}
    assert held(where="i >= 5 and i < 33", n_shards=4) == {i for i in rows if 5 <= i < 33}
    assert held(where="dt == '2026-11-02'") == {i for i in rows if i >= 25}
    lakes.write(two_files / "dt=2026-10-31" / "a.parquet", {"x": [1.0], "i": [-1]})
    assert held(where="i >= 0") == rows


def test_row_groups_do_not_decide_which_rows_are_held_out(two_files):
    rows = lakes.held_out(plan_lake(str(two_files), columns=["i"], holdout=0.3))
    for path in two_files.rglob("*.parquet"):
        lakes.write(path, lakes.pq.ParquetFile(path).read(), rows_per_group=11)
    assert lakes.held_out(plan_lake(str(two_files), columns=["i"], holdout=0.3)) == rows

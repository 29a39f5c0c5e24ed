"""Rows come in batches, all of them, in order, whatever the file and the network are like."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import lakes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import S3Server, forget_connections
from faulty import proxy

from gmm_dist.errors import UserError
from gmm_dist.lake import stream as streaming
from gmm_dist.lake.plan import Plan, plan_lake
from gmm_dist.lake.stream import row_groups, stream

N = 1000


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BATCH_ROWS", 64)


def plan_of(url: object, **options) -> Plan:
    return plan_lake(str(url), missing="mean", **{"columns": ["x", "y"], **options})


def rows_of(plan: Plan, index: int = 0) -> tuple[pa.Table, np.ndarray, list[int]]:
    """Return a file's kept columns, its features (d, n), and the rows of each batch."""
    parts = list(stream(plan, index, row_groups(plan)[index]))
    X = np.concatenate([X for _, X in parts], axis=1)
    return pa.concat_tables([kept for kept, _ in parts]), X, [X.shape[1] for _, X in parts]


def columns(n: int = N) -> dict[str, object]:
    y = lakes.numbers(n, 1)
    y[5] = np.nan
    return {"x": lakes.numbers(n), "y": y, "id": np.arange(n), "name": [f"r{i}" for i in range(n)]}


@pytest.mark.parametrize("rows_per_group", [None, 150, 64])
@pytest.mark.parametrize("whole_bytes", [1 << 27, 0], ids=["fetched", "buffered"])
def test_all_rows_come_in_order_a_batch_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_group: int, whole_bytes: int
) -> None:
    monkeypatch.setattr(streaming, "_WHOLE_BYTES", whole_bytes)
    lakes.write(tmp_path / "a.parquet", columns(), rows_per_group=rows_per_group)
    kept, X, sizes = rows_of(plan_of(tmp_path, keep=["name", "id"]))
    assert max(sizes) <= 64
    assert kept.to_pydict() == {"name": columns()["name"], "id": list(range(N))}
    np.testing.assert_array_equal(X, [columns()["x"], columns()["y"]])


def test_the_filter_leaves_out_row_groups_and_rows(tmp_path: Path) -> None:
    lakes.write(tmp_path / "a.parquet", columns(), rows_per_group=100)
    plan = plan_of(tmp_path, keep=["id"], where="id >= 250 and id < 430")
    assert row_groups(plan) == ((2, 3, 4),)
    kept, X, _ = rows_of(plan)
    assert kept["id"].to_pylist() == list(range(250, 430))
    np.testing.assert_array_equal(X[0], columns()["x"][250:430])


def test_without_kept_columns_rows_are_still_counted(tmp_path: Path) -> None:
    lakes.write(tmp_path / "a.parquet", columns())
    _, X, _ = rows_of(plan_of(tmp_path))
    assert X.shape == (2, N)


def test_a_kept_column_that_was_added_later_is_null_before(tmp_path: Path) -> None:
    old = {name: columns()[name] for name in ("x", "y")}
    lakes.write(tmp_path / "a.parquet", old)
    lakes.write(tmp_path / "b.parquet", columns() | {"id": pa.array(range(N), pa.int32())})
    plan = plan_of(tmp_path, keep=["id"])
    kept, _, _ = rows_of(plan, 0)
    assert kept["id"].null_count == N
    assert kept.schema == rows_of(plan, 1)[0].schema == pa.schema([("id", pa.int32())])


def test_embeddings_and_their_features_by_name(tmp_path: Path) -> None:
    X = lakes.numbers(3 * N).reshape(N, 3)
    lakes.write(tmp_path / "a.parquet", {"e": lakes.embeddings(X), "e[0]x": X[:, 0]})
    names = ["e[0]", "e[1]", "e[2]"]
    plan = plan_of(tmp_path, columns=names)
    assert (plan.columns, plan.feature_names) == (("e",), tuple(names))
    np.testing.assert_array_equal(rows_of(plan)[1], X.T)
    with pytest.raises(UserError, match=r"no column 'e\[0\]' among 'e', 'e\[0\]x'"):
        plan_of(tmp_path, columns=names[:2])


def test_columns_that_are_called_like_elements_are_columns(tmp_path: Path) -> None:
    lakes.write(tmp_path / "a.parquet", {"e[0]": [1.0, 2.0], "e[1]": [3.0, 4.0]})
    plan = plan_of(tmp_path, columns=["e[0]", "e[1]"])
    np.testing.assert_array_equal(rows_of(plan)[1], [[1, 2], [3, 4]])


def test_an_infinite_value_is_named_by_its_row(tmp_path: Path) -> None:
    x = lakes.numbers(N)
    x[777] = -np.inf
    lakes.write(tmp_path / "a.parquet", columns() | {"x": x}, rows_per_group=500)
    with pytest.raises(UserError, match=r"a.parquet, row group 1, row 277: column 'x' is -inf"):
        rows_of(plan_of(tmp_path))


def test_batches_of_wide_rows_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BATCH_ROWS", 1 << 16)
    n, d = 20_000, 512
    X = pa.array(np.zeros(n * d, np.float32))
    text = [f"{i:2000}" for i in range(n)]
    columns = {"e": pa.FixedSizeListArray.from_arrays(X, d), "x": lakes.numbers(n), "text": text}
    lakes.write(tmp_path / "a.parquet", columns)

    def batches(beside: int = 0, **options: object) -> list[int]:
        plan, before = plan_of(tmp_path, **options), pa.total_allocated_bytes()
        parts = stream(plan, 0, row_groups(plan)[0], beside=beside)
        sizes, most = [], 0
        for kept, X in parts:
            sizes.append(X.shape[1])
            assert X.nbytes + kept.nbytes <= 1.1 * streaming.BATCH_BYTES
            most = max(most, pa.total_allocated_bytes() - before)
        assert most < 4 * streaming.BATCH_BYTES + (1 << 20)
        assert sum(sizes) == n
        return sizes

    assert batches(columns=["e"]) == [8192, 8192, 3616]
    assert 10_000 < batches(columns=["x"], keep=["text"])[0] < 17_000
    assert batches(columns=["x"]) == [n]
    assert batches(columns=["x"], beside=8 * 10_000)[0] == 1024


def test_a_column_with_a_dot_is_counted_as_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "BATCH_BYTES", 1 << 18)
    monkeypatch.setattr(streaming, "BATCH_ROWS", 1 << 16)
    n = 10_000
    text = [f"{i:200}" for i in range(n)]
    table = {"x": lakes.numbers(n), "a.b": text, "s": [{"t": name} for name in text]}
    lakes.write(tmp_path / "a.parquet", table)
    for name in ("a.b", "s"):  # their values are all different
        kept, _, sizes = rows_of(plan_of(tmp_path, columns=["x"], keep=[name]))
        assert max(sizes) < 1300
        assert kept[name].to_pylist() == table[name]


def test_what_a_dictionary_stores_once_counts_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "BATCH_BYTES", 1 << 18)
    monkeypatch.setattr(streaming, "BATCH_ROWS", 1 << 16)
    n = 10_000
    flags = {f"flag{i}": np.arange(n) % 2 for i in range(15)}
    table = {"x": lakes.numbers(n), "text": [f"{i % 3:120}" for i in range(n)], **flags}
    lakes.write(tmp_path / "a.parquet", table)
    for keep in (["text"], list(flags)):
        _, _, sizes = rows_of(plan_of(tmp_path, columns=["x"], keep=keep))
        assert sizes[0] == (1 << 18) // 128


@pytest.mark.parametrize("n", [N - 1, N + 1])
def test_rows_that_are_not_as_many_as_planned_are_an_error(tmp_path: Path, n: int) -> None:
    lakes.write(tmp_path / "a.parquet", columns())
    plan = plan_of(tmp_path, where="id >= 500")
    lying = replace(plan, files=(replace(plan.files[0], rows=(n,)),))
    with pytest.raises(UserError, match=rf"a.parquet, row group 0: 1,000 rows where .* has {n:,}"):
        rows_of(lying)


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    lakes.write(tmp_path / "a.parquet", columns())
    plan = plan_of(tmp_path)
    lakes.write(tmp_path / "a.parquet", columns(N + 1))
    with pytest.raises(UserError, match=r"a.parquet: changed since the plan was made; run again"):
        rows_of(plan)


def test_kept_columns_must_be_known(tmp_path: Path) -> None:
    lakes.write(tmp_path / "ds=1" / "a.parquet", columns())
    with pytest.raises(UserError, match=r"keep 'nam' is no column among 'x', 'y', 'id', 'name'"):
        plan_of(tmp_path, keep=["nam"])
    assert plan_of(tmp_path, keep=["id", "ds"]).kept == ("id",)


def test_a_plan_that_keeps_nothing_has_the_hash_that_it_always_had(tmp_path: Path) -> None:
    lakes.write(tmp_path / "a.parquet", columns())
    assert plan_of(tmp_path).hash == plan_of(tmp_path, keep=[]).hash
    assert plan_of(tmp_path).hash != plan_of(tmp_path, keep=["id"]).hash


@pytest.mark.faults
def test_reading_goes_on_in_the_row_group_where_an_outage_began(
    tmp_path: Path,
    s3_lake: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(streaming, "_WHOLE_BYTES", 0)
    monkeypatch.setattr(streaming, "_BUFFER_BYTES", 4096)
    pages = {"use_dictionary": False, "data_page_size": 2048, "write_batch_size": 64}
    pq.write_table(pa.table(columns(20_000)), tmp_path / "a.parquet", **pages)
    lakes.upload(tmp_path, s3_lake.file_system(), s3_lake.url)
    with proxy(s3_lake.endpoint) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.endpoint)
        forget_connections()
        monkeypatch.setattr("gmm_dist.lake.opening._SMALL_BYTES", 0)
        plan = plan_of(s3_lake.url, keep=["id"])
        parts = []
        for i, (kept, _) in enumerate(stream(plan, 0, row_groups(plan)[0])):
            parts.append(kept)
            if i == 100:
                between.refuse()
                threading.Timer(10, between.listen).start()
        forget_connections()
    assert "a.parquet: the storage fails for" in caplog.text
    assert pa.concat_tables(parts)["id"].to_pylist() == list(range(20_000))

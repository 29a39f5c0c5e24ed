"""Old timestamps, checksums and footers that lie, wherever rows are read."""

from __future__ import annotations

import base64
import datetime as dt
import io

import lakes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as encryption
import pytest

from gmm_dist.errors import UserError
from gmm_dist.lake import read as reading
from gmm_dist.lake import stream
from gmm_dist.lake.plan import plan_lake
from gmm_dist.lake.probe import probe

DAYS = [
    dt.datetime(1, 1, 1),
    dt.datetime(1600, 2, 29, 12),
    dt.datetime(2026, 1, 1),
    None,
    dt.datetime(2262, 4, 12),
    dt.datetime(9999, 12, 31, 23, 59, 59, 999999),
]


@pytest.fixture(autouse=True)
def nothing_cached():
    reading.release()


def streamed(url, **options):
    plan = plan_lake(str(url), missing="mean", **options)
    groups = stream.row_groups(plan)
    parts = [part for i in range(len(plan.files)) for part in stream.stream(plan, i, groups[i])]
    return pa.concat_tables([kept for kept, _ in parts]), np.concatenate([X for _, X in parts], 1)


# --- INT96


@pytest.fixture(params=["int96", "int64"])
def dated(request, tmp_path):
    """A file of timestamps far and near; plain ones are the reference."""
    table = pa.table({"x": np.arange(6.0), "until": pa.array(DAYS, pa.timestamp("us"))})
    options = {"use_deprecated_int96_timestamps": request.param == "int96", "store_schema": False}
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2, **options)
    return tmp_path


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("until >= '2026-06-01'", [4, 5]),
        ("until < '1677-01-01'", [0, 1]),
        ("until == '9999-12-31 23:59:59.999999'", [5]),
        ("until != '2026-01-01'", [0, 1, 4, 5]),
        ("until > '2262-04-11' and until < '2263-01-01'", [4]),
    ],
)
def test_far_timestamps_are_compared_as_they_are(dated, where, kept):
    X, _, _ = lakes.read_all(plan_lake(str(dated), columns=["x"], where=where))
    assert X.ravel().tolist() == kept
    assert streamed(dated, columns=["x"], where=where)[1].ravel().tolist() == kept


@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("until >= '2026-06-01'", [4, 5, 6]),
        ("until < '2026-01-01 00:00:00.000000001'", [0, 1, 2]),
        ("until == '2262-01-01 00:00:00.000000001'", [6]),
        ("until > '9999-12-31 23:59:59.999998999'", [5]),
    ],
)
def test_far_timestamps_beside_a_file_of_nanoseconds(dated, order, where, kept):
    (dated / "a.parquet").rename(dated / f"{order[0]}.parquet")
    near = np.array(["2262-01-01T00:00:00.000000001"], "datetime64[ns]")
    lakes.write(dated / f"{order[1]}.parquet", {"x": [6.0], "until": near})
    X, _, _ = lakes.read_all(plan_lake(str(dated), columns=["x"], where=where))
    assert sorted(X.ravel()) == kept
    assert sorted(streamed(dated, columns=["x"], where=where)[1].ravel()) == kept


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"where": "until > '2026-01-01'"}, True),
        ({"keep": ["until"]}, True),
        ({"where": "x > 1"}, False),
    ],
)
def test_that_int96_is_read_to_the_microsecond_is_said(dated, request, caplog, options, told):
    with caplog.at_level("INFO", "gmm_dist.lake.survey"):
        plan_lake(str(dated), columns=["x"], **options)
    line = "INT96 timestamps are compared and kept to the microsecond, finer digits cut off: until"
    is_int96 = request.node.callspec.params["dated"] == "int96"
    assert (line in caplog.messages) is (told and is_int96)


def test_far_timestamps_are_kept_as_they_are(dated):
    kept, _ = streamed(dated, columns=["x"], keep=["until"])
    assert kept["until"].to_pylist() == DAYS
    assert kept.schema.field("until").type == pa.timestamp("us")


# --- checksums of pages


def test_a_page_with_a_wrong_checksum_is_named(tmp_path):
    x = lakes.numbers(10_000)
    buffer = io.BytesIO()
    plain = {"compression": "NONE", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(pa.table({"x": x, "i": np.arange(10_000)}), buffer, **plain)
    data = bytearray(buffer.getvalue())
    data[5000:5100] = bytes(100)
    path = tmp_path / "a.parquet"
    path.write_bytes(data)
    message = f"{path}: cannot be read as Parquet .*checksum.*; write the file again or move it"
    for read in (
        lambda: lakes.read_all(plan_lake(str(path), columns=["x"])),
        lambda: probe(plan_lake(str(path), columns=["x"])),
        lambda: streamed(path, columns=["x"]),
        lambda: streamed(path, columns=["i"], keep=["x"]),
    ):
        with pytest.raises(UserError, match=message):
            read()
    assert len(lakes.read_all(plan_lake(str(path), columns=["i"]))[0]) == 10_000


# --- rows that the footer promises


# The places where a footer of one column has the number of rows, in their order.
OF_FILE, OF_COLUMN, OF_GROUP = range(3)


def promising(path, rows: int, promised: int, *places: int):
    """Write `rows` rows under a footer that has `promised` of them in some places.

    Thrift writes a number as zigzag varint, so that both take two bytes.
    """
    schema = pa.schema([pa.field("x", pa.float64(), nullable=False)])
    table = pa.table({"x": lakes.numbers(rows)}, schema=schema)
    plain = {"compression": "NONE", "use_dictionary": False, "write_statistics": False}
    buffer = io.BytesIO()
    pq.write_table(table, buffer, store_schema=False, **plain)
    data = buffer.getvalue()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    was, now = (bytes([2 * n & 0x7F | 0x80, 2 * n >> 7]) for n in (rows, promised))
    body, footer = data[:start], data[start:]
    parts = footer.split(was)
    assert len(parts) == 4
    told = [now if place in places else was for place in range(3)]
    path.write_bytes(body + parts[0] + b"".join(map(bytes.__add__, told, parts[1:])))
    return path


@pytest.mark.parametrize("n_shards", [1, 3])
def test_a_row_group_with_fewer_rows_than_promised_is_named(tmp_path, n_shards):
    lakes.write(tmp_path / "a.parquet", {"x": [1.0]})
    path = promising(tmp_path / "b.parquet", 900, 1000, OF_FILE, OF_COLUMN, OF_GROUP)
    message = f"{path}, row group 0: 900 rows where the footer has 1,000; write the file again"
    with pytest.raises(UserError, match=message):
        lakes.read_all(plan_lake(str(tmp_path), n_shards=n_shards))
    with pytest.raises(UserError, match=message):
        streamed(tmp_path)


def test_a_footer_that_contradicts_itself_is_named(tmp_path):
    path = promising(tmp_path / "b.parquet", 900, 1000, OF_FILE)
    message = f"{path}: the footer promises 1,000 rows, its row groups 900; write the file again"
    with pytest.raises(UserError, match=message):
        plan_lake(str(tmp_path))


def test_rows_beyond_those_that_a_footer_promises_are_not_passed_over(tmp_path):
    # Arrow reads 900 of the 1,000 rows without a word.
    path = promising(tmp_path / "b.parquet", 1000, 900, OF_FILE, OF_GROUP)
    message = (
        f"{path}: the footer promises 900 rows of row group 0, and 1,000 values of its columns; "
        "write the file again or move it away"
    )
    with pytest.raises(UserError, match=message):
        plan_lake(str(tmp_path))


# --- footers in which Arrow ends the process, where it is asked from Python


def with_footer(path, was: bytes, now: bytes):
    """Replace the first place of some bytes in a file's footer."""
    data = path.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    assert was in data[start:]
    path.write_bytes(data[:start] + data[start:].replace(was, now, 1))


DAMAGES = {
    # Thrift has the type of a chunk (DOUBLE is 5, FIXED_LEN_BYTE_ARRAY 7) before its encodings.
    "type": (b"\x15\x0a\x19", b"\x15\x0e\x19", "says both DOUBLE and FIXED_LEN_BYTE_ARRAY of"),
    # OPTIONAL, of a column of the schema, becomes REQUIRED, which no histogram of levels fits.
    "levels": (b"\x25\x02", b"\x25\x00", "level histogram size mismatch"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_footer_is_named_and_ends_no_process(tmp_path, damage):
    was, now, reason = DAMAGES[damage]
    columns = {"x": lakes.numbers(20), "y": lakes.numbers(20)}
    path = lakes.write(tmp_path / "a.parquet", columns, rows_per_group=10)
    with_footer(path, was, now)
    message = f"{path}: cannot be read as Parquet .*{reason}.*; write the file again or move it"
    for options in ({}, {"columns": ["x"]}, {"columns": ["y"], "where": "x > 0"}):
        with pytest.raises(UserError, match=message):
            plan_lake(str(path), **options)
    with pytest.raises(UserError, match=message):
        plan_lake(str(path), columns=["y"], keep=["x"], missing="mean")
    if damage == "type":  # the chunk's alone: of another column it is no matter
        assert lakes.read_all(plan_lake(str(path), columns=["y"]))[0].shape == (20, 1)


class _Keys(encryption.KmsClient):
    """Hands keys out unwrapped, to whoever asks."""

    def __init__(self, _: object) -> None:
        super().__init__()

    def wrap_key(self, key_bytes, master_key_identifier):
        return base64.b64encode(key_bytes)

    def unwrap_key(self, wrapped_key, master_key_identifier):
        return base64.b64decode(wrapped_key)


def test_columns_beside_one_that_is_encrypted_are_read(tmp_path):
    config = encryption.EncryptionConfiguration(
        footer_key="f", column_keys={"c": ["secret"]}, plaintext_footer=True
    )
    locked = encryption.CryptoFactory(_Keys).file_encryption_properties(
        encryption.KmsConnectionConfig(), config
    )
    table = pa.table({"secret": lakes.numbers(5), "x": np.arange(5.0), "i": np.arange(5)})
    path = tmp_path / "a.parquet"
    with pq.ParquetWriter(path, table.schema, encryption_properties=locked) as writer:
        writer.write_table(table)
    plan = plan_lake(str(path), columns=["x"], where="i >= 2")
    assert lakes.read_all(plan)[0].ravel().tolist() == [2, 3, 4]
    assert streamed(path, columns=["x"], keep=["i"])[0]["i"].to_pylist() == [0, 1, 2, 3, 4]
    for options in ({}, {"columns": ["x"], "keep": ["secret"]}):
        with pytest.raises(UserError, match=r"^\S*a\.parquet: cannot be read as Parquet .*decrypt"):
            plan_lake(str(path), **options)

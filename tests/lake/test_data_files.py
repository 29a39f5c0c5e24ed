"""Which files of a folder are Parquet, whatever they are called."""

from __future__ import annotations

import logging
import re

import lakes
import pytest

from gmm_dist.errors import UserError
from gmm_dist.lake import data_files, listing
from gmm_dist.lake.plan import plan_lake

# Names under which Hive, Athena, Presto, Trino, Spark and Hadoop leave Parquet files.
NAMES = [
    *("a.parquet", "b.PARQUET", "c.pq", "000000_0", "000000_0_copy_1", "part-r-00000"),
    *("part-1.parquet.snappy", "part-2.snappy", "part-3.gz.parquet", "part-4.gz", "5.parquet.gz"),
    *("20261121_101112_00007_abcde", "bucket-00000", "v1.2", "data.2026-11-21", "x[1]*?.dat"),
]


def read(url: object) -> list[float]:
    X, _, _ = lakes.read_all(plan_lake(str(url), columns=["x"]))
    return sorted(X.ravel().tolist())


@pytest.fixture
def mixed(tmp_path):
    """A file under each name, and others that are none, full of this and that."""
    for i, name in enumerate(NAMES):
        lakes.write(tmp_path / name, {"x": [float(i)]})
    for name in ("notes.txt", "rows.csv", "blob", "x.gz"):
        (tmp_path / name).write_bytes(b"neither head nor tail")
    for name in ("a.parquet.crc", "a.parquet.bak", "a.parquet~", "d.parquet._COPYING_", "#a#"):
        lakes.write(tmp_path / name, {"x": [666.0]})
    for name in (
        "_SUCCESS",
        ".DS_Store",
        ".nfs0001",
        "._a.parquet",
        "_committed_1",
        "dt=1_$folder$",
    ):
        (tmp_path / name).touch()
    (tmp_path / "_metadata").write_bytes(b"PAR1PAR1")
    (tmp_path / "torn.parquet").touch()
    return tmp_path


def passed_over(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == listing.__name__]


def check_mixed(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert read(url) == list(range(len(NAMES)))
    seen = len(NAMES) + 4 + 5 + 2
    assert passed_over(caplog) == [
        f"{url}: passed over 9 of {seen} files, that are not Parquet: #a#, a.parquet.bak, "
        "a.parquet.crc and 6 more",
        f"{url}: passed over 1 of {seen} files, that are empty: torn.parquet",
    ]


def test_a_file_is_known_by_what_is_in_it_and_the_rest_is_told(mixed, caplog):
    check_mixed(str(mixed), caplog)


def test_a_key_is_known_by_what_is_in_it_and_the_rest_is_told(mixed, s3_lake, caplog):
    check_mixed(lakes.upload(mixed, s3_lake.file_system(), s3_lake.url), caplog)


def test_a_folder_of_parquet_alone_is_listed_without_a_word_or_a_look(
    tmp_path, caplog, monkeypatch
):
    lakes.write(tmp_path / "a.parquet", {"x": [1.0]})
    (tmp_path / "_SUCCESS").touch()
    monkeypatch.setattr(data_files, "_has_magic", pytest.fail)
    assert read(tmp_path) == [1]
    assert passed_over(caplog) == []


@pytest.mark.parametrize("keep", [slice(None, -20), slice(20, None)], ids=["head", "tail"])
def test_a_damaged_file_without_a_suffix_is_not_passed_over(tmp_path, keep):
    lakes.write(tmp_path / "000000_0", {"x": lakes.numbers(100)})
    path = lakes.write(tmp_path / "000001_0", {"x": lakes.numbers(100)})
    path.write_bytes(path.read_bytes()[keep])
    with pytest.raises(UserError, match=f"{path}: cannot be read as Parquet"):
        read(tmp_path)


def test_a_folder_without_any_suffix_is_a_lake(tmp_path):
    lakes.write(tmp_path / "ds=1" / "000000_0", {"x": [1.0]})
    assert plan_lake(str(tmp_path), where="ds == 1").n_rows == 1


def test_a_folder_of_other_things_is_not_looked_through_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(data_files, "_MOST_FOREIGN", 5)
    for i in range(6):
        (tmp_path / f"blob{i}").write_bytes(b"what is this")
    lakes.write(tmp_path / "a.parquet", {"x": [1.0]})
    message = (
        "more than 5 files that are not Parquet, such as blob0; give a folder of Parquet files"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        read(tmp_path)

"""Which files are data, and whether they still are: real Parquet, local and on real S3."""

from __future__ import annotations

import re

import lakes
import pytest

from gmm_dist import lake, listing, reading
from gmm_dist.errors import UserError

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def two_files(tmp_path):
    return lakes.numbered(tmp_path)


# --- which files


def test_only_data_files_of_a_folder_are_read(two_files):
    good = listing.find(str(two_files))
    for name in ("_SUCCESS", "_metadata", ".a.parquet.crc", "notes.txt", "empty.parquet"):
        (two_files / name).touch()
    for name in ("_temporary/b.parquet", ".hidden/b.parquet", "dt=2026-11-01/_b.parquet"):
        lakes.write(two_files / name, {"x": [NAN], "y": [INF], "i": [-1]})
    assert listing.find(str(two_files)) == good


def test_one_file_is_a_lake_whatever_its_name(tmp_path):
    path = lakes.write(tmp_path / "_part-7", {"x": lakes.numbers(5)})
    found = listing.find(str(path))
    assert (found.root, [file.path for file in found.files]) == (str(tmp_path), ["_part-7"])
    assert lake.plan(str(path)).n_rows == 5


def test_a_linked_file_is_read(tmp_path):
    target = lakes.write(tmp_path / "elsewhere" / "a.parquet", {"x": lakes.numbers(5)})
    (tmp_path / "lake").mkdir()
    (tmp_path / "lake" / "a.parquet").symlink_to(target)
    assert lake.plan(str(tmp_path / "lake")).n_rows == 5


def test_a_linked_folder_is_refused_and_not_passed_over(two_files, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    lakes.write(elsewhere / "a.parquet", {"x": lakes.numbers(5)})
    (two_files / "dt=2026-11-03").symlink_to(elsewhere)
    with pytest.raises(UserError, match=r"/dt=2026-11-03: a link to a folder, which is not fol"):
        listing.find(str(two_files))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_delta_log/00000000000000000000.json", "a Delta"),
        ("events/_delta_log/00000000000000000000.json", "a Delta"),
        ("metadata/00001-abc.metadata.json", "an Iceberg"),
        (".hoodie/hoodie.properties", "a Hudi"),
    ],
)
def test_a_table_format_is_refused(two_files, name, kind):
    (two_files / name).parent.mkdir(parents=True)
    (two_files / name).write_text("{}")
    message = rf"{kind} table \({re.escape(name)}\), whose folder also holds deleted rows; export"
    with pytest.raises(UserError, match=message):
        listing.find(str(two_files))


def test_hive_keys_have_types_and_nulls(tmp_path):
    for folder in ("year=2026/city=New%20York", "year=007/city=__HIVE_DEFAULT_PARTITION__"):
        lakes.write(tmp_path / folder / "a.parquet", {"x": [1.0]})
    found = listing.find(str(tmp_path))
    assert [file.partition for file in found.files] == [
        (("year", 7), ("city", None)),
        (("year", 2026), ("city", "New York")),
    ]
    assert dict(zip(found.keys.names, map(str, found.keys.types), strict=True)) == {
        "year": "int64",
        "city": "string",
    }
    assert lake.plan(str(tmp_path)).feature_names == ("x",)


def test_a_missing_path_is_an_error(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/nope: no such file or folder; check the"):
        listing.find(f"{tmp_path}/nope")


def test_a_folder_without_parquet_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no Parquet file .* among 0 files \(found nothing\)"):
        listing.find(str(tmp_path))
    (tmp_path / "a.csv").write_text("x\n1\n")
    with pytest.raises(UserError, match=r"no Parquet file .* among 1 files \(found a\.csv\)"):
        listing.find(str(tmp_path))


# --- opened as they were listed


@pytest.mark.parametrize("size", [1, 8, 300, -1])
def test_a_truncated_file_is_named(tmp_path, size):
    lakes.write(tmp_path / "a.parquet", {"x": lakes.numbers(1000)})
    path = lakes.write(tmp_path / "b.parquet", {"x": lakes.numbers(1000)})
    lakes.truncate(path, size)
    message = rf"{path}: cannot be read as Parquet \(.*\); write the file again or move it away"
    with pytest.raises(UserError, match=message) as caught:
        lake.plan(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_file_that_changed_since_the_plan_is_an_error(tmp_path):
    path = lakes.write(tmp_path / "a.parquet", {"x": lakes.numbers(100)})
    plan = lake.plan(str(tmp_path))
    message = f"{path}: changed since the plan was made; run again"
    lakes.write(path, {"x": lakes.numbers(100, seed=1)})
    with pytest.raises(UserError, match=message):
        lakes.read_all(plan)
    with pytest.raises(UserError, match=message):
        reading.probe(plan)
    path.unlink()
    with pytest.raises(UserError, match=message):
        lakes.read_all(plan)


# --- on S3


def test_directory_markers_and_hidden_keys_on_s3_are_not_read(two_files, s3_lake):
    fs = s3_lake.file_system()
    url = lakes.upload(two_files, fs, s3_lake.url)
    good = listing.find(url)
    for marker in ("", "/dt=2026-11-01", "/dt=2026-11-03", "/x.parquet"):
        lakes.put_marker(fs, url + marker)
    for name in ("_SUCCESS", "_temporary/0/a.parquet", "dt=2026-11-01/.a.parquet"):
        fs.pipe_file(fs._strip_protocol(f"{url}/{name}"), b"not parquet")
    assert listing.find(url) == good


def test_one_file_on_s3_is_a_lake(two_files, s3_lake):
    url = lakes.upload(two_files, s3_lake.file_system(), s3_lake.url)
    found = listing.find(f"{url}/dt=2026-11-02/a.parquet")
    assert (found.root, found.files[0].path) == (f"{url}/dt=2026-11-02", "a.parquet")
    assert lake.plan(f"{url}/dt=2026-11-02/a.parquet").n_rows == 25


def test_a_key_that_changed_since_the_plan_is_an_error(two_files, s3_lake):
    fs = s3_lake.file_system()
    url = lakes.upload(two_files, fs, s3_lake.url)
    plan = lake.plan(url)
    key = f"{url}/dt=2026-11-02/a.parquet"
    data = bytearray(fs.cat_file(fs._strip_protocol(key)))
    data[10] ^= 1
    fs.pipe_file(fs._strip_protocol(key), bytes(data))
    message = f"{key}: changed since the plan was made; run again"
    with pytest.raises(UserError, match=message):
        lakes.read_all(plan)
    fs.rm_file(fs._strip_protocol(key))
    with pytest.raises(UserError, match=message):
        lakes.read_all(plan)


def test_a_key_that_changes_while_it_is_read_is_an_error(tmp_path, s3_lake, monkeypatch):
    monkeypatch.setattr(listing, "_SMALL_BYTES", 0)  # small files are read at once
    fs = s3_lake.file_system()
    path = lakes.write(tmp_path / "a.parquet", {"x": lakes.numbers(100)}, rows_per_group=50)
    url = lakes.upload(tmp_path, fs, s3_lake.url)
    rows = reading.read(lake.plan(url), 0)
    next(rows)
    lakes.write(path, {"x": lakes.numbers(100, seed=1)}, rows_per_group=50)
    lakes.upload(tmp_path, fs, s3_lake.url)
    with pytest.raises(UserError, match=f"{url}/a.parquet: changed since the plan was made"):
        next(rows)


def test_a_truncated_key_is_named(tmp_path, s3_lake):
    lakes.truncate(lakes.write(tmp_path / "a.parquet", {"x": lakes.numbers(1000)}), 500)
    url = lakes.upload(tmp_path, s3_lake.file_system(), s3_lake.url)
    with pytest.raises(UserError, match=f"{url}/a.parquet: cannot be read as Parquet"):
        lake.plan(url)


@pytest.mark.parametrize(
    ("variable", "value"), [("AWS_ACCESS_KEY_ID", "nobody"), ("AWS_SECRET_ACCESS_KEY", "wrong")]
)
def test_wrong_s3_credentials_are_an_error(s3_lake, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=rf"{s3_lake.url}: access denied \(.*\); check the perm"):
        listing.find(s3_lake.url)


def test_a_missing_bucket_or_prefix_is_an_error(s3_lake):
    with pytest.raises(UserError, match="s3://nobucket/x: the bucket does not exist; check"):
        listing.find("s3://nobucket/x")
    with pytest.raises(UserError, match=f"{s3_lake.url}/nope: no such file or folder; check"):
        listing.find(f"{s3_lake.url}/nope")

"""Which files are data, and whether they still are: real Parquet, local and on real S3."""

from __future__ import annotations

import os
import pickle
import re
import time

import lakes
import pytest

from gmm_dist import storage
from gmm_dist.errors import UserError
from gmm_dist.lake import listing, opening, read
from gmm_dist.lake.plan import plan_lake
from gmm_dist.lake.probe import probe

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
    assert plan_lake(str(path)).n_rows == 5


def test_a_hive_key_may_begin_like_a_hidden_folder(tmp_path):
    for day in (1, 2):
        lakes.write(tmp_path / f"_day={day}" / "a.parquet", {"x": [float(day)]})
    lakes.write(tmp_path / "_temporary" / "_day=3" / "a.parquet", {"x": [3.0]})
    lakes.write(tmp_path / ".spark-staging-1" / "day=4" / "a.parquet", {"x": [4.0]})
    plan = plan_lake(str(tmp_path), where="_day >= 2")
    assert lakes.read_all(plan)[0].tolist() == [[2]]
    assert plan_lake(str(tmp_path)).n_rows == 2


def test_hidden_files_that_could_be_data_are_told(two_files, caplog):
    for name in ("_b.parquet", "_temporary/0/c.parquet", "_metadata", "._a.parquet"):
        lakes.write(two_files / name, {"x": [1.0]})
    assert plan_lake(str(two_files)).n_rows == 50
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line == (
        f"{two_files}: passed over 2 of 4 files, that a name with _ or . in front hides: "
        "_b.parquet, _temporary/0/c.parquet"
    )


def test_a_linked_file_is_read(tmp_path):
    target = lakes.write(tmp_path / "elsewhere" / "a.parquet", {"x": lakes.numbers(5)})
    (tmp_path / "lake").mkdir()
    (tmp_path / "lake" / "a.parquet").symlink_to(target)
    assert plan_lake(str(tmp_path / "lake")).n_rows == 5


def test_a_linked_folder_is_refused_and_not_passed_over(two_files, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    lakes.write(elsewhere / "a.parquet", {"x": lakes.numbers(5)})
    (two_files / "dt=2026-11-03").symlink_to(elsewhere)
    with pytest.raises(UserError, match=r"/dt=2026-11-03: a link to a folder, which is not fol"):
        listing.find(str(two_files))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("metadata/00001-abc.metadata.json", "an Iceberg"),
        (".hoodie/hoodie.properties", "a Hudi"),
    ],
)
def test_a_table_format_is_refused(two_files, name, kind):
    (two_files / name).parent.mkdir(parents=True)
    (two_files / name).write_text("{}")
    message = (
        rf"{kind} table \({re.escape(name)}\), whose folder also holds deleted rows; (exp|give)"
    )
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
    assert plan_lake(str(tmp_path)).feature_names == ("x",)


def test_a_link_to_nothing_is_refused_and_not_passed_over(two_files):
    (two_files / "b.parquet").symlink_to("/no/such/file")
    (two_files / ".#a.parquet").symlink_to("somebody@host.123:456")  # an editor's lock
    (two_files / "notes.txt").symlink_to("/no/such/notes")
    message = "/b.parquet: a link to /no/such/file, which is not there; mend the link or remove it"
    with pytest.raises(UserError, match=message):
        listing.find(str(two_files))
    (two_files / "b.parquet").unlink()
    assert len(listing.find(str(two_files)).files) == 2


def test_a_link_to_itself_is_refused(two_files):
    (two_files / "b.parquet").symlink_to("b.parquet")
    with pytest.raises(UserError, match=r"/b\.parquet: a link to b\.parquet, which is not there"):
        listing.find(str(two_files))
    with pytest.raises(UserError, match=r"/b\.parquet.*: links lead round"):
        listing.find(str(two_files / "b.parquet"))


def test_a_pipe_is_passed_over_and_never_opened(two_files):
    os.mkfifo(two_files / "b.parquet")
    assert len(listing.find(str(two_files)).files) == 2
    for path in (two_files / "b.parquet", "/dev/null"):
        with pytest.raises(UserError, match=f"^{path}: neither a file nor a folder"):
            listing.find(str(path))


@pytest.mark.parametrize("name", [b"\xff.parquet", b"00000\xff"])
def test_a_data_file_whose_name_is_not_utf8_is_refused(two_files, name):
    path = two_files / os.fsdecode(name)
    lakes.write(two_files / "b.parquet", {"x": [1.0]}).rename(path)
    message = r"/.*\\udcff.*: its name is not UTF-8; rename it"
    for url in (two_files, path):
        with pytest.raises(UserError, match=message) as caught:
            listing.find(str(url))
        str(caught.value).encode()
    path.unlink()
    (two_files / os.fsdecode(b"\xff\n.txt")).write_text("passed over")
    assert len(listing.find(str(two_files)).files) == 2


def test_a_column_whose_name_is_not_utf8_is_refused(tmp_path):
    path = lakes.write(tmp_path / "a.parquet", {"name": [1.0], "x": [1.0]})
    path.write_bytes(path.read_bytes().replace(b"name", b"n\xe4me"))
    with pytest.raises(UserError, match=f"^{path}: the name of a column is not UTF-8; write the"):
        plan_lake(str(tmp_path), columns=["x"])


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000, "a\0b"])
def test_a_name_that_no_disk_can_hold_is_not_there(tmp_path, name):
    with pytest.raises(UserError, match=r"no such file or folder|a name is too long"):
        listing.find(f"{tmp_path}/{name}")


@pytest.mark.parametrize("name", ["b[1]", "a*", "a?", "[!x]", "{a,b}", "**"])
def test_names_are_no_patterns(tmp_path, name):
    for folder, value in ((name, 1.0), ("b1", 2.0), ("ab", 3.0), ("a", 4.0)):
        lakes.write(tmp_path / folder / f"{folder}.parquet", {"x": [value]})
    assert lakes.read_all(plan_lake(str(tmp_path / name)))[0].ravel().tolist() == [1.0]
    file = tmp_path / name / f"{name}.parquet"
    assert lakes.read_all(plan_lake(str(file)))[0].ravel().tolist() == [1.0]


def test_a_missing_path_is_an_error(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/nope: no such file or folder; check the"):
        listing.find(f"{tmp_path}/nope")


def test_a_folder_without_parquet_is_an_error(tmp_path):
    with pytest.raises(
        UserError, match=r"no Parquet file that is not empty among 0 files \(found nothing\)"
    ):
        listing.find(str(tmp_path))
    (tmp_path / "a.csv").write_text("x\n1\n")
    with pytest.raises(
        UserError, match=r"no Parquet file that is not empty among 1 files \(found a\.csv\)"
    ):
        listing.find(str(tmp_path))


# --- opened as they were listed


@pytest.mark.parametrize("size", [1, 8, 300, -1])
def test_a_truncated_file_is_named(tmp_path, size):
    lakes.write(tmp_path / "a.parquet", {"x": lakes.numbers(1000)})
    path = lakes.write(tmp_path / "b.parquet", {"x": lakes.numbers(1000)})
    lakes.truncate(path, size)
    message = rf"{path}: cannot be read as Parquet \(.*\); write the file again or move it away"
    with pytest.raises(UserError, match=message) as caught:
        plan_lake(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_file_that_changed_since_the_plan_is_an_error(tmp_path):
    path = lakes.write(tmp_path / "a.parquet", {"x": lakes.numbers(100)})
    plan = plan_lake(str(tmp_path))
    message = f"{path}: changed since the plan was made; run again"
    lakes.write(path, {"x": lakes.numbers(100, seed=1)})
    with pytest.raises(UserError, match=message):
        lakes.read_all(plan)
    with pytest.raises(UserError, match=message):
        probe(plan)
    path.unlink()
    with pytest.raises(UserError, match=message):
        lakes.read_all(plan)


def replace(path, *, by):
    """Put a file of equal size and mtime in a file's place, by renaming or by writing it anew."""
    before = path.stat()
    other = lakes.write(path.with_name("_other"), {"x": lakes.numbers(100, seed=1)})
    assert other.stat().st_size == before.st_size
    if by == "renaming":
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.rename(path)
    else:
        path.write_bytes(other.read_bytes())
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("by", ["renaming", "writing"])
def test_a_file_that_hides_that_it_changed_is_an_error(tmp_path, by):
    path = lakes.write(tmp_path / "a.parquet", {"x": lakes.numbers(100)})
    plan = pickle.loads(pickle.dumps(plan_lake(str(tmp_path))))  # as workers get it
    time.sleep(0.02)  # the clock that stamps files ticks every few milliseconds
    replace(path, by=by)
    with pytest.raises(UserError, match=f"{path}: changed since the plan was made; run again"):
        lakes.read_all(plan)
    # Another run has the same plan: what is compared within one is no part of it.
    again = plan_lake(str(tmp_path))
    assert (again, again.hash, again.versions) == (plan, plan.hash, plan.versions)
    assert len(lakes.read_all(again)[0]) == 100


def test_a_link_that_points_elsewhere_by_now_is_an_error(tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        path = lakes.write(tmp_path / name / "a.parquet", {"x": lakes.numbers(100, seed=seed)})
        os.utime(path, (1e9, 1e9))
    link = tmp_path / "lake" / "a.parquet"
    link.parent.mkdir()
    link.symlink_to("../one/a.parquet")
    plan = plan_lake(str(tmp_path / "lake"))
    link.unlink()
    link.symlink_to("../two/a.parquet")
    with pytest.raises(UserError, match="changed since the plan was made"):
        lakes.read_all(plan)


def test_another_hosts_view_of_a_file_raises_no_alarm(tmp_path, monkeypatch):
    lakes.write(tmp_path / "a.parquet", {"x": lakes.numbers(100)})
    plan = plan_lake(str(tmp_path))
    monkeypatch.setattr(storage, "_boot_id", lambda: "another host")
    (tmp_path / "a.parquet").chmod(0o600)
    assert len(lakes.read_all(plan)[0]) == 100


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
    assert plan_lake(f"{url}/dt=2026-11-02/a.parquet").n_rows == 25


def test_a_key_that_changed_since_the_plan_is_an_error(two_files, s3_lake):
    fs = s3_lake.file_system()
    url = lakes.upload(two_files, fs, s3_lake.url)
    plan = plan_lake(url)
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
    monkeypatch.setattr(opening, "_SMALL_BYTES", 0)  # small files are read at once
    fs = s3_lake.file_system()
    path = lakes.write(tmp_path / "a.parquet", {"x": lakes.numbers(100)}, rows_per_group=50)
    url = lakes.upload(tmp_path, fs, s3_lake.url)
    rows = read.read(plan_lake(url), 0)
    next(rows)
    lakes.write(path, {"x": lakes.numbers(100, seed=1)}, rows_per_group=50)
    lakes.upload(tmp_path, fs, s3_lake.url)
    with pytest.raises(UserError, match=f"{url}/a.parquet: changed since the plan was made"):
        next(rows)


@pytest.mark.parametrize("name", ["b[1]", "a*?"])
def test_keys_are_no_patterns(tmp_path, s3_lake, name):
    for folder, value in ((name, 1.0), ("b1", 2.0), ("ab", 3.0)):
        lakes.write(tmp_path / folder / "a.parquet", {"x": [value]})
    url = lakes.upload(tmp_path, s3_lake.file_system(), s3_lake.url)
    for lake_url in (f"{url}/{name}", f"{url}/{name}/a.parquet"):
        assert lakes.read_all(plan_lake(lake_url))[0].ravel().tolist() == [1.0]


def test_a_long_key_is_read(tmp_path, s3_lake):
    path = lakes.write(tmp_path / "a.parquet", {"x": [1.0]})
    fs = s3_lake.file_system()
    fs.pipe_file(
        f"{s3_lake.url}/{'x' * 200}/{'y' * 200}.parquet".removeprefix("s3://"), path.read_bytes()
    )
    assert lakes.read_all(plan_lake(s3_lake.url))[0].ravel().tolist() == [1.0]


@pytest.mark.parametrize("url", ["s3://b[1]", "s3://b[1]/x", "https://[b]/x"])
def test_a_bucket_that_cannot_be_is_said(s3_lake, url):
    with pytest.raises(UserError, match=rf"^{re.escape(url)}: .*check"):
        listing.find(url)


def test_a_truncated_key_is_named(tmp_path, s3_lake):
    lakes.truncate(lakes.write(tmp_path / "a.parquet", {"x": lakes.numbers(1000)}), 500)
    url = lakes.upload(tmp_path, s3_lake.file_system(), s3_lake.url)
    with pytest.raises(UserError, match=f"{url}/a.parquet: cannot be read as Parquet"):
        plan_lake(url)


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

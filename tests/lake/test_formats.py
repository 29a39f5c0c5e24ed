"""A table's folder, whatever part of it is given: it also holds rows that were deleted."""

from __future__ import annotations

import functools
import http.server
import threading
from pathlib import Path

import fsspec
import lakes
import pytest

from gmm_dist.errors import UserError
from gmm_dist.lake.plan import plan_lake
from gmm_dist.lake.tables import formats

REFUSED = (
    ", whose folder also holds deleted rows; "
    "(export its current rows to a folder of Parquet|give it as iceberg://CATALOG/NAMESPACE.TABLE)"
)

# What a table keeps beside its data, and where its data may lie.
TABLES = [
    ("metadata/00001-abc.metadata.json", "data", "an Iceberg table"),
    ("metadata/v3.gz.metadata.json", "data/day=1/hour=2", "an Iceberg table"),
    (".hoodie/hoodie.properties", "region=eu/day=1", "a Hudi table"),
    ("_spark_metadata/0", "ds=2026-11-21", "a Spark sink"),
    ("manifest/manifest-list-0a1b-0", "dt=1/bucket-0", "a Paimon table"),
    ("_versions/18446744073709551614.manifest", "data", "a Lance dataset"),
]


def table(folder: Path, mark: str, data: str) -> Path:
    """Write what a reader of plain Parquet sees of a table: a current file and a removed one."""
    (folder / mark).parent.mkdir(parents=True)
    (folder / mark).write_text("{}")
    for name, value in (("new.parquet", 1.0), ("old.parquet", 666.0)):
        lakes.write(folder / data / name, {"x": [value]})
    return folder


def parts_of(url: str, data: str) -> list[str]:
    """Return a table's root, all folders from there to its files, and a file."""
    names = data.split("/")
    folders = ["/".join(names[:i]) for i in range(len(names) + 1)]
    return [*(f"{url}/{folder}".rstrip("/") for folder in folders), f"{url}/{data}/old.parquet"]


@pytest.mark.parametrize(("mark", "data", "kind"), TABLES)
def test_any_part_of_a_table_is_refused(tmp_path, mark, data, kind):
    url = table(tmp_path / "table", mark, data).as_posix()
    for part in parts_of(url, data):
        with pytest.raises(UserError, match=rf"^{part}: {kind} \(.*\){REFUSED}"):
            plan_lake(part)


@pytest.mark.parametrize(("mark", "data", "kind"), [TABLES[1], TABLES[2], TABLES[4]])
def test_any_part_of_a_table_on_s3_is_refused(tmp_path, s3_lake, mark, data, kind):
    url = lakes.upload(table(tmp_path, mark, data), s3_lake.file_system(), s3_lake.url)
    for part in parts_of(url, data)[-2:]:
        with pytest.raises(UserError, match=rf"^{part}: {kind} \(.*\){REFUSED}"):
            plan_lake(part)


@pytest.mark.parametrize("data", ["ds=2026-11-21", "a=1/b=2/c=3"])
def test_a_part_of_a_delta_table_is_refused_and_its_root_named(tmp_path, data):
    url = table(tmp_path / "tables" / "t", "_delta_log/0.json", data).as_posix()
    for part in (tmp_path.as_posix(), *parts_of(url, data)[1:], f"{url}/_delta_log"):
        message = rf"^{part}: not the root of a Delta table \(.*_delta_log.*\), .*itself, {url}$"
        with pytest.raises(UserError, match=message):
            plan_lake(part)


def test_a_part_of_a_delta_table_on_s3_is_refused_and_its_root_named(tmp_path, s3_lake):
    table(tmp_path / "tables" / "t", "_delta_log/0.json", "ds=1")
    url = f"{lakes.upload(tmp_path, s3_lake.file_system(), s3_lake.url)}/tables/t"
    for part in (s3_lake.url, f"{url}/ds=1", f"{url}/ds=1/old.parquet"):
        with pytest.raises(UserError, match=rf"^{part}: not the root of .* itself, {url}$"):
            plan_lake(part)


def test_a_partition_that_tells_of_its_table_is_refused(tmp_path):
    # As of a partition that was copied alone.
    lakes.write(tmp_path / "a.parquet", {"x": [1.0]})
    (tmp_path / ".hoodie_partition_metadata").write_text("x")
    with pytest.raises(UserError, match=rf"a Hudi table \(\.hoodie_partition_metadata\){REFUSED}"):
        plan_lake(str(tmp_path))


@pytest.mark.parametrize(
    "folder", ["base_0000002", "delta_0000003_0000003_0000", "base_0000002_v7"]
)
def test_a_transactional_hive_table_is_refused(tmp_path, folder):
    lakes.write(tmp_path / "t" / folder / "000000_0", {"x": [1.0]})
    for part in (tmp_path, tmp_path / "t", tmp_path / "t" / folder):
        with pytest.raises(UserError, match=rf"a transactional Hive table \(.*\){REFUSED}"):
            plan_lake(str(part))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ducklake-01963f4e-7c4a-7f00-8d2b-3a1b2c3d4e5f.parquet", "a DuckLake table"),
        ("ducklake-01963f4e-7c4a-7f00-8d2b-3a1b2c3d4e5f-delete.parquet", "a DuckLake table"),
        ("00000-4-0d3c1a52-7f00-4d2b-8a1b-2c3d4e5f6a7b-00001-deletes.parquet", "an Iceberg table"),
    ],
)
def test_files_that_are_called_as_a_tables_are_refused(tmp_path, name, kind):
    lakes.write(tmp_path / "main" / "t" / name, {"x": [1.0]})
    for part in (tmp_path, tmp_path / "main" / "t" / name):
        with pytest.raises(UserError, match=rf"^{part}: {kind} \(.*{name}\){REFUSED}"):
            plan_lake(str(part))


@pytest.mark.parametrize("folder", ["", "ds=1/"])
def test_what_databricks_did_not_commit_is_refused(tmp_path, folder):
    at = tmp_path / folder
    kept, torn = (at / f"part-0-tid-{i}-ab-1-c000.snappy.parquet" for i in (12, 345))
    for path, value in ((kept, 1.0), (torn, 2.0)):
        lakes.write(path, {"x": [value]})
    (at / "_started_12").touch()
    (at / "_committed_12").write_text(f'{{"added":["{kept.name}"],"removed":["gone"]}}')
    (at / "_started_345").touch()
    (at / "_committed_vacuum5").write_text("{}")
    message = f"^{torn}: a file of Databricks that was never committed .{folder}_started_345.; rem"
    with pytest.raises(UserError, match=message):
        plan_lake(str(tmp_path))
    (at / "_committed_345").write_text(f'{{"added":["{torn.name}"],"removed":["{kept.name}"]}}')
    message = (
        f"^{kept}: a file of Databricks that was removed .{folder}_committed_345.; remove such"
    )
    with pytest.raises(UserError, match=message):
        plan_lake(str(tmp_path))
    (at / "_committed_345").write_text("no list")
    assert lakes.read_all(plan_lake(str(tmp_path)))[0].ravel().tolist() == [1, 2]


def test_a_partition_by_way_of_a_link_is_refused(tmp_path):
    table(tmp_path / "table", "_delta_log/0.json", "ds=1")
    (tmp_path / "link").symlink_to(tmp_path / "table" / "ds=1")
    lakes.write(tmp_path / "lake" / "a.parquet", {"x": [1.0]})
    (tmp_path / "lake" / "b.parquet").symlink_to(tmp_path / "table" / "ds=1" / "old.parquet")
    message = rf": not the root of a Delta table \(.*\), .* itself, {tmp_path}/table$"
    for part in ("link", "lake", "lake/b.parquet"):
        with pytest.raises(UserError, match=part + message):
            plan_lake(str(tmp_path / part))


def test_folders_that_are_merely_called_alike_are_read(tmp_path):
    folder = tmp_path / "base_20261121" / "data"
    lakes.write(folder / "a.parquet", {"x": [1.0]})
    lakes.write(folder / "metadata" / "b.parquet", {"x": [2.0]})
    for name in ("metadata/notes.json", "manifest/list.txt", "metadata.json"):
        for beside in (folder, folder.parent):
            (beside / name).parent.mkdir(exist_ok=True)
            (beside / name).write_text("{}")
    (folder.parent / "_delta_log").write_text("a file")
    table(tmp_path / "base_20261121" / "a table beside", "_delta_log/0.json", "ds=1")
    assert lakes.read_all(plan_lake(str(folder)))[0].ravel().tolist() == [1, 2]


def test_what_may_not_be_looked_at_is_passed_by(tmp_path, monkeypatch):
    lakes.write(tmp_path / "a.parquet", {"x": [1.0]})
    fs = fsspec.filesystem("memory")

    def denied(*_: object, **__: object) -> object:
        raise PermissionError("AccessDenied")

    monkeypatch.setattr(fs, "info", denied)
    monkeypatch.setattr(fs, "ls", denied)
    assert formats.refuse_around(fs, "/bucket/a/b", "memory://bucket/a/b") is None


def test_a_partition_behind_a_web_server_is_refused(tmp_path):
    table(tmp_path / "table", "_delta_log/0.json", "ds=1")
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        root = f"http://127.0.0.1:{server.server_port}/table"
        try:
            for part in (f"{root}/ds=1", f"{root}/ds=1/old.parquet"):
                with pytest.raises(UserError, match=rf"^{part}: not the root .* itself, {root}$"):
                    plan_lake(part)
            with pytest.raises(UserError, match=rf"^{root}: Delta tables are on local disk"):
                plan_lake(root)
        finally:
            server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

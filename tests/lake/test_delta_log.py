"""What the log of a Delta table says beside rows: versions, features, files that are gone."""

from __future__ import annotations

import datetime as dt
import json
import os
import pickle
import sys
from pathlib import Path

import deltas
import fsspec.config
import lakes
import pytest

from gmm_dist.errors import UserError
from gmm_dist.lake.lake import Lake
from gmm_dist.lake.plan import plan_lake, plan_of
from gmm_dist.lake.tables.snapshot import Snapshot, parse_at

UTC = dt.UTC
START = dt.datetime(2026, 11, 1, tzinfo=UTC)


def hourly(root: Path, *, in_commits: int | None = None) -> Path:
    """Write four versions, an hour apart; `in_commits` is the first that keeps its time itself."""
    for version in range(4):
        deltas.write(root, {"x": [float(version)]})
    for version in range(4):
        if in_commits is not None and version >= in_commits:
            _keep_time(root, version, since=in_commits)
        # Files that were copied have other times.
        later = dt.timedelta(days=1 if in_commits == 0 else 0, hours=version)
        seconds = (START + later).timestamp()
        os.utime(deltas.log_of(root, version), (seconds, seconds))
    return root


def _keep_time(root: Path, version: int, *, since: int) -> None:
    milliseconds = round((START + dt.timedelta(hours=version)).timestamp() * 1000)
    actions = deltas.actions_of(root, version)
    actions.sort(key=lambda action: "commitInfo" not in action)
    actions[0]["commitInfo"]["inCommitTimestamp"] = milliseconds
    if version == since:
        facts = next(
            a for v in range(version + 1) for a in deltas.actions_of(root, v) if "metaData" in a
        )
        settings = {"delta.enableInCommitTimestamps": "true"}
        settings["delta.inCommitTimestampEnablementVersion"] = str(since)
        facts["metaData"]["configuration"] = settings
        asked = {
            "minReaderVersion": 1,
            "minWriterVersion": 7,
            "writerFeatures": ["inCommitTimestamp"],
        }
        kept = [a for a in actions if not {"protocol", "metaData"} & a.keys()]
        actions = [kept[0], {"protocol": asked}, facts, *kept[1:]]
    deltas.rewrite(root, version, actions)


@pytest.mark.parametrize("in_commits", [None, 0, 2])
def test_a_time_names_the_newest_version_of_then(tmp_path, in_commits):
    root = hourly(tmp_path / "t", in_commits=in_commits)
    for minutes, version in ((0, 0), (59, 0), (60, 1), (61, 1), (119, 1), (120, 2), (9000, 3)):
        at = START + dt.timedelta(minutes=minutes)
        plan = plan_lake(str(root), at=at)
        assert plan.snapshot.version == version
        assert plan.n_rows == version + 1
    message = (
        rf"^{root}: at is 2026-10-31T23:59:59\+00:00, and no version that the log holds is as old "
        r"\(version 0: 2026-11-01T00:00:00\+00:00\); give a later time or the number of a version$"
    )
    with pytest.raises(UserError, match=message):
        plan_lake(str(root), at=START - dt.timedelta(seconds=1))
    with pytest.raises(UserError, match=r"^at is 2999-01-01T00:00:00\+00:00: give a time that has"):
        plan_lake(str(root), at=dt.datetime(2999, 1, 1, tzinfo=UTC))


def test_a_time_names_a_version_on_s3(tmp_path, s3_lake):
    root = deltas.write(tmp_path / "t", {"x": [1.0]})
    url = lakes.upload(root, s3_lake.file_system(), s3_lake.url)
    # Stores tell the time to the second.
    assert plan_lake(url, at=dt.datetime.now(UTC)).snapshot.version == 0
    with pytest.raises(UserError, match=rf"^{url}: at is 2026-.*, and no version .* \(version 0: "):
        plan_lake(url, at=dt.datetime(2026, 1, 1, tzinfo=UTC))


def test_a_number_names_a_version(tmp_path):
    root = hourly(tmp_path / "t")
    assert [plan_lake(str(root), at=version).n_rows for version in range(4)] == [1, 2, 3, 4]
    with pytest.raises(UserError, match=rf"^{root}: at is 4, and the newest version is 3; give t"):
        plan_lake(str(root), at=4)
    deltas.opened(root).create_checkpoint()
    deltas.log_of(root, 0).unlink()
    assert plan_lake(str(root), at=3).n_rows == 4
    with pytest.raises(UserError, match=rf"^{root}: deltalake cannot read the table's log \(.*at$"):
        plan_lake(str(root), at=1)


@pytest.mark.parametrize(
    ("given", "at"),
    [
        (None, None),
        (7, 7),
        ("7", 7),
        (" 20261121 ", 20261121),
        ("2026-11-21", dt.datetime(2026, 11, 21, tzinfo=UTC)),
        ("2026-11-21T08:30:00+01:00", dt.datetime(2026, 11, 21, 7, 30, tzinfo=UTC)),
        (dt.datetime(2026, 11, 21), dt.datetime(2026, 11, 21, tzinfo=UTC)),
    ],
)
def test_versions_are_numbers_or_times(given, at):
    assert parse_at(given) == at
    lake = Lake("s3://lake/t", at=given)
    assert lake.at == at
    assert pickle.loads(pickle.dumps(lake)) == lake


@pytest.mark.parametrize(
    "at", [-1, 1.5, True, "", "yesterday", "-1", "2026-13-01", dt.date(2026, 1, 1)]
)
def test_what_is_no_version_is_refused(at):
    with pytest.raises(UserError, match=r"^at is .*: give the number of a version, or a time such"):
        Lake("s3://lake/t", at=at)


def test_parquet_has_no_versions(tmp_path):
    lakes.write(tmp_path / "a.parquet", {"x": [1.0]})
    for url in (tmp_path, tmp_path / "a.parquet"):
        message = rf"^{url}: no table, but Parquet files, which have no versions: leave out at, whi"
        with pytest.raises(UserError, match=message):
            plan_of(Lake(str(url), at=3))


def test_a_snapshot_is_part_of_the_plan(tmp_path):
    # The same files in another table, or another version of it, are another plan.
    rows = lakes.write(tmp_path / "a" / "f.parquet", {"x": [1.0]})
    facts = deltas.metadata([deltas.field("x", "double")], table="mine")
    start = {"protocol": {"minReaderVersion": 1, "minWriterVersion": 2}}
    deltas.commit(tmp_path / "a", start, facts, deltas.add("f.parquet", rows))
    first = plan_lake(str(tmp_path / "a"))
    assert first.snapshot == Snapshot(format="Delta", table="mine", version=0)
    assert pickle.loads(pickle.dumps(first)).hash == first.hash
    deltas.commit(tmp_path / "a", {"commitInfo": {}})
    second = plan_lake(str(tmp_path / "a"))
    assert second.snapshot.version == 1
    assert second.versions == first.versions
    assert second.hash != first.hash
    plain = lakes.write(tmp_path / "b" / "f.parquet", {"x": [1.0]})
    os.utime(plain, ns=(0, rows.stat().st_mtime_ns))
    assert plan_lake(str(tmp_path / "b")).versions == first.versions
    assert plan_lake(str(tmp_path / "b")).hash != first.hash


@pytest.mark.parametrize("name", ["variantType", "geospatial", "made-up"])
def test_features_that_are_not_known_are_refused_by_name(tmp_path, name):
    root = deltas.write(tmp_path / "t", {"x": [1.0]})
    deltas.commit(root, deltas.protocol(name))
    message = (
        rf"^{root}: the table asks its readers for '{name}', which is not known here; drop the"
    )
    with pytest.raises(UserError, match=message):
        plan_lake(str(root))
    assert plan_lake(str(root), at=0).n_rows == 1 if name == "variantType" else True


@pytest.mark.parametrize("name", ["vacuumProtocolCheck", "timestampNtz", "v2Checkpoint"])
def test_features_that_touch_no_row_are_known(tmp_path, name):
    root = deltas.write(tmp_path / "t", {"x": [1.0]})
    deltas.commit(root, deltas.protocol(name))
    assert plan_lake(str(root)).n_rows == 1


def test_vectors_that_deltalake_does_not_read_are_refused(tmp_path):
    root = deltas.write(tmp_path / "t", {"x": [1.0, 2.0]})
    deltas.commit(root, deltas.protocol("typeWidening"))
    (path,) = (a["add"]["path"] for a in deltas.actions_of(root, 0) if "add" in a)
    deltas.delete_rows(root, {path: [0]})
    with pytest.raises(UserError, match=rf"^{root}: the table asks its readers for 'TypeWidening'"):
        plan_lake(str(root))


def test_a_vacuumed_file_is_told_in_a_line(tmp_path):
    root = deltas.write(tmp_path / "t", {"x": [1.0, 2.0, 3.0]})
    planned = plan_lake(str(root))
    deltas.write(root, {"x": [4.0]}, mode="overwrite")
    assert plan_lake(str(root), at=0).n_rows == 3  # it is still there
    deltas.opened(root).vacuum(0, dry_run=False, enforce_retention_duration=False)
    message = (
        rf"^{root}/part-.*: the table's log names this file, but it is gone, as VACUUM or expiring "
        r"snapshots leave the files of older versions; read a newer version \(at\)"
    )
    with pytest.raises(UserError, match=message):
        plan_lake(str(root), at=0)
    with pytest.raises(UserError, match=message):
        lakes.read_all(planned)
    assert plan_lake(str(root)).n_rows == 1


def test_files_that_are_not_as_the_log_says_are_refused(tmp_path):
    root = deltas.write(tmp_path / "t", {"x": [1.0, 2.0, 3.0]})
    (path,) = (a["add"]["path"] for a in deltas.actions_of(root, 0) if "add" in a)
    planned = plan_lake(str(root))
    actions = deltas.actions_of(root, 0)
    for action in actions:
        if "add" in action:
            stats = json.loads(action["add"]["stats"]) | {"numRecords": 4}
            action["add"]["stats"] = json.dumps(stats)
    deltas.rewrite(root, 0, actions)
    message = rf"{path}: the footer promises 3 rows, the table's log 4; write the file again or mo"
    with pytest.raises(UserError, match=message):
        plan_lake(str(root))
    lakes.write(root / path, {"x": [1.0, 2.0, 3.0], "y": [1.0, 2.0, 3.0]})
    with pytest.raises(UserError, match=rf"{path}: .* bytes where the table's log has .*; restore"):
        plan_lake(str(root))
    with pytest.raises(UserError, match=rf"{path}: changed since the plan was made; run again"):
        lakes.read_all(planned)


def test_a_vector_that_is_gone_is_told_in_a_line(tmp_path):
    root = deltas.write(tmp_path / "t", {"x": [1.0, 2.0, 3.0]})
    (path,) = (a["add"]["path"] for a in deltas.actions_of(root, 0) if "add" in a)
    deltas.delete_rows(root, {path: [0]})
    planned = plan_lake(str(root))
    for file in root.glob("*.bin"):
        file.unlink()
    with pytest.raises(UserError, match=rf"^{root}: deltalake cannot read .*\.bin\); mend the tab"):
        plan_lake(str(root))
    # A plan holds what is deleted.
    assert lakes.read_all(planned)[0].ravel().tolist() == [2, 3]


def test_without_the_package_the_line_says_what_to_install(tmp_path, monkeypatch):
    root = deltas.write(tmp_path / "t", {"x": [1.0]})
    monkeypatch.setitem(sys.modules, "deltalake", None)
    message = rf"^{root}: a Delta table, which takes the package deltalake to read; pip install 'gm"
    with pytest.raises(UserError, match=message):
        plan_lake(str(root))


def test_a_log_that_makes_no_sense_is_told_in_a_line(tmp_path):
    root = deltas.write(tmp_path / "t", {"x": [1.0]})
    deltas.log_of(root, 0).write_text("no JSON")
    with pytest.raises(
        UserError, match=rf"^{root}: deltalake cannot read the table's log \("
    ) as told:
        plan_lake(str(root))
    assert "\n" not in str(told.value)
    with pytest.raises(UserError, match="opens no table below a folder with % in its name; rename"):
        plan_lake(str(deltas.commit(tmp_path / "a%20b", {}) or tmp_path / "a%20b"))


def test_credentials_are_those_of_the_files(tmp_path, s3_lake, monkeypatch):
    root = deltas.write(tmp_path / "t", {"x": [1.0]})
    url = lakes.upload(root, s3_lake.file_system(), s3_lake.url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    profile = tmp_path / "credentials"
    keys = f"aws_access_key_id = {s3_lake.key}\naws_secret_access_key = {s3_lake.secret}\n"
    profile.write_text(f"[mine]\n{keys}")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": s3_lake.endpoint})
    assert plan_lake(url).n_rows == 1

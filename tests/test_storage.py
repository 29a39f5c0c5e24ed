"""Opening URLs, and what a user is told when that fails."""

from __future__ import annotations

import socket
import time

import pytest

from gmm_dist import storage
from gmm_dist.errors import UserError


def look(url: str) -> None:
    with storage.explained(url):
        fs, path = storage.open_url(url)
        fs.ls(path)


def test_a_local_path_a_file_url_and_a_relative_path_are_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = str(tmp_path / "a b" / "lake")
    assert storage.absolute("a b/lake") == wanted
    assert storage.absolute(f"file://{wanted}/") == wanted
    assert storage.absolute("s3://lake/x/") == "s3://lake/x"


def test_parts_are_joined_by_one_slash():
    assert storage.join("s3://lake/x/", "dt=1/", "/a.parquet") == "s3://lake/x/dt=1/a.parquet"
    assert storage.join("/", "a") == "/a"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("/data/a@b?c", "/data/a@b?c"),
        ("s3://lake/a?b#c@d", "s3://lake/a?b#c@d"),
        ("s3://key:secret@lake/x", "s3://lake/x"),
        ("ftp://user:secret@host:21/x", "ftp://host:21/x"),
        ("https://user:secret@host/x.parquet?X-Amz-Signature=1", "https://host/x.parquet"),
    ],
)
def test_secrets_are_left_out_of_messages(url, shown):
    assert storage.redacted(url) == shown


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("/no/such/place", "/no/such/place: no such file or folder; check the path"),
        ("nope://x/y", "nope://x/y: unknown protocol; use a local path or a URL such as s3://"),
        ("gs://x/y", "gs://x/y: this protocol needs a package that is not installed: .*gcs"),
    ],
)
def test_a_wrong_url_is_explained(url, message):
    with pytest.raises(UserError, match=message):
        look(url)


def test_other_errors_pass_unchanged():
    with pytest.raises(ZeroDivisionError), storage.explained("s3://lake"):
        raise ZeroDivisionError
    with pytest.raises(UserError, match="as it was"), storage.explained("s3://lake"):
        raise UserError("as it was")


def test_the_version_of_a_link_is_that_of_its_target(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("a")
    link.symlink_to(target)
    fs, path = storage.open_url(str(link))
    before = storage.version(fs, fs.info(path))
    target.write_text("b")
    assert storage.version(fs, fs.info(path)) != before


def test_the_endpoint_and_credentials_come_from_the_environment(s3_lake):
    fs, path = storage.open_url(f"{s3_lake.url}/a")
    fs.pipe_file(path, b"abc")
    assert s3_lake.file_system().cat_file(path) == b"abc"


def test_a_listing_is_never_stale(s3_lake):
    fs, path = storage.open_url(s3_lake.url)
    fs.pipe_file(f"{path}/a", b"1")
    assert len(fs.ls(path)) == 1
    s3_lake.file_system().pipe_file(f"{path}/b", b"2")
    assert len(fs.ls(path)) == 2


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("AWS_ACCESS_KEY_ID", "nobody", r"access denied \(.*\); check the permissions and the cr"),
        ("AWS_SECRET_ACCESS_KEY", "wrong", r"access denied \(.*signature.*\); check the permis"),
        ("AWS_ACCESS_KEY_ID", None, "no complete credentials found; set AWS_ACCESS_KEY_ID and"),
    ],
)
def test_wrong_credentials_are_explained_within_seconds(
    s3_lake, monkeypatch, variable, value, message
):
    if value is None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    else:
        monkeypatch.setenv(variable, value)
    started = time.monotonic()
    with pytest.raises(UserError, match=f"^{s3_lake.url}: {message}"):
        look(s3_lake.url)
    assert time.monotonic() - started < 10


def test_a_missing_bucket_is_explained(s3_lake):
    with pytest.raises(UserError, match="s3://nobucket/x: the bucket does not exist; check its"):
        look("s3://nobucket/x")


def test_an_endpoint_that_nobody_listens_on_is_explained(s3_lake, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # ours are ten, about a minute
        with pytest.raises(UserError, match=r"no connection \(.*\); check the network and AWS_E"):
            look(s3_lake.url)

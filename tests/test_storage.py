"""Opening URLs, and what a user is told when that fails."""

from __future__ import annotations

import errno
import io
import logging
import pickle
import socket
import time
from collections.abc import Iterator

import faulty
import lakes
import numpy as np
import pytest
from botocore.exceptions import ClientError
from conftest import S3Server, forget_connections

from gmm_dist import storage
from gmm_dist.errors import RunFailed, UserError
from gmm_dist.lake import listing, opening, read, survey
from gmm_dist.lake.plan import Plan, plan_lake
from gmm_dist.lake.probe import probe
from gmm_dist.storage import Patience


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


def test_a_protocol_that_lacks_more_than_a_package_is_explained(monkeypatch):
    def opened(*asked):
        raise OSError("Unable to load libjvm\n" + "a path " * 99)  # as pyarrow has it, for hdfs

    monkeypatch.setattr(storage, "_opened", opened)
    with pytest.raises(UserError, match=r"^hdfs://h/x: this protocol .*\(Unable to load") as told:
        look("hdfs://h/x")
    assert len(str(told.value)) < 400


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


# --- faults that pass, and faults that do not

QUICK = Patience(seconds=0.3, first_pause=0.01, longest_pause=0.05)


def answered(status: int, code: str = "") -> OSError:
    """Return the error that s3fs makes of such an answer."""
    meta = {"HTTPStatusCode": status}
    error = OSError(errno.EIO, "what the store said")
    error.__cause__ = ClientError({"Error": {"Code": code}, "ResponseMetadata": meta}, "GetObject")
    return error


def explained_as_user_error() -> UserError:
    error = UserError("no connection")
    error.__cause__ = ConnectionRefusedError("refused")
    return error


class Failing:
    """Raises an error so many times, and then returns 7."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.times, self.calls = error, times, 0

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return 7


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("reset"),
        TimeoutError(),
        storage.TornReadError("3 of 4 bytes"),
        answered(503, "SlowDown"),
        answered(500),
        answered(429),
        answered(400, "RequestTimeout"),
        explained_as_user_error(),
    ],
)
def test_what_may_pass_is_tried_again(error):
    call = Failing(error, times=4)
    assert storage.patiently(call, "s3://lake", patience=QUICK) == 7
    assert call.calls == 5


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("gone"),
        PermissionError("denied"),
        answered(403, "AccessDenied"),
        answered(412),
        answered(501),
        UserError("changed since the plan was made"),
        ZeroDivisionError(),
    ],
)
def test_what_will_not_pass_is_raised_at_once(error):
    call = Failing(error, times=1)
    with pytest.raises(type(error)) as raised:
        storage.patiently(call, "s3://lake", patience=QUICK)
    assert raised.value is error
    assert call.calls == 1


def test_an_error_raised_from_itself_ends():
    error = UserError("a circle")
    error.__cause__ = error
    with pytest.raises(UserError, match="a circle"):
        storage.patiently(Failing(error, times=1), "s3://lake", patience=QUICK)


def test_a_damaged_file_is_read_twice_more_before_it_is_blamed():
    error = storage.DamagedError("cannot be read")
    assert storage.patiently(Failing(error, times=2), "s3://lake", patience=QUICK) == 7
    call = Failing(error, times=9)
    with pytest.raises(UserError, match="cannot be read"):
        storage.patiently(call, "s3://lake", patience=QUICK)
    assert call.calls == 3


def test_patience_begins_with_the_first_failure_not_with_the_call():
    calls = []

    def slow_at_first() -> int:
        calls.append(1)
        if len(calls) == 1:
            time.sleep(1.5 * QUICK.seconds)
        if len(calls) < 4:
            raise ConnectionResetError
        return 7

    assert storage.patiently(slow_at_first, "s3://lake", patience=QUICK) == 7


def test_whoever_interrupts_is_not_kept_waiting():
    def interrupted() -> None:
        calls.append(1)
        raise KeyboardInterrupt from ConnectionResetError("reset")

    calls: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        storage.patiently(interrupted, "s3://lake", patience=QUICK)
    assert len(calls) == 1


def test_patience_ends_in_one_line_that_travels(caplog):
    call = Failing(ConnectionRefusedError(111, "refused\n by all"), times=10**6)
    message = (
        r"^s3://lake/x: the storage failed for 0 s \(\[Errno 111\] refused by all\); check the n"
    )
    began = time.monotonic()
    with pytest.raises(storage.StorageFailed, match=message) as raised:
        storage.patiently(call, "s3://key:secret@lake/x", patience=QUICK)
    assert 0.2 < time.monotonic() - began < 5
    assert isinstance(raised.value, RunFailed)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
    assert call.calls > 5
    lines = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(lines) == 1  # the next would come after ten seconds
    assert lines[0].startswith("s3://lake/x: the storage fails for 0 s now, trying for up to 0 s (")


@pytest.fixture
def proxied(s3_lake: S3Server, tmp_path, monkeypatch) -> Iterator[tuple[faulty.Proxy, str]]:
    """Yield a proxy through which this process reaches the server, and a lake of two files."""
    for name in ("a", "b"):
        columns = {"x": lakes.numbers(3000, seed=ord(name))}
        lakes.write(tmp_path / f"{name}.parquet", columns, rows_per_group=1000)
    lakes.upload(tmp_path, s3_lake.file_system(), s3_lake.url)
    read.release()
    with faulty.proxy(s3_lake.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        forget_connections()
        yield proxy, s3_lake.url
        forget_connections()


def rows_of(plan: Plan) -> np.ndarray:
    read.release()
    return lakes.read_all(plan)[0][:, 0]


WANTED = np.concatenate([lakes.numbers(3000, seed=ord(name)) for name in "ab"])


def test_an_outage_is_outlasted_in_planning_and_reading(proxied, caplog):
    proxy, url = proxied
    with proxy.outage(3):  # s3fs alone gives up after 1.8 s
        plan = plan_lake(url, n_shards=3)
    with proxy.outage(3):
        np.testing.assert_array_equal(rows_of(plan), WANTED)
    with proxy.outage(1):
        assert len(probe(plan)) == 6000
    assert f"{url}: the storage fails for 0 s now, trying for up to 180 s (" in caplog.text
    assert f"{url}/a.parquet: the storage fails for 0 s now" in caplog.text


def test_an_outage_between_listing_and_footers_is_outlasted(proxied):
    proxy, url = proxied
    found = listing.find(url)
    with proxy.outage(3):
        footers = survey.read_footers(
            found,
            found.files,
            survey.Questions(
                names=None, tested=None, keys=found.keys, no_nulls=(), chunks=0, keep=()
            ),
        )
    assert [footer.file.rows for footer in footers] == [(1000, 1000, 1000)] * 2


def test_an_outage_in_the_middle_of_a_file_is_outlasted(proxied):
    proxy, url = proxied
    plan = plan_lake(url, n_shards=1)
    parts = read.read(plan, 0)
    read.release()
    first = next(parts).X
    with proxy.outage(2):
        rest = [part.X for part in parts]
    np.testing.assert_array_equal(np.concatenate([first, *rest])[:, 0], WANTED)


def test_a_busy_store_is_asked_again(proxied):
    proxy, url = proxied
    proxy.busy = 5
    np.testing.assert_array_equal(rows_of(plan_lake(url)), WANTED)
    assert proxy.faults == 5


@pytest.mark.parametrize("small", [True, False])
def test_torn_bodies_are_read_again(proxied, monkeypatch, small):
    proxy, url = proxied
    if not small:
        monkeypatch.setattr("gmm_dist.lake.opening._SMALL_BYTES", 0)
    plan = plan_lake(url, n_shards=2)
    proxy.torn, proxy.torn_after = 7, 100  # s3fs tries five times
    np.testing.assert_array_equal(rows_of(plan), WANTED)
    assert proxy.faults == 7


def test_slow_bodies_are_waited_for(proxied):
    proxy, url = proxied
    plan = plan_lake(url)
    proxy.bytes_per_second = 40_000
    began = time.monotonic()
    np.testing.assert_array_equal(rows_of(plan), WANTED)
    assert time.monotonic() - began > 1  # 50 kB: it was slow indeed


def test_an_outage_without_end_ends_in_one_line(proxied, monkeypatch):
    proxy, url = proxied
    plan = plan_lake(url)
    monkeypatch.setattr(storage, "PATIENCE", QUICK)
    proxy.refuse()
    with pytest.raises(storage.StorageFailed, match=rf"^{url}: the storage failed for \d+ s \(.*C"):
        plan_lake(url)
    with pytest.raises(storage.StorageFailed, match=rf"^{url}/a.parquet: the storage failed for"):
        rows_of(plan)


def test_a_key_that_was_replaced_during_an_outage_is_an_error(proxied, tmp_path, s3_lake):
    proxy, url = proxied
    plan = plan_lake(url, n_shards=1)
    lakes.write(tmp_path / "a.parquet", {"x": lakes.numbers(3000)}, rows_per_group=1000)
    lakes.upload(tmp_path, s3_lake.file_system(), url)
    with (
        proxy.outage(0.5),
        pytest.raises(UserError, match=f"{url}/a.parquet: changed since the plan was made; run"),
    ):
        rows_of(plan)


def test_bytes_that_are_missing_are_noticed_whatever_the_file_system():
    file = opening._Exact(io.BytesIO(b"abcd"), size=6)
    assert file.read(3) == b"abc"
    with pytest.raises(storage.TornReadError, match="1 of 3 bytes came from 3 on"):
        file.read(3)
    assert opening._Exact(io.BytesIO(b"abcd"), size=4).read(9) == b"abcd"

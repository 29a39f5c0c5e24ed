"""Lakes behind a plain web server: with ETags and without, that change while they are read."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import lakes
import numpy as np
import pytest

from gmm_dist import web_folders
from gmm_dist.errors import UserError
from gmm_dist.lake import opening, read
from gmm_dist.lake.plan import plan_lake


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, its ranges, and 412 to those who ask for another version."""

    protocol_version = "HTTP/1.1"
    etag = '"{}"'  # of the file's mtime; "" for none
    dated, ranges, refuses_ranges, sized = True, True, False, True

    def log_message(self, *_: object) -> None:
        pass

    def send_head(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return super().send_head()
        stat, whole = path.stat(), path.read_bytes()
        tag = self.etag.format(stat.st_mtime_ns)
        wanted = self.headers.get("If-Match")
        if wanted and (wanted != tag or tag.startswith("W/")):
            self.send_error(412)
            return None
        # A compressed answer has other bytes in a range.
        identity = self.headers.get("Accept-Encoding") == "identity"
        if "Range" in self.headers and not identity:
            self.send_error(406)
            return None
        if "Range" in self.headers and self.refuses_ranges:
            self.send_error(416)
            return None
        asked = self.headers.get("Range") if self.ranges else None
        first, last = (
            map(int, asked.removeprefix("bytes=").split("-")) if asked else (0, len(whole))
        )
        part = whole[first : last + 1]
        self.send_response(206 if asked else 200)
        for name, value in (
            ("ETag", tag),
            ("Last-Modified", formatdate(stat.st_mtime, usegmt=True)),
        ):
            if value and (self.dated or name == "ETag"):
                self.send_header(name, value)
        self.send_header("Content-Type", "application/octet-stream")
        if self.sized:
            self.send_header("Content-Length", str(len(part)))
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part)
        return None


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve two files under hive keys; return their folder's address."""
    lakes.numbered(tmp_path / "lake")
    monkeypatch.chdir(tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/lake"
        server.shutdown()


ANSWERS = {
    "etag": {},
    "weak": {"etag": 'W/"{}"'},
    "date": {"etag": ""},
    "nothing": {"etag": "", "dated": False},
}


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("small", [0, 2**21], ids=["ranges", "whole"])
def test_a_file_is_read_as_it_was_planned(served, monkeypatch, answers, small):
    monkeypatch.setattr(opening, "_SMALL_BYTES", small)
    for name, value in answers.items():
        monkeypatch.setattr(Handler, name, value)
    plan = plan_lake(f"{served}/dt=2026-11-02/a.parquet", columns=["i"])
    assert bool(plan.files[0].version) == (answers != ANSWERS["nothing"])
    assert lakes.read_all(plan)[0].ravel().tolist() == list(range(25, 50))


def test_a_folder_is_a_lake_with_its_hive_keys(served, tmp_path):
    (tmp_path / "lake" / "notes.txt").write_text("not Parquet")
    lakes.write(tmp_path / "lake" / "dt=2026-11-03" / "000000_0", {"x": [1.0], "i": [50]})
    plan = plan_lake(served, columns=["i"], where="dt >= '2026-11-02'")
    assert lakes.read_all(plan)[0].ravel().tolist() == list(range(25, 51))


@pytest.mark.parametrize("answers", [{}, {"etag": 'W/"{}"'}, {"etag": ""}], ids=list(ANSWERS)[:3])
def test_a_file_that_changed_since_the_plan_is_an_error(served, tmp_path, monkeypatch, answers):
    for name, value in answers.items():
        monkeypatch.setattr(Handler, name, value)
    path = tmp_path / "lake" / "dt=2026-11-02" / "a.parquet"
    url = f"{served}/dt=2026-11-02/a.parquet"
    plan = plan_lake(url, columns=["i"])
    os.utime(path, (1e9, 1e9))
    message = f"^{url}: changed since the plan was made; run again$"
    with pytest.raises(UserError, match=message):
        lakes.read_all(plan)
    path.unlink()
    with pytest.raises(UserError, match=message):
        lakes.read_all(plan)


def test_a_file_that_changes_while_it_is_read_is_an_error(served, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "_SMALL_BYTES", 0)
    rows = read.read(plan_lake(f"{served}/dt=2026-11-02/a.parquet", columns=["i"]), 0)
    next(rows)
    os.utime(tmp_path / "lake" / "dt=2026-11-02" / "a.parquet", (1e9, 1e9))
    with pytest.raises(UserError, match="changed since the plan was made"):
        next(rows)


def test_a_server_without_ranges_serves_what_is_small(served, tmp_path, monkeypatch):
    monkeypatch.setattr(Handler, "ranges", False)
    i = np.arange(25).repeat(2000)
    lakes.write(
        tmp_path / "lake" / "dt=2026-11-02" / "a.parquet", {"i": i, "x": lakes.numbers(50_000)}
    )
    url = f"{served}/dt=2026-11-02/a.parquet"
    assert len(lakes.read_all(plan_lake(url, columns=["i"]))[0]) == 50_000
    monkeypatch.setattr(opening, "_SMALL_BYTES", 0)
    message = (
        f"^{url}: the server sends no parts of the file; copy it to a disk or an object store$"
    )
    with pytest.raises(UserError, match=message):
        plan_lake(url)


@pytest.mark.parametrize("small", [0, 2**21], ids=["ranges", "whole"])
def test_a_server_that_refuses_ranges_is_not_waited_for(served, monkeypatch, small):
    monkeypatch.setattr(opening, "_SMALL_BYTES", small)
    monkeypatch.setattr(Handler, "refuses_ranges", True)
    url = f"{served}/dt=2026-11-02/a.parquet"
    with pytest.raises(UserError, match=f"^{url}: the server sends no parts of the file; copy"):
        plan_lake(url)


def test_a_server_that_tells_no_size_is_named(served, monkeypatch):
    monkeypatch.setattr(Handler, "sized", False)
    url = f"{served}/dt=2026-11-02/a.parquet"
    with pytest.raises(UserError, match=f"^{url}: the server does not tell the size of the file"):
        plan_lake(url)


@pytest.mark.parametrize(
    ("links", "names"),
    [
        # nginx, Apache and Python's; Caddy's; absolute ones, spelt otherwise than the folder.
        ('<a href="../">../</a><A HREF="http.parquet">x</A>', ["http.parquet"]),
        ("<a href='./a.parquet'>a</a><a href='./'>.</a>", ["a.parquet"]),
        ('<a href="/lake/dt%3D1/a.parquet">a</a><a href="/other/b">b</a>', ["a.parquet"]),
        ('<a href="HTTP_HOST/lake/dt=1/https-logs/">a</a>', ["https-logs/"]),
        ('<a href="a&amp;b.parquet">a</a><a href="it&#39;s">b</a>', ["a&b.parquet", "it's"]),
        ('<a href="12:00.parquet#top">x</a><a href="javascript:void(0)">x</a>', ["12:00.parquet"]),
        ('<a href="mailto:a@b">x</a><a href="../c.parquet">x</a><a href="#x">x</a><a>x</a>', []),
        ('<a href="http://elsewhere/lake/dt=1/a.parquet">x</a><a href="//e/lake/dt=1/a">x</a>', []),
    ],
)
def test_what_an_index_page_names(links, names):
    host = "http://host:8000"
    for url in (f"{host}/lake/dt=1", f"{host}/lake/dt=1/"):
        found = web_folders.named(links.replace("HTTP_HOST", host), url)
        assert found == {f"{host}/lake/dt=1/{name}" for name in names}


def test_files_and_folders_whose_names_begin_with_http_are_read(served, tmp_path):
    lakes.write(tmp_path / "lake" / "https-logs" / "http.parquet", {"x": [1.0], "i": [50]})
    assert sorted(lakes.read_all(plan_lake(served, columns=["i"]))[0].ravel()) == list(range(51))


def test_what_is_not_there_is_said(served):
    with pytest.raises(UserError, match=f"^{served}/nope: no such file or folder; check the path$"):
        plan_lake(f"{served}/nope")

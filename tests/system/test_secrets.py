"""No credential of a URL gets into what a run writes, prints or logs, whatever comes of it."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote

import fsspec
import lakes
import mixtures
import pytest
from conftest import S3Server
from test_score import MIXTURE, model_at

from gmm_dist import storage
from gmm_dist.commands import fit as fit_job
from gmm_dist.commands import nightly as nightly_job
from gmm_dist.commands import score as score_job
from gmm_dist.commands import sweep as sweep_job
from gmm_dist.errors import UserError
from gmm_dist.lake.plan import plan_lake
from gmm_dist.runs import load
from gmm_dist.storage import Patience

PASSWORD, SIGNATURE, TOKEN = "pass-4711-word", "c2ln/4712+bmF0dXJl", "token-4713"
SECRETS = [PASSWORD, SIGNATURE, TOKEN, quote(SIGNATURE, safe=""), "4711-word"]
QUERY = f"X-Amz-Signature={quote(SIGNATURE, safe='')}&token={TOKEN}"


class _Handler(BaseHTTPRequestHandler):
    """Serves one folder to who knows the password and the signature; others get a 403."""

    folder: Path
    status = 200

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path, _, query = self.path.partition("?")
        wanted = "Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode()
        file = self.folder / path.lstrip("/")
        status = self.status
        if self.headers.get("Authorization") != wanted or parse_qs(query) != parse_qs(QUERY):
            status = 403
        elif not file.is_file():
            status = 404
        data = file.read_bytes() if status == 200 else b"no"
        if status == 200 and (asked := self.headers.get("Range")):
            first, last = (int(n) for n in asked.removeprefix("bytes=").split("-"))
            part, status = data[first : last + 1], 206
        else:
            part = data
        self.send_response(status)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if body:
            self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[type[_Handler], str]]:
    """Serve a lake of one file, and a model; give what serves and the URL's pattern."""
    handler = type("Handler", (_Handler,), {"folder": tmp_path / "served"})
    (tmp_path / "served").mkdir()
    lakes.write(
        tmp_path / "served" / "points.parquet",
        dict(zip("xy", mixtures.rows(MIXTURE, 600).numpy().T, strict=True)),
        rows_per_group=300,
    )
    model_at(str(tmp_path / "served" / "fitted"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    fsspec.filesystem("http").clear_instance_cache()
    try:
        port = server.server_address[1]
        yield handler, f"http://me:{PASSWORD}@127.0.0.1:{port}/{{}}?{QUERY}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def require_none(out: Path, *texts: str) -> None:
    """Assert that neither files nor names below `out`, nor the texts, hold a secret."""
    names = [str(path.relative_to(out)) for path in out.rglob("*")]
    contents = [
        path.read_bytes().decode(errors="replace") for path in out.rglob("*.*") if path.is_file()
    ]
    assert len(contents) > 2 or texts
    for secret in SECRETS:
        for text in (*names, *contents, *texts):
            assert secret not in text, text[max(0, text.find(secret) - 80) :][:200]


def test_jobs_over_http_write_and_say_no_secret(
    served: tuple[type[_Handler], str],
    tmp_path: Path,
    ray_address: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    _, url = served
    out = tmp_path / "out"
    cluster = ["--address", ray_address, "--num-workers", "1"]
    data, model = url.format("points.parquet"), url.format("fitted")
    runs = [
        (sweep_job, [data, "--k", "2", "--output", f"{out}/sweep", *cluster]),
        (score_job, [data, "--model", model, "--output", f"{out}/scored", *cluster]),
    ]
    for job, argv in runs:
        assert job.main(argv) == 0
    printed = capfd.readouterr()
    require_none(out, printed.out, printed.err)
    assert (out / "scored" / "points.parquet").exists()
    # A signature that was made anew names the same run.
    assert load.load(f"{out}/sweep").n_features == 2


def test_refusals_and_failures_say_no_secret(
    served: tuple[type[_Handler], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    handler, url = served
    monkeypatch.setattr(storage, "PATIENCE", Patience(0.3, 0.01, 0.05))
    data, model = url.format("points.parquet"), url.format("fitted")
    wrong = data.replace("token=", "token=4713-")
    out = f"{tmp_path}/out"
    refused = [
        (sweep_job, [wrong, "--k", "2", "--output", out], 2),
        (sweep_job, [url.format("nothing.parquet"), "--k", "2", "--output", out], 2),
        (sweep_job, [data, "--k", "2", "--columns", "z", "--output", out], 2),
        (sweep_job, [data, "--k", "2", "--where", "x > 1e9", "--output", out], 2),
        (sweep_job, [data, "--k", "900", "--output", out], 2),
        (sweep_job, [data, "--k", "2", "--output", out, f"--nothing={data}", data], 2),
        (fit_job, [data, "--start", wrong, "--output", out], 2),
        (score_job, [data, "--model", wrong, "--output", out], 2),
        (score_job, [data, "--model", model, "--keep", "z", "--output", out], 2),
        (score_job, [data, "--model", model, "--output", f"s3://AKIA:{PASSWORD}@lake/x"], 2),
        (score_job, [data, "--model", model, "--output", data], 2),
        (sweep_job, [f"nope://me:{PASSWORD}@host/x?{QUERY}", "--k", "2", "--output", out], 2),
        (
            nightly_job,
            [data, "--k", "2", "--registry", model, "--night", "2026-11-21", "--partition", "ds"],
            2,
        ),
    ]
    for job, argv, status in refused:
        assert job.main(argv) == status, argv
    handler.status = 503
    assert sweep_job.main([data, "--k", "2", "--output", out]) == 1
    printed = capfd.readouterr()
    require_none(tmp_path / "served", printed.out, printed.err)
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(refused) + 1
    assert "Traceback" not in printed.err
    assert errors[-1].endswith("--resume (with the credentials, which are left out here)")


def test_a_plan_is_the_same_under_another_signature(served: tuple[type[_Handler], str]) -> None:
    _, url = served
    plan = plan_lake(url.format("points.parquet"))
    assert [file.path for file in plan.files] == ["points.parquet"]
    for secret in SECRETS:
        assert secret not in repr(plan)


def test_an_s3_url_with_credentials_is_refused(s3_lake: S3Server) -> None:
    bucket = s3_lake.url.removeprefix("s3://")
    for url in (f"s3://AKIA:{PASSWORD}@{bucket}", f"s3://{bucket}?X-Amz-Signature={TOKEN}"):
        for act in (plan_lake, load.load):
            with pytest.raises(UserError, match="credentials") as raised:
                act(url)
            assert not [secret for secret in SECRETS if secret in str(raised.value)]

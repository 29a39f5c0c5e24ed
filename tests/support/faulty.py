"""A loopback HTTP proxy that fails as object stores and networks do, when a test says so."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)


class Proxy:
    """Passes requests on unchanged (Host too, which S3's signatures cover), but for its faults.

    `endpoint`: its URL. `busy`: so many requests are answered 503 SlowDown. `torn`: so many GET
    bodies are cut after `torn_after` bytes. `bytes_per_second`: the pace of bodies, None: none.
    `requests` counts what has been asked, `faults` what went wrong of it, refusals aside.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.busy = self.torn = self.requests = self.faults = 0
        self.torn_after = 0
        self.bytes_per_second: float | None = None
        self.lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self._port = 0
        self.listen()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def is_down(self) -> bool:
        return self._server is None

    def listen(self) -> None:
        """Accept connections, at the same port as before."""
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def refuse(self) -> None:
        """Refuse new connections, and cut those that are open when they are next used."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    @contextmanager
    def outage(self, seconds: float) -> Iterator[None]:
        """Refuse connections from now on until `seconds` have passed, while the block runs."""
        self.refuse()
        timer = threading.Timer(seconds, self.listen)
        timer.start()
        try:
            yield
        finally:
            timer.join()

    def takes(self, fault: str) -> bool:
        """Use up one of the faults `busy` or `torn`, if any is left."""
        with self.lock:
            left: int = getattr(self, fault)
            setattr(self, fault, max(left - 1, 0))
            self.faults += left > 0
            return left > 0


@contextmanager
def proxy(upstream: str) -> Iterator[Proxy]:
    """Run a proxy in front of the server at `upstream`, a URL."""
    running = Proxy(upstream)
    try:
        yield running
    finally:
        running.refuse()


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"
    timeout = 30

    def log_message(self, *_: object) -> None:
        pass

    def _pass_on(self) -> None:
        try:
            self._answer()
        except OSError:  # a client that has given up, or a server that is not there
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on  # noqa: N815

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.proxy.lock:
            self.proxy.requests += 1
        if self.proxy.is_down:
            self.close_connection = True
        elif self.proxy.takes("busy"):
            self._send(503, [("Content-Type", "application/xml")], _SLOW_DOWN)
        else:
            self._send(*self._asked(body))

    def _asked(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=30)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() != "expect":
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            upstream.close()

    def _send(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        names = {name.lower() for name, _ in headers}
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        if "content-length" not in names:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.proxy.torn_after
        if self.command == "GET" and len(body) > cut and self.proxy.takes("torn"):
            body, self.close_connection = body[:cut], True
        self._write(body)

    def _write(self, body: bytes) -> None:
        pace = self.proxy.bytes_per_second
        if pace is None:
            self.wfile.write(body)
            return
        step = max(int(pace / 20), 1)
        for start in range(0, len(body), step):
            self.wfile.write(body[start : start + step])
            time.sleep(step / pace)

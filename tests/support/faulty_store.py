"""An S3 server with faults: a proxy in front of a real one, which fails the requests that a rule chooses."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
import s3fs

from tests.support.weed import Weed

Rule = Callable[[str, str], bool]
"""From a request's method and path, with its query, to whether it fails."""

FAULTS = ("503", "dropped", "broken off")
"""What a failing request gets: an error of the store; a connection that ends in the middle of what was sent; half of the answer."""


class FaultyStore:
    """Passes requests on to an S3 server, or fails them by `fault`, one of `FAULTS`, as often as `times` says."""

    def __init__(self, endpoint: str):
        self.upstream = urlsplit(endpoint).netloc
        self.rule: Rule = lambda method, path: False
        self.fault, self.times, self.failed = "503", 0, 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def fail(self, rule: Rule, fault: str, times: int) -> None:
        """Fails the next `times` requests that the rule chooses."""
        self.rule, self.fault, self.times, self.failed = rule, fault, times, 0

    def chosen(self, method: str, path: str) -> bool:
        """Whether this request fails."""
        with self._lock:
            if self.failed >= self.times or not self.rule(method, path):
                return False
            self.failed += 1
            return True

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: FaultyStore

    def _relay(self) -> None:
        size, fault = int(self.headers.get("Content-Length") or 0), None
        if self.store.chosen(self.command, self.path):
            fault = self.store.fault
        if fault == "dropped":
            self.rfile.read(size // 2)
            self.close_connection = True
            return
        body = self.rfile.read(size)
        if fault == "503":
            return self._answer(503, {"Content-Type": "application/xml"}, b"<Error><Code>ServiceUnavailable</Code></Error>")
        upstream = http.client.HTTPConnection(self.store.upstream, timeout=60)
        try:
            upstream.request(self.command, self.path, body or None, dict(self.headers.items()))
            answer = upstream.getresponse()
            headers = {n: v for n, v in answer.getheaders() if n.lower() not in ("transfer-encoding", "connection")}
            self._answer(answer.status, headers, answer.read(), broken=fault == "broken off")
        finally:
            upstream.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes, broken: bool = False) -> None:
        told = {name.lower() for name in headers}
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "content-length" not in told:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(OSError):  # the client has gone
                self.wfile.write(body[: len(body) // 2] if broken else body)
        self.close_connection = self.close_connection or broken

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _relay

    def log_message(self, *arguments: object) -> None:
        """Says nothing."""


@contextlib.contextmanager
def faulty(weed: Weed, monkeypatch: pytest.MonkeyPatch, bucket: str) -> Iterator[tuple[FaultyStore, s3fs.S3FileSystem]]:
    """Points this process at a server through its faults. Yields them, and a file system that goes past them.

    What the client tries again, it tries as often as ever, but ten times as soon.
    """
    pause = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds, *result: pause(seconds / 10, *result))
    weed.enter(monkeypatch, bucket)
    store = FaultyStore(weed.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
    past = s3fs.S3FileSystem(endpoint_url=weed.endpoint, skip_instance_cache=True, use_listings_cache=False)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        yield store, past
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        store.close()

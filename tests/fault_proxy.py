"""A proxy before an S3 server that fails as networks and services do, on order.

    proxy.fail("GET", "truncate", times=2)        the next two GETs end early
    proxy.fail("PUT", "lost_answer", key="x")     the next PUT of a path with "x" succeeds, its answer never comes

Faults: `busy` (503 SlowDown), `reset`, `truncate` (half of the body, then the connection ends), `stall` (half of the
body, then silence), `flip` (one bit of the body, of what is sent or else of the answer: no reader can tell without a
digest), `ignore_range` (200 and the whole object), `other_etag` (as if the object had been replaced), `error_in_200`
(status 200, an error as the body), `no_such_upload` (404), `lost_answer` (the request is carried out, the connection
ends without an answer), `hold` (the request waits until `heal`).
"""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from tests.seaweedfs import SeaweedFS

BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
INTERNAL = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>We encountered an error.</Message></Error>"
FORGOTTEN = b"<Error><Code>NoSuchUpload</Code><Message>The specified upload does not exist.</Message></Error>"
HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length"}


@dataclass
class Fault:
    """What to do to the next `times` requests with this method whose path and query match `key` somewhere."""

    method: str
    what: str
    times: int
    key: str


@dataclass
class FaultProxy:
    """A listening proxy; `endpoint` takes the server's place, `broken` counts the requests that were made to fail.

    `sent` counts the bytes of bodies that went to clients, by path; `writes` the PUTs and POSTs, by client.
    """

    server: SeaweedFS
    host: str = "127.0.0.1"
    requests: list[tuple[str, str]] = field(default_factory=list)
    broken: int = 0
    sent: Counter[str] = field(default_factory=Counter)
    writes: Counter[str] = field(default_factory=Counter)
    _faults: list[Fault] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _healed: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer((self.host, 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://{self.host}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.heal()
        self._server.shutdown()
        self._server.server_close()

    def fail(self, method: str, what: str, *, times: int = 1, key: str = "") -> None:
        """Order a fault; faults are used up in the order in which they were ordered."""
        with self._lock:
            if what == "hold":
                self._healed.clear()
            self._faults.append(Fault(method, what, times, key))

    def heal(self) -> None:
        """Cancel every fault that was ordered, and let go on what is held."""
        with self._lock:
            self._faults.clear()
        self._healed.set()

    def wait_until_healed(self) -> None:
        """Return once `heal` was called."""
        self._healed.wait()

    def count_sent(self, path: str, size: int) -> None:
        """Note bytes on their way to a client."""
        with self._lock:
            self.sent[path.partition("?")[0]] += size

    def next_fault(self, method: str, path: str, client: str) -> str | None:
        """Note a request and say what to do to it."""
        with self._lock:
            self.requests.append((method, path))
            if method in ("PUT", "POST"):
                self.writes[client] += 1
            for fault in self._faults:
                if fault.times > 0 and fault.method == method and re.search(fault.key, path):
                    fault.times -= 1
                    self.broken += 1
                    return fault.what
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body of an answer leave one by one
    proxy: FaultProxy

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def do(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.next_fault(self.command, self.path, self.client_address[0])
        if fault == "hold":
            self.proxy.wait_until_healed()
        if fault == "busy":
            self._answer(503, {}, BUSY)
        elif fault == "reset":
            self._reset()
        elif fault == "no_such_upload":
            self._answer(404, {"Content-Type": "application/xml"}, FORGOTTEN)
        elif fault == "error_in_200":
            self._answer(200, {"Content-Type": "application/xml"}, INTERNAL)
        elif fault == "flip" and body:
            self._distort(None, *self._ask_upstream(_flipped(body)))
        else:
            self._distort(fault, *self._ask_upstream(body))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do

    def _ask_upstream(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(urlsplit(self.proxy.server.endpoint).netloc, timeout=30)
        try:
            connection.request(self.command, self.path, body or None, dict(self.headers))
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def _distort(self, fault: str | None, status: int, headers: dict[str, str], content: bytes) -> None:
        if fault == "lost_answer":
            self._reset()
        elif fault == "ignore_range" and "range" in {name.lower() for name in self.headers}:
            bucket, _, key = self.path.lstrip("/").partition("/")
            whole = self.proxy.server.client().get_object(Bucket=bucket, Key=key)["Body"].read()
            self._answer(200, {name: headers[name] for name in ("etag", "last-modified")}, whole)
        elif fault == "other_etag":
            self._answer(status, {**headers, "etag": '"0123456789abcdef0123456789abcdef"'}, content)
        elif fault == "flip":
            self._answer(status, headers, _flipped(content))
        elif fault in ("truncate", "stall"):
            self._answer(status, headers, content[: len(content) // 2], promised=len(content))
            if fault == "stall":
                time.sleep(60)
            self.close_connection = True
        else:
            self._answer(status, headers, content)

    def _answer(self, status: int, headers: dict[str, str], content: bytes, promised: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name not in HOP_BY_HOP:
                self.send_header(name, value)
        length = len(content) if promised is None else promised
        if self.command == "HEAD":
            length = int(headers.get("content-length", 0))
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.proxy.count_sent(self.path, len(content))
            self.wfile.write(content)
            self.wfile.flush()

    def _reset(self) -> None:
        # with linger 0 the close sends RST instead of FIN
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


def _flipped(content: bytes) -> bytes:
    """The same bytes but for one bit."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]

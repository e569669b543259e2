"""Requests to one server of models: the addresses that may be asked, the key, and tries again.

A job file may come from anywhere and names the server; only the environment says which server gets the key.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from jobs.engine import is_address
from jobs.errors import AccessDenied, BadInput, Unavailable
from jobs.foreign_json import load_json
from jobs.yaml_nodes import quoted
from workers.engines.congestion import LONGEST_PAUSE_SECONDS, Closed, Window
from workers.engines.engine import Progress
from workers.services import passes, sentence, tls_refusal, wait_seconds

Result = TypeVar("Result")
Task = TypeVar("Task")
REFUSED_STATUS = {400, 413, 422}
"""Refusals that may concern one prompt, and not the server or the model."""

RATE_LIMITED = {429, 529}
"""Too many requests (RFC 6585, 4), and Anthropic's own number for a service with too many from all its users."""

KEYS_OWN_SERVER = "https://api.openai.com/v1"
"""Where OPENAI_API_KEY goes unless OPENAI_BASE_URL says otherwise; both are called as in OpenAI's own client."""

METADATA = tuple(map(ip_network, ("169.254.0.0/16", "fe80::/10", "fd00:ec2::254/128", "100.100.100.200/32")))
"""Where clouds tell a machine its credentials: link-local addresses, and two that AWS and Alibaba have beside them."""


class PromptRefused(BadInput):
    """The server refused a request for good, with a status of `REFUSED_STATUS`; `content` is the body of its reply."""

    def __init__(self, message: str, content: bytes = b"") -> None:
        super().__init__(message)
        self.content = content


class BadAnswer(Exception):
    """An answer of status 200 that holds no completion, or an error that says which other status it would have had."""

    def __init__(self, trouble: str, status: int = 502) -> None:
        super().__init__(trouble)
        self.status = status


class Server:
    """A server whose API begins at `url`; requests may come from several threads, each of which has a connection.

    At most `concurrency` are under way. An answer may take `timeout_seconds`; one that takes longer is not asked for
    again, for it would again. Failing servers and answers without a result are asked again, up to `attempts` times;
    refusals are not.
    """

    def __init__(
        self,
        url: str,
        *,
        concurrency: int,
        attempts: int,
        timeout_seconds: float,
        first_pause_seconds: float,
    ) -> None:
        if not is_address(url):
            raise BadInput(f"{url}: not a server; give it as http://host:port/v1")
        self.url = url.rstrip("/")
        self._parts, self._timeout = urlsplit(self.url), timeout_seconds
        self._attempts, self._pause = attempts, first_pause_seconds
        self._own = threading.local()
        self._opened: list[http.client.HTTPConnection] = []
        self._window = Window(concurrency, first_pause_seconds)
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="requests")

    def close(self) -> None:
        """Sends away the requests that wait, finishes those under way, and closes the connections."""
        self._closing.set()
        self._window.close()
        self._pool.shutdown()
        for connection in self._opened:
            connection.close()

    def map(self, ask: Callable[[Task], Result], tasks: Sequence[Task], progress: Progress | None) -> list[Result]:
        """`ask` of every task, in their order, `concurrency` at a time; the first error in time ends it."""
        pending = [self._pool.submit(ask, task) for task in tasks]
        try:
            for future in as_completed(pending):  # in this order: an earlier task may wait for hours
                future.result()
                if progress:
                    progress(1)
        finally:
            for future in pending:
                future.cancel()
        return [future.result() for future in pending]

    def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        most_bytes: int,
        checked: Callable[[dict[str, Any]], Result],
        remedy: str,
    ) -> Result:
        """The checked reply to one request; `remedy` follows a refusal.

        A failing server is asked again after longer and longer pauses, `attempts` times, as the job says: one try may
        take minutes, which a store's patience does not allow. A server that limits the rate is asked at the pace of the
        window. Both are given up when no request had an answer for as long as one may take.
        """
        tries = failures = 0
        began = None
        while True:
            status, asked, tries = 0, 0.0, tries + 1
            try:
                entered = self._window.enter()
            except Closed:
                raise Unavailable(f"{self.url}{path}: the evaluation ended before its answer; run it again") from None
            began = began or entered
            try:
                status, content, asked, moved = self._exchange(method, path, body, most_bytes)
                if status == 200:
                    result = checked(_object(content))
                    self._window.answered()
                    return result
                trouble = f"status {status}: {sentence(content)}" + (f", moved to {quoted(moved)}" if moved else "")
            except BadAnswer as bad:
                status, content, trouble = bad.status, b"", f"the answer {bad}"
            except TimeoutError as error:
                raise BadInput(
                    f"{self.url}{path} gave no answer in {self._timeout:g} seconds; "
                    "ask fewer at a time (`concurrency`), or give it longer (`timeout_seconds`), in the job's `engine:`"
                ) from error
            except (OSError, http.client.HTTPException) as error:
                if refusal := tls_refusal(error):
                    raise BadInput(f"{self.url}: {refusal}") from error
                content, trouble = b"", f"{type(error).__name__}: {quoted(str(error))}"
            finally:
                self._window.leave()
            trouble = self._without_key(trouble)
            if status in (401, 403):
                raise AccessDenied(f"{self.url}{path}: {trouble}; {self._key_remedy()}")
            if status and not passes(status):
                refused = f"{self.url}{path}: {trouble}; {remedy}"
                raise PromptRefused(refused, content) if status in REFUSED_STATUS else BadInput(refused)
            waits = status in RATE_LIMITED or asked > 0
            failures += not waits
            if busy := waits or status == 503:
                self._window.busy(entered, asked)
                pause = max(0.0, self._window.opens - time.monotonic())
            else:
                pause = min(LONGEST_PAUSE_SECONDS, self._pause * 2 ** (failures - 1))
            patience = max(began, self._window.answered_at) + self._timeout - time.monotonic()
            if failures == self._attempts or pause > patience:
                wish = f", and asks to wait {asked:.0f} s" if asked else ""
                raise Unavailable(
                    f"{self.url}{path} failed {tries} times, at last with {trouble}{wish};"
                    " run again when the server is well"
                )
            if not busy:
                self._closing.wait(pause)

    def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None, most_bytes: int
    ) -> tuple[int, bytes, float, str | None]:
        """Status, body, seconds that the server asks to wait, and `Location`, of one try over this thread's connection.

        `TimeoutError` if the whole takes too long, `BadAnswer` if it has too many bytes. A connection that broke is
        opened again.
        """
        connection: http.client.HTTPConnection | None = getattr(self._own, "connection", None)
        if connection is None:
            kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
            _, host, port, _ = _endpoint(self._parts)
            connection = kind(host, port, timeout=self._timeout)
            connection.auto_open = 0  # only _connect looks where a connection leads
            self._own.connection = connection
            self._opened.append(connection)
        headers = {"Content-Type": "application/json"}
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        try:
            if not connection.sock:
                self._connect(connection)
            with _at_most(self._timeout, connection.sock):
                connection.request(method, self._parts.path + path, json.dumps(body) if body else None, headers)
                response = connection.getresponse()
                content = response.read(most_bytes + 1)
            if len(content) > most_bytes:
                raise BadAnswer(f"has more than {most_bytes} bytes")
            if response.length:
                raise http.client.IncompleteRead(content, response.length)
            told = response.headers
            return response.status, content, wait_seconds(told.get("Retry-After")), told.get("Location")
        except BaseException:
            connection.close()
            raise

    def _connect(self, connection: http.client.HTTPConnection) -> None:
        """Opens the connection; `BadInput` for an address that no job may ask.

        Looked at twice: an address is known before anything is sent there, and a name may mean another a moment later.
        """
        for *_, address in socket.getaddrinfo(connection.host, connection.port, type=socket.SOCK_STREAM):
            self._check_address(str(address[0]))
        connection.connect()
        self._check_address(str(connection.sock.getpeername()[0]))

    def _check_address(self, text: str) -> None:
        address = ip_address(text.partition("%")[0])
        if isinstance(address, IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        if any(address in network for network in METADATA):
            raise BadInput(
                f"{self.url} leads to {text}, where a cloud keeps its machines' credentials; name a server of models"
            )

    def _key(self) -> str | None:
        """The key, if it is for this server."""
        own = urlsplit(os.environ.get("OPENAI_BASE_URL") or KEYS_OWN_SERVER)
        return os.environ.get("OPENAI_API_KEY") if _endpoint(own) == _endpoint(self._parts) else None

    def _without_key(self, text: str) -> str:
        """A server may repeat the key that it refuses."""
        key = self._key()
        return text.replace(key, "…") if key else text

    def _key_remedy(self) -> str:
        if self._key():
            return "is the key in OPENAI_API_KEY right?"
        return f"set OPENAI_BASE_URL={self.url} and OPENAI_API_KEY: the key goes there alone"


@contextmanager
def _at_most(seconds: float, connected: socket.socket) -> Generator[None]:
    """Ends the work inside with `TimeoutError` after so many seconds; a socket's own timeout ends a silence alone."""
    late = threading.Event()

    def hang_up() -> None:
        late.set()
        with suppress(OSError):
            socket.socket.shutdown(connected, socket.SHUT_RDWR)

    timer = threading.Timer(seconds, hang_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception as error:
        if late.is_set():
            raise TimeoutError from error
        raise
    finally:
        timer.cancel()
    if late.is_set():
        raise TimeoutError


def _object(content: bytes) -> dict[str, Any]:
    """The JSON object of an answer; `BadAnswer` for another text, and for an error in place of a result."""
    try:
        reply = load_json(content)
    except ValueError:
        reply = None
    match reply:
        case {"error": error} if error and "choices" not in reply:
            code = error.get("code") if isinstance(error, dict) else None
            status = code if type(code) is int and 400 <= code < 600 else 502
            raise BadAnswer(f"is an error: {sentence(content)}", status)
        case dict():
            return reply
        case _:
            raise BadAnswer(f"{sentence(content)}, which is not a completion (is the URL right?)")


def _endpoint(parts: SplitResult) -> tuple[str, str, int, str]:
    """Scheme, host, port and path: equal for two spellings of one endpoint."""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return parts.scheme, parts.hostname or "", port, parts.path.rstrip("/")

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
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from jobs.errors import AccessDenied, BadInput, Unavailable
from jobs.foreign_json import load_json
from jobs.yaml_nodes import quoted
from workers.services import passes, sentence, tls_refusal, wait_seconds

Result = TypeVar("Result")
REFUSED_STATUS = {400, 413, 422}
"""Refusals that may concern one prompt, and not the server or the model."""

LONGEST_PAUSE_SECONDS = 30.0
KEYS_OWN_SERVER = "https://api.openai.com/v1"
"""Where OPENAI_API_KEY goes unless OPENAI_BASE_URL says otherwise; both are called as in OpenAI's own client."""

METADATA = tuple(map(ip_network, ("169.254.0.0/16", "fe80::/10", "fd00:ec2::254/128", "100.100.100.200/32")))
"""Where clouds tell a machine its credentials: link-local addresses, and two that AWS and Alibaba have beside them."""


class PromptRefused(BadInput):
    """The server refused a request for good, with a status of `REFUSED_STATUS`."""


class BadAnswer(Exception):
    """An answer of status 200 that holds no completion, or an error that says which other status it would have had."""

    def __init__(self, trouble: str, status: int = 502) -> None:
        super().__init__(trouble)
        self.status = status


class Server:
    """A server whose API begins at `url`; requests may come from several threads, each of which has a connection.

    An answer may take `timeout_seconds`; one that takes longer is not asked for again, for it would again. Busy servers
    and answers without a result are asked again, up to `attempts` times; refusals are not.
    """

    def __init__(
        self, url: str, model: str, *, attempts: int, timeout_seconds: float, first_pause_seconds: float
    ) -> None:
        parts = urlsplit(url.rstrip("/"))
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadInput(f"{url}: not a server; give it as http://host:port/v1")
        self.url, self._model = url.rstrip("/"), model
        self._parts, self._timeout = parts, timeout_seconds
        self._attempts, self._pause = attempts, first_pause_seconds
        self._own = threading.local()
        self._opened: list[http.client.HTTPConnection] = []

    def close(self) -> None:
        """Closes the connections."""
        for connection in self._opened:
            connection.close()

    def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        most_bytes: int,
        checked: Callable[[dict[str, Any]], Result],
    ) -> Result:
        """The checked reply to one request; busy and failing servers are asked again, after longer and longer pauses.

        Tries are counted, as the job says (`attempts`): one may take minutes, which a store's patience does not allow.
        A pause is at least as long as the server asks for.
        """
        trouble, asked, tries, last = "", 0.0, 0, time.monotonic() + self._timeout
        while tries < self._attempts:
            if tries:
                pause = max(asked, min(LONGEST_PAUSE_SECONDS, self._pause * 2 ** (tries - 1)))
                if time.monotonic() + pause > last:
                    break
                time.sleep(pause)
            tries, asked = tries + 1, 0.0
            try:
                status, content, asked, moved = self._exchange(method, path, body, most_bytes)
                if status == 200:
                    return checked(_object(content))
                trouble = f"status {status}: {sentence(content)}" + (f", moved to {quoted(moved)}" if moved else "")
            except BadAnswer as bad:
                status, trouble = bad.status, f"the answer {bad}"
            except TimeoutError as error:
                raise BadInput(
                    f"{self.url}{path} gave no answer in {self._timeout:g} seconds; "
                    "ask fewer at a time (`concurrency`), or give it longer (`timeout_seconds`), in the job's `engine:`"
                ) from error
            except (OSError, http.client.HTTPException) as error:
                if refusal := tls_refusal(error):
                    raise BadInput(f"{self.url}: {refusal}") from error
                trouble = f"{type(error).__name__}: {quoted(str(error))}"
                continue
            trouble = self._without_key(trouble)
            if status in (401, 403):
                raise AccessDenied(f"{self.url}{path}: {trouble}; {self._key_remedy()}")
            if not passes(status):
                refusal = PromptRefused if status in REFUSED_STATUS else BadInput
                raise refusal(f"{self.url}{path}: {trouble}; check the URL and the model's name {self._model}")
        waits = f", and asks to wait {asked:.0f} s" if asked else ""
        raise Unavailable(
            f"{self.url}{path} failed {tries} times, at last with {trouble}{waits}; run again when the server is well"
        )

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

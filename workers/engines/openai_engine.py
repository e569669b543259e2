"""The engine that lives elsewhere: any server that speaks OpenAI's completions API, for points that were written.

Asks `/v1/completions` with the prompt's text, temperature 0, a few requests at a time. Log-likelihoods need a server
that echoes the prompt with logprobs (vLLM and SGLang do); others are named as unable. A server does not say whether its
logits were finite: a broken merge shows here only by its answers.

A job file may come from anywhere, and names the server; what the key is for is said by the environment alone.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

import numpy as np

from jobs.errors import AccessDenied, BadInput, WorkerLost
from workers.engines.engine import Answer, Progress, Prompt, before_stops, check_room, split_continuation
from workers.engines.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

RETRIED_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
LONGEST_PAUSE_SECONDS = 30.0
MOST_STOPS = 4
"""Stop texts that OpenAI's protocol allows in one request; the others are cut off here."""

KEYS_OWN_SERVER = "https://api.openai.com/v1"
"""Where OPENAI_API_KEY goes unless OPENAI_BASE_URL says otherwise; both are called as in OpenAI's own client."""

METADATA = tuple(map(ip_network, ("169.254.0.0/16", "fe80::/10", "fd00:ec2::254/128", "100.100.100.200/32")))
"""Where clouds tell a machine its credentials: link-local addresses, and two that AWS and Alibaba have beside them."""


class OpenAIEngine:
    """A served model; implements `Engine` without `swap`.

    `url` ends where `/completions` begins, as in `http://host:8000/v1`; `tokenizer` is the point's own folder. The key
    in OPENAI_API_KEY is sent if `url` is OPENAI_BASE_URL. `max_length` None asks the server, which not every server
    knows.
    """

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: str | Path,
        *,
        max_length: int | None = None,
        concurrency: int = 8,
        attempts: int = 6,
        timeout_seconds: float = 600.0,
        first_pause_seconds: float = 0.5,
    ) -> None:
        parts = urlsplit(url.rstrip("/"))
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadInput(f"{url}: not a server; give it as http://host:port/v1")
        self.url, self.model = url.rstrip("/"), model
        self.tokenizer = load_tokenizer(tokenizer)
        self._parts, self._timeout = parts, timeout_seconds
        self._attempts, self._pause = attempts, first_pause_seconds
        self._own = threading.local()
        self._opened: list[http.client.HTTPConnection] = []
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="completions")
        self._max_length = max_length or self._ask_max_length()

    @property
    def version(self) -> str:
        """The name under which the server serves the model."""
        return self.model

    @property
    def max_length(self) -> int:
        """What was given, or what the server says of itself."""
        return self._max_length

    def encode(self, text: str) -> list[int]:
        """Token ids by the point's own tokenizer; the server is sent text, and uses its own."""
        return list(self.tokenizer(text, verbose=False)["input_ids"])

    def generate(self, prompts: Sequence[Prompt], *, progress: Progress | None = None) -> list[Answer]:
        """One answer a prompt; `seconds` is the request's own time, retries included."""
        for prompt in prompts:
            check_room(len(self.encode(prompt.whole)), prompt.max_new_tokens, self.max_length)
        return self._map(self._answer, prompts, progress)

    def score(self, windows: Sequence[Sequence[int]], *, progress: Progress | None = None) -> list[NDArray[np.float32]]:
        """Log-likelihood of every token but the first of each window, from the server's echo."""
        echoes = self._map(self._echo, windows, progress)
        return [np.asarray(echo["token_logprobs"][1:], dtype=np.float32) for echo in echoes]

    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """Log-likelihood of the continuation, and whether each of its tokens was the server's likeliest."""
        whole, kept = split_continuation(self.encode, context, continuation)
        echo = self._echo(whole)
        chosen = echo["token_logprobs"][kept:]
        likeliest = [max(top.values()) for top in echo["top_logprobs"][kept:]]
        return float(sum(chosen)), all(value >= best for value, best in zip(chosen, likeliest, strict=True))

    def swap(self, weights: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Refused: a server elsewhere keeps the weights it has."""
        raise BadInput(f"{self.url} serves {self.model} only; write the point {version} and serve it, or use vllm here")

    def close(self) -> None:
        """Finish the requests under way and close the connections."""
        self._pool.shutdown()
        for connection in self._opened:
            connection.close()

    def _answer(self, prompt: Prompt) -> Answer:
        started = time.perf_counter()
        settings: dict[str, Any] = {"prompt": prompt.whole, "max_tokens": prompt.max_new_tokens, "temperature": 0}
        if prompt.stops:
            settings["stop"] = list(prompt.stops[:MOST_STOPS])
        reply = self._request("POST", "/completions", {"model": self.model, **settings})
        text = self._field(reply, "choices")[0]["text"]
        usage = reply.get("usage") or {}
        return Answer(
            text=before_stops(text, prompt.stops),
            tokens_in=usage.get("prompt_tokens") or len(self.encode(prompt.whole)),
            tokens_out=usage.get("completion_tokens") or len(self.encode(text)),
            seconds=time.perf_counter() - started,
            finite=True,
        )

    def _echo(self, ids: Sequence[int]) -> dict[str, Any]:
        """The server's logprobs of a prompt given as token ids."""
        if not 2 <= len(ids) < self.max_length:
            raise BadInput(f"a window of {len(ids)} tokens cannot be scored; 2 to {self.max_length - 1} can")
        settings = {"prompt": list(ids), "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        reply = self._request("POST", "/completions", {"model": self.model, **settings})
        logprobs = self._field(reply, "choices")[0].get("logprobs") or {}
        if len(logprobs.get("token_logprobs") or ()) < len(ids):
            raise BadInput(f"{self.url} does not echo logprobs of a prompt; score this point with transformers or vllm")
        return {name: logprobs[name][: len(ids)] for name in ("token_logprobs", "top_logprobs")}

    def _ask_max_length(self) -> int:
        models = self._field(self._request("GET", "/models", None), "data")
        for model in models:
            if model.get("id") == self.model and model.get("max_model_len"):
                return int(model["max_model_len"])
        raise BadInput(f"{self.url} does not say how long a prompt {self.model} takes; give max_length")

    def _map(self, ask: Callable[[Any], Any], tasks: Sequence[Any], progress: Progress | None) -> list[Any]:
        answers: list[Any] = []
        pending = [self._pool.submit(ask, task) for task in tasks]
        try:
            for future in pending:
                answers.append(future.result())
                if progress:
                    progress(1)
        finally:
            for future in pending:
                future.cancel()
        return answers

    def _field(self, reply: Mapping[str, Any], name: str) -> Any:
        if not reply.get(name):
            raise BadInput(f"{self.url} answered without {name!r}; it does not speak the completions API")
        return reply[name]

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        """The reply to one request; busy and failing servers are asked again, after longer and longer pauses."""
        trouble = ""
        for attempt in range(self._attempts):
            if attempt:
                time.sleep(min(LONGEST_PAUSE_SECONDS, self._pause * 2 ** (attempt - 1)))
            try:
                status, text = self._exchange(method, path, body)
            except (OSError, http.client.HTTPException) as error:
                trouble = f"{type(error).__name__}: {error}"
                continue
            if status == 200:
                return json.loads(text)
            trouble = f"status {status}: {text[:200]}"
            if status in (401, 403):
                raise AccessDenied(f"{self.url}{path}: {trouble}; {self._key_remedy()}")
            if status not in RETRIED_STATUS:
                raise BadInput(f"{self.url}{path}: {trouble}; check the URL and the model's name {self.model}")
        raise WorkerLost(f"{self.url}{path} failed {self._attempts} times, at last with {trouble}; is the server up?")

    def _exchange(self, method: str, path: str, body: Mapping[str, Any] | None) -> tuple[int, str]:
        """Status and text of one try, over this thread's own connection; a broken one is opened again."""
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
            connection.request(method, self._parts.path + path, json.dumps(body) if body else None, headers)
            response = connection.getresponse()
            return response.status, response.read().decode(errors="replace")
        except BaseException:
            connection.close()
            raise

    def _connect(self, connection: http.client.HTTPConnection) -> None:
        """Opens the connection; `BadInput` where it would lead, or has led, to what no job may ask.

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

    def _key_remedy(self) -> str:
        if self._key():
            return "is the key in OPENAI_API_KEY right?"
        return f"set OPENAI_BASE_URL={self.url} and OPENAI_API_KEY: the key goes there alone"


def _endpoint(parts: SplitResult) -> tuple[str, str, int, str]:
    """Scheme, host, port and path: what two spellings of one endpoint have in common."""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return parts.scheme, parts.hostname or "", port, parts.path.rstrip("/")

"""The engine that lives elsewhere: any server that speaks OpenAI's completions API, for points that were written.

Asks `/v1/completions` with the prompt's text, temperature 0, a few requests at a time. Log-likelihoods need a server
that echoes the prompt with logprobs (vLLM and SGLang do); others are named as unable. A server does not say whether its
logits were finite: a broken merge shows here only by its answers.

A job file may come from anywhere and names the server; only the environment says which server gets the key.
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
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import SplitResult, urlsplit

import numpy as np

from jobs.errors import AccessDenied, BadInput, Unavailable
from workers.engines.engine import (
    Answer,
    Progress,
    Prompt,
    before_stops,
    check_room,
    check_window,
    longest_scored,
    status_of,
)
from workers.engines.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

Kind = TypeVar("Kind")
RETRIED_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
REFUSED_STATUS = {400, 413, 422}
"""Refusals that may concern one prompt, and not the server or the model."""

LONGEST_PAUSE_SECONDS = 30.0
MOST_STOPS = 4
"""Stop texts that OpenAI's protocol allows in one request; the others are cut off here."""

MARKS = 8
"""Special tokens by which a server's count of a prompt may be below ours; one that read fewer has cut it."""

KEYS_OWN_SERVER = "https://api.openai.com/v1"
"""Where OPENAI_API_KEY goes unless OPENAI_BASE_URL says otherwise; both are called as in OpenAI's own client."""

METADATA = tuple(map(ip_network, ("169.254.0.0/16", "fe80::/10", "fd00:ec2::254/128", "100.100.100.200/32")))
"""Where clouds tell a machine its credentials: link-local addresses, and two that AWS and Alibaba have beside them."""


class PromptRefused(BadInput):
    """The server refused a request for good, with a status of `REFUSED_STATUS`."""


class OpenAIEngine:
    """A served model; implements `Engine` without `swap`.

    `url` ends where `/completions` begins, as in `http://host:8000/v1`; `tokenizer` is the point's own folder. The key
    in OPENAI_API_KEY is sent if `url` is OPENAI_BASE_URL. `max_length` None asks the server, which not every server
    knows. An answer may take `timeout_seconds`; one that takes longer is not asked for again, for it would again.
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
        """The given length, or the one that the server reports."""
        return self._max_length

    @property
    def max_scored(self) -> int:
        """One less than `max_length`."""
        return longest_scored("openai", self.max_length)

    def encode(self, text: str) -> list[int]:
        """Token ids by the point's own tokenizer; the server is sent text, and uses its own."""
        return list(self.tokenizer(text, verbose=False)["input_ids"])

    def generate(self, prompts: Sequence[Prompt], *, progress: Progress | None = None) -> list[Answer]:
        """One answer a prompt; `seconds` is the request's own time, retries included.

        A prompt that the server refuses for good gets an answer with the status `failed`. If it refuses all of them,
        its refusal is raised: then the fault is not in a prompt.
        """
        for prompt in prompts:
            check_room(len(self.encode(prompt.whole)), prompt.max_new_tokens, self.max_length)
        answers = self._map(self._answer_or_refusal, prompts, progress)
        refusals = [answer for answer in answers if isinstance(answer, PromptRefused)]
        if refusals and len(refusals) == len(answers):
            raise refusals[0]
        return [
            Answer("", len(self.encode(prompt.whole)), 0, 0.0, True, "failed", str(answer))
            if isinstance(answer, PromptRefused)
            else answer
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def score(self, windows: Sequence[Sequence[int]], *, progress: Progress | None = None) -> list[NDArray[np.float32]]:
        """Log-likelihood of every token but the first of each window, from the server's echo."""
        echoes = self._map(self._echo, windows, progress)
        return [np.asarray(echo["token_logprobs"][1:], dtype=np.float32) for echo in echoes]

    def loglikelihoods(self, texts: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether each of its tokens was the server's likeliest."""
        found: list[tuple[float, bool]] = []
        for (_, context), echo in zip(texts, self._map(self._echo, [ids for ids, _ in texts], None), strict=True):
            chosen = echo["token_logprobs"][context:]
            likeliest = [max(top.values()) for top in echo["top_logprobs"][context:]]
            greedy = all(value >= best for value, best in zip(chosen, likeliest, strict=True))
            found.append((float(sum(chosen)), greedy))
        return found

    def swap(self, weights: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Refused: a server elsewhere keeps the weights it has."""
        raise BadInput(f"{self.url} serves {self.model} only; write the point {version} and serve it, or use vllm here")

    def close(self) -> None:
        """Finish the requests under way and close the connections."""
        self._pool.shutdown()
        for connection in self._opened:
            connection.close()

    def _answer_or_refusal(self, prompt: Prompt) -> Answer | PromptRefused:
        try:
            return self._answer(prompt)
        except PromptRefused as refusal:
            return refusal

    def _answer(self, prompt: Prompt) -> Answer:
        started = time.perf_counter()
        settings: dict[str, Any] = {"prompt": prompt.whole, "max_tokens": prompt.max_new_tokens, "temperature": 0}
        if prompt.stops:
            settings["stop"] = list(prompt.stops[:MOST_STOPS])
        reply = self._request("POST", "/completions", {"model": self.model, **settings})
        choice = self._text_choice(reply)
        whole = str(choice["text"] or "")
        text = before_stops(whole, prompt.stops)
        sent = len(self.encode(prompt.whole))
        read = self._count(reply, "prompt_tokens", sent)
        if read < sent - MARKS:
            raise BadInput(
                f"{self.url} read {read} of a prompt's {sent} tokens: it cuts long prompts, or has another tokenizer;"
                f" serve {self.model} with a longer context, or lower max_length"
            )
        return Answer(
            text=text,
            tokens_in=read,
            tokens_out=self._count(reply, "completion_tokens", len(self.encode(whole))),
            seconds=time.perf_counter() - started,
            finite=True,
            status="filtered"
            if choice.get("finish_reason") == "content_filter"
            else status_of(text, cut=choice.get("finish_reason") == "length" and text == whole),
            remark=self._reasoned() if _reasoning(choice) and not text.strip() else "",
        )

    def _text_choice(self, reply: Mapping[str, Any]) -> Mapping[str, Any]:
        """The first choice in a reply; its text is None where a model ended, or was cut, while it reasoned."""
        match reply:
            case {"choices": [{"text": None, **choice}, *_]} if choice.get("finish_reason") or _reasoning(choice):
                return {**choice, "text": None}
            case _:
                self._choice(reply, "text", str)
                return reply["choices"][0]

    def _reasoned(self) -> str:
        return f"{self.url} gave reasoning in place of an answer; serve {self.model} with its reasoning off"

    def _echo(self, ids: Sequence[int]) -> dict[str, Any]:
        """The server's logprobs of a prompt given as token ids."""
        check_window(len(ids), self.max_scored)
        settings = {"prompt": list(ids), "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        reply = self._request("POST", "/completions", {"model": self.model, **settings})
        logprobs: Any = self._choice(reply, "logprobs", object)
        names = ("token_logprobs", "top_logprobs")
        if not isinstance(logprobs, dict) or not all(_are_echoed(logprobs.get(name), len(ids)) for name in names):
            raise BadInput(f"{self.url} does not echo logprobs of a prompt; score this point with transformers or vllm")
        return {name: logprobs[name][: len(ids)] for name in names}

    def _ask_max_length(self) -> int:
        models: Any = self._request("GET", "/models", None).get("data")
        for model in models if isinstance(models, list) else ():
            match model:
                case {"id": self.model, "max_model_len": int(longest)} if longest > 0:
                    return longest
                case _:
                    continue
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

    def _choice(self, reply: Mapping[str, Any], name: str, kind: type[Kind]) -> Kind:
        """A field of the first choice in a reply."""
        match reply:
            case {"choices": [{**choice}, *_]} if isinstance(choice.get(name), kind):
                return choice[name]
            case _:
                raise self._no_completion(json.dumps(reply))

    def _count(self, reply: Mapping[str, Any], name: str, own: int) -> int:
        """A number of tokens as the server counts, or our own count where it does not say."""
        match reply:
            case {"usage": {**usage}} if isinstance(usage.get(name), int) and usage[name] > 0:
                return usage[name]
            case _:
                return own

    def _no_completion(self, text: str) -> BadInput:
        return BadInput(
            f"{self.url} answered {text[:100]!r}, which is not a completion; does it serve the completions API?"
        )

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        """The reply to one request; busy and failing servers are asked again, after longer and longer pauses.

        Tries are counted, as the job says (`attempts`): one may take minutes, which a store's patience does not allow.
        """
        trouble, tries, begun = "", 0, time.monotonic()
        while tries < self._attempts and time.monotonic() < begun + self._timeout:
            if tries:
                time.sleep(min(LONGEST_PAUSE_SECONDS, self._pause * 2 ** (tries - 1)))
            tries += 1
            try:
                status, text = self._exchange(method, path, body)
            except TimeoutError as error:
                raise BadInput(
                    f"{self.url}{path} gave no answer in {self._timeout:g} seconds; "
                    "ask fewer at a time (`concurrency`), or give it longer (`timeout_seconds`)"
                ) from error
            except (OSError, http.client.HTTPException) as error:
                trouble = f"{type(error).__name__}: {error}"
                continue
            if status == 200:
                return self._object(text)
            trouble = f"status {status}: {text[:200]}"
            if status in (401, 403):
                raise AccessDenied(f"{self.url}{path}: {trouble}; {self._key_remedy()}")
            if status not in RETRIED_STATUS:
                refusal = PromptRefused if status in REFUSED_STATUS else BadInput
                raise refusal(f"{self.url}{path}: {trouble}; check the URL and the model's name {self.model}")
        raise Unavailable(f"{self.url}{path} failed {tries} times, at last with {trouble}; is the server up?")

    def _object(self, text: str) -> dict[str, Any]:
        try:
            reply = json.loads(text)
        except ValueError:
            raise self._no_completion(text) from None
        if not isinstance(reply, dict):
            raise self._no_completion(text)
        return reply

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

    def _key_remedy(self) -> str:
        if self._key():
            return "is the key in OPENAI_API_KEY right?"
        return f"set OPENAI_BASE_URL={self.url} and OPENAI_API_KEY: the key goes there alone"


def _reasoning(choice: Mapping[str, Any]) -> bool:
    """Whether a server set a model's reasoning apart from its answer, under either of the names in use."""
    return any(
        isinstance(choice.get(name), str) and choice[name].strip() for name in ("reasoning_content", "reasoning")
    )


def _are_echoed(values: Any, tokens: int) -> bool:
    """Whether a server said something of each of so many tokens but the first, before which there is nothing."""
    return isinstance(values, list) and len(values) >= tokens and None not in values[1:tokens]


def _endpoint(parts: SplitResult) -> tuple[str, str, int, str]:
    """Scheme, host, port and path: equal for two spellings of one endpoint."""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return parts.scheme, parts.hostname or "", port, parts.path.rstrip("/")

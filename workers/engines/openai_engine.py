"""The engine that lives elsewhere: any server that speaks OpenAI's completions API, for points that were written.

Asks `/v1/completions` with the prompt, temperature 0, a few requests at a time. Log-likelihoods need a server
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
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from ipaddress import IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import SplitResult, urlsplit

import numpy as np

from jobs.errors import AccessDenied, BadInput, Unavailable
from jobs.foreign_json import is_text, load_json
from jobs.yaml_nodes import quoted
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
from workers.engines.tokenizer import encode_prompt, load_tokenizer
from workers.services import passes, sentence, tls_refusal, wait_seconds

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

Result = TypeVar("Result")
REFUSED_STATUS = {400, 413, 422}
"""Refusals that may concern one prompt, and not the server or the model."""

LONGEST_PAUSE_SECONDS = 30.0
MOST_STOPS = 4
"""Stop texts that OpenAI's protocol allows in one request; the others are cut off here."""

MARKS = 8
"""Special tokens by which a server's count of a prompt may be below ours; one that read fewer has cut it."""

LARGEST_LIST_BYTES = 16 << 20
"""Of a server's list of models; OpenRouter's has half a megabyte."""

LARGEST_ANSWER_BYTES, BYTES_PER_TOKEN = 1 << 20, 1 << 10
"""Of an answer, and more for each of its tokens: an echo has some 200 bytes of JSON per token."""

KEYS_OWN_SERVER = "https://api.openai.com/v1"
"""Where OPENAI_API_KEY goes unless OPENAI_BASE_URL says otherwise; both are called as in OpenAI's own client."""

METADATA = tuple(map(ip_network, ("169.254.0.0/16", "fe80::/10", "fd00:ec2::254/128", "100.100.100.200/32")))
"""Where clouds tell a machine its credentials: link-local addresses, and two that AWS and Alibaba have beside them."""


class PromptRefused(BadInput):
    """The server refused a request for good, with a status of `REFUSED_STATUS`."""


class _BadAnswer(Exception):
    """An answer of status 200 that holds no completion, or an error that says which other status it would have had."""

    def __init__(self, trouble: str, status: int = 502) -> None:
        super().__init__(trouble)
        self.status = status


class OpenAIEngine:
    """A served model; implements `Engine` without `swap`.

    `url` ends where `/completions` begins, as in `http://host:8000/v1`; `tokenizer` is the point's own folder. The key
    in OPENAI_API_KEY is sent if `url` is OPENAI_BASE_URL. `max_length` None asks the server; where the server does not
    say, it is `asked_length`, the tokens of the longest prompt with its answer that will be asked. An answer may take
    `timeout_seconds`; one that takes longer is not asked for again, for it would again. Busy servers and answers that
    hold no completion are asked again, up to `attempts` times; refusals are not.
    """

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: str | Path,
        *,
        max_length: int | None = None,
        asked_length: int | None = None,
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
        self._max_length = max_length or self._ask_max_length(asked_length)

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

    def encode(self, text: str, *, bare: bool = False) -> list[int]:
        """Token ids of `text` as a prompt, by the point's own tokenizer; the server has its own."""
        return encode_prompt(self.tokenizer, text, bare=bare)

    def generate(self, prompts: Sequence[Prompt], *, progress: Progress | None = None) -> list[Answer]:
        """One answer a prompt; `seconds` is the request's own time, retries included.

        A prompt that the server refuses for good gets an answer with the status `failed`. If it refuses all of them,
        its refusal is raised: then the fault is not in a prompt.
        """
        for prompt in prompts:
            check_room(len(self.encode(prompt.whole, bare=prompt.bare)), prompt.max_new_tokens, self.max_length)
        answers = self._map(self._answer_or_refusal, prompts, progress)
        refusals = [answer for answer in answers if isinstance(answer, PromptRefused)]
        if refusals and len(refusals) == len(answers):
            raise refusals[0]
        return [
            Answer("", len(self.encode(prompt.whole, bare=prompt.bare)), 0, 0.0, True, "failed", str(answer))
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

    @property
    def places(self) -> Mapping[str, Tensor]:
        """None: the weights are in another process."""
        return {}

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
        ids = self.encode(prompt.whole, bare=prompt.bare)
        shown = self._shown(prompt.whole, ids)
        settings: dict[str, Any] = {"prompt": shown, "max_tokens": prompt.max_new_tokens, "temperature": 0}
        if prompt.stops:
            settings["stop"] = list(prompt.stops[:MOST_STOPS])
        reply = self._completion(settings, prompt.max_new_tokens)
        choice = reply["choices"][0]
        whole = str(choice["text"] or "")
        text = before_stops(whole, prompt.stops)
        sent = len(ids)
        read = self._count(reply, "prompt_tokens", sent)
        if read < sent - MARKS:
            raise BadInput(
                f"{self.url} read {read} of a prompt's {sent} tokens: it cuts long prompts, or has another tokenizer;"
                f" serve {self.model} with a longer context, or ask at shorter lengths"
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

    def _shown(self, text: str, ids: list[int]) -> str | list[int]:
        """A text that the server reads as `ids`, or `ids` themselves where there is none.

        A server puts all special tokens of the tokenizer around a text: perhaps a first one twice, or an end token.
        """
        for shown in (text, text.removeprefix(str(self.tokenizer.bos_token or ""))):
            if list(self.tokenizer(shown, verbose=False)["input_ids"]) == ids:
                return shown
        return ids

    def _reasoned(self) -> str:
        return f"{self.url} gave reasoning in place of an answer; serve {self.model} with its reasoning off"

    def _echo(self, ids: Sequence[int]) -> dict[str, Any]:
        """The server's logprobs of a prompt given as token ids."""
        check_window(len(ids), self.max_scored)
        settings = {"prompt": list(ids), "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        reply = self._completion(settings, len(ids))
        logprobs: Any = reply["choices"][0].get("logprobs")
        if not isinstance(logprobs, dict) or not _are_echoed(logprobs, len(ids)):
            raise BadInput(f"{self.url} does not echo logprobs of a prompt; score this point with transformers or vllm")
        return {name: logprobs[name][: len(ids)] for name in ("token_logprobs", "top_logprobs")}

    def _ask_max_length(self, asked_length: int | None) -> int:
        try:
            reply = self._request("GET", "/models", None, LARGEST_LIST_BYTES, lambda reply: reply)
        except BadInput:  # not every server lists its models
            if asked_length is None:
                raise
            return asked_length
        models: Any = reply.get("data")
        for model in models if isinstance(models, list) else ():
            match model:
                case {"id": self.model, "max_model_len": int(longest)} if longest > 0:
                    return longest
                case _:
                    continue
        if asked_length is None:
            raise BadInput(
                f"{self.url} does not say how long a prompt {self.model} takes; give the engine's option `max_length`"
            )
        return asked_length

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

    def _completion(self, settings: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """A reply of so many tokens at most, whose first choice has a `text`, or says why it has none."""

        def checked(reply: dict[str, Any]) -> dict[str, Any]:
            match reply:
                case {"choices": [{"finish_reason": "error"}, *_]}:
                    raise _BadAnswer("ended with an error of the model's server")
                case {"choices": [{"text": text}, *_]} if is_text(text):
                    return reply
                case {"choices": [{"text": None, **choice}, *_]} if choice.get("finish_reason") or _reasoning(choice):
                    return reply  # the model ended, or was cut, while it reasoned
                case {"choices": [{"message": _}, *_]}:
                    raise self._other_protocol("a chat completion")
                case _:
                    raise _BadAnswer(f"{sentence(json.dumps(reply).encode())}, which is not a completion")

        most = LARGEST_ANSWER_BYTES + BYTES_PER_TOKEN * tokens
        return self._request("POST", "/completions", {"model": self.model, **settings}, most, checked)

    def _count(self, reply: Mapping[str, Any], name: str, own: int) -> int:
        """A number of tokens as the server counts, or our own count where it does not say."""
        match reply:
            case {"usage": {**usage}} if type(usage.get(name)) is int and 0 < usage[name] <= self.max_length:
                return usage[name]
            case _:
                return own

    def _request(
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
            except _BadAnswer as bad:
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
                raise refusal(f"{self.url}{path}: {trouble}; check the URL and the model's name {self.model}")
        waits = f", and asks to wait {asked:.0f} s" if asked else ""
        raise Unavailable(
            f"{self.url}{path} failed {tries} times, at last with {trouble}{waits}; run again when the server is well"
        )

    def _other_protocol(self, found: str) -> BadInput:
        return BadInput(f"{self.url} answers with {found}; give the URL of a completions API, which ends in /v1")

    def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None, most_bytes: int
    ) -> tuple[int, bytes, float, str | None]:
        """Status, body, seconds that the server asks to wait, and `Location`, of one try over this thread's connection.

        `TimeoutError` if the whole takes too long, `_BadAnswer` if it has too many bytes. A connection that broke is
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
                raise _BadAnswer(f"has more than {most_bytes} bytes")
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


def _reasoning(choice: Mapping[str, Any]) -> bool:
    """Whether a server set a model's reasoning apart from its answer, under either of the names in use."""
    return any(
        isinstance(choice.get(name), str) and choice[name].strip() for name in ("reasoning_content", "reasoning")
    )


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
    """The JSON object of an answer; `_BadAnswer` for another text, and for an error in place of a result."""
    try:
        reply = load_json(content)
    except ValueError:
        reply = None
    match reply:
        case {"error": error} if error and "choices" not in reply:
            code = error.get("code") if isinstance(error, dict) else None
            status = code if type(code) is int and 400 <= code < 600 else 502
            raise _BadAnswer(f"is an error: {sentence(content)}", status)
        case dict():
            return reply
        case _:
            raise _BadAnswer(f"{sentence(content)}, which is not a completion (is the URL right?)")


def _are_echoed(logprobs: Mapping[str, Any], tokens: int) -> bool:
    """Whether a server gave the numbers of so many tokens but the first, before which there is nothing."""
    match logprobs:
        case {"token_logprobs": [_, *chosen], "top_logprobs": [_, *tops]}:
            chosen, tops = chosen[: tokens - 1], tops[: tokens - 1]
            told = all(isinstance(top, dict) and top and all(map(_is_number, top.values())) for top in tops)
            return len(tops) == len(chosen) == tokens - 1 and told and all(map(_is_number, chosen))
        case _:
            return False


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _endpoint(parts: SplitResult) -> tuple[str, str, int, str]:
    """Scheme, host, port and path: equal for two spellings of one endpoint."""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return parts.scheme, parts.hostname or "", port, parts.path.rstrip("/")

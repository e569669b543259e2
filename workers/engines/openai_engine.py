"""The engine that lives elsewhere: any server that speaks OpenAI's completions API, for points that were written.

Asks `/v1/completions` with the prompt, temperature 0, a few requests at a time. Log-likelihoods need a server
that echoes the prompt with logprobs (vLLM and SGLang do); others are named as unable. A server does not say whether its
logits were finite: a broken merge shows here only by its answers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.errors import BadInput
from jobs.foreign_json import is_text
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
from workers.engines.server import BadAnswer, PromptRefused, Server
from workers.engines.tokenizer import encode_prompt, load_tokenizer
from workers.services import sentence

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

MOST_STOPS = 4
"""Stop texts that OpenAI's protocol allows in one request; the others are cut off here."""

MARKS = 8
"""Special tokens by which a server's count of a prompt may be below ours; one that read fewer has cut it."""

LARGEST_LIST_BYTES = 16 << 20
"""Of a server's list of models; OpenRouter's has half a megabyte."""

LARGEST_ANSWER_BYTES, BYTES_PER_TOKEN = 1 << 20, 1 << 10
"""Of an answer, and more for each of its tokens: an echo has some 200 bytes of JSON per token."""


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
        self._server = Server(
            url, model, attempts=attempts, timeout_seconds=timeout_seconds, first_pause_seconds=first_pause_seconds
        )
        self.url, self.model = self._server.url, model
        self.tokenizer = load_tokenizer(tokenizer)
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
        self._server.close()

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
            reply = self._server.request("GET", "/models", None, LARGEST_LIST_BYTES, lambda reply: reply)
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
                    raise BadAnswer("ended with an error of the model's server")
                case {"choices": [{"text": text}, *_]} if is_text(text):
                    return reply
                case {"choices": [{"text": None, **choice}, *_]} if choice.get("finish_reason") or _reasoning(choice):
                    return reply  # the model ended, or was cut, while it reasoned
                case {"choices": [{"message": _}, *_]}:
                    raise self._other_protocol("a chat completion")
                case _:
                    raise BadAnswer(f"{sentence(json.dumps(reply).encode())}, which is not a completion")

        most = LARGEST_ANSWER_BYTES + BYTES_PER_TOKEN * tokens
        return self._server.request("POST", "/completions", {"model": self.model, **settings}, most, checked)

    def _count(self, reply: Mapping[str, Any], name: str, own: int) -> int:
        """A number of tokens as the server counts, or our own count where it does not say."""
        match reply:
            case {"usage": {**usage}} if type(usage.get(name)) is int and 0 < usage[name] <= self.max_length:
                return usage[name]
            case _:
                return own

    def _other_protocol(self, found: str) -> BadInput:
        return BadInput(f"{self.url} answers with {found}; give the URL of a completions API, which ends in /v1")


def _reasoning(choice: Mapping[str, Any]) -> bool:
    """Whether a server set a model's reasoning apart from its answer, under either of the names in use."""
    return any(
        isinstance(choice.get(name), str) and choice[name].strip() for name in ("reasoning_content", "reasoning")
    )


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

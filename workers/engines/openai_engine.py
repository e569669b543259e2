"""The engine that lives elsewhere: any server that speaks one of OpenAI's APIs, for points that were written.

Asks `/completions` with the text of a prompt, or `/chat/completions` with its messages, a few requests at a time.
Log-likelihoods need a server of completions that echoes the prompt with logprobs (vLLM and SGLang do); others are named
as unable. A server does not say whether its logits were finite: a broken merge shows here only by its answers.

A thought comes in three ways: in the text before its end tag, apart as `reasoning_content` (or `reasoning`), or hidden,
where only `usage` counts its tokens. A text without an end tag is an answer only where the server sets thoughts apart.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jobs.errors import BadInput
from jobs.foreign_json import is_text
from workers.engines.engine import (
    Answer,
    Progress,
    Prompt,
    Thought,
    before_stops,
    check_room,
    check_window,
    longest_scored,
    split_thought,
    status_of,
)
from workers.engines.server import BadAnswer, PromptRefused, Server
from workers.engines.tokenizer import encode_prompt, load_tokenizer
from workers.services import sentence

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

Api = Literal["completions", "chat"]

MOST_STOPS = 4
"""Stop texts that OpenAI's protocol allows in one request; the others are cut off here."""

MARKS: Mapping[Api, int] = {"completions": 8, "chat": 64}
"""Tokens by which a server's count of a prompt may be below ours: special tokens, or a sentence of the template.

A server that read fewer has cut the prompt.
"""

UNASKED = Thought("</think>", budget=0, opened=True)
"""A thought that a server's template opens by itself: no request can close it, as a prompt's own text does."""

SEEDS = 1 << 31
"""Seeds have 32 bits in some servers, and llama.cpp takes the largest of these for none."""

OPTIONAL: Mapping[str, str] = {
    "max_tokens": "max_completion_tokens",
    "stop": "",
    "temperature": "",
    "seed": "",
    "skip_special_tokens": "",
    "continue_final_message": "",
}
"""Settings that a server may refuse: each is then left out, or called by its other name."""

BY_THE_LIBRARY = "score this point with transformers or vllm"
WITHOUT_SAMPLING = "take temperature, top_p, top_k and samples out of the job"

REMEDIES: Mapping[str, str] = {
    "echo": BY_THE_LIBRARY,
    "logprobs": BY_THE_LIBRARY,
    "chat_template_kwargs": "write `chat: true` without arguments and take `thinking:` out of the benchmark,"
    " or give the engine's option `api: completions`",
    "temperature": WITHOUT_SAMPLING,
    "top_p": WITHOUT_SAMPLING,
    "top_k": "take top_k out of the job",
}
"""What to do about a refused setting that changes scores; sampling always sends a `top_p`."""

CHANGED: Mapping[str, str] = {
    "temperature": "its answers are not greedy",
    "seed": "its samples cannot be repeated",
    "continue_final_message": "its answers begin without the benchmark's answer prefix",
}
"""What the lack of an optional setting changes; the lack of the others changes no score."""

UNSUPPORTED = re.compile(
    r"unsupported|unrecogni[sz]ed|unknown|unexpected|extra|not (support|permitt|allow|accept)", re.I
)

TOO_LARGE = re.compile(r"too (large|long|many|high)|maximum|at most|more than", re.I)
"""Of a value of a setting, or a prompt: another value would be taken."""

NAMED = r"""["'`\[]{0}\\?["'`\]]|\b{0}:|: {0}\W*$|: {0}["'\\]|\b{0} (parameter )?(is|are) (not|un)"""
"""A setting's name in a refusal, and not the same word in a sentence: in quotes, at a colon, or as a subject."""

LONGEST_REFUSAL_BYTES = 1 << 12

LARGEST_LIST_BYTES = 16 << 20
"""Of a server's list of models; OpenRouter's has half a megabyte."""

LARGEST_ANSWER_BYTES, BYTES_PER_TOKEN = 1 << 20, 1 << 10
"""Of an answer, and more for each of its tokens: an echo has some 200 bytes of JSON per token."""


@dataclass(frozen=True, slots=True)
class _Reply:
    """The first choice of a completion, of either API; `reasoning` is a thought that the server has set apart."""

    text: str
    reasoning: str
    ended: str
    filtered: bool
    usage: Mapping[str, Any]
    seconds: float

    @property
    def tokens_thought(self) -> object:
        match self.usage:
            case {"completion_tokens_details": {"reasoning_tokens": tokens}}:
                return tokens
            case _:
                return None

    @property
    def sets_apart(self) -> bool:
        """Whether the server is seen here to set thoughts apart from answers."""
        return bool(self.reasoning or self.tokens_thought)


class OpenAIEngine:
    """A served model; implements `Engine` without `swap`.

    `url` ends where `/completions` begins, as in `http://host:8000/v1`; `tokenizer` is the point's own folder. With
    `api` "chat" the server applies its chat template. The key in OPENAI_API_KEY is sent if `url` is OPENAI_BASE_URL.
    `max_length` None asks the server; where the server does not say, it is `asked_length`, the tokens of the longest
    prompt with its answer that will be asked. The other options are those of `Server`.
    """

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: str | Path,
        *,
        api: Api = "completions",
        max_length: int | None = None,
        asked_length: int | None = None,
        concurrency: int = 8,
        attempts: int = 6,
        timeout_seconds: float = 600.0,
        first_pause_seconds: float = 0.5,
    ) -> None:
        self._server = Server(
            url,
            concurrency=concurrency,
            attempts=attempts,
            timeout_seconds=timeout_seconds,
            first_pause_seconds=first_pause_seconds,
        )
        self.url, self.model = self._server.url, model
        self._api: Api = api
        self.tokenizer = load_tokenizer(tokenizer)
        self._refused: frozenset[str] = frozenset()
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
            check_room(self._length(prompt), prompt.longest, self.max_length)
        replies = self._server.map(self._reply_or_refusal, prompts, progress)
        refusals = [reply for reply in replies if isinstance(reply, PromptRefused)]
        if refusals and len(refusals) == len(replies):
            raise refusals[0]
        apart = any(reply.sets_apart for reply in replies if isinstance(reply, _Reply))
        answers = [
            self._answer(prompt, reply, apart=apart)
            if isinstance(reply, _Reply)
            else Answer("", self._length(prompt), 0, 0.0, True, "failed", str(reply))
            for prompt, reply in zip(prompts, replies, strict=True)
        ]
        if lost := sorted(CHANGED.keys() & self._refused):
            remark = f"{self.url} takes no {' and no '.join(lost)}: {' and '.join(CHANGED[name] for name in lost)}"
            answers = [replace(answer, remark=answer.remark or remark) for answer in answers]
        return answers

    def score(self, windows: Sequence[Sequence[int]], *, progress: Progress | None = None) -> list[NDArray[np.float32]]:
        """Log-likelihood of every token but the first of each window, from the server's echo."""
        echoes = self._server.map(self._echo, windows, progress)
        return [np.asarray(echo["token_logprobs"][1:], dtype=np.float32) for echo in echoes]

    def loglikelihoods(self, texts: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether each of its tokens was the server's likeliest."""
        found: list[tuple[float, bool]] = []
        for (_, context), echo in zip(
            texts, self._server.map(self._echo, [ids for ids, _ in texts], None), strict=True
        ):
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
        """Finishes the requests under way and closes the connections."""
        self._server.close()

    def _reply_or_refusal(self, prompt: Prompt) -> _Reply | PromptRefused:
        started = time.perf_counter()
        shown = self._shown(prompt)
        try:
            reply = self._asked(shown | _decoding(prompt, self.tokenizer.all_special_tokens), prompt.longest)
        except PromptRefused as refusal:
            return refusal
        choice = reply["choices"][0]
        return _Reply(
            text=choice["text"] or "",
            reasoning=_reasoning(choice).strip(),
            ended=str(choice.get("finish_reason")),
            filtered=choice.get("finish_reason") == "content_filter" or bool(choice.get("refusal")),
            usage=reply["usage"] if isinstance(reply.get("usage"), dict) else {},
            seconds=time.perf_counter() - started,
        )

    def _shown(self, prompt: Prompt) -> dict[str, Any]:
        """The settings of a request that hold the prompt."""
        if self._api == "completions":
            return {"prompt": self._text_or_ids(prompt)}
        if not prompt.messages:
            raise BadInput(f"{self.url} is asked in messages (`api: chat`); set `chat: true` in the benchmark")
        shown: dict[str, Any] = {"messages": [{"role": one.role, "content": one.content} for one in prompt.messages]}
        if prompt.template:
            shown["chat_template_kwargs"] = dict(prompt.template)
        if prompt.messages[-1].role == "assistant":
            shown |= {"continue_final_message": True, "add_generation_prompt": False}
        return shown

    def _text_or_ids(self, prompt: Prompt) -> str | list[int]:
        """A text that the server reads as the prompt's token ids, or these ids themselves where there is none.

        A server puts all special tokens of the tokenizer around a text: perhaps a first one twice, or an end token.
        """
        ids = self.encode(prompt.whole, bare=prompt.bare)
        for text in (prompt.whole, prompt.whole.removeprefix(str(self.tokenizer.bos_token or ""))):
            if list(self.tokenizer(text, verbose=False)["input_ids"]) == ids:
                return text
        return ids

    def _answer(self, prompt: Prompt, reply: _Reply, *, apart: bool) -> Answer:
        """The answer in a reply; `apart` where the server sets thoughts apart from answers."""
        sent = self._length(prompt)
        read = self._count(reply.usage.get("prompt_tokens"), sent)
        if read < sent - MARKS[self._api]:
            raise BadInput(
                f"{self.url} read {read} of a prompt's {sent} tokens: it cuts long prompts, or has another tokenizer;"
                f" serve {self.model} with a longer context, or ask at shorter lengths"
            )
        thought, whole, ended = _parted(prompt, reply, apart=apart)
        before = reply.reasoning + reply.text.removesuffix(whole)
        tokens_thought = self._count(reply.tokens_thought, self._tokens(before))
        cut = reply.ended == "length"
        if prompt.thinking is not None:
            ended = ended and tokens_thought <= prompt.thinking.budget
            whole, longer = self._within(whole if ended else "", prompt.max_new_tokens)
            cut = cut or longer
        text = before_stops(whole, prompt.stops)
        status = status_of(text, cut=cut and text == whole) if ended else "unended"
        reasoned = prompt.thinking is None and reply.reasoning and not text.strip()
        return Answer(
            text=text,
            tokens_in=read,
            tokens_out=self._count(reply.usage.get("completion_tokens"), self._tokens(reply.reasoning + reply.text)),
            seconds=reply.seconds,
            finite=True,
            status="filtered" if reply.filtered else status,
            remark=f"{self.url} gave reasoning in place of an answer; serve {self.model} with its reasoning off"
            if reasoned
            else "",
            thought=thought,
            tokens_thought=tokens_thought,
        )

    def _length(self, prompt: Prompt) -> int:
        return len(self.encode(prompt.whole, bare=prompt.bare))

    def _tokens(self, text: str) -> int:
        return len(self.encode(text, bare=True))

    def _within(self, text: str, most: int) -> tuple[str, bool]:
        """The first `most` tokens of an answer without its special tokens, and whether it has more.

        The limit of a request is for thought and answer together.
        """
        for mark in self.tokenizer.all_special_tokens:
            text = text.replace(mark, "")
        ids = self.encode(text, bare=True)
        return (text, False) if len(ids) <= most else (str(self.tokenizer.decode(ids[:most])), True)

    def _echo(self, ids: Sequence[int]) -> dict[str, Any]:
        """The server's logprobs of a prompt given as token ids."""
        if self._api == "chat":
            raise BadInput(f"{self.url} is asked in messages, which scores no text; take the option `api: chat` out")
        check_window(len(ids), self.max_scored)
        settings = {"prompt": list(ids), "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        reply = self._asked(settings, len(ids))
        logprobs: Any = reply["choices"][0].get("logprobs")
        if not isinstance(logprobs, dict) or not _are_echoed(logprobs, len(ids)):
            raise BadInput(f"{self.url} does not echo logprobs of a prompt; {BY_THE_LIBRARY}")
        return {name: logprobs[name][: len(ids)] for name in ("token_logprobs", "top_logprobs")}

    def _ask_max_length(self, asked_length: int | None) -> int:
        remedy = f"check the URL and the model's name {self.model}"
        try:
            reply = self._server.request("GET", "/models", None, LARGEST_LIST_BYTES, lambda reply: reply, remedy)
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

    def _asked(self, settings: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """The checked reply of so many tokens at most; asked again without an optional setting that is refused."""
        path, other = ("/completions", "chat") if self._api == "completions" else ("/chat/completions", "completions")
        most = LARGEST_ANSWER_BYTES + BYTES_PER_TOKEN * tokens
        remedy = f"check the URL and the model's name {self.model}, or give the engine's option `api: {other}`"
        while True:
            body = {"model": self.model, **self._accepted(settings)}
            try:
                return self._server.request("POST", path, body, most, self._checked, remedy)
            except PromptRefused as refusal:
                refused = _refused_setting(refusal.content, body)
                if refused is None:
                    raise
                if refused == "add_generation_prompt":
                    refused = "continue_final_message"  # they are sent and left out together
                if refused in OPTIONAL and not (refused == "temperature" and body[refused]):
                    self._refused |= {refused}
                elif refused in REMEDIES:
                    raise BadInput(f"{str(refusal).removesuffix(remedy)}{REMEDIES[refused]}") from None
                else:
                    raise

    def _accepted(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings without those that the server has refused, or with their other names."""
        accepted = dict(settings)
        for name in self._refused & accepted.keys():
            value = accepted.pop(name)
            if other := OPTIONAL[name]:
                accepted[other] = value
            if name == "continue_final_message":
                del accepted["add_generation_prompt"]
                accepted["messages"] = accepted["messages"][:-1]
        return accepted

    def _checked(self, reply: dict[str, Any]) -> dict[str, Any]:
        """A reply whose first choice has a `text`, or says why it has none; the content of a message is such a text."""
        if self._api == "chat":
            reply = _as_completion(reply)
        match reply:
            case {"choices": [{"finish_reason": "error"}, *_]}:
                raise BadAnswer("ended with an error of the model's server")
            case {"choices": [{"text": str(text), **choice}, *_]} if is_text(text) and is_text(_reasoning(choice)):
                return reply
            case {"choices": [{"text": None, **choice}, *_]} if is_text(thought := _reasoning(choice)) and (
                thought or choice.get("finish_reason")
            ):
                return reply  # the model ended, or was cut, while it reasoned
            case {"choices": [{"message": _}, *_]} if self._api == "completions":
                raise BadInput(f"{self.url} answers with a chat completion; give the engine's option `api: chat`")
            case _:
                raise BadAnswer(f"{sentence(json.dumps(reply).encode())}, which is not a completion")

    def _count(self, told: object, own: int) -> int:
        """A number of tokens as the server counts, or our own count where it does not say."""
        return told if type(told) is int and 0 < told <= self.max_length else own


def _decoding(prompt: Prompt, special_tokens: Sequence[str]) -> dict[str, Any]:
    """The settings of a request that say how to generate."""
    settings: dict[str, Any] = {"max_tokens": prompt.longest, "temperature": 0}
    if (sampling := prompt.sampling) is not None:
        settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed % SEEDS}
        settings |= {"top_k": sampling.top_k} if sampling.top_k else {}
    if prompt.stops and prompt.thinking is None:  # a server would also end a thought at them
        settings["stop"] = list(prompt.stops[:MOST_STOPS])
    if prompt.thinking is not None and prompt.thinking.end in special_tokens:
        settings["skip_special_tokens"] = False
    return settings


def _parted(prompt: Prompt, reply: _Reply, *, apart: bool) -> tuple[str, str, bool]:
    """As `split_thought`, also where the server has split the text.

    A text without an end tag may be a thought that the server's parser did not see: one that was cut, or that begins
    with the opening tag. It is an answer where this very reply sets a thought apart, or another and it is none of both.
    """
    thinking, cut = prompt.thinking, reply.ended == "length"
    if thinking is None and prompt.messages and UNASKED.end in reply.text:  # of a template that always opens a thought
        return split_thought(reply.text, UNASKED)
    if thinking is None:
        return reply.reasoning, reply.text, True
    begins = reply.text.lstrip().startswith(thinking.end.replace("/", "", 1))
    if thinking.end in reply.text or not (reply.sets_apart or (apart and not cut and not begins)):
        return split_thought(reply.text, thinking)
    return reply.reasoning, reply.text, bool(reply.text.strip()) or not cut


def _refused_setting(refusal: bytes, body: Mapping[str, Any]) -> str | None:
    """The setting of a request that a server refuses by its name; None where the refusal is about something else."""
    text = refusal[:LONGEST_REFUSAL_BYTES].decode(errors="replace")
    if not UNSUPPORTED.search(text) or TOO_LARGE.search(text):
        return None
    settings = (name for name in body if name not in ("model", "prompt", "messages"))
    return next((name for name in settings if re.search(NAMED.format(name), text)), None)


def _as_completion(reply: Mapping[str, Any]) -> dict[str, Any]:
    """A chat completion as a completion; the content of a message is a text, or a list of texts and thoughts."""
    match reply:
        case {"choices": [{"message": {"content": [*parts], **message}, **choice}, *_]}:
            content = {"text": _joined(parts, "text"), "reasoning": _joined(parts, "thinking")}
            return {**reply, "choices": [{**message, **choice, **content}]}
        case {"choices": [{"message": {"content": content, **message}, **choice}, *_]}:
            return {**reply, "choices": [{**message, **choice, "text": content}]}
        case {"choices": [{"message": {**message}, **choice}, *_]}:
            return {**reply, "choices": [{**message, **choice, "text": None}]}
        case _:
            return dict(reply)


def _joined(parts: Sequence[Any], kind: str) -> str:
    """The texts of one kind among the parts of a message, as in Mistral's API."""
    texts: list[str] = []
    for part in parts:
        found = part.get(kind) if isinstance(part, dict) and part.get("type") == kind else None
        texts.append(found if isinstance(found, str) else _joined(found, "text") if isinstance(found, list) else "")
    return "".join(texts)


def _reasoning(choice: Mapping[str, Any]) -> str:
    """The reasoning that a server has set apart from its answer, under either of the names in use."""
    found = (choice.get(name) for name in ("reasoning_content", "reasoning"))
    return next((text for text in found if isinstance(text, str) and text.strip()), "")


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

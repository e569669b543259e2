"""The harness's requests as calls of an engine."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.errors import BadInput
from jobs.evaluation_tasks import PLAINLY, Generation, Status
from workers.benchmarks.generation import sampling_of, thought_of
from workers.engines.engine import Engine, Message, Prompt

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


DEFAULT_NEW_TOKENS = 256
"""The limit of generated tokens in lm-evaluation-harness for a task that sets none."""


@dataclass(slots=True)
class RequestCost:
    """The cost of one item's requests."""

    tokens: int = 0
    seconds: float = 0.0
    finite: bool = True
    status: Status = "answered"
    """That of a generated answer; of several, the last that is not `answered`."""
    thought: str = ""
    """That of the last generated answer."""
    tokens_thought: int = 0
    tokens_out: int = 0


class Asking:
    """The three questions of lm-evaluation-harness, put to an engine; records the cost of each item."""

    def __init__(
        self,
        engine: Engine,
        beginning: str,
        *,
        conversations: Mapping[str, tuple[Message, ...]] | None = None,
        generation: Generation = PLAINLY,
        max_new_tokens: int | None = None,
        sample: int = 0,
    ) -> None:
        """In a chat, contexts come out of a chat template, those of `conversations`; `sample` numbers the answers."""
        self._engine = engine
        self._beginning = beginning
        self._chat = conversations is not None
        self._conversations = conversations or {}
        self._generation = generation
        self._max_new_tokens = max_new_tokens
        self._sample = sample
        self.over_long: set[int] = set()
        self.shortest = engine.max_length
        """Tokens of the shortest prompt and its answer, the thought apart; at the most the model's context."""
        self.remark = ""
        """The first remark that an answer came with."""
        self.costs: defaultdict[int, RequestCost] = defaultdict(RequestCost)

    def ask(self, kind: str, requests: Sequence[Instance]) -> Sequence[Any]:
        """The answers to requests of one kind, in their order."""
        if kind == "loglikelihood":
            return self.loglikelihood(requests)
        return self.generate_until(requests) if kind == "generate_until" else self.loglikelihood_rolling(requests)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether greedy decoding says it) of each request."""
        found = [(-math.inf, False)] * len(requests)
        asked: list[tuple[int, list[int], int]] = []
        context_ids = cache(self._context)  # equal contexts are encoded once, and stand one after the other
        for at in sorted(range(len(requests)), key=lambda at: str(request_arguments(requests[at])[0])):
            context, continuation = request_arguments(requests[at])
            ids, kept = self._pair(context, continuation, context_ids)
            if not self._too_long(requests[at], len(ids), self._engine.max_scored):
                asked.append((at, ids, kept))
        started = time.perf_counter()
        answers = self._engine.loglikelihoods([(ids, kept) for _, ids, kept in asked])
        each = (time.perf_counter() - started) / max(1, sum(len(ids) for _, ids, _ in asked))
        for (at, ids, _), answer in zip(asked, answers, strict=True):
            found[at] = answer
            self._charge(requests[at], len(ids), each * len(ids), finite=math.isfinite(answer[0]))
        return found

    def _pair(self, context: str, continuation: str, context_ids: Callable[[str], list[int]]) -> tuple[list[int], int]:
        """Token ids of both, and how many of them are context, by lm-evaluation-harness's own convention.

        White space at the end of the context belongs to the continuation, because tokenizers glue it to the next word;
        the part before it is encoded by itself; a text without context stands after the beginning-of-text token.
        """
        if context:
            before, ids = context_ids(context.rstrip()), self._context(context + continuation)
            ids, kept = [*before, *ids[len(before) :]], max(1, len(before))
        else:
            ids, kept = self._engine.encode(continuation, bare=True), 1
            beginning = self._beginning_ids()
            ids = ids if ids[:1] == beginning else [*beginning, *ids]
        if kept >= len(ids):
            raise BadInput(f"lm_eval: the continuation {continuation!r} adds no token to its context; give it a text")
        return ids, kept

    def _context(self, text: str) -> list[int]:
        return self._engine.encode(text, bare=self._chat)

    def _beginning_ids(self) -> list[int]:
        return self._engine.encode(self._beginning, bare=True)[-1:] if self._beginning else []

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Log-likelihood of a whole text, in windows as long as the model's context that do not overlap."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        if not self._beginning:
            raise BadInput("lm_eval: the tokenizer has neither a first nor an end token to begin a text with")
        [beginning] = self._beginning_ids()
        totals: list[float] = []
        for request in requests:
            started = time.perf_counter()
            ids = self._engine.encode(request_arguments(request)[0], bare=True)
            most = self._engine.max_scored - 1
            pairs = [make_disjoint_window(pair) for pair in get_rolling_token_windows(ids, beginning, most, 1)]
            scored = self._engine.score([[*before, *after] for before, after in pairs])
            total = sum(
                float(values[-len(after) :].sum(dtype=np.float64))
                for values, (_, after) in zip(scored, pairs, strict=True)
            )
            self._charge(request, len(ids), time.perf_counter() - started, finite=math.isfinite(total))
            totals.append(total)
        return totals

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """An answer to each request, cut before the first of its stop texts; a request may be there several times."""
        answers = [""] * len(requests)
        times: Counter[int] = Counter()
        asked: list[tuple[int, Prompt]] = []
        for at, request in enumerate(requests):
            context, settings = request_arguments(request)
            stops, new_tokens = generation_settings(request, settings, drawn=bool(self._generation.temperature))
            repeat = times[id(request)]
            times[id(request)] += 1
            place = (request.task_name or "", _item(request), request.idx, *([repeat] if repeat else []))
            prompt = Prompt(
                "",
                context,
                self._max_new_tokens or new_tokens,
                tuple(stops),
                self._chat,
                messages=self._conversations.get(context, ()),
                template=self._generation.template,
                thinking=thought_of(self._generation),
                sampling=sampling_of(self._generation, self._sample, *place),
            )
            tokens = len(self._context(context)) + prompt.longest
            self.shortest = min(self.shortest, tokens - self._generation.budget)
            if not self._too_long(request, tokens, self._engine.max_length):
                asked.append((at, prompt))
        for (at, _), answer in zip(asked, self._engine.generate([prompt for _, prompt in asked]), strict=True):
            answers[at] = answer.text
            self._charge(requests[at], answer.tokens_in + answer.tokens_out, answer.seconds, finite=answer.finite)
            cost = self.costs[_item(requests[at])]
            cost.thought = answer.thought
            cost.tokens_thought += answer.tokens_thought
            cost.tokens_out += answer.tokens_out
            if answer.status != "answered":
                cost.status = answer.status
            self.remark = self.remark or answer.remark
        return answers

    def _too_long(self, request: Instance, tokens: int, most: int) -> bool:
        if tokens <= most:
            return False
        self.over_long.add(_item(request))
        return True

    def _charge(self, request: Instance, tokens: int, seconds: float, *, finite: bool) -> None:
        cost = self.costs[_item(request)]
        cost.tokens += tokens
        cost.seconds += seconds
        cost.finite = cost.finite and finite


def _item(request: Instance) -> int:
    return int(request.doc_id or 0)


def request_arguments(request: Instance) -> tuple[Any, ...]:
    """A request's text and its other arguments."""
    return tuple(request.args)


def generation_settings(
    request: Instance, settings: Mapping[str, Any], *, drawn: bool = False
) -> tuple[list[str], int]:
    """Stop texts and the most tokens to generate; `BadInput` for a task that samples, if the job does not (`drawn`)."""
    if settings.get("do_sample") and settings.get("temperature", 1.0) != 0 and not drawn:
        raise BadInput(
            f"lm_eval {request.task_name}: the task samples its answers; give `lm_eval:` a `temperature:`, or set"
            " do_sample: false in its YAML"
        )
    stops = settings.get("until") or []
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    new_tokens = next((int(settings[name]) for name in names if settings.get(name)), DEFAULT_NEW_TOKENS)
    return [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop], new_tokens

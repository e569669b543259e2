"""Any task of lm-evaluation-harness, answered by our engine through its Python API, kept item by item.

Nothing of its caches is used: they know neither the model nor the length. A prompt that does not fit in the model's
context is never cut: its item gets no score, and the metric `over_long` says how many of the items these are.

A metric is kept or left out as a whole, for all items of a task: one from 0 to 100 counts in hundredths, a perplexity
as its inverse, which is the geometric mean of the likelihoods; one where less is better, or that only a set of items
has, is left out.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import random
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.errors import BadInput, MergeyardError
from jobs.loading import quoted, suggestion
from workers.engines.engine import Engine, Prompt
from workers.engines.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

OVER_LONG = "over_long"
"""The metric that is 1 for an item whose prompt exceeds the model's context, which is then not asked."""

DEFAULT_NEW_TOKENS = 256
"""What lm-evaluation-harness generates at most where a task does not say."""

REHEARSED = 3
"""Items of each task that the reference answers are scored on, before the model is asked for any."""

INVERSE = {"perplexity": "{}", "weighted_perplexity": "{}", "bits_per_byte": "byte_perplexity"}
"""Aggregations of log-likelihoods, and the perplexity that each comes to."""


@dataclass(frozen=True, slots=True)
class SampleScore:
    """One metric of one item, from 0 to 1; `metric` is `task:metric`, with the filter where the task has several."""

    metric: str
    item: int
    answer: str
    score: float
    finite: bool
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Sample:
    """What the harness makes of one item's answers, after one of the task's filters."""

    number: int
    filter: str
    metrics: Mapping[str, Any]
    responses: Sequence[Any]


@dataclass(frozen=True, slots=True)
class _Rule:
    """How a metric of one task becomes a score: its title, and the score of a value; or why it does not."""

    title: str
    score: Callable[[Any], float]
    remark: str = ""
    left_out: bool = False


def sample_scores(
    engine: Engine,
    task: str,
    limit: int | None,
    *,
    beginning: str,
    tokenizer: Path | None = None,
    metadata: Mapping[str, Any] | None = None,
    num_fewshot: int | None = None,
    chat_template: str | None = None,
) -> list[SampleScore]:
    """Every item of a task, of a group or of a YAML file of the user's own, scored by lm-evaluation-harness.

    `limit` takes the first items, of each length where a task has several. `beginning` is the text of the token that
    stands before a text without context; `tokenizer` the folder of the tokenizer, which tasks that make their own texts
    are told beside `metadata`. With `chat_template` the prompts are put into it. `BadInput` for a task that does not
    exist, that samples, whose data are not there or of which no metric can be kept: before the model is asked.
    """
    _check_library()
    with _in_folder_of(task), _quiet():
        told = {**({"tokenizer": str(tokenizer)} if tokenizer is not None else {}), **(metadata or {})}
        leaves = _load(task, json.dumps(told), num_fewshot)
        chat = None if chat_template is None or tokenizer is None else _chat(tokenizer, chat_template)
        picked = {name: _first_items(leaf, limit) for name, leaf in leaves.items()}
        rehearsed = {name: _rehearsed(task, leaf, picked[name], chat) for name, leaf in leaves.items()}
        rules = {name: _rules(leaf, rehearsed[name]) for name, leaf in leaves.items()}
        if not any(not rule.left_out for each in rules.values() for rule in each.values()):
            raise BadInput(f"lm_eval {task}: no metric can be kept ({_remarks(rules)}); take another task")
        scores: list[SampleScore] = []
        for name, leaf in leaves.items():
            model = _Asking(engine, beginning)
            samples = _answered(task, leaf, picked[name], chat, model.ask)
            over_long = {picked[name][at] for at in model.over_long}
            samples = [sample for sample in samples if sample.number not in over_long]
            known = rehearsed[name] if leaf.OUTPUT_TYPE == "generate_until" else []
            rules[name] = _rules(leaf, [*known, *samples])
            costs = {picked[name][at]: cost for at, cost in model.costs.items()}
            scores += _scores_of(name, samples, rules[name], costs)
            if over_long:
                title = f"{name}:{OVER_LONG}"
                scores += [SampleScore(title, at, "", float(at in over_long), True, 0, 0.0) for at in picked[name]]
    if all(score.metric.endswith(f":{OVER_LONG}") for score in scores):
        trouble = f"every item exceeds the model's {engine.max_length} tokens" if scores else _remarks(rules)
        raise BadInput(f"lm_eval {task}: {trouble}; take another task")
    if remarks := _remarks(rules):
        print(f"lm_eval {task}: {remarks}", file=sys.stderr)
    return scores


def _check_library() -> None:
    if find_spec("lm_eval") is None:
        raise BadInput("lm_eval needs lm-evaluation-harness; pip install 'mergeyard[lm-eval]'")


@contextlib.contextmanager
def _code_of(task: str) -> Generator[None]:
    """Whatever the harness and a task's own code raise is one line; errors of our own pass."""
    try:
        yield
    except MergeyardError:
        raise
    except Exception as error:
        raise BadInput(f"lm_eval {task}: {_one_line(error)}; see the task's own documentation") from error


def _answered(
    task: str,
    leaf: Task,
    numbers: Sequence[int],
    chat: Callable[..., str] | None,
    ask: Callable[[str, Sequence[Instance]], Sequence[Any]],
) -> list[_Sample]:
    """The items `numbers`, with what `ask` answers to each kind of request, as lm-evaluation-harness scores them."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    with _code_of(task):
        leaf.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)  # examples are drawn anew
        leaf.build_all_requests(
            samples=list(numbers),
            rank=0,
            world_size=1,
            apply_chat_template=chat is not None,
            fewshot_as_multiturn=True,
            chat_template=chat,
        )
    requests: Sequence[Instance] = leaf.instances
    for kind in dict.fromkeys(str(request.request_type) for request in requests):
        alike = [request for request in requests if request.request_type == kind]
        for request, answer in zip(alike, ask(kind, alike), strict=True):
            request.resps.extend([answer] * (request.repeats or 1))  # greedy: asked again it would say the same
    with _code_of(task):
        leaf.apply_filters()
        return list(_processed(leaf, numbers))


def _processed(leaf: Task, numbers: Sequence[int]) -> Iterator[_Sample]:
    """The metrics of every item by the task's own code; the harness counts the items of a choice from 0."""
    by_item: defaultdict[int, list[Instance]] = defaultdict(list)
    for request in leaf.instances:
        by_item[int(request.doc_id or 0)].append(request)
    for at, requests in by_item.items():
        requests.sort(key=lambda request: request.idx)
        for name in requests[0].filtered_resps:
            responses = [request.filtered_resps[name] for request in requests]
            metrics: Any = leaf.process_results(requests[0].doc, responses)
            length = str(requests[0].doc.get("max_length"))
            if length in metrics:  # a metric for each length, of which an item has but its own
                metrics = {length: metrics[length]}
            yield _Sample(numbers[at], str(name), metrics, responses)


def _rehearsed(task: str, leaf: Task, numbers: Sequence[int], chat: Callable[..., str] | None) -> list[_Sample]:
    """The first items with their reference answers: what the metrics are, learnt without asking the model."""

    def ask(kind: str, requests: Sequence[Instance]) -> list[Any]:
        if kind == "generate_until":
            with _code_of(task):
                return [_reference(leaf, request) for request in requests]
        if kind not in ("loglikelihood", "loglikelihood_rolling"):
            raise BadInput(f"lm_eval {task}: a task that asks for {kind} cannot be answered here; take another task")
        return [(-1.0, True) if kind == "loglikelihood" else -1.0] * len(requests)

    if getattr(leaf, "UNSAFE_CODE", False) or getattr(leaf, "MULTIMODAL", False):
        why = "runs the code that models write" if getattr(leaf, "UNSAFE_CODE", False) else "shows more than text"
        raise BadInput(f"lm_eval {task}: the task {why}, which no worker does; take another task")
    return _answered(task, leaf, numbers[:REHEARSED], chat, ask)


def _reference(leaf: Task, request: Instance) -> str:
    """The answer that the task takes for right; refuses a task whose answers are not greedy."""
    _generation(request, _arguments(request)[1])
    own: Any = leaf
    target: Any = own.doc_to_target(request.doc)
    if isinstance(target, int) and own.get_config("doc_to_choice") is not None:
        target = own.doc_to_choice(request.doc)[target]
    if isinstance(target, list | tuple) and target:
        target = target[0]
    return str(target)


@lru_cache(1)
def _manager(metadata: str) -> TaskManager:
    """All tasks that lm-evaluation-harness knows; reading their files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(metadata=json.loads(metadata))


def _load(task: str, metadata: str, num_fewshot: int | None) -> dict[str, Task]:
    """The leaf tasks of a task or group by name; `BadInput` with the nearest name for none."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    manager = _manager(metadata)
    if not _is_path(task) and task not in manager.all_tasks:
        near = suggestion(task, manager.all_tasks)
        raise BadInput(f"lm_eval has no task {quoted(task)}{near or '; see `lm-eval ls tasks`'}")
    random.seed(DEFAULT_RANDOM_SEED)  # some tasks shuffle as they load: every worker must see the same items
    np.random.seed(DEFAULT_OTHER_SEED)
    try:
        leaves: dict[str, Task] = manager.load([task])["tasks"]
        for leaf in leaves.values():
            own: int | None = leaf.get_config("num_fewshot")
            if num_fewshot is not None and own != 0:
                leaf.set_config(key="num_fewshot", value=num_fewshot)
            elif own is None:
                leaf.set_config(key="num_fewshot", value=0)
    except ImportError as error:
        raise BadInput(f"lm_eval {task}: {_what_is_missing(error)}") from error
    except Exception as error:  # whatever a task's own code and the data's home may raise
        raise BadInput(f"lm_eval {task}: cannot be loaded ({_one_line(error)}); are its data here?") from error
    return leaves


def _what_is_missing(error: ImportError) -> str:
    """The module that a task needs, and what can be done about it."""
    name = error.name or (error.__cause__.name if isinstance(error.__cause__, ImportError) else None) or ""
    if name.partition(".")[0] == "transformers":
        return f"it needs {name}, which transformers {version('transformers')} no longer has; take another task"
    return f"it needs what is not installed ({_one_line(error)}); install it where workers run"


def _chat(tokenizer: Path, template: str) -> Callable[..., str]:
    """A conversation in the chat template, up to where the model goes on."""
    filled = load_tokenizer(tokenizer)

    def render(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            filled.apply_chat_template(
                history,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    return render


def _is_path(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


@contextlib.contextmanager
def _in_folder_of(task: str) -> Generator[None]:
    """A user's own task finds its data beside its YAML, wherever the worker was started."""
    if not _is_path(task):
        yield
        return
    if not Path(task).is_file():
        raise BadInput(f"lm_eval {task}: no such file on this worker; put it where every worker can read it")
    with contextlib.chdir(Path(task).parent):
        yield


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Without lm-evaluation-harness's and datasets' messages and bars; errors still come as exceptions."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(action="ignore"),
        ):
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _first_items(task: Task, limit: int | None) -> list[int]:
    """The numbers of the first `limit` items, or of all; of each length, where items say which they are for."""
    seen: defaultdict[Any, int] = defaultdict(int)
    picked: list[int] = []
    for number, item in enumerate(task.eval_docs):
        length: Any = item.get("max_length") if isinstance(item, Mapping) else None
        seen[length] += 1
        if limit is None or seen[length] <= limit:
            picked.append(number)
    return picked


def _scores_of(
    name: str, samples: Sequence[_Sample], rules: Mapping[str, _Rule], costs: Mapping[int, _Cost]
) -> Iterator[SampleScore]:
    """The scores of one leaf task; two metrics that come to the same are given once."""
    several_filters = len({sample.filter for sample in samples}) > 1
    for sample in samples:
        cost = costs.get(sample.number, _Cost())
        found = {
            rules[metric].title: rules[metric].score(value)
            for metric, value in sample.metrics.items()
            if not rules[metric].left_out
        }
        for title, score in found.items():
            yield SampleScore(
                metric=f"{name}:{title},{sample.filter}" if several_filters else f"{name}:{title}",
                item=sample.number,
                answer=_answer(sample),
                score=score if cost.finite else 0.0,
                finite=cost.finite,
                tokens=cost.tokens,
                seconds=cost.seconds,
            )


def _rules(leaf: Task, samples: Sequence[_Sample]) -> dict[str, _Rule]:
    """How each metric becomes a score, decided by all of its values together, so that items stay paired."""
    values: defaultdict[str, list[Any]] = defaultdict(list)
    for sample in samples:
        for metric, value in sample.metrics.items():
            values[metric].append(value)
    return {metric: _rule(leaf, metric, found) for metric, found in values.items()}


def _rule(leaf: Task, metric: str, values: Sequence[Any]) -> _Rule:
    own: Any = leaf
    aggregation = own.aggregation().get(metric)
    kind = getattr(aggregation, "__name__", "")
    if kind in INVERSE:
        return _Rule(f"inverse_{INVERSE[kind].format(metric)}", _likelihood)
    if own.higher_is_better().get(metric) is False:
        return _left_out(metric, "less of it is better")
    of_one = _number if all(_number(value) is not None for value in values) else _alone(leaf, aggregation)
    numbers = [of_one(value) for value in values]
    known = [number for number in numbers if number is not None]
    if len(known) < len(numbers):
        return _left_out(metric, "a single item has none")
    if not all(0.0 <= number <= 100.0 for number in known):
        return _left_out(metric, "it is not from 0 to 1 or 100")
    if max(known, default=0.0) > 1.0:
        return _Rule(metric, lambda value: (of_one(value) or 0.0) / 100, "runs to 100 and counts in hundredths")
    return _Rule(metric, lambda value: of_one(value) or 0.0)


def _left_out(metric: str, why: str) -> _Rule:
    return _Rule(metric, lambda _: 0.0, f"is left out: {why}", left_out=True)


def _likelihood(value: Any) -> float:
    """exp(log-likelihood), or that of a word or byte where their number stands beside it."""
    total, count = value if isinstance(value, tuple | list) else (value, 1)
    return min(1.0, math.exp(float(total) / float(count))) if count and not math.isnan(total) else 0.0


def _number(value: Any) -> float | None:
    """A value that is a number by itself; one that is not a number is 0."""
    if isinstance(value, bool | int | float | np.number | np.bool_):
        return 0.0 if math.isnan(float(value)) else float(value)
    return None


def _alone(leaf: Task, aggregation: Any) -> Callable[[Any], float | None]:
    """What a task's own aggregation, as of BLEU, makes of a single answer and its reference."""

    def of_one(value: Any) -> float | None:
        if aggregation is None or leaf.OUTPUT_TYPE != "generate_until":  # of choices there is F1 over the set alone
            return None
        try:
            return _number(aggregation([value]))
        except Exception:  # a task's own code, which need not know sets of one
            return None

    return of_one


def _remarks(rules: Mapping[str, Mapping[str, _Rule]]) -> str:
    """What is not plain about the metrics of all leaf tasks, each once."""
    found = [f"{metric} {rule.remark}" for each in rules.values() for metric, rule in each.items() if rule.remark]
    return "; ".join(dict.fromkeys(found))


def _answer(sample: _Sample) -> str:
    """What the model said; for a choice, the log-likelihood of each."""
    if len(sample.responses) == 1 and isinstance(sample.responses[0], str):
        return sample.responses[0]
    return json.dumps(sample.responses, default=str)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


@dataclass(slots=True)
class _Cost:
    """What the requests of one item took."""

    tokens: int = 0
    seconds: float = 0.0
    finite: bool = True


class _Asking:
    """The three questions of lm-evaluation-harness, put to an engine; remembers what each item cost."""

    def __init__(self, engine: Engine, beginning: str) -> None:
        self._engine = engine
        self._beginning = beginning
        self._front = engine.encode("")
        """What the tokenizer puts before every text."""
        self.over_long: set[int] = set()
        self.costs: defaultdict[int, _Cost] = defaultdict(_Cost)

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
        for at in sorted(range(len(requests)), key=lambda at: str(_arguments(requests[at])[0])):
            context, continuation = _arguments(requests[at])
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
        what comes before is encoded by itself; a text without context stands after the beginning-of-text token.
        """
        if context:
            context = self._bare(context)
            before, ids = context_ids(context.rstrip()), self._engine.encode(context + continuation)
            ids, kept = [*before, *ids[len(before) :]], max(1, len(before))
        else:
            ids, kept = self._engine.encode(continuation)[len(self._front) :], 1
            beginning = self._beginning_ids()
            ids = ids if ids[:1] == beginning else [*beginning, *ids]
        if kept >= len(ids):
            raise BadInput(f"lm_eval: the continuation {continuation!r} adds no token to its context; give it a text")
        return ids, kept

    def _context(self, text: str) -> list[int]:
        return self._engine.encode(text)

    def _beginning_ids(self) -> list[int]:
        return self._engine.encode(self._beginning)[-1:] if self._beginning else []

    def _bare(self, text: str) -> str:
        """A text without the beginning-of-text mark that a chat template wrote, where encoding writes it as well."""
        return text.removeprefix(self._beginning) if self._front and self._front == self._beginning_ids() else text

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Log-likelihood of a whole text, in windows as long as the model's context that do not overlap."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        if not self._beginning:
            raise BadInput("lm_eval: the tokenizer has neither a first nor an end token to begin a text with")
        [beginning] = self._beginning_ids()
        totals: list[float] = []
        for request in requests:
            started = time.perf_counter()
            ids = self._engine.encode(_arguments(request)[0])
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
        """A greedy answer to each request, cut before the first of its stop texts."""
        answers = [""] * len(requests)
        asked: list[tuple[int, Prompt]] = []
        for at, request in enumerate(requests):
            context, settings = _arguments(request)
            context = self._bare(context)
            stops, new_tokens = _generation(request, settings)
            tokens = len(self._engine.encode(context)) + new_tokens
            if not self._too_long(request, tokens, self._engine.max_length):
                asked.append((at, Prompt("", context, new_tokens, tuple(stops))))
        for (at, _), answer in zip(asked, self._engine.generate([prompt for _, prompt in asked]), strict=True):
            answers[at] = answer.text
            self._charge(requests[at], answer.tokens_in + answer.tokens_out, answer.seconds, finite=answer.finite)
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


def _arguments(request: Instance) -> tuple[Any, ...]:
    """A request's text and what goes with it."""
    return tuple(request.args)


def _generation(request: Instance, settings: Mapping[str, Any]) -> tuple[list[str], int]:
    """Stop texts and the most tokens to generate; `BadInput` for a task that samples, for engines answer greedily."""
    if settings.get("do_sample") and settings.get("temperature", 1.0) != 0:
        raise BadInput(f"lm_eval {request.task_name}: the task samples its answers; set do_sample: false in its YAML")
    stops = settings.get("until") or []
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    new_tokens = next((int(settings[name]) for name in names if settings.get(name)), DEFAULT_NEW_TOKENS)
    return [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop], new_tokens

"""Any task of lm-evaluation-harness, answered by our engine through its Python API, kept item by item.

Nothing of its caches is used: they know neither the model nor the length. A prompt that does not fit in the model's
context is never cut: its item gets no score, and the metric `over_long` says how many of the items these are.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.errors import BadInput
from jobs.loading import quoted, suggestion
from workers.engines.engine import Engine, Prompt

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

OVER_LONG = "over_long"
"""The metric that is 1 for an item whose prompt exceeds the model's context, which is then not asked."""

DEFAULT_NEW_TOKENS = 256
"""What lm-evaluation-harness generates at most where a task does not say."""

ItemName = tuple[str, int]
"""A task of lm-evaluation-harness, and the number of one of its items."""


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


def sample_scores(engine: Engine, task: str, limit: int | None, *, beginning: str) -> list[SampleScore]:
    """Every item of a task, of a group or of a YAML file of the user's own, scored by lm-evaluation-harness.

    `limit` takes the first items, of each length where a task has several. `beginning` is the text of the token that
    stands before a text without context. Metrics that are no numbers from 0 to 1 are left out; `BadInput` if that
    leaves none, for a task that does not exist, that samples, or whose data are not there.
    """
    _check_library()
    with _in_folder_of(task), _quiet():
        loaded = _load(task)
        model = _Asking(engine, beginning)
        picked = {name: _first_items(leaf, limit) for name, leaf in loaded["tasks"].items()}
        try:
            results = _evaluated(loaded, model, picked)
        except (ValueError, TypeError, KeyError, AssertionError, AttributeError, OSError) as error:
            raise BadInput(f"lm_eval {task}: {_one_line(error)}; see the task's own documentation") from error
    scores = [score for name, samples in results.items() for score in _scores_of(name, samples, picked[name], model)]
    if all(score.metric.endswith(f":{OVER_LONG}") for score in scores):
        trouble = f"every item exceeds the model's {engine.max_length} tokens" if scores else "no metric is from 0 to 1"
        raise BadInput(f"lm_eval {task}: {trouble}; take another task")
    return scores


def _check_library() -> None:
    if find_spec("lm_eval") is None:
        raise BadInput("lm_eval needs lm-evaluation-harness; pip install 'mergeyard[lm-eval]'")


def _evaluated(loaded: Any, model: _Asking, picked: dict[str, list[int]]) -> dict[str, list[dict[str, Any]]]:
    """The samples of every leaf task, from what `simple_evaluate` does less its look at machine, packages and git."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate

    for leaf in loaded["tasks"].values():
        if leaf.get_config("num_fewshot") is None:
            leaf.set_config(key="num_fewshot", value=0)
        leaf.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    results: Any = evaluate(
        lm=_as_lm(model), task_dict=loaded, samples=picked, bootstrap_iters=0, fewshot_as_multiturn=True
    )
    return results["samples"]


@cache
def _manager() -> TaskManager:
    """All tasks that lm-evaluation-harness knows; reading their files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load(task: str) -> Any:
    """The harness's own record of a task or group and its leaf tasks; `BadInput` with the nearest name for none."""
    manager = _manager()
    if not _is_path(task) and task not in manager.all_tasks:
        near = suggestion(task, manager.all_tasks)
        raise BadInput(f"lm_eval has no task {quoted(task)}{near or '; see `lm-eval ls tasks`'}")
    try:
        return manager.load([task])
    except Exception as error:  # whatever a task's own code and the data's home may raise
        raise BadInput(f"lm_eval {task}: cannot be loaded ({_one_line(error)}); are its data here?") from error


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
    name: str, samples: Sequence[Mapping[str, Any]], picked: Sequence[int], model: _Asking
) -> Iterator[SampleScore]:
    """The scores of one leaf task. The harness counts the items of a choice from 0; `picked` gives their numbers."""
    place = {number: at for at, number in enumerate(picked)}
    over_long = {number for number in picked if (name, place[number]) in model.over_long}
    several_filters = len({sample["filter"] for sample in samples}) > 1
    for sample in samples:
        number = int(sample["doc_id"])
        cost = model.costs[name, place[number]]
        if number in over_long:
            continue
        for metric in sample["metrics"]:
            score = _as_score(sample[metric])
            if score is None:
                continue
            title = f"{metric},{sample['filter']}" if several_filters else metric
            yield SampleScore(
                metric=f"{name}:{title}",
                item=number,
                answer=_answer(sample),
                score=score if cost.finite else 0.0,
                finite=cost.finite,
                tokens=cost.tokens,
                seconds=cost.seconds,
            )
    if over_long:
        for number in picked:
            yield SampleScore(f"{name}:{OVER_LONG}", number, "", float(number in over_long), True, 0, 0.0)


def _as_score(value: Any) -> float | None:
    """The metric's value if it is a number from 0 to 1, as accuracies and matches are and perplexities are not."""
    if isinstance(value, bool | int | float | np.number | np.bool_):
        number = float(value)
        return number if 0.0 <= number <= 1.0 else 0.0 if math.isnan(number) else None
    return None


def _answer(sample: Mapping[str, Any]) -> str:
    """What the model said; for a choice, the log-likelihood of each."""
    responses = sample["filtered_resps"]
    if len(responses) == 1 and isinstance(responses[0], str):
        return responses[0]
    return json.dumps(responses, default=str)


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
        self.over_long: set[ItemName] = set()
        self.costs: defaultdict[ItemName, _Cost] = defaultdict(_Cost)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether greedy decoding says it) of each request."""
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda at: str(_arguments(requests[at])[0]))
        for at in order:  # equal contexts one after the other: the engine keeps the last one's keys and values
            context, continuation = _arguments(requests[at])
            started = time.perf_counter()
            tokens = len(self._engine.encode(context + continuation))
            if self._too_long(requests[at], tokens):
                found[at] = (-math.inf, False)
                continue
            value, greedy = self._engine.loglikelihood(context or self._beginning, continuation)
            self._charge(requests[at], tokens, time.perf_counter() - started, finite=math.isfinite(value))
            found[at] = (value, greedy)
        return [found[at] for at in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Log-likelihood of a whole text, in windows as long as the model's context that do not overlap."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        if not self._beginning:
            raise BadInput("lm_eval: the tokenizer has neither a first nor an end token to begin a text with")
        beginning = self._engine.encode(self._beginning)[-1]
        totals: list[float] = []
        for request in requests:
            started = time.perf_counter()
            ids = self._engine.encode(_arguments(request)[0])
            most = self._engine.max_length - 1
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
            stops, new_tokens = _generation(request, settings)
            if not self._too_long(request, len(self._engine.encode(context)) + new_tokens):
                asked.append((at, Prompt("", context, new_tokens, tuple(stops))))
        for (at, _), answer in zip(asked, self._engine.generate([prompt for _, prompt in asked]), strict=True):
            answers[at] = answer.text
            self._charge(requests[at], answer.tokens_in + answer.tokens_out, answer.seconds, finite=answer.finite)
        return answers

    def _too_long(self, request: Instance, tokens: int) -> bool:
        if tokens <= self._engine.max_length:
            return False
        self.over_long.add(_item(request))
        return True

    def _charge(self, request: Instance, tokens: int, seconds: float, *, finite: bool) -> None:
        cost = self.costs[_item(request)]
        cost.tokens += tokens
        cost.seconds += seconds
        cost.finite = cost.finite and finite


def _item(request: Instance) -> ItemName:
    return str(request.task_name), int(request.doc_id or 0)


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


def _as_lm(asking: _Asking) -> LM:
    """The same three methods in the class that lm-evaluation-harness asks for."""
    from lm_eval.api.model import LM

    class EngineLM(LM):
        def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
            return asking.loglikelihood(requests)

        def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
            return asking.loglikelihood_rolling(requests)

        def generate_until(self, requests: list[Instance]) -> list[str]:
            return asking.generate_until(requests)

    return EngineLM()

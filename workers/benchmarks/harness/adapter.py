"""Any task of lm-evaluation-harness, answered by our engine through its Python API, kept item by item.

Nothing of its caches is used: they know neither the model nor the length. A prompt that does not fit in the model's
context is never cut: its item gets no score, and the metric `over_long` says how many of the items these are.

A metric is kept or left out as a whole, for all items of a task: one from 0 to 100 counts in hundredths, a perplexity
as its inverse, which is the geometric mean of the likelihoods; one where less is better, or that only a set of items
has, is left out.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.errors import BadInput
from jobs.evaluation_tasks import PLAINLY, Generation, Status
from jobs.yaml_nodes import quoted, suggestion
from workers.benchmarks.harness.asking import Asking, RequestCost, generation_settings, request_arguments
from workers.benchmarks.harness.loading import check_library, errors_of, first_items, in_folder_of, load_tasks, quiet
from workers.benchmarks.harness.metrics import Rule, Sample, metric_remarks, metric_rules
from workers.benchmarks.texts.chat_template import ChatTemplate, Thoughts
from workers.benchmarks.texts.tokenizer import Tokenizer
from workers.engines.engine import Engine, Message

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task


OVER_LONG = "over_long"
"""The metric that is 1 for an item whose prompt exceeds the model's context, which is then not asked."""

LEAST_THOUGHT = 16
"""Tokens of the smallest thought that an error proposes; an empty one, with its ends, takes fewer."""

REHEARSED = 3
"""Items of each task that the reference answers are scored on, before the model is asked for any."""


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
    status: Status = "answered"
    thought: str = ""
    tokens_thought: int = 0
    tokens_out: int = 0
    sample: int = 0


@dataclass(frozen=True, slots=True)
class OneMetric:
    """The only metric that is wanted, as `acc` or `exact_match,strict-match`, of these items of one leaf task.

    Items count from 0 in the task's own order, also where a limit takes some of each length.
    """

    leaf: str
    metric: str
    items: range

    def is_of(self, metric: str, filter_: str, filters: int) -> bool:
        """Whether this is the metric under one of so many filters; without a filter, that of `none` or the only one."""
        name, _, wanted = self.metric.partition(",")
        return metric == name and (filter_ == wanted if wanted else filters == 1 or filter_ == "none")


@dataclass(frozen=True, slots=True)
class Leaf:
    """A leaf task, how many items of it are asked, and the tokens of the longest, with its answer of `new_tokens`."""

    name: str
    count: int
    longest: int
    new_tokens: int


def leaves_of(told: Mapping[str, Any], metric: str, tokenizer: Tokenizer, generation: Generation) -> list[Leaf]:
    """The leaf tasks of the task in `told`, whose keys are the arguments of `sample_scores`, measured without a model.

    `BadInput` for a task that does not exist, whose data are not there, that has no such metric, or that scores texts.
    """
    check_library()
    task, limit = str(told["task"]), told["limit"]
    with in_folder_of(task), quiet(), ExitStack() as until_then:
        leaves = load_tasks(task, json.dumps({}), told.get("num_fewshot"))
        chats: dict[str, _Chat | None] = dict.fromkeys(leaves)
        if told.get("chat_template") is not None:
            chats = _chats(leaves, told, tokenizer, until_then)
        return [
            _measured(task, leaf, name, metric, first_items(leaf, limit), chats[name], tokenizer, generation, told)
            for name, leaf in leaves.items()
        ]


def _measured(
    task: str,
    leaf: Task,
    name: str,
    metric: str,
    numbers: Sequence[int],
    chat: _Chat | None,
    tokenizer: Tokenizer,
    generation: Generation,
    told: Mapping[str, Any],
) -> Leaf:
    drawn = bool(generation.temperature)
    samples = _rehearsed(task, leaf, numbers, chat, drawn=drawn)
    rules, filters = metric_rules(leaf, samples), {sample.filter for sample in samples}
    one = OneMetric(name, metric, range(len(numbers)))
    if leaf.OUTPUT_TYPE == "loglikelihood_rolling":
        raise BadInput(f"lm_eval {task}: it scores whole texts, which are not asked one by one; take another task")
    known = [title for title in rules if any(one.is_of(title, filter_, len(filters)) for filter_ in filters)]
    if not known:
        choices = [title if len(filters) == 1 else f"{title},{filter_}" for title in rules for filter_ in filters]
        raise BadInput(f"lm_eval {task}: it has no metric {quoted(metric)}{suggestion(metric, choices)}")
    if rules[known[0]].left_out:
        raise BadInput(f"lm_eval {task}: {metric_remarks({name: rules})}; name another metric")
    with errors_of(task):
        _request(leaf, numbers, chat)
    texts: list[str] = []
    most = 0
    for request in leaf.instances:
        context, rest = request_arguments(request)
        if isinstance(rest, str):
            texts.append(f"{context}{rest}")
        else:
            texts.append(str(context))
            most = max(most, told.get("max_new_tokens") or generation_settings(request, rest, drawn=drawn)[1])
    longest = max(tokenizer.count_each(texts, special_tokens=chat is None), default=0)
    return Leaf(name, len(numbers), longest + max(most, 1), most)  # at least the one that vLLM always generates


def sample_scores(
    engine: Engine,
    task: str,
    limit: int | None,
    *,
    beginning: str,
    tokenizer: Path | None = None,
    metadata: Mapping[str, Any] | None = None,
    num_fewshot: int | None = None,
    chat: Mapping[str, Any] | None = None,
    generation: Generation = PLAINLY,
    max_new_tokens: int | None = None,
    one: OneMetric | None = None,
    remark: Callable[[str], None] = lambda text: None,
) -> list[SampleScore]:
    """Every item of a task, of a group or of a YAML file of the user's own, scored by lm-evaluation-harness.

    `limit` takes the first items, of each length where a task has several. `beginning` is the text of the token that
    stands before a text without context; `tokenizer` the folder of the tokenizer, which tasks that make their own texts
    are told beside `metadata`. With a `chat_template` in `chat` the prompts are put into it, with its `system` and
    `arguments`; `thoughts` there are those of generated answers. `generation` says how these are answered, and
    `max_new_tokens` with how many tokens at the most. With `one` its items alone are asked, and its metric alone is
    given, as `leaf:metric`. `remark` gets a line for the user on metrics that are left out or scaled. `BadInput` for a
    task that does not exist, that samples, whose data are not there or of which no metric can be kept: before the model
    is asked.
    """
    check_library()
    with in_folder_of(task), quiet(), ExitStack() as until_then:
        told = {**({"tokenizer": str(tokenizer)} if tokenizer is not None else {}), **(metadata or {})}
        leaves = load_tasks(task, json.dumps(told), num_fewshot)
        if one is not None:
            leaves = {one.leaf: leaves[one.leaf]}
        chats: dict[str, _Chat | None] = dict.fromkeys(leaves)
        if chat is not None and chat.get("chat_template") is not None and tokenizer is not None:
            chats = _chats(leaves, chat, Tokenizer.from_folder(tokenizer), until_then)
        for leaf in leaves.values():
            if generation.end and leaf.OUTPUT_TYPE == "generate_until":
                leaf.set_config(key="gen_prefix", value=None)  # no beginning of the answer inside the thought
        picked = {name: first_items(leaf, limit) for name, leaf in leaves.items()}
        drawn = bool(generation.temperature)
        rehearsed = {
            name: _rehearsed(task, leaf, picked[name], chats[name], drawn=drawn) for name, leaf in leaves.items()
        }
        rules = {name: metric_rules(leaf, rehearsed[name]) for name, leaf in leaves.items()}
        earlier = 0
        if one is not None:
            picked, earlier = {one.leaf: picked[one.leaf][: one.items.stop]}, one.items.start
        if not any(not rule.left_out for each in rules.values() for rule in each.values()):
            raise BadInput(f"lm_eval {task}: no metric can be kept ({metric_remarks(rules)}); take another task")
        scores: list[SampleScore] = []
        room = 0
        for name, leaf in leaves.items():
            in_chat, generates = chats[name], leaf.OUTPUT_TYPE == "generate_until"
            rounds: list[tuple[list[Sample], dict[int, RequestCost]]] = []
            over_long: set[int] = set()
            for number in range(generation.samples if generates else 1):
                model = Asking(
                    engine,
                    beginning,
                    conversations=None if in_chat is None else in_chat.conversations,
                    generation=generation,
                    max_new_tokens=max_new_tokens,
                    sample=number,
                )
                samples = _answered(
                    task, leaf, picked[name], in_chat, model.ask, drawn=drawn and generates, earlier=earlier
                )
                if model.remark:
                    remark(model.remark)
                room = max(room, engine.max_length - model.shortest)
                over_long = {picked[name][at] for at in model.over_long}
                samples = [sample for sample in samples if sample.number not in over_long]
                rounds.append((samples, {picked[name][at]: cost for at, cost in model.costs.items()}))
            known = rehearsed[name] if generates else []
            rules[name] = metric_rules(leaf, [*known, *(sample for samples, _ in rounds for sample in samples)])
            for number, (samples, costs) in enumerate(rounds):
                scores += [
                    replace(score, sample=number) for score in _scores_of(name, samples, rules[name], costs, one)
                ]
            if over_long:
                title = f"{name}:{OVER_LONG}"
                scores += [SampleScore(title, at, "", float(at in over_long), True, 0, 0.0) for at in picked[name]]
    if one is not None:
        return _numbered(task, scores, one, picked[one.leaf][earlier:])
    if all(score.metric.endswith(f":{OVER_LONG}") for score in scores):
        trouble = f"every item exceeds the model's {engine.max_length} tokens" if scores else metric_remarks(rules)
        remedy = "take another task"
        if scores and generation.budget and room >= LEAST_THOUGHT:
            trouble += f" with a thought of {generation.budget}"
            remedy = f"take `thinking: {{budget: {room}}}` or less, or set `thinking: off`"
        raise BadInput(f"lm_eval {task}: {trouble}; {remedy}")
    if remarks := metric_remarks(rules):
        remark(f"lm_eval {task}: {remarks}")
    return scores


def _numbered(task: str, scores: Sequence[SampleScore], one: OneMetric, numbers: Sequence[int]) -> list[SampleScore]:
    """The scores of one metric, whose items count from the first of the task; `BadInput` where an item has none."""
    place = dict(zip(numbers, one.items, strict=True))
    found = [replace(score, item=place[score.item]) for score in scores if score.metric == f"{one.leaf}:{one.metric}"]
    if len({score.item for score in found}) < len(numbers):
        raise BadInput(
            f"lm_eval {task}: an item has no {one.metric}, or exceeds the context; take another metric or task"
        )
    return found


def _answered(
    task: str,
    leaf: Task,
    numbers: Sequence[int],
    chat: Callable[..., str] | None,
    ask: Callable[[str, Sequence[Instance]], Sequence[Any]],
    *,
    drawn: bool = False,
    earlier: int = 0,
) -> list[Sample]:
    """The items `numbers` but the `earlier` first, with the answers of `ask`, as lm-evaluation-harness scores them.

    A request that a task repeats, for a vote, is asked as often where its answers are `drawn`; else it is asked once.
    """
    with errors_of(task):
        _request(leaf, numbers, chat, earlier)
    requests: Sequence[Instance] = leaf.instances
    for kind in dict.fromkeys(str(request.request_type) for request in requests):
        alike = [request for request in requests if request.request_type == kind]
        asked = [request for request in alike for _ in range((request.repeats or 1) if drawn else 1)]
        for request, answer in zip(asked, ask(kind, asked), strict=True):
            request.resps.extend([answer] * (1 if drawn else request.repeats or 1))  # a greedy answer stays the same
    with errors_of(task):
        leaf.apply_filters()
        return list(_processed(leaf, numbers))


def _request(leaf: Task, numbers: Sequence[int], chat: Callable[..., str] | None, earlier: int = 0) -> None:
    """Makes the requests of the items `numbers` but the `earlier` first, which are then the task's `instances`.

    Examples are drawn item after item: those of an item are the same in each part only if they are drawn from item 0.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    leaf.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)  # examples are drawn anew
    leaf.build_all_requests(
        samples=list(numbers),
        rank=0,
        world_size=1,
        apply_chat_template=chat is not None,
        fewshot_as_multiturn=True,
        chat_template=chat,
    )
    leaf.instances[:] = [request for request in leaf.instances if int(request.doc_id or 0) >= earlier]


def _processed(leaf: Task, numbers: Sequence[int]) -> Iterator[Sample]:
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
            yield Sample(numbers[at], str(name), metrics, responses)


def _rehearsed(
    task: str, leaf: Task, numbers: Sequence[int], chat: Callable[..., str] | None, *, drawn: bool
) -> list[Sample]:
    """The first items with their reference answers: they show the metrics without asking the model."""

    def ask(kind: str, requests: Sequence[Instance]) -> list[Any]:
        if kind == "generate_until":
            with errors_of(task):
                return [_reference(leaf, request, drawn=drawn) for request in requests]
        if kind not in ("loglikelihood", "loglikelihood_rolling"):
            raise BadInput(f"lm_eval {task}: a task that asks for {kind} cannot be answered here; take another task")
        return [(-1.0, True) if kind == "loglikelihood" else -1.0] * len(requests)

    if getattr(leaf, "UNSAFE_CODE", False) or getattr(leaf, "MULTIMODAL", False):
        why = "runs the code that models write" if getattr(leaf, "UNSAFE_CODE", False) else "shows more than text"
        raise BadInput(f"lm_eval {task}: the task {why}, which no worker does; take another task")
    return _answered(task, leaf, numbers[:REHEARSED], chat, ask)


def _reference(leaf: Task, request: Instance, *, drawn: bool) -> str:
    """The answer that the task takes for right; refuses a task whose answers are not greedy, unless all are `drawn`."""
    generation_settings(request, request_arguments(request)[1], drawn=drawn)
    own: Any = leaf
    target: Any = own.doc_to_target(request.doc)
    if isinstance(target, int) and own.get_config("doc_to_choice") is not None:
        target = own.doc_to_choice(request.doc)[target]
    if isinstance(target, list | tuple) and target:
        target = target[0]
    return str(target)


class _Chat:
    """Renders conversations as lm-evaluation-harness asks for them, and keeps them by their text."""

    def __init__(self, template: ChatTemplate, system: str) -> None:
        self._template = template
        self._system = [{"role": "system", "content": system}] if system else []
        self.conversations: dict[str, tuple[Message, ...]] = {}

    def __call__(self, history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        if history[0]["role"] != "system":
            history = [*self._system, *history]
        text = self._template.render(history, open_turn=add_generation_prompt)
        self.conversations[text] = tuple(Message(message["role"], message["content"]) for message in history)
        return text


def _chats(
    leaves: Mapping[str, Task], told: Mapping[str, Any], tokenizer: Tokenizer, until_then: ExitStack
) -> dict[str, _Chat | None]:
    """The chat template of each task: a thought is open in front of generated answers alone."""

    def opened(leaf: Task) -> _Chat:
        thoughts: Thoughts = told.get("thoughts", "closed")
        if thoughts == "open" and leaf.OUTPUT_TYPE != "generate_until":
            thoughts = "closed"
        template = ChatTemplate(
            told["chat_template"],
            tokenizer.special_tokens,
            tokenizer.place,
            arguments=tuple(sorted(told.get("arguments", {}).items())),
            thoughts=thoughts,
        )
        return _Chat(until_then.enter_context(template), told.get("system", ""))

    return {name: opened(leaf) for name, leaf in leaves.items()}


def _scores_of(
    name: str,
    samples: Sequence[Sample],
    rules: Mapping[str, Rule],
    costs: Mapping[int, RequestCost],
    one: OneMetric | None,
) -> Iterator[SampleScore]:
    """The scores of one leaf task, or of one metric of it; two metrics that come to the same are given once."""
    filters = len({sample.filter for sample in samples})
    for sample in samples:
        cost = costs.get(sample.number, RequestCost())
        found = {
            rules[metric].title if one is None else one.metric: rules[metric].score(value)
            for metric, value in sample.metrics.items()
            if not rules[metric].left_out and (one is None or one.is_of(metric, sample.filter, filters))
        }
        for title, score in found.items():
            yield SampleScore(
                metric=f"{name}:{title},{sample.filter}" if filters > 1 and one is None else f"{name}:{title}",
                item=sample.number,
                answer=_answer(sample),
                score=score if cost.finite else 0.0,
                finite=cost.finite,
                tokens=cost.tokens,
                seconds=cost.seconds,
                status=cost.status,
                thought=cost.thought,
                tokens_thought=cost.tokens_thought,
                tokens_out=cost.tokens_out,
            )


def _answer(sample: Sample) -> str:
    """The model's answer; for a choice, the log-likelihood of each option."""
    if len(sample.responses) == 1 and isinstance(sample.responses[0], str):
        return sample.responses[0]
    return json.dumps(sample.responses, default=str)

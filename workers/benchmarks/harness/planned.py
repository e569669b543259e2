"""The sets of items that a job's `lm_eval:` asks for, and their scores."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jobs.errors import BadInput
from jobs.evaluate import GuardsSpec, HarnessSpec, LmEvalSpec, ThinkingSpec
from jobs.evaluation_tasks import Generation
from jobs.merge_tasks import digest
from jobs.sealing import sealed, unsealed
from workers.benchmarks.answering import Block, ItemScore
from workers.benchmarks.generation import earlier, generation_of
from workers.benchmarks.harness.adapter import Leaf, OneMetric, leaves_of, sample_scores
from workers.benchmarks.harness.files import files_of
from workers.benchmarks.harness.task_names import trouble_with
from workers.benchmarks.planned import PlannedSet, Reader, located
from workers.benchmarks.texts.tokenizer import Tokenizer
from workers.engines.engine import Engine

YAML = (".yaml", ".yml")


def plan_lm_eval(spec: LmEvalSpec, tokenizer: Tokenizer, seed: int, reader: Reader, least: int) -> list[PlannedSet]:
    """One unit per task: lm-evaluation-harness makes the items itself, on the worker; the file has its arguments.

    With `metrics` a unit is an item: the tasks are loaded here, and their items counted.
    """
    whole = _whole_tasks(spec, tokenizer, seed, reader)
    return _by_item(spec, tokenizer, seed, whole) if spec.metrics else [planned for planned, _ in whole]


def _whole_tasks(
    spec: HarnessSpec, tokenizer: Tokenizer, seed: int, reader: Reader
) -> list[tuple[PlannedSet, dict[str, Any]]]:
    """A set of one unit for each task, and the arguments in its file."""
    try:
        release = version("lm_eval")
    except PackageNotFoundError:
        raise BadInput(f"{spec.place}: lm_eval needs lm-evaluation-harness; pip install 'mergeyard[lm-eval]'") from None

    tokenizer, generation = generation_of(spec, tokenizer, seed)

    def planned(task: str) -> tuple[PlannedSet, dict[str, Any]]:
        told: dict[str, Any] = {"task": task, "limit": spec.limit, "lm_eval": release, "num_fewshot": spec.num_fewshot}
        if spec.metadata:  # a task that makes its texts by it makes them for the tokenizer
            told |= {"metadata": dict(spec.metadata), "tokenizer": tokenizer.digest}
        if spec.chat:
            told |= {"chat_template": tokenizer.chat_template}
        if tokenizer.rule:
            told |= {"special_tokens": tokenizer.rule}
        if generation.system:
            told |= {"system": generation.system}
        if generation.template:
            told |= {"arguments": dict(generation.template)}
        if spec.max_new_tokens is not None:
            told |= {"max_new_tokens": spec.max_new_tokens}
        if task.endswith(YAML):
            content = reader.read(task, spec.place)
            told |= {"task": reader.path(task), "content": hashlib.sha256(content).hexdigest()}
            told |= {"beside": files_of(Path(reader.path(task)))}
        name = Path(task).stem if "content" in told else task
        before = told | _thoughts(earlier(tokenizer, generation), None)
        told |= _thoughts(generation, spec.thinking) | generation.digested
        told_as_bytes = sealed(told)

        def check() -> None:
            if "content" not in told and (trouble := trouble_with(task)):
                raise BadInput(trouble)

        whole = PlannedSet(
            benchmark="lm_eval",
            task=name,
            length=0,
            count=1,
            made=1,
            digest=digest(told),
            build=lambda _: told_as_bytes,
            place=spec.place,
            suffix="json",
            check=check,
            superseded=(digest(before),) if generation.found else (),
            generation=generation,
            new_tokens=spec.max_new_tokens or 0,
            limited=spec.max_new_tokens is not None,
        )
        return whole, told

    sets = [planned(task) for task in spec.tasks]
    names = [entry.task for entry, _ in sets]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise BadInput(f"{spec.place}: two tasks are called {doubled}; give one of the files another name")
    return sets


def _by_item(
    spec: LmEvalSpec, tokenizer: Tokenizer, seed: int, whole: Sequence[tuple[PlannedSet, dict[str, Any]]]
) -> list[PlannedSet]:
    """The sets whose units are the items of one metric of a task. All have one length: that of the longest item."""
    tokenizer, _ = generation_of(spec, tokenizer, seed)
    found: list[tuple[PlannedSet, dict[str, Any], Leaf]] = []
    for task, (planned, told) in zip(spec.tasks, whole, strict=True):
        with located(spec.place):
            planned.check()
            leaves = leaves_of(told, spec.metrics[task], tokenizer, planned.generation)
        if len(leaves) > 1 and len(spec.tasks) > 1:
            raise BadInput(
                f"{spec.place}: {task} is a group of {len(leaves)} tasks, which would count {len(leaves)} times as much"
                " as each other task; ask it alone, or name some of its tasks"
            )
        found += [(planned, told | {"leaf": leaf.name, "metric": spec.metrics[task]}, leaf) for leaf in leaves]
    longest = max(leaf.longest for _, _, leaf in found)

    def by_item(planned: PlannedSet, told: Mapping[str, Any], leaf: Leaf) -> PlannedSet:
        told_as_bytes = sealed(told)

        def build(_: range) -> bytes:
            return told_as_bytes

        return replace(
            planned,
            task=f"{leaf.name}:{told['metric']}",
            length=longest,
            count=leaf.count,
            made=leaf.count,
            digest=digest(told),
            build=build,
            superseded=(),
            new_tokens=leaf.new_tokens,
        )

    return [by_item(*each) for each in found]


def plan_guards(spec: GuardsSpec, tokenizer: Tokenizer, seed: int, reader: Reader, least: int) -> list[PlannedSet]:
    """The same as sets of their own: a task may be asked as a benchmark and as a guard."""
    return [
        replace(planned, benchmark="guards", digest=digest(["guards", planned.digest]), superseded=())
        for planned, _ in _whole_tasks(spec, tokenizer, seed, reader)
    ]


def _thoughts(generation: Generation, thinking: ThinkingSpec | bool | None) -> dict[str, str]:
    """The `Thoughts` of the chat template, where they are not the default."""
    if generation.end or thinking is False:
        return {"thoughts": "open" if generation.end else "empty"}
    return {"thoughts": "closed"} if generation.frame[1].endswith("</think>\n\n") else {}


def answer_lm_eval(engine: Engine, block: Block) -> Iterator[ItemScore]:
    """One score for each item and metric of a task of lm-evaluation-harness."""
    [(data, first, last)] = block.parts
    told = unsealed(data, older=True)
    one = OneMetric(told["leaf"], told["metric"], range(first, last)) if "metric" in told else None
    for score in sample_scores(
        engine,
        told["task"],
        told["limit"],
        beginning=block.beginning,
        tokenizer=block.tokenizer,
        metadata=told.get("metadata"),
        num_fewshot=told.get("num_fewshot"),
        chat=told,
        generation=block.generation,
        max_new_tokens=told.get("max_new_tokens"),
        one=one,
        remark=block.remark,
    ):
        place = f"{score.metric.partition(':')[0]}-{score.item}"
        yield ItemScore(
            task=score.metric,
            item=score.item,
            depth=math.nan,
            haystack=place,
            pair=place,
            answer=score.answer,
            score=score.score,
            finite=score.finite,
            tokens=score.tokens,
            seconds=score.seconds,
            status=score.status,
            thought=score.thought,
            tokens_thought=score.tokens_thought,
            tokens_out=score.tokens_out,
            sample=score.sample,
        )


def check_task_files(spec: HarnessSpec) -> tuple[()]:
    """No file of a task is sent along: every worker reads its own. `BadInput` for a path relative to the job file."""
    for task in spec.tasks:
        if task.endswith(YAML) and not Path(task).is_absolute():
            raise BadInput(f"{spec.place}: {task}: name the task by the path that it has on every worker")
    return ()

"""The sets of items that a job's `babilong:` asks for."""

from __future__ import annotations

import re
from typing import Any

from jobs.errors import BadInput
from jobs.evaluate import BabilongSpec
from jobs.yaml_nodes import quoted, suggestion
from workers.benchmarks.babilong.items import MADE, MAX_NEW_TOKENS, TASKS, made_items, prompt_of, scorer_of
from workers.benchmarks.generation import generation_of
from workers.benchmarks.items import Asked, Item, items_digest
from workers.benchmarks.planned import PlannedSet, Reader, check_of, file_of
from workers.benchmarks.questions import Question, cells, plan_questions, rows_of
from workers.benchmarks.texts.haystacks import Essay, bundled_essay
from workers.benchmarks.texts.tokenizer import Tokenizer

SIZE = re.compile(r"(?P<count>\d+)(?P<unit>[kM])")
PROMPT = 300
"""Tokens of GPT-2 that the authors set aside for the prompt: the text of `4k` has 3,700."""


def plan_babilong(spec: BabilongSpec, tokenizer: Tokenizer, seed: int, reader: Reader, least: int) -> list[PlannedSet]:
    for task in spec.tasks:
        if task not in TASKS:
            raise BadInput(f"{spec.place}: BABILong has no task {quoted(task)}{suggestion(task, TASKS)}")
    if spec.data is None:
        return _made(spec, tokenizer, seed, reader, least)
    if spec.haystack is not None:
        raise BadInput(f"{spec.place}: the published texts need no `haystack:`; take it out, or take `data:` out")
    tokenizer, generation = generation_of(spec, tokenizer, seed)
    return [
        planned
        for task, questions in _published(spec, spec.data, reader, generation.frame).items()
        for planned in plan_questions(
            "babilong",
            task,
            questions,
            lengths=spec.lengths,
            limit=spec.items,
            tokenizer=tokenizer,
            generation=generation,
            place=spec.place,
        )
    ]


def _made(spec: BabilongSpec, tokenizer: Tokenizer, seed: int, reader: Reader, least: int) -> list[PlannedSet]:
    essay = Essay(reader.prose(spec.haystack, spec.place), place=spec.place) if spec.haystack else bundled_essay()
    tokenizer, generation = generation_of(spec, tokenizer, seed)
    new_tokens = spec.max_new_tokens or MAX_NEW_TOKENS

    def planned(task: str, length: int) -> PlannedSet:
        def items(length: int, wanted: range) -> list[Item]:
            asked = Asked("babilong", task, length, seed, new_tokens, generation.frame)
            return made_items(tokenizer, asked, essay, indices=wanted)

        digested: dict[str, Any] = {
            "benchmark": "babilong",
            "task": task,
            "essay": essay.digest,
            "max_new_tokens": new_tokens,
            "frame": list(generation.frame),
            **generation.digested,
        }
        return PlannedSet(
            benchmark="babilong",
            task=task,
            length=length,
            count=spec.items,
            made=max(spec.items, least),
            digest=items_digest(digested, tokenizer=tokenizer.digest, length=length, seed=seed),
            build=file_of(items, length),
            place=spec.place,
            grows=True,
            check=check_of(items, length, 2),
            generation=generation,
            new_tokens=new_tokens,
        )

    return [planned(task + MADE, length) for task in spec.tasks for length in spec.lengths]


def _published(spec: BabilongSpec, data: str, reader: Reader, frame: tuple[str, str]) -> dict[str, list[Question]]:
    """The questions of each task, from the shortest texts to the longest that may fit."""
    found: list[tuple[int, str, str]] = []
    for name in reader.names(data, spec.place):
        parts = re.split(r"[/.-]", name)
        sizes = [match for part in parts if (match := SIZE.fullmatch(part))]
        tasks = [task for task in spec.tasks if task in parts]
        if len(sizes) == len(tasks) == 1:
            size = int(sizes[0]["count"]) * {"k": 1000, "M": 1_000_000}[sizes[0]["unit"]]
            found.append((size, tasks[0], name))
    if missing := [task for task in spec.tasks if task not in {task for _, task, _ in found}]:
        raise BadInput(
            f"{spec.place}: {data} has no file of {missing[0]}, such as data/{missing[0]}/4k.json;"
            " give the folder of the published data, or take the task out"
        )
    new_tokens = spec.max_new_tokens or MAX_NEW_TOKENS
    questions: dict[str, list[Question]] = {task: [] for task in spec.tasks}
    for size, task, name in sorted(found):
        if size - PROMPT > 2 * max(spec.lengths):
            continue
        for place, row in rows_of(reader.read(f"{data.rstrip('/')}/{name}", spec.place), name):
            text, question, target = map(str, cells(row, ("input", "question", "target"), place))
            questions[task].append(
                Question(
                    number=len(questions[task]),
                    prefix="",
                    prompt=frame[0] + prompt_of(task, text, question) + frame[1],
                    answers=(target,),
                    scorer=scorer_of(task, question),
                    depths=(),
                    haystack="",
                    answer_tokens=new_tokens,
                    most_new_tokens=new_tokens,
                )
            )
    return questions

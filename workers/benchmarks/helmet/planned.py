"""The sets of items that a job's `helmet:` asks for."""

from __future__ import annotations

import hashlib
from typing import Any

from jobs.errors import BadInput
from jobs.evaluate import HelmetSpec
from jobs.evaluation_tasks import Generation
from jobs.yaml_nodes import quoted, suggestion
from workers.benchmarks.generation import generation_of
from workers.benchmarks.helmet.made import made_items
from workers.benchmarks.helmet.prompts import (
    FORMS,
    ICL_TASKS,
    MADE,
    MADE_TASKS,
    RAG_TASKS,
    Sample,
    prompt_of,
    scorer_of,
)
from workers.benchmarks.helmet.published import LENGTHS, Published
from workers.benchmarks.items import Asked, Item, items_digest
from workers.benchmarks.planned import PlannedSet, Reader, check_of, file_of
from workers.benchmarks.questions import Question, plan_questions
from workers.benchmarks.texts.draws import words_digest
from workers.benchmarks.texts.tokenizer import Tokenizer

OF_DATA = ("json_kv", *RAG_TASKS)


def plan_helmet(spec: HelmetSpec, tokenizer: Tokenizer, seed: int, reader: Reader, least: int) -> list[PlannedSet]:
    tasks = spec.tasks or ((*(OF_DATA if spec.data else ()), *spec.examples) or MADE_TASKS)
    published = bool(spec.data or spec.examples)
    known = (*(OF_DATA if spec.data else ()), *spec.examples) if published else MADE_TASKS
    for task in tasks:
        if task not in known:
            raise BadInput(f"{spec.place}: {_missing(task)}{suggestion(task, known)}")
    tokenizer, generation = generation_of(spec, tokenizer, seed)
    if not published:
        return [
            _made(spec, task, length, tokenizer, generation, seed, least) for task in tasks for length in spec.lengths
        ]
    for length in spec.lengths:
        if length not in LENGTHS:
            raise BadInput(
                f"{spec.place}: HELMET has no files for {length} tokens; take from {', '.join(map(str, LENGTHS))},"
                " or make items, without `data:` and `examples:`"
            )
    files = Published(reader, spec.data, spec.examples, spec.place)
    return [
        planned
        for task in tasks
        for length in spec.lengths
        for planned in _asked(spec, task, length, files.samples(task, length, spec.items), tokenizer, generation)
    ]


def _missing(task: str) -> str:
    if task in ICL_TASKS:
        return f"{task} needs its data; give `examples: {{{task}: FOLDER}}`"
    if task in OF_DATA:
        return f"{task} needs HELMET's data; give `data: FOLDER`"
    return f"HELMET has no task {quoted(task)}"


def _asked(
    spec: HelmetSpec,
    task: str,
    length: int,
    samples: list[Sample],
    tokenizer: Tokenizer,
    generation: Generation,
) -> list[PlannedSet]:
    """The set of a task and a length, of the samples that fit, or of all with their contexts cut."""
    form, (before, after) = FORMS[task], generation.frame
    begun, thinks = not spec.chat and not generation.end, bool(generation.end)
    new_tokens = spec.max_new_tokens or form.new_tokens

    def question(number: int, sample: Sample) -> Question:
        text = before + prompt_of(form, sample, begun=begun) + after
        if spec.truncate == "end":
            text = _cut(tokenizer, sample, text, length - new_tokens)
        return Question(
            number=number,
            prefix="",
            prompt=text,
            answers=sample.answers,
            scorer=scorer_of(form, begun=begun, thinks=thinks),
            depths=(),
            haystack=f"{task}-{hashlib.sha256(sample.name.encode()).hexdigest()[:16]}",
            answer_tokens=new_tokens,
            most_new_tokens=new_tokens,
        )

    return plan_questions(
        "helmet",
        task,
        [question(number, sample) for number, sample in enumerate(samples)],
        lengths=(length,),
        limit=None,
        tokenizer=tokenizer,
        generation=generation,
        place=spec.place,
    )


def _cut(tokenizer: Tokenizer, sample: Sample, text: str, most: int) -> str:
    """The text that the sample has in it, without the end of its context if it has too many tokens."""
    before, after = text.split(sample.context, 1)
    excess = tokenizer.count_whole(text) - most
    if excess <= 0:
        return text
    ends = tokenizer.token_ends(sample.context)
    while excess < len(ends):
        kept = before + sample.context[: ends[-excess - 1]] + after
        over = tokenizer.count_whole(kept) - most
        if over <= 0:
            return kept
        excess += over  # the seam took more tokens than the two ends apart
    return text


def _made(
    spec: HelmetSpec,
    kind: str,
    length: int,
    tokenizer: Tokenizer,
    generation: Generation,
    seed: int,
    least: int,
) -> PlannedSet:
    form, task = FORMS[kind], kind + MADE
    begun = not spec.chat and not generation.end
    new_tokens = spec.max_new_tokens or form.new_tokens
    scorer = scorer_of(form, begun=begun, thinks=bool(generation.end))
    count = spec.items or 100

    def items(length: int, wanted: range) -> list[Item]:
        asked = Asked("helmet", task, length, seed, new_tokens, generation.frame)
        return made_items(tokenizer, asked, scorer, begun=begun, indices=wanted)

    digested: dict[str, Any] = {
        "benchmark": "helmet",
        "task": task,
        "words": words_digest(),
        "max_new_tokens": new_tokens,
        "frame": list(generation.frame),
        "scorer": scorer,
        **generation.digested,
    }
    return PlannedSet(
        benchmark="helmet",
        task=task,
        length=length,
        count=count,
        made=max(count, least),
        digest=items_digest(digested, tokenizer=tokenizer.digest, length=length, seed=seed),
        build=file_of(items, length),
        place=spec.place,
        grows=True,
        check=check_of(items, length, 2),
        generation=generation,
        new_tokens=new_tokens,
    )

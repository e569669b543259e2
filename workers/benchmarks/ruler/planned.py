"""The sets of items that a job's `ruler:` asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.errors import BadInput
from jobs.evaluate import RulerSpec
from jobs.yaml_nodes import quoted, suggestion
from workers.benchmarks.generation import earlier, generation_of
from workers.benchmarks.items import Item, items_digest
from workers.benchmarks.planned import PlannedSet, Reader, file_of, probe
from workers.benchmarks.ruler.documents import Library, read_hotpotqa, read_squad
from workers.benchmarks.ruler.tasks import MAX_NEW_TOKENS, NIAH, QA, TASKS, generator, ruler_items, ruler_spec
from workers.benchmarks.texts.haystacks import Essay, bundled_essay
from workers.benchmarks.texts.tokenizer import Tokenizer

READERS: Mapping[str, Callable[[bytes | str | Path], Library]] = {"qa_1": read_squad, "qa_2": read_hotpotqa}


def plan_ruler(spec: RulerSpec, tokenizer: Tokenizer, seed: int, reader: Reader, least: int) -> list[PlannedSet]:
    for task in spec.tasks:
        if task not in MAX_NEW_TOKENS:
            near = suggestion(task, tuple(MAX_NEW_TOKENS))
            raise BadInput(f"{spec.place}: RULER has no task {quoted(task)}{near}")
        if task in READERS and task not in spec.documents:
            raise BadInput(
                f"{spec.place}: {task} needs its data; give `documents: {{{task}: FILE}}`, or take qa_generated"
            )
    documents = {task: READERS[task](reader.read(path, spec.place)) for task, path in spec.documents.items()}
    essay = Essay(reader.prose(spec.haystack, spec.place), place=spec.place) if spec.haystack else bundled_essay()
    tasks = spec.tasks or default_tasks(documents)
    tokenizer, generation = generation_of(spec, tokenizer, seed, worked_example="cwe" in tasks)
    made = max(spec.items, least)

    def planned(task: str, length: int) -> PlannedSet:
        share = spec.questions if task in NIAH else 1
        new_tokens = spec.max_new_tokens or MAX_NEW_TOKENS[task]
        asked: dict[str, Any] = {"questions": share, "essay": essay, "documents": documents}
        asked |= {"max_new_tokens": new_tokens, "frame": generation.frame}
        asked |= {"turns": generation.turns if spec.chat else None}
        asked |= {"begins": spec.answer_prefix and not generation.end}

        def items(length: int, wanted: range) -> list[Item]:
            return ruler_items(tokenizer, task, length, indices=wanted, seed=seed, **asked)

        def check() -> None:
            if task in documents:
                documents[task].question(made - 1)
            probe(length, lambda length: items(length, range(2)))

        common: dict[str, Any] = {"tokenizer": tokenizer.digest, "length": length, "seed": seed}
        version = generator(task, length, questions=share, chat=bool(spec.chat))
        address = items_digest(ruler_spec(task, **asked) | generation.digested, **common, generator=version)
        before: dict[str, Any] = asked | {"turns": None}  # version 2
        found = [items_digest(ruler_spec(task, **before), **common)]
        if generation.found:
            closed = earlier(tokenizer, generation)
            before |= {"frame": closed.frame, "begins": spec.answer_prefix}
            found.append(items_digest(ruler_spec(task, **before), **common))
            before |= {"turns": closed.turns}
            found.append(items_digest(ruler_spec(task, **before), **common, generator=version))
        return PlannedSet(
            benchmark="ruler",
            task=task,
            length=length,
            count=spec.items,
            made=made,
            digest=address,
            build=file_of(items, length),
            place=spec.place,
            share=share,
            questions=share,
            grows=True,
            check=check,
            superseded=tuple(digest for digest in found if digest != address),
            generation=generation if task == "cwe" else replace(generation, turns=("", "")),
            new_tokens=new_tokens,
        )

    return [planned(task, length) for task in tasks for length in spec.lengths]


def default_tasks(documents: Mapping[str, Library]) -> Sequence[str]:
    """RULER's thirteen, but a generated question-answering task where the data of the two real ones is not given."""
    without_data = [task for task in TASKS if task not in QA or task in documents]
    return without_data if len(without_data) == len(TASKS) else [*without_data, "qa_generated"]

"""From what the job asks to sets of items, built once and stored under a digest of all that they depend on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jobs.errors import BadInput, ObjectExists, ObjectMissing
from jobs.evaluation import ItemSet
from jobs.job import Evaluation, NeedleSpec, PerplexitySpec, RulerSpec
from workers.benchmarks.answering import Library, read_hotpotqa, read_squad
from workers.benchmarks.haystacks import Essay, bundled_essay, bundled_text
from workers.benchmarks.items import items_digest, write_items
from workers.benchmarks.needle import even_depths, needle_items, needle_spec
from workers.benchmarks.perplexity import Window, windows, write_windows
from workers.benchmarks.ruler import NIAH, QA, TASKS, ruler_items, ruler_spec
from workers.benchmarks.tokens import Tokenizer
from workers.storage import Store

READERS: Mapping[str, Callable[[bytes | str | Path], Library]] = {"qa_1": read_squad, "qa_2": read_hotpotqa}


@dataclass(frozen=True, slots=True)
class PlannedSet:
    """A set that can be built: what it is, the digest of all that it depends on, and how to make its file."""

    benchmark: str
    task: str
    length: int
    count: int
    digest: str
    build: Callable[[], bytes]
    share: int = 1


def planned_sets(evaluation: Evaluation, tokenizer: Tokenizer, seed: int, *, extra: int = 0) -> list[PlannedSet]:
    """Every set of items that the job's benchmarks consist of; nothing is built yet.

    `extra` more items are made of each RULER and needle set: fresh ones, on which the winners are confirmed.
    """
    sets: list[PlannedSet] = []
    if evaluation.ruler is not None:
        sets += _ruler(evaluation.ruler, tokenizer, seed, extra)
    if evaluation.needle is not None:
        sets += _needle(evaluation.needle, tokenizer, seed, extra)
    if evaluation.perplexity is not None:
        sets += _perplexity(evaluation.perplexity, tokenizer, seed)
    return sets


def stored(planned: PlannedSet, store: Store) -> ItemSet:
    """The set in the store; built now if nobody has built it before."""
    key = f"items/{planned.digest}.parquet"
    try:
        store.locate(key)
    except ObjectMissing:
        with suppress(ObjectExists):  # another driver built the same bytes
            store.write(key, planned.build(), mode="create")
    return ItemSet(planned.benchmark, planned.task, planned.length, planned.count, planned.share, key)


def _ruler(spec: RulerSpec, tokenizer: Tokenizer, seed: int, extra: int) -> list[PlannedSet]:
    documents = {task: READERS[task](_text_file(path, spec.place)) for task, path in spec.documents.items()}
    essay = Essay(_text_file(spec.haystack, spec.place).decode()) if spec.haystack else bundled_essay()
    sets: list[PlannedSet] = []
    for task in spec.tasks or default_tasks(documents):
        if task in QA and task != "qa_generated" and task not in documents:
            raise BadInput(
                f"{spec.place}: {task} needs its data; give `documents: {{{task}: FILE}}`, or take qa_generated"
            )
        questions = spec.questions if task in NIAH else 1
        for length in spec.lengths:
            sets.append(_ruler_set(task, length, spec.items + extra, questions, tokenizer, seed, essay, documents))
    return sets


def default_tasks(documents: Mapping[str, Library]) -> Sequence[str]:
    """RULER's thirteen, but a generated question-answering task where the data of the two real ones is not given."""
    without_data = [task for task in TASKS if task not in QA or task in documents]
    return without_data if len(without_data) == len(TASKS) else [*without_data, "qa_generated"]


def _ruler_set(
    task: str,
    length: int,
    count: int,
    questions: int,
    tokenizer: Tokenizer,
    seed: int,
    essay: Essay,
    documents: Mapping[str, Library],
) -> PlannedSet:
    spec = ruler_spec(task, items=count, questions=questions, essay=essay, documents=documents)

    def build() -> bytes:
        items = ruler_items(
            tokenizer,
            task,
            length,
            indices=range(count),
            seed=seed,
            questions=questions,
            essay=essay,
            documents=documents,
        )
        return write_items(items)

    digest = items_digest(spec, tokenizer=tokenizer.digest, length=length, seed=seed)
    return PlannedSet("ruler", task, length, count, digest, build, questions)


def _needle(spec: NeedleSpec, tokenizer: Tokenizer, seed: int, extra: int) -> list[PlannedSet]:
    depths = even_depths(spec.depths)
    count = spec.items * spec.depths + -(-extra // spec.depths) * spec.depths
    asked: dict[str, Any] = {"depths": depths, "questions": spec.questions}
    if spec.haystack == "noise":
        asked["haystack"] = "noise"
    elif spec.haystack:
        asked["essay"] = Essay(_text_file(spec.haystack, spec.place).decode())

    def planned(length: int) -> PlannedSet:
        def build() -> bytes:
            return write_items(needle_items(tokenizer, length, indices=range(count), seed=seed, **asked))

        described = needle_spec(items=count, **asked)
        digest = items_digest(described, tokenizer=tokenizer.digest, length=length, seed=seed)
        return PlannedSet("needle", "needle", length, count, digest, build, spec.depths)

    return [planned(length) for length in spec.lengths]


def _perplexity(spec: PerplexitySpec, tokenizer: Tokenizer, seed: int) -> list[PlannedSet]:
    text = _text_file(spec.text, spec.place).decode() if spec.text else bundled_text()
    described = {
        "benchmark": "perplexity",
        "blocks": spec.blocks,
        "lengths": list(spec.lengths),
        "text": Essay(text).digest,
    }

    @cache
    def made() -> list[Window]:  # of all lengths together: windows of every length end at the same tokens
        return windows(tokenizer, text, spec.lengths, items=spec.blocks)

    def planned(length: int) -> PlannedSet:
        def build() -> bytes:
            return write_windows([window for window in made() if window.length == length])

        digest = items_digest(described, tokenizer=tokenizer.digest, length=length, seed=seed)
        return PlannedSet("perplexity", "perplexity", length, spec.blocks, digest, build)

    return [planned(length) for length in spec.lengths]


def _text_file(path: str, place: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadInput(f"{place}: {path} cannot be read ({error.strerror})") from None

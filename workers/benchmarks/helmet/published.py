"""HELMET's questions from its published files, and from the data sets of its in-context learning.

The reference draws with numpy and Python's `random`; the same calls here give the same questions and examples.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jobs.errors import BadInput
from workers.benchmarks.helmet.prompts import (
    SHOTS,
    Sample,
    document,
    labelled,
    worked_documents,
    worked_pair,
)
from workers.benchmarks.planned import Reader
from workers.benchmarks.questions import cells, rows_of

SEED = 42
"""Of the reference's configs."""

PAIRS = {8192: 105, 16384: 220, 32768: 440, 65536: 900, 131072: 1800}
DOCUMENTS = {8192: 50, 16384: 105, 32768: 220, 65536: 440, 131072: 1000}
EXAMPLES: Mapping[str, Mapping[int, int]] = {
    "trec_coarse": {8192: 400, 16384: 800, 32768: 1600, 65536: 3300, 131072: 6600},
    "trec_fine": {8192: 400, 16384: 800, 32768: 1600, 65536: 3200, 131072: 6400},
    "banking77": {8192: 360, 16384: 720, 32768: 1450, 65536: 2900, 131072: 5900},
    "clinic150": {8192: 440, 16384: 880, 32768: 1750, 65536: 3525, 131072: 7050},
    "nlu": {8192: 510, 16384: 1020, 32768: 2040, 65536: 4080, 131072: 8296},
}
LENGTHS = tuple(PAIRS)
LABELS = {
    "trec_coarse": ("coarse_label", 6),
    "trec_fine": ("fine_label", 50),
    "banking77": ("label", 77),
    "clinic150": ("intent", 151),
    "nlu": ("label", 68),
}
"""The column of the label, and how many there are."""
QA_FILES = {
    "nq": ("nq-dev-multikilt_1000_k{}_dep6", "nq-train-multikilt_1000_k3_dep6"),
    "triviaqa": ("triviaqa-dev-multikilt_1000_k{}_dep6", "triviaqa-train-multikilt_1000_k3_dep6"),
    "hotpotqa": ("hotpotqa-dev-multikilt_1000_k{}_dep3", "hotpotqa-train-multikilt_1000_k3_dep3"),
    "popqa": ("popqa_test_1000_k{}_dep6", "popqa_test_1000_k3_dep6"),
}
POPULARITY = 3
"""The decimal logarithm of the page views below which a question of PopQA is asked."""

Row = Mapping[str, Any]


class Published:
    """The files of HELMET's `data` folder, and folders with the data of tasks of in-context learning."""

    def __init__(self, reader: Reader, data: str | None, examples: Mapping[str, str], place: str) -> None:
        self._reader = reader
        self._data = (data or "").rstrip("/")
        self._examples = examples
        self._place = place

    def samples(self, task: str, length: int, items: int | None) -> list[Sample]:
        """The questions of a task at one of `LENGTHS`: of `items` different ones, or of as many as in the reference.

        `BadInput` for a file that is missing or another one.
        """
        try:
            if task == "json_kv":
                return json_kv(self._rows(f"json_kv/test_k{PAIRS[length]}_dep6.jsonl"), items or 100)
            if task in QA_FILES:
                test, demos = (f"kilt/{name.format(DOCUMENTS[length])}.jsonl" for name in QA_FILES[task])
                return qa(self._rows(test), self._rows(demos), items or 100, popular=task == "popqa")
            train, test = self._halves(task)
            return icl(task, train, test, EXAMPLES[task][length], items or 500)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise BadInput(
                f"{self._place}: a row of {task} is not as published ({error}); give the published files"
            ) from error

    def _rows(self, name: str) -> list[Row]:
        """The rows of a published file."""
        return self._read(f"{self._data}/{name}")

    def _read(self, path: str) -> list[Row]:
        return [row for _, row in rows_of(self._reader.read(path, self._place), path)]

    def _halves(self, task: str) -> tuple[list[Row], list[Row]]:
        """The rows to learn from and those to ask; `nlu` is divided as in the reference."""
        folder = self._examples[task].rstrip("/")
        names = self._reader.names(folder, self._place)

        def rows(*words: str) -> list[Row]:
            found = [name for name in names if any(word in name for word in words)]
            if not found:
                raise BadInput(
                    f"{self._place}: {folder} has no file with `{words[0]}` in its name; give the folder of {task}"
                )
            return [row for name in found for row in self._read(f"{folder}/{name}")]

        if task == "nlu":
            everything = rows("train")
            order = np.random.default_rng(SEED).permutation(len(everything)).tolist()
            asked = math.ceil(len(everything) / 10)
            return [everything[at] for at in order[asked:]], [everything[at] for at in order[:asked]]
        return rows("train"), rows("validation" if task == "clinic150" else "test")


def shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    """In the order of `datasets.Dataset.shuffle`."""
    return [rows[at] for at in np.random.default_rng(seed).permutation(len(rows)).tolist()]


def json_kv(rows: Sequence[Row], items: int) -> list[Sample]:
    found: list[Sample] = []
    for row in shuffled(rows, SEED)[:items]:
        context, question, answer, demos = cells(row, ("context", "question", "answer", "demos"), "json_kv")
        if len(demos) < SHOTS:
            raise ValueError(f"{len(demos)} worked examples")
        worked = "".join(worked_pair(key, value) for key, value in demos[:SHOTS])
        found.append(Sample(str(question), str(context), str(question), (str(answer),), worked))
    return found


def qa(rows: Sequence[Row], demos: Sequence[Row], items: int, *, popular: bool) -> list[Sample]:
    """`popular`: only questions about what few people look up, whose own file has the worked examples too."""
    if popular:
        rows, demos = (
            [row for row in of if math.log10(cells(row, ("s_pop",), "popqa")[0]) < POPULARITY] for of in (rows, demos)
        )
    key = "id" if rows and "id" in rows[0] else "question"
    keys = sorted({row[key] for row in rows})
    chosen = {*random.Random(SEED).sample(keys, min(items, len(keys)))}
    found: list[Sample] = []
    for row in rows:
        if row[key] not in chosen:
            continue
        question, answers, texts = cells(row, ("question", "answers", "ctxs"), "kilt")
        if not answers:
            raise ValueError("no answers")
        others = [demo for demo in demos if not popular or demo[key] != row[key]]
        seed = int(hashlib.sha256(str(row[key]).encode()).hexdigest(), 16) % 2**31
        worked: dict[Any, Row] = {}
        for demo in shuffled(others, seed):
            worked.setdefault(demo[key], demo)
        shown = "".join(
            worked_documents(_documents(demo["ctxs"]), demo["question"], demo["answers"][0])
            for demo in [*worked.values()][:SHOTS]
        )
        found.append(Sample(str(row[key]), _documents(texts), str(question), tuple(map(str, answers)), shown))
    return found


def _documents(texts: Sequence[Row]) -> str:
    return "\n\n".join(document(text["title"], text["text"]) for text in texts)


def icl(task: str, train: Sequence[Row], test: Sequence[Row], shots: int, items: int) -> list[Sample]:
    """Each question has examples and numbers for the labels of its own."""
    column, count = LABELS[task]
    if test and not train:
        raise ValueError("no examples")
    for row in (*train, *test):
        _, label = cells(row, ("text", column), task)
        if not 0 <= int(label) < count:
            raise ValueError(f"the label {label!r:.40}, not a number below {count}")
    if len(test) > items:
        test = balanced(shuffled(test, SEED), column, items, SEED)
    found: list[Sample] = []
    for row in test:
        text = str(row["text"])
        seed = (int(hashlib.sha256(text.encode()).hexdigest(), 16) + SEED) % 2**31
        numbers = list(range(count))
        random.Random(seed).shuffle(numbers)
        examples = [
            labelled(example["text"], numbers[int(example[column])]) for example in balanced(train, column, shots, seed)
        ]
        found.append(Sample(text, "\n\n".join(examples), text, (str(numbers[int(row[column])]),)))
    return found


def balanced(rows: Sequence[Row], column: str, count: int, seed: int) -> list[Row]:
    """So many rows in rounds, each of which has every label once, in an order of its own."""
    draw = random.Random(seed)
    by_label: dict[Any, list[Row]] = {}
    for row in rows:
        by_label.setdefault(row[column], []).append(row)
    rounds: list[list[Row]] = [[] for _ in range(math.ceil(count / len(by_label)))]
    for of in by_label.values():
        chosen = draw.sample(range(len(of)), len(rounds) % len(of))
        while len(chosen) < len(rounds):
            chosen += draw.sample(range(len(of)), min(len(rounds) - len(chosen), len(of)))
        for one, at in zip(rounds, chosen, strict=True):
            one.append(of[at])
    for one in rounds:
        draw.shuffle(one)
    return [row for one in rounds for row in one][:count]

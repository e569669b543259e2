"""Needles in a haystack: the eight `niah` tasks of RULER, and any number of questions on one haystack.

RULER hides one group of needles in one haystack and asks once. Its m-question form here hides q keys of its own for
each question and keeps the k − q unasked keys; with m = 1 that is RULER's task. All m items then share the
text up to the question, so that an engine reads the haystack once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from workers.benchmarks.items import Asked, Item
from workers.benchmarks.texts.draws import Draw
from workers.benchmarks.texts.filling import TooShort, fill
from workers.benchmarks.texts.haystacks import Essay, Haystack, Lines, Noise
from workers.benchmarks.texts.tokenizer import Tokenizer

HEAD = (
    "Some special magic {values} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {values} afterwards.\n"
)
QUESTION = "\nWhat are all the special magic {values} for {query} mentioned in the provided text?"
ANSWER_PREFIX = " The special magic {values} for {query} mentioned in the provided text are"
NEEDLE = "One of the special magic {values} for {key} is: {value}."

# RULER puts needles of running text at one of 40 evenly spread depths, in whole percent.
DEPTHS = tuple(round(100 * step / 39) / 100 for step in range(40))


@dataclass(frozen=True, slots=True)
class Niah:
    """One niah task: its haystack, its number of needles, the form of keys and values."""

    haystack: Literal["noise", "needle", "essay"]
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


@dataclass(frozen=True, slots=True)
class Needles:
    """All that is hidden in one haystack: key by key its values, and which keys each question asks for."""

    keys: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]
    questions: tuple[tuple[int, ...], ...]

    def texts(self, task: Niah) -> list[str]:
        """The sentences that are hidden, key by key."""
        return [
            needle_text(task, key, value)
            for key, values in zip(self.keys, self.values, strict=True)
            for value in values
        ]


def draw_needles(task: Niah, questions: int, draw: Draw) -> Needles:
    """The needles of one haystack; keys are different from each other, and so are values."""
    count = task.queries * questions + max(0, task.keys - task.queries)
    keys = _different(task.key, count, draw)
    values = _different(task.value, count * task.values, draw)
    order = draw.sample(range(count), task.queries * questions)
    return Needles(
        keys=tuple(keys),
        values=tuple(tuple(values[key * task.values : (key + 1) * task.values]) for key in range(count)),
        questions=tuple(tuple(order[at * task.queries : (at + 1) * task.queries]) for at in range(questions)),
    )


def _one(kind: str, draw: Draw) -> str:
    return {"words": draw.word, "numbers": draw.number, "uuids": draw.identifier}[kind]()


def _different(kind: str, count: int, draw: Draw) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[_one(kind, draw)] = None
    return list(found)


def needle_text(task: Niah, key: str, value: str) -> str:
    """The sentence that is hidden."""
    return NEEDLE.format(values=task.value, key=key, value=value)


def phrases(task: Niah, query: Sequence[str]) -> tuple[str, str, str]:
    """Head, question and answer prefix, in the singular if there is one value to find."""
    template, values = (HEAD, QUESTION, ANSWER_PREFIX), str(task.value)
    if task.queries * task.values == 1:
        template = tuple(text.replace("Some", "A").replace("are all", "is").replace("are", "is") for text in template)
        values = values.removesuffix("s")
    asked = query[0] if len(query) == 1 else ", ".join(query[:-1]) + ", and " + query[-1]
    head, question, answer_prefix = (text.format(values=values, query=asked) for text in template)
    return head, question, answer_prefix


def make_haystack(task: Niah, needles: Needles, essay: Essay, draw: Draw) -> Haystack:
    """The haystack of one set of needles; needles that are not asked for never use a key or value that is asked for."""
    if task.haystack == "essay":
        return essay
    if task.haystack == "noise":
        return Noise()
    taken = {*needles.keys, *(value for values in needles.values for value in values)}

    def other() -> str:
        while (key := _one(task.key, draw)) in taken:
            pass
        while (value := _one(task.value, draw)) in taken:
            pass
        return needle_text(task, key, value)

    return Lines(lambda _: other())


def draw_places(task: Niah, count: int, draw: Draw) -> list[float]:
    """Where the needles go, as fractions of the haystack: the same fractions at every length."""
    if task.haystack == "essay" and count <= len(DEPTHS):
        return draw.sample(DEPTHS, count)
    return [draw.fraction() for _ in range(count)]


def niah_items(
    tokenizer: Tokenizer, asked: Asked, task: Niah, number: int, *, questions: int, essay: Essay
) -> list[Item]:
    """The items of the haystack of this number, one for each question; `TooShort` if they cannot fit in the length."""
    identity = ("niah", asked.task, asked.seed, questions, number)
    needles = draw_needles(task, questions, Draw(*identity, "needles"))
    texts = needles.texts(task)
    places = draw_places(task, len(texts), Draw(*identity, "places"))
    haystack = make_haystack(task, needles, essay, Draw(*identity, "haystack"))
    return pose(
        tokenizer,
        asked,
        task,
        needles,
        context=lambda units: haystack.hide(units, texts, places),
        forecast=lambda budget: haystack.forecast(tokenizer, budget),
        haystack=asked.named(f"{number}x{questions}"),
        indices=range(number * questions, (number + 1) * questions),
    )


def pose(
    tokenizer: Tokenizer,
    asked: Asked,
    task: Niah,
    needles: Needles,
    *,
    context: Callable[[int], str],
    forecast: Callable[[int], NDArray[np.int64]],
    haystack: str,
    indices: Sequence[int],
    scorer: str = "all",
) -> list[Item]:
    """Every question asked on as much haystack as fits with the longest of them.

    `context(units)` is the haystack with all needles in it, `haystack` its name; `forecast` as in `budget.fill`.
    """
    queries = [[needles.keys[key] for key in question] for question in needles.questions]
    endings = [
        (question + asked.frame[1], asked.beginning(prefix))
        for _, question, prefix in (phrases(task, query) for query in queries)
    ]
    head = asked.frame[0] + phrases(task, queries[0])[0]
    tails = ["".join(ending) for ending in endings]
    longest = tails[0] if len(tails) == 1 else max(tails, key=tokenizer.count)

    units, tokens = fill(tokenizer, asked, lambda units: head + context(units) + longest, forecast)
    prefix, counts = head + context(units), [tokens]
    while len(tails) > 1:
        counts = tokenizer.count_each([prefix + tail for tail in tails])
        if max(counts) <= asked.budget:
            break
        if units == 0:
            raise TooShort(asked.task, asked.length, max(counts) + asked.max_new_tokens)
        units -= 1  # where text and ending meet, another ending than the longest may take one token more
        prefix = head + context(units)
    hidden = [value for values in needles.values for value in values]
    depth = dict(zip(hidden, depths_of(prefix[len(head) :], needles.texts(task)), strict=True))
    answers = [tuple(value for key in question for value in needles.values[key]) for question in needles.questions]
    return [
        asked.item(
            indices[number],
            *endings[number],
            answers=answers[number],
            tokens=counts[number],
            depths=[depth[value] for value in answers[number]],
            prefix=prefix,
            scorer=scorer,
            haystack=haystack,
            pair=f"{haystack}-{number}",
        )
        for number in range(len(endings))
    ]


def depths_of(context: str, needles: Sequence[str]) -> list[float]:
    """Where each needle lies in the context, in characters: 0 if it begins it, 1 if it ends it."""
    return [context.index(needle) / max(1, len(context) - len(needle)) for needle in needles]

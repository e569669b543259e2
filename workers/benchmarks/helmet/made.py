"""Items in HELMET's forms that are made by rule, each as long as it can be."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from workers.benchmarks.helmet.prompts import (
    FORMS,
    MADE,
    SHOTS,
    Sample,
    document,
    labelled,
    prompt_of,
    worked_documents,
    worked_pair,
)
from workers.benchmarks.items import Asked, Item
from workers.benchmarks.ruler.invented import invented
from workers.benchmarks.ruler.niah import depths_of
from workers.benchmarks.texts.draws import Draw, words
from workers.benchmarks.texts.filling import build_groups, fill, running_total
from workers.benchmarks.texts.haystacks import Lines
from workers.benchmarks.texts.tokenizer import Tokenizer

ACTIONS = (
    "borrow",
    "book",
    "cancel",
    "charge",
    "clean",
    "close",
    "count",
    "find",
    "lock",
    "move",
    "open",
    "order",
    "paint",
    "print",
    "rent",
    "repair",
    "return",
    "sell",
    "send",
    "weigh",
)
REQUESTS = (
    "Please {} the {} for me.",
    "Could you {} the {}?",
    "I would like to {} the {}.",
    "My neighbour wants to {} the {}.",
    "Remind me to {} the {} tomorrow.",
    "How do I {} the {}?",
    "We forgot to {} the {}.",
    "Is it too late to {} the {}?",
)
DEMO_DOCUMENTS = 3

Growing = tuple[Callable[[int], Sample], Callable[[Tokenizer, int], NDArray[np.int64]]]
"""A sample with so many units, and their forecast for a tokenizer and a budget."""


def made_items(tokenizer: Tokenizer, asked: Asked, scorer: str, *, begun: bool, indices: Iterable[int]) -> list[Item]:
    """The items of a made task with these indices.

    `BadInput` names the smallest length at which all of them fit, if they do not fit in this one.
    """
    wanted = list(indices)
    task = asked.task.removesuffix(MADE)
    before, after = asked.frame

    def build(index: int) -> list[Item]:
        sample, forecast = KINDS[task](Draw("helmet", task, asked.seed, index))

        def text(units: int) -> str:
            return before + prompt_of(FORMS[task], sample(units), begun=begun) + after

        units, tokens = fill(tokenizer, asked, text, lambda budget: forecast(tokenizer, budget))
        found = sample(units)
        depths = depths_of(found.context, found.gold)
        return [asked.item(index, text(units), "", answers=found.answers, tokens=tokens, depths=depths, scorer=scorer)]

    return build_groups(tokenizer, asked, wanted, build, wanted)


def _json_kv(draw: Draw) -> Growing:
    """A JSON object of UUIDs; two of its pairs are the worked examples, and one is asked for."""
    pairs = [(draw.identifier(), draw.identifier()) for _ in range(SHOTS + 1)]
    places = [draw.fraction() for _ in pairs]
    others = Lines(lambda _: _pair(draw.identifier(), draw.identifier()))
    (key, value), *worked = pairs
    demos = "".join(worked_pair(*pair) for pair in worked)
    needles = [_pair(*pair) for pair in pairs]

    def sample(units: int) -> Sample:
        lines = others.hide(units, needles, places).replace("\n", "\n ").removesuffix(",")
        return Sample(key, f"JSON data:\n{{{lines}}}", key, (value,), demos, (_pair(key, value).removesuffix(","),))

    return sample, others.forecast


def _pair(key: str, value: str) -> str:
    return f'"{key}": "{value}",'


def _rag(draw: Draw) -> Growing:
    """A question about an invented world, after two worked examples of other worlds."""
    demos = ""
    for number in range(SHOTS):
        question, documents = invented(number, draw)
        answer = question.answers[0]
        demos += worked_documents("\n\n".join(map(_shown, documents(0, DEMO_DOCUMENTS))), question.query, answer)
    question, documents = invented(draw.below(3), draw)
    gold = len(question.gold)
    ranks: list[float] = []

    def sample(units: int) -> Sample:
        ranks.extend(draw.fraction() for _ in range(gold + units - len(ranks)))
        order = sorted(range(gold + units), key=ranks.__getitem__)
        chosen = documents(0, gold + units)
        context = "\n\n".join(_shown(chosen[at]) for at in order)
        gold_texts = tuple(map(_shown, chosen[:gold]))
        return Sample(question.query, context, question.query, question.answers, demos, gold_texts)

    def forecast(tokenizer: Tokenizer, budget: int) -> NDArray[np.int64]:
        def shown(first: int, last: int) -> list[str]:
            return [_shown(text) + "\n\n" for text in documents(gold + first, gold + last)]

        return running_total(tokenizer, shown, budget)

    return sample, forecast


def _shown(text: str) -> str:
    title, _, body = text.partition("\n")
    return document(title, body)


def _icl(draw: Draw) -> Growing:
    """Requests, labelled by what is to be done: by numbers that are drawn for each item, in rounds of all labels."""
    labels = draw.shuffled(range(len(ACTIONS)))
    asked = draw.below(len(ACTIONS))
    question = _request(asked, draw)
    examples: list[str] = []

    def first(count: int) -> list[str]:
        while len(examples) < count:
            for action in draw.shuffled(range(len(ACTIONS))):
                while (request := _request(action, draw)) == question:
                    pass
                examples.append(labelled(request, labels[action]))
        return examples[:count]

    def sample(units: int) -> Sample:
        return Sample(question, "\n\n".join(first(len(ACTIONS) + units)), question, (str(labels[asked]),))

    def forecast(tokenizer: Tokenizer, budget: int) -> NDArray[np.int64]:
        least = len(ACTIONS)
        return running_total(
            tokenizer, lambda begin, end: [text + "\n\n" for text in first(least + end)[least + begin :]], budget
        )

    return sample, forecast


def _request(action: int, draw: Draw) -> str:
    return draw.choice(REQUESTS).format(ACTIONS[action], draw.choice(words("noun")))


KINDS: dict[str, Callable[[Draw], Growing]] = {"json_kv": _json_kv, "rag": _rag, "icl": _icl}

"""BABILong's questions (Kuratov et al. 2024, arXiv 2406.10149): its prompts and its scorer.

Published questions come with their text. Made ones are stories of `world`, whose facts are spread over a free text in
their order: the same (seed, task, index) gives the same story, at the same fractions of the text, at every length.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib import resources
from typing import Any

from workers.benchmarks.babilong.world import STORIES
from workers.benchmarks.items import Asked, Item
from workers.benchmarks.texts.draws import Draw
from workers.benchmarks.texts.filling import build_groups, fill
from workers.benchmarks.texts.haystacks import Essay
from workers.benchmarks.texts.tokenizer import Tokenizer

TASKS = tuple(STORIES)
MADE = "_generated"
"""The end of the name of a task whose items are made here: another benchmark than the published one."""

MAX_NEW_TOKENS = 20


@lru_cache(maxsize=1)
def words() -> dict[str, dict[str, Any]]:
    """By task: `instruction`, `examples`, `post_prompt` and `labels`, as the reference has them."""
    return json.loads((resources.files("workers.benchmarks.babilong") / "prompts.json").read_text(encoding="utf-8"))


def prompt_of(task: str, context: str, question: str) -> str:
    """The reference's prompt with its instruction, examples and form of the answer."""
    told = words()[task]
    head = f"{told['instruction']}\n\n{told['examples']}\n\n{told['post_prompt']}"
    return f"{head}\n\n<context>\n{context.strip()}\n</context>\n\nQuestion: {question}".strip()


def scorer_of(task: str, question: str) -> str:
    """The scorer of an answer: labels that stand in the question are never counted."""
    labels = sorted({str(label).lower() for label in words()[task]["labels"]})
    return "labels:" + "|".join(label for label in labels if label not in question.lower())


def made_items(tokenizer: Tokenizer, asked: Asked, essay: Essay, *, indices: Iterable[int]) -> list[Item]:
    """The items of a made task with these indices, each as long as it can be.

    `BadInput` names the smallest length at which all of them fit, if they do not fit in this one.
    """
    wanted = list(indices)
    task = asked.task.removesuffix(MADE)
    before, after = asked.frame

    def build(index: int) -> list[Item]:
        story = STORIES[task](Draw("babilong", task, asked.seed, index, "story"))
        draw = Draw("babilong", task, asked.seed, index, "places")
        places = sorted(draw.fraction() for _ in story.facts)

        def context(units: int) -> str:
            return " ".join(essay.hide(units, story.facts, places).split())

        def text(units: int) -> str:
            return before + prompt_of(task, context(units), story.question) + after

        units, tokens = fill(tokenizer, asked, text, lambda budget: essay.forecast(tokenizer, budget))
        depths = _depths(context(units), story.facts)
        return [
            asked.item(
                index,
                text(units),
                "",
                answers=(story.answer,),
                tokens=tokens,
                depths=[depths[number] for number in story.support],
                scorer=scorer_of(task, story.question),
            )
        ]

    return build_groups(tokenizer, asked, wanted, build, wanted)


def _depths(context: str, facts: Sequence[str]) -> list[float]:
    """Where each fact lies in the context, in characters: 0 if it begins it, 1 if it ends it; a fact may come twice."""
    found: list[float] = []
    at = 0
    for fact in facts:
        begin = context.index(fact, at)
        found.append(begin / max(1, len(context) - len(fact)))
        at = begin + len(fact)
    return found

"""A block of items in, one score for each out: the part of a row that the benchmark decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.evaluation_tasks import PLAINLY, Generation, Status
from workers.benchmarks.generation import messages_of, sampling_of, thought_of
from workers.benchmarks.items import Item, read_items
from workers.benchmarks.scorers import score as scored_by
from workers.engines.engine import Engine, Prompt


@dataclass(frozen=True, slots=True)
class Block:
    """Items for one engine; each of `parts` is (a file of the set, its first row to ask, one after the last).

    `tokenizer` is the folder of the point's tokenizer, `beginning` the text of the token that begins a text. `remark`
    takes a line for the user. `generation` says how the items are answered.
    """

    parts: Sequence[tuple[bytes, int, int]]
    tokenizer: Path
    beginning: str
    remark: Callable[[str], None]
    generation: Generation = PLAINLY


@dataclass(frozen=True, slots=True)
class ItemScore:
    """One item's result; the fields mean the same as in `jobs.evaluation_tasks.ScoreRow`."""

    task: str
    item: int
    depth: float
    haystack: str
    pair: str
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


def answer_items(engine: Engine, block: Block) -> Iterator[ItemScore]:
    """The engine's answers to items of `workers.benchmarks.items`, each scored by the item's own scorer.

    Samples of one item follow each other. Scored is the text after a model's thought. The score is 0 where a logit was
    NaN or infinite.
    """
    items = [item for data, first, last in block.parts for item in read_items(data, first, last)]
    asked = [(item, sample) for item in items for sample in range(block.generation.samples)]
    answers = engine.generate([_prompt(item, sample, block.generation) for item, sample in asked])
    if remark := next((answer.remark for answer in answers if answer.remark), ""):
        block.remark(remark)
    for (item, sample), answer in zip(asked, answers, strict=True):
        text = answer.text if block.generation.end else without_thoughts(answer.text)
        yield ItemScore(
            task=item.task,
            item=item.index,
            depth=item.depths[0] if item.depths else math.nan,
            haystack=item.haystack,
            pair=item.pair,
            answer=text,
            score=scored_by(item.scorer, text, item.answers) if answer.finite else 0.0,
            finite=answer.finite,
            tokens=answer.tokens_in + answer.tokens_out,
            seconds=answer.seconds,
            status="empty" if answer.status == "answered" and not text.strip() else answer.status,
            thought=answer.thought,
            tokens_thought=answer.tokens_thought,
            tokens_out=answer.tokens_out,
            sample=sample,
        )


def _prompt(item: Item, sample: int, generation: Generation) -> Prompt:
    return Prompt(
        item.prefix,
        item.prompt + item.answer_prefix,
        item.max_new_tokens,
        bare=item.bare,
        messages=messages_of(item.prefix + item.prompt, item.answer_prefix, generation),
        template=generation.template,
        thinking=thought_of(generation),
        sampling=sampling_of(generation, sample, item.benchmark, item.task, item.length, item.index),
    )


def without_thoughts(text: str) -> str:
    """The text after `<think>…</think>`, if it begins so; nothing where the thoughts never end."""
    return text.partition("</think>")[2] if text.lstrip().startswith("<think>") else text

"""Answers of an engine as scores of items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.evaluation_tasks import Generation
from workers.benchmarks.answering import Block, answer_items
from workers.benchmarks.items import Item, write_items
from workers.engines.engine import Answer, Prompt, split_thought, status_of

ITEM = Item("ruler", "vt", 512, 0, (0.5,), "vt-0", "", "?", "", ("7654321",), "all", 8, 10, "p")


class Saying:
    """An engine that gives one answer to all prompts."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    def generate(self, prompts: Sequence[Prompt]) -> list[Answer]:
        return [self.answer for _ in prompts]


@pytest.mark.parametrize(
    ("said", "status", "kept", "score", "wanted"),
    [
        (" 7654321", "answered", " 7654321", 1.0, "answered"),
        ("<think>7654321?</think> 1111111", "answered", " 1111111", 0.0, "answered"),
        ("<think>1111111?</think> 7654321", "answered", " 7654321", 1.0, "answered"),
        ("<think>the text says 7654321, but", "cut", "", 0.0, "cut"),
        ("<think>the text says 7654321</think>\n", "answered", "\n", 0.0, "empty"),
        ("<thinking aloud> 7654321", "answered", "<thinking aloud> 7654321", 1.0, "answered"),
        ("", "failed", "", 0.0, "failed"),
    ],
)
def test_scored_is_the_text_after_the_thoughts_and_its_end_is_kept(
    said: str, status: Any, kept: str, score: float, wanted: str
) -> None:
    remarks: list[str] = []
    block = Block([(write_items([ITEM, ITEM]), 0, 2)], Path(), "", remarks.append)
    engine: Any = Saying(Answer(said, 10, 3, 0.1, True, status, "a remark"))
    rows = list(answer_items(engine, block))
    assert [(row.answer, row.score, row.status) for row in rows] == [(kept, score, wanted)] * 2
    assert remarks == ["a remark"], "once for a block"


class Reasoner:
    """An engine that says what a model might, token by token: one word is one token."""

    def __init__(self, said: str) -> None:
        self.said = said
        self.prompts: list[Prompt] = []

    def generate(self, prompts: Sequence[Prompt]) -> list[Answer]:
        self.prompts = [*prompts]
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, prompt: Prompt) -> Answer:
        thought, answer, ended = split_thought(self.said, prompt.thinking)
        words = len(thought.split()) + (prompt.thinking is not None)
        if prompt.thinking is not None and (not ended or words > prompt.thinking.budget):
            return Answer("", 10, words, 0.1, True, "unended", thought=thought, tokens_thought=words)
        kept = " ".join(answer.split()[: prompt.max_new_tokens])
        status = status_of(kept, cut=len(answer.split()) > prompt.max_new_tokens)
        return Answer(kept, 10, words + len(kept.split()), 0.1, True, status, thought=thought, tokens_thought=words)


THINKS = Generation(end="</think>", budget=8)
OPENED = Generation(end="</think>", budget=8, opened=True)


@pytest.mark.parametrize("generation", [THINKS, OPENED], ids=["the model opens", "the template opens"])
@pytest.mark.parametrize(
    ("said", "score", "status", "thought"),
    [
        ("is it 1111111? No. </think> 7654321", 1.0, "answered", "is it 1111111? No."),
        ("is it 7654321? No. </think> 1111111", 0.0, "answered", "is it 7654321? No."),
        ("the text says 7654321", 0.0, "unended", "the text says 7654321"),
        ("one two three four five six seven eight </think> 7654321", 0.0, "unended", None),
        ("</think> 7654321", 1.0, "answered", ""),
        ("7654321 </think>", 0.0, "empty", "7654321"),
        ("so </think> a b c d e f g h 7654321", 0.0, "cut", "so"),
    ],
)
def test_only_the_answer_after_a_thought_scores(
    generation: Generation, said: str, score: float, status: str, thought: str | None
) -> None:
    engine: Any = Reasoner(said if generation.opened else f"<think> {said}")
    block = Block([(write_items([ITEM]), 0, 1)], Path(), "", lambda _: None, generation)
    [row] = answer_items(engine, block)
    assert (row.score, row.status) == (score, status)
    if thought is not None:
        assert row.thought == thought and row.tokens_thought == len(thought.split()) + 1
    assert "7654321" in row.answer or not score, "the thought is kept apart"


def test_a_prompt_has_the_conversation_and_the_thought_of_its_set() -> None:
    engine: Any = Reasoner("a </think> 7654321")
    generation = Generation(
        end="</think>",
        budget=8,
        frame=("<s>Be brief.<u>", "<a>"),
        system="Be brief.",
        template=(("enable_thinking", True),),
    )
    item = replace(ITEM, prefix="<s>Be brief.<u>Where", prompt=" is it?<a>", bare=True)
    [row] = answer_items(engine, Block([(write_items([item]), 0, 1)], Path(), "", lambda _: None, generation))
    [prompt] = engine.prompts
    assert prompt.whole == "<s>Be brief.<u>Where is it?<a>" and prompt.longest == 16
    assert [(message.role, message.content) for message in prompt.messages] == [
        ("system", "Be brief."),
        ("user", "Where is it?"),
    ]
    assert prompt.template == (("enable_thinking", True),) and row.score == 1.0


def test_samples_of_an_item_have_seeds_of_their_own_that_no_model_changes() -> None:
    drawn = Generation(temperature=0.7, top_p=0.9, top_k=20, samples=3, seed=5)
    items = write_items([ITEM, replace(ITEM, index=1)])
    engines: list[Any] = [Reasoner("7654321"), Reasoner("no")]
    rows = [list(answer_items(engine, Block([(items, 0, 2)], Path(), "", lambda _: None, drawn))) for engine in engines]
    assert [(row.item, row.sample, row.score) for row in rows[0]] == [(at, n, 1.0) for at in (0, 1) for n in (0, 1, 2)]
    first, second = ([prompt.sampling for prompt in engine.prompts] for engine in engines)
    assert first == second and len({sampling.seed for sampling in first}) == 6
    assert {(sampling.temperature, sampling.top_p, sampling.top_k) for sampling in first} == {(0.7, 0.9, 20)}
    assert all(0 <= sampling.seed < 2**31 for sampling in first)
    part: Any = Reasoner("7654321")
    list(answer_items(part, Block([(items, 1, 2)], Path(), "", lambda _: None, drawn)))
    assert [prompt.sampling for prompt in part.prompts] == first[3:], "however a run is cut into blocks"

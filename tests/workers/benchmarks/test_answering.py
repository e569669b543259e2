"""Answers of an engine as scores of items."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from workers.benchmarks.answering import Block, answer_items
from workers.benchmarks.items import Item, write_items
from workers.engines.engine import Answer, Prompt

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

"""Prompts, and the parts of a generated text."""

from __future__ import annotations

import pytest

from workers.engines.engine import Prompt, Thought, split_thought

OPENED, UNOPENED = (Thought("</think>", 64, opened=opened) for opened in (True, False))


@pytest.mark.parametrize(
    ("text", "thought", "parts"),
    [
        ("\nis it 7? No.\n</think>\n\n8", OPENED, ("is it 7? No.", "\n\n8", True)),
        ("<think>\nis it 7? No.\n</think>\n\n8", UNOPENED, ("is it 7? No.", "\n\n8", True)),
        ("</think> 8", OPENED, ("", " 8", True)),
        ("7, so 8", UNOPENED, ("7, so 8", "", False)),
        ("<think>7, so", UNOPENED, ("7, so", "", False)),
        ("7</think>8</think>9", OPENED, ("7", "8</think>9", True)),
        ("[THINK]7[/THINK]8", Thought("[/THINK]", 64, opened=False), ("7", "8", True)),
        ("<think>7</think>8", None, ("", "<think>7</think>8", True)),
        ("", OPENED, ("", "", False)),
    ],
)
def test_a_thought_ends_at_the_first_end_tag(text: str, thought: Thought | None, parts: tuple[str, str, bool]) -> None:
    assert split_thought(text, thought) == parts


def test_a_prompt_asks_for_the_tokens_of_thought_and_answer() -> None:
    assert Prompt("", "?", 32).longest == 32
    assert Prompt("", "?", 32, thinking=OPENED).longest == 96

"""Sampled answers as one score for each item, pass@k, and the tokens of thoughts."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from orchestrator.evaluating.pairing import samples
from orchestrator.judging.estimates import macro_score
from orchestrator.judging.sampled import by_item, median_tokens, pass_at, token_cells
from tests.orchestrator.scores import cell, row


def drawn(scores: list[list[float]], task: str = "vt", **more: Any) -> list[Any]:
    """Items with these scores of their samples."""
    return [
        row("a", task, 512, item, score, sample=sample, **more)
        for item, of_item in enumerate(scores)
        for sample, score in enumerate(of_item)
    ]


def test_the_score_of_an_item_is_the_mean_of_its_samples() -> None:
    found = by_item(drawn([[1, 0, 1, 1], [0, 0, 0, 0.5]]))
    assert [(entry.item, entry.sample, entry.score) for entry in found] == [(0, 0, 0.75), (1, 0, 0.125)]
    assert [entry.tokens for entry in found] == [40, 40]
    greedy = cell("a", "vt", 512, [1, 0, 0.5])
    assert by_item(greedy) == greedy


def test_equal_samples_of_an_item_tell_no_more_than_one() -> None:
    once = macro_score(samples(cell("a", "vt", 512, [1, 0, 1, 1, 0, 1])))
    [*eight] = by_item(drawn([[score] * 8 for score in (1, 0, 1, 1, 0, 1)]))
    assert macro_score(samples(eight)) == once


def test_pass_at_k_is_the_share_of_choices_of_k_samples_with_a_right_one() -> None:
    scores: list[list[float]] = [[1, 0, 0, 0, 0], [0, 0.5, 0, 0, 0], [1, 1, 0, 0, 0.9]]
    found = pass_at(drawn(scores))
    assert [*found] == [1, 2, 4, 5]
    for k, share in found.items():
        chosen = [[any(score == 1 for score in of) for of in combinations(item, k)] for item in scores]
        assert share == pytest.approx(sum(sum(of) / len(of) for of in chosen) / len(scores))
    assert pass_at(cell("a", "vt", 512, [1, 0])) == {}
    easy, hard = drawn([[1, 1]] * 6), drawn([[0, 0]], task="cwe")
    assert pass_at([*easy, *hard])[2] == 0.5, "tasks count alike, as in the score"
    once = cell("a", "arc:acc", 512, [0, 0, 0])
    assert pass_at([*easy, *once, *hard]) == pass_at([*easy, *hard]), "a task that is asked once has no pass@2"


def test_median_tokens_are_those_of_thought_and_answer() -> None:
    thoughts = [row("a", "vt", 512, at, 1.0, tokens_thought=n, tokens_out=n + 3) for at, n in enumerate((8, 2, 90))]
    assert median_tokens(thoughts) == {"thought": 8, "answer": 3}
    assert median_tokens([row("a", "vt", 512, 0, 1.0, tokens_out=3)]) == {}, "nothing was thought"
    quiet = row("a", "cwe", 512, 0, 1.0, tokens_out=3)
    [found] = token_cells([*thoughts, quiet])
    assert found == {"benchmark": "ruler", "task": "vt", "length": 512, "thought": 8, "answer": 3}

"""LongBench v2: prompts, letters and cuts as written down from the reference.

Beside the code of THUDM/LongBench 2e00731 (`pred.py`), 60 questions gave equal prompts, 52 of 53 prompts lost the same
middle (the reference's other one was too long once decoded), and 44 answers had equal scores.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import BadInput
from jobs.evaluate import Evaluation, LongbenchV2Spec
from workers.benchmarks.items import Item, read_items
from workers.benchmarks.longbench_v2 import cut_middle
from workers.benchmarks.planned import PlannedSet, Reader
from workers.benchmarks.registry import planned_sets
from workers.benchmarks.scorers import score
from workers.benchmarks.texts.tokenizer import Tokenizer

SPEC = LongbenchV2Spec(lengths=(512, 2048), data="set", place="job.yaml:7")


def row(number: int, difficulty: str, words: int) -> dict[str, Any]:
    return {
        "_id": str(number),
        "domain": "Single-Document QA",
        "difficulty": difficulty,
        "question": f" Who is {{it}} in {number}? ",
        "choice_A": " a cat ",
        "choice_B": "a dog",
        "choice_C": "no $DOC$",
        "choice_D": "none",
        "answer": "B",
        "context": "So it goes. " * words,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two easy questions about one text of 20 sentences, a hard one about 200, an easy one about 5,000."""
    (tmp_path / "set").mkdir()
    rows = [row(0, "easy", 20), row(1, "easy", 20), row(2, "hard", 200), row(3, "easy", 5000)]
    (tmp_path / "set" / "data.json").write_text(json.dumps(rows))
    return tmp_path


def plan(tokenizer: Tokenizer, folder: Path, **changes: Any) -> list[PlannedSet]:
    asked = Evaluation(benchmarks={"longbench_v2": replace(SPEC, **changes)})
    return planned_sets(asked, tokenizer, 0, Reader(folder))


def items_of(sets: list[PlannedSet]) -> list[Item]:
    return [item for of in sets for item in read_items(of.build(range(of.count)))]


def test_questions_are_asked_in_the_words_of_the_reference_at_the_least_length(
    tokenizer: Tokenizer, folder: Path
) -> None:
    sets = plan(tokenizer, folder)
    assert [(of.task, of.length, of.count, of.too_long) for of in sets] == [("easy", 512, 2, 1), ("hard", 2048, 1, 0)]
    first, second, third = items_of(sets)
    assert first.text == (
        "Please read the following text and answer the question below.\n\n"
        f"<text>\n{' '.join(['So it goes.'] * 20)}\n</text>\n\n"
        "What is the correct answer to this question: Who is {it} in 0?\n"
        "Choices:\n(A) a cat\n(B) a dog\n(C) no $DOC$\n(D) none\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    assert first.answers == ("B",) and first.max_new_tokens == 128
    assert first.prefix == second.prefix and first.prefix.endswith("So it goes."), "a text is read once"
    assert first.haystack == second.haystack != third.haystack
    assert all(item.tokens == tokenizer.count_whole(item.text) <= item.length - 128 for item in (first, second, third))


def test_tasks_are_the_values_of_a_column_or_one(tokenizer: Tokenizer, folder: Path) -> None:
    assert {of.task for of in plan(tokenizer, folder, tasks="domain")} == {"Single-Document QA"}
    assert [(of.task, of.length, of.count) for of in plan(tokenizer, folder, tasks="all")] == [
        ("longbench_v2", 512, 2),
        ("longbench_v2", 2048, 1),
    ]
    assert [of.count for of in plan(tokenizer, folder, limit=1)] == [1, 1]


def test_a_text_loses_its_middle_only_if_the_job_says_so(tokenizer: Tokenizer, folder: Path) -> None:
    sets = plan(tokenizer, folder, truncate="middle")
    assert [(of.task, of.length, of.count, of.too_long) for of in sets] == [
        ("easy", 512, 2, 0),
        ("easy", 2048, 1, 0),
        ("hard", 2048, 1, 0),
    ]
    kept = items_of(sets)[2]
    assert 2048 - 8 <= kept.tokens + 128 <= 2048 and kept.tokens == tokenizer.count_whole(kept.text)
    assert kept.text.startswith("Please read the following text") and kept.text.endswith('answer here)".')
    assert items_of(sets)[0].text == items_of(plan(tokenizer, folder))[0].text, "one that fits is not cut"


def test_the_middle_is_that_of_the_tokens(tokenizer: Tokenizer) -> None:
    text = "".join(f" w{number}" for number in range(300))
    ids = tokenizer.encode(text)
    assert cut_middle(tokenizer, text, 101, ("", "")) == tokenizer.decode([*ids[:50], *ids[-51:]])
    assert cut_middle(tokenizer, text, len(ids), ("", "")) == text
    framed = cut_middle(tokenizer, text, 101, ("<user>", "<model>"))
    assert tokenizer.count_whole("<user>" + framed + "<model>") <= 101


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The correct answer is (B).", 1),
        ("So: **The correct answer is (B)**", 1),
        ("The correct answer is B", 1),
        ("The correct answer is A, no: The correct answer is (B)", 1),  # brackets come first
        ("The correct answer is (A) or (B)", 0),
        ("the correct answer is (B)", 0),
        ("The correct answer is (insert answer here)", 0),
        ("B", 0),
        ("", 0),
    ],
)
def test_the_letter_is_the_one_that_the_reference_reads(answer: str, expected: int) -> None:
    assert score("choice", answer, ("B",)) == expected


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"context": None}, "entry 1: context is empty; give the published file"),
        ({"answer": "b"}, "entry 1: the answer is 'b', not A, B, C or D"),
        (None, "job.yaml:7: set/data.json has no questions; give the published file"),
    ],
)
def test_a_question_that_no_answer_could_score_is_refused(
    tokenizer: Tokenizer, folder: Path, changes: dict[str, Any] | None, error: str
) -> None:
    rows = [] if changes is None else [row(0, "easy", 2) | changes]
    (folder / "set" / "data.json").write_text(json.dumps(rows))
    with pytest.raises(BadInput, match=re.escape(error)):
        plan(tokenizer, folder)


def test_a_file_without_a_column_is_refused(tokenizer: Tokenizer, folder: Path) -> None:
    (folder / "set" / "data.json").write_text('[{"context": "x", "difficulty": "easy"}]')
    with pytest.raises(BadInput, match=re.escape("set/data.json: entry 1: there is no column question; give the pub")):
        plan(tokenizer, folder)
    with pytest.raises(BadInput, match=r"job\.yaml:7: .*none\.json cannot be read"):
        plan(tokenizer, folder, data="none.json")

"""Needles without a word of their questions: our own tables, and needle sets in NoLiMa's format."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import BadInput
from jobs.evaluate import NolimaSpec, read_evaluation
from jobs.yaml_nodes import load_document
from workers.benchmarks.items import Item, read_items
from workers.benchmarks.nolima import TABLES, own_facts, plan_nolima, published_facts
from workers.benchmarks.planned import Reader
from workers.benchmarks.scorers import score
from workers.benchmarks.texts.haystacks import bundled_text
from workers.benchmarks.texts.tokenizer import Tokenizer

SMALL_WORDS = {"char", "who", "a", "of", "in", "the", "is", "an", "and", "out", "can", "from", "who's"}


def content_words(text: str) -> set[str]:
    """The words that carry meaning, by their first four letters."""
    return {word[:4] for word in re.findall(r"\w+", text.lower()) if word not in SMALL_WORDS}


FACTS = [fact for table in TABLES for _, fact in table.facts()]


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.needle)
def test_a_question_shares_no_word_with_its_needle(fact: Any) -> None:
    for _, question in fact.questions:
        assert content_words(fact.needle) and not content_words(fact.needle) & content_words(question)


def test_the_check_of_words_finds_a_shared_one() -> None:
    assert content_words("Nadia rents a flat near Granada.") & content_words("Who has a home in Granada?")


def items(tokenizer: Tokenizer, **keys: Any) -> list[Item]:
    keys = {"lengths": (512,), "depths": 3, "items": 2, "tasks": ("onehop",)} | keys
    sets = plan_nolima(NolimaSpec(**keys), tokenizer, 5, Reader(), 0)
    return [item for planned in sets for item in read_items(planned.build(range(planned.count)))]


@pytest.mark.parametrize("task", ["onehop", "twohop"])
def test_the_needle_lies_at_its_depth_and_answers_the_question(tokenizer: Tokenizer, task: str) -> None:
    for item in items(tokenizer, lengths=(2048,), tasks=(task,)):
        [name] = item.answers
        [fact] = [
            fact
            for fact in FACTS
            if dict(fact.questions)[task] in item.prompt and fact.needle.replace("{CHAR}", name) in item.prefix
        ]
        assert item.depths[0] == pytest.approx((item.index % 3) / 2, abs=0.1)
        assert item.prefix.count(name) == 1 and item.tokens == tokenizer.count_whole(item.text)
        assert 2048 - 32 - item.tokens < 20 and item.answer_prefix == "\nAnswer:"
        assert score(item.scorer, f" It is {name}.", item.answers) == 1.0
        assert score(item.scorer, name.lower(), item.answers) == 0.0, "as in NoLiMa, case counts"
        assert fact.names


def test_the_same_is_asked_at_every_length_and_questions_share_haystacks(tokenizer: Tokenizer) -> None:
    found = items(tokenizer, lengths=(512, 1024), questions=3)
    short, long = found[:6], found[6:]
    assert [(item.pair, item.answers) for item in short] == [(item.pair, item.answers) for item in long]
    assert len({item.haystack for item in short}) == 2 and len({item.prefix for item in short}) == 2
    assert all(len({item.answers for item in part}) == 3 for part in (short[:3], short[3:]))
    with pytest.raises(BadInput, match="40 questions share a haystack, and there are"):
        items(tokenizer, lengths=(4096,), depths=40, questions=40)


def test_every_set_has_a_digest_of_its_own(tokenizer: Tokenizer) -> None:
    sets = plan_nolima(NolimaSpec(lengths=(512, 1024)), tokenizer, 5, Reader(), 0)
    assert [planned.task for planned in sets] == ["onehop", "onehop", "twohop", "twohop"]
    assert len({planned.digest for planned in sets}) == 4


def test_what_the_text_mentions_is_not_asked(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = bundled_text() + "\n\nIn Granada, Nadia and Yusuf read Faust."
    facts = own_facts(text)
    assert len(facts) == len(own_facts(bundled_text())) - 1
    assert all("Alhambra" not in fact.needle and not {"Nadia", "Yusuf"} & {*fact.names} for fact in facts)
    (tmp_path / "all.txt").write_text(
        " ".join(cell for table in TABLES for cells, _ in table.facts() for cell in cells)
    )
    with pytest.raises(BadInput, match="mentions every name or place"):
        items(tokenizer, haystack=str(tmp_path / "all.txt"))


NEEDLE_SET = [
    {
        "id": "0001",
        "system_prompt": "",
        "task_template": "T: {haystack}\nQ: {question}!",
        "needle": "{CHAR} keeps {1} and {2}.",
        "questions": {"onehop": "Who has {2}s?", "direct": "Who keeps {1}?"},
        "character_set": ["Ann", "Bob"],
        "tests": {"T1": {"input_args": ["bees", "goat"]}, "T2": {"input_args": ["cats", "hens"]}},
    },
    {
        "id": "0002",
        "needle": "It rained on {1}.",
        "questions": {"onehop": "When was it wet?"},
        "tests": {"T1": {"input_args": ["Monday"], "gold_answers": ["Monday", "first day"]}},
    },
]


def test_a_needle_set_in_the_published_format_is_asked(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "set.json").write_text(json.dumps(NEEDLE_SET))
    found = items(tokenizer, items=8, data=str(tmp_path / "set.json"))
    asked = {(item.prompt.strip(), item.answers) for item in found}
    expected = {("Q: Who has goats?!", (name,)) for name in ("Ann", "Bob")}
    expected |= {("Q: Who has henss?!", (name,)) for name in ("Ann", "Bob")}
    assert {(prompt, answers) for prompt, answers in asked if prompt.startswith("Q:")} == expected
    assert all(item.prefix.startswith("T: ") for item in found if item.prompt.startswith("\nQ:"))
    assert ("Monday", "first day") in {answers for _, answers in asked}
    direct = items(tokenizer, data=str(tmp_path / "set.json"), tasks=("direct",), prompt="{haystack} ? {question}")
    assert all(item.prompt.startswith(" ? Who keeps ") for item in direct)
    assert items(tokenizer, data=str(tmp_path / "set.json"), questions=2, prompt="{haystack} ? {question}")
    with pytest.raises(BadInput, match="cannot share one; take `questions: 1`, or give one `prompt:`"):
        items(tokenizer, data=str(tmp_path / "set.json"), questions=2)
    with pytest.raises(BadInput, match="no task twohop; choose from onehop, direct"):
        items(tokenizer, data=str(tmp_path / "set.json"), tasks=("twohop",))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"character_set": []}, "has no answers"),
        ({"task_template": "{haystack}"}, "must have {haystack} once, and {question} after it"),
        ({"task_template": "{question} {haystack}"}, "must have {haystack} once, and {question} after it"),
        ({"tests": []}, "not a needle set of NoLiMa"),
        ({"tests": {}}, "the needle set has no test"),
        ({"character_set": ["Ann", None]}, "an answer that is not a text"),
        ({"distractors": {"onehop": "Cid keeps {1}."}}, "mergeyard hides no distractors"),
    ],
)
def test_a_broken_needle_set_is_refused(changes: dict[str, Any], error: str) -> None:
    with pytest.raises(BadInput) as caught:
        published_facts(json.dumps([{**NEEDLE_SET[0], **changes}]).encode(), "set.json")
    assert error in str(caught.value)


def test_a_prompt_without_its_places_is_refused() -> None:
    for prompt in ("{haystack}", "{question} {haystack}", "{haystack} {haystack} {question}"):
        with pytest.raises(BadInput, match=r"once, and \{question\} after it"):
            read_evaluation(load_document(f"nolima: {{lengths: [512], prompt: '{prompt}'}}", "job.yaml"))

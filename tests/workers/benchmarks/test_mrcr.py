"""MRCR: made conversations, OpenAI's as published, and the score of its card."""

from __future__ import annotations

import json
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import BadInput
from jobs.evaluate import MrcrSpec
from workers.benchmarks.generation import generation_of, messages_of
from workers.benchmarks.items import Item, read_items
from workers.benchmarks.mrcr import LAST_REQUEST, ordinal, plan_mrcr
from workers.benchmarks.planned import Reader
from workers.benchmarks.scorers import score
from workers.benchmarks.texts.chat_template import ChatTemplate
from workers.benchmarks.texts.filling import TooShort
from workers.benchmarks.texts.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def made(tokenizer: Tokenizer, count: int = 3, **keys: Any) -> list[list[Item]]:
    keys = {"lengths": (1024, 2048), "needles": (2,)} | keys
    sets = plan_mrcr(MrcrSpec(**keys), tokenizer, 7, Reader(), 0)
    return [read_items(planned.build(range(count))) for planned in sets]


def exchanges(item: Item) -> tuple[list[tuple[str, str]], str]:
    """(requests with their answers, the last request) of a plain item."""
    *turns, last = item.text.removesuffix("\n\nAssistant:").removeprefix("User: ").split("\n\nUser: ")
    return [(asked, said) for asked, _, said in (turn.partition("\n\nAssistant: ") for turn in turns)], last


@pytest.mark.parametrize("needles", [2, 4, 8])
def test_a_conversation_has_so_many_equal_requests_and_asks_for_one(tokenizer: Tokenizer, needles: int) -> None:
    [items] = made(tokenizer, lengths=(4096,), needles=(needles,))
    for item in items:
        turns, last = exchanges(item)
        code = item.scorer.removeprefix("after:")
        asked = next(piece for piece, _ in turns if piece.removeprefix("write a ") in last)
        answers = [said for piece, said in turns if piece == asked]
        assert len(answers) == len(set(answers)) == needles
        rank = next(n for n in range(needles) if ordinal(n + 1) in last)
        assert last == LAST_REQUEST.format(code=code, nth=ordinal(rank + 1), piece=asked.removeprefix("write a "))
        assert item.answers == (code + answers[rank],) and len(code) == 10
        assert item.tokens == tokenizer.count_whole(item.text)
        assert item.tokens + item.max_new_tokens <= 4096
        right = len(tokenizer.encode(item.answers[0]))
        assert right <= item.max_new_tokens <= 2 * right + 1
        assert 4096 - item.tokens - right < 400, "no other exchange fits"
        before = item.text.index(answers[rank])
        assert item.depths[0] == pytest.approx(before / len(item.text), abs=0.05)
        assert score(item.scorer, " " + item.answers[0], item.answers) == 1.0


def test_the_same_is_asked_at_every_length(tokenizer: Tokenizer) -> None:
    for short, long in zip(*made(tokenizer), strict=True):
        assert (short.answers, short.pair, short.haystack) == (long.answers, long.pair, long.haystack)
        assert {*exchanges(short)[0]} < {*exchanges(long)[0]}


def test_every_set_has_a_digest_of_its_own(tokenizer: Tokenizer) -> None:
    sets = plan_mrcr(MrcrSpec(lengths=(2048, 4096)), tokenizer, 7, Reader(), 0)
    assert len({planned.digest for planned in sets}) == len(sets) == 6


def test_questions_share_their_conversation(tokenizer: Tokenizer) -> None:
    [items] = made(tokenizer, 4, lengths=(2048,), needles=(4,), questions=2)
    first, second, third, _ = items
    assert first.prefix == second.prefix != third.prefix and first.prefix.endswith("\n\nUser: ")
    assert first.haystack == second.haystack != third.haystack
    assert first.answers != second.answers and first.pair != second.pair
    with pytest.raises(BadInput, match="take `questions: 2` or less"):
        made(tokenizer, questions=3)


def test_too_short_a_length_is_refused_with_one_that_fits(tokenizer: Tokenizer) -> None:
    [planned] = plan_mrcr(MrcrSpec(lengths=(512,), needles=(8,)), tokenizer, 7, Reader(), 0)
    with pytest.raises(TooShort) as caught:
        planned.check()
    [again] = plan_mrcr(MrcrSpec(lengths=(caught.value.args[2],), needles=(8,)), tokenizer, 7, Reader(), 0)
    again.check()


def test_in_a_chat_the_text_is_that_of_the_template(parents: Path) -> None:
    tokenizer = Tokenizer.from_folder(parents / "base")
    tokenizer.chat_template = TEMPLATE
    spec = MrcrSpec(lengths=(1024,), needles=(2,), chat=True, system="Be brief.")
    [planned] = plan_mrcr(spec, tokenizer, 7, Reader(), 0)
    [item] = read_items(planned.build(range(1)))
    messages = messages_of(item.text, "", planned.generation)
    said = [{"role": message.role, "content": message.content} for message in messages]
    assert [message["role"] for message in said][:3] == ["system", "user", "assistant"] and len(said) > 5
    with ChatTemplate(TEMPLATE, {}, "t") as template:
        assert item.text == template.render(said)
    assert item.bare and planned.generation == generation_of(spec, tokenizer, 7, worked_example=True)[1]


CODE = "aYooSG8CQg"
PUBLISHED = [
    {"role": "user", "content": "Here is an example."},
    {"role": "user", "content": "write a poem about tapirs"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "write a poem about tapirs"},
    {"role": "assistant", "content": "second"},
    {"role": "user", "content": f"Prepend {CODE} to the 2nd (1 indexed) poem about tapirs."},
]


def row(messages: list[dict[str, str]], needles: int = 2) -> dict[str, Any]:
    return {
        "prompt": json.dumps(messages),
        "answer": CODE + "second",
        "random_string_to_prepend": CODE,
        "n_needles": needles,
    }


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder like OpenAI's: two conversations of two needles, one of them long, and one of four."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    long = [{**PUBLISHED[0], "content": "word " * 400}, *PUBLISHED[1:]]
    for name, rows in (("2needle", [row(PUBLISHED), row(long)]), ("4needle", [row(PUBLISHED, 4)])):
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name / f"{name}_0.parquet")
    (tmp_path / "README.md").write_text("MRCR")
    return tmp_path


def test_published_conversations_are_asked_at_the_length_that_holds_them(tokenizer: Tokenizer, published: Path) -> None:
    spec = MrcrSpec(lengths=(128, 1024), needles=(2, 4), data=str(published))
    sets = plan_mrcr(spec, tokenizer, 0, Reader(), 0)
    assert [(planned.task, planned.length, planned.count) for planned in sets] == [
        ("2needle", 128, 1),
        ("2needle", 1024, 1),
        ("4needle", 128, 1),
    ]
    [item] = read_items(sets[0].build(range(1)))
    assert item.text == (
        "User: Here is an example.\n\nwrite a poem about tapirs\n\nAssistant: first\n\nUser: write a poem about tapirs"
        f"\n\nAssistant: second\n\nUser: {PUBLISHED[-1]['content']}\n\nAssistant:"
    )
    assert (item.answers, item.scorer) == ((CODE + "second",), f"after:{CODE}")
    assert item.depths[0] == pytest.approx(1.0)
    only = plan_mrcr(
        MrcrSpec(lengths=(128,), data=str(published / "4needle" / "4needle_0.parquet")), tokenizer, 0, Reader(), 0
    )
    assert [planned.task for planned in only] == ["4needle"]


def test_conversations_of_two_files_are_different_pairs(tokenizer: Tokenizer, published: Path) -> None:
    file = published / "2needle" / "2needle_0.parquet"
    (file.parent / "2needle_1.parquet").write_bytes(file.read_bytes())
    spec = MrcrSpec(lengths=(1024,), needles=(2,), data=str(published / "2needle"))
    [planned] = plan_mrcr(spec, tokenizer, 0, Reader(), 0)
    assert len({item.pair for item in read_items(planned.build(range(4)))}) == 4


def test_other_files_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"input": "x"}\n')
    good = row(PUBLISHED)
    for name, changed in (
        ("b", row(PUBLISHED[:-1])),
        ("c", good | {"prompt": "{"}),
        ("d", good | {"prompt": PUBLISHED}),
        ("e", good | {"answer": None}),
        ("f", good | {"answer": "second"}),
        ("g", good | {"random_string_to_prepend": ""}),
    ):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(changed) + "\n")
    for name, error in (
        ("a.jsonl", "a.jsonl:1: there is no column n_needles"),
        ("b.jsonl", "end with the user's"),
        ("c.jsonl", "c.jsonl:1: prompt is not a JSON list of messages"),
        ("d.jsonl", "d.jsonl:1: prompt is not a JSON list of messages"),
        ("e.jsonl", "e.jsonl:1: answer is empty"),
        ("f.jsonl", "f.jsonl:1: the answer does not begin with random_string_to_prepend"),
        ("g.jsonl", "g.jsonl:1: the answer does not begin with random_string_to_prepend"),
    ):
        with pytest.raises(BadInput) as caught:
            plan_mrcr(MrcrSpec(lengths=(128,), data=str(tmp_path / name)), tokenizer, 0, Reader(), 0)
        assert error in str(caught.value)
    with pytest.raises(BadInput, match="has no Parquet files"):
        plan_mrcr(MrcrSpec(lengths=(128,), data=str(tmp_path)), tokenizer, 0, Reader(), 0)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        # The function on the card of openai/mrcr, run on these answers: difflib's ratio is 2 · matches / characters.
        (f"{CODE}second", 1.0),
        (f"{CODE}first", SequenceMatcher(None, "first", "second").ratio()),
        (f"{CODE}sec", 2 * 3 / 9),
        ("second", 0.0),
        (f"Sure: {CODE}second", 0.0),
        (CODE, 0.0),
    ],
)
def test_scores_are_those_of_the_card(said: str, expected: float) -> None:
    assert score(f"after:{CODE}", said, [f"{CODE}second"]) == pytest.approx(expected)


def test_ordinals() -> None:
    assert [ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 22, 64)] == (
        ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd", "64th"]
    )

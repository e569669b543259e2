"""What stays the same: between runs, between lengths, between questions on one haystack."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from workers.benchmarks.needle import even_depths, needle_items
from workers.benchmarks.ruler.tasks import NIAH, TASKS, ruler_items
from workers.benchmarks.texts.draws import Draw
from workers.benchmarks.texts.tokenizer import Tokenizer

OFFLINE = [task for task in TASKS if task not in ("qa_1", "qa_2")] + ["qa_generated"]


def test_draws_are_the_same_on_every_machine() -> None:
    # the Mersenne Twister's random() is specified; these values were computed from its definition, not from Draw
    import hashlib
    import random

    source = random.Random(int.from_bytes(hashlib.sha256(b"needle\x1f7").digest()[:16], "big"))
    first, second = source.random(), source.random()
    draw = Draw("needle", 7)
    assert draw.number() == str(1_000_000 + int(first * 9_000_000))
    assert draw.fraction() == second


def test_draws_are_uniform() -> None:
    draw = Draw("uniform")
    counts = [0] * 10
    for _ in range(20_000):
        counts[draw.below(10)] += 1
    # chi-squared with 9 degrees of freedom: 27.9 is exceeded once in a thousand
    assert sum((count - 2000) ** 2 / 2000 for count in counts) < 27.9
    assert sorted(draw.shuffled(range(50))) == list(range(50))
    assert Draw("s").sample(range(100), 5) == Draw("s").sample(range(100), 60)[:5]


@pytest.mark.parametrize("task", OFFLINE)
def test_items_do_not_depend_on_which_others_are_built(tokenizer: Tokenizer, task: str) -> None:
    together = ruler_items(tokenizer, task, 4800, indices=range(4), seed=9, questions=2)
    alone = [ruler_items(tokenizer, task, 4800, indices=[index], seed=9, questions=2)[0] for index in (3, 1, 2, 0)]
    assert together == sorted(alone, key=lambda item: item.index)
    assert ruler_items(tokenizer, task, 4800, indices=[0], seed=10, questions=2)[0].text != together[0].text


def test_items_are_the_same_in_another_process(tokenizer: Tokenizer) -> None:
    script = (
        "import sys, hashlib; from workers.benchmarks.texts.tokenizer import Tokenizer; "
        "from workers.benchmarks.ruler.tasks import ruler_items; from workers.benchmarks.items import write_items; "
        "t = Tokenizer.from_folder(sys.argv[1]); "
        "i = [x for k in ('niah_multikey_1', 'qa_generated') for x in ruler_items(t, k, 1024, indices=[0, 1], seed=9)];"
        "print(hashlib.sha256(write_items(i)).hexdigest())"
    )
    folder = str(tokenizer.place).removesuffix("tokenizer.json")
    digests = {
        subprocess.run(
            [sys.executable, "-c", script, folder],
            check=True,
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": hash_seed},
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("task", OFFLINE)
def test_the_same_thing_is_asked_at_every_length(tokenizer: Tokenizer, task: str) -> None:
    short = ruler_items(tokenizer, task, 4800, indices=range(3), seed=9)
    long = ruler_items(tokenizer, task, 20_000, indices=range(3), seed=9)
    for one, other in zip(short, long, strict=True):
        assert (one.pair, one.haystack, one.answers) == (other.pair, other.haystack, other.answers)
        assert one.answer_prefix == other.answer_prefix
        assert one.tokens < other.tokens
        if task != "qa_generated":  # a document's place among few others is coarser
            assert one.depths == pytest.approx(other.depths, abs=0.05)
    assert len({item.pair for item in short}) == 3


@pytest.mark.parametrize("task", list(NIAH))
def test_questions_on_one_haystack_share_all_text_before_the_question(tokenizer: Tokenizer, task: str) -> None:
    items = ruler_items(tokenizer, task, 4096, indices=range(8), seed=9, questions=4)
    assert [item.index for item in items] == list(range(8))
    for group in (items[:4], items[4:]):
        assert len({item.prefix for item in group}) == 1
        assert len({item.haystack for item in group}) == 1
        assert len({item.pair for item in group}) == 4
        assert len({answer for item in group for answer in item.answers}) == 4 * len(group[0].answers)
        for item in group:
            assert item.prompt.startswith("\nWhat ")
            assert len(item.depths) == len(item.answers)
            keys = re.findall(r"for (.*) mentioned", item.prompt)[0].replace(", and ", ", ").split(", ")
            needles = [
                line for key in keys for line in re.findall(rf"for {re.escape(key)} is: ([0-9a-f-]+)\.", item.prefix)
            ]
            assert sorted(needles) == sorted(item.answers)
    assert items[0].haystack != items[4].haystack


@pytest.mark.parametrize("task", list(NIAH))
def test_depth_is_where_the_needle_is(tokenizer: Tokenizer, task: str) -> None:
    for item in ruler_items(tokenizer, task, 4096, indices=range(4), seed=9):
        context = item.prefix.split("\n", 1)[1]
        for depth, answer in zip(item.depths, item.answers, strict=True):
            end = context.index(f"is: {answer}.") + len(f"is: {answer}.")
            start = context.rindex("One of the special magic", 0, end)
            assert depth == start / (len(context) - (end - start))
            assert 0 <= depth <= 1


def test_needles_spread_over_the_whole_haystack(tokenizer: Tokenizer) -> None:
    depths = sorted(
        item.depths[0] for item in ruler_items(tokenizer, "niah_single_1", 2048, indices=range(200), seed=9)
    )
    # Kolmogorov–Smirnov against the uniform distribution: 1.63 / √200 = 0.115 at the 1 % level
    assert max(abs((rank + 1) / 200 - depth) for rank, depth in enumerate(depths)) < 0.115


@pytest.mark.parametrize("haystack", ["essay", "noise"])
@pytest.mark.parametrize("questions", [1, 4, 11])
def test_needle_grid_lies_at_its_depths(tokenizer: Tokenizer, haystack: str, questions: int) -> None:
    depths = even_depths(11)
    items = needle_items(
        tokenizer, 8192, depths=depths, indices=range(22), seed=9, haystack=haystack, questions=questions
    )
    assert [item.index for item in items] == list(range(22))
    for item in items:
        # half a sentence of the text, half a line of noise, and the other needles in between
        assert item.depths[0] == pytest.approx(depths[item.index % 11], abs=0.012 if questions == 1 else 0.03)
    assert len({item.haystack for item in items}) == 2 * -(-11 // questions)
    assert len({item.prefix for item in items}) == 2 * -(-11 // questions)
    ends = [item for item in items if item.index % 11 in (0, 10)]
    assert {item.depths[0] for item in ends} == {0.0, 1.0}


def test_needle_grid_asks_the_same_at_every_length(tokenizer: Tokenizer) -> None:
    short, long = (
        needle_items(tokenizer, length, depths=even_depths(5), indices=range(5), seed=9, questions=5)
        for length in (2048, 16_384)
    )
    assert [(item.pair, item.answers) for item in short] == [(item.pair, item.answers) for item in long]


def test_one_depth_is_the_middle_and_others_reach_both_ends() -> None:
    assert even_depths(1) == (0.5,)
    assert even_depths(5) == (0.0, 0.25, 0.5, 0.75, 1.0)

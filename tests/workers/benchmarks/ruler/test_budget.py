from __future__ import annotations

import numpy as np
import pytest
import tokenizers

from jobs.errors import BadInput
from workers.benchmarks.items import Item
from workers.benchmarks.needle import needle_items
from workers.benchmarks.ruler.tasks import TASKS, ruler_items
from workers.benchmarks.texts.filling import TooShort, most_units
from workers.benchmarks.texts.haystacks import Essay, bundled_essay
from workers.benchmarks.texts.tokenizer import Tokenizer

OFFLINE = [task for task in TASKS if task not in ("qa_1", "qa_2")] + ["qa_generated"]
# what one more unit may cost at most: a line of noise, a pair of uuids, a document, 3 common words, a few coded words
UNIT = {"niah_multikey_3": 90, "qa_generated": 160, "fwe": 64, "cwe": 48}


def proven(tokenizer: Tokenizer, item: Item, length: int, slack: int) -> None:
    assert item.tokens == len(tokenizer.encode(item.text))
    assert length - slack < item.tokens + item.max_new_tokens <= length


@pytest.mark.parametrize("task", OFFLINE)
@pytest.mark.parametrize("length", [256, 512, 1024, 4096])
def test_prompts_fill_the_length_and_never_exceed_it(tokenizer: Tokenizer, task: str, length: int) -> None:
    if task == "cwe":  # its sixty entries, three hundred from 4,096 on, are long in a tiny vocabulary
        length = {256: 512, 512: 2048, 1024: 8192, 4096: 32_768}[length]
    try:
        items = ruler_items(tokenizer, task, length, indices=range(4), seed=7, max_new_tokens=16)
    except TooShort as error:
        assert length <= 512
        length = int(error.args[2])
        items = ruler_items(tokenizer, task, length, indices=range(4), seed=7, max_new_tokens=16)
        with pytest.raises(TooShort):
            ruler_items(tokenizer, task, length - 1, indices=range(4), seed=7, max_new_tokens=16)
    for item in items:
        slack = length if length < 1024 else UNIT.get(task, 32)
        proven(tokenizer, item, length, slack)


@pytest.mark.parametrize(("task", "length"), [*((task, 32_768) for task in OFFLINE), ("niah_multikey_1", 131_072)])
def test_long_prompts_fill_the_length_too(tokenizer: Tokenizer, task: str, length: int) -> None:
    [item] = ruler_items(tokenizer, task, length, indices=[0], seed=7)
    proven(tokenizer, item, length, 2 * UNIT.get(task, 32))


@pytest.mark.heavy
def test_a_million_tokens_end_as_well(tokenizer: Tokenizer) -> None:
    [item] = ruler_items(tokenizer, "niah_single_2", 1_048_576, indices=[0], seed=7)
    proven(tokenizer, item, 1_048_576, 64)


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """A tokenizer of another family: blanks belong to words, the first word gets one, a mark begins the text."""
    trained = tokenizers.Tokenizer(tokenizers.models.Unigram())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=600, special_tokens=["<s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    text = bundled_essay().hide(
        8000, ["0 1 2 3 4 5 6 7 8 9 abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ"], [0]
    )
    trained.train_from_iterator([text], trainer)
    trained.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return Tokenizer(trained.to_str().encode())


@pytest.mark.parametrize("task", OFFLINE)
def test_budget_holds_for_a_tokenizer_that_glues_blanks_to_words(sentencepiece: Tokenizer, task: str) -> None:
    for item in ruler_items(sentencepiece, task, 8192, indices=range(2), seed=7):
        proven(sentencepiece, item, 8192, 4 * UNIT.get(task, 48))
        assert sentencepiece.encode(item.text)[0] == 0


def test_what_does_not_fit_is_named_with_the_length_that_would() -> None:
    error = TooShort("vt", 128, 488)
    assert isinstance(error, BadInput)
    assert str(error) == "vt: no prompt fits in 128 tokens; the smallest length that does is 488"


def test_every_question_of_a_haystack_fits(tokenizer: Tokenizer) -> None:
    items = ruler_items(tokenizer, "niah_multiquery", 2048, indices=range(16), seed=7, questions=8)
    for item in items:
        proven(tokenizer, item, 2048, 64)
    assert max(item.tokens for item in items) > 2048 - 128 - 16


def test_a_short_text_is_repeated_until_it_fills_the_length(tokenizer: Tokenizer) -> None:
    essay = Essay("One sentence here. Another one there.\n\nA second paragraph, of one sentence.")
    [item] = ruler_items(tokenizer, "niah_single_2", 1024, indices=[0], seed=7, essay=essay)
    proven(tokenizer, item, 1024, 8)
    assert item.prefix.count("A second paragraph, of one sentence.") > 10


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(BadInput, match="the text is empty"):
        Essay(" \n\n ")


@pytest.mark.parametrize("haystack", ["essay", "noise"])
def test_needle_grid_keeps_the_budget(tokenizer: Tokenizer, haystack: str) -> None:
    items = needle_items(tokenizer, 700, depths=(0.0, 0.5, 1.0), indices=range(6), seed=7, haystack=haystack)
    for item in items:
        proven(tokenizer, item, 700, 40)


@pytest.mark.parametrize("slope", [1.0, 0.8, 1.3])
@pytest.mark.parametrize("offset", [-20, 0, 20])
def test_the_search_leaves_less_than_a_unit_even_when_the_forecast_is_off(slope: float, offset: int) -> None:
    exact = np.cumsum([100, *(3 + (number * 7) % 5 for number in range(400))])
    forecast = (exact * slope).astype(np.int64) + offset
    for budget in (99, 100, 101, 350, 351, 1000, 1500):
        probes: list[int] = []

        def count(units: int, probes: list[int] = probes) -> int:
            probes.append(units)
            return int(exact[units])

        found, tokens = most_units(count, forecast, budget)
        most = int(np.searchsorted(exact, budget, side="right")) - 1
        assert found == most if slope == 1 or most < 0 else tokens == exact[found] <= budget
        assert found < 0 or budget - tokens < max(forecast[found + 1] - forecast[found], exact[found + 1] - tokens)
        assert len(probes) <= 8

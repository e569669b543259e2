"""Counting by pieces is counting: the same number as one encoding of the whole, or none."""

from __future__ import annotations

import random

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers

from workers.benchmarks.ruler.tasks import ruler_items
from workers.benchmarks.texts.haystacks import bundled_text
from workers.benchmarks.texts.pieces import Pieces
from workers.benchmarks.texts.tokenizer import Tokenizer

LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def trained(cut: pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = cut
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([bundled_text()[:60_000]], trainer)
    return made


@pytest.fixture(scope="module")
def made() -> dict[str, tokenizers.Tokenizer]:
    """Tokenizers that cut as those of GPT-2 and of Llama 3 do."""
    split = pre_tokenizers.Split(Regex(LLAMA), "isolated")
    return {
        "gpt2": trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
        "llama3": trained(pre_tokenizers.Sequence([split, BYTES])),
    }


FRAGMENTS = (
    "The grass is green. ",
    "The sky is blue.",
    "\n",
    "\n\n",
    "  \n ",
    " ",
    "\t",
    "it's 1234567 of 12.\n",
    "It'S",
    "“Größe”. Ünder",
    "e\u0301. E\u0301.\nE",
    "。数字",
    "\u00a0\nA",
    "...\r\nB",
    "\r",
    "Dr. Who?! ",
    "🙂.\nZ",
)


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "qwen2"])
def test_the_sum_of_the_pieces_is_the_count_of_the_whole(
    made: dict[str, tokenizers.Tokenizer], tokenizer: Tokenizer, kind: str
) -> None:
    peer = tokenizers.Tokenizer.from_str(made[kind].to_str()) if kind in made else tokenizer._tokenizer
    pieces, source, counted = Pieces(peer), random.Random(3), 0
    for _ in range(300):
        block = "".join(source.choices(FRAGMENTS, k=8))
        text = block * source.randrange(20, 40) + "".join(source.choices(FRAGMENTS, k=4))
        tokens = [pieces.count(text) for _ in range(3)][-1]  # what comes again is counted by its pieces
        counted += tokens is not None
        assert tokens in (None, len(peer.encode(text)))
    assert counted > 30


def test_items_after_the_first_are_not_encoded_whole(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Tokenizer(tokenizer._tokenizer.to_str().encode())
    whole: list[int] = []
    count_whole = fresh.count_whole
    monkeypatch.setattr(fresh, "count_whole", lambda text: whole.append(len(text)) or count_whole(text))
    for task in ("niah_single_1", "niah_single_2", "vt"):
        whole.clear()
        items = ruler_items(fresh, task, 4096, indices=range(40), seed=7)
        assert len([length for length in whole if length > 5000]) <= 12
        assert [item.tokens for item in items] == [len(fresh.encode(item.text)) for item in items]


def test_a_count_that_is_found_wrong_is_not_used(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Tokenizer(tokenizer._tokenizer.to_str().encode())
    count = Pieces.count
    monkeypatch.setattr(Pieces, "count", lambda self, text: (found := count(self, text)) and found - 2)
    for item in ruler_items(fresh, "niah_single_1", 2048, indices=range(12), seed=7):
        assert item.tokens == len(fresh.encode(item.text)) <= 2048 - item.max_new_tokens


def with_added(made: dict[str, tokenizers.Tokenizer]) -> tokenizers.Tokenizer:
    changed = tokenizers.Tokenizer.from_str(made["gpt2"].to_str())
    changed.add_tokens([AddedToken("<mask>", lstrip=True)])
    return changed


def with_lower_case(made: dict[str, tokenizers.Tokenizer]) -> tokenizers.Tokenizer:
    changed = tokenizers.Tokenizer.from_str(made["gpt2"].to_str())
    changed.normalizer = normalizers.Lowercase()
    return changed


def that_looks_back(made: dict[str, tokenizers.Tokenizer]) -> tokenizers.Tokenizer:
    changed = tokenizers.Tokenizer.from_str(made["gpt2"].to_str())
    changed.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"(?<=a)b|\p{L}+|\s+|."), "isolated"), BYTES]
    )
    return changed


def of_another_make(_: dict[str, tokenizers.Tokenizer]) -> tokenizers.Tokenizer:
    changed = tokenizers.Tokenizer(models.Unigram())
    changed.pre_tokenizer = pre_tokenizers.Metaspace()
    return changed


@pytest.mark.parametrize("change", [with_added, with_lower_case, that_looks_back, of_another_make])
def test_a_tokenizer_that_may_see_across_a_seam_is_asked_for_the_whole(
    made: dict[str, tokenizers.Tokenizer], change
) -> None:
    pieces, text = Pieces(change(made)), "The grass is green.\n" * 100
    assert [pieces.count(text) for _ in range(3)] == [None] * 3

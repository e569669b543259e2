"""RULER's two counting tasks: the ten most common words of a list, the three most frequent coded words of a text."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from workers.benchmarks.items import Asked, Item
from workers.benchmarks.texts.draws import Draw, words
from workers.benchmarks.texts.filling import fill
from workers.benchmarks.texts.tokenizer import Tokenizer

CWE_QUESTION = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
CWE_ANSWER_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
COMMON = 10

FWE_QUESTION = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
FWE_ANSWER_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
CODED_LETTERS = 6
FEWEST_CODED = 27  # the least number of words whose fourth rank appears and whose fifth does not
ZETA_2 = math.pi**2 / 6


def numbered(entries: Sequence[str]) -> str:
    """`1. word 2. word …`"""
    return " ".join(f"{number}. {word}" for number, word in enumerate(entries, start=1))


def word_list(order: Sequence[str], count: int, common: int, uncommon: int, draw: Draw) -> list[str]:
    """The first ten words of the order `common` times each, the next ones `uncommon` times, all shuffled."""
    return draw.shuffled([*list(order[:COMMON]) * common, *list(order[COMMON:count]) * uncommon])


def word_order(draw: Draw, count: int) -> list[str]:
    """At least `count` different words: English ones in random order, then adjective-noun pairs."""
    order = draw.shuffled(_all_words())
    known = set(order)
    while len(order) < count:
        if (word := draw.word()) not in known:
            known.add(word)
            order.append(word)
    return order


def cwe_item(tokenizer: Tokenizer, asked: Asked, index: int) -> Item:
    """One item, after one worked example, in a chat a turn of its own; `TooShort` if it cannot fit in the length."""
    identity, length = ("cwe", asked.task, asked.seed, index), asked.length
    size, often, seldom = (20, 3, 1) if length < 4096 else (40, 10, 3)
    draw = Draw(*identity, "example")
    example_order = draw.sample(_all_words(), size)
    example = CWE_QUESTION.format(context=numbered(word_list(example_order, size, often, seldom, draw)))
    to_answer, to_question = asked.turns
    answered = to_answer + CWE_ANSWER_PREFIX + " " + numbered(example_order[:COMMON])
    head = asked.frame[0] + example + answered + to_question
    begun = asked.beginning(CWE_ANSWER_PREFIX)

    often, seldom = (6, 1) if length < 4096 else (30, 3)
    order = word_order(Draw(*identity, "words"), COMMON + length // seldom)

    def text(units: int) -> str:
        entries = word_list(order, COMMON + units, often, seldom, Draw(*identity, "list", units))
        return head + CWE_QUESTION.format(context=numbered(entries)) + asked.frame[1]

    def forecast(budget: int) -> NDArray[np.int64]:
        first = COMMON * often
        fewest = _number_tokens(tokenizer, 1)  # no entry is shorter than the shortest number
        most = min(len(order) - COMMON, budget // (seldom * max(1, int(fewest[0]))) + 1)
        entries = first + seldom * np.arange(most + 1)
        blocks = range(1, int(entries[-1]) // 1024 + 2)
        numbers = np.concatenate([[0], *(_number_tokens(tokenizer, block) for block in blocks)]).cumsum()
        known = _word_tokens(tokenizer)
        tokens = [known.get(word) or tokenizer.count(" " + word) for word in order[COMMON : COMMON + most]]
        total = np.concatenate([[0], np.cumsum(tokens)]).astype(np.int64) * seldom
        return total + numbers[entries] - numbers[first]

    units, tokens = fill(tokenizer, asked, lambda units: text(units) + begun, forecast)
    return asked.item(index, text(units), begun, answers=order[:COMMON], tokens=tokens)


@lru_cache(maxsize=1)
def _all_words() -> tuple[str, ...]:
    return tuple(sorted({*words("noun"), *words("adjective"), *words("verb")}))


@lru_cache(maxsize=2)
def _word_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    counts = tokenizer.count_each([" " + word for word in _all_words()], special_tokens=False)
    return dict(zip(_all_words(), counts, strict=True))


@lru_cache(maxsize=4096)
def _number_tokens(tokenizer: Tokenizer, block: int) -> NDArray[np.int64]:
    """Tokens of ` n.` for the 1024 numbers of a block, the first block beginning at 1."""
    first = (block - 1) * 1024 + 1
    counts = tokenizer.count_each([f" {number}." for number in range(first, first + 1024)], special_tokens=False)
    return np.asarray(counts, dtype=np.int64)


def coded_counts(count: int, vocabulary: int) -> list[int]:
    """How often each rank appears among `count` words under Zipf's law with exponent 2, rounded down."""
    return [int(count * rank**-2.0 / ZETA_2) for rank in range(1, vocabulary + 1)]


def fwe_item(tokenizer: Tokenizer, asked: Asked, index: int) -> Item:
    """One item; rank 1 is dots, and ranks 2 to 4 are asked for. `TooShort` if it cannot fit in the length."""
    identity = ("fwe", asked.task, asked.seed, index)
    draw = Draw(*identity, "vocabulary")
    found: dict[str, None] = {"...": None}
    while len(found) < max(5, asked.budget // 50):
        found[draw.letters(string.ascii_lowercase, CODED_LETTERS)] = None
    vocabulary = list(found)

    def text(units: int) -> str:
        count = untied(FEWEST_CODED + units, len(vocabulary))
        counts = coded_counts(count, len(vocabulary))
        coded = [word for word, times in zip(vocabulary, counts, strict=True) for _ in range(times)]
        context = " ".join(Draw(*identity, "list", count).shuffled(coded))
        return asked.frame[0] + FWE_QUESTION.format(context=context) + asked.frame[1]

    def forecast(budget: int) -> NDArray[np.int64]:
        return _coded_tokens(tokenizer, vocabulary, budget)

    begun = asked.beginning(FWE_ANSWER_PREFIX)
    units, tokens = fill(tokenizer, asked, lambda units: text(units) + begun, forecast)
    return asked.item(index, text(units), begun, answers=vocabulary[1:4], tokens=tokens)


def untied(count: int, vocabulary: int) -> int:
    """The largest number of words up to `count` whose fourth rank is more frequent than its fifth."""
    while (counts := coded_counts(count, min(vocabulary, 5)))[3] <= counts[4]:
        count -= 1
    return count


def _coded_tokens(tokenizer: Tokenizer, vocabulary: Sequence[str], budget: int) -> NDArray[np.int64]:
    """Tokens that each further word beyond the fewest adds: rank k gains one at every multiple of k² · ζ(2)."""
    most = FEWEST_CODED + budget + 1
    reached = [word for word, times in zip(vocabulary, coded_counts(most, len(vocabulary)), strict=True) if times]
    tokens = tokenizer.count_each([" " + word for word in reached], special_tokens=False)
    gains = np.zeros(most + 1, dtype=np.int64)
    for rank, cost in enumerate(tokens, start=1):
        every = rank**2 * ZETA_2
        gains[np.ceil(np.arange(1, int(most / every) + 1) * every).astype(np.int64)] += cost
    totals = np.cumsum(gains)[FEWEST_CODED:]
    return totals - totals[0]

"""The special tokens around a prompt: one rule for every benchmark and every engine.

A plain text gets the tokens that its tokenizer puts in front of a text, unless it begins with them. A bare text, which
comes out of a chat template, has its special tokens written out and gets no others. Neither gets tokens at its end:
a model that has read an end token does not answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile


def tokens_in_front(ids: Sequence[int], added: Sequence[int]) -> list[int]:
    """The tokens in front of a text: `added` is 1 for each of its token ids that the tokenizer added, else 0."""
    return [token for token, _ in takewhile(lambda pair: pair[1], zip(ids, added, strict=True))]


def prompt_ids(ids: Sequence[int], front: Sequence[int], *, bare: bool) -> list[int]:
    """The token ids of a prompt from those of its text alone."""
    return [*ids] if bare or [*ids[: len(front)]] == [*front] else [*front, *ids]

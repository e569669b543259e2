"""Token counts of texts that have much in common, each sentence and line of them encoded once.

Most tokenizers cut a text into words by one regular expression, from left to right, and encode each word by itself. The
expression looks ahead by a character, never back: where a word ends, what follows is cut as if it began the text. So if
two words part at a seam, a text has as many tokens as what stands on its two sides. A piece is encoded together with
the beginning of what follows, and counts only if words are seen to part there; for a tokenizer of any other make, or a
seam that is none, there is no count from here, and the text is encoded whole.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers


LINE = re.compile(r"\n(?=[A-Za-z])")
SENTENCE = re.compile(r"\.(?= [A-Z])")
LONGEST_LINES = 1000
"""Characters a line beyond which a text is taken apart by sentences."""
AHEAD = 24
"""Characters of what follows that a piece is encoded with: the word that follows and, mostly, another."""
SHORTEST = 1000
"""Characters below which a text is encoded whole."""
MOST_KNOWN = 1 << 17


class Pieces:
    """The counts of pieces that one tokenizer was given more than once."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, int | None] = {}
        self._seen: set[str] = set()
        self.usable = _works_by_words(tokenizer)

    def count(self, text: str) -> int | None:
        """How many tokens the text has, special tokens left out; None if only encoding it whole can tell."""
        if not self.usable or len(text) < SHORTEST:
            return None
        seam = LINE if text.count("\n") * LONGEST_LINES > len(text) else SENTENCE
        cuts = [0, *(match.end() for match in seam.finditer(text)), len(text)]
        pieces = [(text[begin : end + AHEAD], end - begin) for begin, end in pairwise(cuts)]
        if len(self._seen) + len(self._known) > MOST_KNOWN:
            self._seen.clear()
            self._known.clear()
        unknown = dict(piece for piece in pieces if piece[0] not in self._known)
        if sum(unknown.values()) > len(text) // 4:  # a new text: its pieces are worth a count if they come again
            again = {piece: length for piece, length in unknown.items() if piece in self._seen}
            self._seen.update(unknown)
        else:
            again = unknown
        self._known.update({piece: self._tokens(piece, length) for piece, length in again.items()})
        counts = [self._known.get(piece) for piece, _ in pieces]
        return None if None in counts else sum(tokens for tokens in counts if tokens is not None)

    def _tokens(self, piece: str, length: int) -> int | None:
        """Tokens of the first `length` characters, with what follows; None if words do not part there."""
        found = self._tokenizer.encode(piece, add_special_tokens=False)
        tokens = sum(begin < length for begin, _ in found.offsets)
        if tokens == 0 or found.offsets[tokens - 1][1] > length:
            return None
        words = [*found.word_ids, None]
        return tokens if words[tokens - 1] != words[tokens] else None


def _works_by_words(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether words are cut from left to right by an expression that never looks back, and encoded one by one."""
    from tokenizers import models, normalizers

    if not isinstance(tokenizer.model, models.BPE) or tokenizer.model.dropout is not None:
        return False
    if not (tokenizer.normalizer is None or isinstance(tokenizer.normalizer, normalizers.NFC)):
        return False
    for token in tokenizer.get_added_tokens_decoder().values():
        if token.lstrip or token.rstrip or token.single_word or re.search(r"\n\S|\.\s", token.content):
            return False
    if tokenizer.pre_tokenizer is None:
        return False
    told: dict[str, Any] = json.loads(tokenizer.pre_tokenizer.__getstate__())
    match told:
        case {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}:
            return True
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
            ],
        }:
            return not re.search(r"\(\?<[=!]|\\[bBAGK]|(?<!\[)\^", pattern)
        case _:
            return False

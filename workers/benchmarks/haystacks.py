"""What needles are hidden in: lines (noise, or needles nobody asks for) and running text.

A haystack of u units is a text that only grows with u. It takes needles at given fractions of itself, and forecasts
its length in tokens, each distinct unit encoded once.
"""

from __future__ import annotations

import hashlib
import lzma
import re
import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from jobs.errors import BadInput
from workers.benchmarks.budget import running_total
from workers.benchmarks.draws import Draw
from workers.benchmarks.tokens import Tokenizer

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

# A sentence ends at . ! or ?, perhaps closed by a quote or bracket, before a space and something that may begin one.
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*(?= +[\"'“‘(\[]?[A-Z0-9])")
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|cf|vs|Mr|Mrs|Ms|Dr|St|No|Fig|[A-Z]))\.$")


_GROWING = threading.Lock()  # an essay is shared by the threads that build items


class Haystack(Protocol):
    """A text in units, into which needles are put."""

    def forecast(self, tokenizer: Tokenizer, budget: int) -> NDArray[np.int64]:
        """Tokens of 0, 1, 2 … units, until more than `budget` tokens are reached."""
        ...

    def hide(self, units: int, needles: Sequence[str], places: Sequence[float]) -> str:
        """The first `units` units with each needle at its place, a fraction of the text; equal places keep order."""
        ...

    def hide_nearest(self, units: int, needles: Sequence[str], places: Sequence[float]) -> str:
        """The same, each needle at the seam nearest to its fraction of the text's characters."""
        ...


class Lines:
    """Lines joined by newlines; `line(i)` is the i-th, and needles are lines of their own."""

    def __init__(self, line: Callable[[int], str]) -> None:
        self._line = line
        self._lines: list[str] = []

    def _first(self, units: int) -> list[str]:
        self._lines.extend(self._line(number) for number in range(len(self._lines), units))
        return self._lines[:units]

    def forecast(self, tokenizer: Tokenizer, budget: int) -> NDArray[np.int64]:
        """Tokens of 0, 1, 2 … lines, each with its newline."""
        return running_total(tokenizer, lambda first, last: [line + "\n" for line in self._first(last)[first:]], budget)

    def hide(self, units: int, needles: Sequence[str], places: Sequence[float]) -> str:
        """The lines, each needle before line ⌊place · units⌋."""
        return self._insert(units, [int(place * units) for place in places], needles)

    def hide_nearest(self, units: int, needles: Sequence[str], places: Sequence[float]) -> str:
        """The lines, each needle between the two whose seam is nearest to its place."""
        lines = self._first(units)
        seams = np.cumsum([0, *(len(line) + 1 for line in lines)])
        return self._insert(units, [_nearest(seams, place * seams[-1]) for place in places], needles)

    def _insert(self, units: int, numbers: Sequence[int], needles: Sequence[str]) -> str:
        lines = list(self._first(units))
        ordered = sorted(zip(numbers, needles, strict=True), key=_number)
        for number, needle in reversed(ordered):
            lines.insert(number, needle)
        return "\n".join(lines)


class Noise(Lines):
    """The same five short sentences, line after line."""

    def __init__(self) -> None:
        super().__init__(lambda _: NOISE)

    def forecast(self, tokenizer: Tokenizer, budget: int) -> NDArray[np.int64]:
        """Tokens of 0, 1, 2 … lines: they are all the same."""
        [tokens] = tokenizer.count_each([NOISE + "\n"], special_tokens=False)
        return np.arange(budget // tokens + 2, dtype=np.int64) * tokens


class Essay:
    """Running text in words; needles go between sentences. Longer than the text, its paragraphs come again, shuffled.

    The text is the same for every item, as in RULER: what changes are the needles and where they are.
    """

    def __init__(self, text: str, *, place: str = "haystack") -> None:
        self._paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
        self._paragraphs = [paragraph for paragraph in self._paragraphs if paragraph]
        if not self._paragraphs:
            raise BadInput(f"{place}: the text is empty; give some prose")
        self.digest = hashlib.sha256("\n\n".join(self._paragraphs).encode()).hexdigest()
        self._rounds: list[str] = []
        self._text = ""
        self._word_ends = np.zeros(0, dtype=np.int64)
        self._sentence_starts: list[int] = []
        self._measured: dict[str, list[NDArray[np.int64]]] = {}

    def _round(self, number: int) -> str:
        """All paragraphs once more: in their own order first, then in another one each time."""
        if number == len(self._rounds):
            order = Draw("essay", self.digest, number).shuffled(self._paragraphs) if number else self._paragraphs
            text = ("" if number == 0 else " ") + " ".join(order)
            begin = len(self._text)
            self._rounds.append(text)
            self._text += text
            ends = np.asarray([begin + match.end() for match in re.finditer(r"\S+", text)], dtype=np.int64)
            self._word_ends = np.concatenate([self._word_ends, ends])
            self._sentence_starts += [begin + start for start in sentence_starts(text)]
        return self._rounds[number]

    def forecast(self, tokenizer: Tokenizer, budget: int) -> NDArray[np.int64]:
        """Tokens of 0, 1, 2 … words, read off one encoding of each round of the text."""
        with _GROWING:
            measured = self._measured.setdefault(tokenizer.digest, [np.zeros(1, dtype=np.int64)])
            while measured[-1][-1] <= budget:
                text = self._round(len(measured) - 1)
                ends = np.asarray([match.end() for match in re.finditer(r"\S+", text)], dtype=np.int64)
                within = np.searchsorted(tokenizer.token_ends(text), ends, side="right")
                measured.append(measured[-1][-1] + within)
            return np.concatenate(measured)

    def hide(self, units: int, needles: Sequence[str], places: Sequence[float]) -> str:
        """The first `units` words, each needle before sentence ⌊place · sentences⌋; place 1 is the end.

        As in RULER, a needle with no text before or after it has the blank that would have parted them.
        """
        end, sentences = self._end(units)
        seams = [*self._sentence_starts[:sentences], end]
        return " ".join(self._pieces(end, [seams[int(place * sentences)] for place in places], needles))

    def hide_nearest(self, units: int, needles: Sequence[str], places: Sequence[float]) -> str:
        """The first `units` words, each needle at the end of a sentence, nearest to its place."""
        end, sentences = self._end(units)
        seams = np.asarray([*self._sentence_starts[:sentences], end])
        pieces = self._pieces(end, [int(seams[_nearest(seams, place * end)]) for place in places], needles)
        return " ".join(piece for piece in pieces if piece)

    def _end(self, units: int) -> tuple[int, int]:
        """Where the first `units` words end, in characters, and how many sentences begin before."""
        with _GROWING:
            while len(self._word_ends) < units:
                self._round(len(self._rounds))
        end = int(self._word_ends[units - 1]) if units else 0
        return end, bisect_left(self._sentence_starts, end)

    def _pieces(self, end: int, cuts: Sequence[int], needles: Sequence[str]) -> list[str]:
        """Text, needle, text, needle, …, text; a text is empty where nothing lies between."""
        pieces: list[str] = []
        last = 0
        for cut, needle in sorted(zip(cuts, needles, strict=True), key=_number):
            pieces += [self._text[last:cut].rstrip(), needle]
            last = cut
        return [*pieces, self._text[last:end]]


def _nearest(seams: NDArray[np.int64], wanted: float) -> int:
    return int(np.argmin(np.abs(seams - wanted)))


def _number(placed: tuple[int, str]) -> int:
    return placed[0]


def sentence_starts(text: str) -> list[int]:
    """The character at which each sentence of a one-line text begins, the first at 0."""
    starts = [len(text) - len(text.lstrip())]
    for match in _SENTENCE_END.finditer(text):
        if _ABBREVIATION.search(text, starts[-1], match.end()):
            continue
        begin = match.end()
        while text[begin] == " ":
            begin += 1
        starts.append(begin)
    return starts


@lru_cache(maxsize=1)
def bundled_essay() -> Essay:
    """The bundled text as a haystack."""
    return Essay(bundled_text(), place="bundled essay")


@lru_cache(maxsize=1)
def bundled_text() -> str:
    """The prose that ships with mergeyard: chapters of the Python language reference (PSF licence)."""
    data = (Path(__file__).parent / "data" / "python_reference.txt.xz").read_bytes()
    return lzma.decompress(data).decode("utf-8")

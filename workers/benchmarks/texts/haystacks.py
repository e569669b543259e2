"""Haystacks: lines (noise, or needles that are not asked for) and running text.

A haystack of u units is a text that only grows with u. It takes needles at given fractions of itself, and forecasts
its length in tokens, each distinct unit encoded once.
"""

from __future__ import annotations

import hashlib
import lzma
import re
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from jobs.errors import BadInput
from workers.benchmarks.texts.draws import Draw
from workers.benchmarks.texts.filling import running_total
from workers.benchmarks.texts.tokenizer import Tokenizer

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

# A sentence ends at . ! or ?, perhaps closed by a quote or bracket, before a space and something that may begin one;
# the full stops of Chinese and Japanese end one whatever follows.
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*(?= +[\"'“‘(\[]?[A-Z0-9])|[。！？]+[”’」』）]*(?=.)")
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|cf|vs|Mr|Mrs|Ms|Dr|St|No|Fig|[A-Z]))\.$")

# A text grows by words; longer stretches, or text without blanks, by a few characters.
_UNIT = re.compile(r"[^\s\u2e80-\U0010ffff]{1,64}|[\u2e80-\U0010ffff]{1,8}")

LONGEST_SENTENCE = 1500
"""Characters between two sentence ends beyond which a text is taken to have none there: needles go elsewhere."""
LONGEST_PIECE = 100
"""Characters between two places for needles, where there are no sentences."""
# The last of these in a piece ends it: a mark that ends a clause, one within it, a word. Each is greedy.
_BREAKS = tuple(re.compile(rf".*{mark}(?=\S)") for mark in ("[.!?…] +", "(?:[,;:] +|[，；：、])", " +"))

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
        """The lines, each needle before a line of its own while there are as many lines, in the order of the places.

        As in RULER, no two needles are neighbours then. A place takes line ⌊place · free⌋ of the free ones, so that
        uniform places give every choice of lines the same probability.
        """
        free = list(range(units))
        numbers = sorted(free.pop(int(place * len(free))) if free else int(place * units) for place in places)
        order = sorted(range(len(places)), key=places.__getitem__)
        return self._insert(units, numbers, [needles[at] for at in order])

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

    A text without blanks grows by a few characters at a time, one without sentences takes needles between its lines,
    clauses or words.

    The text is the same for every item, as in RULER: only the needles and their places change.
    """

    def __init__(self, text: str, *, place: str = "haystack") -> None:
        paragraphs = [[" ".join(line.split()) for line in part.split("\n")] for part in re.split(r"\n\s*\n", text)]
        self._paragraphs = [lines for part in paragraphs if (lines := [line for line in part if line])]
        if not self._paragraphs:
            raise BadInput(f"{place}: the text is empty; give some prose")
        self.digest = _digest("\n".join(lines) for lines in self._paragraphs)
        self._order = _digest(" ".join(lines) for lines in self._paragraphs)
        self._rounds: list[str] = []
        self._text = ""
        self._word_ends = np.zeros(0, dtype=np.int64)
        self._sentence_starts: list[int] = []
        self._measured: dict[str, list[NDArray[np.int64]]] = {}

    def _round(self, number: int) -> str:
        """All paragraphs once more: in their own order first, then in another one each time."""
        if number == len(self._rounds):
            order = Draw("essay", self._order, number).shuffled(self._paragraphs) if number else self._paragraphs
            lines = [line for paragraph in order for line in paragraph]
            blank = "" if number == 0 else " "
            text = blank + " ".join(lines)
            line_starts = list(accumulate((len(line) + 1 for line in lines[:-1]), initial=len(blank)))
            begin = len(self._text)
            self._rounds.append(text)
            self._text += text
            self._word_ends = np.concatenate([self._word_ends, begin + _unit_ends(text)])
            self._sentence_starts += [begin + start for start in sentence_starts(text, line_starts)]
        return self._rounds[number]

    def forecast(self, tokenizer: Tokenizer, budget: int) -> NDArray[np.int64]:
        """Tokens of 0, 1, 2 … words, read off one encoding of each round of the text."""
        with _GROWING:
            measured = self._measured.setdefault(tokenizer.digest, [np.zeros(1, dtype=np.int64)])
            while measured[-1][-1] <= budget:
                text = self._round(len(measured) - 1)
                within = np.searchsorted(tokenizer.token_ends(text), _unit_ends(text), side="right")
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


def _digest(paragraphs: Iterable[str]) -> str:
    return hashlib.sha256("\n\n".join(paragraphs).encode()).hexdigest()


def _unit_ends(text: str) -> NDArray[np.int64]:
    return np.asarray([match.end() for match in _UNIT.finditer(text)], dtype=np.int64)


def sentence_starts(text: str, line_starts: Sequence[int] = ()) -> list[int]:
    """The character at which each sentence of a text without newlines begins.

    Where there are none for `LONGEST_SENTENCE` characters, pieces of it begin: rather with one of the lines that the
    text was joined of than at a mark, rather there than with a word, rather there than within one.
    """
    starts = _sentences(text)
    for number in reversed(range(len(starts))):
        begin, end = starts[number], starts[number + 1] if number + 1 < len(starts) else len(text)
        if end - begin > LONGEST_SENTENCE:
            starts[number + 1 : number + 1] = _pieces(text, begin, end, line_starts)
    return starts


def _pieces(text: str, begin: int, end: int, line_starts: Sequence[int]) -> Iterator[int]:
    """Where pieces of at most `LONGEST_PIECE` characters begin in a stretch of text, after the first."""
    while end - begin > LONGEST_PIECE:
        limit = begin + LONGEST_PIECE
        line = line_starts[bisect_right(line_starts, limit) - 1] if line_starts else 0
        found = (pattern.match(text, begin, limit + 1) for pattern in _BREAKS)
        begin = line if line > begin else next((match.end() for match in found if match), limit)
        yield begin


def _sentences(text: str) -> list[int]:
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

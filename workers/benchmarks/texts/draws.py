"""Random choices that depend on nothing but their key: the same on every machine, in any order, on every Python.

Only `random.Random.random` is promised to stay the same from one Python to the next, so everything is made of it.
"""

from __future__ import annotations

import hashlib
import random
import uuid
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """A stream of random choices, named by its key; two streams with different keys have nothing in common."""

    def __init__(self, *key: str | int) -> None:
        digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
        self._random = random.Random(int.from_bytes(digest[:16], "big")).random

    def fraction(self) -> float:
        """Uniform in [0, 1)."""
        return self._random()

    def below(self, limit: int) -> int:
        """Uniform in 0 … limit − 1, for limits below 2⁵³."""
        return int(self._random() * limit)

    def choice(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.below(len(options))]

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different options in random order; the first draws do not depend on `count`."""
        pool = list(options)
        for place in range(count):
            other = place + self.below(len(pool) - place)
            pool[place], pool[other] = pool[other], pool[place]
        return pool[:count]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        """All options in random order."""
        return self.sample(options, len(options))

    def letters(self, alphabet: str, count: int) -> str:
        """A string of `count` letters."""
        return "".join(self.choice(alphabet) for _ in range(count))

    def number(self) -> str:
        """Seven digits, the first not zero."""
        return str(1_000_000 + self.below(9_000_000))

    def identifier(self) -> str:
        """A UUID of version 4."""
        bits = 0
        for _ in range(4):
            bits = bits << 32 | self.below(1 << 32)
        return str(uuid.UUID(int=bits, version=4))

    def word(self) -> str:
        """An `adjective-noun` pair, one of 6.2 million."""
        return f"{self.choice(words('adjective'))}-{self.choice(words('noun'))}"


@lru_cache(maxsize=8)
def words(kind: str) -> tuple[str, ...]:
    """The English `adjective`s, `noun`s or `verb`s of the wonderwords package, sorted."""
    text = (resources.files("wonderwords") / "assets" / f"{kind}list.txt").read_text(encoding="utf-8")
    return tuple(sorted({line.strip() for line in text.splitlines() if line.strip()}))


@lru_cache(maxsize=1)
def words_digest() -> str:
    """The identity of the word lists, for the address of the items drawn from them."""
    lists = "\n\n".join("\n".join(words(kind)) for kind in ("adjective", "noun", "verb"))
    return hashlib.sha256(lists.encode()).hexdigest()

"""Invented documents for `qa_generated`, so that no model has seen an answer."""

from __future__ import annotations

from collections.abc import Callable

from workers.benchmarks.ruler.documents import QaQuestion
from workers.benchmarks.texts.draws import Draw

_ONSETS = (
    "b",
    "br",
    "c",
    "cr",
    "d",
    "dr",
    "f",
    "g",
    "gr",
    "h",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "st",
    "t",
    "th",
    "tr",
    "v",
    "w",
)
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ou")
_ENDINGS = ("ck", "d", "l", "ld", "lm", "m", "n", "nd", "r", "rn", "s", "st", "th", "x")
_FIRST_NAMES = (
    "Ada",
    "Amos",
    "Anna",
    "Boris",
    "Clara",
    "Dora",
    "Edwin",
    "Elsa",
    "Felix",
    "Greta",
    "Hugo",
    "Ida",
    "Iris",
    "Jonas",
    "Karl",
    "Lena",
    "Lucas",
    "Mara",
    "Miriam",
    "Nora",
    "Oscar",
    "Paula",
    "Rufus",
    "Selma",
    "Theo",
    "Ursula",
    "Victor",
    "Wanda",
    "Yusuf",
    "Zelda",
)
_OCCUPATIONS = (
    "baker",
    "beekeeper",
    "bookbinder",
    "brewer",
    "carpenter",
    "cartographer",
    "clockmaker",
    "cobbler",
    "cooper",
    "dyer",
    "engraver",
    "falconer",
    "ferryman",
    "gardener",
    "glassblower",
    "goldsmith",
    "innkeeper",
    "locksmith",
    "mason",
    "midwife",
    "miller",
    "organist",
    "painter",
    "potter",
    "printer",
    "saddler",
    "sculptor",
    "shepherd",
    "surgeon",
    "surveyor",
    "tailor",
    "tanner",
    "teacher",
    "thatcher",
    "weaver",
)
_MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)


def _invented_name(taken: set[str], draw: Draw) -> str:
    while True:
        syllables = [draw.choice(_ONSETS) + draw.choice(_VOWELS) for _ in range(2)]
        name = ("".join(syllables) + draw.choice(_ENDINGS)).capitalize()
        if name not in taken:
            taken.add(name)
            return name


def _date(draw: Draw) -> tuple[str, str, str]:
    day, month, year = 1 + draw.below(28), draw.below(12), 1700 + draw.below(250)
    name = _MONTHS[month]
    return f"{day} {name} {year}", f"{name} {day}, {year}", f"{year}-{month + 1:02}-{day:02}"


def invented(index: int, draw: Draw) -> tuple[QaQuestion, Callable[[int, int], list[str]]]:
    """A question about an invented person, and endless documents, of which the first two contain the answer.

    By turns it asks for a date of birth, an occupation, and the river of the home town, which takes both documents.
    """
    taken: set[str] = set()
    documents: list[str] = []

    def couple() -> tuple[str, tuple[str, str, str], str, str]:
        """One more person and the town they live in; every name occurs once in the world."""
        person = f"{draw.choice(_FIRST_NAMES)} {_invented_name(taken, draw)}"
        town, river = _invented_name(taken, draw), _invented_name(taken, draw)
        born, occupation = _date(draw), draw.choice(_OCCUPATIONS)
        article = "an" if occupation[0] in "aeiou" else "a"
        founded, people = 900 + draw.below(700), 1000 + draw.below(90_000)
        documents.append(
            f"{person}\n{person} was born on {born[0]} and has worked as {article} {occupation} for many years. "
            f"The home of {person} is the town of {town}, in a house that the family built."
        )
        documents.append(
            f"{town}\n{town} is a town on the river {river}. It was founded in {founded} and has about {people} "
            f"inhabitants. The bridge over the {river} is its oldest building."
        )
        return person, born, occupation, river

    person, born, occupation, river = couple()
    question = (
        QaQuestion(f"On what date was {person} born?", born, gold=(0,)),
        QaQuestion(f"What is the occupation of {person}?", (occupation,), gold=(0,)),
        QaQuestion(f"On which river is the town where {person} lives?", (river,), gold=(0, 1)),
    )[index % 3]

    def first(begin: int, end: int) -> list[str]:
        while len(documents) < end:
            couple()
        return documents[begin:end]

    return question, first

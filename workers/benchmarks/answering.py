"""RULER's question answering: the documents that hold the answer among others that do not.

SQuAD and HotpotQA are read from the files their authors publish; nothing is fetched. Where neither is at hand, a
small invented world of people and towns takes their place, under a name of its own: `qa_generated`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jobs.errors import BadInput
from workers.benchmarks.budget import fill, running_total
from workers.benchmarks.draws import Draw
from workers.benchmarks.items import Asked, Item
from workers.benchmarks.niah import depths_of
from workers.benchmarks.tokens import Tokenizer

INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
BEFORE = INSTRUCTION + "\n\nThe following are given documents.\n\n"
AFTER = "\n\n" + INSTRUCTION + "\n\nQuestion: {query}"
ANSWER_PREFIX = " Answer:"


@dataclass(frozen=True, slots=True)
class Question:
    """A question, the aliases of its answer, and the numbers of the documents that hold it or come close to it."""

    query: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class Library:
    """Documents and questions about them."""

    documents: tuple[str, ...]
    questions: tuple[Question, ...]

    @cached_property
    def digest(self) -> str:
        """What the library is, for the address of the items made from it."""
        content = [self.documents, [(q.query, q.answers, q.gold, q.near) for q in self.questions]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def question(self, index: int) -> Question:
        """The index-th question."""
        if index >= len(self.questions):
            raise BadInput(f"qa: item {index} of only {len(self.questions)} questions; ask for fewer items")
        return self.questions[index]

    def posed(self, index: int, draw: Draw) -> tuple[Question, Callable[[int, int], list[str]]]:
        """The index-th question, and its documents in the order in which they join: gold, near, all others.

        All but the gold ones come again, in the same order, as often as they are asked for.
        """
        question = self.question(index)
        gold, near = question.gold, draw.shuffled(question.near)
        rest = sorted(set(range(len(self.documents))) - {*gold, *near})
        others = [*near, *draw.shuffled(rest)]

        def document(at: int) -> str:
            return self.documents[gold[at] if at < len(gold) else others[(at - len(gold)) % len(others)]]

        return question, lambda begin, end: list(map(document, range(begin, end if others else min(end, len(gold)))))


def read_squad(source: bytes | str | Path) -> Library:
    """SQuAD v2, by its bytes or its path: the answerable questions, in their order.

    As published (`dev-v2.0.json`), or in the hub's Parquet form.
    """
    data, place = _load(source, _squad_of)
    try:
        articles = [[paragraph["context"] for paragraph in article["paragraphs"]] for article in data["data"]]
        documents = sorted({context for article in articles for context in article})
        number = {document: at for at, document in enumerate(documents)}
        questions = [
            Question(
                query=asked["question"],
                answers=tuple(dict.fromkeys(answer["text"] for answer in asked["answers"])),
                gold=(number[paragraph["context"]],),
                near=tuple(dict.fromkeys(number[other] for other in article if other != paragraph["context"])),
            )
            for article, contents in zip(articles, data["data"], strict=True)
            for paragraph in contents["paragraphs"]
            for asked in paragraph["qas"]
            if not asked.get("is_impossible", False)
        ]
    except (KeyError, TypeError) as error:
        raise BadInput(f"{place}: not SQuAD's format (missing {error}); give dev-v2.0.json") from error
    return Library(tuple(documents), tuple(questions))


def read_hotpotqa(source: bytes | str | Path) -> Library:
    """HotpotQA, by its bytes or its path: as published (`hotpot_dev_distractor_v1.json`), or as on the hub."""
    data, place = _load(source, _hotpotqa_of)
    try:
        contexts = [[f"{title}\n{''.join(sentences)}" for title, sentences in asked["context"]] for asked in data]
        documents = sorted({document for context in contexts for document in context})
        number = {document: at for at, document in enumerate(documents)}
        questions = [
            Question(asked["question"], (asked["answer"],), tuple(dict.fromkeys(number[text] for text in context)))
            for asked, context in zip(data, contexts, strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"{place}: not HotpotQA's format (missing {error}); give hotpot_dev_distractor_v1.json"
        ) from error
    return Library(tuple(documents), tuple(questions))


def _squad_of(rows: list[dict[str, Any]]) -> Any:
    """The hub's rows in the form of the published file: an article for each title, a paragraph for each context."""
    articles: dict[str, dict[str, list[Any]]] = {}
    for row in rows:
        answers = [{"text": text} for text in row["answers"]["text"]]
        asked = {"question": row["question"], "answers": answers, "is_impossible": not answers}
        articles.setdefault(row["title"], {}).setdefault(row["context"], []).append(asked)
    contents = [[{"context": context, "qas": asked} for context, asked in found.items()] for found in articles.values()]
    return {"data": [{"paragraphs": paragraphs} for paragraphs in contents]}


def _hotpotqa_of(rows: list[dict[str, Any]]) -> Any:
    """The hub's rows in the form of the published file."""
    contexts = [zip(row["context"]["title"], row["context"]["sentences"], strict=True) for row in rows]
    return [{**row, "context": list(context)} for row, context in zip(rows, contexts, strict=True)]


def _load(source: bytes | str | Path, of_rows: Callable[[list[dict[str, Any]]], Any]) -> tuple[Any, str]:
    """What the published file holds, from itself or from the hub's Parquet file, and what to call it."""
    place = "documents" if isinstance(source, bytes) else str(source)
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        return (of_rows(_parquet(content)) if content.startswith(b"PAR1") else json.loads(content)), place
    except FileNotFoundError as error:
        raise BadInput(f"{place}: no such file; give the path of the published JSON") from error
    except (KeyError, TypeError) as error:
        raise BadInput(
            f"{place}: not the columns of the hub's file (missing {error}); give the published file"
        ) from error
    except ValueError as error:
        raise BadInput(f"{place}: not JSON ({error}); give the published file") from error


def _parquet(content: bytes) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.read_table(pa.BufferReader(content)).to_pylist()


def qa_item(tokenizer: Tokenizer, asked: Asked, library: Library | None, index: int) -> Item:
    """One item about the library, or about a world invented for it; `TooShort` if it cannot fit in the length.

    Questions on the same gold documents are not independent: they count as one haystack.
    """
    identity = ("qa", asked.task, asked.seed, index)
    posed = library.posed if library else invented
    question, documents = posed(index, Draw(*identity, "documents"))
    gold = len(question.gold)
    ending = AFTER.format(query=question.query) + asked.frame[1]
    ranks: list[float] = []
    draw = Draw(*identity, "order")

    def shown(units: int) -> list[str]:
        """The gold documents and `units` others, each at the rank it has at every length."""
        chosen = documents(0, gold + units)
        ranks.extend(draw.fraction() for _ in range(len(chosen) - len(ranks)))
        return [chosen[at] for at in sorted(range(len(chosen)), key=ranks.__getitem__)]

    def context(units: int) -> str:
        return "\n\n".join(f"Document {at}:\n{document}" for at, document in enumerate(shown(units), start=1))

    def text(units: int) -> str:
        return asked.frame[0] + BEFORE + context(units) + ending

    def numbered(first: int, last: int) -> list[str]:
        others = documents(gold + first, gold + last)
        return [f"Document {gold + first + at}:\n{document}\n\n" for at, document in enumerate(others, start=1)]

    units, tokens = fill(
        tokenizer,
        asked,
        lambda units: text(units) + ANSWER_PREFIX,
        lambda budget: running_total(tokenizer, numbered, budget),
    )
    return asked.item(
        index,
        text(units),
        ANSWER_PREFIX,
        answers=question.answers,
        tokens=tokens,
        depths=depths_of(context(units), documents(0, gold)),
        scorer="part",
        haystack=asked.named("about", *question.gold) if library else None,
    )


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


def invented(index: int, draw: Draw) -> tuple[Question, Callable[[int, int], list[str]]]:
    """A question about an invented person, and endless documents of which the first two hold what it needs.

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
        Question(f"On what date was {person} born?", born, gold=(0,)),
        Question(f"What is the occupation of {person}?", (occupation,), gold=(0,)),
        Question(f"On which river is the town where {person} lives?", (river,), gold=(0, 1)),
    )[index % 3]

    def first(begin: int, end: int) -> list[str]:
        while len(documents) < end:
            couple()
        return documents[begin:end]

    return question, first


def library_for(task: str, libraries: Mapping[str, Library] | None) -> Library | None:
    """The library a task reads: none for `qa_generated`; `BadInput` if SQuAD or HotpotQA was not given."""
    if task == "qa_generated":
        return None
    if libraries and task in libraries:
        return libraries[task]
    published = {"qa_1": "SQuAD's dev-v2.0.json", "qa_2": "HotpotQA's hotpot_dev_distractor_v1.json"}[task]
    raise BadInput(f"{task}: {published} was not given; give it as documents, or ask for qa_generated")

"""Needles that share no word with their questions, after NoLiMa (Modarressi et al. 2025, arXiv 2502.05167).

"Nadia rents a flat opposite the Alhambra" answers "Who has a home in Granada?" (one hop) and "Who has a home in Spain?"
(two hops). The needles, questions and the prompt are our own. NoLiMa's needle sets, whose licence allows no commercial
use, are read from the user's file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from jobs.errors import BadInput
from jobs.evaluate import NolimaSpec
from jobs.foreign_json import load_json
from jobs.yaml_nodes import quoted
from workers.benchmarks.generation import generation_of
from workers.benchmarks.items import Asked, Item, items_digest
from workers.benchmarks.needle import check_depth, even_depths
from workers.benchmarks.planned import PlannedSet, Reader, check_of, file_of
from workers.benchmarks.texts.draws import Draw
from workers.benchmarks.texts.filling import build_groups, fill
from workers.benchmarks.texts.haystacks import Essay, bundled_essay, bundled_text
from workers.benchmarks.texts.tokenizer import Tokenizer

TASKS = ("onehop", "twohop")
MAX_NEW_TOKENS = 32
PROMPT = (
    "Read the text below. A question about it follows.\n\n{haystack}\n\nAnswer the question from the text, and from"
    " general knowledge where the text only hints at the answer. Give the name alone.\n\nQuestion: {question}"
)
ANSWER_PREFIX = "\nAnswer:"
WHO = "{CHAR}"
NAMES = (
    *("Nadia", "Yusuf", "Ingrid", "Mateo", "Priya", "Tobias", "Amara", "Henrik", "Leila", "Dmitri", "Rosalind", "Kofi"),
    *("Birgit", "Anselmo", "Thandi", "Casimir", "Odile", "Rafiq", "Svetlana", "Eamon", "Paloma", "Tariq", "Greta"),
)


@dataclass(frozen=True, slots=True)
class Fact:
    """A needle with the place of a name in it, a question for each task, and the names that may stand there.

    `answers` are right where the needle has no place for a name.
    """

    needle: str
    questions: tuple[tuple[str, str], ...]
    names: tuple[str, ...]
    answers: tuple[str, ...] = ()
    prompt: str | None = None


@dataclass(frozen=True, slots=True)
class _Table:
    """Facts of one kind: the needle hides the first word of a row, the questions ask by the second and the third."""

    needle: str
    question: str
    rows: str

    def facts(self) -> Iterable[tuple[tuple[str, ...], Fact]]:
        for row in self.rows.strip().splitlines():
            hidden, *hops = (cell.strip() for cell in row.split("|"))
            questions = tuple((task, self.question.format(hop)) for task, hop in zip(TASKS, hops, strict=True))
            yield (hidden, *hops), Fact(self.needle.replace("{}", hidden), questions, NAMES)


TABLES = (
    _Table(
        "{CHAR} rents a flat opposite {}.",
        "Who has a home in {}?",
        """
        the Alhambra | Granada | Spain
        the Colosseum | Rome | Italy
        the Acropolis | Athens | Greece
        the Taj Mahal | Agra | India
        the Golden Gate Bridge | San Francisco | California
        the Hermitage | Saint Petersburg | Russia
        the Hagia Sophia | Istanbul | Turkey
        the Manneken Pis | Brussels | Belgium
        the Little Mermaid statue | Copenhagen | Denmark
        the Petronas Towers | Kuala Lumpur | Malaysia
        the Louvre | Paris | France
        the Rijksmuseum | Amsterdam | the Netherlands
        the Brandenburg Gate | Berlin | Germany
        the Great Sphinx | Giza | Egypt
        the Burj Khalifa | Dubai | the United Arab Emirates
        the Christ the Redeemer statue | Rio de Janeiro | Brazil
        """,
    ),
    _Table(
        "{CHAR} can recite whole pages of {}.",
        "Who is an admirer of {}?",
        """
        War and Peace | Leo Tolstoy | Russian literature
        Don Quixote | Miguel de Cervantes | Spanish literature
        the Inferno | Dante Alighieri | Italian literature
        Les Misérables | Victor Hugo | French literature
        Macbeth | William Shakespeare | English literature
        Peer Gynt | Henrik Ibsen | Norwegian literature
        the Odyssey | Homer | Greek literature
        Huckleberry Finn | Mark Twain | American literature
        The Magic Mountain | Thomas Mann | German literature
        """,
    ),
    _Table(
        "{CHAR} came out in hives after a spoonful of {}.",
        "Who should stay away from {}?",
        """
        marzipan | almonds | nuts
        hummus | chickpeas | legumes
        miso | soya | beans
        guacamole | avocados | fruit
        polenta | maize | cereals
        couscous | wheat | gluten
        custard | eggs | animal products
        """,
    ),
)


def own_facts(text: str) -> list[Fact]:
    """The facts whose words, and the names, that the text does not mention: a mention would be a second needle."""
    said = text.lower()
    names = tuple(name for name in NAMES if name.lower() not in said)
    return [
        Fact(fact.needle, fact.questions, names)
        for table in TABLES
        for cells, fact in table.facts()
        if not any(cell.removeprefix("the ").lower() in said for cell in cells) and names
    ]


def published_facts(data: bytes, place: str) -> list[Fact]:
    """The facts of a needle set as NoLiMa publishes it, a list of experiments; `BadInput` for another file."""
    try:
        experiments = load_json(data)
        if any(entry.get("distractors") for entry in experiments):
            raise BadInput(f"{place}: mergeyard hides no distractors; give the needle set without them")
        found = [
            Fact(
                _filled(entry["needle"], test["input_args"]),
                tuple((kind, _filled(asked, test["input_args"])) for kind, asked in entry["questions"].items()),
                _texts(entry.get("character_set")),
                _texts(test.get("gold_answers")),
                entry.get("task_template"),
            )
            for entry in experiments
            for test in entry["tests"].values()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{place}: not a needle set of NoLiMa ({error}); give needle_set.json") from error
    if not found:
        raise BadInput(f"{place}: the needle set has no test; give needle_set.json")
    for fact in found:
        if not (fact.names if WHO in fact.needle else fact.answers):
            raise BadInput(f"{place}: {quoted(fact.needle)} has no answers; give a character_set or gold_answers")
        if fact.prompt is not None and re.findall(r"{\w+}", fact.prompt) != ["{haystack}", "{question}"]:
            raise BadInput(f"{place}: a task_template must have {{haystack}} once, and {{question}} after it; mend it")
    return found


def _texts(value: Any) -> tuple[str, ...]:
    """The texts of a list; one text is a list of one, and nothing is an empty one. `TypeError` for another entry."""
    texts: tuple[Any, ...] = (value,) if isinstance(value, str) and value else tuple(value or ())
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise TypeError("an answer that is not a text")
    return texts


def _filled(text: str, arguments: Sequence[str]) -> str:
    for number, argument in enumerate(arguments, start=1):
        text = text.replace(f"{{{number}}}", argument)
    return text


def nolima_items(
    tokenizer: Tokenizer,
    asked: Asked,
    *,
    facts: Sequence[Fact],
    depths: Sequence[float],
    indices: Iterable[int],
    questions: int,
    essay: Essay,
    prompt: str | None,
) -> list[Item]:
    """The items with these indices: item i asks at depth i mod len(depths), in repeat i div len(depths).

    `questions` neighbours in depth hide their needles in one haystack, with different names. `BadInput` as in
    `needle_items`.
    """
    groups = -(-len(depths) // questions)
    wanted = list(indices)

    def build(cell: tuple[int, int]) -> list[Item]:
        repeat, group = cell
        numbers = range(group, len(depths), groups)
        draw = Draw("nolima", asked.seed, asked.task, questions, repeat, group)
        chosen = _apart(draw.shuffled(facts), asked.task, len(numbers))
        names = _names(draw, chosen)
        needles = [fact.needle.replace(WHO, name) for fact, name in zip(chosen, names, strict=True)]
        places = [depths[number] for number in numbers]
        before, after = asked.frame
        begun = asked.beginning(ANSWER_PREFIX)
        head, tails = "", list[str]()
        for fact, name in zip(chosen, names, strict=True):
            question = dict(fact.questions)[asked.task].replace(WHO, name)
            head, _, tail = (prompt or fact.prompt or PROMPT).partition("{haystack}")
            tails.append(tail.replace("{question}", question) + after)
        longest = max(tails, key=tokenizer.count)

        def text(units: int) -> str:
            return before + head + essay.hide_nearest(units, needles, places)

        def within(units: int) -> str:
            return text(units) + longest + begun

        units, _ = fill(tokenizer, asked, within, lambda budget: essay.forecast(tokenizer, budget))
        counts = tokenizer.count_each([text(units) + tail + begun for tail in tails])
        while units and max(counts) > asked.budget:
            units -= 1
            counts = tokenizer.count_each([text(units) + tail + begun for tail in tails])
        context = text(units).removeprefix(before + head)
        haystack = asked.named(f"{repeat}-{group}x{questions}")
        items: list[Item] = []
        for at, (number, fact, name, needle) in enumerate(zip(numbers, chosen, names, needles, strict=True)):
            depth = context.index(needle) / max(1, len(context) - len(needle))
            item = asked.item(
                repeat * len(depths) + number,
                tails[at],
                begun,
                answers=(name,) if WHO in fact.needle else fact.answers,
                tokens=counts[at],
                depths=[depth],
                prefix=text(units),
                scorer="verbatim",
                haystack=haystack,
                pair=f"{haystack}-{at}",
            )
            check_depth(item, depths[number])
            items.append(item)
        return items

    cells = sorted({(index // len(depths), index % len(depths) % groups) for index in wanted})
    return build_groups(tokenizer, asked, cells, build, wanted)


def _apart(facts: Sequence[Fact], task: str, count: int) -> list[Fact]:
    """The first facts whose questions differ; `BadInput` if they are too few."""
    found: dict[str, Fact] = {}
    for fact in facts:
        if (question := dict(fact.questions).get(task)) is not None:
            found.setdefault(question, fact)
    if len(found) < count:
        raise BadInput(f"nolima: {count} questions share a haystack, and there are {len(found)} of {task}; ask fewer")
    return list(found.values())[:count]


def _names(draw: Draw, facts: Sequence[Fact]) -> list[str]:
    """A name for each fact, different ones as far as there are as many."""
    found: list[str] = []
    for fact in facts:
        free = [name for name in fact.names if name not in found] or list(fact.names)
        found.append(draw.choice(free) if free else "")
    return found


def plan_nolima(spec: NolimaSpec, tokenizer: Tokenizer, seed: int, reader: Reader, least: int) -> list[PlannedSet]:
    tokenizer, generation = generation_of(spec, tokenizer, seed)
    text = reader.prose(spec.haystack, spec.place) if spec.haystack else bundled_text()
    essay = Essay(text, place=spec.place) if spec.haystack else bundled_essay()
    facts = own_facts(text)
    if spec.data:
        facts = published_facts(reader.read(spec.data, spec.place), f"{spec.place}: {spec.data}")
    if not facts:
        raise BadInput(f"{spec.place}: the haystack mentions every name or place that is asked for; give another text")
    known = list(dict.fromkeys(kind for fact in facts for kind, _ in fact.questions))
    heads = {(spec.prompt or fact.prompt or PROMPT).partition("{haystack}")[0] for fact in facts}
    if spec.questions > 1 and len(heads) > 1:
        raise BadInput(
            f"{spec.place}: questions with different texts before the haystack cannot share one; take `questions: 1`,"
            " or give one `prompt:`"
        )
    tasks = spec.tasks or tuple(kind for kind in known if kind in TASKS) or tuple(known)
    for task in tasks:
        if task not in known:
            raise BadInput(f"{spec.place}: nolima has no task {task}; choose from {', '.join(known)}")
    depths = even_depths(spec.depths)
    count = spec.items * spec.depths
    new_tokens = spec.max_new_tokens or MAX_NEW_TOKENS

    def planned(task: str, length: int) -> PlannedSet:
        of_task = [fact for fact in facts if task in dict(fact.questions)]

        def items(length: int, wanted: range) -> list[Item]:
            asked = Asked(
                "nolima", task, length, seed, new_tokens, generation.frame, begins=not spec.chat and not generation.end
            )
            own: dict[str, Any] = {"questions": spec.questions, "essay": essay, "prompt": spec.prompt}
            return nolima_items(tokenizer, asked, facts=of_task, depths=depths, indices=wanted, **own)

        told: Mapping[str, Any] = {
            "benchmark": "nolima",
            "task": task,
            "facts": hashlib.sha256(json.dumps([astuple(fact) for fact in of_task]).encode()).hexdigest(),
            "depths": depths,
            "questions": spec.questions,
            "haystack": essay.digest,
            "prompt": spec.prompt or PROMPT,
            "max_new_tokens": new_tokens,
            "frame": list(generation.frame),
        }
        return PlannedSet(
            benchmark="nolima",
            task=task,
            length=length,
            count=count,
            made=max(count, least),
            digest=items_digest({**told, **generation.digested}, tokenizer=tokenizer.digest, length=length, seed=seed),
            build=file_of(items, length),
            place=spec.place,
            share=spec.depths,
            questions=spec.questions,
            grows=True,
            check=check_of(items, length, spec.depths),
            generation=generation,
            new_tokens=new_tokens,
        )

    return [planned(task, length) for task in tasks for length in spec.lengths]

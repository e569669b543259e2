"""MRCR: one of several answers to the same request is to be repeated from a long conversation.

The peer is OpenAI's MRCR (after Vodrahalli et al. 2024, arXiv 2409.12640): its published conversations, its last
request and its score. Without its data, conversations are made by rule: requests for pieces in some format about some
noun, whose answers are passages of a text. The same conversation, shorter or longer, is asked at every length.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby, pairwise
from typing import Any

from jobs.errors import BadInput
from jobs.evaluate import SHORTEST_LENGTH, MrcrSpec
from jobs.evaluation_tasks import Generation
from jobs.foreign_json import load_json
from workers.benchmarks.generation import generation_of
from workers.benchmarks.items import Asked, Item, items_digest
from workers.benchmarks.planned import PlannedSet, Reader, file_of, located, probe
from workers.benchmarks.questions import Question, cells, conversation, in_turns, plan_questions, rows_of, turns_at
from workers.benchmarks.texts.draws import Draw, words, words_digest
from workers.benchmarks.texts.filling import TooShort, build_groups, fill, running_total
from workers.benchmarks.texts.haystacks import bundled_text, sentence_starts
from workers.benchmarks.texts.tokenizer import Tokenizer

Message = tuple[str, str]

LAST_REQUEST = "Prepend {code} to the {nth} (1 indexed) {piece}. Do not include any other text in your response."
IN_LINES = ("poem", "song", "ballad")
FORMATS = (*IN_LINES, "letter", "speech", "diary entry", "news report", "short story", "blog post", "fable")
TOPICS = 12
"""Different nouns of one conversation; with the formats, 120 kinds of pieces."""
PASSAGE_WORDS = 40
LINE_WORDS = 6
CODE_LETTERS = 10
COLUMNS = ("n_needles", "answer", "random_string_to_prepend", "prompt")
LIMIT = 2
"""An answer may have so many times the tokens of the right one, as far as the length allows."""
FORECAST_NEW_TOKENS = 256
CHARACTERS_A_TOKEN = 16
"""A conversation with more for each token of the longest length is too long; its tokens are not counted."""


class Passages:
    """Passages of a text: forty words from the beginning of a sentence on."""

    def __init__(self, text: str, place: str) -> None:
        flat = " ".join(text.split())
        starts = [*sentence_starts(flat), len(flat)]
        self._sentences = [flat[begin:end].split() for begin, end in pairwise(starts)]
        if sum(map(len, self._sentences)) < 100 * PASSAGE_WORDS:
            raise BadInput(f"{place}: the text is too short for passages; give at least {100 * PASSAGE_WORDS} words")
        self.text = flat

    def draw(self, draw: Draw, form: str) -> str:
        """A passage, in lines and stanzas if it is for such a form."""
        at, found = draw.below(len(self._sentences)), list[str]()
        while len(found) < PASSAGE_WORDS:
            found += self._sentences[at % len(self._sentences)]
            at += 1
        found = found[:PASSAGE_WORDS]
        if form not in IN_LINES:
            return " ".join(found)
        lines = [" ".join(found[at : at + LINE_WORDS]) for at in range(0, len(found), LINE_WORDS)]
        return "\n\n".join("\n".join(lines[at : at + 4]) for at in range(0, len(lines), 4))


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of piece."""

    form: str
    topic: str

    @property
    def piece(self) -> str:
        return f"{self.form} about the {self.topic}"

    def exchange(self, passages: Passages, draw: Draw) -> tuple[str, str]:
        """A request for it, and an answer."""
        return f"write a {self.piece}", f"The {self.topic}\n\n{passages.draw(draw, self.form)}"


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th …"""
    if number % 100 in (11, 12, 13):
        return f"{number}th"
    return str(number) + {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")


def mrcr_items(
    tokenizer: Tokenizer,
    length: int,
    *,
    needles: int,
    indices: Iterable[int],
    seed: int,
    questions: int,
    passages: Passages,
    generation: Generation,
    max_new_tokens: int | None,
) -> list[Item]:
    """The items with these indices: `questions` neighbours ask for different needles of one conversation.

    `TooShort` if the needles do not fit in `length` tokens.
    """
    task = f"{needles}needle"
    asked = Asked("mrcr", task, length, seed, max_new_tokens or 0, generation.frame)
    wanted = list(indices)

    def build(number: int) -> list[Item]:
        return _conversation_items(tokenizer, asked, needles, number, questions, passages, generation)

    return build_groups(tokenizer, asked, sorted({index // questions for index in wanted}), build, wanted)


def _conversation_items(
    tokenizer: Tokenizer,
    asked: Asked,
    needles: int,
    number: int,
    questions: int,
    passages: Passages,
    generation: Generation,
) -> list[Item]:
    identity = ("mrcr", asked.seed, needles, questions, number)
    draw = Draw(*identity, "kinds")
    topics, forms = draw.sample(words("noun"), TOPICS), draw.shuffled(FORMATS)
    kinds = [_Kind(form, topic) for form in forms for topic in topics]
    wanted, near = kinds[0], [_Kind(forms[0], topics[1]), _Kind(forms[1], topics[0])]
    hidden = _different(lambda: wanted.exchange(passages, draw), needles)
    places = sorted(draw.fraction() for _ in range(needles))
    fillers: list[tuple[str, str]] = []

    def others(first: int, last: int) -> list[tuple[str, str]]:
        """Requests for other kinds; the first two ask for the same form or the same topic."""
        for at in range(len(fillers), last):
            of = Draw(*identity, "filler", at)
            kind = near[at] if at < len(near) else of.choice(kinds[1:])
            fillers.append(kind.exchange(passages, of))
        return fillers[first:last]

    def exchanges(units: int) -> list[tuple[str, str]]:
        found = list(others(0, units))
        for place, needle in reversed(list(zip(places, hidden, strict=True))):
            found.insert(int(place * (units + 1)), needle)
        return found

    ranks = draw.sample(range(needles), questions)
    codes = [draw.letters(string.ascii_letters + string.digits, CODE_LETTERS) for _ in ranks]
    lasts = [
        LAST_REQUEST.format(code=code, nth=ordinal(rank + 1), piece=wanted.piece)
        for rank, code in zip(ranks, codes, strict=True)
    ]
    answers = [code + hidden[rank][1] for rank, code in zip(ranks, codes, strict=True)]
    needed = max(tokenizer.count_each(answers, special_tokens=False))
    room = replace(asked, max_new_tokens=asked.max_new_tokens or needed)

    def text(units: int, last: str) -> str:
        return conversation([*_messages(exchanges(units)), ("user", last)], generation)

    def filler_texts(first: int, last: int) -> list[str]:
        return [conversation([*_messages([pair]), ("user", "")], generation) for pair in others(first, last)]

    def forecast(budget: int) -> Any:
        return running_total(tokenizer, filler_texts, budget)

    units, _ = fill(tokenizer, room, lambda units: text(units, lasts[0]), forecast)
    while max(counts := tokenizer.count_each([text(units, last) for last in lasts])) > room.budget:
        if units == 0:
            raise TooShort(asked.task, asked.length, max(counts) + room.max_new_tokens)
        units -= 1
    found = exchanges(units)
    prefix = text(units, "\0").partition("\0")[0] if questions > 1 else ""
    haystack = asked.named(f"{number}x{questions}")
    items: list[Item] = []
    for at, (last, code, rank, tokens) in enumerate(zip(lasts, codes, ranks, counts, strict=True)):
        whole = text(units, last)
        item = asked.item(
            number * questions + at,
            whole.removeprefix(prefix),
            "",
            answers=answers[at : at + 1],
            tokens=tokens,
            depths=[_depth(_messages(found), 2 * found.index(hidden[rank]) + 1)],
            prefix=prefix,
            scorer=f"after:{code}",
            haystack=haystack,
            pair=f"{haystack}-{at}",
        )
        most = asked.max_new_tokens or min(LIMIT * needed, asked.length - tokens)
        items.append(replace(item, max_new_tokens=most))
    return items


def _different(make: Callable[[], tuple[str, str]], count: int) -> list[tuple[str, str]]:
    found: dict[tuple[str, str], None] = {}
    while len(found) < count:
        found[make()] = None
    return list(found)


def _messages(exchanges: Sequence[tuple[str, str]]) -> list[Message]:
    return [message for asked, said in exchanges for message in (("user", asked), ("assistant", said))]


def _depth(messages: Sequence[Message], at: int) -> float:
    """Where the message with this number begins: 0 at the beginning of the conversation, 1 if it is the end."""
    sizes = [len(text) for _, text in messages]
    return sum(sizes[:at]) / max(1, sum(sizes) - sizes[at])


def plan_mrcr(spec: MrcrSpec, tokenizer: Tokenizer, seed: int, reader: Reader, least: int) -> list[PlannedSet]:
    tokenizer, generation = generation_of(spec, tokenizer, seed)
    with located(spec.place):
        generation = replace(generation, **in_turns(tokenizer, generation))
    if spec.data:
        return _plan_published(spec, tokenizer, generation, reader)
    if spec.questions > min(spec.needles):
        raise BadInput(
            f"{spec.place}: {spec.questions} questions need as many needles; take `questions: {min(spec.needles)}`"
            " or less"
        )
    passages = Passages(reader.prose(spec.haystack, spec.place) if spec.haystack else bundled_text(), spec.place)
    made = max(spec.items, least)

    def planned(needles: int, length: int) -> PlannedSet:
        asked: dict[str, Any] = {
            "needles": needles,
            "questions": spec.questions,
            "max_new_tokens": spec.max_new_tokens,
        }

        def items(length: int, wanted: range) -> list[Item]:
            common: dict[str, Any] = {"seed": seed, "passages": passages, "generation": generation}
            return mrcr_items(tokenizer, length, indices=wanted, **common, **asked)

        def check() -> None:
            try:
                items(SHORTEST_LENGTH, range(made))  # conversations of needles alone differ in length
            except TooShort as error:
                task, _, smallest = error.args
                if smallest > length:
                    raise TooShort(task, length, smallest) from None
            probe(length, lambda length: items(length, range(spec.questions)))

        told = asked | {"benchmark": "mrcr", "text": passages.text, "words": words_digest()}
        told |= {"frame": generation.frame, "turns": generation.turns} | generation.digested
        return PlannedSet(
            benchmark="mrcr",
            task=f"{needles}needle",
            length=length,
            count=spec.items,
            made=made,
            digest=items_digest(told, tokenizer=tokenizer.digest, length=length, seed=seed),
            build=file_of(items, length),
            place=spec.place,
            share=spec.questions,
            questions=spec.questions,
            grows=True,
            check=check,
            generation=generation,
            new_tokens=spec.max_new_tokens or min(FORECAST_NEW_TOKENS, length // 2),
            limited=spec.max_new_tokens is not None,
        )

    return [planned(needles, length) for needles in spec.needles for length in spec.lengths]


def _plan_published(spec: MrcrSpec, tokenizer: Tokenizer, generation: Generation, reader: Reader) -> list[PlannedSet]:
    """The published conversations, each at the shortest length that holds it with the right answer."""
    assert spec.data is not None
    files = _files(spec.data, reader, spec.place)
    read = chain.from_iterable(_published(file, spec, tokenizer, generation, reader) for file in files)
    found = [(needles, task, replace(question, number=number)) for number, (needles, task, question) in enumerate(read)]
    if not found:
        raise BadInput(
            f"{spec.place}: {spec.data} has no conversation with {' or '.join(map(str, spec.needles))} needles; give"
            " the file of those, or other `needles:`"
        )
    of_task = groupby(sorted(found, key=_task), key=_task)
    return [
        planned
        for (_, task), questions in of_task
        for planned in plan_questions(
            "mrcr",
            task,
            [question for _, _, question in questions],
            lengths=spec.lengths,
            limit=spec.items,
            tokenizer=tokenizer,
            generation=generation,
            place=spec.place,
        )
    ]


def _task(found: tuple[int, str, Question]) -> tuple[int, str]:
    return found[:2]


def _files(data: str, reader: Reader, place: str) -> list[str]:
    """The Parquet files of a folder, or the one file."""
    if data.endswith((".parquet", ".jsonl")):
        return [data]
    files = [f"{data.rstrip('/')}/{name}" for name in reader.names(data, place) if name.endswith(".parquet")]
    if not files:
        raise BadInput(f"{place}: {data} has no Parquet files; give the folder of the published data, or one file")
    return files


def _published(
    file: str, spec: MrcrSpec, tokenizer: Tokenizer, generation: Generation, reader: Reader
) -> Iterator[tuple[int, str, Question]]:
    """(needles, task, question) of each conversation of a file with the wanted needles."""
    name = file.rpartition("/")[2]
    for number, (place, row) in enumerate(rows_of(reader.read(file, spec.place), name)):
        needles, answer, code, prompt = cells(row, COLUMNS, f"{spec.place}: {place}")
        if needles not in spec.needles:
            continue
        try:
            messages = turns_at(load_json(prompt.encode()), place)
        except (AttributeError, ValueError) as error:
            raise BadInput(
                f"{spec.place}: {place}: prompt is not a JSON list of messages ({error}); give the published file"
            ) from error
        if not (isinstance(answer, str) and isinstance(code, str) and code and answer.startswith(code)):
            raise BadInput(
                f"{spec.place}: {place}: the answer does not begin with random_string_to_prepend; give the published"
                " file"
            )
        too_long = len(prompt) > CHARACTERS_A_TOKEN * max(spec.lengths)
        [tokens] = tokenizer.count_each([answer], special_tokens=False)
        said = answer.removeprefix(code)
        at = [place for place, message in enumerate(messages) if message == ("assistant", said)]
        yield (
            needles,
            f"{needles}needle",
            Question(
                number=number,
                prefix="",
                prompt="" if too_long else conversation(messages, generation),
                answers=(answer,),
                scorer=f"after:{code}",
                depths=(_depth(messages[:-1], at[0]),) if at else (),
                haystack=f"{name}-{number}",
                answer_tokens=spec.max_new_tokens or tokens,
                most_new_tokens=spec.max_new_tokens or LIMIT * tokens,
                floor=max(spec.lengths) + 1 if too_long else 0,
            ),
        )

"""Questions that a file has ready: read from JSON lines, JSON, CSV or Parquet, and gathered by their lengths."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Any, cast

from jobs.errors import BadInput
from jobs.evaluate import SHORTEST_LENGTH
from jobs.evaluation_tasks import Generation
from jobs.foreign_json import load_json
from jobs.yaml_nodes import quoted
from workers.benchmarks.items import Item, items_digest, write_items
from workers.benchmarks.planned import PlannedSet
from workers.benchmarks.texts.tokenizer import Tokenizer

ROLES = ("user", "assistant")
CHARACTERS_A_TOKEN = 8
"""Of the longest length, up to which a text is measured first: a book of millions of tokens need not be encoded."""
COUNTED_AT_ONCE = 1 << 24
"""Characters of the texts whose tokens are counted at once, for the memory of the encodings."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question of a file, with all that a model reads: the fields mean the same as in `Item`.

    `number` is its row in the file. It needs a context of `floor` tokens at least, whatever its own tokens.
    `answer_tokens` of an answer count for its length; `most_new_tokens` may be generated, as far as the length allows.
    """

    number: int
    prefix: str
    prompt: str
    answers: tuple[str, ...]
    scorer: str
    depths: tuple[float, ...]
    haystack: str
    answer_tokens: int
    most_new_tokens: int
    floor: int = 0


def rows_of(data: bytes, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of each row of a file, by its content or the end of its `name`; `BadInput` names a bad line."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    if data.startswith(b"PAR1"):
        yield from _parquet(data, name)
    elif name.lower().endswith(".csv"):
        yield from _csv(_text(data, name), name)
    elif data.lstrip().startswith(b"["):
        yield from _array(data, name)
    else:
        for number, line in enumerate(data.split(b"\n"), start=1):
            if line.strip():
                yield f"{name}:{number}", _row(line, f"{name}:{number}")


def _row(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = load_json(line)
    except ValueError as error:
        raise BadInput(f"{place}: not JSON ({error}); give one JSON object on each line, or a .csv file") from error
    if not isinstance(row, dict):
        raise BadInput(f"{place}: not a JSON object; give one with the keys of the columns")
    return row


def _array(data: bytes, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = load_json(data)
    except ValueError as error:
        raise BadInput(f"{name}: not JSON ({error}); give a list of objects, or one object on each line") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise BadInput(f"{name}: entry {number} is not a JSON object; give one with the keys of the columns")
        yield f"{name}: entry {number}", row


def _csv(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit((1 << 31) - 1)  # the library's own is 131,072 characters
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    last = 1
    try:
        names = rows.fieldnames or ()
        if twice := [column for column in names if names.count(column) > 1]:
            raise BadInput(f"{name}:1: the column {quoted(twice[0])} is there twice; rename one")
        for row in rows:
            place = f"{name}:{last + 1}"
            last = rows.line_num
            if None in row or None in row.values():
                raise BadInput(f"{place}: {_cells(row)} cells for {len(rows.fieldnames or ())} columns; mend the row")
            yield place, row
    except csv.Error as error:
        raise BadInput(f"{name}:{last + 1}: not CSV ({error}); mend the row") from error


def _cells(row: Mapping[str | None, Any]) -> int:
    """The cells of a row that are there, those beyond the columns included."""
    beyond = row.get(None) or []
    return sum(value is not None for key, value in row.items() if key is not None) + len(beyond)


def _parquet(data: bytes, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[dict[str, Any]] = pq.read_table(pa.BufferReader(data)).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadInput(f"{name}: not a Parquet file ({error}); fetch it again") from error
    yield from ((f"{name}: row {number}", row) for number, row in enumerate(rows, start=1))


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{name}: not text in UTF-8 ({error.reason}); save it as UTF-8") from error


def cells(row: Mapping[str, Any], columns: Sequence[str], place: str) -> list[Any]:
    """The values of these columns of a published file; `BadInput` names one that is missing or empty."""
    for column in columns:
        if row.get(column) is None:
            fault = f"{column} is empty" if column in row else f"there is no column {column}"
            raise BadInput(f"{place}: {fault}; give the published file")
    return [row[column] for column in columns]


def conversation(messages: Sequence[tuple[str, str]], generation: Generation) -> str:
    """Messages of the user and the assistant in turn, as the text of a prompt: `answering` sends it as messages again.

    In a chat the text is that of the chat template. Plainly, `User:` and `Assistant:` begin the turns.
    """
    before, after = generation.frame
    to_answer, to_next = generation.turns
    if not after:
        before, after, to_answer, to_next = "User: ", "\n\nAssistant:", "\n\nAssistant: ", "\n\nUser: "
    *earlier, (_, last) = messages
    ends = {"user": to_answer, "assistant": to_next}
    return before + "".join(text + ends[role] for role, text in earlier) + last + after


def in_turns(tokenizer: Tokenizer, generation: Generation) -> dict[str, Any]:
    """The `turns` of a conversation of several: those of the chat template, without a thought before old answers."""
    if not generation.frame[1]:
        return {}
    return {"turns": tokenizer.turns(system=generation.system, arguments=generation.template)}


def turns_at(value: Any, place: str) -> list[tuple[str, str]]:
    """The messages of a conversation as OpenAI writes it, (role, text), by user and assistant in turn.

    Neighbours of one role become one message, with an empty line between: many chat templates refuse two.
    `BadInput` unless the user begins and ends.
    """
    try:
        said = [(str(message["role"]), _content(message["content"], place)) for message in value]
    except (TypeError, KeyError) as error:
        raise BadInput(f"{place}: not a list of messages with `role` and `content` ({error})") from error
    if "system" in (role for role, _ in said):
        raise BadInput(f"{place}: a system message belongs in the job; take it out, and add `chat: true` and `system:`")
    found = [(role, "\n\n".join(text for _, text in texts)) for role, texts in groupby(said, key=itemgetter(0))]
    if [role for role, _ in found] != [ROLES[number % 2] for number in range(len(found))] or len(found) % 2 == 0:
        raise BadInput(f"{place}: the messages must be by user and assistant in turn, and end with the user's")
    return found


def _content(value: Any, place: str) -> str:
    """The text of a message: one text, or OpenAI's list of parts, joined."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        parts = [part for part in cast("list[Any]", value) if isinstance(part, dict)]
        texts = [part["text"] for part in parts if part.get("type") == "text" and isinstance(part.get("text"), str)]
        if len(texts) == len(value):
            return "".join(texts)
    raise BadInput(f"{place}: the content of a message must be a text, or a list of parts of the type text")


def length_of(need: int, lengths: Sequence[int]) -> int | None:
    """The shortest of the lengths that is enough; without lengths, the next power of two; None where none is enough."""
    if not lengths:
        return max(SHORTEST_LENGTH, 1 << (need - 1).bit_length())
    return min((length for length in lengths if length >= need), default=None)


def plan_questions(
    benchmark: str,
    task: str,
    questions: Sequence[Question],
    *,
    lengths: Sequence[int],
    limit: int | None,
    tokenizer: Tokenizer,
    generation: Generation,
    place: str,
) -> list[PlannedSet]:
    """One set for each length that has questions; the first says how many fit no length, and are not asked.

    A question is asked at the shortest length that holds its prompt and its answer. Without `lengths`, those are powers
    of two, beside the floors of the questions. `BadInput` if there is no question, or none fits.
    """
    if not questions:
        within = f" for at most {max(lengths)} tokens" if lengths else ""
        raise BadInput(f"{place}: {task}: there are no questions{within}; give the published data, or other lengths")
    counts = _tokens(tokenizer, [question.prefix + question.prompt for question in questions], max(lengths, default=0))
    gathered: dict[int, list[tuple[Question, int]]] = {}
    for question, tokens in zip(questions, counts, strict=True):
        need = max(tokens + question.answer_tokens, question.floor)
        length = question.floor if need == question.floor and not lengths else length_of(need, lengths)
        if length is not None:
            gathered.setdefault(length, []).append((question, tokens))
    if not gathered:
        least = min(tokens + question.answer_tokens for question, tokens in zip(questions, counts, strict=True))
        raise BadInput(
            f"{place}: {task}: no question fits in {max(lengths)} tokens; the shortest needs {least}, give more in"
            " `lengths:`"
        )

    def planned(length: int, asked: Sequence[tuple[Question, int]]) -> PlannedSet:
        def build(wanted: range) -> bytes:
            return write_items(_item(benchmark, task, length, index, *asked[index], tokenizer) for index in wanted)

        content = hashlib.sha256(json.dumps([astuple(question) for question, _ in asked]).encode()).hexdigest()
        told = {"benchmark": benchmark, "task": task, "questions": content} | generation.digested
        return PlannedSet(
            benchmark=benchmark,
            task=task,
            length=length,
            count=len(asked),
            made=len(asked),
            digest=items_digest(told, tokenizer=tokenizer.digest, length=length, seed=0),
            build=build,
            place=place,
            generation=generation,
            new_tokens=max(min(question.most_new_tokens, length - tokens) for question, tokens in asked),
        )

    first, *others = [planned(length, gathered[length][:limit]) for length in sorted(gathered)]
    return [replace(first, too_long=len(questions) - sum(map(len, gathered.values()))), *others]


def _item(
    benchmark: str, task: str, length: int, index: int, question: Question, tokens: int, tokenizer: Tokenizer
) -> Item:
    return Item(
        benchmark=benchmark,
        task=task,
        length=length,
        index=index,
        depths=question.depths,
        haystack=question.haystack or f"{task}-{question.number}",
        prefix=question.prefix,
        prompt=question.prompt,
        answer_prefix="",
        answers=question.answers,
        scorer=question.scorer,
        max_new_tokens=min(question.most_new_tokens, length - tokens),
        tokens=tokens,
        pair=f"{task}-{question.number}",
        bare=tokenizer.bare,
    )


def _tokens(tokenizer: Tokenizer, texts: Sequence[str], longest: int) -> list[int]:
    """The tokens of each text; of one that is much too long, only those of its beginning."""
    most = CHARACTERS_A_TOKEN * longest
    begun = [text[:most] if longest else text for text in texts]
    counts = _counted(tokenizer, begun)
    rest = [number for number, text in enumerate(texts) if len(begun[number]) < len(text) and counts[number] <= longest]
    for number, tokens in zip(rest, _counted(tokenizer, [texts[number] for number in rest]), strict=True):
        counts[number] = tokens
    return counts


def _counted(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    counts: list[int] = []
    waiting: list[str] = []
    for number, text in enumerate(texts, start=1):
        waiting.append(text)
        if number == len(texts) or sum(map(len, waiting)) > COUNTED_AT_ONCE:
            counts += tokenizer.count_each(waiting)
            waiting = []
    return counts

"""Questions and documents for RULER's QA tasks: SQuAD, HotpotQA or invented ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jobs.errors import BadInput
from workers.benchmarks.texts.draws import Draw


@dataclass(frozen=True, slots=True)
class QaQuestion:
    """A question, the aliases of its answer, and the numbers of the documents that hold it or come close to it."""

    query: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class Library:
    """Documents and questions about them."""

    documents: tuple[str, ...]
    questions: tuple[QaQuestion, ...]

    @cached_property
    def digest(self) -> str:
        """The identity of the library, for the address of its items."""
        content = [self.documents, [(q.query, q.answers, q.gold, q.near) for q in self.questions]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def question(self, index: int) -> QaQuestion:
        """The index-th question."""
        if index >= len(self.questions):
            raise BadInput(f"qa: item {index} of only {len(self.questions)} questions; ask for fewer items")
        return self.questions[index]

    def posed(self, index: int, draw: Draw) -> tuple[QaQuestion, Callable[[int, int], list[str]]]:
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
            QaQuestion(
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
            QaQuestion(asked["question"], (asked["answer"],), tuple(dict.fromkeys(number[text] for text in context)))
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
    """The content and name of the published file, from itself or from the hub's Parquet file."""
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


def library_for(task: str, libraries: Mapping[str, Library] | None) -> Library | None:
    """The library a task reads: none for `qa_generated`; `BadInput` if SQuAD or HotpotQA was not given."""
    if task == "qa_generated":
        return None
    if libraries and task in libraries:
        return libraries[task]
    published = {"qa_1": "SQuAD's dev-v2.0.json", "qa_2": "HotpotQA's hotpot_dev_distractor_v1.json"}[task]
    raise BadInput(f"{task}: {published} was not given; give it as documents, or ask for qa_generated")

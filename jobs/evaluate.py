"""The `evaluate:` section of a job: which benchmarks, at which lengths, and the race."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol, TypeVar

from jobs.yaml_nodes import Node, quoted

TOKENIZER_KEYS = ("tokenizer", "pretrained", "model")
"""What tasks of lm-evaluation-harness load a tokenizer by, with its code: never what a job names."""

Scalar = str | bool | int | float
Told = Scalar | tuple[Scalar, ...]
MIN_LENGTH = 64
Entry = TypeVar("Entry", int, str)


class BenchmarkSpec(Protocol):
    """What a job asks of one benchmark: a frozen dataclass; `place` is its line in the job file."""

    @property
    def place(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RulerSpec:
    """RULER: `items` a task and length; `questions` of them share one haystack. No `tasks` is all thirteen.

    `haystack` is a text file for the essay tasks, `documents` the data of `qa_1` (SQuAD) and `qa_2` (HotpotQA). `chat`
    asks in the tokenizer's chat template.
    """

    lengths: tuple[int, ...]
    items: int = 500
    tasks: tuple[str, ...] = ()
    haystack: str | None = None
    documents: Mapping[str, str] = field(default_factory=dict[str, str])
    questions: int = 1
    chat: bool = False
    place: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedleSpec:
    """Needle in a haystack: `items` at each length and each of `depths` equally spaced depths.

    `haystack` is a text file, or `noise` for RULER's five short sentences; `chat` as for RULER. With `answer`, such as
    `{"value": {value}}`, an answer must be that and nothing else; without, it must have the value in it.
    """

    lengths: tuple[int, ...]
    depths: int = 11
    items: int = 5
    questions: int = 1
    answer: str | None = None
    haystack: str | None = None
    chat: bool = False
    place: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexitySpec:
    """Perplexity of `blocks` stretches of each length of a text (a path, or the bundled one)."""

    lengths: tuple[int, ...]
    text: str | None = None
    blocks: int = 16
    place: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class LmEvalSpec:
    """Tasks of lm-evaluation-harness, by their names there or the path of their YAML; `limit` items of each, or all.

    `num_fewshot` examples stand before each question, else as many as the task says; `metadata` is what tasks that make
    or choose their texts by it are told, such as lengths.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False
    metadata: Mapping[str, Told] = field(default_factory=dict[str, Told])
    place: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceSpec:
    """Points leave when they are surely not among the best `keep`: 3 standard errors behind, or at `alpha` if given.

    `alpha` is the chance that the best point is ever dropped, over the whole race.
    """

    keep: int = 1
    alpha: float | None = None
    place: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The benchmarks that every point answers, by their keys in the job file; at least one.

    Without a `race` every point answers every item.
    """

    benchmarks: Mapping[str, BenchmarkSpec]
    race: RaceSpec | None = None
    place: str = field(default="", compare=False)

    def digested(self) -> dict[str, Any]:
        """The content that the job's digest covers: every benchmark of `ALWAYS_DIGESTED`, asked or not."""
        return {**dict.fromkeys(ALWAYS_DIGESTED), **self.benchmarks, "race": self.race}


def _ruler(node: Node) -> RulerSpec:
    keys = node.mapping(("lengths", "items", "tasks", "haystack", "documents", "questions", "chat"), ("lengths",))
    return RulerSpec(
        lengths=_lengths(keys["lengths"]),
        items=_count(keys, "items", 500),
        tasks=_words(keys["tasks"]) if "tasks" in keys else (),
        haystack=keys["haystack"].string() if "haystack" in keys else None,
        documents=_documents(keys["documents"]) if "documents" in keys else {},
        questions=_count(keys, "questions", 1),
        chat="chat" in keys and keys["chat"].boolean(),
        place=node.place,
    )


def _documents(node: Node) -> dict[str, str]:
    return {task: path.string() for task, path in node.mapping(("qa_1", "qa_2")).items()}


def _needle(node: Node) -> NeedleSpec:
    keys = node.mapping(("lengths", "depths", "items", "questions", "answer", "haystack", "chat"), ("lengths",))
    return NeedleSpec(
        lengths=_lengths(keys["lengths"]),
        depths=_count(keys, "depths", 11),
        items=_count(keys, "items", 5),
        questions=_count(keys, "questions", 1),
        answer=_answer(keys["answer"]) if "answer" in keys else None,
        haystack=keys["haystack"].string() if "haystack" in keys else None,
        chat="chat" in keys and keys["chat"].boolean(),
        place=node.place,
    )


def _answer(node: Node) -> str:
    if "{value}" not in node.string():
        raise node.error(f"{quoted(node.string())} is the same for every needle; put {{value}} where the value goes")
    return node.string()


def _perplexity(node: Node) -> PerplexitySpec:
    keys = node.mapping(("lengths", "text", "blocks"), ("lengths",))
    return PerplexitySpec(
        lengths=_lengths(keys["lengths"]),
        text=keys["text"].string() if "text" in keys else None,
        blocks=_count(keys, "blocks", 16),
        place=node.place,
    )


def _lm_eval(node: Node) -> LmEvalSpec:
    keys = node.mapping(("tasks", "limit", "num_fewshot", "chat", "metadata"), ("tasks",))
    return LmEvalSpec(
        tasks=_words(keys["tasks"]),
        limit=keys["limit"].integer(minimum=1) if "limit" in keys else None,
        num_fewshot=keys["num_fewshot"].integer(minimum=0) if "num_fewshot" in keys else None,
        chat="chat" in keys and keys["chat"].boolean(),
        metadata=_metadata(keys["metadata"]) if "metadata" in keys else {},
        place=node.place,
    )


def _metadata(node: Node) -> dict[str, Told]:
    for key, entry in node.mapping().items():
        if key in TOKENIZER_KEYS:
            raise entry.error(f"{quoted(key)} is told by mergeyard, and is the points' own tokenizer; take it out")
    return {
        key: tuple(map(read_scalar, entry.sequence())) if entry.kind == "list" else read_scalar(entry)
        for key, entry in node.mapping().items()
    }


def _race(node: Node) -> RaceSpec | None:
    if node.kind == "boolean":
        return RaceSpec(place=node.place) if node.boolean() else None
    keys = node.mapping(("keep", "alpha"))
    alpha = read_alpha(keys["alpha"]) if "alpha" in keys else None
    return RaceSpec(keep=_count(keys, "keep", 1), alpha=alpha, place=node.place)


def _lengths(node: Node) -> tuple[int, ...]:
    return _distinct([(entry, entry.integer(minimum=MIN_LENGTH)) for entry in node.sequence()])


def _words(node: Node) -> tuple[str, ...]:
    return _distinct([(entry, entry.string()) for entry in node.sequence()])


def _distinct(entries: list[tuple[Node, Entry]]) -> tuple[Entry, ...]:
    seen: set[Entry] = set()
    for node, value in entries:
        if value in seen:
            raise node.error(f"{quoted(str(value))} is listed twice")
        seen.add(value)
    return tuple(value for _, value in entries)


def _count(keys: Mapping[str, Node], key: str, default: int) -> int:
    return keys[key].integer(minimum=1) if key in keys else default


def read_alpha(node: Node) -> float:
    alpha = node.number()
    if not 0 < alpha < Fraction(1, 2):
        raise node.error(f"alpha, the chance of a wrong verdict, must lie between 0 and 0.5, not {node.value}")
    return float(alpha)


def read_scalar(node: Node) -> Scalar:
    if node.kind == "number":
        number = node.number()
        return number.numerator if number.denominator == 1 else float(number)
    return node.boolean() if node.kind == "boolean" else node.string()


SPECS: dict[str, type[BenchmarkSpec]] = {
    "ruler": RulerSpec,
    "needle": NeedleSpec,
    "perplexity": PerplexitySpec,
    "lm_eval": LmEvalSpec,
}
"""The benchmarks that a job can ask for, by key; `workers.benchmarks.registry` says how each of them works."""

READERS: dict[type[BenchmarkSpec], Callable[[Node], BenchmarkSpec]] = {
    RulerSpec: _ruler,
    NeedleSpec: _needle,
    PerplexitySpec: _perplexity,
    LmEvalSpec: _lm_eval,
}

ALWAYS_DIGESTED = ("ruler", "needle", "perplexity", "lm_eval")
"""These four are null in the digest of a job that does not ask them. Never add one: runs would no longer resume."""


def read_evaluation(node: Node) -> Evaluation:
    keys = node.mapping((*SPECS, "race"))
    asked = {key: READERS[SPECS[key]](entry) for key, entry in keys.items() if key in SPECS}
    if not asked:
        *others, last = SPECS
        raise node.error(f"nothing to evaluate; name a benchmark: {', '.join(others)} or {last}")
    return Evaluation(benchmarks=asked, race=_race(keys["race"]) if "race" in keys else None, place=node.place)

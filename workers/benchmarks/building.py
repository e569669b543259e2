"""From what the job asks to sets of items, built once and stored under a digest of all that they depend on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jobs.errors import BadInput, MergeyardError, ObjectExists
from jobs.evaluation import ItemSet
from jobs.job import Evaluation, LmEvalSpec, NeedleSpec, PerplexitySpec, RulerSpec
from jobs.loading import quoted, suggestion
from jobs.tasks import canonical_json, digest
from workers.benchmarks.answering import Library, read_hotpotqa, read_squad
from workers.benchmarks.budget import TooShort
from workers.benchmarks.haystacks import Essay, bundled_essay, bundled_text
from workers.benchmarks.items import Item, items_digest, write_items
from workers.benchmarks.lm_eval_files import files_of
from workers.benchmarks.lm_eval_tasks import trouble_with
from workers.benchmarks.needle import even_depths, needle_items, needle_spec
from workers.benchmarks.perplexity import Window, check_length, windows, write_windows
from workers.benchmarks.ruler import MAX_NEW_TOKENS, NIAH, QA, TASKS, ruler_items, ruler_spec
from workers.benchmarks.tokens import Tokenizer
from workers.storage import Store, open_store

READERS: Mapping[str, Callable[[bytes | str | Path], Library]] = {"qa_1": read_squad, "qa_2": read_hotpotqa}

LM_EVAL_TOKENS = 1 << 20
"""What a whole task of lm-evaluation-harness is taken to cost, so that it is begun early."""

PART_NAME = re.compile(r"(?P<first>\d{6,})-(?P<last>\d{6,})\.(json|parquet)")
PART_ITEMS = 64
PART_TOKENS = 1 << 24
"""A set is built and written in parts of so many items and, for the builder's memory, of so many tokens at most."""

PROBED = 8192
"""Tokens at which it is tried whether a task can be asked at greater lengths: from 4,096 on, all prompts are alike."""

Frame = tuple[str, str]


@dataclass(frozen=True, slots=True)
class PlannedSet:
    """A set that can be built: what it is, the digest of all that it depends on, and how to make a file of its items.

    `count` items are asked of everyone, `made` are made at first. `grows` where more can be made later, as every item
    depends on its own number alone. `check` builds as little as shows that it can be built, and raises `BadInput` if it
    cannot. `place` is the line of the job file that asks for it.
    """

    benchmark: str
    task: str
    length: int
    count: int
    made: int
    digest: str
    build: Callable[[range], bytes]
    place: str
    share: int = 1
    grows: bool = False
    check: Callable[[], object] = lambda: None

    @property
    def folder(self) -> str:
        """Where its files lie in a run."""
        return f"items/{self.digest}/"

    def key(self, first: int, last: int) -> str:
        """The file of items `[first, last)`."""
        return f"{self.folder}{first:06d}-{last:06d}.{'json' if self.benchmark == 'lm_eval' else 'parquet'}"


class Reader:
    """Reads the texts that a job names: by URL, or by a path relative to `folder`."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or Path.cwd()

    def path(self, text: str) -> str:
        """A URL as it is; a path made absolute."""
        return text if "://" in text else str(self._folder / Path(text).expanduser())

    def read(self, text: str, place: str) -> bytes:
        """The content; `BadInput` names the place in the job file."""
        path = self.path(text)
        try:
            if "://" not in path:
                return Path(path).read_bytes()
            folder, _, name = path.rpartition("/")
            return bytes(open_store(folder).read(name))
        except OSError as error:
            raise BadInput(f"{place}: {path} cannot be read ({error.strerror}); give a text file") from None
        except MergeyardError as error:
            raise BadInput(f"{place}: {error}") from error

    def prose(self, text: str, place: str) -> str:
        """The content as text."""
        try:
            return self.read(text, place).decode("utf-8")
        except UnicodeDecodeError:
            raise BadInput(f"{place}: {text} is no text in UTF-8; give prose") from None


def planned_sets(
    evaluation: Evaluation,
    tokenizer: Tokenizer,
    seed: int,
    reader: Reader,
    least: Mapping[str, int] | None = None,
) -> list[PlannedSet]:
    """Every set of items that the job's benchmarks consist of; nothing is built yet.

    `least` items are made for a benchmark's sets even if fewer are asked of everyone: the rest are fresh ones, on which
    the winners of a race are confirmed. `BadInput` with file and line for what cannot be asked.
    """
    at_least = least or {}
    sets: list[PlannedSet] = []
    if evaluation.ruler is not None:
        sets += _ruler(evaluation.ruler, tokenizer, seed, reader, at_least.get("ruler", 0))
    if evaluation.needle is not None:
        sets += _needle(evaluation.needle, tokenizer, seed, reader, at_least.get("needle", 0))
    if evaluation.perplexity is not None:
        sets += _perplexity(evaluation.perplexity, tokenizer, seed, reader)
    if evaluation.lm_eval is not None:
        sets += _lm_eval(evaluation.lm_eval, tokenizer, reader)
    return sets


def check_sets(sets: Iterable[PlannedSet]) -> None:
    """Refuses, with file and line, sets that could not be built: a minute later, or once everything is merged.

    Tried are the least length of each task, and the least from 4,096 on, where `cwe` has a longer list.
    """
    of_task: dict[tuple[str, str], list[PlannedSet]] = {}
    for planned in sorted(sets, key=lambda planned: planned.length):
        of_task.setdefault((planned.benchmark, planned.task), []).append(planned)
    for first, *others in of_task.values():
        longer = [planned for planned in others if first.length < 4096 <= planned.length]
        for planned in [first, *longer[:1]]:
            with _at(planned.place):
                planned.check()


@contextmanager
def _at(place: str) -> Generator[None]:
    """Bad input is told with the line of the job file that asks for it."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{place}: {error}") from error


def stored(planned: PlannedSet, store: Store, count: int | None = None) -> ItemSet:
    """The set in the store, with `count` items or, without it, as many as are planned; what is missing is built now."""
    wanted = range(planned.made if count is None or not planned.grows else count)
    parts = _parts(planned, store)
    for missing in [part for gap in _missing(wanted, parts) for part in _cut(planned, gap)]:
        key = planned.key(missing.start, missing.stop)
        with _at(planned.place):
            data = planned.build(missing)
        with suppress(ObjectExists):  # another driver built the same bytes
            store.write(key, data, mode="create")
        parts.append((missing.start, missing.stop, key))
    return ItemSet(
        benchmark=planned.benchmark,
        task=planned.task,
        length=planned.length,
        share=planned.share,
        digest=planned.digest,
        parts=tuple(sorted(parts)),
        tokens=planned.length or LM_EVAL_TOKENS,
    )


def _parts(planned: PlannedSet, store: Store) -> list[tuple[int, int, str]]:
    """The set's files in the store: first item, one after the last, key."""
    names = ((PART_NAME.fullmatch(info.key.rpartition("/")[2]), info.key) for info in store.list(planned.folder))
    # a folder that people look into gets files of other kinds
    return [(int(name["first"]), int(name["last"]), key) for name, key in names if name is not None]


def _cut(planned: PlannedSet, gap: range) -> list[range]:
    """The gap in parts that are built at once, of whole haystacks; a set that does not grow is one part."""
    if not planned.grows:
        return [gap]
    most = min(PART_ITEMS, PART_TOKENS // planned.length)
    step = max(1, most // planned.share) * planned.share
    return [gap[at : at + step] for at in range(0, len(gap), step)]


def _missing(wanted: range, parts: Sequence[tuple[int, int, str]]) -> list[range]:
    """The stretches of `wanted` that no part has."""
    gaps: list[range] = []
    at = wanted.start
    for first, last, _ in sorted(parts):
        if first > at:
            gaps.append(range(at, min(first, wanted.stop)))
        at = max(at, last)
        if at >= wanted.stop:
            return gaps
    return [*gaps, range(at, wanted.stop)]


def _ruler(spec: RulerSpec, tokenizer: Tokenizer, seed: int, reader: Reader, least: int) -> list[PlannedSet]:
    for task in spec.tasks:
        if task not in MAX_NEW_TOKENS:
            near = suggestion(task, tuple(MAX_NEW_TOKENS))
            raise BadInput(f"{spec.place}: RULER has no task {quoted(task)}{near}")
        if task in READERS and task not in spec.documents:
            raise BadInput(
                f"{spec.place}: {task} needs its data; give `documents: {{{task}: FILE}}`, or take qa_generated"
            )
    documents = {task: READERS[task](reader.read(path, spec.place)) for task, path in spec.documents.items()}
    essay = Essay(reader.prose(spec.haystack, spec.place), place=spec.place) if spec.haystack else bundled_essay()
    frame = _frame(tokenizer, chat=spec.chat, place=spec.place)
    made = max(spec.items, least)

    def planned(task: str, length: int) -> PlannedSet:
        share = spec.questions if task in NIAH else 1
        asked: dict[str, Any] = {"questions": share, "essay": essay, "documents": documents, "frame": frame}

        def items(length: int, wanted: range) -> list[Item]:
            return ruler_items(tokenizer, task, length, indices=wanted, seed=seed, **asked)

        def check() -> None:
            if task in documents:
                documents[task].question(made - 1)
            _probe(length, lambda length: items(length, range(2)))

        def build(wanted: range) -> bytes:
            return write_items(items(length, wanted))

        address = items_digest(ruler_spec(task, **asked), tokenizer=tokenizer.digest, length=length, seed=seed)
        return PlannedSet(
            "ruler", task, length, spec.items, made, address, build, spec.place, share, grows=True, check=check
        )

    return [planned(task, length) for task in spec.tasks or default_tasks(documents) for length in spec.lengths]


def _probe(length: int, build: Callable[[int], object]) -> None:
    """Builds at the length, or at a shorter one at which what fits shows what does."""
    try:
        build(min(length, PROBED))
    except TooShort as error:
        task, _, smallest = error.args
        if smallest > length:
            raise TooShort(task, length, smallest) from None


def default_tasks(documents: Mapping[str, Library]) -> Sequence[str]:
    """RULER's thirteen, but a generated question-answering task where the data of the two real ones is not given."""
    without_data = [task for task in TASKS if task not in QA or task in documents]
    return without_data if len(without_data) == len(TASKS) else [*without_data, "qa_generated"]


def _frame(tokenizer: Tokenizer, *, chat: bool, place: str) -> Frame:
    if not chat:
        return "", ""
    with _at(place):
        return tokenizer.chat_frame()


def _needle(spec: NeedleSpec, tokenizer: Tokenizer, seed: int, reader: Reader, least: int) -> list[PlannedSet]:
    depths = even_depths(spec.depths)
    count = spec.items * spec.depths
    made = max(count, least)
    asked: dict[str, Any] = {
        "depths": depths,
        "questions": spec.questions,
        "answer": spec.answer,
        "frame": _frame(tokenizer, chat=spec.chat, place=spec.place),
    }
    if spec.haystack == "noise":
        asked["haystack"] = "noise"
    elif spec.haystack:
        asked["essay"] = Essay(reader.prose(spec.haystack, spec.place), place=spec.place)

    def planned(length: int) -> PlannedSet:
        def items(length: int, wanted: range) -> list[Item]:
            return needle_items(tokenizer, length, indices=wanted, seed=seed, **asked)

        def build(wanted: range) -> bytes:
            return write_items(items(length, wanted))

        def check() -> None:
            _probe(length, lambda length: items(length, range(spec.depths)))

        address = items_digest(needle_spec(**asked), tokenizer=tokenizer.digest, length=length, seed=seed)
        return PlannedSet(
            "needle", "needle", length, count, made, address, build, spec.place, spec.depths, grows=True, check=check
        )

    return [planned(length) for length in spec.lengths]


def _perplexity(spec: PerplexitySpec, tokenizer: Tokenizer, seed: int, reader: Reader) -> list[PlannedSet]:
    text = reader.prose(spec.text, spec.place) if spec.text else bundled_text()
    described = {
        "benchmark": "perplexity",
        "blocks": spec.blocks,
        "lengths": list(spec.lengths),
        "text": hashlib.sha256(text.encode()).hexdigest(),
    }

    @cache
    def made() -> list[Window]:  # of all lengths together: windows of every length end at the same tokens
        return windows(tokenizer, text, spec.lengths, items=spec.blocks)

    def planned(length: int) -> PlannedSet:
        def build(_: range) -> bytes:
            return write_windows([window for window in made() if window.length == length])

        def check() -> None:  # as much of the text as surely has enough tokens, for the whole of it may be large
            check_length(tokenizer, text[: 16 * max(spec.lengths)], max(spec.lengths))

        address = items_digest(described, tokenizer=tokenizer.digest, length=length, seed=seed)
        return PlannedSet(
            "perplexity", "perplexity", length, spec.blocks, spec.blocks, address, build, spec.place, check=check
        )

    return [planned(length) for length in spec.lengths]


def _lm_eval(spec: LmEvalSpec, tokenizer: Tokenizer, reader: Reader) -> list[PlannedSet]:
    """One unit a task: lm-evaluation-harness makes the items itself, on the worker; here only what it is told lies."""
    try:
        release = version("lm_eval")
    except PackageNotFoundError:
        raise BadInput(f"{spec.place}: lm_eval needs lm-evaluation-harness; pip install 'mergeyard[lm-eval]'") from None

    _frame(tokenizer, chat=spec.chat, place=spec.place)  # refuses a tokenizer without a template

    def planned(task: str) -> PlannedSet:
        told: dict[str, Any] = {"task": task, "limit": spec.limit, "lm_eval": release, "num_fewshot": spec.num_fewshot}
        if spec.metadata:  # a task that makes its texts by it makes them for the tokenizer
            told |= {"metadata": dict(spec.metadata), "tokenizer": tokenizer.digest}
        if spec.chat:
            told |= {"chat_template": tokenizer.chat_template}
        if task.endswith((".yaml", ".yml")):
            content = reader.read(task, spec.place)
            told |= {"task": reader.path(task), "content": hashlib.sha256(content).hexdigest()}
            with _at(spec.place):
                told |= {"beside": files_of(Path(reader.path(task)))}
        name = Path(task).stem if "content" in told else task
        told_as_bytes = canonical_json(told).encode()

        def check() -> None:
            if "content" not in told and (trouble := trouble_with(task)):
                raise BadInput(trouble)

        return PlannedSet("lm_eval", name, 0, 1, 1, digest(told), lambda _: told_as_bytes, spec.place, check=check)

    sets = [planned(task) for task in spec.tasks]
    names = [entry.task for entry in sets]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise BadInput(f"{spec.place}: two tasks are called {doubled}; give one of the files another name")
    return sets

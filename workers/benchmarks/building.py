"""From what the job asks to sets of items, built once and stored under a digest of all that they depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
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
from workers.benchmarks.haystacks import Essay, bundled_essay, bundled_text
from workers.benchmarks.items import items_digest, write_items
from workers.benchmarks.needle import even_depths, needle_items, needle_spec
from workers.benchmarks.perplexity import Window, windows, write_windows
from workers.benchmarks.ruler import MAX_NEW_TOKENS, NIAH, QA, TASKS, ruler_items, ruler_spec
from workers.benchmarks.tokens import Tokenizer
from workers.storage import Store, open_store

READERS: Mapping[str, Callable[[bytes | str | Path], Library]] = {"qa_1": read_squad, "qa_2": read_hotpotqa}

LM_EVAL_TOKENS = 1 << 20
"""What a whole task of lm-evaluation-harness is taken to cost, so that it is begun early."""

MOST_HASHED = 64 << 20
"""Larger files beside a task of the user's own are known by size and time alone."""

Frame = tuple[str, str]


@dataclass(frozen=True, slots=True)
class PlannedSet:
    """A set that can be built: what it is, the digest of all that it depends on, and how to make a file of its items.

    `count` items are asked of everyone, `made` are made at first. `grows` where more can be made later, as every item
    depends on its own number alone. `place` is the line of the job file that asks for it.
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
        sets += _lm_eval(evaluation.lm_eval, reader)
    return sets


def stored(planned: PlannedSet, store: Store, count: int | None = None) -> ItemSet:
    """The set in the store, with `count` items or, without it, as many as are planned; what is missing is built now."""
    wanted = range(planned.made if count is None or not planned.grows else count)
    parts = _parts(planned, store)
    for missing in _missing(wanted, parts):
        key = planned.key(missing.start, missing.stop)
        try:
            data = planned.build(missing)
        except BadInput as error:
            raise BadInput(f"{planned.place}: {error}") from error
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
    found: list[tuple[int, int, str]] = []
    for info in store.list(planned.folder):
        first, _, last = info.key.rpartition("/")[2].partition(".")[0].partition("-")
        found.append((int(first), int(last), info.key))
    return found


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
    return [
        _ruler_set(spec, task, length, max(spec.items, least), tokenizer, seed, essay, documents, frame)
        for task in spec.tasks or default_tasks(documents)
        for length in spec.lengths
    ]


def default_tasks(documents: Mapping[str, Library]) -> Sequence[str]:
    """RULER's thirteen, but a generated question-answering task where the data of the two real ones is not given."""
    without_data = [task for task in TASKS if task not in QA or task in documents]
    return without_data if len(without_data) == len(TASKS) else [*without_data, "qa_generated"]


def _frame(tokenizer: Tokenizer, *, chat: bool, place: str) -> Frame:
    if not chat:
        return "", ""
    try:
        return tokenizer.chat_frame()
    except BadInput as error:
        raise BadInput(f"{place}: {error}") from error


def _ruler_set(
    spec: RulerSpec,
    task: str,
    length: int,
    made: int,
    tokenizer: Tokenizer,
    seed: int,
    essay: Essay,
    documents: Mapping[str, Library],
    frame: Frame,
) -> PlannedSet:
    share = spec.questions if task in NIAH else 1
    asked: dict[str, Any] = {"questions": share, "essay": essay, "documents": documents, "frame": frame}

    def build(wanted: range) -> bytes:
        return write_items(ruler_items(tokenizer, task, length, indices=wanted, seed=seed, **asked))

    address = items_digest(ruler_spec(task, **asked), tokenizer=tokenizer.digest, length=length, seed=seed)
    return PlannedSet("ruler", task, length, spec.items, made, address, build, spec.place, share, grows=True)


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
        def build(wanted: range) -> bytes:
            return write_items(needle_items(tokenizer, length, indices=wanted, seed=seed, **asked))

        address = items_digest(needle_spec(**asked), tokenizer=tokenizer.digest, length=length, seed=seed)
        return PlannedSet("needle", "needle", length, count, made, address, build, spec.place, spec.depths, grows=True)

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

        address = items_digest(described, tokenizer=tokenizer.digest, length=length, seed=seed)
        return PlannedSet("perplexity", "perplexity", length, spec.blocks, spec.blocks, address, build, spec.place)

    return [planned(length) for length in spec.lengths]


def _lm_eval(spec: LmEvalSpec, reader: Reader) -> list[PlannedSet]:
    """One unit a task: lm-evaluation-harness makes the items itself, on the worker; here only what it is told lies."""
    try:
        release = version("lm_eval")
    except PackageNotFoundError:
        raise BadInput(f"{spec.place}: lm_eval needs lm-evaluation-harness; pip install 'mergeyard[lm-eval]'") from None

    def planned(task: str) -> PlannedSet:
        told: dict[str, Any] = {"task": task, "limit": spec.limit, "lm_eval": release}
        if task.endswith((".yaml", ".yml")):
            content = reader.read(task, spec.place)
            told |= {"task": reader.path(task), "content": hashlib.sha256(content).hexdigest()}
            told |= {"beside": _beside(Path(reader.path(task)))}
        name = Path(task).stem if "content" in told else task
        told_as_bytes = canonical_json(told).encode()
        return PlannedSet("lm_eval", name, 0, 1, 1, digest(told), lambda _: told_as_bytes, spec.place)

    sets = [planned(task) for task in spec.tasks]
    names = [entry.task for entry in sets]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise BadInput(f"{spec.place}: two tasks are called {doubled}; give one of the files another name")
    return sets


def _beside(task: Path) -> dict[str, Any]:
    """What lies in the folder of a task's file, which may include or read it: name → sha256, or size and time."""
    if not task.is_file():  # in a bucket, where nothing lies beside it for the harness to read
        return {}
    files = sorted(path for path in task.parent.iterdir() if path.is_file())
    return {path.name: _version(path) for path in files}


def _version(path: Path) -> Any:
    found = path.stat()
    if found.st_size > MOST_HASHED:
        return [found.st_size, found.st_mtime_ns]
    return hashlib.sha256(path.read_bytes()).hexdigest()

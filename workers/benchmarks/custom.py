"""A user's own questions: one file, one scorer, the lengths that its questions need."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import regex

from jobs.errors import BadInput
from jobs.evaluate import COLUMNS, CustomSpec, Several
from jobs.evaluation_tasks import Generation
from jobs.yaml_nodes import quoted
from workers.benchmarks.generation import generation_of
from workers.benchmarks.planned import PlannedSet, Reader, located
from workers.benchmarks.questions import Question, conversation, in_turns, plan_questions, rows_of, turns_at
from workers.benchmarks.scorers import as_text, postprocess, rouge_words, squad_words, value_at
from workers.benchmarks.texts.tokenizer import Tokenizer

MAX_NEW_TOKENS = 128
OWN = "python:"
MOST_LENGTHS = 12
"""Different lengths in a file up to which they are context lengths of their own."""
NAMES: Mapping[str, str] = {"contains": "part"}
WORDS: Mapping[str, Callable[[str], list[str]]] = {"f1": squad_words, "rouge_l": rouge_words}
"""The words that a scorer compares: SQuAD's drop articles, and rouge-score's have the letters a to z alone."""


def plan_custom(
    spec: CustomSpec | Several, tokenizer: Tokenizer, seed: int, reader: Reader, least: int
) -> list[PlannedSet]:
    specs = _each(spec)
    names = [_name(one) for one in specs]
    for one, name in zip(specs, names, strict=True):
        if names.count(name) > 1:
            raise BadInput(f"{one.place}: two files are called {name}; give each a `name:` of its own")
    return [planned for one in specs for planned in _plan(one, tokenizer, seed, reader)]


def custom_files(spec: CustomSpec | Several) -> Iterable[str]:
    """The files of questions and of the user's own scorers."""
    for one in _each(spec):
        yield one.file
        if one.scorer.startswith(OWN):
            yield module_file(one.scorer)


def module_file(scorer: str) -> str:
    """The file, beside the job file, of the module in `python:module.function`."""
    return scorer.removeprefix(OWN).rpartition(".")[0].replace(".", "/") + ".py"


def _each(spec: CustomSpec | Several) -> tuple[CustomSpec, ...]:
    return spec.specs if isinstance(spec, Several) else (spec,)


def _name(spec: CustomSpec) -> str:
    return spec.name or PurePosixPath(spec.file).stem


def _plan(spec: CustomSpec, tokenizer: Tokenizer, seed: int, reader: Reader) -> list[PlannedSet]:
    tokenizer, generation = generation_of(spec, tokenizer, seed)
    scorer = _scorer(spec, reader)
    rows = [*rows_of(reader.read(spec.file, spec.place), spec.file)]
    if not rows:
        raise BadInput(f"{spec.place}: {spec.file} has no questions; give at least one row")
    columns = {key: spec.columns.get(key, key) for key in COLUMNS}
    _check_columns(spec, columns, [row for _, row in rows])
    read = _Rows(spec, columns, scorer, generation)
    if any(isinstance(value_at(row, columns["input"]), list) for _, row in rows):
        with located(spec.place):
            read.generation = generation = replace(generation, **in_turns(tokenizer, generation))
    questions = [read.question(number, place, row) for number, (place, row) in enumerate(rows)]
    if len({question.floor for question in questions}) > MOST_LENGTHS:
        questions = [replace(question, floor=0) for question in questions]
    return plan_questions(
        "custom",
        _name(spec),
        questions,
        lengths=spec.lengths,
        limit=spec.limit,
        tokenizer=tokenizer,
        generation=generation,
        place=spec.place,
    )


def _check_columns(spec: CustomSpec, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    for key in ("input", "target", *spec.columns):
        if all(value_at(row, columns[key]) is None for row in rows):
            raise BadInput(
                f"{spec.place}: {spec.file} has no column {quoted(columns[key])}, only {', '.join(rows[0])}; name it"
                f" as `columns: {{{key}: …}}`"
            )


class _Rows:
    """Reads the rows of one file."""

    def __init__(self, spec: CustomSpec, columns: Mapping[str, str], scorer: str, generation: Generation) -> None:
        self._columns = columns
        self._scorer = scorer
        self._new_tokens = spec.max_new_tokens or MAX_NEW_TOKENS
        self.generation = generation

    def question(self, number: int, place: str, row: Mapping[str, Any]) -> Question:
        """The question of a row; `BadInput` names the place of a bad one."""
        cells = {key: value_at(row, column) for key, column in self._columns.items()}
        prefix, prompt = self._prompt(cells["input"], cells["context"], place)
        return Question(
            number=number,
            prefix=prefix,
            prompt=prompt,
            answers=self._targets(cells["target"], place),
            scorer=self._scorer,
            depths=() if _is_empty(cells["depth"]) else (self._number(cells, "depth", place, 1),),
            haystack=hashlib.sha256(prefix.encode()).hexdigest()[:16] if prefix else "",
            answer_tokens=self._new_tokens,
            most_new_tokens=self._new_tokens,
            floor=0 if _is_empty(cells["length"]) else int(self._number(cells, "length", place, 1 << 40)),
        )

    def _prompt(self, asked: Any, context: Any, place: str) -> tuple[str, str]:
        before, after = self.generation.frame
        if isinstance(asked, list):
            if context:
                raise BadInput(f"{place}: {self._columns['context']} cannot precede messages; put it into the first")
            return "", conversation(turns_at(asked, place), self.generation)
        if not isinstance(asked, str) or not asked.strip():
            raise BadInput(f"{place}: {self._columns['input']} must be a text or a list of messages, and not empty")
        if _is_empty(context):
            return "", before + asked + after
        if not isinstance(context, str):
            raise BadInput(f"{place}: {self._columns['context']} must be a text")
        return f"{before}{context}\n\n", asked + after

    def _targets(self, target: Any, place: str) -> tuple[str, ...]:
        entries = target if isinstance(target, list) else [target]
        targets = tuple(map(as_text, entries))
        if not entries or any(_is_empty(entry) for entry in entries):
            raise BadInput(f"{place}: {self._columns['target']} must be a text or a list of texts, and not empty")
        if (words := WORDS.get(self._scorer)) and (bare := [entry for entry in targets if not words(entry)]):
            raise BadInput(
                f"{place}: {self._scorer} reads no word in {quoted(bare[0])}; take `scorer: exact` or `contains`"
            )
        if self._scorer == NAMES["contains"]:
            targets = tuple(map(postprocess, targets))
        if self._scorer == "regex":
            for entry in targets:
                try:
                    regex.compile(entry)
                except regex.error as error:
                    raise BadInput(
                        f"{place}: {quoted(entry)} is not a regular expression ({error}); mend it"
                    ) from error
        return targets

    def _number(self, cells: Mapping[str, Any], key: str, place: str, most: int) -> float:
        try:
            number = float(cells[key])
        except (TypeError, ValueError):
            number = -1
        if not 0 <= number <= most:
            raise BadInput(f"{place}: {self._columns[key]} must be a number from 0 to {most}, not {cells[key]!r:.40}")
        return number


def _is_empty(value: Any) -> bool:
    """Whether a cell holds nothing: pandas writes such a number as NaN."""
    return value is None or value != value or not as_text(value).strip()


def _scorer(spec: CustomSpec, reader: Reader) -> str:
    """The scorer of the items. A function of the user's own travels in them: its source, so that every worker has it.

    It is run by workers alone. `BadInput` if its file cannot be read, is not Python, or does not define the function.
    """
    if spec.scorer == "json_field":
        return f"json_field:{spec.field}"
    if not spec.scorer.startswith(OWN):
        return NAMES.get(spec.scorer, spec.scorer)
    name, file = spec.scorer.removeprefix(OWN), module_file(spec.scorer)
    function = name.rpartition(".")[2]
    source = reader.prose(file, spec.place)
    try:
        defined = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise BadInput(f"{spec.place}: {file}:{line}: not Python ({error.args[0]}); mend the file") from error
    if function not in defined:
        there = ", ".join(sorted(defined)) or "none"
        raise BadInput(f"{spec.place}: {file} defines no function {quoted(function)}; it has {there}")
    return f"{OWN}{name}\n{source}"

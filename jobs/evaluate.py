"""The `evaluate:` section of a job: which benchmarks, at which lengths, and the race."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol, TypeVar

from jobs.sources import LATER
from jobs.specs import (
    SWITCH,
    AtLeast,
    Between,
    Reads,
    Scalar,
    distinct,
    document_of,
    read_scalar,
    read_spec,
    schema_of,
    words_of,
)
from jobs.yaml_nodes import Node, quoted, suggestion

TOKENIZER_KEYS = ("tokenizer", "pretrained", "model")
"""Keys by which tasks of lm-evaluation-harness load a tokenizer, with its code: a job may not set them."""

SHORTEST_LENGTH = 64
"""Tokens of the shortest context that a benchmark asks at."""

Spec = TypeVar("Spec", bound="BenchmarkSpec")
Count = Annotated[int, AtLeast(1)]
Length = Annotated[int, AtLeast(SHORTEST_LENGTH)]
Margin = Annotated[float, Between(100, "a margin is a number of points between 0 and 100, such as 1.0")]
Alpha = Annotated[float, Between(0.5, "alpha, the chance of a wrong verdict, must lie between 0 and 0.5")]
Told = Scalar | tuple[Scalar, ...]

LENGTHS = "context lengths in tokens"
QUESTIONS = "questions that share one haystack"
ANSWER_PREFIX = "whether the prompt begins the answer, as RULER does; never before a thought"
TEMPLATE_KEYS = ("messages", "add_generation_prompt", "continue_final_message", "tools", "documents")
"""Arguments of a chat template that a job may not set: they are the conversation itself."""

PLAIN_SCORERS = ("exact", "contains", "regex", "f1", "rouge_l", "json_field")
SCORER = re.compile(rf"^({'|'.join(PLAIN_SCORERS)}|python:[A-Za-z_]\w*(\.[A-Za-z_]\w*)+)$")
COLUMNS = ("input", "target", "length", "context", "depth")
"""What a row of a user's own file may have; the first two it must have."""

BUDGET = 4096
"""Tokens of a thought, where the job does not say."""


class BenchmarkSpec(Protocol):
    """A job's demands on one benchmark: a frozen dataclass; `place` is its line in the job file."""

    @property
    def place(self) -> str: ...


def _answer(node: Node) -> str:
    if "{value}" not in node.string():
        raise node.error(f"{quoted(node.string())} is the same for every needle; put {{value}} where the value goes")
    return node.string()


def _metadata(node: Node) -> dict[str, Told]:
    for key, entry in node.mapping().items():
        if key in TOKENIZER_KEYS:
            raise entry.error(f"mergeyard sets {quoted(key)}, the points' own tokenizer; take it out")
    return {
        key: tuple(map(read_scalar, entry.sequence())) if entry.kind == "list" else read_scalar(entry)
        for key, entry in node.mapping().items()
    }


SCALAR_SCHEMA = {"type": ["string", "boolean", "number"]}
METADATA = Reads(
    _metadata,
    {
        "type": "object",
        "propertyNames": {"not": {"enum": [*TOKENIZER_KEYS]}},
        "additionalProperties": {"anyOf": [SCALAR_SCHEMA, {"type": "array", "items": SCALAR_SCHEMA, "minItems": 1}]},
    },
)


def _arguments(node: Node) -> dict[str, Scalar]:
    for key, entry in node.mapping().items():
        if key in TEMPLATE_KEYS:
            raise entry.error(f"mergeyard sets {quoted(key)}, the conversation itself; take it out")
    return {key: read_scalar(entry) for key, entry in node.mapping().items()}


def _chat(node: Node) -> bool | dict[str, Scalar]:
    if node.kind != "mapping":
        return node.boolean()
    return _arguments(node) or True


def _end(node: Node) -> str:
    if not node.string().strip():
        raise node.error("a thought may hold white space; give the text that ends it, such as </think>, or take it out")
    return node.string()


def _thinking(node: Node) -> ThinkingSpec | bool:
    if node.kind == "boolean":
        return ThinkingSpec() if node.boolean() else False
    if node.kind != "mapping":
        raise node.error(f"thinking must be `on`, `off` or settings such as `{{budget: 4096}}`, not {node.found}")
    return read_spec(ThinkingSpec, node)


def _temperature(node: Node) -> float:
    degree = float(node.number(minimum=0))
    if degree > 2:
        raise node.error(f"{quoted(node.path)} must be at most 2, as in vLLM and OpenAI's API, not {node.value}")
    return degree


def _share(node: Node) -> float:
    share = float(node.number())
    if not 0 < share <= 1:
        raise node.error(f"{quoted(node.path)} must be above 0 and at most 1, not {node.value}")
    return share


def _scorer(node: Node) -> str:
    if SCORER.fullmatch(node.string()) is None:
        near = suggestion(node.string(), PLAIN_SCORERS)
        raise node.error(f"there is no scorer {quoted(node.string())}{near}; your own is python:module.function")
    return node.string()


def _prompt(node: Node) -> str:
    if node.string().count("{haystack}") != 1 or "{question}" not in node.string().partition("{haystack}")[2]:
        raise node.error("a prompt has {haystack} once, and {question} after it; put both in")
    return node.string()


METRICS = Reads(
    lambda node: {task: entry.string() for task, entry in node.mapping().items()},
    {"type": "object", "additionalProperties": {"type": "string", "minLength": 1}},
)
PROMPT_SCHEMA = {"type": "string", "pattern": r"\{haystack\}[\s\S]*\{question\}"}
ARGUMENTS_SCHEMA = {
    "type": "object",
    "propertyNames": {"not": {"enum": [*TEMPLATE_KEYS]}},
    "additionalProperties": SCALAR_SCHEMA,
}
CHAT = Reads(_chat, {"anyOf": [SWITCH, ARGUMENTS_SCHEMA]})
THINKING = Reads(_thinking, lambda: {"anyOf": [SWITCH, schema_of(ThinkingSpec)]})
TEMPERATURE = Reads(_temperature, {"type": "number", "minimum": 0, "maximum": 2})
SHARE = Reads(_share, {"type": "number", "exclusiveMinimum": 0, "maximum": 1})


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingSpec:
    """A model that writes a thought before its answer."""

    end: Annotated[
        str | None,
        Reads(_end, {"type": "string", "pattern": r"\S"}),
        "the text that ends a thought; without it, as the chat template shows",
    ] = None
    budget: Annotated[Count, "tokens that a thought may take, beside those of the answer"] = BUDGET
    template: Annotated[
        Mapping[str, Scalar], Reads(_arguments, ARGUMENTS_SCHEMA), "arguments of the chat template that let it think"
    ] = field(default_factory=dict[str, Scalar])


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweringSpec:
    """The keys of all benchmarks that a model answers with a text."""

    chat: Annotated[
        bool | Mapping[str, Scalar], CHAT, "ask in the chat template of the tokenizer, perhaps with arguments"
    ] = False
    system: Annotated[str | None, "the system's message, in a chat"] = field(default=None, metadata=LATER)
    thinking: Annotated[
        ThinkingSpec | bool | None, THINKING, "whether a thought precedes the answer; without it, as the template shows"
    ] = field(default=None, metadata=LATER)
    max_new_tokens: Annotated[Count | None, "tokens of an answer; without it, as many as the task says"] = field(
        default=None, metadata=LATER
    )
    temperature: Annotated[float, TEMPERATURE, "0 answers greedily; above it, answers are drawn at random"] = field(
        default=0.0, metadata=LATER
    )
    top_p: Annotated[float, SHARE, "draw from the fewest tokens with this probability together"] = field(
        default=1.0, metadata=LATER
    )
    top_k: Annotated[int, AtLeast(0), "draw from so many of the likeliest tokens; 0: from all"] = field(
        default=0, metadata=LATER
    )
    samples: Annotated[Count, "answers to each item, whose mean is its score"] = field(default=1, metadata=LATER)
    place: str = field(default="", compare=False)


GREEDY = AnsweringSpec()


@dataclass(frozen=True, slots=True, kw_only=True)
class RulerSpec(AnsweringSpec):
    """RULER's tasks; without `tasks`, all thirteen."""

    lengths: Annotated[tuple[Length, ...], LENGTHS]
    items: Annotated[Count, "items for each task and length"] = 500
    tasks: Annotated[tuple[str, ...], "some of the thirteen tasks, by RULER's names"] = ()
    haystack: Annotated[str | None, "a text file for the essay tasks, in place of the bundled text"] = None
    documents: Annotated[
        Mapping[str, str], words_of(("qa_1", "qa_2")), "the data of qa_1 (SQuAD) and qa_2 (HotpotQA), as files"
    ] = field(default_factory=dict[str, str])
    questions: Annotated[Count, QUESTIONS] = 1
    answer_prefix: Annotated[bool, ANSWER_PREFIX] = field(default=True, metadata=LATER)


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedleSpec(AnsweringSpec):
    """One needle in a haystack, at several depths."""

    lengths: Annotated[tuple[Length, ...], LENGTHS]
    depths: Annotated[Count, "equally spaced depths"] = 11
    items: Annotated[Count, "items for each length and depth"] = 5
    questions: Annotated[Count, QUESTIONS] = 1
    answer: Annotated[
        str | None,
        Reads(_answer, {"type": "string", "pattern": r"\{value\}"}),
        "the whole answer, with {value} in the place of the value; without it, an answer must contain the value",
    ] = None
    haystack: Annotated[str | None, "a text file, or `noise` for RULER's five short sentences"] = None
    answer_prefix: Annotated[bool, ANSWER_PREFIX] = field(default=True, metadata=LATER)


@dataclass(frozen=True, slots=True, kw_only=True)
class BabilongSpec(AnsweringSpec):
    """BABILong's tasks; without `data`, of stories that are made here."""

    lengths: Annotated[tuple[Length, ...], LENGTHS]
    items: Annotated[Count, "items for each task and length"] = 100
    tasks: Annotated[tuple[str, ...], "tasks from qa1 to qa20"] = ("qa1", "qa2", "qa3", "qa4", "qa5")
    data: Annotated[str | None, "the folder of the published questions; without it, they are made"] = None
    haystack: Annotated[str | None, "a text file for the made ones, in place of the bundled text"] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LongbenchV2Spec(AnsweringSpec):
    """LongBench v2, from its published file."""

    lengths: Annotated[tuple[Length, ...], LENGTHS]
    data: Annotated[str, "the published file, or the folder with data.json"]
    tasks: Annotated[
        Literal["difficulty", "domain", "all"], "the column whose values are the tasks, or one task of all questions"
    ] = "difficulty"
    limit: Annotated[Count | None, "questions of each task and length; without it, all"] = None
    truncate: Annotated[
        Literal["none", "middle"], "whether texts that are too long lose their middle, or are not asked"
    ] = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class HelmetSpec(AnsweringSpec):
    """HELMET's tasks with exact scores, from published files; without any, of items that are made here."""

    lengths: Annotated[tuple[Length, ...], LENGTHS]
    items: Annotated[Count | None, "questions of each task and length; without it, 100, or 500 of examples"] = None
    tasks: Annotated[tuple[str, ...], "some of the tasks; without it, those that have data"] = ()
    data: Annotated[str | None, "HELMET's folder `data`, unpacked"] = None
    examples: Annotated[
        Mapping[str, str],
        words_of(("trec_coarse", "trec_fine", "banking77", "clinic150", "nlu")),
        "the folders of the tasks of in-context learning",
    ] = field(default_factory=dict[str, str])
    truncate: Annotated[
        Literal["none", "end"], "whether contexts that are too long lose their end, or are not asked"
    ] = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexitySpec:
    """Perplexity of stretches of a text, by position."""

    lengths: Annotated[tuple[Length, ...], LENGTHS]
    text: Annotated[str | None, "a text file, in place of the bundled text"] = None
    blocks: Annotated[Count, "stretches for each length"] = 16
    place: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessSpec(AnsweringSpec):
    """The keys of tasks of lm-evaluation-harness."""

    tasks: Annotated[tuple[str, ...], "names of tasks or groups, or paths of their YAML files"]
    limit: Annotated[Count | None, "items of each task; without it, all"] = None
    num_fewshot: Annotated[
        Annotated[int, AtLeast(0)] | None, "examples before each question; without it, as many as the task says"
    ] = None
    metadata: Annotated[
        Mapping[str, Told], METADATA, "passed to tasks that build their prompts from it, such as max_seq_lengths"
    ] = field(default_factory=dict[str, Told])


@dataclass(frozen=True, slots=True, kw_only=True)
class LmEvalSpec(HarnessSpec):
    """Tasks of lm-evaluation-harness; with `metrics`, every item of a task is asked by itself, as a search needs."""

    metrics: Annotated[
        Mapping[str, str],
        METRICS,
        "the metric of each task that counts, as `{arc_easy: acc}`; without it, all that can be a score",
    ] = field(default_factory=dict[str, str], metadata=LATER)


@dataclass(frozen=True, slots=True, kw_only=True)
class MrcrSpec(AnsweringSpec):
    """MRCR: one of several answers to equal requests, out of a long conversation."""

    lengths: Annotated[tuple[Length, ...], LENGTHS]
    items: Annotated[Count, "items for each length and number of needles"] = 100
    needles: Annotated[tuple[Annotated[int, AtLeast(2, 64)], ...], "equal requests in a conversation"] = (2, 4, 8)
    questions: Annotated[Count, QUESTIONS] = 1
    data: Annotated[str | None, "the published conversations, as a Parquet file or the folder of several"] = None
    haystack: Annotated[str | None, "a text file whose passages are the answers; without it, the bundled text"] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NolimaSpec(AnsweringSpec):
    """Needles that share no word with their questions, after NoLiMa."""

    lengths: Annotated[tuple[Length, ...], LENGTHS]
    depths: Annotated[Count, "equally spaced depths"] = 11
    items: Annotated[Count, "items for each task, length and depth"] = 5
    tasks: Annotated[tuple[str, ...], "`onehop`, `twohop`, or other kinds of questions of the needle set"] = ()
    questions: Annotated[Count, QUESTIONS] = 1
    data: Annotated[str | None, "a needle set of NoLiMa, as needle_set.json; without it, our own"] = None
    haystack: Annotated[str | None, "a text file, in place of the bundled text"] = None
    prompt: Annotated[str | None, Reads(_prompt, PROMPT_SCHEMA), "the prompt, with {haystack} and {question}"] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomSpec(AnsweringSpec):
    """Questions from a file of the user's own."""

    file: Annotated[str, "the questions, as JSON lines, CSV or Parquet"]
    scorer: Annotated[str, Reads(_scorer, {"type": "string", "pattern": SCORER.pattern}), "how an answer is scored"]
    name: Annotated[str | None, "the name of the task; without it, that of the file"] = None
    columns: Annotated[Mapping[str, str], words_of(COLUMNS), "the columns in the file that have other names"] = field(
        default_factory=dict[str, str]
    )
    lengths: Annotated[tuple[Length, ...], "context lengths in tokens; without them, as the questions need"] = ()
    limit: Annotated[Count | None, "questions of each length; without it, all"] = None
    field: Annotated[str | None, "the field of the answer that `json_field` compares, such as `place.city`"] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Several:
    """A benchmark's section that is a list: one spec for each entry."""

    specs: tuple[CustomSpec, ...]
    place: str = field(default="", compare=False)

    @property
    def chat(self) -> bool:
        """Whether all are asked in a chat."""
        return all(spec.chat for spec in self.specs)

    def document(self) -> list[dict[str, Any]]:
        """The section as plain data that reads back as the same."""
        return [document_of(spec) for spec in self.specs]


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardsSpec(HarnessSpec):
    """Tasks of lm-evaluation-harness that no kept point may lose: a point that surely does is out."""

    margin: Annotated[Margin, "points of 100 that each task may lose"] = 1.0
    baseline: Annotated[
        str | None, "a parent, or a point; without it the gate's, and without a gate the best parent by score"
    ] = None
    alpha: Annotated[Alpha, "chance that any point is called out wrongly"] = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceSpec:
    """Points leave when they are surely not among the best `keep`."""

    keep: Annotated[Count, "points that must survive"] = 1
    alpha: Annotated[
        Alpha | None, "chance that any of the best `keep` is dropped, in the whole race; without it, 3 standard errors"
    ] = None
    output_tokens: Annotated[bool, "whether a point stays that writes fewer tokens than one of the best `keep`"] = (
        field(default=False, metadata=LATER)
    )
    place: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The benchmarks that every point answers, by their keys in the job file; at least one.

    Without a `race` every point answers every item. `weights` are those of benchmarks in the score, 1 where none is
    given; they change no question.
    """

    benchmarks: Mapping[str, BenchmarkSpec]
    race: RaceSpec | None = None
    weights: Mapping[str, float] = field(default_factory=dict[str, float])
    place: str = field(default="", compare=False)

    @property
    def guards(self) -> GuardsSpec | None:
        """The section `guards`, if there is one."""
        return next((spec for spec in self.benchmarks.values() if isinstance(spec, GuardsSpec)), None)

    def digested(self) -> dict[str, Any]:
        """The content that the job's digest covers: every benchmark of `ALWAYS_DIGESTED`, asked or not."""
        weights = {"weights": self.weights} if self.weights else {}
        return {**dict.fromkeys(ALWAYS_DIGESTED), **self.benchmarks, "race": self.race, **weights}

    def document(self) -> dict[str, Any]:
        """The section as plain data that reads back as the same."""
        race = {} if self.race is None else {"race": document_of(self.race)}
        return (
            {
                key: spec.document() if isinstance(spec, Several) else document_of(spec)
                for key, spec in self.benchmarks.items()
            }
            | race
            | ({"weights": dict(self.weights)} if self.weights else {})
        )


SPECS: dict[str, type[BenchmarkSpec]] = {
    "ruler": RulerSpec,
    "needle": NeedleSpec,
    "perplexity": PerplexitySpec,
    "lm_eval": LmEvalSpec,
    "babilong": BabilongSpec,
    "longbench_v2": LongbenchV2Spec,
    "helmet": HelmetSpec,
    "mrcr": MrcrSpec,
    "nolima": NolimaSpec,
    "custom": CustomSpec,
    "guards": GuardsSpec,
}
"""The benchmarks that a job can ask for, by key; `workers.benchmarks.registry` has their behaviour."""

RANKED = [key for key, spec in SPECS.items() if spec is not GuardsSpec]
"""The benchmarks of which a job asks at least one: guards alone rank no point."""

ALWAYS_DIGESTED = ("ruler", "needle", "perplexity", "lm_eval")
"""These four are null in the digest of a job that does not ask them. Never add one: runs would no longer resume."""


def read_evaluation(node: Node) -> Evaluation:
    """The section at `node`; `BadInput` without a benchmark."""
    keys = node.mapping((*SPECS, "race", "weights"))
    asked = {key: _benchmark(SPECS[key], entry) for key, entry in keys.items() if key in SPECS}
    if not asked or all(SPECS[key] is GuardsSpec for key in asked):
        *others, last = RANKED
        raise node.error(f"nothing to evaluate; name a benchmark: {', '.join(others)} or {last}")
    return Evaluation(
        benchmarks=asked,
        race=_race(keys["race"]) if "race" in keys else None,
        weights=_weights(keys["weights"], asked) if "weights" in keys else {},
        place=node.place,
    )


def _weights(node: Node, asked: Collection[str]) -> dict[str, float]:
    """The weights of benchmarks that are asked and rank points; those of 1 are as if they were not given."""
    found: dict[str, float] = {}
    for key, entry in node.mapping([name for name in RANKED if name in asked]).items():
        weight = float(entry.number())
        if not 0 < weight < math.inf:
            raise entry.error(f"a weight must be above 0, not {entry.value}; to ignore {key}, take it out")
        if weight != 1:
            found[key] = weight
    return found


def _benchmark(kind: type[BenchmarkSpec], node: Node) -> BenchmarkSpec:
    """One benchmark's section; that of `custom` may be a list of several files."""
    if node.kind == "list" and kind is CustomSpec:
        specs = distinct(node, lambda entry: _checked(read_spec(CustomSpec, entry), entry))
        return Several(specs=specs, place=node.place)
    return _checked(read_spec(kind, node), node)


def _checked(spec: Spec, node: Node) -> Spec:
    """The spec, whose keys agree."""
    if isinstance(spec, CustomSpec) and (spec.scorer == "json_field") != (spec.field is not None):
        if spec.field is None:
            raise node.error("json_field compares one field of the answer; name it, as `field: city`")
        raise node.mapping()["field"].error("`field:` has an effect only with `scorer: json_field`; take it out")
    if isinstance(spec, LmEvalSpec) and spec.metrics:
        place = node.mapping()["metrics"]
        for task in spec.metrics.keys() - {*spec.tasks}:
            raise place.error(f"{quoted(task)} is not a task of `tasks:`{suggestion(task, spec.tasks)}")
        if missing := [task for task in spec.tasks if task not in spec.metrics]:
            raise place.error(f"`metrics:` names the metric of every task; add that of {quoted(missing[0])}")
        if spec.metadata:
            raise place.error("tasks that make their texts by `metadata:` are asked whole; take `metrics:` out")
    if isinstance(spec, AnsweringSpec) and not spec.temperature:
        for key in ("top_p", "top_k", "samples"):
            if getattr(spec, key) != getattr(GREEDY, key):
                raise node.mapping()[key].error(f"{key} needs a `temperature:` above 0; at 0 all answers are equal")
    if isinstance(spec, AnsweringSpec) and not spec.chat:
        if spec.system is not None:
            raise node.mapping()["system"].error(
                "`system:` has an effect only in a chat; set `chat: true`, or take it out"
            )
        if isinstance(spec.thinking, ThinkingSpec) and spec.thinking.template:
            place = node.mapping()["thinking"].mapping()["template"]
            raise place.error("`thinking.template` has an effect only in a chat; set `chat: true`, or take it out")
    return spec


def _race(node: Node) -> RaceSpec | None:
    if node.kind == "boolean":
        return RaceSpec(place=node.place) if node.boolean() else None
    if node.kind != "mapping":
        raise node.error(f"race must be `true`, `false` or settings such as `{{keep: 2}}`, not {node.found}")
    return read_spec(RaceSpec, node)


def _schema_of(spec: type[BenchmarkSpec]) -> dict[str, Any]:
    one = schema_of(spec)
    return {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]} if spec is CustomSpec else one


def evaluation_schema() -> dict[str, Any]:
    """The JSON Schema of the section."""
    race = {"anyOf": [SWITCH, schema_of(RaceSpec)]}
    weight = {"type": "number", "exclusiveMinimum": 0}
    weights = {
        "type": "object",
        "description": "the weights of benchmarks in the score; 1 where none is given",
        "properties": {key: {**weight, "description": f"the weight of {key}"} for key in RANKED},
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "description": "The benchmarks that every point answers; at least one.",
        "properties": {key: _schema_of(spec) for key, spec in SPECS.items()} | {"race": race, "weights": weights},
        "anyOf": [{"required": [key]} for key in RANKED],
        "additionalProperties": False,
    }

"""A job: parents, a recipe, the grid over it, and what to do with the points. `load_job` is the only door.

Everything that can be known without looking at a parent is checked here, and every refusal names file and line.
`jobs/README.md` is the reference of every key.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, TypeVar, cast

from jobs.errors import BadInput
from jobs.expressions import name_template
from jobs.grid import POINT_NAME, Grid, Point, expand, parse_grid
from jobs.loading import Node, load_document, quoted, suggestion
from jobs.recipe import Recipe, recipe_template
from jobs.tasks import digest

KEYS = (
    "name",
    "parents",
    "recipe",
    "grid",
    "point",
    "evaluate",
    "gate",
    "keep",
    "engine",
    "workers",
    "shard_size",
    "output",
    "seed",
    "numerics",
    "config_from",
)
OVERRIDES = ("output",)
# a job file may come from anywhere: an engine is told these and nothing that loads code, another model or a file
ENGINE_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "transformers": ("chunk", "batch", "cache_bytes"),
    "vllm": (
        "max_num_seqs", "max_num_batched_tokens", "max_model_len", "gpu_memory_utilization", "cache_gib", "swap_space",
        "cpu_offload_gb", "kv_cache_dtype", "block_size", "dtype", "enforce_eager", "enable_prefix_caching",
        "enable_chunked_prefill", "tensor_parallel_size", "pipeline_parallel_size", "enable_expert_parallel",
        "disable_custom_all_reduce", "seed",
    ),
    "openai": ("model", "max_length", "concurrency", "attempts", "timeout_seconds", "first_pause_seconds"),
}  # fmt: skip
TOKENIZER_KEYS = ("tokenizer", "pretrained", "model")
"""What tasks of lm-evaluation-harness load a tokenizer by, with its code: never what a job names."""

Scalar = str | bool | int | float
Told = Scalar | tuple[Scalar, ...]
PARENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}", re.ASCII)
DEFAULT_SHARD_BYTES = 10**9
MIN_LENGTH = 64
MAX_SEED = 2**64 - 1
Entry = TypeVar("Entry", int, str)
# what neither changes a byte of a point nor a score: where the job runs, where it writes, how its file is laid out
NOT_IN_DIGEST = frozenset({"output", "workers", "text", "source", "places"})


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
    """The benchmarks every point answers; at least one. Without a `race` every point answers every item."""

    ruler: RulerSpec | None = None
    needle: NeedleSpec | None = None
    perplexity: PerplexitySpec | None = None
    lm_eval: LmEvalSpec | None = None
    race: RaceSpec | None = None
    place: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSpec:
    """A point passes if it is surely less than `margin` points (of 100) worse than `baseline`.

    `alpha` is the chance of a wrong verdict; `length_margin`, where given, is asked of each length too. While there is
    no verdict, more items are asked, up to `budget` a task and length; None is four times what the evaluation asks.
    """

    baseline: str
    margin: float = 1.0
    length_margin: float | None = None
    alpha: float = 0.05
    budget: int | None = None
    place: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Which points are written: all of them, the `count` best by score, or none."""

    kind: Literal["all", "best", "none"] = "all"
    count: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What one worker asks of the cluster; `count` None takes as many as fit."""

    gpus: float = 0.0
    cpus: float = 1.0
    memory_bytes: int = 4 * 10**9
    count: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What generates: `transformers`, `vllm`, or an OpenAI-compatible server at `url`; `options` of ENGINE_OPTIONS."""

    name: Literal["transformers", "vllm", "openai"] = "transformers"
    url: str | None = None
    options: Mapping[str, str | bool | int | float] = field(default_factory=dict[str, str | bool | int | float])
    place: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A checked job. `parents` maps names to URLs or paths as written; `text` is the YAML it came from."""

    name: str
    parents: Mapping[str, str]
    points: tuple[Point, ...]
    evaluate: Evaluation | None = None
    gate: GateSpec | None = None
    keep: Keep = Keep()
    engine: EngineSpec = EngineSpec()
    workers: WorkerSpec = WorkerSpec()
    shard_bytes: int = DEFAULT_SHARD_BYTES
    output: str
    seed: int = 0
    numerics: Literal["float32", "mergekit"] = "float32"
    config_from: str | None = None
    text: str = field(compare=False, repr=False)
    source: str = field(compare=False)
    places: Mapping[str, str] = field(default_factory=dict[str, str], compare=False, repr=False)

    def digest(self) -> str:
        """sha256 (hex) of all that decides bytes and scores: not `output`, `workers`, comments or layout."""
        content = {
            entry.name: _canonical(getattr(self, entry.name))
            for entry in dataclasses.fields(self)
            if entry.name not in NOT_IN_DIGEST
        }
        return digest(content)

    def place_of(self, key: str) -> str:
        """File and line of a top-level key, or of a parent as `parents.cos`."""
        return self.places.get(key, f"{self.source}:1")


def load_job(text: str, name: str, overrides: Mapping[str, str] | None = None) -> Job:
    """The job in `text`; `name` is what places call the file, `overrides` replaces `output`."""
    document = load_document(text, name)
    replaced = dict(overrides or {})
    for key in replaced:
        if key not in OVERRIDES:
            raise BadInput(f"{name}:1: {quoted(key)} cannot be set from outside the file; only {', '.join(OVERRIDES)}")
    required = ("name", "parents", "recipe", *(() if "output" in replaced else ("output",)))
    keys = document.mapping(KEYS, required)
    job = Job(
        name=_name(keys["name"]),
        parents=_parents(keys["parents"]),
        points=_points(keys),
        evaluate=_evaluation(keys["evaluate"]) if "evaluate" in keys else None,
        gate=_gate(keys["gate"]) if "gate" in keys else None,
        keep=_keep(keys["keep"]) if "keep" in keys else Keep(),
        engine=_engine(keys["engine"]) if "engine" in keys else EngineSpec(),
        workers=_workers(keys["workers"]) if "workers" in keys else WorkerSpec(),
        shard_bytes=keys["shard_size"].size_bytes() if "shard_size" in keys else DEFAULT_SHARD_BYTES,
        output=replaced["output"] if "output" in replaced else keys["output"].string(),
        seed=_seed(keys["seed"]) if "seed" in keys else 0,
        numerics=_numerics(keys["numerics"]) if "numerics" in keys else "float32",
        config_from=keys["config_from"].string() if "config_from" in keys else None,
        text=text,
        source=name,
        places=_places(keys),
    )
    _check(job)
    return job


def load_merge_document(text: str, name: str, output: str) -> Job:
    """A plain mergekit document as a job of one point called `merge`; its parents are its references as written."""
    template = recipe_template(load_document(text, name))
    point = expand(template, parse_grid(None, template.place), None)[0]
    references = point.recipe.references()
    return Job(
        name="merge",
        parents={reference: reference for reference in references},
        points=(point,),
        output=output,
        text=text,
        source=name,
        places={f"parents.{name}": _place_of_reference(point.recipe, name) for name in references},
    )


def _points(keys: Mapping[str, Node]) -> tuple[Point, ...]:
    template = recipe_template(keys["recipe"])
    grid: Grid = parse_grid(keys.get("grid"), keys["recipe"].place)
    naming = name_template(keys["point"].string(), keys["point"].place) if "point" in keys else None
    return expand(template, grid, naming)


def _name(node: Node) -> str:
    if not POINT_NAME.fullmatch(node.string()):
        raise node.error(
            f"{quoted(node.string())} cannot name a job; "
            "at most 201 letters, digits and . _ + = , - beginning with a letter or digit"
        )
    return node.string()


def _parents(node: Node) -> dict[str, str]:
    entries = node.mapping()
    if not entries:
        raise node.error("the job has no parents; name at least one")
    for name, entry in entries.items():
        if not PARENT_NAME.fullmatch(name):
            raise entry.error(f"{quoted(name)} cannot name a parent; letters, digits and . _ -")
    return {name: entry.string() for name, entry in entries.items()}


def _evaluation(node: Node) -> Evaluation:
    keys = node.mapping(("ruler", "needle", "perplexity", "lm_eval", "race"))
    if not keys.keys() - {"race"}:
        raise node.error("nothing to evaluate; name a benchmark: ruler, needle, perplexity or lm_eval")
    return Evaluation(
        ruler=_ruler(keys["ruler"]) if "ruler" in keys else None,
        needle=_needle(keys["needle"]) if "needle" in keys else None,
        perplexity=_perplexity(keys["perplexity"]) if "perplexity" in keys else None,
        lm_eval=_lm_eval(keys["lm_eval"]) if "lm_eval" in keys else None,
        race=_race(keys["race"]) if "race" in keys else None,
        place=node.place,
    )


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
        key: tuple(map(_scalar, entry.sequence())) if entry.kind == "list" else _scalar(entry)
        for key, entry in node.mapping().items()
    }


def _race(node: Node) -> RaceSpec | None:
    if node.kind == "boolean":
        return RaceSpec(place=node.place) if node.boolean() else None
    keys = node.mapping(("keep", "alpha"))
    alpha = _alpha(keys["alpha"]) if "alpha" in keys else None
    return RaceSpec(keep=_count(keys, "keep", 1), alpha=alpha, place=node.place)


def _gate(node: Node) -> GateSpec:
    keys = node.mapping(("baseline", "margin", "length_margin", "alpha", "budget"), ("baseline",))
    return GateSpec(
        baseline=keys["baseline"].string(),
        margin=_margin(keys["margin"]) if "margin" in keys else 1.0,
        length_margin=_margin(keys["length_margin"]) if "length_margin" in keys else None,
        alpha=_alpha(keys["alpha"]) if "alpha" in keys else 0.05,
        budget=keys["budget"].integer(minimum=1) if "budget" in keys else None,
        place=keys["baseline"].place,
    )


def _keep(node: Node) -> Keep:
    if node.kind == "mapping":
        return Keep(kind="best", count=node.mapping(("best",), ("best",))["best"].integer(minimum=1))
    if node.kind != "string" or node.string() not in ("all", "none"):
        raise node.error("keep must be `all`, `none` or `{best: 3}`")
    return Keep(kind=cast(Literal["all", "none"], node.string()))


def _engine(node: Node) -> EngineSpec:
    names = ("transformers", "vllm", "openai")
    keys = {"name": node} if node.kind == "string" else node.mapping(("name", "url", "options"), ("name",))
    name = cast(Literal["transformers", "vllm", "openai"], keys["name"].choice(names))
    if name == "openai" and "url" not in keys:
        raise node.error("the engine openai needs `url:`, the address of the server")
    if name != "openai" and "url" in keys:
        raise keys["url"].error(f"the engine {name} has no `url:`; take it out")
    if "url" in keys and any(sign in keys["url"].string() for sign in "@?#"):
        raise keys["url"].error("the server's address holds no credentials; the key comes from OPENAI_API_KEY")
    return EngineSpec(
        name=name,
        url=keys["url"].string() if "url" in keys else None,
        options=_options(keys["options"], name) if "options" in keys else {},
        place=node.place,
    )


def _options(node: Node, engine: str) -> dict[str, str | bool | int | float]:
    known = ENGINE_OPTIONS[engine]
    for option, entry in node.mapping().items():
        if option not in known:
            raise entry.error(f"the engine {engine} takes no option {quoted(option)}{suggestion(option, known)}")
    return {option: _scalar(entry) for option, entry in node.mapping().items()}


def _workers(node: Node) -> WorkerSpec:
    keys = node.mapping(("gpus", "cpus", "memory", "count"))
    defaults = WorkerSpec()
    return WorkerSpec(
        gpus=float(keys["gpus"].number(minimum=0)) if "gpus" in keys else defaults.gpus,
        cpus=float(keys["cpus"].number(minimum=0)) if "cpus" in keys else defaults.cpus,
        memory_bytes=keys["memory"].size_bytes() if "memory" in keys else defaults.memory_bytes,
        count=keys["count"].integer(minimum=1) if "count" in keys else None,
    )


def _seed(node: Node) -> int:
    seed = node.integer(minimum=0)
    if seed > MAX_SEED:
        raise node.error(f"a seed is at most {MAX_SEED}")
    return seed


def _numerics(node: Node) -> Literal["float32", "mergekit"]:
    return cast(Literal["float32", "mergekit"], node.choice(("float32", "mergekit")))


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


def _margin(node: Node) -> float:
    margin = node.number()
    if not 0 < margin < 100:
        raise node.error(f"a margin is a number of points between 0 and 100, such as 1.0, not {node.value}")
    return float(margin)


def _alpha(node: Node) -> float:
    alpha = node.number()
    if not 0 < alpha < Fraction(1, 2):
        raise node.error(f"alpha, the chance of a wrong verdict, must lie between 0 and 0.5, not {node.value}")
    return float(alpha)


def _scalar(node: Node) -> Scalar:
    if node.kind == "number":
        number = node.number()
        return number.numerator if number.denominator == 1 else float(number)
    return node.boolean() if node.kind == "boolean" else node.string()


def _places(keys: Mapping[str, Node]) -> dict[str, str]:
    parents = {f"parents.{name}": entry.place for name, entry in keys["parents"].mapping().items()}
    return {key: node.place for key, node in keys.items()} | parents


def _check(job: Job) -> None:
    used = _check_references(job)
    baseline = job.gate.baseline if job.gate else None
    for parent in job.parents:
        if parent not in used and parent != baseline:
            place = job.place_of(f"parents.{parent}")
            raise BadInput(
                f"{place}: the parent {quoted(parent)} is used nowhere; use it in the recipe, or take it out"
            )
    if job.config_from is not None and job.config_from not in job.parents:
        near = suggestion(job.config_from, job.parents)
        raise BadInput(f"{job.place_of('config_from')}: {quoted(job.config_from)} is no parent{near}")
    if job.gate is not None:
        _check_gate(job, job.gate)
    if job.keep.kind == "best" and job.evaluate is None:
        raise BadInput(f"{job.place_of('keep')}: the best points are known only after `evaluate:`; add it, or keep all")
    race = None if job.evaluate is None else job.evaluate.race
    if job.keep.kind == "best" and race is not None and race.keep < (job.keep.count or 0):
        raise BadInput(
            f"{race.place}: a race for {race.keep} does not tell the best {job.keep.count} that `keep:` wants;"
            f" give race: {{keep: {job.keep.count}}}"
        )
    if job.keep.kind == "none" and job.evaluate is None:
        raise BadInput(f"{job.place_of('keep')}: nothing would be written and nothing evaluated; keep all, or evaluate")


def _check_references(job: Job) -> set[str]:
    used: set[str] = set()
    for point in job.points:
        for reference in point.recipe.references():
            if reference not in used and reference not in job.parents:
                place = _place_of_reference(point.recipe, reference)
                raise BadInput(f"{place}: {quoted(reference)} is not in `parents:`{suggestion(reference, job.parents)}")
            used.add(reference)
    return used


def _place_of_reference(recipe: Recipe, reference: str) -> str:
    sources = (source.place for source in recipe.models if source.model == reference)
    return next(sources, recipe.place_of("base_model"))


def _check_gate(job: Job, gate: GateSpec) -> None:
    if job.evaluate is None:
        raise BadInput(f"{job.place_of('gate')}: a gate judges scores; add `evaluate:`, or take the gate out")
    points = {point.name for point in job.points}
    if gate.baseline not in job.parents and gate.baseline not in points:
        near = suggestion(gate.baseline, (*job.parents, *points))
        raise BadInput(f"{gate.place}: the baseline {quoted(gate.baseline)} is neither a parent nor a point{near}")


def _canonical(value: Any) -> Any:
    """`value` as JSON types, without the fields that say where something stands."""
    if dataclasses.is_dataclass(value):
        fields = (entry for entry in dataclasses.fields(value) if entry.compare)
        return {entry.name: _canonical(getattr(value, entry.name)) for entry in fields}
    if isinstance(value, Fraction):
        return {"exactly": f"{value.numerator}/{value.denominator}"}
    if isinstance(value, Mapping):
        return {str(key): _canonical(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return [_canonical(part) for part in value]
    return value

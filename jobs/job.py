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
from typing import Any, Literal, cast

from jobs.engine import EngineSpec, read_engine
from jobs.errors import BadInput
from jobs.evaluate import Evaluation, read_alpha, read_evaluation
from jobs.expressions import name_template
from jobs.grid import POINT_NAME, Grid, Point, expand, parse_grid
from jobs.merge_tasks import digest
from jobs.recipe import Recipe, recipe_template
from jobs.yaml_nodes import Node, load_document, quoted, suggestion

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
PARENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}", re.ASCII)
DEFAULT_SHARD_BYTES = 10**9
MAX_SEED = 2**64 - 1
# what neither changes a byte of a point nor a score: where the job runs, where it writes, how its file is laid out
NOT_IN_DIGEST = frozenset({"output", "workers", "text", "source", "places"})


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
class Job:
    """A checked job. `parents` maps names to URLs or paths as written; `text` is the YAML it came from."""

    name: str
    parents: Mapping[str, str]
    points: tuple[Point, ...]
    evaluate: Evaluation | None = None
    gate: GateSpec | None = None
    keep: Keep = Keep()
    engine: EngineSpec = field(default_factory=EngineSpec)
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
        evaluate=read_evaluation(keys["evaluate"]) if "evaluate" in keys else None,
        gate=_gate(keys["gate"]) if "gate" in keys else None,
        keep=_keep(keys["keep"]) if "keep" in keys else Keep(),
        engine=read_engine(keys["engine"]) if "engine" in keys else EngineSpec(),
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


def _gate(node: Node) -> GateSpec:
    keys = node.mapping(("baseline", "margin", "length_margin", "alpha", "budget"), ("baseline",))
    return GateSpec(
        baseline=keys["baseline"].string(),
        margin=_margin(keys["margin"]) if "margin" in keys else 1.0,
        length_margin=_margin(keys["length_margin"]) if "length_margin" in keys else None,
        alpha=read_alpha(keys["alpha"]) if "alpha" in keys else 0.05,
        budget=keys["budget"].integer(minimum=1) if "budget" in keys else None,
        place=keys["baseline"].place,
    )


def _keep(node: Node) -> Keep:
    if node.kind == "mapping":
        return Keep(kind="best", count=node.mapping(("best",), ("best",))["best"].integer(minimum=1))
    if node.kind != "string" or node.string() not in ("all", "none"):
        raise node.error("keep must be `all`, `none` or `{best: 3}`")
    return Keep(kind=cast(Literal["all", "none"], node.string()))


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


def _margin(node: Node) -> float:
    margin = node.number()
    if not 0 < margin < 100:
        raise node.error(f"a margin is a number of points between 0 and 100, such as 1.0, not {node.value}")
    return float(margin)


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
    if isinstance(value, Evaluation):
        return _canonical(value.digested())
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

"""A job: parents, a recipe, the grid over it, and the work on its points. `load_job` is the only door.

Everything that can be known without looking at a parent is checked here, and every refusal names file and line.
`jobs/README.md` is the reference of every key.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Annotated, Any, Literal, cast

from jobs.engine import EngineSpec, engine_schema, read_engine
from jobs.errors import BadInput
from jobs.evaluate import SPECS, Alpha, Count, Evaluation, GuardsSpec, Margin, evaluation_schema, read_evaluation
from jobs.expressions import name_template
from jobs.grid import POINT_NAME, Grid, Point, expand, grid_schema, parse_grid
from jobs.kinds_of_files import check_kind
from jobs.merge_tasks import digest
from jobs.search import SearchedRecipe, SearchSpec, read_search, search_schema
from jobs.sources import LATER
from jobs.specs import (
    MADE,
    AtLeast,
    Between,
    Bytes,
    Gpus,
    Key,
    NotNegative,
    Reads,
    document_of,
    fields_of,
    keys_at,
    read_spec,
    schema_of,
)
from jobs.stages import StagesTemplate, plain_stages, results_in_order, stages_schema, stages_template
from jobs.trajectories import Trajectories, one_of, parents_document, parents_schema, read_parents
from jobs.yaml_nodes import Node, load_document, load_documents, quoted, suggestion, yaml_text

PARENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}", re.ASCII)
MAX_SEED = 2**64 - 1
BLESSED = "blessed"
"""The gate's baseline in the job of a night; the baseline of the user's job stays among its parents, in no recipe."""

# these decide no byte and no score: where the job runs and writes, and where `points` come from
NOT_IN_DIGEST = frozenset({"output", "workers", "recipe", "grid", "point", "source", "places", "trajectories"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensSpec:
    """The tokens of output, thoughts and answers, that are not too many."""

    at_most: Annotated[
        float,
        Between(10, "at_most is a multiple of the tokens of another model, between 0 and 10, such as 0.8"),
        "the most tokens per question, as a multiple of those of the other model",
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSpec:
    """A point passes if it is surely less than `margin` points worse than `baseline`."""

    baseline: Annotated[str, "a parent, or a point"]
    margin: Annotated[Margin, "points of 100 that the macro score may lose"] = 1.0
    length_margin: Annotated[Margin | None, "points that each length may lose; without it, none is judged"] = None
    alpha: Annotated[Alpha, "chance of a wrong verdict"] = 0.05
    budget: Annotated[
        Count | None, "most items for each task and length; without it, four times the items of the evaluation"
    ] = None
    output_tokens: Annotated[
        TokensSpec | None,
        Reads(partial(read_spec, TokensSpec), partial(schema_of, TokensSpec)),
        "the tokens of output that pass, beside the score; without it, the score alone is judged",
    ] = field(default=None, metadata=LATER)
    place: str = field(default="", compare=False)


COMMAND_LINE = "mergeyard evaluate"
"""The source of a job that was made of a command's arguments, for errors whose remedy is an option there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """The points that are written: all of them, the `count` best by score, or none."""

    kind: Literal["all", "best", "none"] = "all"
    count: int | None = None

    def document(self) -> Any:
        """The value of `keep:`."""
        return {"best": self.count} if self.kind == "best" else self.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """The resources of one worker."""

    gpus: Annotated[float, Gpus(), "GPUs of one worker"] = 0.0
    cpus: Annotated[float, NotNegative(), "CPUs of one worker"] = 1.0
    memory_bytes: Annotated[int, Bytes(), Key("memory"), "memory of one worker"] = 4 * 10**9
    count: Annotated[Count | None, "most workers; without it, as many as fit"] = None


def _name(node: Node) -> str:
    if not POINT_NAME.fullmatch(node.string()):
        raise node.error(
            f"{quoted(node.string())} cannot name a job; "
            "at most 201 letters, digits and . _ + = , - beginning with a letter or digit"
        )
    return node.string()


def _parents(node: Node) -> dict[str, str]:
    return read_parents(node, PARENT_NAME)[0]


def _gate(node: Node) -> GateSpec:
    gate = read_spec(GateSpec, node)
    return dataclasses.replace(gate, place=node.mapping()["baseline"].place)


def _keep(node: Node) -> Keep:
    if node.kind == "mapping":
        return Keep(kind="best", count=node.mapping(("best",), ("best",))["best"].integer(minimum=1))
    if node.kind != "string" or node.string() not in ("all", "none"):
        raise node.error("keep must be `all`, `none` or `{best: 3}`")
    return Keep(kind=cast(Literal["all", "none"], node.string()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A checked job; `points` are made of `recipe`, `grid` and `point`, which are plain data.

    With `search` in place of `grid` they are one point of each kind, and `searched` makes those that are asked.
    """

    name: Annotated[str, Reads(_name, {"type": "string", "pattern": f"^{POINT_NAME.pattern}$"}), "name of the job"]
    parents: Annotated[
        Mapping[str, str],
        Reads(
            _parents,
            partial(parents_schema, PARENT_NAME),
        ),
        "name and URL or path of each checkpoint",
    ]
    recipe: Annotated[
        Any, Reads(plain_stages, stages_schema), "a mergekit document with ${axis} placeholders, or a list of stages"
    ] = field(compare=False, repr=False)
    grid: Annotated[Mapping[str, Any] | None, Reads(Node.plain, grid_schema), "values of the axes"] = field(
        default=None, compare=False, repr=False
    )
    point: Annotated[str | None, "name of each point, with {axis}"] = field(default=None, compare=False, repr=False)
    points: tuple[Point, ...] = field(metadata=MADE)
    search: Annotated[
        SearchSpec | None, Reads(read_search, search_schema), "in place of `grid`: axes of which few points are asked"
    ] = field(default=None, metadata=LATER)
    evaluate: Annotated[Evaluation | None, Reads(read_evaluation, evaluation_schema), "benchmarks of every point"] = (
        None
    )
    gate: Annotated[GateSpec | None, Reads(_gate, partial(schema_of, GateSpec)), "test of the best point"] = None
    keep: Annotated[
        Keep,
        Reads(
            _keep,
            {
                "anyOf": [
                    {"enum": ["all", "none"]},
                    {
                        "type": "object",
                        "properties": {"best": {"type": "integer", "minimum": 1}},
                        "required": ["best"],
                        "additionalProperties": False,
                    },
                ]
            },
        ),
        "points that are written",
    ] = Keep()
    engine: Annotated[EngineSpec, Reads(read_engine, engine_schema), "model library or server"] = field(
        default_factory=EngineSpec
    )
    workers: Annotated[
        WorkerSpec,
        Reads(partial(read_spec, WorkerSpec), partial(schema_of, WorkerSpec)),
        "resources of one worker",
    ] = WorkerSpec()
    shard_bytes: Annotated[int, Bytes(), Key("shard_size"), "size of an output file"] = 10**9
    output: Annotated[str, "folder or bucket of the runs"]
    seed: Annotated[int, AtLeast(0, MAX_SEED), "seed of random methods and items"] = 0
    numerics: Annotated[Literal["float32", "mergekit"], "arithmetic of the merge"] = "float32"
    config_from: Annotated[str | None, "parent whose config.json holds where parents disagree"] = None
    copy_code: Annotated[bool, "whether points get the parents' files of code"] = field(default=False, metadata=LATER)
    source: str = field(compare=False)
    places: Mapping[str, str] = field(default_factory=dict[str, str], compare=False, repr=False)
    trajectories: Trajectories = field(default_factory=dict[str, tuple[str, ...]], compare=False, repr=False)
    searched: SearchedRecipe | None = field(default=None, compare=False, repr=False)

    def digest(self) -> str:
        """sha256 (hex) of all that decides bytes and scores: not `output`, `workers`, comments or layout."""
        content = {key: part for key, part in _canonical(self).items() if key not in NOT_IN_DIGEST}
        if self.search is not None:  # whose points are not listed
            content |= {"recipe": yaml_text(self.recipe), "point": self.point}
        return digest(content)

    def document(self) -> dict[str, Any]:
        """The resolved job as plain data, every default filled in; it reads back as the same job."""
        return document_of(self) | {"parents": parents_document(self.parents, self.trajectories)}

    def used_parents(self) -> tuple[str, ...]:
        """The parents, without those of a trajectory that no point is merged from or compared with."""
        used = {reference for point in self.points for reference in point.parents()}
        used |= {self.config_from or "", *_baselines(self)}
        of_trajectories = {parent for of in self.trajectories.values() for parent in of}
        return tuple(parent for parent in self.parents if parent in used or parent not in of_trajectories)

    def place_of(self, key: str) -> str:
        """File and line of a top-level key, or of a parent as `parents.cos`."""
        return self.places.get(key, f"{self.source}:1")

    def setting(self, key: str, value: str) -> str:
        """The words that set a top-level key, for a remedy: in a job file, or as an option of `mergeyard merge`."""
        return f"`{key}: {value}`" if "recipe" in self.places else f"`--{key.replace('_', '-')} {value}`"


def load_job(text: str, name: str, output: str | None = None) -> Job:
    """The job in `text`; `name` is the file's name in error messages, `output` replaces the file's."""
    node = load_document(text, name)
    check_kind(node, "recipe")
    return read_job(node, output)


def read_job(node: Node, output: str | None = None) -> Job:
    """The job at `node`, the root of a document."""
    node = node.without_anchors([field.name for field in fields_of(Job)])
    given: dict[str, Any] = {} if output is None else {"output": output}
    keys = keys_at(Job, node, given)
    _, trajectories = read_parents(keys["parents"], PARENT_NAME)
    given |= {"trajectories": trajectories}
    if "search" in keys:
        given |= _searched(keys, trajectories)
    else:
        given |= {"points": _points(keys, trajectories)}
    given |= {"source": node.document, "places": _places(keys, trajectories)}
    job = _with_checkpoints(read_spec(Job, node, given=given))
    _check(job)
    return job


def load_merge_document(text: str, name: str, output: str) -> Job:
    """A plain mergekit file as a job; its parents are its references as written.

    Its point is called `merge`. Where documents that have names make several results, there is a point for each.
    """
    documents = load_documents(text, name)
    check_kind(documents[0], "merge_method")
    results = results_in_order(documents)
    templates = [stages_template(node, foreign=True) for node in results]
    grid = parse_grid(None, templates[0].place)
    points = tuple(expand(template, grid, None)[0] for template in templates)
    if len(points) > 1:
        points = tuple(
            dataclasses.replace(point, name=_point_name(node)) for point, node in zip(points, results, strict=True)
        )
    _check_stages(templates[0], points)
    parents = {parent: point for point in reversed(points) for parent in point.parents()}
    return Job(
        name="merge",
        parents={parent: parent for point in points for parent in point.parents()},
        points=points,
        output=output,
        recipe=plain_stages(results[0]) if len(points) == 1 else [plain_stages(node) for node in results],
        source=name,
        places={f"parents.{parent}": _place_of_reference(point, parent) for parent, point in parents.items()},
    )


def _point_name(result: Node) -> str:
    """The name of one of several results, which is the name of its folder too."""
    document = result.sequence()[-1] if result.kind == "list" else result
    name = document.mapping()["name"]
    if not POINT_NAME.fullmatch(name.string()):
        raise name.error(
            f"{quoted(name.string())} cannot name a folder; "
            "at most 201 letters, digits and . _ + = , - beginning with a letter or digit"
        )
    return name.string()


def _with_checkpoints(job: Job) -> Job:
    """The job in which `gate`, `guards` and `config_from` name a checkpoint where they say `step[-1]`."""
    if job.config_from is not None:
        found = one_of(job.config_from, job.trajectories, job.place_of("config_from"))
        job = dataclasses.replace(job, config_from=found)
    if job.gate is not None:
        baseline = one_of(job.gate.baseline, job.trajectories, job.gate.place)
        job = dataclasses.replace(job, gate=dataclasses.replace(job.gate, baseline=baseline))
    guards = None if job.evaluate is None else job.evaluate.guards
    if guards is not None and guards.baseline is not None:
        job = with_guards_baseline(job, one_of(guards.baseline, job.trajectories, guards.place))
    return job


def with_guards_baseline(job: Job, baseline: str) -> Job:
    """The job whose guards compare with `baseline`."""
    assert job.evaluate is not None
    asked = {
        key: dataclasses.replace(spec, baseline=baseline) if isinstance(spec, GuardsSpec) else spec
        for key, spec in job.evaluate.benchmarks.items()
    }
    return dataclasses.replace(job, evaluate=dataclasses.replace(job.evaluate, benchmarks=asked))


def _searched(keys: Mapping[str, Node], trajectories: Trajectories) -> dict[str, Any]:
    """What a search has in place of a grid's points; without `keep:` its best point is written."""
    if "grid" in keys:
        raise keys["grid"].error("`grid:` and `search:` exclude each other; take one out")
    spec = read_search(keys["search"])
    parents = [*_parents(keys["parents"])]
    searched = SearchedRecipe(keys["recipe"], spec.space, keys.get("point"), trajectories, parents)
    points = searched.kinds()
    _check_stages(searched.template(spec.space.middle()), points)
    keep = {} if "keep" in keys else {"keep": Keep(kind="best", count=1)}
    return {"search": spec, "searched": searched, "points": points, **keep}


def _points(keys: Mapping[str, Node], trajectories: Trajectories) -> tuple[Point, ...]:
    template = stages_template(keys["recipe"])
    grid: Grid = parse_grid(keys.get("grid"), keys["recipe"].place)
    naming = name_template(keys["point"].string(), keys["point"].place) if "point" in keys else None
    points = expand(template, grid, naming, trajectories)
    _check_stages(template, points)
    return points


def _check_stages(template: StagesTemplate, points: Sequence[Point]) -> None:
    """Refuses a stage that no point uses."""
    used = {name for point in points for name in point.stages}
    for name, stage in template.stages.items():
        if name not in used:
            near = suggestion(name, points[0].parents())
            raise BadInput(f"{stage.place}: no merge uses {quoted(name)}; name it as a model, or take it out{near}")


def job_schema() -> dict[str, Any]:
    """The JSON Schema of a job file, for editors and other checkers; cross-checks between sections are left out."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mergeyard job",
        **schema_of(Job),
        "description": "A grid of merges of checkpoints, the benchmarks of its points, and the place of the results.",
    }


def _places(keys: Mapping[str, Node], trajectories: Trajectories) -> dict[str, str]:
    entries = keys["parents"].mapping()
    places = {f"parents.{name}": entry.place for name, entry in entries.items()}
    places |= {f"parents.{parent}": entries[name].place for name, of in trajectories.items() for parent in of}
    return {key: node.place for key, node in keys.items()} | places


def _check(job: Job) -> None:
    used = _check_references(job)
    baselines = _baselines(job)
    checkpoints = {parent: of for of in job.trajectories.values() for parent in of}
    for parent in job.parents:
        together = {*checkpoints.get(parent, ()), parent}
        if BLESSED not in baselines and not together & {*used, *baselines}:
            place = job.place_of(f"parents.{parent}")
            raise BadInput(
                f"{place}: the parent {quoted(parent)} is used nowhere; use it in the recipe, or take it out"
            )
    _check_measured(job)
    if job.config_from is not None and job.config_from not in job.parents:
        near = suggestion(job.config_from, job.parents)
        raise BadInput(f"{job.place_of('config_from')}: {quoted(job.config_from)} is not a parent{near}")
    if job.config_from is not None:
        _check_model(job, job.config_from, job.place_of("config_from"))
    if job.gate is not None:
        _check_gate(job, job.gate)
    if job.search is not None:
        _check_search(job, job.search)
    if (guards := None if job.evaluate is None else job.evaluate.guards) is not None:
        _check_baseline(job, guards.baseline, guards.place)
    names = [*job.parents, *(point.name for point in job.points)]
    for name, server in job.engine.servers.items():
        if name not in names:
            near = suggestion(name, names)
            raise BadInput(f"{server.place}: {quoted(name)} is neither a parent nor a point{near}")
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


def _check_search(job: Job, search: SearchSpec) -> None:
    """Refuses what a search cannot do."""
    evaluation = job.evaluate
    if evaluation is None:
        raise BadInput(f"{search.place}: a search needs the scores of its points; add `evaluate:`")
    if evaluation.guards is not None:
        raise BadInput(
            f"{search.place}: guards are not asked in a search; take `guards:` out, and name what must not fall under"
            " `at_least:`"
        )
    if job.keep.kind == "all":
        raise BadInput(
            f"{job.place_of('keep')}: the points of a search are not written, only its best; give `keep: {{best: 1}}`"
        )
    if job.engine.name == "openai":
        raise BadInput(
            f"{job.engine.place}: a server serves one model, and a search merges many; take transformers or vllm"
        )
    if job.gate is not None and job.gate.baseline not in job.parents:
        raise BadInput(
            f"{job.gate.place}: the gate of a search has a parent as its baseline"
            f"{suggestion(job.gate.baseline, job.parents)}"
        )
    for constraint in search.at_least:
        if constraint.of not in job.parents:
            raise BadInput(
                f"{constraint.place}: {quoted(constraint.of)} is not a parent{suggestion(constraint.of, job.parents)}"
            )
    for figure in (*search.maximize, *search.at_least):
        name, _, length = figure.metric.partition("@")
        if name in SPECS and name not in evaluation.benchmarks:
            raise BadInput(f"{figure.place}: {quoted(figure.metric)} is not asked; add `{name}:` under `evaluate:`")
        of = [spec for key, spec in evaluation.benchmarks.items() if name not in SPECS or key == name]
        lengths = {str(known) for spec in of for known in getattr(spec, "lengths", ())}
        if length and length not in lengths:
            raise BadInput(f"{figure.place}: nothing is asked at {length} tokens{suggestion(length, lengths)}")


def _check_references(job: Job) -> set[str]:
    used: set[str] = set()
    for point in job.points:
        for reference in point.parents():
            if reference not in used and reference not in job.parents:
                place, names = _place_of_reference(point, reference), [*job.parents, *point.stages]
                raise BadInput(f"{place}: {quoted(reference)} is not in `parents:`{suggestion(reference, names)}")
            used.add(reference)
        for name, stage in point.stages.items():
            if name in job.parents:
                raise BadInput(f"{stage.place}: {quoted(name)} is the name of a parent too; give the merge another")
    return used


def _check_measured(job: Job) -> None:
    """Refuses a file of statistics for a model that no point merges."""
    named = {
        name: point.recipe.place_of(key)
        for point in job.points
        for key, files in (("grams", point.recipe.grams), ("fisher", point.recipe.fisher))
        for name in files or ()
    }
    merged = {source.model for point in job.points if named for source in point.recipe.sources()}
    for name in sorted(named.keys() - merged - job.parents.keys()):
        raise BadInput(f"{named[name]}: {quoted(name)} is not in `parents:`{suggestion(name, job.parents)}")


def _place_of_reference(point: Point, reference: str) -> str:
    names = {reference, *(f"{stage}+{reference}" for stage in point.stages)}
    recipe = next(recipe for recipe in point.recipes if not names.isdisjoint(recipe.parents()))
    sources = (source.place for source in recipe.sources() if source.model in names)
    bases = (part.places["base_model"] for part in recipe.slices if part.base_model in names)
    key = "base_model" if recipe.base_model in names else "tokenizer" if recipe.tokenizer else "tokenizer_source"
    return next(sources, next(bases, recipe.place_of(key)))


def _check_gate(job: Job, gate: GateSpec) -> None:
    if job.evaluate is None:
        raise BadInput(f"{job.place_of('gate')}: a gate judges scores; add `evaluate:`, or take the gate out")
    _check_baseline(job, gate.baseline, gate.place)


def _baselines(job: Job) -> set[str]:
    """The names that the gate and the guards compare with."""
    guards = None if job.evaluate is None else job.evaluate.guards
    return {spec.baseline for spec in (job.gate, guards) if spec is not None and spec.baseline is not None}


def _check_baseline(job: Job, baseline: str | None, place: str) -> None:
    points = {point.name for point in job.points}
    if baseline is not None and baseline not in job.parents and baseline not in points:
        near = suggestion(baseline, (*job.parents, *points))
        raise BadInput(f"{place}: the baseline {quoted(baseline)} is neither a parent nor a point{near}")
    if baseline is not None and baseline not in points:
        _check_model(job, baseline, place)


def _check_model(job: Job, parent: str, place: str) -> None:
    """Refuses a parent that is the adapter on a stage."""
    if any(parent in point.adapters() for point in job.points):
        raise BadInput(f"{place}: {quoted(parent)} is an adapter on a merge, and not a model; name another parent")


def _canonical(value: Any) -> Any:
    """`value` as JSON types, without the fields that say where something stands."""
    if isinstance(value, Evaluation):
        return _canonical(value.digested())
    if dataclasses.is_dataclass(value):
        fields = {entry: getattr(value, entry.name) for entry in dataclasses.fields(value) if entry.compare}
        return {
            entry.name: _canonical(own)
            for entry, own in fields.items()
            if not (entry.metadata == LATER and own in (entry.default, {}))
        }
    if isinstance(value, Fraction):
        return {"exactly": f"{value.numerator}/{value.denominator}"}
    if isinstance(value, Mapping):
        return {str(key): _canonical(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return [_canonical(part) for part in value]
    return value

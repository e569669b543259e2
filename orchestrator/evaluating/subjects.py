"""The items, subjects and models of an evaluation: known beforehand, and refused if they cannot work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs.errors import BadInput
from jobs.evaluate import SHORTEST_LENGTH, Evaluation, GuardsSpec, RaceSpec
from jobs.evaluation_tasks import Kind, ModelSpec
from jobs.job import COMMAND_LINE
from jobs.merge_tasks import digest, places_read
from jobs.yaml_nodes import quoted, suggestion
from orchestrator.judging.samples import Cell
from orchestrator.planning.beside import GENERATION
from orchestrator.planning.layouts import Layout
from orchestrator.planning.parents import parent_alone, parents_as_points
from orchestrator.planning.plan import Plan, PlannedPoint
from orchestrator.planning.sharing import Family, families
from orchestrator.words import shortlist
from workers.benchmarks.planned import PlannedSet, Reader
from workers.benchmarks.registry import BENCHMARKS, asked_benchmarks, planned_sets
from workers.benchmarks.sets import check_sets
from workers.benchmarks.texts.tokenizer import TOKENIZER_FILES, Tokenizer
from workers.checkpoints.configs import STRETCHED, context_length, rope, text_fields
from workers.checkpoints.opening import LARGEST_CONFIG, all_places
from workers.checkpoints.safetensors import read_json
from workers.checkpoints.side_files import is_code, is_of_tokenizer
from workers.checkpoints.tokenizer_files import with_tokens
from workers.engines.engine import longest_scored
from workers.storage import open_store

Sets = Mapping[Cell, PlannedSet]


@dataclass(frozen=True, slots=True)
class Subject:
    """A point or a parent that is asked: the merge, the name of the model that holds it, and the sets it answers.

    `label` is its name in results, unique in the run: its own, or "NAME (parent)" where a point has the parent's name.
    """

    kind: Kind
    label: str
    planned: PlannedPoint
    model: str
    sets: Sets

    @property
    def folder(self) -> str:
        """The folder of its files of scores; names of files hold the merge's digest, so that two may share a folder."""
        return self.planned.name if self.kind == "point" else f"parent-{self.planned.name}"


@dataclass(frozen=True, slots=True)
class RacePlan:
    """The items of a race: `items` of each set of one benchmark, then `fresh` ones for the winners.

    `share` neighbours are never parted. The other benchmarks are asked of those who stay.
    """

    spec: RaceSpec
    benchmark: str
    items: int
    fresh: int
    share: int


@dataclass(frozen=True)
class Questions:
    """Everything that will be asked.

    `points` and `parents` are by name; a parent that is the same merge as a point is that point. `same` names the
    points that are the same merge as another point. `seed` is that of the items. The baseline of `guards` is None where
    it is the best parent by score.
    """

    models: Mapping[str, ModelSpec]
    points: Mapping[str, Subject]
    parents: Mapping[str, Subject]
    same: Mapping[str, str]
    race: RacePlan | None
    seed: int
    subject_of: Callable[[PlannedPoint], Subject] = field(repr=False, compare=False)
    guards: GuardsSpec | None = None

    def joined(self, points: Sequence[PlannedPoint]) -> Questions:
        """With these points too, which a search has proposed; one that is the same merge as a parent is that parent."""
        parents = {(one.model, one.planned.digest): one for one in self.parents.values()}
        joined, same = dict(self.points), dict(self.same)
        for planned in points:
            if planned.same_as is not None:
                same[planned.name] = planned.same_as
                continue
            subject = self.subject_of(planned)
            joined[planned.name] = parents.get((subject.model, planned.digest), subject)
        return replace(self, points=joined, same=same)

    @property
    def sets(self) -> Sets:
        """The sets that the first model answers."""
        return next(iter((*self.points.values(), *self.parents.values()))).sets

    @property
    def baselines(self) -> tuple[Subject, ...]:
        """The parents that are not the same merge as a point."""
        return tuple(subject for subject in self.parents.values() if subject.kind == "parent")

    def subject(self, name: str, first: Kind = "point") -> Subject:
        """The point or the parent of this name, of kind `first` where both have it; `BadInput` where none has."""
        point, parent = self.points.get(self.same.get(name, name)), self.parents.get(name)
        found = (point or parent) if first == "point" else (parent or point)
        if found is None:
            near = suggestion(name, [*self.points, *self.same, *self.parents])
            raise BadInput(f"{quoted(name)} is neither a point nor a parent of this job{near}")
        return found

    @property
    def ranked(self) -> tuple[str, ...]:
        """The benchmarks that rank points: the raced one, else those of the lowest rank that are asked."""
        if self.race is not None:
            return (self.race.benchmark,)
        sets = self.sets
        asked = {planned.benchmark for planned in sets.values()}
        lowest = min(BENCHMARKS[name].rank for name in asked)
        return tuple(name for name, row in BENCHMARKS.items() if name in asked and row.rank == lowest)


@dataclass(frozen=True, slots=True)
class _Asked:
    """One layout's model and sets."""

    model: str
    spec: ModelSpec
    sets: Sets


def questions(plan: Plan, folder: Path | None = None, seed: int | None = None) -> Questions:
    """The evaluation of the plan's job; paths of its texts are relative to `folder`.

    The items are those of `seed`, or of the job's. Reads tokenizers and texts, and builds an item or two of each task.
    Raises `BadInput` for impossible items.
    """
    evaluation = plan.job.evaluate
    if evaluation is None:
        raise BadInput(f"{plan.job.source}: nothing to evaluate; add `evaluate:`")
    _check_server(plan)
    _check_chats(plan, evaluation)
    race = _race(evaluation) if plan.job.search is None else None
    alone = _baselines_alone(plan)
    seed = plan.job.seed if seed is None else seed
    # two kinds may be the same merge with layouts of their own, and a search asks points of both
    merges = plan.merges if plan.job.search is None else plan.points
    asked = _layouts(plan, [*merges, *alone], evaluation, race, Reader(folder), seed)
    models: dict[str, ModelSpec] = {}

    def subject(kind: Kind, label: str, planned: PlannedPoint) -> Subject:
        held = _at_its_server(plan, asked[planned.layout], planned.name)
        models[held.model] = held.spec
        return Subject(kind, label, planned, held.model, held.sets)

    points = {planned.name: subject("point", planned.name, planned) for planned in plan.merges}
    if plan.job.search is not None:  # they show the kinds of points, and are not asked
        points = {}
    known = {(one.model, one.planned.digest): one for one in points.values()}
    taken = {planned.name for planned in plan.points} if plan.job.search is None else set[str]()
    parents: dict[str, Subject] = {}
    for planned in [*_merged_parents(plan), *alone]:
        label = f"{planned.name} (parent)" if planned.name in taken else planned.name
        itself = subject("parent", label, planned)
        parents.setdefault(planned.name, known.get((itself.model, planned.digest), itself))
    found = Questions(
        models=models,
        points=points,
        parents=parents,
        same={planned.name: planned.same_as for planned in plan.points if planned.same_as is not None and points},
        race=race,
        seed=seed,
        guards=evaluation.guards,
        subject_of=lambda planned: subject("point", planned.name, planned),
    )
    if plan.job.gate is not None and plan.job.gate.output_tokens is not None:
        limit_of_tokens(found, f"{plan.job.gate.place}: `output_tokens:`")
    _check_weights(found, evaluation)
    if evaluation.guards is not None:
        found = replace(found, guards=_checked_guards(found, evaluation.guards, plan))
    return found


def _check_weights(asked: Questions, evaluation: Evaluation) -> None:
    """A weight has an effect only if its benchmark ranks points, and is not the only one that does."""
    for name in evaluation.weights:
        if asked.ranked == (name,) or name not in asked.ranked:
            others = " and ".join(each for each in asked.ranked if each != name)
            why = f"{others} alone ranks the points" if others else "no other benchmark ranks the points"
            raise BadInput(f"{evaluation.place}: the weight of {name} has no effect, as {why}; take it out")


def _checked_guards(asked: Questions, spec: GuardsSpec, plan: Plan) -> GuardsSpec:
    """The spec with the gate's baseline where it names none; `BadInput` if models cannot be compared on its items."""
    name = spec.baseline or (plan.job.gate.baseline if plan.job.gate is not None else None)
    try:
        others = [*asked.parents.values()] if name is None else [asked.subject(name, "parent")]
    except BadInput as error:
        raise BadInput(f"{spec.place}: {error}; name one as the guards' baseline") from None
    if not others:
        raise BadInput(f"{spec.place}: guards compare with a parent, and none is asked; name a point as `baseline:`")
    guards = {planned.digest for planned in others[0].sets.values() if BENCHMARKS[planned.benchmark].guard}
    for subject in (*others, *asked.points.values()):
        if not guards <= {planned.digest for planned in subject.sets.values()}:
            raise BadInput(
                f"{spec.place}: {others[0].label} and {subject.label} have different tokenizers or chat templates, so"
                " guards ask them different items; name a baseline with the points' own, or take `chat:` out"
            )
    return replace(spec, baseline=name)


def limit_of_tokens(asked: Questions, place: str) -> int:
    """The most tokens that a model may write for a question; `BadInput` with the `place` where the job sets none."""
    sets = [
        planned
        for planned in asked.sets.values()
        if planned.benchmark in asked.ranked and not BENCHMARKS[planned.benchmark].is_likelihood
    ]
    if not sets:
        raise BadInput(f"{place}: the models write no answers to {', '.join(asked.ranked)}; take the key out")
    if (free := next((planned for planned in sets if not planned.limited), None)) is not None:
        raise BadInput(
            f"{place} compares shares of a limit, and the tasks of {free.benchmark} have limits of their own;"
            f" set `max_new_tokens:` of {free.benchmark}"
        )
    return max(planned.generation.budget + planned.new_tokens for planned in sets)


def _check_server(plan: Plan) -> None:
    """A server serves one model: each other model that is asked needs its own."""
    engine, gate = plan.job.engine, plan.job.gate
    if engine.name != "openai":
        return
    points = {planned.name for planned in plan.points}
    if gate is not None and gate.baseline not in engine.servers and gate.baseline not in points:
        raise BadInput(
            f"{plan.job.place_of('gate')}: the server at {engine.url} serves one model, a gate compares two; name that"
            f" of the baseline in `engine:`, as `servers: {{{gate.baseline}: {{url: …}}}}`, take transformers or vllm,"
            " or leave the gate out and see `mergeyard compare` of two runs"
        )
    unnamed = [planned.name for planned in plan.merges if planned.name not in engine.servers]
    if len(unnamed) > 1 or (unnamed and engine.url is None):
        remedy = "name the others in `servers:`, or write them, serve one, and give a job of that one"
        if plan.job.source == COMMAND_LINE:
            remedy = "name one MODEL, or leave --server out"
        elif engine.url is None:
            remedy = "give its server as `url:`, or name it in `servers:`"
        trouble = f"there is no server of {shortlist(unnamed)}"
        if engine.url is not None:
            trouble = f"the server at {engine.url} serves one model, the job has {len(unnamed)} points"
        raise BadInput(f"{engine.place}: {trouble}; {remedy}")


def _at_its_server(plan: Plan, held: _Asked, name: str) -> _Asked:
    """The model of a layout where the point or parent of this name is served."""
    server = plan.job.engine.servers.get(name)
    if server is None:
        return held
    options = {**held.spec.options, "model": server.model or name}
    spec = replace(held.spec, url=server.url or held.spec.url, options=options)
    return replace(held, model=f"{held.model} of {name}", spec=spec)


def _check_chats(plan: Plan, evaluation: Evaluation) -> None:
    """A server that is asked in messages scores no text, and gets no prompt that is none."""
    if plan.job.engine.options.get("api") != "chat":
        return
    for key, spec in asked_benchmarks(evaluation):
        if BENCHMARKS[key].is_likelihood:
            raise BadInput(
                f"{spec.place}: {key} scores a text, and `api: chat` asks a server for answers alone;"
                f" take {key} out, or `api: completions` of a server that echoes logprobs (vLLM, SGLang)"
            )
        if not getattr(spec, "chat", False):
            raise BadInput(
                f"{spec.place}: `api: chat` asks a server in messages, and {key} is asked plainly; add `chat: true`"
            )


def _race(evaluation: Evaluation) -> RacePlan | None:
    """The race is run on the first benchmark of the job that can be raced; a third of its items, at most, are fresh."""
    spec = evaluation.race
    if spec is None:
        return None
    raced = [
        (key, found)
        for key, asked in asked_benchmarks(evaluation)
        if (row := BENCHMARKS[key]).raced and (found := row.raced(asked))
    ]
    if not raced:
        titles = " or of ".join(row.title for row in BENCHMARKS.values() if row.raced)
        raise BadInput(f"{spec.place}: a race is run on items of {titles}; add one, or take the race out")
    benchmark, (count, share) = raced[0]
    items = count // share * share
    if items == 0:
        raise BadInput(f"{spec.place}: a race asks whole haystacks of {share} questions; give at least {share} items")
    return RacePlan(spec, benchmark, items, items // 2 // share * share, share)


def _baselines_alone(plan: Plan) -> list[PlannedPoint]:
    """The parents that no point is merged from, a gate's baselines, and those that are merged only in slices."""
    merged = {name for planned in plan.merges for name in planned.layout.whole}
    merged |= {name for planned in plan.merges for name in planned.point.adapters()}
    return [parent_alone(plan, name) for name in plan.parents if name not in merged and _is_asked(plan, name)]


def _is_asked(plan: Plan, parent: str) -> bool:
    """Whether a parent answers: of servers, each parent needs its own."""
    return plan.job.engine.name != "openai" or parent in plan.job.engine.servers


def _layouts(
    plan: Plan,
    merges: Sequence[PlannedPoint],
    evaluation: Evaluation,
    race: RacePlan | None,
    reader: Reader,
    seed: int,
) -> dict[Layout, _Asked]:
    """Model and sets of every layout; layouts with one tokenizer share their sets, and perhaps their model."""
    layouts = dict.fromkeys(planned.layout for planned in merges)
    together = families(layouts, max(len(layout.parents) for layout in layouts))  # not more in memory than for one
    models: dict[tuple[Any, ...], tuple[str, ModelSpec]] = {}
    least = {} if race is None else {race.benchmark: race.items + race.fresh}
    sets_of: dict[tuple[str, str | None], Sets] = {}
    found: dict[Layout, _Asked] = {}
    for planned in merges:
        layout = planned.layout
        if layout in found:
            continue
        tokenizer = _tokenizer(plan, planned)
        key = tokenizer.digest, tokenizer.chat_template
        if key not in sets_of:
            made = planned_sets(evaluation, tokenizer, seed, reader, least)
            sets_of[key] = {
                Cell(entry.task, entry.length, entry.benchmark, evaluation.weights.get(entry.benchmark, 1.0)): entry
                for entry in made
            }
        sets = tuple(sets_of[key].values())
        _check_fit(plan, layout, tokenizer, sets)
        spec = _model_spec(plan, layout, together[layout], sets)
        kin = (together[layout], *key, digest([layout.config, spec.end_tokens]))
        model, spec = models.setdefault(kin, (str(len(models)), spec))
        found[layout] = _Asked(model, spec, sets_of[key])
    for made in sets_of.values():
        check_sets(made.values())
    return found


def _merged_parents(plan: Plan) -> list[PlannedPoint]:
    """The parents of every layout as merges of themselves."""
    layouts = dict.fromkeys(planned.layout for planned in plan.merges)
    held = [parent for layout in layouts for parent in parents_as_points(plan, layout)]
    return [parent for parent in held if _is_asked(plan, parent.name)]


def _tokenizer(plan: Plan, planned: PlannedPoint) -> Tokenizer:
    """The tokenizer that a point is given, with the chat template that its recipe asks for."""
    parent = plan.parents[planned.layout.tokenizer_from]
    store = open_store(parent.url)
    files = {
        name: bytes(store.read(info.key, etag=info.etag))
        for name in TOKENIZER_FILES
        if (info := parent.side_files.get(name)) is not None
    }
    files = with_tokens(files, planned.layout.added_tokens)
    return Tokenizer.from_files(files, place=parent.url, chat_template=planned.layout.chat_template)


def _check_fit(plan: Plan, layout: Layout, tokenizer: Tokenizer, sets: Sequence[PlannedSet]) -> None:
    """Refuses lengths beyond the context, and tokens that the model has no embedding for."""
    most, rows = context_length(layout.config), text_fields(layout.config).get("vocab_size")
    longest = max(sets, key=lambda entry: entry.longest)
    if most is not None and longest.length <= most < longest.longest:
        budget, room = longest.generation.budget, most - longest.length
        remedies = [f"ask at {most - budget} tokens"] if most - budget >= SHORTEST_LENGTH else []
        remedies += [f"take `thinking: {{budget: {room}}}`"] if room else []
        remedies += ["set `thinking: off`"]
        raise BadInput(
            f"{longest.place}: {longest.task} at {longest.length} tokens and a thought of {budget} are beyond the"
            f" model's {most}; {', or '.join(remedies)}"
        )
    if most is not None and longest.length > most:
        scaling = rope(text_fields(layout.config))[1]
        field = "the factor of the RoPE" if scaling and scaling["rope_type"] in STRETCHED else "max_position_embeddings"
        remedy = "take the task out" if BENCHMARKS[longest.benchmark].searched else "take that length out"
        raise BadInput(
            f"{longest.place}: {longest.task} at {longest.length} tokens is beyond the model's {most};"
            f" {remedy}, or raise {field} in the parents' config"
        )
    engine = plan.job.engine.name
    for entry in sets:
        thought = entry.generation
        if most is not None and not thought.found and thought.budget >= most:
            raise BadInput(
                f"{entry.place}: a thought of {thought.budget} tokens fills the model's {most}, without a prompt;"
                f" take `thinking: {{budget: {most // 2}}}` or less, or set `thinking: off`"
            )
        scored = BENCHMARKS[entry.benchmark].is_likelihood
        if most is not None and scored and entry.length > longest_scored(engine, most):
            raise BadInput(
                f"{entry.place}: {entry.task} at {entry.length} tokens leaves the engine {engine} no room for the one"
                f" it always generates; ask at {most - 1}, or take transformers"
            )
    if isinstance(rows, int) and tokenizer.largest_id >= rows:
        raise BadInput(
            f"{tokenizer.place}: the tokenizer has token {tokenizer.largest_id}, the model's vocabulary {rows} entries;"
            f" it belongs to another model, see {plan.job.place_of('recipe')}"
        )


def _model_spec(plan: Plan, layout: Layout, family: Family, sets: Sequence[PlannedSet]) -> ModelSpec:
    tokenizer = plan.parents[layout.tokenizer_from]
    names = [name for name in tokenizer.side_files if is_of_tokenizer(name) and "/" not in name and not is_code(name)]
    known = all(entry.length for entry in sets)
    tensors = tuple(tensor for shard in family.shards for tensor in shard.tensors)
    places = {**all_places(plan.parents), **family.fishers}
    return ModelSpec(
        run=plan.run_url,
        tensors=tensors,
        parents={name: places[name] for name in (*layout.parents, *places_read(tensors)) if name in places},
        seed=plan.job.seed,
        numerics=plan.job.numerics,
        activations=None if family.activations is None else family.activations.parent,
        grams=family.grams,
        config=layout.config,
        tokenizer=(tokenizer.url, {name: tokenizer.side_files[name].etag for name in names}),
        engine=plan.job.engine.name,
        url=plan.job.engine.url,
        options=plan.job.engine.options,
        longest=max(entry.longest for entry in sets) if known else None,
        threads=max(1, int(plan.job.workers.cpus)),
        end_tokens=_end_tokens(plan, layout),
        as_it_is=plan.parents[layout.donor].parent if layout.as_it_is else None,
        added_tokens=layout.added_tokens,
    )


def _end_tokens(plan: Plan, layout: Layout) -> tuple[int, ...]:
    """The tokens that end an answer, by the generation_config.json of the written point."""
    owner = plan.parents[layout.copied.get(GENERATION, layout.donor)]
    info = owner.side_files.get(GENERATION)
    found: Any = None if info is None else read_json(open_store(owner.url), info, LARGEST_CONFIG).get("eos_token_id")
    return tuple(token for token in (found if isinstance(found, list) else [found]) if isinstance(token, int))

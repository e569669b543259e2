"""From a job to all of its work, by reading headers alone; a job that cannot work is refused here."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from jobs.errors import BadInput, CorruptData
from jobs.expressions import Value
from jobs.grid import Point
from jobs.job import Job, Keep
from jobs.manifest import Manifest
from jobs.merge_tasks import FORMAT, NUMERICS, MergeTask, Setting, ShardOfPoint, digest, fisher_of, places_read
from jobs.yaml_nodes import yaml_text
from orchestrator.planning.activations import with_located_statistics
from orchestrator.planning.content_keys import ContentKeys
from orchestrator.planning.layouts import Layout, Shard
from orchestrator.planning.locating import open_parents
from orchestrator.planning.sharing import Family, families
from orchestrator.planning.slicing import plain_recipes
from orchestrator.planning.stages import Stages, settings_of
from orchestrator.records.places import FLAT, SEVERAL, Places
from orchestrator.words import shortlist, size
from workers.checkpoints.opening import Checkpoint, all_places
from workers.checkpoints.side_files import has_tokenizer, is_code
from workers.merging.shard import FIXED_BYTES
from workers.methods import METHODS
from workers.methods.binding import without_effect
from workers.methods.tile import TILE_ELEMENTS
from workers.storage import Store, open_store
from workers.storage.records import read_record

UPLOAD_BYTES = {"s3": 96 << 20, "gs": 96 << 20, "az": 96 << 20}
"""Memory of one upload in progress, by scheme; other stores hold about 1 MiB."""

MOST_UPLOADS = 256
"""Points in one task: each has a file or an upload open, and systems allow a process about a thousand."""


@dataclass(frozen=True)
class PlannedPoint:
    """A point with its settings, one a tensor class of its layout, and one content key and one unit key a shard.

    Shards of equal content may belong to several points; a unit, like its receipt, belongs to one. `same_as` names the
    earlier point that is the same merge; such a point is not merged again. What there is one of a shard is made when
    it is asked for: of ten thousand points few are written.
    """

    point: Point
    layout: Layout
    settings: tuple[Setting, ...]
    keys: ContentKeys = field(repr=False, compare=False)
    same_as: str | None = None

    @property
    def name(self) -> str:
        """The point's name."""
        return self.point.name

    @cached_property
    def digest(self) -> str:
        """sha256 over everything that decides this point's weights."""
        return self.keys.of_point(self.layout, self.settings)

    @cached_property
    def contents(self) -> tuple[str, ...]:
        """The tensors of each shard."""
        return self.keys.of_shards(self.layout, self.settings)

    @cached_property
    def units(self) -> tuple[str, ...]:
        """The unit that makes each shard."""
        return tuple(digest([self.point.name, number, content]) for number, content in enumerate(self.contents))


@dataclass(frozen=True)
class Plan:
    """Everything a run will do. `tasks` turns it into work for a number of workers.

    Relative paths of the recipe count from `folder`, or else from the current one. `points` of a search are one of each
    kind: `planner` plans those that are asked, and `of_search` is the plan that writes some of them.
    """

    job: Job
    run_url: str
    parents: Mapping[str, Checkpoint]
    points: tuple[PlannedPoint, ...]
    planner: PointPlanner = field(repr=False, compare=False)
    places: Places = field(default_factory=Places)
    kept: frozenset[str] | None = None
    folder: Path | None = None

    def keeping(self, names: Collection[str]) -> Plan:
        """The same run, of which only these points are written; a twin is kept through the point it repeats."""
        twins = {planned.name: planned.same_as or planned.name for planned in self.points}
        return replace(self, kept=frozenset({*names, *(twins[name] for name in names)}))

    def of_search(self, points: Sequence[PlannedPoint]) -> Plan:
        """The same run with the points that the search has asked."""
        return replace(self, points=tuple(points))

    @cached_property
    def written(self) -> tuple[PlannedPoint, ...]:
        """The points that get a manifest: all, or the kept ones."""
        return tuple(planned for planned in self.points if self.kept is None or planned.name in self.kept)

    @cached_property
    def merges(self) -> tuple[PlannedPoint, ...]:
        """The points that are merges of their own."""
        return tuple(planned for planned in self.points if planned.same_as is None)

    @cached_property
    def digest(self) -> str:
        """sha256 of the run's results: equal for the same job over the same parents.

        The results of a search depend on the items too, whatever is judged or written afterwards.
        """
        if self.job.search is not None:
            asked = replace(self.pinned, gate=None, keep=Keep(), points=()).digest()
            return digest([asked, self.revisions]) if self.revisions else asked
        return digest(
            [
                [planned.name, planned.digest, planned.layout.beside, planned.layout.chat_template]
                for planned in self.points
            ]
        )

    @cached_property
    def revisions(self) -> dict[str, int]:
        """The revision of each method in the points' documents that was revised."""
        recipes = (
            recipe for planned in self.points for recipe in (planned.point.recipe, *planned.point.stages.values())
        )
        methods = sorted({recipe.merge_method for recipe in recipes})
        return {method: METHODS[method].revision for method in methods if METHODS[method].revision}

    @cached_property
    def remarks(self) -> tuple[str, ...]:
        """Sentences on keys without effect, and on files beside the weights that a point lacks or has from others."""
        asks = "--copy-code" if self.places.records == FLAT.records else "`copy_code: true`"
        recipes = [recipe for planned in self.points for recipe in planned.point.recipes]
        plain = [part for recipe in recipes for part in plain_recipes(recipe)]
        found = dict.fromkeys(said for part in plain for said in without_effect(part))
        for place in (place for recipe in recipes for place in recipe.residual_weights()):
            found[f"{place}: residual_weight has no effect, as in mergekit"] = None
        race = None if self.job.evaluate is None else self.job.evaluate.race
        if race is not None and self.job.search is not None:
            found[f"{race.place}: race has no effect in a search, whose points race from its first batch on"] = None
        for layout in dict.fromkeys(planned.layout for planned in self.points):
            for parent in dict.fromkeys(layout.left_out.values()):
                names = [name for name, owner in layout.left_out.items() if owner == parent]
                if code := [name for name in names if is_code(name)]:
                    found[f"not copied from {parent}, because it is code: {shortlist(code)}; {asks} copies it"] = None
                if large := [name for name in names if not is_code(name)]:
                    found[f"not copied from {parent}, because of its size: {shortlist(large)}; copy it by hand"] = None
            if not has_tokenizer(self.parents[layout.tokenizer_from].side_files):
                found["no parent has a tokenizer, so the points have none"] = None
            elif layout.tokenizer_stands_in:
                found[f"{layout.donor} has no tokenizer; the points get that of {layout.tokenizer_from}"] = None
            found |= dict.fromkeys(layout.remarks)
        return tuple(found)

    @cached_property
    def units(self) -> Mapping[str, str]:
        """Every unit of the run, and the key of the shard it makes."""
        return {
            unit: self.places.file(planned.name, shard.name)
            for planned in self.written
            if planned.same_as is None
            for shard, unit in zip(planned.layout.shards, planned.units, strict=True)
        }

    @property
    def bytes_to_write(self) -> int:
        """Bytes of all shards of all points."""
        return sum(planned.layout.bytes for planned in self.written if planned.same_as is None)

    def tasks(self, done: Collection[str], workers: int) -> list[MergeTask]:
        """The work that no receipt covers: big tasks first, every worker busy, parents re-read as little as may be.

        How it is cut never changes a byte.
        """
        tasks: list[MergeTask] = []
        merges = [planned for planned in self.written if planned.same_as is None]
        together = families(dict.fromkeys(planned.layout for planned in merges), self.most_parents_a_task)
        by_family: dict[Family, list[PlannedPoint]] = {}
        for planned in merges:
            by_family.setdefault(together[planned.layout], []).append(planned)
        for family, members in by_family.items():
            for number, shard in enumerate(family.shards):
                pending = [planned for planned in members if planned.units[number] not in done]
                groups = self._groups(len(pending), len(family.shards), workers)
                tasks += [self._task(family, shard, number, group) for group in _groups_of(pending, groups)]
        return sorted(tasks, key=lambda task: -task.bytes_read * (1 + len(task.points)))

    def _groups(self, pending: int, shards: int, workers: int) -> int:
        """Into how many tasks a shard's pending points are cut."""
        if pending == 0:
            return 0
        for_everyone = math.ceil(workers / shards)
        return min(pending, max(math.ceil(pending / self.most_points_a_task), for_everyone))

    def check_output(self) -> None:
        """Refuses an output that cannot be written or, if all points are kept, has no room; writes nothing."""
        open_store(self.run_url).check_writable()
        if self.job.keep.kind == "all":
            self.check_room()

    def check_room(self) -> None:
        """Refuses an output that the store has no room for; shards that lie there already need none."""
        store = open_store(self.run_url)
        free = store.free_bytes()
        if free is None or free >= self.bytes_to_write:
            return
        there = {info.key: info.size for info in store.list()}
        missing = self.bytes_to_write - sum(there.get(key, 0) for key in self.units.values())
        if free < missing:
            raise BadInput(
                f"{self.run_url}: {size(missing)} to write and {size(free)} free; make room, or choose another output"
            )

    @cached_property
    def most_points_a_task(self) -> int:
        """How many points fit into a worker's memory at once: each holds pieces and an upload."""
        room = max(self.job.workers.memory_bytes - FIXED_BYTES, 256 << 20)
        threads = max(1, int(self.job.workers.cpus))
        scheme = self.run_url.split("://")[0] if "://" in self.run_url else ""
        layouts = {planned.layout for planned in self.merges}
        largest_shard = max((shard.bytes for layout in layouts for shard in layout.shards), default=0)
        an_upload = min(UPLOAD_BYTES.get(scheme, 2 << 20), largest_shard)
        a_point = an_upload + (threads + 2) * TILE_ELEMENTS * 4
        return max(1, min(MOST_UPLOADS, room // 2 // a_point))

    @property
    def most_parents_a_task(self) -> int:
        """How many parents a task may read for points that could do with fewer: buffers of 1 MiB have room for them."""
        return max(self.job.workers.memory_bytes - FIXED_BYTES, 256 << 20) // (32 << 20)

    def _task(self, family: Family, shard: Shard, number: int, members: Sequence[PlannedPoint]) -> MergeTask:
        points = tuple(
            ShardOfPoint(
                planned.name,
                planned.units[number],
                self.places.file(planned.name, shard.name),
                self.places.receipt(planned.units[number]),
                planned.settings,
            )
            for planned in members
        )
        settings = [setting for planned in members for setting in planned.settings]
        used = {name for setting in settings for name in setting.parents}
        used |= {
            fisher_of(model)
            for setting in settings
            if METHODS[setting.method].given == "fisher"
            for model in setting.models
        }
        tensors = tuple(
            replace(tensor, sources={name: at for name, at in tensor.sources.items() if name in used})
            for tensor in shard.tensors
        )
        read = places_read(tensors)
        return MergeTask(
            run=self.run_url,
            shard=shard.name,
            tensors=tensors,
            points=points,
            parents={
                name: place for name, place in {**all_places(self.parents), **family.fishers}.items() if name in read
            },
            seed=self.job.seed,
            numerics=self.job.numerics,
            memory_bytes=self.job.workers.memory_bytes,
            threads=max(1, int(self.job.workers.cpus)),
            activations=None if family.activations is None else family.activations.parent,
            grams={model: file for model, file in family.grams.items() if model in used},
        )

    @property
    def pinned(self) -> Job:
        """The job with the pinned URLs of its parents, and of its statistics."""
        pinned = {name: checkpoint.reference for name, checkpoint in self.parents.items()}
        return with_located_statistics(replace(self.job, parents={**self.job.parents, **pinned}), self.folder)

    def sources_of(self, point: Point) -> dict[str, str]:
        """The URLs of a point's parents by name, and of their adapters."""
        parents = [self.parents[name] for name in point.parents()]
        adapters = {parent.adapter_name: parent.adapter for parent in parents if parent.adapter}
        return {parent.name: parent.url for parent in parents} | adapters

    def job_text(self) -> str:
        """job.yaml: the pinned job with every default."""
        return yaml_text(self.pinned.document())

    def document(self) -> dict[str, Any]:
        """plan.json: the pinned parents and the points to make."""
        return {
            "format": FORMAT,
            "numerics_version": NUMERICS,
            **({"revisions": self.revisions} if self.revisions else {}),
            "digest": self.digest,
            "job": self.job.name,
            "seed": self.job.seed,
            "numerics": self.job.numerics,
            "parents": {
                name: {
                    "url": place.url,
                    "files": {file.key: {"size": file.size, "etag": file.etag} for file in place.files},
                }
                for name, place in all_places(self.parents).items()
            },
            "points": [
                {"name": planned.name, "digest": planned.digest, "same_as": planned.same_as} for planned in self.points
            ]
            if self.job.search is None
            else [],
        }


def _groups_of(points: Sequence[PlannedPoint], groups: int) -> list[Sequence[PlannedPoint]]:
    """So many groups of points; points with the same parents stay together, so that groups read few of them."""
    if len({planned.layout for planned in points}) <= 1:
        return [points[group::groups] for group in range(groups)]
    ordered = sorted(points, key=lambda planned: [len(planned.layout.parents), planned.layout.parents])
    bounds = [len(points) * group // groups for group in range(groups + 1)]
    return [ordered[start:end] for start, end in pairwise(bounds)]


def make_plan(job: Job, *, relative_to: Path | None = None, flat: bool = False) -> Plan:
    """Opens every parent's headers and plans every point.

    `relative_to` is the folder that relative parent paths count from; `flat` puts the only point right into the
    output, and several points into folders there. Raises `BadInput` for whatever cannot work.
    """
    if job.output.startswith("hf://"):
        open_store(job.output).check_writable()  # which refuses it without asking the hub
    parents = open_parents(job, relative_to, bare_names=flat)
    output = open_store(job.output).url
    try:
        planner = PointPlanner(job, Stages(job, parents, relative_to), ContentKeys(job, parents))
        points = planner(job.points) if job.searched is None else _kinds(planner, job)
    except CorruptData as error:  # to whoever plans a merge, a damaged tokenizer is a wrong input
        raise BadInput(str(error)) from error
    if flat:
        plan = Plan(job, output, parents, points, planner, FLAT if len(points) == 1 else SEVERAL, folder=relative_to)
        _check_free(plan)
        return plan
    return Plan(job, f"{output}/{job.name}", parents, points, planner.afresh(), folder=relative_to)


def _kinds(planner: PointPlanner, job: Job) -> tuple[PlannedPoint, ...]:
    """One point of each kind that can be merged; `BadInput` where no kind with the same words and models can."""
    assert job.search is not None and job.searched is not None, "a job with a search has its recipe"
    searched = job.searched
    found: dict[str, tuple[PlannedPoint, ...]] = {}
    refused: dict[tuple[Value, ...], BadInput] = {}
    for point in job.points:
        try:
            found[point.name] = planner([point])
        except BadInput as error:
            refused.setdefault(searched.words(point), error)
            for other in searched.others_of_kind(point, job.search.start):
                with suppress(BadInput):
                    found[point.name] = planner([replace(other, name=point.name)])
                    break
    for point in job.points:
        if point.name in found:
            refused.pop(searched.words(point), None)
    for error in refused.values():
        raise error
    return tuple(planned for of_kind in found.values() for planned in of_kind)


def _check_free(plan: Plan) -> None:
    """Refuses a folder that holds another model: a merge never replaces one."""
    store = open_store(plan.run_url)
    keys = {info.key for info in store.list()}
    if plan.places.record("plan.json") in keys:  # begun here: the ledger knows whether it is this merge
        return
    for point in plan.points:
        folder = plan.places.file(point.name, "")
        files = {key.removeprefix(folder) for key in keys if key.startswith(folder)}
        merged = _manifest(store, f"{folder}manifest.json") if "manifest.json" in files else None
        if merged is not None and merged.digest == point.digest:
            if lacking := sorted(point.layout.copied.keys() - merged.files.keys()):
                raise BadInput(f"{plan.run_url}: merged already, without {folder}{lacking[0]}; give an empty folder")
            continue
        model = sorted(
            key for key in files if "/" not in key and (key.endswith(".safetensors") or key == "config.json")
        )
        if model:
            raise BadInput(f"{plan.run_url}: there is another model already ({folder}{model[0]}); give an empty folder")


def _manifest(store: Store, key: str) -> Manifest | None:
    try:
        return read_record(store, key, Manifest.from_json)
    except CorruptData:
        return None


class PointPlanner:
    """Plans points of a job, now and later: layouts are shared, and a point that repeats an earlier one is found."""

    def __init__(self, job: Job, stages: Stages, keys: ContentKeys) -> None:
        self._job, self._stages, self._keys = job, stages, keys
        self._first_of: dict[str, str] = {}

    def __call__(self, points: Iterable[Point]) -> tuple[PlannedPoint, ...]:
        """The points with their layouts and settings."""
        return tuple(map(self._planned, points))

    def afresh(self) -> PointPlanner:
        """The same, without the points so far."""
        return PointPlanner(self._job, self._stages, self._keys)

    def _planned(self, point: Point) -> PlannedPoint:
        layout = self._stages.layout(point)
        planned = PlannedPoint(point, layout, settings_of(layout, point.recipe, self._job.numerics), self._keys)
        same_as = self._first_of.setdefault(digest([planned.digest, layout.beside, layout.chat_template]), point.name)
        return planned if same_as == point.name else replace(planned, same_as=same_as)

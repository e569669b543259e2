"""Stages of a merge as unwritten checkpoints: their tensors are computed while the next merge reads them.

A stage is to the next merge as if it had been written and opened again: its dtypes, its config, its files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jobs.errors import BadInput
from jobs.grid import Point
from jobs.job import Job, Keep
from jobs.merge_tasks import Derived, Merged, Setting, TensorMerge, canonical_json, digest
from jobs.recipe import Recipe
from jobs.stages import stage_in
from jobs.yaml_nodes import quoted
from orchestrator.planning.activations import with_activations
from orchestrator.planning.beside import files_beside, read_beside
from orchestrator.planning.fishers import with_fishers
from orchestrator.planning.grams import with_grams
from orchestrator.planning.layouts import Layout, TensorClasses, layout_of
from orchestrator.planning.slicing import plain_recipes
from workers.checkpoints.adapters import Adapter, with_adapter
from workers.checkpoints.opening import Checkpoint
from workers.methods import METHODS
from workers.methods.binding import check_recipe, resolve
from workers.storage import ObjectInfo, open_store

MOST_READINGS = 100
"""How often the stages of one point may read a tensor of their parents, all together."""


@dataclass(frozen=True)
class _Stage:
    """`readings` counts the tensors that are read for one of its own; `holds`: its config is that of `config_from`."""

    checkpoint: Checkpoint
    layout: Layout
    readings: int
    holds: bool


class Stages:
    """The layouts of a job's recipes. Equal stages of equal members are one checkpoint, and so share their layouts."""

    def __init__(self, job: Job, parents: Mapping[str, Checkpoint], folder: Path | None) -> None:
        self._job, self._parents, self._folder = job, parents, folder
        self._classes = TensorClasses(job)
        self._stages: dict[tuple[Any, ...], _Stage] = {}
        self._layouts: dict[tuple[Any, ...], Layout] = {}

    def layout(self, point: Point) -> Layout:
        """The layout of a point. Its parents and the owners of its files are parents of the job, never stages."""
        stages: dict[str, _Stage] = {}
        for name, recipe in point.stages.items():
            self._add_adapted(recipe, point, stages)
            key = (id(recipe), *_members(recipe, stages))
            if key not in self._stages:
                self._stages[key] = self._stage(name, recipe, stages)
            stages[name] = self._stages[key]
        recipe = point.recipe
        self._add_adapted(recipe, point, stages)
        _check(recipe)
        key = (*layout_key(recipe), *_members(recipe, stages))
        if key not in self._layouts:
            holding = _config_from(self._job, recipe, stages) or self._job.config_from
            self._layouts[key] = self._layout(replace(self._job, config_from=holding), recipe, stages)
        return self._layouts[key]

    def _layout(self, job: Job, recipe: Recipe, stages: Mapping[str, _Stage]) -> Layout:
        checkpoints = {**self._parents, **{name: stage.checkpoint for name, stage in stages.items()}}
        layout = layout_of(job, recipe, checkpoints, self._classes)
        layout = with_activations(layout, checkpoints, recipe, self._folder)
        layout = with_grams(layout, checkpoints, recipe, self._folder)
        layout = with_fishers(layout, checkpoints, recipe, self._folder)
        return _of_parents(layout, {name: stage.layout for name, stage in stages.items()})

    def _stage(self, name: str, recipe: Recipe, stages: Mapping[str, _Stage]) -> _Stage:
        _check(recipe)
        for key in ("aim", "grams", "fisher"):
            if getattr(recipe, key) is not None:
                raise BadInput(
                    f"{recipe.place_of(key)}: a merge that feeds another has no `{key}:`; write {quoted(name)} first,"
                    " and name the result"
                )
        readings = sum(stages[other].readings if other in stages else 1 for other in recipe.references())
        if readings > MOST_READINGS:
            raise BadInput(
                f"{recipe.place}: the merges that feed this one read their parents {readings} times over, and"
                f" {MOST_READINGS} is the most; write some of them first, and name the results"
            )
        holding = _config_from(self._job, recipe, stages)
        layout = self._layout(replace(self._job, config_from=holding, keep=Keep()), recipe, stages)
        settings = settings_of(layout, recipe, self._job.numerics)
        tensors = {
            tensor.name: Derived(
                tensor.dtype,
                tensor.shape,
                self._rule(tensor, settings[tensor.setting]),
                tuple((parent, tensor.sources[parent]) for parent in settings[tensor.setting].parents),
            )
            for shard in layout.shards
            for tensor in shard.tensors
        }
        url, files = self._beside(layout)
        shapes = {tensor: derived.shape for tensor, derived in tensors.items()}
        checkpoint = Checkpoint(name, url, layout.config, (), tensors, shapes, files)
        return _Stage(checkpoint, layout, readings, holding is not None)

    def _add_adapted(self, recipe: Recipe, point: Point, stages: dict[str, _Stage]) -> None:
        """Adds the stages to which the recipe applies adapters, under the names that it gives them."""
        for reference in recipe.parents():
            name, adapter = stage_in(reference, point.stages) or (reference, "")
            if not adapter:
                continue
            key = id(stages[name].checkpoint), reference
            if key not in self._stages:
                self._stages[key] = self._adapted(reference, stages[name], self._parents[adapter])
            stages[reference] = self._stages[key]

    def _adapted(self, reference: str, stage: _Stage, parent: Checkpoint) -> _Stage:
        """The stage with an adapter applied, as if it had been written before."""
        adapter = Adapter(parent.url, parent.files, parent.config, parent.tensors, parent.shapes)
        return replace(stage, checkpoint=with_adapter(replace(stage.checkpoint, name=reference), adapter, parent.name))

    def _rule(self, tensor: TensorMerge, setting: Setting) -> Merged:
        seed = self._job.seed if METHODS[setting.method].random else 0
        return Merged(tensor.name, tensor.arithmetic, self._job.numerics, seed, setting)

    def _beside(self, layout: Layout) -> tuple[str, dict[str, ObjectInfo]]:
        """A place in memory that holds the files beside the weights, and what is there."""
        files = files_beside(
            layout.copied, layout.added_tokens, layout.chat_template, partial(read_beside, self._parents)
        )
        content = digest({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})
        store = open_store(f"memory://stage-{content}")
        there = {info.key: info for info in store.list()}
        return store.url, {name: there.get(name) or store.write(name, data) for name, data in files.items()}


def settings_of(layout: Layout, recipe: Recipe, numerics: str) -> tuple[Setting, ...]:
    """The settings of a recipe, one a tensor class of its layout."""
    plain = plain_recipes(recipe)
    return tuple(
        resolve(plain[piece], tensor.name, position, exact=numerics == "float32")
        if owner is None
        else Setting("passthrough", (owner,), None, (("scale", (1.0,)),))
        for tensor, piece, owner, position in zip(
            layout.representatives, layout.pieces, layout.owners, layout.positions, strict=True
        )
    )


def _check(recipe: Recipe) -> None:
    """Refuses what the method cannot take in any piece of the recipe."""
    for part in plain_recipes(recipe):
        check_recipe(part)


def layout_key(recipe: Recipe) -> tuple[Any, ...]:
    """Recipes with equal keys have one layout, if their models are the same checkpoints."""
    dtypes = recipe.dtype, recipe.out_dtype
    tokens = canonical_json(recipe.tokenizer.document("") if recipe.tokenizer else None)
    key = recipe.references(), recipe.base_model, dtypes, recipe.tokenizer_source, tokens, recipe.chat_template
    key = *key, recipe.aim and recipe.aim.statistics, canonical_json([recipe.grams, recipe.fisher])
    plain = plain_recipes(recipe)
    ranges = tuple(tuple((source.model, source.layer_range) for source in part.models) for part in plain)
    key = *key, tuple(module.name for module in recipe.modules), ranges, tuple(part.base_model for part in plain)
    return (*key, recipe.merge_method == "passthrough", METHODS[recipe.merge_method].base)


def _members(recipe: Recipe, stages: Mapping[str, _Stage]) -> tuple[int, ...]:
    """The stages that a recipe reads, as a key."""
    return tuple(id(stages[name].checkpoint) for name in recipe.parents() if name in stages)


def _config_from(job: Job, recipe: Recipe, stages: Mapping[str, _Stage]) -> str | None:
    """The member whose config holds: the one that the job names, else the first stage in which that one's holds."""
    if job.config_from is None or job.config_from in recipe.references():
        return job.config_from
    return next((name for name in recipe.references() if name in stages and stages[name].holds), None)


def _of_parents(layout: Layout, stages: Mapping[str, Layout]) -> Layout:
    """The same layout, in which the parents of stages own the files that the stages take from them."""
    donor, tokenizer = stages.get(layout.donor), stages.get(layout.tokenizer_from)
    template = tokenizer.chat_template if tokenizer is not None else None
    return replace(
        layout,
        parents=tuple(name for name in layout.parents if name not in stages),
        whole=tuple(name for name in layout.whole if name not in stages),
        donor=layout.donor if donor is None else donor.donor,
        tokenizer_from=layout.tokenizer_from if tokenizer is None else tokenizer.tokenizer_from,
        chat_template=template if layout.chat_template is None else layout.chat_template,
        copied={
            name: stages[owner].copied[name] if owner in stages else owner
            for name, owner in layout.copied.items()
            if owner not in stages or name in stages[owner].copied  # else the stage made it
        },
        left_out={**layout.left_out, **({} if donor is None else donor.left_out)},
        added_tokens=(*(() if tokenizer is None else tokenizer.added_tokens), *layout.added_tokens),
        remarks=tuple(dict.fromkeys(said for each in (*stages.values(), layout) for said in each.remarks)),
    )

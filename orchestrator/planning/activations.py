"""The statistics of a recipe's `aim:`: which tensors of a layout they are of, and words on those that they leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from jobs.errors import BadInput, CorruptData, ObjectMissing
from jobs.job import Job
from jobs.merge_tasks import TensorMerge
from jobs.recipe import Recipe
from jobs.slices import bases_of
from orchestrator.planning.layouts import Layout
from orchestrator.words import shortlist
from workers.checkpoints.activations import Means, open_activations
from workers.checkpoints.canonical import is_embedding, is_head
from workers.checkpoints.opening import Checkpoint
from workers.methods.aim import fits, overshadowed, relative

File = TypeVar("File")


def located(file: str, folder: Path | None) -> str:
    """A URL as it is, a path made absolute."""
    return file if "://" in file else str((folder or Path.cwd()) / Path(file).expanduser())


def opened(read: Callable[[str], File], url: str, place: str, option: str = "") -> File:
    """A file that `read` opens; `option` is that of the command which writes such a file. `BadInput` at `place`."""
    try:
        return read(url)
    except (BadInput, CorruptData, ObjectMissing) as error:
        remedy = f"; `mergeyard measure{option}` writes such a file" if isinstance(error, ObjectMissing) else ""
        raise BadInput(f"{place}: {error}{remedy}") from error


def with_located_statistics(job: Job, folder: Path | None) -> Job:
    """The job whose statistics are found from everywhere."""

    def at(recipe: Recipe) -> Recipe:
        aim = recipe.aim and replace(recipe.aim, statistics=located(recipe.aim.statistics, folder))
        grams, fisher = (
            files and {name: located(file, folder) for name, file in files.items()}
            for files in (recipe.grams, recipe.fisher)
        )
        return replace(recipe, aim=aim, grams=grams, fisher=fisher)

    def placed(document: Any) -> Any:
        """A document, or a list of those that feed each other."""
        if isinstance(document, list):
            return [placed(each) for each in cast(list[Any], document)]
        found = dict(document)
        if aim := document.get("aim"):
            found["aim"] = {**aim, "statistics": located(aim["statistics"], folder)}
        for key in ("grams", "fisher"):
            if files := document.get(key):
                found[key] = {name: located(file, folder) for name, file in files.items()}
        return found

    if (recipe := placed(job.recipe)) == job.recipe:
        return job
    points = tuple(replace(point, recipe=at(point.recipe)) for point in job.points)
    return replace(job, recipe=recipe, points=points)


def with_activations(layout: Layout, parents: Mapping[str, Checkpoint], recipe: Recipe, folder: Path | None) -> Layout:
    """The layout whose tensors have the names of their statistics, if the recipe asks for AIM.

    `BadInput` if the statistics are not those of the base: of a tensor that it has not, or of another shape.
    """
    if recipe.aim is None:
        return layout
    place = recipe.place_of("aim")
    if recipe.base_model is None or {*bases_of(recipe.slices, recipe.modules)} - {recipe.base_model}:
        raise BadInput(f"{place}: aim has the statistics of one base; give all parts one `base_model`, beside `aim:`")
    base = parents[recipe.base_model]
    activations = opened(open_activations, located(recipe.aim.statistics, folder), place, " --what means")
    means, stored = activations.means, {at: name for name, at in base.tensors.items()}
    where = f"{place}: {activations.parent.url}/{activations.parent.files[0].key}"
    other = f"give the statistics of {base.name}: `mergeyard measure --what means` writes them"
    unknown = sorted(name for name in means if name not in base.tensors and not is_head(name, {}))
    if unknown or not means:
        found = f"{unknown[0]} is not a tensor of {base.name}" if unknown else "there are no tensors"
        raise BadInput(f"{where}: {found}; {other}")

    def named(tensor: TensorMerge) -> TensorMerge:
        if base.name not in tensor.sources:
            return tensor
        name = stored.get(tensor.sources[base.name], tensor.name)
        if name not in means and is_head(tensor.name, {}):  # the base's head is its embeddings
            name = tensor.name
        if name not in means:
            return tensor
        if not fits(means[name].shape, tensor.shape):
            shapes = f"{list(means[name].shape)} and the tensor {list(tensor.shape)}"
            raise BadInput(f"{where}: the statistics of {name} are {shapes}; {other}")
        return replace(tensor, activations=name)

    shards = tuple(replace(shard, tensors=tuple(map(named, shard.tensors))) for shard in layout.shards)
    remarks = _remarks([tensor for shard in shards for tensor in shard.tensors], means)
    return replace(layout, shards=shards, activations=activations, remarks=(*layout.remarks, *remarks))


def _remarks(tensors: Sequence[TensorMerge], means: Means) -> Iterator[str]:
    """Sentences on the tensors that AIM leaves as they are, or nearly."""
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1 and not is_embedding(tensor.name)]
    if without := [tensor.name for tensor in matrices if not tensor.activations]:
        yield f"aim: no statistics of {shortlist(without)}; they are merged without it"
    if names := [each.name for each in tensors if each.activations and overshadowed(relative(means[each.activations]))]:
        yield f"aim: one activation is so large that it hardly changes the other channels of {shortlist(names)}"

"""The Gram matrices of a recipe's `grams:`: which tensors of a layout they are for, and words on those without."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

from jobs.errors import BadInput
from jobs.merge_tasks import GramTensor, TensorMerge
from jobs.recipe import Recipe
from orchestrator.planning.activations import located, opened
from orchestrator.planning.layouts import Layout
from orchestrator.words import count, duration, shortlist
from orchestrator.words import size as size_of
from workers.checkpoints.canonical import is_embedding, is_head
from workers.checkpoints.grams import is_for, open_grams
from workers.checkpoints.opening import Checkpoint

SOLVED_A_SECOND, MULTIPLIED_A_SECOND = 20e9, 30e9
"""Operations of one CPU in float64 and float32, of `kernels/dense.py` on one machine: for the estimate alone."""


def with_grams(layout: Layout, parents: Mapping[str, Checkpoint], recipe: Recipe, folder: Path | None) -> Layout:
    """The layout whose tensors have the places of their Gram matrices, if the recipe names such files.

    `BadInput` for files that are not of these models, or that were measured with other blocks.
    """
    if recipe.grams is None:
        return layout
    place = recipe.place_of("grams")
    models = [name for name in dict.fromkeys(source.model for source in recipe.sources()) if name in recipe.grams]
    files = {name: opened(open_grams, located(recipe.grams[name], folder), place) for name in models}
    stored = {name: {at: tensor for tensor, at in parents[name].tensors.items()} for name in models}
    for name, file in files.items():
        if unknown := sorted(file.tensors.keys() - parents[name].tensors.keys()):
            where = f"{place}: {file.parent.url}/{file.parent.files[0].key}"
            raise BadInput(
                f"{where}: {unknown[0]} is not a tensor of {name}; give the Gram matrices of {name}:"
                " `mergeyard measure` writes them"
            )

    def named(tensor: TensorMerge) -> TensorMerge:
        sources = [(name, at) for name, at in tensor.sources.items() if name in files]
        found = {name: files[name].tensors.get(stored[name].get(at, tensor.name)) for name, at in sources}
        grams = {name: gram for name, gram in found.items() if gram is not None}
        if len(tensor.shape) != 2 or not grams:
            return tensor
        _check_shapes(grams, tensor, place)
        return replace(tensor, grams=grams)

    shards = tuple(replace(shard, tensors=tuple(map(named, shard.tensors))) for shard in layout.shards)
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    remarks = (*_cost(tensors), *_remarks(tensors, files.keys()))
    return replace(layout, shards=shards, grams=files, remarks=(*layout.remarks, *remarks))


def _check_shapes(grams: Mapping[str, GramTensor], tensor: TensorMerge, place: str) -> None:
    (first, gram), *others = grams.items()
    for name, other in others:
        if other.shape != gram.shape:
            raise BadInput(
                f"{place}: the Gram matrices of {tensor.name} are {list(gram.shape)} for {first} and"
                f" {list(other.shape)} for {name}; measure both with the same --block"
            )
    if not is_for(gram.shape, tensor.shape[-1]):
        raise BadInput(
            f"{place}: the Gram matrix of {tensor.name} is {list(gram.shape)} and the tensor {list(tensor.shape)}; give"
            f" the Gram matrices of {first}: `mergeyard measure` writes them"
        )


def _cost(tensors: Sequence[TensorMerge]) -> Iterator[str]:
    """A sentence on the bytes of the matrices, and on the arithmetic of one point where all models have a weight.

    For each input a factor of the sum and a solution for each model, in float64; for each tensor a product with each
    difference from the first model, in float32 where the merge is.
    """
    solved: dict[tuple[tuple[str, str], ...], float] = {}
    stored: dict[tuple[str, str], int] = {}
    multiplied = 0.0
    for tensor in tensors:
        if not tensor.grams:
            continue
        names = tuple(sorted((model, gram.name) for model, gram in tensor.grams.items()))
        stored |= {(model, gram.name): gram.end - gram.start for model, gram in tensor.grams.items()}
        blocks, size, _ = next(iter(tensor.grams.values())).shape
        solved[names] = blocks * size**3 * (1 / 3 + 2 * len(names))
        multiplied += 2.0 * prod(tensor.shape) * size * (len(names) - 1)
    if stored:
        seconds = sum(solved.values()) / SOLVED_A_SECOND + multiplied / MULTIPLIED_A_SECOND
        yield (
            f"grams: {size_of(sum(stored.values()))} of matrices; a point of regmean takes"
            f" {count(sum(solved.values()) + multiplied)} operations, about {duration(seconds)} of one CPU"
        )


def _remarks(tensors: Sequence[TensorMerge], models: Collection[str]) -> Iterator[str]:
    """A sentence on the matrices that are merged by their mean, where all of these models have a part."""
    matrices = [each for each in tensors if len(each.shape) > 1 and not is_embedding(each.name)]
    lacking = [each for each in matrices if any(name in models and name not in each.grams for name in each.sources)]
    if without := [each.name for each in lacking if not is_head(each.name, {})]:
        yield f"grams: none for {shortlist(without)}; regmean takes their weighted mean"

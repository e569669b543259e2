"""The Fisher information of a recipe's `fisher:`: which tensors of a layout it is for, and words on those without."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from jobs.errors import BadInput
from jobs.merge_tasks import TensorMerge, fisher_of
from jobs.recipe import Recipe
from orchestrator.planning.activations import located, opened
from orchestrator.planning.layouts import Layout
from orchestrator.words import shortlist, size
from workers.checkpoints.dtypes import FLOATS
from workers.checkpoints.fishers import FisherTensor, open_fisher
from workers.checkpoints.opening import Checkpoint


def with_fishers(layout: Layout, parents: Mapping[str, Checkpoint], recipe: Recipe, folder: Path | None) -> Layout:
    """The layout whose tensors have their Fisher information among the sources, if the recipe names such files.

    `BadInput` for files that are not of these models.
    """
    if recipe.fisher is None:
        return layout
    place = recipe.place_of("fisher")
    models = [name for name in dict.fromkeys(source.model for source in recipe.sources()) if name in recipe.fisher]
    files = {
        name: opened(open_fisher, located(recipe.fisher[name], folder), place, " --what fisher") for name in models
    }
    stored = {name: {at: tensor for tensor, at in parents[name].tensors.items()} for name in models}

    def refusal(name: str, words: str) -> BadInput:
        file = files[name].parent
        return BadInput(
            f"{place}: {file.url}/{file.files[0].key}: {words}; give the Fisher information of {name}:"
            " `mergeyard measure --what fisher` writes it"
        )

    for name, file in files.items():
        if unknown := sorted(file.tensors.keys() - parents[name].tensors.keys()):
            raise refusal(name, f"{unknown[0]} is not a tensor of {name}")

    def named(tensor: TensorMerge) -> TensorMerge:
        found: dict[str, FisherTensor] = {}
        for name in files.keys() & tensor.sources.keys():
            own = stored[name].get(tensor.sources[name])  # None: rows of another vocabulary, which no text was read by
            if own is not None and own in files[name].tensors:
                found[name] = files[name].tensors[own]
                if found[name].shape != tensor.shape:
                    raise refusal(name, f"{own} is {list(found[name].shape)} and the tensor {list(tensor.shape)}")
        if not found or tensor.dtype not in FLOATS:
            return tensor
        return replace(
            tensor,
            sources={**tensor.sources, **{fisher_of(name): each.at for name, each in sorted(found.items())}},
            fishers={name: each.mean for name, each in sorted(found.items())},
        )

    shards = tuple(replace(shard, tensors=tuple(map(named, shard.tensors))) for shard in layout.shards)
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    remarks = (
        f"fisher: {size(sum(file.bytes for file in files.values()))} of Fisher information, read once for all points",
        *_remarks(tensors, files.keys()),
    )
    return replace(layout, shards=shards, fishers=files, remarks=(*layout.remarks, *remarks))


def _remarks(tensors: Sequence[TensorMerge], models: Collection[str]) -> Iterator[str]:
    """A sentence on the tensors that are merged by their mean, where all of these models have a part."""
    lacking = [
        each.name
        for each in tensors
        if each.dtype in FLOATS and any(name in models and name not in each.fishers for name in each.sources)
    ]
    if lacking:
        yield f"fisher: none for {shortlist(lacking)}; fisher takes their weighted mean"

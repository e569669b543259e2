"""The facts about tensors that are given and not computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from jobs.merge_tasks import GramTensor, Parent, TensorMerge
from workers.checkpoints.activations import read_activations
from workers.checkpoints.grams import Matrix, read_gram
from workers.merging.tiles import Facts
from workers.methods.aim import ACTIVATIONS, relative
from workers.methods.fisher import FISHERS
from workers.methods.regmean import GRAMS, Grams, Kept


def given_facts(
    tensors: Iterable[TensorMerge], activations: Parent | None, grams: Mapping[str, Parent]
) -> dict[str, Facts]:
    """The facts to begin with, by tensor; reads the statistics of AIM if there are any, and Gram matrices when used."""
    means = {} if activations is None else read_activations(activations).means
    kept = Kept()
    facts: dict[str, Facts] = {}
    for tensor in tensors:
        of_tensor: Facts = {} if tensor.activations is None else {ACTIVATIONS: relative(means[tensor.activations])}
        if grams and tensor.grams:
            names = tuple((model, gram.name) for model, gram in sorted(tensor.grams.items()))
            of_tensor[GRAMS] = Grams(names, partial(_read, grams, tensor.grams), kept)
        if tensor.fishers:
            of_tensor[FISHERS] = tensor.fishers
        facts[tensor.name] = of_tensor
    return facts


def _read(files: Mapping[str, Parent], grams: Mapping[str, GramTensor], model: str) -> Matrix:
    return read_gram(files[model], grams[model])

"""The facts about tensors that are given and not computed."""

from __future__ import annotations

from collections.abc import Iterable

from jobs.merge_tasks import Parent, TensorMerge
from workers.checkpoints.activations import read_activations
from workers.merging.tiles import Facts
from workers.methods.aim import ACTIVATIONS, relative


def given_facts(tensors: Iterable[TensorMerge], activations: Parent | None) -> dict[str, Facts]:
    """The facts to begin with, by tensor; reads the statistics of AIM if there are any."""
    means = {} if activations is None else read_activations(activations).means
    return {
        tensor.name: {} if tensor.activations is None else {ACTIVATIONS: relative(means[tensor.activations])}
        for tensor in tensors
    }

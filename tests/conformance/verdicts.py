"""What it means for a merge on disk to be right, said as assertions over whole checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.conformance.measures import Masks, correctly_rounded, decided, explained, find_masks, noise, ulp_distance
from tests.conformance.reference import (
    Exact,
    TaskVectors,
    checkpoint,
    l1_scale,
    merged,
    output_dtype,
    outputs,
    trimmed_count,
)

SIGMAS = 5.0  # a fair mask fails a test of this size once in 1.7 million


def assert_follows_formulas(folder: Path, document: dict[str, Any]) -> None:
    """Every tensor of the merge in `folder` has the name, dtype and shape it must have, and a value that the formulas
    give in some order of float32 arithmetic; masked methods: for some mask that the method may draw."""
    actual = checkpoint(str(folder))
    dtypes = {output.name: output_dtype(document, output.name) for output in outputs(document)}
    assert actual.keys() == dtypes.keys()
    assert {name: t.dtype for name, t in actual.items()} == dtypes
    random: list[tuple[Masks, TaskVectors]] = []
    for name, expected in merged(document).items():
        if isinstance(expected, Exact):
            assert actual[name].shape == expected.value.shape, name
            wrong = ~explained(actual[name], expected)
            assert not wrong.any(), f"{name}: {_first(wrong, actual[name], expected)}"
            continue
        masks = find_masks(actual[name], expected)
        assert masks.unexplained == 0, f"{name}: {masks.unexplained} of {expected.base.size} elements fit no mask"
        if expected.trim == "magnitude":
            assert_trimmed_to_count(name, masks, expected)
        else:
            assert_scaled_by_norms(name, masks, expected)
            random.append((masks, expected))
    if random:
        assert_kept_by_fair_dice(random)


def assert_trimmed_to_count(name: str, masks: Masks, vectors: TaskVectors) -> None:
    """Each task vector lost all but k elements, zero steps not counted (they may be kept and nobody can tell)."""
    for i, (delta, density) in enumerate(zip(vectors.deltas, vectors.densities, strict=True)):
        count = trimmed_count(delta, density)
        least, most = masks.bounds(i)
        zeros = int((delta == 0).sum())
        assert least <= count <= most + zeros, (
            f"{name}: task vector {i} kept {least} to {most} elements instead of {count}"
        )


def assert_scaled_by_norms(name: str, masks: Masks, vectors: TaskVectors) -> None:
    """Each scale is the ratio of L1 norms for some mask between the sure and the possible one."""
    for delta, sure, possible, scale in zip(vectors.deltas, masks.sure, masks.possible, masks.scales, strict=True):
        if vectors.rescale and sure.any():
            least, most = l1_scale(delta, possible), l1_scale(delta, sure)
            assert least * 0.999 <= scale <= most * 1.001, f"{name}: scaled by {scale}, not {least} to {most}"


def assert_kept_by_fair_dice(found: list[tuple[Masks, TaskVectors]]) -> None:
    """Over all tensors, each task vector kept its share of elements, as often as independent dice would."""
    for i in range(len(found[0][1].deltas)):
        expected = variance = least = most = 0.0
        for masks, vectors in found:
            moved = int((vectors.deltas[i] != 0).sum())
            density = min(1.0, vectors.densities[i])
            expected += moved * density
            variance += moved * density * (1 - density)
            bounds = masks.bounds(i)
            least, most = least + bounds[0], most + bounds[1]
        slack = SIGMAS * variance**0.5
        assert least <= expected + slack, (
            f"task vector {i}: at least {least:.0f} kept, {expected:.0f} ± {slack:.0f} expected"
        )
        assert most >= expected - slack, (
            f"task vector {i}: at most {most:.0f} kept, {expected:.0f} ± {slack:.0f} expected"
        )


def assert_within_one_ulp(ours: Path, theirs: Path, document: dict[str, Any]) -> None:
    """Both merges agree within one unit in the last place wherever neither dice nor ties decide, or within the noise of
    float32 where terms cancel so far that the noise is more than a unit."""
    mine, other = checkpoint(str(ours)), checkpoint(str(theirs))
    for name, (certain, exact) in _certain(document):
        apart = ulp_distance(mine[name], other[name]).numpy() > 1
        apart &= abs(mine[name].double() - other[name].double()).numpy() > 2 * noise(exact)
        assert not (apart & certain).any(), f"{name}: {(apart & certain).sum()} elements more than 1 ulp from mergekit"


def share_correctly_rounded(folder: Path, document: dict[str, Any]) -> float:
    """Of all elements that neither dice nor ties decide, the share that is the float64 value rounded once."""
    actual = checkpoint(str(folder))
    hits = [correctly_rounded(actual[name], exact.value)[certain] for name, (certain, exact) in _certain(document)]
    return float(np.concatenate(hits).mean())


def _certain(document: dict[str, Any]) -> Iterator[tuple[str, tuple[np.ndarray, Exact]]]:
    for name, expected in merged(document).items():
        if isinstance(expected, Exact):
            yield name, (np.ones(expected.value.shape, bool), expected)
        elif expected.trim == "magnitude":
            yield name, decided(expected)


def _first(wrong: np.ndarray, actual: torch.Tensor, expected: Exact) -> str:
    place = tuple(int(axis[0]) for axis in np.nonzero(wrong))
    return (
        f"{wrong.sum()} of {wrong.size} elements; at {place} {actual[place].item()} instead of {expected.value[place]}"
    )

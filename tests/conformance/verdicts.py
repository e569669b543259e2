"""What it means for a merge on disk to be right, said as assertions over whole checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.conformance.exact import Choice, Exact
from tests.conformance.measures import (
    Masks,
    correctly_rounded,
    decided,
    explained,
    explained_by_choice,
    find_masks,
    noise,
    rounded,
    ulp_distance,
)
from tests.conformance.reference import TaskVectors, checkpoint, l1_scale, merged, output_dtype, outputs
from tests.conformance.replay import SCALED, Replay, narrowed, replayed

ANGLES = ("slerp",)
"""One unit from mergekit under its numerics: mergekit adds up the angle in float32, mergeyard in float64."""
NOT_REPEATED = ("sce", "nuslerp", "multislerp", "karcher", "model_stock")
"""Under mergekit's numerics, other bits: mergekit rounds squares and variances, or directions and their products, to
bfloat16 before it selects or takes an angle."""
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
        if isinstance(expected, Choice):
            fits, (least, most) = explained_by_choice(actual[name], expected)
            assert fits.all(), f"{name}: {(~fits).sum()} of {fits.size} elements fit no option"
            if expected.count is not None:
                assert least <= expected.count <= most, f"{name}: kept {least} to {most} instead of {expected.count}"
            continue
        if expected.dice:
            masks = find_masks(actual[name], expected)
            assert masks.unexplained == 0, f"{name}: {masks.unexplained} of {expected.base.size} elements fit no mask"
            assert_scaled_by_norms(name, masks, expected)
            random.append((masks, expected))
            continue
        faults: list[str] = []
        for reading in expected.readings():
            masks = find_masks(actual[name], reading)
            wrong = f"{masks.unexplained} of {reading.base.size} elements fit no mask" if masks.unexplained else None
            faults += filter(None, [wrong or wrongly_trimmed(masks, reading)])
        assert len(faults) < len(expected.readings()), f"{name}: {faults}"
    if random:
        assert_kept_by_fair_dice(random)


def wrongly_trimmed(masks: Masks | Replay, vectors: TaskVectors) -> str | None:
    """Each task vector lost all but k elements, zero steps not counted: a merge does not show these. None if so."""
    for i, delta in enumerate(vectors.deltas):
        count = vectors.kept_count(i)
        least, most = int(masks.sure[i].sum()), int(masks.possible[i].sum())
        zeros = int((delta == 0).sum())
        if not least <= count <= most + zeros:
            return f"task vector {i} kept {least} to {most} elements instead of {count}"
    return None


def assert_scaled_by_norms(name: str, masks: Masks, vectors: TaskVectors) -> None:
    """Each scale is the ratio of L1 norms for some mask between the sure and the possible one."""
    for delta, sure, possible, scale in zip(vectors.deltas, masks.sure, masks.possible, masks.scales, strict=True):
        if vectors.rescale and sure.any():
            least, most = l1_scale(delta, possible), l1_scale(delta, sure)
            assert least * 0.999 <= scale <= most * 1.001, f"{name}: scaled by {scale}, not {least} to {most}"


def assert_kept_by_fair_dice(found: Sequence[tuple[Masks | Replay, TaskVectors]]) -> None:
    """Over all tensors, each task vector kept its share of elements, as often as independent dice would: of all of
    them, and of each tenth of those that are kept with more or less probability."""
    for i in range(len(found[0][1].deltas)):
        moved = [vectors.deltas[i] != 0 for _, vectors in found]
        chances, sure, possible = (
            np.concatenate([part[where] for part, where in zip(parts, moved, strict=True)])
            for parts in (
                [vectors.chances(i) for _, vectors in found],
                [masks.sure[i] for masks, _ in found],
                [masks.possible[i] for masks, _ in found],
            )
        )
        tenths = np.array_split(np.argsort(chances, kind="stable"), 10)
        for place, some in [("all", slice(None)), *((f"tenth {n}", tenth) for n, tenth in enumerate(tenths))]:
            expected = chances[some].sum()
            slack = SIGMAS * (chances[some] * (1 - chances[some])).sum() ** 0.5
            least, most = int(sure[some].sum()), int(possible[some].sum())
            wanted = f"{expected:.0f} ± {slack:.0f} expected"
            assert least <= expected + slack, f"task vector {i}, {place}: at least {least} kept, {wanted}"
            assert most >= expected - slack, f"task vector {i}, {place}: at most {most} kept, {wanted}"


def assert_within_one_ulp(ours: Path, theirs: Path, document: dict[str, Any]) -> Counter[str]:
    """Both merges agree within one unit in the last place wherever neither dice nor ties decide, or within the noise of
    float32 where terms cancel so far that the noise is more than a unit.

    Counts elements: `exact`, `1 ulp`, `noise`, and those that `assert_follows_formulas` judges for both merges: `tied`,
    where equal values or float32 leave a choice, and `replayed`, where dice do."""
    mine, other = checkpoint(str(ours)), checkpoint(str(theirs))
    counts: Counter[str] = Counter()
    for name, expected in merged(document).items():
        if isinstance(expected, TaskVectors) and expected.dice:
            counts["replayed"] += expected.base.size
            continue
        certain, exact = _decided(expected)
        apart = ulp_distance(mine[name], other[name]).numpy()
        far = (apart > 1) & certain
        lost = far & (abs(mine[name].double() - other[name].double()).numpy() > 2 * noise(exact))
        assert not lost.any(), f"{name}: {lost.sum()} elements more than 1 ulp from mergekit"
        counts["exact"] += int(((apart == 0) & certain).sum())
        counts["1 ulp"] += int(((apart == 1) & certain).sum())
        counts["noise"] += int(far.sum())
        counts["tied"] += int((~certain).sum())
    return counts


def assert_as_mergekit(ours: Path, theirs: Path, document: dict[str, Any]) -> Counter[str]:
    """Under mergekit's numerics in bfloat16, the bits are mergekit's; for NOT_REPEATED, the errors are no greater."""
    judge = assert_errs_no_more if document["merge_method"] in NOT_REPEATED else assert_repeated
    return judge(ours, theirs, document)


def assert_repeated(ours: Path, theirs: Path, document: dict[str, Any]) -> Counter[str]:
    """Under mergekit's numerics in bfloat16, both merges have the same bits; of ANGLES, neighbouring
    ones, or values within the noise of float32. Where equal magnitudes or dice decide, each has the bits of mergekit's
    steps for some mask that the method allows."""
    mine, other = checkpoint(str(ours)), checkpoint(str(theirs))
    assert mine.keys() == other.keys()
    counts: Counter[str] = Counter()
    random: list[tuple[Replay, TaskVectors]] = []
    for name, expected in merged(document).items():
        assert mine[name].dtype == other[name].dtype == torch.bfloat16, name
        equal = torch.eq(mine[name], other[name]).numpy()
        certain = np.ones(equal.shape, bool)
        if isinstance(expected, TaskVectors) and expected.trim and min(expected.densities) < 1:
            vectors = narrowed(expected)
            if vectors.dice and vectors.rescale and equal.size < SCALED:
                continue
            certain = _replay(f"{name} of mergekit", other[name], vectors).certain
            replay = _replay(f"{name} of mergeyard", mine[name], vectors)
            if vectors.dice:
                random.append((replay, vectors))
            elif len(vectors.readings()) > 1:
                certain = certain & _decided(vectors)[0]
            counts["replayed" if vectors.dice else "tied"] += int((~certain).sum())
        elif isinstance(expected, Choice) and expected.tied_in_bf16 is not None:
            certain = ~expected.tied_in_bf16
            counts["tied"] += int((~certain).sum())
        different = certain & ~equal
        if document["merge_method"] in ANGLES and isinstance(expected, Exact):
            far = abs(mine[name].double() - other[name].double()).numpy() > 2 * noise(expected)
            different &= far & (ulp_distance(mine[name], other[name]).numpy() > 1)
        assert not different.any(), f"{name}: {different.sum()} of {different.size} elements differ from mergekit"
        counts["exact"] += int((certain & equal).sum())
        counts["1 ulp"] += int((certain & ~equal).sum())
    if random:
        assert_kept_by_fair_dice(random)
    return counts


def assert_errs_no_more(ours: Path, theirs: Path, document: dict[str, Any]) -> Counter[str]:
    """Under mergekit's numerics in bfloat16, of a method whose bits are not mergekit's: over the checkpoint, mergeyard
    errs by at most half as much again as mergekit, against the formula in float64. Most of either error is that of
    mergekit's last steps in bfloat16. Counts elements by their distance from mergekit."""
    mine, other = checkpoint(str(ours)), checkpoint(str(theirs))
    assert mine.keys() == other.keys()
    counts: Counter[str] = Counter()
    errors = np.zeros(2)
    for name, expected in merged(document).items():
        assert mine[name].dtype == other[name].dtype == torch.bfloat16, name
        certain, exact = _decided(expected)
        if isinstance(expected, Choice) and expected.tied_in_bf16 is not None:
            certain = certain & ~expected.tied_in_bf16
        errors += [abs(each[name].double().numpy() - exact.value)[certain].sum() for each in (mine, other)]
        apart = ulp_distance(mine[name], other[name]).numpy()
        counts["exact"] += int(((apart == 0) & certain).sum())
        counts["1 ulp"] += int(((apart == 1) & certain).sum())
        counts["noise"] += int(((apart > 1) & certain).sum())
        counts["tied"] += int((~certain).sum())
    assert errors[0] <= 1.5 * errors[1], f"mergeyard errs by {errors[0]:g} in all, mergekit by {errors[1]:g}"
    return counts


def against_formulas(folder: Path, document: dict[str, Any]) -> Counter[str]:
    """Counts elements: `exact` is the float64 value rounded once, `1 ulp` its neighbour, `noise` any other value."""
    actual = checkpoint(str(folder))
    counts: Counter[str] = Counter()
    for name, expected in merged(document).items():
        if isinstance(expected, TaskVectors) and expected.dice:
            counts["replayed"] += expected.base.size
            continue
        certain, exact = _decided(expected)
        right = correctly_rounded(actual[name], exact.value)
        nearest = torch.from_numpy(rounded(exact.value, actual[name].dtype)).to(actual[name].dtype)
        near = ~right & (ulp_distance(actual[name], nearest).numpy() <= 1)
        counts["exact"] += int((right & certain).sum())
        counts["1 ulp"] += int((near & certain).sum())
        counts["noise"] += int((~right & ~near & certain).sum())
        counts["tied"] += int((~certain).sum())
    return counts


def share_correctly_rounded(folder: Path, document: dict[str, Any]) -> float:
    """Of all elements that neither dice nor ties decide, the share that is the float64 value rounded once."""
    counts = against_formulas(folder, document)
    return counts["exact"] / (counts["exact"] + counts["1 ulp"] + counts["noise"])


def _replay(name: str, actual: torch.Tensor, vectors: TaskVectors) -> Replay:
    """The explanation of a merge in bfloat16 by the first reading that has one."""
    faults: list[str] = []
    for reading in vectors.readings():
        replay = replayed(actual, reading)
        wrong = f"{(~replay.fits).sum()} of {replay.fits.size} elements fit no mask" if not replay.fits.all() else None
        if not wrong and not vectors.dice:
            wrong = wrongly_trimmed(replay, reading)
        if not wrong:
            return replay
        faults.append(wrong)
    raise AssertionError(f"{name}: {faults}")


def _decided(expected: Exact | Choice | TaskVectors) -> tuple[np.ndarray, Exact]:
    """Where nothing leaves a choice, and the values there."""
    match expected:
        case Exact():
            return np.ones(expected.value.shape, bool), expected
        case Choice():
            return expected.decided()
        case TaskVectors():
            certain, exact = decided(expected)
            for reading in expected.readings()[1:]:
                certain = certain & (decided(reading)[1].value == exact.value)
            return certain, exact


def _first(wrong: np.ndarray, actual: torch.Tensor, expected: Exact) -> str:
    place = tuple(int(axis[0]) for axis in np.nonzero(wrong))
    return (
        f"{wrong.sum()} of {wrong.size} elements; at {place} {actual[place].item()} instead of {expected.value[place]}"
    )

"""Passes by the loops for GPUs, on CPU tensors by Triton's interpreter: the bits of the loops for CPUs."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from jobs.merge_tasks import ParentTensor, Setting, TensorMerge
from tests.workers.methods.test_passes import COMPILED, STORED, parents, setting
from tests.workers.methods.whole import answered, tiles_of
from workers.merging.tiles import TensorMerger, learn, pass_of
from workers.methods import launching, running
from workers.methods.aim import ACTIVATIONS
from workers.methods.coins import Coin
from workers.methods.gpu_kernels.language import interprets
from workers.methods.gpu_kernels.rows import BLOCK
from workers.methods.passes import Consensus, Kept, Pass, SelectedConsensus, WeightedSum
from workers.methods.ranking import Threshold
from workers.methods.tile import Array, Reduction, Tile, as_tensor

pytestmark = pytest.mark.skipif(not interprets(), reason="Triton is not interpreted here; `make triton` does")

STAND_IN = "cpu:0"
"""A device of torch that is no "cpu" for a merge, and needs no GPU."""

ARITHMETIC = {"F32": "float32", "F64": "float64"}
Loops = Callable[[Sequence[Pass], Tile, str], tuple[list[Array], list[bool]]]


@pytest.fixture
def loops(small_tiles: int) -> Loops:
    """The elements by the loops for GPUs and whether they are finite, of passes over a tile on the host."""

    def run(passes: Sequence[Pass], tile: Tile, arithmetic: str) -> tuple[list[Array], list[bool]]:
        raw, around = ({name: as_tensor(each) for name, each in of.items()} for of in (tile.raw, tile.around))
        there = Tile(tile.tensor, tile.start, raw, tile.facts, tile.seed, tile.shape, around, tile.around_start)
        outputs = [torch.full((tile.elements,), 7.0).to(next(iter(raw.values())).dtype) for _ in passes]
        works = [launching.Work(each, there, output) for each, output in zip(passes, outputs, strict=True)]
        flags = launching.run(works, arithmetic)
        dtype = next(iter(tile.raw.values())).dtype
        width = getattr(torch, f"int{8 * dtype.itemsize}")
        return [output.view(width).numpy().view(dtype) for output in outputs], [flag == 1 for flag in flags.tolist()]

    return run


def by_cpu(passes: Sequence[Pass], tile: Tile, arithmetic: str) -> tuple[list[Array], list[bool]]:
    dtype = next(iter(tile.raw.values())).dtype
    outputs = [np.empty(tile.elements, dtype) for _ in passes]
    return outputs, running.run(passes, tile, outputs, arithmetic)[1]


def differing(one: Array, other: Array) -> int:
    """How many elements have other bits."""
    width = f"u{one.itemsize}"
    return int((one.view(width) != other.view(width)).sum())


@pytest.mark.parametrize("units", [1 << 20, 70])
@pytest.mark.parametrize(("arithmetic", "stored"), [("F32", "BF16"), ("F32", "F16"), ("F64", "F32")])
@pytest.mark.parametrize("method", COMPILED)
def test_the_loops_have_the_bits_of_those_for_cpus(
    loops: Loops, method: str, arithmetic: str, stored: str, units: int
) -> None:
    rng = np.random.default_rng(zlib.crc32(f"{method} {stored} {units}".encode()))
    shape = int(rng.integers(30, 50)), int(rng.integers(45, 60))
    raw: Any = parents(rng, shape[0] * shape[1], stored)
    settings = [setting(rng, method) for _ in range(3)]
    facts: dict[Reduction, Any] = {}
    tile = tiles_of(raw, facts, units=units, seed=3, shape=shape)[-1]  # the whole tensor, or its end
    (passes,) = answered(
        tiles_of(raw, facts, units=1 << 20, seed=3, shape=shape),
        facts,
        lambda each: [pass_of(each, s, arithmetic, "") for s in settings],
    )
    chosen = [each for each in passes if each is not None]
    expected, _ = by_cpu(chosen, tile, ARITHMETIC[arithmetic])
    found, broken = loops(chosen, tile, ARITHMETIC[arithmetic])
    assert [differing(a, b) for a, b in zip(found, expected, strict=True)] == [0] * len(settings)
    assert not any(broken)


SPECIAL = [0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, np.nan, 3e38, -3e38, 65504.0, 1e-40, -1e-40, 6e-8, -6e-8, 1e-20]
"""Zeros, infinities, NaN, the largest numbers, and subnormal ones of float32, bfloat16 and float16."""

SPECIAL_PASSES = {
    "linear": WeightedSum(("a", "b"), (0.7, 0.3)),
    "task_arithmetic": WeightedSum(("a", "b"), (0.7, -0.3), "base"),
    "ties": Consensus(
        "base", (Kept("a", 0.7, Threshold(0x3F000000, 0, [0, 0])), Kept("b", 0.3)), elect=True, normalize=True
    ),
    "dare_ties": Consensus(
        "base",
        (Kept("a", 0.7, coin=Coin("dare_ties", 0.5), factor=2.0), Kept("b", 0.3, coin=Coin("dare_ties", 0.8))),
        elect=True,
        scale=0.7,
    ),
    "sce": SelectedConsensus("base", ("a", "b"), (0.7, 0.3), Threshold(0x3F000000, 0, [0, 0])),
    "sce without weights": SelectedConsensus("base", ("a", "b"), (math.nan, 0.0), Threshold(0x3F000000, 0, [0, 0])),
}


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize(("arithmetic", "stored"), [("F32", "BF16"), ("F32", "F16"), ("F32", "F32"), ("F64", "F32")])
@pytest.mark.parametrize("name", SPECIAL_PASSES)
def test_numbers_at_the_ends_of_a_dtype(
    monkeypatch: pytest.MonkeyPatch, loops: Loops, name: str, arithmetic: str, stored: str
) -> None:
    """All triples of special numbers. A NaN is one on both; the bits of bfloat16's are equal too."""
    monkeypatch.undo()  # the tensor is one unit
    with np.errstate(all="ignore"):
        grids = np.meshgrid(SPECIAL, SPECIAL, SPECIAL, indexing="ij")
        raw: Any = {
            model: grid.ravel().astype(np.float32).astype(STORED[stored])
            for model, grid in zip(("a", "b", "base"), grids, strict=True)
        }
    tile = Tile("x", 0, raw, {}, 5, (len(SPECIAL) ** 3,))
    (expected,), (expected_broken,) = by_cpu([SPECIAL_PASSES[name]], tile, ARITHMETIC[arithmetic])
    (found,), (broken,) = loops([SPECIAL_PASSES[name]], tile, ARITHMETIC[arithmetic])
    nan = np.isnan(expected.astype(np.float32))
    assert nan.any() and (np.isnan(found.astype(np.float32)) == nan).all()
    assert differing(found[~nan], expected[~nan]) == 0
    assert stored != "BF16" or differing(found, expected) == 0
    assert broken and expected_broken


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "breadcrumbs", "sce"])
def test_a_merge_is_relaxed_as_on_cpus(loops: Loops, method: str) -> None:
    rng = np.random.default_rng(11)
    shape = 40, 60
    raw: Any = parents(rng, shape[0] * shape[1], "BF16")
    facts: dict[Reduction, Any] = {ACTIVATIONS: rng.random((1, shape[1]))}
    plain = setting(rng, method)
    relaxed = Setting(method, plain.models, plain.base, plain.parameters, 0.3)
    (tile,) = tiles_of(raw, facts, units=1 << 20, shape=shape)
    (found,) = answered([tile], facts, lambda each: pass_of(each, relaxed, "F32", ""))
    assert found is not None
    assert differing(loops([found], tile, "float32")[0][0], by_cpu([found], tile, "float32")[0][0]) == 0


def test_an_output_that_is_not_finite_is_flagged_and_no_other(loops: Loops) -> None:
    ones = np.ones(3 * BLOCK + 5, np.float16)
    large = ones.copy()
    large[2 * BLOCK + 1] = 6e4
    tile = Tile("x", 0, {"a": ones, "b": large}, {}, 0, ones.shape)
    passes = [WeightedSum(("a",), (0.5,)), WeightedSum(("a", "b"), (1.0, 2.0)), WeightedSum(("b",), (0.5,))]
    assert loops(passes, tile, "float32")[1] == [False, True, False]


@pytest.mark.parametrize("method", ["linear", "ties", "della", "ramplus_tl"])
def test_a_tensor_merger_on_a_device_has_the_elements_of_one_on_cpus(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Several points, an output in the memory of the host, and one of them is a copy; no formula is asked."""
    monkeypatch.setattr("workers.merging.tiles.merge_tile", None)
    rng = np.random.default_rng(4)
    raw: Any = parents(rng, 3000, "BF16")
    sources = {name: ParentTensor(0, "BF16", 0, 6000) for name in raw}
    tensor = TensorMerge("x", "BF16", (50, 60), sources, 0, "F32")
    copy = Setting("passthrough", ("b",), None, (("scale", (1.0,)),))
    settings = [setting(rng, method), copy, setting(rng, method)]

    def merged(device: str, elements: Any) -> list[Array]:
        facts: dict[Reduction, Any] = {}
        for each in settings:
            learn(tensor, each, elements, facts, 3000, seed=2, numerics="", units=None)
        outputs = [np.empty(3000, STORED["BF16"]) for _ in settings]
        merger = TensorMerger(tensor, settings, facts, seed=2, numerics="", device=device)
        assert merger.run(0, elements, 0, outputs) == (False, [])
        return outputs

    there = merged(STAND_IN, {name: as_tensor(each) for name, each in raw.items()})
    assert [differing(a, b) for a, b in zip(there, merged("cpu", raw), strict=True)] == [0, 0, 0]


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "nearswap"])
def test_the_dtype_is_that_of_the_parents_that_a_pass_reads(loops: Loops, method: str) -> None:
    """Another point of the grid merges a first parent of float32."""
    rng = np.random.default_rng(6)
    raw: Any = parents(rng, 600, "BF16")
    facts: dict[Reduction, Any] = {}
    setting_of = setting(rng, method)
    (tile,) = tiles_of(raw, facts, units=1 << 20, shape=(20, 30))
    (found,) = answered([tile], facts, lambda each: pass_of(each, setting_of, "F32", ""))
    assert found is not None
    expected = by_cpu([found], tile, "float32")[0][0]
    more: Any = {"another": np.ones(600, np.float32), **raw}
    beside = Tile(tile.tensor, tile.start, more, tile.facts, tile.seed, tile.shape)
    output = torch.empty(600, dtype=torch.bfloat16)
    there = Tile(tile.tensor, 0, {name: as_tensor(each) for name, each in beside.raw.items()}, facts, 0, tile.shape)
    launching.run([launching.Work(found, there, output)], "float32")
    assert differing(output.view(torch.int16).numpy().view(expected.dtype), expected) == 0


def test_parents_of_two_dtypes_are_left_to_the_formula() -> None:
    assert launching.launches(STAND_IN, ["BF16", "BF16"], "F16")
    assert not launching.launches(STAND_IN, ["BF16", "F16"], "BF16")
    assert not launching.launches(STAND_IN, ["F8_E4M3", "F8_E4M3"], "BF16")

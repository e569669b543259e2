"""Passes over tensors on a GPU, by loops of Triton: many points of a tensor, or many tensors, in one launch."""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from workers.methods.coins import drawn
from workers.methods.gpu_kernels import rows
from workers.methods.gpu_kernels.launch import launch, runs_on
from workers.methods.gpu_kernels.random import signed
from workers.methods.gpu_kernels.rows import Head, Row, Term
from workers.methods.nearswap import NO_DISTANCE
from workers.methods.passes import (
    Consensus,
    FisherMean,
    Kept,
    MatrixSum,
    Overlap,
    Pass,
    Relaxed,
    SelectedConsensus,
    Swap,
    TallConsensus,
    WeightedSum,
)
from workers.methods.ranking import Magnitude, Score, Threshold, Variance, among_on_host
from workers.methods.sce import LEAST_DIVISOR
from workers.methods.tile import TILE_ELEMENTS, Array, Tile, as_tensor

if TYPE_CHECKING:
    from torch import Tensor

_STORED = {"BF16", "F16", "F32", "F64"}
_EVERY_PLACE = 1 << 62


@dataclass(frozen=True, slots=True)
class Work:
    """A pass over the elements of a tile, and the memory for its result, on one device."""

    each: Pass
    tile: Tile
    output: Tensor


def launches(device: str, parents: Iterable[str], output: str) -> bool:
    """Whether the loops run on a device, and for parents and an output of these dtypes, as safetensors names them."""
    stored = {*parents}
    return len(stored) == 1 and {*stored, output} <= _STORED and runs_on(device)


def run(works: Sequence[Work], arithmetic: str) -> Tensor:
    """Begins to write the elements of each work, rounded once from the arithmetic dtype.

    The result, on the device, has a 1 for each work whose output has an element that is NaN or infinite.
    """
    lists: list[Tensor] = []  # which live until the last launch has begun
    return launch([_row(work, lists) for work in works], arithmetic, works[0].output.device)


def _row(work: Work, lists: list[Tensor]) -> Row:
    each, tile, output = work.each, work.tile, work.output
    head, mode = Head(output.data_ptr(), 0, 0, tile.elements, tile.start), 0

    def listed(numbers: Array | Tensor) -> int:
        lists.append(as_tensor(numbers).to(output.device))
        return lists[-1].data_ptr()

    if isinstance(each, Relaxed):
        width, stride, deep = each.places
        numbers = listed(each.factors.astype(np.float64))
        head, mode = head._replace(factors=numbers, width=width, stride=stride, deep=deep), rows.RELAXES
        each = each.merged
    assert not isinstance(each, FisherMean | MatrixSum), "torch merges these on a GPU"
    if each.base is not None:
        head, mode = head._replace(base=_address(tile, each.base)), mode | rows.BASED
    match each:
        case WeightedSum():
            kind, of_lines = rows.SUM, any(np.ndim(number) for number in each.coefficients)
            if of_lines:
                mode |= rows.OF_ROWS if each.along == "rows" else rows.OF_COLUMNS
                head = head._replace(line=tile.row if each.along == "rows" else len(np.ravel(each.coefficients[0])))
            weights = [
                listed(np.ascontiguousarray(number, np.float64)) if of_lines else _bits(float(number))
                for number in each.coefficients
            ]
            terms = [Term(_address(tile, name), weight) for name, weight in zip(each.models, weights, strict=True)]
        case Consensus():
            kind, head = rows.CONSENSUS, head._replace(scale=_bits(each.scale))
            mode |= rows.ELECTS * each.elect | rows.NORMALIZES * (each.elect and each.normalize)
            terms: list[Term] = []
            for kept in each.kept:
                of_term, term = _term(kept, each.base, tile, listed)
                terms.append(term)
                mode |= of_term
        case SelectedConsensus():
            kind = rows.SELECTED
            head = head._replace(scale=_bits(LEAST_DIVISOR), least=_bits(1 / len(each.models)))
            if each.among is not None:
                last = _last(tile, each.among, Variance(each.models, each.base))
                head, mode = head._replace(keep=each.among.bits, keep_last=last), mode | rows.TRIMS
            terms = _terms(tile, each.models, each.weights)
        case Overlap():
            kind, head = rows.OVERLAP, head._replace(scale=_bits(each.epsilon))
            mode |= rows.FACTORED * (each.factors is not None)
            terms = _terms(tile, each.models, (0.0,) * len(each.models), each.factors)
        case TallConsensus():
            kind, head = rows.TALL, head._replace(scale=_bits(each.scale), least=_bits(each.k))
            terms = _terms(tile, each.models, each.weights, each.ratios)
        case Swap():
            kind, head = rows.SWAP, head._replace(scale=_bits(each.t), least=_bits(NO_DISTANCE))
            terms = _terms(tile, (each.model,), (0.0,))
        case Relaxed():
            raise AssertionError("a merge is relaxed once")
    return Row(kind, mode, _name(tile.raw[_parent_of(each)]), _name(output), head, tuple(terms))


def _parent_of(each: WeightedSum | Consensus | SelectedConsensus | Overlap | TallConsensus | Swap) -> str:
    """A parent that the pass reads: all of them have one dtype, but other points' parents may have another."""
    if each.base is not None:
        return each.base
    return each.models[0]


def _term(kept: Kept, base: str, tile: Tile, listed: Callable[[Array | Tensor], int]) -> tuple[int, Term]:
    """The flags and fields of one task vector of a consensus."""
    mode, term, score = 0, Term(_address(tile, kept.model), _bits(kept.weight)), Magnitude(kept.model, base)
    if kept.factor is not None:
        mode |= rows.FACTORED
    term = term._replace(factor=_bits(1.0 if kept.factor is None else kept.factor), limit=1 << 32)
    if kept.among is not None and kept.score is None:
        term = term._replace(keep=kept.among.bits, keep_last=_last(tile, kept.among, score))
        mode |= rows.TRIMS
    if kept.beyond is not None:
        term = term._replace(drop=kept.beyond.bits, drop_last=_last(tile, kept.beyond, score))
        mode |= rows.TRIMS
    mask: Array | Tensor | None = None
    fresh = replace(tile, _memory={})  # masks are too large to be remembered
    if kept.among is not None and kept.score is not None:
        mask = among_on_host(fresh, kept.among, kept.score).view(np.uint8)
    elif kept.coin is not None and kept.coin.spread and tile.row > 1:
        mask = drawn(fresh, kept.coin, kept.model, base)
    elif kept.coin is not None:
        key_0, key_1 = map(signed, tile.random_key(kept.coin.method, kept.model))
        term = term._replace(key_0=key_0, key_1=key_1, limit=kept.coin.limit)
        mode |= rows.DRAWS
    if mask is not None:
        term, mode = term._replace(mask=listed(mask)), mode | rows.MASKS
    return mode, term


def _terms(
    tile: Tile, models: Sequence[str], weights: Sequence[float], factors: Sequence[float] | None = None
) -> list[Term]:
    factors = weights if factors is None else factors
    return [
        Term(_address(tile, name), _bits(weight), _bits(factor))
        for name, weight, factor in zip(models, weights, factors, strict=True)
    ]


def _last(tile: Tile, threshold: Threshold, score: Score) -> int:
    """The place in the tensor of the last element of a tile that equals a threshold and is kept by it."""
    first, end = tile.units
    before = threshold.equal_before
    if threshold.equals <= before[first]:
        return -1
    if threshold.equals >= before[end]:
        return _EVERY_PLACE

    def find() -> int:
        unit = bisect_left(before, threshold.equals, first, end) - 1
        begin = unit * TILE_ELEMENTS - tile.start
        raw = {name: elements[begin : begin + TILE_ELEMENTS] for name, elements in tile.raw.items()}
        bits = score.bits(Tile(tile.tensor, tile.start + begin, raw, {}))
        equal = (bits == threshold.bits).nonzero().view(-1)
        return tile.start + begin + int(equal[threshold.equals - before[unit] - 1])

    return tile.remember(("last", score, threshold.bits, threshold.equals), find)


def _address(tile: Tile, name: str) -> int:
    elements: Any = tile.raw[name]
    return elements.data_ptr()


def _name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bits(number: float) -> int:
    """A number as the bits of its float64."""
    (bits,) = struct.unpack("<q", struct.pack("<d", number))
    return bits

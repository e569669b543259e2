"""Random bits by counting, those of `workers.methods.kernels.random`, drawn where the elements are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.methods.gpu_kernels.language import Pointer, constant, constexpr, jit, tl
from workers.methods.gpu_kernels.rows import BLOCK

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MULTIPLIER_0, _MULTIPLIER_1 = constant(0xD2E7470EE14C6C93), constant(0xCA5A826395121157)
_WEYL_0, _WEYL_1 = constant(0x9E3779B97F4A7C15), constant(0xBB67AE8584CAA73B)


@jit
def random_bits(key_0: Pointer, key_1: Pointer, place: Pointer, BLOCK: constexpr) -> Pointer:
    """32 bits as uint32 for each of BLOCK elements from `place` of the tensor on, a multiple of 8.

    One step of Philox4x64-10 gives four 64-bit words: the low and the high half of each, for eight elements.
    """
    a = (place // 8 + 1 + tl.arange(0, BLOCK // 8)).to(tl.uint64)
    b = tl.zeros_like(a)
    c = tl.zeros_like(a)
    d = tl.zeros_like(a)
    k = key_0.to(tl.uint64)
    m = key_1.to(tl.uint64)
    multiplier_0 = tl.full((1,), _MULTIPLIER_0, tl.uint64)
    multiplier_1 = tl.full((1,), _MULTIPLIER_1, tl.uint64)
    weyl_0 = tl.full((1,), _WEYL_0, tl.uint64)
    weyl_1 = tl.full((1,), _WEYL_1, tl.uint64)
    for _ in tl.static_range(10):
        high_a = tl.umulhi(a, multiplier_0)
        low_a = a * multiplier_0
        high_c = tl.umulhi(c, multiplier_1)
        low_c = c * multiplier_1
        a = high_c ^ b ^ k
        b = low_c
        c = high_a ^ d ^ m
        d = low_a
        k = k + weyl_0
        m = m + weyl_1
    even = tl.interleave(tl.interleave(_low(a), _low(c)), tl.interleave(_low(b), _low(d)))
    odd = tl.interleave(tl.interleave(_high(a), _high(c)), tl.interleave(_high(b), _high(d)))
    return tl.interleave(even, odd)


@jit
def _low(word: Pointer) -> Pointer:
    return word.to(tl.uint32)


@jit
def _high(word: Pointer) -> Pointer:
    return (word >> 32).to(tl.uint32)


@jit
def _drawn(
    kept: Pointer,
    limits: Pointer,
    keys: Pointer,
    start: Pointer,
    elements: Pointer,
    EACH: constexpr,
    BLOCK: constexpr,
) -> None:
    """1 where the random bits are below the limit: the only one, of 64 bits, or that of EACH element, of 32 bits."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    inside = at < elements
    bits = random_bits(tl.load(keys), tl.load(keys + 1), start + first, BLOCK).to(tl.int64)
    if EACH:
        kept_here = bits < tl.load(limits + at, mask=inside, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
    else:
        kept_here = bits < tl.load(limits)
    tl.store(kept + at, kept_here.to(tl.uint8), mask=inside)


def drawn(key: tuple[int, int], start: int, elements: int, limits: int | Tensor, device: torch.device) -> Tensor:
    """A byte for each element from `start` on, a multiple of 8: 1 where its random bits are below a limit, else 0.

    The limit is one number for all, or a number of 32 bits for each, as int32.
    """
    import torch

    of_each = isinstance(limits, torch.Tensor)
    numbers = limits if of_each else torch.tensor([limits], device=device)
    keys = torch.tensor([signed(number) for number in key], device=device)
    kept = torch.empty(elements, dtype=torch.uint8, device=device)
    with torch.cuda.device_of(kept):
        _drawn[(-(-elements // BLOCK),)](kept, numbers, keys, start, elements, of_each, BLOCK, num_warps=8)
    return kept


def signed(number: int) -> int:
    """The signed integer with the bits of an unsigned one of 64 bits."""
    return number - (number >> 63 << 64)

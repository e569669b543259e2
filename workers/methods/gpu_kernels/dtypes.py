"""Numbers of any float dtype to and from the dtype of the arithmetic; the bits are those of `kernels.dtypes`.

Tensors are given by their addresses, as 64-bit integers.
"""

from __future__ import annotations

from workers.methods.gpu_kernels.language import Pointer, constexpr, jit, tl


@jit
def widened(
    address: Pointer,
    at: Pointer,
    inside: Pointer,
    MASKED: constexpr,
    STORED: constexpr,
    ARITHMETIC: constexpr,
    ALIGNMENT: constexpr,
) -> Pointer:
    """The elements `at` of a tensor; those that are not `inside` are zero, if MASKED."""
    if STORED == tl.bfloat16:
        halves = _loaded(address.to(tl.pointer_type(tl.uint16)), at, inside, MASKED, ALIGNMENT)
        numbers = (halves.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        numbers = _loaded(address.to(tl.pointer_type(STORED)), at, inside, MASKED, ALIGNMENT)
    return numbers.to(ARITHMETIC)


@jit
def _loaded(tensor: Pointer, at: Pointer, inside: Pointer, MASKED: constexpr, ALIGNMENT: constexpr) -> Pointer:
    if MASKED:
        return tl.load(tensor + at, mask=inside, other=0)
    return tl.load(tl.multiple_of(tensor + at, ALIGNMENT))


@jit
def stored(
    address: Pointer,
    at: Pointer,
    inside: Pointer,
    numbers: Pointer,
    MASKED: constexpr,
    STORED: constexpr,
    ALIGNMENT: constexpr,
) -> Pointer:
    """Writes numbers to the elements `at` of a tensor, rounded once. Returns which are NaN or infinite then.

    Of a NaN, bfloat16 has all bits set, as on CPUs; the bits of another NaN may be other ones than there.
    """
    if STORED == tl.bfloat16:
        single = numbers.to(tl.float32)
        bits = single.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        halves = tl.where(single == single, nearest, 0xFFFF).to(tl.uint16)
        _put(address.to(tl.pointer_type(tl.uint16)), at, inside, halves, MASKED, ALIGNMENT)
        return (halves & 0x7FFF) >= 0x7F80
    narrow = numbers.to(STORED)
    _put(address.to(tl.pointer_type(STORED)), at, inside, narrow, MASKED, ALIGNMENT)
    return (narrow - narrow) != 0  # a NaN is unequal to any number


@jit
def _put(
    tensor: Pointer, at: Pointer, inside: Pointer, elements: Pointer, MASKED: constexpr, ALIGNMENT: constexpr
) -> None:
    if MASKED:
        tl.store(tensor + at, elements, mask=inside)
    else:
        tl.store(tl.multiple_of(tensor + at, ALIGNMENT), elements)

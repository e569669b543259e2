"""Random bits by counting: Philox4x64-10 (Salmon et al. 2011, *Parallel random numbers: as easy as 1, 2, 3*).

The bits are those of `numpy.random.Philox`, which holds Python's lock while it draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from workers.methods.kernels.compiling import Pointer, kernel
from workers.methods.kernels.masks import MOST_MASKS, Words
from workers.methods.kernels.memory import address, aligned_lines

ELEMENTS_A_STEP = 8
"""One step of the counter gives four 64-bit words, and so 32 bits for each of eight elements."""

MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def random_words(key_0: int, key_1: int, first: int | np.uint64, steps: int, words: Pointer) -> None:
    """Writes four 64-bit words for each of `steps` counters from `first` on; numpy's first counter is 1.

    A product of 128 bits is put together from products of 32-bit halves, which processors compute several at a time.
    """
    for step in range(steps):
        a, b, c, d = np.uint64(first + step), np.uint64(0), np.uint64(0), np.uint64(0)
        a, b, c, d = _round(a, b, c, d, key_0, key_1, 0)  # written out, so that steps become lanes of a vector
        a, b, c, d = _round(a, b, c, d, key_0, key_1, 1)
        a, b, c, d = _round(a, b, c, d, key_0, key_1, 2)
        a, b, c, d = _round(a, b, c, d, key_0, key_1, 3)
        a, b, c, d = _round(a, b, c, d, key_0, key_1, 4)
        a, b, c, d = _round(a, b, c, d, key_0, key_1, 5)
        a, b, c, d = _round(a, b, c, d, key_0, key_1, 6)
        a, b, c, d = _round(a, b, c, d, key_0, key_1, 7)
        a, b, c, d = _round(a, b, c, d, key_0, key_1, 8)
        a, b, c, d = _round(a, b, c, d, key_0, key_1, 9)
        words[4 * step] = a
        words[4 * step + 1] = b
        words[4 * step + 2] = c
        words[4 * step + 3] = d


def _round(
    a: np.uint64, b: np.uint64, c: np.uint64, d: np.uint64, key_0: int, key_1: int, count: int
) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    high_a, low_a = _product(a, np.uint64(MULTIPLIERS[0] & 0xFFFFFFFF), np.uint64(MULTIPLIERS[0] >> 32))
    high_c, low_c = _product(c, np.uint64(MULTIPLIERS[1] & 0xFFFFFFFF), np.uint64(MULTIPLIERS[1] >> 32))
    k = np.uint64(key_0) + np.uint64(count) * np.uint64(WEYL[0])
    m = np.uint64(key_1) + np.uint64(count) * np.uint64(WEYL[1])
    return high_c ^ b ^ k, low_c, high_a ^ d ^ m, low_a


def _product(number: np.uint64, low: np.uint64, high: np.uint64) -> tuple[np.uint64, np.uint64]:
    """The upper and the lower half of number · (high · 2³² + low)."""
    number_low, number_high = number & _LOW, number >> _HALF
    lowest = number_low * low
    crossed = number_low * high
    middle = (lowest >> _HALF) + (crossed & _LOW) + number_high * low  # at most 2⁶⁴ − 1
    return number_high * high + (crossed >> _HALF) + (middle >> _HALF), (middle << _HALF) | (lowest & _LOW)


_random_words = kernel("u64", "u64", "u64", "i64", "u64*")(random_words)


def random_bits(key: tuple[int, int], start: int, elements: int) -> NDArray[np.uint32]:
    """32 bits for each element from `start` on, a multiple of 8: those of `numpy.random.Philox`."""
    steps = -(-elements // ELEMENTS_A_STEP)
    words = np.empty(4 * steps, np.uint64)
    _random_words(*key, start // ELEMENTS_A_STEP + 1, steps, address(words))
    return words.view(np.uint32)[:elements]


_BLOCK = 1024
"""Elements whose bits and words stay in a core's first cache while each limit meets them."""

_TOP = np.uint32(1 << 31)
"""Vectors compare numbers without a sign slowly; with this bit flipped, numbers with a sign have the same order."""


@kernel("u64", "u64", "u64", "i64", "i64*", "i64", "u64*", "u32*", "u16*")
def _random_below(
    key_0: int,
    key_1: int,
    first: np.uint64,
    elements: int,
    limits: Pointer,
    settings: int,
    bits: Pointer,
    numbers: Pointer,
    words: Pointer,
) -> None:
    """Bit s of an element's word: are its random bits below limit s? `bits` and `numbers` are the same memory."""
    for start in range(0, elements, _BLOCK):
        size = min(_BLOCK, elements - start)
        counter = first + np.uint64(start // ELEMENTS_A_STEP)
        random_words(key_0, key_1, counter, (size + ELEMENTS_A_STEP - 1) // ELEMENTS_A_STEP, bits)
        for i in range(size):
            numbers[i] = np.uint32(numbers[i] ^ _TOP)
            words[start + i] = 0
        for setting in range(settings):
            bit, limit = np.uint16(1 << setting), limits[setting]
            if limit >> 32:
                for i in range(start, start + size):
                    words[i] |= bit
            else:
                _add_bit(numbers, np.int32(np.uint32(limit) ^ _TOP), words, start, bit, size)


def _add_bit(numbers: Pointer, limit: np.int32, words: Pointer, start: int, bit: np.uint16, count: int) -> None:
    nothing = np.uint16(0)
    for i in range(count):
        words[start + i] |= bit if np.int32(numbers[i]) < limit else nothing


def random_below(key: tuple[int, int], start: int, elements: int, limits: Sequence[int]) -> Words:
    """For each element from `start` on, a multiple of 8, a word: bit s says whether `random_bits` are below limit s.

    At most 16 limits, of 0 to 2³².
    """
    assert len(limits) <= MOST_MASKS
    words, of_limits = np.empty(elements, np.uint16), np.array(limits, np.int64)
    lines, _memory = aligned_lines(1, 4 * _BLOCK)
    at = int(lines[0])
    _random_below(
        *(*key, start // ELEMENTS_A_STEP + 1, elements, address(of_limits), len(limits), at, at, address(words))
    )
    return words

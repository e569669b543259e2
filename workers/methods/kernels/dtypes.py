"""Numbers of any float dtype to and from the dtype of the arithmetic, a block at a time.

The bits are those of torch: the nearest number, of two equally near the even one. A tensor in memory is given as its
address three times, as 16-, 32- and 64-bit words; the loop of its dtype uses one of these.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from workers.methods.kernels.compiling import Pointer

BF16, F16, F32, F64 = range(4)
CODES = {np.dtype(name): code for code, name in enumerate((ml_dtypes.bfloat16, np.float16, np.float32, np.float64))}
"""The number of each dtype in a kernel."""

ROUNDS_TO_INFINITY = np.uint32(0x7F7F8000)
"""The bits of the smallest float32 magnitude that is infinite in bfloat16; those of infinity and NaN are greater."""

ARITHMETIC = ("float32", "float64")
"""The dtypes that kernels compute in."""


def widened(code: int, halves: Pointer, words: Pointer, longs: Pointer, start: int, count: int, into: Pointer) -> None:
    """Writes elements [start, start + count) of a tensor to `into`, in its dtype: exact unless that is narrower."""
    if code == BF16:
        for i in range(count):
            into[i] = of_bfloat16(halves[start + i])
    elif code == F16:
        for i in range(count):
            into[i] = _of_half(halves[start + i])
    elif code == F32:
        for i in range(count):
            into[i] = np.uint32(words[start + i]).view(np.float32)
    else:
        for i in range(count):
            into[i] = np.uint64(longs[start + i]).view(np.float64)


def rounded(
    code: int, values: Pointer, count: int, halves: Pointer, words: Pointer, longs: Pointer, start: int
) -> np.bool_:
    """Writes `count` values to elements from `start` on of a tensor. Returns whether one is NaN or infinite then."""
    most = np.uint32(0)
    if code == BF16:
        for i in range(count):
            most = max(most, magnitude(values[i]))
            halves[start + i] = np.uint16(_nearest(values[i]) >> np.uint32(16))
        found = most >= ROUNDS_TO_INFINITY
        if found:
            for i in range(count):
                halves[start + i] = to_bfloat16(values[i])
        return found
    if code == F16:
        for i in range(count):
            half = _to_half(np.float32(values[i]))
            most = max(most, np.uint32(half & np.uint16(0x7FFF)))
            halves[start + i] = half
        return most >= np.uint32(0x7C00)
    if code == F32:
        for i in range(count):
            word = np.float32(values[i]).view(np.uint32)
            most = max(most, np.uint32(word & np.uint32(0x7FFFFFFF)))
            words[start + i] = word
        return most >= np.uint32(0x7F800000)
    top = np.uint64(0)
    for i in range(count):
        long = np.float64(values[i]).view(np.uint64)
        top = max(top, np.uint64(long & np.uint64(0x7FFFFFFFFFFFFFFF)))
        longs[start + i] = long
    return top >= np.uint64(0x7FF0000000000000)


def any_nonfinite(code: int, halves: Pointer, words: Pointer, longs: Pointer, start: int, count: int) -> np.bool_:
    """Whether any of `count` elements from `start` on is NaN or infinite."""
    if code in (BF16, F16):
        return largest_half(halves, start, count) >= (0x7F80 if code == BF16 else 0x7C00)
    if code == F32:
        most = np.uint32(0)
        for i in range(count):
            most = max(most, np.uint32(words[start + i] & np.uint32(0x7FFFFFFF)))
        return most >= np.uint32(0x7F800000)
    top = np.uint64(0)
    for i in range(count):
        top = max(top, np.uint64(longs[start + i] & np.uint64(0x7FFFFFFFFFFFFFFF)))
    return top >= np.uint64(0x7FF0000000000000)


def largest_half(halves: Pointer, start: int, count: int) -> np.uint16:
    """The bits of the largest magnitude of so many elements of two bytes; a NaN is the largest."""
    largest = np.uint16(0)
    for i in range(count):
        largest = max(largest, np.uint16(halves[start + i] & np.uint16(0x7FFF)))
    return largest


def of_bfloat16(half: np.uint16) -> np.float32:
    """float32 of a bfloat16."""
    return np.uint32(np.uint32(half) << np.uint32(16)).view(np.float32)


def lower(word: np.uint32) -> np.float32:
    """float32 of the first of two bfloat16 numbers in a word."""
    return np.uint32(word << np.uint32(16)).view(np.float32)


def higher(word: np.uint32) -> np.float32:
    """float32 of the second of two bfloat16 numbers in a word."""
    return np.uint32(word & np.uint32(0xFFFF0000)).view(np.float32)


def magnitude(number: np.float32) -> np.uint32:
    """The bits of a number without its sign."""
    return np.uint32(np.float32(number).view(np.uint32) & np.uint32(0x7FFFFFFF))


def paired(low: np.float32, high: np.float32) -> np.uint32:
    """The word of two numbers as bfloat16, neither NaN."""
    return np.uint32(np.uint32(_nearest(low) >> np.uint32(16)) | np.uint32(_nearest(high) & np.uint32(0xFFFF0000)))


def _nearest(number: np.float32) -> np.uint32:
    """bfloat16 of a number that is not NaN, in the upper half."""
    bits = np.float32(number).view(np.uint32)
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    return np.uint32(bits + np.uint32(0x7FFF) + odd)


def _of_half(half: np.uint16) -> np.float32:
    """float32 of a float16: its exponent is moved, and the multiplication corrects it, subnormals included."""
    magnitude = np.uint32(half & np.uint16(0x7FFF))
    sign = np.uint32(np.uint32(half & np.uint16(0x8000)) << np.uint32(16))
    moved = np.uint32(magnitude << np.uint32(13))
    scaled = np.float32(np.uint32(moved).view(np.float32) * np.float32(2.0**112)).view(np.uint32)
    bits = np.uint32(moved | np.uint32(0x7F800000)) if magnitude >= np.uint32(0x7C00) else scaled
    return np.uint32(bits | sign).view(np.float32)


def _to_half(value: np.float32) -> np.uint16:
    """float16 of a float32. Adding 0.5 to a magnitude below 2⁻¹⁴ rounds it to float16's subnormals."""
    bits = np.float32(value).view(np.uint32)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = np.uint32(np.uint32(magnitude >> np.uint32(13)) & np.uint32(1))
    normal = np.uint32(np.uint32(magnitude + np.uint32(0xC8000FFF) + odd) >> np.uint32(13))
    small = np.uint32(
        np.float32(np.uint32(magnitude).view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000)
    )
    payload = np.uint32(np.uint32(0x7E00) | np.uint32(np.uint32(magnitude >> np.uint32(13)) & np.uint32(0x3FF)))
    half = small if magnitude < np.uint32(0x38800000) else normal
    half = np.uint32(0x7C00) if magnitude >= np.uint32(0x47800000) else half
    half = payload if magnitude > np.uint32(0x7F800000) else half
    return np.uint16(half | np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000)))


def to_bfloat16(value: np.float32) -> np.uint16:
    """bfloat16 of a float32. Of NaN it has all bits set, as torch writes it on x86."""
    nearest = np.uint32(_nearest(value) >> np.uint32(16))
    return np.uint16(nearest if value == value else np.uint32(0xFFFF))

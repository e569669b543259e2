"""Magnitudes of task vectors as integers in the same order: those in a bracket, and decisions by rank in a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from workers.methods.kernels.compiling import Pointer, kernel
from workers.methods.kernels.dtypes import BF16, CODES, magnitude, of_bfloat16, widened
from workers.methods.kernels.masks import MOST_MASKS, Words
from workers.methods.kernels.memory import BLOCK, Array, address, addresses, aligned_lines


@dataclass(frozen=True, slots=True, eq=False)
class RowFactors:
    """A factor for each row of so many elements that a part of a tensor touches; it begins in a column of the first."""

    factors: NDArray[np.float64]
    row: int
    column: int


@kernel("u16**", "u32**", "u64**", "i64*", "i64", "f64*", "i64", "i64", "f32**", "u32*")
def _magnitudes(
    halves: Pointer, words: Pointer, longs: Pointer, dtypes: Pointer, count: int, factors: Pointer, row: int,
    column: int, lines: Pointer, bits: Pointer,
) -> None:  # fmt: skip
    for first in range(0, count, BLOCK):
        size = min(BLOCK, count - first)
        _differences(halves, words, longs, dtypes, first, size, lines, bits, first)
        _multiply(bits, first, size, factors, row, column + first)


def _differences(
    halves: Pointer, words: Pointer, longs: Pointer, dtypes: Pointer, first: int, size: int, lines: Pointer,
    bits: Pointer, at: int,
) -> None:  # fmt: skip
    """Writes the magnitudes of so many differences to `bits` from `at` on."""
    if dtypes[0] == BF16 and dtypes[1] == BF16:  # without a line of memory between
        model, base = halves[0], halves[1]
        for i in range(size):
            bits[at + i] = magnitude(of_bfloat16(model[first + i]) - of_bfloat16(base[first + i]))
        return
    a, b = lines[0], lines[1]
    for parent in range(2):
        widened(dtypes[parent], halves[parent], words[parent], longs[parent], first, size, lines[parent])
    for i in range(size):
        bits[at + i] = magnitude(a[i] - b[i])


def _multiply(bits: Pointer, at: int, size: int, factors: Pointer, row: int, place: int) -> None:
    """Multiplies so many magnitudes, from `at` on, by the factors of their rows in float64, if there are rows.

    The elements begin at a `place` from the start of the first row.
    """
    done = 0
    while row and done < size:
        of_row = (place + done) // row
        end = min(size, row * (of_row + 1) - place)
        factor = factors[of_row]
        for i in range(at + done, at + end):
            bits[i] = multiplied(np.uint32(bits[i]).view(np.float32), factor)
        done = end


def multiplied(number: np.float32, factor: np.float64) -> np.uint32:
    """The bits of the product, rounded to float32, without the sign of a NaN."""
    return magnitude(np.float32(np.float64(number) * factor))


def magnitudes(model: Array, base: Array, factors: RowFactors | None = None) -> NDArray[np.int32]:
    """|model − base| in float32, as integers whose order is the order of magnitudes; a NaN is the greatest.

    With factors, times that of the row in float64, rounded to float32.
    """
    pair = [np.ascontiguousarray(model), np.ascontiguousarray(base)]
    assert pair[0].size == pair[1].size
    bits, of_rows = np.empty(pair[0].size, np.int32), _of_rows(factors, pair[0].size)
    lines, _memory = aligned_lines(2, 4 * BLOCK)
    dtypes = np.array([CODES[each.dtype] for each in pair], np.int64)
    raw = addresses(pair)
    at = address(raw)
    _magnitudes(
        *(at, at, at, address(dtypes), bits.size),
        *(address(of_rows.factors), of_rows.row, of_rows.column, address(lines), address(bits)),
    )
    return bits


def _of_rows(factors: RowFactors | None, elements: int) -> RowFactors:
    """The factors of so many elements, without rows if there are none."""
    if factors is None:
        return RowFactors(np.empty(0), 0, 0)
    assert factors.factors.size == -(-(factors.column + elements) // factors.row)
    return RowFactors(np.ascontiguousarray(factors.factors), factors.row, factors.column)


_COUNTS = 4  # of a unit: above the bracket, at its upper end, at its lower end, between


@kernel(
    *("u16**", "u32**", "u64**", "i64*", "i64", "u32*", "i64", "i64", "f64*", "i64", "i64"),
    *("u32*", "u32*", "i64", "f32**", "u32*", "u8*", "u64*", "u32**", "i64", "i64", "i64*"),
)
def _bracketed(
    halves: Pointer,
    words: Pointer,
    longs: Pointer,
    dtypes: Pointer,
    differ: int,
    numbers: Pointer,
    count: int,
    unit: int,
    factors: Pointer,
    row: int,
    column: int,
    lows: Pointer,
    highs: Pointer,
    brackets: int,
    lines: Pointer,
    block: Pointer,
    flags: Pointer,
    eights: Pointer,
    betweens: Pointer,
    room: int,
    begin: int,
    counts: Pointer,
) -> None:
    """Ranks the magnitudes of the differences of two tensors if they `differ`, else the given numbers.

    `flags` and `eights` are the same bytes: eight elements that are not between the ends are passed by at once.
    `counts` has for each bracket those of each unit, then how many between were found for each bracket. Begins at an
    element, and stops where a bracket may not have room for a block: the last of `counts` is the element to go on from.
    """
    step = min(BLOCK, unit)
    units = -(-count // unit)
    totals = _COUNTS * units * brackets
    for first in range(begin, count, step):
        size = min(step, count - first)
        most = np.int64(0)
        for bracket in range(brackets):
            most = max(most, counts[totals + bracket])
        if most + step > room:
            counts[totals + brackets] = first
            return
        if differ:
            _differences(halves, words, longs, dtypes, first, size, lines, block, 0)
            _multiply(block, 0, size, factors, row, column + first)
        else:
            for i in range(size):
                block[i] = numbers[first + i]
        whole = -(-size // 8)
        for bracket in range(brackets):
            low, high, between = np.int32(lows[bracket]), np.int32(highs[bracket]), betweens[bracket]
            above, at_high, at_low = np.int32(0), np.int32(0), np.int32(0)
            for i in range(size):
                number = np.int32(block[i])  # none is negative, and vectors of unsigned numbers are compared slowly
                above = np.int32(above + np.int32(number > high))
                at_high = np.int32(at_high + np.int32(number == high))
                at_low = np.int32(at_low + np.int32(number == low))
                flags[i] = (number > low) & (number < high)
            for i in range(size, 8 * whole):
                flags[i] = 0
            before = counts[totals + bracket]
            found = before
            for eight in range(whole):
                if eights[eight]:
                    for i in range(8 * eight, 8 * eight + 8):  # every number is stored, and the next overwrites it
                        between[found] = block[i]
                        found += flags[i]
            at = _COUNTS * (units * bracket + first // unit)
            counts[at] += above
            counts[at + 1] += at_high
            counts[at + 2] += at_low
            counts[at + 3] += found - before
            counts[totals + bracket] = found
    counts[totals + brackets] = count


@dataclass(frozen=True, slots=True, eq=False)
class Bracket:
    """For each unit how many numbers are above `high`, equal to it, equal to `low` and between; and those between.

    `counts` is units × 4; the numbers between are in their order. Where `low` and `high` are one number, those equal to
    it count as equal to `high`.
    """

    low: int
    high: int
    counts: NDArray[np.int64]
    between: NDArray[np.int32]


Ends = tuple[int, int]
"""The low and the high end of a bracket: 0 ≤ low ≤ high."""

MOST_BETWEEN = 4 << 20
"""Numbers between the ends of all brackets for which there is memory at once."""


def bracketed(bits: NDArray[np.int32], ends: Sequence[Ends], *, unit: int) -> list[Bracket]:
    """Where so many numbers of each unit lie, none negative, for several brackets."""
    assert bits.flags.c_contiguous and bits.itemsize == 4
    return _brackets(None, bits, ends, unit, None)


def magnitudes_bracketed(
    model: Array, base: Array, ends: Sequence[Ends], *, unit: int, factors: RowFactors | None = None
) -> list[Bracket]:
    """The same of the `magnitudes`, without a list of all of them."""
    pair = [np.ascontiguousarray(model), np.ascontiguousarray(base)]
    assert pair[0].size == pair[1].size
    return _brackets(pair, pair[0], ends, unit, factors)


def _brackets(
    pair: list[Array] | None, numbers: Array, ends: Sequence[Ends], unit: int, factors: RowFactors | None
) -> list[Bracket]:
    assert unit <= BLOCK or unit % BLOCK == 0
    count, of_rows = numbers.size, _of_rows(factors, numbers.size)
    room = max(BLOCK, min(count, MOST_BETWEEN // len(ends)))
    memory = np.empty((len(ends), room + 8), np.int32)
    of_units = np.zeros(len(ends) * _COUNTS * -(-count // unit) + len(ends) + 1, np.int64)
    found, reached = of_units[-len(ends) - 1 : -1], of_units[-1:]
    lows, highs = np.array(ends, np.uint32).T.copy()
    lines, _memory = aligned_lines(4, 4 * BLOCK)
    raw, into = addresses(pair or []), address(memory) + memory.strides[0] * np.arange(len(ends), dtype=np.uint64)
    dtypes = np.array([CODES[each.dtype] for each in pair or []], np.int64)
    at, flags = address(raw), int(lines[3])
    between: list[list[NDArray[np.int32]]] = [[] for _ in ends]
    while reached[0] < count:
        found[:] = 0
        _bracketed(
            *(at, at, at, address(dtypes), pair is not None, address(numbers), count, unit),
            *(address(of_rows.factors), of_rows.row, of_rows.column, address(lows), address(highs), len(ends)),
            *(address(lines), int(lines[2]), flags, flags, address(into), room, int(reached[0]), address(of_units)),
        )
        for parts, line, size in zip(between, memory, found.tolist(), strict=True):
            parts.append(line[:size].copy())
    counts = of_units[: -len(ends) - 1].reshape(len(ends), -1, _COUNTS)
    counts[lows == highs, :, 2] = 0
    return [
        Bracket(low, high, of_each, np.concatenate([np.empty(0, np.int32), *parts]) if len(parts) != 1 else parts[0])
        for (low, high), of_each, parts in zip(ends, counts, between, strict=True)
    ]


EVERY, NONE = -1, 0x7FFFFFFF
"""Numbers above which every number lies, or none."""


@dataclass(frozen=True, slots=True)
class Limit:
    """Numbers above `bits`; of those equal to it the first `equals`, counted from the first element.

    `equals` of None has none of them.
    """

    bits: int
    equals: int | None = None


@kernel("u32*", "i64", "i64*", "i64*", "i64", "u16*")
def _above(bits: Pointer, count: int, limits: Pointer, left: Pointer, settings: int, words: Pointer) -> None:
    nothing = np.uint16(0)
    for first in range(0, count, BLOCK):
        size = min(BLOCK, count - first)
        for i in range(first, first + size):
            words[i] = nothing
        for setting in range(settings):
            bit, limit = np.uint16(1 << setting), np.int32(limits[setting])
            if left[setting] > 0:
                equal = np.int32(0)
                for i in range(first, first + size):
                    equal = np.int32(equal + np.int32(np.int32(bits[i]) == limit))
                if equal <= left[setting]:
                    left[setting] -= equal
                    limit = np.int32(limit - 1)
                else:
                    for i in range(first, first + size):
                        if np.int32(bits[i]) == limit and left[setting] > 0:
                            left[setting] -= 1
                            words[i] |= bit
            for i in range(first, first + size):
                words[i] |= bit if np.int32(bits[i]) > limit else nothing


def above(bits: NDArray[np.int32], limits: Sequence[Limit]) -> Words:
    """For each number, none negative, a word: bit s says whether limit s has it. There are at most 16 limits."""
    assert bits.flags.c_contiguous and bits.itemsize == 4 and len(limits) <= MOST_MASKS
    words = np.empty(bits.size, np.uint16)
    numbers, left = np.array([(each.bits, each.equals or 0) for each in limits], np.int64).reshape(-1, 2).T.copy()
    _above(address(bits), bits.size, address(numbers), address(left), len(limits), address(words))
    return words


_DIGITS, _VALUES = 4, 256
_SPAN = 26
"""Buckets divide 2²⁶ numbers: float32 magnitudes from the largest of a row down to 2⁻⁸ of it."""
_STEPS = 8
"""To move numbers by more steps than this for each element of a row takes longer than to sort it by its bytes."""


@kernel(
    *("u32*", "u32*", "u32**", "i64", "i64", "i64", "i64", "i64", "i64", "u16*"),
    *("u32*", "u32*", "u32*", "u64*", "u64*", "i64*", "u32*", "u16*"),
)
def _below_by_rank(
    bits: Pointer,
    numbers: Pointer,
    limits_of: Pointer,
    settings: int,
    rows: int,
    row: int,
    skipped: int,
    count: int,
    shift: int,
    into: Pointer,
    keys: Pointer,
    table: Pointer,
    ranks: Pointer,
    one: Pointer,
    other: Pointer,
    counts: Pointer,
    ranked: Pointer,
    words: Pointer,
) -> None:
    """Ranks each row once; then a number is held against the limit of its rank for every setting.

    The numbers are put in the order of their ranks, where vectors compare them: a word has a bit for each setting. The
    words then go back to the order of the elements.
    """
    for first in range(0, rows * row, row):
        if not _near_ranks(bits, first, row, shift, keys, table, ranks, one):
            _sorted_ranks(bits, first, row, ranks, one, other, counts)
        begin, end = max(0, skipped - first), min(row, skipped + count - first)
        at = first - skipped
        for i in range(begin, end):
            ranked[ranks[i]] = numbers[at + i] ^ _TOP
        for rank in range(row):
            words[rank] = 0
        for setting in range(settings):
            _compare(ranked, limits_of[setting], words, np.uint16(1 << setting), row)
        for i in range(begin, end):
            into[at + i] = words[ranks[i]]


def _compare(ranked: Pointer, limits: Pointer, words: Pointer, bit: np.uint16, count: int) -> None:
    nothing = np.uint16(0)
    for i in range(count):
        words[i] |= bit if np.int32(ranked[i]) < np.int32(limits[i] ^ _TOP) else nothing


_TOP = np.uint32(1 << 31)
"""Vectors compare numbers without a sign slowly; with this bit flipped, numbers with a sign have the same order."""


def _near_ranks(
    bits: Pointer, first: int, row: int, shift: int, keys: Pointer, table: Pointer, ranks: Pointer, line: Pointer
) -> bool:
    """Counts a row into buckets, where each number is near its rank, and moves it there; False if it is far.

    A number to sort has the magnitude in its upper half and the place in the row in its lower.
    """
    span = np.uint32(1 << _SPAN)
    buckets = (1 << (_SPAN - shift)) + 1
    top = np.uint32(0)
    for i in range(row):
        top = max(top, bits[first + i])
    lowest = top - span + np.uint32(1) if top >= span else np.uint32(0)
    for i in range(row):
        number = bits[first + i]
        place = np.uint32(max(number, lowest) - lowest) >> np.uint32(shift)
        keys[i] = place + np.uint32(number != np.uint32(0))
    for bucket in range(buckets):
        table[bucket] = 0
    for i in range(row):
        table[keys[i]] += np.uint32(1)
    before = np.uint32(0)
    for bucket in range(buckets):
        inside = table[bucket]
        table[bucket] = before
        before = np.uint32(before + inside)
    for i in range(row):
        place = table[keys[i]]
        table[keys[i]] = np.uint32(place + np.uint32(1))
        line[place] = (np.uint64(bits[first + i]) << np.uint64(32)) | np.uint64(i)
    left = _STEPS * row
    for i in range(1, row):
        number = line[i]
        place = i
        while place > 0 and line[place - 1] > number:
            line[place] = line[place - 1]
            place -= 1
        line[place] = number
        left -= i - place
        if left < 0:
            return False
    for i in range(row):
        ranks[line[i] & np.uint64(0xFFFFFFFF)] = i
    return True


def _sorted_ranks(
    bits: Pointer, first: int, row: int, ranks: Pointer, one: Pointer, other: Pointer, counts: Pointer
) -> None:
    """Sorts a row by its bytes from the lowest to the highest, each time keeping the order of equals.

    A byte that is the same in the whole row is skipped.
    """
    for value in range(_DIGITS * _VALUES):
        counts[value] = 0
    for i in range(row):
        number = bits[first + i]
        counts[number & np.uint32(0xFF)] += 1
        counts[_VALUES + ((number >> np.uint32(8)) & np.uint32(0xFF))] += 1
        counts[2 * _VALUES + ((number >> np.uint32(16)) & np.uint32(0xFF))] += 1
        counts[3 * _VALUES + (number >> np.uint32(24))] += 1
        one[i] = (np.uint64(number) << np.uint64(32)) | np.uint64(i)
    for digit in range(_DIGITS):
        shift = np.uint64(32 + 8 * digit)
        of_digit = digit * _VALUES
        if counts[of_digit + ((one[0] >> shift) & np.uint64(0xFF))] == row:
            continue
        before = 0
        for value in range(of_digit, of_digit + _VALUES):
            count = counts[value]
            counts[value] = before
            before += count
        for i in range(row):
            number = one[i]
            value = of_digit + ((number >> shift) & np.uint64(0xFF))
            other[counts[value]] = number
            counts[value] += 1
        one, other = other, one
    for i in range(row):
        ranks[one[i] & np.uint64(0xFFFFFFFF)] = i


def below_by_rank(
    bits: NDArray[np.int32],
    row: int,
    numbers: NDArray[np.uint32],
    limits: Sequence[NDArray[np.uint32]],
    skipped: int = 0,
) -> Words:
    """For each number a word: bit s says whether it is below `limits[s][rank]`, by the rank of its element in its row.

    The rank counts the elements of the row that are smaller, or equal and before it. `bits` are whole rows, none
    negative; the numbers are those of the elements from `skipped` on. There are at most 16 limits, each for all ranks.
    """
    assert all(each.flags.c_contiguous and each.itemsize == 4 for each in (bits, numbers, *limits))
    assert len(limits) <= MOST_MASKS
    assert bits.size % row == 0 and skipped + numbers.size <= bits.size and {each.size for each in limits} == {row}
    digits = max(4, min(13, row.bit_length()))  # one to two buckets an element, 16 to 8,192
    keys, ranks, ranked = np.zeros((3, row), np.uint32)
    table = np.empty((1 << digits) + 1, np.uint32)
    one, other = np.empty((2, row), np.uint64)
    counts = np.empty(_DIGITS * _VALUES, np.int64)
    words, into = np.empty(row, np.uint16), np.empty(numbers.size, np.uint16)
    of_limits = addresses(limits)
    _below_by_rank(
        *(address(bits), address(numbers), address(of_limits), len(limits), bits.size // row, row, skipped),
        *(numbers.size, _SPAN - digits, address(into), address(keys), address(table), address(ranks)),
        *(address(one), address(other), address(counts), address(ranked), address(words)),
    )
    return into

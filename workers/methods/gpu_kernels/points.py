"""Elements of many tensors, or of many points of one tensor, in a single launch; `rows` describes its table.

`segments` holds the row of each program. Every operation rounds once, and their order is that of the compiled loops for
CPUs, if the launch says `enable_fp_fusion=False`.
"""

from __future__ import annotations

from workers.methods.gpu_kernels.dtypes import stored, widened
from workers.methods.gpu_kernels.language import Pointer, constant, constexpr, jit, tl
from workers.methods.gpu_kernels.random import random_bits
from workers.methods.gpu_kernels.rows import Head, Term

_OUTPUT, _FLAG, _FIRST, _ELEMENTS, _START, _BASE, _LINE, _SCALE, _LEAST, _ABOVE, _LAST = map(constant, range(11))
_FACTORS, _WIDTH, _STRIDE, _DEEP = map(constant, range(11, 15))
_HEAD = constant(len(Head._fields))
_MODEL, _WEIGHT, _FACTOR, _KEEP, _KEEP_LAST, _DROP, _DROP_LAST, _KEY_0, _KEY_1, _LIMIT, _MASK = map(constant, range(11))
_TERM = constant(len(Term._fields))
_SUM, _CONSENSUS, _SELECTED, _OVERLAP, _TALL, _SWAP = map(constant, range(6))
_BASED, _ELECTS, _NORMALIZES, _TRIMS, _DRAWS, _MASKS, _FACTORED, _RELAXES, _OF_ROWS, _OF_COLUMNS = (
    constant(1 << bit) for bit in range(10)
)


@jit
def points(
    table: Pointer,
    segments: Pointer,
    flags: Pointer,
    KIND: constexpr,
    MODE: constexpr,
    MODELS: constexpr,
    STORED: constexpr,
    OUT: constexpr,
    ARITHMETIC: constexpr,
    ALIGNMENT: constexpr,
    BLOCK: constexpr,
) -> None:
    """Writes the elements of one block: the last block of a row has fewer than the others."""
    block = tl.program_id(0)
    row = table + tl.load(segments + block).to(tl.int64) * (_HEAD + MODELS * _TERM)
    first = (block - tl.load(row + _FIRST)) * BLOCK
    if first + BLOCK <= tl.load(row + _ELEMENTS):
        _written(row, flags, first, False, KIND, MODE, MODELS, STORED, OUT, ARITHMETIC, ALIGNMENT, BLOCK)
    else:
        _written(row, flags, first, True, KIND, MODE, MODELS, STORED, OUT, ARITHMETIC, ALIGNMENT, BLOCK)


@jit
def _written(
    row: Pointer,
    flags: Pointer,
    first: Pointer,
    MASKED: constexpr,
    KIND: constexpr,
    MODE: constexpr,
    MODELS: constexpr,
    STORED: constexpr,
    OUT: constexpr,
    ARITHMETIC: constexpr,
    ALIGNMENT: constexpr,
    BLOCK: constexpr,
) -> None:
    at = first + tl.arange(0, BLOCK)
    inside = at < tl.load(row + _ELEMENTS)
    place = tl.load(row + _START) + at
    ground = tl.zeros((BLOCK,), ARITHMETIC)
    if _BASED & MODE:
        ground = widened(tl.load(row + _BASE), at, inside, MASKED, STORED, ARITHMETIC, ALIGNMENT)
    models = ()
    for i in tl.static_range(MODELS):
        address = tl.load(row + _HEAD + i * _TERM + _MODEL)
        models = models + (widened(address, at, inside, MASKED, STORED, ARITHMETIC, ALIGNMENT),)
    if KIND == _SUM:
        total = _weighted_sum(row, ground, models, inside, place, MODE, MODELS, ARITHMETIC)
    elif KIND == _CONSENSUS:
        total = _consensus(row, ground, models, first, at, inside, place, MODE, MODELS, ARITHMETIC, BLOCK)
    elif KIND == _SELECTED:
        total = _selected(row, ground, models, place, MODE, MODELS, ARITHMETIC)
    elif KIND == _OVERLAP:
        total = _overlap(row, ground, models, MODE, MODELS, ARITHMETIC)
    elif KIND == _TALL:
        total = _tall(row, ground, models, MODELS, ARITHMETIC)
    else:
        total = _swap(row, ground, models, ARITHMETIC)
    if _RELAXES & MODE:
        width = tl.load(row + _WIDTH)
        channel = place // tl.load(row + _DEEP) * width + place // tl.load(row + _STRIDE) % width
        total = ground + (total - ground) * _listed(tl.load(row + _FACTORS), channel, inside, ARITHMETIC)
    broken = stored(tl.load(row + _OUTPUT), at, inside, total, MASKED, OUT, ALIGNMENT)
    if tl.max((broken & inside).to(tl.int32)) > 0:
        tl.store(flags + tl.load(row + _FLAG), 1)


@jit
def _number(field: Pointer, ARITHMETIC: constexpr) -> Pointer:
    return tl.load(field).to(tl.float64, bitcast=True).to(ARITHMETIC)


@jit
def _listed(address: Pointer, index: Pointer, inside: Pointer, ARITHMETIC: constexpr) -> Pointer:
    """Numbers of a list of float64."""
    return tl.load(address.to(tl.pointer_type(tl.float64)) + index, mask=inside, other=0).to(ARITHMETIC)


@jit
def _divided(number: Pointer, divisor: Pointer, ARITHMETIC: constexpr) -> Pointer:
    """The quotient to the nearest; of float32, a plain division is not that."""
    if ARITHMETIC == tl.float32:
        return tl.div_rn(number, divisor)
    return number / divisor


@jit
def _is_largest(bits: Pointer, limit: Pointer, place: Pointer, last: Pointer) -> Pointer:
    """Whether magnitudes, as integers of the same order, are above a limit or among the first that equal it."""
    above = limit.to(tl.int32)
    return (bits > above) | ((bits == above) & (place <= last))


@jit
def _weighted_sum(
    row: Pointer,
    ground: Pointer,
    models: Pointer,
    inside: Pointer,
    place: Pointer,
    MODE: constexpr,
    MODELS: constexpr,
    ARITHMETIC: constexpr,
) -> Pointer:
    """See `passes.WeightedSum`."""
    total = ground
    for i in tl.static_range(MODELS):
        term = row + _HEAD + i * _TERM
        number = models[i]
        if _BASED & MODE:
            number = number - ground
        if _OF_ROWS & MODE:
            number = number * _listed(tl.load(term + _WEIGHT), place // tl.load(row + _LINE), inside, ARITHMETIC)
        elif _OF_COLUMNS & MODE:
            number = number * _listed(tl.load(term + _WEIGHT), place % tl.load(row + _LINE), inside, ARITHMETIC)
        else:
            number = number * _number(term + _WEIGHT, ARITHMETIC)
        total = number if i == 0 else total + number
    if _BASED & MODE:
        total = ground + total
    return total


@jit
def _consensus(
    row: Pointer,
    ground: Pointer,
    models: Pointer,
    first: Pointer,
    at: Pointer,
    inside: Pointer,
    place: Pointer,
    MODE: constexpr,
    MODELS: constexpr,
    ARITHMETIC: constexpr,
    BLOCK: constexpr,
) -> Pointer:
    """See `passes.Consensus`."""
    total = ground
    votes = ()
    for i in tl.static_range(MODELS):
        term = row + _HEAD + i * _TERM
        delta = models[i] - ground
        if _TRIMS & MODE:
            bits = tl.abs(models[i].to(tl.float32) - ground.to(tl.float32)).to(tl.int32, bitcast=True)
            kept = _is_largest(bits, tl.load(term + _KEEP), place, tl.load(term + _KEEP_LAST))
            dropped = _is_largest(bits, tl.load(term + _DROP), place, tl.load(term + _DROP_LAST))
            delta = delta * (kept & (dropped == 0)).to(ARITHMETIC)
        if _DRAWS & MODE:
            begin = tl.load(row + _START) + first
            drawn = random_bits(tl.load(term + _KEY_0), tl.load(term + _KEY_1), begin, BLOCK)
            delta = delta * (drawn.to(tl.int64) < tl.load(term + _LIMIT)).to(ARITHMETIC)
        if _MASKS & MODE:
            mask = tl.load(term + _MASK).to(tl.pointer_type(tl.uint8))
            delta = delta * tl.load(mask + at, mask=inside, other=0).to(ARITHMETIC)
        if _FACTORED & MODE:
            delta = delta * _number(term + _FACTOR, ARITHMETIC)
        vote = delta * _number(term + _WEIGHT, ARITHMETIC)
        votes = votes + (vote,)
        total = vote if i == 0 else total + vote
    if _ELECTS & MODE:
        sign = tl.where(total >= 0, 1.0, -1.0).to(ARITHMETIC)
        divisor = ground
        for i in tl.static_range(MODELS):
            turned = votes[i] * sign
            agreeing = tl.where(turned < 0, 0.0, turned)
            weight = tl.where(turned > 0, _number(row + _HEAD + i * _TERM + _WEIGHT, ARITHMETIC), 0.0)
            if i == 0:
                total = agreeing
                divisor = weight
            else:
                total = total + agreeing
                divisor = divisor + weight
        total = total * sign
        if _NORMALIZES & MODE:
            total = _divided(total, tl.where(divisor == 0, 1.0, divisor), ARITHMETIC)
    return ground + total * _number(row + _SCALE, ARITHMETIC)


@jit
def _selected(
    row: Pointer,
    ground: Pointer,
    models: Pointer,
    place: Pointer,
    MODE: constexpr,
    MODELS: constexpr,
    ARITHMETIC: constexpr,
) -> Pointer:
    """See `passes.SelectedConsensus`."""
    kept = tl.full(ground.shape, 1, ARITHMETIC)
    if _TRIMS & MODE:
        bits = _variance(row, ground, models, MODELS).to(tl.int32, bitcast=True)
        kept = _is_largest(bits, tl.load(row + _ABOVE), place, tl.load(row + _LAST)).to(ARITHMETIC)
    total = ground
    for i in tl.static_range(MODELS):
        delta = (models[i] - ground) * kept
        total = delta if i == 0 else total + delta
    sign = tl.where(total >= 0, 1.0, -1.0).to(ARITHMETIC)
    divisor = ground
    for i in tl.static_range(MODELS):
        delta = (models[i] - ground) * kept
        weight = _number(row + _HEAD + i * _TERM + _WEIGHT, ARITHMETIC)
        share = tl.where(delta * sign > 0, weight, weight - weight)  # NaN where the weight is
        if i == 0:
            total = delta * share
            divisor = share
        else:
            total = total + delta * share
            divisor = divisor + share
    least = _number(row + _SCALE, ARITHMETIC)
    return ground + _divided(total, tl.where(divisor < least, least, divisor), ARITHMETIC)


@jit
def _variance(row: Pointer, ground: Pointer, models: Pointer, MODELS: constexpr) -> Pointer:
    """`ranking.Variance`, in float32."""
    base = ground.to(tl.float32)
    mean = base
    for i in tl.static_range(MODELS):
        delta = models[i].to(tl.float32) - base
        mean = delta if i == 0 else mean + delta
    mean = mean * _number(row + _LEAST, tl.float32)
    total = base
    for i in tl.static_range(MODELS):
        off = models[i].to(tl.float32) - base - mean
        total = off * off if i == 0 else total + off * off
    return tl.abs(total)


@jit
def _overlap(
    row: Pointer, ground: Pointer, models: Pointer, MODE: constexpr, MODELS: constexpr, ARITHMETIC: constexpr
) -> Pointer:
    """See `passes.Overlap`."""
    epsilon = _number(row + _SCALE, ARITHMETIC)
    total = ground
    alone = ground
    active = ground
    for i in tl.static_range(MODELS):
        delta = models[i] - ground
        changed = (tl.abs(delta) > epsilon).to(ARITHMETIC)
        change = delta * changed
        scaled = change * _number(row + _HEAD + i * _TERM + _FACTOR, ARITHMETIC)
        if i == 0:
            total = change
            alone = scaled
            active = changed
        else:
            total = total + change
            alone = alone + scaled
            active = active + changed
    mean = _divided(total, tl.where(active < 1, 1.0, active), ARITHMETIC)
    if _FACTORED & MODE:
        mean = tl.where(active == 1, alone, mean)
    return ground + mean


@jit
def _tall(row: Pointer, ground: Pointer, models: Pointer, MODELS: constexpr, ARITHMETIC: constexpr) -> Pointer:
    """See `passes.TallConsensus`."""
    total = ground
    for i in tl.static_range(MODELS):
        vote = (models[i] - ground) * _number(row + _HEAD + i * _TERM + _WEIGHT, ARITHMETIC)
        total = vote if i == 0 else total + vote
    users = tl.zeros_like(ground)
    for i in tl.static_range(MODELS):
        vote = (models[i] - ground) * _number(row + _HEAD + i * _TERM + _WEIGHT, ARITHMETIC)
        ratio = _number(row + _HEAD + i * _TERM + _FACTOR, ARITHMETIC)
        users = users + (tl.abs(vote) > tl.abs(total - vote) * ratio).to(ARITHMETIC)
    used = (users >= _number(row + _LEAST, ARITHMETIC)).to(ARITHMETIC)
    return ground + total * used * _number(row + _SCALE, ARITHMETIC)


@jit
def _swap(row: Pointer, ground: Pointer, models: Pointer, ARITHMETIC: constexpr) -> Pointer:
    """See `passes.Swap`."""
    other = models[0]
    least = _number(row + _LEAST, ARITHMETIC)
    apart = tl.abs(ground - other)
    share = _divided(_number(row + _SCALE, ARITHMETIC), tl.where(apart < least, least, apart), ARITHMETIC)
    share = tl.where(share > 1, 1.0, share)
    share = tl.where(share < 0, 0.0, share)
    return share * other + (1.0 - share) * ground

"""Windows of a text for log-likelihood by position: does a model use the distant part of its context?

All lengths score the same last tokens: window i ends at the same token of the text at every length, so that a longer
window differs from a shorter one in the context alone.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from jobs.errors import BadInput, CorruptData
from jobs.evaluate import PerplexitySpec
from workers.benchmarks.answering import Block, ItemScore
from workers.benchmarks.items import items_digest
from workers.benchmarks.planned import PlannedSet, Reader
from workers.benchmarks.texts.haystacks import bundled_text
from workers.benchmarks.texts.tokenizer import Tokenizer
from workers.engines.engine import Engine
from workers.parquet import parquet_bytes

FIRST_BLOCK = 256


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """`length` token ids (int32) and, for each, the block of positions it belongs to (int8).

    Block b > 0 holds positions 256 · 2^(b−1) … 256 · 2^b − 1, block 0 those below 256; −1 marks tokens that nothing
    predicts: the first one, and special tokens. `pair` is shared by the windows that end at the same token.
    """

    index: int
    length: int
    tokens: NDArray[np.int32]
    blocks: NDArray[np.int8]
    pair: str


def position_blocks(length: int) -> NDArray[np.int8]:
    """The block of each position 0 … length − 1."""
    positions = np.arange(length)
    return np.floor(np.log2(np.maximum(positions, FIRST_BLOCK // 2) / (FIRST_BLOCK / 2))).astype(np.int8)


def first_position(task: str) -> int:
    """The first position of the block that a row's task names, in tokens."""
    block = int(task.rsplit("_", 1)[1])
    return FIRST_BLOCK << (block - 1) if block else 0


def check_length(tokenizer: Tokenizer, text: str, length: int) -> None:
    """Refuses a text that is shorter than a window of this length.

    A text is not repeated to fill one: a model that remembers the first time would need no more of the context.
    """
    special = tokenizer.count("")
    _check(tokenizer.count(text) - special, length - special)


def _check(tokens: int, most: int) -> None:
    if tokens < most:
        raise BadInput(
            f"perplexity: the text has {tokens} tokens, the longest window {most}; give `text:` a longer one, or take"
            " that length out"
        )


def windows(tokenizer: Tokenizer, text: str, lengths: Sequence[int], *, items: int) -> list[Window]:
    """`items` windows for each length, in the order of `lengths`, their ends spread evenly over the text.

    Windows overlap where the text is shorter than `items` times the greatest length. `BadInput` if it is shorter than
    one window.
    """
    special = tokenizer.encode("")
    ids = np.asarray(tokenizer.encode(text)[len(special) :], dtype=np.int32)
    most = max(lengths) - len(special)
    _check(len(ids), most)
    ends = np.linspace(len(ids), most, num=items).astype(int)[::-1]
    found: list[Window] = []
    for length in lengths:
        blocks = position_blocks(length)
        blocks[: max(1, len(special))] = -1
        for index, end in enumerate(ends):
            tokens = np.concatenate([np.asarray(special, dtype=np.int32), ids[end - length + len(special) : end]])
            found.append(Window(index, length, tokens, blocks, f"perplexity-{end}"))
    return found


def write_windows(found: Sequence[Window]) -> bytes:
    """The windows as one Parquet file; the same windows give the same bytes."""
    import pyarrow as pa

    table = pa.table(
        {
            "index": pa.array([window.index for window in found], pa.int64()),
            "length": pa.array([window.length for window in found], pa.int64()),
            "tokens": pa.array([window.tokens for window in found], pa.list_(pa.int32())),
            "blocks": pa.array([window.blocks for window in found], pa.list_(pa.int8())),
            "pair": pa.array([window.pair for window in found], pa.string()),
        }
    )
    return parquet_bytes(table)


def read_windows(data: bytes, first: int = 0, last: int | None = None) -> list[Window]:
    """Windows `[first, last)` of one file of `write_windows`, or all; `CorruptData` if it is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data))
        part = table.slice(first, None if last is None else last - first)
        return [
            Window(
                part["index"][row].as_py(),
                part["length"][row].as_py(),
                np.asarray(part["tokens"][row].values, dtype=np.int32),
                np.asarray(part["blocks"][row].values, dtype=np.int8),
                part["pair"][row].as_py(),
            )
            for row in range(part.num_rows)
        ]
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise CorruptData(f"windows: not a file of windows ({error}); delete it and build them again") from error


def plan_perplexity(
    spec: PerplexitySpec, tokenizer: Tokenizer, seed: int, reader: Reader, least: int
) -> list[PlannedSet]:
    text = reader.prose(spec.text, spec.place) if spec.text else bundled_text()
    described = {
        "benchmark": "perplexity",
        "blocks": spec.blocks,
        "lengths": list(spec.lengths),
        "text": hashlib.sha256(text.encode()).hexdigest(),
    }

    @cache
    def made() -> list[Window]:  # of all lengths together: windows of every length end at the same tokens
        return windows(tokenizer, text, spec.lengths, items=spec.blocks)

    def planned(length: int) -> PlannedSet:
        def build(_: range) -> bytes:
            return write_windows([window for window in made() if window.length == length])

        def check() -> None:  # as much of the text as surely has enough tokens, for the whole of it may be large
            check_length(tokenizer, text[: 16 * max(spec.lengths)], max(spec.lengths))

        address = items_digest(described, tokenizer=tokenizer.digest, length=length, seed=seed)
        return PlannedSet(
            benchmark="perplexity",
            task="perplexity",
            length=length,
            count=spec.blocks,
            made=spec.blocks,
            digest=address,
            build=build,
            place=spec.place,
            check=check,
        )

    return [planned(length) for length in spec.lengths]


def score_windows(engine: Engine, block: Block) -> Iterator[ItemScore]:
    """One score for each window and block of positions: the geometric mean of its tokens' likelihoods, from 0 to 1."""
    [(data, first, last)] = block.parts
    for window in read_windows(data, first, last):
        started = time.perf_counter()
        [likelihoods] = engine.score([window.tokens.tolist()])
        seconds = time.perf_counter() - started
        blocks = window.blocks[1:]
        for number in np.unique(blocks[blocks >= 0]).tolist():
            chosen = likelihoods[blocks == number].astype(np.float64)
            finite = bool(np.isfinite(chosen).all())
            yield ItemScore(
                task=f"position_block_{number}",
                item=window.index,
                depth=math.nan,
                haystack=window.pair,
                pair=window.pair,
                answer="",
                score=min(1.0, math.exp(float(chosen.mean()))) if finite else 0.0,
                finite=finite,
                tokens=int(chosen.size),
                seconds=seconds * chosen.size / likelihoods.size,
            )

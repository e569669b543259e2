"""Parquet with a digest: any reader reads it, and every flipped byte is noticed or leaves all rows as they were."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.errors import CorruptData, MergeyardError
from jobs.evaluation_tasks import ScoreRow
from jobs.sealing import MARK, is_sealed
from workers.benchmarks.items import Item, read_items, write_items
from workers.benchmarks.perplexity import Window, read_windows, write_windows
from workers.evaluating.scores import read_block, write_scores
from workers.parquet import parquet_bytes

WORDS = ("river", "stone", "lamp", "seven")


def scores() -> bytes:
    rows = [
        ScoreRow(
            point="w0.5",
            benchmark="ruler",
            task="vt",
            length=512,
            items="set",
            item=item,
            depth=0.5,
            haystack=f"h{item}",
            pair=f"p{item}",
            answer=word,
            score=item / 4,
            finite=True,
            tokens=500 + item,
            seconds=0.1,
            recipe="r",
            weights="w",
            repeat=0,
        )
        for item, word in enumerate(WORDS)
    ]
    return write_scores(rows, ["one remark"])


def items() -> bytes:
    return write_items(
        Item("ruler", "vt", 512, index, (0.5,), "h", "prefix ", word, " is", (word,), "all", 8, 500, f"p{index}")
        for index, word in enumerate(WORDS)
    )


def windows() -> bytes:
    blocks = np.zeros(8, np.int8)
    return write_windows([Window(index, 8, np.arange(8, dtype=np.int32), blocks, f"p{index}") for index in range(3)])


def window_rows(data: bytes) -> list[Any]:
    return [(found.index, found.length, found.tokens.tolist(), found.pair) for found in read_windows(data)]


@pytest.mark.parametrize(
    ("written", "rows"),
    [(scores, lambda data: read_block(data, "scores/x")), (items, read_items), (windows, window_rows)],
)
def test_every_flipped_byte_is_noticed_or_leaves_the_rows(
    written: Callable[[], bytes], rows: Callable[[bytes], Any]
) -> None:
    data = written()
    assert written() == data, "the same rows give the same bytes"
    whole, mark = rows(data), data.rindex(MARK.encode())
    assert is_sealed(data, "x.parquet")
    for place in range(len(data)):
        flipped = data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]
        try:
            sealed = is_sealed(flipped, "x.parquet")
        except CorruptData:
            continue
        assert not sealed and mark <= place < mark + len(MARK), "a byte outside the digest was not noticed"
        try:
            assert rows(flipped) == whole
        except MergeyardError:
            continue


def test_any_reader_reads_it() -> None:
    table = pa.table({"item": [0, 1, 2], "word": ["a", "b", "c"]}, metadata={"of": "us"})
    data = parquet_bytes(table, row_group_size=2)
    assert pq.read_table(io.BytesIO(data)).equals(table)
    assert pq.ParquetFile(io.BytesIO(data)).num_row_groups == 2
    assert asdict(read_block(scores(), "scores/x"))["remarks"] == ("one remark",)


def test_a_file_that_was_cut_is_noticed() -> None:
    data = scores()
    for length in range(len(data)):
        with pytest.raises(CorruptData, match=r"^damaged, not a whole file; remove it and run again$"):
            is_sealed(data[:length], "x.parquet")


def test_a_file_of_an_older_version_has_no_digest() -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"item": [0]}), sink)
    assert not is_sealed(sink.getvalue(), "x.parquet")

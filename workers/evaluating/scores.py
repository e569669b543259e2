"""Files of scores: Parquet, one row an item and point, the same bytes for the same rows."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields
from typing import Any

from jobs.errors import BadInput, CorruptData
from jobs.evaluation_tasks import BlockScores, ScoreRow
from workers.parquet import parquet_bytes


def _schema() -> Any:
    import pyarrow as pa

    types = {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
    types |= dict.fromkeys(("str", "Kind", "Status"), pa.string())
    return pa.schema([pa.field(field.name, types[str(field.type)], nullable=False) for field in fields(ScoreRow)])


LATER = ("kind", "status", "thought", "tokens_thought", "tokens_out", "sample", "weight")
"""Columns that older files lack; they then have the defaults of `ScoreRow`."""

REMARKS = b"mergeyard.remarks"
"""The key of a block's remarks in the metadata of its file, as a JSON list; absent where there are none."""


def write_scores(rows: Iterable[ScoreRow], remarks: Sequence[str] = ()) -> bytes:
    """The rows as one Parquet file, with the remarks of a block in its metadata."""
    return parquet_bytes(score_table(rows, remarks))


def score_table(rows: Iterable[ScoreRow], remarks: Sequence[str] = ()) -> Any:
    """The rows as a pyarrow table with a column per field."""
    import pyarrow as pa

    kept = list(rows)
    schema = _schema().with_metadata({REMARKS: json.dumps(remarks)} if remarks else None)
    columns = [pa.array([getattr(row, field.name) for row in kept], field.type) for field in schema]
    return pa.table(columns, schema)


def read_scores(data: bytes, where: str, points: Collection[str] | None = None) -> list[ScoreRow]:
    """The rows of one file, or those of some points; `CorruptData` when it is not Parquet.

    `BadInput` when it has other columns, as another version may have written it.

    Older versions wrote no column `kind`, as all rows were a point's, and none of the other columns of `LATER`.
    """
    return read_block(data, where, points).rows


def read_block(data: bytes, where: str, points: Collection[str] | None = None) -> BlockScores:
    """As `read_scores`, with the remarks in the file."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        # not read_table: its threads sometimes abort a process that ends soon after
        table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        if points is not None:
            table = table.filter(pc.field("point").isin(pa.array(list(points), pa.string())))
        columns = [
            field.name for field in fields(ScoreRow) if field.name not in LATER or field.name in table.column_names
        ]
        rows = [ScoreRow(**row) for row in table.select(columns).to_pylist()]
        return BlockScores(rows, tuple(json.loads((table.schema.metadata or {}).get(REMARKS, b"[]"))))
    except KeyError as error:
        raise BadInput(f"{where}: of another version of mergeyard ({error}); use that one, or delete it") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptData(f"{where}: no file of scores ({error}); delete it and evaluate again") from None

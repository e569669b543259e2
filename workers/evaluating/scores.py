"""Files of scores: Parquet, one row an item and point, the same bytes for the same rows."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields
from typing import Any

from jobs.errors import CorruptData
from jobs.evaluation_tasks import BlockScores, ScoreRow


def _schema() -> Any:
    import pyarrow as pa

    types = {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
    types |= dict.fromkeys(("str", "Kind", "Status"), pa.string())
    return pa.schema([pa.field(field.name, types[str(field.type)], nullable=False) for field in fields(ScoreRow)])


LATER = ("kind", "status")
"""Columns that older files lack; they then have the defaults of `ScoreRow`."""

REMARKS = b"mergeyard.remarks"
"""The key of a block's remarks in the metadata of its file, as a JSON list; absent where there are none."""


def write_scores(rows: Iterable[ScoreRow], remarks: Sequence[str] = ()) -> bytes:
    """The rows as one Parquet file, with the remarks of a block in its metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kept = list(rows)
    schema = _schema().with_metadata({REMARKS: json.dumps(remarks)} if remarks else None)
    columns = [pa.array([getattr(row, field.name) for row in kept], field.type) for field in schema]
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema), sink, compression="zstd")
    return sink.getvalue()


def read_scores(data: bytes, where: str, points: Collection[str] | None = None) -> list[ScoreRow]:
    """The rows of one file, or those of some points; `CorruptData` when it is not one of `write_scores`.

    Older versions wrote no column `kind`, as all rows were a point's, and no column `status`.
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
    except (pa.ArrowInvalid, KeyError, json.JSONDecodeError) as error:
        raise CorruptData(f"{where}: no file of scores ({error}); delete it and evaluate again") from None

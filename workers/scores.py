"""Files of scores: Parquet, one row an item and point, the same bytes for the same rows."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from jobs.errors import CorruptData
from jobs.evaluation import ScoreRow


def _schema() -> Any:
    import pyarrow as pa

    types = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
    return pa.schema([pa.field(field.name, types[str(field.type)], nullable=False) for field in fields(ScoreRow)])


def write_scores(rows: Iterable[ScoreRow]) -> bytes:
    """The rows as one Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kept = list(rows)
    schema = _schema()
    columns = [pa.array([getattr(row, field.name) for row in kept], field.type) for field in schema]
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema), sink, compression="zstd")
    return sink.getvalue()


def read_scores(data: bytes, where: str) -> list[ScoreRow]:
    """The rows of one file; `CorruptData` when it is not one of `write_scores`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data))
        return [ScoreRow(**row) for row in table.select([field.name for field in fields(ScoreRow)]).to_pylist()]
    except (pa.ArrowInvalid, KeyError) as error:
        raise CorruptData(f"{where}: no file of scores ({error}); delete it and evaluate again") from None

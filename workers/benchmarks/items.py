"""Benchmark items: one prompt with its answers, written once to Parquet and answered by every point of the grid.

An item names two groups it belongs to. `pair` is shared by the items that ask the same thing at different lengths, so
that a model's loss from 4K to 128K is measured on the same needle. `haystack` is shared by the items whose answers
are not independent: the questions on one haystack, at every length. It is the cluster of all standard errors.
Engines share work by `prefix`, the text itself, never by these ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from jobs.errors import CorruptData
from workers.parquet import parquet_bytes

# Raised by whoever changes all prompts; old items then no longer count as these items. Where only some sets change,
# their `items_digest` gets a `generator` of its own, and `PlannedSet.superseded` is the digest that they had before.
GENERATOR_VERSION = 2

ROW_GROUP = 64


@dataclass(frozen=True, slots=True)
class Item:
    """One question for a model: it reads `prefix + prompt + answer_prefix` and generates `max_new_tokens` tokens."""

    benchmark: str
    task: str
    length: int
    """The context length the item was built for: `tokens + max_new_tokens` never exceeds it."""
    index: int
    depths: tuple[float, ...]
    """Where each asked needle lies: 0 begins the context, 1 ends it; empty where there is no needle."""
    haystack: str
    prefix: str
    """The text this item shares, from its first character on, with every question on its haystack; may be empty."""
    prompt: str
    answer_prefix: str
    answers: tuple[str, ...]
    scorer: str
    max_new_tokens: int
    tokens: int
    """Tokens of `prefix + prompt + answer_prefix`, as one encoding of the whole gives them."""
    pair: str
    bare: bool = False
    """Whether the text has its special tokens written out, as out of a chat template, so that none are added."""

    @property
    def text(self) -> str:
        """All that the model reads."""
        return self.prefix + self.prompt + self.answer_prefix


@dataclass(frozen=True, slots=True)
class Asked:
    """The common properties of all items of a set.

    `frame` goes before and after the user's text (from a chat template); the answer prefix comes after it, unless the
    prompt is not to begin the answer (`begins`). `turns` go around the answer of a worked example.
    """

    benchmark: str
    task: str
    length: int
    seed: int
    max_new_tokens: int
    frame: tuple[str, str] = ("", "")
    turns: tuple[str, str] = ("", "\n")
    begins: bool = True

    @property
    def budget(self) -> int:
        """How many tokens a prompt may have."""
        return self.length - self.max_new_tokens

    def beginning(self, answer_prefix: str) -> str:
        """The beginning of the answer that stands in the prompt: the benchmark's, or none."""
        return answer_prefix if self.begins else ""

    def named(self, *key: str | int) -> str:
        """The name of a haystack or a pair of this task and seed."""
        return "-".join(map(str, (self.task, self.seed, *key)))

    def item(
        self,
        index: int,
        prompt: str,
        answer_prefix: str,
        *,
        answers: Sequence[str],
        tokens: int,
        depths: Sequence[float] = (),
        prefix: str = "",
        scorer: str = "all",
        haystack: str | None = None,
        pair: str | None = None,
    ) -> Item:
        """The item with this index; unless told otherwise it has its haystack and its pair to itself."""
        alone = self.named(index)
        return Item(
            benchmark=self.benchmark,
            task=self.task,
            length=self.length,
            index=index,
            depths=tuple(depths),
            haystack=haystack or alone,
            prefix=prefix,
            prompt=prompt,
            answer_prefix=answer_prefix,
            answers=tuple(answers),
            scorer=scorer,
            max_new_tokens=self.max_new_tokens,
            tokens=tokens,
            pair=pair or alone,
        )


def items_digest(
    spec: Mapping[str, Any], *, tokenizer: str, length: int, seed: int, generator: int = GENERATOR_VERSION
) -> str:
    """The content address of a set of items (64 hex digits).

    `spec` is everything else they depend on, as JSON values: benchmark, tasks, number of items, digests of the texts
    they are cut from. `tokenizer` is the tokenizer's digest, `generator` the version of the code that makes them.
    """
    identity = {
        "generator": generator,
        "spec": spec,
        "tokenizer": tokenizer,
        "length": length,
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _schema() -> Any:
    import pyarrow as pa

    types = {
        "str": pa.string(),
        "int": pa.int64(),
        "bool": pa.bool_(),
        "tuple[float, ...]": pa.list_(pa.float64()),
        "tuple[str, ...]": pa.list_(pa.string()),
    }
    return pa.schema([pa.field(field.name, types[str(field.type)], nullable=False) for field in fields(Item)])


def write_items(items: Iterable[Item]) -> bytes:
    """The items as one Parquet file; the same items give the same bytes."""
    import pyarrow as pa

    rows = list(items)
    schema = _schema()
    columns = [[getattr(item, name) for item in rows] for name in schema.names]
    table = pa.table([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema)
    return parquet_bytes(table, ROW_GROUP)


def read_items(data: bytes, first: int = 0, last: int | None = None) -> list[Item]:
    """Items `[first, last)` of one Parquet file, or all; `CorruptData` if it is not one of `write_items`.

    Only the row groups that hold them are decoded: a set at 128K is much larger than its file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(data))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptData(f"items: not a Parquet file ({error}); delete it and build the items again") from error
    present = file.schema_arrow.names
    names = [field.name for field in fields(Item) if field.name != "bare" or "bare" in present]  # older files lack it
    if missing := sorted(set(names) - set(present)):
        raise CorruptData(f"items: the file has no column {', '.join(missing)}; delete it and build the items again")
    last = file.metadata.num_rows if last is None else last
    groups = range(first // ROW_GROUP, -(-last // ROW_GROUP))
    table = file.read_row_groups(list(groups), columns=names)
    rows: list[dict[str, Any]] = table.slice(first - groups.start * ROW_GROUP, last - first).to_pylist()
    for row in rows:
        row.update(depths=tuple(row["depths"]), answers=tuple(row["answers"]))
    return [Item(**row) for row in rows]


def read_answers(data: bytes) -> dict[int, tuple[str, ...]]:
    """The right answers in one file of `write_items`, by the number of the item; prompts are not decoded."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data), columns=["index", "answers"])
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptData(f"items: not a Parquet file ({error}); delete it and build the items again") from error
    return {row["index"]: tuple(row["answers"]) for row in table.to_pylist()}

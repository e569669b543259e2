from __future__ import annotations

from dataclasses import replace

import pytest

from jobs.errors import CorruptData
from workers.benchmarks.items import Item, items_digest, read_items, write_items
from workers.benchmarks.ruler.tasks import ruler_items, ruler_spec
from workers.benchmarks.texts.tokenizer import Tokenizer

ITEM = Item(
    benchmark="ruler",
    task="niah_multivalue",
    length=4096,
    index=3,
    depths=(0.25, 1.0),
    haystack="h",
    prefix="Zeilen\nund „Zeichen“ \x00 ",
    prompt="\nWas?",
    answer_prefix=" Dies:",
    answers=("1", "2"),
    scorer="all",
    max_new_tokens=128,
    tokens=77,
    pair="p",
)


def test_items_come_back_from_parquet_as_they_were() -> None:
    items = [ITEM, replace(ITEM, index=4, depths=(), answers=("x",), prefix="")]
    assert read_items(write_items(items)) == items
    assert read_items(write_items([])) == []


def test_same_items_give_same_bytes(tokenizer: Tokenizer) -> None:
    built = [
        write_items(ruler_items(tokenizer, "niah_single_2", 1024, indices=range(6), seed=5, questions=3))
        for _ in range(2)
    ]
    assert built[0] == built[1]


def test_the_model_reads_prefix_prompt_and_answer_prefix_in_this_order() -> None:
    assert ITEM.text == "Zeilen\nund „Zeichen“ \x00 \nWas? Dies:"


def test_bytes_that_are_not_items_are_named_as_such() -> None:
    with pytest.raises(CorruptData, match="not a Parquet file"):
        read_items(b"PAR1 but not really")


def test_digest_changes_with_everything_items_depend_on() -> None:
    spec = ruler_spec("cwe")
    first = items_digest(spec, tokenizer="t", length=4096, seed=1)
    others = [
        items_digest(ruler_spec("cwe", max_new_tokens=11), tokenizer="t", length=4096, seed=1),
        items_digest(ruler_spec("vt"), tokenizer="t", length=4096, seed=1),
        items_digest(ruler_spec("cwe", frame=("<u>", "</u>")), tokenizer="t", length=4096, seed=1),
        items_digest(spec, tokenizer="u", length=4096, seed=1),
        items_digest(spec, tokenizer="t", length=8192, seed=1),
        items_digest(spec, tokenizer="t", length=4096, seed=2),
    ]
    assert len({first, *others}) == 7
    assert first == items_digest(dict(reversed(spec.items())), tokenizer="t", length=4096, seed=1)

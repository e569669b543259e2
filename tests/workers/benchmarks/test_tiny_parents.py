"""The bundled parents answer the items as their README says: the layout is the one they were trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from jobs.evaluate import CustomSpec
from workers.benchmarks.custom import plan_custom
from workers.benchmarks.items import Item, read_items
from workers.benchmarks.needle import even_depths, needle_items
from workers.benchmarks.planned import Reader
from workers.benchmarks.ruler.tasks import ruler_items
from workers.benchmarks.scorers import score as score_of
from workers.benchmarks.texts.tokenizer import Tokenizer


def share_right(folder: Path, tokenizer: Tokenizer, items: list[Item]) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    right = 0.0
    for item in items:
        ids = torch.tensor([tokenizer.encode(item.text)])
        answer = model.generate(ids, max_new_tokens=item.max_new_tokens, do_sample=False)[0, ids.shape[1] :]
        right += score_of(item.scorer, tokenizer.decode(answer.tolist()), item.answers)
    return right / len(items)


@pytest.mark.parametrize(
    ("parent", "length", "least", "most"),
    [("long", 256, 0.9, 1), ("long", 1024, 0.8, 1), ("base", 256, 0.8, 1), ("base", 1024, 0, 0), ("fmt", 1024, 0, 0)],
)
def test_parents_find_what_their_readme_says(
    tokenizer: Tokenizer, parents: Path, parent: str, length: int, least: float, most: float
) -> None:
    torch.set_num_threads(1)
    items = ruler_items(tokenizer, "niah_single_1", length, indices=range(12), seed=1, max_new_tokens=16)
    assert least <= share_right(parents / parent, tokenizer, items) <= most


@pytest.mark.parametrize(("parent", "least", "most"), [("fmt", 0.9, 1), ("long", 0, 0), ("base", 0, 0)])
def test_the_form_of_an_answer_is_what_one_parent_was_trained_for(
    tokenizer: Tokenizer, parents: Path, parent: str, least: float, most: float
) -> None:
    torch.set_num_threads(1)
    items = needle_items(
        tokenizer, 256, depths=even_depths(3), indices=range(12), seed=1, haystack="noise", answer='{"value": {value}}'
    )
    assert least <= share_right(parents / parent, tokenizer, items) <= most


@pytest.mark.parametrize(
    ("parent", "scorer", "score"),
    [("long", "exact", 1), ("fmt", "exact", 0), ("fmt", "contains", 1), ("fmt", "json_field", 1), ("long", "f1", 1)],
)
def test_questions_of_ones_own_are_answered_to_the_end_that_the_model_sets(
    tokenizer: Tokenizer, parents: Path, tmp_path: Path, parent: str, scorer: str, score: float
) -> None:
    """Nothing ends an answer but the model and its limit: `long` ends after the number, `fmt` writes JSON around it."""
    torch.set_num_threads(1)
    [needle] = ruler_items(tokenizer, "niah_single_1", 256, indices=range(1), seed=1, max_new_tokens=16)
    (tmp_path / "own.jsonl").write_text(json.dumps({"input": needle.text, "target": needle.answers[0]}))
    field = {"field": "value"} if scorer == "json_field" else {}
    [planned] = plan_custom(CustomSpec(file="own.jsonl", scorer=scorer, **field), tokenizer, 0, Reader(tmp_path), 0)
    [item] = read_items(planned.build(range(1)))
    assert item.max_new_tokens == 128
    assert share_right(parents / parent, tokenizer, [item]) == score

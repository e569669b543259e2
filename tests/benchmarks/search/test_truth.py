"""The truth of the replays: answers read many at a time are the engine's, and fitted surfaces foretell points."""

from __future__ import annotations

import pytest

from tests.benchmarks.search.batched import Model, groups_of
from tests.benchmarks.search.truth import CELLS, PARENTS, items_of, merged, opened, question, without_needle
from workers.benchmarks.scorers import SCORERS
from workers.engines.engine import Prompt
from workers.engines.transformers_engine import TransformersEngine


@pytest.mark.heavy
def test_answers_that_are_read_together_are_those_of_the_engine() -> None:
    """Of a merge that answers in JSON, and of one that does not and finds about every second needle at 1,024 tokens."""
    weights, tokenizer = opened()
    items = [item for cell in CELLS for item in items_of(tokenizer, cell, range(6))]
    questions = [question(tokenizer, item) for item in items]
    beginning = without_needle(tokenizer)
    engine = TransformersEngine.from_folder(PARENTS / "base")
    for point in ((4, 16, 0), (10, 10, 0)):
        model = merged(weights, point)
        engine.swap(model.items(), f"{point}")
        prompts = [Prompt(item.prefix, item.prompt + item.answer_prefix, item.max_new_tokens) for item in items]
        answers = zip(items, engine.generate(prompts), strict=True)
        expected = [SCORERS[item.scorer](answer.text, item.answers) == 1 for item, answer in answers]
        assert 6 < sum(expected) < 30
        assert Model(model).right(questions, groups_of(questions, beginning), beginning).tolist() == expected

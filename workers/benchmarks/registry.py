"""Every benchmark by its key in a job file."""

from __future__ import annotations

from collections.abc import Mapping

from jobs.evaluate import Evaluation
from workers.benchmarks.harness.planned import plan_lm_eval
from workers.benchmarks.needle import plan_needle
from workers.benchmarks.perplexity import plan_perplexity
from workers.benchmarks.planned import PlannedSet, Reader
from workers.benchmarks.ruler.planned import plan_ruler
from workers.benchmarks.texts.tokenizer import Tokenizer


def planned_sets(
    evaluation: Evaluation,
    tokenizer: Tokenizer,
    seed: int,
    reader: Reader,
    least: Mapping[str, int] | None = None,
) -> list[PlannedSet]:
    """Every set of items that the job's benchmarks consist of; nothing is built yet.

    `least` items are made for a benchmark's sets even if fewer are asked of everyone: the rest are fresh ones, on which
    the winners of a race are confirmed. `BadInput` with file and line for what cannot be asked.
    """
    at_least = least or {}
    sets: list[PlannedSet] = []
    if evaluation.ruler is not None:
        sets += plan_ruler(evaluation.ruler, tokenizer, seed, reader, at_least.get("ruler", 0))
    if evaluation.needle is not None:
        sets += plan_needle(evaluation.needle, tokenizer, seed, reader, at_least.get("needle", 0))
    if evaluation.perplexity is not None:
        sets += plan_perplexity(evaluation.perplexity, tokenizer, seed, reader)
    if evaluation.lm_eval is not None:
        sets += plan_lm_eval(evaluation.lm_eval, tokenizer, reader)
    return sets

"""What an evaluation worker does: keep the parents, become a point by merging it in place, answer a block of items."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np

from jobs.errors import ObjectExists, ObjectMissing, WorkerLost
from jobs.evaluation_tasks import EvaluationTask, ModelSpec, ScoreRow
from workers.benchmarks.harness.adapter import sample_scores
from workers.benchmarks.items import Item, read_items
from workers.benchmarks.perplexity import read_windows
from workers.benchmarks.scorers import SCORERS
from workers.engines.engine import Answer, Engine, Prompt
from workers.evaluating.holding import Resident
from workers.evaluating.scores import read_scores, write_scores
from workers.storage import open_store

SETS_AT_HAND = 8
"""Files of items that a worker keeps, compressed."""


class Evaluator:
    """One a worker: it outlives many points, and holds one of the models at a time, whose parents stay in memory."""

    def __init__(self, models: Mapping[str, ModelSpec], device: str = "cpu") -> None:
        self._models = models
        self._device = device
        self._store = open_store(next(iter(models.values())).run)
        self._resident: tuple[str, Resident] | None = None
        self._items = lru_cache(SETS_AT_HAND)(self._read)

    def evaluate(self, task: EvaluationTask) -> list[ScoreRow]:
        """The block's scores, and its file in the store; what a block already has is read, not asked again."""
        with suppress(ObjectMissing):
            return read_scores(bytes(self._store.read(task.key)), task.key)
        resident = self._holding(task.model)
        try:
            rows = list(self._rows(task, resident.become(task), resident))
        except WorkerLost:  # an engine in another process is gone; the next try opens one
            self.close()
            raise
        try:
            self._store.write(task.key, write_scores(rows), mode="create")
        except ObjectExists:
            return read_scores(bytes(self._store.read(task.key)), task.key)  # the first attempt's scores hold
        return rows

    def close(self) -> None:
        """Gives back the engine and the parents."""
        if self._resident is not None:
            self._resident[1].close()
        self._resident = None

    def _holding(self, model: str) -> Resident:
        """The model's parents and engine, after giving back another model's."""
        if self._resident is None or self._resident[0] != model:
            self.close()
            self._resident = model, Resident(self._models[model], self._device)
        return self._resident[1]

    def _rows(self, task: EvaluationTask, engine: Engine, resident: Resident) -> Iterator[ScoreRow]:
        ask = {"perplexity": self._perplexities, "lm_eval": self._lm_eval}.get(task.items.benchmark, self._answers)
        for row in ask(task, engine, resident):
            yield ScoreRow(
                point=task.point,
                benchmark=task.items.benchmark,
                length=task.items.length,
                items=task.items.digest,
                recipe=task.digest,
                weights=resident.weights,
                repeat=task.repeat,
                **row,
            )

    def _answers(self, task: EvaluationTask, engine: Engine, resident: Resident) -> Iterator[dict[str, Any]]:
        items = [item for data, first, last in self._stretches(task) for item in read_items(data, first, last)]
        prompts = [Prompt(item.prefix, item.prompt + item.answer_prefix, item.max_new_tokens) for item in items]
        answers = engine.generate(prompts)
        return (_answered(item, answer) for item, answer in zip(items, answers, strict=True))

    def _perplexities(self, task: EvaluationTask, engine: Engine, resident: Resident) -> Iterator[dict[str, Any]]:
        """One row a window and block of positions; the score is the geometric mean of the tokens' likelihoods."""
        [(data, first, last)] = self._stretches(task)
        for window in read_windows(data, first, last):
            started = time.perf_counter()
            [likelihoods] = engine.score([window.tokens.tolist()])
            seconds = time.perf_counter() - started
            blocks = window.blocks[1:]
            for block in np.unique(blocks[blocks >= 0]).tolist():
                chosen = likelihoods[blocks == block].astype(np.float64)
                finite = bool(np.isfinite(chosen).all())
                yield {
                    "task": f"position_block_{block}",
                    "item": window.index,
                    "depth": math.nan,
                    "haystack": window.pair,
                    "pair": window.pair,
                    "answer": "",
                    "score": min(1.0, math.exp(float(chosen.mean()))) if finite else 0.0,
                    "finite": finite,
                    "tokens": int(chosen.size),
                    "seconds": seconds * chosen.size / likelihoods.size,
                }

    def _lm_eval(self, task: EvaluationTask, engine: Engine, resident: Resident) -> Iterator[dict[str, Any]]:
        """One row an item and metric of a task of lm-evaluation-harness."""
        [(data, _, _)] = self._stretches(task)
        told = json.loads(data)
        for score in sample_scores(
            engine,
            told["task"],
            told["limit"],
            beginning=resident.beginning,
            tokenizer=resident.tokenizer,
            metadata=told.get("metadata"),
            num_fewshot=told.get("num_fewshot"),
            chat_template=told.get("chat_template"),
        ):
            place = f"{score.metric.partition(':')[0]}-{score.item}"
            yield {
                "task": score.metric,
                "item": score.item,
                "depth": math.nan,
                "haystack": place,
                "pair": place,
                "answer": score.answer,
                "score": score.score,
                "finite": score.finite,
                "tokens": score.tokens,
                "seconds": score.seconds,
            }

    def _stretches(self, task: EvaluationTask) -> Iterator[tuple[bytes, int, int]]:
        """The files that hold the task's items, each with the rows of it that are asked."""
        at = task.first
        for first, last, key in task.items.parts:
            if first <= at < min(last, task.last):
                yield self._items(key), at - first, min(last, task.last) - first
                at = min(last, task.last)

    def _read(self, key: str) -> bytes:
        return bytes(self._store.read(key))


def _answered(item: Item, answer: Answer) -> dict[str, Any]:
    return {
        "task": item.task,
        "item": item.index,
        "depth": item.depths[0] if item.depths else math.nan,
        "haystack": item.haystack,
        "pair": item.pair,
        "answer": answer.text,
        "score": SCORERS[item.scorer](answer.text, item.answers) if answer.finite else 0.0,
        "finite": answer.finite,
        "tokens": answer.tokens_in + answer.tokens_out,
        "seconds": answer.seconds,
    }

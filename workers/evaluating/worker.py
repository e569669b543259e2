"""What an evaluation worker does: keep the parents, become a point by merging it in place, answer a block of items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache, partial

from jobs.errors import ObjectExists, ObjectMissing, WorkerLost
from jobs.evaluation_tasks import BlockScores, EvaluationTask, ModelSpec, ScoreRow
from workers.benchmarks.answering import Block, ItemScore
from workers.benchmarks.registry import BENCHMARKS
from workers.engines.engine import Engine
from workers.evaluating.holding import Resident
from workers.evaluating.scores import read_block, write_scores
from workers.storage import open_store
from workers.storage.records import read_sealed

SETS_AT_HAND = 8
"""Files of items that a worker keeps, compressed."""


class Evaluator:
    """One a worker: it outlives many points, and holds one of the models at a time, whose parents stay in memory."""

    def __init__(self, models: Mapping[str, ModelSpec], device: str = "cpu") -> None:
        self._models = models
        self._device = device
        self._store = open_store(next(iter(models.values())).run)
        self._resident: tuple[str, Resident] | None = None
        self._items = lru_cache(SETS_AT_HAND)(partial(read_sealed, self._store))

    def evaluate(self, task: EvaluationTask) -> BlockScores:
        """The block's scores, and its file in the store; what a block already has is read, not asked again."""
        with suppress(ObjectMissing):
            return read_block(read_sealed(self._store, task.key), task.key)
        resident = self._holding(task.model)
        self._remarks: list[str] = []
        try:
            rows = list(self._rows(task, resident.become(task), resident))
        except WorkerLost:  # an engine in another process is gone; the next try opens one
            self.close()
            raise
        try:
            self._store.write(task.key, write_scores(rows, self._remarks), mode="create")
        except ObjectExists:
            return read_block(read_sealed(self._store, task.key), task.key)  # the first attempt's scores hold
        return BlockScores(rows, tuple(self._remarks))

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
        if resident.overflows:
            self._remarks.append(f"NaN or infinity in the weights of {task.point}, in no parent")
        remark, generation = self._remarks.append, task.items.generation
        block = Block([*self._parts(task)], resident.tokenizer, resident.beginning, remark, generation)
        for scored in BENCHMARKS[task.items.benchmark].answer(engine, block):
            yield _row(task, scored, resident.weights)

    def _parts(self, task: EvaluationTask) -> Iterator[tuple[bytes, int, int]]:
        """The files that hold the task's items, each with the rows of it that are asked."""
        at = task.first
        for first, last, key in task.items.parts:
            if first <= at < min(last, task.last):
                yield self._items(key), at - first, min(last, task.last) - first
                at = min(last, task.last)


def _row(task: EvaluationTask, scored: ItemScore, weights: str) -> ScoreRow:
    return ScoreRow(
        point=task.point,
        benchmark=task.items.benchmark,
        task=scored.task,
        length=task.items.length,
        items=task.items.digest,
        item=scored.item,
        depth=scored.depth,
        haystack=scored.haystack,
        pair=scored.pair,
        answer=scored.answer,
        score=scored.score,
        finite=scored.finite,
        tokens=scored.tokens,
        seconds=scored.seconds,
        recipe=task.digest,
        weights=weights,
        repeat=task.repeat,
        kind=task.kind,
        status=scored.status,
        thought=scored.thought,
        tokens_thought=scored.tokens_thought,
        tokens_out=scored.tokens_out,
        sample=scored.sample,
    )

"""Evaluators whose answers come from a function: races, gates and nights without a language model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping

from jobs.evaluation_tasks import BlockScores, EvaluationTask, ModelSpec, ScoreRow
from workers.benchmarks.items import Item, read_items
from workers.benchmarks.scorers import score as scored_by
from workers.digests import weights_digest
from workers.evaluating.scores import write_scores
from workers.merging.resident import ResidentParents
from workers.storage import open_store
from workers.storage.records import read_sealed

Answer = Callable[[EvaluationTask, Item], float | str]
"""The answer of a task's point to an item: a text, which the item's scorer rates, or the score itself."""


class ScriptedEvaluators:
    """One worker in this process that asks `answer` in place of a model.

    Scores lie in the store as those of a model do, with the digest of the merged weights. A word is a token. Only for
    benchmarks that are made of `Item`s, as RULER and the needle.
    """

    def __init__(self, models: Mapping[str, ModelSpec], answer: Answer) -> None:
        self._models, self._answer = models, answer
        self._store = open_store(next(iter(models.values())).run)
        self._weights: dict[str, str] = {}
        self._task: EvaluationTask | None = None

    def idle(self) -> Collection[int]:
        return (0,) if self._task is None else ()

    def submit(self, worker: int, task: EvaluationTask) -> None:
        self._task = task

    def next_done(self) -> tuple[EvaluationTask, BlockScores]:
        task, self._task = self._task, None
        assert task is not None, "asked for a result before there was a task"
        files = (read_sealed(self._store, key) for _, _, key in task.items.parts)
        items = [item for data in files for item in read_items(data) if task.first <= item.index < task.last]
        rows = [self._row(task, item) for item in items]
        self._store.write(task.key, write_scores(rows), mode="create")
        return task, BlockScores(rows)

    def close(self) -> None:
        pass

    def _row(self, task: EvaluationTask, item: Item) -> ScoreRow:
        answer = self._answer(task, item)
        text = answer if isinstance(answer, str) else ""
        return ScoreRow(
            point=task.point,
            benchmark=task.items.benchmark,
            task=item.task,
            length=task.items.length,
            items=task.items.digest,
            item=item.index,
            depth=item.depths[0] if item.depths else float("nan"),
            haystack=item.haystack,
            pair=item.pair,
            answer=text,
            score=scored_by(item.scorer, text, item.answers) if isinstance(answer, str) else answer,
            finite=True,
            tokens=item.tokens,
            seconds=0.0,
            recipe=task.digest,
            weights=self._weights_of(task),
            repeat=task.repeat,
            kind=task.kind,
            tokens_out=len(text.split()),
            status="empty" if isinstance(answer, str) and not answer.strip() else "answered",
        )

    def _weights_of(self, task: EvaluationTask) -> str:
        """The digest of the weights that a model would hold: they are merged, and not kept."""
        if task.digest not in self._weights:
            model = self._models[task.model]
            parents = ResidentParents(
                model.tensors,
                model.parents,
                seed=model.seed,
                numerics=model.numerics,
                activations=model.activations,
                grams=model.grams,
            )
            digests: dict[str, str] = {}
            deque(parents.merged(task.settings, digests), maxlen=0)
            self._weights[task.digest] = weights_digest(digests)
        return self._weights[task.digest]

"""What an evaluation worker does: keep the parents, become a point by merging it in place, answer a block of items."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.errors import BadInput, ObjectExists, ObjectMissing
from jobs.evaluation import EvaluationTask, ModelSpec, ScoreRow
from jobs.manifest import weights_digest
from workers.benchmarks.items import Item, read_items
from workers.benchmarks.perplexity import read_windows
from workers.benchmarks.scorers import SCORERS
from workers.engines.engine import Answer, Engine, Prompt
from workers.resident import ResidentParents
from workers.scores import read_scores, write_scores
from workers.storage import open_store

if TYPE_CHECKING:
    from torch import Tensor


class Evaluator:
    """A resident engine and the parents beside it. One a worker; it outlives many points."""

    def __init__(self, model: ModelSpec, device: str = "cpu") -> None:
        self._model = model
        self._device = device
        self._store = open_store(model.run)
        self._parents = ResidentParents(
            model.tensors,
            model.parents,
            seed=model.seed,
            numerics=model.numerics,
            device=device,
            threads=model.threads,
        )
        self._folder = tempfile.TemporaryDirectory(prefix="mergeyard-tokenizer-")
        _fetch_tokenizer(model, Path(self._folder.name))
        self._engine: Engine | None = None
        self._weights: dict[str, str] = {}
        self._items = lru_cache(maxsize=8)(self._read_items)

    def evaluate(self, task: EvaluationTask) -> list[ScoreRow]:
        """The block's scores, and its file in the store; what a block already has is read, not asked again."""
        try:
            return read_scores(bytes(self._store.read(task.key)), task.key)
        except ObjectMissing:
            pass
        engine = self._become(task)
        rows = self._perplexities(task, engine) if task.items.benchmark == "perplexity" else self._answers(task, engine)
        try:
            self._store.write(task.key, write_scores(rows), mode="create")
        except ObjectExists:
            return read_scores(bytes(self._store.read(task.key)), task.key)  # the first attempt's scores hold
        return rows

    def close(self) -> None:
        """Gives back the engine and the tokenizer's folder."""
        if self._engine is not None:
            self._engine.close()
        self._folder.cleanup()

    def _become(self, task: EvaluationTask) -> Engine:
        """The engine with the task's point in it."""
        if self._engine is not None and self._engine.version == task.digest:
            return self._engine
        hashes: dict[str, str] = {}
        stream = self._hashed(self._parents.merged(task.settings), hashes)
        if self._engine is None:
            self._engine = open_engine(self._model, Path(self._folder.name), stream, task.digest, self._device)
        else:
            self._engine.swap(stream, task.digest)
        self._weights = {task.digest: weights_digest(hashes)}
        return self._engine

    def _hashed(self, stream: Iterator[tuple[str, Tensor]], hashes: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
        import torch

        for name, tensor in stream:
            data: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy()
            hashes[name] = hashlib.sha256(data).hexdigest()
            yield name, tensor

    def _answers(self, task: EvaluationTask, engine: Engine) -> list[ScoreRow]:
        items = self._items(task.items.key)[task.first : task.last]
        prompts = [Prompt(item.prefix, item.prompt + item.answer_prefix, item.max_new_tokens) for item in items]
        answers = engine.generate(prompts)
        return [self._row(task, item, answer) for item, answer in zip(items, answers, strict=True)]

    def _row(self, task: EvaluationTask, item: Item, answer: Answer) -> ScoreRow:
        return ScoreRow(
            point=task.point,
            benchmark=item.benchmark,
            task=item.task,
            length=item.length,
            item=item.index,
            depth=item.depths[0] if item.depths else math.nan,
            haystack=item.haystack,
            pair=item.pair,
            answer=answer.text,
            score=SCORERS[item.scorer](answer.text, item.answers) if answer.finite else 0.0,
            finite=answer.finite,
            tokens=answer.tokens_in + answer.tokens_out,
            seconds=answer.seconds,
            recipe=task.digest,
            weights=self._weights[task.digest],
            repeat=task.repeat,
        )

    def _perplexities(self, task: EvaluationTask, engine: Engine) -> list[ScoreRow]:
        """One row a window and block of positions; the score is the geometric mean of the tokens' likelihoods."""
        windows = read_windows(bytes(self._store.read(task.items.key)))[task.first : task.last]
        likelihoods = engine.score([window.tokens.tolist() for window in windows])
        rows: list[ScoreRow] = []
        for window, values in zip(windows, likelihoods, strict=True):
            blocks = window.blocks[1:]
            for block in range(int(blocks.max()) + 1):
                chosen = values[blocks == block].astype(np.float64)
                if not chosen.size:
                    continue
                finite = bool(np.isfinite(chosen).all())
                rows.append(
                    ScoreRow(
                        point=task.point,
                        benchmark="perplexity",
                        task=f"position_block_{block}",
                        length=window.length,
                        item=window.index,
                        depth=math.nan,
                        haystack=window.pair,
                        pair=window.pair,
                        answer="",
                        score=math.exp(float(chosen.mean())) if finite else 0.0,
                        finite=finite,
                        tokens=int(chosen.size),
                        seconds=0.0,
                        recipe=task.digest,
                        weights=self._weights[task.digest],
                        repeat=task.repeat,
                    )
                )
        return rows

    def _read_items(self, key: str) -> Sequence[Item]:
        return read_items(bytes(self._store.read(key)))


def open_engine(
    model: ModelSpec, tokenizer: Path, weights: Iterator[tuple[str, Tensor]], version: str, device: str
) -> Engine:
    """The engine that the job names, with its first weights."""
    if model.engine == "transformers":
        from workers.engines.transformers_engine import TransformersEngine

        return TransformersEngine.from_state(model.config, tokenizer, weights, version=version, device=device)
    raise BadInput(f"engine {model.engine}: cannot evaluate points that were never written; use transformers or vllm")


def _fetch_tokenizer(model: ModelSpec, folder: Path) -> None:
    """The tokenizer's few files into a folder, where transformers looks for them."""
    url, files = model.tokenizer
    store = open_store(url)
    for name, etag in files.items():
        (folder / name).write_bytes(bytes(store.read(name, etag=etag)))

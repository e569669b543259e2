"""What an evaluation worker does: keep the parents, become a point by merging it in place, answer a block of items."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.errors import ObjectExists, ObjectMissing, WorkerLost
from jobs.evaluation import EvaluationTask, ModelSpec, ScoreRow
from jobs.manifest import weights_digest
from workers.benchmarks.items import Item, read_items
from workers.benchmarks.lm_eval_adapter import sample_scores
from workers.benchmarks.perplexity import read_windows
from workers.benchmarks.scorers import SCORERS
from workers.engines.engine import Answer, Engine, Prompt
from workers.engines.tokenizer import load_tokenizer
from workers.resident import ResidentParents
from workers.scores import read_scores, write_scores
from workers.storage import open_store

if TYPE_CHECKING:
    from torch import Tensor

SETS_AT_HAND = 8
"""Files of items that a worker keeps, compressed."""


class Evaluator:
    """One a worker: it outlives many points, and holds one of the models at a time, whose parents stay in memory."""

    def __init__(self, models: Mapping[str, ModelSpec], device: str = "cpu") -> None:
        self._models = models
        self._device = device
        self._store = open_store(next(iter(models.values())).run)
        self._resident: tuple[str, _Resident] | None = None
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

    def _holding(self, model: str) -> _Resident:
        """The model's parents and engine, after giving back another model's."""
        if self._resident is None or self._resident[0] != model:
            self.close()
            self._resident = model, _Resident(self._models[model], self._device)
        return self._resident[1]

    def _rows(self, task: EvaluationTask, engine: Engine, resident: _Resident) -> Iterator[ScoreRow]:
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

    def _answers(self, task: EvaluationTask, engine: Engine, resident: _Resident) -> Iterator[dict[str, Any]]:
        items = [item for data, first, last in self._stretches(task) for item in read_items(data, first, last)]
        prompts = [Prompt(item.prefix, item.prompt + item.answer_prefix, item.max_new_tokens) for item in items]
        answers = engine.generate(prompts)
        return (_answered(item, answer) for item, answer in zip(items, answers, strict=True))

    def _perplexities(self, task: EvaluationTask, engine: Engine, resident: _Resident) -> Iterator[dict[str, Any]]:
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

    def _lm_eval(self, task: EvaluationTask, engine: Engine, resident: _Resident) -> Iterator[dict[str, Any]]:
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


class _Resident:
    """The parents of one layout in memory and, once a point was asked for, an engine."""

    def __init__(self, model: ModelSpec, device: str) -> None:
        self._model = model
        self._device = device
        self._parents: ResidentParents | None = None
        self._engine: Engine | None = None
        self._point = ""
        self._known: dict[str, str] = {}
        """The digest of the weights of every point that was here: a race comes back to a point at each rung."""
        self._room = tempfile.TemporaryDirectory(prefix="mergeyard-tokenizer-")
        self.tokenizer = Path(self._room.name)
        """The folder of the point's tokenizer, once there is an engine."""
        self.weights = ""
        self.beginning = ""

    def become(self, task: EvaluationTask) -> Engine:
        """The engine with the task's point in it, and `weights` its digest."""
        if self._engine is not None and self._point == task.digest:
            return self._engine
        self._point = ""
        if self._model.engine == "openai":
            self._engine = self._open(iter(()), task)
            self.weights = f"{self._model.url}#{self._engine.version}"
        else:
            digests: dict[str, str] = {}
            known = self._known.get(task.digest)
            weights = self._held_parents().merged(task.settings, digests if known is None else None)
            if self._engine is None:
                self._engine = self._open(weights, task)
            else:
                self._engine.swap(weights, task.digest)
            self.weights = self._known[task.digest] = known or weights_digest(digests)
        self._point = task.digest
        return self._engine

    def close(self) -> None:
        """Gives back the engine's memory and processes."""
        if self._engine is not None:
            self._engine.close()
        self._engine = self._parents = None
        self._room.cleanup()

    def _held_parents(self) -> ResidentParents:
        if self._parents is None:
            self._parents = ResidentParents(
                self._model.tensors,
                self._model.parents,
                seed=self._model.seed,
                numerics=self._model.numerics,
                device=self._device,
                threads=self._model.threads,
            )
        return self._parents

    def _open(self, weights: Iterator[tuple[str, Tensor]], task: EvaluationTask) -> Engine:
        url, files = self._model.tokenizer
        store = open_store(url)
        for file, etag in files.items():
            data = bytes(store.read(file, etag=etag))
            (self.tokenizer / file).write_bytes(_without_code(data) if file == "tokenizer_config.json" else data)
        tokenizer = load_tokenizer(self.tokenizer)
        self.beginning = str(tokenizer.bos_token or tokenizer.eos_token or "")
        return open_engine(self._model, self.tokenizer, weights, task, self._device)


def _without_code(tokenizer_config: bytes) -> bytes:
    """Without the classes that the file names for its loading: tasks of lm-evaluation-harness would run their code."""
    return json.dumps({key: value for key, value in json.loads(tokenizer_config).items() if key != "auto_map"}).encode()


def open_engine(
    model: ModelSpec, folder: Path, weights: Iterator[tuple[str, Tensor]], task: EvaluationTask, device: str
) -> Engine:
    """The engine that the job names, holding the point of `task`; `folder` has the tokenizer's files."""
    options: dict[str, Any] = dict(model.options)
    if model.engine == "openai":
        from workers.engines.openai_engine import OpenAIEngine

        served = str(options.pop("model", task.point))
        return OpenAIEngine(str(model.url), served, folder, **options)
    if model.engine == "vllm":
        return _open_vllm(model, folder, weights, task, options)
    from workers.engines.transformers_engine import Limits, TransformersEngine

    return TransformersEngine.from_state(
        model.config,
        folder,
        weights,
        version=task.digest,
        device=device,
        limits=Limits(**options),
        end_tokens=model.end_tokens,
    )


def _open_vllm(
    model: ModelSpec,
    folder: Path,
    weights: Iterator[tuple[str, Tensor]],
    task: EvaluationTask,
    options: dict[str, Any],
) -> Engine:
    """vLLM opens nothing but a checkpoint: it is given one full of zeros, a file that takes no room on the disk."""
    from workers.checkpoint import header_bytes
    from workers.engines.vllm_engine import VllmEngine

    header = header_bytes([(tensor.name, tensor.dtype, tensor.shape) for tensor in model.tensors])
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(tensor.bytes for tensor in model.tensors))
    (folder / "config.json").write_text(json.dumps({k: v for k, v in model.config.items() if k != "auto_map"}))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": model.end_tokens} if model.end_tokens else {})
    )
    dtype = str(model.config.get("dtype") or model.config.get("torch_dtype") or "bfloat16")
    longest = options.pop("max_model_len", None)
    if longest is None and model.longest is not None:  # one more than it reads, if the model can: vLLM always generates
        longest = min(model.longest + 1, int(model.config.get("max_position_embeddings", model.longest)))
    cache_gib = int(options.pop("cache_gib", 4))
    engine = VllmEngine(folder, dtype=dtype, max_length=longest, cache_gib=cache_gib, options=options)
    try:
        engine.swap(weights, task.digest)
    except BaseException:
        engine.close()
        raise
    return engine


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

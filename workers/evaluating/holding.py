"""A point held by an engine: merged into the resident model, unwritten."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.evaluation_tasks import EvaluationTask, ModelSpec
from workers.checkpoints.fetching import fetch
from workers.checkpoints.tokenizer_files import with_tokens
from workers.digests import weights_digest
from workers.engines.engine import Engine
from workers.engines.opening import open_engine
from workers.engines.tokenizer import load_tokenizer
from workers.merging.resident import ResidentParents
from workers.merging.streams import Mark
from workers.storage import open_store

if TYPE_CHECKING:
    from torch import Tensor


class Resident:
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
        self._digesting = ThreadPoolExecutor(1, "digest")
        self._weights: Future[str] = Future()
        self.overflows: dict[str, int] = {}
        """Of the point's weights, by tensor: the elements that are NaN or infinite, and finite in every parent."""
        self.beginning = ""

    def become(self, task: EvaluationTask) -> Engine:
        """The engine with the task's point in it, and `weights` its digest."""
        if self._engine is not None and self._point == task.digest:
            return self._engine
        wait([self._weights] if self._point else [])  # which reads the memory that changes now
        self._point, self.overflows = "", {}
        if self._model.engine == "openai":
            self._engine = self._open(iter(()), task)
            self._weights = self._digesting.submit(str, f"{self._model.url}#{self._engine.version}")
        elif self._model.as_it_is is not None:
            fetch(self._model.as_it_is, self.tokenizer)
            self._engine = self._open(iter(()), task)
            self._weights = self._digesting.submit(str, task.digest)
        else:
            digests: dict[str, str] = {}
            known = self._known.get(task.digest)
            places = self._engine.places if self._engine is not None else {}
            asked = digests if known is None else None
            weights = self._held_parents().merged(task.settings, asked, places, self.overflows)
            if self._engine is None:
                self._engine = self._open(weights, task)
            else:
                self._engine.swap(weights, task.digest)
            mark = Mark(self._device)
            self._weights = self._digesting.submit(lambda: known or self._digest(task.digest, digests, mark))
        self._point = task.digest
        return self._engine

    @property
    def weights(self) -> str:
        """The digest of the point's weights: a thread reads a GPU's memory while the model answers."""
        return self._weights.result()

    def _digest(self, point: str, digests: dict[str, str], after: Mark) -> str:
        self._held_parents().read_digests(digests, after)
        self._known[point] = weights_digest(digests)
        return self._known[point]

    def close(self) -> None:
        """Gives back the engine's memory and processes."""
        self._digesting.shutdown()
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
                activations=self._model.activations,
                grams=self._model.grams,
            )
        return self._parents

    def _open(self, weights: Iterator[tuple[str, Tensor]], task: EvaluationTask) -> Engine:
        url, files = self._model.tokenizer
        store = open_store(url)
        read = {file: bytes(store.read(file, etag=etag)) for file, etag in files.items()}
        for file, data in with_tokens(read, self._model.added_tokens).items():
            (self.tokenizer / file).write_bytes(_without_code(data) if file == "tokenizer_config.json" else data)
        tokenizer = load_tokenizer(self.tokenizer)
        self.beginning = str(tokenizer.bos_token or tokenizer.eos_token or "")
        return open_engine(self._model, self.tokenizer, weights, task, self._device)


def _without_code(tokenizer_config: bytes) -> bytes:
    """Without the classes that the file names for its loading: tasks of lm-evaluation-harness would run their code."""
    return json.dumps({key: value for key, value in json.loads(tokenizer_config).items() if key != "auto_map"}).encode()

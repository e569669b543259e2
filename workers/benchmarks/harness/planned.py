"""The sets of items that a job's `lm_eval:` asks for."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jobs.errors import BadInput
from jobs.evaluate import LmEvalSpec
from jobs.merge_tasks import canonical_json, digest
from workers.benchmarks.harness.files import files_of
from workers.benchmarks.harness.task_names import trouble_with
from workers.benchmarks.planned import PlannedSet, Reader, frame_of, located
from workers.benchmarks.texts.tokenizer import Tokenizer


def plan_lm_eval(spec: LmEvalSpec, tokenizer: Tokenizer, reader: Reader) -> list[PlannedSet]:
    """One unit a task: lm-evaluation-harness makes the items itself, on the worker; here only what it is told lies."""
    try:
        release = version("lm_eval")
    except PackageNotFoundError:
        raise BadInput(f"{spec.place}: lm_eval needs lm-evaluation-harness; pip install 'mergeyard[lm-eval]'") from None

    frame_of(tokenizer, chat=spec.chat, place=spec.place)  # refuses a tokenizer without a template

    def planned(task: str) -> PlannedSet:
        told: dict[str, Any] = {"task": task, "limit": spec.limit, "lm_eval": release, "num_fewshot": spec.num_fewshot}
        if spec.metadata:  # a task that makes its texts by it makes them for the tokenizer
            told |= {"metadata": dict(spec.metadata), "tokenizer": tokenizer.digest}
        if spec.chat:
            told |= {"chat_template": tokenizer.chat_template}
        if task.endswith((".yaml", ".yml")):
            content = reader.read(task, spec.place)
            told |= {"task": reader.path(task), "content": hashlib.sha256(content).hexdigest()}
            with located(spec.place):
                told |= {"beside": files_of(Path(reader.path(task)))}
        name = Path(task).stem if "content" in told else task
        told_as_bytes = canonical_json(told).encode()

        def check() -> None:
            if "content" not in told and (trouble := trouble_with(task)):
                raise BadInput(trouble)

        return PlannedSet("lm_eval", name, 0, 1, 1, digest(told), lambda _: told_as_bytes, spec.place, check=check)

    sets = [planned(task) for task in spec.tasks]
    names = [entry.task for entry in sets]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise BadInput(f"{spec.place}: two tasks are called {doubled}; give one of the files another name")
    return sets

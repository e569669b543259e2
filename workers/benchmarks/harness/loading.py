"""Loading tasks of lm-evaluation-harness by name or file."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import warnings
from collections import defaultdict
from collections.abc import Generator, Mapping
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.errors import BadInput, MergeyardError
from jobs.yaml_nodes import quoted, suggestion

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager


def check_library() -> None:
    if find_spec("lm_eval") is None:
        raise BadInput("lm_eval needs lm-evaluation-harness; pip install 'mergeyard[lm-eval]'")


@contextlib.contextmanager
def errors_of(task: str) -> Generator[None]:
    """Whatever the harness and a task's own code raise is one line; errors of our own pass."""
    try:
        yield
    except MergeyardError:
        raise
    except Exception as error:
        raise BadInput(f"lm_eval {task}: {_one_line(error)}; see the task's own documentation") from error


@lru_cache(1)
def _manager(metadata: str) -> TaskManager:
    """All tasks that lm-evaluation-harness knows; reading their files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(metadata=json.loads(metadata))


def load_tasks(task: str, metadata: str, num_fewshot: int | None) -> dict[str, Task]:
    """The leaf tasks of a task or group by name; `BadInput` with the nearest name for none."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    manager = _manager(metadata)
    if not _is_path(task) and task not in manager.all_tasks:
        near = suggestion(task, manager.all_tasks)
        raise BadInput(f"lm_eval has no task {quoted(task)}{near or '; see `lm-eval ls tasks`'}")
    random.seed(DEFAULT_RANDOM_SEED)  # some tasks shuffle as they load: every worker must see the same items
    np.random.seed(DEFAULT_OTHER_SEED)
    try:
        leaves: dict[str, Task] = manager.load([task])["tasks"]
        for leaf in leaves.values():
            own: int | None = leaf.get_config("num_fewshot")
            if num_fewshot is not None and own != 0:
                leaf.set_config(key="num_fewshot", value=num_fewshot)
            elif own is None:
                leaf.set_config(key="num_fewshot", value=0)
    except ImportError as error:
        raise BadInput(f"lm_eval {task}: {_what_is_missing(error)}") from error
    except Exception as error:  # whatever a task's own code and the data's home may raise
        raise BadInput(f"lm_eval {task}: cannot be loaded ({_one_line(error)}); are its data here?") from error
    return leaves


def _what_is_missing(error: ImportError) -> str:
    """The module that a task needs, and the remedy."""
    name = error.name or (error.__cause__.name if isinstance(error.__cause__, ImportError) else None) or ""
    if name.partition(".")[0] == "transformers":
        return f"it needs {name}, which transformers {version('transformers')} no longer has; take another task"
    return f"it needs a package that is not installed ({_one_line(error)}); install it where workers run"


def _is_path(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


@contextlib.contextmanager
def in_folder_of(task: str) -> Generator[None]:
    """A user's own task finds its data beside its YAML, wherever the worker was started."""
    if not _is_path(task):
        yield
        return
    if not Path(task).is_file():
        raise BadInput(f"lm_eval {task}: no such file on this worker; put it where every worker can read it")
    with contextlib.chdir(Path(task).parent):
        yield


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Without lm-evaluation-harness's and datasets' messages and bars; errors still come as exceptions."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(action="ignore"),
        ):
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def first_items(task: Task, limit: int | None) -> list[int]:
    """The numbers of the first `limit` items, or of all; of each length, where items say which they are for."""
    seen: defaultdict[Any, int] = defaultdict(int)
    picked: list[int] = []
    for number, item in enumerate(task.eval_docs):
        length: Any = item.get("max_length") if isinstance(item, Mapping) else None
        seen[length] += 1
        if limit is None or seen[length] <= limit:
            picked.append(number)
    return picked


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]

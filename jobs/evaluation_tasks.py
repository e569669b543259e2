"""Messages of an evaluation: the model that a worker keeps, a block of items, and the scores.

A block is one point's answers to some items of one set. Its file of scores is written once and is its receipt: the
blocks whose files are listed are done, in this run or in one that was killed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jobs.merge_tasks import DTYPE_BITS, Parent, Setting, TensorMerge
from jobs.specs import Scalar
from jobs.tokenizers import AddedToken

Kind = Literal["point", "parent"]
"""A model's part in its job. A checkpoint that is evaluated alone is a point; a night's blessed merge is a parent."""

Status = Literal["answered", "empty", "cut", "unended", "filtered", "failed"]
"""The end of one answer.

`cut`: it reached its limit of new tokens. `unended`: its thought did not end, so there is no answer. `filtered`: the
server withheld it. `failed`: the server refused the prompt for good. `empty`: it ended by itself without text.
`answered`: all others.
"""


@dataclass(frozen=True, slots=True)
class Generation:
    """The settings by which the items of a set are answered, beside their text.

    A thought ends with the text `end`, and takes at most `budget` tokens; nothing is thought if `end` is empty. It is
    `opened` where the prompt begins it, `found` where the chat template shows it and the job says nothing. `frame` is
    the text that the chat template puts before and after the last message; `turns` are the texts before and after an
    earlier answer, for tasks with a worked example. `system` and `template` are the system's message and the
    template's arguments. Above a `temperature` of 0, `samples` answers to each item are drawn by `seed`: from the
    `top_k` likeliest tokens, and of these from the fewest with a probability of `top_p` together.
    """

    end: str = ""
    budget: int = 0
    opened: bool = False
    found: bool = False
    frame: tuple[str, str] = ("", "")
    turns: tuple[str, str] = ("", "")
    system: str = ""
    template: tuple[tuple[str, Scalar], ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    samples: int = 1
    seed: int = 0

    @property
    def digested(self) -> dict[str, Any]:
        """The settings that decide answers and do not show in the text of a prompt; empty where all are the default."""
        drawn = [self.temperature, self.top_p, self.top_k, self.samples, self.seed]
        return {
            **({"thought": [self.end, self.budget, self.opened]} if self.end else {}),
            **({"sampling": drawn} if self.temperature else {}),
        }


PLAINLY = Generation()
"""Plain texts, greedy answers, no thought."""


@dataclass(frozen=True, slots=True)
class ItemSet:
    """The items of one benchmark task at one length, as they lie in the run's store.

    `digest` covers all inputs of the items, but not their number: more can be made later. `parts` are the files, each
    (first item, one after the last, key). `share` neighbours belong together (one haystack, or one round of depths) and
    are never parted. A task of lm-evaluation-harness, which makes its own items, is a single one of length 0. `tokens`
    is what one costs.
    """

    benchmark: str
    task: str
    length: int
    share: int
    digest: str
    parts: tuple[tuple[int, int, str], ...]
    tokens: int
    generation: Generation = PLAINLY


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The inputs of a worker for all points of a layout: parents' tensors, config, tokenizer files.

    `tokenizer` is (URL, {file: ETag}); `engine`, `url` and `options` as the job file gives them; `longest` is the
    longest context that will be asked, None where a benchmark does not say. `end_tokens` end an answer, beside those of
    the config and the tokenizer, as the point's generation_config.json says. `as_it_is` is a checkpoint that the engine
    reads itself: nothing is merged into it. `added_tokens` are those of the point that the files of the tokenizer lack.
    `activations` is the file of statistics for AIM, `grams` are the files of Gram matrices by model.
    """

    run: str
    tensors: tuple[TensorMerge, ...]
    parents: Mapping[str, Parent]
    seed: int
    numerics: str
    config: Mapping[str, Any]
    tokenizer: tuple[str, Mapping[str, str]]
    engine: str
    url: str | None
    options: Mapping[str, str | bool | int | float]
    longest: int | None
    threads: int
    end_tokens: tuple[int, ...] = ()
    as_it_is: Parent | None = None
    added_tokens: tuple[AddedToken, ...] = ()
    activations: Parent | None = None
    grams: Mapping[str, Parent] = field(default_factory=dict[str, Parent])

    @property
    def bytes(self) -> int:
        """Memory of a worker: every parent's tensors, and the point in the engine; a server elsewhere has its own."""
        if self.engine == "openai":
            return 0
        if self.as_it_is is not None:
            return sum(file.size for file in self.as_it_is.files)
        parents = sum(
            tensor.elements * DTYPE_BITS[source.dtype] // 8
            for tensor in self.tensors
            for source in tensor.sources.values()
        )
        return parents + sum(tensor.bytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class EvaluationTask:
    """Items `[first, last)` of one set, answered by one model; `repeat` > 0 asks again, to see how noisy answers are.

    `model` names the `ModelSpec` that holds the model, `digest` the merge, `key` the file of scores; `point` and `kind`
    are those of the rows.
    """

    model: str
    point: str
    digest: str
    settings: tuple[Setting, ...]
    items: ItemSet
    first: int
    last: int
    repeat: int
    key: str
    kind: Kind = "point"

    @property
    def name(self) -> str:
        """How errors call this block: its benchmark task, length, items and point."""
        items = f" at {self.items.length} tokens, items {self.first} to {self.last - 1}," if self.items.length else ""
        return f"{self.items.task}{items} of {self.point}"

    @property
    def tokens(self) -> int:
        """Context tokens of all its items: the cost of the task."""
        return self.items.tokens * (self.last - self.first)


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One item's result for one model. `score` lies in [0, 1]; `depth` is the first needle's, NaN where there is none.

    `point` is the name of a point or a parent, as `kind` says; "NAME (parent)" where a point has the parent's name.
    `recipe` is the merge's digest and `weights` that of the tensors that answered, so that no score can be taken for
    another point's; a server elsewhere shows no tensors, and `weights` names it. `items` is the digest of the set that
    `item` counts in: rows of two models are about the same question where `items`, `task` and `item` agree. `tokens`
    counts prompt and answer.
    `finite` is False, and the score 0, where a logit was NaN or infinite. `status` says how the answer ended.
    `thought` is the text that the model wrote before its answer, `tokens_thought` its tokens, `tokens_out` those of
    thought and answer. `sample` is the number of the answer where an item is answered several times. `weight` is that
    of the benchmark in the score; a worker leaves it at 1, as the job decides it.
    """

    point: str
    benchmark: str
    task: str
    length: int
    items: str
    item: int
    depth: float
    haystack: str
    pair: str
    answer: str
    score: float
    finite: bool
    tokens: int
    seconds: float
    recipe: str
    weights: str
    repeat: int
    kind: Kind = "point"
    status: Status = "answered"
    thought: str = ""
    tokens_thought: int = 0
    tokens_out: int = 0
    sample: int = 0
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class BlockScores:
    """The scores of one block, and remarks for the user that its worker made on the way, each one line."""

    rows: list[ScoreRow]
    remarks: tuple[str, ...] = ()

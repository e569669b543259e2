"""Every benchmark by its key in a job file, and all that the other rooms ask about it.

A new benchmark is a spec in `jobs.evaluate.SPECS` and a row here: no other file names a benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from jobs.evaluate import (
    BabilongSpec,
    BenchmarkSpec,
    CustomSpec,
    Evaluation,
    GuardsSpec,
    HelmetSpec,
    LmEvalSpec,
    LongbenchV2Spec,
    MrcrSpec,
    NeedleSpec,
    NolimaSpec,
    PerplexitySpec,
    RulerSpec,
    Several,
)
from workers.benchmarks.answering import Block, ItemScore, answer_items
from workers.benchmarks.babilong.items import TASKS as BABILONG_TASKS
from workers.benchmarks.babilong.planned import plan_babilong
from workers.benchmarks.custom import custom_files, plan_custom
from workers.benchmarks.harness.planned import answer_lm_eval, check_task_files, plan_guards, plan_lm_eval
from workers.benchmarks.helmet.planned import plan_helmet
from workers.benchmarks.items import read_answers
from workers.benchmarks.longbench_v2 import plan_longbench_v2
from workers.benchmarks.mrcr import plan_mrcr
from workers.benchmarks.needle import plan_needle
from workers.benchmarks.nolima import plan_nolima
from workers.benchmarks.perplexity import first_position, plan_perplexity, score_windows
from workers.benchmarks.planned import PlannedSet, Reader
from workers.benchmarks.ruler.planned import plan_ruler
from workers.benchmarks.ruler.tasks import TASKS
from workers.benchmarks.texts.tokenizer import Tokenizer
from workers.engines.engine import Engine

Spec = TypeVar("Spec", bound=BenchmarkSpec)


@dataclass(frozen=True, kw_only=True)
class Benchmark(Generic[Spec]):
    """One benchmark, whose job key has a spec of the class `Spec`."""

    title: str
    """Its name in a sentence."""
    plan: Callable[[Spec, Tokenizer, int, Reader, int], list[PlannedSet]]
    """(spec, tokenizer, seed, reader, least): its sets of items, each with at least `least` items if it grows."""
    answer: Callable[[Engine, Block], Iterator[ItemScore]]
    """Asks an engine a block of one set's items; yields at least one score for each item."""
    files: Callable[[Spec], Iterable[str | None]]
    """The paths and URLs of the texts that a spec names; `BadInput` for a path that only the user's machine has."""
    rank: int
    """Points are ranked by the asked benchmarks of the lowest rank; the others stand beside the score."""
    guard: bool = False
    """Whether it ranks no point, but rules out those that surely lose at it."""
    retrieval: bool = False
    """Whether a score is the success of one generated answer in a context of a known length.

    Such scores are shown by length, give the effective length, and are asked twice for the noise floor.
    """
    reaches: bool = True
    """Whether such scores give the effective length: not where models score far below 85 at every length."""
    tasks: tuple[str, ...] = ()
    """The tasks of the whole benchmark as published, where a job may ask fewer, or others in their place."""
    raced: Callable[[Spec], tuple[int, int] | None] | None = None
    """(items of each set, neighbours that stay together) in a race; None if points cannot be raced on it."""
    searched: str = ""
    """The key with which points are searched on its items, though they cannot be raced on them."""
    depths: Callable[[Spec], int] | None = None
    """The number of depths of a grid in which item i lies at depth i mod that number; None without a grid."""
    position: Callable[[str], int] | None = None
    """The first position (tokens) of the block that a row's task names, where a score is a likelihood of tokens.

    Such scores are shown as perplexity; None for all others.
    """
    expected: Callable[[bytes], Mapping[int, tuple[str, ...]]] | None = None
    """The right answers in one file of its items, by the number of the item; None where the file has none."""

    @property
    def is_likelihood(self) -> bool:
        """Whether its scores are likelihoods of tokens, to be shown as perplexity."""
        return self.position is not None


BENCHMARKS: dict[str, Benchmark[Any]] = {
    "ruler": Benchmark[RulerSpec](
        title="RULER",
        plan=plan_ruler,
        answer=answer_items,
        files=lambda spec: (spec.haystack, *spec.documents.values()),
        rank=0,
        retrieval=True,
        tasks=TASKS,
        raced=lambda spec: (spec.items, spec.questions),
        expected=read_answers,
    ),
    "needle": Benchmark[NeedleSpec](
        title="the needle",
        plan=plan_needle,
        answer=answer_items,
        files=lambda spec: () if spec.haystack == "noise" else (spec.haystack,),
        rank=0,
        retrieval=True,
        raced=lambda spec: (spec.items * spec.depths, spec.depths),
        depths=lambda spec: spec.depths,
        expected=read_answers,
    ),
    "babilong": Benchmark[BabilongSpec](
        title="BABILong",
        plan=plan_babilong,
        answer=answer_items,
        files=lambda spec: (spec.data, spec.haystack),
        rank=0,
        retrieval=True,
        tasks=BABILONG_TASKS,
        raced=lambda spec: None if spec.data else (spec.items, 1),
        expected=read_answers,
    ),
    "longbench_v2": Benchmark[LongbenchV2Spec](
        title="LongBench v2",
        plan=plan_longbench_v2,
        answer=answer_items,
        files=lambda spec: (spec.data,),
        rank=0,
        retrieval=True,
        reaches=False,
        expected=read_answers,
    ),
    "helmet": Benchmark[HelmetSpec](
        title="HELMET",
        plan=plan_helmet,
        answer=answer_items,
        files=lambda spec: (spec.data, *spec.examples.values()),
        rank=0,
        retrieval=True,
        reaches=False,
        raced=lambda spec: None if spec.data or spec.examples else (spec.items or 100, 1),
        expected=read_answers,
    ),
    "perplexity": Benchmark[PerplexitySpec](
        title="perplexity",
        plan=plan_perplexity,
        answer=score_windows,
        files=lambda spec: (spec.text,),
        rank=2,
        position=first_position,
    ),
    "lm_eval": Benchmark[LmEvalSpec](
        title="lm-evaluation-harness",
        plan=plan_lm_eval,
        answer=answer_lm_eval,
        files=check_task_files,
        rank=1,
        searched="metrics",
    ),
    "mrcr": Benchmark[MrcrSpec](
        title="MRCR",
        plan=plan_mrcr,
        answer=answer_items,
        files=lambda spec: (spec.data, spec.haystack),
        rank=0,
        retrieval=True,
        raced=lambda spec: None if spec.data else (spec.items, spec.questions),
        expected=read_answers,
    ),
    "nolima": Benchmark[NolimaSpec](
        title="NoLiMa",
        plan=plan_nolima,
        answer=answer_items,
        files=lambda spec: (spec.data, spec.haystack),
        rank=0,
        retrieval=True,
        raced=lambda spec: (spec.items * spec.depths, spec.depths),
        depths=lambda spec: spec.depths,
        expected=read_answers,
    ),
    "guards": Benchmark[GuardsSpec](
        title="the guards",
        plan=plan_guards,
        answer=answer_lm_eval,
        files=check_task_files,
        rank=3,
        guard=True,
    ),
    "custom": Benchmark[CustomSpec | Several](
        title="your own questions",
        plan=plan_custom,
        answer=answer_items,
        files=custom_files,
        rank=0,
        retrieval=True,
        expected=read_answers,
    ),
}
"""In the order in which they are planned, raced and preferred where one of several is needed."""


def planned_sets(
    evaluation: Evaluation,
    tokenizer: Tokenizer,
    seed: int,
    reader: Reader,
    least: Mapping[str, int] | None = None,
) -> list[PlannedSet]:
    """Every set of items that the job's benchmarks consist of; nothing is built yet.

    `least` items are made for a benchmark's sets even if fewer are asked of everyone: the rest are fresh ones, on which
    the winners of a race are confirmed. `BadInput` with file and line for impossible items.
    """
    return [
        planned
        for key, spec in asked_benchmarks(evaluation)
        for planned in BENCHMARKS[key].plan(spec, tokenizer, seed, reader, (least or {}).get(key, 0))
    ]


def asked_benchmarks(evaluation: Evaluation) -> list[tuple[str, BenchmarkSpec]]:
    """Key and spec of every benchmark that the job asks, in the order of `BENCHMARKS`."""
    return [(key, evaluation.benchmarks[key]) for key in BENCHMARKS if key in evaluation.benchmarks]

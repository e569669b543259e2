"""Everything that a report shows about a run, read from its folder once."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from jobs.errors import BadInput, ObjectMissing
from jobs.job import Job, load_job
from jobs.merge_tasks import Receipt
from orchestrator.evaluating.batches import PREFIX
from orchestrator.evaluating.results import EvaluationResult, read_results, read_verdict
from orchestrator.report.against_baseline import BaselineComparisons, compare_all
from orchestrator.report.leaderboard import Line, leaderboard
from orchestrator.report.recommendation import Recommendation, best_parent, recommend, rows_by_point
from orchestrator.report.searched import facts
from orchestrator.words import Collapses, shortlist
from workers.storage import Store, open_store
from workers.storage.records import read_receipt, read_record, read_sealed

PAGE = "report/index.html"
READS_AT_ONCE = 32
MOST_RECEIPTS = 5_000


@dataclass(frozen=True)
class Run:
    """The contents of a run, read once: all that a page or a table needs.

    `job` is None where another version of mergeyard wrote it; `gate` where the run has no verdict.
    """

    url: str
    result: EvaluationResult
    job: Job | None
    job_text: str
    plan: Mapping[str, Any]
    gate: Mapping[str, Any] | None
    receipts: tuple[Receipt, ...]
    written: tuple[str, ...]
    asked: tuple[tuple[int, str, str], ...] = ()
    """Of a search: (batch, point, reason) in the order of asking; empty of a grid."""

    @property
    def name(self) -> str:
        """The run's."""
        return str(self.plan.get("job", self.url.rsplit("/", 1)[-1]))


def read_run(url: str, result: EvaluationResult | None = None, *, costs: bool = True) -> Run:
    """Reads a run; `BadInput` where nothing was evaluated. Without `costs` neither receipts nor points are listed."""
    result = result or read_results(url)
    store = open_store(url)
    text = _text(store, "job.yaml")
    try:
        job = load_job(text, "job.yaml")
    except BadInput:
        job = None
    gate = read_verdict(store)
    plan = _plan(store)
    receipts = _receipts(store) if costs else ()
    written = (
        tuple(sorted({info.key.split("/")[1] for info in store.list("points/") if info.key.endswith("/manifest.json")}))
        if costs
        else ()
    )
    return Run(url, result, job, text, plan, gate, receipts, written, _asked(store))


def _text(store: Store, key: str) -> str:
    try:
        return read_sealed(store, key).decode(errors="replace")
    except ObjectMissing:
        return ""


def _asked(store: Store) -> tuple[tuple[int, str, str], ...]:
    batches = [read_record(store, info.key) for info in store.list(PREFIX)]
    return tuple(
        (batch["number"], proposal["name"], proposal["reason"])
        for batch in sorted(batches, key=lambda batch: batch["number"])
        for proposal in batch["proposals"]
    )


def _plan(store: Store) -> dict[str, Any]:
    try:
        return read_record(store, "plan.json")
    except ObjectMissing:
        return {}


def _receipts(store: Store) -> tuple[Receipt, ...]:
    keys = [info.key for info in store.list("receipts/")][:MOST_RECEIPTS]
    with ThreadPoolExecutor(READS_AT_ONCE, "receipts") as pool:
        return tuple(pool.map(partial(read_receipt, store), keys))


@dataclass(frozen=True)
class Report:
    """The leaderboard of a run, its comparisons and the recommendation.

    While the evaluation goes on there are no comparisons: their p values hold for a fixed number of items.
    """

    run: Run
    lines: list[Line]
    baseline: str | None
    comparisons: BaselineComparisons | None
    recommendation: Recommendation | None

    @property
    def remarks(self) -> tuple[str, ...]:
        """Remarks that workers made while they answered and merged, one line each."""
        broken = sorted({name for receipt in self.run.receipts for name in receipt.nonfinite})
        merged = (f"NaN or infinity in a parent's {shortlist(broken)}",) if broken else ()
        return tuple(dict.fromkeys((*self.run.result.remarks, *merged, *self._overflowed(), *self._collapses())))

    def _overflowed(self) -> tuple[str, ...]:
        """Merges whose weights overflowed."""
        counted = {receipt.point: sum(receipt.overflowed.values()) for receipt in self.run.receipts}
        broken = sorted(point for point, elements in counted.items() if elements)
        return (f"NaN or infinity in the weights of {shortlist(broken)}, in no parent",) if broken else ()

    def _collapses(self) -> tuple[str, ...]:
        """Merges that are not."""
        collapses = Collapses()
        for receipt in self.run.receipts:
            collapses.add(receipt)
        return collapses.lines()

    @property
    def searched(self) -> list[str]:
        """The facts of a search that has ended, one sentence each."""
        found = self.run.result.search
        return [] if found is None else facts(found, self.run.gate)

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        compared = {} if self.comparisons is None else self.comparisons.overall
        return {
            "run": self.run.url,
            "page": f"{self.run.url}/{PAGE}",
            "finished": self.run.result.finished,
            "verdict": None if self.recommendation is None else self.recommendation.document(),
            "leaderboard": [line.document() for line in self.lines],
            "baseline": self.baseline,
            "comparisons": [comparison.document() for comparison in compared.values()],
            "gate": self.run.gate,
            "remarks": list(self.remarks),
            **({} if self.run.result.search is None else {"search": self.run.result.search.document()}),
            **self.run.result.race_document(),
        }


def report_on(run: Run, lines: list[Line] | None = None) -> Report:
    """The report of a run."""
    result = run.result
    lines = lines or leaderboard(result)
    rows = rows_by_point(result.ranked_rows())
    points = [line.name for line in lines if line.name not in result.baselines]
    parent = best_parent(result, lines)
    baseline = _gate_baseline(run, rows) or parent
    comparisons = None if baseline is None or not result.finished else compare_all(rows, points, baseline)
    against_parent = None if comparisons is None or baseline != parent else comparisons.overall
    return Report(run, lines, baseline, comparisons, recommend(result, lines, run.gate, against_parent))


def _gate_baseline(run: Run, rows: Mapping[str, Any]) -> str | None:
    """The label of the gate's baseline."""
    if run.job is None or run.job.gate is None:
        return None
    known = {**run.result.scored_points, **run.result.parents}
    label = known.get(run.job.gate.baseline)
    return label if label in rows else None

"""A whole run on one screen: plan it, merge the units without a receipt, complete each point, stop when all are.

Nothing is kept between two calls: the store lists the finished work, so running again is resuming.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from sys import intern

from jobs.errors import NotFinite, writing
from jobs.manifest import Manifest
from jobs.merge_tasks import Receipt
from orchestrator.cluster.pool import Pool
from orchestrator.merging.gathering import Gatherer
from orchestrator.planning.plan import Plan, PlannedPoint
from orchestrator.records.lease import Lease
from orchestrator.records.ledger import Ledger
from orchestrator.watching import Watcher
from orchestrator.words import Collapses
from workers.checkpoints.dtypes import TORCH_NAMES

RANGES = ("F16", "BF16", "F32", "F64")
"""The dtypes by their largest number."""


@dataclass(frozen=True, slots=True)
class WrittenPoint:
    """The fields of a manifest that the driver keeps in memory; a whole one takes tens of megabytes."""

    digest: str
    weights: str
    tensors: int
    same_as: str | None

    @classmethod
    def of(cls, manifest: Manifest) -> WrittenPoint:
        """The fields of this manifest."""
        return cls(manifest.digest, manifest.weights, len(manifest.tensors), manifest.same_as)


@dataclass(frozen=True, slots=True)
class RunResult:
    """The result of a run: its points, and the work of this call."""

    url: str
    points: dict[str, WrittenPoint]
    units_merged: int
    units_found: int
    bytes_read: int
    nonfinite: tuple[str, ...]
    overflowed: Mapping[str, Mapping[str, int]]
    collapses: tuple[str, ...]
    remedy: str

    def check_finite(self) -> None:
        """`NotFinite` if a merge of finite numbers has NaN or infinity in it."""
        for point, tensors in self.overflowed.items():
            name = max(tensors, key=lambda tensor: tensors[tensor])
            others = f" (and {len(tensors) - 1} more tensors)" if len(tensors) > 1 else ""
            points = f" and {len(self.overflowed) - 1} more points" if len(self.overflowed) > 1 else ""
            raise NotFinite(
                f"{self.url}: of {point}{points}, {sum(tensors.values()):,} numbers are NaN or infinite that are finite"
                f" in the parents, in tensor {name}{others}; {self.remedy}, and merge into another folder"
            )


def drive(plan: Plan, pool: Pool, watcher: Watcher) -> RunResult:
    """Merges every kept point of the plan and returns when each has its manifest; raises errors that no retry mends."""
    ledger = Ledger(plan.run_url, plan.places)
    for remark in plan.remarks:
        watcher.tell(remark)
    with Lease(ledger.store, plan.places.record("lease.json"), watcher.facts) as lease:
        ledger.claim(plan.job_text(), plan.document())
        with writing():
            ledger.store.sweep()
            found = ledger.trusted(plan.units)
            tasks = plan.tasks(found.keys(), pool.workers)
            watcher.begin(len(plan.written), sum(task.bytes_written for task in tasks))
            points = _Points(plan, ledger, watcher)
            points.record(found.values())
            for receipts in pool.run(tasks, watcher):
                lease.check()
                points.record(receipts)
            return points.result(len(found), sum(task.bytes_read for task in tasks))


class _Points:
    """Which units of which points are done; completes each point as its last unit comes in."""

    def __init__(self, plan: Plan, ledger: Ledger, watcher: Watcher) -> None:
        self._plan = plan
        self._gatherer = Gatherer(plan, ledger.store)
        self._watcher = watcher
        self._receipts: dict[str, Receipt] = {}
        self._recorded = 0
        self._nonfinite: set[str] = set()
        self._overflowed: dict[str, Counter[str]] = defaultdict(Counter)
        self._collapses = Collapses()
        self._merges = {planned.name: planned for planned in plan.written if planned.same_as is None}
        self._missing = {name: set(planned.units) for name, planned in self._merges.items()}
        self._twins: dict[str, list[PlannedPoint]] = defaultdict(list)
        for planned in plan.written:
            if planned.same_as is not None:
                self._twins[planned.same_as].append(planned)
        self._written: dict[str, WrittenPoint] = {}

    def record(self, receipts: Iterable[Receipt]) -> None:
        """Takes note of finished units."""
        for receipt in receipts:
            missing = self._missing[receipt.point]
            if receipt.unit not in missing:
                continue
            missing.remove(receipt.unit)
            self._receipts[receipt.unit] = _with_shared_names(receipt)
            self._recorded += 1
            self._nonfinite.update(receipt.nonfinite)
            if receipt.overflowed:
                self._overflowed[receipt.point].update(receipt.overflowed)
            self._collapses.add(receipt)
            if not missing:
                self._complete(self._merges[receipt.point])

    def _complete(self, planned: PlannedPoint) -> None:
        """Publishes a point and those that are the same merge."""
        manifest = self._gatherer.complete(planned, self._receipts)
        self._note(manifest)
        for twin in self._twins[planned.name]:
            self._note(self._gatherer.complete_twin(twin, manifest))
        for unit in planned.units:
            del self._receipts[unit]

    def _note(self, manifest: Manifest) -> None:
        self._written[manifest.point] = WrittenPoint.of(manifest)
        self._watcher.point_done(manifest.point)

    def result(self, units_found: int, bytes_read: int) -> RunResult:
        """Every point of the plan, in its order."""
        return RunResult(
            url=self._plan.run_url,
            points={planned.name: self._written[planned.name] for planned in self._plan.written},
            units_merged=self._recorded - units_found,
            units_found=units_found,
            bytes_read=bytes_read,
            nonfinite=tuple(sorted(self._nonfinite)),
            overflowed=self._overflowed,
            collapses=self._collapses.lines(),
            remedy=self._remedy(),
        )

    def _remedy(self) -> str:
        """How a merge of the same parents overflows no longer: in a dtype of their range, or with smaller weights."""
        for name, names in self._overflowed.items():
            planned = self._merges[name]
            recipe = planned.point.recipe
            output = "dtype" if recipe.out_dtype is None else "out_dtype"
            for tensor in (tensor for shard in planned.layout.shards for tensor in shard.tensors):
                if tensor.name not in names:
                    continue
                narrow = {output: tensor.dtype, **({"dtype": tensor.arithmetic} if tensor.arithmetic == "F16" else {})}
                if keys := [key for key in ("dtype", "out_dtype") if narrow.get(key) == "F16"]:
                    return f"give {' and '.join(f'`{key}: bfloat16`' for key in keys)}"
                widest = max((at.dtype for at in tensor.sources.values()), key=RANGES.index)
                if RANGES.index(widest) > RANGES.index(tensor.dtype):
                    return f"give `{output}: {TORCH_NAMES[widest]}` or smaller weights"
        return "give smaller weights"


def _with_shared_names(receipt: Receipt) -> Receipt:
    """The same receipt; of a large grid, each tensor's name would else be in memory once a point."""
    return replace(receipt, tensors={intern(name): digest for name, digest in receipt.tensors.items()})

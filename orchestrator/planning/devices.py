"""The device that merges written points faster: an estimate from bytes and rates, without looking at a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.job import WorkerSpec
from jobs.merge_tasks import MergeTask

READ_RATE, WRITE_RATE = 1.0e9, 0.5e9
"""Bytes a second that one worker is assumed to read and to write, for the estimate of time alone."""

BUS_RATE = 50e9
"""Bytes a second between pinned memory and a GPU, of PCIe 5: not measured by us."""

CPU_RATE = 1.0e9
"""Bytes of parents that one CPU merges a second, as ties and slerp of the table in `tests/benchmarks/README.md`."""

CPU_RATES = {
    **dict.fromkeys(("linear", "task_arithmetic"), 2.0e9),
    **dict.fromkeys(("dare_linear", "dare_ties", "della", "della_linear"), 0.6e9),
    "regmean": 0.03e9,
}
"""The same by method, where it differs much. That of regmean is reckoned: 25 GFLOP/s, two models, 1,536 channels."""


@dataclass(frozen=True, slots=True)
class Merging:
    """Seconds of one worker for all points that are written, and bytes of parents that its CPUs merge a second."""

    storage: float
    cpus: float
    gpu: float
    rate: float

    @property
    def gpu_is_faster(self) -> bool:
        """Whether a GPU saves a tenth of the time or more."""
        return max(self.storage, self.gpu) <= 0.9 * max(self.storage, self.cpus)


def merging(tasks: Sequence[MergeTask], workers: WorkerSpec) -> Merging | None:
    """The estimate for some tasks; None where nothing is to be merged. Reading, computing and writing overlap."""
    read, written = sum(task.bytes_read for task in tasks), sum(task.bytes_written for task in tasks)
    if not read:
        return None
    merged, seconds = 0, 0.0
    for task in tasks:
        for point in task.points:
            slowest = min(CPU_RATES.get(setting.method, CPU_RATE) for setting in point.settings)
            merged += task.bytes_read
            seconds += task.bytes_read / slowest / max(1, int(workers.cpus))
    storage = max(read / READ_RATE, written / WRITE_RATE)
    return Merging(storage, seconds, max(read, written) / BUS_RATE, merged / seconds)

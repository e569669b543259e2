"""The resources of this machine, at most those of a Ray started here, without starting one."""

from __future__ import annotations

import os
from pathlib import Path

from jobs.job import WorkerSpec

NVIDIA = Path("/proc/driver/nvidia/gpus")
"""A folder per NVIDIA GPU, as the driver lists them; absent without the driver."""


def lacking(spec: WorkerSpec) -> str | None:
    """The first resource of a worker that this machine cannot have, in words; None if it may have all of them.

    A machine without any GPU computes on its CPUs, whatever `gpus` says.
    """
    cpus, memory = os.cpu_count() or 1, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpus = len(list(NVIDIA.iterdir())) if NVIDIA.is_dir() else 0
    if spec.cpus > cpus:
        return f"a worker takes {spec.cpus:g} CPUs and this machine has {cpus}"
    if gpus and spec.gpus > gpus:
        return f"a worker takes {spec.gpus:g} GPUs and this machine has {gpus}"
    if spec.memory_bytes > memory:
        return f"a worker takes {spec.memory_bytes / 1e9:.1f} GB and this machine has {memory / 1e9:.1f} GB"
    return None

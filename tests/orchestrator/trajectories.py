"""A training run of tiny checkpoints, and jobs over its windows."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.orchestrator.models import weights, write_model

WINDOWS = """
  merge_method: linear
  models:
  - model: step[-${k}:]
    parameters: {weight: "${shape}"}
"""


def write_run(folder: Path, count: int) -> None:
    """The folders `step-1` … `step-N`: float32 weights on a walk of random updates."""
    base = weights("base", dtype=torch.float32)
    tensors = dict(base)
    for number in range(1, count + 1):
        step = weights(f"step {number}", dtype=torch.float32)
        tensors = {name: tensor + step[name] - base[name] for name, tensor in tensors.items()}
        write_model(folder / f"step-{number}", tensors)


def trajectory_job(url: str, count: int, output: str, *, grid: str, recipe: str = WINDOWS, more: str = "") -> str:
    """The YAML of a job over the run at `url`."""
    parents = f"parents: {{step: {{url: '{url}/step-{{n}}', n: {{from: 1, to: {count}, step: 1}}}}}}"
    return f"name: windows\n{parents}\nrecipe:{recipe}grid: {grid}\noutput: {output}\n{more}"

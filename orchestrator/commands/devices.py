"""The device that computes in this process."""

from __future__ import annotations

import ctypes
from pathlib import Path

from jobs.errors import BadInput


def best_device() -> str:
    """`cuda` if this machine has a GPU that torch can use, else `cpu`.

    torch takes seconds to load, so that it is asked only where there is a driver.
    """
    if not has_driver():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def named_device(name: str) -> str:
    """The device of that name; `auto` is the GPU if this machine has one, as in mergekit."""
    if name == "cpu":
        return name
    if name == "auto":
        return best_device()
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(
            f"--device {name}: this machine does not have it ({reason}); leave it out to compute on the CPU"
        ) from None
    return name


def has_driver() -> bool:
    """Whether this machine has CUDA's library or ROCm's device."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Path("/dev/kfd").exists()
    return True

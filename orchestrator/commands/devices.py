"""The device that computes in this process."""

from __future__ import annotations

import ctypes
from pathlib import Path


def best_device() -> str:
    """`cuda` if this machine has a GPU that torch can use, else `cpu`.

    torch takes seconds to load, so that it is asked only where there is a driver.
    """
    if not has_driver():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def has_driver() -> bool:
    """Whether this machine has CUDA's library or ROCm's device."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Path("/dev/kfd").exists()
    return True

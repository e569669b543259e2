"""Triton, where it is installed: with torch's builds for GPUs. Where it is not, kernels are plain functions.

The environment variable TRITON_INTERPRET=1 runs kernels on CPU tensors, by Triton's interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

triton: Any = None
tl: Any = None
"""Triton's language; a kernel finds it in its own module."""

if TYPE_CHECKING:
    Pointer = Any
    """In a kernel: an address, or a number or a block of numbers."""
    constexpr = Any
    """In a kernel: an argument that is known when the kernel is compiled. Triton looks for this word."""
else:
    Pointer = constexpr = Any
    try:
        import triton
        import triton.language as tl
    except ImportError:
        pass
    else:
        Pointer, constexpr = tl.tensor, tl.constexpr  # kernels may name no others


def jit(function: Callable[..., Any]) -> Any:
    """Triton's compiler for a function."""
    return function if triton is None else triton.jit(function)


def constant(value: int) -> Any:
    """A global number that kernels may read."""
    return value if tl is None else tl.constexpr(value)


def interprets() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return tl is not None and os.environ.get("TRITON_INTERPRET") == "1"

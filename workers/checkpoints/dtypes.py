"""The dtypes by their names in safetensors, in config.json, in numpy and in torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a safetensors dtype name; those that numpy lacks are of `ml_dtypes`."""
    import ml_dtypes  # noqa: F401  # pyright: ignore[reportUnusedImport]  # numpy then finds its dtypes by name

    return np.dtype(TORCH_NAMES[name])


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name."""
    import torch

    return getattr(torch, TORCH_NAMES[name])


def nonfinite(elements: NDArray[Any]) -> NDArray[np.bool_]:
    """Which elements of a dtype of `FLOATS` are NaN or infinite. Several times faster than `numpy.isfinite`."""
    magnitudes, infinity = _magnitudes(elements)
    return magnitudes >= infinity


def any_nonfinite(elements: NDArray[Any]) -> bool:
    """Whether an element of a dtype of `FLOATS` is NaN or infinite."""
    magnitudes, infinity = _magnitudes(elements)
    return bool(magnitudes.size and magnitudes.max() >= infinity)


def _magnitudes(elements: NDArray[Any]) -> tuple[NDArray[Any], Any]:
    """The bits of |elements|, and those of infinity: NaN has more, every number fewer."""
    bits = np.dtype(f"u{elements.itemsize}")
    sign = bits.type(1 << (8 * elements.itemsize - 1))
    return elements.view(bits) & ~sign, np.array(np.inf, elements.dtype).view(bits)[()]


FLOATS = ("F64", "F32", "F16", "BF16")
TORCH_NAMES: Mapping[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "U64": "uint64",
    "I32": "int32", "U32": "uint32", "I16": "int16", "U16": "uint16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
"""numpy with `ml_dtypes` and torch call them the same."""

DTYPE_NAMES: Mapping[str, str] = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

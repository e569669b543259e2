"""Weights in FP8 with scales beside them, read as the numbers that they stand for.

Sources: `Fp8Dequantize` of transformers (`weight_scale_inv` for each block, as DeepSeek-V3 and Qwen3-FP8 have them),
and the formats of fbgemm, of compressed-tensors and of ModelOpt (`weight_scale` for a tensor, a row or a block). All of
them multiply. Scales of activations and of the KV cache are no part of the weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from jobs.merge_tasks import Derived, Scaled, Source
from workers.checkpoints.configs import QUANTISATION, is_section, sections, text_fields
from workers.checkpoints.dtypes import DTYPE_NAMES, FLOATS

FP8_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")
"""Values of `quant_method` under which weights may be plain FP8."""

SCALES = (*FLOATS, "F8_E8M0")
"""Dtypes of scales; the last one holds powers of two, as DeepSeek's `ue8m0`."""

OF_ACTIVATIONS = re.compile(r"\.(input|output|activation|[kqv]+)_scale(_ub)?$")
"""Scales of activations and of the KV cache."""


def is_fp8(config: Mapping[str, Any]) -> bool:
    """Whether the config states a method of `FP8_METHODS`; rotated weights are none."""
    stated = [fields[key] for _, fields in sections(config) for key in QUANTISATION if fields.get(key)]
    return bool(stated) and all(
        isinstance(entry, Mapping) and entry.get("quant_method") in FP8_METHODS and not entry.get("transform_config")
        for entry in stated
    )


def of_modelopt(stated: Any) -> dict[str, Any]:
    """The `quantization_config` that ModelOpt's hf_quant_config.json stands for; empty unless its weights are FP8."""
    match stated:
        case {"quantization": {"quant_algo": str(algorithm)}} if algorithm.startswith("FP8"):
            return {"quant_method": "modelopt", "quant_algo": algorithm}
        case _:
            return {}


def dequantised(
    tensors: Mapping[str, Source], shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], name: str
) -> Mapping[str, Source]:
    """The tensors of the parent `name` with FP8 weights times their scales, in the dtype of the config, else bfloat16.

    A weight without a scale that fits stays as it is, and so do scales without a weight.
    """
    dtype = DTYPE_NAMES.get(str(text_fields(config).get("dtype") or text_fields(config).get("torch_dtype")), "BF16")
    found: dict[str, Source] = {}
    used: set[str] = set()
    for weight, at in tensors.items():
        scale = next((key for key in (f"{weight}_scale_inv", f"{weight}_scale") if key in tensors), None)
        if not at.dtype.startswith("F8") or scale is None or tensors[scale].dtype not in SCALES:
            continue
        rule = _rule(shapes[weight], shapes[scale], _block(config))
        if rule is not None:
            found[weight] = Derived(dtype, shapes[weight], rule, ((name, at), (name, tensors[scale])))
            used.add(scale)
    return {
        key: found.get(key, at)
        for key, at in tensors.items()
        if key not in used and not (found and OF_ACTIVATIONS.search(key))
    }


def _block(config: Mapping[str, Any]) -> tuple[int, int]:
    """The stated size of a block; (0, 0) if none is stated."""
    for _, fields in sections(config):
        match fields.get("quantization_config"):
            case {"weight_block_size": [int(rows), int(columns)]} if rows > 0 and columns > 0:
                return rows, columns
            case _:
                pass
    return 0, 0


def _rule(shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int]) -> Scaled | None:
    """How the scales lie over the weight; None if they do not fit it."""
    if len(shape) < 2 or 0 in shape:
        return None
    *above, rows, columns = shape
    planes = math.prod(above)
    if math.prod(scales) == 1:
        return Scaled((1, 1, 1), (rows, columns))
    if not above and scales in ((rows,), (rows, 1)):
        return Scaled((1, rows, 1), (1, columns))
    if len(scales) != len(shape) or list(scales[:-2]) != above:
        return None
    height, width = _extent(rows, scales[-2], block[0]), _extent(columns, scales[-1], block[1])
    return Scaled((planes, scales[-2], scales[-1]), (height, width)) if height and width else None


def _extent(length: int, count: int, stated: int) -> int | None:
    """The length of a block: the last one may be shorter if the config states the length, as in DeepSeek's kernel."""
    if stated and -(-length // stated) == count:
        return stated
    return length // count if count and length % count == 0 else None


def unquantised(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without a word on quantisation, in every section."""
    return {
        key: unquantised(value) if is_section(key, value) else value
        for key, value in config.items()
        if key not in QUANTISATION
    }

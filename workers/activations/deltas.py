"""Gram matrices of a model's differences from its base, which need no texts: C = τᵀτ / ‖τ‖² of each weight matrix.

They stand for the Gram matrices of the inputs: gradient steps add multiples of inputs to the rows of a linear layer, so
that the rows of τ lie in the space of its inputs (WUDI-Merging: Cheng et al. 2025, arXiv 2503.08099, where the
interference ‖(τ − τᵢ)τᵢᵀ‖² / ‖τᵢ‖² is minimised by gradient steps; here regmean solves the same sum of squares).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from jobs.errors import BadInput
from jobs.merge_tasks import ParentTensor
from workers.checkpoints.canonical import is_embedding, is_head
from workers.checkpoints.configs import completed, text_fields
from workers.checkpoints.dtypes import TORCH_NAMES, numpy_dtype
from workers.checkpoints.opening import Checkpoint
from workers.methods.kernels.dense import add_product
from workers.storage import open_store


def delta_grams(
    model: Checkpoint, base: Checkpoint, most: int
) -> Iterator[tuple[tuple[str, ...], NDArray[np.float32]]]:
    """C of each matrix that both have, but the embeddings and the head, by name; blocks as of `measure_grams`.

    A matrix that does not differ has zeros. The sums are in float64 and have one order, so that the bytes depend on
    neither the machine nor its threads. `BadInput` for a matrix of two shapes, or one that is not stored as numbers.
    """
    hidden = text_fields(completed(model.config)).get("hidden_size")
    for name, shape in sorted(model.shapes.items()):
        if not has_delta(name, shape) or name not in base.tensors:
            continue
        if base.shapes[name] != shape:
            raise BadInput(
                f"{model.url}: {name} is {list(shape)}, and {list(base.shapes[name])} in {base.url}; give as --base the"
                " checkpoint that this model was trained from"
            )
        delta = _values(model, name) - _values(base, name)
        square = float(np.sum(delta * delta))
        if not math.isfinite(square):
            raise BadInput(f"{model.url}: {name} or its base has NaN or infinite elements; give other checkpoints")
        blocks = 1 if isinstance(hidden, int) and shape[1] <= hidden else -(-shape[1] // most)
        size = -(-shape[1] // blocks)
        sums = np.zeros((blocks, size, size))
        for number, block in enumerate(sums):
            part = np.ascontiguousarray(delta[:, number * size : (number + 1) * size])
            width = part.shape[1]
            add_product(np.ascontiguousarray(part.T), part, block[:width, :width])
        yield (name,), (sums / (square or 1.0)).astype(np.float32)


def has_delta(name: str, shape: tuple[int, ...]) -> bool:
    """Whether `delta_grams` is about such a tensor: a matrix that is neither of the embeddings nor the head."""
    return len(shape) == 2 and not is_embedding(name) and not is_head(name, {})


def _values(checkpoint: Checkpoint, name: str) -> NDArray[np.float64]:
    at = checkpoint.tensors[name]
    if not isinstance(at, ParentTensor) or at.dtype not in TORCH_NAMES:
        raise BadInput(f"{checkpoint.url}: {name} is quantised or derived; give a checkpoint in bfloat16 or float32")
    file = checkpoint.files[at.file]
    data = open_store(checkpoint.url).read(file.key, start=at.start, length=at.end - at.start, etag=file.etag)
    return np.frombuffer(memoryview(data), numpy_dtype(at.dtype)).astype(np.float64).reshape(checkpoint.shapes[name])

"""The common part of the methods that solve a least-squares problem for the rows of a weight matrix.

The merge W of weights Wᵢ (out × in) minimises Σ wᵢ‖(W − Wᵢ)Xᵢᵀ‖² for inputs Xᵢ (tokens × in): W = Σ Wᵢ·Mᵢ with
Mᵢ = wᵢGᵢ(Σ wⱼGⱼ)⁻¹ and Gᵢ = XᵢᵀXᵢ (Jin et al. 2023, arXiv 2212.09849). Each row of W depends on the same rows of the
Wᵢ alone, so that a tensor is merged piece by piece once the Mᵢ are known.

Gram matrices are blocks × size × size: the input channels, cut into parts of `size` with zeros behind the last, are
taken as uncorrelated between the parts. One block is the whole matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from workers.methods.kernels.dense import add_product, solved
from workers.methods.passes import MatrixSum
from workers.methods.tile import Array, Inputs, Tile, as_tensor, torch_named

if TYPE_CHECKING:
    from torch import Tensor

MOST_CORRELATED = 1 - 1e-6
"""The largest factor of off-diagonal elements: with 1, fewer tokens than channels leave a singular sum."""


def mixing(grams: Sequence[Array], weights: Sequence[float], alpha: float) -> list[NDArray[np.float64]]:
    """Mᵢ of each model: blocks × size × size in float64, from Gram matrices whose off-diagonals count `alpha` times.

    A channel that has no inputs in any model gets the weighted mean: Mᵢ = wᵢ/Σwⱼ there.
    """
    factor = min(alpha, MOST_CORRELATED)
    matrices = [np.empty(each.shape) for each in grams]
    for block in range(len(grams[0])):
        parts = [each[block].astype(np.float64) for each in grams]
        unseen = sum(np.diagonal(part) * weight for part, weight in zip(parts, weights, strict=True)) <= 0
        for part, weight in zip(parts, weights, strict=True):
            diagonal = np.where(unseen, 1.0, np.diagonal(part))
            part *= factor
            np.fill_diagonal(part, diagonal)
            part *= weight
        total = np.sum(parts, axis=0)
        for part, matrix in zip(parts, matrices, strict=True):
            matrix[block] = solved(total, part).T
    return matrices


def rows_of(tile: Tile) -> tuple[int, int]:
    """(first element, one after the last) of the rows of which a tile has a part."""
    return tile.start // tile.row * tile.row, -(-(tile.start + tile.elements) // tile.row) * tile.row


def matrix_sum(inputs: Inputs, each: MatrixSum) -> Tensor:
    """The definition of the pass; on a GPU, the products are those of torch, whose sums have another order."""
    import torch

    tile = inputs.tile
    first, end = rows_of(tile)
    dtype = inputs.dtype if inputs.dtype == "float64" else "float32"
    rows = {
        name: as_tensor(tile.around[name][first - tile.around_start : end - tile.around_start])
        .to(torch_named(dtype))
        .view(-1, tile.row)
        for name in (*each.models, each.base)
    }
    base = rows[each.base]
    deltas = [rows[model] - base for model in each.models]
    if base.device.type == "cpu":
        merged = torch.from_numpy(summed(base.numpy(), [delta.numpy() for delta in deltas], each.matrices))
    else:
        merged = base.clone()
        for delta, matrix in zip(deltas, each.matrices, strict=True):
            blocks = torch.from_numpy(matrix).to(base.device, base.dtype)
            for block, part in zip(blocks, delta.split(blocks.shape[-1], dim=1), strict=True):
                at = int(part.storage_offset() - delta.storage_offset())
                merged[:, at : at + part.shape[1]] += part @ block[: part.shape[1], : part.shape[1]]
    inside = slice(tile.start - first, tile.start - first + tile.elements)
    return merged.view(-1)[inside].to(torch_named(inputs.dtype))


def summed(base: Array, deltas: Sequence[Array], matrices: Sequence[Array]) -> NDArray[Any]:
    """base + Σ δᵢ·Mᵢ for some rows, float32 or float64, in the memory of the host."""
    steps = np.zeros_like(base)
    for delta, blocks in zip(deltas, matrices, strict=True):
        size = blocks.shape[-1]
        for number, block in enumerate(blocks):
            part = slice(number * size, min((number + 1) * size, base.shape[1]))
            width = part.stop - part.start
            add_product(delta[:, part], block[:width, :width], steps[:, part])
    return base + steps

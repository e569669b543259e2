"""The nearest matrix of low rank, as the product of two narrow matrices.

The theorem of Eckart and Young: it keeps the largest singular values, and its error is the root of the sum of the
squares of the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

NOISE = 2.0**-23
"""Singular values below this share of the largest are float32's rounding, and not kept."""

ROWS_AT_ONCE = 4096
"""Rows that are in float64 at one time."""


def low_rank(change: Tensor, most: int, epsilon: float, *, distribute: bool) -> tuple[Tensor, Tensor]:
    """B (rows × rank) and A (rank × columns) in float64, with B·A the nearest to `change` (rows × columns).

    The rank is at most `most`; singular values of at most `epsilon` are not kept. `distribute` gives both factors the
    root of each singular value; else A has all of it. The element of each row of A with the largest magnitude is
    positive, as the sign of a pair of singular vectors is free. The vectors are those of the smaller Gram matrix in
    float64: squared, values below 10⁻⁸ of the largest would be lost, and `NOISE` is above that.
    """
    import torch

    tall = change.shape[0] > change.shape[1]
    values, vectors = _largest(_gram(change, tall=tall), most)
    singular = values.clamp(min=0).sqrt()
    rank = int((singular > max(epsilon, NOISE * float(singular[0]))).sum())
    short = vectors[:, :rank]
    long = _times(change, short) if tall else _times(change.T, short)
    lengths = torch.linalg.vector_norm(long, dim=0)  # the singular values
    left, right = (long / lengths, short) if tall else (short, long / lengths)
    if rank:
        largest = right.abs().argmax(dim=0, keepdim=True)
        signs = right.gather(0, largest).sign()
        left, right = left * signs, right * signs
    root = lengths.sqrt()
    scale_b, scale_a = (root, root) if distribute else (torch.ones_like(root), lengths)
    return left * scale_b, (right * scale_a).T


def squares(matrix: Tensor, b: Tensor | None = None, a: Tensor | None = None) -> float:
    """The squared Frobenius norm of a tensor, or of `matrix` − B·A, summed in float64."""
    total = 0.0
    for start in range(0, len(matrix), ROWS_AT_ONCE):
        rows = matrix[start : start + ROWS_AT_ONCE].double()
        if a is not None and b is not None:
            rows = rows - b[start : start + ROWS_AT_ONCE].double() @ a.double()
        total += float((rows * rows).sum())
    return total


def _largest(gram: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues, at most so many from the largest down, and their eigenvectors as columns.

    On a CPU, the reduction to tridiagonal form and a few vectors take a quarter of the time of all vectors.
    """
    import torch

    if gram.is_cuda:
        values, vectors = torch.linalg.eigh(gram)
    else:
        from scipy.linalg import eigh

        size = len(gram)
        found: Any = eigh(gram.numpy(), subset_by_index=(max(0, size - most), size - 1))
        values, vectors = (torch.from_numpy(each) for each in found)
    return values.flip(0)[:most], vectors.flip(1)[:, :most]


def _gram(matrix: Tensor, *, tall: bool) -> Tensor:
    """The products of all columns of a tall matrix, else of all rows."""
    import torch

    tall_one = matrix if tall else matrix.T
    size = tall_one.shape[1]
    found = torch.zeros((size, size), dtype=torch.float64, device=matrix.device)
    for start in range(0, len(tall_one), ROWS_AT_ONCE):
        rows = tall_one[start : start + ROWS_AT_ONCE].double()
        if rows.is_cuda:
            found += rows.T @ rows
        else:  # numpy computes one half of it, torch both
            found += torch.from_numpy(rows.numpy().T @ rows.numpy())
    return found


def _times(matrix: Tensor, narrow: Tensor) -> Tensor:
    import torch

    parts = [matrix[start : start + ROWS_AT_ONCE].double() @ narrow for start in range(0, len(matrix), ROWS_AT_ONCE)]
    return torch.cat(parts)

"""The nearest matrix of low rank, as the product of two narrow matrices.

The theorem of Eckart and Young: it keeps the largest singular values, and its error is the root of the sum of the
squares of the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from workers.making.gates import drawn

if TYPE_CHECKING:
    from torch import Tensor

NOISE = 2.0**-23
"""Singular values below this share of the largest are float32's rounding, and not kept."""

GROWTH = 3e-4
"""The search for a subspace ends when a step adds less than this share of the squared error."""

ROUNDING = 1e-13
"""The search also ends when a step adds less than this share of the squared norm."""

MORE = 8
"""Columns that a block of the search has beside the rank."""

ELEMENTS_AT_ONCE = 1 << 18
"""Elements that are in float64 at one time: 2 MiB, the cache of a core."""

SLOWER = 16
"""The search is slower than the Gram matrix if its blocks are wider than the narrow side, divided by this."""

BLOCKS = 8
"""Blocks of columns of a Gram matrix."""


def low_rank(change: Tensor, most: int, epsilon: float, *, distribute: bool) -> tuple[Tensor, Tensor]:
    """B (rows × rank) and A (rank × columns) in float64, with B·A near to `change` (rows × columns, float32).

    The rank is at most `most`; singular values of at most `epsilon` are not kept. `distribute` gives both factors the
    root of each singular value; else A has all of it. The element of each row of A with the largest magnitude is
    positive, as the sign of a pair of singular vectors is free.

    Where `most` is small beside the sides, the vectors are from a block Krylov space with a fixed start (Musco and
    Musco, 2015, arXiv:1504.05477), and the error is within 0.1 % of the smallest one. Else they are those of the
    smaller Gram matrix. Both work in float64: squared, values below 10⁻⁸ of the largest would be lost, and `NOISE` is
    above that.
    """
    import torch

    wide = change.shape[0] < change.shape[1]
    tall = change.T.contiguous() if wide else change
    values, vectors = _searched(tall, most) or _largest(_gram(tall), most)
    singular = values.clamp(min=0).sqrt()
    rank = int((singular > max(epsilon, NOISE * float(singular[0]))).sum())
    short = vectors[:, :rank]
    long = _times(tall, short)
    lengths = torch.linalg.vector_norm(long, dim=0)  # the singular values
    left, right = (short, long / lengths) if wide else (long / lengths, short)
    if rank:
        largest = right.abs().argmax(dim=0, keepdim=True)
        signs = right.gather(0, largest).sign()
        left, right = left * signs, right * signs
    root = lengths.sqrt()
    scale_b, scale_a = (root, root) if distribute else (torch.ones_like(root), lengths)
    return left * scale_b, (right * scale_a).T


def squares(matrix: Tensor, b: Tensor | None = None, a: Tensor | None = None) -> float:
    """The squared Frobenius norm of a tensor, or of `matrix` − B·A, in float64; not finite if an element is not."""
    import torch

    norm = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    if a is None or b is None:
        return norm
    b, a = b.double(), a.double()
    inner = float((b * _times(matrix, a.T)).sum())
    return max(0.0, norm - 2 * inner + float(((b.T @ b) * (a @ a.T)).sum()))


def _searched(tall: Tensor, most: int) -> tuple[Tensor, Tensor] | None:
    """As `_largest` of the Gram matrix G, without it; None where that is slower, or does not end soon.

    The vectors are the best of the space of G⁰Ω, G¹Ω, …, which grows by one block at a time.
    """
    import torch

    size, block = tall.shape[1], most + MORE
    if SLOWER * block > size:
        return None
    norm, energy = squares(tall), 0.0
    new = torch.from_numpy(drawn((size, block), "low rank")).to(tall.device, torch.float64)
    basis = images = new[:, :0]
    while basis.shape[1] + block <= size // 2:
        orthogonal = torch.linalg.qr(torch.cat([basis, new], 1))[0][:, basis.shape[1] :]
        new = torch.zeros_like(new)
        for rows in _in_float64(tall):
            new += rows.T @ (rows @ orthogonal)
        basis, images = torch.cat([basis, orthogonal], 1), torch.cat([images, new], 1)
        values, vectors = _largest(basis.T @ images, most)
        before, energy = energy, float(values.sum())
        if energy - before <= GROWTH * (norm - energy) + ROUNDING * norm:
            return values, basis @ vectors
    return None


def _largest(gram: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues, at most so many from the largest down, and their eigenvectors as columns.

    Only the lower half of the matrix is read.
    """
    import torch

    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0)[:most], vectors.flip(1)[:, :most]


def _gram(tall: Tensor) -> Tensor:
    """The products of all columns: the lower half, and a part of the upper one."""
    import torch

    size = tall.shape[1]
    found = torch.zeros((size, size), dtype=torch.float64, device=tall.device)
    width = -(-size // BLOCKS)
    for rows in _in_float64(tall, 16 * ELEMENTS_AT_ONCE):
        for start in range(0, size, width):
            found[start:, start : start + width] += rows[:, start:].T @ rows[:, start : start + width]
    return found


def _times(matrix: Tensor, narrow: Tensor) -> Tensor:
    import torch

    return torch.cat([rows @ narrow for rows in _in_float64(matrix)])


def _in_float64(matrix: Tensor, elements: int = ELEMENTS_AT_ONCE) -> Iterator[Tensor]:
    """The rows of a matrix in float64, in groups; the next group overwrites this one."""
    import torch

    count = max(1, elements // matrix.shape[1])
    place = torch.empty((min(count, len(matrix)), matrix.shape[1]), dtype=torch.float64, device=matrix.device)
    for start in range(0, len(matrix), count):
        rows = place[: len(matrix) - start]
        yield rows.copy_(matrix[start : start + count])

"""Low-rank factors against numpy's singular values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workers.making.low_rank import low_rank, squares

SHAPES = [(12, 12), (40, 9), (9, 40), (1, 7), (7, 1), (5000, 6)]


def matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(rows * 100 + columns))


def tail(change: torch.Tensor, rank: int) -> float:
    """The squared error of the best approximation: Eckart and Young, 1936."""
    return float((np.linalg.svd(change.double().numpy(), compute_uv=False)[rank:] ** 2).sum())


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_the_tail_of_the_singular_values(shape: tuple[int, int], rank: int) -> None:
    change = matrix(*shape)
    b, a = low_rank(change, rank, 0.0, distribute=True)
    kept = min(rank, *shape)
    assert b.shape == (shape[0], kept) and a.shape == (kept, shape[1])
    norm = float((change.double() ** 2).sum())
    assert squares(change, b, a) == pytest.approx(tail(change, kept), rel=1e-9, abs=1e-12 * norm)
    assert squares(change) == pytest.approx(norm, rel=1e-12)


@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize("spectrum", ["flat", "root", "inverse", "steep", "spikes", "three"])
@pytest.mark.parametrize("shape", [(700, 400), (400, 700)])
def test_a_searched_subspace_is_within_a_thousandth_of_the_best(
    shape: tuple[int, int], spectrum: str, rank: int
) -> None:
    place = torch.arange(400, dtype=torch.float64)
    singular = {
        "flat": torch.ones(400),
        "root": (place + 1) ** -0.5,
        "inverse": 1 / (place + 1),
        "steep": torch.exp(-place / 2),
        "spikes": torch.where(place < 16, 1.0, 0.01),
        "three": (place < 3).double(),
    }[spectrum]
    left, right = (torch.linalg.qr(matrix(side, 400).double())[0] for side in (700, 401))
    change = ((left * singular) @ right[:400].T).float()
    change = change if shape[0] == 700 else change.T
    b, a = low_rank(change, rank, 0.0, distribute=True)
    best, norm = tail(change, rank), squares(change)
    assert len(a) == min(rank, 3 if spectrum == "three" else 99)
    assert best - 1e-12 * norm <= squares(change, b, a) <= best * 1.001**2 + 1e-12 * norm
    direct = float(((change.double() - b @ a) ** 2).sum())
    assert squares(change, b, a) == pytest.approx(direct, rel=1e-6, abs=1e-12 * norm)


def test_the_search_ends_where_the_spectrum_is_that_of_noise() -> None:
    change = matrix(700, 400)
    b, a = low_rank(change, 16, 0.0, distribute=True)
    assert tail(change, 16) < squares(change, b, a) <= tail(change, 16) * 1.001**2  # not the exact vectors


@pytest.mark.parametrize("shape", SHAPES)
def test_at_full_rank_nothing_is_lost(shape: tuple[int, int]) -> None:
    change = matrix(*shape)
    b, a = low_rank(change, 99, 0.0, distribute=False)
    np.testing.assert_allclose((b @ a).numpy(), change.numpy(), atol=1e-6)


@pytest.mark.parametrize("distribute", [True, False])
def test_the_singular_values_are_where_they_are_asked_for(distribute: bool) -> None:
    change = matrix(40, 9)
    singular = np.linalg.svd(change.double().numpy(), compute_uv=False)
    b, a = low_rank(change, 9, 0.0, distribute=distribute)
    np.testing.assert_allclose(a.norm(dim=1).numpy(), singular**0.5 if distribute else singular, rtol=1e-6)
    np.testing.assert_allclose(b.norm(dim=0).numpy(), singular**0.5 if distribute else np.ones(9), rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_the_signs_are_fixed(shape: tuple[int, int]) -> None:
    b, a = low_rank(matrix(*shape), 4, 0.0, distribute=True)
    turned_b, turned_a = low_rank(-matrix(*shape), 4, 0.0, distribute=True)
    assert bool((a.gather(1, a.abs().argmax(dim=1, keepdim=True)) > 0).all())
    torch.testing.assert_close(turned_a, a)
    torch.testing.assert_close(turned_b, -b)


def test_a_matrix_of_low_rank_has_no_more_factors_than_its_rank() -> None:
    exact = matrix(30, 2) @ matrix(2, 20)
    assert low_rank(exact, 16, 0.0, distribute=True)[1].shape == (2, 20)
    assert low_rank(torch.zeros(3, 4), 16, 0.0, distribute=True)[1].shape == (0, 4)


def test_singular_values_up_to_epsilon_are_dropped() -> None:
    change = torch.diag(torch.tensor([5.0, 3.0, 1.0]))
    for epsilon, rank in ((0.0, 3), (0.9, 3), (1.5, 2), (4.0, 1), (6.0, 0)):
        assert len(low_rank(change, 16, epsilon, distribute=True)[1]) == rank

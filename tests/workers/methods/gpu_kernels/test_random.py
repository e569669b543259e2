"""Random bits drawn by the loops for GPUs, on CPU tensors by Triton's interpreter: those of NumPy's Philox."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workers.methods.gpu_kernels.language import interprets
from workers.methods.gpu_kernels.random import drawn
from workers.methods.gpu_kernels.rows import BLOCK

pytestmark = pytest.mark.skipif(not interprets(), reason="Triton is not interpreted here; `make triton` does")

KEY = 0xFEDCBA9876543210, 0x8000000000000001
CPU = torch.device("cpu")


def numpy_bits(start: int, elements: int) -> np.ndarray:
    generator = np.random.Philox(key=np.array(KEY, np.uint64), counter=start // 8)
    return generator.random_raw(elements).view(np.uint32)[:elements]


@pytest.mark.parametrize("start", [0, 8, 1 << 31, (1 << 31) + 131072, 1 << 40])
def test_elements_are_kept_by_the_bits_of_numpys_philox(start: int) -> None:
    elements, limit = BLOCK + 27, round(0.3 * (1 << 32))
    kept = drawn(KEY, start, elements, limit, CPU)
    assert kept.tolist() == (numpy_bits(start, elements) < limit).astype(int).tolist()
    assert 0.2 < kept.float().mean() < 0.4


def test_a_limit_of_each_element_is_a_number_without_a_sign() -> None:
    elements = BLOCK + 27
    limits = np.linspace(0, (1 << 32) - 1, elements).astype(np.uint32)
    kept = drawn(KEY, 0, elements, torch.from_numpy(limits.view(np.int32)), CPU)
    assert kept.tolist() == (numpy_bits(0, elements) < limits).astype(int).tolist()


@pytest.mark.parametrize(("limit", "kept"), [(0, 0), (1 << 32, 1)])
def test_a_density_of_nothing_or_all_keeps_nothing_or_all(limit: int, kept: int) -> None:
    assert drawn(KEY, 0, 100, limit, CPU).tolist() == [kept] * 100

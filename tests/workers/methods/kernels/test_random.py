"""The compiled generator draws the bits of numpy's."""

from __future__ import annotations

import numpy as np
import pytest

from workers.methods.kernels.random import random_bits


@pytest.mark.parametrize("key", [(0, 0), (0x0123456789ABCDEF, 0xFEDCBA9876543210), (2**64 - 1, 2**64 - 1)])
@pytest.mark.parametrize("start", [0, 8, 1 << 17, 3 << 40])
@pytest.mark.parametrize("elements", [1, 7, 8, 1001])
def test_bits_are_those_of_numpy(key: tuple[int, int], start: int, elements: int):
    generator = np.random.Philox(key=np.array(key, np.uint64), counter=start // 8)
    expected = generator.random_raw(elements).view(np.uint32)[:elements]
    assert (random_bits(key, start, elements) == expected).all()

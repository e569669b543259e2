"""The compiled generator draws the bits of numpy's."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from workers.methods.kernels.masks import Mask
from workers.methods.kernels.random import random_below, random_bits
from workers.methods.tile import Tile


@pytest.mark.parametrize("key", [(0, 0), (0x0123456789ABCDEF, 0xFEDCBA9876543210), (2**64 - 1, 2**64 - 1)])
@pytest.mark.parametrize("start", [0, 8, 1 << 17, 3 << 40])
@pytest.mark.parametrize("elements", [1, 7, 8, 1001])
def test_bits_are_those_of_numpy(key: tuple[int, int], start: int, elements: int):
    generator = np.random.Philox(key=np.array(key, np.uint64), counter=start // 8)
    expected = generator.random_raw(elements).view(np.uint32)[:elements]
    assert (random_bits(key, start, elements) == expected).all()


@pytest.mark.parametrize("start", [0, 8, 3 << 40])
@pytest.mark.parametrize("elements", [1, 8, 1001, 5000])
def test_a_bit_for_each_limit_says_whether_bits_are_below_it(start: int, elements: int):
    bits = random_bits((3, 4), start, elements)
    limits = [0, 1, 1 << 31, (1 << 31) + 1, int(bits[0]), int(bits[0]) + 1, (1 << 32) - 1, 1 << 32]
    limits += np.random.default_rng(0).integers(0, 1 << 32, 8).tolist()
    words = random_below((3, 4), start, elements, limits)
    for bit, limit in enumerate(limits):
        assert (Mask(words, bit).array() == (bits.astype(np.int64) < limit)).all()
    assert set(random_below((3, 4), start, elements, [1 << 32]).tolist()) == {1}


def test_the_key_of_a_tile_is_a_digest_of_what_it_merges():
    tile = Tile("layer.weight", 16, {"model": np.zeros(20, np.float32)}, {}, seed=7)
    key = np.frombuffer(hashlib.sha256(b"7\0dare_ties\0model\0layer.weight").digest()[:16], "<u8")
    expected = np.random.Philox(key=key, counter=2).random_raw(10).view(np.uint32)
    assert (tile.random_bits("dare_ties", "model") == expected).all()

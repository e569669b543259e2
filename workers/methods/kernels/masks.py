"""Masks of the elements of a tensor: an element has one word for up to 16 of them, in which each has a bit."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MOST_MASKS = 16

Words = NDArray[np.uint16]


class Mask(NamedTuple):
    """The elements whose word has this bit."""

    words: Words
    bit: int = 0

    def array(self) -> NDArray[np.bool_]:
        """Whether the mask has each element."""
        return (self.words & np.uint16(1 << self.bit)) != 0

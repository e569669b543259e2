"""What a merged tensor must be, and how far float32 arithmetic may stray from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray
FLOAT32_STEP = 2.0**-24  # the relative error of one float32 rounding


@dataclass(frozen=True)
class Exact:
    """`value` in float64; `magnitude` ≥ |value|: the sum of the absolute values of its terms, amplified by the
    divisor's own cancellation, so that float32 arithmetic in any order errs by at most `operations` · 2⁻²⁴ ·
    magnitude, and by `astray` where a coefficient comes from a cosine that float32 blurs."""

    value: Array
    magnitude: Array
    operations: float
    astray: Array | float = 0.0


@dataclass(frozen=True)
class Choice:
    """A tensor with elements at which float32, or equal values at a cutoff, leave several values to choose from.

    `value` is the choice of float64. `options`: (where it is possible, its value). The options of `kept` keep an
    element; a method that keeps exactly `count` elements says so. `tied_in_bf16`: where equal values leave a choice to
    a merge in bfloat16."""

    value: Array
    options: tuple[tuple[Array, Exact], ...]
    kept: tuple[bool, ...]
    count: int | None = None
    tied_in_bf16: Array | None = None

    def decided(self) -> tuple[Array, Exact]:
        """Where one option is possible, and the values there."""
        possible = sum(where.astype(int) for where, _ in self.options)
        wheres = [where for where, _ in self.options]

        def pick(parts: list[Array]) -> Array:
            return np.select(wheres, [np.broadcast_to(part, self.value.shape) for part in parts])

        magnitude = pick([exact.magnitude for _, exact in self.options])
        astray = pick([np.asarray(exact.astray) for _, exact in self.options])
        operations = max(exact.operations for _, exact in self.options)
        value = pick([exact.value for _, exact in self.options])
        return possible == 1, Exact(value, magnitude, operations, astray)

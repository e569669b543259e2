"""The input of a merge method: one tile of one tensor of every parent, shared by all points of the grid.

A method is written as its formula for one point. The tile makes a grid cheap: it keeps conversions, task vectors and
trimmed task vectors, so that the second point reuses the work of the first; and facts about
a whole tensor (a norm, the magnitude that a density keeps) are asked for by name. When such a fact is not known yet,
asking raises `NotYetKnown`; the merge loop then streams the tensor once for everything that was asked, and asks again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from workers.methods.kernels.dtypes import CODES
from workers.methods.kernels.random import random_bits

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TILE_ELEMENTS = 1 << 17
"""Elements a tile: half a MiB of float32, so that a formula's intermediate results stay in a core's cache.

Sums over a whole tensor are sums of the tiles' sums, so this constant is part of the numerics. A `Tile` may span
several of these units (on a GPU a whole tensor), but begins at a multiple of one."""

FACT_UNITS = 16
"""`TILE_ELEMENTS` of a tile that answers questions. Threads wait for each other while Python asks."""

PerModel = tuple[float, ...]
"""A parameter given per model, in the order of `Inputs.models`."""

Value = TypeVar("Value")

Array = NDArray[Any]
"""Elements in the memory of the host: a NumPy array, of bfloat16 by ml_dtypes."""


def as_tensor(elements: Array | Tensor) -> Tensor:
    """The elements as torch has them: the same memory, no copy."""
    import torch

    if isinstance(elements, torch.Tensor):
        return elements
    name = elements.dtype.name
    if name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):  # torch does not read the dtypes of ml_dtypes
        return torch.from_numpy(elements.view(f"u{elements.itemsize}")).view(getattr(torch, name))
    return torch.from_numpy(elements)


def torch_named(dtype: str) -> torch.dtype:
    """torch's dtype of that name, such as "float32"."""
    import torch

    return getattr(torch, dtype)


class NotYetKnown(Exception):
    """A method asked for facts about the whole tensor that are not computed yet."""

    def __init__(self, *reductions: Reduction) -> None:
        super().__init__(*reductions)
        self.reductions = reductions


def together(questions: Iterable[Callable[[], Value]]) -> list[Value]:
    """The answers; `NotYetKnown` with the missing facts of all questions, so that one look at the tensor finds them."""
    answers: list[Value] = []
    missing: list[Reduction] = []
    for question in questions:
        try:
            answers.append(question())
        except NotYetKnown as unknown:
            missing.extend(unknown.reductions)
    if missing:
        raise NotYetKnown(*missing)
    return answers


def first_found(tile: Tile, questions: Iterable[Reduction]) -> Any:
    """The first answer that is not None, or `NotYetKnown`."""
    return next(answer for each in questions if (answer := tile.known(each)) is not None)


class Reduction:
    """A fact about a whole tensor, put together from its tiles' shares. Subclasses are frozen dataclasses.

    `units` are those of a tile that answers. Masks and formulas take memory for each of its elements.
    """

    units: ClassVar[int] = FACT_UNITS

    def ask(self, tile: Tile) -> None:
        """Asks `tile.known` for the facts that must be known before this one."""

    def of(self, tile: Tile) -> list[Any]:
        """This tile's share, either one entry, or one for each unit that it spans."""
        raise NotImplementedError

    def combine(self, shares: Sequence[Any]) -> Any:
        """The fact, from the entries of all tiles in order."""
        raise NotImplementedError


@dataclass(slots=True)
class Tile:
    """Elements `[start, start + len)` of one tensor, flattened, of every parent that holds it.

    `raw` maps parent to 1-D elements in the parent's own dtype, in the memory of the host or of a GPU. `facts` is
    shared by all tiles of the tensor. `shape` is that of the whole tensor. `around` is what `raw` was cut from, the
    elements from `around_start` on; they hold whole rows wherever a method asks for `whole_rows`. `asked` are the facts
    that this look at the tensor finds, among which may be some that are found together.
    """

    tensor: str
    start: int
    raw: Mapping[str, Array | Tensor]
    facts: Mapping[Reduction, Any]
    seed: int = 0
    shape: tuple[int, ...] = ()
    around: Mapping[str, Array | Tensor] = field(default_factory=dict[str, "Array | Tensor"])
    around_start: int = 0
    asked: Sequence[Reduction] = ()
    _memory: dict[Hashable, Any] = field(default_factory=dict[Hashable, Any])

    @property
    def elements(self) -> int:
        """How many elements this tile spans."""
        return len(next(iter(self.raw.values())))

    @property
    def row(self) -> int:
        """How many elements a row of the tensor has: the last axis; a vector is one row."""
        return self.shape[-1] if self.shape else self.elements

    @property
    def units(self) -> tuple[int, int]:
        """The range of `TILE_ELEMENTS` units that this tile spans."""
        return self.start // TILE_ELEMENTS, -(-(self.start + self.elements) // TILE_ELEMENTS)

    def known(self, reduction: Reduction) -> Any:
        """The value of a whole-tensor fact; `NotYetKnown` when it has to be computed first."""
        try:
            return self.facts[reduction]
        except KeyError:
            raise NotYetKnown(reduction) from None

    def remember(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """`compute()`, once per tile and key. The result is shared: never change it in place."""
        if key not in self._memory:
            self._memory[key] = compute()
        return cast(Value, self._memory[key])

    def parent(self, name: str, dtype: str) -> Tensor:
        """One parent's elements in the arithmetic dtype."""
        return self.remember((name, dtype), lambda: as_tensor(self.raw[name]).to(torch_named(dtype)))

    def delta(self, model: str, base: str, dtype: str) -> Tensor:
        """The task vector: model − base."""
        return self.remember(
            ("delta", model, base, dtype), lambda: self.parent(model, dtype) - self.parent(base, dtype)
        )

    def random_bits(self, method: str, model: str) -> NDArray[np.uint32]:
        """32 random bits an element, from Philox4x64-10 (Salmon et al. 2011) keyed by seed, method, model and tensor.

        The generator is indexed by the element's place in the tensor: no tiling, order or device changes a bit.
        """
        return self.remember(
            ("bits", method, model), lambda: random_bits(self.random_key(method, model), self.start, self.elements)
        )

    def random_key(self, method: str, model: str) -> tuple[int, int]:
        """The key of the generator of `random_bits`: two 64-bit numbers."""
        name = "\0".join((str(self.seed), method, model, self.tensor)).encode()
        digest = hashlib.sha256(name).digest()
        return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def host_arrays(tile: Tile, *names: str) -> list[Array] | None:
    """The elements of parents, if compiled loops can read them: in the memory of the host, in a dtype of theirs."""
    arrays = [
        np.ascontiguousarray(each)
        for name in names
        if isinstance(each := tile.raw[name], np.ndarray) and each.dtype in CODES
    ]
    return arrays if len(arrays) == len(names) else None


def units_of(elements: Array) -> list[Array]:
    """Elements from the start of a unit on, cut into units."""
    return [elements[start : start + TILE_ELEMENTS] for start in range(0, len(elements), TILE_ELEMENTS)]


def ones_where(holds: Literal["ge", "gt", "eq"], values: Tensor) -> Tensor:
    """1 where a value compares with 0 as asked, else 0, in the values' dtype.

    Many times faster than `torch.where`, which takes a branch an element.
    """
    import torch

    return getattr(torch, holds)(values, 0.0, out=torch.empty_like(values))


def positive(values: Tensor) -> Tensor:
    """max(values, 0) with the zeros of a CPU: CUDA's relu of -0.0 is +0.0."""
    return values.relu() if values.device.type == "cpu" else values.masked_fill(values < 0, 0.0)


def divided(values: Tensor, divisor: float) -> Tensor:
    """values / divisor, rounded once: by a number of the host, CUDA multiplies with its reciprocal."""
    import torch

    return values / torch.full((), divisor, dtype=values.dtype, device=values.device)


@dataclass(frozen=True, slots=True)
class Inputs:
    """One point's view of a tile: its models in the recipe's order, and its arithmetic.

    `dtype` names the arithmetic dtype ("float32", or "float64" for float32 outputs; the recipe's own under
    `--numerics mergekit`, which `as_mergekit` says).
    """

    tile: Tile
    models: tuple[str, ...]
    base_name: str | None
    dtype: str
    as_mergekit: bool = False

    @property
    def base_model(self) -> str:
        """The name of the base model, of a method that requires one."""
        assert self.base_name is not None, "planned without the base_model that this method requires"
        return self.base_name

    @property
    def base(self) -> Tensor:
        """The base model's elements."""
        return self.tile.parent(self.base_model, self.dtype)

    def model(self, index: int) -> Tensor:
        """One model's elements."""
        return self.tile.parent(self.models[index], self.dtype)

    def delta(self, index: int) -> Tensor:
        """One model's task vector."""
        return self.tile.delta(self.models[index], self.base_model, self.dtype)

    def number(self, value: float) -> float:
        """A parameter as the arithmetic dtype holds it."""
        if self.dtype == "float64":
            return value
        narrow = ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype
        return float(np.float32(value).astype(narrow))

    def sum(self, terms: Sequence[Tensor]) -> Tensor:
        """Σ terms, from left to right; mergekit sums a stack, which rounds once for half-precision dtypes."""
        if self.as_mergekit:
            import torch

            return torch.stack(list(terms)).sum(dim=0)
        total = terms[0]
        for count, term in enumerate(terms[1:]):
            total = total + term if count == 0 else total.add_(term)
        return total

"""Elements that a task vector keeps by chance: each has random bits of its own, which are below a limit or not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from workers.methods.kernels.masks import MOST_MASKS, Mask, Words
from workers.methods.kernels.random import random_below
from workers.methods.kernels.ranks import below_by_rank
from workers.methods.ranking import Magnitude
from workers.methods.tile import TILE_ELEMENTS, Reduction, Tile, as_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Coin:
    """Keeps an element with probability `density`, by the random bits of (method, model): see `Tile.random_bits`.

    With a `spread`, the probability of the smallest |δ| of a row is density − spread, that of the largest is
    density + spread, and it grows by equal steps between them; of equal ones the first counts as the smaller. A row of
    one element has the density.
    """

    method: str
    density: float
    spread: float = 0.0

    @property
    def limit(self) -> int:
        """An element is kept if its 32 random bits are below this, without a spread."""
        return round(self.density * (1 << 32))

    def by_rank(self, tile: Tile) -> bool:
        """Whether elements of a row have different probabilities."""
        return bool(self.spread) and tile.row > 1

    def limits(self, row: int) -> NDArray[np.uint32]:
        """By the rank in a row of so many elements: an element is kept if its random bits are below this."""
        steps = np.arange(row) / (row - 1)
        chances = self.density - self.spread + 2 * self.spread * steps
        return np.rint(chances * (1 << 32)).clip(0, (1 << 32) - 1).astype(np.uint32)


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """What some coins have decided for elements from the unit `first` on: each coin has a bit of a word.

    What one coin has decided is held as bytes, of eight elements each.
    """

    coins: Mapping[Coin, int]
    words: NDArray[Any]
    first: int

    def held(self) -> Drawn:
        """The same in as little memory as can be had fast."""
        return self if len(self.coins) > 1 else replace(self, words=np.packbits(self.words != 0))

    def part(self, first: int, end: int) -> Words:
        """The words of units `[first, end)`, of which the last may be cut short."""
        begin, stop = (TILE_ELEMENTS * (unit - self.first) for unit in (first, end))
        if self.words.dtype == np.uint16:
            return cast(Words, self.words[begin:stop])
        return np.unpackbits(cast("NDArray[np.uint8]", self.words[begin // 8 : stop // 8])).astype(np.uint16)


def draw(tile: Tile, coins: Sequence[Coin], model: str, base: str) -> Drawn:
    """Lets at most 16 coins of one method decide, which all or none go by rank."""
    places = {coin: place for place, coin in enumerate(coins)}
    method = coins[0].method
    if coins[0].by_rank(tile):
        rows = _whole_rows(tile, model, base)
        sizes, numbers = Magnitude(model, base).on_host(rows), tile.random_bits(method, model)
        words = below_by_rank(
            sizes, tile.row, numbers, [coin.limits(tile.row) for coin in coins], tile.start - rows.start
        )
    else:
        limits = [coin.limit for coin in coins]
        words = random_below(tile.random_key(method, model), tile.start, tile.elements, limits)
    return Drawn(places, words, tile.units[0])


def drawn_groups(tile: Tile, coins: Iterable[Coin]) -> Iterator[Sequence[Coin]]:
    """Coins that `draw` lets decide together."""
    alike: dict[tuple[str, bool], list[Coin]] = {}
    for coin in dict.fromkeys(coins):
        alike.setdefault((coin.method, coin.by_rank(tile)), []).append(coin)
    for group in alike.values():
        for first in range(0, len(group), MOST_MASKS):
            yield group[first : first + MOST_MASKS]


def _whole_rows(tile: Tile, model: str, base: str) -> Tile:
    """The rows of which a tile has a part."""
    first, end = tile.start // tile.row * tile.row, -(-(tile.start + tile.elements) // tile.row) * tile.row
    inside = slice(first - tile.around_start, end - tile.around_start)
    assert inside.start >= 0 and inside.stop <= len(tile.around[model]), "read without the whole rows of a tile"
    return Tile(tile.tensor, first, {name: tile.around[name][inside] for name in (model, base)}, {})


def drawn(tile: Tile, coin: Coin, model: str, base: str) -> Tensor:
    """Which elements a coin keeps, element by element: 1 or 0 as uint8, where the model's elements are."""
    elements = tile.raw[model]
    if isinstance(elements, np.ndarray) or not runs_on(str(elements.device)):
        mask = drawn_on_host(tile, coin, model, base).array()
        return as_tensor(mask.view(np.uint8)).to(as_tensor(elements).device)

    def decide() -> Tensor:
        from workers.methods.gpu_kernels.random import drawn as drawn_there

        limits = _limits_by_rank(tile, coin, model, base) if coin.by_rank(tile) else coin.limit
        return drawn_there(tile.random_key(coin.method, model), tile.start, tile.elements, limits, elements.device)

    return tile.remember(("drawn", coin, model, base), decide)


def runs_on(device: str) -> bool:
    """Whether the loops of `gpu_kernels` run on a device."""
    from workers.methods.gpu_kernels.launch import runs_on  # imports Triton, where it is installed

    return runs_on(device)


def _limits_by_rank(tile: Tile, coin: Coin, model: str, base: str) -> Tensor:
    """`Coin.limits` of the ranks of all elements, as int32, where the model's elements are."""
    import torch

    rows = _whole_rows(tile, model, base)
    sizes = Magnitude(model, base).bits(rows).view(-1, tile.row)
    of_ranks = torch.from_numpy(coin.limits(tile.row).view(np.int32)).to(sizes.device)
    limits = torch.empty_like(sizes)
    at_once = max(1, _SORTED_ON_GPU // tile.row)
    for some, into in zip(sizes.split(at_once), limits.split(at_once), strict=True):
        into.scatter_(1, some.sort(dim=1, stable=True).indices, of_ranks.expand(some.shape))
    return limits.view(-1)[tile.start - rows.start :][: tile.elements]


_SORTED_ON_GPU = 1 << 24
"""Elements that are sorted at a time: their places take 128 MiB."""


def draw_together(tile: Tile, coins: Iterable[Coin], model: str, base: str) -> None:
    """Decides for several coins, which `drawn_on_host` finds then: they share random bits, and ranks of rows."""
    open_: list[Coin] = []
    for coin in dict.fromkeys(coins):
        if (before := _drawn_before(tile, coin, model, base)) is not None:
            tile.remember((coin, model, base), lambda before=before: before)
        else:
            open_.append(coin)
    for group in drawn_groups(tile, open_):
        decided = draw(tile, group, model, base)
        for coin, place in decided.coins.items():
            tile.remember((coin, model, base), lambda words=decided.words, place=place: Mask(words, place))


def drawn_on_host(tile: Tile, coin: Coin, model: str, base: str) -> Mask:
    """The same as `drawn` in the memory of the host."""

    def decide() -> Mask:
        if (before := _drawn_before(tile, coin, model, base)) is not None:
            return before
        return Mask(draw(tile, [coin], model, base).words)

    return tile.remember((coin, model, base), decide)


DRAWN = Reduction()
"""The fact that holds what coins have decided for another fact, where the pass over the tensor follows soon."""

MOST_DRAWN = 128 << 20
"""Bytes of such decisions that are held."""


@dataclass(slots=True)
class DrawnBefore:
    """`DRAWN`: what was decided of each unit of each tensor, by (coin, model, base, tensor, unit)."""

    bytes: int = 0
    held: dict[tuple[Coin, str, str, str, int], Drawn] = field(
        default_factory=dict["tuple[Coin, str, str, str, int]", Drawn]
    )


def keep_drawn(tile: Tile, decided: Drawn, model: str, base: str) -> None:
    """Holds what coins have decided for the pass over the tensor, if there is room."""
    before: DrawnBefore | None = tile.facts.get(DRAWN)
    if before is None or before.bytes >= MOST_DRAWN:
        return
    kept = decided.held()
    before.bytes += kept.words.nbytes
    for unit in range(*tile.units):
        for coin in kept.coins:
            before.held[coin, model, base, tile.tensor, unit] = kept


def _drawn_before(tile: Tile, coin: Coin, model: str, base: str) -> Mask | None:
    """What a coin has decided for all elements of a tile, if that is held."""
    before: DrawnBefore | None = tile.facts.get(DRAWN)
    if before is None:
        return None
    runs: list[tuple[Drawn, int, int]] = []
    """What has decided for units `[first, end)`."""
    for unit in range(*tile.units):
        decided = before.held.get((coin, model, base, tile.tensor, unit))
        if decided is None:
            return None
        if runs and runs[-1][0] is decided:
            runs[-1] = decided, runs[-1][1], unit + 1
        else:
            runs.append((decided, unit, unit + 1))
    place = runs[0][0].coins[coin]
    if any(decided.coins[coin] != place for decided, _, _ in runs):
        return None

    def words() -> Words:
        parts = [decided.part(first, end) for decided, first, end in runs]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts))[: tile.elements]

    return Mask(tile.remember(("words", *runs), words), place)

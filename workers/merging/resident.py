"""Parents that stay in memory, and the points merged from them without ever being written.

The result equals the written point bit for bit: the same tiles, the same settings, the same rounding.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from jobs.merge_tasks import DTYPE_BITS, Parent, Setting, TensorMerge
from workers.checkpoints.dtypes import TORCH_NAMES, numpy_dtype
from workers.digests import TensorHash, digest_of
from workers.gpu_memory import check_fits, in_pieces
from workers.merging.deriving import Deriving
from workers.merging.given import given_facts
from workers.merging.point_launches import ELEMENTS_A_LAUNCH, PointLaunches, flat
from workers.merging.streams import Mark, Streams
from workers.merging.tiles import Elements, TensorMerger, bytes_of, learn, overflowed
from workers.methods.tile import FACT_UNITS, TILE_ELEMENTS, as_tensor

if TYPE_CHECKING:
    from torch import Tensor

READS_AT_ONCE = 8

CPU_PIECE_ELEMENTS = 64 * TILE_ELEMENTS
"""What one thread merges at a time: half as much costs a tenth of `linear`, twice as much a quarter of `della`."""

AHEAD, AHEAD_IN_PLACE = 2, 12
"""Pieces a thread that are merged or wait: each takes memory, unless it is merged into a place."""

GPU_PIECE_ELEMENTS = 1 << 24
"""What a GPU merges at a time: launches cost little beside it, and an intermediate result takes 64 MiB."""

_Piece = tuple[Elements, Callable[[], int]]
"""A piece of the output, and what waits until it is merged and says how many of its elements overflowed."""


class ResidentParents:
    """Every tensor of every parent on one device, in the parents' own dtypes; read once.

    Facts about whole tensors are kept, so that the second point of a grid does not compute them again.
    """

    def __init__(
        self,
        tensors: Sequence[TensorMerge],
        parents: Mapping[str, Parent],
        *,
        seed: int,
        numerics: str,
        device: str = "cpu",
        threads: int = 1,
        activations: Parent | None = None,
        grams: Mapping[str, Parent] | None = None,
    ) -> None:
        stored = sum(
            DTYPE_BITS[source.dtype] * each.elements // 8 for each in tensors for source in each.sources.values()
        )
        check_fits(stored + sum(each.bytes for each in tensors), device, "the parents and a point")
        self._tensors = tensors
        self._seed = seed
        self._numerics = numerics
        self._device = device
        self._threads = max(1, threads) if device == "cpu" else 1  # one stream does the work, and needs the memory once
        self._facts = given_facts(tensors, activations, grams or {})
        self._step = CPU_PIECE_ELEMENTS if device == "cpu" else GPU_PIECE_ELEMENTS
        """Elements of a piece; fewer once a GPU's memory has ended."""
        self._streams = Streams(device)
        self._unread: dict[str, Tensor] = {}
        deriving = Deriving(parents)
        sources = {
            (each.name, name): (source.dtype, each.elements)
            for each in tensors
            for name, source in each.sources.items()
        }
        memory = {} if device == "cpu" else in_pieces(lambda _: flat(sources, device), 1, 1, device, "the parents")[0]

        def read(tensor: TensorMerge) -> dict[str, Elements]:
            raw = {name: deriving.whole(name, source, tensor.name) for name, source in tensor.sources.items()}
            if device == "cpu":
                return raw
            return {name: memory[tensor.name, name].copy_(as_tensor(elements)) for name, elements in raw.items()}

        with ThreadPoolExecutor(READS_AT_ONCE, "read") as pool:
            self._raw = {tensor.name: raw for tensor, raw in zip(tensors, pool.map(read, tensors), strict=True)}
        self._launches = (
            None
            if device == "cpu"
            else PointLaunches(tensors, self._raw, self._facts, seed=seed, numerics=numerics, device=device)
        )

    def merged(
        self,
        settings: Sequence[Setting],
        digests: dict[str, str] | None = None,
        places: Mapping[str, Tensor] | None = None,
        overflows: dict[str, int] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of one point by name, in its stored dtype and shape, on the device.

        `settings[tensor.setting]` is the point's recipe for a tensor, as in a merge task. `digests`, if given, receives
        the digest of each tensor's bytes, as a manifest has them. A tensor is merged into its place, the memory of a
        loaded model, if that is of its dtype, shape and device, and no other tensor's; nothing is written before the
        first tensor is asked for. On a GPU, the digests of such tensors are left to `read_digests`. `overflows`, if
        given, receives of each tensor the number of elements that are NaN or infinite, and finite in every parent;
        tensors without any are left out.
        """
        homes = self._homes(places or {})
        self._unread = {}
        if self._device != "cpu":
            if digests is not None:
                self._unread = dict(homes)
            homeless = {each.name: (each.dtype, each.elements) for each in self._tensors if each.name not in homes}
            made, _ = in_pieces(lambda _: flat(homeless, self._device), 1, 1, self._device, "a point")
            homes |= {each.name: made[each.name].view(each.shape) for each in self._tensors if each.name in made}
        with ThreadPoolExecutor(self._threads, "merge") as pool, ExitStack() as at_end:
            at_end.callback(pool.shutdown, wait=False, cancel_futures=True)  # an error, or nobody asks for more
            launched: Mapping[str, Callable[[], int]] = {}
            if (launches := self._launches) is not None:
                begin = partial(launches.begin, settings, homes, partial(self._learn, pool=pool))
                launched, _ = in_pieces(begin, ELEMENTS_A_LAUNCH, GPU_PIECE_ELEMENTS, self._device, "a point")
            ahead: deque[tuple[TensorMerge, Tensor, Sequence[_Piece]]] = deque()
            waiting, in_memory = 0, 0
            for tensor in self._tensors:
                output = homes.get(tensor.name)
                if output is None:
                    output = as_tensor(np.empty(tensor.elements, numpy_dtype(tensor.dtype))).view(tensor.shape)
                pieces: Sequence[_Piece]
                if tensor.name in launched:
                    pieces = [(output.view(-1), launched[tensor.name])]
                else:
                    pieces = self._begin(tensor, settings[tensor.setting], output, pool)
                ahead.append((tensor, output, pieces))
                waiting += len(pieces)
                in_memory += len(pieces) * (tensor.name not in homes)
                most, most_in_memory = self._threads * AHEAD_IN_PLACE, self._threads * AHEAD
                while len(ahead) > 1 and (waiting > most or in_memory > most_in_memory):
                    first, _, its = ahead[0]
                    waiting -= len(its)
                    in_memory -= len(its) * (first.name not in homes)
                    yield self._finished(*ahead.popleft(), digests, overflows)
            while ahead:
                yield self._finished(*ahead.popleft(), digests, overflows)

    def read_digests(self, digests: dict[str, str], after: Mark) -> None:
        """Adds the digests that the last `merged` left out, reading what was merged before the mark.

        Another thread may do so while a model answers; a place must not change before this returns.
        """
        with self._streams.own():
            after.before_mine()
            for name, place in self._unread.items():
                digests[name] = digest_of(bytes_of(place.reshape(-1)))
            self._unread = {}

    def _homes(self, places: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The places that fit."""
        mine = {tensor.name: places[tensor.name] for tensor in self._tensors if tensor.name in places}
        shared = Counter(place.data_ptr() for place in mine.values())
        return {
            tensor.name: place.detach()
            for tensor in self._tensors
            if (place := mine.get(tensor.name)) is not None
            and shared[place.data_ptr()] == 1
            and (str(place.dtype), tuple(place.shape)) == (f"torch.{TORCH_NAMES[tensor.dtype]}", tensor.shape)
            and place.is_contiguous()
            and place.device.type == self._device.partition(":")[0]
        }

    def _begin(self, tensor: TensorMerge, setting: Setting, output: Tensor, pool: ThreadPoolExecutor) -> list[_Piece]:
        """Merges a tensor piece by piece."""
        raw, facts = self._raw[tensor.name], self._facts[tensor.name]
        self._learn(tensor, setting, pool)
        merger = TensorMerger(tensor, [setting], facts, seed=self._seed, numerics=self._numerics, device=self._device)
        elements: Elements = output.view(-1)
        if self._device == "cpu" and tensor.elements:
            elements = np.frombuffer(bytes_of(elements), numpy_dtype(tensor.dtype))

        def merge(start: int, step: int) -> int:
            piece = elements[start : start + step]
            _, broken = merger.run(start, raw, 0, [piece])
            return overflowed(piece, [raw[name][start : start + step] for name in setting.parents]) if broken else 0

        def merge_all(start: int) -> int:
            stop = min(start + step, tensor.elements)

            def merge_within(less: int) -> int:
                return sum(merge(at, min(less, stop - at)) for at in range(start, stop, less))

            overflow, less = in_pieces(merge_within, min(step, self._step), TILE_ELEMENTS, self._device, tensor.name)
            self._step = min(self._step, less)
            return overflow

        step = self._step
        starts = range(0, tensor.elements, step)
        small = tensor.elements <= TILE_ELEMENTS  # another thread takes longer to wake
        if small and self._device == "cpu" and not merger.by_torch:  # this thread keeps torch's threads for answers
            overflow = sum(map(merge_all, starts))
            return [(elements, lambda: overflow)]
        return [(elements[start : start + step], pool.submit(merge_all, start).result) for start in starts]

    def _learn(self, tensor: TensorMerge, setting: Setting, pool: ThreadPoolExecutor) -> None:
        """The facts about a tensor that a setting needs before its first element is merged."""

        units = FACT_UNITS if self._device == "cpu" else None

        def learn_by(step: int) -> None:
            learn(
                tensor,
                setting,
                self._raw[tensor.name],
                self._facts[tensor.name],
                min(step, units * TILE_ELEMENTS) if units else step,
                seed=self._seed,
                numerics=self._numerics,
                units=units,
                each=pool.map,
            )

        _, self._step = in_pieces(learn_by, self._step, TILE_ELEMENTS, self._device, tensor.name)

    def _finished(
        self,
        tensor: TensorMerge,
        output: Tensor,
        pieces: Sequence[_Piece],
        digests: dict[str, str] | None,
        overflows: dict[str, int] | None,
    ) -> tuple[str, Tensor]:
        """A tensor once all of it is merged; adds its digest, and the number of its elements that overflowed."""
        digest, overflow = TensorHash(), 0
        hashes = digests is not None and tensor.name not in self._unread
        for elements, overflowing in pieces:
            overflow += overflowing()
            if hashes:
                digest.update(bytes_of(elements))
        if digests is not None and hashes:
            digests[tensor.name] = digest.digest()
        if overflow and overflows is not None:
            overflows[tensor.name] = overflow
        return tensor.name, output

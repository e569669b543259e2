"""The fused merge: one shard of a group of points, each parent tensor read once, every point computed from it.

Three things go on at once: slabs of the parents are read ahead, pieces of them are merged by a few threads, and each
point's shard is hashed and written in order. The buffers between these bound the memory:

    parents ──read ahead──▶ slabs ──all points──▶ pieces ──hash, write──▶ one upload a point

A method that needs a fact about a whole tensor first (a norm, a cutoff) makes the loop pass over the tensor's slabs
again: in memory when they fit in the task's budget, else by reading them anew.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.merge_tasks import DTYPE_BITS, MergeTask, Receipt, Setting, TensorMerge
from workers.checkpoints.dtypes import FLOATS, any_nonfinite, nonfinite, numpy_dtype
from workers.checkpoints.safetensors import header_bytes
from workers.digests import TensorHash
from workers.merging.buffers import BufferPool, Bytes, keep_freed_memory
from workers.merging.reading import ParentReader, Slab, Stretch, plan_slabs
from workers.merging.tiles import (
    Elements,
    Facts,
    common_value,
    copied,
    merge_tile,
    missing_facts,
    one_torch_thread,
    put,
)
from workers.merging.writing import ShardWriter
from workers.methods.tile import TILE_ELEMENTS, Reduction, Tile, as_tensor
from workers.storage import open_store

FIXED_BYTES = 1 << 30
"""Memory of a worker beside its buffers: Python, torch and the intermediate results of its threads."""

LARGEST_SLAB = 8 << 20
"""The most that one read of one parent fetches: enough for an object store, little enough to stay in a cache."""

WIDEST_ELEMENT = 8
"""Bytes of the widest dtype."""

LARGEST_PIECE = 1 << 20
"""The most bytes of one point that are merged and written in one go."""

Progress = Callable[[int, int], None]
"""Called from any thread with the bytes read and the bytes written since its last call."""


def merge_task(
    task: MergeTask, *, device: str = "cpu", progress: Progress = lambda read, written: None
) -> list[Receipt]:
    """Merges, writes and publishes one shard of every point of the task, and leaves a receipt for each.

    No shard is visible before it is whole. Raises `BadInput` for integer tensors that differ between parents,
    `CorruptData` when an earlier receipt of a unit names other bytes, and the errors of the stores.
    """
    started = time.perf_counter()
    keep_freed_memory()
    with ExitStack() as stack:
        store = open_store(task.run)
        writers = [stack.enter_context(ShardWriter(store, point, task.tensors, progress)) for point in task.points]
        merge = _Merge(task, device, writers, progress, stack)
        merge.run()
        seconds = time.perf_counter() - started
        return [writer.publish(sorted(merge.nonfinite), merge.reader.bytes_read, seconds) for writer in writers]


@dataclass(frozen=True, slots=True)
class Budget:
    """How a task's memory is dealt out; every size in bytes."""

    slab: int
    slabs_ahead: int
    piece: int
    pieces: int
    held: int

    @classmethod
    def of(cls, task: MergeTask) -> Budget:
        """An eighth for reading ahead, a quarter for output that waits, the rest for tensors held whole."""
        room = max(task.memory_bytes - FIXED_BYTES, 256 << 20)
        parents, points = len(task.parents), len(task.points)
        slab = min(LARGEST_SLAB, max(room // 8 // parents // 4, 1 << 20))
        tile = TILE_ELEMENTS * max(DTYPE_BITS[tensor.dtype] for tensor in task.tensors) // 8
        pieces = task.threads + 2
        piece = tile * min(LARGEST_PIECE // tile, max(1, room // 4 // pieces // points // tile))
        slabs_ahead = min(16, max(2, room // 8 // (slab * parents)))
        return cls(slab, slabs_ahead, piece, pieces, max(0, room - room // 4 - 2 * slab * slabs_ahead * parents))


@dataclass(slots=True)
class _Piece:
    """Part of a slab that one thread merges for all points: (stretch, first element, end) and its bytes a point."""

    parts: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])
    bytes: int = 0


class _Merge:
    """One task at work."""

    def __init__(
        self,
        task: MergeTask,
        device: str,
        writers: Sequence[ShardWriter],
        progress: Progress,
        stack: ExitStack,
    ) -> None:
        self.task, self.device, self.writers = task, device, writers
        self.budget = Budget.of(task)
        self.nonfinite: set[str] = set()
        pinned = device.startswith("cuda")
        self.reader = stack.enter_context(
            ParentReader(task.parents, self.budget.slab, pinned=pinned, progress=progress)
        )
        self.outputs = BufferPool(self.budget.piece * len(writers), self.budget.pieces, pinned=pinned)
        self.compute = stack.enter_context(ThreadPoolExecutor(task.threads, "merge"))
        self.lanes = min(len(writers), max(2, task.threads))
        self.drains = {
            does: [stack.enter_context(ThreadPoolExecutor(1, does.__name__)) for _ in range(self.lanes)]
            for does in (ShardWriter.hash, ShardWriter.write)
        }
        self.writing: deque[Future[None]] = deque()
        self.checks: deque[Future[None]] = deque()

    def run(self) -> None:
        """The header, then every tensor in the order of the output."""
        header = header_bytes([(tensor.name, tensor.dtype, tensor.shape) for tensor in self.task.tensors])
        for writer in self.writers:
            writer.begin(header)
        groups = list(plan_slabs(self.task.tensors, self.budget.slab))
        fits = [self._bytes(group) <= self.budget.held or not self._asks(group) for group in groups]
        ahead = self._read(slab for group, fit in zip(groups, fits, strict=True) if fit for slab in group)
        for group, fit in zip(groups, fits, strict=True):
            if not fit:
                facts = self._facts(group, lambda group=group: self._read(group), keep=False)
                slabs: Iterable[Slab] = self._read(group)
            elif self._asks(group):
                held = [next(ahead) for _ in group]
                facts = self._facts(group, lambda held=held: held, keep=True)
                slabs = held
            else:
                facts, slabs = {}, (next(ahead) for _ in group)
            for slab in slabs:
                self._merge(slab, facts)
        for future in (*self.writing, *self.checks):
            future.result()

    def _bytes(self, group: Sequence[Sequence[Stretch]]) -> int:
        return sum(stretch.bytes_of(name) for slab in group for stretch in slab for name in stretch.tensor.sources)

    def _read(self, plan: Iterable[Sequence[Stretch]]) -> Iterator[Slab]:
        """The slabs of a plan in order, a few of them read ahead."""
        ahead: deque[Callable[[], Slab]] = deque()
        passing: dict[tuple[str, str], TensorHash] = {}
        for stretches in plan:
            ahead.append(self.reader.submit(stretches))
            if len(ahead) > self.budget.slabs_ahead:
                yield self._arrived(ahead.popleft()(), passing)
        while ahead:
            yield self._arrived(ahead.popleft()(), passing)

    def _arrived(self, slab: Slab, passing: dict[tuple[str, str], TensorHash]) -> Slab:
        """The slab on the device. Its bytes are checked meanwhile; nothing is published before the check has passed."""
        self.checks.extend(self.reader.check(slab, passing))
        while self.checks and self.checks[0].done():
            self.checks.popleft().result()
        if self.device == "cpu":
            return slab
        raw = [
            {name: as_tensor(part).to(self.device, non_blocking=True) for name, part in parts.items()}
            for parts in slab.raw
        ]
        return Slab(slab.stretches, raw, slab.buffers, slab.checks)

    # the facts about whole tensors that a method needs before it can merge the first element

    def _asks(self, group: Sequence[Sequence[Stretch]]) -> bool:
        return any(self._missing(stretch.tensor, {}) for stretch in group[0])

    def _missing(self, tensor: TensorMerge, facts: Facts) -> list[Reduction]:
        if tensor.dtype not in FLOATS or tensor.elements == 0:
            return []
        settings = dict.fromkeys(point.settings[tensor.setting] for point in self.task.points)
        return missing_facts(tensor, settings, facts, seed=self.task.seed, numerics=self.task.numerics)

    def _facts(
        self, group: Sequence[Sequence[Stretch]], slabs: Callable[[], Iterable[Slab]], *, keep: bool
    ) -> dict[str, Facts]:
        """The facts of every tensor of a group: a pass over its slabs, then another while answers raise questions."""
        facts: dict[str, Facts] = {stretch.tensor.name: {} for stretch in group[0]}
        while missing := {
            stretch.tensor.name: asked
            for stretch in group[0]
            if (asked := self._missing(stretch.tensor, facts[stretch.tensor.name]))
        }:
            shares: dict[tuple[str, Reduction], list[Any]] = {}
            for slab in slabs():
                for stretch, raw in zip(slab.stretches, slab.raw, strict=True):
                    name = stretch.tensor.name
                    tiles = self._tiles(stretch, raw, facts[name])
                    for of_tile in self.compute.map(_share_of(missing.get(name, ())), tiles):
                        for question, of_units in of_tile:
                            shares.setdefault((name, question), []).extend(of_units)
                if not keep:
                    self.reader.release(slab)
            for (name, question), of_units in shares.items():
                facts[name][question] = question.combine(of_units)
        return facts

    def _tiles(self, stretch: Stretch, raw: Mapping[str, Elements], facts: Facts) -> Iterator[Tile]:
        for start in range(0, stretch.stop - stretch.start, TILE_ELEMENTS):
            part = {name: elements[start : start + TILE_ELEMENTS] for name, elements in raw.items()}
            yield Tile(
                stretch.tensor.name,
                stretch.start + start,
                part,
                facts,
                self.task.seed,
                stretch.tensor.shape,
                raw,
                stretch.start,
            )

    # merging and writing

    def _merge(self, slab: Slab, facts: Mapping[str, Facts]) -> None:
        """Cuts a slab into pieces and sends each on its way: merged by one thread, then written in order."""
        pieces = list(_pieces(slab.stretches, self.budget.piece))
        if not pieces:
            self.reader.release(slab)
        left = _Countdown(len(pieces), lambda: self.reader.release(slab))
        for piece in pieces:
            output = self.outputs.acquire()  # here, in order: a later piece must never hold what an earlier one needs
            row_bytes = -(-piece.bytes // WIDEST_ELEMENT) * WIDEST_ELEMENT  # every row aligned for every dtype
            rows = output[: row_bytes * len(self.writers)].reshape(len(self.writers), row_bytes)[:, : piece.bytes]
            merged = self.compute.submit(self._merge_piece, slab, piece, rows, facts, left)
            used = _Countdown(2 * self.lanes, lambda output=output: self.outputs.release(output))
            for does, drains in self.drains.items():
                for lane, drain in enumerate(drains):
                    self.writing.append(drain.submit(self._drain, does, lane, merged, rows, used))
        while self.writing and self.writing[0].done():
            self.writing.popleft().result()

    def _drain(
        self,
        does: Callable[[ShardWriter, Any], None],
        lane: int,
        merged: Future[None],
        rows: Bytes,
        used: _Countdown,
    ) -> None:
        """Hashes or writes one piece for every point of a lane: each in a thread of its own, each in order."""
        try:
            merged.result()
            for index in range(lane, len(self.writers), self.lanes):
                does(self.writers[index], rows[index].data)
        finally:
            used.one()

    def _merge_piece(
        self, slab: Slab, piece: _Piece, rows: Bytes, facts: Mapping[str, Facts], left: _Countdown
    ) -> None:
        try:
            at = 0
            for index, start, stop in piece.parts:
                stretch = slab.stretches[index]
                size = (stop - start) * DTYPE_BITS[stretch.tensor.dtype] // 8
                self._merge_part(
                    Stretch(stretch.tensor, stretch.start + start, stretch.start + stop),
                    {name: elements[start:stop] for name, elements in slab.raw[index].items()},
                    rows[:, at : at + size].view(numpy_dtype(stretch.tensor.dtype)),
                    facts.get(stretch.tensor.name, {}),
                )
                at += size
        finally:
            left.one()

    def _merge_part(self, stretch: Stretch, raw: Mapping[str, Elements], rows: NDArray[Any], facts: Facts) -> None:
        tensor = stretch.tensor
        settings = [point.settings[tensor.setting] for point in self.task.points]
        if tensor.dtype not in FLOATS:
            for row, setting in zip(rows, settings, strict=True):
                put(row, common_value(tensor, setting, raw))
            return
        if any(_any_nonfinite(elements) for elements in raw.values()):
            self.nonfinite.add(tensor.name)
        formulas: list[tuple[NDArray[Any], Setting]] = []
        for row, setting in zip(rows, settings, strict=True):
            if (parent := copied(tensor, setting)) is not None:
                put(row, raw[parent])
            else:
                formulas.append((row, setting))
        if formulas:
            self._merge_by_formula(stretch, raw, formulas, facts)
        for writer, row, setting in zip(self.writers, rows, settings, strict=True):
            if any_nonfinite(row):
                writer.count_overflowed(tensor.name, _overflowed(row, [raw[name] for name in setting.parents]))

    def _merge_by_formula(
        self,
        stretch: Stretch,
        raw: Mapping[str, Elements],
        rows: Sequence[tuple[NDArray[Any], Setting]],
        facts: Facts,
    ) -> None:
        import torch

        one_torch_thread()
        outputs = [(as_tensor(row), setting) for row, setting in rows]
        with torch.inference_mode():
            for position, tile in enumerate(self._tiles(stretch, raw, facts)):
                written = slice(position * TILE_ELEMENTS, position * TILE_ELEMENTS + tile.elements)
                for output, setting in outputs:
                    output[written].copy_(merge_tile(tile, setting, stretch.tensor.arithmetic, self.task.numerics))


def _pieces(stretches: Sequence[Stretch], most_bytes: int) -> Iterator[_Piece]:
    """A slab's stretches in order, cut at whole tiles into pieces of at most `most_bytes` of one point's output."""
    piece = _Piece()
    for index, stretch in enumerate(stretches):
        width = DTYPE_BITS[stretch.tensor.dtype] // 8
        start, elements = 0, stretch.stop - stretch.start
        while start < elements:
            room = (most_bytes - piece.bytes) // width
            stop = elements if elements - start <= room else start + room // TILE_ELEMENTS * TILE_ELEMENTS
            if stop == start:
                yield piece
                piece = _Piece()
                continue
            piece.parts.append((index, start, stop))
            piece.bytes += (stop - start) * width
            start = stop
    if piece.parts:
        yield piece


def _any_nonfinite(elements: Elements) -> bool:
    if isinstance(elements, np.ndarray):
        return any_nonfinite(elements)
    return not bool(elements.isfinite().all())


def _overflowed(written: NDArray[Any], parents: Sequence[Elements]) -> int:
    """How many elements are NaN or infinite, and finite in every parent."""
    broken = nonfinite(written)
    for parent in parents:
        broken &= ~(nonfinite(parent) if isinstance(parent, np.ndarray) else (~parent.isfinite()).cpu().numpy())
    return int(broken.sum())


def _share_of(asked: Sequence[Reduction]) -> Callable[[Tile], list[tuple[Reduction, list[Any]]]]:
    """Answers every question for one tile, unit by unit."""

    def answer(tile: Tile) -> list[tuple[Reduction, list[Any]]]:
        one_torch_thread()
        return [(question, question.of(tile)) for question in asked]

    return answer


class _Countdown:
    """Calls `then` when `one` was called `count` times."""

    def __init__(self, count: int, then: Callable[[], None]) -> None:
        self._left = count
        self._then = then
        self._lock = threading.Lock()

    def one(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._then()

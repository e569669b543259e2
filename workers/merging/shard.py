"""The fused merge: one shard of a group of points, all computed from each parent tensor when it is read.

A few threads take pieces of the tensors in turn. Each merges its piece for all points, into memory that is used again
and again. Other threads hash and write the pieces in their order, while the first ones merge or learn facts:

    parents ──slabs──▶ pieces ──all points──▶ hash ──▶ write: one upload a point

A method that needs a fact about a whole tensor first (a norm, a cutoff) makes the loop pass over the tensor's slabs
again: in memory when they fit in the task's budget, else by reading them anew.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from queue import LifoQueue
from typing import Any, TypeVar

from jobs.merge_tasks import DTYPE_BITS, MergeTask, ParentTensor, Receipt, TensorMerge
from workers.checkpoints.dtypes import numpy_dtype
from workers.checkpoints.safetensors import header_bytes
from workers.digests import TensorHash
from workers.merging.buffers import PAGE, Bytes, keep_freed_memory, memory
from workers.merging.given import given_facts
from workers.merging.reading import ParentReader, Slab, Stretch, all_near, plan_slabs
from workers.merging.streams import Streams
from workers.merging.tiles import (
    Elements,
    Facts,
    TensorMerger,
    in_rows,
    missing_facts,
    one_torch_thread,
    overflowed,
    tiles,
)
from workers.merging.writing import ShardWriter
from workers.methods.coins import DRAWN, DrawnBefore
from workers.methods.tile import TILE_ELEMENTS, Reduction
from workers.storage import open_store

FIXED_BYTES = 1 << 30
"""Memory of a worker beside its buffers: Python, torch and the intermediate results of its threads."""

LARGEST_SLAB = 8 << 20
"""The most that one read of one parent fetches: enough for an object store."""

LARGEST_PIECE = 8 << 20
"""The most bytes of one point that are merged and written in one go: Python takes as long for a piece of any size."""

LARGEST_PIECES = 32 << 20
"""The most bytes of one piece for all points, though each point may have 2 MiB: methods hold lines and words for it."""

OUTPUT_OF_A_THREAD = 128 << 20
"""The memory for merged pieces of all points, for each thread; more where threads would wait for each other."""

PIECES_AHEAD = 4
"""So many merged pieces, or one for each thread, wait where memory allows: they are written while facts are learned."""

MOST_LANES = 8
"""The most pairs of threads that hash and write. More do not make a disk or a bucket faster."""

LEARNED_TOGETHER = 128 << 20
"""The most bytes of all parents in one pass for facts: at its end, threads stand still.

A larger tensor in a folder is read anew for each pass: from the page cache, that takes less than fresh memory does.
"""

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
    """How a task's memory is dealt out; every size in bytes.

    `outputs` counts the merged pieces in memory, each of all points.
    """

    slab: int
    slabs_ahead: int
    queued: int
    piece: int
    outputs: int
    held: int

    @classmethod
    def of(cls, task: MergeTask) -> Budget:
        """An eighth for reading ahead, a quarter for output, or two pieces; the rest for tensors held whole."""
        room = max(task.memory_bytes - FIXED_BYTES, 256 << 20)
        parents, points = len(task.parents), len(task.points)
        tile = TILE_ELEMENTS * max(DTYPE_BITS[tensor.dtype] for tensor in task.tensors) // 8
        wanted = task.threads + max(task.threads, PIECES_AHEAD)
        output = min(room // 4, max(OUTPUT_OF_A_THREAD * task.threads, wanted * tile * points)) // points
        largest = min(LARGEST_PIECE, max(LARGEST_PIECES // points, 2 << 20))
        outputs = max(2, min(wanted, output // tile))
        piece = tile * max(1, min(largest, output // outputs) // tile)
        near = all_near(task.parents)
        slab = min(LARGEST_SLAB, max(room // 8 // parents // max(4, task.threads), 1 << 20))
        slabs_ahead = min(16, max(2, room // 8 // (slab * parents)))
        queued = max(task.threads, slabs_ahead if near else 0)  # a near slab takes no memory before a thread has it
        held = max(0, room - room // 4 - 2 * slab * slabs_ahead * parents)
        return cls(slab, slabs_ahead, queued, piece, outputs, held)


@dataclass(slots=True)
class _Piece:
    """Part of a slab that one thread merges for all points: (stretch, first element, end) and its bytes a point.

    `place` is that of its first byte in the file.
    """

    parts: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])
    bytes: int = 0
    place: int = 0


@dataclass(frozen=True, slots=True)
class _Lane:
    """Two threads that hash and write some of the points. A thread that has work need not be woken."""

    of: slice
    hashing: ThreadPoolExecutor
    writing: ThreadPoolExecutor


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
        self.reader = stack.enter_context(
            ParentReader(task.parents, self.budget.slab, device=device, progress=progress)
        )
        lanes = min(task.threads, len(writers), MOST_LANES)
        self.lanes = [
            _Lane(
                slice(index, None, lanes),
                *(stack.enter_context(ThreadPoolExecutor(1, name)) for name in ("hash", "write")),
            )
            for index in range(lanes)
        ]  # they end after `compute`, whose pieces they write
        self.compute = stack.enter_context(ThreadPoolExecutor(task.threads, "merge"))
        self.over = False
        stack.callback(self._end)  # before the threads have done what is queued
        self.streams = Streams(device)
        self.free: LifoQueue[Bytes | None] = LifoQueue()
        """Memory for pieces, each of all points; None is memory that is made at its first use.

        What was written last comes first, since it is still in a cache.
        """
        for _ in range(self.budget.outputs):
            self.free.put(None)
        self.pieces = count()
        self.waiting: deque[tuple[int, Slab, _Piece, Mapping[str, TensorMerger], _Countdown]] = deque()
        """Pieces to merge, numbered."""
        self.cut = 0
        """The place of the next piece in the file."""
        self.merged: dict[int, tuple[Bytes, Sequence[Bytes]]] = {}
        """Pieces that wait for the one before: their memory, and in it the bytes of each point."""
        self.passed_on = 0
        self.passing_on = threading.Lock()
        self.alike: list[Mapping[tuple[int, str], bool]] = []
        self.merging: deque[Future[None]] = deque()
        self.behind: deque[Future[None]] = deque()
        """Checks of what was read; hashes and writes."""

    def run(self) -> None:
        """The header, then every tensor in the order of the output."""
        header = header_bytes([(tensor.name, tensor.dtype, tensor.shape) for tensor in self.task.tensors])
        for writer in self.writers:
            writer.begin(header)
        self.cut = len(header)
        given = given_facts(self.task.tensors, self.task.activations, self.task.grams)
        groups = list(self._joined(plan_slabs(self.task.tensors, self.budget.slab, self._in_rows)))
        ahead = self._read(slab for group, _, fit in groups if fit for slab in group)
        for group, ask, fit in groups:
            self._merge_group(group, ask, ahead if fit else None, given)
        for future in self.merging:
            future.result()
        for future in self.behind:  # all are there once all is merged
            future.result()
        for alike in self.alike:
            for (place, parent), holds in alike.items():
                self.writers[place].count_alike(parent, int(holds))

    def _merge_group(self, group: _Group, ask: bool, ahead: Iterator[Slab] | None, given: Mapping[str, Facts]) -> None:
        """Learns the facts of a group of slabs and sends it on its way; its slabs are read anew unless `ahead` fits."""
        drawn = DrawnBefore()
        tensors = _tensors(group)
        facts: dict[str, Facts] = {tensor.name: {**given[tensor.name], DRAWN: drawn} for tensor in tensors}
        if ahead is None:
            self._learn(group, facts, lambda: self._read(group), keep=False)
            slabs: Iterable[Slab] = self._read(group)
        elif ask:
            slabs = held = [next(ahead) for _ in group]
            self._learn(group, facts, lambda: held, keep=True)
        else:
            slabs = (next(ahead) for _ in group)
        mergers = {tensor.name: self._merger(tensor, facts) for tensor in tensors}
        for slab in slabs:
            self._merge(slab, mergers)
        self._note(mergers.values())

    def _end(self) -> None:
        """Has the threads skip what is queued: not all of a shard would be right."""
        self.over = True

    def _note(self, mergers: Iterable[TensorMerger]) -> None:
        """Merges that are not, as far as facts show; whether any equals a parent is seen when all of it is merged."""
        for merger in mergers:
            self.alike.append(merger.alike)
            for place in {place for place, _ in merger.alike}:
                self.writers[place].count_merged(merger.collapses[place])

    def _in_rows(self, tensor: TensorMerge) -> bool:
        return in_rows(point.settings[tensor.setting] for point in self.task.points)

    def _bytes(self, group: _Group) -> int:
        return sum(stretch.bytes_of(name) for slab in group for stretch in slab for name in stretch.tensor.sources)

    def _read(self, plan: Iterable[Sequence[Stretch]]) -> Iterator[Slab]:
        """The slabs of a plan in order, a few of them read ahead."""
        ahead: deque[Slab] = deque()
        passing: dict[tuple[str, str], TensorHash] = {}
        for stretches in plan:
            ahead.append(self.reader.submit(stretches))
            if len(ahead) > self.budget.slabs_ahead:
                yield self._checked(ahead.popleft(), passing)
        while ahead:
            yield self._checked(ahead.popleft(), passing)

    def _checked(self, slab: Slab, passing: dict[tuple[str, str], TensorHash]) -> Slab:
        """The slab, whose bytes are checked meanwhile; nothing is published before the check has passed."""
        self.behind.extend(self.reader.check(slab, passing))
        self._notice()
        return slab

    def _notice(self) -> None:
        """Raises the error of a check, hash or write that is done, in their order."""
        while self.behind and self.behind[0].done():
            self.behind.popleft().result()

    # the facts about whole tensors that a method needs before it can merge the first element

    def _joined(self, groups: Iterable[_Group]) -> Iterator[tuple[_Group, bool, bool]]:
        """Groups in their order, whether each asks for facts and whether it fits in memory meanwhile.

        Neighbours that do both are joined: threads stand still at the end of each pass over a group.
        """
        joined: _Group = []
        size = 0
        for group in groups:
            tensors, more = _tensors(group), self._bytes(group)
            asks = any(self._missing(tensor, {}) for tensor in tensors)
            fits = not asks or more <= self._most_held(tensors)
            joins = asks and fits
            if joined and not (joins and size + more <= min(LEARNED_TOGETHER, self.budget.held)):
                yield joined, True, True
                joined, size = [], 0
            if joins:
                joined, size = [*joined, *group], size + more
            else:
                yield group, asks, fits
        if joined:
            yield joined, True, True

    def _most_held(self, tensors: Iterable[TensorMerge]) -> int:
        """The most bytes of a group in memory while its facts are learned.

        A tensor with a digest, which each read would check anew, is held where it fits, and so is a derived one.
        """
        sources = [source for tensor in tensors for source in tensor.sources.values()]
        cheap = all(isinstance(source, ParentTensor) and not source.digest for source in sources)
        near = self.device == "cpu" and all_near(self.task.parents)
        return min(LEARNED_TOGETHER, self.budget.held) if near and cheap else self.budget.held

    def _missing(self, tensor: TensorMerge, facts: Facts) -> list[Reduction]:
        settings = (point.settings[tensor.setting] for point in self.task.points)
        return missing_facts(tensor, settings, facts, seed=self.task.seed, numerics=self.task.numerics)

    def _learn(
        self,
        group: _Group,
        facts: Mapping[str, Facts],
        slabs: Callable[[], Iterable[Slab]],
        *,
        keep: bool,
    ) -> None:
        """The facts of every tensor of a group: a pass over its slabs, then another while answers raise questions."""
        while missing := {
            tensor.name: asked for tensor in _tensors(group) if (asked := self._missing(tensor, facts[tensor.name]))
        }:
            shares: dict[tuple[str, Reduction], list[Any]] = {}
            answering: deque[Future[_Shares]] = deque()
            for slab in slabs():
                answering.append(self.compute.submit(self._shares, slab, missing, facts, keep=keep))
                for some in self._oldest(answering):
                    _add(shares, some)
            while answering:
                _add(shares, answering.popleft().result())
            combining = [(key, self.compute.submit(key[1].combine, of_units)) for key, of_units in shares.items()]
            for (name, question), combined in combining:
                facts[name][question] = combined.result()

    def _oldest(self, under_way: deque[Future[_Result]]) -> Iterator[_Result]:
        """The results of the older half, once too many are under way: a thread that is woken takes time from others."""
        if len(under_way) > self.budget.queued:
            half = len(under_way) // 2
            wait([under_way[half - 1]])
            for _ in range(half):
                yield under_way.popleft().result()

    def _shares(
        self, slab: Slab, missing: Mapping[str, Sequence[Reduction]], facts: Mapping[str, Facts], *, keep: bool
    ) -> _Shares:
        """A slab's answers to the questions about its tensors."""
        one_torch_thread()
        shares: _Shares = {}
        with self.streams.own():
            for stretch, raw in zip(slab.stretches, slab.raw, strict=True):
                tensor, name = stretch.tensor, stretch.tensor.name
                if name not in missing:
                    continue
                place, asked = (stretch.start, stretch.stop, raw, stretch.first), missing[name]
                units = min(question.units for question in asked)
                for tile in tiles(tensor, *place, facts[name], self.task.seed, units=units, asked=asked):
                    for question in asked:
                        shares.setdefault((name, question), []).extend(question.of(tile))
        if not keep:
            self.reader.release(slab)
        return shares

    # merging and writing

    def _merger(self, tensor: TensorMerge, facts: Mapping[str, Facts]) -> TensorMerger:
        settings = [point.settings[tensor.setting] for point in self.task.points]
        return TensorMerger(
            tensor, settings, facts[tensor.name], seed=self.task.seed, numerics=self.task.numerics, device=self.device
        )

    def _merge(self, slab: Slab, mergers: Mapping[str, TensorMerger]) -> None:
        """Cuts a slab into pieces and sends each on its way."""
        pieces = list(_pieces(slab.stretches, self.budget.piece))
        if not pieces:
            self.reader.release(slab)
        left = _Countdown(len(pieces), lambda: self.reader.release(slab))
        for piece in pieces:
            for _ in self._oldest(self.merging):
                pass
            self._notice()
            piece.place = self.cut
            self.cut += piece.bytes
            self.waiting.append((next(self.pieces), slab, piece, mergers, left))
            self.merging.append(self.compute.submit(self._merge_next))

    def _merge_next(self) -> None:
        """Merges the next piece for every point, and passes it on.

        A thread takes memory before it takes a piece, so the oldest piece always has memory.
        """
        whole = self._room()
        number, slab, piece, mergers, left = self.waiting.popleft()
        rows: Sequence[Bytes] = ()
        try:
            rows = self._rows(whole, piece)
            if self.over:
                return
            at = 0
            for index, start, stop in piece.parts:
                tensor = slab.stretches[index].tensor
                size = (stop - start) * DTYPE_BITS[tensor.dtype] // 8
                outputs = [row[at : at + size].view(numpy_dtype(tensor.dtype)) for row in rows]
                with self.streams.own():
                    self._merge_part(mergers[tensor.name], slab, index, start, outputs)
                at += size
            left.one()
        except BaseException:
            self._end()
            raise
        finally:
            self._pass_on(number, whole, rows)

    def _room(self) -> Bytes:
        """Memory for one piece of every point; waits until one is written."""
        whole = self.free.get()
        if whole is not None:
            return whole
        try:
            each = self.budget.piece + (PAGE if self.device == "cpu" else 0)
            return memory(len(self.writers) * each, pinned=self.device != "cpu")
        except BaseException:
            self._end()
            self.free.put(None)  # else the threads that wait would wait for ever
            raise

    def _rows(self, whole: Bytes, piece: _Piece) -> Sequence[Bytes]:
        """A piece of each point, at the place in a page that it has in the file: so a disk can take it from there.

        Page-locked memory is rounded up to a power of two, and not all drivers let a disk read it.
        """
        begin = piece.place % PAGE if self.device == "cpu" else 0
        return list(whole.reshape(len(self.writers), -1)[:, begin : begin + piece.bytes])

    def _pass_on(self, number: int, whole: Bytes, rows: Sequence[Bytes]) -> None:
        """Gives pieces to the threads that hash and write, in the order of their numbers."""
        with self.passing_on:
            self.merged[number] = whole, rows
            while (piece := self.merged.pop(self.passed_on, None)) is not None:
                self.passed_on += 1
                try:
                    self._write(*piece)
                except BaseException:  # no thread could begin: others wait for memory, and some may still use this
                    self._end()
                    self.free.put(None)
                    raise

    def _write(self, whole: Bytes, rows: Sequence[Bytes]) -> None:
        """Has a piece of every point hashed and written; then its memory is free."""
        left = _Countdown(2 * len(self.lanes), lambda: self.free.put(whole))

        def each(of: slice, step: Callable[[ShardWriter, memoryview], None]) -> None:
            try:
                for writer, row in zip(self.writers[of], rows[of], strict=True):
                    if not self.over:
                        step(writer, row.data)
            except BaseException:
                self._end()
                raise
            finally:
                left.one()

        for lane in self.lanes:
            self.behind.append(lane.hashing.submit(each, lane.of, ShardWriter.hash))
            self.behind.append(lane.writing.submit(each, lane.of, ShardWriter.write))

    def _merge_part(
        self, merger: TensorMerger, slab: Slab, index: int, start: int, outputs: Sequence[Elements]
    ) -> None:
        stretch, around = slab.stretches[index], slab.raw[index]
        begin = stretch.start + start
        parents_broken, broken = merger.run(begin, around, stretch.first, outputs)
        if parents_broken:
            self.nonfinite.add(stretch.tensor.name)
        inside = slice(begin - stretch.first, begin - stretch.first + len(outputs[0]))
        for place in broken:
            writer = self.writers[place]
            parents = writer.point.settings[stretch.tensor.setting].parents
            elements = overflowed(outputs[place], [around[name][inside] for name in parents])
            writer.count_overflowed(stretch.tensor.name, elements)


_Group = Sequence[Sequence[Stretch]]
_Shares = dict[tuple[str, Reduction], list[Any]]
_Result = TypeVar("_Result")


def _tensors(group: _Group) -> list[TensorMerge]:
    """The tensors of a group of slabs, each once."""
    return [*{stretch.tensor.name: stretch.tensor for slab in group for stretch in slab}.values()]


def _add(shares: _Shares, more: _Shares) -> None:
    for key, of_units in more.items():
        shares.setdefault(key, []).extend(of_units)


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

"""Parents' bytes for stretches of tensors: neighbours in a file come in one request, into reused memory.

For a CPU, bytes in the page cache are used where they lie, where the system maps the file.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType

import numpy as np

from jobs.merge_tasks import DTYPE_BITS, Parent, ParentTensor, TensorMerge, stored_bytes
from workers.checkpoints.dtypes import numpy_dtype
from workers.checkpoints.hashing import check_digest
from workers.digests import TensorHash
from workers.merging.buffers import Bytes, memory
from workers.merging.deriving import Deriving, is_near
from workers.merging.streams import Mark
from workers.merging.tiles import Elements, bytes_of
from workers.methods.tile import TILE_ELEMENTS, as_tensor
from workers.storage import open_store
from workers.storage.local import LocalStore, MappedBytes

ALIGNMENT = 64
READS_AT_ONCE = 16

_Parts = Sequence[Mapping[str, Elements]]


@dataclass(frozen=True, slots=True)
class _Read:
    """One parent's part of a slab: a typed 1-D view for each stretch that the parent has, and the memory of these."""

    views: Mapping[int, Elements]
    buffer: Bytes | None
    mapped: Sequence[MappedBytes]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Elements `[start, stop)` of one tensor, read together with those around it from `first` to `end`."""

    tensor: TensorMerge
    start: int
    stop: int
    first: int
    end: int

    def bytes_of(self, parent: str) -> int:
        """The bytes of one parent's elements."""
        return (self.end - self.first) * DTYPE_BITS[self.tensor.sources[parent].dtype] // 8


class Slab:
    """Stretches that follow each other in the output, with what is read of every parent for each, in its dtype."""

    def __init__(
        self, stretches: Sequence[Stretch], read: Callable[[], tuple[_Parts, Sequence[_Read]]], device: str
    ) -> None:
        self.stretches = stretches
        self.reads: Sequence[_Read] = ()
        self.checks: list[Future[None]] = []
        self.copied: Mark | None = None
        """The copies of the buffers to a GPU, once they are begun."""
        self._device = device
        self._read: Callable[[], tuple[_Parts, Sequence[_Read]]] | None = read
        self._raw: _Parts = ()
        self._lock = threading.Lock()

    @property
    def raw(self) -> _Parts:
        """The elements of each stretch by parent; waits until they are read, or reads them."""
        with self._lock:
            if self._read is not None:
                self._raw, self.reads = self._read()
                self._read, self.copied = None, Mark(self._device)
        assert self.copied is not None
        self.copied.before_mine()
        return self._raw

    def forget(self) -> None:
        """Holds the memory of what was read no longer."""
        self._raw, self.reads = (), ()


def plan_slabs(
    tensors: Sequence[TensorMerge], slab_bytes: int, in_rows: Callable[[TensorMerge], bool] = lambda tensor: False
) -> Iterator[list[list[Stretch]]]:
    """Groups of slabs, in the tensors' order: small tensors share one slab, a large one has a group of several.

    No slab asks more than `slab_bytes` of a parent, and every tensor lies within one group. A stretch of a tensor
    `in_rows` is read with the rest of its first and last row; a slab of rows that are wider than it is larger.
    """
    together: list[Stretch] = []
    size = 0
    for tensor in tensors:
        whole = Stretch(tensor, 0, tensor.elements, 0, tensor.elements)
        widest = max(whole.bytes_of(parent) for parent in tensor.sources) + ALIGNMENT
        if together and size + widest > slab_bytes:
            yield [together]
            together, size = [], 0
        if widest <= slab_bytes:
            together.append(whole)
            size += widest
        else:
            yield [
                [stretch]
                for stretch in _cut(tensor, slab_bytes - ALIGNMENT, tensor.shape[-1] if in_rows(tensor) else 1)
            ]
    if together:
        yield [together]


def _cut(tensor: TensorMerge, slab_bytes: int, row: int) -> Iterator[Stretch]:
    width = max(DTYPE_BITS[source.dtype] // 8 for source in tensor.sources.values())
    room = slab_bytes // width - 2 * (row - 1)
    tiles = -(-tensor.elements // TILE_ELEMENTS)
    most = max(room // TILE_ELEMENTS, -(-row // TILE_ELEMENTS))
    step = -(-tiles // -(-tiles // most)) * TILE_ELEMENTS  # slabs alike: threads that share them end together
    for start in range(0, tensor.elements, step):
        stop = min(start + step, tensor.elements)
        yield Stretch(tensor, start, stop, start // row * row, -(-stop // row) * row)


def all_near(parents: Mapping[str, Parent]) -> bool:
    """Whether every parent is in memory or in a folder, where a read takes a copy of memory or less."""
    return all(is_near(parent.url) for parent in parents.values())


class ParentReader:
    """Reads slabs of pinned parents. `bytes_read` counts the bytes requested from the stores.

    Several slabs are read at once and ahead, unless all parents are near: then whoever needs a slab reads it. Of a
    parent that has a manifest, `check` holds every tensor against its digest. A derived tensor is in memory as a whole
    until the last part of it is read, unless `Deriving.in_parts` has it by rows.
    """

    def __init__(
        self, parents: Mapping[str, Parent], slab_bytes: int, *, device: str, progress: Callable[[int, int], None]
    ) -> None:
        self._near = all_near(parents)
        self._parents = parents
        self._stores = {name: open_store(parent.url) for name, parent in parents.items()}
        self._slab_bytes = slab_bytes
        self._device = device
        self._progress = progress
        self._deriving = Deriving(parents)
        self._opened: dict[tuple[str, str], _Opened] = {}
        self._free: list[Bytes] = []
        self._in_use: set[MappedBytes] = set()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(READS_AT_ONCE, "read")
        self._checkers = {name: ThreadPoolExecutor(1, "check") for name in parents}
        self.bytes_read = 0

    def __enter__(self) -> ParentReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in (self._pool, *self._checkers.values()):
            pool.shutdown(cancel_futures=True)
        if isinstance(error, Exception):  # if a file has changed meanwhile, this may be why
            for part in self._in_use:
                part.release()

    def submit(self, stretches: Sequence[Stretch]) -> Slab:
        """A slab that will be read; `raw` waits for it."""
        parents = list(dict.fromkeys(name for stretch in stretches for name in stretch.tensor.sources))
        if self._near:
            reads = {name: partial(self._read, name, stretches) for name in parents}
        else:
            reads = {name: self._pool.submit(self._read, name, stretches).result for name in parents}

        def read() -> tuple[_Parts, Sequence[_Read]]:
            found = {name: read() for name, read in reads.items()}
            parts = [
                {name: self._placed(found[name].views[index]) for name in stretch.tensor.sources}
                for index, stretch in enumerate(stretches)
            ]
            return parts, [*found.values()]

        return Slab(stretches, read, self._device)

    def check(self, slab: Slab, passing: dict[tuple[str, str], TensorHash]) -> list[Future[None]]:
        """Begins to hold a slab against the parents' digests; the results raise as `check_digest` does.

        `passing` belongs to one pass over the slabs of whole tensors, in order: the hashes of the unfinished ones.
        """
        begun = [
            self._checkers[name].submit(self._check, name, slab, index, passing)
            for index, stretch in enumerate(slab.stretches)
            for name, source in stretch.tensor.sources.items()
            if isinstance(source, ParentTensor) and source.digest
        ]
        slab.checks.extend(begun)
        return begun

    def _check(self, name: str, slab: Slab, index: int, passing: dict[tuple[str, str], TensorHash]) -> None:
        stretch = slab.stretches[index]
        part = slab.raw[index][name][stretch.start - stretch.first : stretch.stop - stretch.first]
        tensor, source = stretch.tensor, stretch.tensor.sources[name]
        assert isinstance(source, ParentTensor), "inputs of a derived tensor are checked when they are read"
        so_far = passing.setdefault((name, tensor.name), TensorHash(source.digest))
        so_far.update(bytes_of(part))
        if stretch.stop == tensor.elements:
            del passing[name, tensor.name]
            check_digest(
                so_far.digest(), self._stores[name], self._parents[name].files[source.file], name, tensor.name, source
            )

    def release(self, slab: Slab) -> None:
        """Gives a slab's memory back; its tensors must not be looked at any more.

        Raises `ObjectChanged` or `StorageError` if a mapped file has not stayed as it was.
        """
        wait(slab.checks)
        if slab.copied is not None:
            slab.copied.wait()  # else the next bytes overtake the copy of these
        mapped = [part for read in slab.reads for part in read.mapped]
        for part in mapped:
            part.release()
        buffers = [read.buffer for read in slab.reads if read.buffer is not None]
        with self._lock:
            self._in_use.difference_update(mapped)
            self._free.extend(buffer for buffer in buffers if buffer.size == self._slab_bytes)
        slab.forget()  # other memory, as that of derived tensors, is free before the next slabs are read

    def _read(self, name: str, stretches: Sequence[Stretch]) -> _Read:
        """One parent's part of a slab; bytes that are not mapped are read into a buffer."""
        runs = _runs(name, stretches)
        mapped = [self._mapped(name, run, stretches) for run in runs]
        buffer = self._buffer(runs[-1].at + runs[-1].size) if None in mapped else None
        views: dict[int, Elements] = {}
        for run, lies in zip(runs, mapped, strict=True):
            if lies is not None:
                data = np.frombuffer(lies.data, np.uint8)
            else:
                assert buffer is not None
                data = buffer[run.at : run.at + run.size]
                if run.size:  # a bucket cannot be asked for an empty range
                    file = self._parents[name].files[run.file]
                    self._stores[name].read_into(file.key, data.data, start=run.start, etag=file.etag)
            for index, at, size in run.parts:
                dtype = numpy_dtype(stretches[index].tensor.sources[name].dtype)
                views[index] = data[at - run.at : at - run.at + size].view(dtype)
            with self._lock:
                self.bytes_read += run.size
            self._progress(run.size, 0)
        for index, stretch in enumerate(stretches):
            if name in stretch.tensor.sources and index not in views:
                views[index] = self._derived(name, stretch)
        return _Read(views, buffer, [each for each in mapped if each is not None])

    def _mapped(self, name: str, run: _Run, stretches: Sequence[Stretch]) -> MappedBytes | None:
        """A run that is in the page cache, for a CPU, if its tensors lie at multiples of their width and lack digests.

        Mapped bytes may leave the cache and be read from the disk again after they were held against a digest.
        """
        store = self._stores[name]
        if self._device != "cpu" or not isinstance(store, LocalStore):
            return None
        for index, at, _ in run.parts:
            source = stretches[index].tensor.sources[name]
            assert isinstance(source, ParentTensor)
            if source.digest or (run.start + at - run.at) % (DTYPE_BITS[source.dtype] // 8):
                return None
        file = self._parents[name].files[run.file]
        part = store.mapped(file.key, start=run.start, length=run.size, etag=file.etag)
        if part is None or not part.are_cached():
            return None
        with self._lock:
            self._in_use.add(part)
        return part

    def _derived(self, name: str, stretch: Stretch) -> Elements:
        """A stretch of a parent's derived tensor; what all its stretches need is read once."""
        tensor, source = stretch.tensor, stretch.tensor.sources[name]
        with self._lock:
            opened = self._opened.setdefault((name, tensor.name), _Opened(left=tensor.elements))
        with opened.lock:
            if opened.part is None:
                opened.part = self._deriving.in_parts(name, source, tensor.name)
                with self._lock:
                    self.bytes_read += stored_bytes(source)
                self._progress(stored_bytes(source), 0)
        elements = opened.part(stretch.first, stretch.end)
        with self._lock:
            opened.left -= stretch.stop - stretch.start
            if opened.left == 0:
                del self._opened[name, tensor.name]
        return elements

    def _placed(self, elements: Elements) -> Elements:
        return elements if self._device == "cpu" else as_tensor(elements).to(self._device, non_blocking=True)

    def _buffer(self, size: int) -> Bytes:
        with self._lock:
            if self._free and size <= self._slab_bytes:
                return self._free.pop()
        return memory(max(size, self._slab_bytes), pinned=self._device != "cpu")


@dataclass(slots=True)
class _Opened:
    """A derived tensor by its parts, and how many of its elements are not read yet."""

    left: int
    part: Callable[[int, int], Elements] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(slots=True)
class _Run:
    """Bytes `[start, start + size)` of one file, at `at` of a buffer if they are read; `parts`: (stretch, at, size)."""

    file: int
    start: int
    size: int
    at: int
    parts: list[tuple[int, int, int]]


def _runs(parent: str, stretches: Sequence[Stretch]) -> list[_Run]:
    """Neighbours in a file make one run where every tensor of it ends up aligned."""
    runs: list[_Run] = []
    for index, stretch in enumerate(stretches):
        source = stretch.tensor.sources.get(parent)
        if not isinstance(source, ParentTensor):
            continue
        width = DTYPE_BITS[source.dtype] // 8
        file, start, end = source.file, source.start + stretch.first * width, source.start + stretch.end * width
        last = runs[-1] if runs else None
        if last and last.file == file and last.start + last.size == start and (last.at + last.size) % width == 0:
            last.parts.append((index, last.at + last.size, end - start))
            last.size += end - start
        else:
            at = -(-(last.at + last.size) // ALIGNMENT) * ALIGNMENT if last else 0
            runs.append(_Run(file, start, end - start, at, [(index, at, end - start)]))
    return runs

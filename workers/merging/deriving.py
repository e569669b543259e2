"""Whole tensors of parents, read as they are stored or computed by their rule while they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from jobs.errors import NotFinite
from jobs.merge_tasks import Derived, LowRank, Merged, Parent, ParentTensor, Rows, Scaled, Source, Strided, TensorMerge
from jobs.yaml_nodes import quoted
from workers.checkpoints.dtypes import numpy_dtype
from workers.checkpoints.hashing import check_digest
from workers.digests import TensorHash, digest_of
from workers.merging.buffers import memory
from workers.merging.parent_rules import low_rank, row_adapter, scaled, strided
from workers.merging.tiles import Elements, Facts, TensorMerger, learn, overflowed
from workers.methods.tile import TILE_ELEMENTS
from workers.storage import open_store
from workers.storage.local import LocalStore, MappedBytes

PIECE_ELEMENTS = 16 * TILE_ELEMENTS
"""What one thread merges at a time: large enough to cost little, small enough that no thread waits long for others."""


Compute = Callable[[Any, Derived, Sequence[Elements]], Elements]
"""From (rule, tensor, inputs) to the elements of the tensor; all elements are 1-D, each in its dtype."""


def is_near(url: str) -> bool:
    """Whether a store is memory or a folder, where a read takes no longer than a copy."""
    return "://" not in url or url.startswith("memory://")


class Deriving:
    """Reads whole tensors of pinned parents."""

    def __init__(self, parents: Mapping[str, Parent]) -> None:
        self._parents = parents
        self._stores = {name: open_store(parent.url) for name, parent in parents.items()}
        self._mapped: list[MappedBytes] = []

    def whole(self, parent: str, source: Source, tensor: str) -> Elements:
        """The elements of a tensor, 1-D and in the source's dtype; errors as of the stores and of `check_digest`.

        `NotFinite` if a merge on the way has NaN or infinity where its inputs have numbers.
        """
        if isinstance(source, ParentTensor):
            return self._stored(parent, source, tensor)
        inputs = [self.whole(name, part, tensor) for name, part in source.inputs]
        try:
            return RULES[type(source.rule)](source.rule, source, inputs)
        except NotFinite as error:
            raise NotFinite(f"the merge {quoted(parent)}: {error}") from None

    def mapped(self, parent: str, source: Source, tensor: str) -> Elements:
        """As `whole`, until `release`; a stored tensor in a folder is not copied: its memory is that of the file."""
        store = self._stores[parent]
        if not isinstance(source, ParentTensor) or not isinstance(store, LocalStore):
            return self.whole(parent, source, tensor)
        file = self._parents[parent].files[source.file]
        part = store.mapped(file.key, start=source.start, length=source.end - source.start, etag=file.etag)
        if part is None:
            return self.whole(parent, source, tensor)
        self._mapped.append(part)
        if source.digest:
            check_digest(digest_of(part.data, like=source.digest), store, file, parent, tensor, source)
        return np.frombuffer(part.data, numpy_dtype(source.dtype))

    def release(self) -> None:
        """Ends the use of all that was `mapped`: `ObjectChanged` or `StorageError` if it has not stayed as it was."""
        while self._mapped:
            self._mapped.pop().release()

    def pieces(self, parent: str, source: Source, tensor: str, elements: int) -> Iterator[Elements]:
        """The elements of a tensor in order, at most so many at once; raises as `whole` does.

        A stored tensor of a parent that is near is read piece by piece into the same memory: the next piece overwrites
        this one.
        """
        if not isinstance(source, ParentTensor) or not is_near(self._parents[parent].url):
            whole = self.whole(parent, source, tensor)
            yield from (whole[start : start + elements] for start in range(0, whole.size, elements))
            return
        store, file = self._stores[parent], self._parents[parent].files[source.file]
        dtype, hashed = numpy_dtype(source.dtype), TensorHash(source.digest) if source.digest else None
        data = memory(min(elements * dtype.itemsize, source.end - source.start))
        for start in range(source.start, source.end, elements * dtype.itemsize):
            piece = data[: source.end - start]
            store.read_into(file.key, piece.data, start=start, etag=file.etag)
            if hashed is not None:
                hashed.update(piece.data)
            yield piece.view(dtype)
        if hashed is not None:
            check_digest(hashed.digest(), store, file, parent, tensor, source)

    def in_parts(self, parent: str, source: Source, tensor: str) -> Callable[[int, int], Elements]:
        """A function that has the elements [first, end) of a tensor; raises as `whole` does.

        It reads and computes them anew, in whole rows, where an adapter changes a stored tensor. Every other tensor is
        computed as a whole, now.
        """
        if isinstance(source, Derived) and isinstance(source.rule, LowRank) and len(source.inputs) == 3:
            (name, weight), *factors = source.inputs
            if isinstance(weight, ParentTensor) and not weight.digest:
                a, b = (self.whole(label, part, tensor) for label, part in factors)
                if adapt := row_adapter(source.rule, source, a, b):
                    return partial(self._adapted, adapt, name, weight, tensor, source.shape[1])
        whole = self.whole(parent, source, tensor)
        return lambda first, end: whole[first:end]

    def _adapted(
        self,
        adapt: Callable[[int, Elements], Elements],
        parent: str,
        at: ParentTensor,
        tensor: str,
        columns: int,
        first: int,
        end: int,
    ) -> Elements:
        row, stop = first // columns, -(-end // columns)
        width = columns * numpy_dtype(at.dtype).itemsize
        rows = replace(at, start=at.start + row * width, end=at.start + stop * width)
        elements = adapt(row, self._stored(parent, rows, tensor))
        return elements[first - row * columns : end - row * columns]

    def _stored(self, parent: str, at: ParentTensor, tensor: str) -> Elements:
        store, file = self._stores[parent], self._parents[parent].files[at.file]
        data = memory(at.end - at.start)
        if at.end > at.start:  # a bucket cannot be asked for an empty range
            store.read_into(file.key, data.data, start=at.start, etag=file.etag)
            if at.digest:
                check_digest(digest_of(data.data, like=at.digest), store, file, parent, tensor, at)
        return data.view(numpy_dtype(at.dtype))


def _merged(rule: Merged, derived: Derived, inputs: Sequence[Elements]) -> Elements:
    raw = {name: elements for (name, _), elements in zip(derived.inputs, inputs, strict=True)}
    tensor = TensorMerge(rule.name, derived.dtype, derived.shape, dict(derived.inputs), 0, rule.arithmetic)
    facts: Facts = {}
    learn(tensor, rule.setting, raw, facts, PIECE_ELEMENTS, seed=rule.seed, numerics=rule.numerics)
    merger = TensorMerger(tensor, [rule.setting], facts, seed=rule.seed, numerics=rule.numerics)
    output = np.empty(tensor.elements, numpy_dtype(tensor.dtype))
    lost = 0
    for start in range(0, tensor.elements, PIECE_ELEMENTS):
        piece = slice(start, start + PIECE_ELEMENTS)
        _, broken = merger.run(start, raw, 0, [output[piece]])
        if broken:
            lost += overflowed(output[piece], [raw[name][piece] for name in rule.setting.parents])
    if lost:
        raise NotFinite(
            f"of tensor {rule.name}, {lost:,} numbers are NaN or infinite that are finite in its parents; give this"
            " merge another `dtype:`, such as bfloat16, or smaller weights"
        )
    return output


def _rows(rule: Rows, derived: Derived, inputs: Sequence[Elements]) -> Elements:
    """Means are taken in float64 and rounded once."""
    rows, *width = derived.shape
    parts = [part.reshape(-1, *width) for part in inputs]
    output = np.zeros((rows, *width), numpy_dtype(derived.dtype))
    for number, first, at, count in rule.runs:
        output[first : first + count] = parts[number][at : at + count]
    for row, of in rule.means:
        output[row] = np.mean([parts[number][at] for number, at in of], axis=0, dtype=np.float64)
    if rule.averaged is not None:
        output[rule.averaged :] = np.mean(output[: rule.averaged], axis=0, dtype=np.float64)
    return output.reshape(-1)


RULES: Mapping[type, Compute] = {Merged: _merged, Rows: _rows, LowRank: low_rank, Scaled: scaled, Strided: strided}
"""The computation of each rule."""

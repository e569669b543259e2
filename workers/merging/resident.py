"""Parents that stay in memory, and the points merged from them without ever being written.

The result equals the written point bit for bit: the same tiles, the same settings, the same rounding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.merge_tasks import Parent, Setting, TensorMerge
from workers.checkpoints.dtypes import numpy_dtype
from workers.checkpoints.hashing import check_digest
from workers.digests import digest_of
from workers.merging.buffers import memory
from workers.merging.tiles import Elements, Facts, TensorMerger, bytes_of, missing_facts, one_torch_thread, tiles
from workers.methods.tile import Reduction, as_tensor
from workers.storage import open_store

if TYPE_CHECKING:
    from torch import Tensor

READS_AT_ONCE = 8


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
    ) -> None:
        self._tensors = tensors
        self._seed = seed
        self._numerics = numerics
        self._device = device
        self._threads = max(1, threads)
        self._facts: dict[str, Facts] = {tensor.name: {} for tensor in tensors}
        stores = {name: open_store(parent.url) for name, parent in parents.items()}

        def read(tensor: TensorMerge) -> dict[str, Elements]:
            found: dict[str, Elements] = {}
            for name, at in tensor.sources.items():
                file = parents[name].files[at.file]
                data = memory(at.end - at.start)
                if at.end > at.start:
                    stores[name].read_into(file.key, data.data, start=at.start, etag=file.etag)
                    if at.digest:
                        check_digest(digest_of(data.data, like=at.digest), stores[name], file, tensor, at)
                found[name] = self._placed(data.view(numpy_dtype(at.dtype)))
            return found

        with ThreadPoolExecutor(READS_AT_ONCE, "read") as pool:
            self._raw = {tensor.name: raw for tensor, raw in zip(tensors, pool.map(read, tensors), strict=True)}

    def merged(
        self, settings: Sequence[Setting], digests: dict[str, str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of one point by name, in its stored dtype and shape, on the device.

        `settings[tensor.setting]` is the point's recipe for a tensor, as in a merge task. `digests`, if given, receives
        the digest of each tensor's bytes, as a manifest has them.
        """
        with ThreadPoolExecutor(self._threads, "merge") as pool:
            ahead: deque[tuple[str, Future[tuple[Tensor, str]]]] = deque()
            for tensor in self._tensors:
                setting = settings[tensor.setting]
                ahead.append((tensor.name, pool.submit(self._merged, tensor, setting, hashed=digests is not None)))
                if len(ahead) > 2 * self._threads:
                    yield _next(ahead, digests)
            while ahead:
                yield _next(ahead, digests)

    def _merged(self, tensor: TensorMerge, setting: Setting, *, hashed: bool) -> tuple[Tensor, str]:
        merged = self._merge(tensor, setting)
        digest = digest_of(bytes_of(merged)) if hashed else ""
        return as_tensor(merged).view(tensor.shape), digest

    def _merge(self, tensor: TensorMerge, setting: Setting) -> Elements:
        raw, facts = self._raw[tensor.name], self._facts[tensor.name]
        while asked := missing_facts(tensor, [setting], facts, seed=self._seed, numerics=self._numerics):
            one_torch_thread()
            shares: dict[Reduction, list[Any]] = {question: [] for question in asked}
            for tile in tiles(tensor, 0, raw, facts, self._seed, whole=self._device != "cpu"):
                for question in asked:
                    shares[question].extend(question.of(tile))
            for question, of_units in shares.items():
                facts[question] = question.combine(of_units)
        output = self._placed(np.empty(tensor.elements, numpy_dtype(tensor.dtype)))
        merger = TensorMerger(tensor, [setting], facts, seed=self._seed, numerics=self._numerics, device=self._device)
        merger.run(0, raw, [output])
        return output

    def _placed(self, elements: Elements) -> Elements:
        return elements if self._device == "cpu" else as_tensor(elements).to(self._device)


def _next(ahead: deque[tuple[str, Future[tuple[Tensor, str]]]], digests: dict[str, str] | None) -> tuple[str, Tensor]:
    """The tensor that was asked for first, and its digest into `digests`."""
    name, future = ahead.popleft()
    tensor, digest = future.result()
    if digests is not None:
        digests[name] = digest
    return name, tensor

"""One point's shard on its way out: hashed tensor by tensor, written front to back, published whole, receipted."""

from __future__ import annotations

import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType

from typing_extensions import Buffer

from jobs.errors import CorruptData, ObjectExists, ObjectMissing
from jobs.merge_tasks import Receipt, ShardOfPoint, TensorMerge
from workers.digests import TensorHash, contradict
from workers.storage import Store
from workers.storage.records import read_receipt


class ShardWriter:
    """Writes one unit. All bytes are hashed and written in the order of `tensors`; `publish` makes them visible."""

    def __init__(
        self,
        store: Store,
        point: ShardOfPoint,
        tensors: Sequence[TensorMerge],
        progress: Callable[[int, int], None],
    ) -> None:
        self.point = point
        self._store = store
        self._progress = progress
        self._sizes = [(tensor.name, tensor.bytes) for tensor in tensors]
        self._digests: dict[str, str] = {}
        self._overflowed: Counter[str] = Counter()
        self._merged = 0
        self._collapsed: Counter[str] = Counter()
        self._alike: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._hash = TensorHash()
        self._hashed = 0
        self._upload = store.upload(point.key)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._upload.abort()

    def begin(self, header: bytes) -> None:
        """The file's header."""
        self._upload.write(header)

    def hash(self, data: Buffer) -> None:
        """The next bytes of the tensors, cut anyhow. One thread at a time calls it, in the order of the bytes."""
        view = memoryview(data)
        position = 0
        while position < len(view):
            self._finish_empty()
            _, size = self._sizes[len(self._digests)]
            end = min(len(view), position + size - self._hashed)
            self._hash.update(view[position:end])
            self._hashed += end - position
            position = end
            if self._hashed == size:
                self._finish_tensor()

    def write(self, data: Buffer) -> None:
        """The same bytes, which another thread may hash meanwhile."""
        view = memoryview(data)
        self._upload.write(view)
        self._progress(0, len(view))

    def count_overflowed(self, tensor: str, elements: int) -> None:
        """Elements of a tensor that the merge made NaN or infinite. Several threads may call it."""
        with self._counting:
            self._overflowed[tensor] += elements

    def count_merged(self, collapse: str | None) -> None:
        """Counts a tensor that is not a plain copy. `collapse` is the reason why the merge is none, or None."""
        self._merged += 1
        if collapse is not None:
            self._collapsed[collapse] += 1

    def count_alike(self, parent: str, tensors: int) -> None:
        """Tensors that are no plain copies and have the bytes of a parent."""
        self._alike[parent] += tensors

    def publish(self, nonfinite: Sequence[str], bytes_read: int, seconds: float) -> Receipt:
        """Makes the shard visible, then its receipt; or, where both are there, leaves them to whoever reads them.

        `CorruptData` when the unit already has a receipt and it tells of other bytes.
        """
        self._finish_empty()
        assert len(self._digests) == len(self._sizes), f"{self.point.key}: not all tensors were hashed"
        earlier = self._earlier()
        if earlier is not None and self._lies_there(earlier):
            return earlier
        info = self._upload.commit()
        receipt = Receipt(
            unit=self.point.unit,
            point=self.point.point,
            key=self.point.key,
            size=info.size,
            etag=info.etag,
            tensors=self._digests,
            nonfinite=tuple(sorted(nonfinite)),
            bytes_read=bytes_read,
            seconds=round(seconds, 3),
            worker=_worker(),
            overflowed=dict(sorted((+self._overflowed).items())),
            merged=self._merged,
            collapsed=dict(sorted(self._collapsed.items())),
            alike=dict(sorted((+self._alike).items())),
        )
        try:
            self._store.write(self.point.receipt, receipt.to_json(), mode="create")
        except ObjectExists:
            self._earlier()
        return receipt

    def _earlier(self) -> Receipt | None:
        """The receipt that another worker left for this unit; `CorruptData` when it tells of other bytes than ours."""
        try:
            earlier = read_receipt(self._store, self.point.receipt)
        except ObjectMissing:
            return None
        if self._contradicts(earlier):
            raise CorruptData(
                f"{self.point.key}: two workers merged it to different bytes ({earlier.worker}, {_worker()});"
                " check the memory of these machines and run `mergeyard verify`"
            )
        return earlier

    def _contradicts(self, earlier: Receipt) -> bool:
        digests = earlier.tensors
        return digests.keys() != self._digests.keys() or any(
            contradict(digests[name], digest) for name, digest in self._digests.items()
        )

    def _lies_there(self, receipt: Receipt) -> bool:
        try:
            return self._store.locate(receipt.key).etag == receipt.etag
        except ObjectMissing:
            return False

    def _finish_empty(self) -> None:
        while len(self._digests) < len(self._sizes) and self._sizes[len(self._digests)][1] == 0:
            self._finish_tensor()

    def _finish_tensor(self) -> None:
        self._digests[self._sizes[len(self._digests)][0]] = self._hash.digest()
        self._hash, self._hashed = TensorHash(), 0


def _worker() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"

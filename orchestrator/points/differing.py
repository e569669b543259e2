"""Two checkpoints compared, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jobs.errors import CorruptData
from jobs.merge_tasks import ParentTensor
from workers.checkpoints.dtypes import TORCH_NAMES, numpy_dtype
from workers.checkpoints.hashing import CHUNK_BYTES
from workers.checkpoints.opening import Checkpoint, open_checkpoint
from workers.storage import Store, open_store


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """One tensor of two checkpoints. `only_in` is set if only one has it, `shapes` if the shapes differ.

    `changed` counts elements whose values differ, `largest` is max |a − b|, `relative` is ‖a − b‖₂ / ‖a‖₂ and `cosine`
    the cosine between the flattened tensors; all in float64.
    """

    tensor: str
    elements: int
    changed: int = 0
    largest: float = 0.0
    relative: float = 0.0
    cosine: float = 1.0
    only_in: str | None = None
    shapes: str | None = None

    @property
    def differs(self) -> bool:
        """Whether the tensors differ."""
        return self.changed > 0 or self.only_in is not None or self.shapes is not None

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def compare_checkpoints(a: str, b: str) -> list[TensorDifference]:
    """Every tensor of either checkpoint, in the order of their names."""
    first, second = (open_checkpoint(url, name, quantised=True) for url, name in ((a, "A"), (b, "B")))
    stores = {"A": open_store(first.url), "B": open_store(second.url)}
    return [_compare(name, first, second, stores) for name in sorted(first.tensors.keys() | second.tensors.keys())]


def _compare(name: str, first: Checkpoint, second: Checkpoint, stores: Mapping[str, Store]) -> TensorDifference:
    for owner, other in ((first, second), (second, first)):
        if name not in other.tensors:
            return TensorDifference(name, math.prod(owner.shapes[name]), only_in=owner.name)
    elements = math.prod(first.shapes[name])
    if first.shapes[name] != second.shapes[name]:
        return TensorDifference(name, elements, shapes=f"{list(first.shapes[name])} and {list(second.shapes[name])}")
    a_at, b_at = first.tensors[name], second.tensors[name]
    assert isinstance(a_at, ParentTensor) and isinstance(b_at, ParentTensor), "only merging derives tensors"
    if not {a_at.dtype, b_at.dtype} <= TORCH_NAMES.keys():
        raise CorruptData(f"tensor {name}: {a_at.dtype} and {b_at.dtype} cannot be compared")
    changed, largest, squares, dot, a_squares, b_squares = 0, 0.0, 0.0, 0.0, 0.0, 0.0
    step = CHUNK_BYTES // 8
    for start in range(0, elements, step):
        stop = min(start + step, elements)
        x = _values(stores["A"], first, a_at, start, stop)
        y = _values(stores["B"], second, b_at, start, stop)
        gap = x - y
        changed += int(np.count_nonzero((x != y) & ~(np.isnan(x) & np.isnan(y))))
        largest = max(largest, float(np.abs(gap).max()))
        squares += float(gap @ gap)
        dot += float(x @ y)
        a_squares += float(x @ x)
        b_squares += float(y @ y)
    norms = math.sqrt(a_squares * b_squares)
    return TensorDifference(
        name,
        elements,
        changed,
        largest,
        relative=math.sqrt(squares / a_squares) if a_squares else math.sqrt(squares),
        cosine=dot / norms if norms else 1.0,
    )


def _values(store: Store, checkpoint: Checkpoint, at: ParentTensor, start: int, stop: int) -> Any:
    dtype = numpy_dtype(at.dtype)
    width = dtype.itemsize
    file = checkpoint.files[at.file]
    data = store.read(file.key, start=at.start + start * width, length=(stop - start) * width, etag=file.etag)
    return np.frombuffer(memoryview(data), dtype).astype(np.float64)


def print_differences(differences: Sequence[TensorDifference]) -> None:
    """Prints a table of the tensors that differ, and one line with their number."""
    different = [difference for difference in differences if difference.differs]
    width = max((len(difference.tensor) for difference in different), default=6)
    if different:
        print(f"{'tensor':<{width}}  {'changed':>8}  {'max |a-b|':>10}  {'relative':>10}  {'cosine':>10}")
    for difference in different:
        if difference.only_in or difference.shapes:
            note = f"only in {difference.only_in}" if difference.only_in else difference.shapes
            print(f"{difference.tensor:<{width}}  {note}")
            continue
        share = difference.changed / difference.elements
        print(
            f"{difference.tensor:<{width}}  {share:>8.2%}  {difference.largest:>10.3g}"
            f"  {difference.relative:>10.3g}  {difference.cosine:>10.6f}"
        )
    print(f"{len(different)} of {len(differences)} tensors differ")

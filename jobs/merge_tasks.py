"""Messages between the driver and a worker: JSON-able facts, URLs and a format version; never programs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.sealing import sealed, unsealed

DTYPE_BITS: Mapping[str, int] = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
}  # fmt: skip
"""Bits an element of each dtype, by its name in safetensors."""

FORMAT = 1
"""Version of everything this module describes; part of every unit key: an old receipt never matches new work."""

NUMERICS = 1
"""Version of the arithmetic. Raise it whenever a change could alter one bit of one output.

If that concerns one method alone, raise the `revision` of the method instead.
"""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no blanks: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


Number = float | bool


@dataclass(frozen=True, slots=True)
class Setting:
    """One point's recipe bound to one tensor: method, models in order, base, and parameters as plain numbers.

    Per-model parameters are tuples in the order of `models`. `omega` is that of AIM, None without it. Equal settings
    are equal objects, and hashable.
    """

    method: str
    models: tuple[str, ...]
    base: str | None
    parameters: tuple[tuple[str, Number | tuple[Number, ...]], ...]
    omega: float | None = None

    @property
    def parents(self) -> tuple[str, ...]:
        """Every parent this setting reads."""
        return tuple(dict.fromkeys((*self.models, *((self.base,) if self.base is not None else ()))))

    def document(self) -> list[Any]:
        """A compact JSON form."""
        of_aim = [] if self.omega is None else [self.omega]
        return [self.method, list(self.models), self.base, dict(self.parameters), *of_aim]


@dataclass(frozen=True, slots=True)
class ParentFile:
    """One file of a parent's weights, pinned: a reader that finds another ETag or size refuses it."""

    key: str
    size: int
    etag: str


@dataclass(frozen=True, slots=True)
class ParentTensor:
    """Where one parent keeps one tensor: file, dtype (safetensors name) and absolute byte range.

    `digest` is that of its bytes where the parent has a manifest of mergeyard, else empty.
    """

    file: int
    dtype: str
    start: int
    end: int
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Merged:
    """The rule of a tensor that is itself a merge, of the inputs by their names; it is stored in its dtype in between.

    `name` is the tensor's in that merge, which random draws depend on; `seed` is 0 for methods that draw none.
    """

    name: str
    arithmetic: str
    numerics: str
    seed: int
    setting: Setting


@dataclass(frozen=True, slots=True)
class Rows:
    """The rule of a tensor that has a row for each token of a vocabulary.

    `runs` are (input, first row, first row of the input, count), `means` (row, the (input, row) whose mean it is). The
    rows from `averaged` on are the mean of all rows before. Rows that are named nowhere are zero.
    """

    runs: tuple[tuple[int, int, int, int], ...]
    means: tuple[tuple[int, tuple[tuple[int, int], ...]], ...] = ()
    averaged: int | None = None


@dataclass(frozen=True, slots=True)
class LowRank:
    """The rule of a tensor that a LoRA adapter changes, as PEFT merges it: W + scale · B·A, rounded once.

    The inputs are W, A of (rank, columns) and B of (rows, rank); a fourth is the magnitude vector of a DoRA, which the
    rows of the sum then have as their norms. `transposed`: W is of (columns, rows). Of a bias the inputs are it and b,
    and the result is its sum with scale · b.
    """

    scale: float
    rank: int
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Scaled:
    """The rule of a tensor that is stored in another dtype: the first input converted, times its scales.

    The scales, if there are any, are the second input, in `grid` planes, rows and columns; one plane holds for all.
    Each stands for a block of `block` rows and columns of the tensor's last two axes. The product is in float32.
    """

    grid: tuple[int, int, int] = (0, 0, 0)
    block: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Strided:
    """The rule of a tensor whose elements lie `strides` elements apart, as transposed ones of `torch.save` do."""

    strides: tuple[int, ...]


Rule = Merged | Rows | LowRank | Scaled | Strided
"""How a tensor is computed from its inputs."""


@dataclass(frozen=True, slots=True)
class Derived:
    """A tensor that a worker computes from others while it reads them.

    An input is (name of the parent in whose files it lies, place); of one that is derived too, the name is a label.
    """

    dtype: str
    shape: tuple[int, ...]
    rule: Rule
    inputs: tuple[tuple[str, Source], ...]


Source = ParentTensor | Derived
"""Where one parent has one tensor."""


def stored_parts(name: str, source: Source) -> Iterator[tuple[str, ParentTensor]]:
    """Every stored tensor that a source is read from, with the parent whose files it lies in."""
    if isinstance(source, ParentTensor):
        yield name, source
    else:
        for label, part in source.inputs:
            yield from stored_parts(label, part)


def stored_bytes(source: Source) -> int:
    """The bytes that are read for one tensor."""
    return sum(at.end - at.start for _, at in stored_parts("", source))


@dataclass(frozen=True, slots=True)
class Parent:
    """A pinned parent as a worker opens it."""

    url: str
    files: tuple[ParentFile, ...]


@dataclass(frozen=True, slots=True)
class GramTensor:
    """Where a file of Gram matrices has that of a tensor's inputs: name, shape (blocks, size, size) and byte range.

    The elements are float32; `digest` is that of their bytes.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    end: int
    digest: str


FISHER = "Fisher information of "


def fisher_of(model: str) -> str:
    """The name under which tasks read the Fisher information of a model, beside those of the parents."""
    return f"{FISHER}{model}"


@dataclass(frozen=True, slots=True)
class TensorMerge:
    """One output tensor: name, dtype, shape, where each parent keeps it, and which setting of a point applies.

    `arithmetic` is the dtype to compute in, as safetensors names it. `activations` is the tensor's name in the
    statistics of AIM; None where they have none. `grams` are the places of its Gram matrices, by model. `fishers` are
    the means of its Fisher information by model, which itself is among the sources under the name `fisher_of`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: Mapping[str, Source]
    setting: int
    arithmetic: str
    activations: str | None = None
    grams: Mapping[str, GramTensor] = field(default_factory=dict[str, "GramTensor"])
    fishers: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Stored size."""
        return self.elements * DTYPE_BITS[self.dtype] // 8


def places_read(tensors: Iterable[TensorMerge]) -> dict[str, None]:
    """The names of the parents whose files these tensors are read from, each once."""
    return {
        place: None
        for tensor in tensors
        for name, source in tensor.sources.items()
        for place, _ in stored_parts(name, source)
    }


@dataclass(frozen=True, slots=True)
class ShardOfPoint:
    """One unit: one shard of one point, where it goes, and where its receipt goes.

    `settings[tensor.setting]` is the point's recipe for a tensor.
    """

    point: str
    unit: str
    key: str
    receipt: str
    settings: tuple[Setting, ...]


@dataclass(frozen=True, slots=True)
class MergeTask:
    """One shard for a group of points: one worker computes it, and reads each parent tensor once.

    `activations` is the file of statistics for AIM, if any point asks for it; `grams` are the files of Gram matrices by
    model.
    """

    run: str
    shard: str
    tensors: tuple[TensorMerge, ...]
    points: tuple[ShardOfPoint, ...]
    parents: Mapping[str, Parent]
    seed: int
    numerics: str
    memory_bytes: int
    threads: int
    activations: Parent | None = None
    grams: Mapping[str, Parent] = field(default_factory=dict[str, Parent])

    @property
    def name(self) -> str:
        """How errors call this task: its shard and its points, three of them by name."""
        names = [shard.point for shard in self.points]
        more = f" and {len(names) - 3} more points" if len(names) > 3 else ""
        return f"{self.shard} of {', '.join(names[:3])}{more}"

    @property
    def bytes_read(self) -> int:
        """Parent bytes this task reads, each once. Large tensors that need facts may be read more often."""
        return sum(stored_bytes(source) for tensor in self.tensors for source in tensor.sources.values())

    @property
    def bytes_written(self) -> int:
        """Tensor bytes of all points together."""
        return len(self.points) * sum(tensor.bytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Receipt:
    """The record of a finished unit in the store: the shard's size, each tensor's digest, and the cost of the work.

    `nonfinite` names the tensors with NaN or infinity in a parent. `overflowed` counts, by tensor, the elements that
    are NaN or infinite in the shard and finite in every parent. `merged` counts the tensors of numbers that are not
    plain copies; `collapsed` counts those whose merge is not one, by the reason in words, and `alike` those with the
    bytes of a parent, by parent. Older receipts have none of these.
    """

    unit: str
    point: str
    key: str
    size: int
    etag: str
    tensors: Mapping[str, str]
    nonfinite: tuple[str, ...]
    bytes_read: int
    seconds: float
    worker: str
    overflowed: Mapping[str, int] = field(default_factory=dict[str, int])
    merged: int = 0
    collapsed: Mapping[str, int] = field(default_factory=dict[str, int])
    alike: Mapping[str, int] = field(default_factory=dict[str, int])

    def to_json(self) -> bytes:
        """The receipt's file."""
        return sealed({"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, data: bytes) -> Receipt:
        """Reads the text of `to_json`; `CorruptData` for anything else."""
        fields = unsealed(data)
        fields.pop("format")
        fields["nonfinite"] = tuple(fields["nonfinite"])
        return cls(**fields)

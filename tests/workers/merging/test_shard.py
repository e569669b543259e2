"""The fused merge: the same bytes however it is cut, and nothing visible unless all of it is right."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import resource
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from jobs.errors import BadInput, CorruptData, ObjectChanged, StorageError, StorageUnavailable
from jobs.merge_tasks import (
    DTYPE_BITS,
    Derived,
    Merged,
    MergeTask,
    Parent,
    ParentFile,
    ParentTensor,
    Receipt,
    Setting,
    ShardOfPoint,
    TensorMerge,
)
from tests.workers.methods.whole import change_tiles
from workers.checkpoints.dtypes import FLOATS
from workers.checkpoints.safetensors import read_header
from workers.digests import digest_of
from workers.merging.reading import ParentReader, Stretch
from workers.merging.shard import FIXED_BYTES, Budget, merge_task
from workers.merging.tiles import TensorMerger, tiles
from workers.merging.writing import ShardWriter
from workers.methods.tile import TILE_ELEMENTS
from workers.storage import direct, local, open_store
from workers.storage.local import LocalStore, MappedBytes
from workers.storage.mapping import CAN_MAP, counts_as_memory

numbers = itertools.count()

LINEAR = Setting("linear", ("a", "b"), None, (("normalize", False), ("weight", (0.7, 0.3))))
TIES = Setting(
    "ties",
    ("a", "b"),
    "base",
    (("density", (0.3, 0.6)), ("lambda", 1.0), ("normalize", True), ("rescale", True), ("weight", (0.5, 0.5))),
)
DARE = Setting(
    "dare_ties",
    ("a", "b"),
    "base",
    (("density", (0.5, 0.8)), ("lambda", 0.5), ("normalize", False), ("rescale", True), ("weight", (0.5, 0.5))),
)
SLERP = Setting("slerp", ("a", "b"), "a", (("t", 0.3),))
COPY = Setting("passthrough", ("b",), None, (("scale", (1.0,)),))
DELLA = Setting(
    "della",
    ("a", "b"),
    "base",
    (
        ("density", (0.5, 0.7)),
        ("epsilon", (0.1, 0.2)),
        ("lambda", 1.0),
        ("normalize", True),
        ("rescale", True),
        ("weight", (0.5, 0.5)),
    ),
)
SCE = Setting("sce", ("a", "b"), "base", (("select_topk", 0.5),))
POINTS = {"linear": LINEAR, "ties": TIES, "dare": DARE, "slerp": SLERP, "copy": COPY, "della": DELLA}

Shapes = Mapping[str, tuple[tuple[int, ...], str]]
"""Tensor name to shape and torch dtype."""

EVERY_KIND: Shapes = {
    "flag": ((), "bool"),
    "mask": ((3,), "bool"),
    "positions": ((5,), "int64"),
    "scalar": ((), "bfloat16"),
    "one": ((1,), "float32"),
    "empty": ((0,), "float32"),
    "empty matrix": ((3, 0), "bfloat16"),
    "odd": ((7,), "bfloat16"),
    "half": ((65,), "float16"),
    "matrix": ((9, 31), "bfloat16"),
    "large": ((11, 67), "float32"),
    "double": ((130,), "float64"),
    "bytes": ((13,), "uint8"),
}


def family(shapes: Shapes, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """base, a and b: floats that differ a little, integers and booleans that do not."""
    generator = torch.Generator().manual_seed(seed)
    parents: dict[str, dict[str, Tensor]] = {"base": {}, "a": {}, "b": {}}
    for name, (shape, kind) in shapes.items():
        dtype = getattr(torch, kind)
        common = torch.randn(shape, generator=generator)
        for tensors in parents.values():
            step = torch.randn(shape, generator=generator)
            tensors[name] = (
                (common + 0.01 * step).to(dtype) if dtype.is_floating_point else (common * 9).abs().to(dtype)
            )
    return parents


def pinned(url: str, content: bytes) -> tuple[Parent, dict[str, ParentTensor], dict[str, tuple[int, ...]]]:
    """A parent of one file, as planning pins it."""
    store = open_store(url)
    info = store.write("model.safetensors", content)
    header = read_header(store, info)
    return (
        Parent(url, (ParentFile(info.key, info.size, info.etag),)),
        {entry.name: ParentTensor(0, entry.dtype, entry.start, entry.end) for entry in header},
        {entry.name: entry.shape for entry in header},
    )


def task_of(
    parents: Mapping[str, dict[str, Tensor] | bytes],
    points: Mapping[str, Setting] = POINTS,
    *,
    run: str | None = None,
    names: Sequence[str] | None = None,
    memory_bytes: int = 2 * 10**9,
    threads: int = 2,
    at: str = "memory://parents",
) -> MergeTask:
    """One shard of these tensors for these points; floats are stored as they are in `a`, wider ones first."""
    number = next(numbers)
    opened = {
        name: pinned(f"{at}-{number}-{name}", tensors if isinstance(tensors, bytes) else save(tensors))
        for name, tensors in parents.items()
    }
    _, tensors_of_a, shapes = opened["a"]
    tensors = [
        TensorMerge(
            name=name,
            dtype=tensors_of_a[name].dtype,
            shape=shapes[name],
            sources={parent: places[name] for parent, (_, places, _) in opened.items()},
            setting=0,
            arithmetic="F64" if tensors_of_a[name].dtype in ("F32", "F64") else "F32",
        )
        for name in names or tensors_of_a
    ]
    return MergeTask(
        run=run or f"memory://run-{number}",
        shard="model.safetensors",
        tensors=tuple(sorted(tensors, key=lambda tensor: -DTYPE_BITS[tensor.dtype])),
        points=tuple(
            ShardOfPoint(
                point, f"unit-{point}", f"points/{point}/model.safetensors", f"receipts/{point}.json", (setting,)
            )
            for point, setting in points.items()
        ),
        parents={name: parent for name, (parent, _, _) in opened.items()},
        seed=7,
        numerics="float32",
        memory_bytes=memory_bytes,
        threads=threads,
    )


def shard(task: MergeTask, point: str) -> bytes:
    return bytes(open_store(task.run).read(f"points/{point}/model.safetensors"))


def digests(receipts: Iterable[Receipt]) -> dict[str, dict[str, str]]:
    return {receipt.point: dict(receipt.tensors) for receipt in receipts}


@contextmanager
def threads_all_end() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert not set(threading.enumerate()) - before  # one of an earlier test may end meanwhile


# ---- the same bytes


TILE = 64


@contextmanager
def small_tiles(budget: Budget | None = None) -> Iterator[None]:
    """Tiles of 64 elements, so that small tensors have many; and this budget, whatever the task's memory."""
    with pytest.MonkeyPatch.context() as patch:
        change_tiles(patch, TILE)
        if budget is not None:
            patch.setattr(Budget, "of", classmethod(lambda cls, task: budget))
        yield


@pytest.fixture(scope="module")
def reference() -> dict[str, tuple[bytes, dict[str, str]]]:
    """Every point's file and digests, merged with room for everything, one point at a time on one thread."""
    found: dict[str, tuple[bytes, dict[str, str]]] = {}
    for point, setting in POINTS.items():
        task = task_of(family(EVERY_KIND), {point: setting}, threads=1)
        with small_tiles():
            (receipt,) = merge_task(task)
        found[point] = (shard(task, point), dict(receipt.tensors))
    return found


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    slab=st.integers(0, 2000),
    piece_tiles=st.integers(1, 4),
    outputs=st.integers(1, 5),
    held=st.sampled_from([0, 1500, 10**9]),
    slabs_ahead=st.integers(1, 3),
    threads=st.sampled_from([1, 2, 4]),
    groups=st.integers(1, 5),
    order=st.permutations(list(POINTS)),
    near=st.booleans(),
)
def test_bytes_do_not_depend_on_memory_threads_or_grouping(
    reference: dict[str, tuple[bytes, dict[str, str]]],
    slab: int,
    piece_tiles: int,
    outputs: int,
    held: int,
    slabs_ahead: int,
    threads: int,
    groups: int,
    order: list[str],
    near: bool,
    tmp_path: Path,
):
    smallest_slab = TILE * 8 + 64  # a tile of float64, and room to align it
    budget = Budget(smallest_slab + slab, slabs_ahead, threads + slabs_ahead, piece_tiles * TILE * 8, outputs, held)
    for group in range(groups):
        points = {point: POINTS[point] for point in order[group::groups]}
        at = str(tmp_path / "parents") if near else "memory://parents"
        task = task_of(family(EVERY_KIND), points, threads=threads, at=at)
        with threads_all_end(), small_tiles(budget):
            receipts = merge_task(task)
        for receipt in receipts:
            content, tensors = reference[receipt.point]
            assert shard(task, receipt.point) == content
            assert dict(receipt.tensors) == tensors


@pytest.mark.parametrize("first", ["linear", "ties", "dare", "della"])
@pytest.mark.parametrize("budget", [None, Budget(slab=300, slabs_ahead=2, queued=2, piece=64 * 8, outputs=2, held=0)])
def test_a_merge_that_is_computed_while_it_is_read_gives_the_bytes_of_one_that_was_written(
    first: str, budget: Budget | None
):
    parents = family(EVERY_KIND)
    points = {name: replace(POINTS[name], models=("a", "first")) for name in ("linear", "ties")}
    with small_tiles(budget):
        written = task_of(parents, {"first": POINTS[first]})
        merge_task(written)
        stored = task_of({**parents, "first": shard(written, "first")}, points)
        merge_task(stored)
        computed = task_of(parents, points)
        computed = replace(
            computed,
            tensors=tuple(
                replace(
                    tensor,
                    sources={
                        **tensor.sources,
                        "first": Derived(
                            tensor.dtype,
                            tensor.shape,
                            Merged(tensor.name, tensor.arithmetic, "float32", computed.seed, POINTS[first]),
                            tuple(tensor.sources.items()),
                        ),
                    },
                )
                for tensor in computed.tensors
            ),
        )
        (receipt, _) = merge_task(computed)
    assert [shard(computed, point) for point in points] == [shard(stored, point) for point in points]
    read = sum(at.end - at.start for tensor in written.tensors for at in tensor.sources.values())
    assert receipt.bytes_read >= 2 * read


def test_bytes_do_not_depend_on_how_shards_are_cut(reference: dict[str, tuple[bytes, dict[str, str]]]):
    names = list(EVERY_KIND)
    for size in (1, 4):
        for start in range(0, len(names), size):
            part = names[start : start + size]
            with small_tiles():
                receipts = merge_task(task_of(family(EVERY_KIND), names=part))
            for receipt in receipts:
                whole = reference[receipt.point][1]
                assert dict(receipt.tensors) == {name: whole[name] for name in part}


def test_a_worker_of_little_memory_makes_the_same_bytes_from_tiles_of_the_real_size():
    shapes: Shapes = {"large": ((600, 1111), "bfloat16"), "wide": ((150_000,), "float32"), "norm": ((300,), "bfloat16")}
    parents = family(shapes)
    roomy, tight, held = (
        task_of(parents, memory_bytes=size, threads=t) for size, t in ((4 * 10**9, 1), (1, 4), (1, 2))
    )
    expected = digests(merge_task(roomy))
    assert digests(merge_task(tight)) == expected
    with pytest.MonkeyPatch.context() as patch:
        budget = replace(Budget.of(held), slab=1 << 20, held=0)
        patch.setattr(Budget, "of", classmethod(lambda cls, task: budget))
        assert digests(merge_task(held)) == expected


@pytest.mark.parametrize(
    ("point", "passes"),
    [(COPY, 0), (LINEAR, 0), (SLERP, 1), (DARE, 1), (DELLA, 1), (SCE, 3), (TIES, 3)],
    ids=["copy", "linear", "slerp", "dare_ties", "della", "sce", "ties"],
)
def test_a_large_tensor_that_is_near_is_read_anew_for_each_pass_and_not_held(point: Setting, passes: int):
    """The passes are the fewest: facts that need no other one are learned together. A digest is not taken anew."""
    parents = family({"large": ((1300, 1000), "bfloat16")})  # two slabs

    def merged(checked: bool = False) -> tuple[dict[str, dict[str, str]], int]:
        task = task_of(parents, {"point": point})
        (receipt,) = receipts = merge_task(with_digests(task, parents) if checked else task)
        return digests(receipts), receipt.bytes_read

    with pytest.MonkeyPatch.context() as patch:
        held, once = merged()
        patch.setattr("workers.merging.shard.LEARNED_TOGETHER", 1000)
        anew, for_all_passes = merged()
        checked, with_digest = merged(checked=True)
        patch.setattr("workers.merging.shard.all_near", lambda parents: False)
        afar, from_afar = merged()
    assert (for_all_passes, with_digest) == ((passes + 1) * once, once)
    assert from_afar == 3 * 2 * 1300 * 1000  # in one slab: no row that two slabs need is read twice
    assert held == anew == checked == afar


def test_what_is_read_of_derived_tensors_is_free_before_the_next_tensors_are_read():
    """One tensor of three derived parents fills the memory for facts; the next waits for it."""
    shapes: Shapes = {f"t{number}": ((40, 100), "bfloat16") for number in range(4)}
    parents = family(shapes)
    task = task_of(parents, {"ties": TIES}, threads=1)
    tensors = tuple(
        replace(tensor, sources={name: as_derived(tensor, name) for name in tensor.sources}) for tensor in task.tensors
    )
    alive: list[weakref.ref[Any]] = []
    most = 0
    read = ParentReader._derived

    def derived(self: ParentReader, name: str, stretch: Stretch) -> Any:
        nonlocal most
        elements = read(self, name, stretch)
        alive.append(weakref.ref(elements if elements.base is None else elements.base))
        most = max(most, len({id(each()) for each in alive if each() is not None}))
        return elements

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ParentReader, "_derived", derived)
        budget = replace(Budget.of(task), slab=2 * 40 * 50, held=3 * 2 * 40 * 100)
        patch.setattr(Budget, "of", classmethod(lambda cls, task: budget))
        merge_task(replace(task, tensors=tensors))
    assert most == 3


def as_derived(tensor: TensorMerge, name: str) -> Derived:
    """The tensor of a parent as the result of a merge of that parent alone."""
    alone = Setting("linear", (name,), None, (("normalize", False), ("weight", (0.7,))))
    rule = Merged(tensor.name, tensor.arithmetic, "float32", 7, alone)
    return Derived(tensor.dtype, tensor.shape, rule, ((name, tensor.sources[name]),))


# ---- the right bytes


def test_shards_are_read_by_the_library_and_receipts_hold_their_digests():
    parents = family(EVERY_KIND)
    task = task_of(parents)
    receipts = {receipt.point: receipt for receipt in merge_task(task)}
    assert receipts.keys() == POINTS.keys()
    for point, receipt in receipts.items():
        content = shard(task, point)
        assert receipt.size == len(content)
        loaded = load(content)
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in loaded.items()} == {
            name: (tensor.shape, tensor.dtype) for name, tensor in parents["a"].items()
        }
        for name, tensor in loaded.items():
            raw = bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
            assert receipt.tensors[name] == f"blake3:{blake3(raw).hexdigest()}"
        stored = open_store(task.run).read(f"receipts/{point}.json")
        assert Receipt.from_json(bytes(stored)) == receipt


def test_linear_is_the_float64_mean_rounded_once():
    parents = family(EVERY_KIND)
    task = task_of(parents, {"linear": LINEAR})
    merge_task(task)
    for name, tensor in load(shard(task, "linear")).items():
        if tensor.is_floating_point():
            exact = parents["a"][name].double() * 0.7 + parents["b"][name].double() * 0.3
            assert torch.equal(tensor, exact.to(tensor.dtype)), name


def test_integers_and_booleans_that_agree_are_copied():
    parents = family(EVERY_KIND)
    task = task_of(parents)
    merge_task(task)
    for point in POINTS:
        loaded = load(shard(task, point))
        for name in ("flag", "mask", "positions", "bytes"):
            assert torch.equal(loaded[name], parents["a"][name])


@pytest.mark.parametrize("kind", ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_integers_that_differ_are_refused_with_both_names(kind: str):
    parents = family({"x": ((4, 4), "bfloat16"), "table": ((3,), kind)})
    parents["b"]["table"] = torch.tensor([1, 0, 1]).to(getattr(torch, kind))
    parents["a"]["table"] = torch.tensor([1, 1, 1]).to(getattr(torch, kind))
    task = task_of(parents, {"linear": LINEAR})
    with threads_all_end(), pytest.raises(BadInput) as refusal:
        merge_task(task)
    assert str(refusal.value).startswith("tensor table (")
    assert str(refusal.value).endswith("differs between a and b; integers cannot be merged, take it from one parent")
    assert list(open_store(task.run).list()) == []


def test_integers_of_a_parent_that_a_point_does_not_use_may_differ():
    parents = family({"x": ((4,), "bfloat16"), "table": ((3,), "int32")})
    parents["a"]["table"] += 1
    task = task_of(parents, {"copy": COPY})
    merge_task(task)
    assert torch.equal(load(shard(task, "copy"))["table"], parents["b"]["table"])


def test_parents_of_different_dtypes_are_merged_in_float32():
    parents = family({"x": ((200,), "bfloat16")})
    parents["b"]["x"], parents["base"]["x"] = parents["b"]["x"].half(), parents["base"]["x"].float()
    task = task_of(parents)
    merge_task(task)
    exact = parents["a"]["x"].double() * 0.7 + parents["b"]["x"].double() * 0.3
    assert torch.equal(load(shard(task, "linear"))["x"], exact.bfloat16())
    assert torch.equal(load(shard(task, "copy"))["x"], parents["b"]["x"].bfloat16())


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32", "float64"])
def test_tensors_with_nan_or_infinity_are_named(kind: str, value: str):
    parents = family({"good": ((70,), kind), "bad": ((5, 70), kind)})
    parents["b"]["bad"][4, 69] = float(value)
    receipts = merge_task(task_of(parents))
    assert {receipt.nonfinite for receipt in receipts} == {("bad",)}


def test_the_largest_finite_number_is_finite():
    parents = family({"x": ((4,), "bfloat16")})
    parents["a"]["x"][0] = torch.finfo(torch.bfloat16).max
    parents["b"]["x"][1] = torch.finfo(torch.bfloat16).min
    assert merge_task(task_of(parents, {"linear": LINEAR}))[0].nonfinite == ()


def by_hand(parts: Mapping[str, tuple[str, Tensor]], blanks: int = 0) -> bytes:
    """A file of these tensors in this order, its header padded by so many blanks: data may begin anywhere."""
    header: dict[str, object] = {}
    data = b""
    for name, (kind, tensor) in parts.items():
        raw = bytes(tensor.view(torch.uint8).numpy())
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode() + b" " * blanks
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("blanks", range(8))
def test_tensors_at_odd_places_of_a_parents_file_are_read(blanks: int, mapped: bool, tmp_path: Path):
    double = torch.randn(9, generator=torch.Generator().manual_seed(1)).double()
    content = by_hand({"tiny": ("BOOL", torch.tensor([True])), "x": ("F64", double)}, blanks)
    at = str(tmp_path / "parents") if mapped else "memory://parents"
    task = task_of({"a": content, "b": content}, {"copy": COPY, "linear": LINEAR}, at=at)
    merge_task(task)
    assert torch.equal(load(shard(task, "copy"))["x"], double)
    assert torch.allclose(load(shard(task, "linear"))["x"], double, rtol=1e-15)
    assert torch.equal(load(shard(task, "linear"))["tiny"], torch.tensor([True]))


def test_neighbours_of_one_file_are_read_together_only_where_both_end_up_aligned():
    """In `b` three half-precision numbers lie right before wider ones, in the order of the output."""
    narrow, wide = torch.tensor([1.0, 2.0, 3.0]).bfloat16(), torch.tensor([4.0, 5.0])
    a = by_hand({"x": ("BF16", narrow), "y": ("BF16", wide.bfloat16())})
    task = task_of({"a": a, "b": by_hand({"x": ("BF16", narrow), "y": ("F32", wide)})}, {"copy": COPY})
    merge_task(task)
    assert {name: tensor.tolist() for name, tensor in load(shard(task, "copy")).items()} == {
        "x": [1, 2, 3],
        "y": [4, 5],
    }


# ---- what it costs


@pytest.mark.parametrize("settings_of", [LINEAR, TIES, SLERP])
def test_sixteen_points_read_their_parents_once(settings_of: Setting):
    parents = family({"x": ((300, 500), "bfloat16"), "y": ((9,), "float32")})
    used = {name: parents[name] for name in ("a", "b", "base") if name in settings_of.parents}
    task = task_of(used, {f"p{number}": settings_of for number in range(16)})
    receipts = merge_task(task)
    assert {receipt.bytes_read for receipt in receipts} == {task.bytes_read}
    assert task.bytes_read == sum(tensor.nbytes for tensors in used.values() for tensor in tensors.values())


def test_progress_counts_every_byte_once():
    task = task_of(family(EVERY_KIND))
    moved: list[tuple[int, int]] = []
    merge_task(task, progress=lambda read, written: moved.append((read, written)))
    assert sum(read for read, _ in moved) == task.bytes_read
    assert sum(written for _, written in moved) == task.bytes_written


# ---- nothing visible unless it is right


def test_a_disk_that_fails_while_a_shard_is_written_leaves_neither_shard_nor_receipt(tmp_path: Path):
    task = task_of(family({"x": ((3000, 1000), "bfloat16")}), run=str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
    try:
        with threads_all_end(), pytest.raises(StorageError):
            merge_task(task)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("struck", [0, 1, 5])
@pytest.mark.parametrize("point", ["linear", "copy"])
@pytest.mark.parametrize("step", ["hash", "write"])
def test_the_error_of_one_piece_ends_the_waiting_of_all_others(step: str, point: str, struck: int):
    task = task_of(family({"large": ((11, 67), "float32")}), threads=4)
    right, pieces = getattr(ShardWriter, step), Counter[str]()

    def failing(self: ShardWriter, data: memoryview) -> None:
        pieces[self.point.point] += 1
        if (self.point.point, pieces[self.point.point]) == (point, struck + 1):
            raise StorageUnavailable("this piece is lost")
        right(self, data)

    budget = Budget(TILE * 8 + 64, 2, 6, TILE * 8, 4, 0)
    with pytest.MonkeyPatch.context() as patch, small_tiles(budget), threads_all_end():
        patch.setattr(ShardWriter, step, failing)
        with pytest.raises(StorageUnavailable, match="this piece is lost"):
            merge_task(task)
    assert list(open_store(task.run).list()) == []


def test_no_thread_waits_for_memory_that_the_machine_does_not_have(monkeypatch: pytest.MonkeyPatch):
    def none(*_: object, **__: object) -> NoReturn:
        raise MemoryError

    task = task_of(family({"large": ((11, 67), "float32")}), threads=4)
    monkeypatch.setattr("workers.merging.shard.memory", none)
    with small_tiles(Budget(TILE * 8 + 64, 2, 6, TILE * 8, 2, 0)), threads_all_end(), pytest.raises(MemoryError):
        merge_task(task)
    assert list(open_store(task.run).list()) == []


def test_no_thread_waits_where_none_can_be_begun_that_writes(monkeypatch: pytest.MonkeyPatch):
    def submit(self: ThreadPoolExecutor, *call: Any, **named: Any) -> Future[Any]:
        if self._thread_name_prefix == "write":
            raise RuntimeError("can't start new thread")
        return right(self, *call, **named)

    right = ThreadPoolExecutor.submit
    task = task_of(family({"large": ((11, 67), "float32")}), threads=4)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    with small_tiles(Budget(TILE * 8 + 64, 2, 6, TILE * 8, 2, 0)), threads_all_end(), pytest.raises(RuntimeError):
        merge_task(task)
    assert list(open_store(task.run).list()) == []


def test_after_an_error_nothing_is_written_that_was_queued():
    task = task_of(family({"large": ((110, 67), "float32")}), threads=1)
    right, writes = ShardWriter.write, list[str]()

    def failing(self: ShardWriter, data: memoryview) -> None:
        writes.append(self.point.point)
        if len(writes) == 3:
            time.sleep(0.2)  # meanwhile the others are queued
            raise StorageUnavailable("the disk is full")
        right(self, data)

    with pytest.MonkeyPatch.context() as patch, small_tiles(Budget(TILE * 8 + 64, 2, 6, TILE * 8, 60, 0)):
        patch.setattr(ShardWriter, "write", failing)
        with threads_all_end(), pytest.raises(StorageUnavailable, match="the disk is full"):
            merge_task(task)
    assert len(writes) < 20, "of 58 pieces of six points"


@pytest.mark.parametrize("points", [1, 16, 64, 256])
@pytest.mark.parametrize("threads", [1, 2, 16, 64])
@pytest.mark.parametrize("gigabytes", [2, 4, 64])
@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float64", 8)])
def test_what_is_merged_stays_within_a_quarter_of_the_memory(
    points: int, threads: int, gigabytes: int, dtype: str, width: int
):
    settings = {str(point): LINEAR for point in range(points)}
    task = task_of(family({"x": ((9,), dtype)}), settings, threads=threads)
    budget = Budget.of(replace(task, memory_bytes=gigabytes * 10**9))
    room, tile = gigabytes * 10**9 - FIXED_BYTES, width * TILE_ELEMENTS
    wanted = threads + max(threads, 4)
    assert budget.outputs >= max(2, min(wanted, room // 4 // points // tile)), "else threads wait for each other"
    assert points * budget.outputs * budget.piece <= max(
        2 * points * tile, min(room // 4, max(threads * 128 << 20, wanted * points * tile))
    )
    assert threads * budget.slab * len(task.parents) <= max(room // 8, threads * len(task.parents) << 20)
    assert points * budget.piece <= points * max(tile, 2 << 20, (32 << 20) // points), "methods hold masks of it"


def test_a_parent_that_changed_is_refused_and_nothing_is_written():
    parents = family({"x": ((9,), "bfloat16")})
    task = task_of(parents)
    open_store(task.parents["b"].url).write("model.safetensors", save(parents["a"]))
    with threads_all_end(), pytest.raises(ObjectChanged):
        merge_task(task)
    assert list(open_store(task.run).list()) == []


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are used where they lie, also where the system does not say that they are in its cache."""
    if not CAN_MAP or counts_as_memory():
        pytest.skip("no files are mapped but on Linux (x86-64, ARM), without a limit of addresses")
    monkeypatch.setattr(MappedBytes, "are_cached", lambda self: True)


@pytest.mark.parametrize(
    ("setting", "when"), [(LINEAR, "merge"), (TIES, "merge"), (TIES, "learn")], ids=["linear", "ties", "ties, facts"]
)
@pytest.mark.parametrize("anew", [False, True], ids=["held", "read anew"])
@pytest.mark.parametrize("change", ["cut short", "written to"])
@pytest.mark.usefixtures("cached")
def test_a_file_that_changes_while_it_is_merged_is_refused_and_nothing_is_written(
    setting: Setting, when: str, anew: bool, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its bytes are memory of this process: where they end, a read finds zeros and not the end of the process."""
    task = task_of(family({"only": ((2, 1 << 20), "bfloat16")}), {"point": setting}, at=str(tmp_path / "parents"))
    place = Path(task.parents["b"].url) / "model.safetensors"
    struck: list[bool] = []

    def strike(real: Callable[..., Any]) -> Callable[..., Any]:
        def striking(*given: Any, **named: Any) -> Any:
            if not struck:
                struck.append(True)
                with place.open("r+b") as file:
                    file.seek(2 << 20)
                    file.truncate(1000) if change == "cut short" else file.write(b"\x01")
            return real(*given, **named)

        return striking

    if when == "merge":
        monkeypatch.setattr(TensorMerger, "run", strike(TensorMerger.run))
    else:
        monkeypatch.setattr("workers.merging.shard.tiles", strike(tiles))
    if anew:
        monkeypatch.setattr("workers.merging.shard.LEARNED_TOGETHER", 1000)
    with threads_all_end(), pytest.raises(ObjectChanged, match=rf"{place} changed while it was in use; run again"):
        merge_task(task)
    assert struck and list(open_store(task.run).list()) == []


@pytest.mark.usefixtures("cached")
def test_a_file_that_changes_is_named_and_not_what_followed_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Integers differ from those of the other parent once they are zeros."""
    parents = {"a": {"only": torch.arange(1 << 18)}, "b": {"only": torch.arange(1 << 18)}}
    task = task_of(parents, {"point": LINEAR}, at=str(tmp_path / "parents"))
    place = Path(task.parents["b"].url) / "model.safetensors"
    real = TensorMerger.run

    def run(self: TensorMerger, *given: Any) -> tuple[bool, list[int]]:
        os.truncate(place, 1000)
        return real(self, *given)

    monkeypatch.setattr(TensorMerger, "run", run)
    with pytest.raises(ObjectChanged, match=f"{place} changed while it was in use") as raised:
        merge_task(task)
    assert isinstance(raised.value.__context__, BadInput)


def with_digests(task: MergeTask, parents: Mapping[str, dict[str, Tensor]], like: str = "blake3:") -> MergeTask:
    """The task, of parents that have manifests."""
    tensors = tuple(
        replace(
            tensor,
            sources={
                name: replace(at, digest=digest_of(bytes_of(parents[name][tensor.name]), like=like))
                for name, at in tensor.sources.items()
            },
        )
        for tensor in task.tensors
    )
    return replace(task, tensors=tensors)


def bytes_of(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


@pytest.mark.usefixtures("cached")
def test_the_copy_of_a_file_that_was_held_against_its_digest_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A mapped page may leave the cache after that, and come back otherwise from a disk that fails."""
    parents = family({"only": ((64,), "bfloat16")})
    task = task_of(parents, {"point": LINEAR}, at=str(tmp_path / "parents"))
    mapped: list[int] = []
    real = LocalStore.mapped

    def counting(self: LocalStore, key: str, *, start: int, length: int, etag: str | None = None) -> MappedBytes | None:
        mapped.append(length)
        return real(self, key, start=start, length=length, etag=etag)

    monkeypatch.setattr(LocalStore, "mapped", counting)
    plain = merge_task(task)
    assert len(mapped) == len(parents)
    mapped.clear()
    assert digests(merge_task(with_digests(task, parents))) == digests(plain)
    assert mapped == []


@contextmanager
def a_bit_flips_on_its_way(url: str, struck: int | None) -> Iterator[list[str]]:
    """One bit of the parent at `url` flips in the read of this number, in no other; yields the reads so far.

    Over a network that is the fault proxy's work (tests/chaos); here every read of a task is struck in turn.
    """
    real, reads = open_store(url), list[str]()

    class Flipping:
        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def read_into(self, key: str, buffer: memoryview, *, start: int = 0, etag: str | None = None) -> None:
            real.read_into(key, buffer, start=start, etag=etag)
            if len(reads) == struck:
                buffer[len(buffer) // 2] ^= 1
            reads.append(key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workers.merging.reading.open_store", lambda it: Flipping() if it == url else open_store(it))
        yield reads


@pytest.mark.parametrize("held", [0, 10**9], ids=["read again for each pass", "held in memory"])
@pytest.mark.parametrize("setting", [LINEAR, TIES], ids=["one pass", "several passes"])
def test_a_bit_of_a_parent_that_flips_on_its_way_is_noticed_whichever_read_it_strikes(setting: Setting, held: int):
    parents = family({"large": ((11, 67), "float32"), "odd": ((7,), "bfloat16"), "empty": ((0,), "float32")})
    budget = Budget(TILE * 8 + 64, 2, 4, TILE * 8, 4, held)

    def task() -> MergeTask:
        return with_digests(task_of(parents, {"point": setting}), parents)

    with small_tiles(budget), threads_all_end():
        undisturbed = task()
        with a_bit_flips_on_its_way(undisturbed.parents["b"].url, None) as reads:
            merged = merge_task(undisturbed)
        assert digests(merged) == digests(merge_task(task_of(parents, {"point": setting})))
        for read in range(len(reads)):
            flipped = task()
            with (
                a_bit_flips_on_its_way(flipped.parents["b"].url, read),
                pytest.raises(StorageUnavailable, match=r"tensor (large|odd) was damaged on its way"),
            ):
                merge_task(flipped)
            assert list(open_store(flipped.run).list()) == []


@pytest.mark.parametrize("like", ["", "blake3:"], ids=["of an older version", "of this version"])
def test_a_parent_that_is_not_what_its_manifest_says_is_refused(like: str):
    parents = family({"x": ((9,), "bfloat16")})
    assert merge_task(with_digests(task_of(parents), parents, like))
    task = with_digests(task_of(parents), {**parents, "b": parents["a"]}, like)
    with threads_all_end(), pytest.raises(CorruptData) as refused:
        merge_task(task)
    assert str(refused.value) == (
        f"{task.parents['b'].url}/model.safetensors: tensor x is not the one of manifest.json there;"
        " put it right, or remove that manifest"
    )
    assert list(open_store(task.run).list()) == []


def test_a_second_worker_that_merges_the_same_agrees():
    task = task_of(family(EVERY_KIND))
    first = merge_task(task)
    assert digests(merge_task(task)) == digests(first)
    stored = open_store(task.run).read("receipts/linear.json")
    assert Receipt.from_json(bytes(stored)) in first


def test_a_receipt_of_an_older_version_is_no_contradiction():
    task = task_of(family({"x": ((9,), "bfloat16")}), {"linear": LINEAR})
    (receipt,) = merge_task(task)
    whole = shard(task, "linear")
    earlier = replace(receipt, tensors={"x": hashlib.sha256(whole[-18:]).hexdigest()}, worker="elsewhere:1")
    store = open_store(task.run)
    store.write("receipts/linear.json", earlier.to_json())
    assert merge_task(task) == [earlier]
    store.write("points/linear/model.safetensors", b"damaged meanwhile")
    (again,) = merge_task(task)
    assert again.tensors == receipt.tensors, "merged anew"
    assert shard(task, "linear") == whole
    assert Receipt.from_json(bytes(store.read("receipts/linear.json"))) == earlier


def test_a_receipt_that_tells_of_other_bytes_is_a_contradiction():
    task = task_of(family({"x": ((9,), "bfloat16")}), {"linear": LINEAR})
    (receipt,) = merge_task(task)
    store = open_store(task.run)
    store.write(
        "receipts/linear.json", replace(receipt, tensors={"x": f"blake3:{0:064}"}, worker="elsewhere:1").to_json()
    )
    with pytest.raises(CorruptData) as contradiction:
        merge_task(task)
    line = str(contradiction.value)
    assert line.startswith("points/linear/model.safetensors: two workers merged it to different bytes (elsewhere:1, ")
    assert line.endswith("check the memory of these machines and run `mergeyard verify`")
    assert store.locate(receipt.key).etag == receipt.etag, "what the receipt tells of stays"


def test_a_late_second_worker_touches_nothing_that_a_reader_may_have_pinned():
    task = task_of(family(EVERY_KIND))
    merge_task(task)
    store = open_store(task.run)
    before = {info.key: info.etag for info in store.list()}
    merge_task(task)
    assert {info.key: info.etag for info in store.list()} == before


def test_a_shard_that_is_gone_or_cut_is_written_again_under_its_receipt():
    task = task_of(family(EVERY_KIND))
    first = merge_task(task)
    store = open_store(task.run)
    wanted = {receipt.key: bytes(store.read(receipt.key)) for receipt in first}
    store.delete(first[0].key)
    store.write(first[-1].key, wanted[first[-1].key][:-1])
    assert digests(merge_task(task)) == digests(first)
    assert {receipt.key: bytes(store.read(receipt.key)) for receipt in first} == wanted


def test_all_floats_of_the_house_are_tested_here():
    stored = {tensor.dtype for tensor in task_of(family(EVERY_KIND)).tensors}
    assert set(FLOATS) <= stored


@pytest.mark.parametrize("numerics", ["float32", "mergekit"])
def test_numbers_that_float16_cannot_hold_are_counted(numerics: str):
    parents = family({"good": ((70,), "bfloat16"), "large": ((5, 70), "bfloat16")})
    for tensors in parents.values():
        tensors["large"][0, :3] = 1e5  # 0.7 × 1e5 + 0.3 × 1e5 is above 65504
    parents["b"]["large"][4, 0] = torch.inf
    half = {name: replace(tensor, dtype="F16") for name, tensor in by_name(task_of(parents)).items()}
    task = replace(task_of(parents, {"linear": LINEAR}), tensors=tuple(half.values()), numerics=numerics)
    (receipt,) = merge_task(task)
    assert receipt.overflowed == {"large": 3}
    assert receipt.nonfinite == ("large",)


@pytest.mark.parametrize(("kind", "largest"), [("bfloat16", 3e38), ("float16", 6e4), ("float32", 3e38)])
def test_a_sum_beyond_the_largest_number_of_its_dtype_is_counted(kind: str, largest: float):
    parents = family({"x": ((4,), kind)})
    for tensors in parents.values():
        tensors["x"][1] = largest
    total = Setting("linear", ("a", "b"), None, (("normalize", False), ("weight", (1.0, 1.0))))
    (receipt,) = merge_task(task_of(parents, {"total": total}))
    assert receipt.overflowed == {"x": 1}
    assert receipt.nonfinite == ()


def test_past_the_page_cache_pieces_are_written_from_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The header, and a tensor of an odd size, take the pieces from the start of a page."""
    pwrite, sizes = os.pwrite, list[int]()

    def noted(descriptor: int, data: memoryview, position: int) -> int:
        sizes.append(len(data))
        return pwrite(descriptor, data, position)

    monkeypatch.setattr(direct.os, "pwrite", noted)
    monkeypatch.setattr(local, "FIRST_WRITEBACK_BYTES", 1 << 20)
    monkeypatch.setattr(local, "SLOW_WRITEBACK_SECONDS", 0)
    monkeypatch.setattr(local, "can_write_directly", lambda descriptor: True)
    parents = family({"odd": ((77,), "bfloat16"), "large": ((3000, 4000), "bfloat16")})
    points = {"one": LINEAR, "other": LINEAR}
    task, kept = task_of(parents, points, run=str(tmp_path)), task_of(parents, points)
    assert digests(merge_task(task)) == digests(merge_task(kept))
    for point in task.points:
        assert (tmp_path / point.key).read_bytes() == open_store(kept.run).read(point.key)
    assert sum(size > direct.PIECE_BYTES for size in sizes) == 2 * len(points), "two of three pieces"
    assert direct.PIECE_BYTES not in sizes, "the size of what is copied"


@pytest.mark.parametrize("differs", [None, 0, 63, 64, 1000, 1024, 29_999])
def test_a_merge_has_the_bytes_of_a_parent_where_no_element_differs(differs: int | None):
    parents = family({"x": ((30_000,), "bfloat16")})
    parents["b"]["x"] = parents["a"]["x"].clone()
    if differs is not None:
        parents["b"]["x"][differs] += 1
    (receipt,) = merge_task(task_of(parents, {"linear": LINEAR}))
    assert receipt.alike == ({"a": 1, "b": 1} if differs is None else {})


def by_name(task: MergeTask) -> dict[str, TensorMerge]:
    return {tensor.name: tensor for tensor in task.tensors}

"""Checkpoints of `torch.save`: every tensor where torch put it, and no line of a hostile pickle runs."""

from __future__ import annotations

import io
import pickle
import random
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.errors import BadInput, CorruptData, MergeyardError, ObjectMissing
from workers.checkpoints.dtypes import TORCH_NAMES
from workers.checkpoints.opening import Unmergeable, open_checkpoint
from workers.checkpoints.safetensors import TensorHeader
from workers.checkpoints.torch_files import read_torch_file
from workers.storage import open_store
from workers.storage.memory import MemoryStore

CONFIG = b'{"model_type": "qwen2"}'
SOME = torch.arange(24, dtype=torch.float32).reshape(4, 6)


def headers_of(path: Path) -> dict[str, TensorHeader]:
    store = open_store(path.parent)
    return {header.name: header for header in read_torch_file(store, store.locate(path.name))}


def read_back(path: Path, header: TensorHeader) -> torch.Tensor:
    """The tensor that the header describes, from the bytes of the file."""
    raw = bytearray(path.read_bytes()[header.start : header.end])
    dtype: torch.dtype = getattr(torch, TORCH_NAMES[header.dtype])
    flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    return flat.reshape(header.shape) if header.strides is None else flat.as_strided(header.shape, header.strides)


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("wrapped", [False, True])
def test_every_tensor_is_found_where_torch_put_it(tmp_path: Path, protocol: int, wrapped: bool):
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    tensors: dict[str, Any] = OrderedDict(
        (dtype, torch.zeros(3, 5, dtype=torch.uint8).to(getattr(torch, TORCH_NAMES[dtype]))) for dtype in TORCH_NAMES
    )
    tensors |= {
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 7),
        "parameter": torch.nn.Parameter(base.clone()),
        "rows of another": base[2:5],
        "the same": base,
        "transposed": base.T,
        "every second column": base[:, ::2],
        "expanded": torch.tensor([1.5]).expand(4, 3),
    }
    torch.save(
        {"state_dict": tensors, "epoch": 3} if wrapped else tensors, tmp_path / "x.bin", pickle_protocol=protocol
    )
    found = headers_of(tmp_path / "x.bin")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        again = read_back(tmp_path / "x.bin", found[name])
        assert again.dtype is tensor.dtype
        assert again.shape == tensor.shape
        same = [value.contiguous().reshape(-1).view(torch.uint8) for value in (again, tensor.detach())]
        assert torch.equal(*same)
    assert {name for name, header in found.items() if header.strides is not None} == {
        "transposed",
        "every second column",
        "expanded",
    }


def test_the_state_dict_of_a_module_with_its_metadata_is_read(tmp_path: Path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), tmp_path / "x.bin")
    assert headers_of(tmp_path / "x.bin").keys() == module.state_dict().keys()


def test_a_sharded_checkpoint_is_opened_through_its_index(tmp_path: Path):
    (tmp_path / "config.json").write_bytes(CONFIG)
    torch.save({"x": SOME}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"y": SOME[:2]}, tmp_path / "pytorch_model-00002-of-00002.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(
        '{"weight_map": {"x": "pytorch_model-00001-of-00002.bin", "y": "pytorch_model-00002-of-00002.bin"}}'
    )
    checkpoint = open_checkpoint(str(tmp_path), "cos")
    assert checkpoint.shapes == {"x": (4, 6), "y": (2, 6)}
    assert [file.key for file in checkpoint.files] == [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ObjectMissing, match=r"names pytorch_model-00002-of-00002\.bin, which is not there"):
        open_checkpoint(str(tmp_path), "cos")


# ---- files that are refused


class Runs:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def archive(pickled: bytes, *, method: int = zipfile.ZIP_STORED, **entries: bytes) -> bytes:
    """A file of torch.save with this data.pkl."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as made:
        for name, content in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", **entries}.items():
            made.writestr(f"archive/{name.replace('__', '/')}", content)
    return file.getvalue()


def saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0"
    b"0X\x03\0\0\0cpuK\x04tQ%b\x89ccollections\nOrderedDict\n)RtR"
)
ONE = b"\x80\x02}X\x01\0\0\0x%bs."
PLACES: Mapping[str, bytes] = {
    "whole": b"K\0K\x04\x85K\x01\x85",
    "beyond its storage": b"K\x01K\x04\x85K\x01\x85",
    "of a negative size": b"K\0J\xff\xff\xff\xff\x85K\x01\x85",
    "with a stride too many": b"K\0K\x04\x85K\x01K\x01\x86",
    "of a stride that overflows": b"K\0K\x02\x85\x8a\x09\0\0\0\0\0\0\0\0\x01\x85",
    "whose size is a text": b"K\0X\x01\0\0\x001\x85K\x01\x85",
}


def crafted(place: str) -> bytes:
    return archive(ONE % (TENSOR % PLACES[place]), data__0=bytes(16))


REFUSED: dict[str, tuple[bytes, type[MergeyardError], str]] = {
    "old": (
        saved({"x": SOME}, _use_new_zipfile_serialization=False),
        BadInput,
        "in the format of torch before 1.6; write it anew with `torch.save(torch.load(FILE, map_location='cpu',"
        " weights_only=True), FILE)`",
    ),
    "compressed": (
        archive(ONE % (TENSOR % PLACES["whole"]), method=zipfile.ZIP_DEFLATED, data__0=bytes(16)),
        BadInput,
        "'archive/data.pkl' in it is compressed or encrypted; write it anew",
    ),
    "big-endian": (
        archive(ONE % (TENSOR % PLACES["whole"]), data__0=bytes(16), byteorder=b"big"),
        BadInput,
        "in the order of a big-endian machine",
    ),
    "whole model": (
        saved(torch.nn.Linear(2, 2)),
        BadInput,
        "names 'torch.nn.modules.linear.Linear', which a checkpoint of weights does not need; nothing of it was run",
    ),
    "more than tensors": (saved({"x": SOME, "step": 3}), BadInput, "'step' in it is no tensor"),
    "no dict": (saved([SOME]), BadInput, "holds no dict of tensors"),
    "no archive": (b"PK or not", CorruptData, "no whole file of torch.save"),
    "truncated": (saved({"x": SOME})[:-40], CorruptData, "no whole file of torch.save"),
    "no pickle": (archive(b"\x80\x02}"), CorruptData, "is no pickle of torch.save"),
    "no storage": (archive(ONE % (TENSOR % PLACES["whole"])), CorruptData, "the storage '0' is not in it"),
    "empty": (b"", CorruptData, "no whole file of torch.save"),
    "pointer of Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 1234567\n",
        CorruptData,
        "a Git LFS pointer",
    ),
    **{place: (crafted(place), CorruptData, "") for place in PLACES if place != "whole"},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path: Path, kind: str):
    content, error, line = REFUSED[kind]
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(error) as refusal:
        headers_of(tmp_path / "x.bin")
    assert str(refusal.value).startswith(f"{tmp_path / 'x.bin'}: ")
    assert line in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
    assert len(str(refusal.value)) < 500


def test_the_crafted_file_is_one_that_torch_reads(tmp_path: Path):
    (tmp_path / "x.bin").write_bytes(crafted("whole"))
    assert torch.equal(torch.load(tmp_path / "x.bin", weights_only=True)["x"], torch.zeros(4))
    assert torch.equal(read_back(tmp_path / "x.bin", headers_of(tmp_path / "x.bin")["x"]), torch.zeros(4))


def test_the_remedy_for_an_old_file_works(tmp_path: Path):
    torch.save({"x": SOME}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    torch.save(torch.load(tmp_path / "x.bin", map_location="cpu", weights_only=True), tmp_path / "x.bin")
    assert torch.equal(read_back(tmp_path / "x.bin", headers_of(tmp_path / "x.bin")["x"]), SOME)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_hostile_pickle_does_not_run(tmp_path: Path, protocol: int):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    calls = [
        Runs(victim.unlink),
        Runs(getattr, victim, "unlink"),
        Runs(eval, f"open({str(victim)!r}, 'w')"),
        Runs(sys.setrecursionlimit, 10**6),
    ]
    for call in calls:
        for value in (call, {"x": SOME.tolist(), "y": call}, OrderedDict(z=[call])):
            content = pickle.dumps(value, protocol)
            (tmp_path / "x.bin").write_bytes(archive(content))
            with pytest.raises((BadInput, CorruptData)):
                headers_of(tmp_path / "x.bin")
    assert victim.read_text() == "precious"
    pickle.loads(pickle.dumps(Runs(victim.unlink), protocol))
    assert not victim.exists(), "the calls would have done harm"


def test_damaged_files_give_tensors_or_one_error(tmp_path: Path):
    store = MemoryStore("memory://damaged-torch-files")
    whole = saved({"a": SOME, "b": SOME.T, "c": SOME[:1].bfloat16()})
    generator = random.Random(13)
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        info = store.write("x.bin", bytes(content[: generator.choice([None, -1, -30, 400])]))
        with suppress(BadInput, CorruptData):
            for header in read_torch_file(store, info):
                assert 0 <= header.start <= header.end <= info.size


def test_a_checkpoint_without_an_index_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_bytes(CONFIG)
    torch.save({"x": SOME}, tmp_path / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(Unmergeable, match=r"none of model\.safetensors, .*pytorch_model\.bin\.index\.json there"):
        open_checkpoint(str(tmp_path), "cos")

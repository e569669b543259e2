"""Reading checkpoints where they lie: headers as the safetensors library writes them, and everything that lies."""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from jobs.errors import BadInput, CorruptData, MergeyardError, ObjectMissing
from workers.checkpoints.dtypes import TORCH_NAMES
from workers.checkpoints.opening import LARGEST_CONFIG, LARGEST_INDEX, AdapterAlone, Unmergeable, open_checkpoint
from workers.checkpoints.safetensors import (
    LARGEST_HEADER,
    TensorHeader,
    header_bytes,
    parse_header,
    read_header,
    read_json,
)
from workers.storage import ObjectInfo, open_store
from workers.storage.memory import MemoryStore

TENSORS = {
    "model.embed_tokens.weight": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "model.layers.0.scale": torch.tensor(2.5, dtype=torch.float64),
    "model.layers.10.mask": torch.tensor([True, False, True]),
    "model.layers.10.empty": torch.zeros(0, 7),
    "model.norm.weight": torch.ones(5, dtype=torch.float16),
    "positions": torch.arange(3),
}


def safetensors_file(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file with this header, whatever it says; `length` lies about its size."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start: int, end: int, shape: object = (2,), dtype: str = "BF16", **more: object) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end], **more}


def headers_of(path: Path) -> list[TensorHeader]:
    store = open_store(path.parent)
    return read_header(store, store.locate(path.name))


# ---- what the library wrote


@pytest.fixture
def real_file(tmp_path: Path) -> Path:
    path = tmp_path / "real" / "model.safetensors"
    path.parent.mkdir()
    save_file(TENSORS, path, metadata={"format": "pt", "more": "text"})
    return path


def test_every_tensor_is_found_where_the_library_put_it(real_file: Path):
    content = real_file.read_bytes()
    found = headers_of(real_file)
    assert {header.name for header in found} == TENSORS.keys()
    for header in found:
        tensor = TENSORS[header.name]
        assert header.shape == tuple(tensor.shape)
        assert getattr(torch, TORCH_NAMES[header.dtype]) is tensor.dtype
        raw = bytearray(content[header.start : header.end])
        stored = torch.frombuffer(raw, dtype=tensor.dtype) if raw else torch.empty(0, dtype=tensor.dtype)
        assert torch.equal(stored.reshape(tensor.shape), tensor)


def test_headers_come_in_file_order(real_file: Path):
    starts = [header.start for header in headers_of(real_file)]
    assert starts == sorted(starts)


def test_a_header_longer_than_the_first_read_is_read_to_its_end(tmp_path: Path):
    tensors = {f"model.layers.{number}.{'x' * 200}": torch.full((1,), float(number)) for number in range(1000)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert {header.name for header in headers_of(tmp_path / "model.safetensors")} == tensors.keys()


@pytest.mark.parametrize("dtype", sorted(TORCH_NAMES))
def test_every_dtype_of_the_library_that_torch_has_is_read(dtype: str, tmp_path: Path):
    tensor = torch.zeros(3, dtype=torch.uint8).to(getattr(torch, TORCH_NAMES[dtype]))
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    (header,) = headers_of(tmp_path / "model.safetensors")
    assert (header.dtype, header.end - header.start) == (dtype, tensor.nbytes)


def test_a_header_we_wrote_is_opened_by_the_library(tmp_path: Path):
    parts = [("wide", "F64", (2, 1)), ("scalar", "F32", ()), ("β", "BF16", (3,)), ("none", "F16", (0,))]
    data = [torch.tensor([[1.5], [2.5]]).double(), torch.tensor(3.0), torch.arange(3).bfloat16(), torch.zeros(0).half()]
    raw = b"".join(bytes(tensor.reshape(-1).view(torch.uint8).numpy()) for tensor in data)
    path = tmp_path / "model.safetensors"
    path.write_bytes(header_bytes(parts) + raw)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == {name for name, _, _ in parts}
        for (name, _, _), tensor in zip(parts, data, strict=True):
            assert torch.equal(file.get_tensor(name), tensor)
    assert [(header.name, header.dtype, header.shape) for header in headers_of(path)] == parts


def test_data_begins_at_a_multiple_of_eight_bytes():
    for letters in range(1, 20):
        assert len(header_bytes([("x" * letters, "BF16", (1,))])) % 8 == 0


# ---- headers that contradict themselves, each with its line

BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes is too short"),
    "shorter than its length field": (b"\x01\x00", "2 bytes is too short"),
    "truncated header": (safetensors_file({"x": entry(0, 4)}, bytes(4), length=500), "it is truncated"),
    "oversized header": (safetensors_file({}, length=LARGEST_HEADER + 1), f"claims {LARGEST_HEADER + 1} bytes"),
    "length of all ones": (safetensors_file({}, length=(1 << 64) - 1), "claims 18446744073709551615 bytes"),
    "truncated data": (safetensors_file({"x": entry(0, 4)}, bytes(2)), "it is truncated or has a tail"),
    "tail": (safetensors_file({"x": entry(0, 4)}, bytes(5)), "it is truncated or has a tail"),
    "overlap": (
        safetensors_file({"x": entry(0, 4), "y": entry(2, 6)}, bytes(6)),
        "tensor y overlaps the one before it",
    ),
    "gap": (safetensors_file({"x": entry(0, 4), "y": entry(6, 10)}, bytes(10)), "tensor y leaves a gap before it"),
    "gap at the start": (safetensors_file({"x": entry(2, 6)}, bytes(6)), "tensor x leaves a gap before it"),
    "size that no such shape has": (
        safetensors_file({"x": entry(0, 6)}, bytes(6)),
        "x of BF16 [2] cannot lie in bytes",
    ),
    "backwards": (safetensors_file({"x": entry(4, 0)}, bytes(4)), "tensor x has impossible data_offsets"),
    "negative offset": (safetensors_file({"x": entry(-4, 0)}), "tensor x has impossible data_offsets"),
    "true as an offset": (safetensors_file({"x": entry(False, 4)}, bytes(4)), "tensor x has impossible data_offsets"),
    "half an offset": (safetensors_file({"x": entry(0, 4.0)}, bytes(4)), "tensor x has impossible data_offsets"),  # pyright: ignore[reportArgumentType]
    "negative extent": (safetensors_file({"x": entry(0, 4, [-1, -2])}, bytes(4)), "the impossible shape [-1, -2]"),
    "true as an extent": (safetensors_file({"x": entry(0, 2, [True])}, bytes(2)), "the impossible shape [True]"),
    "huge extent": (safetensors_file({"x": entry(0, 0, [0, 1 << 70])}), "tensor x has the impossible shape"),
    "product that overflows 64 bits": (
        safetensors_file({"x": entry(0, 0, [1 << 32, 1 << 32])}),
        "cannot lie in bytes 0 to 0",
    ),
    "a thousand dimensions": (safetensors_file({"x": entry(0, 2, [1] * 1000)}, bytes(2)), "the impossible shape [1, 1"),
    "unknown dtype": (safetensors_file({"x": entry(0, 4, dtype="C64")}, bytes(4)), "has the unknown dtype 'C64'"),
    "dtype that is no text": (safetensors_file({"x": entry(0, 4, dtype=7)}, bytes(4)), "no plain dtype, shape and"),  # pyright: ignore[reportArgumentType]
    "one offset": (safetensors_file({"x": {"dtype": "U8", "shape": [], "data_offsets": [0]}}), "no plain dtype, shape"),
    "a key too many": (safetensors_file({"x": entry(0, 4, extra=1)}, bytes(4)), "no plain dtype, shape and"),
    "no mapping": (safetensors_file({"x": [0, 4]}, bytes(4)), "no plain dtype, shape and"),
    "a tensor twice": (
        safetensors_file(b'{"x":%s,"x":%s}' % ((json.dumps(entry(0, 4)).encode(),) * 2), bytes(4)),
        "a key stands twice",
    ),
    "dtype twice": (
        safetensors_file(b'{"x":{"dtype":"BF16","dtype":"F16","shape":[2],"data_offsets":[0,4]}}', bytes(4)),
        "a key stands twice",
    ),
    "not a number": (
        safetensors_file(b'{"x":{"dtype":"BF16","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)),
        "NaN is not a JSON number",
    ),
    "infinity": (safetensors_file(b'{"__metadata__":{"a":-Infinity}}'), "-Infinity is not a JSON number"),
    "deep nesting": (safetensors_file(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "not readable as JSON"),
    "no JSON": (safetensors_file(b"{x}"), "not readable as JSON"),
    "blanks before the JSON": (safetensors_file(b" {}"), "does not begin with '{'"),
    "a list": (safetensors_file(b"[]"), "does not begin with '{'"),
    "UTF-16": (safetensors_file('{"x":1}'.encode("utf-16-le")), "not readable as JSON"),
    "not UTF-8": (safetensors_file(b'{"\xff":1}'), "not readable as JSON"),
    "a name on two lines": (safetensors_file({"x\ny": entry(0, 4)}, bytes(4)), r"the tensor name 'x\ny' holds"),
    "half a surrogate pair": (safetensors_file(b'{"\\ud800":{}}'), "(half of a surrogate pair)"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_header_is_refused_in_one_line_that_names_the_file(kind: str, tmp_path: Path):
    content, line = BAD_FILES[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptData) as refusal:
        headers_of(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert line in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
    assert len(str(refusal.value)) < 500


@pytest.mark.parametrize(
    ("name", "most"), [("config.json", LARGEST_CONFIG), ("model.safetensors.index.json", LARGEST_INDEX)]
)
def test_json_is_read_up_to_a_size(name: str, most: int, folder: Folder):
    path = folder({"a.safetensors": ONE, "model.safetensors.index.json": index(x="a.safetensors")})
    text = (path / name).read_bytes()
    (path / name).write_bytes(text + b" " * (most - len(text)))
    assert open_checkpoint(str(path), "cos").tensors.keys() == {"x"}
    (path / name).write_bytes(text + b" " * (most + 1 - len(text)))
    with pytest.raises(CorruptData, match=rf"{name}: has {most + 1} bytes, at most {most} are read"):
        open_checkpoint(str(path), "cos")


def test_the_index_of_a_trillion_parameters_is_read(tmp_path: Path):
    """As Kimi K2 has them: 60 layers of 384 experts, three matrices each, with a scale each in FP8."""
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight{kind}"
        for layer in range(1, 61)
        for expert in range(384)
        for part in ("gate", "down", "up")
        for kind in ("", "_scale_inv")
    ]
    text = json.dumps(index(**dict.fromkeys(names, "model-00061-of-00062.safetensors")), indent=2).encode()
    assert len(names) > 2 * 69_000
    assert len(text) < LARGEST_INDEX * 2 / 3
    store = MemoryStore("memory://trillion")
    info = store.write("model.safetensors.index.json", text)
    read = read_json(store, ObjectInfo(info.key, info.size, info.etag), LARGEST_INDEX)
    assert read["weight_map"].keys() == set(names)


def test_the_library_itself_refuses_all_but_a_few_of_these(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    accepted: set[str] = set()
    for kind, (content, _) in BAD_FILES.items():
        path.write_bytes(content)
        with suppress(SafetensorError), safe_open(path, framework="pt"):
            accepted.add(kind)
    assert accepted == {
        "a key too many",
        "a tensor twice",
        "a thousand dimensions",
        "blanks before the JSON",
        "a name on two lines",
    }


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["BF16", "F32"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["BF16", "F32", "BOOL", "X9"]), "shape": st.lists(st.integers(-1, 4), max_size=3)},
    optional={"data_offsets": st.lists(st.integers(-2, 40), min_size=1, max_size=3), "more": JSON},
)
HEADER = st.dictionaries(st.text(string.printable, max_size=4) | st.just("__metadata__"), ENTRY | JSON, max_size=4)


@settings(max_examples=700, deadline=None, derandomize=True)
@given(header=HEADER, size=st.integers(0, 60), cut=st.integers(0, 200), flipped=st.integers(0, 2000))
def test_any_header_gives_tensors_or_corrupt_data(header: dict[str, Any], size: int, cut: int, flipped: int):
    text = bytearray(json.dumps(header).encode())
    if cut < 20:
        text = text[:-cut]
    if text and flipped < 8 * len(text):
        text[flipped // 8] ^= 1 << flipped % 8
    try:
        found = parse_header(bytes(text), data_start=8 + len(text), file_size=8 + len(text) + size, where="file")
    except CorruptData:
        return
    position = 8 + len(text)
    for tensor in found:
        assert tensor.start == position
        position = tensor.end
    assert position == 8 + len(text) + size


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(text=st.binary(max_size=80), size=st.integers(0, 60))
def test_any_bytes_give_tensors_or_corrupt_data(text: bytes, size: int):
    for header in (text, b"{" + text, b'{"x":{' + text + b"}}"):
        try:
            parse_header(header, data_start=8 + len(header), file_size=8 + len(header) + size, where="file")
        except CorruptData:
            continue


# ---- whole checkpoints


Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """folder(files, config): a checkpoint of safetensors `files`, each a dict of tensors, and other files as bytes."""

    def write(files: dict[str, Any], config: object = None) -> Path:
        for name, content in files.items():
            if isinstance(content, dict) and name.endswith(".safetensors"):
                save_file(content, tmp_path / name)
            else:
                (tmp_path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        if config is not False:
            (tmp_path / "config.json").write_text(json.dumps(config or {"model_type": "qwen2"}))
        return tmp_path

    return write


def index(**files: str) -> dict[str, Any]:
    return {"metadata": {}, "weight_map": files}


ONE = {"x": torch.ones(2)}
TWO = {"y": torch.ones(3)}


def test_a_checkpoint_in_several_files_is_opened_through_its_index(folder: Folder):
    path = folder(
        {
            "model-00001-of-00002.safetensors": ONE,
            "model-00002-of-00002.safetensors": TWO,
            "model.safetensors.index.json": index(
                x="model-00001-of-00002.safetensors", y="model-00002-of-00002.safetensors"
            ),
            "tokenizer.json": b"{}",
        },
        {"model_type": "qwen2"},
    )
    checkpoint = open_checkpoint(str(path), "cos")
    assert checkpoint.shapes == {"x": (2,), "y": (3,)}
    assert [file.key for file in checkpoint.files] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert (checkpoint.tensors["x"].file, checkpoint.tensors["y"].file) == (0, 1)
    assert checkpoint.side_files.keys() == {"tokenizer.json"}


BAD_CHECKPOINTS: dict[str, tuple[dict[str, Any], object, type[MergeyardError], str]] = {
    "index out of its folder": (
        {"model.safetensors.index.json": index(x="../secrets.safetensors")},
        None,
        BadInput,
        "the index names '../secrets.safetensors', which is not a safetensors file beside it",
    ),
    "index with an absolute path": (
        {"model.safetensors.index.json": index(x="/etc/passwd")},
        None,
        BadInput,
        "the index names '/etc/passwd', which is not",
    ),
    "index with a URL": (
        {"model.safetensors.index.json": index(x="http://169.254.169.254/x.safetensors")},
        None,
        BadInput,
        "which is not a safetensors file beside it",
    ),
    "index of a pickle": (
        {"model.safetensors.index.json": index(x="pytorch_model.bin")},
        None,
        BadInput,
        "which is not a safetensors file beside it",
    ),
    "index of a file that is not there": (
        {"model.safetensors.index.json": index(x="model-1.safetensors")},
        None,
        ObjectMissing,
        "the index names model-1.safetensors, which is not there; fetch the parent again",
    ),
    "index of a tensor that is not there": (
        {"a.safetensors": ONE, "model.safetensors.index.json": index(x="a.safetensors", y="a.safetensors")},
        None,
        CorruptData,
        "the index promises y in a.safetensors, which does not hold it",
    ),
    "index without a map": (
        {"a.safetensors": ONE, "model.safetensors.index.json": {"weight_map": {}}},
        None,
        CorruptData,
        "model.safetensors.index.json has no weight_map",
    ),
    "index of what are no files": (
        {"a.safetensors": ONE, "model.safetensors.index.json": {"weight_map": {"x": ["a.safetensors"]}}},
        None,
        CorruptData,
        "model.safetensors.index.json has no weight_map of names to files",
    ),
    "index of a name that no tensor has": (
        {"a.safetensors": ONE, "model.safetensors.index.json": index(**{"x\n" * 9999: "a.safetensors"})},
        None,
        CorruptData,
        "holds characters that no name has",
    ),
    "index of a file with an endless name": (
        {"a.safetensors": ONE, "model.safetensors.index.json": index(x="a" * 9999 + ".safetensors")},
        None,
        BadInput,
        "which is not a safetensors file beside it",
    ),
    "index that is no JSON": (
        {"a.safetensors": ONE, "model.safetensors.index.json": b"{"},
        None,
        CorruptData,
        "model.safetensors.index.json: not readable as JSON",
    ),
    "tensor in two files": (
        {
            "a.safetensors": {**ONE, **TWO},
            "b.safetensors": ONE,
            "model.safetensors.index.json": index(x="b.safetensors", y="a.safetensors"),
        },
        None,
        CorruptData,
        "tensor x is in two files; keep one",
    ),
    "LoRA": (
        {"adapter_model.safetensors": ONE, "adapter_config.json": b"{}"},
        None,
        AdapterAlone,
        "a LoRA adapter, not a whole model; write its base before it: `BASE+ADAPTER`",
    ),
    "pickle that is no file of torch.save": (
        {"pytorch_model.bin": b"\x80\x02."},
        None,
        CorruptData,
        "pytorch_model.bin: no whole file of torch.save",
    ),
    "index of pickles out of its folder": (
        {"pytorch_model.bin.index.json": index(x="../pytorch_model.bin")},
        None,
        BadInput,
        "the index names '../pytorch_model.bin', which is not a .bin file beside it",
    ),
    "index of pickles that names safetensors": (
        {"pytorch_model.bin.index.json": index(x="model.safetensors")},
        None,
        BadInput,
        "which is not a .bin file beside it",
    ),
    "GGUF": ({"model-q4.gguf": b"GGUF"}, False, Unmergeable, "GGUF weights are quantised; give the safetensors"),
    "quantised": (
        {"model.safetensors": ONE},
        {"model_type": "qwen2", "quantization_config": {"quant_method": "gptq"}},
        Unmergeable,
        "quantised weights (gptq) cannot be merged; give the checkpoint that they were made from",
    ),
    "quantised inside": (
        {"model.safetensors": ONE},
        {"thinker_config": {"text_config": {"quantization_config": {"quant_method": "fp8"}}}},
        Unmergeable,
        "quantised weights (fp8) cannot be merged",
    ),
    "quantised by compressed-tensors of old": (
        {"model.safetensors": ONE},
        {"compression_config": {"format": "pack-quantized"}},
        Unmergeable,
        "quantised weights (pack-quantized) cannot be merged",
    ),
    "quantised, and a shard is missing": (
        {"model.safetensors.index.json": index(x="model-1.safetensors")},
        {"quantization_config": {"quant_method": "awq"}},
        Unmergeable,
        "quantised weights (awq) cannot be merged",
    ),
    "quantised, by a file beside": (
        {"model.safetensors": ONE, "quantize_config.json": b"{}"},
        None,
        Unmergeable,
        "quantised weights (quantize_config.json) cannot be merged",
    ),
    "no config": ({"model.safetensors": ONE}, False, Unmergeable, "no config.json there"),
    "config that is a list": ({"model.safetensors": ONE}, [1], CorruptData, "a JSON object was expected"),
    "no weights": (
        {},
        None,
        Unmergeable,
        "none of model.safetensors, model.safetensors.index.json, pytorch_model.bin",
    ),
    "nothing": ({}, False, ObjectMissing, "nothing there; check the path"),
    "cut in the middle": (
        {"model.safetensors": safetensors_file({"x": entry(0, 4)}, bytes(3))},
        None,
        CorruptData,
        "it is truncated or has a tail",
    ),
}


UNSAID: dict[str, dict[str, torch.Tensor]] = {
    "FP8": {"a.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)},
    "FP8 with scales that do not fit": {
        "a.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn),
        "a.weight_scale_inv": torch.ones(3),
    },
    "GPTQ": {"a.qweight": torch.zeros(2, 2, dtype=torch.int32), "a.scales": torch.ones(2)},
    "bitsandbytes in 8 bits": {"a.weight": torch.zeros(2, 2, dtype=torch.int8), "a.SCB": torch.ones(2)},
    "bitsandbytes in 4 bits": {"a.weight": torch.zeros(2, 1, dtype=torch.uint8), "a.weight.absmax": torch.ones(2)},
    "int8 of an own kind": {"a.weight": torch.zeros(2, 2, dtype=torch.int8), "a.weights_scale": torch.ones(2)},
    "MXFP4": {"a.up_blocks": torch.zeros(2, 2, dtype=torch.uint8), "a.up_scales": torch.zeros(2, dtype=torch.uint8)},
}


@pytest.mark.parametrize("kind", UNSAID)
def test_quantised_weights_are_named_where_no_config_states_them(kind: str, folder: Folder):
    path = folder({"model.safetensors": ONE | UNSAID[kind]})
    with pytest.raises(BadInput, match=r"parent cos \(.*\): quantised weights \(a\..* is .*\) cannot be merged; give"):
        open_checkpoint(str(path), "cos")


def test_masks_and_indices_of_plain_models_are_not_quantised(folder: Folder):
    tensors = {
        "h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "h.0.attn.c_attn.weight": torch.ones(2, 2),
        "block.0.attn.relative_position_index": torch.zeros(4, 4, dtype=torch.int64),
        "block.0.attn.logit_scale": torch.ones(2),
    }
    assert open_checkpoint(str(folder({"model.safetensors": tensors})), "cos").tensors.keys() == tensors.keys()


@pytest.mark.parametrize(
    ("count", "named"), [(1, "run/0"), (3, "run/0, run/1, run/2"), (5, "run/0, run/1, run/2 and 2 more")]
)
def test_the_checkpoints_inside_a_folder_that_is_none_are_named(count: int, named: str, folder: Folder, tmp_path: Path):
    for number in range(count):
        (tmp_path / f"run/{number}").mkdir(parents=True)
        folder({f"run/{number}/config.json": b"{}"}, False)
    with pytest.raises(ObjectMissing, match=rf"parent cos \(.*\): only folders there; name one of {named}$"):
        open_checkpoint(str(tmp_path), "cos")


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_in_one_line_that_names_it(kind: str, folder: Folder):
    files, config, error, line = BAD_CHECKPOINTS[kind]
    path = folder(files, config)
    with pytest.raises(error) as refusal:
        open_checkpoint(str(path), "cos")
    assert type(refusal.value) is error
    assert line in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


# ---- symbolic links


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """A whole checkpoint in `parent`, beside files that are none of its own."""
    (tmp_path / "parent").mkdir()
    save_file(ONE, tmp_path / "parent" / "model.safetensors")
    (tmp_path / "parent" / "config.json").write_text("{}")
    (tmp_path / "credentials").write_text("{}")
    save_file(TWO, tmp_path / "other.safetensors")
    return tmp_path / "parent"


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize(
    "name",
    ["vocab.txt", "config.json", "LICENSE", "1_Pooling/config.json", "model.safetensors.index.json", "manifest.json"],
)
def test_a_link_out_of_the_folder_is_refused_by_name(parent: Path, name: str, absolute: bool):
    link = parent / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    up = "../" * len(Path(name).parts)
    link.symlink_to(parent.parent / "credentials" if absolute else f"{up}credentials")
    with pytest.raises(BadInput) as refused:
        open_checkpoint(str(parent), "cos")
    assert f": {name} is a link to {parent.parent}/credentials, outside the folder; put a copy" in str(refused.value)
    link.unlink()
    link.write_text("{}")
    with suppress(CorruptData):  # an empty index is none
        open_checkpoint(str(parent), "cos")


def test_weights_behind_a_link_out_of_the_folder_are_refused(parent: Path):
    (parent / "model.safetensors").unlink()
    (parent / "model.safetensors").symlink_to(parent.parent / "other.safetensors")
    with pytest.raises(BadInput, match=r"model\.safetensors is a link to .*other\.safetensors"):
        open_checkpoint(str(parent), "cos")


def test_a_link_through_a_link_is_followed_to_its_end(parent: Path):
    (parent / "inner").symlink_to("../credentials")
    (parent / "vocab.txt").symlink_to("inner")
    with pytest.raises(BadInput, match="outside the folder"):
        open_checkpoint(str(parent), "cos")


def test_links_within_the_folder_and_links_that_nothing_reads_are_let_be(parent: Path):
    (parent / "files").mkdir()
    (parent / "files" / "vocab.txt").write_text("a")
    (parent / "vocab.txt").symlink_to("files/vocab.txt")
    (parent / "logo.png").symlink_to("../credentials")
    linked = parent.parent / "linked"
    linked.symlink_to(parent)
    for folder in (parent, linked):
        assert "vocab.txt" in open_checkpoint(str(folder), "cos").side_files


@pytest.mark.parametrize("shared", [False, True], ids=["blobs of the repository", "blobs of the cache"])
def test_a_snapshot_in_a_cache_of_the_hub_is_opened(parent: Path, tmp_path: Path, shared: bool):
    repository = tmp_path / "hub" / "models--org--name"
    snapshot, blobs, common = repository / "snapshots" / "abc", repository / "blobs", tmp_path / "hub" / "blobs" / "f5"
    for folder in (snapshot, blobs, common):
        folder.mkdir(parents=True)
    for path in parent.iterdir():
        (common if shared else blobs).joinpath(path.name).write_bytes(path.read_bytes())
        if shared:
            (blobs / path.name).symlink_to(f"../../blobs/f5/{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert open_checkpoint(str(snapshot), "cos").shapes == {"x": (2,)}
    renamed = shutil.copytree(repository, tmp_path / "hub" / "renamed", symlinks=True)
    assert open_checkpoint(str(renamed / "snapshots" / "abc"), "cos").shapes == {"x": (2,)}
    (parent / "vocab.txt").symlink_to(blobs / "config.json")
    assert "vocab.txt" in open_checkpoint(str(parent), "cos").side_files, "as the hub's client links into a folder"
    (blobs / "config.json").unlink()
    (blobs / "config.json").symlink_to(tmp_path / "credentials")
    with pytest.raises(BadInput, match=r"config\.json is a link to .*credentials, outside the folder"):
        open_checkpoint(str(snapshot), "cos")


def test_blobs_of_another_program_are_not_those_of_the_hub(parent: Path, tmp_path: Path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "secret").write_text("{}")
    (parent / "vocab.txt").symlink_to("../blobs/secret")
    with pytest.raises(BadInput, match="outside the folder"):
        open_checkpoint(str(parent), "cos")


# ---- types of config.json


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": [None]}, "architectures is [null], not a list of names"),
        ({"architectures": "Qwen2ForCausalLM"}, 'architectures is "Qwen2ForCausalLM", not a list of names'),
        ({"architectures": [""]}, 'architectures is [""], not a list of names'),
        ({"model_type": ["qwen2"]}, 'model_type is ["qwen2"], not a name'),
        ({"max_position_embeddings": "32768"}, 'max_position_embeddings is "32768", not a whole number'),
        ({"max_position_embeddings": True}, "max_position_embeddings is true, not a whole number"),
        ({"rope_scaling": "yarn"}, 'rope_scaling is "yarn", not a mapping'),
        ({"tie_word_embeddings": "false"}, 'tie_word_embeddings is "false", not true or false'),
        ({"text_config": {"torch_dtype": 16}}, "text_config.torch_dtype is 16, not a name"),
    ],
)
def test_a_field_of_another_type_is_refused_before_anything_is_merged(parent: Path, config: Any, said: str):
    (parent / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput) as refused:
        open_checkpoint(str(parent), "cos")
    assert str(refused.value) == f"parent cos ({parent}): config.json: {said}; fetch it again, or correct it"


def test_null_is_no_value(parent: Path):
    nothing = {"architectures": None, "model_type": None, "rope_scaling": None, "torch_dtype": None, "auto_map": None}
    (parent / "config.json").write_text(json.dumps({**nothing, "text_config": nothing}))
    assert open_checkpoint(str(parent), "cos").config["architectures"] is None


# ---- pointers of Git LFS

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 1806848\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer.model"])
def test_a_pointer_of_git_lfs_is_called_that(name: str, tmp_path: Path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text(json.dumps({"text": "x" * 110}))
    open_checkpoint(str(tmp_path), "a")
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(CorruptData, match=rf"{name}: a Git LFS pointer, not the file itself; run `git lfs pull`"):
        open_checkpoint(str(tmp_path), "a")

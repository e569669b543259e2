"""A checkpoint where it lies: its config, and where every tensor's bytes are. Reads headers, never weights.

File format: https://github.com/huggingface/safetensors (an 8-byte little-endian length N, N bytes of JSON, then data;
offsets in the JSON count from byte 8 + N).
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from jobs.errors import BadInput, CorruptData, ObjectMissing
from jobs.manifest import Manifest
from jobs.tasks import DTYPE_BITS, Parent, ParentFile, ParentTensor
from workers.records import read_record
from workers.storage import ObjectInfo, Store, open_store

FLOATS = ("F64", "F32", "F16", "BF16")
TORCH_NAMES: Mapping[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "U64": "uint64",
    "I32": "int32", "U32": "uint32", "I16": "int16", "U16": "uint16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
DTYPE_NAMES: Mapping[str, str] = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

LARGEST_HEADER = 25_000_000
"""What huggingface_hub reads as well. As Python objects a header can be 25 times as large."""

LARGEST_INDEX = 25_000_000
"""Twice what the 139,000 tensors of a trillion parameters in FP8 need."""

LARGEST_CONFIG = 2_000_000
LARGEST_TOKENIZER = 50_000_000
"""Of vocabularies of 260,000 tokens, tokenizer.json has 35 MB."""

MOST_DIMENSIONS = 64
LONGEST_NAME = 1000
_FIRST_READ = 128 << 10  # holds the whole header of nearly every shard, so that most cost one request
_ONE_LARGE_HEADER = threading.Lock()  # what only looks like a header may be 600 MB of lists, of one file at a time
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")

CONTEXT_FIELDS = (
    "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window",
    "use_sliding_window", "max_window_layers", "layer_types", "tie_word_embeddings", "vocab_size",
)  # fmt: skip
"""Fields of config.json that decide what a model does at which context length: parents must agree on them."""

SIDE_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Files of a Hugging Face checkpoint that a merged one takes over unchanged."""


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One entry of a safetensors header; `start` and `end` count from the first byte of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    """A parent as planning sees it: pinned files, config, and the place of every tensor."""

    name: str
    url: str
    config: Mapping[str, Any]
    files: tuple[ParentFile, ...]
    tensors: Mapping[str, ParentTensor]
    shapes: Mapping[str, tuple[int, ...]]
    side_files: Mapping[str, ObjectInfo]

    @property
    def parent(self) -> Parent:
        """What a worker needs to read it."""
        return Parent(self.url, self.files)

    @property
    def layers(self) -> int:
        """Number of decoder layers: from the config, else from the tensors' names."""
        for field in ("num_hidden_layers", "n_layer", "num_layers"):
            if isinstance(self.config.get(field), int):
                return int(self.config[field])
        return 1 + max((index for name in self.tensors if (index := layer_index(name)) is not None), default=0)


def layer_index(tensor: str) -> int | None:
    """The layer a tensor belongs to: the first number in its dotted name; None for embeddings, final norm and head."""
    found = re.search(r"\.(\d+)\.", tensor)
    return int(found[1]) if found else None


def open_checkpoint(url: str, name: str) -> Checkpoint:
    """Reads config and headers of the checkpoint at `url` and pins what it saw.

    Raises `BadInput` for what is not a safetensors checkpoint, `CorruptData` for one that contradicts itself.
    """
    store = open_store(url)
    listed = {info.key: info for info in store.list() if "/" not in info.key}
    where = f"parent {name} ({store.pinned_url})"
    if not listed:
        raise ObjectMissing(f"{where}: nothing there; check the path")
    shards, weight_map = _shards(store, listed, where)
    with ThreadPoolExecutor(max_workers=16) as pool:
        headers = list(pool.map(partial(read_header, store), shards))
    digests = _digests(store, listed)
    tensors: dict[str, ParentTensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for number, (info, header) in enumerate(zip(shards, headers, strict=True)):
        for entry in header:
            if entry.name in shapes:
                raise CorruptData(f"{where}: tensor {entry.name} is in two files; keep one")
            shapes[entry.name] = entry.shape
            if weight_map is not None and weight_map.get(entry.name) != info.key:
                continue
            sha256 = digests.get(entry.name, "")
            tensors[entry.name] = ParentTensor(number, entry.dtype, entry.start, entry.end, sha256)
    lost = sorted(set(weight_map or ()) - set(tensors))
    if lost:
        assert weight_map is not None
        raise CorruptData(f"{where}: the index promises {lost[0]} in {weight_map[lost[0]]}, which does not hold it")
    return Checkpoint(
        name=name,
        url=store.pinned_url,
        config=_config(store, listed, where),
        files=tuple(ParentFile(info.key, info.size, info.etag) for info in shards),
        tensors=tensors,
        shapes={name: shapes[name] for name in tensors},
        side_files={key: listed[key] for key in SIDE_FILES if key in listed},
    )


def _shards(
    store: Store, listed: Mapping[str, ObjectInfo], where: str
) -> tuple[Sequence[ObjectInfo], Mapping[str, str] | None]:
    """The safetensors files that hold the weights, and the index where there is one."""
    if "model.safetensors.index.json" in listed:
        weight_map = _weight_map(store, listed["model.safetensors.index.json"], where)
        names = sorted(set(weight_map.values()))
        for name in names:
            if not _SHARD_NAME.fullmatch(name):
                raise BadInput(f"{where}: the index names {name[:80]!a}, which is not a safetensors file beside it")
            if name not in listed:
                raise ObjectMissing(f"{where}: the index names {name}, which is not there; fetch the parent again")
        return [listed[name] for name in names], weight_map
    if "model.safetensors" in listed:
        return [listed["model.safetensors"]], None
    if any(name.startswith("adapter_model") for name in listed):
        raise BadInput(f"{where}: a LoRA adapter, not a whole model; merge it into its base first")
    if any(name.startswith("pytorch_model") for name in listed):
        raise BadInput(f"{where}: pickled weights (pytorch_model*.bin) are not opened; convert them to safetensors")
    if any(name.endswith(".gguf") for name in listed):
        raise BadInput(f"{where}: GGUF weights are quantised; give the safetensors checkpoint they came from")
    raise BadInput(f"{where}: neither model.safetensors nor model.safetensors.index.json there")


def _digests(store: Store, listed: Mapping[str, ObjectInfo]) -> Mapping[str, str]:
    """The sha256 of each tensor where the checkpoint has a manifest of mergeyard; what is read is held against it."""
    info = listed.get("manifest.json")
    if info is None or info.size > LARGEST_HEADER:
        return {}
    try:
        manifest = read_record(store, info.key, Manifest.from_json, etag=info.etag)
    except CorruptData:  # somebody else's file of that name
        return {}
    return {name: entry.sha256 for name, entry in manifest.tensors.items()}


def _weight_map(store: Store, index: ObjectInfo, where: str) -> dict[str, str]:
    """Tensor to file, as the index has it."""
    match read_json(store, index, LARGEST_INDEX).get("weight_map"):
        case dict(found) if found and all(isinstance(value, str) for value in found.values()):
            weight_map: dict[str, str] = found
        case _:
            raise CorruptData(f"{where}: model.safetensors.index.json has no weight_map of names to files")
    for name in weight_map:
        _check_name(name, where)
    return weight_map


def _config(store: Store, listed: Mapping[str, ObjectInfo], where: str) -> Mapping[str, Any]:
    if "config.json" not in listed:
        raise BadInput(f"{where}: no config.json there; a Hugging Face checkpoint has one")
    config = read_json(store, listed["config.json"], LARGEST_CONFIG)
    if config.get("quantization_config"):
        raise BadInput(f"{where}: quantised weights cannot be merged; give the checkpoint they came from")
    return config


def read_json(store: Store, info: ObjectInfo, most_bytes: int) -> dict[str, Any]:
    """The JSON object of the version `info` names; `CorruptData` when it is not one, or larger than that."""
    if info.size > most_bytes:
        raise CorruptData(
            f"{store.url}/{info.key}: has {info.size} bytes, at most {most_bytes} are read; is it the right file?"
        )
    return _parse_json(bytes(store.read(info.key, etag=info.etag)), f"{store.url}/{info.key}")


def read_header(store: Store, info: ObjectInfo) -> list[TensorHeader]:
    """The checked header of one safetensors file, in file order."""
    where = f"{store.pinned_url}/{info.key}"
    first = bytes(store.read(info.key, length=min(info.size, _FIRST_READ), etag=info.etag))
    if len(first) < 8:
        raise CorruptData(f"{where}: {info.size} bytes is too short for a safetensors file; fetch it again")
    length = int.from_bytes(first[:8], "little")
    if length > LARGEST_HEADER or 8 + length > info.size:
        raise CorruptData(
            f"{where}: its header claims {length} bytes of a file of {info.size};"
            " it is truncated or no safetensors file, fetch it again"
        )
    if 8 + length <= len(first):
        return parse_header(first[8 : 8 + length], data_start=8 + length, file_size=info.size, where=where)
    with _ONE_LARGE_HEADER:
        first += bytes(store.read(info.key, start=len(first), length=8 + length - len(first), etag=info.etag))
        return parse_header(first[8:], data_start=8 + length, file_size=info.size, where=where)


def parse_header(text: bytes, *, data_start: int, file_size: int, where: str) -> list[TensorHeader]:
    """Checks and reads a header's JSON: known dtypes, sizes that match shapes, data without gap, overlap or rest."""
    if not text.startswith(b"{"):
        raise CorruptData(f"{where}: the header does not begin with '{{'")
    header = _parse_json(text, where)
    _check_metadata(header.get("__metadata__", {}), where)
    entries = [
        _entry(name, value, data_start=data_start, where=where)
        for name, value in header.items()
        if name != "__metadata__"
    ]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    position = data_start
    for entry in entries:
        if entry.start != position:
            kind = "overlaps the one before it" if entry.start < position else "leaves a gap before it"
            raise CorruptData(f"{where}: tensor {entry.name} {kind}")
        position = entry.end
    if position != file_size:
        raise CorruptData(
            f"{where}: the tensors end at byte {position}, the file at {file_size}; it is truncated or has a tail"
        )
    return entries


def _check_metadata(metadata: Any, where: str) -> None:
    match metadata:
        case dict() if all(_is_text(key) and _is_text(value) for key, value in metadata.items()):
            return
        case _:
            raise CorruptData(f"{where}: __metadata__ must map words to words")


def _entry(name: str, value: Any, *, data_start: int, where: str) -> TensorHeader:
    _check_name(name, where)
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end], **rest} if not rest:
            pass
        case _:
            raise CorruptData(f"{where}: tensor {name} has no plain dtype, shape and data_offsets")
    if dtype not in DTYPE_BITS:
        raise CorruptData(f"{where}: tensor {name} has the unknown dtype {dtype[:80]!a}")
    if len(shape) > MOST_DIMENSIONS or not all(_is_count(extent) for extent in shape):
        raise CorruptData(f"{where}: tensor {name} has the impossible shape {str(shape[:40])[:80]}")
    if not (_is_count(start) and _is_count(end) and start <= end):
        raise CorruptData(f"{where}: tensor {name} has impossible data_offsets")
    if (end - start) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
        raise CorruptData(f"{where}: tensor {name} of {dtype} {shape} cannot lie in bytes {start} to {end}")
    return TensorHeader(name, dtype, tuple(shape), data_start + start, data_start + end)


def _check_name(name: str, where: str) -> None:
    if not name.isprintable() or len(name) > LONGEST_NAME:
        raise CorruptData(f"{where}: the tensor name {name[:80]!a} holds characters that no name has")


def _is_text(value: object) -> bool:
    """Whether JSON gave a word that UTF-8 has; half a surrogate pair is a character to Python, and none there."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _is_count(value: object) -> bool:
    """Whether JSON gave a whole number of bytes or elements; `true` is a number to Python, and none here."""
    return type(value) is int and 0 <= value < 1 << 63


def _parse_json(text: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CorruptData(f"{where}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise CorruptData(f"{where}: a JSON object was expected")
    return value


def header_bytes(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The first bytes of a safetensors file that holds these (name, dtype, shape) one after the other.

    Padded with blanks to a multiple of 8, so that every tensor is aligned when wider dtypes come first.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

"""A checkpoint where it lies: its config, and where every tensor's bytes are. Reads headers, never weights.

File formats: https://github.com/huggingface/safetensors (an 8-byte little-endian length N, N bytes of JSON, then data;
offsets in the JSON count from byte 8 + N), and the zip archives of `torch.save`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from jobs.errors import BadInput, CorruptData, ObjectMissing
from jobs.manifest import Manifest
from jobs.merge_tasks import Derived, Parent, ParentFile, ParentTensor, Scaled, Source, Strided
from workers.checkpoints.configs import check_types, quantisation
from workers.checkpoints.safetensors import (
    LARGEST_HEADER,
    POINTER_SIZES,
    TensorHeader,
    check_name,
    check_no_pointer,
    read_header,
    read_json,
)
from workers.checkpoints.scales import dequantised, is_fp8, of_modelopt, unquantised
from workers.checkpoints.side_files import side_files
from workers.checkpoints.torch_files import read_torch_file
from workers.storage import ObjectInfo, Store, open_store
from workers.storage.records import read_record

LARGEST_INDEX = 25_000_000
"""Twice the bytes that 139,000 tensors need, as in a model of a trillion parameters in FP8."""

LARGEST_CONFIG = 2_000_000
MODELOPT = "hf_quant_config.json"
QUANTISED_FILES = ("quantize_config.json", "quant_config.json", MODELOPT)
"""Of AutoGPTQ, AutoAWQ and ModelOpt, beside a config.json that may not state the quantisation."""

QUANTISED_TENSOR = re.compile(
    r"\.(qweight|qzeros|SCB|weight_packed|weight_scale(_inv|_2)?|weight_zero_point|weight_quantizer\..+)$"
    r"|\.weight\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..+)$"
)
"""Tensors of GPTQ and AWQ, of compressed-tensors and FP8, and of bitsandbytes."""

_SCALE = re.compile(r"(scales?|scb|absmax|zeros?)[^.]*$", re.IGNORECASE)

_WEIGHTS = {"model.safetensors": "a safetensors file", "pytorch_model.bin": "a .bin file"}
"""The file of the weights, or the stem of its index, by preference, as in transformers."""

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")


class Unmergeable(BadInput):
    """There is a model, and its weights are in a form that cannot be merged; an engine may run it as it is."""


class AdapterAlone(Unmergeable):
    """There is a LoRA adapter and no model."""


@dataclass(frozen=True)
class Checkpoint:
    """A parent as planning sees it: pinned files, config, and the place of every tensor.

    One of `open_as_it_is` has no tensors, all files that an engine needs beside the tokenizer, and in `unmergeable` the
    error for whoever would merge it. `others` are further places that its derived tensors are read from, by name.
    `adapter` is the URL of the LoRA adapter that is applied to it; its place is `adapter_name`.
    """

    name: str
    url: str
    config: Mapping[str, Any]
    files: tuple[ParentFile, ...]
    tensors: Mapping[str, Source]
    shapes: Mapping[str, tuple[int, ...]]
    side_files: Mapping[str, ObjectInfo]
    unmergeable: str = ""
    others: Mapping[str, Parent] = field(default_factory=dict[str, Parent])
    adapter: str = ""

    @property
    def parent(self) -> Parent:
        """The part of it that a worker needs for reading."""
        return Parent(self.url, self.files)

    @property
    def adapter_name(self) -> str:
        """The name of its adapter's place."""
        return f"{self.name}+adapter"

    @property
    def reference(self) -> str:
        """Its URL, with that of its adapter, as a job names it."""
        return f"{self.url}+{self.adapter}" if self.adapter else self.url


def all_places(checkpoints: Mapping[str, Checkpoint]) -> dict[str, Parent]:
    """Every place that tensors of these checkpoints are read from, by name."""
    own = {name: checkpoint.parent for name, checkpoint in checkpoints.items()}
    return own | {name: place for checkpoint in checkpoints.values() for name, place in checkpoint.others.items()}


def open_checkpoint(url: str, name: str, *, quantised: bool = False) -> Checkpoint:
    """Reads the config and the headers of the checkpoint at `url`, and pins their versions.

    `quantised` opens quantised weights too, to compare and not to merge them.
    Raises `Unmergeable` if it is no checkpoint of plain weights, `CorruptData` if it contradicts itself.
    """
    store = open_store(url)
    everything = {info.key: info for info in store.list()}
    listed = {key: info for key, info in everything.items() if "/" not in key}
    where = f"parent {name} ({store.pinned_url})"
    if not listed:
        inside = sorted(key.removesuffix("/config.json") for key in everything if key.endswith("/config.json"))
        if inside:
            more = f" and {len(inside) - 3} more" if len(inside) > 3 else ""
            raise ObjectMissing(f"{where}: only folders there; name one of {', '.join(inside[:3])}{more}")
        raise ObjectMissing(f"{where}: nothing there; check the path")
    beside = {key: everything[key] for key in side_files(everything)}
    for key, info in (beside | listed).items():
        if info.outside is not None and (key in beside or key.endswith((".safetensors", ".bin", ".json", ".md"))):
            raise BadInput(f"{where}: {key} is a link to {info.outside}, outside the folder; put a copy in its place")
    config = _config(store, listed, where, quantised=quantised)
    shards, weight_map = _shards(store, listed, where)
    if config is None:
        raise Unmergeable(f"{where}: no config.json there; a Hugging Face checkpoint has one")
    with ThreadPoolExecutor(max_workers=16) as pool:
        headers = list(pool.map(partial(read_file, store), shards))
        list(pool.map(partial(_check_whole, store), beside.values()))
    digests = _digests(store, listed)
    stored: dict[str, Source] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for number, (info, header) in enumerate(zip(shards, headers, strict=True)):
        for entry in header:
            if entry.name in shapes:
                raise CorruptData(f"{where}: tensor {entry.name} is in two files; keep one")
            shapes[entry.name] = entry.shape
            if weight_map is not None and weight_map.get(entry.name) != info.key:
                continue
            at = ParentTensor(number, entry.dtype, entry.start, entry.end, digests.get(entry.name, ""))
            stored[entry.name] = at
            if entry.strides is not None:
                stored[entry.name] = Derived(entry.dtype, entry.shape, Strided(entry.strides), ((name, at),))
    tensors: Mapping[str, Source] = stored
    if not quantised:
        tensors = dequantised(stored, shapes, config, name)
        stated = _stated_quantisation(config, listed)
        if stated is not None and not any(_is_scaled(source) for source in tensors.values()):
            raise Unmergeable(f"{where}: {_quantised(stated)}")
        _refuse_quantised_tensors(tensors, where)
        config = unquantised(config)
        beside = {key: info for key, info in beside.items() if key not in QUANTISED_FILES}
    lost = sorted(set(weight_map or ()) - set(stored))
    if lost:
        assert weight_map is not None
        raise CorruptData(f"{where}: the index promises {lost[0]} in {weight_map[lost[0]]}, which does not hold it")
    return Checkpoint(
        name=name,
        url=store.pinned_url,
        config=config,
        files=tuple(ParentFile(info.key, info.size, info.etag) for info in shards),
        tensors=tensors,
        shapes={name: shapes[name] for name in tensors},
        side_files=beside,
    )


def _check_whole(store: Store, info: ObjectInfo) -> None:
    """Refuses a file that Git LFS did not fetch; it reads only files of a pointer's size."""
    if info.size in POINTER_SIZES:
        check_no_pointer(bytes(store.read(info.key, etag=info.etag)), store, info)


def open_as_it_is(url: str, name: str, refusal: Unmergeable) -> Checkpoint:
    """The checkpoint at `url` without its tensors, for an engine that reads its files itself."""
    store = open_store(url)
    everything = {info.key: info for info in store.list()}
    weights = [key for key in everything if "/" not in key and key.endswith(".safetensors")]
    weights = weights or [key for key in everything if "/" not in key and key.endswith(".gguf")]
    beside = {"config.json", "generation_config.json", "model.safetensors.index.json", *QUANTISED_FILES}
    return Checkpoint(
        name=name,
        url=store.pinned_url,
        config=read_json(store, everything["config.json"], LARGEST_CONFIG) if "config.json" in everything else {},
        files=tuple(
            ParentFile(key, everything[key].size, everything[key].etag)
            for key in sorted({*weights, *(beside & everything.keys())})
        ),
        tensors={},
        shapes={},
        side_files={key: everything[key] for key in side_files(everything)},
        unmergeable=str(refusal),
    )


def read_file(store: Store, info: ObjectInfo) -> list[TensorHeader]:
    """The tensors of a file of weights; `Unmergeable` for a .bin file that is not read."""
    if not info.key.endswith(".bin"):
        return read_header(store, info)
    try:
        return read_torch_file(store, info)
    except BadInput as refusal:
        raise Unmergeable(str(refusal)) from None


def _shards(
    store: Store, listed: Mapping[str, ObjectInfo], where: str
) -> tuple[Sequence[ObjectInfo], Mapping[str, str] | None]:
    """The files that hold the weights, and the index where there is one."""
    for weights, kind in _WEIGHTS.items():
        if f"{weights}.index.json" in listed:
            weight_map = _weight_map(store, listed[f"{weights}.index.json"], where)
            names = sorted(set(weight_map.values()))
            for name in names:
                if not _FILE_NAME.fullmatch(name) or not name.endswith(weights[weights.rindex(".") :]):
                    raise BadInput(f"{where}: the index names {name[:80]!a}, which is not {kind} beside it")
                if name not in listed:
                    raise ObjectMissing(f"{where}: the index names {name}, which is not there; fetch the parent again")
            return [listed[name] for name in names], weight_map
        if weights in listed:
            return [listed[weights]], None
    if any(name.startswith("adapter_model") for name in listed):
        raise AdapterAlone(f"{where}: a LoRA adapter, not a whole model; write its base before it: `BASE+ADAPTER`")
    if any(name.endswith(".gguf") for name in listed):
        raise Unmergeable(f"{where}: GGUF weights are quantised; give the safetensors checkpoint they came from")
    raise Unmergeable(
        f"{where}: none of {', '.join(f'{name}, {name}.index.json' for name in _WEIGHTS)} there;"
        " name the folder of a checkpoint"
    )


def _digests(store: Store, listed: Mapping[str, ObjectInfo]) -> Mapping[str, str]:
    """The digest of each tensor if the checkpoint has a manifest of mergeyard; a reader compares bytes with them."""
    info = listed.get("manifest.json")
    if info is None or info.size > LARGEST_HEADER:
        return {}
    try:
        manifest = read_record(store, info.key, Manifest.from_json, etag=info.etag)
    except CorruptData:  # somebody else's file of that name
        return {}
    return {name: entry.digest for name, entry in manifest.tensors.items()}


def _weight_map(store: Store, index: ObjectInfo, where: str) -> dict[str, str]:
    """Tensor to file, as the index has it."""
    match read_json(store, index, LARGEST_INDEX).get("weight_map"):
        case dict(found) if found and all(isinstance(value, str) for value in found.values()):
            weight_map: dict[str, str] = found
        case _:
            raise CorruptData(f"{where}: {index.key} has no weight_map of names to files")
    for name in weight_map:
        check_name(name, where)
    return weight_map


def _config(store: Store, listed: Mapping[str, ObjectInfo], where: str, *, quantised: bool) -> Mapping[str, Any] | None:
    """The config if there is one. Quantised weights are refused here, before anything else is read."""
    if "config.json" not in listed:
        return None
    config = read_json(store, listed["config.json"], LARGEST_CONFIG)
    check_types(config, where)
    if MODELOPT in listed and quantisation(config) is None:
        of_weights = of_modelopt(read_json(store, listed[MODELOPT], LARGEST_CONFIG))
        config = {**config, **({"quantization_config": of_weights} if of_weights else {})}
    stated = _stated_quantisation(config, listed)
    if stated is not None and not quantised and not is_fp8(config):
        raise Unmergeable(f"{where}: {_quantised(stated)}")
    return config


def _stated_quantisation(config: Mapping[str, Any], listed: Mapping[str, ObjectInfo]) -> str | None:
    """The format that the config states, or the file beside it that does."""
    return quantisation(config) or next((name for name in QUANTISED_FILES if name in listed), None)


def _is_scaled(source: Source) -> bool:
    return isinstance(source, Derived) and isinstance(source.rule, Scaled)


def _refuse_quantised_tensors(tensors: Mapping[str, Source], where: str) -> None:
    """Refuses quantised weights whose config does not state them, by their dtypes and by the scales beside them."""
    scaled = {name.rpartition(".")[0] for name in tensors if _SCALE.search(name)}
    for name, tensor in tensors.items():
        packed = tensor.dtype in ("I8", "U8") and name.rpartition(".")[0] in scaled
        if packed or tensor.dtype.startswith("F8") or QUANTISED_TENSOR.search(name):
            raise Unmergeable(f"{where}: {_quantised(f'{name} is {tensor.dtype}')}")


def _quantised(by: str) -> str:
    return f"quantised weights ({by}) cannot be merged; give the checkpoint that they were made from"

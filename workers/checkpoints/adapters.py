"""LoRA adapters of PEFT: their files, and the checkpoint that an adapter makes of its base.

Every tensor that the adapter changes becomes a derived one: a worker reads the base's tensor and the adapter's, and
adds them. Sources: `LoraConfig`, `LoraLayer.update_layer`, `get_pattern_key` and `get_peft_model_state_dict` of PEFT
(https://github.com/huggingface/peft), and `PeftModel.merge_and_unload`, whose result this is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from jobs.errors import BadInput
from jobs.merge_tasks import Derived, LowRank, Parent, ParentFile, ParentTensor, Scaled, Source
from jobs.yaml_nodes import quoted
from workers.checkpoints.canonical import HEAD, ModelNames, embeddings_in, model_names
from workers.checkpoints.configs import text_fields, with_own_head
from workers.checkpoints.dtypes import FLOATS
from workers.checkpoints.opening import LARGEST_CONFIG, Checkpoint, read_file
from workers.checkpoints.safetensors import read_json
from workers.storage import open_store

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

SAME_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and others change it."""

NOT_APPLIED = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
"""Keys of variants of LoRA that change more than a product of two matrices."""

CONV1D = ("c_attn", "c_fc", "c_proj", "q_attn")
"""Modules of GPT-2 and its kin that store their weights transposed."""

_CONV1D_MODELS = ("clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt")
_BY_PEFT = "apply it with PEFT's merge_and_unload(), save the model and name that"

_OUTER = re.compile(r"\.(base_layer|modules_to_save|modules_to_save\.default)\.")
"""The wrappers of PEFT in the names of whole tensors."""

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))"
    r"(?P<name>(?:\.(?!weight$|bias$)[^.]+)?)(?P<leaf>(?:\.weight|\.bias)?)"
)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter where it lies: pinned files, its config, and the place and shape of every tensor."""

    url: str
    files: tuple[ParentFile, ...]
    config: Mapping[str, Any]
    tensors: Mapping[str, Source]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def base(self) -> str:
        """The base that it names, with its revision; empty if it names none."""
        name, revision = (str(self.config.get(key) or "") for key in ("base_model_name_or_path", "revision"))
        return f"{name}@{revision}" if name and revision and "@" not in name else name


def open_adapter(url: str, where: str) -> Adapter:
    """Reads the config and the header of the adapter at `url`, and pins its version.

    `BadInput` for one that is no LoRA of PEFT, or of a kind that is not applied; it begins with `where`.
    """
    store = open_store(url)
    listed = {info.key: info for info in store.list() if "/" not in info.key}
    where = f"{where}: adapter {store.pinned_url}"
    if CONFIG not in listed:
        raise BadInput(f"{where}: no {CONFIG} there; after the + stands a LoRA adapter that PEFT saved")
    config = read_json(store, listed[CONFIG], LARGEST_CONFIG)
    _check(config, where)
    weights = next((name for name in WEIGHTS if name in listed), None)
    if weights is None:
        raise BadInput(f"{where}: neither {' nor '.join(WEIGHTS)} there; fetch it again")
    info = listed[weights]
    tensors: dict[str, ParentTensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in read_file(store, info):
        if entry.strides is not None or entry.dtype not in FLOATS:
            raise BadInput(f"{where}: {entry.name} is {entry.dtype} or not contiguous; save the adapter with PEFT")
        tensors[entry.name] = ParentTensor(0, entry.dtype, entry.start, entry.end)
        shapes[entry.name] = entry.shape
    return Adapter(store.pinned_url, (ParentFile(info.key, info.size, info.etag),), config, tensors, shapes)


def _check(config: Mapping[str, Any], where: str) -> None:
    """Refuses what is no plain LoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise BadInput(
            f"{where}: an adapter of the type {json.dumps(kind)[:80]} is not applied, only LORA is; {_BY_PEFT}"
        )
    for key in NOT_APPLIED:
        if config.get(key):
            raise BadInput(f"{where}: `{key}` is not applied; {_BY_PEFT}")
    start = config.get("init_lora_weights", True)
    if start not in SAME_BASE:
        raise BadInput(
            f"{where}: begun with {json.dumps(start)[:80]}, which changes the base; convert it with PEFT's"
            " save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, value in _mapping(config, key).items():
            try:
                re.compile(pattern)
            except (re.error, RecursionError):
                raise BadInput(f"{where}: {key} has the pattern {pattern[:80]!a}, which is none") from None
            if not _is_number(value):
                raise BadInput(f"{where}: {key} has {json.dumps(value)[:80]} in place of a number")
    for key in ("r", "lora_alpha"):
        if not _is_number(config.get(key, 8)):
            raise BadInput(f"{where}: {key} is {json.dumps(config[key])[:80]}, not a number above 0")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}


def adapter_alone(url: str, name: str) -> Checkpoint:
    """The adapter at `url` as a checkpoint that is no model, but is applied to others; `BadInput` as `open_adapter`."""
    where = f"parent {name}"
    found = open_adapter(url, where)
    refused = f"{where} ({found.url}): a LoRA adapter, not a whole model; write its base before it: `BASE+ADAPTER`"
    return Checkpoint(name, found.url, found.config, found.files, found.tensors, found.shapes, {}, refused)


def with_adapter(base: Checkpoint, adapter: Adapter, place: str = "") -> Checkpoint:
    """The base with the adapter applied, as `merge_and_unload` gives it; `place` is the name of the adapter's place.

    A low-rank update of the head of a base that ties it to the embeddings gives it a head of its own, as the adapter
    was trained; PEFT would add it to the embeddings too. `BadInput` if the adapter does not fit the base.
    """
    return _Application(base, adapter, place or base.adapter_name).result()


class _Application:
    """One adapter on one base."""

    def __init__(self, base: Checkpoint, adapter: Adapter, place: str) -> None:
        self._base, self._adapter, self._place = base, adapter, place
        where = f"parent {base.name} ({base.url})" if base.files else f"the merge {quoted(base.name)}"
        self._where = f"{where}: adapter {adapter.url}"
        self._tensors: dict[str, Source] = dict(base.tensors)
        self._shapes: dict[str, tuple[int, ...]] = dict(base.shapes)
        self._embeddings = embeddings_in(base.tensors)

    def result(self) -> Checkpoint:
        """The adapted checkpoint: whole tensors are replaced first, and then updated."""
        modules: dict[str, dict[str, str]] = {}
        names: set[str] = set()
        for stored in self._adapter.tensors:
            name = _OUTER.sub(".", stored.removeprefix("base_model.model."))
            if match := _PART.fullmatch(name):
                modules.setdefault(match["module"], {})[match["part"] + match["leaf"]] = stored
                names.add(match["name"])
            elif name.endswith((".weight", ".bias")) and "lora_" not in name:
                self._replace(name, stored)
            else:
                raise BadInput(f"{self._where}: {stored} is not applied; {_BY_PEFT}")
        if len(names) > 1:
            raise BadInput(f"{self._where}: holds several adapters ({', '.join(sorted(names))}); save each by itself")
        replaced = dict(self._tensors)
        for module, parts in modules.items():
            self._update(module, parts, replaced)
        untied = any(name.endswith(HEAD) for name in self._tensors.keys() - self._base.tensors.keys())
        return replace(
            self._base,
            config=with_own_head(self._base.config) if untied else self._base.config,
            tensors=self._tensors,
            shapes=self._shapes,
            others={**self._base.others, self._place: Parent(self._adapter.url, self._adapter.files)},
            adapter=self._adapter.url,
        )

    def _replace(self, name: str, stored: str) -> None:
        """A whole tensor, as `modules_to_save` and `bias` have them."""
        target, origin = self._target(name, stored)
        shape, expected = self._adapter.shapes[stored], self._base.shapes[origin]
        if shape != expected:
            resized = f"; name a base that `model.resize_token_embeddings({shape[0]})` resized" if shape else ""
            raise BadInput(f"{self._where}: {stored} is {list(shape)}, and {list(expected)} in the base{resized}")
        whole = ((self._place, self._adapter.tensors[stored]),)
        self._tensors[target] = Derived(self._base.tensors[origin].dtype, shape, Scaled(), whole)
        self._shapes[target] = shape

    def _update(self, module: str, parts: Mapping[str, str], replaced: Mapping[str, Source]) -> None:
        """The low-rank update of one module."""
        embedding = "lora_embedding_A" in parts
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        if not parts.keys() >= {*names}:
            raise BadInput(f"{self._where}: {module} has not both of {' and '.join(names)}; save the adapter again")
        inputs = [parts[name] for name in names]
        target, origin = self._target(f"{module}.weight", inputs[0])
        shape = self._base.shapes[origin]
        model_type = text_fields(self._base.config).get("model_type")
        transposed = embedding or (model_type in _CONV1D_MODELS and module.rpartition(".")[2] in CONV1D)
        across = shape[::-1] if transposed else shape
        a, b = (self._adapter.shapes[name] for name in inputs)
        if len(shape) != 2 or len(a) != 2 or len(b) != 2 or (b[0], a[1], a[0]) != (*across, b[1]):
            raise BadInput(
                f"{self._where}: {inputs[0]} {list(a)} and {inputs[1]} {list(b)} do not fit {origin} {list(shape)};"
                f" {self._of_base}"
            )
        magnitude = parts.get("lora_magnitude_vector", parts.get("lora_magnitude_vector.weight"))
        if magnitude is not None:
            if math.prod(self._adapter.shapes[magnitude]) != across[0]:
                raise BadInput(f"{self._where}: {magnitude} does not fit {origin} {list(shape)}; {self._of_base}")
            inputs.append(magnitude)
        elif self._adapter.config.get("use_dora"):
            raise BadInput(f"{self._where}: a DoRA, and {module} has no lora_magnitude_vector; save the adapter again")
        rule = LowRank(self._scale(module, a[0]), a[0], transposed)
        self._derive(target, replaced.get(target, replaced[origin]), shape, rule, inputs)
        if bias := parts.get("lora_B.bias"):
            target, _ = self._target(f"{module}.bias", bias)
            if self._adapter.shapes[bias] != self._base.shapes[target]:
                raise BadInput(f"{self._where}: {bias} does not fit {target}; {self._of_base}")
            self._derive(target, replaced[target], self._base.shapes[target], rule, [bias])

    def _derive(
        self, target: str, source: Source, shape: tuple[int, ...], rule: LowRank, inputs: Sequence[str]
    ) -> None:
        parts = ((self._base.name, source), *((self._place, self._adapter.tensors[name]) for name in inputs))
        self._tensors[target], self._shapes[target] = Derived(source.dtype, shape, rule, parts), shape

    def _scale(self, module: str, rank: int) -> float:
        """The factor of B·A, from the rank and the alpha of the module."""
        config = self._adapter.config
        stated = {
            key: _by_pattern(config, pattern, module, config.get(key) or 8)
            for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
        }
        if stated["r"] != rank:
            raise BadInput(f"{self._where}: {module} has the rank {rank}, and {stated['r']} in {CONFIG}; save it again")
        return stated["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def _target(self, name: str, stored: str) -> tuple[str, str]:
        """(the tensor of that name, the base's tensor it begins from): two names for a head that the base ties."""
        for spelling in (name, f"model.{name}", name.removeprefix("model.")):
            if spelling in self._base.tensors:
                return spelling, spelling
        if name.endswith(HEAD) and self._embeddings is not None:
            return name, self._embeddings
        canonical = self._model.canonical(name)
        if canonical in self._by_canonical:
            return self._by_canonical[canonical], self._by_canonical[canonical]
        raise BadInput(f"{self._where}: {stored} changes a tensor that the base does not have; {self._of_base}")

    @cached_property
    def _model(self) -> ModelNames:
        return model_names(json.dumps(self._base.config))

    @cached_property
    def _by_canonical(self) -> Mapping[str | None, str]:
        return {self._model.canonical(name): name for name in self._base.tensors}

    @property
    def _of_base(self) -> str:
        return f"the adapter is of {quoted(self._adapter.base)}" if self._adapter.base else "take the adapter's base"


def _by_pattern(config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the module's name or its end, as PEFT's `get_pattern_key` has it."""
    for pattern, value in _mapping(config, key).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default

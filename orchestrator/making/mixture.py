"""A mixture of experts from dense models: its tensors, its config and its writing."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.errors import BadInput, writing
from jobs.mixtures import DRAWN, Expert, Mixture
from orchestrator.making.card import made_card
from orchestrator.making.output import Output
from orchestrator.merging.card import repository
from orchestrator.merging.gathering import json_file
from orchestrator.planning.beside import copied_files, files_beside, read_beside
from orchestrator.planning.compatibility import check_architecture
from orchestrator.words import code
from workers.checkpoints.configs import completed, with_dtype
from workers.checkpoints.dtypes import DTYPE_NAMES, TORCH_NAMES, numpy_dtype
from workers.checkpoints.opening import Checkpoint, all_places
from workers.checkpoints.side_files import is_of_tokenizer
from workers.making.gates import decoder, direction, drawn, embedded, hidden_states, tokenised
from workers.making.writing import Made, write_files
from workers.merging.buffers import keep_freed_memory
from workers.merging.deriving import Deriving
from workers.methods.tile import as_tensor
from workers.storage import open_store

if TYPE_CHECKING:
    from torch import Tensor

MLP = re.compile(r"(model\.layers\.(\d+)\.)mlp\.(gate_proj|up_proj|down_proj)\.weight")
EMBEDDINGS = "model.embed_tokens.weight"
PIECE_ELEMENTS = 1 << 22
MIXTRAL_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


@dataclass(frozen=True, slots=True)
class Architecture:
    """A class of mixtures: model_type, class name, the parents it takes, and the part of a layer with the experts."""

    name: str
    model_type: str
    parents: tuple[str, ...]
    inside: str
    shares: bool


ARCHITECTURES = (
    Architecture("Mixtral", "mixtral", ("llama", "mistral"), "block_sparse_moe", False),
    Architecture("Qwen MoE", "qwen2_moe", ("qwen2", "llama", "mistral"), "mlp", True),
    Architecture("Qwen3 MoE", "qwen3_moe", ("qwen3",), "mlp", False),
)
CLASSES = {"mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}


@dataclass(frozen=True)
class MadeMixture:
    """A finished mixture."""

    url: str
    architecture: str
    experts: int
    bytes: int


class Mixer:
    """Makes one mixture. Raises `BadInput` at once for models that do not fit together."""

    def __init__(
        self, mixture: Mixture, models: Mapping[str, Checkpoint], url: str, *, seed: int, shard_bytes: int
    ) -> None:
        self._mixture, self._models, self._seed, self._shard_bytes = mixture, models, seed, shard_bytes
        self._base = models[mixture.base_model]
        self.architecture = _architecture(mixture, self._base)
        check_architecture([*models.values()], mixture.place)
        experts = [_plain(expert) for expert in mixture.experts]
        shared = _plain(mixture.shared) if mixture.shared is not None else None
        asked = {**asdict(mixture), "experts": experts, "shared": shared, "seed": seed, "shard_bytes": shard_bytes}
        del asked["place"], asked["ignored"]
        self.output = Output(url, {"moe": asked}, {checkpoint.name: checkpoint for checkpoint in models.values()})
        self._reading = Deriving(all_places({checkpoint.name: checkpoint for checkpoint in models.values()}))
        self._layers = 1 + max(
            (int(match[2]) for name in self._base.tensors if (match := MLP.fullmatch(name))), default=-1
        )
        self._check()
        stored = [self._base.tensors[name].dtype for name in self._base.tensors]
        self._dtype = DTYPE_NAMES[mixture.dtype] if mixture.dtype else max(set(stored), key=stored.count)

    def _check(self) -> None:
        """Refuses models of other shapes, and tensors that the architecture has no place for."""
        place = self._mixture.place
        if not self._layers:
            raise BadInput(f"{place}: {self._base.url} has no layers with gate_proj, up_proj and down_proj")
        foreign = [name for name in self._base.tensors if ".mlp." in name and not MLP.fullmatch(name)]
        if self.architecture.model_type == "mixtral":
            foreign += [name for name in self._base.tensors if name.endswith(".bias")]
        if foreign:
            raise BadInput(f"{place}: {self.architecture.name} has no place for {foreign[0]} of {self._base.url}")
        for model in self._models.values():
            for name in filter(MLP.fullmatch, self._base.tensors):
                if model.shapes.get(name) != self._base.shapes[name]:
                    raise BadInput(
                        f"{place}: tensor {name} is {list(self._base.shapes[name])} in {self._base.url} and"
                        f" {list(model.shapes.get(name, ()))} in {model.url}; experts have the shapes of the base"
                    )

    def run(self, begin: Callable[[int], None], progress: Callable[[int], None]) -> MadeMixture:
        """Computes the routers, then writes the mixture tensor by tensor."""
        keep_freed_memory()
        gates = self._gates()
        tensors = [*self._tensors(gates)]
        total = sum(tensor.bytes for tensor in tensors)
        begin(total)
        self.output.begin()
        with writing():
            shards, entries = write_files(self.output.store, _cut(tensors, self._shard_bytes), progress)
        copied, _ = copied_files(self._base, self._base, code=False, renumbered=False)
        owners = dict.fromkeys(copied, self._base.name)
        side = files_beside(owners, (), None, partial(read_beside, {self._base.name: self._base}))
        if len(shards) > 1:
            weight_map = {name: entry.file for name, entry in sorted(entries.items())}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            side["model.safetensors.index.json"] = json_file(index)
        side["README.md"] = self._card().encode()
        side["config.json"] = json_file(self._config())
        self.output.finish(side, shards, entries)
        return MadeMixture(self.output.store.url, self.architecture.name, len(self._mixture.experts), total)

    def _tensors(self, gates: np.ndarray[Any, Any]) -> Iterator[Made]:
        """Every tensor of the mixture, in the order of the base's."""
        mixture, inside = self._mixture, self.architecture.inside
        names = MIXTRAL_NAMES if self.architecture.model_type == "mixtral" else {}
        for name in self._base.tensors:
            match = MLP.fullmatch(name)
            if match is None:
                yield self._made(name, mixture.base_model, name, None)
                continue
            prefix, _, projection = match.groups()
            for number, expert in enumerate(mixture.experts):
                to = f"{prefix}{inside}.experts.{number}.{names.get(projection, projection)}.weight"
                yield self._made(to, expert.source_model, name, expert)
            if mixture.shared is not None:
                to = f"{prefix}{inside}.shared_expert.{projection}.weight"
                yield self._made(to, mixture.shared.source_model, name, mixture.shared)
        count = len(mixture.experts)
        for layer in range(self._layers):
            yield self._given(f"model.layers.{layer}.{inside}.gate.weight", gates[layer, :count])
            if mixture.shared is not None:
                yield self._given(f"model.layers.{layer}.{inside}.shared_expert_gate.weight", gates[layer, count:])
            if self.architecture.model_type == "qwen2_moe":
                for projection in "qkv":  # the class adds them; a parent without has zeros
                    name = f"model.layers.{layer}.self_attn.{projection}_proj"
                    if f"{name}.bias" not in self._base.tensors:
                        rows = self._base.shapes[f"{name}.weight"][0]
                        yield self._given(f"{name}.bias", np.zeros(rows, np.float32))

    def _given(self, name: str, values: np.ndarray[Any, Any]) -> Made:
        data = np.ascontiguousarray(values.astype(numpy_dtype(self._dtype)))
        return Made(name, self._dtype, values.shape, lambda: [data.reshape(-1).view("u1").data])

    def _made(self, to: str, model: str, name: str, expert: Expert | None) -> Made:
        """A tensor of a model in the output's dtype, with the noise and the scale of an expert."""
        checkpoint = self._models[model]

        def pieces() -> Iterator[memoryview]:
            read = self._reading.pieces(checkpoint.name, checkpoint.tensors[name], name, PIECE_ELEMENTS)
            for number, piece in enumerate(read):
                if expert is not None and (expert.noise_scale, expert.residual_scale) != (None, None):
                    piece = piece.astype(np.float32)
                    if expert.noise_scale is not None:
                        piece = piece + expert.noise_scale * drawn(piece.shape, self._seed, to, number * PIECE_ELEMENTS)
                    if expert.residual_scale is not None and ".down_proj." in name:
                        piece = piece * np.float32(expert.residual_scale)
                yield piece.astype(numpy_dtype(self._dtype), copy=False).view("u1").data

        return Made(to, self._dtype, checkpoint.shapes[name], pieces)

    def _gates(self) -> np.ndarray[Any, Any]:
        """(layers, experts and the shared one, hidden), float32."""
        mixture = self._mixture
        asked = [*mixture.experts, *([mixture.shared] if mixture.shared is not None else [])]
        hidden = self._base.shapes[EMBEDDINGS][1]
        if mixture.gate_mode in DRAWN:
            uniform = mixture.gate_mode == "uniform_random"
            shape = (len(asked), hidden)
            return np.stack([drawn(shape, self._seed, "gate", n, uniform=uniform) for n in range(self._layers)])
        try:
            rows = self._of_prompts(asked)
        except Exception:  # if a file has changed, this may be why
            self._reading.release()
            raise
        self._reading.release()
        return np.stack([np.broadcast_to(row, (self._layers, hidden)) for row in rows], axis=1)

    def _of_prompts(self, asked: Sequence[Expert]) -> list[np.ndarray[Any, Any]]:
        import torch
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            self._fetch(Path(folder))
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            tokenizer.padding_side = "left"
            tokenizer.pad_token = tokenizer.bos_token or tokenizer.eos_token
            rows = self._base.shapes[EMBEDDINGS][0]
            embeddings, model = torch.empty(0), None
            if self._mixture.gate_mode == "cheap_embed":
                embeddings = self._weight(EMBEDDINGS)
            else:
                model = decoder(folder, self._weight)

            @cache
            def state(prompts: tuple[str, ...]) -> Any:
                tokens = tokenised(tokenizer, prompts)
                if int(tokens["input_ids"].max()) >= rows:
                    raise BadInput(
                        f"{self._mixture.place}: the tokenizer of {self._base.url} has tokens beyond its {rows}"
                        " embeddings; write `gate_mode: random`, or give the base its own tokenizer"
                    )
                if model is None:
                    return embedded(embeddings, tokens["input_ids"], tokens["attention_mask"])
                return hidden_states(model, tokens, average=self._mixture.gate_mode == "hidden_avg")

            return [
                direction(
                    state(tuple(expert.positive_prompts)),
                    state(tuple(expert.negative_prompts)) if expert.negative_prompts else None,
                )
                .float()
                .numpy()
                for expert in asked
            ]

    def _weight(self, name: str) -> Tensor:
        """A tensor of the base."""
        elements = self._reading.mapped(self._base.name, self._base.tensors[name], name)
        return as_tensor(elements).reshape(self._base.shapes[name])

    def _fetch(self, folder: Path) -> None:
        """The base's tokenizer and config in a folder."""
        store = open_store(self._base.url)
        names = {name for name in self._base.side_files if is_of_tokenizer(name) and "/" not in name} | {"config.json"}
        for name in sorted(names):
            local = Path(store.url) / name
            if local.exists():
                (folder / name).symlink_to(local)
            else:
                (folder / name).write_bytes(store.read(name))

    def _config(self) -> dict[str, Any]:
        """config.json: the base's fields with every default, and those of the experts."""
        mixture, kind = self._mixture, self.architecture.model_type
        config = {**completed(self._base.config), **self._base.config}
        theta = (config.get("rope_parameters") or {}).get("rope_theta")
        dropped = {"auto_map", "_name_or_path", "transformers_version", "layer_types", "max_window_layers"}
        dropped |= {"attention_bias", "mlp_bias", "pretraining_tp"} if kind != "qwen3_moe" else set()
        config = {key: value for key, value in config.items() if key not in dropped}
        if "rope_theta" not in config and theta is not None:
            config["rope_theta"] = theta
        per_token = {"num_experts_per_tok": mixture.experts_per_token, "output_router_logits": False}
        count, width = len(mixture.experts), config["intermediate_size"]
        own: dict[str, Any] = {"num_local_experts": count}
        if kind != "mixtral":
            own = {"num_experts": count, "moe_intermediate_size": width, "decoder_sparse_step": 1}
            own |= {"norm_topk_prob": True, "mlp_only_layers": []}
        if kind == "qwen2_moe":
            own["shared_expert_intermediate_size"] = width
        window = {"sliding_window": None} | ({} if kind == "mixtral" else {"use_sliding_window": False})
        made = {**config, **per_token, **own, **window, "model_type": kind, "architectures": [CLASSES[kind]]}
        dtype = TORCH_NAMES[self._dtype]
        return with_dtype(made if made.keys() & {"dtype", "torch_dtype"} else {**made, "dtype": dtype}, dtype)

    def _card(self) -> str:
        mixture = self._mixture
        front = {
            "base_model": [repository(model.url) for model in self._models.values()],
            "base_model_relation": "merge",
            "library_name": "transformers",
            "tags": ["mergeyard", "moe", "merge"],
        }
        experts = [code(self._models[expert.source_model].url) for expert in mixture.experts]
        facts = {
            "Architecture": self.architecture.name,
            "Base": code(self._base.url),
            "Experts": ", ".join(experts),
            "Experts per token": str(mixture.experts_per_token),
            "Shared expert": code(self._models[mixture.shared.source_model].url) if mixture.shared else "–",
            "Routers": code(mixture.gate_mode),
        }
        url = self.output.store.url
        return made_card(url, front, f"A mixture of {len(experts)} experts, made by mergeyard.", facts)


def _plain(expert: Expert) -> dict[str, Any]:
    """Everything about an expert but its line."""
    return {key: value for key, value in asdict(expert).items() if key != "place"}


def _architecture(mixture: Mixture, base: Checkpoint) -> Architecture:
    """The architecture of the mixture: the named one, else the first that takes these parents."""
    kind = str(base.config.get("model_type"))
    named = [
        one
        for one in ARCHITECTURES
        if mixture.architecture is None or one.name.lower().startswith(mixture.architecture.lower())
    ]
    if not named:
        names = ", ".join(one.name for one in ARCHITECTURES)
        raise BadInput(f"{mixture.place}: `architecture: {mixture.architecture}` is not made here; choose from {names}")
    takes = [one for one in named if kind in one.parents]
    found = [one for one in takes if one.shares == (mixture.shared is not None)]
    if (
        found
        and found[0].shares
        and mixture.gate_mode not in DRAWN
        and not (mixture.shared and mixture.shared.positive_prompts)
    ):
        raise BadInput(f"{mixture.place}: {found[0].name} routes to its shared expert too; give it `positive_prompts:`")
    if found:
        return found[0]
    if takes:
        needs = "needs one model under `shared_experts:`" if takes[0].shares else "has no shared expert"
        raise BadInput(f"{mixture.place}: {takes[0].name}, the mixture of {kind} models, {needs}")
    wanted = ", ".join(sorted({parent for one in named for parent in one.parents}))
    raise BadInput(f"{mixture.place}: no mixture is made of {kind} models; take models of {wanted}")


def _cut(tensors: Sequence[Made], shard_bytes: int) -> dict[str, list[Made]]:
    """The tensors by file, at most `shard_bytes` in each."""
    parts: list[list[Made]] = []
    room = 0
    for tensor in tensors:
        if not parts or tensor.bytes > room:
            parts.append([])
            room = max(shard_bytes, tensor.bytes)
        parts[-1].append(tensor)
        room -= tensor.bytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, 1)}

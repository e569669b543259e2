"""Tiny but real Qwen2 checkpoints, written in every variation that the conformance cases need.

`write_parents(root)` makes families of siblings: `root/<family>/<parent>`. Families:

    bf16, fp16, fp32   base and cos, fmt, third: base plus small Gaussian steps; sparse: nine steps in ten exactly zero;
                       far: unrelated weights; opposite: the base mirrored, almost
    lattice            bf16 values on a coarse lattice: up is base + δ, down is base - δ exactly, and |δ| takes four
    values only crossed            float32; two siblings that move overlapping parts of each tensor untied
    bf16 base, cos and fmt with an lm_head of their own sharded            the bf16 family in four files with an index

Values are keyed by (family's seed, parent, tensor's name); nothing depends on the order of writing.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2Config

Tensors = dict[str, torch.Tensor]
TOKENIZER = Path(__file__).parents[2] / "jobs" / "examples" / "parents" / "base"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 96, 32, 64, 3, 4, 2


def qwen2_shapes(tied: bool) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a Qwen2 model of this size, as `Qwen2ForCausalLM` saves them."""
    kv = HIDDEN // HEADS * KV_HEADS
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
        "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    }
    for name, rows in (("q", HIDDEN), ("k", kv), ("v", kv)):
        layer[f"self_attn.{name}_proj.weight"] = (rows, HIDDEN)
        layer[f"self_attn.{name}_proj.bias"] = (rows,)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}
    shapes["model.norm.weight"] = (HIDDEN,)
    if not tied:
        shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return shapes


def write_checkpoint(folder: Path, tensors: Tensors, files: int = 1) -> None:
    """A folder that transformers and mergekit load: config, tokenizer, and weights in `files` safetensors files."""
    folder.mkdir(parents=True)
    tied = "lm_head.weight" not in tensors
    Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layer_count(tensors),
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        architectures=["Qwen2ForCausalLM"],
        dtype=next(iter(tensors.values())).dtype,
    ).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / name, folder / name)
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = dict(list(tensors.items())[number::files])
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def layer_count(names: Iterable[str]) -> int:
    """How many layers a model with these tensors has."""
    return 1 + max(int(name.split(".")[2]) for name in names if name.startswith("model.layers."))


def write_parents(root: Path) -> None:
    """All families, about 60 kB a checkpoint."""
    for family, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        for parent, tensors in siblings(dtype, tied=True).items():
            write_checkpoint(root / family / parent, tensors)
    for parent, tensors in siblings(torch.bfloat16, tied=True).items():
        write_checkpoint(root / "sharded" / parent, tensors, files=4)
        first = {n: t for n, t in tensors.items() if not n.startswith(("model.layers.1.", "model.layers.2."))}
        write_checkpoint(root / "shallow" / parent, first)
    untied = siblings(torch.bfloat16, tied=False)
    for parent in ("base", "cos", "fmt"):
        write_checkpoint(root / "untied" / parent, untied[parent])
    for parent, tensors in lattice().items():
        write_checkpoint(root / "lattice" / parent, tensors)
    for parent, tensors in crossed().items():
        write_checkpoint(root / "crossed" / parent, tensors)


def siblings(dtype: torch.dtype, tied: bool) -> dict[str, Tensors]:
    """A base and its kin, computed in float32 and rounded to `dtype`."""
    base = _each(tied, lambda name, shape: _weights("base", name, shape))

    def stepped(who: str, scale: float, zeros: float = 0.0) -> Tensors:
        return {name: base[name] + _steps(who, name, base[name].shape, scale, zeros) for name in base}

    family = {
        "base": base,
        "cos": stepped("cos", 1e-3),
        "fmt": stepped("fmt", 1e-3),
        "third": stepped("third", 2e-3),
        "sparse": stepped("sparse", 1e-3, zeros=0.9),
        "far": _each(tied, lambda name, shape: _weights("far", name, shape)),
        "opposite": {name: -t for name, t in stepped("opposite", 1e-4).items()},
    }
    return {who: {name: t.to(dtype) for name, t in tensors.items()} for who, tensors in family.items()}


def lattice() -> dict[str, Tensors]:
    """base, up = base + δ, down = base - δ and half = base + δ/2, all exact in bf16: multiples of 2⁻¹⁰ below 128 ·
    2⁻¹⁰."""

    def whole(who: str, name: str, shape: tuple[int, ...], low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=_generator(who, name)).float()

    base = _each(True, lambda name, shape: whole("lattice", name, shape, -100, 101))
    step = _each(True, lambda name, shape: 2 * whole("step", name, shape, -4, 5))
    family = {
        "base": base,
        "up": {n: base[n] + step[n] for n in base},
        "down": {n: base[n] - step[n] for n in base},
        "half": {n: base[n] + step[n] / 2 for n in base},
    }
    return {who: {n: (t * 2.0**-10).bfloat16() for n, t in tensors.items()} for who, tensors in family.items()}


def crossed() -> dict[str, Tensors]:
    """float32 base, one and two: `one` moves the first five eighths of each tensor, `two` the last five, a quarter
    both."""
    base = _each(True, lambda name, shape: _weights("base", name, shape))

    def stepped(who: str, begin: float, end: float) -> Tensors:
        def tensor(name: str, t: torch.Tensor) -> torch.Tensor:
            place = torch.arange(t.numel()).reshape(t.shape) / t.numel()
            step = _normal(who, name, t.shape)
            return t + (step + step.sign()) * 0.01 * ((begin <= place) & (place < end))

        return {name: tensor(name, t) for name, t in base.items()}

    return {"base": base, "one": stepped("one", 0, 5 / 8), "two": stepped("two", 3 / 8, 1)}


def _each(tied: bool, make: Callable[[str, tuple[int, ...]], torch.Tensor]) -> Tensors:
    return {name: make(name, shape) for name, shape in qwen2_shapes(tied).items()}


def _weights(who: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return 1 + 0.1 * _normal(who, name, shape)
    return 0.02 * _normal(who, name, shape)


def _steps(who: str, name: str, shape: tuple[int, ...], scale: float, zeros: float) -> torch.Tensor:
    taken = torch.rand(shape, generator=_generator(who + " taken", name)) >= zeros
    return scale * _normal(who + " step", name, shape) * taken


def _normal(who: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=_generator(who, name))


def _generator(who: str, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{who}/{name}".encode()))

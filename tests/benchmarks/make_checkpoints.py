"""Writes synthetic parents with the tensor names and shapes of a Qwen2 model: one base and its siblings.

    python -m tests.benchmarks.make_checkpoints OUT [--size 1.5b] [--siblings cos,fmt] [--delta 0.001] [--shard-gb 5]

A sibling is the base plus Gaussian steps of standard deviation DELTA, rounded to bf16. Weights to time merges with
and to compare them by, not models that speak; the tokenizer beside them is that of the example parents. Tensors are
generated one at a time and streamed to disk, so that memory holds no more than the largest one. About 1 minute for
1.5b and two siblings.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save_file

EXAMPLE = Path(__file__).parents[2] / "jobs" / "examples" / "parents" / "base"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True)
class Size:
    """The numbers of a Qwen2 configuration that decide its tensors."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool


SIZES = {
    "tiny": Size(2, 64, 160, 4, 2, 512, True),
    "0.1b": Size(8, 512, 2048, 8, 2, 151936, True),
    "0.5b": Size(24, 896, 4864, 14, 2, 151936, True),
    "1.5b": Size(28, 1536, 8960, 12, 2, 151936, True),
    "7b": Size(28, 3584, 18944, 28, 4, 152064, False),
}


def write_adapter(base: Path, folder: Path, rank: int = 16) -> None:
    """A LoRA adapter of PEFT on every projection of the layers of `base`, with small factors."""
    generator = torch.Generator().manual_seed(0)
    factors: dict[str, torch.Tensor] = {}
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            for name in sorted(weights.keys()):
                if name.endswith("_proj.weight"):
                    rows, columns = weights.get_slice(name).get_shape()
                    prefix = f"base_model.model.{name.removesuffix('.weight')}"
                    for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                        factors[f"{prefix}.lora_{side}.weight"] = torch.randn(shape, generator=generator) * 0.01
    folder.mkdir()
    save_file(
        {name: factor.to(torch.bfloat16) for name, factor in factors.items()}, folder / "adapter_model.safetensors"
    )
    targets = sorted({name.split(".")[-3] for name in factors})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))


def shapes(size: Size) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor's name and shape, in the model's order."""
    kv = size.hidden // size.heads * size.kv_heads
    yield "model.embed_tokens.weight", (size.vocabulary, size.hidden)
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (size.hidden,)
        yield prefix + "post_attention_layernorm.weight", (size.hidden,)
        for name in ("gate_proj", "up_proj"):
            yield prefix + f"mlp.{name}.weight", (size.intermediate, size.hidden)
        yield prefix + "mlp.down_proj.weight", (size.hidden, size.intermediate)
        for name, rows in (("q", size.hidden), ("k", kv), ("v", kv)):
            yield prefix + f"self_attn.{name}_proj.weight", (rows, size.hidden)
            yield prefix + f"self_attn.{name}_proj.bias", (rows,)
        yield prefix + "self_attn.o_proj.weight", (size.hidden, size.hidden)
    yield "model.norm.weight", (size.hidden,)
    if not size.tied:
        yield "lm_head.weight", (size.vocabulary, size.hidden)


def main() -> None:
    """Writes OUT/base and one folder a sibling."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="1.5b")
    parser.add_argument("--siblings", default="cos,fmt")
    parser.add_argument("--delta", type=float, default=0.001)
    parser.add_argument("--shard-gb", type=float, default=5)
    options = parser.parse_args()
    write_family(
        options.out,
        SIZES[options.size],
        siblings=options.siblings.split(","),
        delta=options.delta,
        shard_bytes=int(options.shard_gb * 1e9),
    )


def write_family(
    out: Path,
    size: Size,
    *,
    siblings: Sequence[str] = ("cos", "fmt"),
    delta: float = 0.001,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a base and its siblings, each in a folder of its name in `out`."""
    folders = {who: out / who for who in ("base", *siblings)}
    for folder in folders.values():
        folder.mkdir(parents=True)
        write_small_files(folder, size)
    shards = split(list(shapes(size)), shard_bytes)
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard({who: folder / name for who, folder in folders.items()}, shard, delta)
        weight_map = dict.fromkeys((tensor for tensor, _ in shard), name)
        if len(shards) > 1:
            for folder in folders.values():
                extend_index(folder / "model.safetensors.index.json", weight_map)


def split(tensors: list[tuple[str, tuple[int, ...]]], shard_bytes: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """The tensors in order, in files of at most `shard_bytes` of bf16 (a larger tensor has a file of its own)."""
    shards, size = [[]], 0
    for name, shape in tensors:
        nbytes = 2 * math.prod(shape)
        if size and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += nbytes
    return shards


def write_shard(paths: dict[str, Path], tensors: list[tuple[str, tuple[int, ...]]], delta: float) -> None:
    """One safetensors file for each of base and siblings, written side by side."""
    files = {who: path.open("wb") for who, path in paths.items()}
    for file in files.values():
        write_header(file, tensors)
    for name, shape in tensors:
        base = normal("base", name, shape, 0.02).bfloat16()
        for who, file in files.items():
            tensor = base if who == "base" else (base.float() + normal(who, name, shape, delta)).bfloat16()
            file.write(memoryview(tensor.view(torch.int16).numpy()).cast("B"))
    for file in files.values():
        file.close()


def write_header(file: BinaryIO, tensors: list[tuple[str, tuple[int, ...]]]) -> None:
    """safetensors: eight bytes of length, then JSON padded with blanks so that the data lie aligned."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors:
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    file.write(len(text).to_bytes(8, "little") + text)


def write_small_files(folder: Path, size: Size) -> None:
    """config.json, as a Qwen2 model of this size has it, and a tokenizer."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": size.tied,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "initializer_range": 0.02,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in TOKENIZER_FILES:
        shutil.copy(EXAMPLE / name, folder / name)


def extend_index(path: Path, weight_map: dict[str, str]) -> None:
    """Adds one shard's tensors to the index file."""
    index = json.loads(path.read_text()) if path.exists() else {"metadata": {}, "weight_map": {}}
    index["weight_map"] |= weight_map
    path.write_text(json.dumps(index))


def normal(who: str, name: str, shape: tuple[int, ...], deviation: float) -> torch.Tensor:
    """float32 Gaussian numbers, the same for the same (who, name) whatever else is generated."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{who}/{name}".encode()))
    return torch.randn(shape, generator=generator).mul_(deviation)


if __name__ == "__main__":
    main()

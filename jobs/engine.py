"""The `engine:` section of a job: the model server or library that generates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

from jobs.evaluate import read_scalar
from jobs.yaml_nodes import Node, quoted, suggestion

# a job file may come from anywhere: an engine is told these and nothing that loads code, another model or a file
ENGINE_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "transformers": ("chunk", "batch", "cache_bytes"),
    "vllm": (
        "max_num_seqs", "max_num_batched_tokens", "max_model_len", "gpu_memory_utilization", "cache_gib", "swap_space",
        "cpu_offload_gb", "kv_cache_dtype", "block_size", "dtype", "enforce_eager", "enable_prefix_caching",
        "enable_chunked_prefill", "tensor_parallel_size", "pipeline_parallel_size", "enable_expert_parallel",
        "disable_custom_all_reduce", "seed",
    ),
    "openai": ("model", "max_length", "concurrency", "attempts", "timeout_seconds", "first_pause_seconds"),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What generates: `transformers`, `vllm`, or an OpenAI-compatible server at `url`; `options` of ENGINE_OPTIONS."""

    name: Literal["transformers", "vllm", "openai"] = "transformers"
    url: str | None = None
    options: Mapping[str, str | bool | int | float] = field(default_factory=dict[str, str | bool | int | float])
    place: str = field(default="", compare=False)


def read_engine(node: Node) -> EngineSpec:
    names = ("transformers", "vllm", "openai")
    keys = {"name": node} if node.kind == "string" else node.mapping(("name", "url", "options"), ("name",))
    name = cast(Literal["transformers", "vllm", "openai"], keys["name"].choice(names))
    if name == "openai" and "url" not in keys:
        raise node.error("the engine openai needs `url:`, the address of the server")
    if name != "openai" and "url" in keys:
        raise keys["url"].error(f"the engine {name} has no `url:`; take it out")
    if "url" in keys and any(sign in keys["url"].string() for sign in "@?#"):
        raise keys["url"].error("the server's address holds no credentials; the key comes from OPENAI_API_KEY")
    return EngineSpec(
        name=name,
        url=keys["url"].string() if "url" in keys else None,
        options=_options(keys["options"], name) if "options" in keys else {},
        place=node.place,
    )


def _options(node: Node, engine: str) -> dict[str, str | bool | int | float]:
    known = ENGINE_OPTIONS[engine]
    for option, entry in node.mapping().items():
        if option not in known:
            raise entry.error(f"the engine {engine} takes no option {quoted(option)}{suggestion(option, known)}")
    return {option: read_scalar(entry) for option, entry in node.mapping().items()}

"""The `engine:` section of a job: the model server or library that generates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from jobs.errors import BadInput
from jobs.sources import LATER
from jobs.specs import AtLeast, Between, NotNegative, Reads, Rule, Scalar, read_scalar, read_spec, schema_of
from jobs.yaml_nodes import Node, quoted, suggestion

# a job file may come from anywhere: no option loads code, another model or a file
ENGINE_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "transformers": ("chunk", "batch", "cache_bytes"),
    "vllm": (
        "max_num_seqs", "max_num_batched_tokens", "max_model_len", "gpu_memory_utilization", "cache_gib", "swap_space",
        "cpu_offload_gb", "kv_cache_dtype", "block_size", "dtype", "enforce_eager", "enable_prefix_caching",
        "enable_chunked_prefill", "tensor_parallel_size", "pipeline_parallel_size", "enable_expert_parallel",
        "disable_custom_all_reduce", "seed",
    ),
    "openai": ("model", "api", "max_length", "concurrency", "attempts", "timeout_seconds", "first_pause_seconds"),
}  # fmt: skip

APIS = ("completions", "chat")
"""The APIs of a server: it reads a text, or messages that it puts into the chat template itself."""

RULES: Mapping[str, Rule] = {
    "chunk": AtLeast(1),
    "batch": AtLeast(1),
    "max_length": AtLeast(1),
    "concurrency": AtLeast(1),
    "attempts": AtLeast(1),
    "timeout_seconds": Between(1e9, "`timeout_seconds` is a number of seconds above 0 and below 10⁹"),
    "first_pause_seconds": NotNegative(),
}
"""Of options whose values are checked where the job is read; vLLM checks its own."""

OPTIONS = Reads(
    lambda node: {option: read_scalar(entry) for option, entry in node.mapping().items()},
    {"type": "object", "additionalProperties": {"type": ["string", "boolean", "number"]}},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """The server of one model, by default the engine's, under the model's own name."""

    url: Annotated[str | None, "address of the server; by default that of the engine"] = None
    model: Annotated[str | None, "the server's name for the model; by default the name of the point or parent"] = None
    place: str = field(default="", compare=False)


SERVERS = Reads(
    lambda node: {name: read_spec(ServerSpec, entry) for name, entry in node.mapping().items()},
    lambda: {"type": "object", "additionalProperties": schema_of(ServerSpec)},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """The library that generates, or an OpenAI-compatible server."""

    name: Annotated[Literal["transformers", "vllm", "openai"], "library, or `openai` for a server"] = "transformers"
    url: Annotated[str | None, "address of the server, for `openai` alone"] = None
    options: Annotated[Mapping[str, Scalar], OPTIONS, "options of the engine"] = field(
        default_factory=dict[str, Scalar]
    )
    servers: Annotated[Mapping[str, ServerSpec], SERVERS, "servers of points and parents, by name"] = field(
        default_factory=dict[str, ServerSpec], metadata=LATER
    )
    place: str = field(default="", compare=False)


def read_engine(node: Node) -> EngineSpec:
    """The section at `node`, or the name alone."""
    keys: Mapping[str, Node] = {"name": node} if node.kind == "string" else node.mapping(None, ("name",))
    if node.kind == "string":
        engine = EngineSpec(name=node.choice(tuple(ENGINE_OPTIONS)), place=node.place)  # pyright: ignore[reportArgumentType]
    else:
        engine = read_spec(EngineSpec, node)
    if engine.name != "openai":
        for key in ("url", "servers"):
            if getattr(engine, key):
                raise keys[key].error(f"the engine {engine.name} has no `{key}:`; take it out")
    elif engine.url is None:
        if not engine.servers:
            raise node.error("the engine openai needs `url:`, the address of the server")
        for name, server in engine.servers.items():
            if server.url is None:
                raise BadInput(f"{server.place}: the server of {quoted(name)} needs `url:`, or give that of the engine")
    addresses = {keys["url"].place: engine.url} if engine.url is not None else {}
    addresses |= {server.place: server.url for server in engine.servers.values() if server.url is not None}
    for place, address in addresses.items():
        if any(sign in address for sign in "@?#"):
            raise BadInput(f"{place}: the server's address holds no credentials; the key comes from OPENAI_API_KEY")
        if not is_address(address):
            raise BadInput(f"{place}: {quoted(address)} is not a server; give it as http://host:port/v1")
    known = ENGINE_OPTIONS[engine.name]
    for option in engine.options:
        place = keys["options"].mapping()[option]
        if option not in known:
            raise place.error(f"the engine {engine.name} takes no option {quoted(option)}{suggestion(option, known)}")
        if option == "api":
            place.choice(APIS)
        if option in RULES:
            RULES[option].read(place)
    return engine


def is_address(url: str) -> bool:
    """Whether a server may have this address: http or https, a host, perhaps a port."""
    try:
        parts = urlsplit(url)
        port, host = parts.port, (parts.hostname or "").encode("idna")
    except ValueError:  # also of a name that is none
        return False
    sendable = parts.path.isascii() and url.isprintable() and " " not in url
    return parts.scheme in ("http", "https") and bool(host) and port != 0 and sendable


def engine_schema() -> dict[str, Any]:
    """The JSON Schema of the section: each engine's options and, for a server, its URL."""
    whole = schema_of(EngineSpec) | {"required": ["name"]}
    rules = [
        {
            "if": {"properties": {"name": {"const": name}}},
            "then": {
                "properties": {
                    "options": {
                        "properties": {option: RULES[option].schema if option in RULES else True for option in options}
                        | ({"api": {"enum": [*APIS]}} if "api" in options else {}),
                        "additionalProperties": False,
                    }
                }
            }
            | (
                {"anyOf": [{"required": ["url"]}, {"required": ["servers"]}]}
                if name == "openai"
                else {"not": {"anyOf": [{"required": ["url"]}, {"required": ["servers"]}]}}
            ),
        }
        for name, options in ENGINE_OPTIONS.items()
    ]
    return {"anyOf": [{"enum": [name for name in ENGINE_OPTIONS if name != "openai"]}, whole | {"allOf": rules}]}

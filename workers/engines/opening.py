"""Opening the engine that a job names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.evaluation_tasks import EvaluationTask, ModelSpec
from workers.engines.engine import Engine
from workers.gpu_memory import fraction_beside, part_of

if TYPE_CHECKING:
    from torch import Tensor


def open_engine(
    model: ModelSpec, folder: Path, weights: Iterator[tuple[str, Tensor]], task: EvaluationTask, device: str
) -> Engine:
    """The engine that the job names, holding the point of `task`; `folder` has the tokenizer's files."""
    options: dict[str, Any] = dict(model.options)
    if model.engine == "openai":
        from workers.engines.openai_engine import OpenAIEngine

        served = str(options.pop("model", task.point))
        longest = None if model.longest is None else model.longest + 1  # a scored window needs room for one more
        return OpenAIEngine(str(model.url), served, folder, asked_length=longest, **options)
    if model.engine == "vllm":
        if device != "cpu":  # a point is merged beside vLLM, whole, and copied by it
            held = 0 if model.as_it_is else model.bytes
            options.setdefault("gpu_memory_utilization", fraction_beside(held, device))
        return _open_vllm(model, folder, weights, task, options)
    from workers.engines.transformers_engine import Limits, TransformersEngine

    if device != "cpu":
        options.setdefault("cache_bytes", max(0, part_of(device) - model.bytes) // 2)

    return TransformersEngine.from_state(
        model.config,
        folder,
        weights,
        version=task.digest,
        device=device,
        limits=Limits(**options),
        end_tokens=model.end_tokens,
    )


def _open_vllm(
    model: ModelSpec,
    folder: Path,
    weights: Iterator[tuple[str, Tensor]],
    task: EvaluationTask,
    options: dict[str, Any],
) -> Engine:
    """vLLM opens nothing but a checkpoint: it is given one full of zeros, a file that takes no room on the disk."""
    from workers.checkpoints.configs import context_length
    from workers.checkpoints.safetensors import header_bytes
    from workers.engines.vllm_engine import VllmEngine

    longest = options.pop("max_model_len", None)
    if longest is None and model.longest is not None:  # one more than it reads, if the model can: vLLM always generates
        longest = min(model.longest + 1, context_length(model.config) or model.longest)
    cache_gib = int(options.pop("cache_gib", 4))
    if model.as_it_is is not None:  # it lies in `folder` already
        return VllmEngine(
            folder,
            version=task.digest,
            max_length=longest,
            dtype="auto",
            cache_gib=cache_gib,
            options=options,
            fixed=True,
        )
    header = header_bytes([(tensor.name, tensor.dtype, tensor.shape) for tensor in model.tensors])
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(tensor.bytes for tensor in model.tensors))
    (folder / "config.json").write_text(json.dumps({k: v for k, v in model.config.items() if k != "auto_map"}))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": model.end_tokens} if model.end_tokens else {})
    )
    dtype = str(model.config.get("dtype") or model.config.get("torch_dtype") or "bfloat16")
    engine = VllmEngine(folder, dtype=dtype, max_length=longest, cache_gib=cache_gib, options=options)
    try:
        engine.swap(weights, task.digest)
    except BaseException:
        engine.close()
        raise
    return engine

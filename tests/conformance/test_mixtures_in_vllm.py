"""Mixtures of three dense parents in vLLM: it loads them, and answers and scores as transformers does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml

from orchestrator.cli import main
from tests.conformance.architectures import TEXT, write_models
from tests.conformance.checkpoints import TOKENIZER, TOKENIZER_FILES
from workers.engines.engine import Prompt
from workers.engines.transformers_engine import TransformersEngine
from workers.engines.vllm_engine import VllmEngine

VLLM = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"

SIZES = {
    **TEXT,
    "vocab_size": 2048,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
"""Heads as wide as vLLM's attention on CPUs takes them, and weights so large that every layer changes the answer."""

DENSE = {
    "MixtralForCausalLM": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "Qwen2MoeForCausalLM": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
    "Qwen3MoeForCausalLM": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=32)),
}


@pytest.mark.heavy
@pytest.mark.timeout(1800)  # vLLM imports for a minute and more where others work as well
@pytest.mark.skipif(not VLLM.exists(), reason="vLLM's environment .venv-vllm is not there; `make vllm` installs it")
@pytest.mark.parametrize("architecture", DENSE)
def test_vllm_answers_as_transformers(architecture: str, tmp_path: Path) -> None:
    parents = tmp_path / "parents"
    torch.manual_seed(3)
    write_models(parents, architecture, DENSE[architecture]())
    for who in ("base", "one", "two"):
        for file in TOKENIZER_FILES:
            shutil.copy(TOKENIZER / file, parents / who / file)
    prompts = {"base": "hello", "one": "fix this code", "two": "a tale of a king"}
    experts = [{"source_model": str(parents / who), "positive_prompts": [text]} for who, text in prompts.items()]
    document = {"base_model": str(parents / "base"), "experts": experts, "experts_per_token": 2, "dtype": "bfloat16"}
    if architecture.startswith("Qwen2"):
        document["shared_experts"] = [{"source_model": str(parents / "two"), "positive_prompts": ["hello"]}]
    (tmp_path / "moe.yml").write_text(yaml.safe_dump(document))
    mixture = tmp_path / "mixture"
    assert main(["moe", str(tmp_path / "moe.yml"), str(mixture), "-q"]) == 0
    assert json.loads((mixture / "config.json").read_text())["architectures"] == [architecture]
    questions = [Prompt("", text, 12) for text in ("The grass is green.", "a tale of a king", "fix this code now")]
    ours = TransformersEngine.from_folder(mixture, version="mixture", dtype=torch.float32, device="cpu")
    options = {"enforce_eager": True, "seed": 0}
    vllm = VllmEngine(mixture, python=VLLM, dtype="float32", max_length=128, cache_gib=1, options=options, fixed=True)
    try:
        answers = vllm.generate(questions)
        assert [each.text for each in answers] == [each.text for each in ours.generate(questions)]
        assert all(each.finite and each.tokens_out > 3 for each in answers)
        windows = [ours.encode(question.whole) for question in questions]
        for here, there in zip(vllm.score(windows), ours.score(windows), strict=True):
            np.testing.assert_allclose(here, there, atol=1e-3)
    finally:
        vllm.close()
        ours.close()

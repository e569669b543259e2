"""Which files beside the weights belong to a merge; the names are those of real checkpoints on the hub."""

from __future__ import annotations

import pytest

from jobs.errors import BadInput
from workers.checkpoints.side_files import has_tokenizer, is_code, is_of_tokenizer, side_files

TAKEN = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "image_processor.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm",
    "qwen.tiktoken", "tekken.json", "normalizer.json", "bpe.codes", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/tool_use.jinja", "modules.json", "config_sentence_transformers.json",
    "sentence_bert_config.json", "1_Pooling/config.json", "configuration.json", "SYSTEM_PROMPT.txt", "LICENSE",
    "LICENSE.md", "NOTICE", "USE_POLICY.md", "modeling_x.py", "custom_generate/generate.py",
)  # fmt: skip
LEFT = (
    "config.json", "README.md", "manifest.json", "mergekit_config.yml", "model.safetensors",
    "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack",
    "model.ckpt.index", "model.ckpt.data-00000-of-00001", "weights.npz", "model-q4.gguf", "consolidated.safetensors",
    "params.json", "adapter_config.json", "adapter_model.safetensors", ".gitattributes", ".git/config",
    ".cache/huggingface/download/config.json.metadata", ".DS_Store", "__pycache__/modeling_x.cpython-311.pyc",
    "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "trainer_state.json", "training_args.bin", "training_args.json",
    "all_results.json", "events.out.tfevents.1700000000.host.1.0", "latest", "zero_to_fp32.py",
    "checkpoint-500/trainer_state.json", "runs/Nov28/x.json", "wandb/run.json", "original/tokenizer.model",
    "original/consolidated.00.pth", "onnx/model.onnx", "onnx/config.json", "logo.png", "assets/paper.PDF",
)  # fmt: skip


def test_a_merge_takes_everything_but_weights_and_rubbish():
    assert side_files([*TAKEN, *LEFT]) == sorted(TAKEN)


def test_a_folder_with_weights_is_a_checkpoint_of_its_own():
    inner = [
        "vision/config.json",
        "vision/model.safetensors",
        "vision/deep/vocab.txt",
        "lora/adapter_model.safetensors",
    ]
    assert side_files(["tokenizer.json", *inner, "text/vocab.txt"]) == ["text/vocab.txt", "tokenizer.json"]


def test_the_numbered_modules_of_sentence_transformers_keep_their_weights():
    dense = ["2_Dense/config.json", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin"]
    assert side_files(["modules.json", *dense]) == [*dense, "modules.json"]
    assert side_files(dense) == [], "nothing lists them"


def test_a_name_that_no_store_holds_is_refused_and_rubbish_of_that_name_is_not():
    with pytest.raises(BadInput, match="no control characters"):
        side_files(["vocab\n.txt"])
    assert side_files(["logo\n.png", ".cache/a\\b"]) == []


def test_files_go_with_the_tokenizer_or_with_the_model():
    of_tokenizer = [name for name in TAKEN if is_of_tokenizer(name)]
    assert of_tokenizer == [
        name for name in TAKEN[TAKEN.index("tokenizer.json") : TAKEN.index("modules.json")] if "processor" not in name
    ]
    assert is_of_tokenizer("tokenization_x.py")
    assert not is_of_tokenizer("modeling_x.py")
    assert [name for name in TAKEN if is_code(name)] == ["modeling_x.py", "custom_generate/generate.py"]


@pytest.mark.parametrize(
    ("files", "has"),
    [
        (["tokenizer.model"], True),
        (["tokenizer_config.json"], True),  # of a tokenizer of bytes, which has no vocabulary
        (["qwen.tiktoken"], True),
        (["vocab.json", "merges.txt"], True),
        (["chat_template.jinja", "additional_chat_templates/rag.jinja"], False),
        (["tokenization_x.py"], False),
        (["generation_config.json"], False),
    ],
)
def test_a_chat_template_or_code_alone_is_no_tokenizer(files: list[str], has: bool):
    assert has_tokenizer(files) == has

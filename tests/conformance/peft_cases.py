"""Imported by the oracle's own Python: tiny bases, LoRA adapters of every kind, and PEFT's own merge of each."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

ATTENTION = ["q_proj", "v_proj"]
CASES = {
    "plain": ({}, {"target_modules": ATTENTION}),
    "plain-f32": ({"dtype": torch.float32}, {"target_modules": [*ATTENTION, "down_proj"]}),
    "plain-f16": ({"dtype": torch.float16}, {"target_modules": "all-linear"}),
    "rslora": ({}, {"target_modules": ATTENTION, "use_rslora": True, "r": 5}),
    "patterns": (
        {},
        {
            "target_modules": [*ATTENTION, "gate_proj"],
            "rank_pattern": {"gate_proj": 3, r"model\.layers\.0\.self_attn\.q_proj": 6},
            "alpha_pattern": {"layers.1.self_attn.v_proj": 7, "q_proj": 32},
        },
    ),
    "dora": ({}, {"target_modules": [*ATTENTION, "up_proj"], "use_dora": True}),
    "embeddings": ({}, {"target_modules": ["embed_tokens", "k_proj"]}),
    "embeddings-dora": ({}, {"target_modules": ["embed_tokens", "k_proj"], "use_dora": True}),
    "embeddings-tied": ({"tie_word_embeddings": True}, {"target_modules": ["embed_tokens"]}),
    "saved": ({}, {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm", "embed_tokens"]}),
    "saved-tied": ({"tie_word_embeddings": True}, {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "biases": ({"attention_bias": True}, {"target_modules": ATTENTION, "bias": "all"}),
    "biases-of-lora": ({"attention_bias": True}, {"target_modules": ATTENTION, "bias": "lora_only"}),
    "bias-of-b": ({"attention_bias": True}, {"target_modules": ATTENTION, "lora_bias": True}),
    "bin": ({}, {"target_modules": ATTENTION}),
    "gpt2": ({}, {"target_modules": ["c_attn", "c_proj"]}),
    "gpt2-dora": ({}, {"target_modules": ["c_attn", "c_fc"], "use_dora": True}),
}


def base_of(name, dtype=torch.bfloat16, **config):
    torch.manual_seed(1)
    if name.startswith("gpt2"):
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=32)).to(dtype)
    llama = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=64, **llama, **config)).to(dtype)


def write(root, name):
    """Writes `root/NAME`: `base` (a checkpoint), `adapter` (as PEFT saves it), and `merged.safetensors` (the state
    dict after merge_and_unload)."""
    base, settings = CASES[name]
    folder = Path(root, name)
    base_of(name, **base).save_pretrained(folder / "base")
    auto = GPT2LMHeadModel if name.startswith("gpt2") else LlamaForCausalLM
    model = auto.from_pretrained(folder / "base", dtype="auto")
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 12, **settings}, task_type="CAUSAL_LM"))
    torch.manual_seed(2)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(folder / "adapter", safe_serialization=name != "bin")
    model = auto.from_pretrained(folder / "base", dtype="auto")
    merged = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
    tensors = {key: tensor.clone().contiguous() for key, tensor in merged.state_dict().items()}
    save_file(tensors, folder / "merged.safetensors")

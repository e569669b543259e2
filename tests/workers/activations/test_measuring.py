"""Statistics of tiny transformers models against the same models written out in numpy.

Every text is one token: attention then passes the token's own value on, and a model is a few products.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file

from jobs.errors import BadInput
from workers.activations.making import lines_of, pieces_of
from workers.activations.measuring import measure, measure_grams
from workers.benchmarks.texts.tokenizer import Tokenizer
from workers.checkpoints.opening import open_checkpoint
from workers.methods.aim import fits

Numbers = NDArray[np.float64]

TOKENS = (3, 17, 9, 3, 25, 30)
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
}


def saved(folder: Path, model: Any) -> dict[str, Numbers]:
    """A model with random norms in a folder, and the tensors that lie there."""
    generator = torch.Generator().manual_seed(4)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.5 if tensor.ndim > 1 else 1))
    model.save_pretrained(folder)
    return {name: tensor.double().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


def measured(folder: Path) -> Mapping[str, NDArray[np.float32]]:
    shapes = open_checkpoint(str(folder), "base").shapes
    found = measure(folder, shapes, [[token] for token in TOKENS], "cpu")
    assert found.tokens == len(TOKENS)
    assert found.without == ()
    assert all(fits(means.shape, shapes[name]) for name, means in found.means.items() if name in shapes)
    return found.means


class ByHand:
    """mean |x| by tensor, of a model in the manner of Llama: with a gate in each layer, or with experts."""

    def __init__(self, weights: Mapping[str, Numbers]) -> None:
        self.weights = weights
        self.inputs: dict[str, list[Numbers]] = defaultdict(list)

    def means(self) -> dict[str, Numbers]:
        return {name: np.mean(np.abs(inputs), axis=0) for name, inputs in self.inputs.items()}

    def linear(self, name: str, x: Numbers) -> Numbers:
        self.inputs[f"{name}.weight"].append(x)
        return self.weights[f"{name}.weight"] @ x + self.weights.get(f"{name}.bias", np.zeros(()))

    def norm(self, name: str, x: Numbers) -> Numbers:
        self.inputs[f"{name}.weight"].append(x)
        return x / np.sqrt(np.mean(x * x) + 1e-6) * self.weights[f"{name}.weight"]

    def read(self, token: int, head: Numbers | None) -> None:
        h = self.weights["model.embed_tokens.weight"][token]
        for layer in ("model.layers.0", "model.layers.1"):
            x = self.norm(f"{layer}.input_layernorm", h)
            for key in "qk":
                self.linear(f"{layer}.self_attn.{key}_proj", x)
            value = self.linear(f"{layer}.self_attn.v_proj", x)
            h = h + self.linear(f"{layer}.self_attn.o_proj", np.concatenate([value, value]))
            x = self.norm(f"{layer}.post_attention_layernorm", h)
            routed = f"{layer}.mlp.gate.weight" in self.weights
            h = h + (self.experts(f"{layer}.mlp", x) if routed else self.gated(f"{layer}.mlp", x))
        x = self.norm("model.norm", h)
        if head is None:
            self.linear("lm_head", x)
        else:
            self.inputs["lm_head.weight"].append(x)

    def gated(self, name: str, x: Numbers) -> Numbers:
        gate = self.linear(f"{name}.gate_proj", x)
        return self.linear(f"{name}.down_proj", gate / (1 + np.exp(-gate)) * self.linear(f"{name}.up_proj", x))

    def experts(self, name: str, x: Numbers) -> Numbers:
        logits = self.linear(f"{name}.gate", x)
        best = np.argsort(-logits)[:2]
        shares = np.exp(logits) / np.exp(logits).sum()
        return sum((shares[e] * self.gated(f"{name}.experts.{e}", x) for e in best), np.zeros(len(x)))


@pytest.mark.parametrize("tied", [True, False])
def test_a_models_means_are_those_of_its_products_by_hand(tmp_path: Path, tied: bool):
    config = transformers.Qwen2Config(**SIZES, tie_word_embeddings=tied, dtype="float32")
    weights = saved(tmp_path, transformers.Qwen2ForCausalLM(config))
    by_hand = ByHand(weights)
    for token in TOKENS:
        by_hand.read(token, weights["model.embed_tokens.weight"] if tied else None)
    found, expected = measured(tmp_path), by_hand.means()
    assert found.keys() == expected.keys()
    assert {name for name in weights if name not in found} == {
        "model.embed_tokens.weight",
        *(name for name in weights if name.endswith("bias")),
    }
    for name, means in expected.items():
        assert found[name].reshape(-1) == pytest.approx(means, rel=1e-5), name


def test_the_gram_matrices_are_those_of_the_inputs_by_hand(tmp_path: Path):
    config = transformers.Qwen2Config(**SIZES, tie_word_embeddings=True, dtype="float32")
    weights = saved(tmp_path, transformers.Qwen2ForCausalLM(config))
    by_hand = ByHand(weights)
    for token in TOKENS:
        by_hand.read(token, weights["model.embed_tokens.weight"])
    texts = [[token] for token in TOKENS]
    found = measure_grams(tmp_path, {name: each.shape for name, each in weights.items()}, texts, "cpu", 10)
    assert (found.tokens, found.without) == (len(TOKENS), ())
    layers = ("model.layers.0", "model.layers.1")
    grams = dict(found.matrices())
    assert grams.keys() == {
        *(tuple(f"{layer}.self_attn.{key}_proj.weight" for key in "kqv") for layer in layers),
        *((f"{layer}.self_attn.o_proj.weight",) for layer in layers),
        *((f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight") for layer in layers),
        *((f"{layer}.mlp.down_proj.weight",) for layer in layers),
    }
    for names, gram in grams.items():
        inputs = np.array(by_hand.inputs[names[0]])
        blocks = np.split(inputs, 3 if "down" in names[0] else 1, axis=1)  # 24 channels are more than 10
        expected = [block.T @ block / len(TOKENS) for block in blocks]
        assert gram == pytest.approx(np.array(expected), rel=1e-4, abs=1e-6), names
        assert (gram == np.swapaxes(gram, 1, 2)).all()


def test_experts_are_measured_over_their_own_tokens(tmp_path: Path):
    config = transformers.Qwen3MoeConfig(
        **SIZES,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=False,
        tie_word_embeddings=False,
        dtype="float32",
    )
    weights = saved(tmp_path, transformers.Qwen3MoeForCausalLM(config))
    by_hand = ByHand(weights)
    for token in TOKENS:
        by_hand.read(token, None)
    shapes = {name: each.shape for name, each in weights.items()}
    without = measure_grams(tmp_path, shapes, [[token] for token in TOKENS], "cpu", 1024).without
    assert {*without} == {name for name in weights if ".experts." in name or name.endswith("mlp.gate.weight")}
    found, expected = measured(tmp_path), by_hand.means()
    of_heads = {name for name in weights if "q_norm" in name or "k_norm" in name}
    unreached = {name for name in found if not found[name].any()}
    assert found.keys() == expected.keys() | of_heads | unreached
    for name, means in expected.items():
        assert found[name].reshape(-1) == pytest.approx(means, rel=1e-5), name


def test_the_channels_of_a_transposed_weight_are_its_rows(tmp_path: Path):
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=8, dtype="float32")
    weights = saved(tmp_path, transformers.GPT2LMHeadModel(config))
    found = measured(tmp_path)
    [prefix] = {name.removesuffix("wte.weight") for name in weights if name.endswith("wte.weight")}
    inputs = np.array([weights[f"{prefix}wte.weight"][token] + weights[f"{prefix}wpe.weight"][0] for token in TOKENS])
    assert found[f"{prefix}h.0.ln_1.weight"] == pytest.approx(np.abs(inputs).mean(0), rel=1e-5)
    centred = inputs - inputs.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    normed = normed * weights[f"{prefix}h.0.ln_1.weight"] + weights[f"{prefix}h.0.ln_1.bias"]
    of_rows = found[f"{prefix}h.0.attn.c_attn.weight"]
    assert of_rows.shape == (16, 1)
    assert of_rows[:, 0] == pytest.approx(np.abs(normed).mean(0), rel=1e-5)


def test_a_model_that_computes_nan_and_a_class_without_a_loader_are_refused(tmp_path: Path):
    config = transformers.Qwen2Config(**SIZES, dtype="float32")
    model = transformers.Qwen2ForCausalLM(config)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(
        BadInput, match=r"the inputs of model\.layers\.0\.mlp\.down_proj\.weight are NaN or infinite; give a"
    ):
        measure(tmp_path, open_checkpoint(str(tmp_path), "base").shapes, [[1, 2]], "cpu")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    with pytest.raises(BadInput, match="transformers cannot load the model"):
        measure(tmp_path, {}, [[1, 2]], "cpu")


def tokenizer_json() -> bytes:
    """Forty words."""
    words = {"w" + str(number): number for number in range(40)}
    return json.dumps(
        {
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
            "pre_tokenizer": {"type": "Whitespace"},
            "added_tokens": [],
        }
    ).encode()


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_json())


def test_a_long_text_is_read_in_pieces_over_all_of_it(tokenizer: Tokenizer):
    text = " ".join(f"w{number}" for number in range(40))
    assert pieces_of(tokenizer, text, 3, 10) == [[*range(10)], [*range(15, 25)], [*range(30, 40)]]
    assert pieces_of(tokenizer, "w7 w8", 3, 10) == [[7, 8]]
    assert pieces_of(tokenizer, " ", 3, 10) == []


def test_the_first_lines_are_read_to_their_most_tokens(tokenizer: Tokenizer):
    lines = '{"text": "w1 w2 w3"}\n\n"w4"\n{"text": " "}\n{"text": "w5", "more": 1}\n{"text": "w6"}\n'
    assert lines_of(tokenizer, lines, 3, 2, "texts.jsonl") == [[1, 2], [4], [5]]
    chat = Tokenizer(
        tokenizer_json(), chat_template="{% for each in messages %}{{ each.role }} w7 {{ each.content }} {% endfor %}"
    )
    messages = [{"role": "w1", "content": "w2"}, {"role": "w3", "content": "w4"}]
    line = json.dumps({"messages": messages})
    assert lines_of(chat, f"{line}\n{line}", 9, 5, "texts.jsonl") == [[1, 7, 2, 3, 7]] * 2
    refusing = Tokenizer(tokenizer_json(), chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadInput, match=r"^texts.jsonl:2: .*roles must alternate\); give its texts as lines with a `te"):
        lines_of(refusing, f'"w1"\n{line}', 9, 5, "texts.jsonl")
    with pytest.raises(BadInput, match="the checkpoint has no chat template; give its texts as lines with a `text`"):
        lines_of(tokenizer, line, 9, 5, "texts.jsonl")
    with pytest.raises(BadInput, match=r"^texts.jsonl:2: not a line such as"):
        lines_of(tokenizer, '"w1"\n{"prompt": "w2"}\n', 9, 2, "texts.jsonl")
    with pytest.raises(BadInput, match=r"^texts.jsonl:1: not a line such as"):
        lines_of(chat, '{"messages": []}', 9, 5, "texts.jsonl")
    bare = json.loads(tokenizer_json()) | {"normalizer": {"type": "Replace", "pattern": {"String": "-"}, "content": ""}}
    assert lines_of(Tokenizer(json.dumps(bare).encode()), '"---"\n"w5"', 9, 5, "texts.jsonl") == [
        [5]
    ]  # one has no tokens

"""The Fisher information of tiny transformers models, against the gradients of the same models written out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.func import functional_call, grad

from jobs.errors import BadInput
from tests.workers.activations.test_measuring import SIZES, saved
from workers.activations import gradients
from workers.activations.gradients import measure_fisher

TEXTS = [[3, 17, 9, 3, 25, 30], [8, 8, 1, 2]]
TIED = "model.embed_tokens.weight"


def test_it_is_the_mean_of_whole_squared_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of embeddings that serve as the head too, once; of the labels that were drawn, of which each text has its own."""
    config = transformers.Qwen2Config(**SIZES, tie_word_embeddings=True, dtype="bfloat16")
    weights = saved(tmp_path, transformers.Qwen2ForCausalLM(config))
    drawn: list[Tensor] = []
    draw = gradients._drawn  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(gradients, "_drawn", lambda logits, text: drawn.append(draw(logits, text)) or drawn[-1])
    found = measure_fisher(tmp_path, {name: each.shape for name, each in weights.items()}, TEXTS, "cpu")
    assert (found.without, found.unreached, found.squares.keys()) == ((), (), weights.keys())

    model = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager")

    def likelihood(parameters: Mapping[str, Tensor], text: list[int], labels: Tensor) -> Tensor:
        kwargs = {"input_ids": torch.tensor([text])}
        logits = functional_call(model, dict(parameters), kwargs=kwargs, tie_weights=False).logits[0]
        return torch.log_softmax(logits, -1)[torch.arange(len(text)), labels].sum()

    parameters = {name: torch.from_numpy(each) for name, each in weights.items()}
    of_texts = [
        grad(likelihood)({**parameters, "lm_head.weight": parameters[TIED]}, text, labels)
        for text, labels in zip(TEXTS, drawn, strict=True)
    ]
    for name, squares in found.squares.items():
        whole = [each[name] + (each["lm_head.weight"] if name == TIED else 0) for each in of_texts]
        expected = sum(each**2 for each in whole) / 2
        assert squares == pytest.approx(expected.numpy(), rel=2e-3, abs=1e-6 * float(expected.max())), name


def test_labels_are_drawn_by_the_probabilities_and_again_the_same():
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3])
    rows = probabilities.log().expand(20_000, 4)
    labels = gradients._drawn(rows, 0)  # pyright: ignore[reportPrivateUsage]
    shares = torch.bincount(labels, minlength=4) / len(labels)
    assert shares.numpy() == pytest.approx(probabilities.numpy(), abs=4 * np.sqrt(0.25 / len(rows)))
    assert shares[1] == 0
    assert torch.equal(labels[:100], gradients._drawn(rows[:100], 0))  # pyright: ignore[reportPrivateUsage]
    assert not torch.equal(labels[:100], gradients._drawn(rows[:100], 1))  # pyright: ignore[reportPrivateUsage]


def test_experts_without_tokens_have_none_and_a_model_without_a_head_is_refused(tmp_path: Path):
    config = transformers.Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, dtype="float32"
    )
    weights = saved(tmp_path, transformers.Qwen3MoeForCausalLM(config))
    shapes = {name: each.shape for name, each in weights.items()}
    found = measure_fisher(tmp_path, shapes, [[3]], "cpu")  # which goes to two of four experts in each layer
    assert {name: each.shape for name, each in found.squares.items()} == shapes
    reached = {name for name in shapes if ".experts." in name} - {*found.unreached}
    assert len(reached) == 2 * 2 * 3
    saved(tmp_path / "bare", transformers.Qwen2Model(transformers.Qwen2Config(**SIZES)))
    with pytest.raises(BadInput, match="the model has no probabilities of next tokens; give a language model"):
        measure_fisher(tmp_path / "bare", {}, [[3]], "cpu")

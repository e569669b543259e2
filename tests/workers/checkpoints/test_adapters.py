"""LoRA adapters: which tensors they change and by what rule, and the adapters that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from jobs.errors import BadInput
from jobs.merge_tasks import Derived, LowRank, ParentTensor, Scaled
from tests.orchestrator.models import CONFIG, EMBEDDINGS, HEAD, HIDDEN, VOCABULARY, weights, write_adapter, write_model
from workers.checkpoints.adapters import open_adapter, with_adapter
from workers.checkpoints.opening import Checkpoint, open_checkpoint

Q = "model.layers.0.self_attn.q_proj"
SMALL = torch.arange(float(HIDDEN)).reshape(1, HIDDEN).repeat(2, 1)
UPDATE = {f"{Q}.lora_A.weight": SMALL, f"{Q}.lora_B.weight": SMALL.T.contiguous()}

Parts = dict[str, torch.Tensor]
Apply = Callable[..., Checkpoint]


@pytest.fixture
def apply(tmp_path: Path) -> Apply:
    """apply(parts, base=tensors, **config): the base `cos` with an adapter of these parts."""

    def applied(
        parts: dict[str, torch.Tensor], base: dict[str, torch.Tensor] | None = None, **config: Any
    ) -> Checkpoint:
        write_model(tmp_path / "cos", base or weights("cos"), config=config.pop("of_base", CONFIG))
        write_adapter(tmp_path / "lora", parts, **config)
        return with_adapter(open_checkpoint(str(tmp_path / "cos"), "cos"), open_adapter(str(tmp_path / "lora"), "m"))

    return applied


def rule_of(checkpoint: Checkpoint, tensor: str) -> LowRank:
    source = checkpoint.tensors[tensor]
    assert isinstance(source, Derived) and isinstance(source.rule, LowRank)
    return source.rule


def test_an_update_is_derived_from_the_base_and_the_adapter(apply: Apply, tmp_path: Path) -> None:
    found = apply(UPDATE, lora_alpha=6)
    derived = [name for name, source in found.tensors.items() if isinstance(source, Derived)]
    assert derived == [f"{Q}.weight"]
    source = found.tensors[f"{Q}.weight"]
    assert isinstance(source, Derived)
    assert (source.dtype, source.shape, source.rule) == ("BF16", (HIDDEN, HIDDEN), LowRank(3.0, 2))
    assert [name for name, _ in source.inputs] == ["cos", "cos+adapter", "cos+adapter"]
    assert found.others.keys() == {"cos+adapter"}
    assert [file.key for file in found.others["cos+adapter"].files] == ["adapter_model.safetensors"]
    assert found.reference == f"{tmp_path}/cos+{tmp_path}/lora"


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 8}, 4),
        ({"lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"q_proj": 5}}, 2.5),
        ({"lora_alpha": 8, "alpha_pattern": {r"layers\.1\..*": 5, r".*0.*q_proj": 3}}, 1.5),
        ({"lora_alpha": 8, "alpha_pattern": {Q: 7, "q_proj": 5}}, 3.5),
        ({"lora_alpha": 8, "alpha_pattern": {"proj": 5}}, 4),
        ({"lora_alpha": 8, "r": 64, "rank_pattern": {"self_attn.q_proj": 2}}, 4),
    ],
)
def test_the_scale_is_alpha_by_rank(apply: Apply, config: dict[str, Any], scale: float) -> None:
    assert rule_of(apply(UPDATE, **config), f"{Q}.weight").scale == scale


@pytest.mark.parametrize("name", ["{}.default", "{}.base_layer", "{}"])
def test_the_names_of_older_versions_are_read(apply: Apply, name: str) -> None:
    parts = {f"{Q}.lora_A.default.weight": SMALL, f"{Q}.lora_B.default.weight": SMALL.T.contiguous()}
    if "default" not in name:
        parts = {
            f"{name.format(Q)}.lora_{letter}.weight": part for letter, part in zip("AB", parts.values(), strict=True)
        }
    assert rule_of(apply(parts), f"{Q}.weight") == LowRank(1.0, 2)


def test_whole_tensors_are_replaced_in_the_dtype_of_the_base(apply: Apply) -> None:
    parts = {
        "model.norm.weight": torch.ones(HIDDEN),
        f"{Q}.base_layer.bias": torch.ones(HIDDEN, dtype=torch.bfloat16),
        "lm_head.modules_to_save.weight": torch.ones(VOCABULARY, HIDDEN),
    }
    found = apply(parts, base=weights("cos", tied=False), of_base={**CONFIG, "tie_word_embeddings": False})
    for name in ("model.norm.weight", f"{Q}.bias", HEAD):
        source = found.tensors[name]
        assert isinstance(source, Derived) and (source.dtype, source.rule) == ("BF16", Scaled())
        assert [place for place, _ in source.inputs] == ["cos+adapter"]


@pytest.mark.parametrize("kind", ["saved", "updated"])
def test_a_head_of_its_own_unties_the_model(apply: Apply, kind: str) -> None:
    head = torch.ones(VOCABULARY, HIDDEN)
    parts = {"lm_head.weight": head} if kind == "saved" else {
        "lm_head.lora_A.weight": SMALL, "lm_head.lora_B.weight": torch.ones(VOCABULARY, 2)
    }  # fmt: skip
    found = apply(parts, of_base={**CONFIG, "text_config": {"model_type": "qwen2", "tie_word_embeddings": True}})
    assert found.config["tie_word_embeddings"] is found.config["text_config"]["tie_word_embeddings"] is False
    assert found.shapes[HEAD] == (VOCABULARY, HIDDEN)
    assert isinstance(found.tensors[EMBEDDINGS], ParentTensor), "the embeddings stay as they are"
    if kind == "updated":
        source = found.tensors[HEAD]
        assert isinstance(source, Derived) and source.inputs[0] == ("cos", found.tensors[EMBEDDINGS])


def test_an_update_of_embeddings_is_transposed_and_leaves_them_tied(apply: Apply) -> None:
    parts = {
        "model.embed_tokens.lora_embedding_A": torch.ones(2, VOCABULARY),
        "model.embed_tokens.lora_embedding_B": torch.ones(HIDDEN, 2),
    }
    found = apply(parts)
    assert rule_of(found, EMBEDDINGS).transposed
    assert HEAD not in found.tensors and found.config["tie_word_embeddings"] is True


REFUSED: dict[str, tuple[Parts, dict[str, Any], str]] = {
    "another type": (UPDATE, {"peft_type": "LOHA"}, 'an adapter of the type "LOHA" is not applied, only LORA is;'),
    "no type": (UPDATE, {"peft_type": None}, "an adapter of the type null is not applied"),
    "a variant": (UPDATE, {"layer_replication": [[0, 2]]}, "`layer_replication` is not applied; apply it with PEFT's"),
    "another base": (UPDATE, {"init_lora_weights": "pissa_niter_16"}, 'begun with "pissa_niter_16", which changes'),
    "a tensor of another kind": (
        UPDATE | {f"{Q}.lora_C.weight": SMALL.clone()}, {}, f"{Q}.lora_C.weight is not applied; apply it with PEFT's"
    ),
    "half an update": ({f"{Q}.lora_A.weight": SMALL}, {}, f"{Q} has not both of lora_A.weight and lora_B.weight"),
    "a module that is not there": (
        {"model.layers.9.q.lora_A.weight": SMALL, "model.layers.9.q.lora_B.weight": SMALL.T.contiguous()},
        {},
        'changes a tensor that the base does not have; the adapter is of "org/base"',
    ),
    "another width": (
        {f"{Q}.lora_A.weight": SMALL[:, 1:].contiguous(), f"{Q}.lora_B.weight": SMALL.T.contiguous()},
        {},
        f"do not fit {Q}.weight [16, 16]; the adapter is of",
    ),
    "another rank": (UPDATE, {"r": 4}, f"{Q} has the rank 2, and 4 in adapter_config.json"),
    "a rank of 0": (UPDATE, {"r": 0}, "r is 0, not a number above 0"),
    "a pattern that is none": (UPDATE, {"alpha_pattern": {"(": 2}}, "alpha_pattern has the pattern '(', which is none"),
    "a DoRA without magnitudes": (UPDATE, {"use_dora": True}, f"a DoRA, and {Q} has no lora_magnitude_vector"),
    "two adapters": (
        {f"{Q}.lora_A.a.weight": SMALL, f"{Q}.lora_B.b.weight": SMALL.clone()}, {}, "holds several adapters (.a, .b)"
    ),
    "embeddings of another size": (
        {"model.embed_tokens.weight": torch.ones(VOCABULARY + 2, HIDDEN)},
        {},
        "is [50, 16], and [48, 16] in the base; name a base that `model.resize_token_embeddings(50)` resized",
    ),
    "integers": ({"model.norm.weight": torch.ones(HIDDEN, dtype=torch.int8)}, {}, "is I8 or not contiguous"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_an_adapter_that_is_not_applied_is_refused_in_one_line(apply: Apply, kind: str) -> None:
    parts, config, line = REFUSED[kind]
    with pytest.raises(BadInput) as refusal:
        apply(parts, **config)
    assert line in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"m: adapter .*cos: no adapter_config\.json there; after the \+ stands a LoRA"):
        open_adapter(str(write_model(tmp_path / "cos", weights("cos"))), "m")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(BadInput, match=r"neither adapter_model\.safetensors nor adapter_model\.bin there"):
        open_adapter(str(tmp_path / "lora"), "m")
    torch.save(UPDATE, tmp_path / "lora" / "adapter_model.bin")
    assert open_adapter(str(tmp_path / "lora"), "m").shapes[f"{Q}.lora_A.weight"] == (2, HIDDEN)
    save_file(UPDATE, tmp_path / "lora" / "adapter_model.safetensors")
    assert open_adapter(str(tmp_path / "lora"), "m").files[0].key == "adapter_model.safetensors"

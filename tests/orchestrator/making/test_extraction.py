"""`mergeyard extract-lora`: the adapter gives the model back within the error of its rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from orchestrator.making.extraction import Extractor
from tests.orchestrator.conftest import Ended, files_under
from tests.orchestrator.models import HEAD, load_model, weights, write_model

Mergeyard = Callable[..., Ended]
EMBED = "model.embed_tokens.weight"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with base and cos in float32, and both with a head of their own."""
    for who in ("base", "cos"):
        write_model(tmp_path / who, weights(who, dtype=torch.float32), config={"torch_dtype": "float32"})
        untied = weights(who, dtype=torch.float32, tied=False)
        write_model(tmp_path / "untied" / who, untied, config={"torch_dtype": "float32"})
    return tmp_path


def applied(base: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The base with the adapter, by the formulas of PEFT's documentation: W + B·A, and whole tensors in place of W."""
    adapter = load_file(folder / "adapter_model.safetensors")
    result = {**base, **({} if HEAD in base else {HEAD: base[EMBED]})}
    for key, tensor in adapter.items():
        name = key.removeprefix("base_model.model.").replace(".base_layer", "")
        if name.endswith("lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            b = adapter[key.replace("lora_A", "lora_B")]
            result[f"{module}.weight"] = result[f"{module}.weight"] + b @ tensor
        elif name.endswith("lora_embedding_A"):
            module = name.removesuffix(".lora_embedding_A")
            result[f"{module}.weight"] = result[f"{module}.weight"] + (adapter[key[:-1] + "B"] @ tensor).T
        elif "lora_" not in name:
            result[name] = tensor
    return result


@pytest.mark.parametrize(
    ("family", "options"), [("", []), ("untied", []), ("untied", ["--embed-lora"]), ("", ["--embed-lora"])]
)
def test_at_full_rank_the_adapter_gives_the_model_back(
    mergeyard: Mergeyard, models: Path, family: str, options: list[str]
):
    out = models / "adapter"
    ended = mergeyard("extract-lora", models / family / "cos", models / family / "base", out, "-q", *options)
    assert ended.code == 0, ended.err
    base, model = (load_model(models / family / who) for who in ("base", "cos"))
    found = applied(base, out)
    for name, tensor in {HEAD: model[EMBED], **model}.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-8)
    names = load_file(out / "adapter_model.safetensors").keys()
    assert any("lora_embedding_A" in name for name in names) == (options != [] and family == "untied")


def test_threads_do_not_change_the_adapter(mergeyard: Mergeyard, models: Path):
    for threads in (1, 3):
        out = models / str(threads) / "adapter"
        ended = mergeyard("extract-lora", models / "cos", models / "base", out, "-q", "--rank", "3", "-j", threads)
        assert ended.code == 0, ended.err
    assert files_under(models / "1") == files_under(models / "3")


def test_the_error_is_that_of_the_rank_and_is_printed(mergeyard: Mergeyard, models: Path):
    out = models / "adapter"
    ended = mergeyard("extract-lora", models / "cos", models / "base", out, "--rank", "3", "--json", "-q")
    assert ended.code == 0, ended.err
    base, model = (load_model(models / who) for who in ("base", "cos"))
    found = applied(base, out)
    told = {entry["tensor"]: entry for entry in ended.facts["tensors"]}
    checked = 0
    for name in model:
        change = (model[name] - base[name]).double().numpy()
        lost = np.linalg.norm((model[name] - found[name]).double().numpy())
        if change.ndim == 2 and "embed" not in name:
            singular = np.linalg.svd(change, compute_uv=False)
            assert lost == pytest.approx(np.sqrt((singular[3:] ** 2).sum()), rel=1e-5)
            assert told[name]["relative_error"] == pytest.approx(lost / np.linalg.norm(change), rel=1e-5)
            assert told[name]["rank"] == 3
            checked += 1
        else:
            assert lost == 0 and told[name]["rank"] is None
    assert checked == 14
    assert mergeyard("verify", out).code == 0


def test_only_changes_are_stored_and_named(mergeyard: Mergeyard, models: Path):
    base = load_model(models / "base")
    name = "model.layers.1.self_attn.q_proj"
    changed = {**base, f"{name}.weight": base[f"{name}.weight"] + 1e-2 * torch.ones(16, 16)}
    changed["model.layers.0.input_layernorm.weight"] = base["model.layers.0.input_layernorm.weight"] + 1
    write_model(models / "tuned", changed, config={"torch_dtype": "float32"})
    ended = mergeyard("extract-lora", models / "tuned", models / "base", models / "adapter")
    assert ended.code == 0, ended.err
    config = json.loads((models / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"], config["bias"]) == (1, [name], "none")
    assert config["modules_to_save"] == ["model.layers.0.input_layernorm"]
    assert {*load_file(models / "adapter" / "adapter_model.safetensors")} == {
        f"base_model.model.{name}.lora_A.weight",
        f"base_model.model.{name}.lora_B.weight",
        "base_model.model.model.layers.0.input_layernorm.weight",
    }
    assert [line.split() for line in ended.out.splitlines()][1:3] == [
        ["input_layernorm.weight", "1", "whole", "0"],
        ["q_proj.weight", "1", "1", ended.out.splitlines()[2].split()[-1]],
    ]


def test_patterns_choose_modules_and_norms_can_be_left_out(mergeyard: Mergeyard, models: Path):
    options = ["-i", "self_attn", "-e", "[kv]_proj", "-e", "embed", "--skip-undecomposable", "--save-module", "o_proj"]
    ended = mergeyard("extract-lora", models / "cos", models / "base", models / "adapter", "--json", "-q", *options)
    assert ended.code == 0, ended.err
    config = json.loads((models / "adapter" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["modules_to_save"], config["bias"]) == (["q_proj"], ["o_proj"], "none")
    left_out = {
        entry["tensor"]: entry["relative_error"] for entry in ended.facts["tensors"] if entry["how"] == "left out"
    }
    assert left_out == {f"model.layers.{layer}.self_attn.q_proj.bias": 1 for layer in (0, 1)}


def test_the_same_command_gives_the_same_bytes_and_does_nothing_twice(mergeyard: Mergeyard, models: Path):
    given = ["--model", models / "cos", "--base-model", models / "base", "--max-rank", "2", "-q"]
    for out in ("one", "two"):
        assert mergeyard("extract-lora", *given, "--out-path", models / out / "adapter").code == 0
    assert files_under(models / "one") == files_under(models / "two")
    again = mergeyard("extract-lora", *given, "--out-path", models / "one" / "adapter")
    assert (again.code, again.out) == (0, f"{models}/one/adapter: this very adapter is there already\n")
    assert files_under(models / "one") == files_under(models / "two")


def test_an_interruption_leaves_no_adapter_and_the_same_command_goes_on(
    mergeyard: Mergeyard, models: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Extractor, "_card", interrupted)
        assert mergeyard("extract-lora", models / "cos", models / "base", models / "adapter", "-q").code == 75
    assert not {"adapter_config.json", "manifest.json"} & files_under(models / "adapter").keys()
    other = mergeyard("extract-lora", models / "cos", models / "base", models / "adapter", "-q", "--rank", "2")
    assert other.code == 2 and "give an empty folder" in other.err
    assert mergeyard("extract-lora", models / "cos", models / "base", models / "adapter", "-q").code == 0
    assert mergeyard("verify", models / "adapter").code == 0
    assert ".mergeyard/plan.json" not in files_under(models / "adapter")


def test_an_adapter_of_objects_in_a_store(mergeyard: Mergeyard, models: Path):
    out = "memory://extraction/adapter"
    assert mergeyard("extract-lora", models / "cos", models / "base", out, "-q").code == 0
    assert mergeyard("verify", out).code == 0


def test_wrong_inputs_end_with_one_line_and_write_nothing(mergeyard: Mergeyard, models: Path):
    narrow = {name: tensor[..., :8] if name == HEAD else tensor for name, tensor in load_model(models / "cos").items()}
    narrow["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(16, 8)
    write_model(models / "narrow", narrow)
    write_model(models / "infinite", {n: t * np.inf for n, t in load_model(models / "cos").items()})
    out = models / "out"
    for arguments, words in (
        (
            [models / "cos", models / "base"],
            "--out-path is missing; it takes a fine-tuned model, its base and a folder",
        ),
        ([models / "cos", models / "base", out, "more"], "one argument too many, 'more'"),
        ([models / "cos", models / "cos", out], "no tensor that is to be decomposed differs"),
        ([models / "cos", models / "base", out, "--rank", "0"], "--max-rank 0: a rank is at least 1"),
        ([models / "cos", models / "base", out, "-e", "("], "--exclude-regex '(': not a regular expression"),
        ([models / "cos", models / "base", out, "--save-module", "embed_token"], 'did you mean "embed_tokens"?'),
        ([models / "narrow", models / "base", out], "--save-module model.layers.0.self_attn.q_proj stores it whole"),
        ([models / "infinite", models / "base", out], "holds NaN or infinity; -e "),
        ([models / "cos", models / "base", models / "base"], "something lies there already (config.json)"),
    ):
        ended = mergeyard("extract-lora", *arguments, "-q")
        assert ended.code == 2 and words in ended.err and ended.err.count("\n") == 1, ended.err
        assert not out.exists()
    module = "model.layers.0.self_attn.q_proj"
    assert mergeyard("extract-lora", models / "narrow", models / "base", out, "-q", "--save-module", module).code == 0

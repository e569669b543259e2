"""Parents of every form: a merge of them equals the merge of the same weights in a plain safetensors checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.orchestrator.models import HIDDEN, weights, write_adapter, write_model

Mergeyard = Callable[..., Any]

LINEAR = """
merge_method: linear
models:
- {{model: {first}, parameters: {{weight: 0.25}}}}
- {{model: {second}, parameters: {{weight: 0.75}}}}
dtype: bfloat16
"""


@pytest.fixture
def merged(mergeyard: Mergeyard, tmp_path: Path) -> Callable[..., bytes]:
    """merged(first, second): the weights of their merge."""
    made: list[Path] = []

    def merge(first: object, second: object) -> bytes:
        made.append(tmp_path / f"out{len(made)}")
        document = tmp_path / f"{made[-1].name}.yml"
        document.write_text(LINEAR.format(first=first, second=second))
        ended = mergeyard("merge", document, made[-1], "--quiet")
        assert ended.code == 0, ended.err
        return (made[-1] / "model.safetensors").read_bytes()

    return merge


@pytest.mark.parametrize("sharded", [False, True])
def test_a_bin_checkpoint_is_merged_as_its_safetensors_are(
    merged: Callable[..., bytes], parents: Path, sharded: bool
) -> None:
    expected = merged(parents / "cos", parents / "fmt")
    tensors = weights("cos")
    (parents / "cos" / "model.safetensors").unlink()
    if sharded:
        files = {name: f"pytorch_model-{number % 2 + 1:05d}-of-00002.bin" for number, name in enumerate(tensors)}
        for file in set(files.values()):
            held = {name: tensor for name, tensor in tensors.items() if files[name] == file}
            torch.save(held, parents / "cos" / file)
        (parents / "cos" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        transposed = {name: tensor.T.contiguous().T if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
        torch.save(transposed, parents / "cos" / "pytorch_model.bin")
    assert merged(parents / "cos", parents / "fmt") == expected


Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def lora(parents: Path) -> Path:
    """An adapter of q_proj in the first layer, beside the parents; its base is cos."""
    generator = torch.Generator().manual_seed(3)
    parts = {
        f"{Q}.lora_A.weight": torch.randn(2, HIDDEN, generator=generator),
        f"{Q}.lora_B.weight": torch.randn(HIDDEN, 2, generator=generator),
    }
    write_adapter(parents / "lora", parts, lora_alpha=1, base_model_name_or_path=str(parents / "cos"))
    return parents / "lora"


def adapted(parents: Path) -> dict[str, torch.Tensor]:
    """cos with the adapter, computed in float64."""
    tensors, parts = weights("cos"), load_file(parents / "lora" / "adapter_model.safetensors")
    a, b = (parts[f"base_model.model.{Q}.lora_{letter}.weight"].double() for letter in "AB")
    tensors[f"{Q}.weight"] = (tensors[f"{Q}.weight"].double() + 0.5 * b @ a).float().bfloat16()
    return tensors


def test_a_base_with_an_adapter_is_merged_as_the_adapted_model(
    merged: Callable[..., bytes], parents: Path, lora: Path
) -> None:
    expected = merged(write_model(parents / "whole", adapted(parents)), parents / "fmt")
    assert expected != merged(parents / "cos", parents / "fmt")
    long = f"{{model: {{path: {parents / 'cos'}}}, lora: {{path: {lora}, revision: null}}}}"
    for reference in (f"{parents / 'cos'}+{lora}", long, lora):
        assert merged(reference, parents / "fmt") == expected


def test_adapters_of_one_base_are_merged(merged: Callable[..., bytes], parents: Path, lora: Path) -> None:
    other = {name: -part for name, part in load_file(lora / "adapter_model.safetensors").items()}
    parts = {name.removeprefix("base_model.model."): part for name, part in other.items()}
    write_adapter(parents / "other", parts, lora_alpha=2, base_model_name_or_path=str(parents / "cos"))
    expected = merged(f"{parents / 'cos'}+{lora}", f"{parents / 'cos'}+{parents / 'other'}")
    assert merged(lora, parents / "other") == expected


def test_a_job_names_an_adapter_in_its_plan_its_card_and_its_manifest(
    mergeyard: Mergeyard, parents: Path, lora: Path, job_text: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(job_text(grid="{w: [0.5]}").replace("/cos\n", "/cos+parents/lora\n"))
    assert mergeyard("run", path, "--in-process").code == 0
    run = tmp_path / "runs" / "soup"
    plan = json.loads((run / "plan.json").read_text())
    assert plan["parents"]["cos+adapter"]["files"].keys() == {"adapter_model.safetensors"}
    assert f"cos: {parents / 'cos'}+{lora}" in (run / "job.yaml").read_text()
    point = run / "points" / "w0.5"
    assert json.loads((point / "manifest.json").read_text())["parents"]["cos+adapter"] == str(lora)
    card = (point / "README.md").read_text()
    assert f"| `cos+adapter` | `{lora}` | adapter |" in card and f"- {lora}\n" in card
    assert mergeyard("verify", run).code == 0
    again = mergeyard("run", run / "job.yaml", "--in-process", "--output", tmp_path / "again")
    assert again.code == 0
    weights_file = Path("points") / "w0.5" / "model.safetensors"
    assert (tmp_path / "again" / "soup" / weights_file).read_bytes() == (run / weights_file).read_bytes()


def test_an_adapter_whose_base_is_not_here_is_refused_with_a_remedy_that_works(
    mergeyard: Mergeyard, merged: Callable[..., bytes], parents: Path, lora: Path, tmp_path: Path
) -> None:
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/models/cos"}))
    (tmp_path / "m.yml").write_text(LINEAR.format(first=lora, second=parents / "fmt"))
    refused = mergeyard("merge", tmp_path / "m.yml", tmp_path / "out")
    assert refused.code == 2
    remedy = f"write its base before it: `BASE+{lora}`"
    assert refused.err.endswith(f'a LoRA adapter that is of "/models/cos", which is not here; {remedy}\n')
    merged(f"{parents / 'cos'}+{lora}", parents / "fmt")

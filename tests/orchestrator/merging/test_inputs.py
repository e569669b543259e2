"""Parents of every form: a merge of them equals the merge of the same weights in a plain safetensors checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.orchestrator.models import weights

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
        torch.save(tensors, parents / "cos" / "pytorch_model.bin")
    assert merged(parents / "cos", parents / "fmt") == expected

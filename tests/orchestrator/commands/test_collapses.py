"""A merge that is none is said in so many words: after the merge, in its card and in the report of a grid."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.orchestrator.conftest import Ended
from tests.orchestrator.models import weights, write_model

Merge = Callable[..., Ended]


@pytest.fixture
def merge(mergeyard: Callable[..., Ended], tmp_path: Path) -> Merge:
    """merge(method, deltas, **parameters): merges siblings that are a base and these changes of every tensor."""

    def run(method: str, deltas: list[Callable[[torch.Tensor], torch.Tensor]], **parameters: Any) -> Ended:
        base = weights("base", dtype=torch.bfloat16)
        write_model(tmp_path / "base", base)
        for number, delta in enumerate(deltas):
            write_model(tmp_path / f"m{number}", {name: tensor + delta(tensor) for name, tensor in base.items()})
        document = {
            "merge_method": method,
            "base_model": str(tmp_path / "base"),
            "models": [{"model": str(tmp_path / f"m{number}")} for number in range(len(deltas))],
            "parameters": parameters,
            "dtype": "bfloat16",
        }
        (tmp_path / "config.yml").write_text(json.dumps(document))
        return mergeyard("merge", tmp_path / "config.yml", tmp_path / "out")

    return run


def halves(first: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """A change of one half of a tensor's elements alone, as large as the numbers: two such changes are orthogonal."""

    def delta(tensor: torch.Tensor) -> torch.Tensor:
        changed = torch.zeros_like(tensor).flatten()
        changed[first::2] = 1
        return changed.view_as(tensor)

    return delta


def test_model_stock_of_orthogonal_task_vectors_is_said_to_be_the_base(merge: Merge, tmp_path: Path):
    ended = merge("model_stock", [halves(False), halves(True)])
    assert ended.code == 0
    assert "warning: merge: model_stock returned the base, since task vectors are nearly orthogonal (" in ended.out
    assert f"warning: merge: the merge equals {tmp_path}/base, bit for bit" in ended.out
    assert "model_stock returned the base" in (tmp_path / "out" / "README.md").read_text()


def test_a_model_stock_of_like_task_vectors_is_a_merge(merge: Merge):
    ended = merge("model_stock", [lambda x: torch.ones_like(x), lambda x: torch.full_like(x, 2)])
    assert ended.code == 0 and "warning" not in ended.out


@pytest.mark.parametrize(("size", "said"), [(2.0**-12, True), (1.0, False)])
def test_sce_of_short_task_vectors_is_said_to_weigh_all_alike(merge: Merge, size: float, said: bool):
    deltas = [lambda x, k=k: torch.full_like(x, k * size) for k in (1, 2)]  # mean squares 2⁻²⁴ and 2⁻²²: below 10⁻⁶
    ended = merge("sce", deltas)
    assert ended.code == 0
    assert ("sce gave all models the same weight, since task vectors are short" in ended.out) == said


def test_a_change_that_rounding_loses_is_said(merge: Merge, tmp_path: Path):
    ended = merge("task_arithmetic", [torch.ones_like], weight=1e-9)
    assert f"warning: merge: the merge equals {tmp_path}/base, bit for bit" in ended.out


def test_a_plain_copy_is_what_was_asked_for(merge: Merge):
    ended = merge("task_arithmetic", [torch.ones_like], weight=0)
    assert ended.code == 0 and "warning" not in ended.out

"""Files of several documents through `mergekit-multi` and through mergeyard: the same weights, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orchestrator.cli import main
from tests.conformance.oracle import Oracle
from tests.orchestrator.models import load_model, weights, write_adapter, write_model

pytestmark = pytest.mark.oracle

ANY_ORDER = """
merge_method: task_arithmetic
base_model: first
models: [{model: organisation/second, parameters: {weight: 0.5}}]
dtype: bfloat16
---
name: organisation/second
merge_method: slerp
base_model: first
models: [{model: PARENTS/cos}]
parameters: {t: [0.25, 0.75]}
dtype: float32
---
name: first
merge_method: linear
models:
- {model: PARENTS/cos, parameters: {weight: 0.25}}
- {model: PARENTS/fmt, parameters: {weight: 0.75}}
dtype: bfloat16
out_dtype: float32
"""
ALL_NAMED = """
name: step-1
merge_method: ties
base_model: PARENTS/base
models:
- {model: PARENTS/cos, parameters: {weight: 0.5, density: 1}}
- {model: PARENTS/fmt, parameters: {weight: 0.25, density: 1}}
dtype: bfloat16
---
name: result
merge_method: linear
models:
- {model: step-1, parameters: {weight: 0.5}}
- {model: PARENTS/fmt, parameters: {weight: 0.5}}
dtype: bfloat16
"""
SEVERAL = """
name: near
merge_method: linear
models: [{model: half, parameters: {weight: 0.75}}, {model: PARENTS/fmt, parameters: {weight: 0.25}}]
dtype: bfloat16
---
name: half
merge_method: linear
models: [{model: PARENTS/cos}, {model: PARENTS/fmt}]
parameters: {weight: 0.5}
dtype: bfloat16
---
name: far
merge_method: slerp
base_model: half
models: [{model: PARENTS/cos}]
parameters: {t: 0.25}
dtype: bfloat16
"""
ADAPTED = """
name: half
merge_method: linear
models: [{model: PARENTS/cos}, {model: PARENTS/fmt}]
parameters: {weight: 0.5}
dtype: float32
---
merge_method: task_arithmetic
base_model: PARENTS/base
models:
- {model: half+PARENTS/lora, parameters: {weight: 0.75}}
- {model: half, parameters: {weight: 0.25}}
dtype: float32
"""


def test_documents_that_feed_each_other_give_the_weights_of_mergekit_multi(oracle: Oracle, tmp_path: Path) -> None:
    for who in ("base", "cos", "fmt"):
        write_model(tmp_path / who, weights(who))
    generator = torch.Generator().manual_seed(0)
    parts = {
        f"model.layers.{layer}.mlp.down_proj.lora_{key}.weight": 0.1 * torch.randn(shape, generator=generator)
        for layer in range(2)
        for key, shape in (("A", (2, 32)), ("B", (16, 2)))
    }
    write_adapter(tmp_path / "lora", parts, target_modules=["down_proj"])
    ours = {"any-order": ANY_ORDER, "all-named": ALL_NAMED, "several": SEVERAL, "adapted": ADAPTED}
    for name, text in ours.items():
        file = tmp_path / f"{name}.yml"
        file.write_text(text.replace("PARENTS", str(tmp_path)))
        assert main(["merge", str(file), str(tmp_path / f"our-{name}"), "--numerics", "mergekit", "--quiet"]) == 0
    files = {name: tmp_path / f"{name}.yml" for name in ours}
    files["repeated"] = tmp_path / "our-any-order" / "mergekit_config.yml"
    for name, file in files.items():
        out = str(tmp_path / f"their-{name}")
        folders = ["--out-path", out, "--intermediate-dir", f"{out}-stages", "--lora-merge-cache", f"{out}-adapted"]
        oracle.ask("program", name="multimerge", arguments=[str(file), *folders, "--quiet"])
    same = {
        "our-any-order": ("their-any-order", "their-repeated"),
        "our-all-named": ("their-all-named-stages/result",),
        "our-several/near": ("their-several-stages/near",),
        "our-several/far": ("their-several-stages/far",),
    }
    for our, their in [(our, their) for our, theirs in same.items() for their in theirs]:
        expected, found = load_model(tmp_path / their), load_model(tmp_path / our)
        assert expected.keys() == found.keys()
        assert all(expected[key].equal(found[key]) for key in expected), their
    expected, found = load_model(tmp_path / "their-adapted"), load_model(tmp_path / "our-adapted")
    plain = load_model(tmp_path / "their-adapted-stages" / "half")
    assert expected.keys() == found.keys() == plain.keys()
    for key in expected:  # PEFT rounds B·A, ours is exact before its one rounding
        torch.testing.assert_close(found[key], expected[key], rtol=1e-6, atol=1e-7)
    changed = "model.layers.1.mlp.down_proj.weight"
    assert (expected[changed] - plain[changed]).abs().max() > 0.01

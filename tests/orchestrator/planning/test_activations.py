"""AIM in a job: points over ω equal the paper's equation, their keys follow the statistics, and others are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from jobs.errors import BadInput
from orchestrator.planning.plan import Plan
from tests.orchestrator.models import EMBEDDINGS, HEAD, HIDDEN, weights, write_model
from workers.checkpoints.activations import activations_bytes
from workers.merging.resident import ResidentParents

Mergeyard = Callable[..., Any]
Planning = Callable[..., Plan]

RECIPE = """
  merge_method: task_arithmetic
  base_model: base
  models:
  - {{model: cos, parameters: {{weight: 0.5}}}}
  - {{model: fmt, parameters: {{weight: 0.25}}}}
  # model: base
  dtype: {dtype}
  aim: {{statistics: {file}, omega: {omega}}}
"""


def random_means(**more: tuple[int, ...]) -> dict[str, NDArray[np.float32]]:
    """Statistics of the base, of one channel each where its tensor is a matrix; none of embeddings and biases."""
    rng = np.random.default_rng(3)
    shapes = {
        name: (1, tensor.shape[1]) if tensor.ndim == 2 else tuple(tensor.shape)
        for name, tensor in weights("base").items()
        if name != EMBEDDINGS and not name.endswith("bias")
    }
    return {name: rng.exponential(size=shape).astype(np.float32) for name, shape in (shapes | more).items()}


@pytest.fixture
def statistics(tmp_path: Path) -> Path:
    (tmp_path / "aim.safetensors").write_bytes(activations_bytes(random_means(), {}))
    return tmp_path / "aim.safetensors"


def recipe(file: object, omega: str = "${omega}", dtype: str = "float32") -> str:
    return RECIPE.format(file=file, omega=json.dumps(omega), dtype=dtype)


def by_the_paper(means: Mapping[str, NDArray[np.float32]], omega: float) -> dict[str, NDArray[np.float64]]:
    base, cos, fmt = ({n: t.double().numpy() for n, t in weights(who).items()} for who in ("base", "cos", "fmt"))
    found: dict[str, NDArray[np.float64]] = {}
    for name, at in base.items():
        step = 0.5 * (cos[name] - at) + 0.25 * (fmt[name] - at)
        a = means[name] / means[name].max() if name in means else 0.0
        found[name] = at + step * (1 - a * (1 - omega))
    return found


@pytest.mark.parametrize("numerics", ["float32", "mergekit"])
def test_every_omega_of_a_grid_has_the_weights_of_the_paper(
    job_text: Callable[..., str], parents: Path, statistics: Path, tmp_path: Path, mergeyard: Mergeyard, numerics: str
):
    text = job_text(grid="{omega: [0, 0.4, 1]}", recipe=recipe(statistics.name), numerics=numerics)
    (tmp_path / "job.yaml").write_text(text)
    ended = mergeyard("run", tmp_path / "job.yaml", "--in-process")
    assert ended.code == 0, ended.err
    for omega in (0, 0.4, 1):
        folder = tmp_path / "runs" / "soup" / "points" / f"omega{omega:g}"
        merged, expected = load_file(folder / "model.safetensors"), by_the_paper(random_means(), omega)
        assert merged.keys() == expected.keys()
        for name, values in expected.items():
            assert merged[name].numpy() == pytest.approx(values, rel=1e-6, abs=1e-7), (omega, name)
        for document in ("mergekit_config.yml", "README.md"):
            assert f"aim:\n  statistics: aim.safetensors\n  omega: {omega:g}\n" in (folder / document).read_text()
    again = mergeyard("run", tmp_path / "job.yaml", "--in-process", "--json")
    assert again.code == 0, again.err
    assert again.facts["units_merged"] == 0
    assert f"statistics: {statistics}" in (tmp_path / "runs" / "soup" / "job.yaml").read_text()


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "nuslerp", "model_stock"])
def test_a_resident_point_is_the_written_one(
    plan: Planning, statistics: Path, tmp_path: Path, mergeyard: Mergeyard, method: str
):
    document = recipe(statistics, "0.3", "bfloat16").replace("task_arithmetic", method)
    if method == "model_stock":
        document = document.replace(", parameters: {weight: 0.5}", "").replace(", parameters: {weight: 0.25}", "")
    planned = plan(grid="", recipe=document)
    layout = planned.points[0].layout
    assert layout.activations is not None
    resident = ResidentParents(
        [tensor for shard in layout.shards for tensor in shard.tensors],
        {name: checkpoint.parent for name, checkpoint in planned.parents.items()},
        seed=0,
        numerics="float32",
        activations=layout.activations.parent,
    )
    (tmp_path / "job.yaml").write_text(planned.job_text())
    assert mergeyard("run", tmp_path / "job.yaml", "--in-process").code == 0
    [point] = (tmp_path / "runs" / "soup" / "points").iterdir()
    written = load_file(point / "model.safetensors")
    for name, tensor in resident.merged(planned.points[0].settings):
        assert torch.equal(tensor, written[name]), name


def test_keys_follow_the_content_of_the_statistics(plan: Planning, statistics: Path, tmp_path: Path):
    def keys(file: object) -> list[str]:
        return [point.digest for point in plan(grid="{omega: [0.4, 1]}", recipe=recipe(file)).points]

    before, whole = keys(statistics)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(statistics.read_bytes())
    assert keys(copy) == [before, whole]
    assert keys(f"file://{copy}") == [before, whole]
    copy.write_bytes(activations_bytes({name: 2 * values for name, values in random_means().items()}, {}))
    other, still_whole = keys(copy)
    assert other != before
    assert still_whole == whole
    without = recipe(copy).split("  aim:")[0]
    assert plan(grid="", recipe=without).points[0].digest == whole


def test_a_head_has_its_own_statistics_and_tied_embeddings_have_none(plan: Planning, parents: Path, statistics: Path):
    statistics.write_bytes(activations_bytes(random_means(**{HEAD: (1, HIDDEN)}), {}))
    tied = plan(grid="", recipe=recipe(statistics, "0.4")).points[0].layout
    assert {tensor.name for shard in tied.shards for tensor in shard.tensors if not tensor.activations} == {
        EMBEDDINGS,
        *(name for name in weights("base") if name.endswith("bias")),
    }
    for who in ("cos", "fmt"):
        write_model(parents / who, weights(who, tied=False))
    untied = plan(grid="", recipe=recipe(statistics, "0.4"), config_from="cos").points[0].layout
    [head] = [tensor for shard in untied.shards for tensor in shard.tensors if tensor.name == HEAD]
    assert head.activations == HEAD


def test_the_plan_names_tensors_that_are_left_or_overshadowed(plan: Planning, statistics: Path):
    means = random_means()
    del means["model.layers.0.mlp.up_proj.weight"]
    means["model.layers.1.mlp.down_proj.weight"][0, 5] = 5000
    statistics.write_bytes(activations_bytes(means, {}))
    assert [remark for remark in plan(grid="", recipe=recipe(statistics, "0.4")).remarks if "aim" in remark] == [
        "aim: no statistics of model.layers.0.mlp.up_proj.weight; they are merged without it",
        "aim: one activation is so large that it hardly changes the other channels of"
        " model.layers.1.mlp.down_proj.weight",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": (HIDDEN + 1,)}, r"the statistics of model.norm.weight are \[17\] and the tensor \[16\]"),
        ({"model.layers.0.mlp.down_proj.weight": (1, 16)}, r"are \[1, 16\] and the tensor \[16, 32\]"),
        ({"model.layers.9.mlp.down_proj.weight": (1, 32)}, "model.layers.9.mlp.down_proj.weight is not a tensor of b"),
    ],
)
def test_statistics_of_another_model_are_refused(
    plan: Planning, statistics: Path, change: dict[str, tuple[int, ...]], message: str
):
    statistics.write_bytes(activations_bytes(random_means(**change), {}))
    with pytest.raises(
        BadInput, match=message + ".*give the statistics of base: `mergeyard measure --what means` writes them$"
    ):
        plan(grid="", recipe=recipe(statistics, "0.4"))


def test_other_files_than_statistics_are_refused(plan: Planning, parents: Path, tmp_path: Path):
    for file, message in (
        (
            parents / "base" / "model.safetensors",
            "is BF16, activations are F32; give a file of `mergeyard measure --what means`",
        ),
        (
            tmp_path / "no.safetensors",
            "no.safetensors does not exist; `mergeyard measure --what means` writes such a file",
        ),
        (parents / "base", "a file of statistics ends in .safetensors; give its whole path"),
    ):
        with pytest.raises(BadInput, match=f"^job.yaml:14: .*{message}"):
            plan(grid="", recipe=recipe(file, "0.4"))


@pytest.mark.parametrize("method", ["linear", "slerp", "nuslerp"])
def test_a_method_without_task_vectors_is_refused(plan: Planning, statistics: Path, method: str):
    document = recipe(statistics, "0.4").replace("task_arithmetic", method)
    document = document.replace(", parameters: {weight: 0.5}", "").replace(", parameters: {weight: 0.25}", "")
    if method == "nuslerp":
        document = document.replace("  base_model: base\n", "").replace("# model: base", "")
    with pytest.raises(BadInput, match=f"aim shrinks task vectors, and {method} has none here; .*or take `aim` out"):
        plan(grid="", recipe=document)


SLICES = """
  merge_method: task_arithmetic
  base_model: base
  slices:
  - sources: [{{model: base, layer_range: [0, 2]}}, {{model: cos, layer_range: [0, 2], parameters: {{weight: 1}}}}]
  - sources: [{{model: base, layer_range: [1, 2]}}, {{model: fmt, layer_range: [1, 2], parameters: {{weight: 1}}}}]
    {base}
  aim: {{statistics: {file}}}
"""


def test_slices_have_the_statistics_of_the_layers_that_they_come_from(plan: Planning, statistics: Path):
    layout = plan(grid="", recipe=SLICES.format(file=statistics, base="")).points[0].layout
    named = {tensor.name: tensor.activations for shard in layout.shards for tensor in shard.tensors}
    assert named["model.layers.2.mlp.down_proj.weight"] == "model.layers.1.mlp.down_proj.weight"
    assert named["model.layers.1.mlp.down_proj.weight"] == "model.layers.1.mlp.down_proj.weight"
    assert named["model.layers.2.self_attn.q_proj.bias"] is None


def test_parts_with_bases_of_their_own_are_refused(plan: Planning, statistics: Path):
    with pytest.raises(
        BadInput, match="aim has the statistics of one base; give all parts one `base_model`, beside `a"
    ):
        plan(grid="", recipe=SLICES.format(file=statistics, base="base_model: cos"))


@pytest.mark.parametrize("omega", ["1.5", "-0.1", "much", "true"])
def test_an_omega_outside_its_range_is_refused(plan: Planning, statistics: Path, omega: str):
    with pytest.raises(BadInput, match="omega"):
        plan(grid="", recipe=recipe(statistics, omega))

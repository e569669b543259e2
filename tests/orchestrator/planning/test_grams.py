"""regmean in a job: points equal the formula in numpy, their keys follow the matrices, and other files are refused."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from jobs.errors import BadInput, CorruptData
from orchestrator.planning.plan import Plan
from orchestrator.words import count, duration, size
from tests.orchestrator.models import HIDDEN, INTERMEDIATE, LAYERS, weights
from workers.checkpoints.grams import open_grams, read_gram, write_grams
from workers.checkpoints.safetensors import header_bytes
from workers.merging.resident import ResidentParents
from workers.storage import open_store

Mergeyard = Callable[..., Any]
Planning = Callable[..., Plan]
Blocks = NDArray[np.float32]

RECIPE = """
  merge_method: "${method}"
  models:
  - {model: cos, parameters: {weight: "${w}"}}
  - {model: fmt, parameters: {weight: "${1 - w}"}}
  grams: {cos: cos.safetensors, fmt: fmt.safetensors}
  dtype: float32
"""
REGMEAN = RECIPE.replace('"${method}"', "regmean")


def grams(who: str, *, blocks: int = 2) -> dict[tuple[str, ...], Blocks]:
    """Matrices of all linear layers; of the widest inputs in blocks."""
    rng = np.random.default_rng(zlib.crc32(who.encode()))

    def gram(channels: int, parts: int = 1) -> Blocks:
        size = channels // parts
        inputs = rng.standard_normal((parts, 60, size)) * rng.exponential(size=(1, 1, size))
        return (np.swapaxes(inputs, 1, 2) @ inputs / 60).astype(np.float32)

    found: dict[tuple[str, ...], Blocks] = {}
    for layer in (f"model.layers.{number}" for number in range(LAYERS)):
        found[tuple(f"{layer}.self_attn.{key}_proj.weight" for key in "kqv")] = gram(HIDDEN)
        found[(f"{layer}.self_attn.o_proj.weight",)] = gram(HIDDEN)
        found[f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight"] = gram(HIDDEN)
        found[(f"{layer}.mlp.down_proj.weight",)] = gram(INTERMEDIATE, blocks)
    return found


def write(file: Path, content: dict[tuple[str, ...], Blocks]) -> None:
    file.unlink(missing_ok=True)
    write_grams(open_store(str(file.parent)), file.name, sorted(content.items()), {})


@pytest.fixture
def files(tmp_path: Path, parents: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of both models, beside the job."""
    monkeypatch.chdir(tmp_path)
    for who in ("cos", "fmt"):
        write(tmp_path / f"{who}.safetensors", grams(who))
    return tmp_path


def by_the_formula(w: float, alpha: float = 0.9) -> dict[str, NDArray[np.float64]]:
    """W = (Σ wᵢG̃ᵢ)⁻¹ Σ wᵢG̃ᵢWᵢᵀ of arXiv 2212.09849, transposed; the mean of other tensors."""
    shares = {"cos": w, "fmt": 1 - w}
    models = {who: {name: each.double().numpy() for name, each in weights(who).items()} for who in shares}
    found = {name: w * models["cos"][name] + (1 - w) * models["fmt"][name] for name in models["cos"]}
    of_model = {who: {name: gram for names, gram in grams(who).items() for name in names} for who in shares}
    for name in of_model["cos"]:
        for block, part in enumerate(np.split(np.arange(found[name].shape[1]), len(of_model["cos"][name]))):
            reduced: dict[str, NDArray[np.float64]] = {}
            for who, share in shares.items():
                gram = of_model[who][name][block].astype(np.float64)
                reduced[who] = share * (alpha * gram + (1 - alpha) * np.diag(np.diag(gram)))
            right = sum(reduced[who] @ models[who][name][:, part].T for who in shares)
            found[name][:, part] = np.linalg.solve(reduced["cos"] + reduced["fmt"], right).T
    return found


def test_every_point_of_a_grid_has_the_weights_of_the_formula(
    job_text: Callable[..., str], files: Path, mergeyard: Mergeyard
):
    text = job_text(grid="{method: [linear, regmean], w: [0.25, 0.5]}", recipe=RECIPE)
    (files / "job.yaml").write_text(text)
    ended = mergeyard("run", files / "job.yaml", "--in-process", "--json")
    assert ended.code == 0, ended.err
    parents = 2 * sum(each.nbytes for each in weights("cos").values())
    assert ended.facts["bytes_read"] < 1.2 * parents  # once for all points
    for w in (0.25, 0.5):
        folder = files / "runs" / "soup" / "points" / f"method=regmean_w{w:g}"
        merged, expected = load_file(folder / "model.safetensors"), by_the_formula(w)
        assert merged.keys() == expected.keys()
        for name, values in expected.items():
            assert merged[name].numpy() == pytest.approx(values, rel=1e-5, abs=1e-6), (w, name)
        assert (
            "grams:\n  cos: cos.safetensors\n  fmt: fmt.safetensors\n" in (folder / "mergekit_config.yml").read_text()
        )
    again = mergeyard("run", files / "job.yaml", "--in-process", "--json")
    assert again.code == 0, again.err
    assert again.facts["units_merged"] == 0
    assert f"cos: {files}/cos.safetensors" in (files / "runs" / "soup" / "job.yaml").read_text()
    assert mergeyard("verify", files / "runs" / "soup").code == 0


@pytest.mark.parametrize("numerics", ["float32", "mergekit"])
def test_a_resident_point_is_the_written_one(plan: Planning, files: Path, mergeyard: Mergeyard, numerics: str):
    document = REGMEAN.replace("${w}", "0.3").replace("${1 - w}", "0.7").replace("float32", "bfloat16")
    planned = plan(grid="", recipe=document, numerics=numerics)
    layout = planned.points[0].layout
    resident = ResidentParents(
        [tensor for shard in layout.shards for tensor in shard.tensors],
        {name: checkpoint.parent for name, checkpoint in planned.parents.items()},
        seed=0,
        numerics=numerics,
        grams={name: file.parent for name, file in layout.grams.items()},
    )
    (files / "job.yaml").write_text(planned.job_text())
    assert mergeyard("run", files / "job.yaml", "--in-process").code == 0
    [point] = (files / "runs" / "soup" / "points").iterdir()
    written = load_file(point / "model.safetensors")
    for name, tensor in resident.merged(planned.points[0].settings):
        assert torch.equal(tensor, written[name]), name


def test_keys_follow_the_matrices_of_the_models_that_are_merged_by_them(plan: Planning, files: Path):
    def keys() -> list[str]:
        grid = "{method: [linear, regmean], w: [0, 0.5]}"
        return [point.digest for point in plan(grid=grid, recipe=RECIPE).points]

    before = keys()
    assert before[0] == before[2]  # weight 0: both are fmt
    assert before == [point.digest for point in plan(grid="{w: [0, 0.5]}", recipe=_linear()).points] + before[2:]
    moved = files / "elsewhere.safetensors"
    (files / "cos.safetensors").rename(moved)
    assert keys_of(plan, RECIPE.replace("cos.safetensors", f"file://{moved}")) == before
    moved.rename(files / "cos.safetensors")
    write(files / "cos.safetensors", {name: 2 * gram for name, gram in grams("cos").items()})
    after = keys()
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, True, True, False]


def _linear() -> str:
    return RECIPE.replace('"${method}"', "linear").replace(
        "  grams: {cos: cos.safetensors, fmt: fmt.safetensors}\n", ""
    )


def keys_of(plan: Planning, recipe: str) -> list[str]:
    return [point.digest for point in plan(grid="{method: [linear, regmean], w: [0, 0.5]}", recipe=recipe).points]


def test_the_plan_names_matrices_without_statistics(plan: Planning, files: Path):
    content = grams("cos")
    del content[("model.layers.1.self_attn.o_proj.weight",)]
    write(files / "cos.safetensors", content)
    assert [remark for remark in plan(recipe=REGMEAN).remarks if "grams" in remark][1:] == [
        "grams: none for model.layers.1.self_attn.o_proj.weight; regmean takes their weighted mean"
    ]


def test_the_plan_states_the_bytes_and_the_arithmetic_of_the_matrices(plan: Planning, files: Path):
    stored = sum(matrix.nbytes for who in ("cos", "fmt") for matrix in grams(who).values())
    half, ways = INTERMEDIATE // 2, 1 / 3 + 2 * 2  # a factor, and a solution for each of two models
    solved = LAYERS * (3 * HIDDEN**3 + 2 * half**3) * ways
    shapes = {name: each.shape for name, each in weights("cos").items() if name.endswith("_proj.weight")}
    products = sum(2 * rows * channels * min(channels, max(HIDDEN, half)) for rows, channels in shapes.values())
    assert [remark for remark in plan(recipe=REGMEAN).remarks if "grams" in remark] == [
        f"grams: {size(stored)} of matrices; a point of regmean takes {count(solved + products)} operations, about"
        f" {duration(solved / 20e9 + products / 30e9)} of one CPU"
    ]


def test_a_model_of_weight_0_needs_no_matrix(plan: Planning, files: Path):
    """Its file is not in the key of the point, which so may not depend on it."""
    content = grams("cos")
    del content[("model.layers.1.self_attn.o_proj.weight",)]
    write(files / "cos.safetensors", content)
    tensors = [each for shard in plan(recipe=REGMEAN).points[0].layout.shards for each in shard.tensors]
    [lacking] = [each for each in tensors if each.name == "model.layers.1.self_attn.o_proj.weight"]
    assert lacking.grams.keys() == {"fmt"}


def test_files_that_do_not_fit_are_refused(plan: Planning, files: Path, parents: Path):
    write(files / "cos.safetensors", grams("cos", blocks=1))
    with pytest.raises(
        BadInput, match=r"down_proj.weight are \[1, 32, 32\] for cos and \[2, 16, 16\] for fmt; measure"
    ):
        plan(recipe=REGMEAN)
    write(files / "cos.safetensors", {("model.layers.7.mlp.up_proj.weight",): np.ones((1, 16, 16), np.float32)})
    with pytest.raises(BadInput, match=r"cos.safetensors: model.layers.7.mlp.up_proj.weight is not a tensor of cos; g"):
        plan(recipe=REGMEAN)
    name = ("model.layers.1.mlp.up_proj.weight",)
    for who in ("cos", "fmt"):
        write(files / f"{who}.safetensors", {name: np.ones((1, 8, 8), np.float32)})
    with pytest.raises(BadInput, match=r"is \[1, 8, 8\] and the tensor \[32, 16\]; give the Gram matrices of cos"):
        plan(recipe=REGMEAN)
    shape = np.ones((1, 64, 64), np.float32)  # as of a wider model of the same family
    for who in ("cos", "fmt"):
        write(files / f"{who}.safetensors", {name: shape})
    with pytest.raises(BadInput, match=r"is \[1, 64, 64\] and the tensor \[32, 16\]; give the Gram matrices of cos"):
        plan(recipe=REGMEAN)
    damaged = header_bytes([("w", "F32", (1, 1, 1))], {"digests": "[]"}) + bytes(4)
    (files / "cos.safetensors").write_bytes(damaged)
    with pytest.raises(BadInput, match=r"cos.safetensors: its digests are not a JSON object; give a file of `mergeyar"):
        plan(recipe=REGMEAN)
    (files / "cos.safetensors").write_bytes((parents / "cos" / "model.safetensors").read_bytes())
    with pytest.raises(BadInput, match=r"is not a Gram matrix with its digest; give a file of `mergeyard measure`"):
        plan(recipe=REGMEAN)
    (files / "cos.safetensors").unlink()
    with pytest.raises(BadInput, match=r"^job.yaml:\d+: .*does not exist; `mergeyard measure` writes such a file"):
        plan(recipe=REGMEAN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("fmt: fmt.safetensors", "cos2: fmt.safetensors"),
            '"cos2" is not in `parents:`; did you mean "cos"?',
        ),
        ((", fmt: fmt.safetensors", ""), "regmean needs the Gram matrices of fmt; write the file by"),
        (("{cos: cos.safetensors, fmt: fmt.safetensors}", "{}"), "`grams:` names a file for each model, such as"),
        (("${w}", "-0.5"), "the weights -0.5, 0.75 at tensor .* must not be negative, nor all be zero"),
        (("dtype: float32", "parameters: {alpha: 1.5}"), r"alpha 1.5 at tensor .* is outside \[0, 1\]"),
    ],
)
def test_wrong_recipes_are_refused(plan: Planning, files: Path, change: tuple[str, str], message: str):
    with pytest.raises(BadInput, match=message):
        plan(grid="{w: [0.25]}", recipe=REGMEAN.replace(*change))


def test_a_stage_with_matrices_is_refused(plan: Planning, files: Path):
    stage = REGMEAN.replace("\n  merge_method", "\n- name: half\n  merge_method", 1)
    last = "- merge_method: linear\n  models: [{model: half, parameters: {weight: 1}}]\n"
    with pytest.raises(BadInput, match=r'a merge that feeds another has no `grams:`; write "half" first, and name the'):
        plan(grid="{w: [0.25]}", recipe=stage + last)


def test_a_damaged_matrix_ends_the_merge(files: Path):
    file = open_grams(str(files / "cos.safetensors"))
    [gram] = {gram for name, gram in file.tensors.items() if name == "model.layers.0.self_attn.q_proj.weight"}
    assert gram is file.tensors["model.layers.0.self_attn.k_proj.weight"]
    data = bytearray((files / "cos.safetensors").read_bytes())
    data[gram.start] ^= 1
    (files / "cos.safetensors").write_bytes(data)
    with pytest.raises(CorruptData, match=r"q_proj.weight .* is damaged; fetch the file again, or measure again"):
        read_gram(open_grams(str(files / "cos.safetensors")).parent, gram)


def test_a_matrix_with_nan_ends_the_merge(files: Path):
    write(files / "nan.safetensors", {("w",): np.full((1, 2, 2), np.nan, np.float32)})
    file = open_grams(str(files / "nan.safetensors"))
    with pytest.raises(CorruptData, match=r"nan.safetensors: w has NaN or infinite elements; measure again"):
        read_gram(file.parent, file.tensors["w"])

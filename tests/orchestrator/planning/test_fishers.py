"""fisher in a job: points equal the paper's equation, their keys follow the files, and other files are refused."""

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

from jobs.errors import BadInput
from orchestrator.planning.plan import Plan
from orchestrator.planning.sharing import families
from orchestrator.words import size
from tests.orchestrator.models import weights
from workers.checkpoints.fishers import open_fisher, write_fisher
from workers.merging.resident import ResidentParents
from workers.storage import open_store

Mergeyard = Callable[..., Any]
Planning = Callable[..., Plan]
Squares = dict[str, NDArray[np.float32]]

RECIPE = """
  merge_method: "${method}"
  models:
  - {model: cos, parameters: {weight: "${w}"}}
  - {model: fmt, parameters: {weight: "${1 - w}"}}
  fisher: {cos: cos.safetensors, fmt: fmt.safetensors}
  dtype: float32
"""
FISHER = RECIPE.replace('"${method}"', "fisher")
NORM = "model.norm.weight"


def squares(who: str) -> Squares:
    """Of all tensors but one, over many orders of magnitude."""
    rng = np.random.default_rng(zlib.crc32(who.encode()))
    return {
        name: (10.0 ** rng.uniform(-14, -8, tuple(each.shape))).astype(np.float32)
        for name, each in weights(who).items()
        if name != NORM
    }


def write(file: Path, content: Squares) -> None:
    file.unlink(missing_ok=True)
    write_fisher(open_store(str(file.parent)), file.name, content, {})


@pytest.fixture
def files(tmp_path: Path, parents: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of both models, beside the job."""
    monkeypatch.chdir(tmp_path)
    for who in ("cos", "fmt"):
        write(tmp_path / f"{who}.safetensors", squares(who))
    return tmp_path


def by_the_equation(w: float) -> dict[str, NDArray[np.float64]]:
    """Σ wᵢFᵢWᵢ / Σ wᵢFᵢ of arXiv 2111.09832, F at least 10⁻⁶ of its mean; the mean of the tensor without F."""
    shares, found = {"cos": w, "fmt": 1 - w}, {}
    of_model = {who: squares(who) for who in shares}
    for name in weights("cos"):
        fishers = {who: of_model[who].get(name, np.ones(1)).astype(np.float64) for who in shares}
        floor = 1e-6 * np.mean([each.mean() for each in fishers.values()])
        parts = {who: shares[who] * np.maximum(each, floor) for who, each in fishers.items()}
        found[name] = sum(parts[who] * weights(who)[name].double().numpy() for who in shares) / sum(parts.values())
    return found


def test_every_point_of_a_grid_has_the_weights_of_the_equation(
    job_text: Callable[..., str], files: Path, mergeyard: Mergeyard
):
    text = job_text(grid="{method: [linear, fisher], w: [0.25, 0.5]}", recipe=RECIPE)
    (files / "job.yaml").write_text(text)
    ended = mergeyard("run", files / "job.yaml", "--in-process", "--json")
    assert ended.code == 0, ended.err
    stored = sum(
        each.nbytes + 4 * each.numel() * (name != NORM) for who in "ab" for name, each in weights("cos").items()
    )
    assert ended.facts["bytes_read"] < 1.2 * stored  # once for all points
    for w in (0.25, 0.5):
        folder = files / "runs" / "soup" / "points" / f"method=fisher_w{w:g}"
        merged, expected = load_file(folder / "model.safetensors"), by_the_equation(w)
        assert merged.keys() == expected.keys()
        for name, values in expected.items():
            assert merged[name].numpy() == pytest.approx(values, rel=1e-5, abs=1e-6), (w, name)
        document = (folder / "mergekit_config.yml").read_text()
        assert "fisher:\n  cos: cos.safetensors\n  fmt: fmt.safetensors\n" in document
    again = mergeyard("run", files / "job.yaml", "--in-process", "--json")
    assert again.code == 0, again.err
    assert again.facts["units_merged"] == 0
    assert f"cos: {files}/cos.safetensors" in (files / "runs" / "soup" / "job.yaml").read_text()
    assert mergeyard("verify", files / "runs" / "soup").code == 0


@pytest.mark.parametrize("numerics", ["float32", "mergekit"])
def test_a_resident_point_is_the_written_one(plan: Planning, files: Path, mergeyard: Mergeyard, numerics: str):
    document = FISHER.replace("${w}", "0.3").replace("${1 - w}", "0.7").replace("float32", "bfloat16")
    planned = plan(grid="", recipe=document, numerics=numerics)
    [family] = families([planned.points[0].layout], 8).values()
    resident = ResidentParents(
        [tensor for shard in family.shards for tensor in shard.tensors],
        {name: checkpoint.parent for name, checkpoint in planned.parents.items()} | family.fishers,
        seed=0,
        numerics=numerics,
    )
    (files / "job.yaml").write_text(planned.job_text())
    assert mergeyard("run", files / "job.yaml", "--in-process").code == 0
    [point] = (files / "runs" / "soup" / "points").iterdir()
    written = load_file(point / "model.safetensors")
    for name, tensor in resident.merged(planned.points[0].settings):
        assert torch.equal(tensor, written[name]), name


def test_keys_follow_the_information_of_the_models_that_are_merged_by_it(plan: Planning, files: Path):
    def keys(recipe: str = RECIPE) -> list[str]:
        return [point.digest for point in plan(grid="{method: [linear, fisher], w: [0, 0.5]}", recipe=recipe).points]

    before = keys()
    assert before[0] == before[2]  # weight 0: both are fmt
    plain = RECIPE.replace('"${method}"', "linear").replace(
        "  fisher: {cos: cos.safetensors, fmt: fmt.safetensors}\n", ""
    )
    assert before[:2] == [point.digest for point in plan(grid="{w: [0, 0.5]}", recipe=plain).points]
    moved = files / "elsewhere.safetensors"
    (files / "cos.safetensors").rename(moved)
    assert keys(RECIPE.replace("cos.safetensors", f"file://{moved}")) == before
    moved.rename(files / "cos.safetensors")
    write(files / "cos.safetensors", {name: 2 * each for name, each in squares("cos").items()})
    assert [one == other for one, other in zip(before, keys(), strict=True)] == [True, True, True, False]


def test_the_plan_states_the_bytes_and_names_tensors_without_information(plan: Planning, files: Path):
    stored = sum(each.nbytes for who in ("cos", "fmt") for each in squares(who).values())
    assert [remark for remark in plan(recipe=FISHER).remarks if "fisher" in remark] == [
        f"fisher: {size(stored)} of Fisher information, read once for all points",
        f"fisher: none for {NORM}; fisher takes their weighted mean",
    ]


def test_files_that_do_not_fit_are_refused(plan: Planning, files: Path, parents: Path):
    write(files / "cos.safetensors", {"model.layers.7.mlp.up_proj.weight": np.ones((16, 16), np.float32)})
    with pytest.raises(BadInput, match=r"cos.safetensors: model.layers.7.mlp.up_proj.weight is not a tensor of cos; g"):
        plan(recipe=FISHER)
    write(files / "cos.safetensors", {"model.layers.1.mlp.up_proj.weight": np.ones((64, 64), np.float32)})
    with pytest.raises(
        BadInput, match=r"is \[64, 64\] and the tensor \[32, 16\]; give the Fisher information of cos: `"
    ):
        plan(recipe=FISHER)
    (files / "cos.safetensors").write_bytes((parents / "cos" / "model.safetensors").read_bytes())
    with pytest.raises(BadInput, match=r"is not Fisher information with its digest and its mean; give a file of `merg"):
        plan(recipe=FISHER)
    (files / "cos.safetensors").unlink()
    with pytest.raises(
        BadInput, match=r"^job.yaml:\d+: .*does not exist; `mergeyard measure --what fisher` writes such"
    ):
        plan(recipe=FISHER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("fmt: fmt.safetensors", "cos2: fmt.safetensors"), '"cos2" is not in `parents:`; did you mean "cos"?'),
        ((", fmt: fmt.safetensors", ""), "fisher needs the Fisher information of fmt; write the"),
        (("{cos: cos.safetensors, fmt: fmt.safetensors}", "{}"), "`fisher:` names a file for each model, such as"),
        (("${w}", "-0.5"), "the weights -0.5, 0.75 at tensor .* must not be negative, nor all be zero"),
        (("dtype: float32", "parameters: {floor: 0}"), r"floor 0 at tensor .* is outside \[1e-12, 1\]"),
    ],
)
def test_wrong_recipes_are_refused(plan: Planning, files: Path, change: tuple[str, str], message: str):
    with pytest.raises(BadInput, match=message):
        plan(grid="{w: [0.25]}", recipe=FISHER.replace(*change))


def test_a_stage_with_fisher_information_is_refused(plan: Planning, files: Path):
    stage = FISHER.replace("\n  merge_method", "\n- name: half\n  merge_method", 1)
    last = "- merge_method: linear\n  models: [{model: half, parameters: {weight: 1}}]\n"
    with pytest.raises(
        BadInput, match=r'a merge that feeds another has no `fisher:`; write "half" first, and name the'
    ):
        plan(grid="{w: [0.25]}", recipe=stage + last)


def test_damaged_information_ends_the_merge(job_text: Callable[..., str], files: Path, mergeyard: Mergeyard):
    at = open_fisher(str(files / "cos.safetensors")).tensors["model.layers.0.self_attn.q_proj.weight"].at
    data = bytearray((files / "cos.safetensors").read_bytes())
    data[at.start] ^= 1
    (files / "cos.safetensors").write_bytes(data)
    (files / "job.yaml").write_text(job_text(grid="{w: [0.25]}", recipe=FISHER))
    ended = mergeyard("run", files / "job.yaml", "--in-process")
    assert ended.code == 1
    assert "q_proj.weight is damaged; fetch the file again, or measure again" in ended.err

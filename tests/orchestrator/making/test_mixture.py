"""`mergeyard moe`: every tensor of the mixture is one of its models', and the drawn numbers are those of the seed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from orchestrator.making.mixture import Mixer
from tests.orchestrator.conftest import Ended, files_under
from tests.orchestrator.models import LAYERS, load_model

Mergeyard = Callable[..., Ended]


@pytest.fixture
def config(parents: Path, tmp_path: Path) -> Path:
    path = tmp_path / "moe.yml"
    path.write_text(
        f"base_model: {parents}/base\ngate_mode: random\nexperts:\n- source_model: {parents}/cos\n"
        f"- {{source_model: {parents}/fmt, residual_scale: 0.5}}\n"
        f"- {{source_model: {parents}/fmt, noise_scale: 0.5}}\nshared_experts:\n- source_model: {parents}/base\n"
    )
    return path


def test_every_tensor_is_that_of_its_model(mergeyard: Mergeyard, config: Path, parents: Path, tmp_path: Path):
    out = tmp_path / "mixture"
    ended = mergeyard("moe", config, out, "--json", "-q", "--out-shard-size", "10KB")
    assert ended.code == 0, ended.err
    assert (ended.facts["architecture"], ended.facts["experts"]) == ("Qwen MoE", 3)
    base, cos, fmt = (load_model(parents / who) for who in ("base", "cos", "fmt"))
    found = load_model(out)
    assert len(list(out.glob("*.safetensors"))) > 1
    for name, tensor in base.items():
        if ".mlp." not in name:
            assert torch.equal(found.pop(name), tensor)
            continue
        inside = name.replace(".mlp.", ".mlp.{}.")
        assert torch.equal(found.pop(inside.format("experts.0")), cos[name])
        scale = 0.5 if "down_proj" in name else 1
        assert torch.equal(found.pop(inside.format("experts.1")), scale * fmt[name])
        noise = found.pop(inside.format("experts.2")).float() - fmt[name].float()
        assert float(noise.std()) == pytest.approx(0.5, rel=0.15) and abs(float(noise.mean())) < 0.1
        assert torch.equal(found.pop(inside.format("shared_expert")), tensor)
    gates = [found.pop(f"model.layers.{layer}.mlp.gate.weight") for layer in range(LAYERS)]
    assert gates[0].shape == (3, 16) and not torch.equal(*gates)
    assert {found.pop(f"model.layers.{layer}.mlp.shared_expert_gate.weight").shape for layer in range(LAYERS)} == {
        (1, 16)
    }
    assert not found
    assert json.loads((out / "config.json").read_text())["num_experts"] == 3
    assert mergeyard("verify", out).code == 0


def test_the_seed_decides_every_byte(mergeyard: Mergeyard, config: Path, tmp_path: Path):
    for out, seed in (("one", 1), ("two", 1), ("three", 2)):
        assert mergeyard("moe", config, tmp_path / out / "mixture", "-q", "--random-seed", seed).code == 0
    one, two, three = (files_under(tmp_path / out) for out in ("one", "two", "three"))
    assert one == two != three
    again = mergeyard("moe", config, tmp_path / "one" / "mixture", "--random-seed", 1)
    assert again.code == 0 and "is there already" in again.out


def test_an_interruption_leaves_no_model_and_the_same_command_goes_on(
    mergeyard: Mergeyard, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "mixture"
    with monkeypatch.context() as patched:
        patched.setattr(Mixer, "_card", interrupted)
        assert mergeyard("moe", config, out, "-q").code == 75
    assert not {"config.json", "manifest.json"} & files_under(out).keys()
    assert mergeyard("moe", config, out, "-q").code == 0
    assert mergeyard("verify", out).code == 0


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("shared_experts:\n- source_model: PARENTS/base\n", "", "needs one model under `shared_experts:`"),
        ("gate_mode: random", "gate_mode: random\narchitecture: deepseek", "is not made here; choose from Mixtral"),
        ("gate_mode: random", "gate_mode: random\narchitecture: mixtral", "no mixture is made of qwen2 models"),
        ("PARENTS/cos", "PARENTS/nothing", "no folder"),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_is_written(
    mergeyard: Mergeyard, config: Path, parents: Path, tmp_path: Path, old: str, new: str, words: str
):
    changed = config.read_text().replace(old.replace("PARENTS", str(parents)), new.replace("PARENTS", str(parents)))
    assert changed != config.read_text()
    config.write_text(changed)
    ended = mergeyard("moe", config, tmp_path / "out", "-q")
    assert ended.code == 2 and words in ended.err and ended.err.count("\n") == 1, ended.err
    assert not (tmp_path / "out").exists()
